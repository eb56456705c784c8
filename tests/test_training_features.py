"""What reaches the model: pixels as bytes, padded lengths, features from the disk; same losses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import (
    GEMMA,
    QWEN2,
    QWEN25,
    QWEN35,
    TINY,
    loss_and_gradients,
    same,
    wake_adapter,
    words_of,
)

from medtune import answers, models, plan, records, training
from medtune.pairs import load_pairs


def run(tmp_path, sample_path, name: str, **changes) -> tuple[list[float], Path]:
    """Train six steps on answers of unequal length; return the losses and the folder."""
    data = tmp_path / "data"
    if not data.exists():
        splits = ["train"] * 20 + ["validation"] * 4
        records.convert_pairs(load_pairs(str(sample_path), limit=24), data, splits=splits)
    out = tmp_path / name
    settings = {
        "data": data,
        "model_name_or_path": TINY,
        "output_dir": out,
        "max_steps": 6,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-3,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    training.main(words_of(settings | changes))
    log = json.loads((out / "log.json").read_text())
    return [entry["loss"] for entry in log if "loss" in entry], out


def trainer_of(name, folder: Path, sample_path):
    """Build a trainer that has six pairs to train on."""
    if name == QWEN2:
        name = plan.make_twin(QWEN2, folder / "twin", scale="tiny", dtype="float32")
    pairs = load_pairs(str(sample_path), limit=6)
    records.convert_pairs(pairs, folder / "data", splits=["train"] * 6)
    settings = {
        "data": folder / "data",
        "model_name_or_path": name,
        "output_dir": folder / "out",
    }
    return training.build_trainer(*training.parse_arguments(words_of(settings)))


# ---- batches


@pytest.mark.parametrize("name", [TINY, QWEN2])
def test_pixels_as_bytes(tmp_path, sample_path, name):
    """They arrive as the processor would have scaled them; other pixels pass as they are."""
    trainer = trainer_of(name, tmp_path, sample_path)
    rows = [trainer.train_dataset[number] for number in range(4)]
    scaled = trainer.data_collator([dict(row) for row in rows])
    seen = []

    def note_pixels(module, args):
        seen.append(args[0].clone())

    trainer.model.get_base_model().model.visual.register_forward_pre_hook(note_pixels)
    assert training.send_bytes(trainer)
    batch = trainer.data_collator([dict(row) for row in rows])
    assert batch["pixel_values"].dtype == torch.uint8
    assert scaled["pixel_values"].dtype == torch.float32
    for key in scaled:
        assert key == "pixel_values" or torch.equal(batch[key], scaled[key])
    with torch.no_grad():
        trainer.model(**scaled)
        trainer.model(**batch)
    assert torch.allclose(*seen, atol=1e-6)
    assert seen[0].std() > 0.1

    processor = trainer.processing_class
    held_out = answers.generate_answers(trainer.model, processor, rows[:2], max_new_tokens=3)
    assert len(held_out) == 2, "a model that was trained on bytes answers"
    pictures = [row["images"][0] for row in rows]
    prepared = processor.image_processor(pictures, return_tensors="pt")
    assert torch.equal(scaled["pixel_values"], prepared["pixel_values"])


@pytest.mark.parametrize("name", [TINY, QWEN2])
def test_padding_to_steps_of_length_changes_no_loss(tmp_path, sample_path, name):
    trainer = trainer_of(name, tmp_path, sample_path)
    rows = [dict(trainer.train_dataset[number]) for number in range(3)]
    plain = trainer.data_collator([dict(row) for row in rows])
    width = plain["input_ids"].shape[1]
    # the width is no multiple of this step
    padded = training.pad_lengths(
        trainer.data_collator, [dict(row) for row in rows], step=width + 5
    )
    assert padded["input_ids"].shape == padded["labels"].shape == (3, width + 5)
    for key, value in plain.items():
        if value.shape == (3, width):
            assert torch.equal(padded[key][:, :width], value)
    assert torch.equal(padded["pixel_values"], plain["pixel_values"])
    assert (padded["labels"][:, width:] == -100).all()
    assert not padded["attention_mask"][:, width:].any()

    model = trainer.model
    wake_adapter(model)
    assert same(loss_and_gradients(model, plain), loss_and_gradients(model, padded))
    training.speed_up(model)
    assert same(loss_and_gradients(model, plain), loss_and_gradients(model, padded))


# ---- whole trainings


@pytest.mark.slow
def test_fast_training_has_the_same_losses_and_leaves_the_same_adapter(
    tmp_path, sample_path, capsys
):
    watch = {"eval_strategy": "steps", "eval_steps": 3, "eval_samples": 4}
    plain, out = run(tmp_path, sample_path, "plain", **watch)
    adapter = load_file(out / "model" / "adapter_model.safetensors")
    for name in ("fast", "cached", "cached again"):
        cached = name != "fast"
        losses, out = run(tmp_path, sample_path, name, fast=True, cache_features=cached, **watch)
        said = capsys.readouterr().out
        computed = "medtune train: features of" in said
        assert computed == (name == "cached"), "what is there is reused"
        assert losses == pytest.approx(plain, rel=1e-4)
        other = load_file(out / "model" / "adapter_model.safetensors")
        assert adapter.keys() == other.keys()
        for key, value in adapter.items():
            # by norm, as in notebook 04: Adam makes whole steps of gradients that are next to
            # nothing but rounding
            assert (value - other[key]).norm() <= 1e-3 * value.norm()
        models.load_tuned(models.load_base(TINY), out / "model")
        models.load_processor(out / "model")


@pytest.mark.slow
@pytest.mark.parametrize("name", [QWEN25, QWEN35])
def test_features_of_a_model_without_deepstack(tmp_path, sample_path, name):
    other = plan.make_twin(name, tmp_path / "twin", scale="tiny", dtype="float32")
    plain, _ = run(tmp_path, sample_path, "plain", model_name_or_path=other)
    cached, _ = run(tmp_path, sample_path, "cached", model_name_or_path=other, cache_features=True)
    assert cached == pytest.approx(plain, rel=1e-4)


@pytest.mark.slow
def test_features_are_for_a_frozen_tower_of_qwen(tmp_path, sample_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, sample_path, "out", cache_features=True, target="language+vision")
    gemma = plan.make_twin(GEMMA, tmp_path / "gemma", scale="tiny", dtype="float32")
    with pytest.raises(SystemExit):
        run(tmp_path, sample_path, "other", cache_features=True, model_name_or_path=gemma)
    lines = capsys.readouterr().err.splitlines()
    said = [line for line in lines if line.startswith("medtune train:")]
    assert len(said) == 2
    assert all("vision tower and merger frozen" in line for line in said)


def sizes_of_files(folder: Path) -> list[int]:
    return [file.stat().st_size for file in folder.iterdir()]


@pytest.mark.slow
def test_other_weights_or_sizes_have_features_of_their_own(tmp_path, sample_path):
    run(tmp_path, sample_path, "one", cache_features=True, max_steps=1)
    run(tmp_path, sample_path, "two", cache_features=True, max_steps=1, max_pixels=128 * 128)
    folders = sorted((tmp_path / "data" / "features").iterdir())
    assert len(folders) == 2
    first, second = [sizes_of_files(folder) for folder in folders]
    assert len(first) == len(second)
    small, large = sorted([sum(first), sum(second)])
    assert small < 0.5 * large


# ---- the benchmark


@pytest.mark.slow
def test_the_benchmark_rehearses_its_rungs(tmp_path):
    """One of each kind, with tiny twins; a second start does nothing again."""
    script = Path(__file__).parents[1] / "benchmarks" / "train.py"
    rungs = ["naive", "fast96_features", "moe_fast8", "gemma_tied", "generate64_static"]
    command = [sys.executable, script, tmp_path, "--small", "--steps", "4"]
    command += ["--rungs", ",".join(rungs)]
    subprocess.run(command, check=True, capture_output=True)
    rows = []
    for line in (tmp_path / "results.jsonl").read_text().splitlines():
        rows.append(json.loads(line))
    assert [row["rung"] for row in rows] == rungs
    assert not any("error" in row for row in rows), rows
    assert rows[0]["first_loss"] == pytest.approx(rows[1]["first_loss"], rel=0.1)
    assert all(row["samples_per_second"] > 0 for row in rows)
    assert rows[0]["mfu_percent"] >= 0
    subprocess.run(command, check=True, capture_output=True)
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == len(rungs)
    assert (tmp_path / "table.md").read_text().count("\n") == len(rungs) + 2
