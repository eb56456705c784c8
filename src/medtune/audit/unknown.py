"""Guess which pictures belong together where nobody says it, and measure what a guess is worth.

MedTrinity names no patient, and many sets do not. Three things can stand in: pictures that look
alike, captions that are the same to the letter, and ids that share their beginning. `rate_groups`
compares such a guess with groups that are known: on the course's slices it finds less than one in a
hundred of the pairs that belong together. So it is a guess to accept with open eyes, and no patient.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from medtune.pairs import names_group

from .duplicates import duplicate_captions, near_duplicates
from .fingerprints import Fingerprints
from .splits import join_groups

GUESS_DISTANCE = 31
"""Bits, of 256, in which the pictures of a guessed group may differ.

Chosen on the sample, whose groups are known: of the pairs that it joins there a tenth is wrong. At
the 20 of `near_duplicates`, which look for copies, it is a twentieth, and a sixth of the pairs is
found. From 32 on the search takes twice as long.
"""

# A caption on more pictures than this is a template, and not a patient.
_MOST_OF_A_CAPTION = 10
# An id of the form that numbers the pictures of somebody: p12_3, study-7-slice-002.
_NUMBERED_ID = re.compile(r"(.*\d.*?)[\s._/-]+[a-z]*\d+", re.IGNORECASE | re.DOTALL)


def count_unknown_groups(dataset: Any) -> int:
    """Count the rows that name no patient, series or other group.

    Examples
    --------
    >>> import datasets
    >>> count_unknown_groups(datasets.Dataset.from_dict({"id": ["a", "b"], "group": ["p1", None]}))
    1
    """
    if "group" not in dataset.column_names:
        return len(dataset)
    return sum(not names_group(group) for group in dataset["group"])


def group_clues(
    dataset: Any,
    *,
    max_distance: int = GUESS_DISTANCE,
    fingerprints: Fingerprints | None = None,
) -> dict[str, list[tuple[int, int, int]]]:
    """List the pairs of rows that may belong together, by what says so.

    Parameters
    ----------
    dataset : a Dataset of pairs.
    max_distance : bits, of 256, in which pictures that look alike may differ.
    fingerprints : of the data set, where they are known.

    Returns
    -------
    dict : pairs of rows (i, j, distance) that "look alike", have the "same caption", or have the
        "same id but for a number". Captions and ids have the distance 0.

    Examples
    --------
    >>> import datasets
    >>> rows = {"id": ["p1_1", "p1_2", "p2_1"], "caption": ["A", "B", "B"], "image": [b""] * 3}
    >>> group_clues(datasets.Dataset.from_dict(rows))["same caption"]
    [(1, 2, 0)]
    """
    by_caption = []
    for rows in duplicate_captions(dataset):
        if len(rows) <= _MOST_OF_A_CAPTION:
            by_caption += _linked(rows)
    by_id = []
    for rows in _rows_by_beginning(dataset["id"]):
        by_id += _linked(rows)
    return {
        "look alike": near_duplicates(
            dataset, max_distance=max_distance, fingerprints=fingerprints
        ),
        "same caption": by_caption,
        "same id but for a number": by_id,
    }


def guess_groups(rows: int, pairs: Iterable[tuple]) -> list[str]:
    """Put rows that pairs connect, directly or through others, into one group each.

    Parameters
    ----------
    rows : how many there are.
    pairs : tuples that begin with two row numbers, such as those of `group_clues`.

    Returns
    -------
    list : the name of the group of each row; a row in no pair is a group of its own.

    Examples
    --------
    >>> guess_groups(3, [(0, 2, 12)])
    ['cluster-00000', 'cluster-00001', 'cluster-00000']
    """
    return join_groups([f"cluster-{row:05d}" for row in range(rows)], pairs)


def rate_groups(guessed: Sequence[str], known: Sequence[str]) -> dict[str, int]:
    """Compare guessed groups with known ones, by the pairs of rows that they put together.

    Parameters
    ----------
    guessed : the guessed group of each row.
    known : its true group.

    Returns
    -------
    dict : `pairs` that belong together, `found` ones that the guess puts together as well, and
        `wrong` ones, which it puts together although they do not belong.

    Raises
    ------
    ValueError : not as many rows on both sides.

    Examples
    --------
    >>> rate_groups(["a", "a", "b", "b"], ["p1", "p1", "p1", "p2"])
    {'pairs': 3, 'found': 1, 'wrong': 1}
    """
    found = _pairs_within(list(zip(guessed, known, strict=True)))
    return {
        "pairs": _pairs_within(known),
        "found": found,
        "wrong": _pairs_within(guessed) - found,
    }


def _pairs_within(names: Sequence) -> int:
    """Count the pairs of rows that have the same name."""
    return sum(count * (count - 1) // 2 for count in Counter(names).values())


def _linked(rows: list[int]) -> list[tuple[int, int, int]]:
    """Pair the first row with each other one, which is enough to keep all together."""
    first, *others = rows
    return [(first, other, 0) for other in others]


def _rows_by_beginning(ids: Sequence) -> list[list[int]]:
    """Give the rows whose ids are equal but for their last number, if ids of this set are built so.

    A beginning must hold a number itself, as that of a patient does: `image_0001` and `image_0002`
    say nothing. And most ids of the set must have a companion: of random ones some look alike by
    chance.
    """
    rows = defaultdict(list)
    for row, name in enumerate(ids):
        found = _NUMBERED_ID.fullmatch(str(name))
        if found:
            rows[found[1]].append(row)
    together = [members for members in rows.values() if len(members) > 1]
    if sum(map(len, together)) < len(ids) / 2 or len(together) < 3:
        return []
    return together
