"""What one and two GPUs do under no DeepSpeed, ZeRO-2 and ZeRO-3: speed, peak memory, losses.

    python benchmarks/launch_gpus.py OUT_FOLDER [--steps 18] [--seconds 440]
    python benchmarks/launch_gpus.py OUT_FOLDER --small                # a rehearsal, also on a CPU
    python benchmarks/launch_gpus.py OUT_FOLDER --only zero3,experts   # a part

`medtune.training` trains a model of the shape of Qwen3-VL-2B with random weights, so nothing is
downloaded. Then a model of the shape of Qwen3-VL-30B-A3B runs under ZeRO-3 over both cards. Each
result is a line in OUT_FOLDER/results.jsonl.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from _harness import (
    TINY_MODEL,
    Stopwatch,
    append_row,
    environment_of_ranks,
    losses_of,
    make_parser,
    read_log,
    run_for,
    to_arguments,
    torchrun,
)
from _random_records import random_answers, record, save_noise_pictures
from transformers import AutoConfig, AutoModelForImageTextToText, TrainerCallback

from medtune.models import load_base, load_processor
from medtune.plan import build_twin, twin_config
from medtune.training import build_trainer, parse_arguments, train_model

# its `load_base` is replaced, so the file itself is needed
from medtune.training import trainer as trainer_file

DENSE = "Qwen/Qwen3-VL-2B-Instruct"
EXPERTS = "Qwen/Qwen3-VL-30B-A3B-Instruct"
# What a configuration calls a token, and the token.
TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
PICTURES = 64
RECORDS = 640
QUESTION = "Describe this medical image."
WORDS = "the liver is seen at upper left of this picture bright dark small large kidney spleen region near"
# name -> ranks and ZeRO stage
LAUNCHES: dict[str, tuple[int, str]] = {
    "one": (1, ""),
    "ddp": (2, ""),
    "zero2": (2, "zero2"),
    "zero3": (2, "zero3"),
}
OFFLOADS = ("zero2_offload", "zero3_offload")
ALL = (*LAUNCHES, "experts", *OFFLOADS)

Settings = dict[str, Any]


# ---- models and records


def build(folder: Path, small: bool) -> None:
    """Write the dense twin, the configuration of the twin with experts, and the records."""
    scale = "tiny" if small else "full"
    side = 64 if small else 512
    processor = load_processor(TINY_MODEL)
    prepare = processor.image_processor
    # Qwen-VL calls numbers of pixels by the names of edges
    prepare.size = type(prepare.size)(shortest_edge=side * side, longest_edge=side * side)
    prepare.temporal_patch_size = 2
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dense = build_twin(DENSE, processor, scale=scale, device=device)
    dense.save_pretrained(folder / "dense")
    experts = twin_config(EXPERTS, scale=scale)
    experts.architectures = ["Qwen3VLMoeForConditionalGeneration"]
    for name, token in TOKENS.items():
        setattr(experts, name, processor.tokenizer.convert_tokens_to_ids(token))
    experts.save_pretrained(folder / "experts")
    for name in ("dense", "experts"):
        processor.save_pretrained(folder / name)
    tokens = write_records(folder / "data", processor.tokenizer)
    pictures = (side // 32) ** 2
    print(f"answers have {tokens:.0f} tokens on average, pictures {pictures}", flush=True)


def write_records(folder: Path, tokenizer: Any) -> float:
    """Write records with answers of unequal length; return the mean number of their tokens."""
    save_noise_pictures(folder / "images", PICTURES, noise_side=64, side=512)
    answers = random_answers(WORDS.split(), RECORDS, shortest=60, longest=180)
    tokens = 0
    with open(folder / "train.jsonl", "w", encoding="utf-8") as file:
        for number, answer in enumerate(answers):
            tokens += len(tokenizer(answer)["input_ids"])
            picture = f"images/{number % PICTURES}.jpg"
            file.write(json.dumps(record(number, picture, QUESTION, answer)) + "\n")
    return tokens / RECORDS


# ---- in every rank


class Measure(TrainerCallback):
    """Note when each step ends, and the peak of memory."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_step_end(self, args, state, control, **kwargs):
        # TRL has just read the loss, so the card is done
        self.times.append(time.perf_counter())

    def on_train_end(self, args, state, control, **kwargs):
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        measured = {"times": self.times, "peak_gb": peak / 1e9}
        measured_file(args.output_dir, args.process_index).write_text(json.dumps(measured))


def measured_file(output_dir: str, rank: int) -> Path:
    """Name the file in which a rank notes what it measured."""
    return Path(output_dir) / f"measured-{rank}.json"


def build_in_shards(path: str, plugin: Any) -> Any:
    """Make the twin with experts so that no rank ever holds all of it."""
    # takes seconds and looks for compilers, and the runs without it should be without it
    import deepspeed

    config = AutoConfig.from_pretrained(path)
    torch.set_default_dtype(torch.bfloat16)
    with deepspeed.zero.Init(config_dict_or_path=plugin.hf_ds_config.config):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    torch.set_default_dtype(torch.float32)
    for parameter in model.parameters():
        # experts, which no constructor fills
        if len(parameter.ds_shape) == 3:
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.normal_(0, 0.02)
    return model


def train_all(file: str) -> None:
    """Train the runs of a file one after the other."""
    for settings in json.loads(Path(file).read_text()):
        train_one(settings)


def train_one(settings: Settings) -> None:
    """Train one run, as one of the ranks."""
    script_args, training_args, model_args = parse_arguments(to_arguments(settings))

    def load(path: str, **options: Any) -> Any:
        if str(path).endswith("experts"):
            return build_in_shards(path, training_args.deepspeed_plugin)
        return load_base(path, **options)

    with patch.object(trainer_file, "load_base", load):
        trainer = build_trainer(script_args, training_args, model_args, callbacks=[Measure()])
    train_model(trainer, script_args, model_args)


# ---- the launches


class Launcher:
    """Start ranks, one launch after the other, until the time is up.

    Parameters
    ----------
    out : folder of the results.
    folder : of models, records and runs.
    seconds : for all launches.
    """

    def __init__(self, out: Path, folder: Path, seconds: float):
        self.out = out
        self.folder = folder
        self._end = time.perf_counter() + seconds

    @property
    def seconds_left(self) -> float:
        return self._end - time.perf_counter()

    def launch(self, name: str, ranks: int, parts: dict[str, Settings]) -> None:
        """Start ranks that train some runs, and note of each what it measured."""
        for part, settings in parts.items():
            settings["output_dir"] = str(self.folder / f"{name}-{part}")
        file = self.folder / f"{name}.json"
        file.write_text(json.dumps(list(parts.values())))
        command = [*torchrun(ranks), __file__, "--train", str(file)]
        # multicast over NVLink is off, as in the committed figures
        environment = environment_of_ranks(NCCL_NVLS_ENABLE="0")
        watch = Stopwatch()
        ended = run_for(command, max(30, self.seconds_left), self.out / f"{name}.log", environment)
        for part, settings in parts.items():
            line = {
                "run": name,
                "part": part,
                "ranks": ranks,
                "code": "timeout" if ended.timed_out else ended.code,
                "launch_seconds": watch.read().wall,
            }
            line |= read_run(settings, ranks)
            append_row(self.out / "results.jsonl", line)
            print(json.dumps(line)[:400], flush=True)


def read_run(settings: Settings, ranks: int) -> dict[str, Any]:
    """Read losses, speed and peaks of a run, as far as it got."""
    folder = settings["output_dir"]
    found: dict[str, Any] = {}
    try:
        found["losses"] = losses_of(read_log(folder))
        measured = []
        for rank in range(ranks):
            measured.append(json.loads(measured_file(folder, rank).read_text()))
        times = measured[0]["times"]
        # the first steps warm up
        late = times[len(times) // 3 :]
        batch = ranks * settings["per_device_train_batch_size"]
        found["samples_per_second"] = batch * (len(late) - 1) / (late[-1] - late[0])
        found["peak_gb"] = [rank["peak_gb"] for rank in measured]
    except (OSError, ValueError, IndexError, ZeroDivisionError) as error:
        found["error"] = f"{type(error).__name__}: {error}"
    return found


def shared_settings(folder: Path, small: bool) -> Settings:
    """Give what all runs share."""
    return {
        "data": str(folder / "data"),
        "model_name_or_path": str(folder / "dense"),
        "target": "llamafactory-all",
        "lora_r": 8,
        "lora_alpha": 16,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "seed": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "autocast_adapter_dtype": False,
        "disable_tqdm": True,
        "dataloader_num_workers": 0 if small else 8,
    }


def speed_settings(folder: Path, small: bool, steps: int) -> Settings:
    """Give the settings of the runs whose speed is measured."""
    if small:
        own = {"dtype": "float32", "bf16": False, "per_device_train_batch_size": 2, "max_steps": 6}
    else:
        own = {
            "dtype": "bfloat16",
            "bf16": True,
            "per_device_train_batch_size": 32,
            "max_steps": steps,
        }
    return shared_settings(folder, small) | own


def exact_settings(folder: Path, small: bool, ranks: int) -> Settings:
    """Give the settings of the runs whose losses are compared: 8 samples a step in float32."""
    own = {
        "dtype": "float32",
        "bf16": False,
        "max_steps": 6,
        "per_device_train_batch_size": 8 // ranks,
    }
    return shared_settings(folder, small) | own


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--small", action="store_true", help="tiny shapes, also on a CPU")
    parser.add_argument("--seconds", type=float, default=440)
    parser.add_argument("--only", default=",".join(ALL), help=f"of {', '.join(ALL)}")
    parser.add_argument("--steps", type=int, default=18)
    parser.add_argument("--train", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train_all(options.train)
        return
    if not options.out:
        parser.error("name a folder for the results")
    options.out.mkdir(parents=True, exist_ok=True)
    launcher = Launcher(options.out, Path(tempfile.mkdtemp()), options.seconds)
    build(launcher.folder, options.small)
    launch_all(launcher, options)


def launch_all(launcher: Launcher, options: argparse.Namespace) -> None:
    """Launch what the options ask for."""
    folder, small = launcher.folder, options.small
    only = options.only.split(",")
    speed = speed_settings(folder, small, options.steps)
    for name, (ranks, stage) in LAUNCHES.items():
        if name not in only:
            continue
        sharding = {"deepspeed": stage} if stage else {}
        parts = {
            "speed": speed | sharding,
            "exact": exact_settings(folder, small, ranks) | sharding,
        }
        launcher.launch(name, ranks, parts)
    if "experts" in only:
        experts = {
            "model_name_or_path": str(folder / "experts"),
            "deepspeed": "zero3",
            "target": "attention",
            "activation_checkpointing": True,
            "max_steps": 6,
            "per_device_train_batch_size": 2 if small else 16,
        }
        launcher.launch("experts", 2, {"speed": speed | experts})
    for name in OFFLOADS:
        if name in only and launcher.seconds_left > 60:
            launcher.launch(name, 2, {"speed": speed | {"deepspeed": name, "max_steps": 6}})


if __name__ == "__main__":
    main()
