"""Read every picture once and keep what the audit needs of it."""

import hashlib
import io
import itertools
import os
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from PIL import Image
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

from medtune.files import only_writer
from medtune.pairs import picture_bytes, to_rgb

from .near import BITS, SIDE, VIEWS, hash_views, likeness_feature, thumbnail, view_spectra


class Fingerprints(NamedTuple):
    """What the audit keeps of each picture, 1.7 KB; every list and array has one entry a row.

    Attributes
    ----------
    digests : SHA-256 of the file's bytes, None when the picture cannot be read.
    hashes : (n, 17, 4) uint64, the 256 bits of the whole picture, then of each trimmed view.
    features : (n, 256) float32, the low frequencies as a vector of length 1, so that a dot product
        of two rows says how much the pictures look alike.
    unreadable : the rows whose picture cannot be read.
    """

    digests: list[str | None]
    hashes: np.ndarray
    features: np.ndarray
    unreadable: list[int]


class _Mark(NamedTuple):
    """The fingerprint of one picture, one entry of each field of `Fingerprints`."""

    digest: str | None
    hash: np.ndarray
    feature: np.ndarray


def fingerprint(
    dataset: Iterable[dict], *, workers: int = 2, keep: str | os.PathLike | None = None
) -> Fingerprints:
    """Read every picture once; the memory needed does not grow with the size of the pictures.

    Parameters
    ----------
    dataset : a Dataset, an IterableDataset, or any rows with an `image` that
        `medtune.pairs.picture_bytes` takes.
    workers : threads that decode; Pillow decodes outside Python's lock.
    keep : folder for the fingerprints, 1.6 KB a picture; they are then read from there and not held
        in memory, but for the digests, 120 bytes a picture. What a killed run has left there is
        taken over: those pictures are compared with it, which is fast, and not decoded again.

    Returns
    -------
    Fingerprints : one entry a row; a picture that cannot be read is listed, not raised.

    Raises
    ------
    ValueError : `keep` holds fingerprints of other pictures, or another process writes there.

    Examples
    --------
    >>> fingerprint([{"image": b"no picture"}]).unreadable
    [0]
    """
    total = len(dataset) if hasattr(dataset, "__len__") else None
    if keep is None:
        marks: list[_Mark] = []
        cells = tqdm(picture_cells(dataset), "Reading pictures", total, delay=2)
        for block in _marks_of(cells, workers):
            marks += block
        return gathered(marks)

    folder = Path(keep)
    with only_writer(folder / "digests.bin", f"keep={folder}"):
        done = _trim(folder)
        cells = picture_cells(dataset)
        _compare(folder, cells, done)
        bar = tqdm(cells, "Reading pictures", total, initial=done, delay=2)
        for block in _marks_of(bar, workers):
            append_marks(folder, gathered(block))
    return read_marks(folder)


def _marks_of(cells: Iterable[Any], workers: int) -> Iterator[list[_Mark]]:
    """Yield the fingerprints of pictures, block by block."""
    cells = iter(cells)
    # One BLAS thread in each of ours: on a busy machine they would wait for each other, 40 times
    # slower.
    with threadpool_limits(1), ThreadPoolExecutor(workers) as pool:
        # `pool.map` alone would read the whole data set ahead: a block is all that memory holds.
        while block := list(pool.map(_mark, itertools.islice(cells, 16 * workers))):
            yield block


def gathered(marks: list[_Mark]) -> Fingerprints:
    """Put the marks of pictures together."""
    hashes = np.array([mark.hash for mark in marks], np.uint64)
    features = np.array([mark.feature for mark in marks], np.float32)
    return Fingerprints(
        digests=[mark.digest for mark in marks],
        # no rows at all still have the shape of hashes and features
        hashes=hashes.reshape(-1, len(VIEWS), BITS // 64),
        features=features.reshape(-1, BITS),
        unreadable=[row for row, mark in enumerate(marks) if mark.digest is None],
    )


# --- fingerprints in a folder ---------------------------------------------------------------------

# The file of each field, and the bytes of a picture in it. The digests are written last, so that
# what they count is there in the others.
_FILES = {"hashes.bin": len(VIEWS) * BITS // 8, "features.bin": 4 * BITS, "digests.bin": 32}

# Stands for the digest of a picture that cannot be read.
_NO_DIGEST = bytes(32)


def _trim(folder: Path) -> int:
    """Count the pictures that all files have, and cut off what a killed run left half written."""
    counts = []
    for name, size in _FILES.items():
        file = folder / name
        file.touch()
        counts.append(file.stat().st_size // size)
    done = min(counts)
    for name, size in _FILES.items():
        os.truncate(folder / name, done * size)
    return done


def _compare(folder: Path, cells: Iterator[Any], done: int) -> None:
    """Step over the pictures that are done; each must be the one that was done."""
    with open(folder / "digests.bin", "rb") as file:
        for cell in itertools.islice(cells, done):
            known = file.read(len(_NO_DIGEST))
            # what could not be read may be no bytes at all
            if known != _NO_DIGEST and _quick_digest(cell) != known:
                break
        else:
            if file.tell() == done * len(_NO_DIGEST):
                return
    raise ValueError(
        f"keep={folder} holds {done} fingerprints of other pictures: delete it, or name another "
        "folder"
    )


def _quick_digest(cell: Any) -> bytes | None:
    """Give the digest without decoding the picture."""
    try:
        return hashlib.sha256(picture_bytes(cell)).digest()
    except Exception:  # as in `_mark`
        return None


def _digest_bytes(digest: str | None) -> bytes:
    return _NO_DIGEST if digest is None else bytes.fromhex(digest)


def append_marks(folder: Path, marks: Fingerprints) -> None:
    """Write fingerprints behind those of the folder."""
    columns = {
        "hashes.bin": marks.hashes.tobytes(),
        "features.bin": marks.features.tobytes(),
        "digests.bin": b"".join(_digest_bytes(digest) for digest in marks.digests),
    }
    for name, data in columns.items():
        with open(folder / name, "ab") as file:
            file.write(data)


def read_marks(folder: Path) -> Fingerprints:
    """Map the arrays from the files, and read the digests."""
    data = (folder / "digests.bin").read_bytes()
    digests: list[str | None] = []
    for begin in range(0, len(data), len(_NO_DIGEST)):
        digest = data[begin : begin + len(_NO_DIGEST)]
        digests.append(None if digest == _NO_DIGEST else digest.hex())
    if not digests:
        return gathered([])  # an empty file cannot be mapped
    return Fingerprints(
        digests=digests,
        hashes=np.memmap(folder / "hashes.bin", np.uint64, "r").reshape(-1, len(VIEWS), BITS // 64),
        features=np.memmap(folder / "features.bin", np.float32, "r").reshape(-1, BITS),
        unreadable=[row for row, digest in enumerate(digests) if digest is None],
    )


# --- one picture ----------------------------------------------------------------------------------


def picture_cells(dataset: Iterable[dict]) -> Iterator[Any]:
    """Yield the `image` of each row, still encoded; a Dataset reads no other column for it."""
    if hasattr(dataset, "cast_column"):
        encoded = datasets.Image(decode=False)
        dataset = dataset.select_columns(["image"]).cast_column("image", encoded)
    return (row["image"] for row in dataset)


def _mark(cell: Any) -> _Mark:
    try:
        data = picture_bytes(cell)
        small = thumbnail(_open_small(data))
    except Exception:  # decoders raise many kinds
        nothing = np.zeros((len(VIEWS), BITS // 64), np.uint64)
        return _Mark(None, nothing, np.zeros(BITS, np.float32))
    spectra = view_spectra(small)
    digest = hashlib.sha256(data).hexdigest()
    return _Mark(digest, hash_views(spectra), likeness_feature(spectra))


def _open_small(data: bytes) -> Image.Image:
    """Open a picture, upright and with 8 bits a channel; a large JPEG comes smaller than it is."""
    with warnings.catch_warnings(action="ignore"):
        image = Image.open(io.BytesIO(data))
    plain_jpeg = image.format == "JPEG" and image.mode in ("L", "RGB")
    if plain_jpeg and "exif" not in image.info:  # what has EXIF may have to be turned
        # The decoder leaves out what the thumbnail does not show, which is many times faster.
        image.draft("L", (SIDE, SIDE))
        return image
    return to_rgb(image)
