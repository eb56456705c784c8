"""Train a model, check in the first minute that it trains, and make it fast.

`checks` looks at labels, image tokens, gradients and accumulation before the hours begin, `reload`
at the adapter on disk after them. `settings` has the keys of a training, `trainer` makes TRL's
trainer of them, `stream` lets it read shards as it goes, `preflight` looks at all records before
the first step, `checkpoints` knows how a run stops and goes on, and `launch` runs it: in a notebook
or as `python -m medtune.training --config train.yaml`, in one process or in many. `watchdog` says
what a training waits for that hangs, `failures` what ended one. `speed` and `features` do the same
training in less time; the folder `deepspeed` holds settings for ZeRO. `words` lets the words that
name the structure weigh more in the loss. `watch` starts a training from a notebook and stops it
after some minutes, `messages` counts what its processes send each other, and `measure` what a step
takes.
"""

from .checkpoints import complete_checkpoints
from .checks import (
    answer_end,
    check_accumulation,
    check_gradients,
    check_image_tokens,
    check_labels,
)
from .features import cache_features
from .launch import leave_ranks, main, train_model
from .messages import bytes_sent
from .reload import check_reload
from .settings import ZERO, ScriptArguments, parse_arguments
from .speed import pad_lengths, send_bytes, speed_up
from .trainer import build_trainer
from .watch import run_watched
from .words import name_spans, weigh_names

__all__ = [
    "ZERO",
    "ScriptArguments",
    "answer_end",
    "build_trainer",
    "bytes_sent",
    "cache_features",
    "check_accumulation",
    "check_gradients",
    "check_image_tokens",
    "check_labels",
    "check_reload",
    "complete_checkpoints",
    "leave_ranks",
    "main",
    "name_spans",
    "pad_lengths",
    "parse_arguments",
    "run_watched",
    "send_bytes",
    "speed_up",
    "train_model",
    "weigh_names",
]
