"""Run the training of another program with a clock in it.

    python benchmarks/_train_clock.py NOTES.json MODULE [WORDS ...]

MODULE is run as `python -m MODULE WORDS` would. Where it trains with a Trainer of Transformers, NOTES.json
then has the seconds at which each step ended, the losses that it logged, and the peak of memory.
"""

import functools
import json
import runpy
import sys
import time
from pathlib import Path

import torch
import transformers


class Clock(transformers.TrainerCallback):
    """Note when each step ends.

    Parameters
    ----------
    notes : the file to write.
    """

    def __init__(self, notes: Path):
        self._notes = notes
        self._times: list[float] = []
        self._losses: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._times.append(time.perf_counter())

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            self._losses.append(float(logs["loss"]))

    def on_train_end(self, args, state, control, **kwargs):
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        noted = {"times": self._times, "losses": self._losses, "peak_gb": round(peak / 1e9, 2)}
        noted["batch"] = args.per_device_train_batch_size * args.gradient_accumulation_steps
        self._notes.write_text(json.dumps(noted))


def main(notes: str, module: str, *words: str) -> None:
    """Put the clock into every trainer, and run the module."""
    own = transformers.Trainer.__init__

    # programs ask which arguments it takes
    @functools.wraps(own)
    def with_clock(trainer, *args, **options):
        own(trainer, *args, **options)
        trainer.add_callback(Clock(Path(notes)))

    transformers.Trainer.__init__ = with_clock
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
