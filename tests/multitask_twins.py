"""Tiny twins of four model families with the two heads, and records to train them with."""

import functools

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from PIL import Image
from transformers import TrainingArguments

from medtune import models, multitask, plan

FAMILIES = {
    "qwen2-vl": "Qwen/Qwen2-VL-2B-Instruct",
    "qwen3-vl": "Qwen/Qwen3-VL-2B-Instruct",
    "qwen3-vl-moe": "Qwen/Qwen3-VL-30B-A3B-Instruct",
    "gemma-3": "google/gemma-3-4b-pt",
}
ORGANS = ("liver", "spleen", "heart", "stomach")
SIZES = ((64, 64), (96, 64), (64, 128), (128, 96))


def twins_below(tmp_path_factory):
    """Return a function that gives the folder of a family's twin; each is made once."""

    @functools.cache
    def twin(family):
        folder = tmp_path_factory.mktemp("twins") / family
        return plan.make_twin(FAMILIES[family], folder, scale="tiny", dtype="float32")

    return twin


def tuned(folder, *, quantised=False, dtype="float32", seed=0, **settings):
    """Return the processor, and a model with heads whose adapter already does something."""
    torch.manual_seed(seed)
    config = models.nf4_config("float32") if quantised else None
    base = models.load_base(folder, dtype=dtype, quantization_config=config)
    if quantised:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    targets = models.adapter_targets(base, "language")
    base = get_peft_model(base, LoraConfig(r=4, **targets))
    model = multitask.MultiTaskModel(base, **settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return models.load_processor(folder), model


def trainer_of(folder, out, rows, *, steps=3, batch=2, quantised=False, dtype="float32", **options):
    """Make a trainer for a twin on a CPU; `options` are training arguments."""
    processor, model = tuned(folder, quantised=quantised, dtype=dtype)
    arguments = {
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "seed": 0,
        "disable_tqdm": True,
    }
    args = TrainingArguments(str(out), **(arguments | options))
    return multitask.MultiTaskTrainer(
        model, args, train_dataset=rows, eval_dataset=rows, processing_class=processor
    )


def record(number, *, organ=None, finding=None, size=(64, 64), roi=(0.1, 0.2, 0.5, 0.6), **more):
    """Make a record about one of four organs; its picture is noise."""
    organ = organ or ORGANS[number % 4]
    if finding:
        answer = f"The {organ} shows {finding}."
    else:
        answer = f"The {organ} is normal. No cyst is seen within it."
    completion = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    return {
        "id": f"r{number}",
        "images": [Image.effect_noise(size, 60).convert("RGB")],
        "roi": None if roi is None else list(roi),
        "structure": organ,
        "prompt": multitask.ask(f"Where is the {organ}?"),
        "completion": [completion],
        **more,
    }


def make_records():
    """Make eight records with pictures of four shapes."""
    records = []
    for number in range(8):
        box = (0.1 * (number % 4), 0.2, 0.5, 0.6)
        records.append(record(number, size=SIZES[number % 4], roi=box))
    return records


def answer_of(row):
    """Return the answer of a record."""
    return row["completion"][0]["content"][0]["text"]


def decode(processor, batch, row, kind):
    """Return the text of the tokens of one kind in one row of a batch."""
    of_kind = batch["token_kinds"][row] == kind
    return processor.tokenizer.decode(batch["input_ids"][row][of_kind])
