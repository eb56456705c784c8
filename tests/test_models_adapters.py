"""An adapter reaches the layers of the parts that are asked for, in every family, and no others."""

import re

import peft
import pytest
import torch
from tiny_models import EXPERTS, FAMILIES, QWEN3_VISION, TEXT, family, tiny_folder, tiny_twin
from transformers import AutoModelForImageTextToText, Qwen3_5MoeConfig

from medtune import models


def without_storage(name: str) -> torch.nn.Module:
    """A model of one family that has names and shapes only."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(family(name))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "which", ["language", "attention", "language+merger", "all-linear", "llamafactory-all"]
)
def test_targets_name_exactly_the_layers_of_their_parts(name, which):
    """Oracle: peft itself, which builds an adapter on each layer that the pattern names."""
    base = without_storage(name)
    targets = models.adapter_targets(base, which)
    wanted = set()
    for word in which.split("+"):
        wanted |= models.TARGETS[word]

    expected = set()
    matched = set()
    for key, module in base.named_modules():
        is_linear = isinstance(module, torch.nn.Linear)
        if is_linear and models.part_of(key) in wanted and "vision_tower.head" not in key:
            expected.add(key)
        if re.fullmatch(targets["target_modules"], key):
            matched.add(key)
    assert matched == expected

    counts = models.count_parameters(peft.get_peft_model(base, peft.LoraConfig(r=2, **targets)))
    trained = {part for part, count in counts.items() if count["trained"]} - {"total"}
    # only new families have projections for each layer's own inputs
    absent = wanted - set(models.count_parameters(base))
    absent.add("experts")  # bare parameters, which only their own word reaches
    if name == "gemma-3" and which == "all-linear":
        absent.add("merger")  # there it is no Linear layer
    assert trained == wanted - absent
    assert counts["total"]["trained"] == sum(counts[part]["trained"] for part in trained)


def test_peft_agrees_on_all_linear():
    """peft's own `all-linear` finds the same layers."""

    def adapted(base, targets):
        model = peft.get_peft_model(base, peft.LoraConfig(r=2, **targets))
        return {name for name, _ in model.named_parameters() if "lora_" in name}

    base = without_storage("qwen3-vl")
    ours = adapted(base, models.adapter_targets(base, "all-linear"))
    assert ours == adapted(without_storage("qwen3-vl"), {"target_modules": "all-linear"})


def test_fused_experts_beside_a_shared_one_are_reached():
    """Qwen3.5: the shared expert has Linear layers, the others are bare parameters."""
    attention = {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
    attention |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    text = TEXT | EXPERTS | attention | {"shared_expert_intermediate_size": 24}
    text |= {"layer_types": ["linear_attention", "full_attention"]}
    vision = {key: value for key, value in QWEN3_VISION.items() if "deepstack" not in key}
    with torch.device("meta"):
        base = AutoModelForImageTextToText.from_config(
            Qwen3_5MoeConfig(text_config=text, vision_config=vision)
        )
    targets = models.adapter_targets(base, "experts")
    assert targets["target_parameters"] == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    # peft's word reaches the shared expert, which has Linear layers, and leaves the others alone
    everywhere = models.adapter_targets(base, "all-linear")
    assert "shared_expert" in everywhere["target_modules"]
    assert "target_parameters" not in everywhere
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, **targets))
    adapted = {name for name, _ in model.named_parameters() if "lora_A" in name}
    assert len([name for name in adapted if ".shared_expert." in name]) == 2 * 3
    assert len([name for name in adapted if ".experts." in name]) == 2 * 2


def test_unknown_and_absent_targets_are_refused():
    base = models.load_base(tiny_folder())
    with pytest.raises(ValueError, match="Unknown adapter target 'everything'"):
        models.adapter_targets(base, "everything")
    with pytest.raises(ValueError, match="no layers for the adapter target 'experts'"):
        models.adapter_targets(base, "language+experts")


def test_single_layers_can_be_named_as_targets():
    base = models.load_base(tiny_twin("qwen3-vl"))
    pattern = models.adapter_targets(base, "q_proj+gate_proj")["target_modules"]
    layers = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    assert [layer for layer in layers if layer in pattern] == ["q_proj", "gate_proj"]
    with pytest.raises(ValueError, match="'x_proj'"):
        models.adapter_targets(base, "x_proj")


def test_learning_rates_by_part_reach_the_right_weights():
    base = models.load_base(tiny_twin("qwen3-vl"))
    targets = models.adapter_targets(base, "all-linear")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, **targets))
    groups = models.parameter_groups(model, 1e-4, {"vision": 1e-5, "merger": 2e-5})
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {}
    for group in groups:
        for parameter in group["params"]:
            rates[models.part_of(names[id(parameter)])] = group["lr"]
    assert rates == {
        "vision": 1e-5,
        "merger": 2e-5,
        "language attention": 1e-4,
        "language MLP": 1e-4,
    }
    trained = sum(parameter.requires_grad for parameter in model.parameters())
    assert sum(len(group["params"]) for group in groups) == trained
    with pytest.raises(ValueError, match="'head', but nothing is trained there"):
        models.parameter_groups(model, 1e-4, {"head": 1.0})


def test_four_bit_weights_are_counted_at_their_true_number():
    def numbers(base):
        counts = models.count_parameters(base)
        return {part: count["trained"] + count["frozen"] for part, count in counts.items()}

    full = models.load_base(tiny_folder())
    packed = models.load_base(tiny_folder(), quantization_config=models.nf4_config())
    assert numbers(full) == numbers(packed)
