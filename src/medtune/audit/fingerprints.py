"""Read every picture once and keep what the audit needs of it."""

import hashlib
import io
import itertools
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import datasets
import numpy as np
from PIL import Image
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

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


def fingerprint(dataset: Iterable[dict], *, workers: int = 2) -> Fingerprints:
    """Read every picture once; the memory needed does not grow with the size of the pictures.

    Parameters
    ----------
    dataset : a Dataset, an IterableDataset, or any rows with an `image` that
        `medtune.pairs.picture_bytes` takes.
    workers : threads that decode; Pillow decodes outside Python's lock.

    Returns
    -------
    Fingerprints : one entry a row; a picture that cannot be read is listed, not raised.

    Examples
    --------
    >>> fingerprint([{"image": b"no picture"}]).unreadable
    [0]
    """
    total = len(dataset) if hasattr(dataset, "__len__") else None
    cells = iter(tqdm(picture_cells(dataset), "Reading pictures", total, delay=2))
    marks: list[_Mark] = []
    # One BLAS thread in each of ours: on a busy machine they would wait for each other, 40 times
    # slower.
    with threadpool_limits(1), ThreadPoolExecutor(workers) as pool:
        # `pool.map` alone would read the whole data set ahead: a block is all that memory holds.
        while block := list(pool.map(_mark, itertools.islice(cells, 16 * workers))):
            marks += block

    hashes = np.array([mark.hash for mark in marks], np.uint64)
    features = np.array([mark.feature for mark in marks], np.float32)
    return Fingerprints(
        digests=[mark.digest for mark in marks],
        # no rows at all still have the shape of hashes and features
        hashes=hashes.reshape(-1, len(VIEWS), BITS // 64),
        features=features.reshape(-1, BITS),
        unreadable=[row for row, mark in enumerate(marks) if mark.digest is None],
    )


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
