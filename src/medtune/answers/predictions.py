"""Read answers that others made: LLaMA-Factory's, those of an OpenAI batch, any JSON or CSV table.

What cannot be read is named with its line: no answer is left out in silence.
"""

import csv
import io
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from medtune.files import one_line
from medtune.pairs import names_group, safe_id
from medtune.records import read_records

from .prompts import prompt_of

# Our names, and by which others call the same; the first that a row has counts. `predict`, `label`
# and `prompt` are LLaMA-Factory's, `custom_id` is OpenAI's, whose `id` is that of the request.
ALIASES = {
    "id": ("custom_id", "id", "sample_id", "image_id", "question_id", "study_id"),
    "answer": (
        "answer",
        "predict",
        "prediction",
        "predicted",
        "generated_text",
        "generated",
        "response",
        "output",
    ),
    "reference": ("reference", "label", "labels", "ground_truth", "target", "gt"),
    "group": ("group",),
    "slice": ("slice",),
    "question": ("question", "prompt"),
}

# What else a table of references calls a reference.
MORE_REFERENCES = ("caption", "report", "answer", "impression", "findings")

# In rows of a data set these hold turns of a dialogue.
TURNS = ("completion", "messages", "conversations", "conversation")

# Where an OpenAI batch has what the model said.
OPENAI = ("response", "body", "choices")

# Signs that no text has, but pictures and archives do.
CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")

# A UTF-16 file begins so, as Excel's "Unicode text" does.
UTF16 = (b"\xff\xfe", b"\xfe\xff")

# Bad lines that a message names; the others are counted.
MOST_NAMED = 5

_LOG = logging.getLogger("medtune")


@dataclass
class _Line:
    """A row of a table, or what is wrong with it.

    Attributes
    ----------
    place : line of the file, from 1; of a JSON list the number of the item.
    values : of the row, by the names of the file.
    problem : in one line, empty where there is none.
    """

    place: int
    values: dict[str, Any]
    problem: str = ""


def read_predictions(
    path: str | PathLike,
    *,
    columns: Mapping[str, str] | None = None,
    references: str | PathLike | Mapping[str, str] | Iterable[Mapping[str, Any]] | None = None,
    encoding: str | None = None,
) -> list[dict[str, Any]]:
    r"""Read a table of answers, whoever made it.

    Read are JSON Lines, a JSON list and CSV (also with semicolons or tabs): what `generate_answers`
    wrote, LLaMA-Factory's `generated_predictions.jsonl`, the output of an OpenAI batch, and tables
    whose columns are called alike or are named by `columns`.

    Parameters
    ----------
    path : the file.
    columns : the name that the file has for "id", "answer", "reference", "group", "slice" or
        "question", by ours. A name with points leads into JSON objects: "response.text".
    references : where the references come from if the file has none, or others: a table with an id
        and a reference or caption, a file of training records, a mapping from id to reference, or
        rows of a data set. An answer whose id is the name of a file finds the record that
        conversion made of it, and takes over its id.
    encoding : of a file that is not UTF-8, such as "gb18030".

    Returns
    -------
    list of dict : in the order of the file "id", "answer" and "reference" (str), and "group",
        "slice" and "question" where they are known. Without ids in the file a row's number is its id, from 1.

    Raises
    ------
    OSError : there is no such file.
    ValueError : the file is no table of answers, or lines of it are none: all of them are counted,
        the first are named; an id that stands on two lines; no references; an encoding that does
        not fit.

    Examples
    --------
    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp(), "generated_predictions.jsonl")
    >>> _ = file.write_text('{"prompt": "What?", "predict": "A liver.", "label": "A spleen."}\n')
    >>> read_predictions(file)
    [{'id': '1', 'answer': 'A liver.', 'reference': 'A spleen.', 'question': 'What?'}]
    """
    path = Path(path)
    columns = dict(columns or {})
    _check_names(columns)
    lines = list(_read_table(path, encoding))
    _refuse_missing_columns(path, lines, columns)
    known = None if references is None else _read_references(references, encoding)
    rows = []
    bad = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append((line.place, _row_of(line, number, columns, known)))
        except ValueError as error:
            bad.append(f"line {line.place}: {error}")
    _refuse_bad(path, bad, len(lines))
    _refuse_repeated(path, rows)
    answers = [row for _, row in rows]
    if known is not None:
        _tell_unanswered(path, answers, known)
    return answers


def _check_names(columns: Mapping[str, str]) -> None:
    for name in columns:
        if name not in ALIASES:
            known = ", ".join(ALIASES)
            raise ValueError(f"columns names {name!r}, but can name {known} only")


# ---- files


def _read_table(path: Path, encoding: str | None) -> Iterator[_Line]:
    """Yield the rows of a file, whichever form its content has."""
    text = _text_of(path, encoding)
    begin = text.lstrip()[:1]
    if begin == "[":
        yield from _json_list(path, text)
    elif begin == "{":
        yield from _json_lines(path, text)
    else:
        yield from _delimited(path, text)


def _text_of(path: Path, encoding: str | None) -> str:
    """Read a file as text, and refuse what is none."""
    if path.is_dir():
        raise ValueError(f"{path} is no table of answers but a folder: name a file of it")
    content = path.read_bytes()
    no_table = f"{path} is no table of answers: JSONL, JSON or CSV"
    if not content.strip():
        raise ValueError(f"{no_table}; it is empty")
    if encoding is None and content.startswith(UTF16):
        encoding = "utf-16"
    if encoding is None and (CONTROL.search(content[:8192]) or content.startswith(b"%PDF")):
        raise ValueError(no_table)
    try:
        return content.decode(encoding or "utf-8-sig")
    except LookupError:
        raise ValueError(f"there is no encoding={encoding}: take a name such as gb18030") from None
    except UnicodeError:
        if encoding:
            raise ValueError(f"{path} is not in encoding={encoding}") from None
        raise ValueError(
            f"{path} is not UTF-8: say what it is, encoding=gb18030 or cp1252 for example"
        ) from None


def _json_list(path: Path, text: str) -> Iterator[_Line]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is no table of answers: {one_line(error)}") from None
    for number, value in enumerate(values, 1):
        yield _line_of(number, value)


def _json_lines(path: Path, text: str) -> Iterator[_Line]:
    """Yield the rows of JSON Lines, or of one JSON object that holds a list of them."""
    lines = text.split("\n")
    try:
        whole = json.loads(text)
    except ValueError:
        whole = None
    if isinstance(whole, dict) and "\n" in text.strip():
        # one object over several lines: the list in it is the table
        for value in whole.values():
            if isinstance(value, list):
                for number, item in enumerate(value, 1):
                    yield _line_of(number, item)
                return
        raise ValueError(f"{path} is no table of answers: one JSON object without a list in it")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            # a kill may cut the last line short
            yield _Line(number, {}, f"it is no JSON, it begins {line[:20]!r}")
            continue
        yield _line_of(number, value)


def _line_of(number: int, value: Any) -> _Line:
    if isinstance(value, dict):
        return _Line(number, value)
    return _Line(number, {}, f"it is no JSON object but {type(value).__name__}")


def _delimited(path: Path, text: str) -> Iterator[_Line]:
    """Yield the rows of a table with a heading, cut by commas, semicolons or tabs."""
    heading_line = text.lstrip("\r\n").partition("\n")[0]
    delimiter = max(",;\t", key=heading_line.count)
    csv.field_size_limit(1 << 27)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    heading: list[str] = []
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if not heading:
                heading = [cell.strip() for cell in cells]
                if len(heading) < 2:
                    raise ValueError(f"{path} is no table of answers: JSONL, JSON or CSV")
                continue
            if len(cells) == len(heading):
                yield _Line(reader.line_num, dict(zip(heading, cells, strict=True)))
            else:
                expected = len(heading)
                problem = f"it has {len(cells)} cells, the heading has {expected}"
                yield _Line(reader.line_num, {}, problem)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from None


# ---- rows


def _refuse_missing_columns(path: Path, lines: Sequence[_Line], columns: Mapping[str, str]) -> None:
    """Raise `ValueError` if no row has a column that the caller named."""
    there: dict[str, None] = {}
    for line in lines:
        there.update(dict.fromkeys(line.values))
    for name in columns.values():
        if there and not any(_has(line.values, name) for line in lines):
            raise ValueError(f"{path} has no column {name!r}; it has {', '.join(there)}")


def _has(values: Mapping[str, Any], name: str) -> bool:
    return _follow(values, name) is not _ABSENT


_ABSENT = object()


def _follow(values: Any, name: str) -> Any:
    """Return the value of a name, which may lead into objects by points."""
    if isinstance(values, Mapping) and name in values:
        return values[name]
    for step in name.split("."):
        if isinstance(values, Mapping) and step in values:
            values = values[step]
        elif isinstance(values, list) and step.isdigit() and int(step) < len(values):
            values = values[int(step)]
        else:
            return _ABSENT
    return values


def _find(
    values: Mapping[str, Any], ours: str, columns: Mapping[str, str], more: Sequence[str] = ()
) -> Any:
    """Return what a row has for one of our names, `_ABSENT` if it has nothing."""
    if ours in columns:
        return _follow(values, columns[ours])
    # headings are written in many ways: "Predict ", "Image ID"
    plain = {}
    for key in values:
        plain.setdefault("_".join(str(key).split()).lower(), key)
    for alias in (*ALIASES[ours], *more):
        if alias in plain:
            return values[plain[alias]]
    return _ABSENT


def _row_of(
    line: _Line,
    number: int,
    columns: Mapping[str, str],
    known: Mapping[str, Mapping[str, Any]] | None,
) -> dict[str, Any]:
    """Make our row of a line; raise `ValueError` that says what is wrong with it."""
    if line.problem:
        raise ValueError(line.problem)
    values = line.values
    name = _find(values, "id", columns)
    if name is _ABSENT:
        name = number
    if not _is_text(name) or not str(name).strip():
        raise ValueError("its id is empty or no text")
    row = {"id": str(name).strip(), "answer": _answer_of(values, columns)}
    joined: Mapping[str, Any] = {}
    if known is None:
        row["reference"] = _own_reference(values, columns)
    else:
        row["id"] = _known_id(row["id"], known)
        joined = known[row["id"]]
        row["reference"] = joined["reference"]
    return row | _rest_of(values, columns, joined)


def _known_id(name: str, known: Mapping[str, Any]) -> str:
    """Return the id that the references have for an id."""
    if name in known:
        return name
    # conversion hashes ids that are names of files
    hashed = safe_id(name)
    if hashed not in known:
        raise ValueError(f"there is no reference for id {name!r}")
    return hashed


def _own_reference(values: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    """Return the reference that a row has itself."""
    reference = _find(values, "reference", columns)
    if isinstance(reference, list) and len(reference) == 1:
        reference = reference[0]
    if reference is _ABSENT:
        raise ValueError(
            "it has no reference: name its column, columns={'reference': 'NAME'}, "
            "or give references=TABLE"
        )
    if not _is_text(reference):
        raise ValueError("its reference is no text")
    return str(reference)


def _answer_of(values: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    """Return the answer of a row."""
    answer = _find(values, "answer", columns)
    if "answer" not in columns and ("custom_id" in values or isinstance(answer, Mapping)):
        answer = _openai_answer(values)
    if answer is _ABSENT:
        raise ValueError("it has no answer: name its column, columns={'answer': 'NAME'}")
    if not _is_text(answer):
        raise ValueError("its answer is no text")
    return str(answer)


def _openai_answer(values: Mapping[str, Any]) -> Any:
    """Return what the model said in a line of an OpenAI batch."""
    error = values.get("error") or _follow(values, "response.body.error")
    if error and error is not _ABSENT:
        said = error.get("message") if isinstance(error, Mapping) else error
        raise ValueError(f"the request failed: {one_line(said or error, limit=100)}")
    content = _follow(values, ".".join([*OPENAI, "0", "message", "content"]))
    if content is _ABSENT:
        raise ValueError(f"it has no {'.'.join(OPENAI)}[0].message.content")
    if isinstance(content, list):
        texts = [part.get("text") or "" for part in content if isinstance(part, Mapping)]
        content = "".join(texts)
    return content


def _rest_of(
    values: Mapping[str, Any], columns: Mapping[str, str], joined: Mapping[str, Any]
) -> dict[str, str]:
    """Return group, slice and question of a row, as far as they are known."""
    rest = {}
    for ours in ("group", "slice", "question"):
        value = _find(values, ours, columns)
        if value is _ABSENT or not names_group(value):
            value = joined.get(ours)
        if names_group(value) and _is_text(value):
            rest[ours] = str(value)
    return rest


def _is_text(value: Any) -> bool:
    """Say whether a value can stand as text: a text or a number, but not NaN and not a truth."""
    if isinstance(value, bool):
        return False
    return isinstance(value, str) or (isinstance(value, int | float) and value == value)


def _refuse_bad(path: Path, bad: Sequence[str], total: int) -> None:
    if not bad:
        return
    more = len(bad) - MOST_NAMED
    named = "; ".join(bad[:MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")
    raise ValueError(f"{path}: {len(bad)} of {total} lines are no answers: {named}")


def _refuse_repeated(path: Path, rows: Sequence[tuple[int, dict[str, Any]]]) -> None:
    first: dict[str, int] = {}
    for place, row in rows:
        if row["id"] in first:
            raise ValueError(
                f"{path}: id {row['id']!r} stands on lines {first[row['id']]} and {place}: "
                "an id must stand on one line only"
            )
        first[row["id"]] = place


# ---- references


def _read_references(
    source: str | PathLike | Mapping[str, str] | Iterable[Mapping[str, Any]],
    encoding: str | None,
) -> dict[str, dict[str, Any]]:
    """Return "reference", and "group" and "question" where they are known, by id."""
    if isinstance(source, Mapping):
        return {str(name): {"reference": str(text)} for name, text in source.items()}
    where = "references"
    if isinstance(source, str | PathLike):
        where = str(source)
        rows: Iterable[Mapping[str, Any]] = _rows_of_references(Path(source), encoding)
    else:
        rows = source
    known: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(rows, 1):
        name = _find(row, "id", {})
        reference = _reference_of(row)
        if not _is_text(name) or not _is_text(reference):
            raise ValueError(f"{where}, row {number}: it needs an id and a reference or caption")
        name = str(name).strip()
        if name in known:
            raise ValueError(f"{where}, row {number}: id {name!r} has a reference already")
        known[name] = {"reference": str(reference)} | _rest_of(row, {}, {})
    return known


def _rows_of_references(path: Path, encoding: str | None) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a table of references, or of a file of training records in any dialect."""
    for line in _read_table(path, encoding):
        if line.problem:
            raise ValueError(f"{path}, line {line.place}: {line.problem}")
        if any(key in line.values for key in TURNS) and path.suffix == ".jsonl":
            columns = ["id", "prompt", "completion", "group", "slice"]
            records = read_records(path.parent, path.stem)
            yield from records.select_columns([c for c in columns if c in records.column_names])
            return
        yield line.values


def _reference_of(row: Mapping[str, Any]) -> Any:
    if row.get("completion") and not isinstance(row["completion"], str):
        return prompt_of(row).reference
    return _find(row, "reference", {}, MORE_REFERENCES)


def _tell_unanswered(
    path: Path, answers: Sequence[Mapping[str, Any]], known: Mapping[str, Any]
) -> None:
    """Warn where references have no answer: a batch may have lost some."""
    answered = {row["id"] for row in answers}
    missing = [name for name in known if name not in answered]
    if missing:
        _LOG.warning(
            f"{path}: {len(missing)} of {len(known)} references have no answer, "
            f"the first is {missing[0]!r}"
        )
