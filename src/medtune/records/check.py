"""Check a folder of training records in any dialect, and the pictures that they name."""

import itertools
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from tqdm.auto import tqdm

from medtune.files import one_line, write_json
from medtune.pairs import names_group

from .dialects import Problem, pictures_of, read_turns
from .prepare import Preparer, find_control_token
from .read import (
    NO_RECORDS,
    Answer,
    answers_of,
    local_files,
    picture_file,
    read_placed,
    record_id,
)

# In the order of the report; those that need a processor or a length come last.
CHECKS = (
    "readable",
    "roles alternate",
    "no empty turn",
    "no video",
    "no control tokens",
    "image marks",
    "pictures open",
    "ids differ",
    "groups apart",
)
WITH_PROCESSOR = ("processor takes it", "answers whole")
BLOCK = 256  # records whose pictures are opened at the same time
MOST_ERRORS = 1000  # listed in the report; all are counted
# As in `medtune.pairs.reject_reason`: what has more may be a decompression bomb.
MAX_PIXELS = 50_000_000


@dataclass(frozen=True)
class Picture:
    """A picture that opens, as training will see it.

    file : where it lies.
    size : width and height in pixels.
    mode : such as "RGB", which some processors do not take all of.
    """

    file: Path
    size: tuple[int, int]
    mode: str


def check_folder(
    folder: str | os.PathLike, *, processor: Any = None, max_length: int | None = None
) -> dict:
    """Check the records of a folder, in any dialect, and their pictures; writes `check.json` there.

    With a processor every record is prepared as a training prepares it, so that a record which
    would end the training in its middle is found now: a picture of a shape or mode that the
    processor refuses, a control token of the model in a text, an answer that would be cut.

    Parameters
    ----------
    folder : holds `dataset_info.json` that names the files, or else JSON or JSON Lines files of
        records.
    processor : a Transformers processor, to prepare each record and to count its tokens.
    max_length : tokens to which a training would cut; a record that has more is an error.

    Returns
    -------
    dict : `ok`, whether nothing is wrong; `records` and `answers`, how many each file has (each
        answer of a dialogue is learned); `table`, for each check how many errors it found and the
        first of them; `errors`, up to 1,000, each with place (file:line), id, check and problem;
        `left_out`, the entries of `dataset_info.json` that are not read here, and why. With a
        processor also `tokens` (min, median, max of the answers with all that is before them) and
        `cut`, the tokens of the longer ones by id.

    Raises
    ------
    ValueError : the folder holds no records, or `max_length` comes without a processor.
    OSError : the report cannot be written.

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
    files, left_out = _record_files(folder)
    if not files:
        reasons = "".join(f"; {name}: {reason}" for name, reason in left_out.items())
        raise ValueError(f"{folder} holds no records{reasons}")
    if max_length and not processor:
        raise ValueError(
            "max_length is in tokens, which a processor counts: give one too (medtune check: --model)"
        )

    preparer = Preparer(processor, max_length) if processor else None
    findings = Findings(preparer)
    bar = tqdm(unit="record", delay=3)
    with bar:
        for place, record, pictures in _open_pictures(folder, files):
            findings.add(place, record, pictures)
            bar.update()
    findings.add_missing_files(folder, files)
    report = findings.report(left_out)
    try:
        write_json(folder / "check.json", report)
    except OSError as error:
        hint = (
            f"cannot write {folder / 'check.json'} ({error.strerror}): make room, or check a copy"
        )
        raise OSError(error.errno, hint) from None
    return report


def _record_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """Give the files of records, and what dataset_info.json names but is not there to be read."""
    info = folder / "dataset_info.json"
    if info.is_file():
        named, left_out = local_files(info)
        # several entries may share a file
        return list(dict.fromkeys(named.values())), left_out
    found = sorted(file for file in folder.glob("*.json*") if file.stem not in NO_RECORDS)
    return found, {}


# --- pictures ---------------------------------------------------------------------------------


def _open_pictures(
    folder: Path, files: list[Path]
) -> Iterator[tuple[str, Any, list[Picture | str]]]:
    """Yield place and record of all files, each with what its pictures are."""
    there = [file for file in files if file.is_file()]
    stream = itertools.chain.from_iterable(_placed_in(folder, file) for file in there)
    with ThreadPoolExecutor() as pool:
        while block := list(itertools.islice(stream, BLOCK)):
            records = [record for _, record in block]
            seen = pool.map(look_at_pictures, itertools.repeat(folder), records)
            for (place, record), pictures in zip(block, seen, strict=True):
                yield place, record, pictures


def _placed_in(folder: Path, file: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, record) of a file; one in a folder below is named with its folder."""
    for place, record in read_placed(file):
        number = place.rpartition(":")[2]
        yield f"{_name_in(folder, file)}:{number}", record


def _name_in(folder: Path, file: Path) -> str:
    return file.relative_to(folder).as_posix()


def look_at_pictures(folder: Path, record: Any) -> list[Picture | str]:
    """Open each picture that a record names, or say what is wrong with it in one line."""
    return [_look_at(folder, name) for name in pictures_of(record)]


def _look_at(folder: Path, name: Any) -> Picture | str:
    shown = str(name)[:100]
    try:
        file = picture_file(folder, name)
        # in the way in which the data set of a training decodes it
        image = datasets.Image().decode_example({"path": str(file), "bytes": None})
    except FileNotFoundError:
        return f"{shown}: it is missing"
    except Exception as error:  # decoders raise many kinds
        return f"{shown}: {one_line(error)}"
    if image.width * image.height > MAX_PIXELS:
        return f"{shown}: {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}"
    return Picture(file, image.size, image.mode)


# --- findings ---------------------------------------------------------------------------------


@dataclass
class Findings:
    """What a check found, record by record.

    preparer : prepares each record as a training does, if the caller gave a processor.
    records : number of records by file.
    answers : number of answers to be learned, by file.
    errors : all errors, with place, id, check and problem.
    tokens : tokens of each answer of the sound records with all before it, by the id of its row.
    ids : the place where each id was met first.
    groups : the file in which each group was met first.
    """

    preparer: Preparer | None
    records: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    errors: list[dict] = field(default_factory=list)
    tokens: dict[str, int] = field(default_factory=dict)
    ids: dict[str, str] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)

    def add(self, place: str, record: Any, pictures: list[Picture | str]) -> None:
        """Check one record, whose pictures have been looked at."""
        file = place.rpartition(":")[0]
        self.records[file] += 1
        sample_id = record_id(record, place)

        turns, problems = read_turns(record, len(pictures))
        problems += self._control_tokens(turns)
        for picture in pictures:
            if isinstance(picture, str):
                problems.append(Problem("pictures open", picture))
        if isinstance(record, dict):
            problems += self._claims(record, place, file)

        answers = answers_of(sample_id, turns, pictures)
        self.answers[file] += len(answers)
        if self.preparer and not problems:
            problems += self._prepare(self.preparer, answers)
        self._add_errors(place, sample_id, problems)

    def _control_tokens(self, turns: list) -> list[Problem]:
        known = self.preparer.control_tokens if self.preparer else None
        for role, text in turns:
            token = find_control_token(text, known)
            if token:
                problem = f"the {role} says {token}, which a model takes for a command"
                return [Problem("no control tokens", problem)]
        return []

    def _claims(self, record: dict, place: str, file: str) -> list[Problem]:
        """Find out whether another record has the id, or another file (a split) the group."""
        problems = []
        if record.get("id") not in (None, ""):
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

    def _prepare(self, preparer: Preparer, answers: list[Answer]) -> list[Problem]:
        """Prepare each answer of a record as a training does, and count its tokens."""
        for answer in answers:
            try:
                count = preparer.count_tokens(answer)
            except Exception as error:  # processors raise many kinds
                # the same would end each other answer, too
                return [Problem("processor takes it", one_line(error))]
            self.tokens[answer.id] = count
        # the last answer comes with all before it, so it is the longest
        problem = preparer.problem_of_length(self.tokens[answers[-1].id])
        return [Problem("answers whole", problem)] if problem else []

    def _add_errors(self, place: str, sample_id: str, problems: list[Problem]) -> None:
        for check, text in problems:
            error = {"place": place, "id": sample_id, "check": check, "problem": text}
            self.errors.append(error)

    def add_missing_files(self, folder: Path, files: list[Path]) -> None:
        """Note the files that dataset_info.json names and that are not there."""
        for file in files:
            if not file.is_file():
                name = _name_in(folder, file)
                problem = Problem("readable", "dataset_info.json names this file; it is missing")
                self._add_errors(name, name, [problem])

    def report(self, left_out: dict[str, str]) -> dict:
        """Sum up, as `check_folder` returns it."""
        report = {
            "ok": not self.errors,
            "records": dict(self.records),
            "answers": dict(self.answers),
            "table": self._table(),
            "errors": self.errors[:MOST_ERRORS],
            "left_out": left_out,
        }
        if self.preparer and self.tokens:
            lengths = sorted(self.tokens.values())
            middle = lengths[len(lengths) // 2]
            report["tokens"] = {"min": lengths[0], "median": middle, "max": lengths[-1]}
            report["cut"] = {}
            for name, count in self.tokens.items():
                if self.preparer.cuts(count):
                    report["cut"][name] = count
        return report

    def _table(self) -> list[dict]:
        counts = Counter(error["check"] for error in self.errors)
        first: dict[str, str] = {}
        for error in self.errors:
            first.setdefault(error["check"], f"{error['place']}: {error['problem']}")
        rows = []
        for check in CHECKS + (WITH_PROCESSOR if self.preparer else ()):
            rows.append({"check": check, "errors": counts[check], "first": first.get(check)})
        return rows
