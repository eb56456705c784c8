"""Open what holds the pairs, and read it in small blocks, so that memory stays flat."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from medtune.files import one_line
from medtune.pairs import load_pairs, safe_id

BLOCK = 64  # rows in memory at a time, and between two notes of the progress

TEXT = datasets.Value("string")

# Columns that a record builds itself, or that would make TRL or LLaMA-Factory take the record for
# one of another kind.
OWN_COLUMNS = {
    *("image", "images", "id", "caption", "split"),
    *("prompt", "completion", "messages", "conversations"),
    *("system", "instruction", "output", "history"),
    *("text", "tools", "chosen", "rejected", "problem"),
}
# Columns of the course's own sample, and of the sources that tell the same: they go into the
# records. What else a table holds (names, ages, numbers of patients) stays out unless it is named.
COURSE_COLUMNS = {
    *("group", "question", "roi", "has_box", "shows"),
    *("slice", "structure", "window", "modality", "fields"),
    *("slab", "slices", "plane", "spacing"),
}
# What a source knows about all rows at once is read from these.
SMALL_COLUMNS = ("id", "group", "split", "problem")
# Columns that tell the patient; `medtune.pairs.load_pairs` makes them groups that name nobody.
PATIENT_COLUMNS = {"patient_id", "subject_id", "patientid", "patient"}
# Types that JSON has no value for, as they look inside the text of a `datasets` feature.
NO_JSON = re.compile(r"Value\('(large_)?(binary|date|time|duration|decimal)|(Image|Audio|Video)\(")


@dataclass
class Shard:
    """A file of a source, or a whole `datasets.Dataset`.

    Attributes
    ----------
    name
        Name of the file; empty for a data set.
    rows
        How many rows it has; 1 for a file that cannot be opened.
    small
        Those of `SMALL_COLUMNS` that it has, as pyarrow arrays.
    foreign
        Whether it is a file as it came from elsewhere: its ids may be paths, and its
        pictures must not name files of this machine.
    read
        Gives tables of so many rows, from the first row to the last.
    problem
        Why the file cannot be opened, if so.
    file
        Where it lies; None for a data set.
    """

    name: str
    rows: int
    small: dict[str, list[pa.Array]]
    foreign: bool = False
    read: Callable[[int], Iterator[Any]] | None = None
    problem: str | None = None
    file: Path | None = None


@dataclass
class Source:
    """What holds the pairs.

    shards : its parts, in order.
    types : the `datasets` feature of each column.
    identity : what tells this source from another or from a changed one, as JSON can hold it.
    first : number of its first row; above 0 where this is a part of a larger source.
    """

    shards: list[Shard]
    types: dict[str, Any]
    identity: list
    first: int = 0

    @property
    def rows(self) -> int:
        """How many rows all shards have together."""
        return sum(shard.rows for shard in self.shards)

    @property
    def stop(self) -> int:
        """Give the number after that of the last row."""
        return self.first + self.rows

    def cells(self, column: str) -> list[Any]:
        """Give one of the small columns for all rows, None where a shard lacks it."""
        cells: list[Any] = []
        for shard in self.shards:
            if column in shard.small:
                for chunk in shard.small[column]:
                    cells += _readable(chunk)
            else:
                cells += [shard.problem if column == "problem" else None] * shard.rows
        return cells

    def ids(self) -> list[Any]:
        """Give the ids of all rows, as they stand in the records."""
        ids = []
        for shard in self.shards:
            for chunk in shard.small["id"]:
                for name in _readable(chunk):
                    foreign = shard.foreign and isinstance(name, str)
                    ids.append(safe_id(name) if foreign else name)
        return ids


def _readable(chunk: pa.Array) -> list[Any]:
    """Give the values of a column; a text that is not UTF-8, whose row is rejected, as None."""
    try:
        return chunk.to_pylist()
    except UnicodeDecodeError:
        values: list[Any] = []
        for value in chunk:
            try:
                values.append(value.as_py())
            except UnicodeDecodeError:
                values.append(None)
        return values


@dataclass
class Block:
    """Some rows of a shard that follow each other.

    shard : name of the shard.
    numbers : numbers of the rows, counted from 0 over the whole source.
    table : the rows as a pyarrow table or record batch; None if they cannot be read.
    problem : why they cannot be read, if so.
    foreign : as the shard has it.
    """

    shard: str
    numbers: range
    table: Any = None
    problem: str | None = None
    foreign: bool = False

    def rows(self) -> list[dict]:
        """Give the rows as dictionaries; one that cannot be read has only the key `problem`."""
        if self.problem:
            return [{"problem": self.problem} for _ in self.numbers]
        rows = []
        for index in range(len(self.numbers)):
            # Row by row, so that a text that is not UTF-8 spoils its own row only.
            try:
                rows += self.table.slice(index, 1).to_pylist()
            except UnicodeDecodeError as error:
                rows.append({"problem": f"text: {one_line(error)}"})
        if self.foreign:
            for row in rows:
                _make_our_own(row)
        return rows


def _make_our_own(row: dict) -> None:
    """Give a row of a foreign file a picture without a path, and an id that is none."""
    if isinstance(row.get("id"), str):
        row["id"] = safe_id(row["id"])
    picture = row.get("image")
    if isinstance(picture, dict):
        row["image"] = {"bytes": picture["bytes"], "path": None}


# --- open -------------------------------------------------------------------------------------


def open_source(source: Any) -> Source:
    """Open a source of pairs without reading its pictures.

    Parquet that already has our columns is read directly; everything else goes through
    `medtune.pairs.load_pairs`.

    Parameters
    ----------
    source : a `datasets.Dataset` of pairs, or what `medtune.pairs.load_pairs` takes.

    Raises
    ------
    ValueError, OSError : the source cannot be opened, or lacks image, id or caption.
    """
    if not isinstance(source, (str, os.PathLike)):
        return _open_dataset(source)
    opened = _open_parquet(Path(source).expanduser())
    if opened and not find_repeated_ids(opened):
        return opened
    try:
        # It also tells two views of one report, whose id repeats, from rows that are there twice.
        return _open_dataset(load_pairs(source, strict=False))
    except ValueError:
        if opened:
            return opened  # here a spoilt row is rejected alone, and so is a repeated one
        raise


def _open_parquet(path: Path) -> Source | None:
    """Open the parquet files of a path directly, or return None if that is not possible."""
    files = _parquet_files(path)
    shards, types = [], []
    for file in files:
        try:
            shard, shard_types = open_shard(file)
        except (OSError, ValueError) as error:
            problem = f"shard: {file.name} is cut off, fetch it again ({one_line(error)})"
            # It counts as one row, so that the file is listed among the rejected.
            ids = {"id": [pa.array([str(file)])]}
            shards.append(Shard(file.name, 1, ids, problem=problem, file=file))
            continue
        shards.append(shard)
        types.append(shard_types)

    if not shards:
        return None
    if not types:
        raise ValueError(shards[0].problem)
    if not has_our_columns(types[0]) or types.count(types[0]) < len(types):
        return None
    return Source(shards, types[0], [_file_identity(file) for file in files])


def _parquet_files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(path.rglob("*.parquet"))
    elif path.suffix == ".parquet":
        files = [path]
    else:
        files = []
    return [file for file in files if file.exists()]


def open_shard(file: Path) -> tuple[Shard, dict]:
    """Open a parquet file, and give it with the feature of each of its columns.

    Raises
    ------
    OSError, ValueError : it is no parquet file, or a part of one.
    """
    # Without pre_buffer, a row group of any size is read page by page.
    parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 16)
    types = dict(datasets.Features.from_arrow_schema(parquet.schema_arrow))
    small = _small_columns(parquet.read(columns=[name for name in SMALL_COLUMNS if name in types]))
    rows = parquet.metadata.num_rows
    shard = Shard(file.name, rows, small, foreign=True, read=parquet.iter_batches, file=file)
    return shard, types


def _small_columns(table: pa.Table) -> dict[str, list[pa.Array]]:
    return {name: table[name].chunks for name in table.column_names}


def has_our_columns(types: dict[str, Any]) -> bool:
    """Say whether a file has image, id and caption as we call them, and nothing to be renamed."""
    texts = types.get("id") == TEXT and types.get("caption") == TEXT
    for name in types:
        plain = name.strip().lower()
        if plain in PATIENT_COLUMNS and "group" not in types:
            return False
        # "Split" or "question ": `load_pairs` knows what is meant
        if plain != name and plain in {*COURSE_COLUMNS, "split", "caption_zh"}:
            return False
    return texts and _holds_bytes(types.get("image"))


def _holds_bytes(kind: Any) -> bool:
    """Say whether a column holds the bytes of pictures, and not only names of files."""
    content = kind.get("bytes") if isinstance(kind, dict) else kind
    return content in (datasets.Image(), datasets.Value("binary"), datasets.Value("large_binary"))


def _file_identity(file: Path) -> list:
    stat = file.stat()
    return [file.name, stat.st_size, stat.st_mtime_ns]


def _open_dataset(pairs: Any) -> Source:
    needed = {"image", "id", "caption"}
    if not isinstance(pairs, datasets.Dataset) or not needed <= set(pairs.column_names):
        raise ValueError(
            "convert needs a Dataset with image, id and caption, as medtune.pairs.load_pairs gives"
        )
    wanted = {"image": datasets.Image(decode=False), "id": TEXT, "caption": TEXT}
    for name, kind in wanted.items():
        if pairs.features[name] != kind:
            pairs = pairs.cast_column(name, kind)
    there = [name for name in SMALL_COLUMNS if name in pairs.column_names]
    small = _small_columns(pairs.select_columns(there).with_format("arrow")[:])
    shard = Shard("", len(pairs), small, read=pairs.with_format("arrow").iter)
    return Source([shard], dict(pairs.features), [pairs._fingerprint])


# --- read -------------------------------------------------------------------------------------


def read_blocks(source: Source, first: int) -> Iterator[Block]:
    """Yield the rows of a source from row number `first` on.

    A shard that ends before is not read. `first` is where a block of an earlier call ended, so no
    block lies on both sides of it.
    """
    start = source.first
    for shard in source.shards:
        stop = start + shard.rows
        if stop > first:
            yield from _shard_blocks(shard, start, first)
        start = stop


def _shard_blocks(shard: Shard, start: int, first: int) -> Iterator[Block]:
    stop = start + shard.rows
    problem = shard.problem
    if shard.read:
        try:
            for table in shard.read(BLOCK):
                end = start + table.num_rows
                if start >= first:
                    yield Block(shard.name, range(start, end), table, foreign=shard.foreign)
                start = end
        except (OSError, ValueError) as error:
            problem = f"shard: {shard.name} breaks off here ({one_line(error)})"
    if problem:
        yield Block(shard.name, range(start, stop), problem=problem)


def find_repeated_ids(source: Source) -> dict[int, int]:
    """Find the rows whose id an earlier row has already: number of the row -> number of the first.

    Only a hash of 8 bytes is kept of each id, so that this works for millions of them.
    """
    hashes = np.fromiter(id_hashes(source.shards), np.int64)
    _, firsts, groups = np.unique(hashes, return_index=True, return_inverse=True)
    first_of_row = firsts[groups]
    later = np.flatnonzero(first_of_row != np.arange(source.rows))
    return {int(row): int(first_of_row[row]) for row in later}


def id_hashes(shards: Sequence[Shard]) -> Iterator[int]:
    """Yield a hash of the id of each row."""
    for shard in shards:
        for chunk in shard.small.get("id", ()):
            # As bytes: an id that is not UTF-8 cannot become a text.
            for value in chunk.cast("binary").to_pylist():
                yield hash(value)


def copied_columns(types: dict[str, Any], keep: Sequence[str]) -> list[str]:
    """Name the columns that go into the records as they are.

    Parameters
    ----------
    types : the feature of each column of the source.
    keep : columns that the caller wants besides those of the course.

    Raises
    ------
    ValueError : a column to keep is not there, or cannot be kept.
    """
    for name in keep:
        if name not in types:
            raise ValueError(f"keep={name}: the source has no such column, only {', '.join(types)}")
        if name in OWN_COLUMNS:
            raise ValueError(f"keep={name}: a record has something else of this name; rename it")
        if _lacks_json(types[name]):
            raise ValueError(f"keep={name}: JSON has no value for it; make it a text or a number")
    names = []
    for name, kind in types.items():
        wanted = name in keep or name in COURSE_COLUMNS
        if wanted and name not in OWN_COLUMNS and not _lacks_json(kind):
            names.append(name)
    return names


def _lacks_json(kind: Any) -> bool:
    return bool(NO_JSON.search(str(kind)))


def left_out_columns(types: dict[str, Any], copied: Sequence[str]) -> list[str]:
    """Name the columns of a source that its records do not have, in any form."""
    used = {"image", "id", "caption", "caption_zh", "split", "problem", *copied}
    return [name for name in types if name not in used]
