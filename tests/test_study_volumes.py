"""The study of notebook 11: three seeds a setting, and results that are summed up as they are."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from scipy import stats

from medtune.runs.study import read_study

REPO = Path(__file__).parents[1]
NOTEBOOK = "11_volumes_priors_records"
CHANGE = f"{NOTEBOOK}.differences.earlier swapped.change"


def test_each_setting_has_three_seeds(tmp_path):
    (tmp_path / "notebooks").symlink_to(REPO / "notebooks")
    shutil.copytree(
        REPO / "papermill_runs" / "volumes-base",
        tmp_path / "papermill_runs" / "volumes-base",
        ignore=shutil.ignore_patterns("out"),
    )
    says, points = read_study(REPO / "papermill_runs" / "volumes.yaml", root=tmp_path)
    assert says["before"] == []
    seeds = {}
    for values in points.values():
        settings = values[NOTEBOOK]
        assert settings["eval_samples"] == 0, "all held-out questions"
        setting = settings["learning_rate"], settings["lora_r"]
        seeds.setdefault(setting, []).append(settings["seed"])
    assert len(seeds) == 3
    assert all(sorted(found) == [0, 1, 2] for found in seeds.values())


def run_of(seed: int, rate: float, gain: float) -> dict:
    """A row of the table of results."""
    return {
        "run": f"seed-{seed}_learning_rate-{rate}",
        "state": "COMPLETE",
        "seed": seed,
        "learning_rate": rate,
        "max_steps": 1200,
        f"{NOTEBOOK}.scores.base.change": 85.0,
        f"{NOTEBOOK}.scores.tuned.change": 80.0 + seed,
        f"{NOTEBOOK}.scores.earlier swapped.change": 40.0,
        f"{CHANGE}.difference": gain,
        f"{CHANGE}.low": gain - 5,
        f"{CHANGE}.high": gain + 5,
    }


def sum_up(rows: list[dict], folder: Path) -> subprocess.CompletedProcess:
    pd.DataFrame(rows).to_parquet(folder / "results.parquet")
    script = REPO / "docs" / "figures" / "study_volumes.py"
    command = [sys.executable, script, folder / "results.parquet", "--out", folder / "out"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_results_are_summed_up_by_setting(tmp_path):
    gains = {5e-3: [2.0, 4.0, 30.0], 2e-3: [40.0, 41.0, 42.0]}
    rows = [run_of(seed, rate, gains[rate][seed]) for rate in gains for seed in range(3)]
    rows.append({"run": "lost", "state": "FAIL"})
    done = sum_up(rows, tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    assert found["states"] == {"COMPLETE": 6, "FAIL": 1}
    assert list(found["settings"]) == ["learning_rate 0.005", "learning_rate 0.002"]
    high_rate, low_rate = found["settings"].values()
    assert [row["who"] for row in low_rate["scores"]] == ["base", "tuned"]
    assert low_rate["scores"][1]["mean"] == 81.0
    [control] = low_rate["controls"]
    assert (control["control"], control["part"]) == ("earlier swapped", "change")
    assert (control["mean"], control["passed"], control["passed_alone"]) == (41.0, True, 3)
    spread = stats.ttest_1samp(gains[2e-3], 0).confidence_interval()
    assert (control["low"], control["high"]) == pytest.approx((spread.low, spread.high))
    # one seed alone is sure; over the seeds the interval includes 0
    [control] = high_rate["controls"]
    assert (control["passed"], control["passed_alone"]) == (False, 1)
    assert (tmp_path / "out" / "controls.png").stat().st_size > 1000
    assert "1 of 1 controls are passed over the seeds" in done.stdout


def test_a_study_without_a_finished_run_is_refused(tmp_path):
    done = sum_up([{"run": "lost", "state": "FAIL"}], tmp_path)
    assert done.returncode == 1
    assert "no finished run" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
