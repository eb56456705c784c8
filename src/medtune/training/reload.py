"""Is the adapter on disk the model in memory? A check for after training, before the model goes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from medtune.models import compare_logits, load_base, load_tuned, text_logits

from .words import STRESSED


def check_reload(
    base: str | os.PathLike,
    adapter: str | os.PathLike,
    model: Any,
    batch: Mapping[str, torch.Tensor],
    *,
    tolerance: float = 1e-5,
) -> dict[str, float]:
    """Check that the adapter on disk, put onto a fresh base model, gives the logits of the model.

    Parameters
    ----------
    base : folder or hub name of the base model; it is loaded in the dtype and quantisation of
        `model`.
    adapter : folder of the saved adapter.
    model : the model in memory, with its adapter. For the time of the check it moves to the CPU,
        unless it is quantised.
    batch : tensors by name, of a few samples.
    tolerance : allowed difference, relative to the largest logit.

    Returns
    -------
    dict : see `medtune.models.compare_logits`.

    Raises
    ------
    ValueError : the logits differ, or the adapter does not fit the base (missing or unexpected
        keys).
    """
    # marks for the loss, which a fresh model does not know
    batch = {key: value for key, value in batch.items() if key != STRESSED}
    quantization = getattr(model.config, "quantization_config", None)
    home = model.device
    noted = text_logits(model, batch)
    # a card that trains the model may have no room for another
    model.to(home if quantization else "cpu")
    fresh = load_base(
        base,
        dtype=model.config.dtype,
        device_map={"": home},
        quantization_config=quantization,
    )
    fresh = load_tuned(fresh, adapter)
    # TRL trains QLoRA's adapters in bfloat16, peft loads them as float32
    for ours, theirs in zip(fresh.parameters(), model.parameters(), strict=True):
        ours.data = ours.data.to(theirs.dtype)
    result = compare_logits(noted, fresh, batch)
    # the fresh model must go before the other one comes back
    del fresh
    model.to(home)
    allowed = tolerance * max(result["largest_logit"], 1.0)
    # written so that a difference that is NaN is an error, too
    if not result["max_abs_diff"] <= allowed:
        raise ValueError(
            f"The adapter in {adapter} does not give back the model in memory: "
            f"logits differ by up to {result['max_abs_diff']:.3g}. "
            "Was it saved after the last step, from the same base?"
        )
    return result
