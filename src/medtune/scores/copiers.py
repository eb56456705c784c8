"""Copy the caption of the nearest picture, by its pixels."""

from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image
from sklearn.neighbors import NearestNeighbors


def thumbnail_vectors(images: Iterable[Image.Image], *, side: int = 32) -> np.ndarray:
    """Make each picture a small grey one and give its pixels as a vector.

    Parameters
    ----------
    images : pictures in any mode and size.
    side : width and height of the small pictures, in pixels.

    Returns
    -------
    numpy.ndarray : (pictures, side * side), grey values 0..255.

    Examples
    --------
    >>> thumbnail_vectors([Image.new("RGB", (200, 100), "white")]).shape
    (1, 1024)
    """
    vectors = []
    for image in images:
        small = image.convert("L").resize((side, side))
        vectors.append(np.asarray(small, float).ravel())
    return np.array(vectors).reshape(-1, side * side)


def copy_nearest(captions: Sequence[str], known: np.ndarray, asked: np.ndarray) -> list[str]:
    """Answer with the caption of the known picture whose vector is nearest.

    Parameters
    ----------
    captions : of the known pictures.
    known : (known pictures, size) their vectors, such as `thumbnail_vectors` gives.
    asked : (pictures, size) the vectors of those that need an answer.

    Returns
    -------
    list : a caption for each of `asked`.

    Examples
    --------
    >>> copy_nearest(["dark", "bright"], np.array([[0.0], [255.0]]), np.array([[200.0]]))
    ['bright']
    """
    nearest = NearestNeighbors(n_neighbors=1).fit(known)
    rows = nearest.kneighbors(asked, return_distance=False)[:, 0]
    return [captions[row] for row in rows]
