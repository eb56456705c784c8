"""Ask whether something is there: questions with yes or no, about what is and what is not.

The idea is POPE's (Li and others, *Evaluating Object Hallucination in Large Vision-Language
Models*, 2023). A model that says "yes" to whatever is usual is found out by questions about what is
usual and absent, and about what often stands beside what is there.
"""

import random
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from medtune.scores import bootstrap_interval

from .rules import judge_closed

ABSENT = ("random", "frequent", "neighbouring")
"""How the absent names are chosen, from easy to hard."""

QUESTION = "Does this picture show the {}? Answer yes or no."


@dataclass(frozen=True)
class ExistenceQuestion:
    """A question about one name in one picture.

    Parameters
    ----------
    sample : number of the sample, from 0.
    kind : "present", "random", "frequent" or "neighbouring".
    name : what is asked for.
    question : the text to ask.
    reference : "Yes." or "No."
    """

    sample: int
    kind: str
    name: str
    question: str
    reference: str

    @property
    def key(self) -> str:
        """An id that no other question of the same set has."""
        return f"{self.sample}-{self.kind}-{self.name.replace(' ', '_')}"


def existence_questions(
    present: Sequence[Collection[str]],
    *,
    together: Iterable[Collection[str]] | None = None,
    each: int = 1,
    question: str = QUESTION,
    seed: int = 0,
) -> list[ExistenceQuestion]:
    """Make questions about names that are present, and as many about each kind of absent ones.

    Absent names are those that some other sample has. A random one is drawn, the frequent one is
    that of most samples, and the neighbouring one stands most often together with what is present.

    Parameters
    ----------
    present : the names of each sample: the structures of a picture, or the one in a box. A name
        that is left out is taken for absent, so the sets should be complete.
    together : sets of names that stand together, such as a region and its neighbours; by default
        `present`. A box has one name: there, give those of the whole picture.
    each : questions of each kind for a sample, as far as there are names.
    question : what is asked, with {} for the name.
    seed : of what is drawn.

    Returns
    -------
    list of ExistenceQuestion : for each sample those about what is present, then for each kind of
        absent names as many.

    Raises
    ------
    ValueError : no samples, `each` below 1, or a question without {}.

    Examples
    --------
    >>> pictures = [{"liver", "spleen"}, {"liver", "heart"}, {"heart", "aorta"}]
    >>> for asked in existence_questions(pictures)[:4]:
    ...     print(asked.kind, asked.name, asked.reference)
    present spleen Yes.
    random heart No.
    frequent heart No.
    neighbouring heart No.
    """
    if not present:
        raise ValueError("present is empty: give the names of each sample")
    if each < 1:
        raise ValueError(f"each={each} must be at least 1")
    if "{}" not in question:
        raise ValueError("question must hold {}, where the name goes")
    frequency = Counter(name for names in present for name in set(names))
    beside = _counts_together(present if together is None else together)
    draw = random.Random(seed)
    asked = []
    for sample, names in enumerate(present):
        absent = sorted(set(frequency) - set(names))
        chosen = {
            "present": draw.sample(sorted(set(names)), min(each, len(set(names)))),
            "random": draw.sample(absent, min(each, len(absent))),
            "frequent": _most(absent, frequency)[:each],
            "neighbouring": _most(absent, _beside_any(names, beside))[:each],
        }
        count = len(chosen["present"])
        for kind, words in chosen.items():
            reference = "Yes." if kind == "present" else "No."
            for name in words[:count]:
                text = question.replace("{}", name)
                asked.append(ExistenceQuestion(sample, kind, name, text, reference))
    return asked


def _counts_together(sets: Iterable[Collection[str]]) -> dict[str, Counter]:
    """Count for each name how often every other one stands together with it."""
    beside: dict[str, Counter] = {}
    for names in sets:
        for name in names:
            others = [other for other in names if other != name]
            beside.setdefault(name, Counter()).update(others)
    return beside


def _beside_any(names: Collection[str], beside: dict[str, Counter]) -> Counter:
    counts: Counter = Counter()
    for name in names:
        counts.update(beside.get(name, Counter()))
    return counts


def _most(names: Sequence[str], counts: Counter) -> list[str]:
    """Sort the names that were counted at all, the most frequent first."""
    counted = [name for name in names if counts[name]]
    return sorted(counted, key=lambda name: (-counts[name], name))


def existence_scores(
    questions: Sequence[ExistenceQuestion],
    answers: Sequence[str],
    *,
    groups: Sequence[str] | None = None,
    slices: Sequence | None = None,
    language: str = "en",
) -> dict[str, dict[str, Any]]:
    """Score answers to questions of existence, for each kind of absent names.

    As POPE does, the questions about what is present are joined to those about each kind of absent
    names. An answer with neither yes nor no, or with both, is wrong and counts as unclear; POPE's
    own script takes whatever does not say "no" for a yes.

    Parameters
    ----------
    questions : what `existence_questions` gives.
    answers : one a question.
    groups, slices : patient or block, and slice, of each question; they give the accuracy an
        interval, as `bootstrap_interval` takes them.
    language : "en" or "zh", of the answers.

    Returns
    -------
    dict : by kind of absent names "accuracy", "precision", "recall" and "f1" of yes (0 where there
        is nothing), "yes" and "unclear", the shares of such answers, "questions", and "low" and
        "high" of the accuracy, None where there is none.

    Raises
    ------
    ValueError : not one answer a question.

    Examples
    --------
    >>> asked = existence_questions([{"liver"}, {"heart"}])
    >>> found = existence_scores(asked, ["Yes."] * len(asked))["random"]
    >>> found["accuracy"], found["recall"], found["yes"]
    (0.5, 1.0, 1.0)
    """
    if len(answers) != len(questions):
        raise ValueError(f"answers must hold {len(questions)}, one a question, not {len(answers)}")
    said = [_says(answer, language) for answer in answers]
    scores = {}
    for kind in ABSENT:
        rows = [row for row, asked in enumerate(questions) if asked.kind in ("present", kind)]
        if not any(questions[row].kind == kind for row in rows):
            continue
        wanted = [questions[row].kind == "present" for row in rows]
        own = [said[row] for row in rows]
        scores[kind] = _rates(own, wanted)
        right = [float(is_said is is_there) for is_said, is_there in zip(own, wanted, strict=True)]
        scores[kind] |= {"low": None, "high": None}
        if groups is not None:
            interval = bootstrap_interval(
                right,
                [groups[row] for row in rows],
                slices=None if slices is None else [slices[row] for row in rows],
            )
            scores[kind] |= {"low": interval["low"], "high": interval["high"]}
    return scores


def _says(answer: str, language: str) -> bool | None:
    """Say whether an answer means yes; None where it means neither, or both."""
    # the strict rule for closed questions: whole words, the one and not the other
    yes, no = ("是", "不是") if language == "zh" else ("yes", "no")
    if judge_closed(answer, yes, language)["accuracy"]:
        return True
    if judge_closed(answer, no, language)["accuracy"]:
        return False
    return None


def _rates(said: Sequence[bool | None], wanted: Sequence[bool]) -> dict[str, Any]:
    pairs = list(zip(said, wanted, strict=True))
    hits = sum(answer is True and there for answer, there in pairs)
    said_yes = sum(answer is True for answer in said)
    right = sum(answer is there for answer, there in pairs)
    present = sum(wanted)
    return {
        "accuracy": right / len(pairs),
        "precision": hits / max(said_yes, 1),
        "recall": hits / max(present, 1),
        "f1": 2 * hits / max(said_yes + present, 1),
        "yes": said_yes / len(pairs),
        "unclear": sum(answer is None for answer in said) / len(pairs),
        "questions": len(pairs),
    }
