"""LLaMA-Factory on the pairs and the model of benchmarks/train.py: three rows.

With its defaults; with the batch, the checkpointing and the precision of one of our rungs; and with
the best that its options give. Only the last two say something about the programs: the first says
what its defaults are.
"""

import json
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from _harness import TINY_MODEL
from _train_one import CUDA, Conditions, device_name, note
from _train_rungs import DENSE

from medtune.plan import make_twin

SETTINGS = {
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


@dataclass(frozen=True)
class Row:
    """One of the three rows.

    Parameters
    ----------
    settings : its keys, on top of `SETTINGS`.
    beside : our rung that it is compared with; empty if it is not.
    by_length : batches of answers of like length.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    beside: str = ""
    by_length: bool = False


# as our rung fast64 has them
EQUAL = {
    "per_device_train_batch_size": 64,
    "gradient_accumulation_steps": 1,
    "disable_gradient_checkpointing": True,
    "dataloader_num_workers": 8,
}
# Its own key enable_liger_kernel does nothing for Qwen3-VL; this one is Transformers'. A larger
# batch was no faster.
BEST = EQUAL | {"use_liger_kernel": True, "dataloader_num_workers": 12}
ROWS = {
    "peer": Row(),
    "peer_equal": Row(EQUAL, beside="fast64"),
    "peer_best": Row(BEST, beside="fast96", by_length=True),
}


@dataclass(frozen=True)
class Peer:
    """Where LLaMA-Factory is.

    Parameters
    ----------
    folder : it and what it asks for are installed in, since it wants other versions.
    python : the interpreter that runs it.
    """

    folder: Path
    python: str

    def environment(self) -> dict[str, str]:
        """Give the variables of its processes, which find it in its folder."""
        return os.environ | {"PYTHONPATH": str(self.folder), "DISABLE_VERSION_CHECK": "1"}


def measure_peer(name: str, peer: Peer, conditions: Conditions, seconds: float) -> None:
    """Train for at most so many seconds, and note the speed of the second half of the steps.

    Parameters
    ----------
    name : of `ROWS`.
    """
    out = conditions.out
    wanted = ROWS[name]
    settings = SETTINGS | wanted.settings
    if wanted.by_length:
        settings |= _by_length(peer)
    settings |= {
        "model_name_or_path": str(_saved_twin(conditions)),
        "dataset_dir": str(out / "data"),
        "media_dir": str(out / "data"),
        "output_dir": str(out / "runs" / name),
        "max_steps": conditions.steps or 30,
    }
    if not CUDA:
        settings |= {"bf16": False, "use_cpu": True, "use_liger_kernel": False}
    if conditions.small:
        settings |= {"per_device_train_batch_size": 2, "dataloader_num_workers": 0}
    file = out / f"{name}.yaml"
    file.write_text(yaml.safe_dump(settings))
    command = [peer.python, "-m", "llamafactory.cli", "train", str(file)]
    batch = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
    row = {"rung": name, "device": device_name()}
    try:
        with open(out / f"{name}.log", "w") as log:
            subprocess.run(
                command, env=peer.environment(), stdout=log, stderr=log, timeout=seconds, check=True
            )
        row |= _read_speed(out / "runs" / name / "trainer_log.jsonl", batch)
    except (subprocess.SubprocessError, OSError, ValueError, KeyError, IndexError) as error:
        row["error"] = f"{type(error).__name__}: see {name}.log: {str(error)[-200:]}"
    note(out, row)


def _by_length(peer: Peer) -> dict[str, Any]:
    """Give the key for batches by length, which Transformers renamed; the peer has a version of its own."""
    ask = (
        "import transformers as t; print('group_by_length' in t.TrainingArguments.__annotations__)"
    )
    answer = subprocess.run(
        [peer.python, "-c", ask], env=peer.environment(), capture_output=True, text=True
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


def _read_speed(log: Path, batch: int) -> dict[str, Any]:
    """Compute the speed from a log whose clock shows whole seconds."""
    entries = []
    for line in log.read_text().splitlines():
        entry = json.loads(line)
        if "loss" in entry:
            entries.append(entry)
    middle = entries[len(entries) // 2]
    last = entries[-1]
    steps = last["current_steps"] - middle["current_steps"]
    seconds = _seconds(last["elapsed_time"]) - _seconds(middle["elapsed_time"])
    return {
        "samples_per_second": round(batch * steps / max(seconds, 1), 2),
        "batch": batch,
        "first_loss": entries[0]["loss"],
        "last_loss": last["loss"],
        "steps": last["current_steps"],
    }


def _seconds(clock: str) -> int:
    """Read "1:02:03" as seconds.

    >>> _seconds("1:02:03")
    3723
    """
    seconds = 0
    for part in clock.split(":"):
        seconds = 60 * seconds + int(part)
    return seconds
