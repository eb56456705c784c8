"""What a training leaves behind while it runs, and how it goes on from there after a stop.

The folder of a run, `output_dir`, holds `settings.json`, `log.json` and folders `checkpoint-N`.
Into a checkpoint goes, last of all, the note `complete.json`: one without it was cut off. Once the
model is saved, `finished.json` says after how many steps.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed import distributed_c10d
from transformers import TrainerCallback
from trl import ModelConfig, SFTConfig

from medtune.files import write_json
from medtune.records import names_shards

from .settings import OF_SHARDS, ScriptArguments, zero_stage
from .stream import ShardLoader

# Of TRL's settings, what a run and its continuation share. The rest is places, printing, and how a step
# is cut into batches.
SHARED_KEYS = [
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "max_steps",
    "num_train_epochs",
    "max_grad_norm",
    "optim",
    "weight_decay",
    "seed",
    "data_seed",
    "bf16",
    "fp16",
    "completion_only_loss",
    "max_length",
]


# The same of DPOConfig and GRPOConfig, beside those above that they have.
SHARED_KEYS_OF = {
    "sft": [],
    "dpo": ["beta", "loss_type", "loss_weights", "label_smoothing", "f_divergence_type"],
    "grpo": [
        "beta",
        "loss_type",
        "epsilon",
        "epsilon_high",
        "num_generations",
        "num_iterations",
        "steps_per_generation",
        "max_completion_length",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "reward_weights",
        "scale_rewards",
        "mask_truncated_completions",
    ],
}

# Of ScriptArguments, what changes nothing that is learned.
OWN_TO_A_START = ("allow_cut_answers", "watchdog_seconds", "check_prompts")

# How long a run is. A continuation may be longer.
LENGTHS = ("max_steps", "num_train_epochs")

# Epochs are counted in fractions of a step.
ROUNDING = 1e-6


def shared_settings(
    script_args: ScriptArguments, training_args: SFTConfig, model_args: ModelConfig
) -> dict[str, Any]:
    """Collect what a run and its continuation must have in common, in the types of JSON."""
    settings = asdict(script_args) | asdict(model_args)
    for key in OWN_TO_A_START:
        settings.pop(key, None)
    if script_args.stage == "sft":
        # runs that began before there were others did not note it
        settings.pop("stage")
    if not names_shards(script_args.data):
        for key in OF_SHARDS:
            settings.pop(key)
    for key in SHARED_KEYS + SHARED_KEYS_OF[script_args.stage]:
        if hasattr(training_args, key):
            settings[key] = getattr(training_args, key)
    # however they are cut: over ranks, over batches of a step
    settings["samples_per_step"] = (
        training_args.world_size
        * training_args.per_device_train_batch_size
        * training_args.gradient_accumulation_steps
    )
    # a continuation differs in this key
    settings["resume"] = None
    return json.loads(json.dumps(settings, default=str))


def complete_checkpoints(output_dir: str | os.PathLike) -> list[tuple[Path, dict[str, Any]]]:
    """Find the checkpoints that were written to their end, newest first.

    Parameters
    ----------
    output_dir : folder of the run, with folders `checkpoint-N` in it.

    Returns
    -------
    list of tuple : folder, and its note `complete.json`. The note is written last and has "step",
        "zero_stage", "ranks" and "files": each of these must still have its size in bytes.

    Examples
    --------
    >>> import tempfile
    >>> out = Path(tempfile.mkdtemp())
    >>> for step in (2, 10, 12):
    ...     (out / f"checkpoint-{step}").mkdir()
    >>> for step in (2, 10):
    ...     write_json(out / f"checkpoint-{step}" / "complete.json", {"step": step, "files": {}})
    >>> [folder.name for folder, note in complete_checkpoints(out)]
    ['checkpoint-10', 'checkpoint-2']
    """
    found = []
    for folder in Path(output_dir).glob("checkpoint-*"):
        # no note, a note that was cut off, a file that is missing: not complete
        with contextlib.suppress(OSError, ValueError):
            note = json.loads((folder / "complete.json").read_text("utf-8"))
            sizes = {name: (folder / name).stat().st_size for name in note["files"]}
            if sizes == note["files"]:
                found.append((folder, note))
    return sorted(found, key=_step_of, reverse=True)


def _step_of(checkpoint: tuple[Path, dict[str, Any]]) -> int:
    return checkpoint[1]["step"]


@dataclass
class Start:
    """From where a run goes on.

    Attributes
    ----------
    checkpoint : folder of the checkpoint, or None to start anew.
    universal : whether DeepSpeed must read the checkpoint in its universal form, because it was
        written by another number of ranks.
    finished : why nothing is left to do, in one line; empty where something is.
    """

    checkpoint: str | None = None
    universal: bool = False
    finished: str = ""


def prepare_start(
    out: Path, settings: dict[str, Any], *, resume: bool, stage: int | None, ranks: int
) -> Start:
    """Make the folder of a run ready, and say from where it goes on; for rank 0 only.

    Parameters
    ----------
    out : folder of the run. Incomplete checkpoints in it are removed.
    settings : of this run, see `shared_settings`.
    resume : whether a run that is there may be continued.
    stage : ZeRO stage, or None without DeepSpeed.
    ranks : number of processes that train.

    Returns
    -------
    Start : the newest complete checkpoint, or none; or that the run is finished.

    Raises
    ------
    ValueError : the folder holds a run with other settings or of another ZeRO stage, a run that is
        not to be resumed, or a finished one that left no checkpoint to train longer from.

    Examples
    --------
    >>> import tempfile
    >>> out = Path(tempfile.mkdtemp())
    >>> prepare_start(out, {"seed": 1}, resume=False, stage=None, ranks=1)
    Start(checkpoint=None, universal=False, finished='')
    """
    finished = why_finished(out, settings) if resume else ""
    if finished:
        return Start(finished=finished)
    _refuse_another_run(out, settings, resume)
    complete = complete_checkpoints(out)
    if not complete and (out / "finished.json").exists() and (out / "model").is_dir():
        raise ValueError(
            f"{out} is finished and left no checkpoint to train longer from: "
            "choose another output_dir, and another save_strategy than 'no' to be able to"
        )
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "settings.json", settings)
    _remove_all_but(out, [folder for folder, _ in complete])
    if not complete:
        return Start()
    folder, note = complete[0]
    if note["zero_stage"] != stage:
        was = "without DeepSpeed"
        if note["zero_stage"] is not None:
            was = f"under ZeRO stage {note['zero_stage']}"
        raise ValueError(f"{folder} was written {was}: only a run of the same kind can continue it")
    # only DeepSpeed's own checkpoints are in as many pieces as there were ranks
    universal = bool(stage) and note["ranks"] != ranks
    if universal:
        _write_universal_form(folder, note["step"])
    return Start(str(folder), universal)


def why_finished(out: Path, settings: dict[str, Any]) -> str:
    """Say in one line that a run is finished; empty if it is not, or is another run.

    Parameters
    ----------
    out : folder of the run.
    settings : of the run that is to go on, see `shared_settings`.

    Examples
    --------
    >>> why_finished(Path("no-folder"), {"max_steps": 4})
    ''
    """
    model = out / "model"
    try:
        old = json.loads((out / "settings.json").read_text("utf-8"))
        note = json.loads((out / "finished.json").read_text("utf-8"))
        steps, epochs = note["steps"], note["epochs"]
    except (OSError, ValueError, KeyError):
        return ""
    same = all(settings[key] == old.get(key) for key in settings if key not in LENGTHS)
    if not same or not model.is_dir():
        return ""
    if settings["max_steps"] > 0:
        reached = steps >= settings["max_steps"]
    else:
        reached = epochs >= settings["num_train_epochs"] - ROUNDING
    if not reached:
        return ""
    return (
        f"{out} is finished after {steps} steps, its model is in {model}: nothing is left to train "
        "(a larger max_steps or num_train_epochs trains longer)"
    )


def note_finished(out: Path, *, steps: int, epochs: float) -> None:
    """Note, after all else, that the model of a run is saved, and after how much training."""
    write_json(out / "finished.json", {"steps": steps, "epochs": epochs})


def _refuse_another_run(out: Path, settings: dict[str, Any], resume: bool) -> None:
    """Raise `ValueError` if the folder holds a run that this one may not continue."""
    noted = out / "settings.json"
    if noted.exists():
        old = json.loads(noted.read_text("utf-8"))
        changed = [key for key in settings if settings[key] != old.get(key)]
        longer = resume and _is_longer(settings, old)
        if longer:
            changed = [key for key in changed if key not in LENGTHS]
        if changed:
            raise ValueError(
                f"{out} holds a run with another {', '.join(changed)}: choose another output_dir"
            )
        if longer:
            print(
                f"medtune train: {out} is to be longer now: from here on the learning rate "
                "follows the longer schedule",
                file=sys.stderr,
            )
        if resume:
            return
    if noted.exists() or any(out.glob("checkpoint-*")):
        raise ValueError(
            f"{out} holds a run already: add --resume (resume: true) to continue it, "
            "or choose another output_dir"
        )


def _is_longer(new: dict[str, Any], old: dict[str, Any]) -> bool:
    """Say whether a run is to have more steps, or more epochs, than the one that is there."""
    if any(new.get(key) is None or old.get(key) is None for key in LENGTHS):
        return False
    if new["max_steps"] > 0 and old["max_steps"] > 0:
        # then nobody looks at the epochs
        return new["max_steps"] > old["max_steps"]
    if new["max_steps"] != old["max_steps"]:
        return False
    return new["num_train_epochs"] > old["num_train_epochs"]


def _remove_all_but(out: Path, complete: list[Path]) -> None:
    """Remove the checkpoints that are not complete: the next one may have the same name."""
    for folder in list(out.glob("checkpoint-*")):
        if folder not in complete:
            print(f"medtune train: {folder} is incomplete: it is removed", file=sys.stderr)
            shutil.rmtree(folder)


def _write_universal_form(checkpoint: Path, step: int) -> None:
    """Let DeepSpeed rewrite the pieces of its ranks as a form that any number of ranks can read."""
    # DeepSpeed writes this file last
    if (checkpoint / "latest_universal").exists():
        return
    command = [
        sys.executable,
        "-m",
        "deepspeed.checkpoint.ds_to_universal",
        # adapters have no state for what is frozen
        "--inject_missing_state",
        "--input_folder",
        checkpoint / f"global_step{step}",
        "--output_folder",
        checkpoint / f"global_step{step}_universal",
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


class RunCallback(TrainerCallback):
    """What happens between the steps, besides training.

    The log is written as JSON; a signal ends the run after the step that it falls into; a full disk
    stops saving, not training; a checkpoint gets its note once it is complete.

    Parameters
    ----------
    trainer : the trainer that this is added to.
    stream : the loader of the shards that it trains from, if it does.
    """

    def __init__(self, trainer: Any, stream: ShardLoader | None = None):
        self.trainer = trainer
        self.stream = stream
        self.out = Path(trainer.args.output_dir)
        self.is_first_rank = trainer.is_world_process_zero()
        # number of the signal that asked for an end, 0 for none
        self.stop = 0
        self.bytes_of_checkpoint = _bytes_of_checkpoint(trainer.model)

    def ask_to_stop(self, number: int, frame: Any) -> None:
        """Note a signal; its number and the frame come from Python's `signal`."""
        self.stop = number

    def on_train_begin(self, args, state, control, **kwargs):
        """Give every group of ranks the time limit of the settings."""
        if args.world_size == 1:
            return
        # on a CPU, and in the groups that DeepSpeed makes, nobody else sets it
        limit = timedelta(seconds=args.ddp_timeout)
        for group in distributed_c10d._world.pg_map:
            distributed_c10d._set_pg_timeout(limit, group)

    def on_log(self, args, state, control, **kwargs):
        """Write the whole log anew."""
        if self.is_first_rank:
            write_json(self.out / "log.json", state.log_history)

    def on_step_end(self, args, state, control, **kwargs):
        """End the run if a signal asked for it, and save only where there is space."""
        disk_is_full = False
        if self.is_first_rank:
            disk_is_full = shutil.disk_usage(self.out).free < self.bytes_of_checkpoint
        flags = torch.tensor([self.stop, int(disk_is_full)], device=args.device)
        if args.world_size > 1:
            # all ranks stop, or do not save, at the same step
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        self.stop, disk_is_full = flags.tolist()
        if self.stop:
            control.should_training_stop = True
            control.should_save = True
        if disk_is_full and control.should_save:
            control.should_save = False
            needed = self.bytes_of_checkpoint / 1e9
            self.trainer.accelerator.print(
                f"medtune train: not saved, {self.out} has less than {needed:.1f} GB free"
            )

    def on_save(self, args, state, control, **kwargs):
        """Note that a checkpoint is complete, once every rank has written its part."""
        folder = self.out / f"checkpoint-{state.global_step}"
        if self.stream is not None:
            self.stream.save(folder)
        self.trainer.accelerator.wait_for_everyone()
        if not self.is_first_rank:
            return
        sizes = {}
        for file in folder.rglob("*"):
            if file.is_file():
                sizes[str(file.relative_to(folder))] = file.stat().st_size
        note = {
            "step": state.global_step,
            "zero_stage": zero_stage(args),
            "ranks": args.world_size,
            "files": sizes,
        }
        write_json(folder / "complete.json", note)


def _bytes_of_checkpoint(model: torch.nn.Module) -> int:
    """Estimate the size of a checkpoint from what is trained."""
    trained = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            # under ZeRO-3 a parameter holds nothing here, and DeepSpeed knows its true size
            trained += getattr(parameter, "ds_numel", parameter.numel())
    # weights, their float32 copy and two moments of Adam, four bytes each; then the processor
    return 16 * trained + 50_000_000
