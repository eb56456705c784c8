"""Supervised fine-tuning as a script: the same code in a notebook, in one process, on several GPUs and machines.

``medtune train train.yaml`` or ``python -m medtune.train --config train.yaml`` trains in one process. The same file
under ``torchrun``, ``accelerate launch`` or ``deepspeed`` trains in many. The keys are those of `ScriptArguments`,
TRL's ``SFTConfig`` and ``ModelConfig``; an unknown one is refused.

In ``output_dir`` there will be ``settings.json``, ``log.json``, ``checkpoint-N`` folders and at
last ``model``: the adapter, or the whole model, with its processor.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

# Settings of DeepSpeed by name: zero1, zero2 and zero3, and each with _offload.
ZERO = {path.stem: str(path) for path in Path(__file__).with_name("deepspeed").glob("*.json")}
# Of SFTConfig, what a run and its continuation share. The rest is places, printing, and how a step is cut up.
FIXED = ["learning_rate", "lr_scheduler_type", "warmup_steps", "max_steps", "num_train_epochs", "max_grad_norm"]
FIXED += ["optim", "weight_decay", "seed", "data_seed", "bf16", "fp16", "completion_only_loss", "max_length"]


@dataclass
class ScriptArguments:
    """What medtune adds to the keys of TRL; the help of each field says what it means."""

    data: str = field(metadata={"help": "Folder written by 'medtune convert'."})
    target: str = field(default="language", metadata={"help": "Layers with an adapter: words of models.TARGETS, by +."})
    eval_samples: int = field(default=32, metadata={"help": "Validation pairs of an evaluation."})
    max_pixels: int = field(default=0, metadata={"help": "Most pixels of a picture; 0: what the processor says."})
    autocast_adapter_dtype: bool = field(default=True, metadata={"help": "float32 adapters (not under ZeRO-3)."})
    fast: bool = field(default=False, metadata={"help": "The same training in less time, see medtune.speed."})
    cache_features: bool = field(default=False, metadata={"help": "A frozen vision tower sees a picture once."})
    resume: bool = field(default=False, metadata={"help": "Continue from the newest complete checkpoint."})


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
            return super().set_defaults_with_config(**{k: ZERO.get(str(v), v) for k, v in config.items()})

        def error(self, message):
            raise ValueError(message)

    parser, gpu = Parser((ScriptArguments, SFTConfig, ModelConfig)), torch.cuda.is_available()
    # As in notebook 03; gradient_checkpointing is an old name of activation_checkpointing, which TRL turns on.
    parser.set_defaults(max_length=None, completion_only_loss=True, report_to="none", gradient_checkpointing=None)
    parser.set_defaults(use_peft=True, lora_dropout=0.0, save_total_limit=2, router_aux_loss_coef=0.0)
    parser.set_defaults(bf16=gpu, use_cpu=not gpu, dataloader_pin_memory=gpu)
    # DeepSpeed's launcher adds a local rank, which is in the environment, too
    argv = [ZERO.get(argument, argument) for argument in argv if not argument.startswith("--local_rank=")]
    script_args, training_args, model_args = parser.parse_args_and_config(argv)
    if not model_args.model_name_or_path:
        raise ValueError("model_name_or_path is missing: name the base model, a folder or a hub id")
    if training_args.resume_from_checkpoint:
        raise ValueError("resume_from_checkpoint: loading a foreign checkpoint can run its code; use resume instead")
    if training_args.n_gpu > 1:
        raise ValueError("one process sees several GPUs: start it with torchrun, or set CUDA_VISIBLE_DEVICES=0")
    if script_args.fast and gpu:
        torch._dynamo.config.recompile_limit = 64  # all layers share one function of Transformers
        training_args.dataloader_num_workers = training_args.dataloader_num_workers or min(8, os.cpu_count() or 1)
    return script_args, training_args, model_args


def zero_stage(training_args) -> int | None:
    """The ZeRO stage, 0 to 3, or None without DeepSpeed."""
    return training_args.deepspeed_plugin and training_args.deepspeed_plugin.zero_stage


def build_trainer(script_args: ScriptArguments, training_args, model_args, *, trainer_class=None, **options):
    """Load data, processor and base model, add the adapter, and make the trainer, as notebook 03 does.

    Parameters
    ----------
    script_args, training_args, model_args : see `parse_arguments`.
    trainer_class : called instead of `trl.SFTTrainer`, with the same keywords; its batches are its own affair, so the
        checks of labels and image tokens are left out.
    **options : further keywords for it, such as ``callbacks`` or ``data_collator``.

    Raises
    ------
    ValueError, OSError : in one line: no such data, model or target; labels or image tokens that are wrong.
    """
    from peft import get_peft_model
    from transformers import AutoConfig, set_seed
    from transformers.integrations import deepspeed as integration
    from trl import SFTTrainer, get_peft_config, get_quantization_config

    from medtune import convert, models, preflight, speed

    path, stage = model_args.model_name_or_path, zero_stage(training_args)
    if stage is not None:
        import deepspeed

        deepspeed.init_distributed()  # on a CPU only torch has been told of the other ranks so far
    with training_args.main_process_first():  # the others then read what rank 0 has cached
        train, watched = convert.read_records(script_args.data, "train"), None
        if training_args.eval_strategy != "no":
            watched = convert.read_records(script_args.data, "validation").shuffle(seed=training_args.seed)
            watched = watched.select(range(min(script_args.eval_samples, len(watched))))
    processor = models.load_processor(path, max_pixels=script_args.max_pixels or None)
    experts = getattr(AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config(), "num_experts", 0)
    if stage == 3 and experts:  # transformers 5.23 cannot load fused experts in shards: whole first, sharded later
        integration.unset_hf_deepspeed_config()
    where = {"device_map": None if stage == 3 else {"": training_args.device}, "revision": model_args.model_revision}
    where |= {"dtype": model_args.dtype, "quantization_config": get_quantization_config(model_args)}
    model = models.load_base(path, attn_implementation=model_args.attn_implementation, **where)
    if peft_config := get_peft_config(model_args):
        if not (peft_config.target_modules or peft_config.target_parameters):
            vars(peft_config).update(models.adapter_targets(model, script_args.target))
        set_seed(training_args.seed)  # adapters start at random
        cast = script_args.autocast_adapter_dtype and stage != 3  # ZeRO-3 wants one dtype
        model = get_peft_model(model, peft_config, autocast_adapter_dtype=cast)
        if stage == 3 and training_args.activation_checkpointing:  # the other kind fails with adapters under ZeRO-3
            training_args.activation_checkpointing_kwargs = {"use_reentrant": True}
    if stage == 3 and experts:
        integration.set_hf_deepspeed_config(training_args.deepspeed_plugin.hf_ds_config)
    data = {"train_dataset": train, "eval_dataset": watched, "processing_class": processor}
    trainer = (trainer_class or SFTTrainer)(model=model, args=training_args, **data, **options)
    trainer.model_accepts_loss_kwargs = True  # the loss is a mean over the tokens of all ranks, see notebook 03
    if script_args.cache_features:
        with training_args.main_process_first():
            speed.cache_features(trainer, Path(script_args.data) / "features")
    if script_args.fast:
        # under ZeRO-3 the weights of experts are there only while their own layer runs
        speed.speed_up(model, experts=stage != 3, compiled=training_args.device.type == "cuda")
        if trainer_class is None and not script_args.cache_features:
            speed.send_bytes(trainer)
        if trainer_class is None and training_args.device.type == "cuda":
            trainer.data_collator = partial(speed.pad_lengths, trainer.data_collator)
    if stage == 3:
        trainer.data_collator = partial(_with_picture, trainer.data_collator, train)
    if trainer_class is None and trainer.is_world_process_zero():
        rows = [trainer.train_dataset[i] for i in range(min(4, len(train)))]
        batch = trainer.data_collator([dict(row) for row in rows])
        preflight.check_labels(batch, processor, [row["completion"][0]["content"][0]["text"] for row in rows])
        preflight.check_image_tokens(batch, processor)
    return trainer


def _with_picture(collate, train, rows: list[dict]) -> dict:
    """Add a row that does not count to a batch without pictures: under ZeRO-3 no rank may skip the vision tower."""
    if any(row["images"] for row in rows):
        return collate(rows)
    batch = collate([*rows, next(dict(row) for row in train if row["images"])])
    batch["labels"][len(rows) :] = -100
    return batch


def complete_checkpoints(output_dir) -> list[tuple[Path, dict]]:
    """Find the checkpoints that were written to their end, newest first, each with its note ``complete.json``.

    The note is written last and has "step", "zero_stage", "ranks" and "files": each must still have its size in bytes.
    """
    found = []
    for folder in Path(output_dir).glob("checkpoint-*"):
        with contextlib.suppress(OSError, ValueError):
            note = json.loads((folder / "complete.json").read_text("utf-8"))
            if all((folder / name).stat().st_size == size for name, size in note["files"].items()):
                found.append((folder, note))
    return sorted(found, key=lambda pair: -pair[1]["step"])


def _write(path: Path, value: Any) -> None:
    path.with_suffix(".partial").write_text(json.dumps(value, indent=1), "utf-8")
    os.replace(path.with_suffix(".partial"), path)


def _prepare(out: Path, settings: dict, resume: bool, stage: int | None, ranks: int) -> tuple[str | None, bool]:
    """On rank 0: say from which checkpoint to go on, if any, and whether in DeepSpeed's universal form."""
    noted, complete = out / "settings.json", complete_checkpoints(out)
    old = json.loads(noted.read_text("utf-8")) if noted.exists() else settings
    if changed := [key for key in settings if settings[key] != old.get(key)]:
        raise ValueError(f"{out} holds a run with another {', '.join(changed)}: choose another output_dir")
    if not (resume and noted.exists()) and (noted.exists() or any(out.glob("checkpoint-*"))):
        raise ValueError(f"{out} holds another run: set resume to continue your own, or choose another output_dir")
    out.mkdir(parents=True, exist_ok=True)
    _write(noted, settings)
    for folder in set(out.glob("checkpoint-*")) - {folder for folder, _ in complete}:
        print(f"medtune.train: {folder} is incomplete: it is removed", file=sys.stderr)
        shutil.rmtree(folder)
    if not complete:
        return None, False
    folder, note = complete[0]
    if note["zero_stage"] != stage:
        was = "without DeepSpeed" if note["zero_stage"] is None else f"under ZeRO stage {note['zero_stage']}"
        raise ValueError(f"{folder} was written {was}: only a run of the same kind can continue it")
    universal, tag = bool(stage) and note["ranks"] != ranks, f"global_step{note['step']}"
    if universal and not (folder / "latest_universal").exists():
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        command += ["--input_folder", folder / tag, "--output_folder", folder / f"{tag}_universal"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return str(folder), universal


def _callback(trainer):
    """Between the steps: the log, the end that a signal asks for, disk space, notes of complete checkpoints."""
    import torch
    from transformers import TrainerCallback

    out, first = Path(trainer.args.output_dir), trainer.is_world_process_zero()
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters() if p.requires_grad)
    needed = 16 * trained + 50_000_000  # bytes: weights, their float32 copy, two moments of Adam; the processor

    class Callback(TrainerCallback):
        stop = 0  # number of the signal that asked for an end

        def on_train_begin(self, args, state, control, **kwargs):
            for group in torch.distributed.distributed_c10d._world.pg_map if args.world_size > 1 else ():
                wait = timedelta(seconds=args.ddp_timeout)  # on a CPU, and in DeepSpeed's groups, nobody sets it
                torch.distributed.distributed_c10d._set_pg_timeout(wait, group)

        def on_log(self, args, state, control, **kwargs):
            if first:
                _write(out / "log.json", state.log_history)

        def on_step_end(self, args, state, control, **kwargs):
            full = first and shutil.disk_usage(out).free < needed
            flags = torch.tensor([self.stop, int(full)], device=args.device)
            if args.world_size > 1:  # all ranks stop, or do not save, at the same step
                torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
            self.stop, full = flags.tolist()
            control.should_training_stop |= bool(self.stop)
            control.should_save |= bool(self.stop)
            if full and control.should_save:
                control.should_save = False
                trainer.accelerator.print(f"medtune.train: not saved, {out} has less than {needed / 1e9:.1f} GB free")

        def on_save(self, args, state, control, **kwargs):
            trainer.accelerator.wait_for_everyone()
            if first:
                folder = out / f"checkpoint-{state.global_step}"
                sizes = {str(f.relative_to(folder)): f.stat().st_size for f in folder.rglob("*") if f.is_file()}
                note = {"step": state.global_step, "zero_stage": zero_stage(args), "ranks": args.world_size}
                _write(folder / "complete.json", note | {"files": sizes})

    return Callback()


def run(trainer, script_args: ScriptArguments, model_args) -> None:
    """Train, from the newest complete checkpoint if `resume` says so, and save the model.

    Raises
    ------
    ValueError, OSError : the folder belongs to another run, the ZeRO stages differ, the disk is full.
    SystemExit : 130 after Ctrl-C, SIGTERM or SIGUSR1, once the checkpoint of the current step is written.
    """
    from accelerate.utils import broadcast_object_list

    from medtune import models

    args, stage, first = trainer.args, zero_stage(trainer.args), trainer.is_world_process_zero()
    out, ranks = Path(args.output_dir), args.world_size
    settings: dict = asdict(script_args) | asdict(model_args) | {key: getattr(args, key) for key in FIXED}
    settings |= {"samples_per_step": ranks * args.per_device_train_batch_size * args.gradient_accumulation_steps}
    settings = json.loads(json.dumps(settings | {"resume": None}, default=str))
    found = [_prepare(out, settings, script_args.resume, stage, ranks) if first else None]
    checkpoint, universal = broadcast_object_list(found)[0]
    if universal:
        args.deepspeed_plugin.hf_ds_config.config["checkpoint"] = {"load_universal": True}
    callback = _callback(trainer)
    trainer.add_callback(callback)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: setattr(callback, "stop", number))
    trainer.train(resume_from_checkpoint=checkpoint)
    if callback.stop:
        raise SystemExit(130)
    model = trainer.model
    if stage == 3:  # the shards of all ranks, put together on rank 0
        state = trainer.deepspeed._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=model_args.use_peft)
        model.save_pretrained = partial(model.save_pretrained, state_dict=state)
    if first:
        card = models.model_card(model_args.model_name_or_path, data=script_args.data, settings=settings)
        models.save_model(model, trainer.processing_class, out / "model", card=card)
    trainer.accelerator.wait_for_everyone()  # a rank that left while another still saves can abort


def main(argv: list[str] | None = None, trainer_class=None) -> None:
    """Train as the arguments say (those of the process by default); what a user can put right is one line.

    Examples
    --------
    >>> main(["--data", "records", "--lerning_rate", "1"])
    Traceback (most recent call last):
    SystemExit: 1
    """
    try:
        script_args, training_args, model_args = parse_arguments(sys.argv[1:] if argv is None else argv)
        run(build_trainer(script_args, training_args, model_args, trainer_class=trainer_class), script_args, model_args)
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"medtune.train: rank {os.environ.get('RANK', 0)}: {text}", file=sys.stderr, flush=True)
        if not isinstance(error, (ValueError, OSError)):
            raise
        sys.exit(1)


if __name__ == "__main__":
    from torch import distributed

    main()
    if distributed.is_initialized():
        distributed.destroy_process_group()
