"""Compare two models by their logits, write a model card, and save a model whole or not at all."""

import os
import shutil
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import torch
from transformers import PreTrainedModel, ProcessorMixin

from medtune.files import one_line

# Any of these files makes a folder one that `save_model` may replace.
MODEL_FILES = ("config.json", "adapter_config.json")

# Marks of the image tokens in a batch, by family: Qwen-VL's and Gemma's. Text is 0.
IMAGE_MARKS = ("mm_token_type_ids", "token_type_ids")

LIMITS = (
    "Made with a tutorial; no medical device, not validated on patients. "
    "An answer that reads well can be wrong. Compare scores only on the same held-out set, "
    "and beside the scores of answers to the wrong picture."
)


def text_logits(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Compute the logits at the tokens of text, leaving out padding and picture.

    Parameters
    ----------
    model : the model; it is left in the mode (training or evaluation) in which it came.
    batch : a batch of the processor, with "attention_mask"; "labels" are not used.

    Returns
    -------
    Tensor : (positions, vocabulary), float32, on the CPU.
    """
    is_text = batch["attention_mask"].bool()
    for key in IMAGE_MARKS:
        if key in batch:
            is_text = is_text & (batch[key] == 0)
    inputs = {key: value.to(model.device) for key, value in batch.items() if key != "labels"}
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(**inputs).logits
    model.train(was_training)
    return logits[is_text.to(model.device)].float().cpu()


def compare_logits(
    first: PreTrainedModel | torch.Tensor,
    second: PreTrainedModel | torch.Tensor,
    batch: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, float]:
    """Compare two models by their `text_logits` for one batch.

    Parameters
    ----------
    first, second : models; of a model that is no longer in memory, give the logits that were noted.
    batch : a batch of the processor; not needed where both are logits.

    Returns
    -------
    dict : "max_abs_diff" and "mean_abs_diff", "largest_logit" to judge them by, and
        "argmax_agreement", the share (0..1) of "positions" where both find the same next token most
        likely.

    Examples
    --------
    >>> result = compare_logits(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.5, 3.0]]))
    >>> result["max_abs_diff"], result["argmax_agreement"], result["positions"]
    (0.5, 1.0, 1)
    """
    first = first if isinstance(first, torch.Tensor) else text_logits(first, batch)
    second = second if isinstance(second, torch.Tensor) else text_logits(second, batch)
    difference = (first - second).abs()
    agreement = (first.argmax(-1) == second.argmax(-1)).float()
    return {
        "max_abs_diff": difference.max().item(),
        "mean_abs_diff": difference.mean().item(),
        "largest_logit": first.abs().max().item(),
        "argmax_agreement": agreement.mean().item(),
        "positions": len(difference),
    }


def model_card(
    base: str,
    *,
    data: str,
    settings: dict,
    metrics: dict | None = None,
    limits: str | None = None,
) -> str:
    """Write the text of a model's README.md: base, data, settings, scores if there are any, limits.

    Parameters
    ----------
    base : hub name or folder of the base model.
    data : what it was trained on, in a sentence or more.
    settings : hyperparameters by name.
    metrics : scores on held-out pairs by name.
    limits : what the model must not be used for; by default a text that holds for every model of
        the course.

    Returns
    -------
    str : Markdown, with the metadata that the hub reads at its head.

    Examples
    --------
    >>> card = model_card("Qwen/Qwen3-VL-2B-Instruct", data="60 X-rays", settings={"lora_r": 8})
    >>> "| lora_r | 8 |" in card
    True
    """
    if metrics:
        scores = _table("score on held-out pairs", metrics)
    else:
        scores = "None were recorded when this was saved."
    head = (
        f"---\nbase_model: {base}\npipeline_tag: image-text-to-text\n"
        "tags: [medical, medtune]\n---\n"
        f"# Fine-tuned from {base}\n\n"
        "Made with medtune. The licences of the base model and of the data apply.\n"
    )
    sections = {
        "Data": data,
        "Settings": _table("setting", settings),
        "Scores": scores,
        "Limits": limits or LIMITS,
    }
    return head + "".join(f"\n## {title}\n\n{text}\n" for title, text in sections.items())


def _table(title: str, values: dict) -> str:
    """Write a Markdown table of two columns, fractions with four digits."""
    lines = [f"| {title} | |", "|---|---|"]
    for key, value in values.items():
        shown = f"{value:.4g}" if isinstance(value, float) else value
        lines.append(f"| {key} | {shown} |")
    return "\n".join(lines)


def save_model(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    out: str | PathLike,
    *,
    card: str,
    max_shard_size: str = "2GB",
) -> list[str]:
    """Save a model or adapter with its processor, chat template and card: all of it or nothing.

    Parameters
    ----------
    model : a plain model, or one with an adapter; then the adapter is saved.
    processor : its processor.
    out : folder; a model already there is replaced once the new one is complete.
    card : text of README.md, see `model_card`.
    max_shard_size : a larger model is written in several files.

    Returns
    -------
    list of str : names of the files written.

    Raises
    ------
    ValueError : `out` holds something else than a model.
    OSError : the disk is full or cannot be written.
    """
    out = Path(out)
    if out.exists() and not any((out / file).exists() for file in MODEL_FILES):
        raise ValueError(f"{out} exists and is no model folder: choose another folder.")
    # hidden folders beside the wanted one are on the same disk, so a rename puts them in its place
    partial = out.with_name(f".{out.name}.partial")
    replaced = out.with_name(f".{out.name}.old")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        model.save_pretrained(partial, max_shard_size=max_shard_size)
        processor.save_pretrained(partial)
        (partial / "README.md").write_text(card, encoding="utf-8")

        shutil.rmtree(replaced, ignore_errors=True)
        if out.exists():
            os.replace(out, replaced)
        os.replace(partial, out)
    # every kind of error: safetensors reports a full disk with a class of its own
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"Could not save {out}, nothing was written (disk full?): {one_line(error)}"
        ) from error
    shutil.rmtree(replaced, ignore_errors=True)
    return sorted(file.name for file in out.iterdir())
