"""Read the records of a table, whatever its form."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .delimited import read_delimited
from .excel import EXCEL_SUFFIXES, read_excel
from .json_tables import read_json, read_json_rows
from .reading import LoosePictures, Reading, Table
from .shards import SHARD_SUFFIXES, read_shard, schema_of, shard_names

TABLE_SUFFIXES = {".csv", ".tsv", ".tab", ".txt", ".json", ".jsonl", ".ndjson"} | EXCEL_SUFFIXES


def records_of(table: Table | LoosePictures, reading: Reading) -> Iterator[tuple[str, Any]]:
    """Yield (where it stands, record) of a table.

    Parameters
    ----------
    table : Table or LoosePictures
        Any part of a source.
    reading : Reading
        How it is to be read.

    Yields
    ------
    tuple of str and any value
        A record, or a ValueError that says why there is none.

    Raises
    ------
    ValueError, OSError
        The table as a whole cannot be read.
    """
    if isinstance(table, LoosePictures):
        for file in table.files:
            yield Path(file).name, {"image": file, "caption": ""}
        return
    file = table.path
    columns = table.columns | reading.columns
    # files of one name may lie in several folders
    folder = file.resolve().parent
    nested = folder.is_relative_to(reading.base) and folder != reading.base
    parents = folder.relative_to(reading.base).parts if nested else ()
    # no slash: that would make a path of what only says where a row stands
    name = " - ".join((*parents, file.name))
    suffix = file.suffix.lower()
    if suffix in SHARD_SUFFIXES:
        schema, _ = schema_of(file)
        numbered = read_shard(file, shard_names(schema, columns, file))
    elif suffix in EXCEL_SUFFIXES:
        numbered = read_excel(file, columns)
    elif suffix in (".jsonl", ".ndjson"):
        numbered = read_json_rows(file, reading.encoding)
    elif suffix == ".json":
        numbered = read_json(file, reading.encoding)
    else:
        numbered = read_delimited(file, reading.encoding, columns)
    for number, record in numbered:
        yield f"{name}:{number}", record
