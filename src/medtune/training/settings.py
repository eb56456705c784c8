"""What a training is told: the keys of a YAML file and of the command line.

The keys are those of `ScriptArguments`, TRL's `SFTConfig` and TRL's `ModelConfig`; an unknown one
is refused. `stage: dpo` has `DPOConfig` instead, `stage: grpo` has `GRPOConfig` and the keys of
`RewardArguments`.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from trl import DPOConfig, GRPOConfig, ModelConfig, SFTConfig, TrlParser

from medtune.files import one_line
from medtune.records import names_shards

# Files of settings for DeepSpeed by their short name: zero1, zero2 and zero3, and each with
# _offload. `deepspeed: zero2` in a YAML file means the file of that name.
ZERO = {path.stem: str(path) for path in Path(__file__).with_name("deepspeed").glob("*.json")}


@dataclass
class ScriptArguments:
    """What medtune adds to the keys of TRL.

    Attributes
    ----------
    stage : "sft" learns the answers of the records; "dpo" learns which of two answers is the better
        one, from `preferences/` beside the records (`medtune prefer`); "grpo" learns from rewards
        for its own answers, see `RewardArguments`.
    adapter : a saved adapter to go on from; its own rank and layers hold. With dpo and grpo it is
        also the reference, of which TRL keeps a copy.
    data : folder written by `medtune convert`; or parquet shards (a file, a folder of such, a
        pattern like `shards/*.parquet`) or a set on the hub, which are read as the training goes.
    splits : for shards: CSV with id and split of each pair, as `medtune audit --write` writes it.
    split_by, questions, language, system_prompt, magnify : for shards: as `medtune convert` takes them.
    question_seed : for shards: decides which questions are drawn, as `medtune convert --seed`.
    shuffle_buffer : for shards: rows that are shuffled together; up to 1 keeps them as they lie.
    most_rejected : for shards: share of the rows that may be left out.
    target : layers that get an adapter, as words of `medtune.models.TARGETS` joined by `+`.
    eval_samples : number of validation pairs of an evaluation.
    max_pixels : most pixels of a picture; 0 leaves what the processor says.
    autocast_adapter_dtype : keep the adapters in float32 (not under ZeRO-3).
    name_weight : how many times as much the words that name the structure weigh in the loss, see
        `medtune.training.weigh_names`.
    fast : the same training in less time, see `medtune.training.speed`.
    cache_features : let a frozen vision tower see each picture only once.
    allow_cut_answers : train even where `max_length` cuts answers.
    watchdog_seconds : without a step, after which stderr says what is waited for; 0 never says it.
    resume : continue from the newest complete checkpoint.
    """

    data: str = field(
        metadata={"help": "Folder written by 'medtune convert', parquet shards, or a hub set."}
    )
    stage: str = field(
        default="sft",
        metadata={
            "help": "sft: learn the answers; dpo: from pairs of answers; grpo: from rewards."
        },
    )
    adapter: str | None = field(
        default=None, metadata={"help": "A saved adapter to go on from, in place of a fresh one."}
    )
    splits: str | None = field(
        default=None,
        metadata={"help": "For shards: CSV with id and split, as 'medtune audit --write' has it."},
    )
    split_by: str | None = field(
        default=None, metadata={"help": "For shards: patient or none, as 'medtune convert'."}
    )
    questions: list[str] | None = field(
        default=None, metadata={"help": "For shards: what is asked, one or several to draw from."}
    )
    language: str = field(
        default="en", metadata={"help": "For shards: language of the captions, en or zh."}
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "For shards: what is said before each question."}
    )
    magnify: bool = field(
        default=False,
        metadata={"help": "For shards: show the region of interest once more, enlarged."},
    )
    question_seed: int = field(
        default=0, metadata={"help": "For shards: decides the draw of questions, as in convert."}
    )
    shuffle_buffer: int = field(
        default=1000, metadata={"help": "For shards: rows shuffled together; 0: as they lie."}
    )
    most_rejected: float = field(
        default=0.1, metadata={"help": "For shards: share of the rows that may be left out."}
    )
    target: str = field(
        default="language",
        metadata={"help": "Layers with an adapter: words of medtune.models.TARGETS, joined by +."},
    )
    eval_samples: int = field(
        default=32, metadata={"help": "Number of validation pairs of an evaluation."}
    )
    max_pixels: int = field(
        default=0, metadata={"help": "Most pixels of a picture; 0: what the processor says."}
    )
    autocast_adapter_dtype: bool = field(
        default=True, metadata={"help": "Keep the adapters in float32 (not under ZeRO-3)."}
    )
    name_weight: float = field(
        default=1.0, metadata={"help": "Of the words that name the structure, in the loss."}
    )
    fast: bool = field(
        default=False,
        metadata={"help": "The same training in less time, see medtune.training.speed."},
    )
    cache_features: bool = field(
        default=False, metadata={"help": "A frozen vision tower sees each picture only once."}
    )
    allow_cut_answers: bool = field(
        default=False, metadata={"help": "Train even where max_length cuts answers."}
    )
    watchdog_seconds: float = field(
        default=60.0,
        metadata={"help": "Say what is waited for after so many seconds without a step; 0: never."},
    )
    resume: bool = field(
        default=False, metadata={"help": "Continue from the newest complete checkpoint."}
    )


@dataclass
class RewardArguments(ScriptArguments):
    """What medtune adds for `stage: grpo`; TRL's key `reward_weights` weighs the rewards.

    Attributes
    ----------
    rewards : names of the functions of `medtune.rewards` without their ending: finding, name, box,
        format, length. One whose weight is 0 is only logged.
    missed_weight : what an answer gets that reports no finding where there is one.
    invented_weight : what it gets that reports one where there is none.
    silent_weight : what it gets that says nothing where the record says that there is none.
    wrong_side_weight : what the name gets for the wrong side of the body.
    box_scale : width and height of the picture in boxes that are written as text.
    answer_pattern : regular expression that the whole answer must match, for format.
    shortest, longest : words of a good answer, for length.
    check_prompts : so many of the prompts are answered and rewarded before the first step, to see
        that there is something to learn; 0: none.
    """

    rewards: list[str] = field(
        default_factory=lambda: ["finding"],
        metadata={"help": "Rewards of medtune.rewards: finding, name, box, format, length."},
    )
    missed_weight: float = field(
        default=-1.0, metadata={"help": "What an answer gets that misses a finding."}
    )
    invented_weight: float = field(
        default=-0.5, metadata={"help": "What an answer gets that invents a finding."}
    )
    silent_weight: float = field(
        default=0.5, metadata={"help": "What an answer gets that does not deny what is not there."}
    )
    wrong_side_weight: float = field(
        default=0.5, metadata={"help": "What the name gets for the wrong side of the body."}
    )
    box_scale: float = field(
        default=1000.0, metadata={"help": "What a picture's width and height are in a written box."}
    )
    answer_pattern: str = field(
        default=r"[^\n]+[.。]", metadata={"help": "What the whole answer must match, for format."}
    )
    shortest: int = field(
        default=40, metadata={"help": "Least words of a good answer, for length."}
    )
    longest: int = field(default=90, metadata={"help": "Most words of a good answer, for length."})
    check_prompts: int = field(
        default=32,
        metadata={"help": "Prompts answered and rewarded before the first step; 0: none."},
    )


# What a training of each stage is told: our keys, and TRL's.
STAGES = {
    "sft": (ScriptArguments, SFTConfig),
    "dpo": (ScriptArguments, DPOConfig),
    "grpo": (RewardArguments, GRPOConfig),
}

# What `rewards` may name.
REWARDS = ("finding", "name", "box", "format", "length")

# Keys that only shards have a use for.
OF_SHARDS = (
    "splits",
    "split_by",
    "questions",
    "language",
    "system_prompt",
    "magnify",
    "question_seed",
    "shuffle_buffer",
    "most_rejected",
)


class _Parser(TrlParser):
    """TRL's parser, which knows the short names of `ZERO` and raises instead of exiting."""

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        """Take the values of a YAML file as defaults."""
        values = {key: ZERO.get(str(value), value) for key, value in config.items()}
        return super().set_defaults_with_config(**values)

    def error(self, message: str) -> None:
        """Raise what argparse would print before it ends the process."""
        raise ValueError(message)


def parse_arguments(
    argv: list[str],
) -> tuple[ScriptArguments, SFTConfig | DPOConfig | GRPOConfig, ModelConfig]:
    """Read the words of a command line: `--config train.yaml` and what overrides it.

    Parameters
    ----------
    argv : words as in `sys.argv[1:]`; a key that stands in both counts as it stands here.

    Returns
    -------
    tuple : ScriptArguments, `trl.SFTConfig` and `trl.ModelConfig`. With `stage: dpo` the second is a
        `trl.DPOConfig`; with `stage: grpo` the first is RewardArguments and the second a
        `trl.GRPOConfig`.

    Raises
    ------
    ValueError : an unknown key, a value of the wrong type, settings that exclude each other.

    Examples
    --------
    >>> words = ["--data", "records", "--model_name_or_path", "tiny-vlm", "--lora_r", "4"]
    >>> script_args, training_args, model_args = parse_arguments(words)
    >>> script_args.target, training_args.completion_only_loss, model_args.lora_r
    ('language', True, 4)
    >>> parse_arguments([*words, "--lora_rank", "4"])
    Traceback (most recent call last):
    ValueError: Some specified arguments are not used ... ['--lora_rank', '4'] Did you mean ... lora_r...
    """
    stage = _stage_of(argv)
    if stage not in STAGES:
        raise ValueError(f"stage={stage} is unknown: use {', '.join(STAGES)}")
    known = (*STAGES[stage], ModelConfig)
    parser = _Parser(known, prog="medtune train")
    _set_defaults(parser, stage)
    words = []
    for word in argv:
        # DeepSpeed's launcher adds a local rank, which is in the environment, too
        if not word.startswith("--local_rank="):
            words.append(ZERO.get(word, word))
    script_args, training_args, model_args = _parse(parser, words, known)
    _refuse_what_cannot_train(training_args, model_args)
    if not script_args.name_weight > 0:
        raise ValueError(f"name_weight={script_args.name_weight}: must be above 0")
    _refuse_what_is_not_of_shards(script_args)
    if script_args.adapter and not model_args.use_peft:
        raise ValueError("adapter and use_peft=false exclude each other: an adapter is trained on")
    if stage != "sft":
        _refuse_what_is_of_sft(script_args, training_args)
    if script_args.fast and torch.cuda.is_available():
        # all layers share one function of Transformers, and each variant of it counts
        torch._dynamo.config.recompile_limit = 64
        if not training_args.dataloader_num_workers:
            training_args.dataloader_num_workers = min(8, os.cpu_count() or 1)
    return script_args, training_args, model_args


def _parse(parser: TrlParser, words: list[str], known: tuple[type, ...]) -> tuple:
    """Read the words and the file of settings; what is wrong with them is a `ValueError`."""
    try:
        return parser.parse_args_and_config(words)
    except ValueError as error:
        raise ValueError(f"{error}{_did_you_mean(str(error), known)}") from None
    except FileNotFoundError as error:
        advice = "docs/your-data.md has one to begin with"
        raise ValueError(f"there is no file of settings {error.filename}: {advice}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"the file of settings is no YAML: {one_line(error)}") from None


def _stage_of(argv: list[str]) -> str:
    """Find the stage before anything else is read: it decides which keys there are."""
    words = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    words.add_argument("--stage")
    words.add_argument("--config")
    try:
        given, _ = words.parse_known_args(argv)
    except argparse.ArgumentError:
        # the parser of all keys says what is wrong
        return "sft"
    if given.stage:
        return given.stage
    # a file that is missing or no YAML is told by the parser of all keys
    with contextlib.suppress(OSError, TypeError, AttributeError, ValueError, yaml.YAMLError):
        return str(yaml.safe_load(Path(given.config).read_text("utf-8")).get("stage", "sft"))
    return "sft"


def _did_you_mean(message: str, of: tuple[type, ...]) -> str:
    """Name the keys that are most like the first unknown one of a message; empty if none is."""
    unknown = re.search(r"--(\w+)", message)
    if not unknown:
        return ""
    known = []
    for settings in of:
        known += [setting.name for setting in fields(settings)]
    near = difflib.get_close_matches(unknown[1], known, 3)
    if not near or unknown[1] in near:
        return ""
    return f" Did you mean {' or '.join(near)}?"


def _set_defaults(parser: TrlParser, stage: str) -> None:
    """Set what is the same in every training of the course, as notebook 03 explains it."""
    gpu = torch.cuda.is_available()
    if stage != "grpo":
        # a text that is cut loses image tokens
        parser.set_defaults(max_length=None)
    if stage == "sft":
        parser.set_defaults(completion_only_loss=True)
    parser.set_defaults(
        report_to="none",
        # an old name of activation_checkpointing, which TRL turns on
        gradient_checkpointing=None,
        use_peft=True,
        lora_dropout=0.0,
        save_total_limit=2,
        router_aux_loss_coef=0.0,
        bf16=gpu,
        use_cpu=not gpu,
        dataloader_pin_memory=gpu,
    )


def _refuse_what_cannot_train(training_args: SFTConfig, model_args: ModelConfig) -> None:
    """Raise `ValueError` for settings that are allowed one by one but make no training."""
    if not model_args.model_name_or_path:
        raise ValueError("model_name_or_path is missing: name the base model, a folder or a hub id")
    if training_args.resume_from_checkpoint:
        raise ValueError(
            "resume_from_checkpoint: loading a foreign checkpoint can run its code; "
            "use resume instead"
        )
    if training_args.n_gpu > 1:
        raise ValueError(
            "one process sees several GPUs: start it with torchrun, or set CUDA_VISIBLE_DEVICES=0"
        )


def _refuse_what_is_not_of_shards(script_args: ScriptArguments) -> None:
    """Raise `ValueError` where a key of shards would be left unheeded, or one cannot be with them."""
    if names_shards(script_args.data):
        if script_args.cache_features:
            raise ValueError(
                "cache_features=true needs a converted folder: data names shards, which are read as "
                "the training goes"
            )
        return
    defaults = {setting.name: setting.default for setting in fields(ScriptArguments)}
    for key in OF_SHARDS:
        if getattr(script_args, key) != defaults[key]:
            raise ValueError(
                f"{key} is for shards, and data={script_args.data} names none: what a converted "
                "folder holds was decided by medtune convert"
            )


def _refuse_what_is_of_sft(
    script_args: ScriptArguments, training_args: DPOConfig | GRPOConfig
) -> None:
    """Raise `ValueError` for what goes with `stage: sft` only."""
    stage = script_args.stage
    if names_shards(script_args.data):
        raise ValueError(f"stage={stage} needs a converted folder: data names shards")
    for key, usual in (("fast", False), ("cache_features", False), ("name_weight", 1)):
        value = getattr(script_args, key)
        if value != usual:
            raise ValueError(
                f"{key}={str(value).lower()} is for stage=sft: TRL's loss of {stage} has its own "
                "forward"
            )
    if zero_stage(training_args) == 3:
        raise ValueError(
            f"stage={stage} does not train under ZeRO-3 here: take deepspeed: zero2, or none"
        )
    for reward in getattr(script_args, "rewards", []):
        if reward not in REWARDS:
            raise ValueError(f"rewards: {reward!r} is unknown, use {', '.join(REWARDS)}")


def zero_stage(training_args: SFTConfig) -> int | None:
    """Return the ZeRO stage, 0 to 3, or None without DeepSpeed.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> zero_stage(SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=2)))
    2
    """
    plugin = training_args.deepspeed_plugin
    return None if plugin is None else plugin.zero_stage
