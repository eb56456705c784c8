"""Join groups that look-alikes connect, and split rows so that no group is cut.

Needs numpy and scipy.
"""

import random
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

SPLITS = ("train", "validation", "test")

Table = dict[str, np.ndarray]
"""For each group how many of its rows are of each kind, a vector (kinds,)."""

Deal = dict[str, int]
"""For each group the number of its split, in the order in which the groups were dealt."""


def join_groups(names: Sequence[str], pairs: Iterable[tuple]) -> list[str]:
    """Make one group of groups that a pair of rows connects, directly or through others.

    Parameters
    ----------
    names : the group of each row.
    pairs : tuples that begin with two row numbers, such as near-duplicates (i, j, distance).

    Returns
    -------
    list : the group of each row; joined groups have the name that comes first in the rows.

    Examples
    --------
    >>> join_groups(["p1", "p2", "p2", "p3"], [(0, 1, 12)])
    ['p1', 'p1', 'p1', 'p3']
    """
    rows = np.array([(i, j) for i, j, *_ in pairs], int).reshape(-1, 2)
    _, numbers = np.unique(names, return_inverse=True)  # equal names have one number
    links = numbers[rows]  # (pairs, 2)
    graph = coo_array((np.ones(len(links)), links.T), shape=(len(names), len(names)))
    _, component_of_number = connected_components(graph, directed=False)

    first_name: dict[int, str] = {}
    joined = []
    for component, name in zip(component_of_number[numbers].tolist(), names, strict=True):
        joined.append(first_name.setdefault(component, name))
    return joined


def split_by_group(
    groups: Sequence[str],
    *,
    shares: Sequence[float] = (0.8, 0.1, 0.1),
    stratify: Sequence | None = None,
    seed: int = 0,
    names: Sequence[str] = SPLITS,
) -> list[str]:
    """Give every row a split so that no group is cut and none is empty.

    The shares come out as near as the groups allow. Groups are dealt out in random order, each to
    the split that lacks most of its kind; of several such deals the one nearest to the shares is
    kept. The result depends on groups, `stratify` and seed, not on the order of the rows.

    Parameters
    ----------
    groups : the group of each row, such as its patient.
    shares : how much of the rows each split should get; they need not sum to 1; 0 leaves a split
        empty.
    stratify : one value a row, such as the modality; every split gets its share of each value,
        where groups allow.
    seed : of the order in which the groups are dealt out.
    names : of the splits, one for each share.

    Returns
    -------
    list : the split of each row.

    Raises
    ------
    ValueError : fewer groups than splits, or shares that make no sense.

    Examples
    --------
    >>> split_by_group(["p1", "p1", "p2", "p3"], shares=(2, 1, 1))
    ['train', 'train', 'validation', 'test']
    """
    groups = list(groups)
    used = [split for split, share in enumerate(shares) if share > 0]
    if len(shares) > len(names) or min(shares) < 0 or not used:
        raise ValueError(
            f"shares {tuple(shares)} must be at most {len(names)} numbers from 0, and not all 0"
        )
    count = len(set(groups))
    if count < len(used):
        raise ValueError(
            f"{count} group(s) cannot fill {len(used)} splits uncut: give finer groups"
        )

    table = _count_kinds(groups, stratify)
    total = sum(table.values())  # (kinds,)
    wanted = np.array(shares)[used, None] / sum(shares) * total  # (used splits, kinds)
    deal = _best_deal(table, wanted, total, seed)
    return [names[used[deal[group]]] for group in groups]


def _count_kinds(groups: list[str], stratify: Sequence | None) -> Table:
    """Count the rows of each kind in each group; sorted, so that the order of rows is forgotten."""
    kinds = [""] * len(groups)  # all of one kind
    if stratify is not None:
        kinds = [str(kind) for kind in stratify]
    rows = Counter(zip(groups, kinds, strict=True))
    columns = sorted(set(kinds))
    table = {}
    for group in sorted(set(groups)):
        table[group] = np.array([float(rows[group, kind]) for kind in columns])
    return table


def _best_deal(table: Table, wanted: np.ndarray, total: np.ndarray, seed: int) -> Deal:
    """Deal the groups out several times at random, and keep the deal nearest to the shares."""
    chance = random.Random(seed)
    attempts = max(1, min(50, 20_000 // len(table)))  # fewer with many groups, which fit anyway
    best: Deal = {}
    best_cost = np.inf
    for _ in range(attempts):
        order = chance.sample(list(table), len(table))
        deal, lacking = _deal_out(order, table, wanted, total)
        _fill_empty_splits(deal, lacking, table)
        cost = float((np.abs(lacking) / total).sum())
        # of deals that are equal but for rounding the first stays, on every machine
        if cost < best_cost - 1e-9:
            best = deal
            best_cost = cost
    return best


def _deal_out(
    order: list[str], table: Table, wanted: np.ndarray, total: np.ndarray
) -> tuple[Deal, np.ndarray]:
    """Give each group to the split that lacks most of its kind.

    Returns the deal and what each split lacks after it, (splits, kinds), below 0 where it has more
    rows than it should.
    """
    lacking = wanted.copy()
    deal: Deal = {}
    for group in order:
        need = (lacking / total) @ table[group]  # (splits,); a rare kind counts more a row
        split = int(np.argmax(need))
        deal[group] = split
        lacking[split] -= table[group]
    return deal, lacking


def _fill_empty_splits(deal: Deal, lacking: np.ndarray, table: Table) -> None:
    """Give each split that got nothing the smallest group of the split with most groups."""
    empty = sorted(set(range(len(lacking))) - set(deal.values()))
    for split in empty:
        donor = Counter(deal.values()).most_common(1)[0][0]
        donated = [group for group in deal if deal[group] == donor]
        smallest = min(donated, key=lambda group: table[group].sum())
        lacking[donor] += table[smallest]
        lacking[split] -= table[smallest]
        deal[smallest] = split
