"""Compare two models by their logits, write a model card, and save a model whole or not at all."""

import json
import os
import platform
import re
import shutil
from collections.abc import Mapping, Sequence
from importlib import metadata
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, ProcessorMixin

from medtune.files import one_line

from .load import end_tokens

# Any of these files makes a folder one that `save_model` may replace.
MODEL_FILES = ("config.json", "adapter_config.json")

# Marks of the image tokens in a batch, by family: Qwen-VL's and Gemma's. Text is 0.
IMAGE_MARKS = ("mm_token_type_ids", "token_type_ids")

# Asked in the lines that load a model where nobody says what it was asked in training.
DEFAULT_QUESTION = "Describe this medical image."
# A card lists so many questions; of more it gives the number.
MOST_QUESTIONS = 5

# Keys in the summary of notebook 05, and how a card calls them.
MEASURES = {
    "bleu4_words": "word BLEU-4",
    "bleu4_characters": "character BLEU-4",
    "name_accuracy": "name right",
    "place_accuracy": "place right",
    "finding_accuracy": "finding right",
    "entity_f1": "entity F1",
}
CONDITIONS = {
    "base": "base",
    "tuned": "tuned",
    "wrong picture": "shuffled",
    "most frequent caption": "most_frequent",
}

# The folders of a path that begins at a root, a home, a dot or a drive, up to its last part. An
# address of the web has a colon before its slashes, a fraction a digit.
LOCAL_PATH = re.compile(
    r"(?<![\w:/\\.~])(?:~|\.{1,2}|[A-Za-z]:)?(?:[/\\][^\s/\\\"'`,;|]+)*[/\\](?=[^\s/\\])"
)

LOADING_CODE = """\
from medtune.models import {names}
from PIL import Image

folder = "."  # where this file lies
processor = load_processor(folder)
{load}
question = {question}
{pictures}
content = [{{"type": "image"}} for _ in pictures] + [{{"type": "text", "text": question}}]
messages = [{{"role": "user", "content": content}}]
prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
inputs = processor(text=[prompt], images=[pictures], return_tensors="pt")
tokens = model.generate(
    **inputs.to(model.device, dtype=model.dtype), max_new_tokens=160, do_sample=False
)
answer = tokens[0, inputs["input_ids"].shape[1] :]
print(processor.tokenizer.decode(answer, skip_special_tokens=True))
"""

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
    Tensor : (positions, vocabulary), float32, on the CPU. A model in float32 computes in float32 on
        a GPU, too, where cuDNN's convolutions are in TF32 unless told otherwise.
    """
    is_text = batch["attention_mask"].bool()
    for key in IMAGE_MARKS:
        if key in batch:
            is_text = is_text & (batch[key] == 0)
    inputs = {key: value.to(model.device) for key, value in batch.items() if key != "labels"}
    was_training = model.training
    model.eval()
    # a product stands in for the convolution where `speed_up` was there: in TF32 they differ by 1e-3
    cudnn = torch.backends.cudnn
    with torch.no_grad(), cudnn.flags(enabled=cudnn.enabled, allow_tf32=False):
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


def model_card(  # noqa: PLR0913 - each is a part of the card
    base: str,
    *,
    data: str,
    settings: dict,
    metrics: dict | None = None,
    limits: str | None = None,
    question: str | Sequence[str] | None = None,
    pictures: int = 1,
    kind: Literal["adapter", "merged"] | None = None,
) -> str:
    """Write the text of a model's README.md: base, data, question, how to load it, scores, limits.

    A card goes where the model goes: of a folder on this machine it shows the last part only.

    Parameters
    ----------
    base : hub name or folder of the base model.
    data : what it was trained on, in a sentence or more.
    settings : hyperparameters by name.
    metrics : scores on held-out pairs by name; several columns where the values are mappings, see
        `card_scores`.
    limits : what the model must not be used for; by default a text that holds for every model of
        the course.
    question : what the model was asked in training; several if it was asked several.
    pictures : how many pictures the first question goes with, in the lines that ask the model.
    kind : "adapter", or "merged" for a model with all its weights: the card then shows the lines
        that load and ask it.

    Returns
    -------
    str : Markdown, with the metadata that the hub reads at its head.

    Examples
    --------
    >>> card = model_card("Qwen/Qwen3-VL-2B-Instruct", data="60 X-rays", settings={"lora_r": 8})
    >>> "| lora_r | 8 |" in card
    True
    >>> "base_model: tiny-vlm" in model_card("/home/me/tiny-vlm", data="60 X-rays", settings={})
    True
    """
    base = _shown_name(base)
    questions = _as_list(question)
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
    sections = {"Data": _shown_name(data)}
    if questions:
        sections["Question"] = _list_questions(questions)
    if kind:
        asked = questions[0] if questions else DEFAULT_QUESTION
        sections["Load and ask"] = f"```python\n{_loading_code(base, kind, asked, pictures)}```"
    sections["Settings"] = _table("setting", settings)
    sections["Scores"] = scores
    sections["Limits"] = limits or LIMITS
    sections["Versions"] = _versions()
    return head + "".join(f"\n## {title}\n\n{text}\n" for title, text in sections.items())


def card_scores(summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Pick from the summary of notebook 05 what a card shows, for `model_card(metrics=...)`.

    Parameters
    ----------
    summary : content of `05_evaluate/summary.json`.

    Returns
    -------
    dict : for each measure, in percent, the base, the tuned model, the tuned model with the wrong
        picture, the most frequent caption, and what tuning gained, with its interval if there is
        one. Then what the intervals are about, and the number of pairs.

    Examples
    --------
    >>> found = {"n": 9, "bleu4_words": {"base": 17.7, "tuned": 91.8}}
    >>> card_scores(found)["word BLEU-4"]
    {'base': '17.7', 'tuned': '91.8'}
    """
    gained = summary.get("paired", {}).get("tuned_minus_base", {})
    shown = {}
    for key, measure in MEASURES.items():
        row = {}
        for column, who in CONDITIONS.items():
            value = summary.get(key, {}).get(who)
            if value is not None:
                row[column] = f"{value:.1f}"
        difference = gained.get(measure)
        if row and difference:
            row["tuned less base"] = _with_interval(difference)
        if row:
            shown[measure] = row
    pairs = f"held-out pairs, the scores in percent; {summary.get('intervals') or 'no intervals'}"
    shown[pairs] = {"tuned": summary["n"]}
    return shown


def _with_interval(difference: Mapping[str, Any]) -> str:
    text = f"{difference['difference']:+.1f}"
    if difference.get("low") is None:
        return text
    return f"{text} [{difference['low']:+.1f}, {difference['high']:+.1f}]"


def _as_list(question: str | Sequence[str] | None) -> list[str]:
    """Give the questions, each once."""
    if not question:
        return []
    if isinstance(question, str):
        return [question]
    return list(dict.fromkeys(question))


def _list_questions(questions: list[str]) -> str:
    """Write the questions of a training; of many only the number: they are the data's own."""
    if len(questions) > MOST_QUESTIONS:
        return f"{len(questions)} different questions of the data."
    # as code: a question may hold signs that Markdown reads
    return "\n".join(f"- `{one_line(question, limit=1000)}`" for question in questions)


def _loading_code(base: str, kind: str, question: str, pictures: int) -> str:
    """Write the lines that load a saved model from its folder and ask it."""
    if pictures == 1:
        opened = 'pictures = [Image.open("picture.png").convert("RGB")]  # yours'
    else:
        opened = (
            f"# yours, {pictures} of them in the order of the training\n"
            f'files = [f"picture-{{number}}.png" for number in range(1, {pictures + 1})]\n'
            'pictures = [Image.open(file).convert("RGB") for file in files]'
        )
    if kind == "adapter":
        names = "load_base, load_processor, load_tuned"
        hint = "" if "/" in base else "  # the folder of the base model, on your machine"
        load = f'base = load_base({base!r}, dtype="auto"){hint}\nmodel = load_tuned(base, folder)\n'
    else:
        names = "load_base, load_processor"
        load = 'model = load_base(folder, dtype="auto")\n'
    return LOADING_CODE.format(names=names, load=load, question=repr(question), pictures=opened)


def _versions() -> str:
    """Write one line with the versions of Python and of the packages that are installed."""
    versions = [f"python {platform.python_version()}"]
    for package in ("medtune", "torch", "transformers", "peft", "trl", "datasets", "bitsandbytes"):
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(versions)


def _table(title: str, values: Mapping[str, Any]) -> str:
    """Write a Markdown table, fractions with four digits; mappings make a column for each key."""
    rows = {}
    columns: dict[str, None] = {}
    for key, value in values.items():
        rows[key] = value if isinstance(value, Mapping) else {"": value}
        columns.update(dict.fromkeys(rows[key]))
    lines = [f"| {title} | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for key, row in rows.items():
        cells = [_cell(row.get(column, "")) for column in columns]
        lines.append(f"| {key} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    # a line break or a bar would end the cell
    return _shown_name(str(value)).replace("\n", " ").replace("|", "\\|")


def _shown_name(name: str | PathLike) -> str:
    """Give a name that may leave this machine: of a folder or file here its last part.

    >>> _shown_name("Qwen/Qwen3-VL-2B-Instruct"), _shown_name("../data/tiny-vlm/")
    ('Qwen/Qwen3-VL-2B-Instruct', 'tiny-vlm')
    """
    text = os.fspath(name)
    # a snapshot in the hub's cache is called by a hash; a folder above it says which model it is
    cached = re.search(r"models--([^/\\]+)--([^/\\]+)[/\\]snapshots", text)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    # a hub name and a folder below this one look alike
    is_here = "/" in text and os.path.exists(text)
    if is_here or re.match(r"(~|\.{1,2}|[A-Za-z]:)?[/\\]", text):
        return re.split(r"[/\\]", text.rstrip("/\\"))[-1]
    return _without_folders(text)


def _without_folders(text: str) -> str:
    """Shorten each path in a text that begins at a root, a home or a dot to its last part.

    >>> _without_folders("pairs of /data/ward 7/x, see https://example.org/a/b and 3/4")
    'pairs of ward 7/x, see https://example.org/a/b and 3/4'
    """
    return LOCAL_PATH.sub("", text)


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
        _forget_local_base(partial / "adapter_config.json")
        _note_end_tokens(partial / "generation_config.json", model, processor)
        # over the stub that PEFT writes
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


def _forget_local_base(config: Path) -> None:
    """Take the base's folder out of an adapter's configuration, if it is one of this machine only.

    A name alone would not do: other programs would ask the hub for it. The card has the name.
    """
    if not config.exists():
        return
    settings = json.loads(config.read_text("utf-8"))
    base = settings.get("base_model_name_or_path")
    if base and os.path.isabs(os.path.expanduser(base)):
        settings["base_model_name_or_path"] = None
        config.write_text(json.dumps(settings, indent=2), "utf-8")


def _note_end_tokens(config: Path, model: PreTrainedModel, processor: ProcessorMixin) -> None:
    """Let other programs end an answer, too, where the chat template ends it.

    An adapter has no such file: its base keeps its own.
    """
    if not config.exists():
        return
    settings = json.loads(config.read_text("utf-8"))
    ids = end_tokens(model, processor)
    noted = settings.get("eos_token_id")
    if not set(ids) <= set(noted if isinstance(noted, list) else [noted]):
        settings["eos_token_id"] = ids
        config.write_text(json.dumps(settings, indent=2), "utf-8")


def write_no_stub_cards(trainer: Any) -> None:
    """Keep a trainer from writing README.md files of its own beside the model and its checkpoints.

    TRL writes one into `output_dir`, PEFT one into each checkpoint: they tell nothing of data,
    scores and limits, and name the base by its folder on this machine.

    Parameters
    ----------
    trainer : of TRL or Transformers, before it trains.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> trainer = SimpleNamespace(model=None, create_model_card=print)
    >>> write_no_stub_cards(trainer)
    >>> trainer.create_model_card(model_name="a stub")
    """

    def write_nothing(*_: Any, **__: Any) -> None:
        """Stand in for what writes a stub."""

    if hasattr(trainer, "create_model_card"):
        trainer.create_model_card = write_nothing
    if hasattr(trainer.model, "create_or_update_model_card"):
        trainer.model.create_or_update_model_card = write_nothing
