"""Count on a model itself, on the device "meta", where it has shapes and no storage.

`python -m medtune.plan.counting` writes the table that `counts.py` reads.
"""

import warnings
from functools import cache
from typing import Any

import peft
import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert

from medtune.files import write_json
from medtune.models import TARGETS, adapter_targets, part_of

from .counts import TABLE, Adapter
from .shapes import FACTS
from .twins import head_of_its_own, twin_config


def _build(name: str, dtype: str = "bfloat16") -> PreTrainedModel:
    """Build a model of the published shape without storage."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(
            twin_config(name), dtype=getattr(torch, dtype)
        )


@cache
def count_adapter(name: str, dtype: str, adapter: Adapter) -> dict[str, Any]:
    """Count what an adapter trains: "parameters", their "bytes", and the "parts" that they are in.

    Parameters
    ----------
    name : full hub name of `medtune.plan.model_names`.
    dtype : of the base model's weights.
    adapter : what is added.

    Raises
    ------
    ValueError : the adapter's target is unknown, or reaches nothing in this model.
    """
    model = _build(name, dtype)
    # what peft warns of (tied weights) matters only when something is saved
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        options = peft.LoraConfig(
            r=adapter.rank,
            modules_to_save=list(adapter.modules_to_save) or None,
            **adapter_targets(model, adapter.target),
        )
        model = peft.get_peft_model(model, options)
    parameters = 0
    size = 0
    parts = set()
    for full_name, weight in model.named_parameters():
        if weight.requires_grad:
            parameters += weight.numel()
            size += weight.numel() * weight.element_size()
            parts.add(part_of(full_name))
    return {"parameters": parameters, "bytes": size, "parts": sorted(parts)}


def build_counts(name: str) -> dict[str, Any]:
    """Count a model for the table.

    Parameters
    ----------
    name : full hub name of `medtune.plan.model_names`.

    Returns
    -------
    dict : "weights" and how many of them bitsandbytes packs into 4 bits ("packed"), the "parts" of
        the model, and for each word of `medtune.models.TARGETS` that reaches something ("targets")
        what an adapter of rank 1 trains ("per_rank") and in which "parts".
    """
    model = _build(name)
    # bitsandbytes leaves the head as it is
    with head_of_its_own(model):
        left_whole = get_keys_to_not_convert(model)
    packed = 0
    for module_name, module in model.named_modules():
        if type(module) is torch.nn.Linear and module_name not in left_whole:
            packed += module.weight.numel()
    targets = {}
    for word in TARGETS:
        try:
            # the matrices of an adapter grow with its rank, and nothing else does
            found = count_adapter(name, "bfloat16", Adapter(word, 1, ()))
        except ValueError:
            continue
        targets[word] = {"per_rank": found["parameters"], "parts": found["parts"]}
    return {
        "weights": sum(weight.numel() for weight in model.parameters()),
        "packed": packed,
        "parts": sorted({part_of(full_name) for full_name, _ in model.named_parameters()}),
        "targets": targets,
    }


if __name__ == "__main__":
    write_json(TABLE, {name: build_counts(name) for name in FACTS["models"]})
