"""List pictures and captions that are there twice: same file, same pixels, nearly the same."""

import functools
import hashlib
import io
from collections import defaultdict
from collections.abc import Hashable, Iterable
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from medtune.pairs import picture_bytes, to_rgb

from .fingerprints import Fingerprints, fingerprint, picture_cells
from .near import MAX_DISTANCE, near_pairs


def exact_duplicates(
    dataset: Iterable[dict], *, pixels: bool = False, fingerprints: Fingerprints | None = None
) -> list[list[int]]:
    """List the rows that hold the same file, or the same pixels.

    Parameters
    ----------
    dataset : rows with an `image`.
    pixels : compare the RGB pixels instead of the bytes, whatever the file format.
    fingerprints : of the data set, where they are known.

    Returns
    -------
    list : for each picture that is there twice or more, its rows.

    Examples
    --------
    >>> import io, PIL.Image
    >>> PIL.Image.new("L", (9, 9), 7).save(png := io.BytesIO(), "PNG")
    >>> exact_duplicates([{"image": png.getvalue()}, {"image": png.getvalue()}])
    [[0, 1]]
    """
    marks = fingerprint(dataset) if fingerprints is None else fingerprints
    keys: list[Hashable] = list(marks.digests)
    if pixels:
        for row, key in _pixel_keys(dataset, marks).items():
            keys[row] = key
    return [rows for rows in equal_rows(keys) if len(rows) > 1]


def _pixel_keys(dataset: Iterable[dict], marks: Fingerprints) -> dict[int, Hashable]:
    """Give size and digest of the pixels, for the rows that have a near-duplicate.

    The same pixels have nearly the same hash, so no other picture needs to be decoded in full.
    """
    likely = set()
    for i, j, _ in near_duplicates(dataset, fingerprints=marks):
        likely.update((i, j))
    keys = {}
    for row, cell in enumerate(picture_cells(dataset)):
        if row in likely:
            image = to_rgb(Image.open(io.BytesIO(picture_bytes(cell))))
            keys[row] = image.size, hashlib.sha256(image.tobytes()).digest()
    return keys


def duplicate_captions(dataset: Any) -> list[list[int]]:
    """List the rows whose captions are the same but for case and white space.

    Parameters
    ----------
    dataset : anything whose `["caption"]` is a list of texts; empty captions are left out.

    Returns
    -------
    list : for each caption that is there twice or more, its rows.

    Examples
    --------
    >>> duplicate_captions({"caption": ["A liver.", "a  liver. ", "A lung."]})
    [[0, 1]]
    """
    return [rows for rows in equal_rows(plain_captions(dataset)) if len(rows) > 1]


def plain_captions(dataset: Any) -> list[str | None]:
    """Give each caption without case and extra white space, None for an empty one."""
    captions = []
    for caption in dataset["caption"]:
        words = (caption or "").casefold().split()
        captions.append(" ".join(words) or None)
    return captions


def equal_rows(keys: Iterable[Hashable]) -> list[list[int]]:
    """Give the rows of each key, keys in the order of the rows; the key None is left out."""
    rows = defaultdict(list)
    for row, key in enumerate(keys):
        if key is not None:
            rows[key].append(row)
    return list(rows.values())


def near_duplicates(
    dataset: Iterable[dict],
    *,
    max_distance: int = MAX_DISTANCE,
    fingerprints: Fingerprints | None = None,
) -> list[tuple[int, int, int]]:
    """List pairs of rows (i, j, distance), i < j, whose pictures are nearly the same.

    `medtune.audit.near_pairs` says what the distance means and how the pairs are found. Pictures
    that cannot be read are in no pair.

    Parameters
    ----------
    dataset : rows with an `image`; not looked at when there are fingerprints.
    max_distance : bits, of 256, that may differ.
    fingerprints : of the data set, where they are known.

    Examples
    --------
    >>> import io, PIL.Image
    >>> picture = PIL.Image.effect_mandelbrot((200, 200), (-2, -1, 1, 1.2), 50)
    >>> picture.save(png := io.BytesIO(), "PNG")
    >>> picture.save(jpeg := io.BytesIO(), "JPEG")
    >>> pairs = near_duplicates([{"image": png.getvalue()}, {"image": jpeg.getvalue()}])
    >>> [(i, j) for i, j, distance in pairs]
    [(0, 1)]
    """
    marks = fingerprint(dataset) if fingerprints is None else fingerprints
    readable = [row for row, digest in enumerate(marks.digests) if digest is not None]
    progress = functools.partial(tqdm, desc="Comparing pictures", delay=2)
    if not marks.unreadable:
        # taking rows out would copy them all, which may be mapped from a file
        return near_pairs(marks.hashes, max_distance, progress=progress)
    pairs = near_pairs(marks.hashes[readable], max_distance, progress=progress)
    return [(readable[i], readable[j], distance) for i, j, distance in pairs]
