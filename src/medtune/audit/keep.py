"""Write a split into a table, so that conversion and others can take the same."""

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path

from medtune.files import write_whole


def write_splits(
    path: str | os.PathLike,
    ids: Sequence[str],
    splits: Sequence[str | None],
    groups: Sequence[str],
) -> None:
    """Write a CSV of ids, splits and groups, whole or not at all.

    Parameters
    ----------
    path : the file; one that is there is replaced.
    ids : the id of each row.
    splits : the split of each row; None for a row in none, whose cell stays empty.
    groups : the group of each row, such as from `assign_groups`.

    Raises
    ------
    ValueError : not one of each for every row, a row without an id, or an id that stands in two
        splits or groups: nobody could tell its rows apart later.
    OSError : the file cannot be written; one that was there stays as it was.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> file = pathlib.Path(tempfile.mkdtemp(), "splits.csv")
    >>> write_splits(file, ["a", "b"], ["train", "test"], ["p1", "p2"])
    >>> print(file.read_text())
    id,split,group
    a,train,p1
    b,test,p2
    """
    if not len(ids) == len(splits) == len(groups):
        raise ValueError(
            f"{len(ids)} ids, {len(splits)} splits and {len(groups)} groups: one a row is needed"
        )
    places: dict[str, tuple[str, str]] = {}
    for row, (name, split, group) in enumerate(zip(ids, splits, groups, strict=True)):
        if name is None or not str(name).strip():
            raise ValueError(f"row {row} has no id, by which its split could be found again")
        place = (split or "", str(group))
        # the same row twice is one line: conversion says that it is there twice
        if places.setdefault(str(name), place) != place:
            raise ValueError(
                f"the id {str(name)!r:.80} stands in two splits or groups: give each row an id of "
                "its own"
            )
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["id", "split", "group"])
    for name, place in places.items():
        table.writerow([name, *place])
    write_whole(Path(path).expanduser(), text.getvalue())
