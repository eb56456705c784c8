"""Make a data set of rows: from the cache on disk, in memory, or as a stream."""

import itertools
import json
from dataclasses import replace

import datasets
import pyarrow as pa
from datasets.exceptions import DatasetGenerationError

from medtune.files import one_line

from .reading import LoosePictures, Reading, Table
from .shards import SHARD_SUFFIXES, TEXT, shard_features
from .survey import look_over
from .tables import read_rows

# So many rows of a table tell a stream which columns there are and of what type.
FIRST_ROWS = 256


def make_dataset(  # noqa: PLR0913 - where from, how to read it, and three ways to hand it over
    name: str,
    tables: list[Table | LoosePictures],
    reading: Reading,
    *,
    streaming: bool,
    limit: int | None,
) -> datasets.Dataset | datasets.IterableDataset:
    """Make a data set of the rows of some tables.

    Parameters
    ----------
    name : str
        What a message calls the source.
    tables : list of Table or LoosePictures
        What `read_rows` shall read.
    reading : Reading
        How it shall read them.
    streaming : bool
        Give a stream that reads as you go.
    limit : int or None
        The first rows only.

    Returns
    -------
    datasets.Dataset or datasets.IterableDataset
        A stream if asked for; else a set in memory or, of shards whose rows are all wanted, one that
        lies in the cache on disk.

    Raises
    ------
    ValueError, OSError
        There are no rows, or they cannot be read.
    """
    # said here, because a worker of a stream gets only some of the tables
    reading = replace(reading, several_tables=len(tables) > 1)
    survey = look_over(tables, reading)
    salt = reading.secret() if survey.needs_salt else None
    reading = replace(reading, repeated=survey.repeated, salt=salt)
    features = shard_features(tables, reading) if are_shards(tables) else None
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


def are_shards(tables: list[Table | LoosePictures]) -> bool:
    """Say whether the types of all columns are known before the rows are read.

    Parameters
    ----------
    tables : list of Table or LoosePictures
        What the source consists of.

    Returns
    -------
    bool
        True where all of them are parquet or Arrow.

    Examples
    --------
    >>> are_shards([LoosePictures(("a.png",))])
    False
    """
    for table in tables:
        if isinstance(table, LoosePictures) or table.path.suffix.lower() not in SHARD_SUFFIXES:
            return False
    return True


def _on_disk(
    tables: list[Table], reading: Reading, features: datasets.Features, nothing: str
) -> datasets.Dataset:
    """Let `datasets` write the rows to its cache, from where they are mapped into memory."""
    changed = tuple(table.path.stat().st_mtime_ns for table in tables)
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
    tables: list[Table | LoosePictures],
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
    tables: list[Table | LoosePictures], reading: Reading, features: datasets.Features
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
    if reading.repeated:
        # also where the first rows of a stream stand alone: a later one may be one of two views
        features.setdefault("group", TEXT)
    if not reading.strict:
        # also where the first rows of a stream are good: a later one may be bad
        features["problem"] = TEXT
    return datasets.Features(features)
