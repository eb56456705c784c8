"""When not to answer: risk against coverage, and a threshold that keeps a promise.

A *confidence* orders answers by how sure the model is. Who answers only above a threshold answers
less (*coverage*) and errs less (*risk*), if the confidence is worth anything.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Threshold:
    """From which confidence on to answer.

    Parameters
    ----------
    value : answers of this confidence or more are given; infinity where none may be.
    promised : share of all questions that may be answered wrongly, on average over sets of
        questions like those that it was chosen by.
    coverage : share of those questions that it lets be answered.
    found : share of those questions that were answered wrongly.
    """

    value: float
    promised: float
    coverage: float
    found: float

    def rate(self, confidence: Sequence[float], wrong: Sequence[bool]) -> dict[str, float]:
        """Say what the threshold does on other questions.

        Parameters
        ----------
        confidence : of each answer; NaN counts as none.
        wrong : whether it is wrong.

        Returns
        -------
        dict : `coverage`, the share of questions that are answered; `answered_wrong`, the share of
            all questions that are answered and wrong, which was promised; `risk`, the share of wrong
            ones among the answered, NaN where none is answered.

        Examples
        --------
        >>> Threshold(0.5, 0.1, 1.0, 0.0).rate([0.9, 0.6, 0.2], [False, True, True])["risk"]
        0.5
        """
        scores, errors = _arrays(confidence, wrong)
        answered = scores >= self.value
        both = float((answered & errors).mean())
        coverage = float(answered.mean())
        risk = both / coverage if coverage else math.nan
        return {"coverage": coverage, "answered_wrong": both, "risk": risk}


def choose_threshold(
    confidence: Sequence[float], wrong: Sequence[bool], *, risk: float = 0.05
) -> Threshold:
    """Choose the lowest threshold that keeps wrong answers below a share of all questions.

    Split-conformal risk control (Angelopoulos and others, *Conformal Risk Control*, 2022): of the
    thresholds the lowest is taken for which (wrong answers + 1) / (questions + 1) is at most the
    risk. If the questions to come are exchangeable with these, the share of them that is answered
    wrongly is at most the risk, on average. Questions about another person, another scanner or
    another kind of picture are not exchangeable with these, and nothing is promised about them.

    Parameters
    ----------
    confidence : of each answer to a question that the model was not trained on; NaN counts as none.
    wrong : whether the answer is wrong.
    risk : share of questions that may be answered wrongly, between 0 and 1.

    Returns
    -------
    Threshold : its value is infinite where so few questions cannot promise so little.

    Raises
    ------
    ValueError : no questions, columns of different lengths, or a risk outside of 0 to 1.

    Examples
    --------
    >>> sure = [i / 100 for i in range(100)]
    >>> errors = [i < 30 for i in range(100)]
    >>> choose_threshold(sure, errors, risk=0.1).value
    0.21
    """
    if not 0 < risk < 1:
        raise ValueError(f"risk={risk} is a share between 0 and 1")
    scores, errors = _arrays(confidence, wrong)
    # a little more, for what rounding takes
    allowed = risk * (len(scores) + 1) - 1 + 1e-9
    # from the surest on: how many are wrong when all down to this one are answered
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    wrong_so_far = np.cumsum(errors[order])
    value = math.inf
    for last in range(len(ranked)):
        # answers of one confidence are given together, or none of them
        ends = last + 1 == len(ranked) or ranked[last + 1] < ranked[last]
        if not ends:
            continue
        if wrong_so_far[last] > allowed or not np.isfinite(ranked[last]):
            break
        value = float(ranked[last])
    answered = scores >= value
    return Threshold(value, risk, float(answered.mean()), float((answered & errors).mean()))


def risk_coverage(
    confidence: Sequence[float], wrong: Sequence[bool]
) -> tuple[np.ndarray, np.ndarray, float]:
    """Trace risk against coverage as the threshold falls.

    Parameters
    ----------
    confidence : of each answer; NaN counts as none, and such answers come last.
    wrong : whether it is wrong.

    Returns
    -------
    tuple : coverage, rising to 1; the share of wrong answers among those that are answered; and the
        area under this curve (AURC), which is small where the sure answers are the right ones, and
        the share of wrong answers where confidence says nothing.

    Raises
    ------
    ValueError : no questions, or columns of different lengths.

    Examples
    --------
    >>> coverage, risk, area = risk_coverage([0.9, 0.8, 0.1], [False, False, True])
    >>> risk.round(2).tolist(), round(area, 3)
    ([0.0, 0.0, 0.33], 0.111)
    """
    scores, errors = _arrays(confidence, wrong)
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    # answers that are equally sure share their errors: their order means nothing
    shared = errors[order].astype(float)
    _, places = np.unique(-ranked, return_inverse=True)
    means = np.bincount(places, shared) / np.bincount(places)
    counts = np.arange(1, len(ranked) + 1)
    risk = np.cumsum(means[places]) / counts
    return counts / len(ranked), risk, float(risk.mean())


def calibration_table(
    confidence: Sequence[float], wrong: Sequence[bool], *, bins: int = 10
) -> tuple[list[dict[str, float]], float]:
    """Compare how sure the answers are with how often they are right.

    Parameters
    ----------
    confidence : of each answer, 0..1; answers without one (NaN) are left out.
    wrong : whether it is wrong.
    bins : of equal width.

    Returns
    -------
    tuple : for each bin that is not empty its mean `confidence`, the share `right` and the number of
        `answers`; and the expected calibration error, the mean distance of the first two, weighed by
        the third.

    Raises
    ------
    ValueError : no answer has a confidence, one is outside of 0 to 1, or the columns differ in
        length.

    Examples
    --------
    >>> table, error = calibration_table([0.9, 0.9, 0.1, 0.1], [False, False, True, True])
    >>> round(error, 2), table[0]["answers"]
    (0.1, 2)
    """
    scores, errors = _arrays(confidence, wrong)
    known = np.isfinite(scores)
    scores, errors = scores[known], errors[known]
    if not len(scores):
        raise ValueError("confidence: no answer has one")
    if scores.min() < 0 or scores.max() > 1:
        raise ValueError("confidence must be a probability, from 0 to 1")
    which = np.minimum((scores * bins).astype(int), bins - 1)
    table = []
    error = 0.0
    for number in np.unique(which):
        inside = which == number
        sure, right = float(scores[inside].mean()), float(1 - errors[inside].mean())
        table.append({"confidence": sure, "right": right, "answers": int(inside.sum())})
        error += inside.mean() * abs(sure - right)
    return table, float(error)


def _arrays(confidence: Sequence[float], wrong: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
    scores, errors = np.asarray(confidence, float), np.asarray(wrong, bool)
    if len(scores) != len(errors):
        raise ValueError(f"wrong has {len(errors)} values, confidence {len(scores)}")
    if not len(scores):
        raise ValueError("confidence: there are no questions")
    return np.where(np.isnan(scores), -np.inf, scores), errors
