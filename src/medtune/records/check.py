"""Check a folder of training records in any dialect, and the pictures that they name."""

import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from medtune.files import one_line, write_json
from medtune.pairs import names_group

from .dialects import MARK, Problem, Turn, messages_with_parts, read_turns
from .read import read_placed

CHECKS = (
    "readable",
    "roles alternate",
    "no empty turn",
    "image marks",
    "pictures open",
    "ids differ",
    "groups apart",
)
# Files that lie in such a folder and hold no records, by their names without suffix.
NO_RECORDS = {"dataset_info", "rejected", "convert", "check", "summary"}
BLOCK = 256  # records whose pictures are opened at the same time
MOST_ERRORS = 1000  # listed in the report; all are counted

Size = tuple[int, int]  # width and height in pixels


def check_folder(
    folder: str | os.PathLike, *, processor: Any = None, max_length: int | None = None
) -> dict:
    """Check the records of a folder, in any dialect, and their pictures; writes `check.json` there.

    Parameters
    ----------
    folder : holds `dataset_info.json` that names the files, or else JSON or JSON Lines files of
        records.
    processor : a Transformers processor, to count the tokens of each record.
    max_length : report the records that have more tokens, and hence would be cut.

    Returns
    -------
    dict : `ok`, whether nothing is wrong; `records`, how many each file has; `table`, for each
        check how many errors it found and the first of them; `errors`, up to 1,000, each with place
        (file:line), id, check and problem. With a processor also `tokens` (min, median, max) and
        `cut`, the tokens of the longer records by id.

    Raises
    ------
    ValueError : the folder holds no records, or `max_length` comes without a processor.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> record = '{"id": "a", "messages": [{"role": "user", "content": "What?"}]}'
    >>> _ = (folder / "train.jsonl").write_text(record)
    >>> check_folder(folder)["errors"][0]["problem"]
    'the roles are user'
    """
    folder = Path(folder).expanduser().resolve()
    names = _record_files(folder)
    if not names:
        raise ValueError(f"{folder} holds no records")
    if max_length and not processor:
        raise ValueError("max_length is in tokens: give a processor too")

    findings = Findings(TokenCounter(processor) if processor else None)
    for placed, pictures in _open_pictures(folder, names):
        findings.add(*placed, pictures)
    report = findings.report(max_length)
    write_json(folder / "check.json", report)
    return report


def _record_files(folder: Path) -> list[str]:
    info = folder / "dataset_info.json"
    if info.is_file():
        entries = json.loads(info.read_text("utf-8")).values()
        return [Path(entry["file_name"]).name for entry in entries]
    return sorted(file.name for file in folder.glob("*.json*") if file.stem not in NO_RECORDS)


# --- pictures ---------------------------------------------------------------------------------


def _open_pictures(
    folder: Path, names: list[str]
) -> Iterator[tuple[tuple[str, Any], list[Size | str]]]:
    """Yield (place, record) of all files, each with what its pictures are."""
    files = [read_placed(folder / name) for name in names]
    stream = itertools.chain.from_iterable(files)
    with ThreadPoolExecutor() as pool:
        while block := list(itertools.islice(stream, BLOCK)):
            records = [record for _, record in block]
            seen = pool.map(look_at_pictures, itertools.repeat(folder), records)
            yield from zip(block, seen, strict=True)


def look_at_pictures(folder: Path, record: Any) -> list[Size | str]:
    """Give the size of each picture that a record names, or what is wrong with it in one line."""
    names = record.get("images") if isinstance(record, dict) else None
    if not names:
        return []
    if not isinstance(names, list):
        names = [names]
    return [_size_or_problem(folder, name) for name in names]


def _size_or_problem(folder: Path, name: Any) -> Size | str:
    try:
        path = folder / name
        if not path.resolve().is_relative_to(folder):
            raise ValueError("it lies outside the folder")
        with Image.open(path) as picture:
            picture.load()
            return picture.size
    except FileNotFoundError:
        return f"{name}: it is missing"
    except Exception as error:  # decoders raise many kinds
        return f"{name}: {one_line(error)}"


# --- tokens -----------------------------------------------------------------------------------


class TokenCounter:
    """Counts the tokens of records as a processor would make them, without preparing each picture.

    A picture's tokens depend on its size alone, so each size is tried once, on an empty picture.
    """

    def __init__(self, processor: Any):
        self.processor = processor
        self._tokens_of_size: dict[Size, int] = {}

    def count(self, turns: list[Turn], sizes: list[Size]) -> int:
        """Count the tokens of a record with pictures of these sizes."""
        _, tokens = self._render(turns)
        return tokens + sum(self._picture_tokens(size) for size in sizes)

    def _render(self, turns: list[Turn]) -> tuple[str, int]:
        """Give the text that the chat template makes of the turns, and its number of tokens."""
        messages = messages_with_parts(turns)
        text = self.processor.apply_chat_template(messages, tokenize=False)
        tokens = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return text, len(tokens)

    def _picture_tokens(self, size: Size) -> int:
        """Count the tokens that a picture of this size adds to those of its mark."""
        if size not in self._tokens_of_size:
            text, without = self._render([("user", MARK)])
            picture = Image.new("RGB", size)
            tokens = self.processor(images=[[picture]], text=[text])["input_ids"][0]
            self._tokens_of_size[size] = len(tokens) - without
        return self._tokens_of_size[size]


# --- findings ---------------------------------------------------------------------------------


@dataclass
class Findings:
    """What a check found, record by record.

    counter : counts the tokens of a record, if the caller gave a processor.
    records : number of records by file.
    errors : all errors, with place, id, check and problem.
    tokens : tokens of each sound record, by id.
    ids : the place where each id was met first.
    groups : the file in which each group was met first.
    """

    counter: TokenCounter | None
    records: Counter[str] = field(default_factory=Counter)
    errors: list[dict] = field(default_factory=list)
    tokens: dict[str, int] = field(default_factory=dict)
    ids: dict[str, str] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)

    def add(self, place: str, record: Any, pictures: list[Size | str]) -> None:
        """Check one record, whose pictures have been looked at."""
        file = place.rpartition(":")[0]
        self.records[file] += 1
        known = record if isinstance(record, dict) else {}
        sample_id = str(known.get("id") or place)

        turns, problems = read_turns(record, len(pictures))
        for picture in pictures:
            if isinstance(picture, str):
                problems.append(Problem("pictures open", picture))
        problems += self._claims(known, place, file)

        if self.counter and not problems:
            self.tokens[sample_id] = self.counter.count(turns, pictures)
        for check, text in problems:
            error = {"place": place, "id": sample_id, "check": check, "problem": text}
            self.errors.append(error)

    def _claims(self, record: dict, place: str, file: str) -> list[Problem]:
        """Find out whether another record has the id, or another file (a split) the group."""
        problems = []
        if record.get("id"):
            sample_id = str(record["id"])
            owner = self.ids.setdefault(sample_id, place)
            if owner != place:
                problems.append(Problem("ids differ", f"id {sample_id} is in {owner} too"))
        if names_group(record.get("group")):
            group = str(record["group"])
            owner = self.groups.setdefault(group, file)
            if owner != file:
                problems.append(Problem("groups apart", f"group {group} is in {owner} too"))
        return problems

    def report(self, max_length: int | None) -> dict:
        """Sum up, as `check_folder` returns it."""
        report = {
            "ok": not self.errors,
            "records": dict(self.records),
            "table": self._table(),
            "errors": self.errors[:MOST_ERRORS],
        }
        if self.tokens:
            lengths = sorted(self.tokens.values())
            middle = lengths[len(lengths) // 2]
            report["tokens"] = {"min": lengths[0], "median": middle, "max": lengths[-1]}
            report["cut"] = self._longer_than(max_length)
        return report

    def _table(self) -> list[dict]:
        counts = Counter(error["check"] for error in self.errors)
        first: dict[str, str] = {}
        for error in self.errors:
            first.setdefault(error["check"], f"{error['place']}: {error['problem']}")
        rows = []
        for check in CHECKS:
            rows.append({"check": check, "errors": counts[check], "first": first.get(check)})
        return rows

    def _longer_than(self, max_length: int | None) -> dict[str, int]:
        if not max_length:
            return {}
        return {name: count for name, count in self.tokens.items() if count > max_length}
