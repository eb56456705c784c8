"""Judge answers that list all findings of a picture: which are right, missed, or invented.

A finding is what the caption rules read, under one name for all its synonyms and in both languages,
so that a Chinese list can be compared with an English report. What an answer denies is not listed.
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from medtune.captions import entities

from .findings import RATIOS
from .intervals import mean_of_known, values_of
from .text import text_pairs

LISTING_QUESTIONS = (
    "List every abnormal finding in this image with its position, one on each line. If there is"
    " none, answer: No abnormal finding.",
    "Find all lesions in this image, then give a differential diagnosis under the heading"
    " Differential diagnosis.",
    "请逐行列出这张图像中的所有异常发现及其位置。如果没有，请回答：未见异常。",
    "请找出这张图像中的所有病灶，然后在“鉴别诊断”标题下给出鉴别诊断。",
)
"""Questions that ask for all findings, two in English and two in Chinese."""

# A line such as "Pleural effusion: absent", as models like to write lists; the rules read sentences.
_ABSENT = re.compile(
    r"^[ \t\-*•·\d.、)]*+([^:：\n]{2,60})[:：]\s*(?:absent|none|no|negative|not (?:seen|present|found|visible)"
    r"|无|未见|没有|否|阴性)[ \t.。]*+$",
    re.I | re.M,
)
_PRESENT = re.compile(
    r"^[ \t\-*•·\d.、)]*+([^:：\n]{2,60})[:：]\s*(?:present|yes|positive|seen|有|可见|是|阳性)[ \t.。]*+$",
    re.I | re.M,
)
# What could be is no finding: it stands behind its heading, to an empty line or the next heading.
_DIFFERENTIAL = re.compile(
    r"(?:\bdifferential(?: diagnos[ie]s)?(?: considerations?)?|\bddx|鉴别诊断)[*\s]{0,10}"
    r"(?:[:：\n]|(?:may )?includes?\b|is\b|are\b|包括|考虑)"
    r"(.+?)(?=\n[ \t]*+\n|\n\W{0,10}\w[^\n:：]{1,40}[:：]|\Z)",
    re.I | re.S,
)


@dataclass(frozen=True)
class Listing:
    """What a text lists.

    Attributes
    ----------
    findings : asserted findings, by the rules' names.
    denied : findings that are said to be absent, and nowhere asserted.
    differential : what stands under "differential diagnosis".
    """

    findings: frozenset[str]
    denied: frozenset[str]
    differential: frozenset[str]


def read_listing(text: str) -> Listing:
    """Read the findings that an answer or a report lists.

    Parameters
    ----------
    text : sentences or a list, English or Chinese.

    Returns
    -------
    Listing : its findings, what it denies, and its differential diagnosis.

    Raises
    ------
    ValueError : it is no string.

    Examples
    --------
    >>> listing = read_listing(
    ...     "- Nodule in the left lung\\n- Pleural effusion: absent\\n"
    ...     "Differential diagnosis: metastasis or tuberculosis."
    ... )
    >>> sorted(listing.findings), sorted(listing.denied), sorted(listing.differential)
    (['nodule'], ['pleural effusion'], ['metastasis', 'tuberculosis'])
    """
    if not isinstance(text, str):
        raise ValueError(f"an answer must be text, not {type(text).__name__}")
    differential: set[str] = set()
    for section in _DIFFERENTIAL.finditer(text):
        asserted, _ = _findings(section[1])
        differential |= asserted
    # an empty line, so that what stands before and behind does not become one sentence
    rest = _DIFFERENTIAL.sub("\n\n", text)
    rest = _ABSENT.sub(r"\n no \1.\n", rest)
    rest = _PRESENT.sub(r"\n \1.\n", rest)
    asserted, denied = _findings(rest)
    return Listing(frozenset(asserted), frozenset(denied - asserted), frozenset(differential))


def _findings(text: str) -> tuple[set[str], set[str]]:
    """Return the findings that a text asserts, and those that it denies."""
    asserted = set()
    denied = set()
    for kind, value, negated in entities(text):
        if kind != "finding":
            continue
        if negated:
            denied.add(value)
        else:
            asserted.add(value)
    return asserted, denied


def listing_scores(
    predictions: Iterable[str],
    references: Iterable[str],
    *,
    per_sample: bool = False,
    columns: bool = False,
) -> dict[str, Any]:
    """Compare the findings that answers list with those of references, as sets.

    A finding that the reference does not assert is invented, whether it denies it or is silent; one
    that the answer does not assert is missed. A picture without findings, of which the answer lists
    none, is right.

    Parameters
    ----------
    predictions, references : the answers and what they should be, one of each a sample.
    per_sample : give a list for each score instead, with one value a sample, NaN where nothing
        compares. The first three scores are then one, "findings", a list of [matched, predicted,
        wanted]; to compare two runs by it give `paired_bootstrap` the statistic `RATIOS["f1"]`.
    columns : give (rows, statistic) in place of each score, as `with_intervals` takes them.

    Returns
    -------
    dict : "precision", "recall" and "f1" over all findings (0 to 1); "picture_f1", the mean of F1
        over pictures, 1 where there is nothing to list and nothing is listed; "all_right", the share
        of pictures of which all is listed and nothing else; "invented_per_picture" and
        "missed_per_picture"; "differential_recall", the share of the reference's differential
        diagnoses that the answer's differential or findings name, where it has some. Then, by name
        of the finding, most frequent first: "by_finding", with precision, recall, f1, "support" in
        the references and "listed" in the answers; how often it was "invented", "missed", and
        "contradicted", said in one text and denied in the other. With `per_sample` these three are
        a list of names for each sample, and "by_finding" is left out.

    Raises
    ------
    ValueError : lists of different length, empty lists, or an answer that is not a string.

    Examples
    --------
    >>> answers = ["1. Pleural effusion. 2. A mass.", "未见异常。"]
    >>> scores = listing_scores(answers, ["右侧胸腔积液。未见肿块。", "No abnormality."])
    >>> scores["precision"], scores["recall"], scores["invented"], scores["contradicted"]
    (0.5, 1.0, {'mass': 1}, {'mass': 1})
    """
    pairs = text_pairs(predictions, references)
    texts = set(itertools.chain.from_iterable(pairs))
    # captions from a template come again and again: each is read once
    listings = {text: read_listing(text) for text in texts}
    samples = [(listings[answer], listings[reference]) for answer, reference in pairs]

    counts = [_count(said.findings, wanted.findings) for said, wanted in samples]
    names = {
        "invented": [sorted(said.findings - wanted.findings) for said, wanted in samples],
        "missed": [sorted(wanted.findings - said.findings) for said, wanted in samples],
        "contradicted": [_contradicted(said, wanted) for said, wanted in samples],
    }
    values = {
        "picture_f1": [_picture_f1(row) for row in counts],
        "all_right": [float(said.findings == wanted.findings) for said, wanted in samples],
        "invented_per_picture": [float(len(found)) for found in names["invented"]],
        "missed_per_picture": [float(len(found)) for found in names["missed"]],
        "differential_recall": [_differential_recall(said, wanted) for said, wanted in samples],
    }
    if per_sample:
        return {"findings": counts, **values, **names}

    scores: dict[str, Any] = {name: (counts, ratio) for name, ratio in RATIOS.items()}
    for name, column in values.items():
        scores[name] = column, mean_of_known
    scores["by_finding"] = _score_findings(samples)
    for name, found in names.items():
        scores[name] = dict(_by_frequency(itertools.chain.from_iterable(found)))
    return scores if columns else values_of(scores)


def _count(said: frozenset[str], wanted: frozenset[str]) -> list[int]:
    """Count [matched, predicted, wanted]."""
    return [len(said & wanted), len(said), len(wanted)]


def _picture_f1(row: Sequence[int]) -> float:
    matched, predicted, wanted = row
    if predicted + wanted == 0:
        return 1.0
    return 2 * matched / (predicted + wanted)


def _contradicted(said: Listing, wanted: Listing) -> list[str]:
    return sorted((said.findings & wanted.denied) | (said.denied & wanted.findings))


def _differential_recall(said: Listing, wanted: Listing) -> float:
    if not wanted.differential:
        return math.nan
    named = wanted.differential & (said.differential | said.findings)
    return len(named) / len(wanted.differential)


def _by_frequency(names: Iterable[str]) -> list[tuple[str, int]]:
    """Count names, the most frequent first, and in the order of the alphabet where as frequent."""
    return sorted(Counter(names).items(), key=lambda entry: (-entry[1], entry[0]))


def _score_findings(samples: Sequence[tuple[Listing, Listing]]) -> dict[str, dict[str, float]]:
    """Give precision, recall, F1, support and number of times listed of each finding that occurs."""
    rows: dict[str, list[int]] = {}
    for said, wanted in samples:
        for name in said.findings | wanted.findings:
            row = rows.setdefault(name, [0, 0, 0])
            row[0] += name in said.findings and name in wanted.findings
            row[1] += name in said.findings
            row[2] += name in wanted.findings
    by_finding = {}
    for name in sorted(rows, key=lambda name: (-rows[name][2], name)):
        scores = values_of({ratio: ([rows[name]], function) for ratio, function in RATIOS.items()})
        _, listed, support = rows[name]
        by_finding[name] = {**scores, "support": support, "listed": listed}
    return by_finding
