"""Peaks of GPU memory of training runs on shape twins: what the planner is held to.

    python benchmarks/memory.py OUT.jsonl --part 0     # half of them, about 5 minutes on an H200
    python benchmarks/memory.py OUT.jsonl --check      # the others, which no constant was fitted to
    python benchmarks/memory.py OUT.jsonl --new --each 60 --steps 4   # later models, 8 minutes
    python benchmarks/memory.py OUT.jsonl --tiny       # at tiny scale on a CPU, to try the script

The runs really go through TRL's SFTTrainer. FIT in `_memory_configurations.py` are those that the
constants of `medtune.plan` were fitted to, CHECK those that it had not seen, NEW those of models
that came later. With --each a configuration has a process of its own and so many seconds, and one
that OUT.jsonl holds is not measured again. Each line of OUT.jsonl is one configuration;
docs/figures/planner_table.py makes the committed table of them. Weights are random: nothing here
says anything about quality.
"""

import argparse
import gc
import json
import logging
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from _harness import append_row, losses_of, make_parser, read_rows, run_for, to_arguments
from _memory_configurations import CHECK, FIT, NEW, Configuration
from datasets import Dataset, List
from datasets import Image as Picture
from peft import LoraConfig
from PIL import Image
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from medtune.models import adapter_targets, nf4_config
from medtune.plan import build_twin, save_processor

# the words of the twins' own text: their stand-in tokenizer was trained on it
from medtune.plan.shapes import FACTS

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
ANSWER_WORDS = 60


# ---- memory


def allocated() -> int:
    """Give the bytes that are allocated now; 0 without a GPU."""
    return torch.cuda.memory_allocated() if CUDA else 0


def peak() -> int:
    """Give the peak since the last reset."""
    return torch.cuda.max_memory_allocated() if CUDA else 0


def reset_peak() -> None:
    """Begin a new peak."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()


class Steps(TrainerCallback):
    """Note what memory does in each part of each step."""

    def __init__(self) -> None:
        self.log: list[dict[str, int]] = []
        self.times: list[float] = []

    def begin_forward(self) -> None:
        self.log.append({"before": allocated()})
        reset_peak()

    def end_forward(self) -> None:
        self.log[-1] |= {"kept": allocated(), "forward": peak()}
        reset_peak()

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.log[-1] |= {"gradients": allocated(), "backward": peak()}
        reset_peak()

    def on_step_end(self, *args, **kwargs):
        if CUDA:
            torch.cuda.synchronize()
        self.log[-1] |= {"end": allocated(), "optimizer": peak()}
        self.times.append(time.perf_counter())

    def highest(self) -> int:
        """Give the peak of all parts of all steps."""
        tops = []
        for entry in self.log:
            tops += [entry["forward"], entry["backward"], entry["optimizer"]]
        return max(tops)


class ProbedTrainer(SFTTrainer):
    """TRL's trainer, which tells `Steps` when a forward pass begins and ends."""

    def __init__(self, *args: Any, steps: Steps, **options: Any):
        self.steps = steps
        super().__init__(*args, callbacks=[steps], **options)

    def compute_loss(self, *args, **kwargs):
        self.steps.begin_forward()
        loss = super().compute_loss(*args, **kwargs)
        self.steps.end_forward()
        return loss


class PreparedOnce:
    """A collator that prepares its pictures once, so that what is timed is the model."""

    def __init__(self, collate: Any, rows: Dataset):
        self.batch = collate([*rows])

    def __call__(self, rows: list) -> dict[str, torch.Tensor]:
        return {key: value.clone() for key, value in self.batch.items()}

    def shapes(self) -> dict[str, list[int]]:
        return {key: list(value.shape) for key, value in self.batch.items()}


# ---- what a layer keeps


@contextmanager
def watch_saved(layer: Any, found: list) -> Iterator[None]:
    """Note what one layer keeps for the backward pass: dtype and shape of each storage."""
    original = layer.forward
    seen = set()

    def pack(tensor):
        if tensor.data_ptr() not in seen and not isinstance(tensor, torch.nn.Parameter):
            seen.add(tensor.data_ptr())
            found.append([str(tensor.dtype).removeprefix("torch."), list(tensor.shape)])
        return tensor

    def unpack(tensor):
        return tensor

    def forward(*args, **kwargs):
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return original(*args, **kwargs)

    layer.forward = forward
    try:
        yield
    finally:
        layer.forward = original


def layers_of(model: Any) -> dict[str, Any]:
    """Pick a layer from the middle of the language model and of the vision tower."""
    stacks: dict[str, torch.nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) > 1:
            kind = "vision" if "vis" in name else "language"
            if len(module) > len(stacks.get(kind, [])):
                stacks[kind] = module
    return {kind: stack[len(stack) // 2] for kind, stack in stacks.items()}


def saved_by_layers(trainer: ProbedTrainer, collate: PreparedOnce) -> dict[str, list]:
    """Say what one layer of each kind keeps in a forward pass."""
    saved: dict[str, list] = {"language": [], "vision": []}
    for kind, layer in layers_of(trainer.model).items():
        with watch_saved(layer, saved[kind]):
            batch = trainer._prepare_inputs(collate([]))
            # as accelerate does once training starts
            with torch.autocast(DEVICE, torch.bfloat16):
                trainer.model.train()
                SFTTrainer.compute_loss(trainer, trainer.model, batch)
        del batch
        gc.collect()
    return saved


# ---- one configuration


def make_rows(batch: int, pixels: int) -> Dataset:
    """Make rows as notebook 02 writes them: one picture, one question, one answer."""
    # as JSON, quotes included: so it was when the committed figures were measured
    words = json.dumps(FACTS["text"]).split() * 9
    answer = " ".join(words[:ANSWER_WORDS])
    question = [{"type": "image", "text": None}, {"type": "text", "text": "What is shown?"}]
    prompt = [{"role": "user", "content": question}]
    completion = [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    picture = Image.linear_gradient("L").resize((pixels, pixels)).convert("RGB")
    columns = {
        "prompt": [prompt] * batch,
        "completion": [completion] * batch,
        "images": [[picture]] * batch,
    }
    return Dataset.from_dict(columns).cast_column("images", List(Picture()))


def measure(
    configuration: Configuration, scale: str, steps: int, note_saved: bool
) -> dict[str, Any]:
    """Train some steps of one configuration, or answer a batch, and say what memory did.

    Parameters
    ----------
    scale : "full" or "tiny".
    note_saved : also say what a layer keeps; it keeps graphs alive, so that no peak of the same
        process counts then.
    """
    start = allocated()
    with tempfile.TemporaryDirectory() as scratch:
        processor = save_processor(configuration.model, Path(scratch) / "processor", scale=scale)
        began = time.perf_counter()
        model = make_model(configuration, processor, scale)
        gc.collect()
        result = {"build_seconds": time.perf_counter() - began, "weights": allocated() - start}
        batch, pixels = configuration.batch, configuration.pixels
        if scale == "tiny":
            batch, pixels = 2, 64
        rows = make_rows(batch, pixels)
        if configuration.method == "generate":
            new_tokens = configuration.options["new_tokens"]
            return result | measure_answers(model, processor, rows, new_tokens, start)
        trainer = make_trainer(configuration, model, processor, rows, steps, scratch)
        return result | measure_training(trainer, rows, note_saved, start)


def make_model(configuration: Configuration, processor: Any, scale: str) -> Any:
    """Build the twin."""
    usual = "float32" if configuration.method == "full" else "bfloat16"
    return build_twin(
        configuration.model,
        processor,
        scale=scale,
        dtype=configuration.options.get("dtype", usual),
        device=DEVICE,
        quantization_config=nf4_config() if configuration.method == "qlora" else None,
    )


def measure_answers(
    model: Any, processor: Any, rows: Dataset, new_tokens: int, start: int
) -> dict[str, Any]:
    """Let a model answer a batch."""
    text = processor.apply_chat_template(
        rows[0]["prompt"], tokenize=False, add_generation_prompt=True
    )
    inputs = processor(
        text=[text] * len(rows), images=list(rows["images"]), return_tensors="pt", padding=True
    ).to(model.device)
    reset_peak()
    with torch.inference_mode(), torch.autocast(DEVICE, torch.bfloat16):
        model.generate(
            **inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False
        )
    shapes = {key: list(value.shape) for key, value in inputs.items()}
    return {"peak": peak() - start, "batch_shapes": shapes}


def make_trainer(  # noqa: PLR0913 - what a trainer is made of
    configuration: Configuration,
    model: Any,
    processor: Any,
    rows: Dataset,
    steps: int,
    folder: str,
) -> ProbedTrainer:
    """Make the trainer, with an adapter unless all is trained."""
    options = configuration.options
    lora = None
    if configuration.method != "full":
        lora = LoraConfig(
            r=options.get("r", 8),
            lora_alpha=16,
            lora_dropout=options.get("dropout", 0.0),
            modules_to_save=options.get("save"),
            **adapter_targets(model, configuration.target),
        )
    arguments = SFTConfig(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=len(rows),
        learning_rate=1e-5,
        completion_only_loss=True,
        max_length=None,
        bf16=True,
        use_cpu=not CUDA,
        activation_checkpointing=configuration.checkpointing,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = ProbedTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        processing_class=processor,
        peft_config=lora,
        steps=Steps(),
    )
    trainer.model_accepts_loss_kwargs = True
    return trainer


def measure_training(
    trainer: ProbedTrainer, rows: Dataset, note_saved: bool, start: int
) -> dict[str, Any]:
    """Train, and say what memory did and how fast it was."""
    trained = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    result: dict[str, Any] = {
        "with_adapter": allocated() - start,
        "trained": sum(weight.numel() for weight in trained),
        "trained_bytes": sum(weight.numel() * weight.element_size() for weight in trained),
    }
    collate = PreparedOnce(trainer.data_collator, rows)
    trainer.data_collator = collate
    result["batch_shapes"] = collate.shapes()
    result["answer_tokens"] = int((collate.batch["labels"] != -100).sum())
    if note_saved and not trainer.args.activation_checkpointing:
        result["saved"] = saved_by_layers(trainer, collate)
    reset_peak()
    trainer.train()
    steps = trainer.steps
    # the first two steps warm up
    seconds = steps.times[-1] - steps.times[1]
    return result | {
        "peak": steps.highest() - start,
        "reserved": torch.cuda.max_memory_reserved() if CUDA else 0,
        "steps": steps.log,
        "samples_per_second": len(rows) * (len(steps.times) - 2) / seconds,
        "losses": losses_of(trainer.state.log_history),
    }


# ---- all configurations


def line_of(configuration: Configuration, given: argparse.Namespace) -> dict[str, Any]:
    """Measure a configuration; what goes wrong is noted, too."""
    line = asdict(configuration)
    # it only says when it is measured
    del line["part"]
    if CUDA:
        line["device"] = torch.cuda.get_device_name()
        line["capacity"] = torch.cuda.mem_get_info()[1]
        torch.cuda.reset_peak_memory_stats()
    clock = time.perf_counter()
    try:
        scale = "tiny" if given.tiny else "full"
        line |= measure(configuration, scale, given.steps, given.saved)
    except torch.OutOfMemoryError as error:
        line |= {"error": "out of memory", "message": str(error)[:200]}
    except Exception as error:
        line["error"] = f"{type(error).__name__}: {error}"[:500]
        line["trace"] = traceback.format_exc()[-1500:]
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
    line["seconds"] = time.perf_counter() - clock
    return line


def chosen(given: argparse.Namespace) -> list[Configuration]:
    """List the configurations that the options ask for."""
    found = []
    configurations = FIT
    if given.check:
        configurations = CHECK
    if given.new:
        configurations = NEW
    if given.only is not None:
        return [configurations[given.only]]
    for configuration in configurations:
        other_part = given.part not in (None, configuration.part)
        left_out = given.without_checkpointing and configuration.checkpointing
        if not other_part and not left_out:
            found.append(configuration)
    return found


def measure_apart(number: int, configuration: Configuration, given: argparse.Namespace) -> None:
    """Measure a configuration in a process of its own; note it if that ended without a line."""
    log = given.out.with_name(f"{given.out.stem}-{number}.log")
    options = {"only": number, "steps": given.steps}
    command = [sys.executable, __file__, str(given.out), *to_arguments(options)]
    for name in ("new", "check", "tiny"):
        if getattr(given, name):
            command.append(f"--{name}")
    before = len(read_rows(given.out))
    ended = run_for(command, given.each, log)
    if len(read_rows(given.out)) == before:
        why = f"took longer than {given.each} s" if ended.timed_out else f"ended with {ended.code}"
        line = asdict(configuration)
        del line["part"]
        append_row(given.out, line | {"error": f"{why}, see {log.name}"})
    line = read_rows(given.out)[-1]
    print(number, configuration.model, line.get("peak"), line.get("error", ""), flush=True)


def is_measured(configuration: Configuration, out: Path) -> bool:
    """Say whether a line of this configuration is there, and no error in it."""
    wanted = asdict(configuration)
    del wanted["part"]
    for line in read_rows(out):
        if line.items() >= wanted.items() and line.get("error") in (None, "out of memory"):
            return True
    return False


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--part", type=int, default=None)
    parser.add_argument("--check", action="store_true", help="measure CHECK instead of FIT")
    parser.add_argument("--new", action="store_true", help="measure NEW instead of FIT")
    parser.add_argument("--only", type=int, help="number of the one configuration, from 0")
    parser.add_argument(
        "--each", type=float, help="a process for each configuration, with so many seconds"
    )
    parser.add_argument(
        "--saved", action="store_true", help="also note what a layer keeps, instead of the peak"
    )
    parser.add_argument(
        "--without-checkpointing", action="store_true", help="of these only those without"
    )
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument(
        "--seconds", type=int, default=420, help="start no further configuration after this"
    )
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    began = time.perf_counter()
    for number, configuration in enumerate(chosen(given)):
        if time.perf_counter() - began > given.seconds:
            break
        if given.each:
            if not is_measured(configuration, given.out):
                measure_apart(given.only or number, configuration, given)
            continue
        line = line_of(configuration, given)
        append_row(given.out, line)
        print(*line.values(), sep=" | ", flush=True)


if __name__ == "__main__":
    main()
