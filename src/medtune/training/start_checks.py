"""Looks at pairs, rewards and reference before the first step of `stage: dpo` and `stage: grpo`.

These trainings run to their end on data from which nothing can be learned, and their curves look
harmless. What is found here is an error of one line.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from accelerate.utils import gather_object
from trl import DPOTrainer, GRPOTrainer, apply_chat_template

from .preflight import find_cut, name_of, refuse_cut, refuse_odd_sizes, sizes_of_pictures
from .rewarding import columns_of

# A reference that is the start gives the same numbers; on 4-bit weights TRL keeps the start in
# bfloat16 and its copy in float32. Another model is off by a tenth and more.
MOST_APART = 0.05  # nats a token

# A sampled answer may run on now and then.
MOST_CUT = 0.1

# Records on which start and reference are compared.
COMPARED = 2

# Differences of rewards that come from rounding.
ROUNDING = 1e-9


# ---- pairs and questions


def check_preferences(
    pairs: datasets.Dataset, processor: Any, max_length: int | None, *, allow_cut_answers: bool
) -> None:
    """Look at all preference pairs: pictures, answers that are the same, answers that are cut.

    Parameters
    ----------
    pairs : from `medtune.rewards.read_preferences`.
    processor : of the model.
    max_length : most tokens of question and answer; None cuts nothing.
    allow_cut_answers : whether answers may be cut.

    Raises
    ------
    ValueError : names the first record with something wrong.
    """
    same = []
    for row in pairs.select_columns(["id", "chosen", "rejected"]):
        if _said(row["chosen"]) == _said(row["rejected"]):
            same.append(row)
    if same:
        raise ValueError(
            f"{len(same)} of {len(pairs)} pairs have the same answer as chosen and rejected, the "
            f"first of {name_of(same[0])}: nothing can be learned of them, take them out"
        )
    sizes = sizes_of_pictures(pairs)
    refuse_odd_sizes(processor, pairs, sizes)
    if max_length:
        for key in ("chosen", "rejected"):
            answers = pairs.select_columns(["id", "prompt", "images", key])
            answers = answers.rename_column(key, "completion")
            cut = find_cut(processor, answers, sizes, max_length)
            refuse_cut(cut, len(pairs), max_length, allowed=allow_cut_answers)


def check_questions(
    questions: datasets.Dataset,
    processor: Any,
    max_completion_length: int | None,
    *,
    allow_cut_answers: bool,
) -> None:
    """Look at all questions: pictures, and true answers that are longer than an answer may be.

    Parameters
    ----------
    questions : from `read_questions`.
    processor : of the model.
    max_completion_length : most tokens of an answer; None is no limit.
    allow_cut_answers : whether answers may be cut.

    Raises
    ------
    ValueError : names the first record with something wrong.
    """
    refuse_odd_sizes(processor, questions, sizes_of_pictures(questions))
    if not max_completion_length or allow_cut_answers:
        return
    names = questions["id"]
    tokens = processor.tokenizer(list(questions["reference"]), add_special_tokens=False)
    # and the token that ends an answer
    lengths = [len(ids) + 1 for ids in tokens["input_ids"]]
    cut = [row for row, length in enumerate(lengths) if length > max_completion_length]
    if cut:
        raise ValueError(
            f"{len(cut)} of {len(questions)} true answers are longer than "
            f"max_completion_length={max_completion_length}, the first is record {names[cut[0]]!r}: "
            f"set {max(lengths)} or more, or the model's own will be cut; allow_cut_answers=true "
            "trains so"
        )


def _said(turns: list[dict[str, Any]]) -> str:
    return "".join(part.get("text") or "" for part in turns[-1]["content"]).strip()


# ---- the reference


def check_reference(trainer: DPOTrainer | GRPOTrainer, data: datasets.Dataset, answer: str) -> None:
    """Compare start and reference on the first records.

    Parameters
    ----------
    trainer : before its first step.
    data : what it trains on.
    answer : the column with an answer to compare on.

    Raises
    ------
    ValueError : the reference is another model than the start, so that the first step would already
        pay for a distance that nobody walked.
    """
    # without a weight on the divergence GRPO has no reference
    if not trainer.beta:
        return
    rows = [data[row] for row in range(min(COMPARED, len(data)))]
    for row in rows:
        text = apply_chat_template(
            {"prompt": row["prompt"], "completion": row[answer]}, trainer.processing_class
        )
        batch = _prepare(trainer, [text["prompt"] + text["completion"]], [row])
        with _asleep(trainer.model):
            start = _log_probs(trainer.model, batch)
            with _reference_of(trainer) as reference:
                referred = _log_probs(reference, batch)
        apart = (start - referred).abs().mean().item()
        if not apart <= MOST_APART:
            raise ValueError(
                f"the reference is not the start: on {name_of(row)} they are {apart:.2f} nats a token "
                "apart; begin from an adapter (adapter: FOLDER), or from the base with a fresh one"
            )


@contextmanager
def _reference_of(trainer: Any):
    """Give the reference as TRL takes it: a model, a copy of the adapter, or the bare base."""
    if trainer.ref_model is not None:
        yield trainer.ref_model
        return
    model = trainer.model
    if not hasattr(model, "peft_config"):
        # before its first step a model that is trained whole is its own reference
        yield model
    elif "ref" in model.peft_config:
        active = model.active_adapter
        model.set_adapter("ref")
        try:
            yield model
        finally:
            model.set_adapter(active)
    else:
        with model.disable_adapter():
            yield model


def _log_probs(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Give the log-probability of each token of a batch but the first."""
    logits = model(**batch).logits[:, :-1].float()
    chosen = batch["input_ids"][:, 1:, None]
    return logits.log_softmax(-1).gather(-1, chosen)[..., 0]


def _prepare(trainer: Any, texts: list[str], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Turn texts and the pictures of their rows into a batch, padded on the left to go on writing."""
    pictures = [row["images"] for row in rows]
    batch = trainer.processing_class(
        # processors want None, not empty lists, where there is no picture at all
        images=pictures if any(pictures) else None,
        text=texts,
        padding=True,
        padding_side="left",
        add_special_tokens=False,
        return_tensors="pt",
    )
    return dict(batch.to(trainer.args.device))


@contextmanager
def _asleep(model: Any):
    """Let a model compute without dropout and without gradients."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


# ---- sampled answers and their rewards


@dataclass
class Asked:
    """What came of one question.

    Attributes
    ----------
    rewards : for each reward function, those of the sampled answers; NaN is not judged.
    cut : how many of the answers reached the longest length.
    """

    rewards: list[list[float]]
    cut: int


def check_rewards(
    trainer: GRPOTrainer, questions: datasets.Dataset, *, allow_cut_answers: bool
) -> None:
    """Answer some questions as the training will, and look at rewards and lengths.

    Every rank answers a part, and all of them see everything.

    Parameters
    ----------
    trainer : before its first step.
    questions : some of those that it trains on.
    allow_cut_answers : whether answers may be cut.

    Raises
    ------
    ValueError : a reward that counts is the same for all answers or judges none; the answers to each
        question all earn the same; many answers are cut.
    """
    args = trainer.args
    mine = range(args.process_index, len(questions), args.world_size)
    # the training's own draws stay what they are
    with torch.random.fork_rng(), _asleep(trainer.model):
        torch.manual_seed(args.seed + args.process_index)
        asked = [_ask(trainer, questions[row]) for row in mine]
    asked = gather_object(asked)
    answers = len(asked) * trainer.num_generations
    cut = sum(one.cut for one in asked)
    if cut > MOST_CUT * answers and not allow_cut_answers:
        raise ValueError(
            f"{cut} of {answers} sampled answers are cut by max_completion_length="
            f"{args.max_completion_length}: raise it, or begin from a model that ends its answers; "
            "allow_cut_answers=true trains so"
        )
    _refuse_constant(trainer, asked)


def _refuse_constant(trainer: Any, asked: list[Asked]) -> None:
    """Raise `ValueError` where no reward, or one that counts, tells answers apart."""
    weights = trainer.reward_weights.tolist()
    first = f"the {len(asked)} prompts that were tried"
    for number, (name, weight) in enumerate(zip(trainer.reward_func_names, weights, strict=True)):
        if not weight:
            continue
        values = []
        for one in asked:
            values += [value for value in one.rewards[number] if not math.isnan(value)]
        if not values:
            raise ValueError(f"{name} judges no answer to {first}: take it out of rewards")
        if max(values) - min(values) <= ROUNDING:
            raise ValueError(
                f"{name} is {values[0]:g} for every answer to {first}, {len(values)} in all: a "
                "constant reward teaches nothing; take it out of rewards, give it the weight 0, or "
                "begin from a model that is right now and then"
            )
    spreads = []
    for one in asked:
        totals = []
        for values in zip(*one.rewards, strict=True):
            judged = [w * v for w, v in zip(weights, values, strict=True) if not math.isnan(v)]
            totals.append(sum(judged))
        spreads.append(max(totals) - min(totals))
    if max(spreads) <= ROUNDING:
        raise ValueError(
            f"to each of {first} all answers earn the same: GRPO compares answers to one question, "
            "and learns nothing; raise temperature or num_generations, or ask other questions"
        )


def _ask(trainer: Any, row: dict[str, Any]) -> Asked:
    """Sample answers to one question, in batches that the training takes, too."""
    prompt = apply_chat_template({"prompt": row["prompt"]}, trainer.processing_class)["prompt"]
    answers = []
    cut = 0
    left = trainer.num_generations
    while left:
        count = min(left, trainer.args.per_device_train_batch_size)
        left -= count
        batch = _prepare(trainer, [prompt] * count, [row] * count)
        written = trainer.model.generate(**batch, generation_config=trainer.generation_config)
        for ids in written[:, batch["input_ids"].shape[1] :].tolist():
            ended = [place for place, token in enumerate(ids) if token in trainer.eos_token_ids]
            if ended:
                ids = ids[: ended[0]]
            else:
                cut += 1
            answers.append(trainer.processing_class.tokenizer.decode(ids, skip_special_tokens=True))
    columns = columns_of([row] * len(answers))
    rewards = []
    for function in trainer.reward_funcs:
        earned = function(answers, **columns)
        rewards.append([math.nan if value is None else float(value) for value in earned])
    return Asked(rewards, cut)
