"""Make a better and a worse answer of each of the model's own, with the truth at hand.

Both are the model's own words but for what is right in one and wrong in the other. So what DPO
learns from the pair is that difference, and not another style.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from medtune.captions import detect_language, entities, parse_caption, split_sentences

KINDS = ("own", "removed", "invented", "kind", "side")
"""What can be wrong in the worse answer; `preference_pairs` says what each means."""


@dataclass(frozen=True)
class Preference:
    """Two answers to one question, one of them better.

    Attributes
    ----------
    row : int
        The number of the answer that both were made of.
    chosen : str
        The better one: what it says about findings, or the side of the structure, is true.
    rejected : str
        The worse one.
    kind : str
        What is wrong with it, one of `KINDS`.
    """

    row: int
    chosen: str
    rejected: str
    kind: str


def preference_pairs(
    answers: Sequence[str],
    references: Sequence[str],
    *,
    kinds: Sequence[str] = KINDS,
    seed: int = 0,
) -> list[Preference]:
    """Make preference pairs of a model's answers and the true captions.

    The kinds of pair, by what is wrong in the rejected answer:

    - "own": it is the model's own answer, which says something else about findings than the
      reference does;
    - "removed": there is a finding, and it is denied in the words of another reference;
    - "invented": there is none, and one is reported in the words of another reference;
    - "kind": there is a finding, and another one is reported instead;
    - "side": the structure is named on the wrong side of the body.

    In the first four the chosen answer is the model's own, with what it says about findings
    replaced by the sentences of the reference where it differs. In "side" the chosen answer has the
    side of the reference. An answer that names another structure, or does so in Chinese, makes no
    pair of "side". A reference that is silent about findings makes none of the other kinds, unless
    the model invented one there. An answer that does not take up the reference's sentence, because
    it was cut off, makes none of them, either.

    A sentence that speaks of findings is exchanged whole, so write captions in which it says nothing
    else. The pairs cannot teach what the sentences do not say, such as whether the finding was seen;
    and sentences of other references may disagree with this picture in more than the finding.

    Parameters
    ----------
    answers : sequence of str
        What the model said, sampled or greedy.
    references : sequence of str
        The true captions, in the same order.
    kinds : sequence of str
        The kinds to make.
    seed : int
        Draws the sentences that are put in; the same seed gives the same pairs.

    Returns
    -------
    list of Preference
        In the order of the answers; none, one or several of each.

    Raises
    ------
    ValueError
        Not one reference for each answer, an unknown kind, or a text that is no string.

    Examples
    --------
    >>> cyst = "It shows the left kidney. Within it lies a cyst."
    >>> none = "It shows the liver. No focal lesion is seen."
    >>> for pair in preference_pairs([none.replace("liver", "left kidney"), none], [cyst, none]):
    ...     print(pair.row, pair.kind, "|", pair.chosen, "|", pair.rejected)
    0 own | It shows the left kidney. Within it lies a cyst. | It shows the left kidney. No focal lesion is seen.
    0 side | It shows the left kidney. No focal lesion is seen. | It shows the right kidney. No focal lesion is seen.
    1 invented | It shows the liver. No focal lesion is seen. | It shows the liver. Within it lies a cyst.
    """
    if len(answers) != len(references):
        raise ValueError(f"{len(answers)} answers, {len(references)} references: give one of each")
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise ValueError(f"kinds={unknown[0]!r}: use {', '.join(KINDS)}")
    words = _Words.of(references)
    draw = random.Random(seed)
    pairs = []
    for row, (answer, reference) in enumerate(zip(answers, references, strict=True)):
        made = _finding_pairs(answer, reference, words, draw)
        made |= _side_pair(answer, reference)
        seen = set()
        for kind, (chosen, rejected) in made.items():
            # "removed" may be the very thing that the model did
            if kind in kinds and chosen != rejected and rejected not in seen:
                seen.add(rejected)
                pairs.append(Preference(row, chosen, rejected, kind))
    return pairs


@dataclass
class _Words:
    """Sentences of the references, to put into answers."""

    denials: list[str]  # those that say that there is none
    reports: dict[frozenset[str], list[str]]  # what they report, and how

    @classmethod
    def of(cls, references: Sequence[str]) -> "_Words":
        words = cls([], {})
        for reference in references:
            sentences = _about_findings(reference)
            caption = parse_caption(reference)
            if caption.findings:
                reported = frozenset(caption.findings)
                words.reports.setdefault(reported, []).append(" ".join(sentences))
            elif sentences:
                words.denials.append(" ".join(sentences))
        return words


def _finding_pairs(
    answer: str, reference: str, words: _Words, draw: random.Random
) -> dict[str, tuple[str, str]]:
    """Make the pairs about findings: (chosen, rejected) by kind."""
    said = parse_caption(answer)
    truth = parse_caption(reference)
    if not (truth.findings or truth.negated or said.findings):
        return {}
    chosen = answer
    if _statement(answer) != _statement(reference):
        chosen = _with_findings(answer, _about_findings(reference))
        better = parse_caption(chosen)
        # An answer that was cut off runs into the sentence behind it: what denies there, denies here.
        if set(better.findings) != set(truth.findings) or (truth.negated and not better.negated):
            return {}
    pairs = {"own": (chosen, answer)}
    if truth.findings:
        there = frozenset(truth.findings)
        others = [reported for reported in words.reports if not reported & there]
        if words.denials:
            pairs["removed"] = (chosen, _with_findings(answer, [draw.choice(words.denials)]))
        if others:
            # sorted, for the order of a set of words changes from one Python to the next
            other = draw.choice(sorted(others, key=sorted))
            pairs["kind"] = (chosen, _with_findings(answer, [draw.choice(words.reports[other])]))
    elif truth.negated and words.reports:
        any_report = draw.choice(sorted(words.reports, key=sorted))
        report = draw.choice(words.reports[any_report])
        pairs["invented"] = (chosen, _with_findings(answer, [report]))
    return pairs


def _side_pair(answer: str, reference: str) -> dict[str, tuple[str, str]]:
    """Make the pair about the side of the structure, where it has one and the organ is right."""
    said = parse_caption(answer).structure or ""
    truth = parse_caption(reference).structure or ""
    side, _, organ = truth.partition(" ")
    mirrored = {"left": f"right {organ}", "right": f"left {organ}"}.get(side)
    if mirrored is None or said not in (truth, mirrored) or said not in answer:
        return {}
    chosen = answer.replace(said, truth)
    rejected = answer.replace(said, mirrored)
    # in a caption that names both sides this may have hit a neighbour, or changed what it is about
    if parse_caption(chosen).structure != truth or parse_caption(rejected).structure != mirrored:
        return {}
    return {"side": (chosen, rejected)}


def _statement(text: str) -> set[tuple[str, str, bool]]:
    """What a text says about findings, each with whether it is denied."""
    return {entity for entity in entities(text) if entity[0] == "finding"}


def _about_findings(text: str) -> list[str]:
    """The sentences that speak of findings."""
    return [sentence.strip() for sentence in split_sentences(text) if _statement(sentence)]


def _with_findings(answer: str, sentences: Sequence[str]) -> str:
    """Put sentences about findings in the place of an answer's own."""
    kept = [sentence.strip() for sentence in split_sentences(answer) if not _statement(sentence)]
    kept = [sentence for sentence in kept if re.search(r"\w", sentence)]
    between = "" if detect_language(answer) == "zh" else " "
    return between.join([*kept, *sentences])
