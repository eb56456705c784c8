"""medtune.multitask.trainer: it trains each task, and counts alike however a step is cut."""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from datasets import Dataset
from multitask_twins import FAMILIES, answer_of, make_records, record, trainer_of, twins_below
from PIL import Image
from safetensors.torch import load_file

from medtune.multitask import LOGGED
from medtune.records import convert_pairs
from medtune.scores import box_scores
from medtune.training import complete_checkpoints


@pytest.fixture(scope="session")
def twin(tmp_path_factory):
    return twins_below(tmp_path_factory)


@pytest.fixture
def records():
    return make_records()


WAYS = {
    "fp32": {},
    "bf16": {"bf16": True, "dtype": "bfloat16"},
    "nf4": {"quantised": True},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_it_trains_and_logs_each_task(twin, records, tmp_path, way):
    options = {"save_strategy": "no", "eval_strategy": "epoch"} | way
    trainer = trainer_of(twin("qwen3-vl"), tmp_path, records, **options)
    before = {}
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            before[name] = parameter.detach().clone()
    trainer.train()
    after = dict(trainer.model.named_parameters())
    moved = {name for name in before if not torch.equal(after[name], before[name])}
    heads = {name.split(".")[1] for name in moved if name.startswith("heads")}
    assert heads >= {"vote", "match", "log_variances"}
    assert any("lora_A" in name for name in moved)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 3
    assert all(set(LOGGED) <= entry.keys() for entry in logs)
    trainer.evaluate()
    last = trainer.state.log_history[-1]
    assert {f"eval_{name}" for name in LOGGED} <= last.keys()


def gradients_of(trainer, parts):
    """Return the gradients of one step whose rows are cut into some batches."""
    trainer.model.zero_grad()
    collated = iter([trainer.data_collator(part) for part in parts])
    batches, items = trainer.get_batch_samples(collated, len(parts), "cpu")
    trainer.current_gradient_accumulation_steps = len(parts)
    for batch in batches:
        trainer.training_step(trainer.model, batch, items)
    gradients = {}
    for name, parameter in trainer.model.named_parameters():
        if parameter.grad is not None:
            gradients[name] = parameter.grad.clone()
    return gradients


@pytest.mark.parametrize("family", FAMILIES)
def test_accumulated_batches_give_the_gradient_of_one(twin, family, tmp_path):
    """For all three losses, though batches differ in answers, boxes and pairs."""
    rows = []
    for number in range(6):
        finding = None if number % 2 else "a mass of 12 mm"
        rows.append(record(number, finding=finding))
    rows[1]["roi"] = None
    trainer = trainer_of(twin(family), tmp_path, rows)
    matches = trainer.data_collator(rows)["matches"]
    assert set(matches.tolist()) == {-1, 0, 1}, "the rows must show it"
    whole = gradients_of(trainer, [rows])
    cut = gradients_of(trainer, [rows[:1], rows[1:3], rows[3:]])
    assert whole.keys() == cut.keys()
    for name in whole:
        assert_close_named(name, whole[name], cut[name], atol=2e-5, rtol=2e-3)


def assert_close_named(name, one, other, **tolerances):
    """Compare two tensors; a message names the parameter."""
    torch.testing.assert_close(one, other, msg=lambda text: f"{name}: {text}", **tolerances)


def test_a_stopped_run_goes_on_with_its_heads(twin, records, tmp_path):
    whole = trainer_of(twin("qwen3-vl"), tmp_path / "whole", records, steps=4)
    whole.train()
    half = trainer_of(twin("qwen3-vl"), tmp_path / "half", records, steps=4)
    half.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    expected = dict(whole.model.named_parameters())
    for name, parameter in half.model.named_parameters():
        assert_close_named(name, expected.pop(name), parameter)
    assert not expected


SCRIPT = """
from medtune.multitask import MultiTaskTrainer
from medtune.training import main

main(trainer_class=MultiTaskTrainer)
"""
PROGRAM = Path(__file__).parents[1] / "notebooks" / "programs" / "07_train.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture
def folder(records, tmp_path):
    """Records in a folder, as `medtune.training` reads them."""
    pairs = []
    for row in records:
        pairs.append(
            {
                "image": row["images"][0],
                "id": row["id"],
                "caption": answer_of(row),
                "roi": row["roi"],
                "structure": row["structure"],
                "split": "train",
            }
        )
    convert_pairs(Dataset.from_list(pairs), tmp_path / "data")
    return tmp_path / "data"


def words_of(twin, folder, out, command, **options):
    """The command that trains on a folder by a command of Python."""
    options = {
        "data": folder,
        "model_name_or_path": twin("qwen3-vl"),
        "output_dir": out,
        "lora_r": 4,
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "dtype": "float32",
    } | options
    words = [sys.executable, *command]
    for option, value in options.items():
        words += [f"--{option}", value]
    return [str(word) for word in words]


def launch(twin, folder, out, command, **options):
    """Train on a folder by a command of Python; return what was logged of each step."""
    words = words_of(twin, folder, out, command, **options)
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (out / "model" / "multitask.safetensors").is_file()
    log = json.loads((out / "log.json").read_text("utf-8"))
    return [entry for entry in log if "text_loss" in entry]


def check_same(of_one, of_two):
    """Each logged number agrees, step by step."""
    assert len(of_one) >= 3
    for one, two in zip(of_one, of_two, strict=True):
        for key in LOGGED:
            assert one[key] == pytest.approx(two[key], rel=1e-3, abs=1e-4), key


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_two_ranks_train_as_one_process_does(twin, folder, tmp_path):
    """The same file under torchrun: two ranks of batch 2 lose what one of batch 4 loses."""
    script = tmp_path / "launch.py"
    script.write_text(SCRIPT)
    of_one = launch(twin, folder, tmp_path / "one", [script], per_device_train_batch_size=4)
    command = [*TORCHRUN, script]
    of_two = launch(twin, folder, tmp_path / "two", command, per_device_train_batch_size=2)
    check_same(of_one, of_two)


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_deepspeed_on_two_ranks_trains_as_one_process_does(twin, folder, tmp_path):
    """Notebook 07's program: two ranks, two batches of 1 a step each, lose what one of 4 loses."""
    heads = {
        "model": {"miss_weight": 5.0},
        "collator": {"question": "Where is the {structure}?", "diagnosis_weight": 2.0},
        "trainer": {"head_learning_rate": 1e-3},
    }
    settings = tmp_path / "heads.json"
    settings.write_text(json.dumps(heads))
    command = [PROGRAM, settings]
    of_one = launch(twin, folder, tmp_path / "one", command, per_device_train_batch_size=4)
    sharded = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    sharded["deepspeed"] = "zero2"
    of_two = launch(twin, folder, tmp_path / "two", [*TORCHRUN, *command], **sharded)
    check_same(of_one, of_two)


def kill_at_a_checkpoint(words, out, log):
    """Start a command, and kill all its processes once a checkpoint is complete."""
    with open(log, "w") as file:
        process = subprocess.Popen(words, stdout=file, stderr=file)
    while not complete_checkpoints(out):
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.02)
    # the launcher first, or it would end the ranks in peace
    for one in [process, *psutil.Process(process.pid).children(recursive=True)]:
        one.kill()
    process.wait()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_launched_run_that_was_killed_goes_on(twin, folder, tmp_path):
    """Under DeepSpeed on two ranks, to the numbers of one that nobody disturbed."""
    heads = {"model": {}, "collator": {}, "trainer": {"head_learning_rate": 1e-3}}
    settings = tmp_path / "heads.json"
    settings.write_text(json.dumps(heads))
    command = [*TORCHRUN, PROGRAM, settings]
    options = {
        "per_device_train_batch_size": 1,
        "deepspeed": "zero2",
        "max_steps": 12,
        "save_strategy": "steps",
        "save_steps": 4,
    }
    whole = launch(twin, folder, tmp_path / "whole", command, **options)

    out = tmp_path / "killed"
    words = words_of(twin, folder, out, command, **options)
    kill_at_a_checkpoint(words, out, tmp_path / "killed.log")
    assert not (out / "model").exists(), "it was killed on its way"
    newest, _ = complete_checkpoints(out)[0]
    (states,) = newest.glob("global_step*/mp_rank_00_model_states.pt")
    saved = torch.load(states, weights_only=False)["module"]
    frozen = [name for name in saved if "lora_" not in name and not name.startswith("heads")]
    # DeepSpeed overlooks a head that shares its weights with the embedding
    assert saved and set(frozen) <= {"base.base_model.model.lm_head.weight"}, frozen

    again = launch(twin, folder, out, command, resume=True, **options)
    assert [entry["step"] for entry in again] == [entry["step"] for entry in whole]
    check_same(whole, again)
    for file in ("multitask.safetensors", "adapter_model.safetensors"):
        expected = load_file(tmp_path / "whole" / "model" / file)
        for name, weight in load_file(out / "model" / file).items():
            assert_close_named(name, weight, expected[name], rtol=1e-4, atol=1e-6)


def squares(count):
    """Draw a bright square at a random place of each picture; its box is known."""
    rng = torch.Generator().manual_seed(0)
    rows = []
    for number in range(count):
        drawn = torch.rand(3, generator=rng) * torch.tensor([80, 80, 24])
        x, y, side = drawn.int().tolist()
        side += 24
        corners = (x, y, x + side, y + side)
        picture = Image.new("RGB", (128, 128))
        picture.paste((255, 255, 255), corners)
        box = [edge / 128 for edge in corners]
        rows.append(record(number, roi=box) | {"images": [picture]})
    return rows


@pytest.mark.slow
def test_a_square_is_found(twin, tmp_path):
    """The heads learn: the mean IoU with the square rises far above that of the mean box."""
    rows = squares(160)
    trained = rows[:128]
    held_out = rows[128:]
    options = {"steps": 150, "batch": 8, "save_strategy": "no"}
    trainer = trainer_of(twin("qwen3-vl"), tmp_path, trained, **options)
    trainer.model.settings.weighting = "fixed"
    trainer.model.settings.weights = [0.0, 1.0, 0.0]
    trainer.data_collator.negative_ratio = 0.0
    trainer.data_collator.verify_ratio = 0.0
    trainer.train()
    images = [row["images"][0] for row in held_out]
    questions = ["Where is the square?"] * 32
    statements = ["a square"] * 32
    found, _ = trainer.model.judge(trainer.processing_class, images, questions, statements)
    true = [row["roi"] for row in held_out]
    mean_box = torch.tensor([row["roi"] for row in trained]).mean(0).tolist()
    iou = box_scores(found, true)["iou"]
    iou_of_mean_box = box_scores([mean_box] * 32, true)["iou"]
    assert iou > 1.5 * iou_of_mean_box
