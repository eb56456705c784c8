"""A model made fast computes the same, losses and gradients, and says where it cannot be helped."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from tiny_training import (
    EXPERTS,
    GEMMA,
    GEMMA4,
    QWEN2,
    QWEN3,
    QWEN25,
    QWEN35,
    TINY,
    batch_of,
    loss_and_gradients,
    noise,
    same,
    twin,
)
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from trl.trainer.utils import add_fused_lm_head

from medtune import models, plan, training


def watch_attention(monkeypatch, see) -> None:
    """Call `see` with the arguments of every attention call, before it computes."""
    own = torch.nn.functional.scaled_dot_product_attention

    def attend(*args, **kwargs):
        see(*args, **kwargs)
        return own(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)


# ---- attention


@pytest.mark.parametrize(
    "name, sizes, calls",
    [
        (QWEN3, [(64, 64)] * 3, 2),  # one for each of two layers
        (QWEN3, [(64, 64), (64, 256)], 4),  # one a picture and layer: sizes differ
        (QWEN2, [(56, 84)] * 3, 2),
        (QWEN35, [(64, 64)] * 3, 2),
        (QWEN25, [(56, 56)] * 2, 3),  # its first layer has windows, which are left alone
        (QWEN25, [(56, 56), (56, 140)], None),
    ],
)
def test_pictures_in_one_attention_call(tmp_path, monkeypatch, name, sizes, calls):
    model, processor = twin(name, "all-linear", tmp_path)
    batch = batch_of(processor, sizes)
    all_equal = len(batch["image_grid_thw"].unique(dim=0)) == 1
    assert all_equal == (len(set(sizes)) == 1)
    before = loss_and_gradients(model, batch)
    seen = []
    watch_attention(monkeypatch, lambda query, *args, **kwargs: seen.append(query.shape))
    changed = training.speed_up(model, experts=False)
    layers = 1 if name == QWEN25 else 2
    assert changed == {"attention": layers, "experts": 0, "compiled": 0}
    core = model.get_base_model().model
    with torch.no_grad():
        core.get_image_features(batch["pixel_values"], batch["image_grid_thw"])
    assert calls is None or len(seen) == calls, seen
    assert same(before, loss_and_gradients(model, batch))


def samples_with_one_or_two_pictures(processor) -> dict:
    """Four samples with a text before, and with one or two equal pictures."""
    random = np.random.default_rng(0)
    texts = []
    pictures = []
    for number in range(4):
        asked = [{"type": "image"}, {"type": "text", "text": "What is it? " * (number + 1)}]
        count = 1 + number % 2
        content = [{"type": "text", "text": "So " * number}, *(asked * count)]
        turn = {"role": "user", "content": content}
        texts.append(processor.apply_chat_template([turn], tokenize=False))
        pictures.append([noise(56, 112, random) for _ in range(count)])
    batch = processor(text=texts, images=pictures, return_tensors="pt", padding=True)
    names = ("input_ids", "image_grid_thw", "attention_mask", "mm_token_type_ids")
    return {name: batch[name] for name in names}


@pytest.mark.parametrize("name", [QWEN3, QWEN2, QWEN25, QWEN35])
@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_counted_at_once(tmp_path, monkeypatch, name, side):
    """One or two pictures a sample, padding on either side; others go the model's own way."""
    model, processor = twin(name, "language", tmp_path)
    core = model.get_base_model().model
    processor.tokenizer.padding_side = side
    batch = samples_with_one_or_two_pictures(processor)
    own = core.get_rope_index
    calls = []

    def watched(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    monkeypatch.setattr(core, "get_rope_index", watched)
    training.speed_up(model)
    positions, deltas = own(**batch)
    found_positions, found_deltas = core.get_rope_index(**batch)
    assert not calls
    assert torch.equal(positions, found_positions)
    assert torch.equal(deltas, found_deltas)
    # turned by a quarter, the first picture is not like the others
    batch["image_grid_thw"] = batch["image_grid_thw"].clone()
    batch["image_grid_thw"][0] = batch["image_grid_thw"][0][[0, 2, 1]]
    assert torch.equal(own(**batch)[0], core.get_rope_index(**batch)[0])
    assert calls


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_the_right_needs_no_mask(tmp_path, monkeypatch, side):
    model, processor = twin(QWEN3, "language", tmp_path)
    processor.tokenizer.padding_side = side
    batch = batch_of(processor, [(64, 64)] * 3)
    assert (batch["attention_mask"] == 0).any()
    before = loss_and_gradients(model, batch)
    seen = []

    def see(*args, attn_mask=None, is_causal=False, **kwargs):
        seen.append((attn_mask is not None, is_causal))

    watch_attention(monkeypatch, see)
    training.speed_up(model)
    assert same(before, loss_and_gradients(model, batch))
    has_mask_and_is_causal = (False, True) if side == "right" else (True, False)
    # the vision tower comes first, the two layers of the language model last
    assert seen[-2:] == [has_mask_and_is_causal] * 2, seen


def test_a_layer_that_holds_a_state_is_not_disturbed_by_padding(tmp_path):
    """Qwen3.5: what stands behind the text cannot change the state that the text has made."""
    model, processor = twin(QWEN35, "language", tmp_path)
    processor.tokenizer.padding_side = "right"
    batch = batch_of(processor, [(64, 64)] * 3)
    assert (batch["attention_mask"] == 0).any()
    before = loss_and_gradients(model, batch)
    training.speed_up(model)
    assert same(before, loss_and_gradients(model, batch))


# ---- the whole model


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_positions_without_a_label_are_not_scored(tmp_path, share):
    """As TRL's head does on a GPU; with no label at all, too."""
    processor = plan.save_processor(QWEN3, tmp_path, scale="tiny")
    model = plan.build_twin(QWEN3, processor, scale="tiny", dtype="float32").train()
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    batch = batch_of(processor, [(64, 64)] * 3) | {"fused_lm_head": True}
    width = batch["labels"].shape[1]
    batch["labels"][:, : int(share * width)] = -100
    scored = (batch["labels"][:, 1:] != -100).sum().item()
    before = model(**batch)
    gradients = loss_and_gradients(model, batch)
    training.speed_up(model)
    after = model(**batch)
    assert before.label_mask.sum() == scored < before.log_probs.numel()
    assert after.label_mask.sum() == scored == after.log_probs.numel()
    assert after.is_top1.sum() == before.is_top1.sum()
    assert after.entropy.sum().item() == pytest.approx(before.entropy.sum().item(), rel=1e-5)
    if scored:
        assert same(gradients, loss_and_gradients(model, batch))
    assert model.eval()(**batch).log_probs.shape == before.log_probs.shape


def test_modes_and_counts_are_as_before(tmp_path):
    """The walks over all modules that are spared leave the same state."""
    model, _ = twin(QWEN3, "language", tmp_path)
    base = model.get_base_model()
    count = base.num_parameters(exclude_embeddings=True)
    # so a base comes from `from_pretrained`, under a wrapper that says it is training
    base.eval()
    model.training = True
    training.speed_up(model)
    for mode in (True, False, True, True, False):
        assert model.train(mode) is model
        assert {module.training for module in model.modules()} == {mode}
    assert base.num_parameters(exclude_embeddings=True) == count > 0


@pytest.mark.parametrize("name", [GEMMA, GEMMA4])
def test_models_without_such_layers_stay_as_they_are(tmp_path, name):
    model, processor = twin(name, "language", tmp_path)
    batch = batch_of(processor, [(64, 64)] * 2)
    before = loss_and_gradients(model, batch)
    assert training.speed_up(model) == {"attention": 0, "experts": 0, "compiled": 0}
    assert same(before, loss_and_gradients(model, batch))


# ---- experts


@pytest.mark.parametrize("target", ["experts", "attention+experts"])
def test_adapters_of_experts_as_thin_products(tmp_path, target):
    model, processor = twin(EXPERTS, target, tmp_path)
    batch = batch_of(processor, [(64, 64)] * 3)
    before = loss_and_gradients(model, batch)
    with torch.no_grad(), model.disable_adapter():
        base = model(**batch).loss.item()
    changed = training.speed_up(model, attention=False)
    assert changed == {"attention": 0, "experts": 2, "compiled": 0}
    assert same(before, loss_and_gradients(model, batch))
    assert before[0] != pytest.approx(base, rel=1e-4), "or the test says nothing"
    with torch.no_grad(), model.disable_adapter():
        assert model(**batch).loss.item() == pytest.approx(base, rel=1e-6)
    model.merge_adapter()
    assert model(**batch).loss.item() == pytest.approx(before[0], rel=1e-4)


def test_ranks_that_the_kernels_cannot_take_are_left_to_peft(tmp_path):
    model, processor = twin(EXPERTS, "experts", tmp_path, r=4)
    assert training.speed_up(model)["experts"] == 0
    model(**batch_of(processor, [(64, 64)])).loss.backward()


def test_no_full_size_change_of_experts_is_made(tmp_path, monkeypatch):
    model, processor = twin(EXPERTS, "experts", tmp_path)
    training.speed_up(model)
    monkeypatch.delattr(ParamWrapper, "_activate_lora")
    model(**batch_of(processor, [(64, 64)])).loss.backward()


# ---- compiled layers; the backend "eager" traces, and leaves out the minutes of compiling


def layers_of(core) -> list[torch.nn.Module]:
    """The vision blocks and decoder layers of a Qwen-VL."""
    return [*core.visual.blocks, *core.language_model.layers]


def test_a_block_with_pictures_in_one_call_is_one_graph(tmp_path):
    """Else compiling it would be of little use."""
    model, processor = twin(QWEN3, "all-linear", tmp_path)
    batch = batch_of(processor, [(64, 64)] * 2)
    before = loss_and_gradients(model, batch)
    changed = training.speed_up(model, compiled=True)
    assert changed["compiled"] == 4, "two blocks and two decoder layers"
    for layer in layers_of(model.get_base_model().model):
        layer.compile(backend="eager", fullgraph=True)
    assert same(before, loss_and_gradients(model, batch))


def test_layers_of_a_class_are_compiled_once_not_each():
    """Else the limit of recompilations is reached, and what comes later stays uncompiled."""
    processor = models.load_processor(TINY)
    base = models.load_base(TINY).train()
    training.speed_up(base)
    layers = layers_of(base.model)
    for layer in layers:
        layer.compile(backend="eager", fullgraph=True)
    torch._dynamo.reset()
    counters.clear()
    base(**batch_of(processor, [(64, 64)] * 2), use_cache=False).loss.backward()
    assert len(layers) == 13
    assert counters["stats"]["unique_graphs"] <= 4


@pytest.mark.parametrize(
    "target, checkpointing",
    [("attention+experts", False), ("attention+experts", True), ("attention", True)],
)
def test_layers_with_experts_are_compiled_in_parts(tmp_path, monkeypatch, target, checkpointing):
    """Their products are not traced, and checkpointing leaves a layer with them uncompiled."""
    own = torch.nn.Module.compile
    compiled = []

    def compile_eagerly(module):
        compiled.append(type(module).__name__)
        return own(module, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    model, processor = twin(EXPERTS, target, tmp_path)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    batch = batch_of(processor, [(64, 64)] * 2) | {"use_cache": False}
    before = loss_and_gradients(model, batch)
    torch._dynamo.reset()
    counters.clear()
    assert training.speed_up(model, compiled=True)["compiled"] == 4
    assert same(before, loss_and_gradients(model, batch))
    assert {"Qwen3VLMoeTextAttention", "Qwen3VLMoeTextRMSNorm"} < set(compiled)
    # without thin products the block of experts is left alone
    assert ("Qwen3VLMoeTextSparseMoeBlock" in compiled) == ("experts" in target)
    stats = counters["stats"]
    assert stats["unique_graphs"] >= 3 and stats["calls_captured"] > 60, stats


# ---- what the default precision of adapters rests on


class WatchProducts(TorchDispatchMode):
    """Notes the precision of what is multiplied."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "mm" in func.name():
            self.seen.update(value.dtype for value in args if isinstance(value, torch.Tensor))
        return func(*args, **(kwargs or {}))


def test_adapters_in_float32_are_multiplied_in_bfloat16_under_autocast():
    """With `bf16`, their precision decides what the optimizer sees, not how fast products are."""
    base = torch.nn.Sequential(torch.nn.Linear(8, 8)).to(torch.bfloat16)
    model = get_peft_model(base, LoraConfig(target_modules=["0"], r=2))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    with WatchProducts() as products:
        with torch.autocast("cpu", torch.bfloat16):
            model(x).sum().backward()
        assert products.seen == {torch.bfloat16}
        model(x).sum().backward()
        # without autocast they are multiplied in float32
        assert products.seen == {torch.bfloat16, torch.float32}
