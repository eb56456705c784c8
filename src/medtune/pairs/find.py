"""Find out what a source on this machine consists of: tables, shards, or pictures alone."""

import json
import re
from pathlib import Path
from typing import Any

from medtune.files import one_line

from .archives import unpacked
from .columns import split_of_word
from .files_of_pictures import find_pictures
from .reading import LoosePictures, Table
from .shards import SHARD_SUFFIXES
from .slabs import find_volumes
from .sources import TABLE_SUFFIXES
from .tables import split_of
from .volumes import is_nifti

# What medtune itself writes beside training records: no tables of captions.
NO_TABLES = {
    "dataset_info.json",
    "dataset_dict.json",
    "state.json",
    "rejected.jsonl",
    "convert.json",
    "check.json",
    "summary.json",
}

# A text file is a table only if its name says so: most are notes and licences.
_TABLE_TEXTS = re.compile(r"captions?|metadata|reports?", re.IGNORECASE)
_WELL_NAMED = ("captions", "metadata")

# Sources of other kinds -> what to do with them.
OTHER_SOURCES = {
    ".nii": "a NIfTI volume: give slab=N (slices in a question), or save its slices as PNG",
    ".nii.gz": "a NIfTI volume: give slab=N (slices in a question), or save its slices as PNG",
    ".mha": "a volume: save its slices as PNG, or give the DICOM series",
    ".nrrd": "a volume: save its slices as PNG, or give the DICOM series",
    ".tar": "an archive: unpack it, and give the folder",
    ".tar.gz": "an archive: unpack it, and give the folder",
    ".tgz": "an archive: unpack it, and give the folder",
    ".gz": "an archive: unpack it, and give the file",
    ".7z": "an archive: unpack it, and give the folder",
    ".rar": "an archive: unpack it, and give the folder",
    ".xls": "an old Excel file: save it as CSV or .xlsx",
    ".ods": "a spreadsheet: save it as CSV or .xlsx",
    ".doc": "a document: write its captions into a CSV",
    ".docx": "a document: write its captions into a CSV",
    ".pdf": "a document: write its captions into a CSV",
    ".pkl": "a pickle, which could run code: save it as parquet",
    ".pickle": "a pickle, which could run code: save it as parquet",
    ".mp4": "a video: take pictures out of it",
    ".avi": "a video: take pictures out of it",
    ".npy": "an array: save its pictures as PNG",
    ".npz": "an array: save its pictures as PNG",
    ".h5": "an HDF5 file: save its pictures as PNG, and its captions as CSV",
    ".hdf5": "an HDF5 file: save its pictures as PNG, and its captions as CSV",
    ".lmdb": "a database: save it as parquet",
    ".xml": "XML: write its captions into a CSV",
}


def folder_of_zip(path: Path, encoding: str | None, takes_volumes: bool = False) -> Path:
    """Give the folder of a ZIP that was unpacked, or the path itself where it is none.

    Parameters
    ----------
    path : Path
        Any source that is there.
    encoding : str or None
        How names in an old ZIP are encoded.
    takes_volumes : bool
        Whether a NIfTI file is read.

    Returns
    -------
    Path
        A folder or file that can be read.

    Raises
    ------
    ValueError
        The file is of a kind that is not read; the message says what to do with it.

    Examples
    --------
    >>> folder_of_zip(Path("a folder"), None).name
    'a folder'
    """
    if not path.is_file() or (takes_volumes and is_nifti(path)):
        return path
    suffix = path.suffix.lower()
    both = "".join(part.lower() for part in path.suffixes[-2:])
    if suffix == ".zip":
        return unpacked(path, encoding)
    for ending in (both, suffix):
        if ending in OTHER_SOURCES:
            raise ValueError(f"{path.name} is {OTHER_SOURCES[ending]}")
    return path


# --- shards ---------------------------------------------------------------------------------------


def find_shards(path: Path, split: str | None) -> list[Table]:
    """Find parquet files, or the Arrow files that `datasets` saved.

    Parameters
    ----------
    path : Path
        A file or a folder.
    split : str or None
        Only files of this split, where file or folder names say one.

    Returns
    -------
    list of Table
        In order; none where there are no shards.
    """
    if path.is_file():
        files = [path] if path.suffix.lower() in SHARD_SUFFIXES else []
    else:
        files = sorted(path.rglob("*.parquet")) or _saved_files(path)
    shards = [Table(file, _split_of_shard(file, path)) for file in files]
    named = [shard for shard in shards if shard.split == split]
    # where no name tells the wanted split, the column must
    return named if split and named else shards


def _saved_files(path: Path) -> list[Path]:
    """List the files of a set that `datasets` saved, with or without splits."""
    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return []
    files = [file for file in sorted(path.rglob("*.arrow")) if not file.name.startswith("cache-")]
    # what else lies in such a folder is no part of the set
    return [file for file in files if (file.parent / "state.json").is_file()]


def _split_of_shard(file: Path, path: Path) -> str | None:
    by_name = split_of(file)
    if by_name or file.parent == path.parent:
        return by_name
    return split_of_word(file.parent.name) if file.parent != path else None


# --- tables ---------------------------------------------------------------------------------------


def find_tables(path: Path) -> list[Table]:
    """Find the tables of a source.

    Parameters
    ----------
    path : Path
        A table, or a folder: its tables named after splits, else the one table of captions, else
        those that a `dataset_info.json` describes, else those in folders named after splits.

    Returns
    -------
    list of Table
        In order; none where there is no table.

    Raises
    ------
    ValueError
        There are several, and it is not clear which is meant.
    """
    if path.is_file():
        if path.name == "dataset_info.json":
            described = _described_tables(path)
            if not described:
                raise ValueError(
                    f"{path} names no file that lies here: give the hub's name of a set"
                )
            return described
        is_table = path.suffix.lower() in TABLE_SUFFIXES
        return [Table(path, split_of(path))] if is_table else []
    files = [file for file in sorted(path.iterdir()) if _may_be_a_table(file)]
    of_splits = _of_splits(files)
    if of_splits:
        return of_splits
    if len(files) > 1 and (path / "dataset_info.json").is_file():
        described = _described_tables(path / "dataset_info.json")
        if described:
            return described
    well_named = [file for file in files if file.stem.lower() in _WELL_NAMED]
    files = well_named or files
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{path} holds several tables ({names}): give captions=FILE")
    if files:
        return [Table(files[0], split_of(files[0]))]
    return _nested_tables(path)


def _may_be_a_table(file: Path) -> bool:
    if file.name.startswith((".", "~$")) or file.name in NO_TABLES or not file.is_file():
        return False
    suffix = file.suffix.lower()
    if suffix == ".txt":
        return bool(_TABLE_TEXTS.fullmatch(file.stem))
    return suffix in TABLE_SUFFIXES


def _of_splits(files: list[Path]) -> list[Table]:
    """Keep the tables that are named after splits, such as test.jsonl or train_captions.csv."""
    exact = [file for file in files if split_of_word(file.stem)]
    if not exact:
        named = [file for file in files if split_of(file)]
        # beside captions there may be other tables of the same splits
        exact = [file for file in named if re.search(r"caption|report|metadata", file.stem, re.I)]
        is_one_each = len({split_of(file) for file in named}) == len(named) > 1
        exact = exact or (named if is_one_each else [])
        if len({split_of(file) for file in exact}) < len(exact):
            return []
    return [Table(file, split_of(file)) for file in exact]


def _nested_tables(path: Path) -> list[Table]:
    """Find the tables in folders named after splits, as Hugging Face's ImageFolder has them."""
    tables = []
    for folder in sorted(path.iterdir()):
        split = split_of_word(folder.name)
        if not folder.is_dir() or split is None:
            continue
        inside = find_tables(folder)
        tables += [Table(table.path, table.split or split, table.columns) for table in inside]
    return tables


def _described_tables(file: Path) -> list[Table]:
    """Find the tables that LLaMA-Factory's description names and that lie here."""
    try:
        entries = json.loads(file.read_text("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is not JSON ({one_line(error, 100)})") from None
    entries = entries.values() if isinstance(entries, dict) else []
    here = []
    for entry in entries:
        name = entry.get("file_name") if isinstance(entry, dict) else None
        # a name comes from elsewhere: it must not lead out of the folder
        if isinstance(name, str) and _lies_in(file.parent / name, file.parent):
            here.append((entry, file.parent / name))
    with_pictures = [pair for pair in here if "images" in (pair[0].get("columns") or {})]
    tables = []
    for entry, table in with_pictures or here:
        if table.suffix.lower() in TABLE_SUFFIXES and table.is_file():
            tables.append(Table(table, split_of(table), _columns_of(entry)))
    return tables


def _lies_in(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _columns_of(entry: dict[str, Any]) -> dict[str, str]:
    """Translate a description's names of columns into ours."""
    ours = {"images": "image", "messages": "messages"}
    theirs = entry.get("columns") or {}
    return {ours[name]: theirs[name] for name in ours if isinstance(theirs.get(name), str)}


# --- pictures alone -------------------------------------------------------------------------------


def _without_captions(name: str, what: str) -> ValueError:
    return ValueError(
        f"{name} holds {what} and no table of captions: give captions=FILE.csv "
        "(columns image, caption) or, only to look at pictures, "
        "allow_empty_captions=True"
    )


def find_loose_pictures(name: str, path: Path, allow_empty_captions: bool) -> LoosePictures:
    """Find pictures and DICOM files that no table names.

    Parameters
    ----------
    name : str
        What a message calls the source.
    path : Path
        A folder or a file.
    allow_empty_captions : bool
        Whether pictures without captions are wanted.

    Returns
    -------
    LoosePictures
        Their files.

    Raises
    ------
    ValueError
        There are pictures, and nobody said that they are wanted without captions.
    """
    found = find_pictures(path)
    if len(found) and not allow_empty_captions:
        raise _without_captions(name, f"{len(found)} pictures")
    return LoosePictures(tuple(str(file) for file in found))


def find_loose_volumes(name: str, path: Path, allow_empty_captions: bool) -> LoosePictures:
    """Find volumes that no table names.

    Parameters
    ----------
    name : str
        What a message calls the source.
    path : Path
        A folder or a file.
    allow_empty_captions : bool
        Whether volumes without captions are wanted.

    Returns
    -------
    LoosePictures
        NIfTI files, and folders of DICOM slices.

    Raises
    ------
    ValueError
        There are none, or nobody said that they are wanted without captions.
    """
    found = find_volumes(path)
    if not found:
        raise ValueError(
            f"{name} holds no volumes to make slabs of: neither NIfTI files nor DICOM slices"
        )
    if not allow_empty_captions:
        raise _without_captions(name, f"{len(found)} volumes")
    return LoosePictures(tuple(str(file) for file in found))
