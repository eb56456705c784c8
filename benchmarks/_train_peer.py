"""LLaMA-Factory with its defaults, on the pairs and the model of benchmarks/train.py."""

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from _harness import TINY_MODEL
from _train_one import CUDA, Conditions, device_name, note
from _train_rungs import DENSE

from medtune.plan import make_twin

BATCH = 4
ACCUMULATION = 4
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
    "per_device_train_batch_size": BATCH,
    "gradient_accumulation_steps": ACCUMULATION,
    "learning_rate": 5.0e-5,
    "lr_scheduler_type": "cosine",
    "bf16": True,
    "flash_attn": "sdpa",
    "report_to": "none",
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


def measure_peer(peer: Peer, conditions: Conditions, seconds: float) -> None:
    """Train for at most so many seconds, and note the speed of the second half of the steps."""
    out = conditions.out
    settings = SETTINGS | {
        "model_name_or_path": str(_saved_twin(conditions)),
        "dataset_dir": str(out / "data"),
        "media_dir": str(out / "data"),
        "output_dir": str(out / "runs" / "peer"),
        "max_steps": conditions.steps or 30,
    }
    if not CUDA:
        settings |= {"bf16": False, "use_cpu": True}
    (out / "peer.yaml").write_text(yaml.safe_dump(settings))
    environment = os.environ | {"PYTHONPATH": str(peer.folder), "DISABLE_VERSION_CHECK": "1"}
    command = [peer.python, "-m", "llamafactory.cli", "train", str(out / "peer.yaml")]
    row = {"rung": "peer", "device": device_name()}
    try:
        with open(out / "peer.log", "w") as log:
            subprocess.run(
                command, env=environment, stdout=log, stderr=log, timeout=seconds, check=True
            )
        row |= _read_speed(out / "runs" / "peer" / "trainer_log.jsonl")
    except (subprocess.SubprocessError, OSError, ValueError, KeyError, IndexError) as error:
        row["error"] = f"{type(error).__name__}: see peer.log: {str(error)[-200:]}"
    note(out, row)


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


def _read_speed(log: Path) -> dict[str, Any]:
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
    batch = BATCH * ACCUMULATION
    return {
        "samples_per_second": round(batch * steps / max(seconds, 1), 2),
        "batch": batch,
        "first_loss": entries[0]["loss"],
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
