"""Judge where a model looks, and whether it notices that picture and text do not match."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from medtune.boxes import iou

from .intervals import Statistic, check_lengths, mean_of_known, values_of

Boxes = Sequence[Sequence[float] | None]


def box_scores(
    predicted: Boxes, true: Boxes, *, per_sample: bool = False, columns: bool = False
) -> dict[str, Any]:
    """Compare boxes by intersection over union.

    No predicted box, or an impossible one (x2 <= x1, not finite), has IoU 0. Samples without a true
    box are left out.

    Parameters
    ----------
    predicted, true : one box (x1, y1, x2, y2 in 0..1) a sample, None for no box.
    per_sample : give a list for "iou" and "iou_above_0.5" instead, with one value a sample, NaN
        where there is no true box.
    columns : give (rows, statistic) in place of each of the two, as `with_intervals` takes them.

    Returns
    -------
    dict : "iou" (mean, 0 to 1), "iou_above_0.5" (share), and counts: "true_boxes", "missed",
        "false_boxes" (predicted where there is none).

    Raises
    ------
    ValueError : lists of different length, empty lists, a box that is not four numbers, or a true
        one that is impossible.

    Examples
    --------
    >>> box_scores([[0, 0, 0.5, 1], None], [[0, 0, 1, 1], [0, 0, 1, 1]])["iou"]
    0.25
    """
    check_lengths(predicted=predicted, true=true)
    predicted_boxes = _box_array(predicted)
    true_boxes = _box_array(true)
    is_predicted = _is_possible(predicted_boxes)
    is_true = _is_possible(true_boxes)
    given = sum(box is not None for box in true)
    if not is_true.any() or is_true.sum() < given:
        raise ValueError(
            "true holds no box, or one without x1 < x2 and y1 < y2: check the column of true boxes"
        )

    both = zip(predicted_boxes.tolist(), true_boxes.tolist(), strict=True)
    overlap = np.where(is_predicted, [iou(ours, theirs) for ours, theirs in both], 0)
    samples = {
        "iou": np.where(is_true, overlap, math.nan).tolist(),
        "iou_above_0.5": np.where(is_true, overlap > 0.5, math.nan).tolist(),
    }
    if per_sample:
        return samples
    scores: dict[str, Any] = {name: (values, mean_of_known) for name, values in samples.items()}
    scores["true_boxes"] = int(is_true.sum())
    scores["missed"] = int((is_true & ~is_predicted).sum())
    scores["false_boxes"] = int((is_predicted & ~is_true).sum())
    return scores if columns else values_of(scores)


def _box_array(boxes: Boxes) -> np.ndarray:
    """Make an array (n, 4) of boxes, with NaN for no box."""
    rows = []
    for box in boxes:
        if box is not None and len(box) != 4:
            raise ValueError("a box must be four numbers, x1, y1, x2, y2, or None")
        rows.append([math.nan] * 4 if box is None else box)
    return np.asarray(rows, dtype=float)


def _is_possible(boxes: np.ndarray) -> np.ndarray:
    """Say of each box (n, 4) whether its numbers are finite and it has an area, (n,)."""
    finite = np.isfinite(boxes).all(axis=1)
    has_area = (boxes[:, :2] < boxes[:, 2:]).all(axis=1)
    return finite & has_area


def match_scores(
    scores: Sequence[float],
    labels: Sequence[int],
    *,
    specificity: float = 0.9,
    bins: int = 10,
    columns: bool = False,
) -> dict[str, Any]:
    """Judge the probabilities that picture and text match.

    Parameters
    ----------
    scores : the probability of each sample, 0 to 1.
    labels : 1 for a match, 0 for none; both must occur.
    specificity : share of the zeros that a threshold must keep below it.
    bins : of equal width, over which the calibration is judged.
    columns : give (rows, statistic) in place of each score, as `with_intervals` takes them.

    Returns
    -------
    dict : "auroc", "average_precision", "calibration_error" (expected, over the bins) and
        "sensitivity" at the threshold that keeps at least the share `specificity` of the zeros
        below it; all 0 to 1.

    Raises
    ------
    ValueError : lists of different length, empty lists, scores that are no probabilities, or labels
        that are not both 0 and 1.

    Examples
    --------
    >>> match_scores([0.1, 0.4, 0.8, 0.9], [0, 0, 1, 1])["auroc"]
    1.0
    """
    check_lengths(scores=scores, labels=labels)
    rows = np.column_stack([np.asarray(labels, dtype=float), np.asarray(scores, dtype=float)])
    # No comparison with NaN is true: written this way round, NaN is refused too.
    if not ((rows[:, 1] >= 0) & (rows[:, 1] <= 1)).all():
        raise ValueError(
            "scores must be probabilities between 0 and 1: pass logits through a sigmoid first"
        )
    if set(rows[:, 0]) != {0.0, 1.0}:
        raise ValueError("labels must be 0 and 1, and both must occur")

    judges = {
        "auroc": roc_auc_score,
        "average_precision": average_precision_score,
        "calibration_error": functools.partial(_calibration_error, bins=bins),
        "sensitivity": functools.partial(_sensitivity, specificity=specificity),
    }
    results = {name: (rows, _of_rows(judge)) for name, judge in judges.items()}
    return results if columns else values_of(results)


def _of_rows(judge: Callable[[np.ndarray, np.ndarray], float]) -> Statistic:
    """Make of a function of (labels, scores) a statistic of rows [label, score]."""

    def statistic(rows: np.ndarray) -> float:
        labels = rows[:, 0]
        # A resample with one kind of label has no value.
        if labels.sum() in (0, len(rows)):
            return math.nan
        return judge(labels, rows[:, 1])

    statistic.bounds = (0.0, 1.0)  # for `bootstrap_interval`
    return statistic


def _calibration_error(labels: np.ndarray, scores: np.ndarray, *, bins: int) -> float:
    """Average over the samples how far their bin's mean score is from its share of ones."""
    # A score of 1 belongs to the last bin.
    bin_of = np.minimum((scores * bins).astype(int), bins - 1)
    # The gaps are sums over a bin, not means: that weighs each bin by its samples.
    gaps = np.bincount(bin_of, scores - labels)
    return np.abs(gaps).sum() / len(labels)


def _sensitivity(labels: np.ndarray, scores: np.ndarray, *, specificity: float) -> float:
    """Give the best share of ones found while at most 1 - specificity of the zeros are too."""
    false_alarms, hits, _ = roc_curve(labels, scores, drop_intermediate=False)
    # The small number is for shares such as 1 - 0.9, which are not exact in binary.
    allowed = false_alarms <= 1 - specificity + 1e-9
    return hits[allowed].max()
