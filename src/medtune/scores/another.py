"""Score answers about another person, and count in what that data set differs from the training."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from medtune.captions import Caption, parse_caption

from .conditions import Measure, score_conditions
from .detection import detection_scores
from .findings import finding_scores
from .text import standard_scores

MEASURES = (
    Measure("name right", finding_scores, "structure_exact", 100),
    Measure("place right", finding_scores, "place_exact", 100),
    Measure("sensitivity", detection_scores, "sensitivity", 100),
    Measure("false alarms", detection_scores, "false_alarms", 100),
    Measure("kind right", detection_scores, "kind_right", 100),
    Measure("word BLEU-4", standard_scores, "bleu"),
)
"""What is measured on another person, in percent."""

NOTHING_TAUGHT = "no pair is about a structure that the training had"


def score_people(
    people: Mapping[str, Sequence[Mapping[str, Any]]],
    train_captions: Iterable[str],
    *,
    measures: Sequence[Measure] = MEASURES,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Score a model's answers about several people, each over what the model was taught.

    A name that the training never had cannot be said. Pairs about such structures are counted, and
    left out of the scores. What else differs between the people is counted as well: a drop of a
    score may come from the other person, or from another zoom or phase of contrast.

    Parameters
    ----------
    people : for each person or set the answers: "answer", "reference" and, where they are known,
        "group" and "slice", as `generate_answers` gives them.
    train_captions : the captions that the model was trained on.
    measures : what is measured.
    seed : of the resamples.

    Returns
    -------
    dict : for each person "scores" (by measure what `score_conditions` gives), "pairs", "scored"
        (pairs about structures of the training), "not_taught" (pairs by name of the others, most
        frequent first), "structures", "slices" (None where they are not known), "names_by_region"
        (names right in percent where each structure of a slice counts once, however many pictures
        show it; None where the slices are not known), "names_lost" (for each structure that was
        scored: "pairs", "right", the share of right names in percent, and "training_pairs"; those
        with most wrong names first), "area" (median share of the picture that a region covers, in
        percent), "windows" and "densities" (shares of the pairs in percent).

    Raises
    ------
    ValueError : nobody, or somebody without answers.

    Examples
    --------
    >>> train = ["The region shows the liver. No focal lesion is seen."]
    >>> rows = [
    ...     {"answer": "It shows the liver.", "reference": "It shows the liver."},
    ...     {"answer": "It shows the liver.", "reference": "It shows the spleen."},
    ... ]
    >>> found = score_people({"another": rows}, train)["another"]
    >>> found["scores"]["name right"]["value"], found["pairs"], found["not_taught"]
    (100.0, 2, {'spleen': 1})
    """
    if not people:
        raise ValueError("people is empty: give {name: answers}")
    taught = _taught(train_captions)
    found = {}
    for name, rows in people.items():
        if not rows:
            raise ValueError(f"people: {name!r} has no answers")
        found[name] = _score_person(rows, taught, measures, seed)
    return found


def _score_person(
    rows: Sequence[Mapping[str, Any]],
    taught: Mapping[str | None, int],
    measures: Sequence[Measure],
    seed: int,
) -> dict[str, Any]:
    read = [parse_caption(row["reference"]) for row in rows]
    scored = []
    for row, caption in zip(rows, read, strict=True):
        # a caption that names no structure asks for no name
        if caption.structure is None or caption.structure in taught:
            scored.append(row)
    others = [caption.structure for caption in read if caption.structure not in {*taught, None}]
    slices = _known([row.get("slice") for row in rows])
    named = _names_right(scored)
    return {
        "scores": _scores(scored, measures, seed),
        "pairs": len(rows),
        "scored": len(scored),
        "not_taught": _counts(others),
        "structures": len({caption.structure for caption in read} - {None}),
        "slices": None if slices is None else len(set(slices)),
        "names_by_region": _names_by_region(named) if slices else None,
        "names_lost": _names_lost(named, taught),
        **_what_differs(read),
    }


def _scores(
    rows: Sequence[Mapping[str, Any]], measures: Sequence[Measure], seed: int
) -> dict[str, Any]:
    if not rows:
        none = {"value": None, "low": None, "high": None, "reason": NOTHING_TAUGHT}
        return {measure.name: dict(none) for measure in measures}
    groups = _known([row.get("group") for row in rows])
    slices = _known([row.get("slice") for row in rows])
    scored = score_conditions(
        {"model": [row["answer"] for row in rows]},
        [row["reference"] for row in rows],
        measures,
        groups=groups,
        slices=slices,
        seed=seed,
    )
    return scored["model"].results


def _names_right(rows: Sequence[Mapping[str, Any]]) -> list[tuple[Any, str, bool]]:
    """Give slice and structure of each reference with a name, and whether the answer names it."""
    named = []
    for row in rows:
        structure = parse_caption(row["reference"]).structure
        if structure is not None:
            said = parse_caption(row["answer"]).structure
            named.append((row.get("slice"), structure, said == structure))
    return named


def _names_by_region(named: Sequence[tuple[Any, str, bool]]) -> float | None:
    """Average the names that are right over structures of slices, in percent."""
    right: dict[tuple, list[bool]] = {}
    for slice_, structure, is_right in named:
        right.setdefault((slice_, structure), []).append(is_right)
    if not right:
        return None
    return 100 * float(np.mean([np.mean(views) for views in right.values()]))


def _names_lost(
    named: Sequence[tuple[Any, str, bool]], taught: Mapping[str | None, int]
) -> list[dict[str, Any]]:
    """List the structures, those with most wrong names first."""
    right: dict[str, list[bool]] = {}
    for _, structure, is_right in named:
        right.setdefault(structure, []).append(is_right)
    lost = []
    for structure in sorted(right, key=lambda name: (sum(right[name]) - len(right[name]), name)):
        found = right[structure]
        lost.append(
            {
                "structure": structure,
                "pairs": len(found),
                "right": round(100 * float(np.mean(found)), 1),
                "training_pairs": taught[structure],
            }
        )
    return lost


def _taught(captions: Iterable[str]) -> Counter[str | None]:
    """Count how many captions of the training name each structure."""
    taught: Counter[str | None] = Counter()
    # many captions are the same, and reading one takes time
    for caption, times in Counter(captions).items():
        taught[parse_caption(caption).structure] += times
    return taught


def _known(cells: list[Any]) -> list[Any] | None:
    return None if None in cells else cells


def _what_differs(read: list[Caption]) -> dict[str, Any]:
    areas = [caption.area_share for caption in read if caption.area_share is not None]
    return {
        "area": round(100 * float(np.median(areas)), 1) if areas else None,
        "windows": _shares([caption.window for caption in read]),
        "densities": _shares([caption.density for caption in read]),
    }


def _shares(values: list[str | None]) -> dict[str, float]:
    counts = _counts([value for value in values if value is not None])
    return {value: round(100 * count / len(values), 1) for value, count in counts.items()}


def _counts(values: list[str]) -> dict[str, int]:
    """Count values, the most frequent first, and by name where they are as frequent."""
    names = sorted(set(values), key=lambda name: (-values.count(name), name))
    return {name: values.count(name) for name in names}
