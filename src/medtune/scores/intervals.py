"""Say how sure a score is: intervals from a bootstrap that draws whole patients, or whole slices.

Needs numpy and scipy.
"""

import math
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import expit, logit
from scipy.stats import t as student_t

Statistic = Callable[[np.ndarray], float]
"""A number for an array of values (n,) or rows (n, k), NaN where there is none."""

SMALLEST = 1e-12
"""A spread below it is what rounding leaves of none."""


def mean_of_known(values: np.ndarray) -> float:
    """Average what is not NaN; NaN when nothing is left.

    Examples
    --------
    >>> import numpy as np
    >>> mean_of_known(np.array([1, np.nan, 3]))
    2.0
    """
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else math.nan


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
    slices: Sequence | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Compute scores, and for each the interval over patients.

    Parameters
    ----------
    score : a function that with `columns=True` gives (rows, statistic) in place of each score, one
        row a sample, such as `standard_scores` or `box_scores`.
    data : what it takes, such as answers and references.
    groups : the patient, series or block of each sample; None gives the scores alone.
    slices : the slice of each sample, for samples of one patient, as `bootstrap_interval` takes it.
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
    >>> scores["right"], round(scores["intervals"]["right"]["low"], 2)
    (0.5, 0.14)
    """
    if groups is None:
        return score(*data, **options)
    scores = score(*data, columns=True, **options)
    intervals = {}
    for name, entry in scores.items():
        # What is no column is a fact about the scores, such as the tokenizer.
        if isinstance(entry, tuple):
            rows, statistic = entry
            intervals[name] = bootstrap_interval(rows, groups, slices=slices, statistic=statistic)
    values = {name: interval["value"] for name, interval in intervals.items()}
    return {**scores, **values, "intervals": intervals}


def bootstrap_interval(  # noqa: PLR0913 - the usual choices of a bootstrap, each with a default
    values: Any,
    groups: Sequence[str],
    *,
    slices: Sequence | None = None,
    statistic: Statistic | None = None,
    bounds: tuple[float, float] | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    min_groups: int = 5,
    seed: int = 0,
) -> dict[str, Any]:
    """Interval of a score from resamples that draw whole patients, or whole slices of one patient.

    Samples of one patient resemble each other, and so do those of one slice: drawing them one by
    one would give an interval that is far too narrow.

    One group, or groups that are all named like "block-07", are one patient. Then `slices` are
    drawn, each with all its samples, and within its block: the blocks are fixed. Such an interval
    says how the score would move with other slices of these blocks, and nothing about other
    patients. Without `slices` there is none.

    The resamples give the standard error. The interval is as wide as the t distribution says for so
    few patients or slices, because the quantiles of the resamples themselves are too narrow: of 8
    patients they hold the truth in 85 cases of 100 instead of 95. Where the score has limits, such
    as 0 and 1 of a share, the interval is made on log-odds. It stays within the limits, and is
    longer on the side away from the nearer one, which a share of 0.9 needs. That of one patient is
    never narrower than that of samples that know nothing of each other.

    Parameters
    ----------
    values : one value a sample, NaN or None for no value, or one row a sample.
    groups : the patient, series or block of each sample.
    slices : for samples of one patient the slice that each was taken from. Slices of two blocks
        are never one. With several patients they are not looked at.
    statistic : function of the resampled values (n,) or rows (n, k); by default the mean of what is
        not NaN.
    bounds : lowest and highest number that the statistic can give. By default those of a mean of
        values from 0 to 1, or what the statistic itself says in an attribute `bounds`.
    level : the interval's coverage, 0 to 1.
    resamples : how often the groups are drawn.
    min_groups : with fewer groups that have a value no interval is given.
    seed : of the draws.

    Returns
    -------
    dict : "value", "low", "high" (None if not given), "error" (the standard error, 0 where all
        patients or slices agree, which gives no interval), "groups" (how many were drawn), "label"
        ("over 12 groups" or "within one patient, blocks fixed: 17 slices"), "reason" (why there is
        no interval, or None).

    Raises
    ------
    ValueError : no values, not one group a value, not one slice a value.

    Examples
    --------
    >>> bootstrap_interval([1, 2, 3, 4, 5, 6], ["a", "b", "c", "d", "e", "e"])["label"]
    'over 5 groups'
    >>> bootstrap_interval([1, 2, 3, 4, 5, 6], ["a", "a", "a", "b", "b", "b"])["reason"]
    '2 groups are too few for an interval (5)'
    >>> one_patient = ["patient"] * 6
    >>> bootstrap_interval([1, 2, 3, 4, 5, 6], one_patient, slices=[1, 2, 3, 4, 5, 5])["label"]
    'within one patient: 5 slices'
    """
    check_lengths(values=values, groups=groups)
    if slices is not None:
        check_lengths(values=values, slices=slices)
    rows = np.asarray(values, dtype=float)
    statistic = statistic or mean_of_known
    if bounds is None:
        bounds = _known_bounds(rows, statistic)

    units = _units_to_draw(rows, groups, slices)
    value = float(statistic(rows))
    low = high = error = None
    reason = _reason_for_none(value, units, min_groups)
    if reason is None:
        width = _width(rows, units, statistic, level, resamples, seed)
        error = width.error
        if error > 0:
            low, high = _ends(value, width.reach, bounds)
        else:
            reason = f"all {units.count} {units.kind} agree, so that resamples show no error"
    return {
        "value": None if math.isnan(value) else value,
        "low": low,
        "high": high,
        "error": error,
        "groups": units.count,
        "label": units.label,
        "reason": reason,
    }


@dataclass(frozen=True)
class _Units:
    """What a resample draws.

    Attributes
    ----------
    strata : for each fixed block the samples of each unit in it; patients are in one stratum.
    kind : what a unit is called, "groups" or "slices".
    label : what the interval is about.
    problem : why nothing can be drawn, or None.
    """

    strata: list[list[np.ndarray]]
    kind: str
    label: str
    problem: str | None = None

    @property
    def count(self) -> int:
        """How many units there are."""
        return sum(len(units) for units in self.strata)


def _units_to_draw(rows: np.ndarray, groups: Sequence[str], slices: Sequence | None) -> _Units:
    """Find the patients, or the slices of one patient; those without any value do not count."""
    names = np.array([str(group) for group in groups])
    known = ~np.isnan(rows.reshape(len(rows), -1)).all(axis=1)
    different = set(names)
    one_patient = len(different) == 1 or all("block-" in name for name in different)
    if not one_patient:
        patients = _members(names, known)
        return _Units([patients], "groups", f"over {len(patients)} groups")
    if slices is None or any(number is None for number in slices):
        problem = "all samples are of one patient, and their slices are not known"
        return _Units([], "slices", "within one patient", problem)

    numbers = np.array([str(number) for number in slices])
    strata = []
    for name in sorted(different):
        strata.append(_members(numbers, known & (names == name)))
    strata = _without_lone_slices(strata)
    count = sum(len(stratum) for stratum in strata)
    fixed = ", blocks fixed" if len(different) > 1 else ""
    return _Units(strata, "slices", f"within one patient{fixed}: {count} slices")


def _members(names: np.ndarray, known: np.ndarray) -> list[np.ndarray]:
    """Give the samples of each name that occurs among the known ones."""
    members = []
    for name in np.unique(names[known]):
        members.append(np.flatnonzero((names == name) & known))
    return members


def _without_lone_slices(strata: list[list[np.ndarray]]) -> list[list[np.ndarray]]:
    """Put a block that has one slice together with its neighbour.

    A block's only slice would be drawn each time, as if slices did not differ.
    """
    merged: list[list[np.ndarray]] = []
    for stratum in strata:
        if merged and (len(stratum) == 1 or len(merged[-1]) == 1):
            merged[-1] = merged[-1] + stratum
        elif stratum:
            merged.append(stratum)
    return merged


def _reason_for_none(value: float, units: _Units, min_groups: int) -> str | None:
    """Say why there is no interval, as far as this is known before anything is drawn."""
    if math.isnan(value):
        return "no sample has a value"
    if units.problem:
        return units.problem
    if units.count < max(min_groups, 2):
        return f"{units.count} {units.kind} are too few for an interval ({min_groups})"
    return None


def _known_bounds(rows: np.ndarray, statistic: Statistic) -> tuple[float, float] | None:
    """Give the limits of a statistic: its own, or those of a mean of values from 0 to 1."""
    own = getattr(statistic, "bounds", None)
    if own is not None:
        return own
    known = rows[~np.isnan(rows)]
    is_mean = statistic is mean_of_known or statistic is np.mean
    if is_mean and known.size and known.min() >= 0 and known.max() <= 1:
        return (0.0, 1.0)
    return None


@dataclass(frozen=True)
class _Width:
    """How far an interval reaches.

    Attributes
    ----------
    error : the standard error.
    reach : the error times the quantile of the t distribution.
    """

    error: float
    reach: float


def _width(  # noqa: PLR0913 - what is drawn, of what, and how often
    rows: np.ndarray,
    units: _Units,
    statistic: Statistic,
    level: float,
    resamples: int,
    seed: int,
) -> _Width:
    """Compute the width from resamples of the units, of slices from those of single samples too.

    Of one patient the wider of the two counts. Its slices show the same structures again and again,
    and a model errs on the same ones: such slices differ less than samples that know nothing of
    each other, and yet their errors are not independent. (Angrist and Pischke, Mostly Harmless
    Econometrics, 2009, section 8.2, take the larger error for a like reason.)
    """
    rng = np.random.default_rng(seed)
    drawn: list[Sequence] = [units.strata]
    if units.kind == "slices":
        drawn.append([np.concatenate(stratum) for stratum in units.strata])
    widths = []
    for strata in drawn:
        error = _spread(rows, strata, statistic, resamples, rng)
        # one degree of freedom is spent on the mean of each block
        freedom = sum(len(members) for members in strata) - len(strata)
        quantile = float(student_t.ppf((1 + level) / 2, freedom))
        widths.append(_Width(error, quantile * error))
    return max(widths, key=lambda width: width.reach)


def _spread(
    rows: np.ndarray,
    strata: Sequence[list[np.ndarray] | np.ndarray],
    statistic: Statistic,
    resamples: int,
    rng: np.random.Generator,
) -> float:
    """Give the spread of the statistic over resamples.

    A resample draws from each block as many units as it has, with return. The units of a block are
    lists of samples, or an array of single samples.
    """
    choices = []
    for members in strata:
        choices.append(rng.integers(len(members), size=(resamples, len(members))))
    drawn = []
    for number in range(resamples):
        chosen = []
        for members, choice in zip(strata, choices, strict=True):
            if isinstance(members, np.ndarray):
                chosen.append(members[choice[number]])
            else:
                chosen += [members[unit] for unit in choice[number].tolist()]
        drawn.append(statistic(rows[np.concatenate(chosen)]))
    # A resample may lack what the statistic needs, and then counts for nothing.
    known = np.array(drawn)[~np.isnan(drawn)]
    spread = float(known.std()) if known.size else 0.0
    if spread < SMALLEST:
        return 0.0
    # Units of a sample lie nearer to its own mean than to the truth: n / (n - 1) of the variance.
    count = sum(len(members) for members in strata)
    return spread * math.sqrt(count / (count - len(strata)))


def _ends(value: float, reach: float, bounds: tuple[float, float] | None) -> tuple[float, float]:
    """Give the ends of a t interval, on log-odds where the value has limits."""
    if bounds is None:
        return value - reach, value + reach
    lowest, highest = bounds
    width = highest - lowest
    share = (value - lowest) / width
    if not 0 < share < 1:
        return value - reach, value + reach
    # the slope of the log-odds at the value turns its error into one of the log-odds
    on_log_odds = reach / width / (share * (1 - share))
    low = lowest + width * float(expit(logit(share) - on_log_odds))
    high = lowest + width * float(expit(logit(share) + on_log_odds))
    return low, high


def paired_bootstrap(
    a: Any,
    b: Any,
    groups: Sequence[str],
    *,
    slices: Sequence | None = None,
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
    slices : the slice of each sample, for samples of one patient.
    statistic : of which the difference is taken; by default the mean of what is not NaN.
    options : of `bootstrap_interval`.

    Returns
    -------
    dict : what `bootstrap_interval` returns, with "difference" in place of "value", "decided" (True
        if the interval leaves out 0; None if there is none) and "better" (the same, and a is the
        better one). Where all patients or slices show the same difference there is no interval, but
        six or more of them decide: chance would not make so many agree.

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
    ours = np.asarray(a, dtype=float)
    theirs = np.asarray(b, dtype=float)
    both = np.stack([ours, theirs], axis=1)  # (n, 2, ...)
    # Rows without a value in one run have none in the other either, so that both means are of the
    # same samples.
    without_value = np.isnan(both.reshape(len(both), -1)).any(axis=1)
    both[without_value] = math.nan

    def difference(rows: np.ndarray) -> float:
        return statistic(rows[:, 0]) - statistic(rows[:, 1])

    limits = _known_bounds(both, statistic)
    if limits is not None:
        width = limits[1] - limits[0]
        options = {"bounds": (-width, width)} | options
    result = bootstrap_interval(both, groups, slices=slices, statistic=difference, **options)
    found = result.pop("value")
    decided = _is_decided(found, result, options.get("level", 0.95))
    better = None if decided is None else decided and found > 0
    return {"difference": found, **result, "better": better, "decided": decided}


def _is_decided(difference: float | None, result: Mapping[str, Any], level: float) -> bool | None:
    """Say whether a difference is more than chance; None where nothing can be said."""
    if difference is None or result["error"] is None:
        return None
    if result["low"] is not None:
        return result["low"] > 0 or result["high"] < 0
    # All show the same. Signs that are a coin's would do so twice in 2 ** groups times.
    return difference != 0 and 2 * 0.5 ** result["groups"] < 1 - level
