"""For whom is a model worse? One score by any column of the data, corrected for looking often."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from .intervals import bootstrap_interval, check_lengths, mean_of_known

NOT_KNOWN = "(not known)"
"""The group of the samples for which a column says nothing."""

MOST_NUMBERS = 20
"""A column with more different numbers than these has to be cut into ranges."""

MIN_UNITS = 5
"""So many patients, or slices, a group needs to be compared."""


def compare_groups(  # noqa: PLR0913 - groups, slices, resamples and seed are those of the intervals
    values: Sequence[float],
    traits: Mapping[str, Sequence],
    *,
    groups: Sequence[str] | None = None,
    slices: Sequence | None = None,
    smallest: int = 10,
    level: float = 0.05,
    resamples: int = 1000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Compare the samples of each group with all others, by each column.

    Whoever looks at twenty groups finds one that differs by chance. The p-values of all groups that
    are compared are corrected together (`correct_for_looks`). A column of two groups is one look.

    Two p-values are computed, and the larger one counts. The first takes samples for independent
    (Fisher's exact test for values of 0 and 1, Mann and Whitney's otherwise). The second comes from
    resamples of whole patients, or of slices within their blocks, as `bootstrap_interval` draws
    them. It gives the interval of each group, too. Where all answers of a small group are right, or
    all wrong, resamples show no spread; then the interval is Clopper and Pearson's, with each
    patient or slice as one answer.

    Parameters
    ----------
    values : one a sample, such as 1 for a wrong answer; NaN or None for no value.
    traits : the columns, by name: for each sample its structure, age group, sex, device. None is a
        group of its own, "(not known)".
    groups : the patient, series or block of each sample; None leaves out intervals and the second
        p-value.
    slices : for samples of one patient the slice of each, as `bootstrap_interval` takes it.
    smallest : groups of fewer samples with a value are named, and not compared; nor are those of
        fewer than five patients or slices.
    level : a corrected p-value below it makes a difference.
    resamples, seed : of the resamples.

    Returns
    -------
    list of dict : one a group, the smallest p-value first, those not compared last: "by", "group",
        "samples", "units" (patients or slices), "value" (the mean), "low", "high", "others" (the
        mean of all others), "difference", "p", "p_corrected", "differs" (True, False, None where
        not compared) and "reason" (why not).

    Raises
    ------
    ValueError : no values, not one value a sample, or a column of many different numbers.

    Examples
    --------
    >>> wrong = [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    >>> sex = ["f"] * 6 + ["m"] * 6
    >>> first = compare_groups(wrong, {"sex": sex}, smallest=6)[0]
    >>> first["value"], first["others"], round(first["p_corrected"], 4), first["differs"]
    (1.0, 0.0, 0.0022, True)
    """
    known = np.asarray(values, dtype=float)
    check_lengths(values=known)
    lines = []
    looks = []
    for trait, cells in traits.items():
        check_lengths(**{"values": known, trait: cells})
        names = _names(trait, cells)
        of_trait = []
        for name in sorted(set(names)):
            inside = np.array([own == name for own in names])
            line = {"by": trait, "group": name}
            line |= _group(known, inside, groups, slices, resamples, seed)
            line |= _comparison(line, known, inside, groups, slices, smallest, resamples, seed)
            of_trait.append(line)
        lines += of_trait
        looks += _looks(of_trait)
    corrected = correct_for_looks([look[0]["p"] for look in looks])
    for look, p in zip(looks, corrected, strict=True):
        for line in look:
            line["p_corrected"] = p
            line["differs"] = p < level
    return sorted(lines, key=lambda line: math.inf if line["p"] is None else line["p"])


def correct_for_looks(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number (Holm, 1979).

    The smallest is multiplied by their number, the next by one less, and so on; none becomes
    smaller than one before it. If nothing differs at all, a corrected value falls below 0.05 in at
    most 5 of 100 such tables, however the tests depend on each other.

    Parameters
    ----------
    p_values : of all comparisons that were looked at, also of those that showed nothing.

    Returns
    -------
    list of float : the corrected ones, in the same order.

    Examples
    --------
    >>> [round(p, 2) for p in correct_for_looks([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    corrected = [1.0] * len(p_values)
    so_far = 0.0
    order = np.argsort(p_values, kind="stable")
    for place, number in enumerate(order):
        so_far = max(so_far, (len(p_values) - place) * p_values[number])
        corrected[number] = min(1.0, so_far)
    return corrected


def _names(trait: str, cells: Sequence) -> list[str]:
    different = {cell for cell in cells if not _is_missing(cell)}
    numbers = [cell for cell in different if isinstance(cell, int | float)]
    if len(numbers) > MOST_NUMBERS:
        raise ValueError(
            f"{trait} has {len(numbers)} different numbers: cut it into ranges first (pandas.cut)"
        )
    return [NOT_KNOWN if _is_missing(cell) else str(cell) for cell in cells]


def _is_missing(cell: Any) -> bool:
    # NaN is what pandas has for an empty cell, and the one value that is not equal to itself
    return cell is None or cell != cell or cell == ""


def _looks(lines: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Give the lines of a column that were compared; of two groups, each is the other's others."""
    compared = [line for line in lines if line["p"] is not None]
    if len(lines) == len(compared) == 2:
        return [compared]
    return [[line] for line in compared]


def _group(  # noqa: PLR0913 - as in compare_groups
    values: np.ndarray,
    inside: np.ndarray,
    groups: Sequence[str] | None,
    slices: Sequence | None,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Describe one group: how many, the mean, its interval."""
    own = np.where(inside, values, math.nan)
    mean = mean_of_known(own)
    found = {
        "samples": int((~np.isnan(own)).sum()),
        "units": None,
        "value": None if math.isnan(mean) else mean,
        "low": None,
        "high": None,
    }
    if groups is not None and found["value"] is not None:
        interval = bootstrap_interval(own, groups, slices=slices, resamples=resamples, seed=seed)
        if interval["error"] == 0 and _are_yes_or_no(own):
            interval |= _exact_interval(mean, interval["groups"])
        found |= {"units": interval["groups"], "low": interval["low"], "high": interval["high"]}
    return found


def _are_yes_or_no(values: np.ndarray) -> bool:
    return set(np.unique(values[~np.isnan(values)])) <= {0.0, 1.0}


def _exact_interval(mean: float, units: int) -> dict[str, float]:
    """Give Clopper and Pearson's interval, as if each patient or slice had answered once."""
    exact = stats.binomtest(round(mean * units), units).proportion_ci()
    return {"low": float(exact.low), "high": float(exact.high)}


def _comparison(  # noqa: PLR0913 - as in compare_groups
    line: Mapping[str, Any],
    values: np.ndarray,
    inside: np.ndarray,
    groups: Sequence[str] | None,
    slices: Sequence | None,
    smallest: int,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Compare a group with all others, or say why not."""
    others = mean_of_known(np.where(inside, math.nan, values))
    result = {
        "others": None if math.isnan(others) else others,
        "difference": None,
        "p": None,
        "p_corrected": None,
        "differs": None,
        "reason": None,
    }
    if line["samples"] < max(smallest, 1):
        return result | {"reason": f"{line['samples']} samples are too few ({smallest})"}
    if math.isnan(others):
        return result | {"reason": "there are no others to compare with"}
    if groups is not None and line["units"] < MIN_UNITS:
        reason = f"{line['units']} patients or slices are too few ({MIN_UNITS})"
        return result | {"reason": reason}
    result["difference"] = line["value"] - others
    p = _p_of_samples(values, inside)
    if groups is not None:
        p = max(p, _p_of_units(values, inside, groups, slices, resamples, seed))
    return result | {"p": p}


def _p_of_samples(values: np.ndarray, inside: np.ndarray) -> float:
    """Test as if the samples knew nothing of each other."""
    known = ~np.isnan(values)
    own = values[inside & known]
    others = values[~inside & known]
    if _are_yes_or_no(values):
        table = [[own.sum(), len(own) - own.sum()], [others.sum(), len(others) - others.sum()]]
        return float(stats.fisher_exact(np.array(table, dtype=int)).pvalue)
    return float(stats.mannwhitneyu(own, others).pvalue)


def _p_of_units(  # noqa: PLR0913 - as in compare_groups
    values: np.ndarray,
    inside: np.ndarray,
    groups: Sequence[str],
    slices: Sequence | None,
    resamples: int,
    seed: int,
) -> float:
    """Test by resamples of patients or slices: the difference over its error, as a t."""
    rows = np.stack([values, np.where(np.isnan(values), math.nan, inside)], axis=1)
    found = bootstrap_interval(
        rows, groups, slices=slices, statistic=_difference, resamples=resamples, seed=seed
    )
    if not found["error"]:
        # all units say the same, so that resamples know of no chance; the other test does
        return 0.0
    # one degree of freedom is spent on the mean of each block
    blocks = len(set(groups)) if "blocks fixed" in found["label"] else 1
    freedom = max(1, found["groups"] - blocks)
    return float(2 * stats.t.sf(abs(found["value"]) / found["error"], freedom))


def _difference(rows: np.ndarray) -> float:
    own = rows[rows[:, 1] == 1, 0]
    others = rows[rows[:, 1] == 0, 0]
    if not len(own) or not len(others):
        return math.nan
    return float(own.mean() - others.mean())
