"""Boxes and the probability that picture and text match."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from medtune.scores import box_scores, match_scores, with_intervals

# boxes on a grid of 8x8 cells, so that areas can be counted
SPANS = st.lists(st.integers(0, 8), min_size=2, max_size=2, unique=True).map(sorted)
TRUE = st.tuples(SPANS, SPANS).map(
    lambda spans: [spans[0][0] / 8, spans[1][0] / 8, spans[0][1] / 8, spans[1][1] / 8]
)
ANY_FOUR = st.lists(st.integers(0, 8), min_size=4, max_size=4).map(
    lambda numbers: [number / 8 for number in numbers]
)
GUESSES = st.none() | TRUE | ANY_FOUR


def cells(box) -> set[tuple[int, int]]:
    """List the cells that a box covers."""
    if box is None:
        return set()
    left, top, right, bottom = (round(8 * edge) for edge in box)
    return set(itertools.product(range(left, right), range(top, bottom)))


@given(st.lists(st.tuples(GUESSES, TRUE), min_size=1))
def test_box_scores_count_grid_cells(pairs):
    expected = []
    for guess, true in pairs:
        both = cells(guess) & cells(true)
        either = cells(guess) | cells(true)
        expected.append(len(both) / len(either))
    predicted, true = zip(*pairs, strict=True)
    assert box_scores(predicted, true, per_sample=True)["iou"] == pytest.approx(expected)
    scores = box_scores(predicted, true)
    assert scores["iou"] == pytest.approx(np.mean(expected))
    assert scores["iou_above_0.5"] == pytest.approx(np.mean([value > 0.5 for value in expected]))
    assert scores["missed"] == sum(not cells(guess) for guess in predicted)


def test_boxes_that_are_missing_or_impossible():
    whole = [0, 0, 1, 1]
    predicted = [None, whole, [0.5, 0, 0.1, 1], [math.nan, 0, 1, 1], whole]
    scores = box_scores(predicted, [None, None, whole, whole, whole])
    third = 1 / 3
    counts = {"true_boxes": 3, "missed": 2, "false_boxes": 1}
    assert scores == pytest.approx({"iou": third, "iou_above_0.5": third} | counts)


@pytest.mark.parametrize(
    ("predicted", "true", "message"),
    [
        ([[0, 0, 1, 1]], [None], "holds no box"),
        ([[0, 0, 1, 1]], [[1, 0, 0, 1]], "without x1 < x2"),
        ([[0, 0, 1]], [[0, 0, 1, 1]], "four numbers"),
        ([[0, 0, 1, 1]], [], "1 predicted, 0 true"),
        ([], [], "nothing to score"),
    ],
)
def test_bad_boxes_are_named(predicted, true, message):
    with pytest.raises(ValueError, match=message):
        box_scores(predicted, true)


@pytest.mark.slow
def test_match_scores_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=300)
    scores = np.clip(0.3 * labels + rng.random(300) * 0.7, 0, 1)
    result = match_scores(scores, labels, specificity=0.8)
    assert result["auroc"] == pytest.approx(roc_auc_score(labels, scores))
    assert result["average_precision"] == pytest.approx(average_precision_score(labels, scores))

    ones, zeros = scores[labels == 1], scores[labels == 0]
    allowed = [t for t in np.unique(scores) if np.mean(zeros < t) >= 0.8]
    assert result["sensitivity"] == pytest.approx(max(np.mean(ones >= t) for t in allowed))

    error = 0.0
    for number in range(10):
        inside = (scores >= number / 10) & (scores < (number + 1) / 10 + (number == 9))
        if inside.any():
            error += abs(scores[inside].mean() - labels[inside].mean()) * inside.mean()
    assert result["calibration_error"] == pytest.approx(error)

    groups = list(range(100)) * 3
    assert set(with_intervals(match_scores, scores, labels, groups=groups)["intervals"]) == set(
        result
    )


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([0.5, 1.5], [0, 1], "between 0 and 1"),
        ([0.5, math.nan], [0, 1], "between 0 and 1"),
        ([0.5, 0.5], [1, 1], "both must occur"),
        ([0.5, 0.5, 0.5], [0, 1, 2], "labels must be 0 and 1"),
        ([0.5], [0, 1], "1 scores, 2 labels"),
    ],
)
def test_bad_matches_are_named(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        match_scores(scores, labels)
