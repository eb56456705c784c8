"""The studies of notebook 12: what runs their files ask for, and that results are summed up."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest
from scipy import stats

from medtune.runs.study import read_study

REPO = Path(__file__).parents[1]
NOTEBOOK = "12_reward_what_is_true"


@pytest.fixture(scope="module")
def study_rewards():
    """The script that sums up."""
    file = REPO / "docs" / "figures" / "study_rewards.py"
    spec = importlib.util.spec_from_file_location("study_rewards", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name, runs", [("rewards", 9), ("rewards-early", 3)])
def test_the_study_is_three_seeds_times_its_weights(tmp_path, name, runs):
    (tmp_path / "notebooks").symlink_to(REPO / "notebooks")
    shutil.copytree(
        REPO / "papermill_runs" / "rewards-base",
        tmp_path / "papermill_runs" / "rewards-base",
        ignore=shutil.ignore_patterns("out"),
    )
    done = tmp_path / "papermill_runs" / "rewards-base" / "out" / "02_convert_data"
    done.mkdir(parents=True)
    (done / "summary.json").write_text("{}")
    says, points = read_study(REPO / "papermill_runs" / f"{name}.yaml", root=tmp_path)
    assert says["before"] == ["02_convert_data"]
    of_12 = [values[NOTEBOOK] for values in points.values()]
    assert len({(values["seed"], values["missed"]) for values in of_12}) == len(of_12) == runs
    for values in points.values():
        assert values["03_finetune_lora"]["seed"] == values[NOTEBOOK]["seed"]
        assert (values["03_finetune_lora"]["max_steps"] == 150) == (name == "rewards-early")
        assert values[NOTEBOOK]["methods"] == ["DPO", "GRPO"]
        assert values[NOTEBOOK]["minutes"] > 0, "the rivals have equal minutes"


def run_of(seed: int, missed: float, gain: float) -> dict:
    """A row of the table of results: GRPO reports more findings, and no more false ones."""
    row = {"run": f"seed-{seed}_missed-{missed}", "state": "COMPLETE"}
    row[f"{NOTEBOOK}.settings.missed"] = missed
    for method, by in (("DPO", -gain), ("GRPO", gain)):
        for measure in ("sensitivity", "false alarms", "name right"):
            ahead = f"{NOTEBOOK}.minus_sft.{method}.{measure}."
            row |= {f"{ahead}difference": by, f"{ahead}low": by - 5, f"{ahead}high": by + 5}
        row[f"{NOTEBOOK}.wrong_picture_reward.{method}"] = 0.25
    row[f"{NOTEBOOK}.wrong_picture_reward.start"] = 0.25
    return row


def test_the_results_are_summed_up_by_method_weight_and_measure(
    study_rewards, tmp_path, monkeypatch, capsys
):
    rows = [run_of(seed, missed, 2.0 + 2 * seed) for seed in range(3) for missed in (-1.0, -3.0)]
    rows.append({"run": "lost", "state": "FAIL"})
    pd.DataFrame(rows).to_parquet(tmp_path / "results.parquet")
    words = [str(tmp_path / "results.parquet"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["study_rewards.py", *words])
    study_rewards.main()
    found = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    assert found["states"] == {"COMPLETE": 6, "FAIL": 1}
    by_key = {(row["method"], row["missed"], row["measure"]): row for row in found["rows"]}
    of_grpo = by_key["GRPO", -3.0, "sensitivity"]
    # of the gains 2, 4 and 6 points the last one has an interval above 0
    assert (of_grpo["difference"], of_grpo["least"], of_grpo["greatest"]) == (4.0, 2.0, 6.0)
    assert (of_grpo["runs"], of_grpo["better"], of_grpo["worse"]) == (3, 1, 0)
    spread = stats.ttest_1samp([2.0, 4.0, 6.0], 0).confidence_interval()
    assert (of_grpo["low"], of_grpo["high"]) == pytest.approx((spread.low, spread.high))
    # more false alarms are no gain
    assert (by_key["GRPO", -1.0, "false alarms"]["worse"]) == 1
    assert (by_key["DPO", -1.0, "false alarms"]["better"]) == 1
    # with three seeds the interval of 2, 4 and 6 is wide: it includes 0
    assert not any(verdict["pays"] for verdict in found["verdicts"])
    assert (tmp_path / "out" / "effects.png").stat().st_size > 1000
    assert "sensitivity" in capsys.readouterr().out


@pytest.mark.parametrize(
    "low, names, pays", [(1.0, 0.0, True), (1.0, -3.0, False), (-1.0, 0.0, False)]
)
def test_a_method_pays_if_findings_gain_and_names_hold(study_rewards, low, names, pays):
    row = {"method": "DPO", "missed": -1.0}
    rows = [
        row | {"measure": "sensitivity", "difference": 4.0, "low": low, "high": 9.0},
        row | {"measure": "name right", "difference": names, "low": -9.0, "high": 9.0},
    ]
    [verdict] = study_rewards.verdicts_of(rows)
    assert verdict["pays"] == pays and not verdict["fewer invented"]
