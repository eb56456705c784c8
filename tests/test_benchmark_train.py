"""The ladder and the rivals of benchmarks/train.py: which settings are measured."""

import json
import sys

from tiny_models import REPO

sys.path.insert(0, str(REPO / "benchmarks"))
from _train_ladder import results_table  # noqa: E402
from _train_peer import ROWS  # noqa: E402
from _train_rungs import LADDER, RUNGS  # noqa: E402


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


def test_a_rival_has_three_rows_of_which_two_are_compared():
    assert [bool(row.beside) for row in ROWS.values()] == [False, True, True]
    equal = ROWS["peer_equal"]
    ours = RUNGS[equal.beside].settings
    assert equal.settings["per_device_train_batch_size"] == ours["per_device_train_batch_size"]
    assert equal.settings["gradient_accumulation_steps"] == 1
    # neither computes activations twice, and both compute in bfloat16
    assert equal.settings["disable_gradient_checkpointing"]
    assert not ours.get("activation_checkpointing") and ours["bf16"]
    # on top of equal settings, what else it offers
    assert ROWS["peer_best"].settings.items() > {"use_liger_kernel": True}.items()


def test_the_table_shows_all_three_and_a_ratio_for_two(tmp_path):
    speeds = {"peer": 9.0, "peer_equal": 40.0, "peer_best": 60.0, "fast64": 100.0, "fast96": 120.0}
    with open(tmp_path / "results.jsonl", "w", encoding="utf-8") as file:
        for rung, speed in speeds.items():
            row = {"rung": rung, "samples_per_second": speed, "first_loss": 8.0, "last_loss": 7.0}
            file.write(json.dumps(row) + "\n")
    table = results_table(tmp_path).splitlines()
    for rung in speeds:
        assert any(line.startswith(f"| {rung} |") and "7.0000" in line for line in table)
    ratios = [line for line in table if "times as fast" in line]
    assert ratios == [
        "fast64 beside peer_equal: 2.50 times as fast",
        "fast96 beside peer_best: 2.00 times as fast",
    ]
