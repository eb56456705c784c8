"""Judge answers to questions about slabs, an earlier picture or a record, whose truth is known."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from .intervals import mean_of_known, values_of
from .text import text_pairs

NUMBERS = {
    **{"no": 0, "none": 0, "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5},
    **{"six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "all": -1},
    **{"零": 0, "一": 1, "两": 2, "二": 2, "三": 3, "四": 4, "五": 5, "六": 6, "七": 7, "八": 8},
}
_NUMBER = r"\d+|" + "|".join(word for word in NUMBERS if word.isascii())
_NUMBER_ZH = r"\d+|[零一两二三四五六七八]"
_PICTURE = r"(?:pictures?|slices?|images?)"

# "3 of the 4 pictures", "none of the slices"
COUNT = re.compile(
    rf"\b({_NUMBER})\s+(?:out\s+)?of\s+(?:the\s+|these\s+)?(?:({_NUMBER})\s+)?{_PICTURE}"
)
COUNT_ZH = re.compile(rf"({_NUMBER_ZH})张(?:图片?|切片)?[中里]的?({_NUMBER_ZH})张")
# "largest in picture 2", "picture 2 shows it largest"
LARGEST = (
    re.compile(rf"\b(?:largest|biggest|widest)\b[^.\d]{{0,20}}{_PICTURE}\s+({_NUMBER})\b"),
    re.compile(rf"\b{_PICTURE}\s+({_NUMBER})\b[^.\d]{{0,20}}\b(?:largest|biggest|widest)\b"),
    re.compile(rf"图({_NUMBER_ZH})[^。\d]{{0,4}}最[大宽]"),
)
SIZES = {
    "tenth": r"\btenth\b|十分之一",
    "fifth": r"\bfifth\b|五分之一",
    "third": r"\bthird\b|三分之一",
    "half": r"\bhalf\b|一半|二分之一",
}
PRESENT = {
    True: r"^(?:yes\b|有|是)",
    False: r"^(?:no\b|没有|没|无|否|不)",
}
# "to the left", "from the middle right to the middle left part", "upwards"
DIRECTIONS = {
    "left": r"\bto the (?:middle )?left\b|\bleftwards?\b|[向往]左|移到左",
    "right": r"\bto the (?:middle )?right\b|\brightwards?\b|[向往]右|移到右",
    "up": r"\bup(?:wards?)?\b|\bto the upper\b|[向往]上|移到上",
    "down": r"\bdown(?:wards?)?\b|\bto the lower\b|[向往]下|移到下",
}
# "shifts to the left": what is real shifts, see `slab_scores`
SHIFTS = re.compile(r"\bshifts?\b|偏移")
HEIGHT = re.compile(r"(\d+(?:\.\d+)?)\s*(?:mm\b|millimet|毫米)")
RAISED = {
    True: r"\bcreatinine is (?:raised|high|elevated|above)\b|肌酐(?:升高|偏?高)",
    False: r"\bcreatinine is (?:normal|not raised|not elevated)\b|肌酐(?:正常|不高)",
}
CHANGES = {
    "grown": r"\b(?:grown|larger|bigger|increased)\b|变大|增大",
    "shrunk": r"\b(?:shrunk|shrunken|smaller|decreased)\b|变小|缩小",
    "same": r"\b(?:same|unchanged|stable|not changed|no change)\b|没有?变化|无变化|不变",
    "new": r"\b(?:new|appeared)\b|新的|新出现",
    "gone": r"\b(?:gone|disappeared|vanished)\b|不见|消失",
}
# "has not grown" says what it is not
DENIED = re.compile(
    r"\b(?:not|n't|neither|nor)\s+(?:yet\s+)?(?!changed)\w+|[没不](?:有|再)?[变增缩][大小]"
)
KNOWN = {
    True: r"\brecord (?:knows|tells|speaks) of (?:a|an|one)\b|病历里?有已知的?病灶",
    False: r"\brecord (?:knows|tells|speaks) of no\b|病历里?没有已知的?病灶",
}
SEEN = {
    True: r"\ba (?:\w+ ){0,2}lesion is (?:in|seen)\b|\bthere is a (?:\w+ ){0,2}lesion\b|里面[^。没]*有[^。]*病灶",
    False: r"\bthere is no (?:\w+ ){0,2}lesion\b|\bno lesion is (?:in|seen)\b|里面没有病灶",
}
# what a lesion may do that is in both pictures
GROWTH = ("grown", "shrunk", "same")


@dataclass(frozen=True)
class SlabAnswer:
    """What an answer says; None where it says nothing of it, or contradicts itself.

    Attributes
    ----------
    count : in how many pictures the lesion is.
    largest : in which it is largest, from 1.
    size : how wide it is there: "tenth", "fifth", "third" or "half" of the frame.
    present : whether the structure that was asked for is there.
    height : in mm.
    direction : "left", "right", "up" or "down".
    change : "grown", "shrunk", "same", "new" or "gone".
    known : whether the record knows of a lesion.
    raised : whether the creatinine is raised.
    seen : whether the pictures show one.
    """

    count: int | None = None
    largest: int | None = None
    size: str | None = None
    height: float | None = None
    present: bool | None = None
    direction: str | None = None
    change: str | None = None
    known: bool | None = None
    raised: bool | None = None
    seen: bool | None = None


def read_slab_answer(text: str) -> SlabAnswer:
    """Read what an answer says about slices, a change or a record, in English or Chinese.

    Parameters
    ----------
    text : the answer.

    Returns
    -------
    SlabAnswer : what it says. Of two statements that contradict each other neither counts.

    Examples
    --------
    >>> answer = read_slab_answer("In 3 of the 4 pictures. It is largest in picture 2.")
    >>> answer.count, answer.largest, answer.change
    (3, 2, None)
    >>> read_slab_answer("病灶变大了。").change
    'grown'
    """
    low = text.strip().lower()
    largest = set()
    for pattern in LARGEST:
        largest |= {_number(found) for found in pattern.findall(low)}
    return SlabAnswer(
        count=_only(_counts(low)),
        largest=_only(largest),
        size=_only(_said(SIZES, low)),
        height=_only({float(number) for number in HEIGHT.findall(low)}),
        present=_only(_said(PRESENT, low)),
        direction=_only(_said(DIRECTIONS, low)),
        change=_only(_said(CHANGES, DENIED.sub(" ", low))),
        known=_only(_said(KNOWN, low)),
        raised=_only(_said(RAISED, low)),
        seen=_only(_said(SEEN, low)),
    )


def _number(word: str) -> int:
    return int(word) if word.isdigit() else NUMBERS[word]


def _counts(text: str) -> set[int]:
    counts = set()
    for count, of in COUNT.findall(text):
        number = _number(count)
        if number < 0:
            # "all of the 4 pictures"; without a number nobody knows how many
            number = _number(of) if of else -1
        counts.add(number)
    counts |= {_number(count) for _, count in COUNT_ZH.findall(text)}
    return {count for count in counts if count >= 0}


def _said(patterns: dict, text: str) -> set:
    return {value for value, pattern in patterns.items() if re.search(pattern, text)}


def _only(values: set) -> Any:
    return next(iter(values)) if len(values) == 1 else None


def slab_scores(
    predictions: Iterable[str],
    references: Iterable[str],
    *,
    per_sample: bool = False,
    columns: bool = False,
) -> dict[str, Any]:
    """Score answers about slabs, changes and records part by part: each is right or not.

    A part counts where the reference says it. An answer that does not say it, or contradicts itself,
    is wrong; but where no answer of a set says it, the set is not scored: a model that was never
    taught the words is silent, and not wrong.

    Parameters
    ----------
    predictions, references : the answers and what they should be, one of each a sample.
    per_sample : give a list for each score instead, with one value a sample, NaN where it does not
        count.
    columns : give (rows, statistic) in place of each score, as `with_intervals` takes them.

    Returns
    -------
    dict : "count_right", "largest_right", "size_right", "height_right", "present_right",
        "direction_right", "change_right", "known_right", "raised_right" and "seen_right", the shares
        of right answers; also "count_within_one"; "shift_right", the direction where the reference
        says that something shifts, which "direction_right" then leaves out; and "growth_right", the
        share of the references with a lesion in both pictures where the answer tells whether it has
        grown, shrunk or is the same. All 0 to 1, None where nothing counts.

    Raises
    ------
    ValueError : lists of different length, empty lists, or an answer that is not a string.

    Examples
    --------
    >>> scores = slab_scores(["In 2 of the 4 pictures.", "Yes."], ["In 3 of the 4 pictures.", "No."])
    >>> scores["count_right"], scores["count_within_one"], scores["present_right"]
    (0.0, 1.0, 0.0)
    """
    pairs = text_pairs(predictions, references)
    said = [read_slab_answer(answer) for answer, _ in pairs]
    wanted = [read_slab_answer(reference) for _, reference in pairs]
    is_shift = [bool(SHIFTS.search(reference.lower())) for _, reference in pairs]
    samples = {}
    for part in fields(SlabAnswer):
        told = [getattr(answer, part.name) for answer in said]
        truth = [getattr(reference, part.name) for reference in wanted]
        if part.name == "direction":
            shifts = _only_where(is_shift, truth)
            samples["shift_right"] = _judged(told, shifts)
            truth = _only_where([not one for one in is_shift], truth)
        samples[f"{part.name}_right"] = _judged(told, truth)
        if part.name == "count":
            samples["count_within_one"] = _judged(told, truth, within=1)
        if part.name == "change":
            in_both = [value in GROWTH for value in truth]
            samples["growth_right"] = _judged(told, _only_where(in_both, truth))
    if per_sample:
        return samples
    entries = {name: (values, mean_of_known) for name, values in samples.items()}
    return entries if columns else values_of(entries)


def _only_where(kept: list[bool], truth: list) -> list:
    """Leave out the truth, None, of what is not kept."""
    return [value if keep else None for keep, value in zip(kept, truth, strict=True)]


def _judged(told: list, truth: list, within: int = 0) -> list[float]:
    if all(value is None for value in told):
        return [math.nan] * len(told)
    judged = []
    for value, wanted in zip(told, truth, strict=True):
        if wanted is None:
            judged.append(math.nan)
        elif value is None:
            judged.append(0.0)
        elif within:
            judged.append(float(abs(value - wanted) <= within))
        else:
            judged.append(float(value == wanted))
    return judged
