"""One rung of benchmarks/train.py: build the twin, train it or let it answer, and measure.

Everything that `HF_HOME` decides is imported here, so the environment must be set before.
"""

import logging
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import trl
from _harness import TINY_MODEL, append_row, losses_of, to_arguments
from _train_data import ensure_data
from _train_rungs import LORA, RUNGS, Rung
from _train_watch import StepProfile
from transformers import AutoModelForImageTextToText, TrainerCallback

from medtune.answers import generate_answers
from medtune.models import load_processor, part_of
from medtune.plan import build_twin, save_processor, twin_config
from medtune.records import read_records
from medtune.training import build_trainer, parse_arguments, send_bytes, speed_up

# its names are replaced for some rungs, so the file itself is needed
from medtune.training import trainer as trainer_file

CUDA = torch.cuda.is_available()
# What is printed of a row.
PRINTED = ("rung", "samples_per_second", "mfu_percent", "peak_gb", "first_loss", "error")
# Samples whose lengths stand for those of all.
SEEN_SAMPLES = 16


@dataclass(frozen=True)
class Conditions:
    """What all rungs of a call share.

    Parameters
    ----------
    out : folder of the results, the data and the models.
    small : tiny twins, a rehearsal.
    steps : optimizer steps; 0 for what suits.
    peak : TFLOP/s of the card, dense bfloat16.
    profile : also profile the last two steps.
    """

    out: Path
    small: bool
    steps: int
    peak: float
    profile: bool

    @property
    def scale(self) -> str:
        return "tiny" if self.small else "full"

    @property
    def training_steps(self) -> int:
        steps = self.steps or (4 if self.small else 24)
        # a profile of the last steps needs some before them
        return max(steps, 8) if self.profile else steps


def device_name() -> str:
    """Name the GPU, or say that there is none."""
    return torch.cuda.get_device_name() if CUDA else "cpu"


def note(out: Path, row: dict[str, Any]) -> None:
    """Append a row to the results, and print the most of it."""
    append_row(out / "results.jsonl", row)
    print("  ".join(f"{key}={row[key]}" for key in PRINTED if key in row), flush=True)


def measure_rung(name: str, conditions: Conditions) -> None:
    """Measure a rung and note what came of it, errors as well."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    row = {"rung": name, "device": device_name()}
    try:
        row |= _measure(name, RUNGS[name], conditions)
    except Exception as error:
        traceback.print_exc()
        message = " ".join(str(error).split())[:300]
        row["error"] = f"{type(error).__name__}: {message}"
    if CUDA:
        row["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    note(conditions.out, row)


def _measure(name: str, rung: Rung, conditions: Conditions) -> dict[str, Any]:
    facts = ensure_data(conditions.out / "data", conditions.small)
    twin = Twin.of(rung.model, conditions)
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        if rung.limit_gb:
            whole = torch.cuda.get_device_properties().total_memory
            torch.cuda.set_per_process_memory_fraction(min(1, rung.limit_gb * 1e9 / whole))
    if rung.generate:
        return _answer(rung, twin, conditions)
    return _train(name, rung, twin, conditions) | facts


# ---- the model


@dataclass(frozen=True)
class Twin:
    """A model of a published shape whose weights are made in memory.

    Weights are random: there is no need to write 60 GB and read them again.

    Parameters
    ----------
    name : the published model.
    scale : "full" or "tiny".
    folder : has processor and configuration, but no weights.
    processor : that of the folder.
    """

    name: str
    scale: str
    folder: Path
    processor: Any

    @classmethod
    def of(cls, name: str, conditions: Conditions) -> "Twin":
        """Prepare the folder of a twin, unless it is there."""
        folder = conditions.out / "models" / name.split("/")[1]
        scale = conditions.scale
        if not (folder / "config.json").exists():
            save_processor(name, folder, scale=scale, tokenizer=TINY_MODEL / "tokenizer.json")
            twin_config(name, scale=scale).save_pretrained(folder)
        return cls(name, scale, folder, load_processor(folder))

    def build(self, path: Any = None, *, dtype: str, quantization_config: Any = None, **_: Any):
        """Make the model; takes the arguments of `medtune.models.load_base`, in whose place it is."""
        return build_twin(
            self.name,
            self.processor,
            scale=self.scale,
            dtype=dtype,
            device="cuda" if CUDA else "cpu",
            quantization_config=quantization_config,
        )


def needed_tflop(
    twin: Twin, tokens: float, answer_tokens: float, patches: int, sees_pixels: bool
) -> float:
    """Compute the TFLOP that a sample of LoRA takes.

    That is the forward pass and the gradients of activations; frozen weights need none.

    Parameters
    ----------
    twin : the model.
    tokens, answer_tokens, patches : of a sample; the head sees the answer's tokens only.
    sees_pixels : pixels go through the vision tower, forward only.
    """
    config = twin_config(twin.name, scale=twin.scale)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    text = config.get_text_config()
    parts: dict[str, float] = {}
    for key, parameter in model.named_parameters():
        part = part_of(key)
        parts[part] = parts.get(part, 0) + parameter.numel()

    # of the experts a token meets a few
    experts = getattr(text, "num_experts", 0) or 1
    active = getattr(text, "num_experts_per_tok", 0) / experts
    language = parts.get("language attention", 0) + parts.get("language MLP", 0)
    language += active * parts.get("experts", 0)
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    width = text.num_attention_heads * head_size

    # forward and backward: 2 operations a weight each
    layers = 4 * language * tokens
    head = 4 * text.vocab_size * text.hidden_size * answer_tokens
    # causal: each token looks at half of the others
    attention = 3 * 4 * tokens**2 * width * text.num_hidden_layers / 2
    flop = layers + head + attention
    if sees_pixels:
        flop += _tower_flop(config.vision_config, parts, patches)
    return flop / 1e12


def _tower_flop(vision: Any, parts: dict[str, float], patches: int) -> float:
    """Compute what a forward pass of the vision tower and the merger takes."""
    depth = getattr(vision, "depth", None) or vision.num_hidden_layers
    blocks = 2 * parts["vision"] * patches
    # it makes one token of four patches
    merger = 2 * parts["merger"] * patches / 4
    attention = 4 * patches**2 * vision.hidden_size * depth
    return blocks + merger + attention


# ---- training


def late_speed(times: list[float], batch: int, until: int | None = None) -> float:
    """Give the samples a second of the second half of the steps, from when each of them ended.

    Parameters
    ----------
    times : seconds.
    batch : samples of a step.
    until : the first step that does not count; None for none.
    """
    late = times[len(times) // 2 - 1 : until]
    return batch * (len(late) - 1) / (late[-1] - late[0])


class Measure(TrainerCallback):
    """Note when each step ends, and profile the last two if asked to."""

    def __init__(self, conditions: Conditions):
        self.times: list[float] = []
        self.profile: StepProfile | None = None
        self._profile_after = conditions.training_steps - 2 if conditions.profile else None

    def on_step_end(self, args, state, control, **kwargs):
        # TRL has just read the loss, so the card is done
        self.times.append(time.perf_counter())
        if state.global_step == self._profile_after:
            self.profile = StepProfile(CUDA)
            self.profile.start()

    def samples_per_second(self, batch: int) -> float:
        """Give the speed of the second half of the steps, without those under the profiler."""
        return late_speed(self.times, batch, until=self._profile_after)


def _settings(name: str, rung: Rung, twin: Twin, conditions: Conditions) -> dict[str, Any]:
    """Give the keys of `medtune.training` for a rung."""
    settings = {
        "data": conditions.out / "data",
        "model_name_or_path": twin.folder,
        "output_dir": conditions.out / "runs" / name,
        "seed": 0,
        **LORA,
        **rung.settings,
        "max_steps": conditions.training_steps,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    if conditions.small:
        settings |= {"per_device_train_batch_size": 2, "dataloader_num_workers": 0}
    if not CUDA:
        settings |= {"dtype": "float32", "bf16": False}
    return settings


@contextmanager
def _trainer_of(rung: Rung, twin: Twin) -> Iterator[None]:
    """Let `build_trainer` take the twin for the base model, and tie its embeddings if asked to."""
    own = trl.get_peft_config

    def tied(model_args):
        config = own(model_args)
        config.ensure_weight_tying = True
        return config

    peft_config = tied if rung.tie_embeddings else own
    with (
        patch.object(trainer_file, "load_base", twin.build),
        patch.object(trainer_file, "get_peft_config", peft_config),
    ):
        yield


def _change_model(trainer: Any, rung: Rung) -> None:
    """Apply what of `fast` a rung asks for one by one."""
    if rung.speed:
        # as `fast` sets it
        torch._dynamo.config.recompile_limit = 64
        speed_up(
            trainer.model,
            attention=rung.speed.get("attention", False),
            experts=False,
            compiled=rung.speed.get("compiled", False) and CUDA,
        )
    if rung.send_bytes:
        send_bytes(trainer)


def _train(name: str, rung: Rung, twin: Twin, conditions: Conditions) -> dict[str, Any]:
    """Train, and say how fast and with which losses."""
    settings = _settings(name, rung, twin, conditions)
    script_args, training_args, model_args = parse_arguments(to_arguments(settings))
    measure = Measure(conditions)
    with _trainer_of(rung, twin):
        trainer = build_trainer(script_args, training_args, model_args, callbacks=[measure])
    _change_model(trainer, rung)
    trainer.train()
    if measure.profile:
        measure.profile.stop()
        measure.profile.save(conditions.out / f"profile-{name}.txt", name)

    batch = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
    rate = measure.samples_per_second(batch)
    tokens, answer_tokens, patches = _sample_sizes(trainer)
    row = {
        "samples_per_second": round(rate, 2),
        "tokens_per_second": round(rate * tokens),
        "tokens": round(tokens, 1),
    }
    # packed weights are not counted by their numbers
    if not rung.settings.get("load_in_4bit"):
        sees_pixels = not script_args.cache_features
        tflop = needed_tflop(twin, tokens, answer_tokens, patches, sees_pixels)
        row["tflop_a_sample"] = round(tflop, 3)
        row["mfu_percent"] = round(100 * tflop * rate / conditions.peak, 1)
    losses = losses_of(trainer.state.log_history)
    return row | {
        "batch": batch,
        "steps": conditions.training_steps,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "seconds_to_second_step": round(measure.times[1] - measure.times[0], 1),
    }


def _sample_sizes(trainer: Any) -> tuple[float, float, int]:
    """Count tokens, tokens of the answer, and patches of the mean sample."""
    rows = [dict(trainer.train_dataset[number]) for number in range(SEEN_SAMPLES)]
    batch = trainer.data_collator(rows)
    tokens = batch["attention_mask"].sum().item() / SEEN_SAMPLES
    answer_tokens = (batch["labels"] != -100).sum().item() / SEEN_SAMPLES
    grids = batch.get("image_grid_thw")
    # Gemma-3 has no grids: its pictures are of one size, 64 times 64 patches
    patches = 4096 if grids is None else grids.prod(-1).sum().item() // SEEN_SAMPLES
    return tokens, answer_tokens, patches


# ---- answers


def _answer(rung: Rung, twin: Twin, conditions: Conditions) -> dict[str, Any]:
    """Answer 1,024 questions with 150 tokens each; the second of two rounds counts."""
    if conditions.small:
        new_tokens, samples, dtype = 4, 6, "float32"
        options = rung.generate | {"batch_size": 2}
    else:
        new_tokens, samples, dtype = 150, 1024, "bfloat16"
        options = dict(rung.generate)
    model = twin.build(dtype=dtype)
    rows = read_records(conditions.out / "data", "train")
    rows = rows.select(range(min(len(rows), samples)))
    options |= {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    speed_up(model)
    # compiles for these lengths
    generate_answers(model, twin.processor, rows, **options)
    began = time.perf_counter()
    answers = generate_answers(model, twin.processor, rows, **options)
    rate = len(answers) / (time.perf_counter() - began)
    return {
        "samples_per_second": round(rate, 2),
        "tokens_per_second": round(rate * new_tokens),
        "batch": options["batch_size"],
    }
