"""The gate behind the model: an answer that does not match its picture is not given."""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw

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


def draw_result(image: Image.Image, result: Mapping[str, Any]) -> Image.Image:
    """Draw the box and the match score of a result into a copy of its picture.

    Parameters
    ----------
    image : PIL.Image.Image
        The picture that was asked about.
    result : mapping
        What `locate_verify_diagnose` says about it.

    Returns
    -------
    PIL.Image.Image
        A new picture in mode RGB. The box is orange where an answer was given, red where not: green
        would look like one that an annotator has drawn.

    Examples
    --------
    >>> result = {"box": [0.25, 0.25, 0.75, 0.75], "match_score": 0.9, "answer": "A cyst."}
    >>> drawn = draw_result(Image.new("L", (100, 100)), result)
    >>> drawn.getpixel((25, 50))
    (255, 165, 0)
    """
    x0, y0, x1, y1 = result["box"]
    copy = image.convert("RGB").copy()
    colour = "red" if result["answer"] is None else "orange"
    # a pen of 1 pixel is not seen in a picture of 512
    pen = max(1, min(copy.size) // 200)
    corners = (x0 * copy.width, y0 * copy.height, x1 * copy.width, y1 * copy.height)
    brush = ImageDraw.Draw(copy)
    brush.rectangle(corners, outline=colour, width=pen)
    text = f"match {result['match_score']:.2f}"
    height = max(10, copy.height // 24)
    # above the box, or inside of it where there is no room
    top = corners[1] - 1.3 * height
    if top < 0:
        top = corners[1] + 2 * pen
    brush.text((corners[0] + 2 * pen, top), text, fill=colour, font_size=height)
    return copy
