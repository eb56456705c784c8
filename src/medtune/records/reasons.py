"""What `rejected.jsonl` says of a row that is left out: enough to find it, and nobody's name.

A row is found again by its number, by its id, and by the line of its table. Names of files and
folders are cut out of the reason: they often hold the name or the number of a patient.
"""

import contextlib
import re
from typing import Any

from medtune.pairs import safe_id

# What a reason of ours begins with: a column, or a kind of its own.
KINDS = (
    "id",
    "caption",
    "question",
    "image",
    "roi",
    "split",
    "text",
    "record",
    "dialogue",
    "shard",
    "slab",
)

# The table and the line that the loader puts in front: "captions.csv:3: ".
_PLACE = re.compile(r"^(?:[^:]*[/\\])?([^:/\\]+:\d+: )")
# Pillow names the stream it read, with its address in memory.
_ADDRESS = re.compile(r" ?<[^<>]* at 0x[0-9a-fA-F]+>|\b0x[0-9a-fA-F]{6,}\b")
_ENDING = r"(?:jpe?g|png|webp|bmp|tiff?|gif|dcm|dicom|ima|nii(?:\.gz)?|zip|mp4|avi)"
# A name of a picture that may hold blanks, between a word that announces it and what is said of it.
_ANNOUNCED = re.compile(
    rf"\b(picture|file|name) (?!(?:{_ENDING}\b|is\b|are\b|lies\b|cannot\b|has\b))"
    r"(?:[^:]*?)(?= (?:is|are|lies|cannot|has)\b|$)",
    re.IGNORECASE,
)
# Quoted values, but not the signs that JSON misses, nor advice on an argument.
_QUOTED = re.compile(r"columns=\{[^}]*\}|'[^']{3,}'|\"[^\"]{3,}\"")
_PATH = re.compile(rf"[^\s,;()]*[/\\][^\s,;()]*|[^\s,;()]+\.{_ENDING}\b", re.IGNORECASE)


def public_id(sample_id: Any) -> Any:
    """Give the id under which a row is listed: a hash where it is a path or the name of a file.

    Examples
    --------
    >>> public_id("roco-17"), public_id(None)
    ('roco-17', None)
    """
    if not isinstance(sample_id, str):
        return sample_id
    with contextlib.suppress(ValueError):  # without a salt it cannot be hashed
        return safe_id(sample_id)
    return None


def public_reason(reason: str, sample_id: Any = None) -> str:
    """Cut out of a reason the names of files, addresses, and an id that is a path.

    Parameters
    ----------
    reason : as `reject_reason`, the loader or a decoder gives it.
    sample_id : the id of the row, which some reasons quote.

    Examples
    --------
    >>> public_reason("captions.csv:3: picture p10/Hans Mueller.png is missing")
    'captions.csv:3: picture is missing'
    >>> public_reason("id: '../a' would leave a folder", "../a")
    'id: would leave a folder'
    """
    reason = reason.replace(f"{sample_id!r} ", "")
    reason = _ADDRESS.sub("", reason)
    kind = reason.partition(":")[0]
    # these are written here, and quote nothing but words for splits and marks
    if kind in ("split", "question", "caption", "id", "text", "record", "dialogue", "slab"):
        return reason
    if kind == "shard":
        # the name of a shard tells no patient, and which one to fetch again
        name, space, said = reason.removeprefix("shard: ").partition(" ")
        start = f"shard: {name}{space}"
    elif kind in KINDS:
        start, said = f"{kind}: ", reason.removeprefix(f"{kind}: ")
    else:
        start, said = _without_picture_name(reason)
    said = _ANNOUNCED.sub(r"\1", said)
    said = _QUOTED.sub(_kept_quotation, said)
    said = _PATH.sub("", said)
    return start + " ".join(said.split())


def _without_picture_name(reason: str) -> tuple[str, str]:
    """Take a reason of the loader apart: the place in a table, and what is said.

    Where there is no table, the name of the picture stands in its place, and goes.
    """
    place = _PLACE.match(reason)
    if place:
        return place[1], reason[place.end() :]
    name, colon, said = reason.partition(": ")
    return "", said if colon else name


def _kept_quotation(found: re.Match) -> str:
    return found[0] if found[0].startswith("columns=") else ""


def kind_of(reason: str) -> str:
    """Give the kind of a reason, to be counted: a column, or "row" for what the loader refused.

    Examples
    --------
    >>> kind_of("image: has zero bytes"), kind_of("captions.csv:3: picture is missing")
    ('image', 'image')
    """
    place = _PLACE.match(reason)
    said = reason[place.end() :] if place else reason
    word = said.partition(":")[0]
    if word in KINDS:
        return word
    return "image" if re.match(r"(picture|DICOM|NIfTI|file|folder|volume)\b", said) else "row"
