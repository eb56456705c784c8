"""The README's figures: computed from the committed reference runs, and good enough to teach with."""

import json
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest

REPO = Path(__file__).parents[1]
sys.path.insert(0, str(REPO / "docs" / "figures"))
import results_figure  # noqa: E402
import results_table  # noqa: E402


@pytest.fixture(scope="module")
def runs() -> list[dict]:
    return results_table.read_runs()


def average(runs: list[dict], key: str, column: str) -> float:
    return mean(run[key][column] for run in runs)


def average_found(runs: list[dict], measure: str, who: str) -> float:
    return mean(run["detection"][measure][who] for run in runs)


def test_the_readme_holds_the_table_of_the_runs():
    script = REPO / "docs" / "figures" / "results_table.py"
    done = subprocess.run(
        [sys.executable, script, "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_it_learned_from_the_picture(runs):
    assert len(runs) == 3 and len({run["training"]["seed"] for run in runs}) == 3
    assert all(run["names_in_references"] >= 30 for run in runs)
    assert average(runs, "name_accuracy", "tuned") >= 30
    floor = mean(run["most_frequent_name"]["name_accuracy"] for run in runs)
    assert average(runs, "name_accuracy", "shuffled") <= floor + 3
    for run in runs:
        for measure in ("name right", "word BLEU-4"):
            assert run["paired"]["tuned_minus_shuffled"][measure]["low"] > 0


def test_the_base_knew_the_place_and_no_name(runs):
    assert average(runs, "name_accuracy", "base") == 0
    assert average(runs, "place_accuracy", "tuned") >= average(runs, "place_accuracy", "base") - 5


def test_the_heads_of_the_tiny_run_locate_and_verify():
    reference = REPO / "papermill_runs" / "reference" / "tiny-cpu" / "summary.json"
    summary = json.loads(reference.read_text("utf-8"))["notebooks"]["07_locate_verify_diagnose"]
    assert summary["n"] >= 290
    assert summary["match"]["auroc"] > 0.75
    assert summary["iou"]["model"] > 2 * summary["iou"]["constant mean box"]


def test_a_measure_without_a_value_is_not_scored(runs):
    """The base was never taught the words for findings; a seed may have no interval."""
    assert results_table._cell([None, 86.3, 89.1], 1) == "not scored"
    changed = json.loads(json.dumps(runs))
    for run in changed:
        run["detection"]["sensitivity"]["base"] = None
    changed[1]["paired"]["tuned_minus_shuffled"]["name right"]["low"] = None
    for language in (1, 2):
        table = results_table.build_table(changed, language)
        finding = next(
            line for line in table.splitlines() if results_table.ROWS[2][language] in line
        )
        assert finding.split("|")[2].strip() == results_table.NOT_SCORED[language]
    gain = results_table.Gain.of(changed, "name right")
    assert gain.low is gain.high is None and " to " not in str(gain)
    # the envelope reaches over the intervals of all seeds
    envelope = results_table.Gain.of(runs, "name right")
    for run in runs:
        interval = run["paired"]["tuned_minus_shuffled"]["name right"]
        assert envelope.low <= interval["low"] < interval["high"] <= envelope.high


def test_the_figure_leaves_out_what_is_not_scored(runs, tmp_path):
    changed = json.loads(json.dumps(runs))
    for run in changed:
        run["detection"]["sensitivity"]["shuffled"] = None
    people = results_figure.read_people()
    drawn = results_figure.bars(changed, people)
    assert drawn["sensitivity"]["shuffled"] is None
    results_figure.draw(drawn, 3, 1, tmp_path / "figure.svg")
    assert results_figure.shown(tmp_path / "figure.svg") == drawn


def test_the_figure_shows_the_numbers_of_the_runs():
    script = REPO / "docs" / "figures" / "results_figure.py"
    done = subprocess.run(
        [sys.executable, script, "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_findings_are_seen_and_not_read_off_the_words(runs):
    for run in runs:
        assert run["detection"]["sensitivity"]["base"] is None
        assert run["auroc_at_deciding_word"]["right_picture"] > 0.8
        assert run["auroc_at_deciding_word"]["wrong_picture"] < 0.65
    assert average_found(runs, "sensitivity", "tuned") > average_found(
        runs, "sensitivity", "no_pixel"
    )
