"""What is kept of the full study that was run once: its verdicts follow from its table."""

import importlib.util
import json
from pathlib import Path

import pandas as pd
import pytest
import yaml
from scipy import stats

REPO = Path(__file__).parents[1]
KEPT = REPO / "papermill_runs" / "reference" / "study-knobs"


@pytest.fixture(scope="module")
def judge():
    """The script that judges the study, as a module."""
    file = REPO / "docs" / "figures" / "study_knobs.py"
    spec = importlib.util.spec_from_file_location("study_knobs", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("intervals", "expected"),
    [
        ([(1, 5), (0.5, 9)], "supported"),
        ([(1, 5), (-9, -1)], "not supported"),
        ([(-1.5, 1.9), (-0.5, 1.5)], "not supported"),
        ([(1, 5), (-3, 9)], "undecided"),
    ],
)
def test_a_verdict_follows_from_the_intervals(judge, intervals, expected):
    effects = []
    for low, high in intervals:
        effects.append({"claim": "better", judge.NAMES: {"low": low, "high": high}})
    assert judge.verdict(effects) == expected


def test_an_interval_over_seeds_is_scipys(judge):
    values = [1.0, 2.0, 4.5]
    low, high = stats.ttest_1samp(values, 0).confidence_interval()
    found = judge.interval(values)
    assert (found["low"], found["high"]) == pytest.approx((low, high))


@pytest.mark.skipif(not KEPT.is_dir(), reason="the full study has not been run yet")
def test_what_is_kept_of_the_full_study_follows_from_its_table(judge):
    everything = pd.read_parquet(KEPT / "results.parquet")
    table = judge.load(KEPT / "results.parquet")
    assert len(everything) >= 100 and table["seed"].nunique() == 3
    kept = json.loads((KEPT / "verdicts.json").read_text("utf-8"))
    again = json.loads(json.dumps(judge.judge(table)))
    assert [(v["claim"], v["verdict"]) for v in again] == [(v["claim"], v["verdict"]) for v in kept]
    page = (REPO / "docs" / "knobs.md").read_text("utf-8")
    for verdict in kept:
        row = f"| {verdict['recipe']} | {verdict['claim']} | **{verdict['verdict']}** |"
        assert row in page
    says = yaml.safe_load((REPO / "papermill_runs" / "knobs.yaml").read_text("utf-8"))
    factors = set()
    for grid in says["factors"]:
        factors |= set(grid)
    assert len(factors - {"seed"}) >= 5
