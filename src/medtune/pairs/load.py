"""Load image-text pairs from whatever holds them.

A *pair* is a row with `image`, `id` and `caption`, plus whatever else the source knows (`group`,
`split`, `roi`, ...). A picture stays the bytes or the file that the source holds and is decoded
when you read `row["image"]`; see the bytes themselves with
`dataset.cast_column("image", datasets.Image(decode=False))`.
"""

import os
import re
from collections.abc import Collection
from pathlib import Path

import datasets

from medtune.modelscope import fetch_dataset, is_modelscope_name

from .arrow import are_shards, make_dataset
from .columns import own_names, split_of_word
from .dicom import SUFFIXES as DICOM_SUFFIXES
from .find import (
    OTHER_SOURCES,
    find_loose_pictures,
    find_loose_volumes,
    find_shards,
    find_tables,
    folder_of_zip,
)
from .hub import load_from_hub
from .reading import Reading, Table
from .shards import SHARD_SUFFIXES, schema_of
from .slabs import slab_asked_for
from .sources import TABLE_SUFFIXES
from .tables import split_of

# Endings of what can only be meant as a file.
FILE_SUFFIXES = TABLE_SUFFIXES | SHARD_SUFFIXES | DICOM_SUFFIXES | {".zip", *OTHER_SOURCES}

# Owner and name of a set on the hub.
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def load_pairs(  # noqa: PLR0913 - one function for every source, each with its own options
    source: str | os.PathLike,
    *,
    config: str | None = None,
    split: str | None = None,
    streaming: bool = False,
    limit: int | None = None,
    window: str | tuple | None = None,
    slab: int | None = None,
    slab_mm: float | None = None,
    columns: dict[str, str] | None = None,
    captions: str | os.PathLike | None = None,
    image_root: str | os.PathLike | None = None,
    allow_empty_captions: bool = False,
    salt: str | None = None,
    strict: bool = True,
    encoding: str | None = None,
    without: Collection[str] = (),
) -> datasets.Dataset | datasets.IterableDataset:
    """Load pairs from parquet, the hub, tables, dialogues, DICOM files, or a folder of such.

    Parameters
    ----------
    source : str or Path
        "sample" (the built sample set), a hub id such as "UCSC-VLAA/MedTrinity-25M", or a path: of
        a parquet file, of a CSV, TSV, Excel file, JSON or JSON Lines of captions, questions or
        dialogues (messages, conversations, prompt/completion), of COCO's or R2Gen's JSON, of a
        DICOM file, of a ZIP, or of a folder: parquet shards, a set that `datasets` saved, or
        pictures with one table beside them or in each of its folders train, val and test. What
        "modelscope:OWNER/NAME" means is fetched from ModelScope, and read as such a folder.
    config : str, optional
        Configuration of a hub set, such as "25M_demo", or a folder of a set on ModelScope; it may
        also stand after a colon in `source`.
    split : str, optional
        The split to keep: by the column `split`, by file names such as `test-00000.parquet` or
        `test.jsonl`, or by the hub's splits (there the default is "train"). Of local sources val,
        valid and dev mean validation.
    streaming : bool
        Return an IterableDataset that reads as you go: memory and disk stay flat.
    limit : int, optional
        The first rows only, held in memory, without reading or downloading the rest.
    window : str or tuple, optional
        For DICOM and NIfTI: a CT window, see `medtune.pairs.WINDOWS`, or (centre, width); three of
        these make the colours red, green and blue.
    slab : int, optional
        So many slices of a volume become the pictures of one question. The table names folders of
        one DICOM series each, or NIfTI files; without a table every volume is taken. Slices are
        brought into the radiologist's view. A row is a picture, as ever; the rows of one question
        share the column `slab`, by which `medtune.records.convert_pairs` puts them together, and
        tell `slice` (its number, from 0), `slices` (those of the slab), `plane` and `spacing`
        (millimetres between slices, rows and columns); a table's own columns of these names are
        left out.
    slab_mm : float, optional
        Millimetres between two slices of a slab, around the middle of the volume or around the
        slice that the table names in `middle_slice`, from 0. By default slabs are spread evenly
        over the whole volume.
    columns : dict of str to str, optional
        Our name -> the source's name, where they differ: `{"caption": "impression"}`. Common names
        are known, whatever their capitals. Ours are image, id, caption, question, group and split.
    captions : str or Path, optional
        The table of captions, where it is not the only one in the folder.
    image_root : str or Path, optional
        The folder that pictures may not lie outside of (default: where the table is); names of
        pictures are relative to either.
    allow_empty_captions : bool
        Load pictures or DICOM files that have no table, with the caption "".
    salt : str, optional
        A secret that ids which are file names, and numbers of patients, are hashed with; by default
        that of the user, see `medtune.pairs.user_salt`. With the same salt they agree between
        calls.
    strict : bool
        Raise on the first bad row of a table. If False, it becomes a row whose column `problem`
        says why, which `reject_reason` reports, so that the rest goes on and nothing is lost
        silently.
    encoding : str, optional
        How the text of tables is encoded, such as "gb18030"; by default UTF-8.
    without : collection of str, optional
        Paths of shards that are left out, such as those that `list_shards` cannot open.

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
    path = _find_source(source, config)
    columns = own_names(columns or {})
    wanted = slab_asked_for(slab, slab_mm)
    if not path.exists():
        hub_id, config_in_name = _hub_id_of(name, path)
        if wanted:
            raise ValueError(f"slab={slab} is made of files on this machine, not of a hub set")
        return load_from_hub(
            hub_id,
            config or config_in_name,
            split or "train",
            streaming=streaming,
            limit=limit,
            columns=columns,
            salt=salt,
        )
    path = folder_of_zip(path, encoding, takes_volumes=wanted is not None)
    # words such as val mean a split that we call otherwise; others are left for the error to name
    split = split_of_word(split) or split
    base = (path if path.is_dir() else path.parent).resolve()
    reading = Reading(
        columns=columns,
        strict=strict,
        window=window,
        slab=wanted,
        salt=salt,
        split=split,
        encoding=encoding,
        base=base,
        root=Path(image_root).expanduser().resolve() if image_root else base,
    )
    # shards hold whole rows of known types, unless the captions are said to stand elsewhere
    tables: list = []
    if captions:
        tables = _given_table(Path(captions).expanduser())
    else:
        tables = find_shards(path, split) or find_tables(path)
    if without:
        tables = [table for table in tables if str(table.path) not in without]
    if not tables:
        find_loose = find_loose_volumes if wanted else find_loose_pictures
        tables = [find_loose(name, path, allow_empty_captions)]
    elif wanted and are_shards(tables):
        raise ValueError(
            f"slab={slab} is made of volumes: name them in a table (CSV, JSON); {name} holds "
            "single pictures in shards"
        )
    return make_dataset(name, tables, reading, streaming=streaming, limit=limit)


def list_shards(source: str | os.PathLike) -> dict[Path, str | None]:
    """List the shards of a source, in the order in which `load_pairs` reads them.

    Parameters
    ----------
    source : str or Path
        A parquet file, or a folder of parquet shards or of Arrow files that `datasets` saved.

    Returns
    -------
    dict of Path to str or None
        Why each cannot be opened, None for a good one; empty where the source is something else.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> (folder / "a.parquet").write_bytes(b"no parquet")
    10
    >>> ["fetch it again" in reason for reason in list_shards(folder).values()]
    [True]
    """
    shards: dict[Path, str | None] = {}
    for table in find_shards(Path(source).expanduser(), None):
        shards[table.path] = None
        try:
            schema_of(table.path)
        except ValueError as error:
            shards[table.path] = str(error)
    return shards


def _find_source(source: str | os.PathLike, config: str | None) -> Path:
    """Give the path of a source; one that is not there may be meant for the hub."""
    name = str(source)
    if name == "sample":
        return _find_sample()
    if is_modelscope_name(name):
        return Path(fetch_dataset(name, config))
    return Path(source).expanduser()


def _given_table(captions: Path) -> list[Table]:
    """Give the table that the caller named."""
    if captions.is_dir():
        return find_shards(captions, None) or find_tables(captions)
    if captions.suffix.lower() not in TABLE_SUFFIXES | SHARD_SUFFIXES:
        known = ", ".join(sorted(TABLE_SUFFIXES | SHARD_SUFFIXES))
        raise ValueError(f"{captions} is no table of captions: give captions=FILE ({known})")
    return [Table(captions, split_of(captions))]


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
    looks_like_a_file = path.suffix.lower() in FILE_SUFFIXES
    if looks_like_a_file or not _HUB_ID.fullmatch(hub_id):
        raise FileNotFoundError(f"no such file or folder: {hub_id}")
    return hub_id, config or None
