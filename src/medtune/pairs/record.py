"""Turn one record of a table into pairs: its picture, or each frame of it, with each answer."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files_of_pictures import Picture, open_pictures
from .reading import Reading, our_names

# What the dialects of dialogue data call the two who speak; other roles, such as system, are not
# part of question and answer.
ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}

# Columns that hold a dialogue or repeat it: the pair has question and caption instead.
DIALOGUE_COLUMNS = {
    "messages",
    "conversations",
    "prompt",
    "completion",
    "instruction",
    "output",
    "history",
    "system",
}

# Lone surrogates, which JSON can spell ("\ud800") and Arrow cannot hold.
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def names_group(cell: Any) -> bool:
    """Say whether the `group` of a row names a patient: 0 does, as a number may be a name.

    Parameters
    ----------
    cell : what the column `group` holds in a row, of any type.

    Returns
    -------
    bool : False for None, an empty text and NaN, which tables have where nothing was entered.

    Examples
    --------
    >>> [names_group(cell) for cell in (0, "p1", "", None, float("nan"))]
    [True, True, False, False, False]
    """
    # NaN is the one value that differs from itself
    return cell is not None and cell != "" and cell == cell


@dataclass
class Answer:
    """What is said about a picture.

    Attributes
    ----------
    caption : str
        The caption or, in a dialogue, the answer.
    question : str or None
        What was asked in the dialogue; None where there was no dialogue.
    """

    caption: str
    question: str | None


@dataclass
class FoundPair:
    """A pair of a record, before ids are numbered and patients become groups.

    Attributes
    ----------
    row : dict
        image, id, caption, and whatever else is known.
    id_is_given : bool
        Whether the id is that of the record; else it was made up.
    patient : str or None
        A hash that stands for the patient of a DICOM file.
    """

    row: dict
    id_is_given: bool
    patient: str | None


def record_pairs(record: Any, reading: Reading, salt: str) -> Iterator[FoundPair]:
    """Yield a pair for each picture and each answer of a record, plain or a dialogue.

    Parameters
    ----------
    record : dict
        Column -> value; anything else is refused.
    reading : Reading
        How the source is to be read.
    salt : str
        What patients' numbers are hashed with.

    Yields
    ------
    FoundPair
        Nothing for a dialogue without a picture.

    Raises
    ------
    ValueError, OSError, TypeError, AttributeError
        The record is bad. The last two come from values of an unexpected kind, such as a number in
        the place of a turn.
    """
    if not isinstance(record, dict):
        raise ValueError(f"a record is a JSON object, not {type(record).__name__}")
    turns = _turns_of(record)
    needed = () if turns else ("image", "caption")
    # one table may hold records of several kinds: a wish that this one cannot fulfil is no error
    columns = {ours: theirs for ours, theirs in reading.columns.items() if theirs in record}
    names = our_names(record, columns, "the record", needed)
    extra = _renamed(record, names)
    images = extra.pop("image", None)
    caption = extra.pop("caption", None)
    given_id = extra.pop("id", None)
    extra.pop("images", None)  # left where a record has both image and images
    if turns and not images:
        return
    if not isinstance(images, list):
        images = [images]
    for image in images:
        file = _located(image, reading.folders)
        for picture in open_pictures(file, reading.window, salt):
            for answer in _answers(turns) if turns else [Answer(caption, None)]:
                row = _row(picture, answer, given_id, extra)
                yield FoundPair(row, given_id is not None, picture.patient)


def _renamed(record: dict, names: dict[str, str]) -> dict:
    """Give the values of a record under our names, without those of a dialogue."""
    renamed = {}
    for theirs, value in record.items():
        if theirs in names and theirs not in DIALOGUE_COLUMNS:
            renamed[names[theirs]] = without_surrogates(value)
    return renamed


def _row(picture: Picture, answer: Answer, given_id: Any, extra: dict) -> dict:
    row = {
        "image": picture.cell,
        "id": picture.made_up_id if given_id is None else str(given_id),
        "caption": answer.caption,
    }
    # what the table says of a picture counts more than what its file says
    row |= picture.known
    row |= extra
    if answer.question is not None:
        row["question"] = answer.question
    return row


def without_surrogates(value: Any) -> Any:
    """Replace lone surrogates of a text by the sign that `reject_reason` looks for.

    Examples
    --------
    >>> without_surrogates("lone \\ud800"), without_surrogates(7)
    ('lone \ufffd', 7)
    """
    return _SURROGATE.sub("\ufffd", value) if isinstance(value, str) else value


# --- dialogues ------------------------------------------------------------------------------------


def _turns_of(record: dict) -> list[dict] | None:
    """Give the turns of a dialogue in any of the dialects, or None for a plain record."""
    if "completion" not in record:
        return record.get("messages") or record.get("conversations")
    turns = []
    # what stands in prompt and completion counts even if there are messages too
    for role, column in (("user", "prompt"), ("assistant", "completion")):
        said = record.get(column)
        # a list of messages, or plain text
        turns += said if isinstance(said, list) else [{"role": role, "content": said}]
    return turns


def _answers(turns: list[dict]) -> Iterator[Answer]:
    """Yield each answer of a dialogue with what was asked since the answer before."""
    question: list[str] = []
    for turn in turns:
        role = ROLES.get(turn.get("role") or turn.get("from"))
        said = _text_of(turn)
        if role == "assistant":
            yield Answer(said, "\n".join(question))
            question = []
        elif role == "user":
            question.append(said)


def _text_of(turn: dict) -> str:
    """Give the words of a turn, without the marks for pictures."""
    said = turn.get("content") or turn.get("value") or ""
    if not isinstance(said, str):  # a list of parts, of which pictures have no text
        said = " ".join(part.get("text") or "" for part in said)
    return without_surrogates(said.replace("<image>", "").strip())


# --- pictures -------------------------------------------------------------------------------------


def _located(name: Any, folders: tuple[Path, ...]) -> Path:
    """Find a picture that a table names, inside the first folder and nowhere else.

    A table comes from elsewhere: it must not reach other files of this machine, by '..' or a link.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"{name!r} is no picture name")
    root = folders[0]
    paths = [(folder / name).resolve() for folder in folders]
    if not all(path.is_relative_to(root) for path in paths):
        raise ValueError(
            f"picture {name} lies outside the folder (a link or '..'): give image_root=FOLDER"
        )
    for path in paths:
        if path.exists():
            return path
    raise FileNotFoundError(f"picture {name} is missing")
