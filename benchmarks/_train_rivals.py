"""LLaMA-Factory and ms-swift on the pairs and the model of benchmarks/train.py: three rows each.

With its defaults; with the batch, the checkpointing and the precision of one of our rungs; and with
the best that its options give. Only the last two say something about the programs: the first says
what its defaults are.
"""

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from _harness import TINY_MODEL, run_for, to_arguments
from _train_one import CUDA, Conditions, device_name, late_speed, note
from _train_rungs import DENSE

from medtune.models import load_processor
from medtune.plan import make_twin

CLOCK = Path(__file__).with_name("_train_clock.py")


# ---- the rows


@dataclass(frozen=True)
class Row:
    """One of the three rows of a rival.

    Parameters
    ----------
    rival : of `RIVALS`.
    settings : its keys, on top of what all of its rows have.
    beside : our rung that it is compared with; empty if it is not.
    by_length : batches of answers of like length.
    """

    rival: str
    settings: dict[str, Any] = field(default_factory=dict)
    beside: str = ""
    by_length: bool = False


LLAMAFACTORY = {
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_target": "all",
    "lora_rank": 8,
    "lora_alpha": 16,
    "template": "qwen3_vl_nothink",
    "dataset": "records",
    "cutoff_len": 2048,
    "preprocessing_num_workers": 8,
    "dataloader_num_workers": 4,
    "overwrite_output_dir": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "learning_rate": 5.0e-5,
    "lr_scheduler_type": "cosine",
    "bf16": True,
    "flash_attn": "sdpa",
    "report_to": "none",
}
SWIFT = {
    "tuner_type": "lora",
    "target_modules": "all-linear",
    "lora_rank": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "model_type": "qwen3_vl",
    "max_length": 2048,
    "dataset_num_proc": 8,
    "dataloader_num_workers": 4,
    "save_strategy": "no",
    "logging_steps": 1,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "learning_rate": 5.0e-5,
    "torch_dtype": "bfloat16",
    "attn_impl": "sdpa",
    "report_to": "none",
}
# as our rung fast64 has them
EQUAL = {
    "per_device_train_batch_size": 64,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 8,
}
LLAMAFACTORY_EQUAL = EQUAL | {"disable_gradient_checkpointing": True}
SWIFT_EQUAL = EQUAL | {"gradient_checkpointing": False, "vit_gradient_checkpointing": False}
# LLaMA-Factory's own key enable_liger_kernel does nothing for Qwen3-VL; this one is Transformers'.
# A larger batch was no faster.
BEST = {"use_liger_kernel": True, "dataloader_num_workers": 12}
ROWS = {
    "llamafactory": Row("llamafactory"),
    "llamafactory_equal": Row("llamafactory", LLAMAFACTORY_EQUAL, "fast64"),
    "llamafactory_best": Row("llamafactory", LLAMAFACTORY_EQUAL | BEST, "fast96", by_length=True),
    "swift": Row("swift"),
    "swift_equal": Row("swift", SWIFT_EQUAL, "fast64"),
    "swift_best": Row("swift", SWIFT_EQUAL | BEST, "fast96", by_length=True),
}


# ---- how each is started


@dataclass(frozen=True)
class Started:
    """What starts a rival.

    Parameters
    ----------
    module : what `python -m` runs.
    words : its command line.
    environment : variables on top of those that are there.
    """

    module: str
    words: list[str]
    environment: dict[str, str] = field(default_factory=dict)


def start_llamafactory(name: str, row: Row, conditions: Conditions, by_length: dict) -> Started:
    """Write its settings into a file."""
    out = conditions.out
    settings = LLAMAFACTORY | row.settings | by_length | _in_common(name, conditions)
    settings |= {
        "model_name_or_path": str(_saved_twin(conditions)),
        "dataset_dir": str(out / "data"),
        "media_dir": str(out / "data"),
    }
    if not CUDA:
        settings |= {"bf16": False, "use_cpu": True, "use_liger_kernel": False}
    file = out / f"{name}.yaml"
    file.write_text(yaml.safe_dump(settings))
    return Started("llamafactory.cli", ["train", str(file)], {"DISABLE_VERSION_CHECK": "1"})


def start_swift(name: str, row: Row, conditions: Conditions, by_length: dict) -> Started:
    """Give its settings as words; a file of its own tells it the number of the image token."""
    out = conditions.out
    twin = _saved_twin(conditions)
    settings = SWIFT | row.settings | by_length | _in_common(name, conditions)
    settings |= {"model": twin, "dataset": out / "data" / "records.json"}
    if not CUDA:
        settings |= {"torch_dtype": "float32", "use_liger_kernel": False, "dataset_num_proc": 1}
    plugin = out / "swift_plugin.py"
    token = load_processor(twin).tokenizer.convert_tokens_to_ids("<|image_pad|>")
    # it has the number of the published tokenizer built in, and the twin's is smaller
    plugin.write_text(
        "from swift.template.templates import qwen\n"
        f"qwen.Qwen2VLTemplate.image_token_id = {token}\n"
    )
    settings["external_plugins"] = plugin
    return Started("swift.cli.sft", to_arguments(settings), {"ROOT_IMAGE_DIR": str(out / "data")})


RIVALS: dict[str, Callable[..., Started]] = {
    "llamafactory": start_llamafactory,
    "swift": start_swift,
}


def _in_common(name: str, conditions: Conditions) -> dict[str, Any]:
    """Give the keys that both call by one name."""
    settings: dict[str, Any] = {
        "output_dir": str(conditions.out / "runs" / name),
        "max_steps": conditions.steps or (4 if conditions.small else 30),
    }
    if conditions.small:
        settings |= {"per_device_train_batch_size": 2, "dataloader_num_workers": 0}
    return settings


# ---- the measurement


@dataclass(frozen=True)
class Place:
    """Where a rival is.

    Parameters
    ----------
    folder : it and what it asks for are installed in, since it wants other versions.
    python : the interpreter that runs it.
    """

    folder: Path
    python: str

    def environment(self) -> dict[str, str]:
        """Give the variables of its processes, which find it in its folder."""
        return os.environ | {"PYTHONPATH": str(self.folder)}


def measure_rival(name: str, place: Place, conditions: Conditions, seconds: float) -> None:
    """Train for at most so many seconds, and note the speed of the second half of the steps.

    Parameters
    ----------
    name : of `ROWS`.
    """
    out = conditions.out
    wanted = ROWS[name]
    by_length = _by_length(place) if wanted.by_length else {}
    row = {"rung": name, "device": device_name()}
    notes = out / f"{name}.json"
    notes.unlink(missing_ok=True)
    try:
        started = RIVALS[wanted.rival](name, wanted, conditions, by_length)
        command = [place.python, str(CLOCK), str(notes), started.module, *started.words]
        environment = place.environment() | started.environment
        ended = run_for(command, seconds, out / f"{name}.log", environment)
        if ended.code:
            raise RuntimeError("its time was up" if ended.timed_out else f"exit code {ended.code}")
        row |= read_notes(notes)
    except (RuntimeError, OSError, ValueError, KeyError, IndexError) as error:
        row["error"] = f"{type(error).__name__}: see {name}.log: {str(error)[-200:]}"
    note(out, row)


def read_notes(notes: Path) -> dict[str, Any]:
    """Compute the speed of the second half of the steps from what the clock noted."""
    noted = json.loads(notes.read_text())
    times = noted["times"]
    return {
        "samples_per_second": round(late_speed(times, noted["batch"]), 2),
        "batch": noted["batch"],
        "first_loss": noted["losses"][0],
        "last_loss": noted["losses"][-1],
        "steps": len(times),
        "peak_gb": noted["peak_gb"],
    }


def _by_length(place: Place) -> dict[str, Any]:
    """Give the key for batches by length, which Transformers renamed; a rival has its own version."""
    ask = (
        "import transformers as t; print('group_by_length' in t.TrainingArguments.__annotations__)"
    )
    answer = subprocess.run(
        [place.python, "-c", ask], env=place.environment(), capture_output=True, text=True
    )
    if answer.stdout.strip().endswith("True"):
        return {"group_by_length": True}
    return {"train_sampling_strategy": "group_by_length"}


def _saved_twin(conditions: Conditions) -> Path:
    """Write the twin with its weights, unless it is there."""
    folder = conditions.out / "models" / "saved"
    if not (folder / "config.json").exists():
        make_twin(
            DENSE,
            folder,
            scale=conditions.scale,
            tokenizer=TINY_MODEL / "tokenizer.json",
            device="cuda" if CUDA else "cpu",
        )
    return folder
