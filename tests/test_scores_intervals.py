"""Intervals over patients."""

import json
import math

import numpy as np
import pytest
from example_captions import EN, EN_DENIED, ZH
from hypothesis import given
from hypothesis import strategies as st

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


def clustered_answers(rng, clusters, truth, alike):
    """Draw right and wrong answers, about 17 a cluster; give them and the cluster of each.

    `alike` is the correlation of two answers of one cluster. Each cluster has its own chance to be
    right, drawn from a beta distribution whose mean is the truth.
    """
    chances = np.full(clusters, truth)
    if alike > 0:
        weight = (1 - alike) / alike
        chances = rng.beta(truth * weight, (1 - truth) * weight, clusters)
    sizes = np.maximum(1, rng.poisson(17, clusters))
    names = np.repeat(np.arange(clusters), sizes)
    return (rng.random(len(names)) < chances[names]).astype(float), names


SIMULATIONS = 500
COVERED = (0.92, 0.98)
"""What may be found for a nominal 0.95."""


def coverage(intervals, truth):
    """Give the share of the intervals that hold the truth, among those that were given."""
    given = [interval for interval in intervals if interval["low"] is not None]
    assert len(given) > 0.95 * len(intervals), "nearly all have an interval"
    covered = [interval["low"] <= truth <= interval["high"] for interval in given]
    return np.mean(covered)


@pytest.mark.parametrize("clusters", [8, 17, 40])
@pytest.mark.parametrize(("truth", "alike"), [(0.5, 0.3), (0.9, 0.0), (0.9, 0.1)])
def test_intervals_of_a_share_hold_the_truth_as_often_as_they_say(clusters, truth, alike):
    rng = np.random.default_rng(0)
    found = []
    for seed in range(SIMULATIONS):
        right, patients = clustered_answers(rng, clusters, truth, alike)
        found.append(bootstrap_interval(right, patients, resamples=60, seed=seed))
    assert COVERED[0] <= coverage(found, truth) <= COVERED[1]


@pytest.mark.parametrize(("truth", "alike"), [(0.5, 0.3), (0.9, 0.1)])
def test_slices_of_fixed_blocks_hold_the_truth_of_these_blocks(truth, alike):
    """17 slices in three blocks, as in the sample: each block has its own level."""
    rng = np.random.default_rng(1)
    shift = np.array([-0.08, 0.0, 0.08])
    found = []
    for seed in range(SIMULATIONS):
        right, blocks, slices = [], [], []
        for block, count in enumerate((5, 6, 6)):
            its_right, names = clustered_answers(rng, count, truth + shift[block], alike)
            right += its_right.tolist()
            blocks += [f"held-out-block-{block}"] * len(names)
            slices += names.tolist()
        interval = bootstrap_interval(right, blocks, slices=slices, resamples=60, seed=seed)
        found.append(interval)
    # the blocks have about as many samples a slice, so their truths weigh as their slices do
    whole = truth + np.average(shift, weights=(5, 6, 6))
    assert found[0]["label"] == "within one patient, blocks fixed: 17 slices"
    assert COVERED[0] <= coverage(found, whole) <= COVERED[1]


@pytest.mark.parametrize("clusters", [8, 17])
@pytest.mark.parametrize("alike", [0.0, 0.1])
def test_intervals_of_a_difference_hold_the_truth_as_often_as_they_say(clusters, alike):
    """A tuned model at 0.9 against one that is hardly ever right, where the difference is skewed."""
    rng = np.random.default_rng(2)
    found = []
    for seed in range(SIMULATIONS):
        tuned, patients = clustered_answers(rng, clusters, 0.9, alike)
        other = (rng.random(len(tuned)) < 0.02).astype(float)
        found.append(paired_bootstrap(tuned, other, patients, resamples=60, seed=seed))
    assert COVERED[0] <= coverage(found, 0.88) <= COVERED[1]


def test_intervals_of_a_mean_without_limits_hold_the_truth():
    rng = np.random.default_rng(3)
    patients = np.repeat(np.arange(8), 6)
    found = {"by patient": [], "by sample": []}
    for seed in range(SIMULATIONS):
        values = (rng.normal(size=(8, 1)) + 0.3 * rng.normal(size=(8, 6))).ravel()
        for name, groups in (("by patient", patients), ("by sample", range(48))):
            interval = bootstrap_interval(values, groups, resamples=60, seed=seed)
            found[name].append(interval)
    assert COVERED[0] <= coverage(found["by patient"], 0) <= COVERED[1]
    assert coverage(found["by sample"], 0) < 0.7, "single samples would cover far too seldom"


def test_slices_of_one_patient_are_drawn_whole_and_within_their_blocks():
    drift = np.linspace(0, 1, 40)  # neighbours are alike
    slices = np.arange(40) // 4
    one = bootstrap_interval(drift, ["patient"] * 40, slices=slices)
    assert one["label"] == "within one patient: 10 slices" and one["groups"] == 10
    blocks = [f"held-out-block-{i // 20}" for i in range(40)]
    fixed = bootstrap_interval(drift, blocks, slices=slices)
    assert fixed["label"] == "within one patient, blocks fixed: 10 slices"
    # what lies between the blocks is no chance: they are the same in each resample
    assert fixed["error"] < 0.7 * one["error"]
    # slices drawn whole are fewer than their samples
    each_alone = bootstrap_interval(drift, ["patient"] * 40, slices=range(40))
    assert one["error"] > 1.5 * each_alone["error"]

    # the order of the samples does not matter, nor what slices are called
    order = np.random.default_rng(0).permutation(40)
    shuffled = bootstrap_interval(
        drift[order],
        [blocks[i] for i in order],
        slices=[f"slice {slices[i]}" for i in order],
    )
    for key in ("value", "low", "high", "error"):
        assert shuffled[key] == pytest.approx(fixed[key])
    # the number 3 of one block is not the number 3 of the other
    numbered_anew = bootstrap_interval(drift, blocks, slices=slices % 5)
    assert numbered_anew == fixed
    # patients are drawn whole, whatever slices they have
    patients = [f"p{i // 4}" for i in range(40)]
    many = bootstrap_interval(drift, patients, slices=range(40))
    assert many == bootstrap_interval(drift, patients) and many["label"] == "over 10 groups"


def test_no_interval_is_narrower_than_that_of_independent_samples():
    """Each slice shows the same ten structures, of which three are always named wrong."""
    right = [1.0] * 7 + [0.0] * 3
    values = right * 17
    slices = np.repeat(np.arange(17), 10)
    blocks = [f"held-out-block-{slice_ // 6}" for slice_ in slices]
    found = bootstrap_interval(values, blocks, slices=slices, resamples=4000)
    binomial = math.sqrt(0.7 * 0.3 / 170)
    assert found["error"] == pytest.approx(binomial, rel=0.05)
    # on log-odds it is a little shorter than the textbook's, as Wilson's is
    assert found["high"] - found["low"] > 0.95 * 2 * 1.96 * found["error"]


def test_a_block_of_one_slice_is_drawn_with_its_neighbour():
    values = [0.2, 0.8, 0.4, 0.9, 0.5, 0.7]
    blocks = ["block-0"] * 3 + ["block-1"] + ["block-2"] * 2
    lone = bootstrap_interval(values, blocks, slices=range(6))
    joined = ["block-0"] * 4 + ["block-2"] * 2
    assert lone["error"] == bootstrap_interval(values, joined, slices=range(6))["error"] > 0
    last = bootstrap_interval(values, ["block-0"] * 5 + ["block-1"], slices=range(6))
    assert last["error"] == bootstrap_interval(values, ["x"] * 6, slices=range(6))["error"]


def test_one_patient_without_slices_has_no_interval():
    drift = np.linspace(0, 1, 40)
    for groups in (["patient"] * 40, [f"block-{i // 4:02d}" for i in range(40)]):
        for slices in (None, [None] * 40):
            found = bootstrap_interval(drift, groups, slices=slices)
            assert found["low"] is found["high"] is None and found["value"] == 0.5
            assert found["label"] == "within one patient"
            assert "slices are not known" in found["reason"]
    compared = paired_bootstrap(drift, 2 * drift, ["patient"] * 40)
    assert compared["better"] is compared["decided"] is None


def test_too_few_groups_have_no_interval():
    drift = np.linspace(0, 1, 40)
    few = bootstrap_interval(drift[:9], ["patient"] * 9, slices=np.arange(9) // 3)
    assert few["low"] is None and few["value"] > 0
    assert few["reason"] == "3 slices are too few for an interval (5)"
    assert bootstrap_interval([1.0], ["patient"], slices=[1])["low"] is None
    two = bootstrap_interval(drift, ["a"] * 20 + ["b"] * 20)
    assert two["low"] is None and two["reason"] == "2 groups are too few for an interval (5)"
    # a group without a value says nothing
    unknown = bootstrap_interval([1, 0, 1, None, None, None], list("abcdef"))
    assert unknown["reason"] == "3 groups are too few for an interval (5)"


def test_where_all_agree_there_is_no_interval_and_yet_a_verdict():
    groups = list("abcdefgh")
    always = bootstrap_interval([1] * 8, groups)
    assert always["value"] == 1 and always["low"] is None and always["error"] == 0
    assert always["reason"] == "all 8 groups agree, so that resamples show no error"
    better = paired_bootstrap([1] * 8, [0] * 8, groups)
    assert better["low"] is None and better["decided"] is better["better"] is True
    worse = paired_bootstrap([0] * 8, [1] * 8, groups)
    assert worse["decided"] is True and worse["better"] is False
    same = paired_bootstrap([1] * 8, [1] * 8, groups)
    assert same["decided"] is same["better"] is False
    # five coins fall alike once in sixteen times
    five = paired_bootstrap([1] * 5, [0] * 5, groups[:5])
    assert five["decided"] is five["better"] is False


@given(
    st.lists(st.sampled_from([0.0, 0.5, 1.0, math.nan]), min_size=1, max_size=40),
    st.integers(1, 12),
    st.integers(1, 4),
)
def test_ends_lie_around_the_value_and_within_the_limits(values, slices_a_block, blocks):
    groups = [f"block-{i % blocks}" for i in range(len(values))]
    slices = [i % slices_a_block for i in range(len(values))]
    found = bootstrap_interval(values, groups, slices=slices, resamples=50)
    assert (found["low"] is None) == (found["reason"] is not None)
    if found["low"] is not None:
        assert 0 <= found["low"] <= found["value"] <= found["high"] <= 1


def test_a_statistic_may_name_its_limits():
    values = [98.0, 99.5, 100.0, 100.0, 100.0, 100.0, 97.0]
    groups = list("abcdefg")
    assert bootstrap_interval(values, groups)["high"] > 100
    assert 99 < bootstrap_interval(values, groups, bounds=(0, 100))["high"] < 100

    def percent(rows):
        return rows.mean()

    percent.bounds = (0, 100)
    named = bootstrap_interval(values, groups, statistic=percent)
    assert named == bootstrap_interval(values, groups, bounds=(0, 100))


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
        if interval["error"] in (None, 0):
            # the areas that three groups name, or what all groups have alike
            assert interval["low"] is None and "groups" in interval["reason"]
        else:
            assert interval["low"] < scores[name] < interval["high"]
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
