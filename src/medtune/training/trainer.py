"""From the settings to a trainer: data, processor, base model, adapter, and what makes it fast."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import get_peft_model
from transformers import AutoConfig, set_seed
from transformers.integrations import deepspeed as deepspeed_integration
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    ModelConfig,
    SFTConfig,
    SFTTrainer,
    get_peft_config,
    get_quantization_config,
)

from medtune.models import adapter_targets, load_base, load_processor, load_tuned
from medtune.modelscope import fetch_model, is_modelscope_name
from medtune.records import names_shards, read_records
from medtune.rewards import read_preferences

from .features import cache_features
from .preflight import check_data, decode_first, name_records, without_odd_pictures
from .rewarding import read_questions, reward_functions
from .settings import RewardArguments, ScriptArguments, zero_stage
from .speed import pad_lengths, send_bytes, speed_up
from .start_checks import check_preferences, check_questions, check_reference, check_rewards
from .stream import LOOKED_AT, ShardLoader, open_streams, steps_known
from .words import weigh_names


def build_trainer(
    script_args: ScriptArguments,
    training_args: SFTConfig | DPOConfig | GRPOConfig,
    model_args: ModelConfig,
    *,
    trainer_class: Callable[..., Any] | None = None,
    **options: Any,
) -> Any:
    """Load data, processor and base model, add the adapter, and make the trainer, as notebook 03.

    With `stage: dpo` and `stage: grpo` it is that of notebook 12.

    Parameters
    ----------
    script_args, training_args, model_args : see `parse_arguments`.
    trainer_class : called instead of `trl.SFTTrainer`, with the same keywords; its batches are its
        own affair, so that the checks of labels and image tokens are left out.
    **options : further keywords for it, such as `callbacks` or `data_collator`.

    Returns
    -------
    trl.SFTTrainer : ready to train, or what `trainer_class` returned; with the other stages a
        `trl.DPOTrainer` or a `trl.GRPOTrainer`.

    Raises
    ------
    ValueError, OSError : in one line: no such data, model or target; a record that cannot be
        prepared or would be cut; labels or image tokens that are wrong. With the other stages: a
        rejected answer that is the chosen one; a reward that never differs; sampled answers that
        are cut; a reference that is not the start.
    """
    if zero_stage(training_args) is not None:
        # DeepSpeed is imported only by those who use it: it takes seconds and looks for compilers
        import deepspeed

        # on a CPU only torch has been told of the other ranks so far
        deepspeed.init_distributed()
    if script_args.stage == "sft":
        return _build_sft(
            script_args, training_args, model_args, trainer_class=trainer_class, **options
        )
    if trainer_class is not None:
        raise ValueError(f"stage={script_args.stage} has a trainer of its own")
    if script_args.stage == "dpo":
        return _build_dpo(script_args, training_args, model_args, **options)
    return _build_grpo(script_args, training_args, model_args, **options)


def _build_sft(
    script_args: ScriptArguments,
    training_args: SFTConfig,
    model_args: ModelConfig,
    *,
    trainer_class: Callable[..., Any] | None,
    **options: Any,
) -> Any:
    """Make the trainer that learns the answers of the records."""
    _refuse_weights_of_its_own(script_args, trainer_class)
    stage = zero_stage(training_args)
    stream = None
    if names_shards(script_args.data):
        stream, watched = open_streams(script_args, training_args)
        train = stream.records()
    else:
        train, watched = _read_data(script_args, training_args)
    processor = _load_processor(script_args, model_args)
    model = _load_model(script_args, training_args, model_args)
    with steps_known(training_args) if stream else contextlib.nullcontext():
        trainer = (trainer_class or SFTTrainer)(
            model=model,
            args=training_args,
            train_dataset=train,
            eval_dataset=watched,
            processing_class=processor,
            **options,
        )
    # the loss is a mean over the tokens of all ranks, see notebook 03
    trainer.model_accepts_loss_kwargs = True
    weigh_names(trainer, script_args.name_weight)
    _make_fast(trainer, script_args, own_batches=trainer_class is not None)
    if stage == 3:
        trainer.data_collator = partial(_with_picture, trainer.data_collator, train)
    if trainer_class is None:
        name_records(trainer)
        _save_only_what_is_trained(trainer, model_args)
        if trainer.is_world_process_zero():
            # not `train`: what makes it fast may have left the pictures undecoded
            looked_at = trainer.train_dataset
            if stream:
                looked_at = stream.first(LOOKED_AT, seed=training_args.seed)
                leave_out = stream.left_out.add
                looked_at = without_odd_pictures(processor, looked_at, leave_out)
            check_data(trainer, looked_at, allow_cut_answers=script_args.allow_cut_answers)
    if stream:
        collate = trainer.data_collator
        if trainer_class is not None:
            # others want what a data set gives: pictures, not files
            collate = partial(decode_first, collate)
        trainer.shard_loader = ShardLoader(stream, script_args, training_args, collate)
        trainer.get_train_dataloader = lambda: trainer.shard_loader
    return trainer


def _build_dpo(
    script_args: ScriptArguments,
    training_args: DPOConfig,
    model_args: ModelConfig,
    **options: Any,
) -> DPOTrainer:
    """Make the trainer that learns which of two answers is the better one."""
    read = partial(read_preferences, script_args.data)
    train, watched = _read_splits(read, script_args, training_args)
    processor = _load_processor(script_args, model_args)
    if training_args.process_index == 0:
        for pairs in (train, watched):
            if pairs:
                check_preferences(
                    pairs,
                    processor,
                    training_args.max_length,
                    allow_cut_answers=script_args.allow_cut_answers,
                )
    trainer = DPOTrainer(
        model=_load_model(script_args, training_args, model_args),
        args=training_args,
        train_dataset=train,
        eval_dataset=watched,
        processing_class=processor,
        **options,
    )
    _save_only_what_is_trained(trainer, model_args)
    if trainer.is_world_process_zero():
        check_reference(trainer, train, "chosen")
    return trainer


def _build_grpo(
    script_args: RewardArguments,
    training_args: GRPOConfig,
    model_args: ModelConfig,
    **options: Any,
) -> GRPOTrainer:
    """Make the trainer that learns from rewards for its own answers."""
    functions = reward_functions(script_args)
    read = partial(read_questions, script_args, functions)
    train, watched = _read_splits(read, script_args, training_args)
    processor = _load_processor(script_args, model_args)
    if training_args.process_index == 0:
        for questions in (train, watched):
            if questions:
                check_questions(
                    questions,
                    processor,
                    training_args.max_completion_length,
                    allow_cut_answers=script_args.allow_cut_answers,
                )
    trainer = GRPOTrainer(
        model=_load_model(script_args, training_args, model_args),
        reward_funcs=functions,
        args=training_args,
        train_dataset=train,
        eval_dataset=watched,
        processing_class=processor,
        **options,
    )
    _save_only_what_is_trained(trainer, model_args)
    if trainer.is_world_process_zero():
        check_reference(trainer, train, "completion")
    if script_args.check_prompts:
        tried = _evenly(train, script_args.check_prompts)
        check_rewards(trainer, tried, allow_cut_answers=script_args.allow_cut_answers)
    return trainer


def _read_splits(
    read: Callable[[str], datasets.Dataset],
    script_args: ScriptArguments,
    training_args: DPOConfig | GRPOConfig,
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Read the rows to train on, and some to evaluate on if there is any evaluation."""
    # the other ranks then read what rank 0 has cached
    with training_args.main_process_first():
        train = read("train")
        if training_args.eval_strategy == "no":
            return train, None
        return train, _evenly(read("validation"), script_args.eval_samples)


def _evenly(data: datasets.Dataset, count: int) -> datasets.Dataset:
    """Take some rows, evenly over all: the first ones may be those of one patient."""
    count = min(count, len(data))
    return data.select([row * len(data) // count for row in range(count)])


def _load_processor(script_args: ScriptArguments, model_args: ModelConfig) -> Any:
    return load_processor(model_args.model_name_or_path, max_pixels=script_args.max_pixels or None)


def _refuse_weights_of_its_own(
    script_args: ScriptArguments, trainer_class: Callable[..., Any] | None
) -> None:
    """Raise `ValueError` where a trainer with a loss of its own would not heed `name_weight`."""
    if trainer_class is not None and script_args.name_weight != 1:
        raise ValueError(
            f"name_weight={script_args.name_weight} is for TRL's trainer, and this one has a loss "
            "of its own: leave it at 1"
        )


def _read_data(
    script_args: ScriptArguments, training_args: SFTConfig
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Read the records to train on, and those to evaluate on if there is any evaluation."""
    # the other ranks then read what rank 0 has cached
    with training_args.main_process_first():
        train = read_records(script_args.data, "train")
        if training_args.eval_strategy == "no":
            return train, None
        held_out = read_records(script_args.data, "validation")
        held_out = held_out.shuffle(seed=training_args.seed)
        few = min(script_args.eval_samples, len(held_out))
        return train, held_out.select(range(few))


def _load_model(
    script_args: ScriptArguments, training_args: SFTConfig, model_args: ModelConfig
) -> Any:
    """Load the base model, and put a fresh or a saved adapter onto it if the settings say so."""
    stage = zero_stage(training_args)
    with _loaded_whole_if_it_has_experts(training_args, model_args):
        model = load_base(
            model_args.model_name_or_path,
            attn_implementation=model_args.attn_implementation,
            # under ZeRO-3 each rank holds its shard, and DeepSpeed decides where
            device_map=None if stage == 3 else {"": training_args.device},
            revision=model_args.model_revision,
            dtype=model_args.dtype,
            quantization_config=get_quantization_config(model_args),
        )
        peft_config = get_peft_config(model_args)
        if peft_config is None:
            return model
        # ZeRO-3 wants one dtype
        in_float32 = script_args.autocast_adapter_dtype and stage != 3
        if script_args.adapter is not None:
            model = load_tuned(
                model, script_args.adapter, trainable=True, autocast_adapter_dtype=in_float32
            )
            return _read_back_as_it_is(model.train())
        if not (peft_config.target_modules or peft_config.target_parameters):
            for key, value in adapter_targets(model, script_args.target).items():
                setattr(peft_config, key, value)
        # adapters start at random
        set_seed(training_args.seed)
        model = get_peft_model(model, peft_config, autocast_adapter_dtype=in_float32)
        _read_back_as_it_is(model)
    if stage == 3 and training_args.activation_checkpointing:
        # the kind that is not reentrant fails with adapters under ZeRO-3
        training_args.activation_checkpointing_kwargs = {"use_reentrant": True}
    return model


def _read_back_as_it_is(model: Any) -> Any:
    """Let a model with an adapter read checkpoints in the precision that they have.

    Peft brings what it loads to float32. TRL trains adapters on 4-bit weights in bfloat16, and a
    resumed run would be another one.
    """
    model.load_adapter = partial(model.load_adapter, autocast_adapter_dtype=False)
    return model


@contextmanager
def _loaded_whole_if_it_has_experts(
    training_args: SFTConfig, model_args: ModelConfig
) -> Iterator[None]:
    """Under ZeRO-3, load a mixture of experts whole; the trainer shards it later.

    Transformers 5.23 cannot load fused experts in shards. It shards what it loads as long as it
    remembers DeepSpeed's settings, so that they are taken away for a moment.
    """
    if zero_stage(training_args) != 3:
        yield
        return
    name = model_args.model_name_or_path
    folder = fetch_model(name) if is_modelscope_name(name) else name
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if not getattr(config.get_text_config(), "num_experts", 0):
        yield
        return
    deepspeed_integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        settings = training_args.deepspeed_plugin.hf_ds_config
        deepspeed_integration.set_hf_deepspeed_config(settings)


def _save_only_what_is_trained(trainer: Any, model_args: ModelConfig) -> None:
    """Keep out of what is saved what no training changes.

    That is the copy which TRL makes of an adapter for its reference. And under ZeRO-1 and 2 it is
    the base: each rank would copy it into its memory for each checkpoint, though only the adapter
    is kept; for a 30B model that took a minute, and 62 GB on each rank.
    """
    model = trainer.model
    if "ref" in getattr(model, "peft_config", {}):
        model.save_pretrained = partial(model.save_pretrained, selected_adapters=["default"])
    if model_args.use_peft and zero_stage(trainer.args) in (1, 2):
        trainer.accelerator.get_state_dict = partial(_trained_weights, model)


def _trained_weights(model: Any, *_: Any) -> dict[str, torch.Tensor]:
    """Return what is trained of a model that each rank holds whole, in the memory of the CPU."""
    weights = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            weights[name] = weight.detach().cpu()
    return weights


def _make_fast(trainer: Any, script_args: ScriptArguments, *, own_batches: bool) -> None:
    """Apply what the keys `fast` and `cache_features` ask for.

    Where the trainer makes `own_batches`, not TRL's, they are left as they are.
    """
    training_args = trainer.args
    on_gpu = training_args.device.type == "cuda"
    if script_args.cache_features:
        with training_args.main_process_first():
            cache_features(trainer, Path(script_args.data) / "features")
    if not script_args.fast:
        return
    # under ZeRO-3 the weights of experts are there only while their own layer runs
    thin_experts = zero_stage(training_args) != 3
    speed_up(trainer.model, experts=thin_experts, compiled=on_gpu)
    if own_batches:
        return
    if not script_args.cache_features:
        send_bytes(trainer)
    if on_gpu:
        trainer.data_collator = partial(pad_lengths, trainer.data_collator)


def _with_picture(
    collate: Callable[[list[dict]], dict], train: datasets.Dataset, rows: list[dict]
) -> dict:
    """Add a row that does not count to a batch without pictures.

    Under ZeRO-3 no rank may skip the vision tower: the others would wait for its shards.
    """
    if any(row["images"] for row in rows):
        return collate(rows)
    spare = next(dict(row) for row in train if row["images"])
    batch = collate([*rows, spare])
    batch["labels"][len(rows) :] = -100
    return batch
