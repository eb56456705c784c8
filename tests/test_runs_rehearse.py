"""Every recipe has a profile that can be planned, and a rehearsal of one takes a few steps."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from medtune import runs
from medtune.pairs import load_pairs
from medtune.plan import estimate, model_facts
from medtune.records import read_records
from medtune.runs import read_params

REPO = Path(__file__).parents[1]

PROFILES = {
    "qwen3-vl-30b-a3b-zero3-b32": "Qwen/Qwen3-VL-30B-A3B-Instruct",
    "qwen3-vl-30b-a3b-zero2-b4": "Qwen/Qwen3-VL-30B-A3B-Instruct",
    "qwen3-vl-30b-a3b-corrected": "Qwen/Qwen3-VL-30B-A3B-Instruct",
    "qwen3-vl-30b-a3b-corrected-zero3": "Qwen/Qwen3-VL-30B-A3B-Instruct",
    "qwen3-vl-30b-a3b-webui": "Qwen/Qwen3-VL-30B-A3B-Instruct",
    "qwen3-vl-2b-multitask": "Qwen/Qwen3-VL-2B-Instruct",
    "qwen3-vl-2b-multitask-2gpu": "Qwen/Qwen3-VL-2B-Instruct",
    "gemma3-4b-qlora": "google/gemma-3-4b-pt",
    "qwen2-vl-2b-lora": "Qwen/Qwen2-VL-2B-Instruct",
    "qwen3-vl-2b-dpo": "Qwen/Qwen3-VL-2B-Instruct",
    "qwen3-vl-2b-grpo": "Qwen/Qwen3-VL-2B-Instruct",
    "qwen3-vl-4b-volumes": "Qwen/Qwen3-VL-4B-Instruct",
    "medgemma-1.5-4b-qlora": "google/medgemma-1.5-4b-it",
    "qwen3.5-2b-lora": "Qwen/Qwen3.5-2B",
    "qwen3.5-35b-a3b-lora": "Qwen/Qwen3.5-35B-A3B",
}
# what trains there is a lesson of its own, in steps and not in epochs
VOLUMES = "11_volumes_priors_records"

# Those for your own data, and the card in GB that their first line names.
CARDS = {"medgemma-1.5-4b-qlora": 16, "qwen3.5-2b-lora": 16, "qwen3.5-35b-a3b-lora": 80}


def trained_by(params: dict) -> str:
    """The notebook of a run that trains: 03, in several processes 03b, with heads 07; on volumes 11."""
    if list(params) == [VOLUMES]:
        return VOLUMES
    (notebook,) = [name for name in params if name.startswith(("03_", "03b_", "07_"))]
    assert all(values.get("trained_by", notebook) == notebook for values in params.values()), (
        "05 and 06 go on from there"
    )
    return notebook


@pytest.mark.parametrize(("name", "model"), PROFILES.items())
def test_every_recipe_has_a_profile_that_is_read_without_complaint(name, model):
    params = read_params(name, root=REPO)
    assert {values.get("model_name_or_path", model) for values in params.values()} == {model}
    assert model_facts(model), "its shape is known, so it can be planned and rehearsed"
    trained = params[trained_by(params)]
    assert trained.get("num_train_epochs", trained["max_steps"]) > 0
    assert trained["dtype"] == "bfloat16"


@pytest.mark.parametrize(("name", "card"), CARDS.items())
def test_a_run_for_your_own_data_fits_on_the_card_that_it_names(name, card):
    text = (REPO / "papermill_runs" / name / "params.yaml").read_text("utf-8")
    assert f"one card of {card} GB" in text.splitlines()[0]
    trained = read_params(name, root=REPO)["03_finetune_lora"]
    found = estimate(
        PROFILES[name],
        method=trained["method"],
        target=trained["target"],
        lora_r=trained["lora_r"],
        batch_size=trained["per_device_train_batch_size"],
        checkpointing=trained["activation_checkpointing"],
        accumulation=trained["gradient_accumulation_steps"] > 1,
        gpu_gb=card,
    )
    assert found["fits"]
    (planned,) = re.findall(r"Planned: ([\d.]+) GB", text)
    assert float(planned) == pytest.approx(found["peak"], abs=0.05)


def test_a_run_for_your_own_data_guesses_no_patients():
    for name in CARDS:
        converted = read_params(name, root=REPO)["02_convert_data"]
        assert converted["split_by"] == "patient"
        assert not converted["accept_unknown_groups"]


def test_the_published_hyperparameters_stand_in_the_profiles():
    first = read_params("qwen3-vl-30b-a3b-zero3-b32", root=REPO)["03b_finetune_launched"]
    second = read_params("qwen3-vl-30b-a3b-zero2-b4", root=REPO)["03b_finetune_launched"]

    def effective_batch(run):
        batch = run["per_device_train_batch_size"] * run["gradient_accumulation_steps"]
        return batch * run["num_processes"]

    assert [first["zero"], second["zero"]] == ["zero3", "zero2"]
    assert [first["save_steps"], first["logging_steps"]] == [200, 5]
    for name in ("qwen3-vl-30b-a3b-zero3-b32", "qwen3-vl-30b-a3b-webui", "qwen2-vl-2b-lora"):
        asked = read_params(name, root=REPO)["02_convert_data"]["question"]
        assert asked == "图片中的诊断结果是怎样?"

    assert effective_batch(first) == 32 * 8 * 4
    assert effective_batch(second) == 4 * 8 * 4
    assert first["lora_r"] == 8
    assert first["lora_alpha"] == 16
    assert first["learning_rate"] == 5e-5
    assert first["lr_scheduler_type"] == "cosine"

    gemma = read_params("gemma3-4b-qlora", root=REPO)["03_finetune_lora"]
    assert gemma["modules_to_save"] == ["lm_head", "embed_tokens"]
    assert gemma["method"] == "qlora"
    assert gemma["lora_r"] == 16
    assert gemma["lora_alpha"] == 16
    assert gemma["max_grad_norm"] == 0.3


# Each of these is the run that is rehearsed below but for some values; what a rehearsal replaces
# anyway (batches, epochs, steps between two evaluations or checkpoints) is among them.
REPLACED = {
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "eval_steps",
    "save_steps",
}
OTHERWISE = {
    "qwen3-vl-30b-a3b-zero2-b4": {"zero": "zero2"},
    "qwen3-vl-30b-a3b-corrected": {
        "zero": "zero2",
        "warmup_steps": 0.03,
        "question": "What is the diagnosis in this picture?",
    },
    "qwen3-vl-30b-a3b-corrected-zero3": {
        "warmup_steps": 0.03,
        "question": "What is the diagnosis in this picture?",
    },
    "qwen3-vl-30b-a3b-webui": {"dialect": "conversations"},
}


@pytest.mark.parametrize(("name", "otherwise"), OTHERWISE.items())
def test_the_other_runs_of_a_model_are_the_rehearsed_one_but_for_a_few_values(name, otherwise):
    """So the rehearsals of one with ZeRO-3 and one with ZeRO-2 go through the steps of all five."""
    rehearsed = read_params("qwen3-vl-30b-a3b-zero3-b32", root=REPO)
    other = read_params(name, root=REPO)
    assert list(other) == list(rehearsed)
    differing = {}
    for notebook, values in other.items():
        assert values.keys() == rehearsed[notebook].keys()
        for key, value in values.items():
            if value != rehearsed[notebook][key] and key not in {*REPLACED, "run_dir"}:
                differing[key] = value
    assert differing == otherwise


def test_the_profiles_of_dpo_and_grpo_differ_in_the_method_only():
    """So one rehearsal of 12 with both methods goes through the steps of both."""
    dpo = read_params("qwen3-vl-2b-dpo", root=REPO)
    grpo = read_params("qwen3-vl-2b-grpo", root=REPO)
    differing = set()
    for notebook, values in dpo.items():
        for key, value in values.items():
            if key != "run_dir" and value != grpo[notebook][key]:
                differing.add(f"{notebook[:2]}.{key}")
    sizes = {"12.dpo_steps", "12.dpo_batch_size", "12.grpo_steps", "12.grpo_batch_size"}
    assert differing == {"12.methods", "12.answers_each", *sizes}
    assert dpo["12_reward_what_is_true"]["methods"] == ["DPO"]
    assert grpo["12_reward_what_is_true"]["methods"] == ["GRPO"]


@pytest.fixture
def workplace(tmp_path, sample_path, monkeypatch) -> Path:
    """A folder with two notebooks, a recipe's run of these, and some 50 pairs of the sample."""
    pairs = load_pairs(sample_path)
    every = {"train": 200, "validation": 40, "test": 40}
    rows = [row for row, split in enumerate(pairs["split"]) if row % every[split] == 0]
    pairs.select(rows).to_parquet(tmp_path / "few.parquet")
    monkeypatch.setenv("MEDTUNE_SAMPLE", str(tmp_path / "few.parquet"))

    (tmp_path / "notebooks").mkdir()
    (tmp_path / "papermill_runs" / "small").mkdir(parents=True)
    (tmp_path / "data").symlink_to(REPO / "data")
    write_recipe(tmp_path, "qwen2-vl-2b-lora", ["02_convert_data", "03_finetune_lora"])
    return tmp_path


def write_recipe(root: Path, recipe: str, notebooks: list[str]) -> None:
    """Write some notebooks of a recipe's run as the run called small."""
    for name in notebooks:
        shutil.copy(REPO / "notebooks" / f"{name}.ipynb", root / "notebooks")
    shutil.copytree(
        REPO / "notebooks" / "programs", root / "notebooks" / "programs", dirs_exist_ok=True
    )
    file = REPO / "papermill_runs" / recipe / "params.yaml"
    params = yaml.safe_load(file.read_text("utf-8"))
    small = {key: params[key] for key in ("shared", *notebooks)}
    small["notebooks"] = notebooks
    # for notebooks that are not here
    if not {"05_evaluate", "06_merge_export"} & set(notebooks):
        for key in ("batch_size", "trained_by"):
            small["shared"].pop(key, None)
    written = root / "papermill_runs" / "small" / "params.yaml"
    written.write_text(yaml.safe_dump(small), "utf-8")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_is_rehearsed_with_a_twin(workplace):
    """By the command: a twin of the run's model, the run's settings, and a handful of steps."""
    out = workplace / "papermill_runs" / "small-rehearsal" / "out"
    twin = out / "tiny-twin-of-Qwen2-VL-2B-Instruct"
    twin.mkdir(parents=True)
    # left over from an older version
    (twin / "config.json").write_text("{}", "utf-8")
    os.utime(twin / "config.json", (0, 0))

    medtune = Path(sys.executable).with_name("medtune")
    options = ["--steps", "2", "--scale", "tiny", "--root", workplace]
    done = subprocess.run(
        [medtune, "rehearse", "small", *options], capture_output=True, text=True, cwd=workplace
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Random weights" in done.stdout
    assert "MedTrinity" in done.stdout and "the sample set stands in its place" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines()]
    executed = {row[0] for row in rows if row and row[0].startswith("0")}
    assert executed >= {"02_convert_data", "03_finetune_lora"}

    trained = out / "03_finetune_lora"
    summary = json.loads((trained / "summary.json").read_text("utf-8"))
    assert summary["results"]["steps"] == 2
    assert summary["max_steps"] == 2
    assert summary["effective_batch_size"] == 4
    assert summary["lora_r"] == 8, "the recipe's own setting"
    assert summary["target"] == "llamafactory-all", "the recipe's own setting"
    assert (trained / "adapter" / "adapter_config.json").is_file()
    assert Path(summary["model_name_or_path"]).name == twin.name
    config = json.loads((twin / "config.json").read_text("utf-8"))
    assert config["model_type"] == "qwen2_vl", "the old twin is replaced"
    assert summary["train_pairs"] < 60
    assert summary["eval_loss"]["after"] > 0


def rehearse_small(root: Path) -> Path:
    """Rehearse the run called small by the command; return the folder of its results."""
    medtune = Path(sys.executable).with_name("medtune")
    options = ["--steps", "2", "--scale", "tiny", "--root", root]
    done = subprocess.run(
        [medtune, "rehearse", "small", *options], capture_output=True, text=True, cwd=root
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return root / "papermill_runs" / "small-rehearsal" / "out"


def summary_of(out: Path, notebook: str) -> dict:
    return json.loads((out / notebook / "summary.json").read_text("utf-8"))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_on_four_cards_is_rehearsed_in_two_processes_with_its_zero_stage(workplace):
    """R1 with ZeRO-3: the mixture of experts, sharded over two ranks on the CPU, then merged."""
    launched = "03b_finetune_launched"
    notebooks = ["02_convert_data", launched, "06_merge_export"]
    write_recipe(workplace, "qwen3-vl-30b-a3b-zero3-b32", notebooks)
    out = rehearse_small(workplace)
    summary = summary_of(out, launched)
    assert (summary["ranks"], summary["zero"], summary["max_steps"]) == (2, "zero3", 2)
    assert summary["eval_loss"]["after"] > 0
    assert (out / launched / "adapter" / "adapter_model.safetensors").is_file()
    log = runs.read_log("small-rehearsal", root=workplace)
    assert [entry["step"] for entry in log.history if "loss" in entry] == [1, 2]
    assert log.samples_per_step == summary["effective_batch_size"] == 8

    # the published dialect and question
    lines = (out / "02_convert_data" / "data" / "train.jsonl").read_text("utf-8").splitlines()
    asked = json.loads(lines[0])["messages"][0]
    assert asked == {"role": "user", "content": "<image>图片中的诊断结果是怎样?"}
    assert "safetensors" in " ".join(summary_of(out, "06_merge_export")["files"])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_second_published_run_is_rehearsed_with_its_zero_stage(workplace):
    """R1 with ZeRO-2, in R2's dialect: of both, the training in two processes is the same."""
    launched = "03b_finetune_launched"
    write_recipe(workplace, "qwen3-vl-30b-a3b-zero2-b4", ["02_convert_data", launched])
    written = workplace / "papermill_runs" / "small" / "params.yaml"
    params = yaml.safe_load(written.read_text("utf-8"))
    params["02_convert_data"]["dialect"] = "conversations"
    written.write_text(yaml.safe_dump(params), "utf-8")
    out = rehearse_small(workplace)
    summary = summary_of(out, launched)
    assert (summary["ranks"], summary["zero"], summary["max_steps"]) == (2, "zero2", 2)
    lines = (out / "02_convert_data" / "data" / "train.jsonl").read_text("utf-8").splitlines()
    assert [turn["from"] for turn in json.loads(lines[0])["conversations"]] == ["user", "assistant"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_for_your_own_data_is_rehearsed(workplace):
    """The mixture of experts with Gated DeltaNet layers; the others' models are tried elsewhere."""
    write_recipe(workplace, "qwen3.5-35b-a3b-lora", ["02_convert_data", "03_finetune_lora"])
    out = rehearse_small(workplace)
    summary = summary_of(out, "03_finetune_lora")
    assert (summary["results"]["steps"], summary["target"]) == (2, "attention")
    assert summary["eval_loss"]["after"] > 0
    config = json.loads((out / "tiny-twin-of-Qwen3.5-35B-A3B" / "config.json").read_text("utf-8"))
    assert config["model_type"] == "qwen3_5_moe"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_recipe_in_4_bits_is_rehearsed_with_what_it_published(workplace):
    """R4: text before the picture, 4 bits kept in bfloat16, TensorBoard, one drawn description."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    notebooks = ["02_convert_data", "03_finetune_lora", "06_merge_export"]
    write_recipe(workplace, "gemma3-4b-qlora", notebooks)
    out = rehearse_small(workplace)
    row = read_records(out / "02_convert_data" / "data", "train")[0]
    assert [part["type"] for part in row["prompt"][0]["content"]] == ["text", "image"]

    summary = summary_of(out, "03_finetune_lora")
    assert (summary["method"], summary["max_steps"]) == ("qlora", 2)
    assert summary["modules_to_save"] == ["lm_head", "embed_tokens"]
    (events,) = (out / "03_finetune_lora").rglob("events.out.tfevents.*")
    reported = EventAccumulator(str(events)).Reload()
    assert [point.step for point in reported.Scalars("train/loss")] == [1, 2]

    merged = summary_of(out, "06_merge_export")
    assert merged["answers"] == 4
    executed = (out / "06_merge_export.ipynb").read_text("utf-8")
    assert "drawn: " in executed


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_runs_of_dpo_and_grpo_are_rehearsed(workplace):
    """One rehearsal with both methods: a base of random weights, an adapter of it, then 12."""
    rewarded = "12_reward_what_is_true"
    write_recipe(workplace, "qwen3-vl-2b-grpo", ["02_convert_data", "03_finetune_lora", rewarded])
    written = workplace / "papermill_runs" / "small" / "params.yaml"
    params = yaml.safe_load(written.read_text("utf-8"))
    params[rewarded]["methods"] = ["DPO", "GRPO"]
    written.write_text(yaml.safe_dump(params), "utf-8")
    out = rehearse_small(workplace)
    summary = summary_of(out, rewarded)
    assert set(summary["scores"]) == {"start", "SFT goes on", "DPO", "GRPO"}
    assert summary["questions_kept"] == summary["questions"] > 4
    assert summary["preference_pairs"] > 0
    logs = json.loads((out / rewarded / "logs.json").read_text("utf-8"))
    for name in ("SFT goes on", "DPO", "GRPO"):
        assert [entry["step"] for entry in logs[name] if "loss" in entry] == [1, 2], name


@pytest.mark.parametrize(("gpu_gb", "batch", "accumulated"), [(24, 4, 4), (80, 16, 1)])
def test_the_run_on_volumes_fits_where_it_says(gpu_gb, batch, accumulated):
    run = read_params("qwen3-vl-4b-volumes", root=REPO)[VOLUMES]
    in_all = run["per_device_train_batch_size"] * run["gradient_accumulation_steps"]
    assert batch * accumulated == in_all
    settings = {"lora_r": run["lora_r"], "target": run["target"], "gpu_gb": gpu_gb}
    settings |= {"pictures_per_sample": 4, "image_size": 256, "text_tokens": 100}
    settings |= {"checkpointing": run["activation_checkpointing"]}
    found = estimate(PROFILES["qwen3-vl-4b-volumes"], batch_size=batch, **settings)
    assert found["fits"]
    said = (REPO / "papermill_runs" / "qwen3-vl-4b-volumes" / "params.yaml").read_text("utf-8")
    assert f"on {gpu_gb} GB {batch} " in said and f"{found['needed']:.0f} GB without" in said


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_run_on_volumes_is_rehearsed(workplace, volumes_path):
    """Some questions of each task, with several pictures each, trained, answered and controlled."""
    (workplace / "few").mkdir()
    few = few_questions(volumes_path, workplace / "few" / "volumes.parquet")
    write_recipe(workplace, "qwen3-vl-4b-volumes", [VOLUMES])
    written = workplace / "papermill_runs" / "small" / "params.yaml"
    params = yaml.safe_load(written.read_text("utf-8"))
    params["shared"].pop("trained_by", None)
    params["shared"]["batch_size"] = 16
    params[VOLUMES]["volumes"] = str(few)
    written.write_text(yaml.safe_dump(params), "utf-8")
    out = rehearse_small(workplace)
    summary = summary_of(out, VOLUMES)
    assert summary["max_steps"] == 2 and summary["controls"] > 10
    assert set(summary["scores"]) >= {"base", "tuned", "slices shuffled", "record swapped"}
    config = json.loads((out / VOLUMES / "adapter" / "adapter_config.json").read_text("utf-8"))
    assert config["r"] == 16, "the profile's own setting"


def few_questions(volumes: Path, target: Path) -> Path:
    """Keep so many questions of each task and split as the notebook needs to run through."""
    pairs = load_pairs(volumes)
    wanted = {"train": 6, "validation": 2, "test": 4}
    kept = {}
    rows = []
    for row, (task, split, slab) in enumerate(
        zip(pairs["task"], pairs["split"], pairs["slab"], strict=True)
    ):
        slabs = kept.setdefault((task, split), [])
        if slab not in slabs and len(slabs) < wanted[split]:
            slabs.append(slab)
        if slab in slabs:
            rows.append(row)
    pairs.select(rows).to_parquet(target)
    return target


def test_data_on_this_machine_are_rehearsed_and_what_is_replaced_is_said(
    workplace, monkeypatch, capsys
):
    """Only the run itself is left out: its overrides say what it would do."""
    from medtune.runs import rehearse

    asked = {}
    monkeypatch.setattr(rehearse, "run", lambda name, **options: asked.update(options))
    monkeypatch.setattr(rehearse, "make_twin", lambda *arguments, **options: None)
    file = workplace / "papermill_runs" / "small" / "params.yaml"
    params = yaml.safe_load(file.read_text("utf-8"))
    mine = workplace / "mine"
    mine.mkdir()
    params["shared"]["data"] = str(mine)
    file.write_text(yaml.safe_dump(params), "utf-8")
    rehearse.rehearse("small", root=workplace, scale="tiny")
    said = capsys.readouterr().out
    assert f"on the run's own data, {mine}" in said and "Qwen2-VL-2B-Instruct" in said
    assert not [key for key in asked["overrides"] if key.endswith(".data")]
    assert asked["overrides"]["03_finetune_lora.max_steps"] == 2
