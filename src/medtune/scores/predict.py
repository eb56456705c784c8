"""The table that LLaMA-Factory prints after `do_predict`, for several runs side by side."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .text import llamafactory_scores

PREDICT_NAMES = (
    "predict_bleu-4",
    "predict_rouge-1",
    "predict_rouge-2",
    "predict_rouge-l",
    "predict_runtime",
    "predict_samples_per_second",
    "predict_steps_per_second",
)
"""The rows of the table, by the names that LLaMA-Factory gives them."""


def predict_table(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    batch_size: int | Mapping[str, int | None] | None = None,
) -> dict[str, dict[str, float | None]]:
    """Put scores and speed of several runs side by side, as published tables do.

    BLEU-4 and ROUGE are those of `llamafactory_scores`: of characters, in percent. The speed is what
    `generation_speed` sums up. It tells two runs apart only if they answered on the same machine,
    with the same batch size and as many processes; and an untuned model is often slow only because
    its answers are long.

    Parameters
    ----------
    runs : the answers of each run, by its name, such as `read_answers` gives: "answer", "reference",
        and "seconds" where they are known.
    batch_size : of all runs, or of each; a step is a batch. Without it there are no steps.

    Returns
    -------
    dict : for each run the values of `PREDICT_NAMES`, None for what its answers do not tell.
        `pandas.DataFrame(predict_table(...))` shows it with a column a run.

    Raises
    ------
    ValueError : no runs, a run without answers or without a reference, or a batch size below 1.

    Examples
    --------
    >>> answers = [{"answer": "the left kidney", "reference": "the right kidney", "seconds": 2.0}]
    >>> table = predict_table({"base": answers, "tuned": answers}, batch_size=1)
    >>> table["tuned"]["predict_bleu-4"], table["tuned"]["predict_samples_per_second"]
    (60.5782, 0.5)
    """
    if not runs:
        raise ValueError("no runs: give {name: answers}")
    table = {}
    for name, answers in runs.items():
        size = batch_size.get(name) if isinstance(batch_size, Mapping) else batch_size
        if size is not None and size < 1:
            raise ValueError(f"batch_size={size}: give 1 or more")
        table[name] = _scores_of(name, answers) | _speed_of(answers, size)
    return table


def _scores_of(name: str, answers: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Score the answers of one run."""
    if not answers:
        raise ValueError(f"the run {name} has no answers")
    for number, answer in enumerate(answers):
        if not isinstance(answer.get("answer"), str) or not isinstance(
            answer.get("reference"), str
        ):
            raise ValueError(f"answer {number} of the run {name} lacks its answer or reference")
    scores = llamafactory_scores(
        [answer["answer"] for answer in answers], [answer["reference"] for answer in answers]
    )
    return {f"predict_{key}": round(value, 4) for key, value in scores.items()}


def _speed_of(
    answers: Sequence[Mapping[str, Any]], batch_size: int | None
) -> dict[str, float | None]:
    """Sum up the speed of one run; answers of other programs do not say how long they took."""
    names = ("predict_runtime", "predict_samples_per_second", "predict_steps_per_second")
    if any(answer.get("seconds") is None for answer in answers):
        return dict.fromkeys(names)
    # here and not at the top: the room of the answers loads torch, which scores do without
    from medtune.answers import generation_speed

    with_tokens = [{"tokens": 0, **answer} for answer in answers]
    speed = generation_speed(with_tokens)
    steps_per_second = None
    if batch_size is not None:
        steps = math.ceil(len(answers) / batch_size)
        steps_per_second = round(steps / max(speed["predict_runtime"], 1e-9), 3)
    values = [speed["predict_runtime"], speed["predict_samples_per_second"], steps_per_second]
    return dict(zip(names, values, strict=True))
