"""Do adapters in bfloat16 learn as well as in float32? Loss curves of the tiny base model.

    python benchmarks/adapter_precision.py OUT.json [--steps 60] [--seeds 0 1 2] \
        [--rates 4e-3 4e-4 5e-5]

Under bfloat16 autocast the products are in bfloat16 either way (tests/test_training_speed.py): what
differs is the precision in which the optimizer keeps weights and moments. So that a CPU without
bfloat16 arithmetic can tell, everything is computed in float32 and, for "bfloat16", weights and
moments are rounded to bfloat16 after each step, as a fused AdamW does that computes in float32 and
stores bfloat16. The base's weights are bfloat16 numbers as they ship. Every step's loss is kept;
the compared number is the mean over the last quarter of the steps. Runs already in OUT.json are
skipped.
"""

import argparse
import itertools
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _harness import losses_of, make_parser, read_log, write_result
from _sample_training import make_trainer, sample_pairs, write_training_data
from transformers import TrainerCallback

from medtune.training import train_model

PRECISIONS = ("float32", "bfloat16")

Run = dict[str, Any]


class Round(TrainerCallback):
    """Round what the optimizer keeps to bfloat16 after each step."""

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        kept = [weight for weight in model.parameters() if weight.requires_grad]
        for state_of_weight in optimizer.state.values():
            kept += [state_of_weight["exp_avg"], state_of_weight["exp_avg_sq"]]
        with torch.no_grad():
            for tensor in kept:
                tensor.copy_(tensor.to(torch.bfloat16))


def train_once(run: Run, data: Path, folder: Path, options: argparse.Namespace) -> list[float]:
    """Train once and return the loss of every step."""
    settings = {
        "data": data,
        "output_dir": folder,
        "learning_rate": run["rate"],
        "lr_scheduler_type": "constant",
        "seed": run["seed"],
        "bf16": False,
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch,
        "cache_features": True,
        "fast": True,
    }
    callbacks = [Round()] if run["adapters"] == "bfloat16" else []
    trainer, script_args, model_args = make_trainer(settings, callbacks=callbacks)
    train_model(trainer, script_args, model_args)
    return losses_of(read_log(folder))


def loss_at_the_end(losses: Sequence[float]) -> float:
    """Average the last quarter of the steps."""
    quarter = max(1, len(losses) // 4)
    return statistics.mean(losses[-quarter:])


def summarise(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Compare, for each rate, the precisions by the mean loss at the end, seed by seed."""
    summary = {}
    for rate in sorted({run["rate"] for run in runs}, reverse=True):
        of_rate = [run for run in runs if run["rate"] == rate]
        ends: dict[str, dict[int, float]] = {precision: {} for precision in PRECISIONS}
        for run in of_rate:
            ends[run["adapters"]][run["seed"]] = loss_at_the_end(run["losses"])
        seeds = [seed for seed in ends["float32"] if seed in ends["bfloat16"]]
        if not seeds:
            continue
        full = [ends["float32"][seed] for seed in seeds]
        half = [ends["bfloat16"][seed] for seed in seeds]
        differences = [low / high - 1 for low, high in zip(half, full, strict=True)]
        first = statistics.mean(run["losses"][0] for run in of_rate)
        summary[f"{rate:g}"] = {
            "seeds": seeds,
            "first_loss": round(first, 4),
            "float32": [round(loss, 4) for loss in full],
            "bfloat16": [round(loss, 4) for loss in half],
            "relative_difference": [round(difference, 4) for difference in differences],
        }
    return summary


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=[4e-3, 4e-4, 5e-5])
    options = parser.parse_args()

    runs = json.loads(options.out.read_text())["runs"] if options.out.exists() else []
    done = {(run["rate"], run["seed"], run["adapters"]) for run in runs}
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "data"
        pairs = sample_pairs().shuffle(seed=0)
        pairs = pairs.select(range(min(len(pairs), options.steps * options.batch)))
        write_training_data(pairs, data)
        for choice in itertools.product(options.rates, options.seeds, PRECISIONS):
            if choice in done:
                continue
            rate, seed, precision = choice
            run = {"rate": rate, "seed": seed, "adapters": precision}
            folder = Path(scratch) / f"{rate}-{seed}-{precision}"
            losses = train_once(run, data, folder, options)
            print(json.dumps(run | {"last": losses[-1]}), flush=True)
            runs.append(run | {"losses": losses})
            result = {"steps": options.steps, "batch": options.batch}
            write_result(options.out, result | {"summary": summarise(runs), "runs": runs})
    print(json.dumps(summarise(runs), indent=1))


if __name__ == "__main__":
    main()
