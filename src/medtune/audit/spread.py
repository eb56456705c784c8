"""Take the fingerprints of shards on the machines of a Ray cluster.

Each machine reads a shard where it lies; the pictures do not travel, and are not written once more.
What comes back is 1.6 KB a picture, and the other columns.
"""

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from medtune.cluster import join_cluster, name_failed
from medtune.files import only_writer
from medtune.pairs import list_shards, load_pairs, user_salt

from .fingerprints import Fingerprints, append_marks, fingerprint, gathered, read_marks


@dataclass(frozen=True)
class _Place:
    """One shard of a source.

    source : folder or file that `load_pairs` takes.
    options : what else it takes, as JSON.
    number : place of the shard among all of them.
    salt : what names are hashed with, on all machines alike.
    """

    source: str
    options: str
    number: int
    salt: str


@dataclass(frozen=True)
class Marked:
    """A source whose pictures were read on a cluster.

    Attributes
    ----------
    pairs
        All columns but the pictures.
    fingerprints
        Of all rows, in their order.
    ray
        Address of the cluster.
    """

    pairs: datasets.Dataset
    fingerprints: Fingerprints
    ray: str
    _places: Mapping[str, _Place]
    _starts: list[int]

    def cells(self, rows: Sequence[int]) -> list[Any]:
        """Fetch the encoded pictures of a few rows.

        Raises
        ------
        ValueError : a shard cannot be read any more.
        """
        jobs = {}
        for number, (name, place) in enumerate(self._places.items()):
            start, stop = self._starts[number], self._starts[number + 1]
            own = [row - start for row in rows if start <= row < stop]
            if own:
                jobs[name] = (place, own)
        found = {}

        def take(name: str, cells: dict[int, Any]) -> None:
            start = self._starts[list(self._places).index(name)]
            for row, cell in cells.items():
                found[start + row] = cell

        with join_cluster(self.ray) as cluster:
            failed = cluster.each(_read_cells, jobs, take, title="Fetching pictures")
        if failed:
            raise ValueError(name_failed(failed, len(jobs), "shards cannot be read"))
        return [found[row] for row in rows]


def fingerprint_on_cluster(
    source: str | os.PathLike,
    *,
    ray: str,
    keep: str | os.PathLike | None = None,
    **options: Any,
) -> Marked:
    """Read every picture of some shards once, on the machines of a Ray cluster.

    The result is that of `fingerprint` over the pairs of the source.

    Parameters
    ----------
    source : a folder of parquet shards, or one of them, on a disk that all machines see.
    ray : address of the cluster, HOST:PORT.
    keep : folder for the fingerprints, as `fingerprint` has it; shards that are done stay there if
        others fail, and the same call goes on.
    **options : for `medtune.pairs.load_pairs`.

    Raises
    ------
    ValueError : the source is no parquet, a shard cannot be read (it is named, and the others are
        done), or `keep` holds fingerprints already.
    OSError : there is no cluster.

    Examples
    --------
    >>> marked = fingerprint_on_cluster("shards/", ray="10.0.0.1:6379")  # doctest: +SKIP
    """
    # the same name on all machines
    source = Path(source).expanduser().resolve()
    asked = _Asked(source, list_shards(source), options, ray, Path(keep) if keep else None)
    if not asked.files:
        raise ValueError(f"ray={ray} takes parquet shards, and {source} has none")
    if asked.keep is None:
        with tempfile.TemporaryDirectory() as folder:
            return _mark(asked, Path(folder))
    with only_writer(asked.keep / "digests.bin", f"keep={keep}"):
        if (asked.keep / "digests.bin").exists():
            raise ValueError(
                f"keep={keep} holds fingerprints already: go on without ray={ray}, or name another "
                "folder"
            )
        return _mark(asked, asked.keep)


@dataclass(frozen=True)
class _Asked:
    """What a caller wants.

    source : folder or file of the shards.
    files : why each shard cannot be opened, None for a good one.
    options : for `load_pairs`.
    ray : address of the cluster.
    keep : folder for the fingerprints, if they are to be kept.
    """

    source: Path
    files: Mapping[Path, str | None]
    options: Mapping[str, Any]
    ray: str
    keep: Path | None


def _mark(asked: _Asked, folder: Path) -> Marked:
    """Read the shards, with what is done already in a folder."""
    ray = asked.ray
    failed = {str(file): reason for file, reason in asked.files.items() if reason}
    whole = [file for file, reason in asked.files.items() if not reason]
    told = json.dumps(dict(asked.options) | {"without": sorted(failed)})
    salt = user_salt()
    places = {}
    jobs = {}
    for number, file in enumerate(whole):
        name = str(file)
        places[name] = _Place(str(asked.source), told, number, salt)
        jobs[name] = (places[name], not _part(folder, file).exists())
    tables = {}

    def take(name: str, result: tuple[pa.Table, Fingerprints | None]) -> None:
        tables[name], marks = result
        if marks is not None:
            _write_part(_part(folder, Path(name)), marks)

    (folder / "shards").mkdir(exist_ok=True)
    with join_cluster(ray) as cluster:
        failed |= cluster.each(_mark_shard, jobs, take, title="Reading pictures of shards")
    if failed:
        what = name_failed(_by_file_name(failed), len(asked.files), "shards could not be read")
        rest = "the others are not kept: name keep=FOLDER"
        if asked.keep:
            rest = f"the others are done and kept in {asked.keep}"
        raise ValueError(f"{what}; {rest}, and the same call goes on with these")

    table = pa.concat_tables([tables[name] for name in places], promote_options="default")
    _refuse_repeated(table["id"].to_pylist(), ray)
    parts = [_part(folder, file) for file in whole]
    starts = [0]
    for file in whole:
        starts.append(starts[-1] + tables[str(file)].num_rows)
    if asked.keep:
        for part in parts:
            append_marks(folder, _read_part(part))
        marks = read_marks(folder)
        for part in parts:
            part.unlink()
        (folder / "shards").rmdir()
    else:
        marks = _together([_read_part(part) for part in parts])
    return Marked(datasets.Dataset(table), marks, ray, places, starts)


def _refuse_repeated(ids: list[str], ray: str) -> None:
    """Refuse ids of which two shards have one: together, the second would be told from the first."""
    seen = set()
    for name in ids:
        if name in seen:
            raise ValueError(
                f"the id {name!r:.80} stands in two shards: audit them without ray={ray}, which tells "
                "whether these are two views or the same row twice"
            )
        seen.add(name)


def _by_file_name(failed: Mapping[str, str]) -> dict[str, str]:
    """Name shards by their files; a reason need not say the whole way again."""
    return {
        Path(name).name: reason.replace(name, Path(name).name) for name, reason in failed.items()
    }


# ---- on one of the machines


def _mark_shard(place: _Place, wanted: bool) -> tuple[pa.Table, Fingerprints | None]:
    """Give the columns of a shard without the pictures, and their fingerprints if they are wanted."""
    rows = _rows_of(place)
    others = []

    def cells() -> Iterator[dict[str, Any]]:
        for row in rows:
            others.append({name: value for name, value in row.items() if name != "image"})
            yield {"image": row["image"]}

    marks = None
    if wanted:
        # one thread: Ray has as many of these at a time as there are processors
        marks = fingerprint(cells(), workers=1)
    else:
        for _ in cells():
            pass
    types = datasets.Features(
        {name: kind for name, kind in rows.features.items() if name != "image"}
    )
    return pa.Table.from_pylist(others, types.arrow_schema), marks


def _read_cells(place: _Place, numbers: Sequence[int]) -> dict[int, Any]:
    """Give the encoded pictures of some rows of a shard, by their number in it."""
    wanted = set(numbers)
    found = {}
    for number, row in enumerate(_rows_of(place)):
        if number in wanted:
            found[number] = row["image"]
    return found


def _rows_of(place: _Place) -> datasets.IterableDataset:
    """Open a shard as it is among the others: an id of another may be its own."""
    os.environ["MEDTUNE_SALT"] = place.salt
    stream = _open_source(place.source, place.options)
    return stream.shard(num_shards=stream.num_shards, index=place.number)


@functools.lru_cache(maxsize=1)
def _open_source(source: str, options: str) -> datasets.IterableDataset:
    """Look over all shards, once in a process."""
    if not Path(source).exists():
        raise FileNotFoundError(
            f"a machine of the cluster does not see {source}: it must lie on a disk that all share"
        )
    stream = load_pairs(source, streaming=True, strict=False, **json.loads(options))
    return stream.cast_column("image", datasets.Image(decode=False))


# ---- what was done, on the disk


def _part(folder: Path, shard: Path) -> Path:
    """Give the file for the fingerprints of a shard; of one that has changed it is another."""
    stat = shard.stat()
    known = json.dumps([str(shard), stat.st_size, stat.st_mtime_ns])
    return folder / "shards" / f"{hashlib.sha256(known.encode()).hexdigest()[:24]}.npz"


def _write_part(part: Path, marks: Fingerprints) -> None:
    hidden = part.with_suffix(".part")
    with open(hidden, "wb") as file:
        digests = np.array(["" if digest is None else digest for digest in marks.digests], "U64")
        np.savez(file, digests=digests, hashes=marks.hashes, features=marks.features)
    os.replace(hidden, part)


def _read_part(part: Path) -> Fingerprints:
    with np.load(part) as arrays:
        digests = [digest or None for digest in arrays["digests"].tolist()]
        unreadable = [row for row, digest in enumerate(digests) if digest is None]
        return Fingerprints(digests, arrays["hashes"], arrays["features"], unreadable)


def _together(parts: list[Fingerprints]) -> Fingerprints:
    """Put fingerprints one after the other."""
    nothing = gathered([])
    digests = []
    for part in parts:
        digests += part.digests
    return Fingerprints(
        digests=digests,
        hashes=np.concatenate([nothing.hashes, *(part.hashes for part in parts)]),
        features=np.concatenate([nothing.features, *(part.features for part in parts)]),
        unreadable=[row for row, digest in enumerate(digests) if digest is None],
    )
