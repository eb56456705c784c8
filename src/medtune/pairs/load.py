"""Load image-text pairs from whatever holds them.

A *pair* is a row with `image`, `id` and `caption`, plus whatever else the source knows (`group`,
`split`, `roi`, ...). A picture stays the bytes or the file that the source holds and is decoded
when you read `row["image"]`; see the bytes themselves with
`dataset.cast_column("image", datasets.Image(decode=False))`.
"""

import os
import re
from dataclasses import replace
from pathlib import Path

import datasets

from .arrow import make_dataset, parquet_features
from .dicom import SUFFIXES as DICOM_SUFFIXES
from .files_of_pictures import find_pictures
from .hub import load_from_hub
from .reading import Reading
from .tables import SPLITS, TABLE_SUFFIXES, LoosePictures, split_of

# What medtune itself writes beside training records: no tables of captions.
NO_TABLES = {
    "dataset_info.json",
    "rejected.jsonl",
    "convert.json",
    "check.json",
    "summary.json",
}

# Owner and name of a set on the hub.
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def load_pairs(  # noqa: PLR0913 - one function for every source, each with its own options
    source: str | os.PathLike,
    *,
    config: str | None = None,
    split: str | None = None,
    streaming: bool = False,
    limit: int | None = None,
    window: str | tuple[float, float] | None = None,
    columns: dict[str, str] | None = None,
    captions: str | os.PathLike | None = None,
    image_root: str | os.PathLike | None = None,
    allow_empty_captions: bool = False,
    salt: str | None = None,
    strict: bool = True,
) -> datasets.Dataset | datasets.IterableDataset:
    """Load pairs from parquet, the hub, tables, dialogues, DICOM files, or a folder of such.

    Parameters
    ----------
    source : str or Path
        "sample" (the built sample set), a hub id such as "UCSC-VLAA/MedTrinity-25M", or the path of
        a parquet file, of a CSV, TSV, JSON or JSONL of captions or dialogues (messages,
        conversations, prompt/completion), of a DICOM file, or of a folder: parquet shards, or
        pictures with one table beside them.
    config : str, optional
        Configuration of a hub set, such as "25M_demo"; it may also stand after a colon in `source`.
    split : str, optional
        The split to keep: by the column `split`, by file names such as `test-00000.parquet` or
        `test.jsonl`, or by the hub's splits (there the default is "train").
    streaming : bool
        Return an IterableDataset that reads as you go: memory and disk stay flat.
    limit : int, optional
        The first rows only, held in memory, without reading or downloading the rest.
    window : str or tuple of float, optional
        For DICOM: a CT window, see `medtune.pairs.WINDOWS`, or (centre, width).
    columns : dict of str to str, optional
        Our name -> the source's name, where they differ: `{"caption": "impression"}`. Common names
        are known.
    captions : str or Path, optional
        The table of captions, where it is not the only one in the folder.
    image_root : str or Path, optional
        The folder that pictures may not lie outside of (default: where the table is); names of
        pictures are relative to either.
    allow_empty_captions : bool
        Load pictures or DICOM files that have no table, with the caption "".
    salt : str, optional
        For DICOM: a secret that makes the hashed patient groups agree between calls (without one,
        groups are numbered as they come).
    strict : bool
        Raise on the first bad row of a table. If False, it becomes a row whose column `problem`
        says why, which `reject_reason` reports, so that the rest goes on and nothing is lost
        silently.

    Returns
    -------
    datasets.Dataset or datasets.IterableDataset
        A row for each pair, with `image`, `id`, `caption` and whatever else the source knows.

    Raises
    ------
    FileNotFoundError
        The source, its table or a picture is not there.
    PermissionError
        The hub refuses a gated set.
    ConnectionError
        The source is no path here, and the hub is out of reach.
    ValueError
        There are no pairs, or they cannot be read. Each message is one line: what, where, and what
        to do.

    Examples
    --------
    >>> import pathlib, tempfile, PIL.Image
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> PIL.Image.new("L", (8, 8)).save(folder / "a.png")
    >>> _ = (folder / "captions.csv").write_text("image,caption\\na.png,A black square.\\n")
    >>> load_pairs(folder)[0]["caption"]
    'A black square.'
    """
    name = str(source)
    path = _find_sample() if name == "sample" else Path(source).expanduser()
    columns = columns or {}
    if not path.exists():
        hub_id, config_in_name = _hub_id_of(name, path)
        return load_from_hub(
            hub_id,
            config or config_in_name,
            split or "train",
            streaming=streaming,
            limit=limit,
            columns=columns,
        )
    reading = Reading(columns=columns, strict=strict, window=window, salt=salt, split=split)
    shards = _parquet_files(path)
    features = None
    # Parquet holds whole rows of known types, unless the captions are said to stand elsewhere.
    if shards and not captions:
        tables, reading = _shards_of_split(shards, reading)
        features = parquet_features(tables, reading)
    else:
        tables = [Path(captions)] if captions else _find_tables(path)
        if not tables:
            tables = [_find_loose_pictures(name, path, allow_empty_captions)]
        reading = replace(reading, folders=_picture_folders(path, image_root))
    return make_dataset(name, tables, reading, features=features, streaming=streaming, limit=limit)


def _find_sample() -> Path:
    """Find the built sample set: where MEDTUNE_SAMPLE says, else above here or above this file."""
    named = os.environ.get("MEDTUNE_SAMPLE")
    if named:
        candidates = [Path(named)]
    else:
        here = Path.cwd()
        above = [here, *here.parents, *Path(__file__).resolve().parents]
        candidates = [folder / "data/sample/sample.parquet" for folder in above]
    for path in candidates:
        if path.is_file():
            return path
    raise FileNotFoundError(
        "the sample set is not built: run `make sample` in medtune's folder, or set MEDTUNE_SAMPLE"
    )


def _hub_id_of(name: str, path: Path) -> tuple[str, str | None]:
    """Take "owner/name:config" apart, or raise if it cannot be meant for the hub."""
    hub_id, _, config = name.partition(":")
    # "data/rows.parquet" has the form of a hub id, but is a path with a slip in it
    looks_like_a_file = path.suffix in TABLE_SUFFIXES | DICOM_SUFFIXES | {".parquet"}
    if looks_like_a_file or not _HUB_ID.fullmatch(hub_id):
        raise FileNotFoundError(f"no such file or folder: {hub_id}")
    return hub_id, config or None


def _parquet_files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(path.rglob("*.parquet"))
    return [path] if path.suffix == ".parquet" else []


def _shards_of_split(shards: list[Path], reading: Reading) -> tuple[list[Path], Reading]:
    """Keep the files named after the wanted split; without any, the column `split` must tell."""
    if not reading.split:
        return shards, reading
    named = [file for file in shards if split_of(file) == reading.split]
    if not named:
        return shards, reading
    return named, replace(reading, split=None)


def _find_tables(path: Path) -> list[Path]:
    """Find the tables of a folder: those named after splits, else the one table of captions."""
    if path.is_file():
        return [path] if path.suffix in TABLE_SUFFIXES else []
    files = [file for file in sorted(path.iterdir()) if _may_be_a_table(file)]
    of_splits = [file for file in files if file.stem in SPLITS]
    if of_splits:
        return of_splits
    well_named = [file for file in files if file.stem in ("captions", "metadata")]
    files = well_named or files
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{path} holds several tables ({names}): give captions=FILE")
    return files


def _may_be_a_table(file: Path) -> bool:
    is_hidden = file.name.startswith(".")
    return file.suffix in TABLE_SUFFIXES and file.name not in NO_TABLES and not is_hidden


def _find_loose_pictures(name: str, path: Path, allow_empty_captions: bool) -> LoosePictures:
    """Find pictures and DICOM files that no table names."""
    found = find_pictures(path)
    if found and not allow_empty_captions:
        raise ValueError(
            f"{name} holds {len(found)} pictures and no table of captions: give captions=FILE.csv "
            "(columns image, caption) or allow_empty_captions=True"
        )
    return LoosePictures(tuple(str(file) for file in found))


def _picture_folders(path: Path, image_root: str | os.PathLike | None) -> tuple[Path, ...]:
    """Give the folders that pictures are looked for in; they must not leave the first."""
    base = (path if path.is_dir() else path.parent).resolve()
    root = Path(image_root).expanduser().resolve() if image_root else base
    # tables name a picture by its path from the root, from the table, or by its bare name
    folders = dict.fromkeys((root, base, base / "images"))
    return tuple(folder for folder in folders if folder.is_relative_to(root))
