"""Score the answers to a benchmark: closed and open questions, choices and reports apart."""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from medtune.scores import bootstrap_interval, standard_scores, with_intervals

from .rules import judge_choice, judge_closed, normal_form, token_scores

# Kind -> rule's key -> what the table calls it.
NAMES = {
    "closed": {
        "accuracy": "closed: accuracy, whole words",
        "published": "closed: accuracy, LLaVA-Med's rule",
    },
    "open": {
        "recall": "open: recall of words",
        "f1": "open: F1 of words",
        "exact": "open: exactly right",
    },
    "choice": {
        "accuracy": "choice: accuracy, whole words",
        "published": "choice: accuracy, OmniMedVQA's rule",
    },
}
_REPORT_SCORES = {"bleu": "report: BLEU-4", "rougeL": "report: ROUGE-L", "chrf": "report: chrF"}


def score_benchmark(
    answers: Sequence[Mapping[str, Any]], facts: Sequence[Mapping[str, Any]], *, seed: int = 0
) -> dict[str, Any]:
    """Score answers by the rules of their kind of question, each with its interval.

    Questions about one picture or case are drawn together, as they are right and wrong together.

    Parameters
    ----------
    answers : "answer" and "reference" of each question, as `generate_answers` gives them.
    facts : what `load_benchmark` says of each: "kind", "language", "options", "category", "group".
    seed : of the resamples.

    Returns
    -------
    dict : "questions" (how many of each kind), "groups" (pictures or cases), "scores" (by name what
        `bootstrap_interval` returns, in percent), "controls" (percent, what needs no picture: the
        most frequent answer to all closed questions, and chance among options) and "categories" (by
        the benchmark's own word for the kind of question: "questions" and "value", percent, by the
        first score of each kind).

    Raises
    ------
    ValueError : no answers, or not one for each question.

    Examples
    --------
    >>> answers = [{"answer": "yes", "reference": "Yes"}, {"answer": "a lung", "reference": "lung"}]
    >>> shared = {"language": "en", "options": [], "category": "", "group": "a"}
    >>> facts = [{"kind": "closed", **shared}, {"kind": "open", **shared}]
    >>> found = score_benchmark(answers, facts)
    >>> found["scores"]["open: exactly right"]["value"], found["questions"]
    (100.0, {'closed': 1, 'open': 1})
    """
    if not answers or len(answers) != len(facts):
        raise ValueError(f"{len(answers)} answers to {len(facts)} questions: give one of each")
    kinds = Counter(fact["kind"] for fact in facts)
    scores: dict[str, dict[str, Any]] = {}
    controls = {}
    values = defaultdict(list)
    for kind in ("closed", "open", "choice"):
        numbers = [number for number, fact in enumerate(facts) if fact["kind"] == kind]
        if not numbers:
            continue
        judged = [_judge(answers[number], facts[number]) for number in numbers]
        groups = [str(facts[number]["group"]) for number in numbers]
        for key, name in NAMES[kind].items():
            found = bootstrap_interval([one[key] for one in judged], groups, seed=seed)
            scores[name] = _in_percent(found)
        first = next(iter(NAMES[kind]))
        for number, one in zip(numbers, judged, strict=True):
            values[facts[number]["category"]].append(one[first])
        controls |= _controls(kind, answers, facts, numbers)
    if kinds["report"]:
        scores |= _report_scores(answers, facts)
    return {
        "questions": dict(sorted(kinds.items())),
        "groups": len({fact["group"] for fact in facts}),
        "scores": scores,
        "controls": controls,
        "categories": _categories(values),
    }


def _judge(answer: Mapping[str, Any], fact: Mapping[str, Any]) -> dict[str, float]:
    said = answer["answer"]
    reference = answer["reference"]
    if fact["kind"] == "closed":
        return judge_closed(said, reference, fact["language"])
    if fact["kind"] == "choice":
        return judge_choice(said, reference, fact["options"])
    return token_scores(said, reference, fact["language"])


def _controls(
    kind: str, answers: Sequence[Mapping], facts: Sequence[Mapping], numbers: Sequence[int]
) -> dict[str, float]:
    """Give what is reached without any picture."""
    if kind == "closed":
        references = Counter(normal_form(answers[number]["reference"]) for number in numbers)
        word, _ = references.most_common(1)[0]
        # judged like any answer: in Chinese it is right about all words for no
        right = []
        for number in numbers:
            same = {"answer": word, "reference": answers[number]["reference"]}
            right.append(_judge(same, facts[number])["accuracy"])
        return {f"closed: always {word!r}": 100 * math.fsum(right) / len(right)}
    if kind == "choice":
        chance = sum(1 / len(facts[number]["options"]) for number in numbers)
        return {"choice: by chance": 100 * chance / len(numbers)}
    return {}


def _in_percent(found: Mapping[str, Any]) -> dict[str, Any]:
    percent = dict(found)
    for key in ("value", "low", "high", "error"):
        if percent[key] is not None:
            percent[key] = 100 * percent[key]
    return percent


def _report_scores(
    answers: Sequence[Mapping[str, Any]], facts: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Score reports in small letters, as papers on IU X-Ray do."""
    numbers = [number for number, fact in enumerate(facts) if fact["kind"] == "report"]
    said = [answers[number]["answer"].lower() for number in numbers]
    wanted = [answers[number]["reference"].lower() for number in numbers]
    groups = [str(facts[number]["group"]) for number in numbers]
    found = with_intervals(standard_scores, said, wanted, groups=groups)
    return {name: found["intervals"][key] for key, name in _REPORT_SCORES.items()}


def _categories(values: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    """Average by the benchmark's own kinds of question, the largest first."""
    found = {}
    for name in sorted(values, key=lambda name: (-len(values[name]), name)):
        if name:
            mean = math.fsum(values[name]) / len(values[name])
            found[name] = {"questions": len(values[name]), "value": 100 * mean}
    return found
