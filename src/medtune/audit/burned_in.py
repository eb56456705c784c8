"""Warn of text in the pixels, which may name a patient: by the flag of DICOM, and by reading them.

The reader is the program tesseract, where it is installed. What it read stays in memory and is
thrown away: the result says only which pictures hold text.
"""

import io
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from medtune.pairs import picture_bytes, to_rgb

from .fingerprints import picture_cells

# The longer edge that pictures are scaled to, in pixels: letters of 10 pixels in a picture of 512
# are read well when they are twice as tall, and those of a film of 3000 are tall enough.
_SMALL_EDGE = 1000
_LARGE_EDGE = 2000
_MOST_SCALE = 4  # what is smaller than that holds no letters that anybody could read
_SECONDS = 120  # for one picture; none takes longer than a second on a free machine

# A word counts if tesseract is this sure of it, in per cent, and it has three letters or digits: the
# grain of a film is taken for shorter words. A picture holds text if its words have four.
_CONFIDENCE = 70
_SIGNS_OF_WORD = 3
_SIGNS_OF_TEXT = 4

# Grey levels from which on, or down from which, a pixel can be of a letter that was burnt in.
_WHITE = 235
_BLACK = 20

# Languages that are read where tesseract has them.
_LANGUAGES = ("eng", "chi_sim", "chi_tra")


@dataclass
class BurnedIn:
    """What is known about text in the pixels of pictures.

    Attributes
    ----------
    looked : int
        How many pictures were read by tesseract.
    flagged : list of str
        Ids of the pictures whose DICOM file says that text is burnt in.
    with_text : list of str
        Ids of those pictures, of the ones looked at, in which text was found.
    reader_found : bool
        Whether tesseract, with a language of its own, is on this machine.
    pictures : int
        How many pictures there are.
    unreadable : list of str
        Ids of those that were to be looked at and could not be read.
    """

    looked: int = 0
    flagged: list[str] = field(default_factory=list)
    with_text: list[str] = field(default_factory=list)
    reader_found: bool = False
    pictures: int = 0
    unreadable: list[str] = field(default_factory=list)

    def warnings(self) -> list[str]:
        """Say in lines what somebody must look at before these pictures leave the house.

        Returns
        -------
        list of str
            No line where nothing was found and everything was looked for.

        Examples
        --------
        >>> BurnedIn(looked=2, with_text=["a"], reader_found=True, pictures=9).warnings()
        ['1 of 2 pictures looked at, of 9, hold text, which may name a patient (first: id a)']
        """
        lines = []
        if self.flagged:
            lines.append(
                f"{len(self.flagged)} of {self.pictures} pictures come from DICOM files that say "
                f"that text is burnt into them (first: id {self.flagged[0]})"
            )
        if self.with_text:
            lines.append(
                f"{len(self.with_text)} of {self.looked} pictures looked at, of {self.pictures}, "
                f"hold text, which may name a patient (first: id {self.with_text[0]})"
            )
        if self.unreadable:
            lines.append(
                f"text was not looked for in {len(self.unreadable)} pictures, which could not be "
                f"read (first: id {self.unreadable[0]})"
            )
        if not self.reader_found:
            lines.append(
                "text in the pictures was not looked for: the program tesseract is not installed "
                "(Debian and Ubuntu: apt-get install tesseract-ocr)"
            )
        return lines


def burned_in_text(
    pairs: Any,
    *,
    sample: int = 30,
    seed: int = 0,
    confidence: float = _CONFIDENCE,
    cells: Callable[[list[int]], Iterable[Any]] | None = None,
) -> BurnedIn:
    """Look for text in the pixels, which may name a patient.

    No finding is no proof: handwriting, small or turned letters are missed, and a picture may show
    a face.

    Parameters
    ----------
    pairs : datasets.Dataset
        Pairs with `id` and `image`, and `burned_in` where DICOM files say it.
    sample : int
        Most pictures that are read, drawn by chance; each takes about half a second.
    seed : int
        Of the draw.
    confidence : float
        From how many per cent on a word that tesseract read counts.
    cells : callable, optional
        Gives the encoded pictures of some rows, where `pairs` has no column `image`.

    Returns
    -------
    BurnedIn
        How many pictures were looked at and the ids of those with text; never the text itself.

    Raises
    ------
    ValueError
        A sample below 0, or a confidence outside of 0 to 100.

    Examples
    --------
    >>> import datasets
    >>> cells = {"image": [None], "id": ["a"], "burned_in": ["YES"]}
    >>> burned_in_text(datasets.Dataset.from_dict(cells), sample=0).flagged
    ['a']
    """
    if sample < 0:
        raise ValueError(f"sample={sample} must be a number of pictures, from 0")
    if not 0 <= confidence <= 100:
        raise ValueError(f"confidence={confidence} must be per cent, 0 to 100")
    ids = [str(name) for name in pairs["id"]]
    found = BurnedIn(pictures=len(ids))
    if "burned_in" in pairs.column_names:
        flags = pairs["burned_in"]
        found.flagged = [name for name, flag in zip(ids, flags, strict=True) if flag == "YES"]
    program = shutil.which("tesseract")
    languages = _languages_of(program) if program else []
    found.reader_found = bool(languages)
    drawn = sorted(random.Random(seed).sample(range(len(ids)), min(sample, len(ids))))
    if not languages or not drawn:
        return found

    command = [program, "stdin", "stdout", "--psm", "11", "-l", "+".join(languages), "tsv"]

    def look(cell: Any) -> bool | None:
        return _holds_text(cell, command, confidence)

    # tesseract is a process of its own: while one picture is read, the next is decoded
    with ThreadPoolExecutor(2) as pool:
        pictures = picture_cells(pairs.select(drawn)) if cells is None else cells(drawn)
        answers = list(tqdm(pool.map(look, pictures), "Looking for text", len(drawn), delay=2))
    for row, answer in zip(drawn, answers, strict=True):
        if answer is None:
            found.unreadable.append(ids[row])
            continue
        found.looked += 1
        if answer:
            found.with_text.append(ids[row])
    return found


def _languages_of(program: str) -> list[str]:
    """Give those of our languages that tesseract has the data of."""
    try:
        done = _run([program, "--list-langs"])
    except (OSError, subprocess.SubprocessError):
        return []
    there = done.stdout.decode("utf-8", "replace").split()
    return [language for language in _LANGUAGES if language in there]


def _holds_text(cell: Any, command: list[str], confidence: float) -> bool | None:
    """Say whether a picture holds text; None where nobody can say."""
    try:
        image = to_rgb(Image.open(io.BytesIO(picture_bytes(cell)))).convert("L")
    except Exception:  # decoders raise many kinds
        return None
    for view in _views(_at_reading_size(image)):
        buffer = io.BytesIO()
        view.save(buffer, "PNG")
        try:
            done = _run(command, buffer.getvalue())
        except (OSError, subprocess.SubprocessError):
            return None
        if done.returncode != 0:
            return None
        table = done.stdout.decode("utf-8", "replace")
        if _count_signs(table, confidence) >= _SIGNS_OF_TEXT:
            return True
    return False


def _views(image: Image.Image) -> Iterator[Image.Image]:
    """Yield what tesseract shall read: the picture, and what in it is white, and black.

    Letters are burnt in at full white or black. Over anatomy tesseract alone finds half of them.
    """
    yield image
    # what has no such pixel needs no second look
    if image.getextrema()[1] >= _WHITE:
        yield image.point(lambda level: 0 if level >= _WHITE else 255)
    if image.getextrema()[0] <= _BLACK:
        yield image.point(lambda level: 0 if level <= _BLACK else 255)


def _run(command: list[str], content: bytes = b"") -> subprocess.CompletedProcess:
    # one thread: it would take all cores for a gain of nothing
    environment = os.environ | {"OMP_THREAD_LIMIT": "1"}
    return subprocess.run(
        command, input=content, capture_output=True, timeout=_SECONDS, env=environment
    )


def _at_reading_size(image: Image.Image) -> Image.Image:
    longer = max(image.size)
    edge = min(max(longer, _SMALL_EDGE), _LARGE_EDGE)
    scale = min(edge / longer, _MOST_SCALE)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC)


def _count_signs(table: str, confidence: float) -> int:
    """Count letters and digits of the words that a TSV of tesseract is sure of."""
    total = 0
    for line in table.splitlines()[1:]:
        cells = line.split("\t")
        if len(cells) != 12:
            continue
        # the last two columns: confidence (-1 for what is no word), text
        signs = sum(map(_weight, cells[11]))
        if float(cells[10]) >= confidence and signs >= _SIGNS_OF_WORD:
            total += signs
    return total


def _weight(sign: str) -> int:
    if "\u3400" <= sign <= "\u9fff":
        return 2  # two Chinese signs are a name
    return int(sign.isalnum())
