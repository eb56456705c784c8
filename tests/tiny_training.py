"""Tiny models with adapters, batches for them, and how to compare two trainings."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import (
    AutoConfig,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from medtune import models, plan

TINY = Path(__file__).parents[1] / "data" / "tiny-vlm"
QWEN2 = "Qwen/Qwen2-VL-2B-Instruct"
QWEN25 = "Qwen/Qwen2.5-VL-7B-Instruct"
QWEN3 = "Qwen/Qwen3-VL-2B-Instruct"
EXPERTS = "Qwen/Qwen3-VL-30B-A3B-Instruct"
QWEN35 = "Qwen/Qwen3.5-2B"
GEMMA = "google/gemma-3-4b-pt"
GEMMA4 = "google/gemma-4-E2B-it"


def words_of(settings: dict) -> list[str]:
    """Write settings as the words of a command line."""
    words = []
    for key, value in settings.items():
        words += [f"--{key}", str(value)]
    return words


def twin(name: str, target: str, folder: Path, *, r: int = 8):
    """Build a tiny twin with an adapter that does something; return it and its processor."""
    processor = plan.save_processor(name, folder, scale="tiny")
    model = plan.build_twin(name, processor, scale="tiny", dtype="float32")
    config = LoraConfig(r=r, lora_alpha=8, **models.adapter_targets(model, target))
    model = get_peft_model(model, config)
    torch.manual_seed(0)
    wake_adapter(model)
    return model.train(), processor


def wake_adapter(model) -> None:
    """Draw all that is trained at random: a fresh adapter does nothing, for its B is zero."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)


def noise(height: int, width: int, random: np.random.Generator) -> Image.Image:
    """A picture of random pixels."""
    return Image.fromarray(random.integers(0, 255, (height, width, 3), dtype=np.uint8))


def batch_of(processor, sizes: list[tuple[int, int]]) -> dict:
    """Ask questions of unequal length about pictures of these heights and widths."""
    random = np.random.default_rng(0)
    texts = []
    pictures = []
    for number, (height, width) in enumerate(sizes):
        question = {"type": "text", "text": "What is it? " * (number + 1)}
        turn = {"role": "user", "content": [{"type": "image"}, question]}
        texts.append(processor.apply_chat_template([turn], tokenize=False))
        pictures.append([noise(height, width, random)])
    batch = dict(processor(text=texts, images=pictures, return_tensors="pt", padding=True))
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


def loss_and_gradients(model, batch) -> tuple[float, dict[str, torch.Tensor]]:
    """Compute the loss of a batch, and each gradient by the name of its parameter."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients[name] = parameter.grad.clone()
    return loss.item(), gradients


def same(before, after) -> bool:
    """Say whether the loss and each gradient are the same within 1e-4."""
    old_loss, old_gradients = before
    new_loss, new_gradients = after
    assert old_gradients and old_gradients.keys() == new_gradients.keys()
    for name, old in old_gradients.items():
        assert old.abs().max() > 0, "or the test says nothing"
        if (old - new_gradients[name]).norm() > 1e-4 * old.norm():
            return False
    return new_loss == pytest.approx(old_loss, rel=1e-4)


def make_model(folder: Path, tiny_vlm: Path, *, experts: bool) -> None:
    """Save a twin of the tiny base model with 0.3 million random weights.

    It is dense, or has experts that are not square.
    """
    base = AutoConfig.from_pretrained(tiny_vlm).to_dict()
    text = base["text_config"]
    text.pop("model_type")
    text.update(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2)
    text.update(num_key_value_heads=1, head_dim=32)
    text["rope_parameters"]["mrope_section"] = [6, 5, 5]
    vision = base["vision_config"]
    vision.pop("model_type")
    vision.update(depth=2, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=64)
    vision.update(deepstack_visual_indexes=[1])
    config_class = Qwen3VLConfig
    model_class = Qwen3VLForConditionalGeneration
    if experts:
        text.update(num_experts=4, num_experts_per_tok=2)
        text.update(moe_intermediate_size=48, decoder_sparse_step=1)
        config_class = Qwen3VLMoeConfig
        model_class = Qwen3VLMoeForConditionalGeneration
    ids = {key: value for key, value in base.items() if key.endswith("token_id")}
    config = config_class(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
    torch.manual_seed(0)
    model_class(config).save_pretrained(folder)
    models.load_processor(tiny_vlm).save_pretrained(folder)


def make_record(folder: Path, name: str, words: list[str], *, picture: bytes | None) -> dict:
    """Write a picture, if there is one, and return the record that names it."""
    images = []
    question = [{"type": "text", "text": "What is it?"}]
    if picture is not None:
        Image.frombytes("RGB", (32, 32), picture).save(folder / "images" / f"{name}.png")
        images = [f"images/{name}.png"]
        question.insert(0, {"type": "image"})
    answer = [{"type": "text", "text": " ".join(words) + "."}]
    return {
        "id": name,
        "images": images,
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def make_data(folder: Path, sizes: dict[str, int], *, text_only: tuple[int, ...] = ()) -> None:
    """Write splits with small random pictures and answers of very unequal length.

    Training samples with a number in `text_only` have no picture.
    """
    draw = random.Random(0)
    (folder / "images").mkdir(parents=True)
    for split, number in sizes.items():
        lines = []
        for index in range(number):
            words = draw.choices(["dark", "bright", "liver", "left", "upper"], k=1 + index % 9)
            picture = draw.randbytes(3072)
            if split == "train" and index in text_only:
                picture = None
            record = make_record(folder, f"{split}{index}", words, picture=picture)
            lines.append(json.dumps(record) + "\n")
        (folder / f"{split}.jsonl").write_text("".join(lines))
