"""Prove that a split does not leak: count what stands on both sides of it."""

import random
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .duplicates import equal_rows, near_duplicates, plain_captions
from .fingerprints import Fingerprints, fingerprint, picture_cells
from .near import MAX_DISTANCE

Pair = tuple[int, int, int]


@dataclass
class _Likeness:
    """What can connect the rows of a data set, whatever the split.

    Attributes
    ----------
    groups : the patient or series of each row.
    digests : SHA-256 of each row's file, None where it cannot be read.
    captions : each row's caption without case and extra white space, None for an empty one.
    near : pairs of near-duplicates (i, j, distance).
    """

    groups: list[str]
    digests: list[str | None]
    captions: list[str | None]
    near: list[Pair]


@dataclass
class _Crossings:
    """What crosses one split.

    Attributes
    ----------
    groups : how many groups have rows on both sides.
    exact_duplicates : how many files do.
    captions : how many captions do.
    near : the pairs of near-duplicates (i, j, distance) that do.
    held_out_leaked : share, 0 to 1, of the rows outside train with something of theirs in train.
    """

    groups: int
    exact_duplicates: int
    captions: int
    near: list[Pair]
    held_out_leaked: float

    def counts(self) -> dict[str, float]:
        """Give the numbers under the names that the report has for them."""
        return {
            "groups_crossing": self.groups,
            "exact_duplicates_crossing": self.exact_duplicates,
            "captions_crossing": self.captions,
            "near_duplicates_crossing": len(self.near),
            "held_out_leaked": self.held_out_leaked,
        }


def audit_split(  # noqa: PLR0913 - three columns of the data, and five choices with a default
    dataset: Any,
    groups: Sequence[str],
    splits: Sequence[str | None],
    *,
    max_distance: int = MAX_DISTANCE,
    fingerprints: Fingerprints | None = None,
    near: list[Pair] | None = None,
    raise_on_leak: bool = True,
    seed: int = 0,
) -> dict:
    """Count what crosses a split, and fail unless it is nothing.

    Parameters
    ----------
    dataset : a Dataset of pairs, with `image` and `caption`.
    groups : the group of each row, from `assign_groups`.
    splits : the split of each row; None for rows that stand in none, such as the gap between two
        blocks of slices.
    max_distance : bits, of 256, in which near-duplicates may differ.
    fingerprints : of the data set, where they are known.
    near : what `near_duplicates` found within `max_distance`, where it is known: in a large set the
        search takes most of the time.
    raise_on_leak : False gives the report whatever it says, for display.
    seed : of the random split with the same sizes that the report puts beside this one.

    Returns
    -------
    dict : the sizes of the splits (`rows` and `groups`); `unreadable` pictures and their
        `unreadable_ids`, among them rows that are bad for another reason; all
        `near_duplicates` within `max_distance`; `groups_crossing`, `near_duplicates_crossing`,
        `exact_duplicates_crossing` (all must be 0); `captions_crossing`, captions that stand on
        both sides (no fault, but a warning about scores); `held_out_leaked`, the share of rows
        outside train with a group-mate or near-duplicate in it; the first 100 `leaking_pairs`
        (i, j, distance); and the same counts for a `random_split`.

    Raises
    ------
    ValueError : a group or near-duplicate pair crosses, or a picture cannot be read and so cannot
        be cleared.

    Examples
    --------
    >>> import datasets, io, PIL.Image
    >>> PIL.Image.linear_gradient("L").save(png := io.BytesIO(), "PNG")
    >>> cells = [{"bytes": png.getvalue(), "path": None}] * 2
    >>> pairs = datasets.Dataset.from_dict({"image": cells, "caption": ["A ramp.", "Another."]})
    >>> audit_split(pairs, ["p1", "p2"], ["train", "test"])
    Traceback (most recent call last):
        ...
    ValueError: the split leaks: 0 groups and 1 near-duplicate pairs cross it, first rows ...
    """
    groups = list(groups)
    splits = list(splits)
    if not len(groups) == len(splits) == len(dataset):
        raise ValueError(
            f"{len(dataset)} rows, {len(groups)} groups and {len(splits)} splits: "
            "one a row is needed"
        )
    marks = fingerprint(dataset) if fingerprints is None else fingerprints
    if near is None:
        near = near_duplicates(dataset, max_distance=max_distance, fingerprints=marks)
    likeness = _Likeness(
        groups=groups,
        digests=marks.digests,
        captions=plain_captions(dataset),
        near=near,
    )
    crossings = _find_crossings(splits, likeness)
    if raise_on_leak:
        _refuse_unreadable(dataset, marks.unreadable)
        _refuse_leaks(crossings)

    by_chance = _find_crossings(_shuffled(splits, seed), likeness)
    return {
        "rows": dict(Counter(split or "unassigned" for split in splits)),
        "groups": _groups_per_split(groups, splits),
        "unreadable": len(marks.unreadable),
        "unreadable_ids": _ids_of(dataset, marks.unreadable),
        "near_duplicates": len(likeness.near),
        "max_distance": max_distance,
        **crossings.counts(),
        "leaking_pairs": crossings.near[:100],
        "random_split": by_chance.counts(),
    }


def _ids_of(dataset: Any, rows: list[int]) -> list[str]:
    """Give the ids of some rows; of a set without ids their numbers."""
    if "id" not in dataset.column_names:
        return [f"row {row}" for row in rows]
    ids = dataset["id"]  # one column: no picture is decoded
    return [str(ids[row]) for row in rows]


def _refuse_unreadable(dataset: Any, rows: list[int]) -> None:
    if not rows:
        return
    first = f"row {rows[0]}"
    if "id" in dataset.column_names:
        first += f", id {dataset['id'][rows[0]]}"
    [cell] = picture_cells(dataset.select(rows[:1]))
    file = cell.get("path") if isinstance(cell, dict) else None
    if file:
        first += f", file {Path(file).name}"
    raise ValueError(
        f"{len(rows)} pictures cannot be read, so they cannot be cleared (first: {first}): take "
        "them out, see medtune.pairs.reject_reason"
    )


def _refuse_leaks(crossings: _Crossings) -> None:
    """Raise unless no group, file or near-duplicate pair crosses."""
    if not (crossings.groups or crossings.exact_duplicates or crossings.near):
        return
    what = f"{crossings.groups} groups and {len(crossings.near)} near-duplicate pairs cross it"
    if crossings.near:
        i, j, distance = crossings.near[0]
        what += f", first rows {i} and {j} at distance {distance}"
    remedy = "join groups with assign_groups(..., pairs=near_duplicates(...)) and split again"
    raise ValueError(f"the split leaks: {what}; {remedy}")


def _groups_per_split(groups: list[str], splits: list[str | None]) -> dict[str, int]:
    """Count the groups of each split; rows in no split are left out."""
    members = dict.fromkeys(zip(groups, splits, strict=True))  # each once, in the order of the rows
    return dict(Counter(split for _, split in members if split))


def _shuffled(splits: list[str | None], seed: int) -> list[str | None]:
    """Deal the same splits out at random; rows in none stay in none."""
    placed = [split for split in splits if split]
    drawn = iter(random.Random(seed).sample(placed, len(placed)))
    return [next(drawn) if split else split for split in splits]


def _find_crossings(splits: list[str | None], likeness: _Likeness) -> _Crossings:
    groups, with_group_in_train = _crossing_keys(splits, likeness.groups)
    files, with_file_in_train = _crossing_keys(splits, likeness.digests)
    captions, _ = _crossing_keys(splits, likeness.captions)
    near, with_look_alike_in_train = _crossing_pairs(splits, likeness.near)

    reached = with_group_in_train | with_file_in_train | with_look_alike_in_train
    held_out = {row for row, split in enumerate(splits) if split and split != "train"}
    share = len(held_out & reached) / (len(held_out) or 1)
    return _Crossings(groups, files, captions, near, round(share, 4))


def _crossing_keys(splits: list[str | None], keys: Sequence[Hashable]) -> tuple[int, set[int]]:
    """Count the keys that stand in several splits, and give the rows that share one with train."""
    crossing = 0
    reached: set[int] = set()
    for rows in equal_rows(keys):
        sides = {splits[row] for row in rows if splits[row]}
        if len(sides) > 1:
            crossing += 1
        if "train" in sides:
            reached.update(rows)
    return crossing, reached


def _crossing_pairs(splits: list[str | None], pairs: list[Pair]) -> tuple[list[Pair], set[int]]:
    """Give the pairs of which each row stands in another split, and their rows that face train."""
    crossing = []
    reached: set[int] = set()
    for i, j, distance in pairs:
        if not splits[i] or not splits[j] or splits[i] == splits[j]:
            continue
        crossing.append((i, j, distance))
        if splits[j] == "train":
            reached.add(i)
        if splits[i] == "train":
            reached.add(j)
    return crossing, reached
