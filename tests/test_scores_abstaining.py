"""When not to answer: the promise of the threshold holds where questions are exchangeable."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import auc

from medtune.scores import calibration_table, choose_threshold, risk_coverage


def questions(rng, n, *, knows=2.0):
    """Answers whose confidence says something about their being right."""
    ease = rng.normal(0, 1, n)
    wrong = rng.random(n) < 1 / (1 + np.exp(knows * ease))
    confidence = 1 / (1 + np.exp(-ease + rng.normal(0, 0.5, n)))
    return confidence, wrong


@pytest.mark.parametrize(("n", "risk"), [(60, 0.1), (200, 0.05), (500, 0.02)])
def test_the_promise_is_kept_on_average_and_not_by_answering_nothing(n, risk):
    rng = np.random.default_rng(n)
    found, coverage = [], []
    for _ in range(400):
        threshold = choose_threshold(*questions(rng, n), risk=risk)
        rated = threshold.rate(*questions(rng, 400))
        found.append(rated["answered_wrong"])
        coverage.append(rated["coverage"])
    error = np.std(found) / np.sqrt(len(found))
    assert np.mean(found) <= risk + 3 * error
    # the loss is at most 2 / (n + 1) below the risk where every answer has a confidence of its own
    assert np.mean(found) >= risk - 2 / (n + 1) - 3 * error
    # and as much is answered as whoever knew all questions would answer
    known = choose_threshold(*questions(rng, 200_000), risk=risk)
    assert np.mean(coverage) == pytest.approx(known.coverage, abs=0.06)


def test_another_kind_of_question_breaks_the_promise():
    rng = np.random.default_rng(0)
    threshold = choose_threshold(*questions(rng, 2000), risk=0.05)
    confidence, wrong = questions(rng, 2000, knows=-2.0)
    assert threshold.rate(confidence, wrong)["answered_wrong"] > 0.15


rows = st.lists(
    st.tuples(st.sampled_from([0.1, 0.3, 0.5, 0.9, math.nan]), st.booleans()), min_size=1
)


@settings(deadline=None)
@given(rows=rows, risk=st.floats(0.01, 0.99))
def test_the_threshold_is_the_lowest_that_may_be(rows, risk):
    confidence, wrong = zip(*rows, strict=True)
    chosen = choose_threshold(confidence, wrong, risk=risk)
    n = len(rows)
    best = math.inf
    for value in sorted({c for c in confidence if not math.isnan(c)}, reverse=True):
        errors = sum(w for c, w in rows if c >= value)
        if errors + 1 > risk * (n + 1) + 1e-9:
            break
        best = value
    assert chosen.value == best
    rated = chosen.rate(confidence, wrong)
    assert rated["coverage"] == chosen.coverage and rated["answered_wrong"] == chosen.found


@settings(deadline=None)
@given(rows=rows)
def test_the_curve_ends_at_the_share_of_errors_and_no_order_of_ties_matters(rows):
    confidence, wrong = zip(*rows, strict=True)
    coverage, risk, area = risk_coverage(confidence, wrong)
    assert coverage[-1] == 1 and risk[-1] == pytest.approx(np.mean(wrong))
    turned = risk_coverage(confidence[::-1], wrong[::-1])
    assert turned[1] == pytest.approx(risk) and turned[2] == pytest.approx(area)


def test_the_area_is_that_of_the_curve():
    rng = np.random.default_rng(1)
    confidence, wrong = questions(rng, 5000)
    coverage, risk, area = risk_coverage(confidence, wrong)
    assert area == pytest.approx(auc(coverage, risk), abs=0.002)
    guessed = risk_coverage(rng.random(5000), wrong)[2]
    assert area < guessed - 0.1 and guessed == pytest.approx(wrong.mean(), abs=0.03)


def test_a_calibrated_confidence_has_a_small_error():
    rng = np.random.default_rng(2)
    confidence = rng.random(20_000)
    wrong = rng.random(20_000) > confidence
    table, error = calibration_table(confidence, wrong)
    assert len(table) == 10 and sum(row["answers"] for row in table) == 20_000
    assert error < 0.02
    assert calibration_table(confidence**0.3, wrong)[1] > 0.15


def test_what_cannot_be_judged_is_refused():
    with pytest.raises(ValueError, match="there are no questions"):
        choose_threshold([], [])
    with pytest.raises(ValueError, match="wrong has 1 values"):
        risk_coverage([0.1, 0.2], [True])
    with pytest.raises(ValueError, match="risk=2"):
        choose_threshold([0.1], [True], risk=2)
    with pytest.raises(ValueError, match="no answer has one"):
        calibration_table([math.nan], [True])
    with pytest.raises(ValueError, match="from 0 to 1"):
        calibration_table([1.5], [True])


def test_few_questions_promise_nothing_and_say_so():
    chosen = choose_threshold([0.9] * 10, [False] * 10, risk=0.05)
    assert chosen.value == math.inf and chosen.coverage == 0
    assert math.isnan(chosen.rate([0.99], [False])["risk"])
