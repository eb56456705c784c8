"""Read a converted folder as the data set that TRL's `SFTTrainer` wants."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError

from medtune.files import one_line, read_json_lines

from .dialects import (
    MARK,
    Turn,
    messages_with_parts,
    pictures_of,
    read_turns,
    turns_of_answers,
)

# Files that lie in such a folder and hold no records, by their names without suffix.
NO_RECORDS = {"dataset_info", "rejected", "convert", "check", "summary"}

TEXT = datasets.Value("string")
# Json, because a part is either {"type": "image"} or {"type": "text", "text": ...}.
TURNS = datasets.List({"role": TEXT, "content": datasets.List(datasets.Json())})


@dataclass
class Answer:
    """One answer of a record, as it is learned: a row of the data set.

    id : the id of the record; from its second answer on with the number, as in "a#2".
    turns : all turns up to the answer; the last one is learned, the others are its prompt.
    images : the pictures that are shown in these turns.
    """

    id: str
    turns: list[Turn]
    images: list


def read_placed(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, record) of JSON Lines, or of a .json file that is one list.

    The place is written as "file:number", from 1. What is not JSON comes as its ValueError.
    """
    for number, record in _numbered_records(file):
        yield f"{file.name}:{number}", record


def _numbered_records(file: Path) -> Iterator[tuple[int, Any]]:
    if file.suffix != ".json":
        yield from read_json_lines(file)
        return
    try:
        # with -sig, because some editors begin a file with a byte order mark
        records = json.loads(file.read_text("utf-8-sig", errors="replace"))
    except ValueError as error:
        lines = list(read_json_lines(file))
        if len(lines) > 1 and not isinstance(lines[0][1], ValueError):
            yield from lines  # JSON Lines that are called .json
        else:
            yield 1, error
        return
    if isinstance(records, list):
        yield from enumerate(records, 1)
    elif isinstance(records, dict) and _looks_like_a_record(records):
        yield 1, records  # JSON Lines of one line
    else:
        yield 1, ValueError(f"{file.name} is no list of records")


def _looks_like_a_record(value: dict) -> bool:
    keys = {"prompt", "messages", "conversations", "instruction", "query"}
    return bool(keys & value.keys())


def record_id(record: Any, place: str) -> str:
    """Give the id of a record as text, or the place where it stands if it has none."""
    given = record.get("id") if isinstance(record, dict) else None
    return place if given is None or given == "" else str(given)


def answers_of(sample_id: str, turns: list[Turn], images: list) -> list[Answer]:
    """Give each answer of a record, with what was said and shown before it.

    Examples
    --------
    >>> said = [("user", "<image>What?"), ("assistant", "A liver.")]
    >>> [answer.id for answer in answers_of("a", said * 2, ["a.png", "b.png"])]
    ['a', 'a#2']
    """
    answers = []
    for number, part in enumerate(turns_of_answers(turns), 1):
        shown = sum(text.count(MARK) for _, text in part)
        name = sample_id if number == 1 else f"{sample_id}#{number}"
        answers.append(Answer(name, part, images[:shown]))
    return answers


def picture_file(folder: Path, name: Any) -> Path:
    """Find the file of a picture that a record names, inside of the folder and nowhere else.

    Raises
    ------
    ValueError : it lies elsewhere, or is no file at all.
    """
    if not isinstance(name, str) or name.startswith("data:") or "\0" in name:
        raise ValueError("a picture must be a file beside the records: save it as one")
    if re.match(r"[a-z0-9]+://", name):
        raise ValueError("a picture on the web is not fetched: save it beside the records")
    file = (folder / name).resolve()
    if not file.is_relative_to(folder):
        raise ValueError("a picture lies outside the folder")
    return file


def read_records(folder: str | os.PathLike, split: str = "train") -> datasets.Dataset:
    """Read a split of a converted folder as the data set that TRL's `SFTTrainer` wants.

    The records may be in any dialect. A dialogue of several answers gives a row for each of them,
    because a trainer learns the last answer of a row: the turns before it are its prompt.

    Parameters
    ----------
    folder : what `medtune.records.convert_pairs` wrote, or JSON or JSON Lines of records beside
        pictures.
    split : name of the file without its suffix: "train", "validation" or "test".

    Returns
    -------
    datasets.Dataset : `id` (from the second answer of a record on with its number: "a#2"),
        `prompt` and `completion` (turns of content parts), `images` (decoded when a row is read)
        and what the source had besides, such as `group` and `roi`.

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
    file = _split_file(folder, split)
    other_types = _other_types(folder)
    own_types = {"id": TEXT, "prompt": TURNS, "completion": TURNS}
    own_types["images"] = datasets.List(datasets.Image())
    # `datasets` keeps what it read under a hash of these arguments: a changed file is read anew.
    arguments = {
        "file": file,
        "folder": folder,
        "changed": file.stat().st_mtime_ns,
        "columns": tuple(other_types),
    }
    try:
        return datasets.Dataset.from_generator(
            _rows, features=datasets.Features(own_types | other_types), gen_kwargs=arguments
        )
    except DatasetGenerationError as error:
        reason = one_line(error.__cause__ or error)
        raise ValueError(f"cannot read records: {reason}") from None


def _split_file(folder: Path, split: str) -> Path:
    """Find the file of a split: by its name, or by what dataset_info.json calls it."""
    files = [folder / f"{split}.jsonl", folder / f"{split}.json"]
    info = folder / "dataset_info.json"
    if info.is_file():
        files += [file for name, file in local_files(info)[0].items() if name == split]
    for file in files:
        if file.is_file():
            return file
    there = sorted(other.stem for other in folder.glob("*.json*") if other.stem not in NO_RECORDS)
    raise FileNotFoundError(
        f"{folder / split}.jsonl does not exist, only {', '.join(there) or 'nothing'}: "
        "write it with `medtune convert`"
    )


def local_files(info: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Read LLaMA-Factory's dataset_info.json.

    Returns
    -------
    tuple : the file of each entry that lies beside it; and for each other entry why it is left out.
    """
    try:
        entries = json.loads(info.read_text("utf-8-sig"))
        items = list(entries.items())
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{info} is no JSON of data sets ({one_line(error)}): mend it") from None
    files: dict[str, Path] = {}
    left_out: dict[str, str] = {}
    for name, entry in items:
        named = entry.get("file_name") if isinstance(entry, dict) else None
        if not isinstance(named, str) or not named:
            left_out[name] = "it lies on a hub, not in this folder"
            continue
        file = info.parent / named
        if not file.resolve().is_relative_to(info.parent.resolve()):
            left_out[name] = "it lies outside the folder"
        elif file.suffix not in (".json", ".jsonl"):
            left_out[name] = "it is neither JSON nor JSON Lines"
        else:
            files[name] = file
    return files, left_out


def _other_types(folder: Path) -> datasets.Features:
    """Give the types of the columns that the source had besides, if the folder notes them."""
    notes = folder / "convert.json"
    if not notes.is_file():
        return datasets.Features()
    return datasets.Features.from_dict(json.loads(notes.read_text("utf-8"))["features"])


def _rows(file: Path, folder: Path, changed: int, columns: tuple[str, ...]) -> Iterator[dict]:
    """Yield the rows of the data set, one for each answer.

    `changed` only tells `datasets` one state of the file from another.
    """
    for place, record in read_placed(file):
        names = pictures_of(record)
        turns, problems = read_turns(record, len(names))
        if problems:
            raise ValueError(f"{place}: {problems[0].text}")
        try:
            images = [str(picture_file(folder, name)) for name in names]
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None

        known = record if isinstance(record, dict) else {}
        for answer in answers_of(record_id(record, place), turns, images):
            messages = messages_with_parts(answer.turns)
            row = {name: known.get(name) for name in columns}
            row["id"] = answer.id
            row["prompt"] = messages[:-1]
            row["completion"] = messages[-1:]
            row["images"] = answer.images
            yield row
