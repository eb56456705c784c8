"""Judge whether findings are reported: where there is one, where there is none, and which."""

import math
from collections.abc import Callable, Iterable
from typing import Any

from medtune.captions import Caption, parse_caption

from .intervals import mean_of_known, values_of
from .text import text_pairs


def detection_scores(
    predictions: Iterable[str],
    references: Iterable[str],
    *,
    per_sample: bool = False,
    columns: bool = False,
) -> dict[str, Any]:
    """Score reported findings as a test for disease is scored.

    Most captions say that there is no finding, so that "finding right" is high for whoever never
    reports one. These three do not mix the samples with a finding and those without.

    Answers none of which says anything about findings, present or absent, are not scored: a model
    that was never taught the words cannot report. Where some of them do, a silent one reports
    nothing.

    Parameters
    ----------
    predictions, references : the answers and what they should be, one of each a sample.
    per_sample : give a list for each score instead, with one value a sample, NaN where it does not
        count.
    columns : give (rows, statistic) in place of each score, as `with_intervals` takes them.

    Returns
    -------
    dict : "sensitivity", the share of the references with a finding where the answer reports one;
        "false_alarms", the share of the others where it does; "kind_right", the share of the
        references with a finding where the answer reports the same. All 0 to 1, None where nothing
        counts.

    Raises
    ------
    ValueError : lists of different length, empty lists, or an answer that is not a string.

    Examples
    --------
    >>> references = ["A cyst is seen.", "A cyst is seen.", "No cyst is seen."]
    >>> answers = ["A nodule is seen.", "No cyst is seen.", "A cyst is seen."]
    >>> detection_scores(answers, references)
    {'sensitivity': 0.5, 'false_alarms': 1.0, 'kind_right': 0.0}
    """
    pairs = text_pairs(predictions, references)
    said = [parse_caption(answer) for answer, _ in pairs]
    wanted = [parse_caption(reference) for _, reference in pairs]
    samples = {
        "sensitivity": _judged(_sensitivity, said, wanted),
        "false_alarms": _judged(_false_alarm, said, wanted),
        "kind_right": _judged(_kind_right, said, wanted),
    }
    if per_sample:
        return samples
    entries = {name: (values, mean_of_known) for name, values in samples.items()}
    return entries if columns else values_of(entries)


def _judged(
    judge: Callable[[Caption, Caption], float], said: list[Caption], wanted: list[Caption]
) -> list[float]:
    speaks = any(caption.findings or caption.negated for caption in said)
    if not speaks:
        return [math.nan] * len(said)
    return [judge(answer, reference) for answer, reference in zip(said, wanted, strict=True)]


def _sensitivity(said: Caption, wanted: Caption) -> float:
    return float(bool(said.findings)) if wanted.findings else math.nan


def _false_alarm(said: Caption, wanted: Caption) -> float:
    return math.nan if wanted.findings else float(bool(said.findings))


def _kind_right(said: Caption, wanted: Caption) -> float:
    if not wanted.findings:
        return math.nan
    return float(set(said.findings) == set(wanted.findings))
