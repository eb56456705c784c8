"""Score the same pairs as they were answered under several conditions, and compare two of these.

A condition is a way to get answers: a model, the same model shown the wrong picture, or a rule that
needs no model.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .intervals import (
    Statistic,
    bootstrap_interval,
    check_lengths,
    mean_of_known,
    paired_bootstrap,
    values_of,
)
from .text import text_pairs

Score = Callable[..., dict[str, Any]]
"""A score of answers and references that knows `columns=True`, such as `standard_scores`."""

NO_GROUPS = "no patients or series known"


@dataclass(frozen=True)
class Measure:
    """One column of a table of results: one number of one score, in the unit of the table.

    Attributes
    ----------
    name : what the table calls it.
    score : the function that computes it, such as `standard_scores` or what `pair_score` returns.
    key : which of the numbers of that function.
    factor : what the number is multiplied by; 100 makes percent of a share.

    Examples
    --------
    >>> from medtune.scores import finding_scores
    >>> Measure("name right", finding_scores, "structure_exact", 100).name
    'name right'
    """

    name: str
    score: Score
    key: str
    factor: float = 1


@dataclass(frozen=True)
class Column:
    """What one measure makes of each sample, before it becomes one number.

    Attributes
    ----------
    rows : one value a sample, NaN for none, or one list of counts a sample.
    statistic : makes the number of an array of rows.
    factor : what the number is multiplied by.
    """

    rows: Sequence
    statistic: Statistic
    factor: float


@dataclass(frozen=True)
class ScoredCondition:
    """The answers of one condition, scored by several measures.

    Attributes
    ----------
    results : for each measure a mapping with "value", "low", "high", "error", "groups", "label" and
        "reason" as in `bootstrap_interval`, in the unit of the measure.
    columns : for each measure what `compare_conditions` takes.
    facts : what the scores tell besides, such as "bleu_signature" and "note".
    """

    results: dict[str, dict[str, Any]]
    columns: dict[str, Column]
    facts: dict[str, Any]


def pair_score(
    judge: Callable[[str, str], float], *, speaks: Callable[[str], Any] | None = None
) -> Score:
    """Make a score of a function that judges a single answer.

    Parameters
    ----------
    judge : takes an answer and its reference, and returns a number, NaN where nothing compares.
    speaks : says of a text whether it speaks at all of what is judged. Where no answer of a set
        does, the set is not scored: a model that was never taught the words is not wrong about the
        matter, it is silent. Where some answers do, the silent ones are judged like any other.

    Returns
    -------
    function : takes answers, references, `per_sample` and `columns` as the other scores do. The
        number is the mean of what is not NaN; its key is the name of the function.

    Examples
    --------
    >>> def ends_alike(answer, reference):
    ...     return float(answer[-1] == reference[-1])
    >>> pair_score(ends_alike)(["liver", "spleen"], ["spleen", "spleen"])
    {'ends_alike': 0.5}
    >>> pair_score(ends_alike, speaks=str.isalpha)(["1", "2"], ["spleen", "spleen"])
    {'ends_alike': None}
    """

    def score(
        predictions: Iterable[str],
        references: Iterable[str],
        *,
        per_sample: bool = False,
        columns: bool = False,
    ) -> dict[str, Any]:
        pairs = text_pairs(predictions, references)
        values = [judge(answer, reference) for answer, reference in pairs]
        if speaks is not None and not any(speaks(answer) for answer, _ in pairs):
            values = [math.nan] * len(pairs)
        if per_sample:
            return {judge.__name__: values}
        entries = {judge.__name__: (values, mean_of_known)}
        return entries if columns else values_of(entries)

    score.__doc__ = judge.__doc__
    return score


def score_conditions(  # noqa: PLR0913 - groups, slices and seed are those of the intervals
    answers: Mapping[str, Sequence[str]],
    references: Sequence[str],
    measures: Sequence[Measure],
    *,
    groups: Sequence[str] | None = None,
    slices: Sequence | None = None,
    seed: int = 0,
) -> dict[str, ScoredCondition]:
    """Score the answers of several conditions to the same questions, with intervals.

    Parameters
    ----------
    answers : the answers of each condition, by its name, one a sample.
    references : what the answers should be.
    measures : what is measured. A function that several of them share is called once a condition.
    groups : the patient, series or block of each sample; without them there are no intervals.
    slices : the slice of each sample, for samples of one patient, as `bootstrap_interval` takes it.
    seed : of the resamples.

    Returns
    -------
    dict : a `ScoredCondition` for each condition.

    Raises
    ------
    ValueError : not one answer and one group a sample, or an answer that is not a string.

    Examples
    --------
    >>> from medtune.scores import standard_scores
    >>> references = ["a cyst", "no cyst"]
    >>> answers = {"base": ["a", "a"], "tuned": ["a cyst", "no cyst"]}
    >>> scored = score_conditions(answers, references, [Measure("chrF", standard_scores, "chrf")])
    >>> scored["tuned"].results["chrF"]["value"]
    100.0
    """
    scored = {}
    for name, texts in answers.items():
        columns, facts = _columns_and_facts(texts, references, measures)
        results = {}
        for measure, column in columns.items():
            results[measure] = _result(column, groups, slices, seed)
        scored[name] = ScoredCondition(results, columns, facts)
    return scored


def _columns_and_facts(
    texts: Sequence[str], references: Sequence[str], measures: Sequence[Measure]
) -> tuple[dict[str, Column], dict[str, Any]]:
    entries_of: dict[Score, dict[str, Any]] = {}
    columns = {}
    facts = {}
    for measure in measures:
        if measure.score not in entries_of:
            entries = measure.score(texts, references, columns=True)
            entries_of[measure.score] = entries
            # What is no column is a fact about the score, such as the tokenizer.
            for key, entry in entries.items():
                if not isinstance(entry, tuple):
                    facts[key] = entry
        rows, statistic = entries_of[measure.score][measure.key]
        columns[measure.name] = Column(rows, statistic, measure.factor)
    return columns, facts


def _result(
    column: Column, groups: Sequence[str] | None, slices: Sequence | None, seed: int
) -> dict[str, Any]:
    if groups is not None:
        found = bootstrap_interval(
            column.rows, groups, slices=slices, statistic=column.statistic, seed=seed
        )
        return _in_unit(found, ("value", "low", "high", "error"), column.factor)
    value = float(column.statistic(np.asarray(column.rows, dtype=float)))
    return {
        "value": None if math.isnan(value) else column.factor * value,
        "low": None,
        "high": None,
        "error": None,
        "groups": None,
        "label": None,
        "reason": NO_GROUPS,
    }


def _in_unit(found: dict[str, Any], keys: Iterable[str], factor: float) -> dict[str, Any]:
    """Multiply some numbers of a result, where there are any."""
    scaled = dict(found)
    for key in keys:
        if found[key] is not None:
            scaled[key] = factor * found[key]
    return scaled


def compare_conditions(  # noqa: PLR0913 - groups, slices and seed are those of the intervals
    first: ScoredCondition,
    second: ScoredCondition,
    measures: Iterable[str] | None = None,
    *,
    groups: Sequence[str] | None,
    slices: Sequence | None = None,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Compare two conditions pair by pair: the difference, first minus second, and its interval.

    Each resample draws the same samples of both. A score of a whole corpus, such as BLEU, is not
    the mean of its samples: it is computed anew for each resample, from the sum of their counts.

    Parameters
    ----------
    first, second : two conditions that `score_conditions` has scored on the same samples.
    measures : the names of those to compare; by default all.
    groups : the patient, series or block of each sample.
    slices : the slice of each sample, for samples of one patient.
    seed : of the resamples.

    Returns
    -------
    dict : for each measure what `paired_bootstrap` returns, in its own unit: "difference", "low",
        "high", "better" and so on. A measure without a value is left out, and without groups all
        are.

    Raises
    ------
    ValueError : a measure that was not scored, or samples that are not the same in number.

    Examples
    --------
    >>> from medtune.scores import standard_scores
    >>> references = ["the liver", "the spleen", "the heart", "the colon", "the aorta"]
    >>> answers = {"base": ["a liver"] * 5, "tuned": references}
    >>> groups = ["p1", "p2", "p3", "p4", "p5"]
    >>> measures = [Measure("chrF", standard_scores, "chrf")]
    >>> scored = score_conditions(answers, references, measures, groups=groups)
    >>> found = compare_conditions(scored["tuned"], scored["base"], groups=groups)
    >>> found["chrF"]["better"], found["chrF"]["label"]
    (True, 'over 5 groups')
    """
    if groups is None:
        return {}
    names = list(first.columns) if measures is None else list(measures)
    compared = {}
    for name in names:
        if name not in first.columns or name not in second.columns:
            raise ValueError(f"{name!r} was not scored: there are {', '.join(first.columns)}")
        ours = first.columns[name]
        theirs = second.columns[name]
        check_lengths(first=ours.rows, second=theirs.rows, groups=groups)
        found = paired_bootstrap(
            ours.rows,
            theirs.rows,
            groups,
            slices=slices,
            statistic=ours.statistic,
            seed=seed,
        )
        if found["difference"] is not None:
            compared[name] = _in_unit(found, ("difference", "low", "high", "error"), ours.factor)
    return compared
