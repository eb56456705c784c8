"""Give a set that `datasets` has loaded our columns, without reading what is right already."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import datasets

from .columns import our_names, plain_name
from .locate import Places
from .reading import Reading
from .record import HeldPicture, RecordReader, as_caption, as_id, names_group, patient_number
from .salt import patient_group, safe_id
from .shards import TEXT, has_dialogues

AS_BYTES = datasets.Image(decode=False)

Pairs = datasets.Dataset | datasets.IterableDataset


def with_our_columns(pairs: Pairs, name: str, columns: dict[str, str], salt: str | None) -> Pairs:
    """Give the columns our names and types, and rows without an id one.

    Parameters
    ----------
    pairs : datasets.Dataset or datasets.IterableDataset
        A set with any names of columns.
    name : str
        What a message calls it.
    columns : dict of str to str
        Our name -> the set's name.
    salt : str or None
        What ids and numbers of patients are hashed with; None for that of the user.

    Returns
    -------
    datasets.Dataset or datasets.IterableDataset
        With the columns image, id and caption, and whatever else the set has.

    Raises
    ------
    ValueError
        A column is missing or holds something else than expected.
    """
    reading = Reading(columns=columns, salt=salt)
    is_dialogue = has_dialogues(pairs.column_names)
    need = () if is_dialogue else ("image", "caption")
    names = our_names(pairs.column_names, columns, name, need)
    theirs = {ours: column for column, ours in names.items()}
    image = pairs.features[theirs["image"]] if "image" in theirs else None
    if is_dialogue or isinstance(image, datasets.List | datasets.LargeList):
        return _with_each_answer(pairs, reading)
    pairs = pairs.select_columns(list(names))
    changed = {column: ours for column, ours in names.items() if column != ours}
    pairs = pairs.rename_columns(changed)
    if pairs.features["image"] != datasets.Image():
        pairs = pairs.cast_column("image", datasets.Image())
    may_be_number = "caption" in columns or "question" in theirs
    tidy = _Tidy(reading, may_be_number, plain_name(theirs.get("group", "group")) != "group")
    if isinstance(pairs, datasets.IterableDataset):
        return _tidied_stream(pairs, tidy)
    return _tidied_set(pairs, tidy)


@dataclass
class _Tidy:
    """Puts the cells of a row in order.

    Attributes
    ----------
    reading : Reading
        Holds the salt.
    may_be_number : bool
        Whether a number is an answer.
    hashes_group : bool
        Whether the group is the number of a patient.
    """

    reading: Reading
    may_be_number: bool
    hashes_group: bool

    def __call__(self, row: dict) -> dict:
        """Give the cells that are ours to change."""
        tidy = {"caption": as_caption(row["caption"], self.may_be_number)}
        name = as_id(row.get("id"))
        if name is None and "image" in row:
            cell = row["image"] or {}
            tidy["id"] = HeldPicture(cell.get("bytes"), self.reading).made_up_id
        else:
            tidy["id"] = None if name is None else safe_id(name, self.reading.salt)
        if self.hashes_group:
            group = row.get("group")
            known = names_group(group)
            tidy["group"] = (
                patient_group(patient_number(group), self.reading.secret()) if known else None
            )
        return tidy

    def rows(self, row: dict) -> Iterator[dict]:
        """Yield the row in order."""
        yield row | self(row)


def _tidied_stream(pairs: datasets.IterableDataset, tidy: _Tidy) -> datasets.IterableDataset:
    features = datasets.Features({**pairs.features, "id": TEXT, "caption": TEXT})
    if tidy.hashes_group:
        features["group"] = TEXT
    # undecoded: a picture that cannot be decoded is left to reject_reason
    undecoded = pairs.cast_column("image", AS_BYTES)
    first = next(iter(undecoded), None)
    if first is not None and first | tidy(first) == first and features == pairs.features:
        return pairs
    return _generated(undecoded, tidy.rows, features)


def _generated(
    undecoded: datasets.IterableDataset, function: Callable, features: datasets.Features
) -> datasets.IterableDataset:
    """Make a stream of what a function makes of each row.

    What `map` gives is not decoded any more, however its columns are cast.
    """
    count = undecoded.num_shards
    # a list is spread among the workers of a loader
    parts = [undecoded.shard(count, number) for number in range(count)]
    arguments = {"parts": parts, "function": function}
    return datasets.IterableDataset.from_generator(
        _rows_of_parts, features=features, gen_kwargs=arguments
    )


def _rows_of_parts(parts: list[datasets.IterableDataset], function: Callable) -> Iterator[dict]:
    for part in parts:
        for row in part:
            yield from function(row)


def _tidied_set(pairs: datasets.Dataset, tidy: _Tidy) -> datasets.Dataset:
    """Replace only the columns that change: the pictures of a large set are not written again."""
    read = [name for name in ("caption", "id", "group") if name in pairs.column_names]
    if "id" not in read:
        # the picture makes the id
        read.append("image")
    few = pairs.select_columns(read)
    if "image" in read:
        few = few.cast_column("image", AS_BYTES)
    columns: dict[str, list] = {}
    for row in few:
        for column, value in tidy(row).items():
            columns.setdefault(column, []).append(value)
    for column, values in columns.items():
        if column in pairs.column_names:
            is_right = pairs.features[column] == TEXT and pairs[column][:] == values
            if is_right:
                continue
            pairs = pairs.remove_columns(column)
        pairs = pairs.add_column(column, values, feature=TEXT)
    return pairs


def _with_each_answer(pairs: Pairs, reading: Reading) -> Pairs:
    """Make a row for each picture and each answer of the records of a set."""
    features = datasets.Features(
        {"image": datasets.Image(), "id": TEXT, "caption": TEXT, "question": TEXT, "group": TEXT}
    )
    answers = _EachAnswer(reading, tuple(features))
    undecoded = pairs
    for column, feature in pairs.features.items():
        if isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
            undecoded = undecoded.cast_column(column, datasets.List(AS_BYTES))
        elif isinstance(feature, datasets.Image):
            undecoded = undecoded.cast_column(column, AS_BYTES)
    if isinstance(pairs, datasets.IterableDataset):
        return _generated(undecoded, answers.rows, features)
    return datasets.Dataset.from_generator(
        _rows_of_parts,
        features=features,
        gen_kwargs={"parts": [undecoded], "function": answers.rows},
    )


@dataclass
class _EachAnswer:
    """Makes rows of a record that has several pictures or answers.

    Attributes
    ----------
    reading : Reading
        How the set is to be read.
    columns : tuple of str
        The columns that each row shall have.
    """

    reading: Reading
    columns: tuple[str, ...]

    def rows(self, record: dict) -> Iterator[dict]:
        """Yield the rows of a record; one that cannot be read raises ValueError."""
        # pictures stand in the records: a set from elsewhere names no files of this machine
        reader = RecordReader(self.reading, Places((), ()), self.reading.columns, is_shard=True)
        name = None
        numbers: Counter = Counter()
        for pair in reader.pairs_of(record):
            row = pair.row
            # several pictures without a given id have ids of their own: the first names the group
            name = name or pair.given_id or row["id"]
            row.setdefault("group", patient_group(name, self.reading.secret()))
            numbers[row["id"]] += 1
            if numbers[row["id"]] > 1:
                row["id"] = f"{row['id']}-{numbers[row['id']]}"
            yield {column: row.get(column) for column in self.columns}
