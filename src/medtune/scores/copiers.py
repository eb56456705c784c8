"""Copy captions: that of the nearest picture, by its pixels, or a typical one, without any pixel."""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

import numpy as np
from PIL import Image
from sklearn.neighbors import NearestNeighbors

from medtune.captions import parse_caption

from .intervals import check_lengths


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


def answer_by_kind(
    captions: Sequence[str], known: Sequence[Hashable], asked: Sequence[Hashable]
) -> list[str]:
    """Answer without any pixel, from what kind of thing is asked about.

    Each kind gets one answer: of its captions those with its most frequent finding, or with its
    most frequent silence on findings; of these the ones with the most frequent structure; of these
    the most frequent caption. A kind that has no caption is answered as all captions together.

    What such a table scores is what the kind gives away. A model whose findings are no better has
    not been shown to see them.

    Parameters
    ----------
    captions : of the known pictures.
    known : the kind of each of them, such as kind of tissue and window.
    asked : the kinds of those that need an answer.

    Returns
    -------
    list : a caption for each of `asked`.

    Raises
    ------
    ValueError : not one kind a caption, or no captions.

    Examples
    --------
    >>> captions = ["A lung with a nodule.", "A lung.", "A lung with a nodule.", "A liver."]
    >>> answer_by_kind(captions, ["lung", "lung", "lung", "liver"], ["lung", "liver"])
    ['A lung with a nodule.', 'A liver.']
    """
    check_lengths(captions=captions, known=known)
    of_kind: dict[Hashable, list[str]] = {}
    for caption, kind in zip(captions, known, strict=True):
        of_kind.setdefault(kind, []).append(caption)
    answers: dict[Hashable, str] = {}
    for kind in set(asked):
        answers[kind] = _typical(of_kind.get(kind, captions))
    return [answers[kind] for kind in asked]


def _typical(captions: Sequence[str]) -> str:
    """Choose a caption by its finding first, then by its structure, then by its words."""
    read = [(parse_caption(caption), caption) for caption in captions]
    [(finding, _)] = Counter(parsed.finding for parsed, _ in read).most_common(1)
    read = [(parsed, caption) for parsed, caption in read if parsed.finding == finding]
    [(structure, _)] = Counter(parsed.structure for parsed, _ in read).most_common(1)
    alike = [caption for parsed, caption in read if parsed.structure == structure]
    return Counter(alike).most_common(1)[0][0]
