"""Count pictures of a benchmark that a training set, or the benchmark's own, holds as well."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from medtune.audit import Fingerprints, fingerprint, near_duplicates


@dataclass(frozen=True)
class Shared:
    """How many pictures of one set are found in another.

    Attributes
    ----------
    pictures : different files that were asked about.
    exact : of these, the same file is in the other set.
    near : of these, the same picture or nearly the same is: rescaled, saved again, trimmed. Slices
        that lie side by side may be taken for each other.
    unreadable : files of either set that could not be compared.
    """

    pictures: int
    exact: int
    near: int
    unreadable: int


def count_shared(asked: Iterable[Any], known: Iterable[Any]) -> Shared:
    """Count the pictures of one set that another one holds, by the fingerprints of the audit.

    Parameters
    ----------
    asked : pictures as `medtune.pairs.picture_bytes` takes them; the same file counts once.
    known : those of the other set.

    Returns
    -------
    Shared : how many were found, as files and as pictures.

    Examples
    --------
    >>> import io, PIL.Image
    >>> picture = PIL.Image.effect_mandelbrot((200, 200), (-2, -1, 1, 1.2), 50)
    >>> picture.save(png := io.BytesIO(), "PNG")
    >>> picture.resize((150, 150)).save(small := io.BytesIO(), "PNG")
    >>> count_shared([png.getvalue()], [small.getvalue()])
    Shared(pictures=1, exact=0, near=1, unreadable=0)
    """
    ours = _distinct(fingerprint({"image": cell} for cell in asked))
    theirs = _distinct(fingerprint({"image": cell} for cell in known))
    size = len(ours.digests)
    both = Fingerprints(
        digests=ours.digests + theirs.digests,
        hashes=np.concatenate([ours.hashes, theirs.hashes]),
        features=np.concatenate([ours.features, theirs.features]),
        unreadable=[],
    )
    held = set(theirs.digests)
    exact = {row for row, digest in enumerate(ours.digests) if digest in held}
    near = set(exact)
    for i, j, _ in near_duplicates([], fingerprints=both):
        # i < j: ours stand first
        if i < size <= j:
            near.add(i)
    unreadable = len(ours.unreadable) + len(theirs.unreadable)
    return Shared(size, len(exact), len(near), unreadable)


def _distinct(marks: Fingerprints) -> Fingerprints:
    """Keep each readable file once; what cannot be read stays listed."""
    first = {}
    for row, digest in enumerate(marks.digests):
        if digest is not None:
            first.setdefault(digest, row)
    rows = list(first.values())
    return Fingerprints(list(first), marks.hashes[rows], marks.features[rows], marks.unreadable)
