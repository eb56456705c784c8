"""Supervised fine-tuning as a script: the same code in a notebook, in one process, on many GPUs.

`medtune train train.yaml` or `python -m medtune.training --config train.yaml` trains in one
process. The same file under `torchrun`, `accelerate launch` or `deepspeed` trains in many.

In `output_dir` there will be `settings.json`, `log.json`, folders `checkpoint-N` and, at last,
`model`: the adapter, or the whole model, with its processor. `finished.json` says that it is
complete.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import distributed
from trl import ModelConfig, SFTConfig

from medtune.models import model_card, save_model, write_no_stub_cards
from medtune.records import count_rejected

from .checkpoints import (
    RunCallback,
    Start,
    note_finished,
    prepare_start,
    shared_settings,
    why_finished,
)
from .failures import explain
from .settings import ScriptArguments, parse_arguments, zero_stage
from .stream import ShardLoader
from .trainer import build_trainer
from .watchdog import watch

# What a shell gives for Ctrl-C: a scheduler can tell a run that was stopped from one that failed.
STOPPED = 130

# A model card names the questions of so many records, and not more questions than this.
RECORDS_ASKED = 100
MOST_QUESTIONS = 5


def train_model(trainer: Any, script_args: ScriptArguments, model_args: ModelConfig) -> None:
    """Train, from the newest complete checkpoint if `resume` says so, and save the model.

    A run that is finished is left as it is, and a line says so.

    Parameters
    ----------
    trainer : what `build_trainer` made of the same settings.
    script_args, model_args : see `parse_arguments`.

    Raises
    ------
    ValueError, OSError : the folder belongs to another run, the ZeRO stages differ, the disk is
        full.
    SystemExit : 130 after Ctrl-C, SIGTERM or SIGUSR1, once the checkpoint of the current step is
        written.
    """
    settings = shared_settings(script_args, trainer.args, model_args)
    start = _agree_on_start(trainer, settings, script_args.resume)
    if start.finished:
        trainer.accelerator.print(f"medtune train: {start.finished}")
        return
    if start.universal:
        config = trainer.args.deepspeed_plugin.hf_ds_config.config
        config["checkpoint"] = {"load_universal": True}
    stream = getattr(trainer, "shard_loader", None)
    if stream is not None and start.checkpoint:
        stream.load(Path(start.checkpoint))
    callback = RunCallback(trainer, stream)
    trainer.add_callback(callback)
    # SIGUSR1 is what Slurm can send before the time of a job is over
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, callback.ask_to_stop)
    _take_no_step_too_many(trainer)
    write_no_stub_cards(trainer)
    with watch(trainer, script_args.watchdog_seconds):
        trainer.train(resume_from_checkpoint=start.checkpoint)
    if callback.stop:
        if trainer.is_world_process_zero():
            step = f"{trainer.state.global_step} of {trainer.state.max_steps}"
            print(f"medtune train: stopped after step {step}, --resume goes on", file=sys.stderr)
        raise SystemExit(STOPPED)
    if stream is not None and trainer.is_world_process_zero():
        _tell_what_was_left_out(stream)
    _save(trainer, script_args, model_args, settings)


def _take_no_step_too_many(trainer: Any) -> None:
    """Let a run that was killed between its last checkpoint and its model train nothing more.

    Transformers looks at the number of steps only after a step, and so would take one more.
    """
    own = trainer._run_epoch

    def run_epoch(*args: Any, **kwargs: Any) -> None:
        if trainer.state.global_step >= trainer.state.max_steps:
            trainer.control.should_training_stop = True
            return
        own(*args, **kwargs)

    trainer._run_epoch = run_epoch


def _agree_on_start(trainer: Any, settings: dict[str, Any], resume: bool) -> Start:
    """Let rank 0 look into the folder of the run, and tell all ranks what it found."""
    args = trainer.args
    start = None
    if trainer.is_world_process_zero():
        start = prepare_start(
            Path(args.output_dir),
            settings,
            resume=resume,
            stage=zero_stage(args),
            ranks=args.world_size,
        )
    return broadcast_object_list([start])[0]


def _save(
    trainer: Any, script_args: ScriptArguments, model_args: ModelConfig, settings: dict[str, Any]
) -> None:
    """Save the adapter or the whole model with its processor and a card, as folder `model`."""
    model = trainer.model
    if zero_stage(trainer.args) == 3:
        # every rank must take part when the shards of all are put together on rank 0
        state = trainer.deepspeed._zero3_consolidated_16bit_state_dict(
            exclude_frozen_parameters=model_args.use_peft
        )
        model.save_pretrained = partial(model.save_pretrained, state_dict=state)
    if trainer.is_world_process_zero():
        card = model_card(
            model_args.model_name_or_path,
            data=script_args.data,
            settings=settings,
            question=_questions(trainer.train_dataset),
            pictures=_pictures(trainer.train_dataset),
            kind="adapter" if model_args.use_peft else "merged",
        )
        save_model(
            model, trainer.processing_class, Path(trainer.args.output_dir) / "model", card=card
        )
        state = trainer.state
        note_finished(
            Path(trainer.args.output_dir), steps=state.global_step, epochs=state.epoch or 0.0
        )
    # a rank that left while another still saves can abort
    trainer.accelerator.wait_for_everyone()


def _tell_what_was_left_out(stream: ShardLoader) -> None:
    """Say how many rows of the shards no step was trained on, and why."""
    kinds = stream.stream.index.reasons + count_rejected(stream.stream.left_out.folder)
    if kinds:
        # the lists come in the order of the processes' numbers, which is chance
        listed = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        print(
            f"medtune train: {kinds.total()} of {stream.stream.index.rows} rows were left out "
            f"({listed}): {stream.stream.left_out.folder} lists those that were read",
            file=sys.stderr,
        )


def _questions(data: Any) -> list[str]:
    """List what the first records ask, each question once: most data sets ask few."""
    questions = []
    # a stream and a data set alike
    for row in data.select_columns(["prompt"]).take(RECORDS_ASKED):
        parts = row["prompt"][-1]["content"]
        question = "".join(part.get("text") or "" for part in parts).strip()
        if question not in questions and len(questions) < MOST_QUESTIONS:
            questions.append(question)
    return questions


def _pictures(data: Any) -> int:
    """Count the pictures of the first record's question; 1 where the record marks none."""
    for row in data.select_columns(["prompt"]).take(1):
        parts = row["prompt"][-1]["content"]
        return max(1, sum(part["type"] == "image" for part in parts))
    return 1


def _is_finished(
    script_args: ScriptArguments, training_args: SFTConfig, model_args: ModelConfig
) -> bool:
    """Say, before a model is loaded for nothing, whether the run is finished; prints so, too."""
    if not script_args.resume:
        return False
    settings = shared_settings(script_args, training_args, model_args)
    # what rank 0 finds holds for all: output_dir may lie on its machine alone
    finished = broadcast_object_list([why_finished(Path(training_args.output_dir), settings)])[0]
    if finished and training_args.process_index == 0:
        print(f"medtune train: {finished}", flush=True)
    return bool(finished)


def leave_ranks() -> None:
    """End this process if it is a rank of several: the last line of a program that a launcher starts.

    DeepSpeed keeps the groups of ranks after they are destroyed, and gloo's threads with them. One
    that still holds a tensor when the interpreter ends aborts the process, and the launcher calls a
    finished training failed (pytorch/pytorch, pull request 179291). So what was registered to run at
    the end is run, and the interpreter's own end is left out. Alone, a process goes on as usual.

    Examples
    --------
    >>> leave_ranks()
    """
    if not distributed.is_initialized():
        return
    distributed.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def main(argv: list[str] | None = None, trainer_class: Callable[..., Any] | None = None) -> None:
    """Train as the arguments say; what a user can put right is one line.

    Parameters
    ----------
    argv : words as in `sys.argv[1:]`, which are taken by default.
    trainer_class : see `build_trainer`.

    Raises
    ------
    SystemExit : 1 after an error that a user can put right, 130 after a signal.

    Examples
    --------
    >>> main(["--data", "records", "--lerning_rate", "1"])
    Traceback (most recent call last):
    SystemExit: 1
    """
    out = "output_dir"
    try:
        if argv is None:
            argv = sys.argv[1:]
        script_args, training_args, model_args = parse_arguments(argv)
        out = training_args.output_dir
        if _is_finished(script_args, training_args, model_args):
            return
        trainer = build_trainer(script_args, training_args, model_args, trainer_class=trainer_class)
        train_model(trainer, script_args, model_args)
    except Exception as error:
        line, for_users = explain(error, out)
        rank = os.environ.get("RANK", 0)
        print(f"medtune train: rank {rank}: {line}", file=sys.stderr, flush=True)
        if not for_users:
            raise
        sys.exit(1)
