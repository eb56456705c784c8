"""ZeRO-2 or ZeRO-3, large batch or small: does the loss follow the stage or the number of optimizer steps?

    python benchmarks/zero_claim.py DATA OUT.json [--samples 512] [--seeds 3]

A published recipe compared ZeRO-3 at batch 32 with ZeRO-2 at batch 4 and blamed the stage. This runs the two cells that
it ran and the two that it left out, on the tiny base model and two ranks, with its ratio of 8 to 1. Everything else is
equal: the samples and their order, the learning rate and its schedule, one epoch.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).parents[1]
STAGES, BATCHES = ("zero2", "zero3"), (4, 32)


def cells(data: Path, folder: Path, samples: int, seeds: int) -> list[dict]:
    """The arguments of every run."""
    common = {"model_name_or_path": str(REPO / "data" / "tiny-vlm"), "data": str(data), "disable_tqdm": True}
    common |= {"lora_r": 8, "lora_alpha": 16, "learning_rate": 2e-3, "lr_scheduler_type": "cosine", "logging_steps": 1}
    common |= {"save_strategy": "no", "dtype": "float32", "bf16": False, "eval_samples": 32}
    runs = []
    for seed in range(seeds):
        for stage in STAGES:
            for batch in BATCHES:
                run = {"seed": seed, "deepspeed": stage, "per_device_train_batch_size": batch // 2}
                run |= {"max_steps": samples // batch, "eval_strategy": "steps", "eval_steps": samples // batch}
                runs.append(common | run | {"output_dir": str(folder / f"{stage}-{batch}-{seed}")})
    return runs


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rank", action="store_true", help="this is one of the two ranks")
    options = parser.parse_args()
    if options.rank:
        from medtune import train

        for run in json.loads(options.data.read_text()):
            train.main([part for key, value in run.items() for part in (f"--{key}", str(value))])
        return
    folder = Path(tempfile.mkdtemp())
    runs = cells(options.data.resolve(), folder, options.samples, options.seeds)
    (folder / "runs.json").write_text(json.dumps(runs))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "127.0.0.1:0", __file__, "--rank", str(folder / "runs.json"), "-"]
    path = os.pathsep.join([str(REPO / "src"), os.environ.get("PYTHONPATH", "")])
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": path})
    results = []
    for run in runs:
        log = json.loads((Path(run["output_dir"]) / "log.json").read_text())
        row = {"seed": run["seed"], "stage": run["deepspeed"], "batch": 2 * run["per_device_train_batch_size"]}
        losses = [entry["loss"] for entry in log if "loss" in entry]
        row |= {"steps": run["max_steps"], "eval_loss": [e["eval_loss"] for e in log if "eval_loss" in e][-1]}
        results.append(row | {"losses": losses})
        print({key: value for key, value in row.items() if key != "losses"})
    options.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {key: value for key, value in runs[0].items() if key not in ("data", "output_dir", "model_name_or_path")}
    about = {"samples": options.samples, "settings": settings, "results": results}
    options.out.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
