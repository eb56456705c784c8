"""Wrong pairs to test the match head with: a statement, and a picture of which it cannot be true."""

import random
from collections.abc import Collection, Hashable, Sequence


def wrong_pairs(
    structures: Sequence[Hashable], shows: Sequence[Collection[Hashable]], *, seed: int = 0
) -> list[tuple[int, int]]:
    """Choose for each record another one whose picture does not show what the record is about.

    Parameters
    ----------
    structures : the structure that each record is about; where none is named, its `finding_of`.
    shows : all of the same to be seen in the picture of each record.
    seed : decides which of the pictures that fit is taken.

    Returns
    -------
    list of (int, int) : number of a record, and number of the one with the wrong picture. Records
        about what all pictures show are left out.

    Examples
    --------
    >>> shows = [{"liver", "spine"}, {"liver", "spine"}, {"lung", "spine"}]
    >>> wrong_pairs(["liver", "spine", "lung"], shows)
    [(0, 2), (2, 1)]
    """
    rng = random.Random(seed)
    pairs = []
    for number, structure in enumerate(structures):
        fits = [other for other, seen in enumerate(shows) if structure not in seen]
        if fits:
            pairs.append((number, rng.choice(fits)))
    return pairs
