"""The planner against peaks recorded on a GPU, and against what must hold of any plan."""

import json
import sys

import pytest
from tiny_models import REPO

from medtune import cli
from medtune.plan import estimate, model_facts, model_names, recommend, smallest_card
from medtune.plan.memory import CARDS

MEASURED = REPO / "papermill_runs" / "reference" / "planner-h200" / "measured.json"


# --- recorded figures ----------------------------------------------------------------------------


def measured_rows() -> list[dict]:
    """All that was recorded."""
    return json.loads(MEASURED.read_text("utf-8"))


def measured_trainings() -> list[dict]:
    """Recorded training runs of a GPU."""
    return [row for row in measured_rows() if row["method"] != "generate"]


def measured_answers() -> list[dict]:
    """Recorded generation on a GPU."""
    return [row for row in measured_rows() if row["method"] == "generate"]


@pytest.fixture(scope="module")
def planner_table():
    """The script that writes the committed table."""
    sys.path.insert(0, str(REPO / "docs" / "figures"))
    import planner_table as module

    return module


@pytest.mark.slow
def test_the_planner_meets_every_measured_peak_within_a_tenth(planner_table):
    """Peaks of TRL's SFTTrainer on an H200; rows marked check came after the planner was fitted."""
    rows = [row for row in measured_trainings() if "peak_gb" in row]
    families = {model_facts(row["model"])["config"]["model_type"] for row in rows}
    assert len(rows) >= 12
    assert families >= {"qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "gemma3"}
    assert sum(row["set"] == "check" for row in rows) >= 8
    far_off = {}
    for row in rows:
        found = estimate(row["model"], **planner_table.options_of(row))
        error = found["peak"] / row["peak_gb"] - 1
        if abs(error) > 0.1:
            far_off[str(row)] = error
    assert not far_off


def test_the_planner_meets_the_measured_peaks_of_generation_within_a_tenth(planner_table):
    rows = measured_answers()
    models = {row["model"] for row in rows}
    assert models >= {"Qwen/Qwen3-VL-2B-Instruct", "google/gemma-3-4b-it"}
    for row in rows:
        assert planner_table.planned(row) == pytest.approx(row["peak_gb"], rel=0.1)


def test_the_planner_never_says_fits_where_memory_ran_out(planner_table):
    ran_out = [row for row in measured_trainings() if row.get("error") == "out of memory"]
    assert ran_out
    for row in ran_out:
        assert not estimate(row["model"], **planner_table.options_of(row))["fits"]
    for row in measured_trainings():
        if "reserved_gb" in row:
            # a card as large as what PyTorch had reserved would have been just enough
            options = planner_table.options_of(row) | {"gpu_gb": row["peak_gb"]}
            assert not estimate(row["model"], **options)["fits"]


def test_the_committed_table_is_that_of_the_recorded_figures(planner_table):
    text = (MEASURED.parent / "README.md").read_text("utf-8")
    assert planner_table.table(measured_trainings()) in text
    assert planner_table.table(measured_answers()) in text


def test_later_measurements_are_added_to_those_that_stand(planner_table, tmp_path, monkeypatch):
    kept = measured_rows()
    (tmp_path / "measured.json").write_text(json.dumps(kept), "utf-8")
    monkeypatch.setattr(planner_table, "FOLDER", tmp_path)
    configuration = {
        "model": "Qwen/Qwen3.5-2B",
        "method": "lora",
        "target": "language",
        "batch": 8,
        "pixels": 512,
        "checkpointing": True,
        "options": {"r": 16},
    }
    measured = {
        "device": "NVIDIA H200",
        "batch_shapes": {"input_ids": [8, 348]},
        "peak": 6.0e9,
        "weights": 4.4e9,
        "reserved": 6.2e9,
        "steps": [],
        "samples_per_second": 20.0,
    }
    later = [configuration | measured, configuration | {"error": "took longer than 60 s"}]
    file = tmp_path / "later.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in later), "utf-8")
    monkeypatch.setattr(sys, "argv", ["planner_table.py", "--add", str(file)])
    planner_table.main()
    rows = json.loads((tmp_path / "measured.json").read_text("utf-8"))
    assert rows[:-1] == kept
    assert (rows[-1]["model"], rows[-1]["set"], rows[-1]["peak_gb"]) == (
        "Qwen/Qwen3.5-2B",
        "check",
        6.0,
    )
    assert "| Qwen3.5-2B | lora language, r 16, checkpointing | 8 | 348 | 6.0 |" in (
        tmp_path / "README.md"
    ).read_text("utf-8")


def test_accumulation_costs_what_a_rehearsal_took():
    """Gemma-3 of planner-h200: 19.03 GB in steps of two batches, 16.257 in steps of one."""
    options = {
        "method": "qlora",
        "target": "all-linear",
        "lora_r": 16,
        "lora_dropout": 0.05,
        "modules_to_save": ("lm_head", "embed_tokens"),
    }
    one = estimate("google/gemma-3-4b-pt", accumulation=False, **options)
    several = estimate("google/gemma-3-4b-pt", accumulation=True, **options)
    assert one["peak"] == pytest.approx(16.257, rel=0.02)
    assert several["peak"] == pytest.approx(19.03, rel=0.02)


# --- what must hold of any plan ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "grows"),
    [
        ({"batch_size": 2}, "activations"),
        ({"image_size": 1024}, "activations"),
        ({"text_tokens": 1000}, "activations"),
        ({"lora_r": 64}, "adapter"),
        ({"modules_to_save": ("lm_head",)}, "optimizer"),
        ({"new_tokens": 1000}, "kv_cache"),
        ({"new_tokens": 100_000}, "generation"),
        ({"checkpointing": False}, "activations"),
        ({"method": "full"}, "gradients"),
        ({"dtype": "float32"}, "weights"),
    ],
    ids=str,
)
def test_more_takes_more(change, grows):
    base = estimate("Qwen3-VL-2B-Instruct", batch_size=1)
    more = estimate("Qwen3-VL-2B-Instruct", **{"batch_size": 1, **change})
    assert more[grows] > base[grows]


def test_zero_splits_what_it_says():
    plans = {}
    for stage in (1, 2, 3):
        plans[stage] = estimate("Qwen3-VL-2B-Instruct", method="full", gpus=4, zero_stage=stage)
    one, two, three = plans[1], plans[2], plans[3]
    assert two["weights"] == one["weights"] == pytest.approx(4 * three["weights"], rel=1e-3)
    assert one["gradients"] == pytest.approx(4 * two["gradients"], rel=1e-3)
    assert one["optimizer"] == two["optimizer"] == three["optimizer"]
    assert one["peak"] >= two["peak"] > three["peak"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Qwen3-VL-2B-Instruct", {"gpu_gb": 24}),
        ("gemma-3-4b-it", {"gpu_gb": 16, "method": "qlora"}),
        ("Qwen3-VL-30B-A3B-Instruct", {"gpu_gb": 80, "gpus": 4, "target": "attention"}),
    ],
    ids=str,
)
def test_the_recommendation_fits_and_the_next_larger_batch_does_not(name, options):
    found = recommend(name, **options)
    assert found["fits"]
    larger = estimate(
        name,
        **options,
        checkpointing=found["checkpointing"],
        zero_stage=found["zero_stage"],
        batch_size=2 * found["batch_size"],
    )
    assert not larger["fits"] or found["batch_size"] == 64


def test_the_30b_fits_one_large_card_or_four_small_ones():
    name = "Qwen3-VL-30B-A3B-Instruct"
    found = recommend(name, gpu_gb=80, gpus=4, target="attention")
    assert found["zero_stage"] == 0
    assert found["weights"] > 60, "it fits one card of 80 GB beside its activations"
    nothing = recommend(name, gpu_gb=24, target="attention")
    assert not nothing["fits"]
    assert nothing["batch_size"] == 1
    split = recommend(name, gpu_gb=24, gpus=4, target="attention")
    assert split["fits"]
    assert split["zero_stage"] == 3


def test_time_and_disk_of_a_plan():
    found = estimate(
        "Qwen3-VL-30B-A3B-Instruct", target="attention", pairs=36000, samples_per_second=10
    )
    assert found["hours_per_epoch"] == 1
    assert found["download"] == pytest.approx(62.1, abs=0.1)
    assert found["disk"] > 2 * found["download"]
    with pytest.raises(ValueError, match="lora, qlora or full"):
        estimate("Qwen3-VL-2B-Instruct", method="dora")


def test_the_command_plans(capsys):
    name = "Qwen/Qwen3-VL-2B-Instruct"
    options = ["--batch-size", "4", "--no-checkpointing", "--gpu-gb", "24"]
    with pytest.raises(SystemExit) as end:
        cli.main(["plan", name, *options])
    assert not end.value.code
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    found = estimate(name, batch_size=4, checkpointing=False, gpu_gb=24)
    assert float(rows["peak"].split()[0]) == pytest.approx(found["peak"], rel=1e-3)
    assert rows["fits"].strip() == str(found["fits"])


@pytest.mark.parametrize(
    "option", [("--gpus", "0"), ("--gpu-gb", "-5"), ("--zero-stage", "7"), ("--batch-size", "0")]
)
def test_the_command_refuses_what_cannot_be(capsys, option):
    with pytest.raises(SystemExit) as end:
        cli.main(["plan", "Qwen/Qwen3-VL-2B-Instruct", *option])
    assert end.value.code == 2 and option[0] in capsys.readouterr().err


def test_the_command_without_a_model_lists_all_with_the_smallest_card(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["plan"])
    assert not end.value.code
    head, *lines, advice = capsys.readouterr().out.splitlines()
    assert head.split() == ["model", "billion", "lora_card_gb", "qlora_card_gb", "licence"]
    assert "medtune plan MODEL" in advice
    listed = {}
    for line in lines:
        name, _, lora, qlora, _ = line.split(maxsplit=4)
        listed[name] = {"lora": lora, "qlora": qlora}
    assert list(listed) == model_names()
    for name, cards in listed.items():
        for method, card in cards.items():
            options = {"method": method, "batch_size": 1}
            assert estimate(name, gpu_gb=float(card), **options)["fits"]
            # no smaller one is sold that would do
            smaller = [size for size in CARDS if size < int(card)]
            if smaller:
                assert not estimate(name, gpu_gb=smaller[-1], **options)["fits"]


def test_options_of_one_model_are_refused_for_the_list(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["plan", "--gpus", "2"])
    assert end.value.code
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--gpus 2" in said and "counts with a model only" in said


def test_a_model_that_fits_on_no_card_is_said_so():
    """In float32 the larger mixture of experts takes 140 GB for its weights alone."""
    assert smallest_card("Qwen/Qwen3.5-35B-A3B", dtype="float32") is None
