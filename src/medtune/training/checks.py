"""Is it really training? Checks for the first minute, before the hours.

Needs torch; the model, the processor and the trainer come from whoever calls. This file stands
alone and can be copied into another project.

Every check returns a small dict to look at, and raises `ValueError` with one line when something
is wrong. The batch is always one from the trainer's own collator, as
`batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])` gives it.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# The label of a token that has no part in the loss: PyTorch's cross entropy leaves it out.
NOT_COUNTED = -100

# Words in the name of a parameter and the part of a vision-language model that they tell of; the
# first that fits decides, for a merger's parameters often stand inside the vision tower.
WORDS_OF_PARTS = {
    "merger": "merger",
    "projector": "merger",
    "embed_vision": "merger",
    "visual": "vision",
    "vision": "vision",
    "experts": "experts",
}


# ---- what the loss covers


def answer_end(processor: Any) -> str:
    r"""Return what the chat template puts after an answer, such as `"<|im_end|>\n"`.

    Examples
    --------
    >>> class Processor:
    ...     def apply_chat_template(self, turns, tokenize):
    ...         return "".join(f"<{turn['content'][0]['text']}>" for turn in turns)
    >>> answer_end(Processor())
    '>'
    """
    dialogue = [_turn("user", "?"), _turn("assistant", "ANSWER")]
    text = processor.apply_chat_template(dialogue, tokenize=False)
    return text.rpartition("ANSWER")[2]


def _turn(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _learned_text(processor: Any, answer: str) -> str:
    """Return what the chat template makes of an answer: the text behind the rendered prompt.

    That is rarely the answer as it is: Gemma's template trims it, and SmolVLM's puts a blank before
    it.
    """
    question = _turn("user", "?")
    prompt = processor.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
    dialogue = [question, _turn("assistant", answer)]
    whole = processor.apply_chat_template(dialogue, tokenize=False)
    shared = os.path.commonprefix([prompt, whole])
    return whole[len(shared) :]


def check_labels(batch: Mapping[str, Any], processor: Any, answers: list[str]) -> dict[str, Any]:
    """Check that the loss covers exactly the answers: no prompt, no image token, but the end token.

    The answers are compared as the chat template renders them, for it may trim them.

    Parameters
    ----------
    batch : `input_ids`, `attention_mask` and `labels`, each of shape (rows, tokens); labels that do
        not count are -100.
    processor : of the model, with its `tokenizer` and a chat template.
    answers : the reference answer of each row.

    Returns
    -------
    dict : the number of "rows", the "answer_tokens" and "prompt_tokens" of each row, and the
        decoded labels of the "first".

    Raises
    ------
    ValueError : names the first row whose labels are not the answer, the end token and what the
        template puts after it; or says that labels are shifted, or on image tokens.

    Examples
    --------
    >>> class Letters:  # a processor that is its own tokenizer: every letter is a token
    ...     image_token_id = 0
    ...     def __call__(self, text, add_special_tokens):
    ...         return {"input_ids": [ord(letter) for letter in text]}
    ...     def decode(self, ids):
    ...         return "".join(chr(number) for number in ids)
    ...     def apply_chat_template(self, turns, tokenize, add_generation_prompt=False):
    ...         return "".join(turn["content"][0]["text"] + "." for turn in turns)
    >>> processor = Letters()
    >>> processor.tokenizer = processor
    >>> ids = torch.tensor([[ord(letter) for letter in "What?CT."]])
    >>> labels = ids.clone()
    >>> labels[:, :5] = -100
    >>> batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    >>> check_labels(batch, processor, ["CT"])
    {'rows': 1, 'first': 'CT.', 'answer_tokens': [3], 'prompt_tokens': [5]}
    >>> check_labels(batch, processor, ["X-ray"])
    Traceback (most recent call last):
    ValueError: Row 0: the labels are not the answer and its end '.'; from character 0 on they read
    'CT.' instead of 'X-ray.'.
    """
    labels = batch["labels"]
    ids = batch["input_ids"]
    if len(answers) != len(labels):
        raise ValueError(
            f"{len(labels)} rows in the batch, but {len(answers)} answers to compare them with."
        )
    counted = labels != NOT_COUNTED
    if bool((labels[counted] != ids[counted]).any()):
        raise ValueError(
            "Some labels are not the tokens of the input: the model would learn a shifted text."
        )
    if holds_image_tokens(batch, processor):
        raise ValueError("Image tokens are among the labels: mask them with -100.")

    texts = []
    for row, answer in enumerate(answers):
        text = processor.tokenizer.decode(labels[row][counted[row]])
        _refuse_other_text(row, text, answer, processor)
        texts.append(text)
    prompt = batch["attention_mask"].bool() & ~counted
    return {
        "rows": len(texts),
        "first": texts[0],
        "answer_tokens": counted.sum(1).tolist(),
        "prompt_tokens": prompt.sum(1).tolist(),
    }


def holds_image_tokens(batch: Mapping[str, Any], processor: Any) -> bool:
    """Say whether the loss covers tokens that stand for a picture.

    Parameters
    ----------
    batch : with its `labels`.
    processor : of the model, with its `tokenizer`.
    """
    return bool((batch["labels"] == _image_token_id(processor)).any())


def _refuse_other_text(row: int, text: str, answer: str, processor: Any) -> None:
    """Raise `ValueError` where the labels of a row do not read as the answer and its end."""
    tokenizer = processor.tokenizer
    # through the tokenizer and back, because some normalise the text
    tokens = tokenizer(_learned_text(processor, answer), add_special_tokens=False)["input_ids"]
    expected = tokenizer.decode(tokens)
    if text == expected:
        return
    place = _first_difference(text, expected)
    tail = answer_end(processor)
    raise ValueError(
        f"Row {row}: the labels are not the answer and its end {tail!r}; from character {place} on "
        f"they read {text[place : place + 60]!r} instead of {expected[place : place + 60]!r}."
    )


def _first_difference(text: str, expected: str) -> int:
    """Return the place of the first character in which two texts differ."""
    for place, (found, wanted) in enumerate(zip(text, expected, strict=False)):
        if found != wanted:
            return place
    return min(len(text), len(expected))


def _image_token_id(processor: Any) -> int:
    """Return the id of the tokens that stand for the picture's patches in the text."""
    # Gemma-3's processor calls the mark before the picture by this name; its tokenizer knows better
    from_tokenizer = getattr(processor.tokenizer, "image_token_id", None)
    return from_tokenizer or processor.image_token_id


# ---- pictures in the text


def check_image_tokens(batch: Mapping[str, Any], processor: Any) -> dict[str, Any]:
    """Check that each picture has as many image tokens in the text as the vision tower delivers.

    Parameters
    ----------
    batch : `input_ids` of shape (rows, tokens), and `image_grid_thw` (Qwen), `image_position_ids`
        (Gemma-4), `pixel_values` of pictures that all have the same number of tokens (Gemma-3), or
        of pieces that have (SmolVLM). A batch without pictures has none of them.
    processor : of the model, with its `tokenizer`.

    Returns
    -------
    dict : the number of "pictures", or of the pieces into which they are cut, and the
        "image_tokens" of each.

    Raises
    ------
    ValueError : image tokens are missing or too many, for example because a text was cut to a
        length.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> processor = SimpleNamespace(tokenizer=None, image_token_id=9, image_seq_length=2)
    >>> batch = {"input_ids": torch.tensor([[1, 9, 9]]), "pixel_values": torch.zeros(1, 3, 8, 8)}
    >>> check_image_tokens(batch, processor)
    {'pictures': 1, 'image_tokens': [2]}
    >>> batch["input_ids"] = batch["input_ids"][:, :2]  # cut to a length
    >>> check_image_tokens(batch, processor)
    Traceback (most recent call last):
    ValueError: The text has runs of [1] image tokens, the pictures need [2]: set max_length=None
    and bound the pixels instead, a cut breaks pictures.
    """
    expected = _tokens_of_pictures(batch, processor)
    found = _lengths_of_runs(batch["input_ids"] == _image_token_id(processor))
    if found != expected:
        raise ValueError(
            f"The text has runs of {found} image tokens, the pictures need {expected}: "
            "set max_length=None and bound the pixels instead, a cut breaks pictures."
        )
    return {"pictures": len(expected), "image_tokens": expected}


def _tokens_of_pictures(batch: Mapping[str, Any], processor: Any) -> list[int]:
    """Count the image tokens that the vision tower will deliver for each picture of a batch."""
    if "image_grid_thw" in batch:
        # frames, rows and columns of patches; the merger makes one token of a square of patches
        patches = batch["image_grid_thw"].prod(-1)
        return (patches // processor.image_processor.merge_size**2).tolist()
    if "pixel_values" not in batch:
        return []
    if "image_position_ids" in batch:
        # Gemma-4: the place of each patch, and -1 where a picture is filled up
        patches = (batch["image_position_ids"] >= 0).all(-1).sum(-1)
        return (patches // processor.image_processor.pooling_kernel_size**2).tolist()
    tokens_of_piece = getattr(processor, "image_seq_len", None)
    if tokens_of_piece:
        # rows of fewer pieces are filled up with black ones, which the mask leaves out
        pieces = batch["pixel_attention_mask"].flatten(2).any(-1)
        return [tokens_of_piece] * int(pieces.sum())
    fixed = getattr(processor, "image_seq_length", None)
    if fixed:
        return [fixed] * len(batch["pixel_values"])
    raise ValueError(
        f"The image tokens of {type(processor).__name__} cannot be counted: "
        "neither grid nor number."
    )


def _lengths_of_runs(mask: torch.Tensor) -> list[int]:
    """Return the lengths of the runs of True in a mask (rows, tokens), row by row."""
    # a column of zeros at both ends, so that a run at the edge of the text begins and ends, too
    edge = torch.zeros_like(mask[:, :1]).int()
    steps = torch.diff(mask.int(), dim=1, prepend=edge, append=edge)
    # `nonzero` goes row by row: the n-th start and the n-th end belong to the same run
    starts = torch.nonzero(steps == 1)[:, 1]
    ends = torch.nonzero(steps == -1)[:, 1]
    return (ends - starts).tolist()


# ---- gradients


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Train without dropout for a moment; after it the model and the random state are as before.

    As before are the rates of dropout, the mode (training or evaluation) and that no parameter has
    a gradient.
    """
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    rates = [module.p for module in dropouts]
    training = model.training
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        for module in dropouts:
            module.p = 0.0
        try:
            model.zero_grad()
            yield
        finally:
            for module, rate in zip(dropouts, rates, strict=True):
                module.p = rate
            model.zero_grad()
            model.train(training)


def _simple_part_of(name: str) -> str:
    """Say to which part of a vision-language model a parameter belongs, by words in its name."""
    for word, part in WORDS_OF_PARTS.items():
        if word in name:
            return part
    return "language"


def check_gradients(
    model: nn.Module,
    batch: Mapping[str, torch.Tensor],
    *,
    part_of: Callable[[str], str] = _simple_part_of,
    step: float = 1e-3,
) -> dict[str, dict[str, Any]]:
    """Check that after one step every adapter has a gradient; the model is left as it was.

    LoRA starts with B = 0, so that A gets a gradient only once B has moved: hence the step.

    Parameters
    ----------
    model : a model with adapters, or any with parameters to train.
    batch : tensors by name, labels among them; the model's output for them has a `loss`.
    part_of : function from a parameter's name to the part of the model in which it counts, such as
        `medtune.models.part_of`; by default merger, vision, experts and language are told apart.
    step : length of the step along each gradient.

    Returns
    -------
    dict : for each part of the model the number of "tensors" trained and the "norm" of their
        gradient.

    Raises
    ------
    ValueError : nothing to train, an adapter that is frozen or that nothing reaches, a gradient
        that is zero or not finite.

    Examples
    --------
    >>> class Model(nn.Linear):
    ...     device = "cpu"
    ...     def forward(self, x):
    ...         return type("Output", (), {"loss": super().forward(x).square().sum()})
    >>> model = Model(2, 1)
    >>> check_gradients(model, {"x": torch.ones(3, 2)})["language"]["tensors"]
    2
    >>> check_gradients(model, {"x": torch.zeros(3, 2)})
    Traceback (most recent call last):
    ValueError: No gradient in language: weight has norm 0.0, so it would never learn.
    """
    trained = _trained_parameters(model, part_of)
    norms = _norms_after_a_step(model, batch, trained, step)
    parts: dict[str, dict[str, Any]] = {}
    for name, norm in norms.items():
        if not 0 < norm < float("inf"):
            raise ValueError(
                f"No gradient in {part_of(name)}: {name} has norm {norm}, so it would never learn."
            )
        part = parts.setdefault(part_of(name), {"tensors": 0, "norm": 0.0})
        part["tensors"] += 1
        part["norm"] = (part["norm"] ** 2 + norm**2) ** 0.5
    return parts


def _trained_parameters(
    model: nn.Module, part_of: Callable[[str], str]
) -> dict[str, torch.nn.Parameter]:
    """Find the adapters of a model, or all that it trains; a frozen adapter is an error."""
    adapters = {}
    learning = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            adapters[name] = parameter
        if parameter.requires_grad:
            learning[name] = parameter
    trained = adapters or learning
    if not trained:
        raise ValueError("Nothing is trained: no parameter requires a gradient.")
    frozen = [name for name in trained if name not in learning]
    if frozen:
        raise ValueError(
            f"Adapter frozen in {part_of(frozen[0])}: {frozen[0]} and {len(frozen) - 1} more."
        )
    return trained


def _norms_after_a_step(
    model: nn.Module,
    batch: Mapping[str, torch.Tensor],
    trained: dict[str, torch.nn.Parameter],
    step: float,
) -> dict[str, float]:
    """Take a step of length `step`, measure each gradient's norm there, and take the step back.

    A parameter without a gradient has the norm NaN.
    """
    inputs = {key: value.to(model.device) for key, value in batch.items()}
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    norms = {}
    with _undisturbed(model):
        try:
            model.train()
            model(**inputs).loss.backward()
            with torch.no_grad():
                for parameter in trained.values():
                    if parameter.grad is not None:
                        length = parameter.grad.norm().clamp(min=1e-12)
                        parameter -= step * parameter.grad / length
            model.zero_grad()
            model(**inputs).loss.backward()
            for name, parameter in trained.items():
                grad = parameter.grad
                norms[name] = float("nan") if grad is None else grad.norm().item()
        finally:
            with torch.no_grad():
                for name, parameter in trained.items():
                    parameter.copy_(before[name])
    return norms


# ---- accumulation


@dataclass
class _Step:
    """What one step of a trainer came to.

    Attributes
    ----------
    loss : the loss, summed over the batches of the step.
    gradients : of every parameter that has one, in float32.
    answer_tokens : number of labels that count, of each batch.
    """

    loss: float
    gradients: list[torch.Tensor]
    answer_tokens: list[int]


def check_accumulation(
    trainer: Any, rows: list[dict], *, tolerance: float = 5e-5
) -> dict[str, Any]:
    """Check that one batch of n rows, and n accumulated batches of one row, give the same gradient.

    Several models declare `accepts_loss_kwargs = False`. Then a Trainer takes the mean of means,
    and short answers weigh more: set `trainer.model_accepts_loss_kwargs = True`. To the loss of a
    mixture of experts TRL adds one that balances the router, which no cut of the batch leaves as
    it is: `SFTConfig(router_aux_loss_coef=0.0)` trains without.

    Parameters
    ----------
    trainer : a `trl.SFTTrainer` for example, before or after training.
    rows : of the training set, with answers of different length.
    tolerance : allowed difference, relative to the loss and to the largest gradient. In float32 a
        GPU rounds by 1e-5, and means of means differ by 1e-3 or so.

    Returns
    -------
    dict : "loss_batch", "loss_accumulated", "gradient_difference" (relative to the largest
        gradient), and the "answer_tokens" of the rows.

    Raises
    ------
    ValueError : they differ, or the rows cannot show it because all answers have the same number of
        tokens.
    """
    with _log_untouched(trainer):
        whole = _take_step(trainer, [rows])
        parts = _take_step(trainer, [[row] for row in rows])
    tokens = parts.answer_tokens
    if len(set(tokens)) < 2:
        raise ValueError(
            f"These rows cannot show it: their answers all have {tokens[0]} tokens, choose others."
        )
    difference = _largest_difference(whole.gradients, parts.gradients)
    same_loss = abs(whole.loss - parts.loss) <= tolerance * abs(whole.loss)
    # written so that a difference that is NaN is an error, too
    if not (same_loss and difference <= tolerance):
        raise ValueError(
            f"Loss {whole.loss:.6f} in one batch, {parts.loss:.6f} accumulated "
            f"(gradients differ by {difference:.1e}): the mean depends on the cut; "
            "set trainer.model_accepts_loss_kwargs = True, router_aux_loss_coef=0."
        )
    return {
        "loss_batch": whole.loss,
        "loss_accumulated": parts.loss,
        "gradient_difference": difference,
        "answer_tokens": tokens,
    }


@contextmanager
def _log_untouched(trainer: Any) -> Iterator[None]:
    """Let a trainer compute steps that its log and its counters do not know of afterwards."""
    accumulation = getattr(trainer, "current_gradient_accumulation_steps", 1)
    # TRL's trainers sum these up at every step; other trainers have neither
    metrics = copy.deepcopy(getattr(trainer, "_metrics", None))
    token_count = getattr(trainer, "_total_train_tokens", None)
    try:
        yield
    finally:
        trainer.current_gradient_accumulation_steps = accumulation
        if metrics is not None:
            trainer._metrics = metrics
            trainer._total_train_tokens = token_count


def _take_step(trainer: Any, batches: list[list[dict]]) -> _Step:
    """Compute loss and gradient of a step of several batches, as the trainer itself does it."""
    model = trainer.model
    collated = []
    for rows in batches:
        # collators may change the rows they get
        collated.append(trainer.data_collator([copy.deepcopy(row) for row in rows]))
    samples, items = trainer.get_batch_samples(iter(collated), len(batches), trainer.args.device)
    trainer.current_gradient_accumulation_steps = len(batches)
    loss = 0.0
    with _undisturbed(model):
        for sample in samples:
            loss += trainer.training_step(model, sample, items).item()
        gradients = []
        for parameter in model.parameters():
            if parameter.grad is not None:
                gradients.append(parameter.grad.detach().float().clone())
    tokens = [int((sample["labels"] != NOT_COUNTED).sum()) for sample in samples]
    return _Step(loss, gradients, tokens)


def _largest_difference(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    """Return the largest difference between two gradients, relative to the largest of the first."""
    largest = max(gradient.abs().max().item() for gradient in first)
    pairs = zip(first, second, strict=True)
    difference = max((one - other).abs().max().item() for one, other in pairs)
    return difference / largest
