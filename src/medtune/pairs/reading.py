"""How a source is to be read, and which of its columns is which of ours."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Our name -> the names that published sets give the same thing, best first.
ALIASES = {
    "image": ("image_path", "file_name", "filename", "path", "images"),
    "id": ("image_id", "uid"),
    "caption": ("text", "report", "findings", "description"),
}


@dataclass(frozen=True)
class Reading:
    """What `load_pairs` was asked for, on its way to the functions that read the rows.

    `datasets` pickles it: to hash it into the name of a cached set, and to hand it to the workers
    of a stream. So it holds values, no open files.

    Attributes
    ----------
    columns : dict of str to str
        Our name -> the source's name, where the caller said so.
    strict : bool
        Whether a bad row raises; else it becomes a row with a `problem`.
    window : str, tuple of float or None
        The window for DICOM files.
    salt : str or None
        The secret that patients' numbers are hashed with; without one, groups are only numbered.
    split : str or None
        Keep the rows of this split only.
    folders : tuple of Path
        Where the pictures of a table are looked for; none may lie outside of the first.
    several_tables : bool
        Whether there is more than one table, so that each row tells the split its table is named
        after.
    changed : tuple of int
        When each file was last written, in nanoseconds. Nobody reads it, but it goes into the hash:
        a changed file is not served from the cache.
    """

    columns: dict[str, str] = field(default_factory=dict)
    strict: bool = True
    window: Any = None
    salt: str | None = None
    split: str | None = None
    folders: tuple[Path, ...] = ()
    several_tables: bool = False
    changed: tuple[int, ...] = ()


def our_names(
    available: Iterable[str], columns: dict[str, str], where: object, need: tuple[str, ...] = ()
) -> dict[str, str]:
    """Map the source's names to ours: what the caller said first, then `ALIASES`.

    Parameters
    ----------
    available : iterable of str
        The names that the source has, in its order.
    columns : dict of str to str
        Our name -> the source's name, as the caller said.
    where : object
        What a message calls the source.
    need : tuple of str
        Our names that must be among the result.

    Returns
    -------
    dict of str to str
        The source's name -> our name. A column that bears one of our names though the caller gave
        that name to another is left out.

    Raises
    ------
    ValueError
        A needed name, or one that the caller gave, is not there.

    Examples
    --------
    >>> our_names(["uid", "report", "group"], {}, "the table")
    {'uid': 'id', 'report': 'caption', 'group': 'group'}
    """
    available = list(available)
    names = {name: name for name in available if name not in columns}
    for ours, theirs in columns.items():
        names[theirs] = ours
    for ours, aliases in ALIASES.items():
        if ours in names.values():
            continue
        # an alias serves if it is there and not taken for something else
        free = [alias for alias in aliases if names.get(alias) == alias]
        if free:
            names[free[0]] = ours
    missing = [theirs for theirs in columns.values() if theirs not in available]
    missing += [ours for ours in need if ours not in names.values()]
    if missing:
        raise ValueError(
            f"{where} has no column {' or '.join(missing)}, only {', '.join(available)}: "
            "say which is which, columns={'caption': 'NAME'}"
        )
    return names
