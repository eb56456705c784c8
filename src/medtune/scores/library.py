"""Offer the text scores to Hugging Face's `evaluate`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .intervals import with_intervals
from .text import llamafactory_scores

if TYPE_CHECKING:
    import evaluate


def evaluate_metric(
    score: Callable[..., dict[str, Any]] = llamafactory_scores,
) -> evaluate.Metric:
    """Wrap a text score as an `evaluate.Metric`, to combine with that library's, without the hub.

    Parameters
    ----------
    score : `llamafactory_scores`, `standard_scores` or `finding_scores`.

    Returns
    -------
    evaluate.Metric : its `compute` takes predictions and references, the score's own options, and
        `groups` for intervals as `with_intervals` gives them.

    Examples
    --------
    >>> metric = evaluate_metric()
    >>> metric.compute(predictions=["the spleen"], references=["the spleen"])["bleu-4"]
    100.0
    """
    # `evaluate` loads torch and transformers: seconds that no other score needs to wait for
    import datasets
    import evaluate

    text = datasets.Value("string")
    features = datasets.Features({"predictions": text, "references": text})

    class TextScores(evaluate.Metric):
        def _info(self) -> evaluate.MetricInfo:
            return evaluate.MetricInfo(description=score.__doc__, citation="", features=features)

        def _compute(
            self,
            predictions: list[str],
            references: list[str],
            groups: list[str] | None = None,
            **options: Any,
        ) -> dict[str, Any]:
            return with_intervals(score, predictions, references, groups=groups, **options)

    return TextScores()
