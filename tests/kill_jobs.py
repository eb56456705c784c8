"""The jobs that tests/test_kills.py kills: each runs in a process of its own.

They stand apart from the tests so that the processes need not import pytest, and so that all that
takes seconds is imported once, before the processes part.
"""

import os
import resource
import time
from pathlib import Path

import peft  # noqa: F401 - imported before the processes part
import psutil
import tiny_qwen
import torch
import trl  # noqa: F401 - imported before the processes part
from tiny_training import words_of

from medtune import models, training
from medtune.answers import generate_answers

STEPS = 8


def train(place: Path, out: Path, **changes) -> None:
    """Train some steps, with a checkpoint after each."""
    settings = {
        "data": place / "data",
        "model_name_or_path": place / "base",
        "output_dir": out,
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": 1,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "lora_r": 4,
        "lora_dropout": 0.1,
        "seed": 0,
        "disable_tqdm": True,
        "resume": True,
    }
    training.main(words_of(settings | changes))


def train_qlora(place: Path, out: Path) -> None:
    """Train adapters on weights in 4 bits."""
    train(place, out, load_in_4bit=True, use_bnb_nested_quant=True)


def train_to_the_brim(place: Path, out: Path) -> None:
    """Train without a look at the free space: something else fills the disk meanwhile."""
    training.checkpoints._bytes_of_checkpoint = lambda model: 0
    train(place, out)


def slowly(image):
    """Show a picture after a while, so that there is time for a kill."""
    time.sleep(0.05)
    return image


def generate(place: Path, out: Path) -> None:
    """Answer a few questions, some in a batch."""
    processor = tiny_qwen.make_processor()
    model = tiny_qwen.make_model(processor)
    generate_answers(
        model,
        processor,
        tiny_qwen.make_records(),
        out=out / "answers.jsonl",
        batch_size=2,
        max_new_tokens=24,
        image_transform=slowly,
    )


def merge(place: Path, out: Path) -> None:
    """Merge an adapter and save the model in several files, as notebook 06 does it."""
    processor = models.load_processor(place / "base")
    tuned = models.load_tuned(models.load_base(place / "base"), place / "adapter")
    merged = tuned.merge_and_unload(safe_merge=True)
    models.save_model(merged, processor, out / "merged", card="a card", max_shard_size="300KB")


def export(place: Path, out: Path) -> None:
    """Save a model over another, many times."""
    processor = models.load_processor(place / "base")
    model = models.load_base(place / "base", dtype="bfloat16")
    for _ in range(20):
        models.save_model(model, processor, out / "model", card="a card", max_shard_size="200KB")


def limited(job, megabytes: int, *arguments) -> None:
    """Run a job that may have so many megabytes more than it has now."""
    allowed = psutil.Process().memory_info().vms + megabytes * 1_000_000
    resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
    job(*arguments)


def told_in(log: Path, job, *arguments) -> None:
    """Run a job whose output, also that of its libraries, goes to a file."""
    torch.set_num_threads(1)
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    job(*arguments)
