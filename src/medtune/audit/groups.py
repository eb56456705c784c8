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
        r"^(patient\d+)_", or without a parenthesis all that it matches.
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
        names = _names_of_ids(list(dataset["id"]), id_pattern)
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


def _names_of_ids(ids: list[str | None], id_pattern: str) -> list[str]:
    try:
        pattern = re.compile(id_pattern)
    except re.error as error:
        raise ValueError(f"id_pattern {id_pattern!r} is no regular expression: {error}") from None
    matches = [pattern.search(name or "") for name in ids]
    if None in matches:
        missed = matches.count(None)
        first = ids[matches.index(None)]
        raise ValueError(
            f"id_pattern {id_pattern!r} does not match {missed} of {len(ids)} ids, first {first!r}"
        )
    part = 1 if pattern.groups else 0
    return [match[part] for match in matches]
