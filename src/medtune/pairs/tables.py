"""Yield the rows of a source: its records as pairs, with ids that differ, groups, and splits."""

import logging
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from medtune.files import one_line

from .columns import SPLITS
from .locate import places_of
from .reading import LoosePictures, Reading, Table
from .record import FoundPair, RecordReader, names_group, picture_key
from .salt import patient_group, safe_id
from .shards import SHARD_SUFFIXES
from .sources import records_of
from .survey import id_hash

# Its warnings stand as plain lines on the screen unless the user's program says otherwise.
_LOG = logging.getLogger("medtune")

# What is said of a dialogue about no picture.
TEXT_ONLY = "dialogue: it has no picture"


@dataclass
class _Given:
    """What one walk over the tables has given away so far.

    Attributes
    ----------
    ids : Counter
        How often each id that is made up or stands for several pairs of a record has come.
    views : dict of str to dict
        For each id that stands on several rows: what each row shows and asks -> its number.
    text_only : int
        How many dialogues without a picture were left out.
    """

    ids: Counter = field(default_factory=Counter)
    views: dict[str, dict[tuple, int]] = field(default_factory=dict)
    text_only: int = 0


def split_of(file: Path) -> str | None:
    """Give the split that a file is named after: train, validation, test, or None.

    Parameters
    ----------
    file : Path
        Only the name counts, up to the first '-', '_' or '.'.

    Returns
    -------
    str or None
        "train", "validation" (for valid, val and dev too), "test", or None for any other name.

    Examples
    --------
    >>> split_of(Path("data/val-00000-of-00002.parquet")), split_of(Path("captions.csv"))
    ('validation', None)
    """
    return SPLITS.get(re.split(r"[-_.]", file.name)[0].lower())


def read_rows(
    tables: list[Table | LoosePictures], reading: Reading, keys: tuple[str, ...] = ()
) -> Iterator[dict]:
    """Yield the pairs of all tables in order.

    Parameters
    ----------
    tables : list of Table or LoosePictures
        What the source consists of. It is a list because `datasets` spreads the lists among a
        generator's arguments, and only those, over the workers of a stream.
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
    given = _Given()
    for table in tables:
        file_split = None if isinstance(table, LoosePictures) else table.split
        for row in _rows_of(table, reading, given):
            if reading.several_tables:
                row.setdefault("split", file_split)
            is_wanted = reading.split is None or row.get("split", file_split) == reading.split
            if is_wanted or row.get("problem"):
                yield {key: row.get(key) for key in keys or row}
    if given.text_only:
        _LOG.warning(f"left out: {given.text_only} dialogues without a picture")


def _rows_of(table: Table | LoosePictures, reading: Reading, given: _Given) -> Iterator[dict]:
    """Yield the rows of a table; a bad record raises or becomes a row that says what is wrong."""
    reader = _reader_of(table, reading)
    for where, record in records_of(table, reading):
        try:
            # what could not be read takes the same way as what makes no pair
            if isinstance(record, ValueError):
                raise record
            # all pairs of a record or none: read them before the first is given out
            found = list(reader.pairs_of(record))
        except (ValueError, OSError, TypeError, AttributeError) as error:
            reason = f"{where}: {one_line(error)}"
            if reading.strict:
                is_missing = isinstance(error, FileNotFoundError)
                raise (FileNotFoundError if is_missing else ValueError)(reason) from None
            yield _problem(table, where, reason, reading)
            continue
        if not found and reading.strict:
            given.text_only += 1
        elif not found:
            yield _problem(table, where, f"{where}: {TEXT_ONLY}", reading)
        # several pictures without a given id have ids of their own: the first names the group
        name = (found[0].given_id or found[0].row["id"]) if found else None
        slabs: dict[int | None, str] = {}
        for number, pair in enumerate(found):
            _set_group(pair, name, len(found), reading)
            row = _finished(pair, number, len(found), reading, given)
            if pair.slab is not None:
                # a slab is called by the id of its first picture, which no other pair has
                row["slab"] = slabs.setdefault(pair.slab, row["id"])
            yield row


def _reader_of(table: Table | LoosePictures, reading: Reading) -> RecordReader:
    takes_volumes = reading.slab is not None
    if isinstance(table, LoosePictures):
        places = places_of(reading.base, reading.base, reading.root)
        return RecordReader(reading, replace(places, volumes=takes_volumes), {})
    file = table.path
    # train_captions.csv stands beside train/ or train_images/
    first_word = re.split(r"[-_.]", file.name)[0]
    own_folders = (file.stem, first_word, f"{first_word}_images")
    places = places_of(file.resolve().parent, reading.base, reading.root, own_folders)
    places = replace(places, volumes=takes_volumes)
    is_shard = file.suffix.lower() in SHARD_SUFFIXES
    return RecordReader(reading, places, table.columns | reading.columns, is_shard)


def _problem(table: Table | LoosePictures, where: str, reason: str, reading: Reading) -> dict:
    # where a table is at fault its name and line are the id; a picture's own name may be a patient's
    is_picture = isinstance(table, LoosePictures)
    name = safe_id(where, reading.salt) if is_picture else where
    return {"id": name, "image": None, "caption": None, "problem": reason}


def _set_group(pair: FoundPair, name: str | None, of: int, reading: Reading) -> None:
    """Give pairs of one record, and views of one report, a group: no split must tear them apart."""
    row = pair.row
    # the table's word about the group counts more than that of a DICOM file
    if pair.patient and not names_group(row.get("group")):
        row["group"] = pair.patient
    belongs_together = of > 1 or _is_repeated(pair, reading)
    if name is not None and belongs_together and not names_group(row.get("group")):
        row["group"] = patient_group(name, reading.secret())


def _is_repeated(pair: FoundPair, reading: Reading) -> bool:
    return pair.id_is_given and id_hash(pair.given_id) in reading.repeated


def _finished(pair: FoundPair, number: int, of: int, reading: Reading, given: _Given) -> dict:
    """Give the row of a pair an id that no other pair has."""
    row = pair.row
    name = row["id"]
    if name is None:
        return row
    if _is_repeated(pair, reading):
        # the same picture with the same question is a repetition: it keeps its id, so that
        # conversion names it
        views = given.views.setdefault(name, {})
        view = (picture_key(row["image"]), row.get("question"), number if of > 1 else 0)
        row["id"] = _numbered(name, views.setdefault(view, len(views) + 1))
    elif of > 1 or not pair.id_is_given:
        given.ids[name] += 1
        row["id"] = _numbered(name, given.ids[name])
    return row


def _numbered(name: str, number: int) -> str:
    """Add a number to an id that came before: a, a-2, a-3."""
    return name if number == 1 else f"{name}-{number}"
