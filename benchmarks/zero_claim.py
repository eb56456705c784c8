"""ZeRO-2 or ZeRO-3, large batch or small: what does the loss follow, the stage or the steps?

    python benchmarks/zero_claim.py DATA OUT.json [--samples 512] [--seeds 3]

DATA is a folder of `medtune convert`. A published recipe compared ZeRO-3 at batch 32 with ZeRO-2 at
batch 4 and blamed the stage. This runs the two cells that it ran and the two that it left out, on
the tiny base model and two ranks, with its ratio of 8 to 1. Everything else is equal: the samples
and their order, the learning rate and its schedule, one epoch. Notebook 04 does it with one seed.
"""

import argparse
import itertools
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from _harness import (
    TINY_MODEL,
    environment_of_ranks,
    losses_of,
    make_parser,
    read_log,
    to_arguments,
    torchrun,
    write_result,
)

from medtune import training

STAGES = ("zero2", "zero3")
BATCHES = (4, 32)
RANKS = 2
# What all runs share.
SETTINGS = {
    "lora_r": 8,
    "lora_alpha": 16,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "dtype": "float32",
    "bf16": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "eval_strategy": "steps",
    "eval_samples": 32,
    "disable_tqdm": True,
}


def make_runs(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Give the settings of every run."""
    runs = []
    for seed, stage, batch in itertools.product(range(options.seeds), STAGES, BATCHES):
        steps = options.samples // batch
        run = {
            "model_name_or_path": str(TINY_MODEL),
            "data": str(options.data.resolve()),
            "output_dir": str(folder / f"{stage}-{batch}-{seed}"),
            "seed": seed,
            "deepspeed": stage,
            "per_device_train_batch_size": batch // RANKS,
            "max_steps": steps,
            "eval_steps": steps,
        }
        runs.append(SETTINGS | run)
    return runs


def train_all(file: Path) -> None:
    """Train the runs of a file one after the other, as one of the ranks."""
    for run in json.loads(file.read_text()):
        training.main(to_arguments(run))


def result_of(run: dict[str, Any]) -> dict[str, Any]:
    """Read what a run left."""
    log = read_log(run["output_dir"])
    held_out = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    return {
        "seed": run["seed"],
        "stage": run["deepspeed"],
        "batch": RANKS * run["per_device_train_batch_size"],
        "steps": run["max_steps"],
        "eval_loss": held_out[-1],
        "losses": losses_of(log),
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=3)
    # this is one of the two ranks, and DATA is the file of the runs
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        train_all(options.data)
        return
    folder = Path(tempfile.mkdtemp())
    runs = make_runs(options, folder)
    file = folder / "runs.json"
    file.write_text(json.dumps(runs))
    command = [*torchrun(RANKS), __file__, "--rank", str(file), "-"]
    subprocess.run(command, check=True, env=environment_of_ranks())
    results = []
    for run in runs:
        result = result_of(run)
        results.append(result)
        print({key: value for key, value in result.items() if key != "losses"})
    paths = ("data", "output_dir", "model_name_or_path")
    settings = {key: value for key, value in runs[0].items() if key not in paths}
    found = {"samples": options.samples, "settings": settings, "results": results}
    write_result(options.out, found)


if __name__ == "__main__":
    main()
