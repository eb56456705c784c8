"""Trainings of the tiny base model on pairs of the sample set, as the course has them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from _harness import SAMPLE, TINY_MODEL, to_arguments
from datasets import Dataset

from medtune.pairs import load_pairs
from medtune.records import convert_pairs
from medtune.training import build_trainer, parse_arguments

# The course's settings, and what a measurement needs: every loss, no checkpoint, no bar.
SETTINGS = {
    "model_name_or_path": TINY_MODEL,
    "lora_r": 16,
    "lora_alpha": 32,
    "use_cpu": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
}


def sample_pairs() -> Dataset:
    """Load the pairs of the sample set."""
    return load_pairs(str(SAMPLE))


def write_training_data(pairs: Dataset, folder: Path) -> None:
    """Convert pairs into records, all of them to train on."""
    convert_pairs(pairs, folder, splits=["train"] * len(pairs))


def make_trainer(settings: Mapping[str, Any], **options: Any) -> tuple[Any, Any, Any]:
    """Make a trainer; return it with its script's and its model's arguments."""
    words = to_arguments(SETTINGS | dict(settings))
    script_args, training_args, model_args = parse_arguments(words)
    trainer = build_trainer(script_args, training_args, model_args, **options)
    return trainer, script_args, model_args
