"""The ladder and the rivals of benchmarks/train.py: which settings are measured."""

import json
import os
import subprocess
import sys

import pytest
from tiny_models import REPO

sys.path.insert(0, str(REPO / "benchmarks"))
from _train_ladder import results_table  # noqa: E402
from _train_rivals import RIVALS, ROWS, read_notes  # noqa: E402
from _train_rungs import LADDER, RUNGS  # noqa: E402

OTHER_PROGRAM = """
import inspect, sys, torch
from transformers import Trainer, TrainingArguments

assert "processing_class" in inspect.signature(Trainer.__init__).parameters

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def forward(self, x, labels):
        return {"loss": (self.layer(x) - labels).pow(2).mean()}

if __name__ == "__main__":
    rows = [{"x": torch.ones(1), "labels": torch.zeros(1)}] * 24
    args = TrainingArguments(
        sys.argv[1], max_steps=4, per_device_train_batch_size=3, gradient_accumulation_steps=2,
        logging_steps=1, learning_rate=0.1, save_strategy="no", use_cpu=True, report_to="none",
    )
    Trainer(Model(), args, train_dataset=rows).train()
"""


def test_no_rung_asks_for_what_does_not_load():
    """Liger's kernels fail with this Transformers; once a rung inherited them from another."""
    for name, rung in RUNGS.items():
        assert not rung.settings.get("use_liger_kernel"), name


def test_each_rung_changes_something_of_the_one_above_it():
    names = list(LADDER)
    for above, name in zip(names[:-1], names[1:], strict=True):
        assert RUNGS[above] != RUNGS[name], name
        for key, value in LADDER[name][0].items():
            assert RUNGS[name].settings[key] == value


@pytest.mark.parametrize("rival", RIVALS)
def test_a_rival_has_three_rows_of_which_two_are_compared(rival):
    rows = {name: row for name, row in ROWS.items() if row.rival == rival}
    assert [bool(row.beside) for row in rows.values()] == [False, True, True]
    equal = rows[f"{rival}_equal"]
    ours = RUNGS[equal.beside].settings
    assert equal.settings["per_device_train_batch_size"] == ours["per_device_train_batch_size"]
    assert equal.settings["gradient_accumulation_steps"] == 1
    # neither computes activations twice, and both compute in bfloat16
    off = {"disable_gradient_checkpointing": True, "gradient_checkpointing": False}
    assert off.items() & equal.settings.items()
    assert not ours.get("activation_checkpointing") and ours["bf16"]
    # on top of equal settings, what else it offers
    assert rows[f"{rival}_best"].settings.items() > {"use_liger_kernel": True}.items()


def test_the_clock_stands_in_a_training_of_another_program(tmp_path):
    """The other program is a file that trains with a Trainer of Transformers."""
    (tmp_path / "other_program.py").write_text(OTHER_PROGRAM)
    notes = tmp_path / "notes.json"
    command = [sys.executable, REPO / "benchmarks" / "_train_clock.py", notes, "other_program"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    subprocess.run([*command, tmp_path / "run"], env=environment, check=True, timeout=100)
    read = read_notes(notes)
    assert (read["steps"], read["batch"]) == (4, 6)
    assert read["samples_per_second"] > 0
    assert read["last_loss"] < read["first_loss"]


def test_the_table_shows_all_three_and_a_ratio_for_two(tmp_path):
    speeds = {
        "swift": 9.0,
        "swift_equal": 40.0,
        "swift_best": 60.0,
        "fast64": 100.0,
        "fast96": 120.0,
    }
    with open(tmp_path / "results.jsonl", "w", encoding="utf-8") as file:
        for rung, speed in speeds.items():
            row = {"rung": rung, "samples_per_second": speed, "first_loss": 8.0, "last_loss": 7.0}
            file.write(json.dumps(row) + "\n")
    table = results_table(tmp_path).splitlines()
    for rung in speeds:
        assert any(line.startswith(f"| {rung} |") and "7.0000" in line for line in table)
    ratios = [line for line in table if "times as fast" in line]
    assert ratios == [
        "fast64 beside swift_equal: 2.50 times as fast",
        "fast96 beside swift_best: 2.00 times as fast",
    ]
