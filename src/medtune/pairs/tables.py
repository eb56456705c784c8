"""Yield the rows of parquet files and of tables: CSV, TSV, JSON and JSON Lines.

A row is a dict with `image`, `id`, `caption` and whatever else the source knows.
"""

import csv
import json
import re
import secrets
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from medtune.files import one_line, read_json_lines

from .reading import Reading, our_names
from .record import FoundPair, names_group, record_pairs

TABLE_SUFFIXES = {".csv", ".tsv", ".json", ".jsonl"}

# The first word of a file's name -> the split that it means.
SPLITS = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "test": "test",
}


@dataclass(frozen=True)
class LoosePictures:
    """Pictures that no table names: each becomes a row with the caption "".

    Attributes
    ----------
    files : tuple of str
        Absolute paths of pictures and DICOM files.
    """

    files: tuple[str, ...]


@dataclass
class _Given:
    """What one walk over the tables has given away so far.

    Attributes
    ----------
    salt : str
        What patients' numbers are hashed with; made up where the caller gave none.
    ids : Counter
        How often each id that is made up or repeats has come.
    groups : dict of str to str
        The hash of a patient -> the number that the group got.
    """

    salt: str
    ids: Counter = field(default_factory=Counter)
    groups: dict[str, str] = field(default_factory=dict)


def split_of(file: Path) -> str | None:
    """Give the split that a file is named after: train, validation, test, or None.

    Parameters
    ----------
    file : Path
        Only the name counts, up to the first '-', '_' or '.'.

    Returns
    -------
    str or None
        "train", "validation" (for valid and val too), "test", or None for any other name.

    Examples
    --------
    >>> split_of(Path("data/val-00000-of-00002.parquet")), split_of(Path("captions.csv"))
    ('validation', None)
    """
    first_word = re.split(r"[-_.]", file.name)[0]
    return SPLITS.get(first_word)


def read_rows(
    tables: list[Path | LoosePictures], reading: Reading, keys: tuple[str, ...] = ()
) -> Iterator[dict]:
    """Yield the pairs of all tables in order.

    Parameters
    ----------
    tables : list of Path or LoosePictures
        Parquet files, tables of captions or dialogues, pictures without a table. It is a list
        because `datasets` spreads the lists among a generator's arguments, and only those, over the
        workers of a stream.
    reading : Reading
        How they are to be read.
    keys : tuple of str
        The columns that every row shall have, for lack of a value with None; none: those it has.

    Yields
    ------
    dict
        Rows of the wanted split, and those with a `problem`, of whatever split: nobody knows.

    Raises
    ------
    ValueError, OSError
        A table cannot be read or, if `reading.strict`, holds a bad row.
    """
    given = _Given(reading.salt or secrets.token_hex(16))
    for table in tables:
        file_split = None if isinstance(table, LoosePictures) else split_of(table)
        for row in _rows_of(table, reading, given):
            if reading.several_tables:
                row.setdefault("split", file_split)
            is_wanted = reading.split is None or row.get("split", file_split) == reading.split
            if is_wanted or row.get("problem"):
                yield {key: row.get(key) for key in keys or row}


def _rows_of(table: Path | LoosePictures, reading: Reading, given: _Given) -> Iterator[dict]:
    if isinstance(table, Path) and table.suffix == ".parquet":
        return _parquet_rows(table, reading.columns)
    return _table_rows(table, reading, given)


def _parquet_rows(shard: Path, columns: dict[str, str]) -> Iterator[dict]:
    try:
        # Memory stays flat: without pre_buffer a row group of any size is read page by page, and 32
        # pictures at a time are few enough even if each has some megabytes.
        with pq.ParquetFile(shard, pre_buffer=False, buffer_size=1 << 20) as file:
            names = our_names(file.schema_arrow.names, columns, shard)
            for batch in file.iter_batches(32, columns=list(names), use_threads=False):
                for row in batch.rename_columns(names).to_pylist():
                    row["image"] = _bytes_only(row["image"])
                    # ids of many sets are numbers, and some tables mix both
                    if row["id"] is not None:
                        row["id"] = str(row["id"])
                    yield row
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{shard} cannot be read to its end, fetch it again ({one_line(error)})"
        ) from None


def _bytes_only(cell: Any) -> dict | None:
    """Give the cell of a picture that a shard holds, without its path.

    A shard comes from elsewhere: it must not name files of this machine.
    """
    content = cell["bytes"] if isinstance(cell, dict) else cell
    return {"bytes": content, "path": None} if isinstance(content, bytes) else None


def _table_rows(table: Path | LoosePictures, reading: Reading, given: _Given) -> Iterator[dict]:
    """Yield the rows of a table; a bad record raises or becomes a row that says what is wrong."""
    for where, record in _records(table):
        try:
            # what could not be parsed takes the same way as what makes no pair
            if isinstance(record, ValueError):
                raise ValueError(f"not JSON ({record})")
            # all pairs of a record or none: read them before the first is given out
            found = list(record_pairs(record, reading, given.salt))
        except (ValueError, OSError, TypeError, AttributeError) as error:
            reason = f"{where}: {one_line(error)}"
            if reading.strict:
                is_missing = isinstance(error, FileNotFoundError)
                raise (FileNotFoundError if is_missing else ValueError)(reason) from None
            row = {"id": where, "image": None, "caption": None, "problem": reason}
            found = [FoundPair(row, id_is_given=True, patient=None)]
        for pair in found:
            _set_group(pair, reading, given)
            # an id that was made up, or that stands for several pairs, must be made different
            if len(found) > 1 or not pair.id_is_given:
                pair.row["id"] = _numbered(pair.row["id"], given.ids)
            yield pair.row


def _set_group(pair: FoundPair, reading: Reading, given: _Given) -> None:
    """Put a DICOM file into the group of its patient, unless the table names a group."""
    if not pair.patient or names_group(pair.row.get("group")):
        return
    if reading.salt:
        pair.row["group"] = pair.patient
    else:
        # a hash with a salt that nobody knows says nothing, and differs from call to call
        number = len(given.groups) + 1
        pair.row["group"] = given.groups.setdefault(pair.patient, f"dicom-{number:04d}")


def _numbered(name: str, ids: Counter) -> str:
    """Add a number to an id that came before: a, a-2, a-3."""
    ids[name] += 1
    return name if ids[name] == 1 else f"{name}-{ids[name]}"


def _records(table: Path | LoosePictures) -> Iterator[tuple[str, Any]]:
    """Yield (where it stands, record); a line that is not JSON comes as its ValueError.

    Bytes that are not UTF-8 come out as U+FFFD, which `reject_reason` looks for.
    """
    if isinstance(table, LoosePictures):
        for file in table.files:
            yield Path(file).name, {"image": file, "caption": ""}
        return
    if table.suffix in (".csv", ".tsv"):
        numbered = _csv_records(table)
    elif table.suffix == ".jsonl":
        numbered = read_json_lines(table)
    else:
        numbered = _json_records(table)
    for number, record in numbered:
        yield f"{table.name}:{number}", record


def _csv_records(table: Path) -> Iterator[tuple[int, dict]]:
    """Yield (number of the last line, record) of a table with any of the usual separators."""
    # the default refuses a field of 128 KiB: a long caption is for `reject_reason` to judge
    csv.field_size_limit(1 << 30)
    # newline="": a line end inside of a quoted caption stays what it is
    with open(table, encoding="utf-8-sig", errors="replace", newline="") as text:
        head = text.readline()
        text.seek(0)
        separator = max(",\t;", key=head.count)
        reader = csv.DictReader(text, delimiter=separator)
        for record in reader:
            yield reader.line_num, record


def _json_records(table: Path) -> Iterator[tuple[int, Any]]:
    """Yield (number from 1, record) of a JSON file that holds a list."""
    with open(table, encoding="utf-8-sig", errors="replace") as text:
        try:
            records = json.load(text)
        except ValueError as error:
            raise ValueError(
                f"{table} is not JSON ({error}): cut off, or JSON Lines named .json?"
            ) from None
    if not isinstance(records, list):
        raise ValueError(f"{table} is no list of records but one {type(records).__name__}")
    yield from enumerate(records, 1)
