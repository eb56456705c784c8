"""`stage: dpo` and `stage: grpo`: what they refuse before the first step, and that they train."""

import json
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_training import TINY, make_model, make_record, wake_adapter, words_of

from medtune import models, rewards, training
from medtune.captions import parse_caption
from medtune.pairs import load_pairs
from medtune.records import convert_pairs, read_records
from medtune.training.start_checks import check_reference

CYST = "It shows the left kidney. Within it lies a cyst, about a third as wide as the region."
NONE = "It shows the left kidney. No focal lesion is seen within it."


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    """Eight records of small pictures, half of them with a finding."""
    folder = tmp_path_factory.mktemp("records")
    (folder / "images").mkdir()
    draw = random.Random(0)
    lines = []
    for number in range(8):
        caption = NONE if number % 2 else CYST
        words = caption.removesuffix(".").split()
        record = make_record(folder, f"train{number}", words, picture=draw.randbytes(3072))
        lines.append(json.dumps(record) + "\n")
    (folder / "train.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def with_pairs(records) -> Path:
    """The same folder, with preference pairs: each answer says that there is nothing."""
    answers = []
    for row in read_records(records).select_columns(["id"]):
        answers.append({"id": row["id"], "answer": NONE})
    rewards.write_preferences(records, answers)
    return records


@pytest.fixture(scope="module")
def mute_model(tmp_path_factory) -> Path:
    """A model of random weights: it says nothing that anybody can read."""
    folder = tmp_path_factory.mktemp("mute")
    make_model(folder, TINY, experts=False)
    return folder


@pytest.fixture(scope="module")
def mute_adapter(mute_model, tmp_path_factory) -> Path:
    """An adapter on it that does something."""
    folder = tmp_path_factory.mktemp("adapter")
    base = models.load_base(mute_model)
    model = get_peft_model(base, LoraConfig(r=4, **models.adapter_targets(base)))
    torch.manual_seed(0)
    wake_adapter(model)
    model.save_pretrained(folder)
    return folder


def words(folder: Path, out: Path, stage: str, **changes) -> list[str]:
    """The words of a short training on the tiny base."""
    settings = {
        "stage": stage,
        "data": folder,
        "model_name_or_path": TINY,
        "output_dir": out,
        "max_steps": 2,
        "save_steps": 1,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "lora_r": 4,
    }
    if stage == "grpo":
        settings |= {"num_generations": 2, "max_completion_length": 50, "check_prompts": 0}
    return words_of(settings | changes)


def refused(capsys, arguments: list[str]) -> str:
    """The one line that a training ends with."""
    with pytest.raises(SystemExit) as end:
        training.main(arguments)
    assert end.value.code == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("medtune train: rank 0: ")
    return last


def log_of(out: Path) -> list[dict]:
    return json.loads((out / "log.json").read_text("utf-8"))


# ---- the settings


@pytest.mark.parametrize(
    "stage, changes, message",
    [
        ("dpo2", {}, "stage=dpo2 is unknown: use sft, dpo, grpo"),
        ("sft", {"rewards": "finding"}, "--rewards"),
        ("dpo", {"num_iterations": 2}, "--num_iterations"),
        ("grpo", {"rewards": "truth"}, "'truth' is unknown, use finding, name, box"),
        ("dpo", {"fast": "true"}, "fast=true is for stage=sft"),
        ("dpo", {"name_weight": "3.0"}, "name_weight=3.0 is for stage=sft"),
        ("grpo", {"data": "shards/*.parquet"}, "stage=grpo needs a converted folder"),
        ("dpo", {"adapter": "a", "use_peft": "false"}, "adapter and use_peft=false"),
        ("grpo", {"beta": "much"}, "beta"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, capsys, stage, changes, message):
    settings = {"stage": stage, "data": tmp_path, "model_name_or_path": TINY}
    settings |= {"output_dir": tmp_path / "out"}
    assert message in refused(capsys, words_of(settings | changes))
    assert not (tmp_path / "out").exists()


def test_a_yaml_names_rewards_and_weights(tmp_path):
    lines = [
        "stage: grpo",
        "data: here",
        "model_name_or_path: there",
        f"output_dir: {tmp_path}/out",
        "rewards: [finding, format]",
        "reward_weights: [1.0, 0.25]",
        "missed_weight: -3.0",
    ]
    (tmp_path / "train.yaml").write_text("\n".join(lines))
    script_args, training_args, _ = training.parse_arguments(
        ["--config", str(tmp_path / "train.yaml")]
    )
    assert script_args.rewards == ["finding", "format"]
    assert training_args.reward_weights == [1.0, 0.25]
    assert script_args.missed_weight == -3.0


def test_the_stage_of_the_command_line_counts(tmp_path):
    (tmp_path / "train.yaml").write_text(f"stage: sft\ndata: x\noutput_dir: {tmp_path}\n")
    argv = ["--config", str(tmp_path / "train.yaml"), "--model_name_or_path", "y", "--stage=dpo"]
    script_args, training_args, _ = training.parse_arguments(argv)
    assert script_args.stage == "dpo" and type(training_args).__name__ == "DPOConfig"
    assert training_args.max_length is None, "or image tokens are cut"


# ---- pairs on disk


def test_pairs_on_disk_are_those_that_were_made(with_pairs):
    pairs = rewards.read_preferences(with_pairs)
    texts = {
        row["id"]: row["completion"][0]["content"][0]["text"] for row in read_records(with_pairs)
    }
    assert pairs.column_names == ["id", "prompt", "images", "chosen", "rejected"]
    kinds = set()
    for row in pairs:
        truth = texts[row["id"]]
        better = row["chosen"][0]["content"][0]["text"]
        worse = row["rejected"][0]["content"][0]["text"]
        assert better != worse and len(row["images"]) == 1
        [high], [low] = (
            rewards.finding_reward([better], [truth]),
            rewards.finding_reward([worse], [truth]),
        )
        kinds.add(high > low)
        assert high >= low
    assert True in kinds


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "train.jsonl:1 is no JSON"),
        ("[]", "train.jsonl:1 is no pair"),
        ('{"id": "a", "chosen": "x"}', "train.jsonl:1 has no rejected"),
        ('{"id": "nobody", "chosen": "x", "rejected": "y"}', "no record of 'train'"),
        ("", "is empty"),
    ],
)
def test_a_bad_line_of_pairs_is_named(tmp_path, line, message):
    said = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": CYST}]
    (tmp_path / "train.jsonl").write_text(json.dumps({"id": "a", "messages": said}))
    (tmp_path / "preferences").mkdir()
    (tmp_path / "preferences" / "train.jsonl").write_text(line)
    with pytest.raises(ValueError, match=re.escape(message)):
        rewards.read_preferences(tmp_path)


def test_an_answer_to_another_split_makes_no_pair(records):
    with pytest.raises(ValueError, match="no record of 'train'"):
        rewards.write_preferences(records, [{"id": "nobody", "answer": CYST}])


# ---- looks before the first step


def test_without_pairs_it_is_said_how_to_make_them(sample_path, tmp_path, capsys):
    convert_pairs(load_pairs(sample_path, split="train", limit=2), tmp_path / "data")
    line = refused(capsys, words(tmp_path / "data", tmp_path / "out", "dpo"))
    assert "medtune prefer" in line


def test_the_same_answer_as_chosen_and_rejected_is_refused(with_pairs, tmp_path, capsys):
    folder = tmp_path / "data"
    shutil.copytree(with_pairs, folder)
    line = {"id": read_records(folder)["id"][0], "chosen": CYST, "rejected": f" {CYST}"}
    (folder / "preferences" / "train.jsonl").write_text(json.dumps(line))
    line = refused(capsys, words(folder, tmp_path / "out", "dpo"))
    assert "1 of 1 pairs have the same answer as chosen and rejected" in line


def test_answers_that_a_limit_cuts_are_refused(with_pairs, tmp_path, capsys):
    line = refused(capsys, words(with_pairs, tmp_path / "out", "dpo", max_length=20))
    assert "are cut by max_length=20" in line
    line = refused(capsys, words(with_pairs, tmp_path / "out", "grpo", max_completion_length=5))
    assert "8 of 8 true answers are longer than max_completion_length=5" in line


def test_sampled_answers_that_are_cut_are_refused(records, mute_model, tmp_path, capsys):
    mute = {"model_name_or_path": mute_model, "check_prompts": 8}
    line = refused(capsys, words(records, tmp_path / "out", "grpo", **mute))
    assert "of 16 sampled answers are cut by max_completion_length=50" in line


def test_a_constant_reward_is_refused(sample_path, mute_model, tmp_path, capsys):
    records = tmp_path / "data"
    convert_pairs(load_pairs(sample_path, split="train", limit=4), records)
    mute = {"model_name_or_path": mute_model, "check_prompts": 4, "allow_cut_answers": "true"}
    mute |= {"rewards": "box", "max_completion_length": 8}
    line = refused(capsys, words(records, tmp_path / "out", "grpo", **mute))
    assert "box_reward is 0 for every answer to the 4 prompts" in line


def test_rewards_that_differ_between_questions_only_are_refused(
    records, mute_model, tmp_path, capsys
):
    """So cold, all answers to a question are alike; silence is worth less where a finding is."""
    mute = {"model_name_or_path": mute_model, "check_prompts": 8, "allow_cut_answers": "true"}
    mute |= {"max_completion_length": 2, "temperature": 1e-4}
    line = refused(capsys, words(records, tmp_path / "out", "grpo", **mute))
    assert "to each of the 8 prompts that were tried all answers earn the same" in line


def test_a_reference_that_is_not_the_start_is_refused(
    with_pairs, mute_model, mute_adapter, tmp_path
):
    """A start that moved after its reference was copied, as a wrongly read adapter would."""
    start = {"model_name_or_path": mute_model, "adapter": mute_adapter}
    arguments = words(with_pairs, tmp_path / "out", "dpo", **start)
    trainer = training.build_trainer(*training.parse_arguments(arguments))
    data = trainer.train_dataset
    check_reference(trainer, data, "chosen")
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if ".default." in name and "lora_B" in name:
                parameter.mul_(-1)
    with pytest.raises(ValueError, match="the reference is not the start"):
        check_reference(trainer, data, "chosen")


def test_records_that_cannot_be_judged_are_left_out_and_counted(
    sample_path, mute_model, tmp_path, capsys
):
    pairs = load_pairs(sample_path, split="train", limit=300)
    silent = []
    spoken = []
    for row, caption in enumerate(pairs["caption"]):
        said = parse_caption(caption)
        (spoken if said.findings or said.negated else silent).append(row)
    convert_pairs(pairs.select(silent[:3] + spoken[:2]), tmp_path / "data")
    changes = {"model_name_or_path": mute_model, "max_completion_length": 200}
    arguments = words(tmp_path / "data", tmp_path / "out", "grpo", **changes)
    trainer = training.build_trainer(*training.parse_arguments(arguments))
    assert len(trainer.train_dataset) == 2
    assert "3 of 5 records of 'train' are left out" in capsys.readouterr().err


# ---- they train


def adapter_of(folder: Path) -> dict:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("stage", ["dpo", "grpo"])
def test_a_stage_goes_on_from_an_adapter_and_can_be_resumed(
    stage, with_pairs, mute_model, mute_adapter, tmp_path
):
    changes = {"model_name_or_path": mute_model, "adapter": mute_adapter, "beta": 0.1}
    if stage == "grpo":
        # the number of words tells samples apart, whatever the model knows
        changes |= {"rewards": "length", "check_prompts": 2}
        changes |= {"max_completion_length": 16, "allow_cut_answers": "true"}
    whole = tmp_path / "whole"
    training.main(words(with_pairs, whole, stage, **changes))
    log = log_of(whole)
    if stage == "dpo":
        assert log[0]["loss"] == pytest.approx(0.6931, abs=1e-3), "start and reference are one"
    else:
        assert log[0]["kl"] == pytest.approx(0, abs=1e-4), "start and reference are one"

    begun = adapter_of(mute_adapter)
    ended = adapter_of(whole / "model")
    assert ended.keys() == begun.keys(), "the copy for the reference is not saved"
    moved = [name for name in begun if not torch.equal(begun[name], ended[name])]
    assert moved, "or nothing was trained"
    models.load_tuned(models.load_base(mute_model), whole / "model")

    again = tmp_path / "again"
    again.mkdir()
    (again / "settings.json").write_bytes((whole / "settings.json").read_bytes())
    (whole / "checkpoint-1").rename(again / "checkpoint-1")
    training.main([*words(with_pairs, again, stage, **changes), "--resume"])
    resumed = adapter_of(again / "model")
    for name, weights in ended.items():
        assert torch.allclose(weights, resumed[name], atol=1e-6), name
