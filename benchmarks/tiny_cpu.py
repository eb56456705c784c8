"""Where the time of the tiny run goes on a CPU, in CPU milliseconds a sample, and what each setting takes off.

    python benchmarks/tiny_cpu.py [--steps 6] [--batch 8] [--json FILE]

CPU time of the process, not the clock on the wall: on a shared machine it says more. The limit is the arithmetic that
PyTorch counts, divided by the speed of a large float32 product on the same number of threads in the same run.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

REPO = Path(__file__).parents[1]


def milliseconds(call, times: int, batch: int) -> float:
    """CPU milliseconds a sample: the median of `times` calls, after one that warms up."""
    call()
    spent = []
    for _ in range(times):
        began = time.process_time()
        call()
        spent.append(time.process_time() - began)
    return round(1000 * statistics.median(spent) / batch, 1)


def product_gflops(side: int = 1536) -> float:
    """Speed of a large product in GFLOP a CPU second."""
    a = torch.randn(side, side)
    return 2 * side**3 / (milliseconds(lambda: a @ a, 5, 1) / 1000) / 1e9


def measure(keys: dict, data: Path, folder: Path, options) -> dict:
    """Build the trainer of the course's settings and time its parts."""
    from torch.utils.flop_counter import FlopCounterMode

    from medtune import train

    settings = {"data": data, "model_name_or_path": REPO / "data" / "tiny-vlm", "output_dir": folder, "lora_r": 16}
    settings |= {"lora_alpha": 32, "learning_rate": 4e-3, "per_device_train_batch_size": options.batch, "use_cpu": True}
    settings |= {"max_steps": options.steps, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1} | keys
    parsed = train.parse_arguments([part for key, value in settings.items() for part in (f"--{key}", str(value))])
    trainer = train.build_trainer(*parsed)
    trainer.train()
    rows, model = trainer.train_dataset.select(range(options.batch)), trainer.model
    batch = trainer._prepare_inputs(trainer.data_collator([dict(row) for row in rows]))
    core, size = model.get_base_model().model, (options.steps, options.batch)

    @torch.no_grad()
    def look():
        core.get_image_features(batch["pixel_values"], batch["image_grid_thw"])

    def forward():
        with torch.no_grad():
            trainer.compute_loss(model, dict(batch))

    def both():
        trainer.compute_loss(model, dict(batch)).backward()

    with FlopCounterMode(display=False) as counter:
        both()
    row = {"read and collate": milliseconds(lambda: trainer.data_collator([dict(row) for row in rows]), *size)}
    row |= {"vision forward": milliseconds(look, *size), "forward": milliseconds(forward, *size)}
    row |= {"forward and backward": milliseconds(both, *size)}
    row |= {"GFLOP a sample": round(counter.get_total_flops() / options.batch / 1e9, 2)}
    return row | {"losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from medtune import convert
    from medtune.data import load_pairs

    found = {"threads": torch.get_num_threads(), "GFLOP a CPU second": round(product_gflops(), 1), "rows": {}}
    rungs = {"plain": {}, "fast": {"fast": True}, "fast, cached features": {"fast": True, "cache_features": True}}
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "data"
        pairs = load_pairs(str(REPO / "data" / "sample" / "sample.parquet")).select(range(64))
        convert.convert_pairs(pairs, data, splits=["train"] * 64)
        for number, (name, keys) in enumerate(rungs.items()):
            row = measure(keys, data, Path(scratch) / str(number), options)
            work, spent = row["GFLOP a sample"], row["read and collate"] + row["forward and backward"]
            row |= {"share of arithmetic": round(1000 * work / found["GFLOP a CPU second"] / spent, 2)}
            row |= {"samples a CPU second": round(1000 / spent, 1)}
            found["rows"][name] = row
            print(name, {key: value for key, value in row.items() if key != "losses"}, flush=True)
    plain = found["rows"]["plain"]["losses"]
    for name, row in found["rows"].items():
        worst = max(abs(a / b - 1) for a, b in zip(row.pop("losses"), plain, strict=True))
        row["losses differ by"] = f"{worst:.0e}"
        print(f"{name}: losses differ from the plain ones by {worst:.0e}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
