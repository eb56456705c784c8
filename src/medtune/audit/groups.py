"""Say which pictures belong to one patient, series or cluster of look-alikes."""

import re
from collections.abc import Iterable
from typing import Any

from medtune.pairs import names_group

from .duplicates import near_duplicates
from .fingerprints import Fingerprints
from .splits import join_groups


def assign_groups(
    dataset: Any,
    *,
    column: str | None = None,
    id_pattern: str | None = None,
    pairs: Iterable[tuple[int, int, int]] | None = None,
    fingerprints: Fingerprints | None = None,
) -> list[str]:
    r"""Say for each row which pictures must stay on one side of a split.

    Parameters
    ----------
    dataset : a Dataset of pairs.
    column : column that names the patient or series (default: `group`, where the data have it, as
        DICOM series do); a row without a value is a group of its own.
    id_pattern : regular expression; its first parenthesis in the `id` is the group, such as
        r"^(patient\d+)_", or without a parenthesis all that it matches. A row that is known to be
        bad, by its `problem`, has an id that was made up: it is a group of its own.
    pairs : near-duplicate pairs; groups that they connect become one. With neither column nor
        pattern the groups are the clusters of near-duplicates, which are looked for when `pairs` is
        not given.
    fingerprints : of the data set, where they are known, to look for near-duplicates.

    Returns
    -------
    list : the name of the group of each row.

    Raises
    ------
    ValueError : no such column, a bad pattern, or an id that it does not match.

    Examples
    --------
    >>> import datasets
    >>> pairs = datasets.Dataset.from_dict({"id": ["p1_a", "p2_a", "p1_b"]})
    >>> assign_groups(pairs, id_pattern=r"(p\d+)_")
    ['p1', 'p2', 'p1']
    """
    nothing_said = column is None and id_pattern is None
    if nothing_said and "group" in dataset.column_names:
        column = "group" if any(map(names_group, dataset["group"])) else None

    if column:
        names = _names_of_column(dataset, column)
    elif id_pattern:
        names = _names_of_ids(_ids_of_good_rows(dataset), id_pattern, len(dataset))
    else:
        names = [f"cluster-{row:05d}" for row in range(len(dataset))]
        if pairs is None:
            pairs = near_duplicates(dataset, fingerprints=fingerprints)
    return join_groups(names, pairs or ())


def _names_of_column(dataset: Any, column: str) -> list[str]:
    if column not in dataset.column_names:
        there = ", ".join(dataset.column_names)
        raise ValueError(f"no column {column!r} to group by (there are: {there})")
    names = []
    for row, value in enumerate(dataset[column]):
        names.append(str(value) if names_group(value) else f"row-{row}")
    return names


def _ids_of_good_rows(dataset: Any) -> dict[int, str]:
    """Give the ids, by row, of those rows of which the loader noted no problem."""
    problems = [None] * len(dataset)
    if "problem" in dataset.column_names:
        problems = dataset["problem"]
    ids = {}
    for row, (name, problem) in enumerate(zip(dataset["id"], problems, strict=True)):
        if not problem:
            ids[row] = "" if name is None else str(name)
    return ids


def _names_of_ids(ids: dict[int, str], id_pattern: str, rows: int) -> list[str]:
    try:
        pattern = re.compile(id_pattern)
    except re.error as error:
        raise ValueError(f"id_pattern {id_pattern!r} is no regular expression: {error}") from None
    part = 1 if pattern.groups else 0
    names = [f"row-{row}" for row in range(rows)]
    missed = []
    for row, name in ids.items():
        match = pattern.search(name)
        if match is None:
            missed.append(name)
        elif not match[part]:  # a parenthesis that may be left out, or may hold nothing
            raise ValueError(
                f"id_pattern {id_pattern!r} matches {name!r}, but finds no group in it: its "
                "parenthesis must hold something in every id"
            )
        else:
            names[row] = match[part]
    if missed:
        raise ValueError(
            f"id_pattern {id_pattern!r} does not match {len(missed)} of {len(ids)} ids, "
            f"first {missed[0]!r}"
        )
    return names
