"""Supervised fine-tuning as a script: the same code from a notebook, in one process, on several GPUs and machines.

``medtune train train.yaml`` or ``python -m medtune.train --config train.yaml`` trains in one process; the same file under
``torchrun``, ``accelerate launch`` or ``deepspeed`` trains in many. The keys are those of `ScriptArguments`, TRL's
``SFTConfig`` and TRL's ``ModelConfig`` (``medtune train --help`` lists them); an unknown one is refused.

In ``output_dir`` there will be: ``settings.json``, ``log.jsonl`` (one JSON object a log entry), ``checkpoint-N``,
``result.json`` and at last ``model``, the adapter (or the whole model) with processor and card.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

ZERO = {path.stem: str(path) for path in sorted(Path(__file__).with_name("deepspeed").glob("*.json"))}
# Of SFTConfig, what a run and its continuation must share; the rest is places, how a step is cut up, what is printed.
FIXED = [
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "max_steps",
    "num_train_epochs",
    "max_grad_norm",
    "optim",
]
FIXED += ["weight_decay", "seed", "data_seed", "bf16", "fp16", "completion_only_loss", "max_length"]


@dataclass
class ScriptArguments:
    """What medtune adds to the keys of TRL.

    Parameters
    ----------
    data : folder written by ``medtune convert``, with train.jsonl and, if it is evaluated, validation.jsonl.
    target : layers that get an adapter, words of `medtune.models.TARGETS` joined by ``+``.
    autocast_adapter_dtype : keep adapters in float32 beside a bfloat16 base (not under ZeRO-3).
    """

    data: str = field(metadata={"help": "folder written by 'medtune convert'"})
    target: str = field(default="language", metadata={"help": "layers that get an adapter, words joined by +"})
    eval_samples: int = field(default=32, metadata={"help": "validation pairs that an evaluation takes"})
    max_pixels: int = field(default=0, metadata={"help": "most pixels of a resized picture; 0: as the processor says"})
    autocast_adapter_dtype: bool = field(default=True, metadata={"help": "float32 adapters beside a bfloat16 base"})
    preflight: bool = field(default=True, metadata={"help": "check labels and image tokens before the first step"})
    resume: bool = field(default=False, metadata={"help": "continue from the newest complete checkpoint"})


def _zero(name: str) -> str:
    """The file of a name such as zero2; DeepSpeed in a process that nothing launched is told that it is alone."""
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
            alone["MASTER_PORT"] = free.getsockname()[1]
        os.environ.update({key: str(value) for key, value in alone.items()})
    return ZERO.get(name, name)


def parse_arguments(argv: list[str]) -> tuple[ScriptArguments, Any, Any]:
    """Read ``--config train.yaml`` and what overrides it; return ScriptArguments, SFTConfig and ModelConfig.

    Raises
    ------
    ValueError : an unknown key, a value of the wrong type, settings that exclude each other.
    """
    import torch
    from trl import ModelConfig, SFTConfig, TrlParser

    class Parser(TrlParser):
        def set_defaults_with_config(self, **config):
            if config.get("deepspeed"):
                config["deepspeed"] = _zero(config["deepspeed"])
            return super().set_defaults_with_config(**config)

        def error(self, message):
            raise ValueError(message)

    parser, gpu = Parser((ScriptArguments, SFTConfig, ModelConfig)), torch.cuda.is_available()
    parser.set_defaults(max_length=None, completion_only_loss=True, use_peft=True, report_to="none")  # as notebook 03
    parser.set_defaults(bf16=gpu, dataloader_pin_memory=gpu, save_total_limit=2, lora_dropout=0.0)
    parser.set_defaults(gradient_checkpointing=None, use_cpu=not gpu)  # the old name of activation_checkpointing
    argv = [arg for arg in argv if not arg.startswith("--local_rank=")]  # the launcher of DeepSpeed adds it
    argv = [_zero(arg) if before == "--deepspeed" else arg for before, arg in zip(["", *argv], argv)]  # noqa: B905
    script_args, training_args, model_args = parser.parse_args_and_config(argv)
    if training_args.resume_from_checkpoint:
        raise ValueError("resume_from_checkpoint: a foreign checkpoint can run code; set resume to continue this run's")
    if not model_args.model_name_or_path:
        raise ValueError("model_name_or_path is missing: name the base model, a folder or a hub id")
    if (model_args.load_in_4bit or model_args.load_in_8bit) and not model_args.use_peft:
        raise ValueError("load_in_4bit and load_in_8bit need use_peft: quantised weights cannot be trained themselves")
    return script_args, training_args, model_args


def zero_stage(training_args) -> int | None:
    """The ZeRO stage, 0 to 3, or None without DeepSpeed."""
    return training_args.deepspeed_plugin and training_args.deepspeed_plugin.zero_stage


@contextlib.contextmanager
def _whole_if_experts(path, stage: int | None, training_args):
    """Load experts whole before ZeRO-3 shards them: transformers 5.23 does not turn them round when it shards itself."""
    from transformers import AutoConfig
    from transformers.integrations import deepspeed

    config = AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config()
    experts = stage == 3 and hasattr(config, "num_experts")
    if experts:
        deepspeed.unset_hf_deepspeed_config()
    yield
    if experts:
        deepspeed.set_hf_deepspeed_config(training_args.deepspeed_plugin.hf_ds_config)


def build_trainer(script_args: ScriptArguments, training_args, model_args, *, trainer_class=None, **options):
    """Load base model, processor and data, add the adapter, and make the trainer, as notebook 03 does.

    Parameters
    ----------
    script_args, training_args, model_args : see `parse_arguments`.
    trainer_class : called instead of `trl.SFTTrainer`, with the same keywords.
    **options : further keywords for it, such as ``callbacks`` or ``data_collator``.

    Raises
    ------
    ValueError, OSError : in one line: no such data, model or target.
    """
    from peft import get_peft_model
    from transformers import set_seed
    from trl import SFTTrainer, get_peft_config, get_quantization_config

    from medtune import convert, models

    stage = zero_stage(training_args)
    if stage is not None:
        import deepspeed

        deepspeed.init_distributed()  # on a CPU only torch.distributed has been told so far
    with training_args.main_process_first(desc="reading the records"):
        train = convert.read_records(script_args.data, "train")
        watched = None
        if training_args.eval_strategy != "no":
            watched = convert.read_records(script_args.data, "validation").shuffle(seed=training_args.seed)
            watched = watched.select(range(min(script_args.eval_samples, len(watched))))
    processor = models.load_processor(model_args.model_name_or_path, max_pixels=script_args.max_pixels or None)
    with _whole_if_experts(model_args.model_name_or_path, stage, training_args):
        model = models.load_base(
            model_args.model_name_or_path,
            dtype=model_args.dtype,
            quantization_config=get_quantization_config(model_args),
            device_map=None if stage == 3 else {"": training_args.device},
            attn_implementation=model_args.attn_implementation,
            revision=model_args.model_revision,
        )
        if model_args.use_peft:
            if not model_args.lora_target_modules and not model_args.lora_target_parameters:
                targets = models.adapter_targets(model, script_args.target)
                model_args = replace(model_args, **{f"lora_{key}": value for key, value in targets.items()})
            set_seed(training_args.seed)  # the adapters start at random
            cast = script_args.autocast_adapter_dtype and stage != 3
            model = get_peft_model(model, get_peft_config(model_args), autocast_adapter_dtype=cast)
            if stage == 3 and training_args.activation_checkpointing:  # the other kind fails with adapters
                training_args.activation_checkpointing_kwargs = {"use_reentrant": True}
                training_args.gradient_checkpointing_kwargs = training_args.activation_checkpointing_kwargs
    trainer = (trainer_class or SFTTrainer)(
        model=model,
        args=training_args,
        train_dataset=train,
        eval_dataset=watched,
        processing_class=processor,
        **options,
    )
    trainer.model_accepts_loss_kwargs = True  # the loss is a mean over the tokens of all ranks, see notebook 03
    return trainer


def complete_checkpoints(output_dir) -> list[tuple[Path, dict]]:
    """Find the checkpoints that were written to their end, newest first, each with what `run` noted about it.

    Complete means: the note ``complete.json``, which is written last, is there, and every file that it lists has its
    size. The note has "step", "zero_stage", "ranks" and "files" (size in bytes by path).
    """
    found = []
    for folder in Path(output_dir).glob("checkpoint-*"):
        with contextlib.suppress(OSError, ValueError):
            note = json.loads((folder / "complete.json").read_text("utf-8"))
            if all((folder / name).stat().st_size == size for name, size in note["files"].items()):
                found.append((folder, note))
    return sorted(found, key=lambda pair: -pair[1]["step"])


def _write(path: Path, value: Any) -> None:
    path.with_name(path.name + ".partial").write_text(json.dumps(value, indent=1, default=str), "utf-8")
    os.replace(path.with_name(path.name + ".partial"), path)


def _prepare(out: Path, settings: dict, resume: bool, stage: int | None, ranks: int) -> tuple[str | None, bool]:
    """On rank 0: the checkpoint to continue from, if any, and whether it is a universal one; checks what is there."""
    noted = out / "settings.json"
    if noted.exists() and not resume:
        raise ValueError(f"{out} holds a run: continue it with resume, or choose another output_dir")
    if noted.exists() and (old := json.loads(noted.read_text("utf-8"))) != json.loads(
        json.dumps(settings, default=str)
    ):
        changed = next(key for key in settings if old.get(key) != json.loads(json.dumps(settings[key], default=str)))
        raise ValueError(
            f"{out} holds a run with {changed} {old.get(changed)!r}, not {settings[changed]!r}: choose another output_dir"
        )
    if not noted.exists() and any(out.glob("checkpoint-*")):
        raise ValueError(f"{out} holds checkpoints of another program: choose another output_dir")
    out.mkdir(parents=True, exist_ok=True)
    _write(noted, settings)
    complete = complete_checkpoints(out)
    for folder in set(out.glob("checkpoint-*")) - {folder for folder, _ in complete}:
        print(f"medtune.train: {folder.name} is incomplete and is removed", file=sys.stderr)
        shutil.rmtree(folder)
    if not complete:
        return None, False
    folder, note = complete[0]
    if note["zero_stage"] != stage:
        names = [
            f"ZeRO stage {number}" if number is not None else "no DeepSpeed" for number in (note["zero_stage"], stage)
        ]
        raise ValueError(f"{folder} was written with {names[0]}, this run has {names[1]}: continue with {names[0]}")
    universal = bool(stage) and note["ranks"] != ranks
    if universal:
        _make_universal(folder, note["step"])
    return str(folder), universal


def _make_universal(folder: Path, step: int) -> None:
    """Rewrite a DeepSpeed checkpoint so that another number of ranks can load it."""
    import subprocess

    tag = f"global_step{step}"
    target = folder / f"{tag}_universal"
    if not target.exists():
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        command += ["--input_folder", str(folder / tag), "--output_folder", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(target, ignore_errors=True)
            raise ValueError(f"{folder} cannot be made universal: {done.stderr.strip().splitlines()[-1]}")
    (folder / "latest_universal").write_text(target.name)


def _callback(trainer, limit: int | None):
    """What happens around the steps: log, note of a complete checkpoint, free disk, signals."""
    import torch
    from transformers import TrainerCallback
    from transformers.trainer_utils import rotate_checkpoints

    out, first = Path(trainer.args.output_dir), trainer.is_world_process_zero()
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters() if p.requires_grad)
    needed = 16 * trained + 50_000_000  # weights, master weights and two moments of Adam, and the processor

    class Callback(TrainerCallback):
        stop = 0  # the signal that asked for an end

        def on_train_begin(self, args, state, control, **kwargs):
            if first:
                lines = [json.dumps(entry) + "\n" for entry in state.log_history]
                (out / "log.jsonl").write_text("".join(lines), "utf-8")

        def on_log(self, args, state, control, **kwargs):
            if first:
                with open(out / "log.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps(state.log_history[-1]) + "\n")

        def on_step_end(self, args, state, control, **kwargs):
            full = first and shutil.disk_usage(out).free < needed
            flags = torch.tensor([self.stop, int(full)], device=args.device)
            if args.world_size > 1:  # all ranks must stop, or save, at the same step
                torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
            self.stop, full = flags.tolist()
            if self.stop:
                control.should_training_stop = control.should_save = True
            if full and control.should_save:
                control.should_save = False
                trainer.accelerator.print(
                    f"medtune.train: no checkpoint at step {state.global_step}: {out} has less than "
                    f"{needed / 1e9:.1f} GB free",
                    file=sys.stderr,
                )

        def on_save(self, args, state, control, **kwargs):
            trainer.accelerator.wait_for_everyone()
            if first:
                folder = out / f"checkpoint-{state.global_step}"
                files = {str(f.relative_to(folder)): f.stat().st_size for f in folder.rglob("*") if f.is_file()}
                note = {"step": state.global_step, "zero_stage": zero_stage(args), "ranks": args.world_size}
                _write(folder / "complete.json", note | {"files": files})
                best = state.best_model_checkpoint
                rotate_checkpoints(str(out), save_total_limit=limit, best_model_checkpoint=best)

    callback = Callback()

    def note(number, frame):
        if callback.stop and trainer.args.world_size == 1:
            raise KeyboardInterrupt
        callback.stop = number

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, note)
    return callback


def run(trainer, script_args: ScriptArguments, model_args) -> dict:
    """Train to the end, or from the newest complete checkpoint to the end, and save the model.

    Raises
    ------
    ValueError, OSError : the folder belongs to another run, ZeRO stages do not agree, the disk is full.
    SystemExit : 130 after Ctrl-C, SIGTERM or SIGUSR1, once a checkpoint is written.
    """
    from accelerate.utils import broadcast_object_list

    args = trainer.args
    out, stage = Path(args.output_dir), zero_stage(args)
    settings = {key: value for key, value in asdict(script_args).items() if key not in ("resume", "preflight")}
    settings |= asdict(model_args) | {key: getattr(args, key) for key in FIXED}
    settings["samples_per_step"] = args.world_size * args.per_device_train_batch_size * args.gradient_accumulation_steps
    found: list = [None, None]
    if trainer.is_world_process_zero():
        try:
            found[0] = _prepare(out, settings, script_args.resume, stage, args.world_size)
        except (ValueError, OSError) as error:
            found[1] = error
    broadcast_object_list(found)
    if found[1]:
        raise found[1]
    checkpoint, universal = found[0]
    if universal:
        args.deepspeed_plugin.hf_ds_config.config["checkpoint"] = {"load_universal": True}
    limit, args.save_total_limit = args.save_total_limit, None  # ours counts once a checkpoint is complete
    callback = _callback(trainer, limit)
    trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=checkpoint)
    if callback.stop:
        raise SystemExit(130)
    save(trainer, script_args, model_args, settings)
    return settings


def save(trainer, script_args, model_args, settings) -> None:
    from functools import partial
    from types import SimpleNamespace

    from medtune import models

    out, log = Path(trainer.args.output_dir), trainer.state.log_history
    state = None
    if zero_stage(trainer.args) == 3:  # the weights of all ranks, collected on rank 0
        state = trainer.deepspeed._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=model_args.use_peft)
    if trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model)
        whole = SimpleNamespace(save_pretrained=partial(model.save_pretrained, state_dict=state))
        card = models.model_card(model_args.model_name_or_path, data=script_args.data, settings=settings)
        models.save_model(whole, trainer.processing_class, out / "model", card=card)
    trainer.accelerator.wait_for_everyone()


def main(argv: list[str] | None = None, trainer_class=None) -> None:
    """Train as the arguments say.

    Examples
    --------
    >>> main(["--data", "x", "--lerning_rate", "1"])
    Traceback (most recent call last):
    SystemExit: 1
    """
    try:
        script_args, training_args, model_args = parse_arguments(sys.argv[1:] if argv is None else argv)
        trainer = build_trainer(script_args, training_args, model_args, trainer_class=trainer_class)
        run(trainer, script_args, model_args)
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"medtune.train: rank {os.environ.get('RANK', 0)}: {text}", file=sys.stderr, flush=True)
        if isinstance(error, (ValueError, OSError)):
            raise SystemExit(1) from None
        raise


if __name__ == "__main__":
    main()
