"""Make a data set of rows: from the cache on disk, in memory, or as a stream."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.exceptions import DatasetGenerationError

from medtune.files import one_line

from .reading import ALIASES, Reading, our_names
from .tables import LoosePictures, read_rows

TEXT = datasets.Value("string")

# So many rows of a table tell a stream which columns there are and of what type.
FIRST_ROWS = 256


def parquet_features(shards: list[Path], reading: Reading) -> datasets.Features:
    """Find the columns of parquet files, under our names, and their types.

    Only the footers are read: what a shard from a broken download lacks.

    Parameters
    ----------
    shards : list of Path
        Parquet files; their columns may differ, and the first that has one decides its type.
    reading : Reading
        How they are to be read.

    Returns
    -------
    datasets.Features
        image, id and caption, and whatever else any of the files has.

    Raises
    ------
    ValueError
        A file is no parquet file or lacks a column, or there are no rows in any.
    """
    features: dict = {}
    rows = 0
    for shard in shards:
        try:
            footer = pq.read_metadata(shard)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{shard} is cut off or no parquet file, fetch it again ({one_line(error)})"
            ) from None
        rows += footer.num_rows
        schema = footer.schema.to_arrow_schema()
        names = our_names(schema.names, reading.columns, shard, need=tuple(ALIASES))
        if reading.split and "split" not in names.values():
            raise ValueError(
                f"{shard} has no column split: leave split out, or make one with medtune.audit"
            )
        found = {}
        for theirs, feature in datasets.Features.from_arrow_schema(schema).items():
            if theirs in names:
                found[names[theirs]] = feature
        features = found | features
    if not rows:
        raise ValueError(f"{shards[0]} holds no pairs")
    features |= {"image": datasets.Image(), "id": TEXT, "caption": TEXT}
    return datasets.Features(features)


def make_dataset(  # noqa: PLR0913 - where from, how to read it, and three ways to hand it over
    name: str,
    tables: list[Path | LoosePictures],
    reading: Reading,
    *,
    features: datasets.Features | None,
    streaming: bool,
    limit: int | None,
) -> datasets.Dataset | datasets.IterableDataset:
    """Make a data set of the rows of some tables.

    Parameters
    ----------
    name : str
        What a message calls the source.
    tables : list of Path or LoosePictures
        What `read_rows` shall read.
    reading : Reading
        How it shall read them.
    features : datasets.Features or None
        The columns and their types; None: see what the rows hold.
    streaming : bool
        Give a stream that reads as you go.
    limit : int or None
        The first rows only.

    Returns
    -------
    datasets.Dataset or datasets.IterableDataset
        A stream if asked for; else a set in memory or, where `features` are known and all rows are
        wanted, one that lies in the cache on disk.

    Raises
    ------
    ValueError, OSError
        There are no rows, or they cannot be read.
    """
    # said here, because a worker of a stream gets only some of the tables
    reading = replace(reading, several_tables=len(tables) > 1)
    nothing = f"{name} holds no pairs"
    if reading.split:
        nothing += f" of split {reading.split}"
    if features is not None and not streaming and limit is None:
        return _on_disk(tables, reading, features, nothing)
    if streaming:
        # a look at the first rows: for their types, or only so that an error shows here
        enough = FIRST_ROWS if features is None else 1
        count = min(enough, limit or enough)
    else:
        count = limit
    rows = list(itertools.islice(read_rows(tables, reading), count))
    if not rows:
        raise ValueError(nothing)
    columns = _columns_of(rows)
    if features is None:
        columns = {key: _of_one_kind(values) for key, values in columns.items()}
        features = _features_of(columns, reading)
    if streaming:
        return _stream(tables, reading, features, limit)
    empty = [None] * len(rows)
    complete = {key: columns.get(key, empty) for key in features}
    return datasets.Dataset.from_dict(complete, features=features)


def _on_disk(
    tables: list[Path], reading: Reading, features: datasets.Features, nothing: str
) -> datasets.Dataset:
    """Let `datasets` write the rows to its cache, from where they are mapped into memory."""
    changed = tuple(file.stat().st_mtime_ns for file in tables)
    reading = replace(reading, changed=changed)
    arguments = _arguments(tables, reading, features)
    try:
        return datasets.Dataset.from_generator(read_rows, features=features, gen_kwargs=arguments)
    except DatasetGenerationError as error:
        # its own message says only that an error occurred
        raise ValueError(one_line(error.__cause__ or error)) from None
    except ValueError:  # datasets refuses a generator that yields nothing
        raise ValueError(nothing) from None


def _stream(
    tables: list[Path | LoosePictures],
    reading: Reading,
    features: datasets.Features,
    limit: int | None,
) -> datasets.IterableDataset:
    arguments = _arguments(tables, reading, features)
    pairs = datasets.IterableDataset.from_generator(
        read_rows, features=features, gen_kwargs=arguments
    )
    return pairs if limit is None else pairs.take(limit)


def _arguments(
    tables: list[Path | LoosePictures], reading: Reading, features: datasets.Features
) -> dict:
    """Give the arguments of `read_rows`; one list among them: `datasets` takes lists for shards."""
    return {"tables": tables, "reading": reading, "keys": tuple(features)}


def _columns_of(rows: list[dict]) -> dict[str, list]:
    """Turn rows into columns, in the order in which their names first come up."""
    keys: dict[str, None] = {}
    for row in rows:
        keys.update(dict.fromkeys(row))
    return {key: [row.get(key) for row in rows] for key in keys}


def _of_one_kind(values: list) -> list:
    """Keep values of one kind as they are; values of several kinds become JSON text."""
    # Arrow columns have one type: numbers mixed with text, or texts with objects, are refused
    try:
        pa.array(values)
    except (ValueError, TypeError, OverflowError):
        return [_as_text(value) for value in values]
    return values


def _as_text(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value)


def _features_of(columns: dict[str, list], reading: Reading) -> datasets.Features:
    """Find the types of columns; a column without any value counts as text."""
    plain = {key: values for key, values in columns.items() if key != "image"}
    features = {"image": datasets.Image()}
    for key, feature in datasets.Dataset.from_dict(plain).features.items():
        features[key] = TEXT if feature == datasets.Value("null") else feature
    if not reading.strict:
        # also where the first rows of a stream are good: a later one may be bad
        features["problem"] = TEXT
    return datasets.Features(features)
