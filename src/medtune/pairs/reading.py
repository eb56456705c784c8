"""How a source is to be read, and the tables that it consists of."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .salt import user_salt
from .slabs import Slab


@dataclass(frozen=True)
class Table:
    """A file with pairs: a table, a dialogue file, or a shard of parquet or Arrow.

    Attributes
    ----------
    path : Path
        The file.
    split : str or None
        The split that its name, or that of its folder, says.
    columns : dict of str to str
        Our name -> the file's name, as a description beside the file says.
    """

    path: Path
    split: str | None = None
    columns: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LoosePictures:
    """Pictures that no table names: each becomes a row with the caption "".

    Attributes
    ----------
    files : tuple of str
        Absolute paths of pictures and DICOM files; for slabs, of NIfTI files and folders of slices.
    """

    files: tuple[str, ...]


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
    window : str, tuple or None
        The window for DICOM files and volumes.
    slab : Slab or None
        Which slices of a volume become the pictures of one question; None reads no volumes.
    salt : str or None
        The secret that ids and patients' numbers are hashed with; None where none is needed.
    split : str or None
        Keep the rows of this split only.
    encoding : str or None
        How the text of tables is encoded; None for UTF-8.
    base : Path
        The folder of the source: names of pictures are relative to it or to their table's folder.
    root : Path
        The folder that no picture may lie outside of.
    several_tables : bool
        Whether there is more than one table, so that each row tells the split its table is named
        after.
    repeated : frozenset of int
        Hashes of the ids that stand on several rows.
    changed : tuple of int
        When each file was last written, in nanoseconds. Nobody reads it, but it goes into the hash:
        a changed file is not served from the cache.
    """

    columns: dict[str, str] = field(default_factory=dict)
    strict: bool = True
    window: Any = None
    slab: Slab | None = None
    salt: str | None = None
    split: str | None = None
    encoding: str | None = None
    base: Path = Path()
    root: Path = Path()
    several_tables: bool = False
    repeated: frozenset[int] = frozenset()
    changed: tuple[int, ...] = ()

    def secret(self) -> str:
        """Give the salt, that of the user where the caller gave none."""
        return self.salt or user_salt()
