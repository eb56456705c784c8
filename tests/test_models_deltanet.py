"""Adapters on Gated DeltaNet layers learn, answer, merge and reload: elsewhere they stay inert.

Qwen3.5 has such layers in the place of three of four attentions. What an adapter on them computes
goes through two pieces of code: whole chunks in training and for the prompt, one token after the
other in an answer.
"""

import peft
import pytest
import torch
from PIL import Image
from tiny_models import tiny_twin

from medtune import models

FAMILIES = ["qwen3.5", "qwen3.5-moe"]
STEPS = 8
NEW_TOKENS = 12


def prompt_of(processor) -> dict:
    """One question about one picture, as the model gets it."""
    content = [{"type": "image"}, {"type": "text", "text": "What is shown?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    picture = Image.effect_mandelbrot((96, 96), (-2, -1.5, 1, 1.5), 30).convert("RGB")
    return processor(text=[text], images=[[picture]], return_tensors="pt")


def adapted_in_delta_layers(base: torch.nn.Module) -> peft.PeftModel:
    """An adapter on the base's Gated DeltaNet layers only."""
    everywhere = models.adapter_targets(base, "attention")["target_modules"]
    (there,) = [part for part in everywhere.split("|model") if "linear_attn" in part]
    there = there if there.startswith("model") else f"model{there}"
    torch.manual_seed(0)
    return peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, target_modules=there))


def learn(model: peft.PeftModel, batch: dict) -> list[float]:
    """Train on what the batch itself says, some steps; return the losses."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    losses = []
    model.train()
    for _ in range(STEPS):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    model.eval()
    return losses


def answer(model, batch: dict, *, use_cache: bool = True) -> list[int]:
    """What the model says, token by token."""
    said = model.generate(
        **batch,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=use_cache,
    )
    return said[0, batch["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("four_bit", [False, True], ids=["lora", "qlora"])
def test_every_adapter_there_gets_a_gradient(family, four_bit):
    config = models.nf4_config("float32") if four_bit else None
    base = models.load_base(tiny_twin(family), quantization_config=config)
    model = adapted_in_delta_layers(base)
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    # of one layer in the twin: queries with keys and values, the gate, two gates of heads, the end
    leaves = {name.split(".linear_attn.")[1].split(".")[0] for name in names}
    assert leaves == {"in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"}
    for name, weight in model.named_parameters():
        # at the start these are zero, and the other matrix of each pair has no gradient
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    batch = prompt_of(models.load_processor(tiny_twin(family)))
    model.train()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    without = []
    for name, weight in model.named_parameters():
        if weight.requires_grad and (weight.grad is None or not weight.grad.abs().max() > 0):
            without.append(name)
    assert not without


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_change_and_stay_changed_when_merged_and_reloaded(family, tmp_path):
    folder = tiny_twin(family)
    processor = models.load_processor(folder)
    batch = prompt_of(processor)
    before = models.load_base(folder)
    said_before = answer(before, batch)

    model = adapted_in_delta_layers(models.load_base(folder))
    losses = learn(model, batch)
    assert losses[-1] < losses[0] - 0.3, losses
    said = answer(model, batch)
    assert said != said_before
    # in whole chunks, from the beginning for each token, as in training
    assert answer(model, batch, use_cache=False) == said
    assert models.compare_logits(model, before, batch)["max_abs_diff"] > 0.1

    model.save_pretrained(tmp_path / "adapter")
    reloaded = models.load_tuned(models.load_base(folder), tmp_path / "adapter")
    assert models.compare_logits(reloaded, model, batch)["max_abs_diff"] == 0
    assert answer(reloaded, batch) == said

    merged = reloaded.merge_and_unload(safe_merge=True)
    models.save_model(merged, processor, tmp_path / "merged", card="c")
    again = models.load_base(tmp_path / "merged")
    assert models.compare_logits(again, model, batch)["max_abs_diff"] < 1e-4
    assert answer(again, batch) == said
