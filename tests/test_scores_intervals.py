"""Intervals over patients."""

import json
import math

import numpy as np
import pytest
from example_captions import EN, EN_DENIED, ZH

from medtune.scores import (
    RATIOS,
    bootstrap_interval,
    box_scores,
    finding_scores,
    llamafactory_scores,
    match_scores,
    paired_bootstrap,
    standard_scores,
    with_intervals,
)


def test_interval_covers_the_truth_when_patients_differ():
    """Whole patients are drawn: drawing single samples would cover far too seldom."""
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(20), 8)
    samples = np.arange(160)
    covered = {"by patient": 0, "by sample": 0}
    for seed in range(80):
        values = (rng.normal(size=(20, 1)) + 0.3 * rng.normal(size=(20, 8))).ravel()
        for name, groups in (("by patient", patients), ("by sample", samples)):
            interval = bootstrap_interval(values, groups, resamples=200, seed=seed)
            covered[name] += interval["low"] < 0 < interval["high"]
    assert covered["by patient"] / 80 > 0.85
    assert covered["by sample"] / 80 < 0.7


def test_one_patient_is_cut_into_neighbouring_blocks():
    drift = np.linspace(0, 1, 40)  # neighbours are alike
    one = bootstrap_interval(drift, ["patient"] * 40)
    assert one["label"] == "within one patient" and one["groups"] == 10
    assert bootstrap_interval(drift, [f"block-{i // 4:02d}" for i in range(40)]) == one
    assert bootstrap_interval(drift, [f"held-out-block-{i // 20}" for i in range(40)]) == one

    each_alone = bootstrap_interval(drift, range(40))
    assert one["high"] - one["low"] > 1.5 * (each_alone["high"] - each_alone["low"])
    assert bootstrap_interval(drift, [f"p{i // 4}" for i in range(40)])["label"] == "over 10 groups"


def test_too_few_groups_have_no_interval():
    drift = np.linspace(0, 1, 40)
    few = bootstrap_interval(drift[:9], ["patient"] * 9)
    assert few["low"] is None and few["value"] > 0
    assert few["reason"] == "4 blocks are too few for an interval (5)"
    assert bootstrap_interval([1.0], ["patient"])["low"] is None
    two = bootstrap_interval(drift, ["a"] * 20 + ["b"] * 20)
    assert two["low"] is None and two["reason"] == "2 groups are too few for an interval (5)"


def test_intervals_skip_what_has_no_value():
    values = [1, None, math.nan, 3, 2, 2, 2]
    groups = list("abcdefg")
    interval = bootstrap_interval(values, groups)
    assert interval["value"] == 2 and interval["low"] < 2 < interval["high"]
    assert bootstrap_interval(values, groups) == interval
    assert bootstrap_interval(values, groups, seed=1) != interval
    assert bootstrap_interval([math.nan] * 7, groups)["reason"] == "no sample has a value"


@pytest.mark.parametrize(("values", "groups"), [([], []), ([1, 2], ["a", "a", "b"])])
def test_values_and_groups_are_one_each(values, groups):
    with pytest.raises(ValueError, match="values"):
        bootstrap_interval(values, groups)


SOME_TEXTS = [EN, EN_DENIED, ZH, "The liver.", "The left kidney, a cyst of 3 mm."] * 3
SOME_REFERENCES = SOME_TEXTS[3:] + SOME_TEXTS[:3]


@pytest.mark.parametrize("score", [llamafactory_scores, standard_scores, finding_scores])
def test_every_score_has_an_interval_around_it(score):
    groups = [f"p{i % 7}" for i in range(15)]
    plain = score(SOME_TEXTS, SOME_REFERENCES)
    assert "intervals" not in plain
    scores = with_intervals(score, SOME_TEXTS, SOME_REFERENCES, groups=groups)
    numbers = {name for name, value in scores.items() if isinstance(value, float)}
    assert scores["intervals"].keys() == numbers
    for name, interval in scores["intervals"].items():
        assert interval["value"] == pytest.approx(scores[name])
        assert interval["low"] <= scores[name] <= interval["high"]
        assert interval["label"] == "over 7 groups"
    json.dumps(scores, allow_nan=False)

    # the rest is what the score gives alone
    del scores["intervals"]
    assert scores == plain
    assert with_intervals(score, SOME_TEXTS, SOME_REFERENCES, groups=None) == plain


def test_boxes_and_matches_have_intervals():
    boxes = [[0, 0, 1, (i + 1) / 8] for i in range(8)]
    groups = list("abcdefgh")
    found = with_intervals(box_scores, boxes, [[0, 0, 1, 1]] * 8, groups=groups)
    assert found["intervals"]["iou"]["low"] > 0.3
    assert found["true_boxes"] == 8

    probabilities = [0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9]
    labels = [0, 0, 0, 1, 0, 1, 1, 1]
    options = {"specificity": 0.7, "bins": 4}
    matched = with_intervals(match_scores, probabilities, labels, groups=groups, **options)
    intervals = matched.pop("intervals")
    assert matched == match_scores(probabilities, labels, **options)
    assert intervals["auroc"]["low"] < matched["auroc"] <= intervals["auroc"]["high"]


@pytest.mark.parametrize("score", [llamafactory_scores, standard_scores, finding_scores])
def test_columns_give_the_score(score):
    plain = score(SOME_TEXTS, SOME_REFERENCES)
    columns = score(SOME_TEXTS, SOME_REFERENCES, columns=True)
    assert columns.keys() == plain.keys()
    for name, value in plain.items():
        if isinstance(value, float):
            rows, statistic = columns[name]
            assert len(rows) == len(SOME_TEXTS)
            assert statistic(np.array(rows, dtype=float)) == value


def test_paired_difference():
    rng = np.random.default_rng(0)
    base = rng.normal(size=60)
    groups = np.arange(60) // 3
    tuned = base + 0.1 + 0.05 * rng.normal(size=60)  # a small gain, the same everywhere
    gain = paired_bootstrap(tuned, base, groups)
    assert gain["difference"] == pytest.approx(np.mean(tuned - base)) and gain["better"] is True

    # intervals of the two overlap, the paired one decides
    tuned_alone = bootstrap_interval(tuned, groups)
    base_alone = bootstrap_interval(base, groups)
    assert tuned_alone["low"] < base_alone["high"]
    assert paired_bootstrap(base, tuned, groups)["better"] is False
    assert paired_bootstrap(base, base, groups)["better"] is False

    few = paired_bootstrap(tuned, base, groups // 10)
    assert few["better"] is few["low"] is None and few["difference"] == gain["difference"]


def test_paired_difference_of_what_both_have():
    a = [1, None, 3, 4, 5, 9]
    b = [0, 1, math.nan, 3, 4, 8]
    assert paired_bootstrap(a, b, list("abcdef"))["difference"] == pytest.approx(1)
    with pytest.raises(ValueError, match="2 a, 1 b"):
        paired_bootstrap([1, 2], [1], ["x"])


def test_paired_difference_of_a_ratio():
    half, nothing = [[1, 2, 2]] * 6, [[0, 2, 2]] * 6
    found = paired_bootstrap(half, nothing, list("abcdef"), statistic=RATIOS["f1"])
    assert found["difference"] == 0.5
