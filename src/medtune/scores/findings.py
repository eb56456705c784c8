"""Compare what two captions say, not how: the organ, its place and the findings that they name."""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from medtune.captions import PLACES, Caption, entities, parse_caption

from .intervals import mean_of_known, values_of
from .text import text_pairs

KINDS = ("modality", "structure", "side", "place", "zone", "finding", "finding place")
"""The kinds of entity that count for precision, recall and F1 over all."""

Entity = tuple[str, str, bool]
"""Kind, value, and whether it is negated."""


def precision(rows: np.ndarray) -> float:
    """Give the share of what was said that is right; `rows` are [matched, predicted, wanted].

    Examples
    --------
    >>> import numpy as np
    >>> print(precision(np.array([[1, 2, 4], [1, 2, 4]])))
    0.5
    """
    return rows[:, 0].sum() / max(rows[:, 1].sum(), 1)


def recall(rows: np.ndarray) -> float:
    """Give the share of what was wanted that was said; `rows` are [matched, predicted, wanted].

    Examples
    --------
    >>> import numpy as np
    >>> print(recall(np.array([[1, 2, 4], [1, 2, 4]])))
    0.25
    """
    return rows[:, 0].sum() / max(rows[:, 2].sum(), 1)


def f1(rows: np.ndarray) -> float:
    """Give the harmonic mean of precision and recall; `rows` are [matched, predicted, wanted].

    Examples
    --------
    >>> import numpy as np
    >>> print(f1(np.array([[1, 1, 3], [1, 1, 3]])))
    0.5
    """
    return 2 * rows[:, 0].sum() / max(rows[:, 1:].sum(), 1)


RATIOS: dict[str, Callable[[np.ndarray], float]] = {
    "precision": precision,
    "recall": recall,
    "f1": f1,
}
"""Statistics of rows [matched, predicted, wanted], one a sample; 0 where there is nothing."""

for _ratio in RATIOS.values():
    _ratio.bounds = (0.0, 1.0)  # for `bootstrap_interval`


def finding_scores(
    predictions: Iterable[str],
    references: Iterable[str],
    *,
    per_sample: bool = False,
    columns: bool = False,
) -> dict[str, Any]:
    """Compare the entities that `medtune.captions` finds in answers and references.

    An entity is a kind, a value and whether it is negated, so that "no lesion" does not match "a
    lesion".

    Parameters
    ----------
    predictions, references : the answers and what they should be, one of each a sample.
    per_sample : give a list for each score instead, with one value a sample, NaN where nothing
        compares. The first three scores are then one, "entities", a list of [matched, predicted,
        wanted]; to compare two runs by it give `paired_bootstrap` the statistic `RATIOS["f1"]`.
    columns : give (rows, statistic) in place of each score, as `with_intervals` takes them.

    Returns
    -------
    dict : "precision", "recall", "f1" over the entities of `KINDS` (0 to 1). "structure_exact" and
        "place_exact": share of the references naming one where the answer names the same.
        "place_error" (steps on the 3x3 grid, 0 to 4) and "area_error" (percentage points), where
        both say one. None where nothing compares. "by_kind": precision, recall, f1 and support of
        each kind.

    Raises
    ------
    ValueError : lists of different length, empty lists, or an answer that is not a string.

    Examples
    --------
    >>> right = "The region of interest, located in the upper left of the image, shows the spleen."
    >>> wrong = right.replace("upper left", "lower left")
    >>> scores = finding_scores([wrong, right.replace("spleen", "liver")], [right, right])
    >>> scores["structure_exact"], scores["place_error"]
    (0.5, 1.0)
    """
    pairs = text_pairs(predictions, references)
    # Captions from a template come again and again: each is read once.
    texts = set(itertools.chain.from_iterable(pairs))
    entities_of = {text: entities(text) for text in texts}
    captions_of = {text: parse_caption(text) for text in texts}
    field_columns = _compare_fields(pairs, captions_of)
    counts = _count_entities(pairs, entities_of, KINDS)
    if per_sample:
        return {"entities": counts, **field_columns}

    scores: dict[str, Any] = {name: (counts, ratio) for name, ratio in RATIOS.items()}
    for name, values in field_columns.items():
        scores[name] = values, mean_of_known
    scores["by_kind"] = _score_kinds(pairs, entities_of)
    return scores if columns else values_of(scores)


def _compare_fields(
    pairs: list[tuple[str, str]], captions_of: dict[str, Caption]
) -> dict[str, list[float]]:
    """Compare structure, place and area, one value a sample, NaN where nothing compares."""
    values: dict[str, list[float]] = {
        "structure_exact": [],
        "place_exact": [],
        "place_error": [],
        "area_error": [],
    }
    for answer, reference in pairs:
        said = captions_of[answer]
        wanted = captions_of[reference]
        values["structure_exact"].append(_same(said.structure, wanted.structure))
        values["place_exact"].append(_same(said.place, wanted.place))
        values["place_error"].append(_grid_steps(said.place, wanted.place))
        values["area_error"].append(_area_difference(said, wanted))
    return values


def _same(said: str | None, wanted: str | None) -> float:
    # An answer that names none is wrong; a reference that names none asks for nothing.
    if wanted is None:
        return math.nan
    return float(said == wanted)


def _grid_steps(said: str | None, wanted: str | None) -> float:
    """Count the steps between two places of the 3x3 grid, along rows and columns."""
    if not said or not wanted:
        return math.nan
    # The places are listed row by row, three in each.
    said_row, said_column = divmod(PLACES.index(said), 3)
    wanted_row, wanted_column = divmod(PLACES.index(wanted), 3)
    return float(abs(said_row - wanted_row) + abs(said_column - wanted_column))


def _area_difference(said: Caption, wanted: Caption) -> float:
    """Give the difference of the two areas in percentage points."""
    if said.area_share is None or wanted.area_share is None:
        return math.nan
    return abs(100 * said.area_share - 100 * wanted.area_share)


def _count_entities(
    pairs: list[tuple[str, str]], entities_of: dict[str, set[Entity]], kinds: Iterable[str]
) -> list[list[int]]:
    """Count the entities of some kinds, as [matched, predicted, wanted] for each sample."""
    counts = []
    for answer, reference in pairs:
        said = {entity for entity in entities_of[answer] if entity[0] in kinds}
        wanted = {entity for entity in entities_of[reference] if entity[0] in kinds}
        counts.append([len(said & wanted), len(said), len(wanted)])
    return counts


def _score_kinds(
    pairs: list[tuple[str, str]], entities_of: dict[str, set[Entity]]
) -> dict[str, dict[str, float]]:
    """Give precision, recall, F1 and support of each kind that occurs at all."""
    found = set(itertools.chain.from_iterable(entities_of.values()))
    kinds = {kind for kind, _, _ in found}
    by_kind = {}
    for kind in sorted(kinds):
        counts = _count_entities(pairs, entities_of, [kind])
        scores = values_of({name: (counts, ratio) for name, ratio in RATIOS.items()})
        scores["support"] = sum(wanted for _, _, wanted in counts)
        by_kind[kind] = scores
    return by_kind
