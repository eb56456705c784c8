"""Find the pictures on two sides of a split that look most alike."""

from collections.abc import Sequence

import numpy as np


def closest_across(
    features: np.ndarray, splits: Sequence[str | None], *, known: str = "train", asked: str = "test"
) -> list[tuple[float, int, int]]:
    """Give for each held-out picture the training picture that looks most like it.

    Parameters
    ----------
    features : (n, size) one vector of length 1 a picture, such as `Fingerprints.features`.
    splits : the split of each picture.
    known, asked : the splits that are compared.

    Returns
    -------
    list : (likeness, row of the held-out picture, row of its nearest training picture), most alike
        first. The likeness is a cosine: 1 for pictures that look the same.

    Examples
    --------
    >>> features = np.array([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]])
    >>> closest_across(features, ["train", "train", "test"])
    [(0.8, 2, 0)]
    """
    known_rows = [row for row, split in enumerate(splits) if split == known]
    asked_rows = [row for row, split in enumerate(splits) if split == asked]
    if not known_rows or not asked_rows:
        return []
    likeness = features[asked_rows] @ features[known_rows].T  # (asked, known)
    nearest = np.array(known_rows)[likeness.argmax(axis=1)]
    closest = zip(likeness.max(axis=1).tolist(), asked_rows, nearest.tolist(), strict=True)
    return sorted(closest, reverse=True)
