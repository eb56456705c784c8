"""Draw some of many rows."""

import math
import random
from collections.abc import Hashable, Sequence


def sample_rows(
    labels: Sequence[Hashable], limit: int, *, least: int = 8, seed: int = 0
) -> list[int]:
    """Draw about `limit` rows at random, the same share of each label.

    Parameters
    ----------
    labels : one a row, such as its split.
    limit : how many rows are wanted; shares are rounded up, so a few more may come.
    least : no label gets fewer rows than this, if it has as many.
    seed : chooses the rows.

    Returns
    -------
    list : the numbers of the rows, in order.

    Examples
    --------
    >>> rows = sample_rows(["train"] * 90 + ["test"] * 10, 20, least=4)
    >>> len(rows), sum(row >= 90 for row in rows)
    (22, 4)
    """
    rows_of: dict[Hashable, list[int]] = {}
    for row, label in enumerate(labels):
        rows_of.setdefault(label, []).append(row)
    chance = random.Random(seed)
    drawn = []
    for rows in rows_of.values():
        wanted = max(least, math.ceil(limit / len(labels) * len(rows)))
        drawn += chance.sample(rows, min(wanted, len(rows)))
    return sorted(drawn)
