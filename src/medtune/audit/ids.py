"""Find ids that stand in several rows of a set of shards, without holding the set in memory."""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb

from medtune.files import one_line

# What DuckDB may hold in memory; the rest goes to files of its own, which are deleted in the end.
MEMORY = "512MB"

# So many shards are named in a warning.
MOST_NAMED = 10


@dataclass(frozen=True)
class RepeatedIds:
    """Which ids stand in several rows.

    Attributes
    ----------
    rows : rows of all shards.
    ids : how many ids stand in more than one row.
    across : how many of them stand in more than one shard.
    later_rows : rows whose id an earlier row has.
    shards : for each shard with such an id, by its place in the order of the shards from 0, how many
        of its rows have one.
    without_ids : the shards that have no column of ids.
    nameless_rows : rows of the others without an id.
    """

    rows: int
    ids: int
    across: int
    later_rows: int
    shards: dict[int, int]
    without_ids: list[int]
    nameless_rows: int

    def warnings(self) -> list[str]:
        """Say what was found, one line each, without an id: an id may name a patient.

        Examples
        --------
        >>> found = RepeatedIds(9, 1, 1, 1, {0: 1, 2: 1}, [], 0)
        >>> print(found.warnings()[0])
        1 ids stand in more than one row, 1 of them in several shards (2 rows in shards 0, 2, ...
        """
        lines = []
        if self.ids:
            rows = sum(self.shards.values())
            lines.append(
                f"{self.ids} ids stand in more than one row, {self.across} of them in several "
                f"shards ({rows} rows in shards {_listed(list(self.shards))}, counted from 0 in "
                f"the order of their names): if these are copies, take {self.later_rows} rows out; "
                "if they are different pictures, give them ids that differ, such as the shard's "
                "number and the row's"
            )
        if self.without_ids:
            lines.append(
                f"{len(self.without_ids)} shards have no column of ids (shards "
                f"{_listed(self.without_ids)}, counted from 0): whether their rows are there twice "
                "is not known; name the column that has them, or add one"
            )
        if self.nameless_rows:
            lines.append(f"{self.nameless_rows} rows have no id: they are compared with none")
        return lines


def repeated_ids(
    source: str | os.PathLike | Sequence[str | os.PathLike], *, column: str = "id"
) -> RepeatedIds:
    """Look for ids that repeat within a parquet shard or across shards.

    Only the footers and the column of ids are read, by DuckDB, which puts aside on disk what does
    not fit into 512 MB. Ids are compared as texts: the number 7 in one shard and the text "7" in
    another are the same.

    Parameters
    ----------
    source : a parquet file, a folder of them, which is searched with its subfolders, or a list of
        files; the order is that of the names, of a list its own.
    column : the column of ids.

    Returns
    -------
    RepeatedIds : the counts; no id is kept.

    Raises
    ------
    ValueError : there is no parquet file, or one cannot be read.

    Examples
    --------
    >>> import tempfile
    >>> import pyarrow, pyarrow.parquet
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name, ids in {"a": [1, 2], "b": ["2", "3"]}.items():
    ...     pyarrow.parquet.write_table(pyarrow.table({"id": ids}), folder / f"{name}.parquet")
    >>> found = repeated_ids(folder)
    >>> found.ids, found.across, found.shards
    (1, 1, {0: 1, 1: 1})
    """
    shards = _shards_of(source)
    with _database() as database:
        rows = _count_rows(database, shards)
        with_ids = _shards_with(database, shards, column)
        without_ids = [number for number in range(len(shards)) if number not in with_ids]
        if not with_ids:
            return RepeatedIds(rows, 0, 0, 0, {}, without_ids, 0)
        _make_tables(database, shards, with_ids, column)
        [nameless] = database.execute("select count(*) from ids where id is null").fetchone()
        ids, across, repeated_rows = database.execute(
            "select count(*), count(*) filter (several), coalesce(sum(times), 0) from repeated"
        ).fetchone()
        counted = database.execute(
            "select shard, count(*) from ids semi join repeated using (id) group by shard "
            "order by shard"
        ).fetchall()
    return RepeatedIds(
        rows=rows,
        ids=ids,
        across=across,
        later_rows=int(repeated_rows) - ids,
        shards=dict(counted),
        without_ids=without_ids,
        nameless_rows=nameless,
    )


def _shards_of(source: str | os.PathLike | Sequence[str | os.PathLike]) -> list[str]:
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        shards = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    else:
        shards = [Path(each) for each in source]
    if not shards:
        raise ValueError(f"source={source} has no parquet file: give a folder with shards")
    for shard in shards:
        if not shard.is_file():
            raise ValueError(f"source={source}: there is no file {shard.name}")
    return [str(shard) for shard in shards]


@contextlib.contextmanager
def _database() -> Iterator[duckdb.DuckDBPyConnection]:
    """Open a database in memory that puts aside on disk what is too much."""
    with tempfile.TemporaryDirectory(prefix="medtune-ids-") as folder:
        settings = {
            "memory_limit": MEMORY,
            "temp_directory": folder,
            "threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2,
            "preserve_insertion_order": False,
        }
        database = duckdb.connect(config=settings)
        try:
            yield database
        finally:
            database.close()


def _count_rows(database: duckdb.DuckDBPyConnection, shards: list[str]) -> int:
    """Count the rows by the footers."""
    question = "select coalesce(sum(num_rows), 0) from parquet_file_metadata(?)"
    return sum(int(_ask(database, question, shard)) for shard in shards)


def _shards_with(database: duckdb.DuckDBPyConnection, shards: list[str], column: str) -> list[int]:
    """Give the numbers of the shards that have a column."""
    question = "select count(*) from (describe select * from read_parquet(?)) where column_name = ?"
    return [
        number for number, shard in enumerate(shards) if _ask(database, question, shard, column)
    ]


def _make_tables(
    database: duckdb.DuckDBPyConnection, shards: list[str], with_ids: list[int], column: str
) -> None:
    """Make `ids`, a row for each row, and `repeated`, a row for each id that repeats."""
    database.execute("create temp table ids (id varchar, shard integer)")
    name = '"' + column.replace('"', '""') + '"'
    for number in with_ids:
        # one shard after the other, so that each may have ids of another type
        into = f"insert into ids select cast({name} as varchar), {number} from read_parquet(?)"
        _ask(database, into, shards[number])
    database.execute(
        "create temp table repeated as select id, count(*) as times, "
        "min(shard) < max(shard) as several from ids where id is not null "
        "group by id having count(*) > 1"
    )


def _ask(database: duckdb.DuckDBPyConnection, question: str, shard: str, *values: str) -> int:
    """Put a question to one shard whose answer is one number; a shard that is bad is named."""
    # DuckDB takes these for a pattern of several files
    path = re.sub(r"([\[*?])", r"[\1]", shard)
    try:
        return database.execute(question, [path, *values]).fetchone()[0]
    except duckdb.Error as error:
        raise ValueError(
            f"source: {Path(shard).name} cannot be read, fetch it again ({one_line(error)})"
        ) from None


def _listed(numbers: list[int]) -> str:
    named = ", ".join(map(str, numbers[:MOST_NAMED]))
    more = len(numbers) - MOST_NAMED
    return f"{named} and {more} others" if more > 0 else named
