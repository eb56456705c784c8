"""Read shards, files of rows with known types: parquet, and Arrow as `datasets` saves it."""

from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from medtune.files import one_line

from .columns import DIALOGUES, our_names, plain_name
from .dialogues import DIALOGUE_COLUMNS
from .reading import Reading, Table

SHARD_SUFFIXES = {".parquet", ".arrow"}

TEXT = datasets.Value("string")


def schema_of(shard: Path) -> tuple[pa.Schema, int]:
    """Give the columns of a shard and how many rows it has.

    Parameters
    ----------
    shard : Path
        A parquet or Arrow file; only what a broken download lacks is read.

    Returns
    -------
    tuple of pyarrow.Schema and int
        The columns with their types, and the number of rows.

    Raises
    ------
    ValueError
        The file is broken.
    """
    try:
        if shard.suffix == ".arrow":
            with pa.memory_map(str(shard)) as file, pa.ipc.open_stream(file) as stream:
                return stream.schema, sum(batch.num_rows for batch in stream)
        footer = pq.read_metadata(shard)
        return footer.schema.to_arrow_schema(), footer.num_rows
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{shard} is cut off or no {shard.suffix[1:]} file, fetch it again ({one_line(error)})"
        ) from None


def batches_of(shard: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a shard, some at a time, so that memory stays flat.

    Parameters
    ----------
    shard : Path
        A parquet or Arrow file.
    columns : list of str
        The columns to read.

    Yields
    ------
    pyarrow.RecordBatch
        A few rows.
    """
    if shard.suffix == ".arrow":
        with pa.memory_map(str(shard)) as file, pa.ipc.open_stream(file) as stream:
            for batch in stream:
                for start in range(0, batch.num_rows, 32):
                    yield batch.select(columns).slice(start, 32)
        return
    # without pre_buffer a row group of any size is read page by page, and 32 pictures at a time are
    # few enough even if each has some megabytes
    with pq.ParquetFile(shard, pre_buffer=False, buffer_size=1 << 20) as file:
        yield from file.iter_batches(32, columns=columns, use_threads=False)


def read_shard(shard: Path, names: dict[str, str]) -> Iterator[tuple[int, dict]]:
    """Yield (number from 1, record) of a shard.

    Parameters
    ----------
    shard : Path
        A parquet or Arrow file.
    names : dict of str to str
        The shard's name -> our name, for the columns to read.

    Yields
    ------
    tuple of int and dict
        Column -> value, with the shard's own names.

    Raises
    ------
    ValueError
        The file breaks off.
    """
    number = 0
    try:
        labels = _words_of_splits(shard, names)
        for batch in batches_of(shard, list(names)):
            for record in batch.to_pylist():
                number += 1
                for name, words in labels.items():
                    if record[name] is not None:
                        record[name] = words[record[name]]
                yield number, record
    except (OSError, pa.ArrowException) as error:
        raise ValueError(
            f"{shard} cannot be read to its end, fetch it again ({one_line(error)})"
        ) from None


def _words_of_splits(shard: Path, names: dict[str, str]) -> dict[str, list[str]]:
    """Give the words behind the numbers of a column split, where `datasets` stored it so."""
    schema, _ = schema_of(shard)
    words = {}
    for theirs, feature in datasets.Features.from_arrow_schema(schema).items():
        if names.get(theirs) == "split" and isinstance(feature, datasets.ClassLabel):
            words[theirs] = feature.names
    return words


def shard_names(schema: pa.Schema, columns: dict[str, str], where: object) -> dict[str, str]:
    """Map a shard's columns to ours, and refuse one that cannot become pairs.

    Parameters
    ----------
    schema : pyarrow.Schema
        The shard's columns.
    columns : dict of str to str
        Our name -> the shard's name, as the caller said.
    where : object
        What a message calls the shard.

    Returns
    -------
    dict of str to str
        The shard's name -> our name, without the index that pandas stores.

    Raises
    ------
    ValueError
        A column is missing, or it is not clear which holds the caption.
    """
    available = [name for name in schema.names if not name.startswith("__index_level_")]
    if has_dialogues(available):
        return our_names(available, columns, where)
    return our_names(available, columns, where, ("image", "caption"))


def has_dialogues(names: list[str]) -> bool:
    """Say whether some of the columns hold dialogues.

    Examples
    --------
    >>> has_dialogues(["image", "caption"]), has_dialogues(["messages", "images"])
    (False, True)
    """
    plain = {plain_name(name) for name in names}
    pairs = ({"prompt", "completion"}, {"instruction", "output"})
    return bool(plain & DIALOGUES) or any(pair <= plain for pair in pairs)


def shard_features(tables: list[Table], reading: Reading) -> datasets.Features:
    """Find the columns that the rows of shards will have, and their types.

    Parameters
    ----------
    tables : list of Table
        Shards; their columns may differ, and the first that has one decides its type.
    reading : Reading
        How they are to be read.

    Returns
    -------
    datasets.Features
        image, id and caption, and whatever else any of the files has.

    Raises
    ------
    ValueError
        A file is broken or lacks a column, or there are no rows in any.
    """
    features: dict = {}
    rows = 0
    for table in tables:
        shard = table.path
        schema, count = schema_of(shard)
        rows += count
        columns = table.columns | reading.columns
        names = shard_names(schema, columns, shard)
        if reading.split not in (None, table.split) and "split" not in names.values():
            raise ValueError(
                f"{shard} has no column split: leave split out, or make one with medtune.audit"
            )
        features = _row_features(schema, names) | features
    if not rows:
        raise ValueError(f"{tables[0].path} holds no pairs")
    if reading.several_tables and any(table.split for table in tables):
        features.setdefault("split", TEXT)
    if reading.repeated:
        features.setdefault("group", TEXT)
    if not reading.strict:
        features["problem"] = TEXT
    return datasets.Features(features)


def _row_features(schema: pa.Schema, names: dict[str, str]) -> dict:
    found = {"image": datasets.Image(), "id": TEXT, "caption": TEXT}
    is_dialogue = has_dialogues(list(names))
    several = is_dialogue
    for theirs, feature in datasets.Features.from_arrow_schema(schema).items():
        if theirs not in names:
            continue
        ours = names[theirs]
        if ours == "image":
            several = several or isinstance(feature, datasets.List | datasets.LargeList)
        elif ours == "images" or theirs in DIALOGUE_COLUMNS:
            continue
        elif (
            ours == "question"
            or (ours == "group" and plain_name(theirs) != "group")
            or ours == "split"
        ):
            found[ours] = TEXT
        else:
            found.setdefault(ours, feature)
    if is_dialogue:
        found["question"] = TEXT
    if several:
        found.setdefault("group", TEXT)
    return found
