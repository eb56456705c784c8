"""Choose the questions that a model can learn from by trying.

GRPO compares answers to the same question. Where all are right, or all are wrong, there is nothing
to compare, and the step was for nothing.
"""

import math
from collections.abc import Sequence


def pass_rates(rewards: Sequence[Sequence[float | None]], *, passing: float = 1.0) -> list[float]:
    """Give for each question the share of its answers that reached a reward.

    Parameters
    ----------
    rewards : sequence
        For each question the rewards of its sampled answers; None and NaN are not judged.
    passing : float
        The least reward of an answer that passes.

    Returns
    -------
    list of float
        0 to 1 for each question; NaN where no answer was judged.

    Examples
    --------
    >>> pass_rates([[1.0, -1.0], [1.0, 1.0], [None]])
    [0.5, 1.0, nan]
    """
    rates = []
    for of_question in rewards:
        judged = [value for value in of_question if value is not None and not math.isnan(value)]
        passed = [value for value in judged if value >= passing]
        rates.append(len(passed) / len(judged) if judged else math.nan)
    return rates


def choose_questions(
    rewards: Sequence[Sequence[float | None]],
    *,
    passing: float = 1.0,
    low: float = 0.1,
    high: float = 0.9,
) -> list[int]:
    """Find the questions that are answered now right and now wrong.

    Parameters
    ----------
    rewards : sequence
        For each question the rewards of its sampled answers; None and NaN are not judged.
    passing : float
        The least reward of an answer that passes.
    low, high : float
        A question is kept whose pass rate lies between, both included.

    Returns
    -------
    list of int
        Their numbers, in order.

    Raises
    ------
    ValueError
        No question is left, or `low` and `high` are no range within 0 and 1.

    Examples
    --------
    >>> choose_questions([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    [1]
    """
    if not 0 <= low <= high <= 1:
        raise ValueError(f"low={low} and high={high} must be a range within 0 and 1")
    rates = pass_rates(rewards, passing=passing)
    chosen = [number for number, rate in enumerate(rates) if low <= rate <= high]
    if not chosen:
        too_hard = sum(rate < low for rate in rates)
        too_easy = sum(rate > high for rate in rates)
        raise ValueError(
            f"no question has a pass rate between {low} and {high}: {too_hard} of {len(rates)} are "
            f"below and {too_easy} above; sample warmer, take more answers, or ask other questions"
        )
    return chosen
