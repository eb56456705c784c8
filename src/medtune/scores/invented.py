"""Count what answers name that is not there, and what they leave out.

The measures are those of CHAIR (Rohrbach and others, *Object Hallucination in Image Captioning*,
2018), for structures and findings instead of cars and dogs: the share of answers with at least one
invented name, and the share of names that are invented.
"""

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medtune.captions import GENERIC, entities

from .intervals import check_lengths, mean_of_known, values_of
from .text import text_pairs


@dataclass(frozen=True)
class _Named:
    """What a text says is there."""

    structures: frozenset[str]
    findings: frozenset[str]


@dataclass(frozen=True)
class _Sample:
    """The names of one kind in one answer.

    Parameters
    ----------
    named : in the answer.
    wanted : in the reference.
    there : all that is known to be in the picture.
    """

    named: frozenset[str]
    wanted: frozenset[str]
    there: frozenset[str]

    @property
    def invented(self) -> frozenset[str]:
        """What is named and is not there; "a lesion" is there wherever any finding is."""
        if self.there:
            return self.named - self.there - set(GENERIC)
        return self.named

    @property
    def missed(self) -> frozenset[str]:
        """What the reference names and the answer does not."""
        return self.wanted - self.named


def share(rows: np.ndarray) -> float:
    """Give the share of what is counted; `rows` are [counted, all], NaN where there is nothing.

    Examples
    --------
    >>> import numpy as np
    >>> print(share(np.array([[1, 2], [0, 2]])))
    0.25
    """
    total = rows[:, 1].sum()
    return float(rows[:, 0].sum() / total) if total else math.nan


share.bounds = (0.0, 1.0)  # for `bootstrap_interval`


def invented_scores(
    predictions: Iterable[str],
    references: Iterable[str],
    *,
    present: Sequence[Collection[str]] | None = None,
    per_sample: bool = False,
    columns: bool = False,
) -> dict[str, Any]:
    """Count the structures and findings that answers invent, and those that they miss.

    Names are those of the caption rules, so synonyms are one and what is denied is not named. They
    are compared as a whole: "lung" is not "left lung". A structure is there if the reference names
    it, as the region or as its neighbour, or if `present` has it. A finding is there if the
    reference asserts it; "a lesion" is there if the reference asserts any.

    Parameters
    ----------
    predictions, references : the answers and what they should be, one of each a sample.
    present : for each sample the structures in its picture, as `named_in_pictures` gives them. A
        caption of one region does not name all of them, and what it leaves out is not invented.
    per_sample : give a list for each score instead, with one value a sample: a share of its own
        names, NaN where it has none.
    columns : give (rows, statistic) in place of each score, as `with_intervals` takes them.

    Returns
    -------
    dict : "invents_structure" and "invents_finding", the share of answers with at least one name of
        what is not there. "structures_invented" and "findings_invented", the share of names that
        are. "structures_missed" and "findings_missed", the share of the reference's names that the
        answer leaves out. "finding_of_nothing", the share of named findings where the reference has
        none at all: the others have a wrong name. All 0 to 1, None where nothing counts. "by_name":
        for each structure and finding how often it was "wanted", "named", "invented" and "missed",
        most often wanted first; left out with `per_sample`.

    Raises
    ------
    ValueError : lists of different length, empty lists, or an answer that is not a string.

    Examples
    --------
    >>> answers = ["It shows the liver. A cyst is seen.", "It shows the spleen."]
    >>> scores = invented_scores(answers, ["It shows the liver."] * 2)
    >>> scores["structures_invented"], scores["invents_finding"], scores["finding_of_nothing"]
    (0.5, 0.5, 1.0)
    >>> in_picture = [{"liver", "spleen"}] * 2
    >>> invented_scores(answers, ["It shows the liver."] * 2, present=in_picture)["structures_missed"]
    0.5
    """
    pairs = text_pairs(predictions, references)
    if present is None:
        present = [()] * len(pairs)
    check_lengths(answers=pairs, present=present)
    # captions from a template come again and again: each is read once
    named = {text: _names(text) for text in set(itertools.chain.from_iterable(pairs))}
    structures = []
    findings = []
    for (answer, reference), in_picture in zip(pairs, present, strict=True):
        said = named[answer]
        wanted = named[reference]
        there = wanted.structures | frozenset(in_picture)
        structures.append(_Sample(said.structures, wanted.structures, there))
        findings.append(_Sample(said.findings, wanted.findings, wanted.findings))

    rows = {
        "structures_invented": _counts(structures, _invented),
        "structures_missed": _counts(structures, _missed),
        "findings_invented": _counts(findings, _invented),
        "findings_missed": _counts(findings, _missed),
        "finding_of_nothing": _counts(findings, _of_nothing),
    }
    flags = {
        "invents_structure": [float(bool(sample.invented)) for sample in structures],
        "invents_finding": [float(bool(sample.invented)) for sample in findings],
    }
    if per_sample:
        return flags | {name: [share(np.array([row])) for row in own] for name, own in rows.items()}
    scores: dict[str, Any] = {name: (own, mean_of_known) for name, own in flags.items()}
    scores |= {name: (own, share) for name, own in rows.items()}
    scores["by_name"] = _by_name(structures, "structure") | _by_name(findings, "finding")
    return scores if columns else values_of(scores)


def named_in_pictures(captions: Iterable[str], pictures: Sequence) -> list[set[str]]:
    """Collect for each sample the structures that any caption of the same picture names.

    CHAIR joins all captions of a picture in the same way: together they name nearly all that is in
    it. What nobody named is still taken for absent.

    Parameters
    ----------
    captions : one a sample.
    pictures : which picture, or slice, each is about.

    Returns
    -------
    list of set of str : for each sample the structures and neighbours of its whole picture.

    Raises
    ------
    ValueError : not one picture a caption, or none at all.

    Examples
    --------
    >>> texts = ["It shows the liver.", "It shows the spleen.", "It shows the heart."]
    >>> [sorted(names) for names in named_in_pictures(texts, [7, 7, 8])]
    [['liver', 'spleen'], ['liver', 'spleen'], ['heart']]
    """
    captions = list(captions)
    check_lengths(captions=captions, pictures=pictures)
    in_picture: dict[Any, set[str]] = {}
    for caption, picture in zip(captions, pictures, strict=True):
        in_picture.setdefault(picture, set()).update(_names(caption).structures)
    return [set(in_picture[picture]) for picture in pictures]


def _names(text: str) -> _Named:
    structures = set()
    findings = set()
    for kind, value, negated in entities(text):
        if kind in ("structure", "neighbour") and not negated:
            structures.add(value)
        elif kind == "finding" and not negated:
            findings.add(value)
    return _Named(frozenset(structures), frozenset(findings))


def _counts(
    samples: Sequence[_Sample], count: Callable[[_Sample], tuple[int, int]]
) -> list[tuple[int, int]]:
    return [count(sample) for sample in samples]


def _invented(sample: _Sample) -> tuple[int, int]:
    return len(sample.invented), len(sample.named)


def _missed(sample: _Sample) -> tuple[int, int]:
    return len(sample.missed), len(sample.wanted)


def _of_nothing(sample: _Sample) -> tuple[int, int]:
    return 0 if sample.there else len(sample.named), len(sample.named)


def _by_name(samples: Sequence[_Sample], kind: str) -> dict[str, dict[str, Any]]:
    """Count each name of a kind, most often wanted first."""
    found: dict[str, dict[str, Any]] = {}
    for sample in samples:
        for name in sample.named | sample.wanted:
            row = found.setdefault(
                name, {"kind": kind, "wanted": 0, "named": 0, "invented": 0, "missed": 0}
            )
            row["wanted"] += name in sample.wanted
            row["named"] += name in sample.named
            row["invented"] += name in sample.invented
            row["missed"] += name in sample.missed
    order = sorted(found, key=lambda name: (-found[name]["wanted"], name))
    return {name: found[name] for name in order}
