"""Read a converted folder as the data set that TRL's `SFTTrainer` wants."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError

from medtune.files import one_line, read_json_lines

from .dialects import messages_with_parts, read_turns

TEXT = datasets.Value("string")
# Json, because a part is either {"type": "image"} or {"type": "text", "text": ...}.
TURNS = datasets.List({"role": TEXT, "content": datasets.List(datasets.Json())})


def read_placed(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, record) of JSON Lines, or of a .json file that is one list.

    The place is written as "file:number", from 1. A line that is not JSON comes as its ValueError.
    """
    if file.suffix == ".json":
        records = enumerate(json.loads(file.read_text("utf-8", errors="replace")), 1)
    else:
        records = read_json_lines(file)
    for number, record in records:
        yield f"{file.name}:{number}", record


def read_records(folder: str | os.PathLike, split: str = "train") -> datasets.Dataset:
    """Read a split of a converted folder as the data set that TRL's `SFTTrainer` wants.

    The records may be in any dialect.

    Parameters
    ----------
    folder : what `medtune.records.convert_pairs` wrote, or JSON Lines of records beside pictures.
    split : name of the file: "train", "validation" or "test".

    Returns
    -------
    datasets.Dataset : `id`, `prompt` and `completion` (turns of content parts), `images` (decoded
        when a row is read) and what the source had besides, such as `group` and `roi`.

    Raises
    ------
    FileNotFoundError : there is no such split.
    ValueError : a record does not conform, or names a picture outside the folder.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> said = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A liver."}]
    >>> _ = (folder / "train.jsonl").write_text(json.dumps({"id": "a", "messages": said}))
    >>> read_records(folder)[0]["completion"][0]["role"]
    'assistant'
    """
    folder = Path(folder).expanduser().resolve()
    file = folder / f"{split}.jsonl"
    if not file.is_file():
        there = ", ".join(sorted(other.stem for other in folder.glob("*.jsonl"))) or "nothing"
        raise FileNotFoundError(
            f"{file} does not exist, only {there}: write it with `medtune convert`"
        )
    other_types = _other_types(folder)
    own_types = {"id": TEXT, "prompt": TURNS, "completion": TURNS}
    own_types["images"] = datasets.List(datasets.Image())
    # `datasets` keeps what it read under a hash of these arguments: a changed file is read anew.
    arguments = {
        "file": file,
        "changed": file.stat().st_mtime_ns,
        "columns": ("id", *other_types),
    }
    try:
        return datasets.Dataset.from_generator(
            _rows, features=datasets.Features(own_types | other_types), gen_kwargs=arguments
        )
    except DatasetGenerationError as error:
        reason = one_line(error.__cause__ or error)
        raise ValueError(f"cannot read records: {reason}") from None


def _other_types(folder: Path) -> datasets.Features:
    """Give the types of the columns that the source had besides, if the folder notes them."""
    notes = folder / "convert.json"
    if not notes.is_file():
        return datasets.Features()
    return datasets.Features.from_dict(json.loads(notes.read_text("utf-8"))["features"])


def _rows(file: Path, changed: int, columns: tuple[str, ...]) -> Iterator[dict]:
    """Yield the rows of the data set.

    `changed` only tells `datasets` one state of the file from another.
    """
    folder = file.parent
    for place, record in read_placed(file):
        names = record.get("images") if isinstance(record, dict) else None
        images = [(folder / name).resolve() for name in names or ()]
        turns, problems = read_turns(record, len(images))
        if problems:
            raise ValueError(f"{place}: {problems[0].text}")
        if not all(image.is_relative_to(folder) for image in images):
            raise ValueError(f"{place}: a picture lies outside the folder")

        messages = messages_with_parts(turns)
        row = {name: record.get(name) for name in columns}
        row["prompt"] = messages[:-1]
        row["completion"] = messages[-1:]
        row["images"] = [str(image) for image in images]
        yield row
