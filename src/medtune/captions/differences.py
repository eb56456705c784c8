"""What a translation changed: numbers, sides, negations, and what the rules read in both languages.

Where two texts have as many sentences, they are compared sentence by sentence, because a slip in
one of them must not hide behind a like word in another. Else they are compared as a whole.

A difference is a reason to look, not a verdict: the rules know the words of `terms.toml`, and a
translation may use others. What they find nothing in, they compare nothing of; but every digit, every
word for a side and every word of negation counts, whatever it belongs to.
"""

import functools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .quantities import compare_numbers
from .rules import GENERIC, detect_language, entities, split_sentences

# The kinds of `entities` that are compared under a name of ours; sides and numbers are read here.
_KINDS = {
    "finding": "finding",
    "structure": "structure",
    "neighbour": "structure",
    "place": "place",
    "finding place": "place",
    "zone": "place",
    "modality": "modality",
    "density": "density",
    "change": "change",
    "device": "device",
}

# What says "no" for certain. A text with one of these, whose twin has nothing that can mean no, has
# lost its negation on the way.
_DENIES = {
    "en": re.compile(
        r"\bno(?! doubt\b)\b|\bnot\b|\bcannot\b|n't\b|\bwithout\b|\babsence of\b|\bneither\b|\bnor\b"
        r"|\bnegative for\b|\bnone\b|\bfree of\b|\black(?:s|ing)?\b|\bnever\b|\babsent\b"
        r"|\bruled? out\b|\bunremarkable\b|\bnormal\b"
    ),
    "zh": re.compile(
        r"未|没有|无(?![创名功损])|不伴|并非|不清|(?<!不能)(?<!待)排除|否认|缺如|阴性"
    ),
}
# What can mean "no", in one word or another: "unremarkable" is 未见异常.
_MAY_DENY = {
    "en": re.compile(
        _DENIES["en"].pattern + r"|\bun(?!i|der|it)\w+|\bnon|\b\w+less\b|\bill\b"
        r"|\bimm(?:ob|at|eas)\w+|\bin(?:complete|determin|distinct|conclus|visib|suffic|definit"
        r"|adequ|operab)\w*|\bnormal|\bclear|\bintact|\bstable|\bpreserved|\bnegative|\babsen"
        r"|\bfree\b|\bfail|\bresol|\bdisappear|\bexclu|\brather\b|\bloss\b|\bmissing|\bpoorly|\bblurr|\bobscur|\bfuzz"
        r"|\banechoic|\ba(?:sym|vasc|febr|typ)\w+"
    ),
    # not 不足 and 不到 ("less than"), 肺不张 ("atelectasis"), 不规则 ("irregular") and 不均匀
    # ("heterogeneous"): their English has no sign of a negation either
    "zh": re.compile(
        r"未|没|无(?!名)|不(?![足到张等均规整同])|非(?!常)|排除|否认|缺|阴性|消失|免|除外|正常|清晰"
    ),
}

_SIDES = {
    "en": {
        "left": re.compile(r"\bleft(?:ward|wards|most)?\b"),
        "right": re.compile(r"\bright(?:ward|wards|most)?\b(?! angle)"),
        "bilateral": re.compile(
            r"\bbilateral(?:ly)?\b|\bboth\b|\bbihilar\b|\bbibasilar\b|\bbibasal\b|\bbiapical\b"
        ),
    },
    "zh": {
        "left": re.compile("左(?!右)"),
        "right": re.compile("(?<!左)右"),
        "bilateral": re.compile(
            "[双两](?=[侧肺肾侧上下叶膈胸乳眼耳肩髋膝手足腿臂肋])|左右两?|两(?=个?肺)"
        ),
    },
}
# "2 cm or so": no side; nor has a diameter from left to right one
_ABOUT = re.compile("左右(?=径)|(?<=[0-9a-z米升度岁天周月年%％])左右")
# A plural of what a body has two of may be 双 in Chinese: "the lungs are clear", 双肺清晰
_TWO_OF_THEM = re.compile(
    r"\b(?:lungs|kidneys|adrenals|(?:adrenal )?glands|breasts|ovaries|eyes|hips|knees|hila|hemithoraces"
    r"|hemidiaphragms|diaphragms|pleurae|ureters|femurs|shoulders|lobes|lung (?:fields|bases|apices)"
    r"|costophrenic angles|hemispheres|ventricles|carotids|orbits|clavicles)\b"
)
# "both" sides in one language may be "left and right" in the other
_BOTH = frozenset({"left", "right"})


@dataclass(frozen=True)
class Difference:
    """What a translation changed of one kind.

    Attributes
    ----------
    kind : str
        "number", "side", "negation", "finding", "structure", "place", "modality", "density",
        "change" or "device".
    lost : tuple of str
        What only the source says, in the rules' English words.
    added : tuple of str
        What only the translation says.
    """

    kind: str
    lost: tuple[str, ...]
    added: tuple[str, ...]


KINDS = ("number", "side", "negation", *dict.fromkeys(_KINDS.values()))
"""All kinds of difference, the ones that count most first."""


def check_translation(source: str, translated: str) -> list[Difference]:
    """Find what a translation changed.

    Parameters
    ----------
    source : str
        A caption, English or Chinese.
    translated : str
        What it became in the other language.

    Returns
    -------
    list of Difference
        One for each kind that changed, the gravest kind first; empty if nothing did.

    Raises
    ------
    ValueError
        One of them is no string.

    Examples
    --------
    >>> check_translation("A 14 mm cyst in the left kidney.", "左肾可见1.4厘米囊肿。")
    []
    >>> for change in check_translation("No cyst in the left kidney.", "右肾可见囊肿。"):
    ...     print(change.kind, change.lost, change.added)
    side ('left',) ('right',)
    negation ('no cyst',) ('cyst',)
    structure ('left kidney',) ('right kidney',)
    """
    for text in (source, translated):
        if not isinstance(text, str):
            raise ValueError(f"a caption must be text, not {type(text).__name__}")
    lost: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    added: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for one, other in _aligned(source, translated):
        for kind, ours, theirs in _compare_words(one, other):
            lost[kind].update(ours)
            added[kind].update(theirs)
    _compare_entities(source, translated, lost, added)
    found = []
    for kind in KINDS:
        if lost[kind] or added[kind]:
            found.append(Difference(kind, tuple(lost[kind]), tuple(added[kind])))
    return found


def check_translations(
    sources: Sequence[str], translations: Sequence[str], *, examples: int = 3
) -> dict[str, Any]:
    """Count what translations changed, with examples.

    Parameters
    ----------
    sources, translations : sequence of str
        The captions, and what they became, in the same order.
    examples : int
        How many examples each kind has at most.

    Returns
    -------
    dict
        "captions"; "changed", how many of them have a difference; "share", that as a share; and
        "kinds", for each kind that occurs its "captions", "share" and "examples": the row, and what
        was "lost" and "added". The examples hold words of the rules and numbers, not the captions.

    Raises
    ------
    ValueError
        Not one translation for each caption.

    Examples
    --------
    >>> found = check_translations(["A cyst.", "No mass."], ["囊肿。", "肿块。"])
    >>> found["changed"], found["kinds"]["negation"]["examples"]
    (1, [{'row': 1, 'lost': ['no mass'], 'added': ['mass']}])
    """
    if len(sources) != len(translations):
        raise ValueError(
            f"{len(sources)} captions, {len(translations)} translations: give one of each"
        )
    kinds: dict[str, dict[str, Any]] = {}
    changed = 0
    # captions from a template come again and again
    known: dict[tuple[str, str], list[Difference]] = {}
    for row, pair in enumerate(zip(sources, translations, strict=True)):
        if pair not in known:
            known[pair] = check_translation(*pair)
        if known[pair]:
            changed += 1
        for difference in known[pair]:
            kind = kinds.setdefault(difference.kind, {"captions": 0, "share": 0.0, "examples": []})
            kind["captions"] += 1
            if len(kind["examples"]) < examples:
                words = {"lost": list(difference.lost), "added": list(difference.added)}
                kind["examples"].append({"row": row, **words})
    total = max(len(sources), 1)
    for kind in kinds.values():
        kind["share"] = kind["captions"] / total
    in_order = {kind: kinds[kind] for kind in KINDS if kind in kinds}
    return {
        "captions": len(sources),
        "changed": changed,
        "share": changed / total,
        "kinds": in_order,
    }


# ------------------------------------------------------------ sentence by sentence


def _sentences(text: str) -> list[str]:
    """Cut a text into sentences; what is only white space or a full stop is none."""
    return [sentence for sentence in split_sentences(text) if sentence.strip(" \n\t.。;；")]


def _aligned(source: str, translated: str) -> list[tuple[str, str]]:
    """Pair the sentences of two texts, if they have as many; else the texts."""
    ours = _sentences(source)
    theirs = _sentences(translated)
    if len(ours) == len(theirs):
        return list(zip(ours, theirs, strict=True))
    return [(source, translated)]


# captions from a template repeat their sentences
@functools.lru_cache(maxsize=8192)
def _compare_words(source: str, translated: str) -> list[tuple[str, list[str], list[str]]]:
    """Compare numbers, sides and negations of two sentences, or of two texts: kind, lost, added."""
    return [
        ("number", *compare_numbers(source, translated)),
        ("side", *_compare_sides(source, translated)),
        ("negation", *_compare_denials(source, translated)),
    ]


def _side_counts(text: str) -> Counter[str]:
    """Count the words for each side."""
    text = _ABOUT.sub("", text.lower())
    counts: Counter[str] = Counter()
    for language in ("en", "zh"):
        for side, words in _SIDES[language].items():
            counts[side] += len(words.findall(text))
    return +counts


def _compare_sides(source: str, translated: str) -> tuple[list[str], list[str]]:
    """Compare the sides that two texts name."""
    ours = _side_counts(source)
    theirs = _side_counts(translated)
    if ours == theirs:
        return [], []
    lost = set(ours) - set(theirs)
    added = set(theirs) - set(ours)
    # "left and right" may be 双侧
    both_became_one_word = lost == _BOTH and added <= {"bilateral"} and "bilateral" in theirs
    one_word_became_both = added == _BOTH and lost <= {"bilateral"} and "bilateral" in ours
    if both_became_one_word or one_word_became_both:
        return [], []
    if lost | added == {"bilateral"}:
        twin = source if added else translated
        if _TWO_OF_THEM.search(twin.lower()):
            return [], []
    if lost or added:
        return sorted(lost), sorted(added)
    # Both name the same sides. A sentence that says "left" once more than its twin may repeat a word;
    # one that says it once more and "right" once less has mixed them up.
    gone = ours - theirs
    come = theirs - ours
    if set(gone) & _BOTH and set(come) & _BOTH:
        return sorted(gone), sorted(come)
    return [], []


def _compare_denials(source: str, translated: str) -> tuple[list[str], list[str]]:
    """Find a negation that the other text does not have in any form."""
    ours = source.lower()
    theirs = translated.lower()
    if _denies(ours) and not _may_deny(theirs):
        return ["a negation"], []
    if _denies(theirs) and not _may_deny(ours):
        return [], ["a negation"]
    return [], []


def _denies(text: str) -> bool:
    return _DENIES[detect_language(text)].search(text) is not None


def _may_deny(text: str) -> bool:
    return _MAY_DENY[detect_language(text)].search(text) is not None


# ------------------------------------------------------------ what the rules read


def _compare_entities(
    source: str, translated: str, lost: dict[str, Counter[str]], added: dict[str, Counter[str]]
) -> None:
    """Compare what the rules read in the two texts."""
    ours = _named(source)
    theirs = _named(translated)
    for kind, value in ours.keys() - theirs.keys():
        lost[kind][value] += 1
    for kind, value in theirs.keys() - ours.keys():
        added[kind][value] += 1
    for kind, value in ours.keys() & theirs.keys():
        before = ours[kind, value]
        after = theirs[kind, value]
        if kind in ("finding", "device", "change") and before != after:
            lost["negation"].update(_with_no(value, before - after))
            added["negation"].update(_with_no(value, after - before))
    # the word alone is what a negation has without a finding that the rules know
    for words in (lost["negation"], added["negation"]):
        if len(words) > 1:
            del words["a negation"]


def _named(text: str) -> dict[tuple[str, str], set[bool]]:
    """Return what the rules read, by our kind and value, and whether it is said, denied or both."""
    named: dict[tuple[str, str], set[bool]] = {}
    for kind, value, negated in entities(_ABOUT.sub("", text)):
        generic = kind == "finding" and value in GENERIC
        if kind in _KINDS and not generic:
            named.setdefault((_KINDS[kind], value), set()).add(negated)
    # the left and the right one together are 双肾, a kidney without a side
    for kind, value in list(named):
        plain = value.removeprefix("left ")
        if kind == "structure" and value != plain and (kind, f"right {plain}") in named:
            denied = named.pop((kind, value)) | named.pop((kind, f"right {plain}"))
            named.setdefault((kind, plain), set()).update(denied)
    return named


def _with_no(value: str, polarities: Iterable[bool]) -> list[str]:
    return [f"no {value}" if negated else value for negated in polarities]
