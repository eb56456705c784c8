"""Look over all ids of a source before its first row is given.

Two rows of one id are two views of one report, say, and must stay together: the first of them has
to know that there is a second.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .columns import our_names, plain_name
from .reading import LoosePictures, Reading, Table
from .record import as_id
from .salt import is_unsafe
from .shards import SHARD_SUFFIXES, batches_of, schema_of, shard_names
from .sources import records_of

# Of a larger set of shards nobody looks at all ids before the first row: conversion names those
# that come again.
MOST_IDS = 1_000_000


@dataclass(frozen=True)
class Survey:
    """What is known before the rows are read.

    Attributes
    ----------
    repeated : frozenset of int
        The hashes of the ids that stand on several rows.
    needs_salt : bool
        Whether ids are made up or hashed, or patients' numbers are hashed.
    """

    repeated: frozenset[int]
    needs_salt: bool


def id_hash(name: str) -> int:
    """Give 8 bytes of an id's hash as a number: the same in every process.

    Examples
    --------
    >>> id_hash("s1") == id_hash("s1"), id_hash("s1") == id_hash("s2")
    (True, False)
    """
    digest = hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def look_over(tables: list[Table | LoosePictures], reading: Reading) -> Survey:
    """Look over the ids of all tables.

    Parameters
    ----------
    tables : list of Table or LoosePictures
        What the source consists of.
    reading : Reading
        How it is to be read.

    Returns
    -------
    Survey
        Which ids stand on several rows, and whether a salt is needed.

    Raises
    ------
    ValueError, OSError
        A table cannot be read at all.
    """
    needs_salt = False
    hashes: list[int] = []
    for table in tables:
        if isinstance(table, LoosePictures):
            needs_salt = True
        elif table.path.suffix in SHARD_SUFFIXES:
            ids, needs = _of_shard(table, reading)
            needs_salt = needs_salt or needs
            hashes += ids
        else:
            # whether a file is a plain picture or DICOM shows only when it is opened
            needs_salt = True
            hashes += [id_hash(name) for name in _ids_of_table(table, reading)]
    values, counts = np.unique(np.array(hashes, dtype=np.int64), return_counts=True)
    return Survey(frozenset(values[counts > 1].tolist()), needs_salt)


def _of_shard(table: Table, reading: Reading) -> tuple[list[int], bool]:
    schema, count = schema_of(table.path)
    names = shard_names(schema, table.columns | reading.columns, table.path)
    theirs = {ours: name for name, ours in names.items()}
    hashes_group = "group" in theirs and plain_name(theirs["group"]) != "group"
    if "id" not in theirs or count > MOST_IDS:
        return [], True
    needs_salt = hashes_group
    hashes = []
    try:
        for batch in batches_of(table.path, [theirs["id"]]):
            for cell in batch.column(0).to_pylist():
                name = as_id(cell)
                needs_salt = needs_salt or name is None or is_unsafe(name)
                if name is not None:
                    hashes.append(id_hash(name))
    except (OSError, ValueError):
        # damage is named where the rows are read
        needs_salt = True
    return hashes, needs_salt


def _ids_of_table(table: Table, reading: Reading) -> Iterator[str]:
    names_of: dict[tuple, str | None] = {}
    for _, record in records_of(table, reading):
        if not isinstance(record, dict):
            continue
        key = tuple(record)
        if key not in names_of:
            names_of[key] = _id_column(record, table.columns | reading.columns)
        name = as_id(record.get(names_of[key])) if names_of[key] is not None else None
        if name is not None:
            yield name


def _id_column(record: dict, columns: dict[str, str]) -> str | None:
    available = [name for name in record if isinstance(name, str)]
    present = {plain_name(name) for name in available}
    columns = {ours: theirs for ours, theirs in columns.items() if plain_name(theirs) in present}
    for theirs, ours in our_names(available, columns, "the record").items():
        if ours == "id":
            return theirs
    return None
