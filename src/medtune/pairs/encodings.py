"""Open a table as text, and say which encoding fits where it is not UTF-8."""

import codecs
import re
from pathlib import Path
from typing import TextIO

from charset_normalizer import from_bytes

# What is left when neither western letters nor pairs of high bytes are seen.
_OTHERS = ["shift_jis", "big5", "cp1251", "gb18030"]
# Signs of western texts below the letters: quotation marks, dashes, degrees, micro, a fixed blank,
# and the letters that Windows has there.
_WESTERN_SIGNS = (
    b"\x80\x84\x85\x91\x92\x93\x94\x95\x96\x97\xa0\xab\xb0\xb1\xb2\xb3\xb5\xb7\xbb"
    b"\x8a\x8c\x8e\x9a\x9c\x9e\x9f"
)
# So many signs tell Korean from Chinese.
_ENOUGH = 8

# How much of a file tells its encoding.
_SAMPLE = 1 << 20

_HIGH_RUN = re.compile(rb"[\x80-\xff]+")


def open_text(path: Path, encoding: str | None, newline: str | None) -> TextIO:
    """Open a table as text; bytes that do not fit come out as U+FFFD, for `reject_reason` to find.

    Parameters
    ----------
    path : Path
        The file.
    encoding : str or None
        Its encoding; None for UTF-8, with or without a byte order mark.
    newline : str or None
        Which signs end a line, as `open` takes it.

    Returns
    -------
    TextIO
        The open file.

    Raises
    ------
    ValueError
        The file as a whole is not in this encoding, or there is no such encoding.
    OSError
        The file cannot be opened.
    """
    check_encoding(path, encoding)
    is_utf8 = encoding is None or codecs.lookup(encoding).name == "utf-8"
    # only this name of UTF-8 takes a byte order mark away
    name = "utf-8-sig" if is_utf8 else encoding
    return open(path, encoding=name, errors="replace", newline=newline)


def check_encoding(path: Path, encoding: str | None) -> None:
    """Raise, once for a file, if all of it is in another encoding than UTF-8.

    Some bytes that do not fit in a file of otherwise good UTF-8 are damage: they spoil their rows
    only.

    Parameters
    ----------
    path : Path
        A file of text.
    encoding : str or None
        The encoding that the caller gave; then only its name is checked.

    Raises
    ------
    ValueError
        With the encoding that fits, as `encoding=NAME`.
    """
    if encoding is not None:
        try:
            codecs.lookup(encoding)
        except LookupError:
            raise ValueError(
                f"no encoding is called {encoding!r}: encoding=gb18030 and encoding=cp1252 are two"
            ) from None
        return
    with open(path, "rb") as file:
        start = file.read(4)
        if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise ValueError(f"{path.name} is not UTF-8 but UTF-16: give encoding=utf-16")
        file.seek(0)
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            while block := file.read(_SAMPLE):
                decoder.decode(block)
            decoder.decode(b"", final=True)
            return
        except UnicodeDecodeError as error:
            # what surrounds the first sign that does not fit, be it late in the file
            place = max(0, file.tell() - len(error.object) + error.start - _SAMPLE // 2)
        file.seek(place)
        sample = file.read(_SAMPLE)
    if not _is_damaged_utf8(sample):
        raise ValueError(
            f"{path.name} is not UTF-8 text: give encoding={fitting_encoding(sample)}, or save it "
            "as UTF-8"
        )


def _is_damaged_utf8(sample: bytes) -> bool:
    """Say whether most signs beyond ASCII are good UTF-8, each run of them as a whole."""
    runs = _HIGH_RUN.findall(sample)
    good = sum(_decodes(run, "utf-8") for run in runs)
    return good >= len(runs) - good


def fitting_encoding(sample: bytes) -> str:
    """Guess the encoding of text that is not UTF-8.

    Parameters
    ----------
    sample : bytes
        Some of the text.

    Returns
    -------
    str
        A name that Python knows.

    Examples
    --------
    >>> fitting_encoding("胸部正位片，双肺纹理清晰。".encode("gbk"))
    'gb18030'
    >>> fitting_encoding("Tórax normal.".encode("latin-1"))
    'cp1252'
    """
    runs = _HIGH_RUN.findall(sample)
    if _looks_western(runs):
        return "cp1252" if _decodes(sample, "cp1252") else "latin-1"
    if _looks_paired(runs):
        # Guessers confuse the two for short texts. The signs of Korean stand in one block, those of
        # Chinese reach beyond it; a text too short to tell is more often Chinese.
        leads = [lead for run in runs for lead in run[::2]]
        in_block = sum(0xB0 <= lead <= 0xC8 for lead in leads)
        is_korean = len(leads) >= _ENOUGH and in_block >= 0.97 * len(leads)
        return "euc_kr" if is_korean and _decodes(sample, "euc_kr") else "gb18030"
    best = from_bytes(sample, cp_isolation=_OTHERS).best()
    if best is not None and best.encoding in _OTHERS:
        return best.encoding
    fitting = [name for name in _OTHERS if _decodes(sample, name)]
    return fitting[0] if fitting else "cp1252"


def _looks_western(runs: list[bytes]) -> bool:
    """Say whether the signs beyond ASCII stand alone, as a letter with an accent in a word does."""
    single = sum(len(run) == 1 for run in runs)
    joined = b"".join(runs)
    letters = sum(byte >= 0xC0 or byte in _WESTERN_SIGNS for byte in joined)
    return single >= len(runs) / 2 and letters >= 0.8 * len(joined)


def _looks_paired(runs: list[bytes]) -> bool:
    """Say whether signs consist of two high bytes each, as in the Chinese and Korean standards."""
    paired = [run for run in runs if len(run) % 2 == 0 and min(run) >= 0xA1]
    return len(paired) >= 0.9 * len(runs)


def _decodes(sample: bytes, encoding: str) -> bool:
    # the end of a sample may lie inside of a sign, that of a run may not
    try:
        if encoding == "utf-8":
            sample.decode(encoding)
        codecs.getincrementaldecoder(encoding)().decode(sample)
    except UnicodeDecodeError:
        return False
    return True
