"""The gate behind the model: an answer that does not match its picture is not given."""

from collections.abc import Sequence
from typing import Any

from medtune.answers import generate_answers

from .model import MultiTaskModel
from .records import ask, statement_of


def choose_threshold(scores: Sequence[float], sensitivity: float = 0.95) -> float:
    """Choose the highest threshold under which not too many true pairs fall.

    Parameters
    ----------
    scores : match scores of true pairs, which were not trained on.
    sensitivity : the share of them, above 0 up to 1, that must not fall under the threshold.

    Examples
    --------
    >>> choose_threshold([0.9, 0.8, 0.3, 0.7], sensitivity=0.75)
    0.7
    """
    may_be_missed = int((1 - sensitivity) * len(scores))
    return sorted(scores)[may_be_missed]


def locate_verify_diagnose(  # noqa: PLR0913 - each is given by keyword where it is a setting
    model: MultiTaskModel,
    processor: Any,
    images: Sequence[Any],
    questions: Sequence[str],
    *,
    threshold: float,
    batch_size: int = 16,
    max_new_tokens: int = 160,
) -> list[dict[str, Any]]:
    """Answer questions, one about each picture, but give no answer that does not match its picture.

    Parameters
    ----------
    model, processor : a `MultiTaskModel` and its processor.
    images : PIL pictures.
    questions : a question about each of them.
    threshold : least match score, 0..1, of a draft that is given as an answer; see
        `choose_threshold`.
    batch_size : pictures that are asked about together.
    max_new_tokens : most tokens of an answer.

    Returns
    -------
    list of dict : "box"; "match_score", 0..1, of the drafted answer; "answer", None under
        `threshold`; "reason".
    """
    rows = []
    for image, question in zip(images, questions, strict=True):
        nothing_known = [{"content": ""}]
        rows.append({"prompt": ask(question), "images": [image], "completion": nothing_known})
    answers = generate_answers(
        model.base, processor, rows, batch_size=batch_size, max_new_tokens=max_new_tokens
    )
    drafts = [answer["answer"] for answer in answers]
    statements = [statement_of(draft) for draft in drafts]
    boxes, scores = model.judge(processor, images, questions, statements, batch_size=batch_size)
    results = []
    for box, score, draft in zip(boxes, scores, drafts, strict=True):
        results.append(_pass_or_hold(box, score, draft, threshold))
    return results


def _pass_or_hold(box: list[float], score: float, draft: str, threshold: float) -> dict[str, Any]:
    """Give a draft as the answer if its score suffices."""
    reason = f"match {score:.3f}, threshold {threshold:.3f}"
    answer = draft
    if score < threshold:
        reason += ": picture and draft may not belong together, so there is no diagnosis"
        answer = None
    return {"box": box, "match_score": score, "answer": answer, "reason": reason}
