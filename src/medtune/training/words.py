"""Words that weigh more in the loss: a caption has many, and few of them say what it is.

Every token of an answer counts alike in the loss, so the name of a structure has as small a part in
it as an "and". `weigh_names` lets a trainer of TRL give the names more of it. The weight of an
answer as a whole stays: its weights have a mean of 1 over the tokens that are learned. So the
number of tokens, by which a Trainer divides the loss of a step, is that of the weights, too,
however the step is cut into batches and ranks.

The collator marks tokens, and the model's forward weighs what TRL's head says of them. Nothing is
computed twice, and a model that does not train, in an evaluation for example, weighs nothing.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import torch
from trl import apply_chat_template
from trl.data_utils import is_conversational, prepare_multimodal_messages

from medtune.captions import structure_spans
from medtune.models import mark_words, weigh_tokens

from .around import AroundCollator, rows_without
from .speed import NOT_COUNTED, without_adapter

# In a batch: which tokens belong to words that weigh more, (rows, tokens), true or false. Marks
# and not weights, which DeepSpeed would round to bfloat16 on their way to the model.
STRESSED = "stressed"

# Columns of a record that say what its answer names.
NAMING_COLUMNS = ("structure", "fields")

# First character of a stretch of an answer, and the one behind it.
Span = tuple[int, int]


# ---- which words


def name_spans(row: dict[str, Any]) -> list[Span]:
    """Find the words of a record's answer that name the structure.

    Parameters
    ----------
    row : a record, with `completion`. The name is that of `structure`, or of `structure_zh` in
        `fields`, where the answer has it word for word; else the one that the caption's rules find,
        see `medtune.captions.structure_spans`.

    Returns
    -------
    list of (int, int) : first character of each stretch of the answer, and the one behind it; empty
        where it names nothing.

    Examples
    --------
    >>> answer = [{"type": "text", "text": "It shows the left kidney."}]
    >>> row = {"completion": [{"role": "assistant", "content": answer}]}
    >>> name_spans(row), name_spans(row | {"structure": "kidney"})
    ([(13, 24)], [(18, 24)])
    """
    answer = _answer_of(row)
    fields = row.get("fields") or {}
    for name in (row.get("structure"), fields.get("structure_zh")):
        spans = _places_of(name, answer) if name else []
        if spans:
            return spans
    return structure_spans(answer)


def _answer_of(row: dict[str, Any]) -> str:
    """Give the text of what a record teaches."""
    completion = row["completion"]
    if isinstance(completion, str):
        return completion
    content = completion[-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or "" for part in content)


def _places_of(name: str, answer: str) -> list[Span]:
    """Find a name in an answer, but not as a part of a longer English word."""
    pattern = rf"(?<![A-Za-z]){re.escape(name)}(?![A-Za-z])"
    return [match.span() for match in re.finditer(pattern, answer, re.IGNORECASE)]


# ---- in a trainer


def weigh_names(trainer: Any, name_weight: float) -> None:
    """Let the words that name the structure weigh more in the loss of a training.

    Which words those are, `name_spans` says for each record; in one that names nothing all words
    weigh alike. An answer as a whole weighs as before. Evaluations report the plain loss. It goes
    before `speed_up`, `send_bytes`, `cache_features` and the first step.

    Parameters
    ----------
    trainer : a `trl.SFTTrainer` on records with pictures, as `medtune.records.read_records` gives
        them, whose processor has a fast tokenizer.
    name_weight : how many times as much such a word weighs as any other; with 1 the trainer stays
        as it is.

    Raises
    ------
    ValueError : the weight is not above 0; the trainer has another loss than TRL's `nll`, is
        another kind of trainer, or cuts sequences over its ranks. Later, while batches are made: an
        answer is learned in other words or tokens than TRL writes it in.
    """
    if not name_weight > 0:
        raise ValueError(f"name_weight={name_weight}: must be above 0; 1 weighs all words alike")
    if name_weight == 1:
        return
    _refuse_other_losses(trainer, name_weight)
    # TRL takes only the columns out of the data set that its own collator knows
    trainer._set_signature_columns_if_needed()
    for column in NAMING_COLUMNS:
        if column not in trainer._signature_columns:
            trainer._signature_columns.append(column)
    trainer.data_collator = _MarkNames(trainer.data_collator, trainer.processing_class)
    _weigh_what_the_head_says(without_adapter(trainer.model), name_weight)


def _refuse_other_losses(trainer: Any, name_weight: float) -> None:
    """Raise `ValueError` where the loss would not heed the weights."""
    start = f"name_weight={name_weight} does not go with"
    args = trainer.args
    if not hasattr(trainer.data_collator, "processor") or not getattr(
        trainer, "_is_vision_dataset", False
    ):
        raise ValueError(
            f"{start} this trainer: it needs TRL's SFTTrainer on records with pictures, or set it to 1"
        )
    if args.loss_type != "nll":
        raise ValueError(f"{start} loss_type={args.loss_type}: set one of them back, to 1 or nll")
    if args.label_smoothing_factor > 0 or trainer.compute_loss_func is not None:
        raise ValueError(
            f"{start} label_smoothing_factor or compute_loss_func, which compute the loss in "
            "another way: leave them out, or set it to 1"
        )
    split = trainer.accelerator.parallelism_config
    if split is not None and (split.sp_enabled or split.cp_enabled):
        raise ValueError(f"{start} sequences cut over ranks (sp_size, cp_size): set it to 1")


class _MarkNames(AroundCollator):
    """A collator that also marks the tokens of words that weigh more."""

    def __call__(self, rows: list[dict]) -> dict:
        """Collate rows; the batch has `STRESSED` besides."""
        # before the collator, which may change the rows it gets
        answers = [self._marked_answer(row) for row in rows]
        batch = self.collate(rows_without(rows, NAMING_COLUMNS))
        stressed = torch.zeros(batch["input_ids"].shape, dtype=torch.bool)
        for number, (ids, marks) in enumerate(answers):
            learned = batch["labels"][number] != NOT_COUNTED
            labels = batch["labels"][number][learned]
            # an answer that max_length cuts is shorter
            if not torch.equal(labels, ids[: len(labels)]):
                raise ValueError(
                    "name_weight: what is learned of a record is not its answer alone; "
                    "set completion_only_loss=true, or name_weight=1"
                )
            stressed[number, learned] = marks[: len(labels)]
        batch[STRESSED] = stressed
        return batch

    def _marked_answer(self, row: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """Write an answer in tokens as TRL does; say which of them belong to a name."""
        text = self._rendered(row)
        answer = _answer_of(row)
        # some templates strip an answer
        written = answer.strip()
        blanks = len(answer) - len(answer.lstrip())
        place = text.rfind(written)
        if place < 0:
            raise ValueError(
                "name_weight: the chat template changes the words of an answer; set name_weight=1"
            )
        encoded = self.own_processor.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, return_tensors="pt"
        )
        begins, ends = encoded["offset_mapping"][0].unbind(-1)
        moved = place - blanks
        spans = [(first + moved, behind + moved) for first, behind in name_spans(row)]
        return encoded["input_ids"][0], mark_words(begins, ends, spans)

    def _rendered(self, row: dict) -> str:
        """Write what a record teaches in the chat template, with the end of the answer."""
        if not is_conversational(row):
            return row["completion"]
        images = row["images"] if "images" in row else [row["image"]]
        turns = {
            "prompt": prepare_multimodal_messages(row["prompt"], images=images),
            "completion": prepare_multimodal_messages(row["completion"]),
        }
        return apply_chat_template(turns, self.own_processor)["completion"]


def _weigh_what_the_head_says(base: Any, name_weight: float) -> None:
    """Weigh the log-probabilities of TRL's head while a model trains; TRL's loss is their sum.

    Parameters
    ----------
    base : the model of Transformers that TRL gave a head, without adapter.
    name_weight : see `weigh_names`.
    """
    own = base.forward

    # `generate` reads the signature of the model's own forward
    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        # no model knows it, so it must go in any case
        stressed = kwargs.pop(STRESSED, None)
        outputs = own(*args, **kwargs)
        if stressed is None or not base.training or not kwargs.get("fused_lm_head"):
            return outputs
        # a position predicts the token of the next one
        learned = kwargs["labels"][:, 1:] != NOT_COUNTED
        weights = weigh_tokens(stressed[:, 1:], learned, name_weight)
        if outputs.log_probs.shape != weights.shape:
            # `speed_up` has left only the labelled positions, in one row
            weights = weights[learned][None]
        outputs.log_probs = outputs.log_probs * weights
        return outputs

    base.forward = forward
