"""Which split each row goes to: as the caller says, as a file says, as the source says, by patient.

A patient on both sides of a split makes every score too good. So where the source knows the patient
of each row and nobody has made a split, the patients are dealt out here.
"""

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from medtune.audit import split_by_group
from medtune.files import one_line
from medtune.pairs import names_group, safe_id, split_of, split_of_word

from .dialects import SPLITS
from .sources import Source


@dataclass
class Chosen:
    """The split of each row, and how it was found.

    Attributes
    ----------
    by
        "given" (by the caller), "source" (a column, or the names of its files), "patient"
        (dealt out here), or "none" (all rows are for training).
    splits
        The split of each row, None for a row that has none; no list where each row says it.
    groups
        The group of each row, where the file of splits says it.
    missing
        Why a row has no split.
    unused
        Lines of the file of splits that no row belongs to.
    unknown_groups
        Rows that name no patient or other group, and are no rejected ones.
    first
        Number of the row that both lists begin with.
    """

    by: str
    splits: list[str | None] | None = None
    groups: list[str | None] | None = None
    missing: str = ""
    unused: int = 0
    unknown_groups: int = 0
    first: int = 0

    def split_of_row(self, number: int) -> str | None:
        """Give the split of a row; there must be a list."""
        return self.splits[number - self.first]

    def group_of_row(self, number: int) -> str | None:
        """Give the group of a row; there must be a list."""
        return self.groups[number - self.first]

    def part(self, rows: range) -> "Chosen":
        """Give what is said of some rows that follow each other, for another process."""
        there = slice(rows.start - self.first, rows.stop - self.first)
        splits = self.splits[there] if self.splits else None
        groups = self.groups[there] if self.groups else None
        return replace(self, splits=splits, groups=groups, first=rows.start)


def choose_splits(
    source: Source,
    splits: Sequence[str] | str | os.PathLike | None,
    split_by: str | None,
    seed: int,
) -> Chosen:
    """Find the split of each row.

    Parameters
    ----------
    source : what holds the pairs.
    splits : one for each row, or a CSV of them by id; None or empty: as the source says.
    split_by : "patient", "none", or None: by patient where groups and no split are known. Then rows
        that name no patient are rejected.
    seed : of the order in which patients are dealt out.

    Raises
    ------
    ValueError : the splits do not fit the source, or it cannot be dealt out by patient.
    OSError : the file of splits cannot be read.
    """
    if split_by not in (None, "patient", "none"):
        raise ValueError(f"split_by={split_by} must be patient or none")
    chosen = _choose(source, splits, split_by, seed)
    chosen.unknown_groups = _count_unknown(source, chosen.groups)
    return chosen


def _count_unknown(source: Source, told: list[str | None] | None) -> int:
    """Count the rows that neither the source nor the file of splits gives a group."""
    unknown = 0
    groups = source.cells("group")
    for number, problem in enumerate(source.cells("problem")):
        known = names_group(groups[number]) or (told and names_group(told[number]))
        if not known and not problem:
            unknown += 1
    return unknown


def _choose(
    source: Source,
    splits: Sequence[str] | str | os.PathLike | None,
    split_by: str | None,
    seed: int,
) -> Chosen:
    if isinstance(splits, (str, os.PathLike)):
        _refuse_both(split_by)
        return _of_file(source, Path(splits).expanduser())
    if splits is not None and len(splits):
        _refuse_both(split_by)
        if len(splits) != source.rows:
            raise ValueError(f"{len(splits)} splits for {source.rows} rows")
        return Chosen("given", list(splits))

    known = _says_splits(source)
    if split_by == "patient" or (split_by is None and not known):
        groups = _known_groups(source)
        if split_by == "patient" and groups is None:
            raise ValueError(
                "split_by=patient needs the patient of each row in a column `group`: "
                "name it with columns={'group': 'NAME'}"
            )
        if groups is not None and (split_by or len(set(groups) - {None}) >= len(SPLITS)):
            return _by_patient(groups, seed)
    if known:
        return Chosen("source")
    return Chosen("none", ["train"] * source.rows)


def _by_patient(groups: list[str | None], seed: int) -> Chosen:
    """Deal out the patients; a row that names none goes nowhere, for its patient may be anywhere."""
    without = [number for number, group in enumerate(groups) if group is None]
    if len(without) > len(groups) / 2:
        raise ValueError(
            f"{len(without)} of {len(groups)} rows name no patient (first: row {without[0]}), so that "
            "no split can keep patients together: fill them in, or say split_by=none"
        )
    rows = [number for number, group in enumerate(groups) if group is not None]
    dealt = split_by_group([groups[number] for number in rows], seed=seed)
    splits: list[str | None] = [None] * len(groups)
    for number, split in zip(rows, dealt, strict=True):
        splits[number] = split
    missing = "group: it names no patient, who may stand in another split"
    return Chosen("patient", splits, missing=missing)


def _refuse_both(split_by: str | None) -> None:
    if split_by == "patient":
        raise ValueError("splits=FILE says the split of each row: leave split_by=patient out")


def _says_splits(source: Source) -> bool:
    """Say whether any row or file of the source names a split."""
    if any(split_of(Path(shard.name)) for shard in source.shards):
        return True
    # a column that is there and empty, as tables have it, says nothing
    return any(isinstance(cell, str) and cell.strip() for cell in source.cells("split"))


def _known_groups(source: Source) -> list[str | None] | None:
    """Give the group of each row as text, None where it is not known; None if none is."""
    groups: list[str | None] = []
    known = 0
    problems = source.cells("problem")
    for number, cell in enumerate(source.cells("group")):
        if names_group(cell):
            groups.append(str(cell))
            known += 1
        elif problems[number]:
            groups.append(f"rejected row {number}")
        else:
            groups.append(None)
    return groups if known else None


# --- a file of splits -------------------------------------------------------------------------


@dataclass
class _Line:
    """What a line of the file says.

    split : train, validation or test; None where it says nothing.
    group : the patient, if the line says it.
    used : whether a row belongs to it.
    """

    split: str | None
    group: str | None
    used: bool = field(default=False)


def _of_file(source: Source, file: Path) -> Chosen:
    lines = _read_lines(file)
    splits: list[str | None] = []
    groups: list[str | None] = []
    for cell in source.ids():
        line = lines.get(cell)
        if line:
            line.used = True
        splits.append(line.split if line else None)
        groups.append(line.group if line else None)
    if not any(splits):
        raise ValueError(
            f"{file} has a split for none of the ids: splits=FILE is of another source"
        )
    unused = sum(not line.used for line in {id(line): line for line in lines.values()}.values())
    missing = f"split: {file.name} has none for this id"
    return Chosen("given", splits, groups if any(groups) else None, missing, unused)


def _read_lines(file: Path) -> dict[str, _Line]:
    """Read the lines by the id of their pair, which may be written as the source has it, too."""
    lines: dict[str, _Line] = {}
    try:
        with open(file, encoding="utf-8-sig", newline="") as text:
            reader = csv.DictReader(text)
            columns = {str(name).strip().lower(): name for name in reader.fieldnames or ()}
            if not {"id", "split"} <= columns.keys():
                raise ValueError(f"{file} has no columns id and split: give splits=FILE with both")
            for row in reader:
                cells = {name: (row[theirs] or "").strip() for name, theirs in columns.items()}
                line = _line_of(cells, f"{file}, line {reader.line_num}")
                for name in (cells["id"], safe_id(cells["id"])):
                    known = lines.setdefault(name, line)
                    if known.split != line.split:
                        raise ValueError(
                            f"{file}, line {reader.line_num}: the id stands above already, "
                            f"with the split {known.split}"
                        )
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file} is no CSV in UTF-8 ({one_line(error)})") from None
    return lines


def _line_of(cells: dict[str, str], where: str) -> _Line:
    split = split_of_word(cells["split"])
    if cells["split"] and split is None:
        raise ValueError(f"{where}: {cells['split']!r:.50} is none of {', '.join(SPLITS)}")
    return _Line(split, cells.get("group") or None)
