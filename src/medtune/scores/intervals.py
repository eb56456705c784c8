"""Say how sure a score is: bootstrap intervals that draw whole patients.

Needs numpy.
"""

import math
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np

Statistic = Callable[[np.ndarray], float]
"""A number for an array of values (n,) or rows (n, k), NaN where there is none."""

MOST_BLOCKS = 10
"""Blocks into which the samples of one patient are cut."""


def mean_of_known(values: np.ndarray) -> float:
    """Average what is not NaN; NaN when nothing is left.

    Examples
    --------
    >>> import numpy as np
    >>> mean_of_known(np.array([1, np.nan, 3]))
    2.0
    """
    if np.isnan(values).all():
        return math.nan
    return float(np.nanmean(values))


def check_lengths(**columns: Sized) -> None:
    """Raise ValueError unless the columns, given under their names, are equally long and not empty.

    Examples
    --------
    >>> check_lengths(scores=[0.5, 0.7], labels=[1])
    Traceback (most recent call last):
        ...
    ValueError: 2 scores, 1 labels: give one of each per sample
    """
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{length} {name}" for name, length in lengths.items())
        raise ValueError(f"{found}: give one of each per sample")
    if 0 in lengths.values():
        raise ValueError(f"no {' and no '.join(lengths)}: there is nothing to score")


def values_of(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Put the number in place of each (rows, statistic), None for NaN; other entries stay.

    Examples
    --------
    >>> import numpy as np
    >>> values_of({"iou": ([0.5, 1.0], np.mean), "missed": 3})
    {'iou': 0.75, 'missed': 3}
    """
    values = dict(entries)
    for name, entry in entries.items():
        if isinstance(entry, tuple):
            rows, statistic = entry
            value = float(statistic(np.asarray(rows, dtype=float)))
            values[name] = None if math.isnan(value) else value
    return values


def with_intervals(
    score: Callable[..., dict[str, Any]],
    *data: Any,
    groups: Sequence[str] | None,
    **options: Any,
) -> dict[str, Any]:
    """Compute scores, and for each the interval over patients.

    Parameters
    ----------
    score : a function that with `columns=True` gives (rows, statistic) in place of each score, one
        row a sample, such as `standard_scores` or `box_scores`.
    data : what it takes, such as answers and references.
    groups : the patient, series or block of each sample; None gives the scores alone.
    options : of `score`.

    Returns
    -------
    dict : what `score` returns, and "intervals": for each score what `bootstrap_interval` returns.

    Raises
    ------
    ValueError : not one group a sample, or what `score` raises.

    Examples
    --------
    >>> def share_right(answers, references, columns=False):
    ...     right = [float(a == b) for a, b in zip(answers, references)]
    ...     return {"right": (right, mean_of_known)}
    >>> scores = with_intervals(share_right, "abcdefgh", "abcdxxxx", groups="abcdefgh")
    >>> scores["right"], scores["intervals"]["right"]["low"]
    (0.5, 0.125)
    """
    if groups is None:
        return score(*data, **options)
    scores = score(*data, columns=True, **options)
    intervals = {}
    for name, entry in scores.items():
        # What is no column is a fact about the scores, such as the tokenizer.
        if isinstance(entry, tuple):
            rows, statistic = entry
            intervals[name] = bootstrap_interval(rows, groups, statistic=statistic)
    values = {name: interval["value"] for name, interval in intervals.items()}
    return {**scores, **values, "intervals": intervals}


def bootstrap_interval(  # noqa: PLR0913 - the usual choices of a bootstrap, each with a default
    values: Any,
    groups: Sequence[str],
    *,
    statistic: Statistic | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    min_groups: int = 5,
    seed: int = 0,
) -> dict[str, Any]:
    """Percentile bootstrap interval that draws whole groups.

    Samples of one patient resemble each other: drawing them one by one would give an interval that
    is far too narrow.

    One group, or groups that are all named like "block-07", are one patient: then blocks of
    neighbouring slices are drawn, and the interval says nothing about other patients. If there are
    fewer than `min_groups` blocks, 10 are made of neighbouring samples, in the order given: sort by
    slice.

    Parameters
    ----------
    values : one value a sample, NaN or None for no value, or one row a sample.
    groups : the patient, series or block of each sample.
    statistic : function of the resampled values (n,) or rows (n, k); by default the mean of what is
        not NaN.
    level : the interval's coverage, 0 to 1.
    resamples : how often the groups are drawn.
    min_groups : with fewer groups no interval is given.
    seed : of the draws.

    Returns
    -------
    dict : "value", "low", "high" (None if not given), "groups" (how many were drawn), "label"
        ("within one patient" or "over 12 groups"), "reason" (why there is no interval, or None).

    Raises
    ------
    ValueError : no values, or not one group a value.

    Examples
    --------
    >>> bootstrap_interval([1, 2, 3, 4, 5, 6], ["a", "b", "c", "d", "e", "e"])["label"]
    'over 5 groups'
    >>> bootstrap_interval([1, 2, 3, 4, 5, 6], ["a", "a", "a", "b", "b", "b"])["reason"]
    '2 groups are too few for an interval (5)'
    """
    check_lengths(values=values, groups=groups)
    rows = np.asarray(values, dtype=float)
    statistic = statistic or mean_of_known

    units = _units_to_draw(groups, min_groups)
    count = len(units.members)
    value = float(statistic(rows))
    low = high = reason = None
    if math.isnan(value):
        reason = "no sample has a value"
    elif count < min_groups:
        kind = "blocks" if units.one_patient else "groups"
        reason = f"{count} {kind} are too few for an interval ({min_groups})"
    else:
        drawn = _resampled(rows, units.members, statistic, resamples, seed)
        # A resample may lack what the statistic needs, and then counts for nothing.
        low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2]).tolist()
    return {
        "value": None if math.isnan(value) else value,
        "low": low,
        "high": high,
        "groups": count,
        "label": "within one patient" if units.one_patient else f"over {count} groups",
        "reason": reason,
    }


@dataclass(frozen=True)
class _Units:
    """What a resample draws.

    Attributes
    ----------
    members : the samples of each patient, or of each block of one patient.
    one_patient : whether they are blocks of one patient.
    """

    members: list[np.ndarray]
    one_patient: bool


def _units_to_draw(groups: Sequence[str], min_groups: int) -> _Units:
    names, codes = np.unique([str(group) for group in groups], return_inverse=True)
    one_patient = len(names) == 1 or all("block-" in name for name in names)
    if one_patient and len(names) < min_groups:
        codes = _neighbour_blocks(codes)
    members = [np.flatnonzero(codes == code) for code in range(codes.max() + 1)]
    return _Units(members, one_patient)


def _neighbour_blocks(codes: np.ndarray) -> np.ndarray:
    """Cut the samples, group by group and in the order given, into up to 10 blocks of equal size.

    A block has two samples at least.
    """
    samples = len(codes)
    count = min(MOST_BLOCKS, samples // 2)
    blocks = np.empty_like(codes)
    # A stable sort keeps the order of the samples within a group: neighbours stay neighbours.
    blocks[np.argsort(codes, kind="stable")] = np.arange(samples) * count // samples
    return blocks


def _resampled(
    rows: np.ndarray, members: list[np.ndarray], statistic: Statistic, resamples: int, seed: int
) -> list[float]:
    """Give the statistic of each resample, which draws as many groups as there are, with return."""
    count = len(members)
    draws = np.random.default_rng(seed).integers(count, size=(resamples, count))
    values = []
    for draw in draws:
        chosen = np.concatenate([members[group] for group in draw])
        values.append(statistic(rows[chosen]))
    return values


def paired_bootstrap(
    a: Any,
    b: Any,
    groups: Sequence[str],
    *,
    statistic: Statistic | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Interval of a minus b, such as tuned minus base, on the same samples.

    Two intervals may overlap although one run is better on nearly every patient; the interval of
    the difference shows it. Samples where a or b has no value are left out.

    Parameters
    ----------
    a, b : the values or rows of the two runs, as `bootstrap_interval` takes them.
    groups : the patient, series or block of each sample.
    statistic : of which the difference is taken; by default the mean of what is not NaN.
    options : of `bootstrap_interval`.

    Returns
    -------
    dict : what `bootstrap_interval` returns, with "difference" in place of "value", and "better":
        True if the whole interval lies above 0, None if there is none.

    Raises
    ------
    ValueError : no values, or not one of each a sample.

    Examples
    --------
    >>> paired_bootstrap([2, 3, 4, 5, 6], [1, 2, 3, 4, 5.5], ["v", "w", "x", "y", "z"])["better"]
    True
    """
    check_lengths(a=a, b=b, groups=groups)
    statistic = statistic or mean_of_known
    both = np.stack([np.asarray(a, dtype=float), np.asarray(b, dtype=float)], axis=1)  # (n, 2, ...)
    # Rows without a value in one run have none in the other either, so that both means are of the
    # same samples.
    without_value = np.isnan(both.reshape(len(both), -1)).any(axis=1)
    both[without_value] = math.nan

    def difference(rows: np.ndarray) -> float:
        return statistic(rows[:, 0]) - statistic(rows[:, 1])

    result = bootstrap_interval(both, groups, statistic=difference, **options)
    better = None if result["low"] is None else result["low"] > 0
    return {"difference": result.pop("value"), **result, "better": better}
