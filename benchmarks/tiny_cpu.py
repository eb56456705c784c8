"""Where the time of the tiny run goes on a CPU, and what each setting takes off.

    python benchmarks/tiny_cpu.py [--steps 6] [--batch 8] [--json FILE]

Times are CPU milliseconds a sample: CPU time of the process, not the clock on the wall, says more
on a shared machine. The limit is the arithmetic that PyTorch counts, divided by the speed of a
large float32 product on the same number of threads in the same run.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _harness import Stopwatch, losses_of, make_parser, write_result
from _sample_training import make_trainer, sample_pairs, write_training_data
from torch.utils.flop_counter import FlopCounterMode

PAIRS = 64
RUNGS = {
    "plain": {},
    "fast": {"fast": True},
    "fast, cached features": {"fast": True, "cache_features": True},
}


def cpu_milliseconds(call: Callable[[], Any], times: int, samples: int = 1) -> float:
    """Give CPU milliseconds a sample: the median of `times` calls, after one that warms up."""
    call()
    spent = []
    for _ in range(times):
        watch = Stopwatch()
        call()
        spent.append(watch.read().cpu)
    return round(1000 * statistics.median(spent) / samples, 1)


def product_gflops(side: int = 1536) -> float:
    """Measure the speed of a large product in GFLOP a CPU second."""
    matrix = torch.randn(side, side)
    seconds = cpu_milliseconds(lambda: matrix @ matrix, times=5) / 1000
    return 2 * side**3 / seconds / 1e9


def measure(
    keys: dict[str, Any], data: Path, folder: Path, options: argparse.Namespace
) -> tuple[dict[str, float], list[float]]:
    """Train with the course's settings and some keys; time the parts of a step.

    Returns
    -------
    dict : milliseconds a sample of each part, and the arithmetic.
    list : the loss of every step.
    """
    settings = {
        "data": data,
        "output_dir": folder,
        "learning_rate": 4e-3,
        "per_device_train_batch_size": options.batch,
        "max_steps": options.steps,
    }
    trainer, _, _ = make_trainer(settings | keys)
    trainer.train()
    model = trainer.model
    core = model.get_base_model().model
    rows = trainer.train_dataset.select(range(options.batch))

    def collate():
        return trainer.data_collator([dict(row) for row in rows])

    batch = trainer._prepare_inputs(collate())

    @torch.no_grad()
    def look():
        core.get_image_features(batch["pixel_values"], batch["image_grid_thw"])

    @torch.no_grad()
    def forward():
        trainer.compute_loss(model, dict(batch))

    def forward_and_backward():
        trainer.compute_loss(model, dict(batch)).backward()

    def timed(call: Callable[[], Any]) -> float:
        return cpu_milliseconds(call, options.steps, options.batch)

    with FlopCounterMode(display=False) as counter:
        forward_and_backward()
    row = {
        "read and collate": timed(collate),
        "vision forward": timed(look),
        "forward": timed(forward),
        "forward and backward": timed(forward_and_backward),
        "GFLOP a sample": round(counter.get_total_flops() / options.batch / 1e9, 2),
    }
    return row, losses_of(trainer.state.log_history)


def largest_difference(losses: Sequence[float], others: Sequence[float]) -> float:
    """Give the largest relative difference of two curves."""
    return max(abs(one / other - 1) for one, other in zip(losses, others, strict=True))


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    gflops = round(product_gflops(), 1)
    rows = {}
    losses = {}
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "data"
        write_training_data(sample_pairs().select(range(PAIRS)), data)
        for number, (name, keys) in enumerate(RUNGS.items()):
            row, losses[name] = measure(keys, data, Path(scratch) / str(number), options)
            spent = row["read and collate"] + row["forward and backward"]
            row["share of arithmetic"] = round(1000 * row["GFLOP a sample"] / gflops / spent, 2)
            row["samples a CPU second"] = round(1000 / spent, 1)
            rows[name] = row
            print(name, row, flush=True)
    for name, row in rows.items():
        worst = largest_difference(losses[name], losses["plain"])
        row["losses differ by"] = f"{worst:.0e}"
        print(f"{name}: losses differ from the plain ones by {worst:.0e}")
    if options.json:
        found = {"threads": torch.get_num_threads(), "GFLOP a CPU second": gflops, "rows": rows}
        write_result(options.json, found)


if __name__ == "__main__":
    main()
