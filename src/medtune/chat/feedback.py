"""Keep what somebody says of an answer as a row of training data."""

import hashlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path

import filelock

from medtune.files import read_json_lines, write_whole


def save_feedback(
    folder: str | os.PathLike, key: str, pictures: Sequence, *, caption: str, **said: str
) -> Path:
    """Keep feedback as a row of JSON Lines that `medtune convert` reads; return the file.

    Parameters
    ----------
    folder : gets `feedback.jsonl` and `images/`, in PNG without metadata; one that is made is for
        its owner alone (mode 0700). Two pages may share it.
    key : names the answer: a later word on it replaces the former.
    pictures : several make a pair each, of one `group`; convert joins them again with
        `pictures_per_sample`.
    caption : what a model should learn to answer. Empty after a thumb down: convert rejects such a
        row, and counts it.
    **said : further columns, such as question, answer (what the model said; the column is called
        `model_answer`), model, and rating ("up", "down", "corrected").

    Raises
    ------
    ValueError : a line of an earlier file is not JSON; the file stays as it is.
    OSError : the folder cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> from PIL import Image
    >>> from medtune.pairs import load_pairs
    >>> cat = [Image.new("RGB", (9, 9))]
    >>> file = save_feedback(tempfile.mkdtemp(), "1", cat, caption="A cat.", rating="corrected")
    >>> load_pairs(file)[0]["caption"]
    'A cat.'
    """
    folder = Path(folder)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    (folder / "images").mkdir(exist_ok=True)
    names = [_save_picture(folder, picture) for picture in pictures]
    group = hashlib.sha256(str(names).encode()).hexdigest()[:16]
    row = {"id": key, "image": names, "caption": caption, "group": group}
    # what is saved to be learned must not be dealt out: convert would do so where groups are known
    row |= {"split": "train", **said}
    file = folder / "feedback.jsonl"
    # the file is written anew: of two pages that do so at once, one would lose its vote
    with filelock.FileLock(folder / ".lock"):
        rows = [old for old in _rows(file) if old["id"] != key]
        lines = [_line(_with_clear_names(one)) for one in [*rows, row]]
        write_whole(file, "".join(lines))
    return file


def _with_clear_names(row: dict) -> dict:
    """A row in which only the caption can be what shall be learned.

    Beside a question, a column `answer` could be that as well, and convert would refuse to guess.
    """
    return {"model_answer" if key == "answer" else key: value for key, value in row.items()}


def _line(row: dict) -> str:
    """A row as a line of JSON, readable in any language."""
    line = json.dumps(row, ensure_ascii=False)
    # half of a sign of two halves, as a browser may send it, has no form in UTF-8
    return line.encode("utf-8", errors="replace").decode("utf-8") + "\n"


def _rows(file: Path) -> list[dict]:
    """The rows of an earlier feedback file; none where there is no file."""
    if not file.exists():
        return []
    rows = []
    for number, row in read_json_lines(file):
        if isinstance(row, ValueError):
            raise ValueError(
                f"{file}, line {number} is not JSON ({row}): mend it or move the file away"
            )
        rows.append(row)
    return rows


def _save_picture(folder: Path, picture) -> str:
    """Save a picture under a hash of its pixels, so that the same one is there once; its name."""
    digest = hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()[:32]
    name = f"images/{digest}.png"
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    write_whole(folder / name, buffer.getvalue())
    return name
