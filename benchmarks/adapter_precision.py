"""Do adapters in bfloat16 learn as well as in float32? Loss curves of the tiny base, over seeds and learning rates.

    python benchmarks/adapter_precision.py OUT.json [--steps 60] [--seeds 0 1 2] [--rates 4e-3 4e-4 5e-5]

Under bfloat16 autocast the products are in bfloat16 either way (tests/test_speed.py): what differs is the precision in
which the optimizer keeps weights and moments. So that a CPU without bfloat16 arithmetic can tell, everything is
computed in float32 and, for "bfloat16", weights and moments are rounded to bfloat16 after each step, as a fused AdamW
does that computes in float32 and stores bfloat16. The base's weights are bfloat16 numbers as they ship. Every step's
loss is kept; the compared number is the mean over the last quarter of the steps. Runs already in OUT.json are skipped.
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

REPO = Path(__file__).parents[1]


def train_once(data: Path, folder: Path, rate: float, seed: int, rounded: bool, options) -> list[float]:
    """Train once and return the loss of every step."""
    import torch
    from transformers import TrainerCallback

    from medtune import train

    class Round(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            moments = (m for state in optimizer.state.values() for key, m in state.items() if key.startswith("exp_avg"))
            with torch.no_grad():
                for kept in [*(p for p in model.parameters() if p.requires_grad), *moments]:
                    kept.copy_(kept.to(torch.bfloat16))

    settings = {"data": data, "model_name_or_path": REPO / "data" / "tiny-vlm", "output_dir": folder, "lora_r": 16}
    settings |= {"learning_rate": rate, "seed": seed, "bf16": False, "use_cpu": True, "lora_alpha": 32}
    settings |= {"max_steps": options.steps, "per_device_train_batch_size": options.batch, "logging_steps": 1}
    settings |= {"lr_scheduler_type": "constant", "save_strategy": "no", "disable_tqdm": True}
    settings |= {"cache_features": True, "fast": True}
    arguments = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    parsed = train.parse_arguments(arguments)
    trainer = train.build_trainer(*parsed, callbacks=[Round()] if rounded else [])
    train.run(trainer, parsed[0], parsed[2])
    return [entry["loss"] for entry in json.loads((folder / "log.json").read_text()) if "loss" in entry]


def summarise(runs: list[dict]) -> dict:
    """For each rate: the mean loss at the end by precision, and the difference of the pairs of a seed."""
    found = {}
    for rate in sorted({run["rate"] for run in runs}, reverse=True):
        ends = {}
        for run in runs:
            if run["rate"] == rate:
                last = run["losses"][-max(1, len(run["losses"]) // 4) :]
                ends[run["adapters"], run["seed"]] = statistics.mean(last)
        seeds = [seed for kind, seed in ends if kind == "float32" and ("bfloat16", seed) in ends]
        if not seeds:
            continue
        row = {kind: [round(ends[kind, seed], 4) for seed in seeds] for kind in ("float32", "bfloat16")}
        row["relative_difference"] = [round(ends["bfloat16", s] / ends["float32", s] - 1, 4) for s in seeds]
        starts = [run["losses"][0] for run in runs if run["rate"] == rate]
        found[f"{rate:g}"] = {"seeds": seeds, "first_loss": round(statistics.mean(starts), 4)} | row
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=[4e-3, 4e-4, 5e-5])
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from medtune import convert
    from medtune.data import load_pairs

    runs = json.loads(options.out.read_text())["runs"] if options.out.exists() else []
    done = {(run["rate"], run["seed"], run["adapters"]) for run in runs}
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "data"
        pairs = load_pairs(str(REPO / "data" / "sample" / "sample.parquet"))
        pairs = pairs.shuffle(seed=0).select(range(min(len(pairs), options.steps * options.batch)))
        convert.convert_pairs(pairs, data, splits=["train"] * len(pairs))
        for rate in options.rates:
            for seed in options.seeds:
                for kind in ("float32", "bfloat16"):
                    if (rate, seed, kind) in done:
                        continue
                    folder = Path(scratch) / f"{rate}-{seed}-{kind}"
                    losses = train_once(data, folder, rate, seed, kind == "bfloat16", options)
                    runs.append({"rate": rate, "seed": seed, "adapters": kind, "losses": losses})
                    result = {"steps": options.steps, "batch": options.batch, "summary": summarise(runs), "runs": runs}
                    options.out.parent.mkdir(parents=True, exist_ok=True)
                    options.out.write_text(json.dumps(result, indent=1) + "\n")
                    print(json.dumps({"rate": rate, "seed": seed, "adapters": kind, "last": losses[-1]}), flush=True)
    print(json.dumps(summarise(runs), indent=1))


if __name__ == "__main__":
    main()
