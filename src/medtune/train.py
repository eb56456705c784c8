"""Supervised fine-tuning as a script: the same code in a notebook, in one process, on several GPUs and machines.

``medtune train train.yaml`` or ``python -m medtune.train --config train.yaml`` trains in one process. The same file
under ``torchrun``, ``accelerate launch`` or ``deepspeed`` trains in many. The keys are those of `ScriptArguments`,
TRL's ``SFTConfig`` and ``ModelConfig``; an unknown one is refused.

In ``output_dir`` there will be ``settings.json``, ``log.json`` (loss and seconds), ``checkpoint-N`` folders,
``result.json`` (memory of every rank) and at last ``model``: the adapter, or the whole model, with its processor.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
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
    trace_step: int = field(default=0, metadata={"help": "Step whose profile is written to trace-rank*.json; 0: none."})
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
    parser.set_defaults(use_peft=True, lora_dropout=0.0, save_total_limit=2)
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
    if (model_args.load_in_4bit or model_args.load_in_8bit) and not model_args.use_peft:
        raise ValueError("load_in_4bit and load_in_8bit need use_peft: quantised weights cannot be trained")
    return script_args, training_args, model_args


def zero_stage(training_args) -> int | None:
    """The ZeRO stage, 0 to 3, or None without DeepSpeed."""
    return training_args.deepspeed_plugin and training_args.deepspeed_plugin.zero_stage


def build_trainer(script_args: ScriptArguments, training_args, model_args, *, trainer_class=None, **options):
    """Load data, processor and base model, add the adapter, and make the trainer, as notebook 03 does.

    Parameters
    ----------
    script_args, training_args, model_args : see `parse_arguments`.
    trainer_class : called instead of `trl.SFTTrainer`, with the same keywords.
    **options : further keywords for it, such as ``callbacks`` or ``data_collator``.

    Raises
    ------
    ValueError, OSError : in one line: no such data, model or target; labels or image tokens that are wrong.
    """
    from peft import get_peft_model
    from transformers import AutoConfig, set_seed
    from transformers.integrations import deepspeed as integration
    from trl import SFTTrainer, get_peft_config, get_quantization_config

    from medtune import convert, models, preflight

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
    if model_args.use_peft:
        if not (model_args.lora_target_modules or model_args.lora_target_parameters):
            targets = models.adapter_targets(model, script_args.target)
            model_args = replace(model_args, **{f"lora_{key}": value for key, value in targets.items()})
        set_seed(training_args.seed)  # adapters start at random
        cast = script_args.autocast_adapter_dtype and stage != 3  # ZeRO-3 wants one dtype
        model = get_peft_model(model, get_peft_config(model_args), autocast_adapter_dtype=cast)
        if stage == 3 and training_args.activation_checkpointing:  # the other kind fails with adapters under ZeRO-3
            training_args.activation_checkpointing_kwargs = {"use_reentrant": True}
            training_args.gradient_checkpointing_kwargs = training_args.activation_checkpointing_kwargs
    if stage == 3 and experts:
        integration.set_hf_deepspeed_config(training_args.deepspeed_plugin.hf_ds_config)
    data = {"train_dataset": train, "eval_dataset": watched, "processing_class": processor}
    trainer = (trainer_class or SFTTrainer)(model=model, args=training_args, **data, **options)
    trainer.model_accepts_loss_kwargs = True  # the loss is a mean over the tokens of all ranks, see notebook 03
    if trainer.is_world_process_zero():
        rows = [train[i] for i in range(min(4, len(train)))]
        batch = trainer.data_collator([dict(row) for row in rows])
        preflight.check_labels(batch, processor, [row["completion"][0]["content"][0]["text"] for row in rows])
        preflight.check_image_tokens(batch, processor)
    return trainer


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
        was, now = (values.get(changed[0]) for values in (old, settings))
        raise ValueError(f"{out} holds a run with {changed[0]} {was!r}, not {now!r}: choose another output_dir")
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
        was, now = ("no DeepSpeed" if s is None else f"ZeRO stage {s}" for s in (note["zero_stage"], stage))
        raise ValueError(f"{folder} was written with {was}, this run has {now}: continue with {was}")
    universal, tag = bool(stage) and note["ranks"] != ranks, f"global_step{note['step']}"
    if universal and not (folder / "latest_universal").exists():
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        command += ["--input_folder", folder / tag, "--output_folder", folder / f"{tag}_universal"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return str(folder), universal


def _callback(trainer, script_args: ScriptArguments, limit: int | None):
    """Between the steps: the log, the end that a signal asks for, disk space, notes of complete checkpoints."""
    import torch
    from transformers import TrainerCallback
    from transformers.trainer_utils import rotate_checkpoints

    out, first, start = Path(trainer.args.output_dir), trainer.is_world_process_zero(), time.perf_counter()
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters() if p.requires_grad)
    needed = 16 * trained + 50_000_000  # bytes: weights, their float32 copy, two moments of Adam; the processor

    class Callback(TrainerCallback):
        stop = 0  # number of the signal that asked for an end

        def on_log(self, args, state, control, **kwargs):
            state.log_history[-1]["seconds"] = round(time.perf_counter() - start, 3)
            if first:
                _write(out / "log.json", state.log_history)

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step + 1 == script_args.trace_step:
                self.profile = torch.profiler.profile(record_shapes=True)
                self.profile.start()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == script_args.trace_step:
                self.profile.stop()
                self.profile.export_chrome_trace(str(out / f"trace-rank{args.process_index}.json"))
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
                rotate_checkpoints(str(out), limit, best_model_checkpoint=state.best_model_checkpoint)

    return Callback()


def _memory(trainer) -> dict[str, int]:
    """Bytes that this rank holds: weights, what the optimizer adds, and the most that were in use on a GPU."""
    import torch

    def size(tensors):
        return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))

    weights = [getattr(p, "ds_tensor", p) for p in trainer.model.parameters()]
    inner, held = trainer.optimizer, []
    while hasattr(inner, "optimizer"):  # accelerate's wrapper, then DeepSpeed's, which trains a float32 copy
        inner = inner.optimizer
        for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
            held += getattr(inner, name, [])
    held += [value for state in inner.state.values() for value in state.values()]
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {"rank": trainer.args.process_index, "weights": size(weights), "optimizer": size(held), "peak": peak}


def run(trainer, script_args: ScriptArguments, model_args) -> None:
    """Train, from the newest complete checkpoint if `resume` says so, save the model and write ``result.json``.

    Raises
    ------
    ValueError, OSError : the folder belongs to another run, the ZeRO stages differ, the disk is full.
    SystemExit : 130 after Ctrl-C, SIGTERM or SIGUSR1, once the checkpoint of the current step is written.
    """
    from accelerate.utils import broadcast_object_list, gather_object

    from medtune import models

    args, stage, found = trainer.args, zero_stage(trainer.args), [None, None]
    out, first = Path(args.output_dir), trainer.is_world_process_zero()
    settings: dict = asdict(script_args) | asdict(model_args) | {key: getattr(args, key) for key in FIXED}
    settings["samples_per_step"] = args.world_size * args.per_device_train_batch_size * args.gradient_accumulation_steps
    settings = json.loads(json.dumps(settings | {"resume": None, "trace_step": None}, default=str))
    if first:
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
    callback = _callback(trainer, script_args, args.save_total_limit)
    args.save_total_limit = None  # an old checkpoint goes once the new one is complete, not before
    trainer.add_callback(callback)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: setattr(callback, "stop", number))
    trainer.train(resume_from_checkpoint=checkpoint)
    if callback.stop:
        raise SystemExit(130)
    state = None
    if stage == 3:  # the shards of all ranks, put together on rank 0
        state = trainer.deepspeed._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=model_args.use_peft)
    memory = gather_object([_memory(trainer)])
    if first:
        model = trainer.accelerator.unwrap_model(trainer.model)
        whole = SimpleNamespace(save_pretrained=partial(model.save_pretrained, state_dict=state))
        card = models.model_card(model_args.model_name_or_path, data=script_args.data, settings=settings)
        models.save_model(whole, trainer.processing_class, out / "model", card=card)
        _write(out / "result.json", {"zero_stage": stage, "memory": memory, "log": trainer.state.log_history[-1]})
    trainer.accelerator.wait_for_everyone()


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
    main()
