"""Fields, entities, negation and language of medical captions, English and Chinese, by rules.

Needs no third-party package, only the table of words `terms.toml` in the same folder.

How a caption is read:

1. It is cut into sentences, and every sentence is put into one spelling and one order of words.
2. Patterns find places in the picture, shares of its area and sizes; the words of `terms.toml` find
   the rest. A word for a side ("left kidney", 左肾) goes with the word that follows.
3. Every sentence is cut into clauses, and a clause that says "no", "without", 未见 denies what it
   names behind that word; one that says "is not seen" denies what it names before.
4. What an advice names ("CT is recommended to exclude a tumor") has not been found and is dropped.

The patterns stand first, each with a comment that says what it matches; the functions follow.
"""

import functools
import itertools
import re
import tomllib
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

# kind -> name -> other words for it
TERMS: dict[str, dict[str, list[str]]] = tomllib.loads(
    Path(__file__).with_name("terms.toml").read_text("utf-8")
)

# The 3x3 grid of the picture, row by row; left is the left of the picture, not of the patient.
PLACES = (
    "upper left",
    "upper middle",
    "upper right",
    "middle left",
    "center",
    "middle right",
    "lower left",
    "lower middle",
    "lower right",
)

# Left out where another finding of the same polarity has a name of its own: "a cystic lesion".
GENERIC = ("lesion", "abnormality")

# One thing that a caption names: (kind, value, negated).
_Entity = tuple[str, str, bool]

# Words for one side of the patient; every other word for a side (both, 双) means "bilateral".
_SIDES = {"left": "left", "right": "right", "左": "left", "右": "right"}

# Characters; what is longer is cut, because some patterns look far ahead and would take too long.
_LONGEST_SENTENCE = 2000

# How far from a percentage the words are that say what it is a share of, in characters.
_BEFORE_AREA = 60
_AFTER_AREA = 40


# ------------------------------------------------------------ one spelling, one order of words

_HEIGHT = "(upper|middle|mid|lower)"
_SIDE = "(left|right|bilateral|both)"

# (what is written, what it becomes), applied in turn to a sentence in lower case, so that the terms
# stay short.
_REWRITE_RULES = [
    # a hyphen or dash inside a word: "ground-glass" -> "ground glass"
    (r"(?<=[a-z0-9])[-‐-―](?=[a-z0-9])", " "),
    # British spelling: haemorrhage, oedema, oesophagus, centre, tumour, neighbouring
    ("haem", "hem"),
    ("oe(?=dem|soph)", "e"),
    ("centre", "center"),
    ("(?:(?<=tum)|(?<=neighb))our", "or"),
    # any white space, line ends too, is one space
    (r"\s+", " "),
    # 低密度病灶, 低密度影 -> 低密度灶
    ("(?<=密度)(?:病灶|病变|影)", "灶"),
    # "left and right", "right and the left" -> "bilateral"
    (r"\b(?:left (?:and|or) (?:the )?right|right (?:and|or) (?:the )?left)\b", "bilateral"),
    # "upper left lobe" -> "left upper lobe"
    (rf"\b{_HEIGHT} {_SIDE} (?=lobe|zone|lung)", r"\2 \1 "),
    # "right middle and lower lobes" -> "right middle lobe and right lower lobe"
    (
        rf"\b((?:{_SIDE} )?){_HEIGHT} (?:and|to|or) {_HEIGHT} (lobe|zone|lung)s?",
        r"\1\3 \5 and \1\4 \5",
    ),
    # "upper lobe of the left lung" -> "left upper lobe"
    (rf"\b{_HEIGHT} (lobe|zone|field)s? of (?:the )?{_SIDE} lungs?", r"\3 \1 \2"),
    # "left lower zone", "left lower lung field" -> "left lung lower zone"
    (
        rf"\b{_SIDE} {_HEIGHT} (?:(?:lung|pulmonary) )?(?:zone|field|lung)s?\b(?! lobe)",
        r"\1 lung \2 zone",
    ),
    # 左上肺 -> 左肺上野, but not 左上肺叶 (a lobe) and not 左下肺炎 (a pneumonia)
    ("([左右双两]侧?)([上中下])肺(?![叶炎癌])", r"\1肺\2野"),
]
_REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in _REWRITE_RULES]


# ------------------------------------------------------------ where in the picture

# one word of a place
_WORD = r"(?:upper|lower|top|bottom|left|right|middle|mid|center|central|centrally)"
# what may stand between two words of one place: "in the left-center and slightly upper part"
_LINK = (
    r"(?:[ ,]+(?:and|to|in|at|on|the|horizontally|vertically|slightly|side|area|part|portion"
    r"|region))*[ ,]+"
)
# what may follow a place: "the upper left corner"
_PART = r" (?:part|portion|side|corner|area|region|section|third|half|aspect|edge)\b"
# a place "of the image" is one of the picture, not of the patient
_OF_IMAGE = (
    r" of (?:the|this) (?:\w+ ){0,2}?"
    r"(?:image|picture|frame|scan|slice|view|photo\w*|radiograph|x ray|brain)\b"
)
# the end of a place that does not say of what
_END_OF_PLACE = (
    r"(?= ?[.,;:)]| (?:and )?(?:is|which|that|it|occup|cover|show|exhibit|appear|contain)|\s*$)"
)
_ZH_ONE = "[左右上下中]"  # a place of one character
_ZH_PLACE = "左上|右上|左下|右下|左中|右中|上中|中上|下中|中下|中央|中心|中间|正中"

# (kind, pattern whose first group holds the words of the place); what one has found, the next ones
# do not see
_PLACE_RULES = [
    # "in its upper left part", "in its center": of the region, so it is the finding's place
    ("finding place", rf"\bin its ({_WORD}(?:{_LINK}{_WORD}){{0,3}})(?:{_PART}|(?<=center)\b)"),
    # 位于其左上部
    ("finding place", f"其({_ZH_PLACE}|{_ZH_ONE}(?=[部侧方]))"),
    # "the upper left part of the image"
    ("place", rf"\b({_WORD}(?:{_LINK}{_WORD}){{0,5}})(?:{_PART})?{_OF_IMAGE}"),
    # "at the upper left." with two words or more, "the center", "centrally"
    (
        "place",
        rf"\b({_WORD}(?:{_LINK}{_WORD}){{1,5}}|(?<=the )center|centrally)(?:{_PART})?"
        rf"{_END_OF_PLACE}",
    ),
    # 图像的左上部
    ("place", f"(?:图像?|图片|画面|影像|视野)的?({_ZH_PLACE}|{_ZH_ONE}(?=[部侧方角边]))"),
    # 位于左上
    ("place", f"[位处]于({_ZH_PLACE})"),
]
_PLACE_PATTERNS = [(kind, re.compile(pattern)) for kind, pattern in _PLACE_RULES]


# ------------------------------------------------------------ how large

# "4%", "less than 1 percent", 不足1%: (word for less, number)
_AREA = re.compile(
    r"(less than |under |below |不足|不到|小于|< ?)?(\d+(?:\.\d+)?) ?(?:%|percent|per cent)"
)
# what is said near a share of the picture, and not near "survival was 40%"
_ABOUT_AREA = re.compile("area|occup|account|cover|image|占|面积")
# "14 mm", "32 x 28 mm", 3.2cm×2.8cm: (number, second number, unit)
_SIZE = re.compile(
    r"(\d+(?:\.\d+)?)(?: ?[x×*] ?(\d+(?:\.\d+)?))? ?(mm|millimet|毫米|cm|centimet|厘米)"
)
_CENTIMETRES = ("cm", "centimet", "厘米")


# ------------------------------------------------------------ what lies beside, and which side

# A stretch whose structures are neighbours: "bordered by ..." to the end of the clause, 与...相邻
_BESIDE = re.compile(
    r"\b(?:bordered by|borders|adjacent to|next to|neighboring|abut(?:s|ting)|beside"
    r"|surrounded by)\b[^.;]{0,200}?(?=[.;]| and (?:is|has|it|shows)\b|, (?:which|and it)\b|$)"
    # "higher density than the surrounding brain tissue"
    r"|\bsurrounding .{1,14}"
    # 周围脑组织, but not 周围型 ("peripheral", a kind of tumour)
    r"|周围[^型].{0,3}"
    r"|与[^,。;]{1,60}?(?:相邻|毗邻|邻接)|(?:毗邻|紧邻|邻近)[^,。;]+"
)
# A word for a side that goes with no word of the table: "the left is larger"
_SIDE_ALONE = re.compile(r"\b(?:left|right|bilateral(?:ly)?|both)\b|[左右]|[双两]侧")


# ------------------------------------------------------------ what is denied

# What follows is denied, up to the end of the clause
_NO = re.compile(
    # not "no doubt" and "no longer"
    r"\b(?:no(?! doubt\b| longer\b)"
    # not "not only", "not necessarily", "cannot be excluded"
    r"|not(?! only\b| necessarily\b| (?:be )?(?:exclud|rul))"
    r"|without|absence of|absent|nor|negative for|free of|clear of|lack(?:s|ing)?|neither|never"
    r"|fail(?:s|ed)? to|rule[sd] out|rather than"
    r"|(?<!partial )resolution of)\b"
    # not 未分化 (undifferentiated), 未成熟 (immature), 未定 (undetermined), 未知 (unknown)
    r"|未(?!分化|成熟|定|知)|没有|不伴"
    # not 无法 (cannot), 无关 (unrelated), 无创 (non-invasive)
    r"|无(?![法关创])"
    # not 不能排除, 以排除, 待排除, 需排除 (cannot, in order to, yet to be excluded)
    r"|(?<![能法以待需未])排除"
)
# What stands before is denied: "is not seen", "is no longer visible", "has resolved", 缺如
_NOT_SEEN = re.compile(
    r"\b(?:is|are|was|were|been) (?:not|no longer) (?:\w+ ){0,2}?"
    r"(?:seen|visible|visuali[sz]ed|identified|detected|noted|present|evident|demonstrated"
    r"|observed|found)\b"
    r"|\b(?:is|are|was|were) (?:absent|ruled out|excluded|gone)\b"
    r"|\b(?:has|have) (?:\w+ )?(?:resolved|disappeared)\b"
    r"|(?:缺如|未显示|未见(?:显示)?|已?消失)(?=[,。;]|$)"
)
# Where a negation ends: a list goes on after a comma, a new statement does not
_CLAUSE_ENDS = re.compile(
    r"[.;:()!?。]"
    r"|,(?= ?[\u4e00-\u9fff]"
    r"|(?: and| but)? (?:the|there|it|its|this|these|that|with|which|where"
    r"|an? [a-z ]{1,40} (?:is|are|was|were))\b)"
    r"|\b(?:but|however|although|though|except|while|whereas|yet|despite|due to|because"
    r"|and the(?:re)?|which)\b"
    r"|但|然而|伴有|仅见|可见"
)
# Before a structure: "no mass in the left kidney" denies the mass and not the kidney
_WITHIN = re.compile(r"\b(?:in|of|within|at|on|to|from|over|near|around) (?:the |both )?$")
# how many characters before the structure it is looked for in
_WITHIN_LENGTH = 14
# Kinds that a negation denies; structures only where it names none of these
_DENIABLE = ("finding", "device", "density", "change", "side")


# ------------------------------------------------------------ what a sentence is about

# An advice: what should be done or looked for
_ADVICE = re.compile(
    r"\brecommend|\badvis(?:ed|able)\b|\bshould be\b|clinical correlation"
    r"|(?:further|additional) \w+ (?:is|are|may be) "
    r"(?:need|requir|necess|suggest|indicat|warrant)"
    r"|\bwarrants?\b|建议|推荐|请结合|必要时|需进一步|应进一步"
)
# How the region stands to its surroundings
_RELATION = re.compile(
    "related|relation|border|adjacent|next to|neighbo|abut|compress|displac|mass effect|pressure"
    "|invad|surround|extend|affect|due to|associat|secondary|caus|effac|obscur"
    "|关系|相邻|毗邻|邻近|压迫|推移|受压|侵犯|周围|累及|占位效应"
)
# The region of interest, or the frame that marks it
_REGION = re.compile(
    r"region of interest|\broi\b|\bframe|\bbox\b|inside it|感兴趣区|方框|绿框|框内", re.I
)
# The text under "Clinical Diagnosis Tips:" or 临床诊断提示：, to the next heading or an empty line
_TIPS = re.compile(
    r"(?:tips?|诊断提示)[*\s]*[:：](.+?)(?=\n\W*\w[^\n:：]{1,40}[:：]|\n\s*\n|\Z)", re.I | re.S
)
# Between two sentences; a full stop ends one only before a space, as in "3.2 cm. No mass."
_SENTENCE_ENDS = re.compile(r"(?<=[。！；;\n])|(?<=[.!?？])(?=\s)")


# ------------------------------------------------------------ the fields


@dataclass
class Caption:
    """The fields of one caption; None or an empty list where it does not say.

    Attributes
    ----------
    modality : str or None
        How the picture was taken, such as "CT".
    structure : str or None
        What the region of interest shows, such as "left kidney".
    finding : str or None
        The first of `findings`.
    findings : list of str
        Findings that the caption asserts, in its order.
    negated : list of str
        Findings that it says are absent.
    neighbours : list of str
        Structures that it says lie beside the region.
    level : str or None
        The part of the body, such as "upper abdomen".
    view : str or None
        The plane or the projection, such as "axial" or "PA".
    window : str or None
        The grey values that a CT is shown with, such as "soft tissue".
    side : str or None
        "left", "right" or "bilateral", the patient's.
    place : str or None
        Where in the picture the region lies, one of `PLACES`.
    area_share : float or None
        Share of the picture that the region covers, 0..1.
    density : str or None
        How bright the region is, such as "low density" or "hypoechoic".
    size_mm : float or None
        The first size that is given, in millimetres; the longer side of two.
    finding_place : str or None
        Where in the region the finding lies, one of `PLACES`.
    language : str or None
        "en" or "zh".
    relation : str or None
        The sentences on how the region stands to its surroundings.
    advice : str or None
        The sentences that advise something.
    target_diag : str or None
        The sentences that carry the diagnosis.
    """

    # pydantic reads this: an error about an LLM's answer must not repeat what the answer says
    __pydantic_config__ = {"hide_input_in_errors": True}

    modality: str | None
    structure: str | None
    finding: str | None
    findings: list[str] = field(default_factory=list)
    negated: list[str] = field(default_factory=list)
    neighbours: list[str] = field(default_factory=list)
    level: str | None = None
    view: str | None = None
    window: str | None = None
    side: str | None = None
    place: str | None = None
    area_share: float | None = None
    density: str | None = None
    size_mm: float | None = None
    finding_place: str | None = None
    language: str | None = None
    relation: str | None = None
    advice: str | None = None
    target_diag: str | None = None


# Kinds of which a caption has one: the first that it names fills the field of the same name.
_SINGLE_FIELDS = (
    "modality",
    "finding",
    "level",
    "view",
    "window",
    "place",
    "density",
    "finding_place",
)


def detect_language(text: str) -> str:
    """Tell Chinese from English by what there is more of.

    Parameters
    ----------
    text : str
        Any text.

    Returns
    -------
    str
        "zh" when Chinese characters outnumber Latin words, else "en", for an empty text too.

    Examples
    --------
    >>> detect_language("轴位CT图像"), detect_language("The spleen (脾脏)."), detect_language("")
    ('zh', 'en', 'en')
    """
    chinese_characters = re.findall("[\u3400-\u9fff\uf900-\ufaff]", text)
    latin_words = re.findall("[A-Za-z]+", text)
    return "zh" if len(chinese_characters) > len(latin_words) else "en"


def entities(text: str) -> set[_Entity]:
    """Find what a caption names, in the same English words for both languages.

    The kinds are modality, view, window, level, structure, neighbour, side (the patient's), zone
    (of the lung), place and finding place (of the 3x3 grid), area ("4%", "<1%"), size ("14 mm"),
    density, finding, change and device. "May be a mass" counts as a mass; what an advice names does
    not count.

    Parameters
    ----------
    text : str
        A caption, or any other string.

    Returns
    -------
    set of tuple
        (kind, value, negated); `negated` is True for what is said to be absent.

    Raises
    ------
    ValueError
        If the caption is no string.

    Examples
    --------
    >>> found = entities("No pleural effusion. A 2 cm cyst in the left kidney.")
    >>> for entity in sorted(found):
    ...     print(entity)
    ('finding', 'cyst', False)
    ('finding', 'pleural effusion', True)
    ('side', 'left', False)
    ('size', '20 mm', False)
    ('structure', 'left kidney', False)
    >>> found == entities("左肾可见一个2厘米的囊肿。无胸腔积液。")
    True
    """
    return set(_entities_in_order(_analyse(text)))


def parse_caption(text: str) -> Caption:
    """Read the fields of a caption by rules.

    The sentence about the region of interest names the structure, else one with a finding, else
    the first that names any. `target_diag` is the text under "Clinical Diagnosis Tips"
    (临床诊断提示), else the sentences that assert a finding, else those that deny one.

    Parameters
    ----------
    text : str
        A caption, or any other string.

    Returns
    -------
    Caption
        The fields; None or an empty list where the caption does not say.

    Raises
    ------
    ValueError
        If the caption is no string.

    Examples
    --------
    >>> caption = parse_caption(
    ...     "The region of interest, located in the upper left of the image, covers about 4% of "
    ...     "its area and shows the left kidney. No focal lesion is seen within it."
    ... )
    >>> caption.structure, caption.place, caption.area_share
    ('left kidney', 'upper left', 0.04)
    >>> caption.finding, caption.negated, caption.target_diag
    (None, ['lesion'], 'No focal lesion is seen within it.')
    """
    sentences = _analyse(text)
    named = _entities_in_order(sentences)
    language = detect_language(text)
    structure, beside_it = _structure_of(sentences)

    single = {}
    for name in _SINGLE_FIELDS:
        values = _values(named, name.replace("_", " "))
        single[name] = values[0] if values else None

    areas = _values(named, "area")
    sizes = _values(named, "size")
    return Caption(
        **single,
        structure=structure,
        findings=_values(named, "finding"),
        negated=_values(named, "finding", negated=True),
        neighbours=_values(named, "neighbour"),
        side=_side_of(structure, beside_it, named),
        area_share=float(areas[0].strip("<%")) / 100 if areas else None,
        size_mm=float(sizes[0].removesuffix(" mm")) if sizes else None,
        language=language,
        relation=_quote((s.text for s in sentences if _RELATION.search(s.text.lower())), language),
        advice=_quote((s.text for s in sentences if _ADVICE.search(s.text.lower())), language),
        target_diag=_diagnosis(text, sentences, named, language),
    )


def structure_spans(text: str) -> list[tuple[int, int]]:
    """Find the words of a caption that name the structure it is about.

    Those are the words of the table for the structure that `parse_caption` finds, wherever the
    caption has them but for its neighbours. Words in an order or a spelling that the rules put
    right first ("upper lobe of the left lung") are not found.

    Parameters
    ----------
    text : str
        A caption, or any other string.

    Returns
    -------
    list of (int, int)
        First character of each stretch, and the one behind it; empty where there is none.

    Raises
    ------
    ValueError
        If the caption is no string.

    Examples
    --------
    >>> text = "It shows the left kidney, adjacent to the spleen."
    >>> [text[first:behind] for first, behind in structure_spans(text)]
    ['left kidney']
    """
    structure = parse_caption(text).structure
    lower = text.lower()
    # some letters become two, and then no position is that of the text
    if structure is None or len(lower) != len(text):
        return []
    beside = [match.span() for match in _BESIDE.finditer(lower)]
    spans = []
    for match in _vocabulary().pattern.finditer(lower):
        mention = _mention_of(match)
        named = mention.kind == "structure" and mention.value == structure
        if named and not _is_within(match.start(), beside):
            spans.append(match.span())
    return spans


def split_sentences(text: str) -> list[str]:
    """Cut a text into its sentences, each with its full stop.

    Parameters
    ----------
    text : str
        English or Chinese.

    Returns
    -------
    list of str
        The sentences; together they are the text.

    Examples
    --------
    >>> split_sentences("A cyst of 3.2 cm. No mass.")
    ['A cyst of 3.2 cm.', ' No mass.']
    """
    return _SENTENCE_ENDS.split(text)


# ------------------------------------------------------------ from sentences to fields


@dataclass
class _Sentence:
    """A sentence of a caption, and what it names."""

    text: str  # as it is written, without white space around it
    named: tuple[_Entity, ...]  # in the order of the text, the sides last


@functools.lru_cache(maxsize=8192)
def _analyse_text(text: str) -> tuple[_Sentence, ...]:
    """Cut a caption into sentences and read each; the same caption is often asked for again."""
    sentences = []
    for sentence in split_sentences(text):
        for start in range(0, len(sentence), _LONGEST_SENTENCE):
            piece = sentence[start : start + _LONGEST_SENTENCE]
            sentences.append(_Sentence(piece.strip(), _read_sentence(piece)))
    return tuple(sentences)


def _analyse(text: str) -> tuple[_Sentence, ...]:
    """Check that a caption is text, and read its sentences."""
    # before the cache, which would answer a TypeError for what has no hash
    if not isinstance(text, str):
        raise ValueError(f"a caption must be text, not {type(text).__name__}")
    return _analyse_text(text)


def _entities_in_order(sentences: Iterable[_Sentence]) -> list[_Entity]:
    """List what all sentences name, without a generic finding beside one with a name of its own."""
    named = []
    for sentence in sentences:
        named += sentence.named

    polarities = set()  # those that have a finding with a name of its own
    for kind, value, negated in named:
        if kind == "finding" and value not in GENERIC:
            polarities.add(negated)

    kept = []
    for kind, value, negated in named:
        generic = kind == "finding" and value in GENERIC
        if not (generic and negated in polarities):
            kept.append((kind, value, negated))
    return kept


def _values(named: Iterable[_Entity], kind: str, negated: bool = False) -> list[str]:
    """List the different values of one kind and polarity, in the order of the text."""
    values = [value for k, value, n in named if k == kind and n == negated]
    return list(dict.fromkeys(values))


def _structure_of(sentences: Iterable[_Sentence]) -> tuple[str | None, tuple[_Entity, ...]]:
    """Find the structure that a caption is about, and all that the same sentence names."""

    def rank(sentence: _Sentence) -> tuple[bool, bool]:
        speaks_of_region = _REGION.search(sentence.text) is not None
        has_finding = bool(_values(sentence.named, "finding"))
        return not speaks_of_region, not has_finding

    for sentence in sorted(sentences, key=rank):
        structures = _values(sentence.named, "structure")
        if structures:
            return structures[0], sentence.named
    return None, ()


def _side_of(
    structure: str | None, beside_it: Iterable[_Entity], named: Iterable[_Entity]
) -> str | None:
    """Tell the patient's side: the structure's, else its sentence's; without one the caption's."""
    if structure and structure.startswith(("left ", "right ")):
        return structure.split()[0]
    sides = _values(beside_it if structure else named, "side")
    if not sides:
        return None
    return sides[0] if len(sides) == 1 else "bilateral"


def _diagnosis(
    text: str, sentences: Iterable[_Sentence], named: Iterable[_Entity], language: str
) -> str | None:
    """Find the words that carry the diagnosis: the tips, else the sentences with the findings."""
    tips = _TIPS.search(text)
    if tips:
        return tips[1].strip()
    findings = [entity for entity in named if entity[0] == "finding"]
    asserted = {entity for entity in findings if not entity[2]}
    wanted = asserted or set(findings)
    return _quote((s.text for s in sentences if not wanted.isdisjoint(s.named)), language)


def _quote(sentences: Iterable[str], language: str) -> str | None:
    """Join sentences as their language does; None where there are none."""
    joined = ("" if language == "zh" else " ").join(sentences)
    return joined or None


# ------------------------------------------------------------ from a sentence to what it names


@dataclass(slots=True)
class _Mention:
    """One thing that a sentence names, and where."""

    start: int  # character of the sentence in its one spelling
    kind: str
    value: str
    side: str | None = None  # the word for a side that goes with it, as it is written


# captions from a template repeat their sentences
@functools.lru_cache(maxsize=8192)
def _read_sentence(sentence: str) -> tuple[_Entity, ...]:
    """List what one sentence names, in the order of the text, and then the sides."""
    text = _normalise(sentence)
    places, text = _take_places(text)
    terms, rest = _take_terms(text)
    mentions = [*places, *_areas(text), *_sizes(text), *terms, *_lone_sides(rest)]
    mentions.sort(key=lambda mention: mention.start)

    denied = _denied_starts(mentions, text, rest)
    mentions = _without_advice(mentions, text)

    named = []
    sides = []
    for mention in mentions:
        negated = mention.start in denied
        # a lone word for a side has no value, only the side
        if mention.kind != "side":
            named.append((mention.kind, mention.value, negated))
        if mention.side:
            sides.append(("side", _SIDES.get(mention.side, "bilateral"), negated))
    return (*named, *sides)


def _normalise(text: str) -> str:
    """Put a text into one spelling and one order of words, in lower case."""
    # NFKC makes full-width signs narrow: the patterns know "," and "%" only, not "，" and "％"
    text = unicodedata.normalize("NFKC", text).lower()
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text.strip()


def _blank(text: str, match: re.Match[str]) -> str:
    """Put spaces where a pattern matched; every other character keeps its position."""
    return text[: match.start()] + " " * len(match[0]) + text[match.end() :]


def _take_places(text: str) -> tuple[list[_Mention], str]:
    """Find places in the picture; returns them, and the text with spaces in their stead.

    Their words must go: "upper left of the image" is not the left of the patient.
    """
    places = []
    for kind, pattern in _PLACE_PATTERNS:
        for match in list(pattern.finditer(text)):
            place = _place_of_words(match[1])
            if place:
                places.append(_Mention(match.start(), kind, place))
                text = _blank(text, match)
    return places, text


def _place_of_words(words: str) -> str | None:
    """Turn words such as "left center and upper middle" or 左上 into one of the nine places."""
    up = re.search("up|top|上", words)
    down = re.search("low|bottom|下", words)
    left = re.search("left|左", words)
    right = re.search("right|右", words)
    if (up and down) or (left and right):
        return None
    row = 0 if up else 2 if down else 1
    column = 0 if left else 2 if right else 1
    return PLACES[3 * row + column]


def _areas(text: str) -> Iterator[_Mention]:
    """Find shares of the picture's area, such as "4%" or "<1%"."""
    for match in _AREA.finditer(text):
        near = text[max(0, match.start() - _BEFORE_AREA) : match.end() + _AFTER_AREA]
        percent = float(match[2])
        if percent <= 100 and _ABOUT_AREA.search(near):
            less = "<" if match[1] else ""
            yield _Mention(match.start(), "area", f"{less}{percent:g}%")


def _sizes(text: str) -> Iterator[_Mention]:
    """Find sizes; of "32 x 28 mm" the longer side."""
    for match in _SIZE.finditer(text):
        longest = max(float(match[1]), float(match[2] or 0))
        millimetres = longest * (10 if match[3] in _CENTIMETRES else 1)
        yield _Mention(match.start(), "size", f"{millimetres:g} mm")


def _take_terms(text: str) -> tuple[list[_Mention], str]:
    """Find words of the table; returns them, and the text with spaces in their stead."""
    beside = [match.span() for match in _BESIDE.finditer(text)]
    terms = []
    rest = text
    for match in _vocabulary().pattern.finditer(text):
        rest = _blank(rest, match)
        mention = _mention_of(match)
        if mention.kind == "ignore":
            continue
        if mention.kind == "structure" and _is_within(mention.start, beside):
            mention.kind = "neighbour"
            # the side of a neighbour is not that of the region
            mention.side = None
        terms.append(mention)
    return terms, rest


def _mention_of(match: re.Match[str]) -> _Mention:
    """Say what a word of the table means, with the word for a side before it."""
    kind, value = _vocabulary().look_up(match["word"] or match["zh_word"])
    side = match["side"] or match["zh_side"]
    if kind == "paired":
        kind = "structure"
        if side in _SIDES:
            value = f"{_SIDES[side]} {value}"
    elif value.startswith(("left ", "right ")):
        # it has a side of its own: "left atrial appendage"
        side = value.split()[0]
    return _Mention(match.start(), kind, value.removesuffix(" window"), side)


def _is_within(position: int, stretches: Iterable[tuple[int, int]]) -> bool:
    """Tell whether a position lies in one of the stretches of a text."""
    return any(first <= position < end for first, end in stretches)


def _lone_sides(rest: str) -> Iterator[_Mention]:
    """Find words for a side that go with no word of the table."""
    for match in _SIDE_ALONE.finditer(rest):
        yield _Mention(match.start(), "side", "", match[0])


def _without_advice(mentions: list[_Mention], text: str) -> list[_Mention]:
    """Drop what an advice names: what should be looked for has not been found.

    An advice begins behind the last comma before its own words, or with the sentence.
    """
    advice = _ADVICE.search(text)
    if advice is None:
        return mentions
    last_comma = text.rfind(",", 0, advice.start())  # -1 where there is none
    return [mention for mention in mentions if mention.start <= last_comma]


# ------------------------------------------------------------ negation


def _denied_starts(mentions: list[_Mention], text: str, rest: str) -> set[int]:
    """Tell which mentions are denied, by where they start.

    `rest` is the text without the words of the table, some of which hold a "no" ("no change").
    """
    denied: set[int] = set()
    clause_ends = [match.start() for match in _CLAUSE_ENDS.finditer(rest)]
    for start, end in itertools.pairwise([0, *clause_ends, len(rest) + 1]):
        span = _denied_span(rest, start, end)
        if span is None:
            continue
        inside = [mention for mention in mentions if span[0] <= mention.start < span[1]]
        denied |= _denied_of(inside, text)
    return denied


def _denied_span(rest: str, start: int, end: int) -> tuple[int, int] | None:
    """Find the stretch that a clause denies: before "is not seen", else behind "no"."""
    not_seen = _NOT_SEEN.search(rest, start, end)
    if not_seen:
        return start, not_seen.start()
    no = _NO.search(rest, start, end)
    if no:
        return no.end(), end
    return None


def _denied_of(mentions: list[_Mention], text: str) -> set[int]:
    """Choose what a negation denies of the mentions in its reach: findings before structures."""
    # "no regression of the mass": the mass stays, only its change is denied
    if mentions and mentions[0].kind == "change":
        mentions = mentions[:1]
    denied = {mention.start for mention in mentions if mention.kind in _DENIABLE}
    if denied:
        return denied
    for mention in mentions:
        before = text[max(0, mention.start - _WITHIN_LENGTH) : mention.start]
        if mention.kind == "structure" and not _WITHIN.search(before):
            denied.add(mention.start)
    return denied


# ------------------------------------------------------------ the words of the table


@dataclass
class _Vocabulary:
    """All words of `TERMS`, ready to be found in a text."""

    pattern: re.Pattern[str]  # groups side and word, or zh_side and zh_word
    whole: dict[str, tuple[str, str]]  # word -> (kind, name)
    stems: dict[str, tuple[str, str]]  # the same for "hemorrhag*", without the star

    def look_up(self, word: str) -> tuple[str, str]:
        """Return kind and name of a word that the pattern found."""
        if word in self.whole:
            return self.whole[word]
        # long stems come first
        stem = next(stem for stem in self.stems if word.startswith(stem))
        return self.stems[stem]


@functools.cache
def _vocabulary() -> _Vocabulary:
    """Build the pattern of all words, once."""
    meanings = {}
    for kind, names in TERMS.items():
        for name, others in names.items():
            for word in [name, *others]:
                meanings[_normalise(word)] = (kind, name)
    # `re` takes the first alternative that fits, so the longest word must come first
    words = sorted(meanings, key=lambda word: (word[0], -len(word)))
    latin = [word for word in words if word.isascii()]
    chinese = [word for word in words if not word.isascii()]
    pattern = re.compile(
        r"(?<![a-z0-9])(?:(?P<side>left|right|bilateral|both)(?: sided)? (?:the )?)?"
        rf"(?P<word>{_any_of(latin)})(?:e?s)?(?![a-z0-9])"
        rf"|(?:(?P<zh_side>[左右双两])侧?的?)?(?P<zh_word>{_any_of(chinese)})"
    )
    return _Vocabulary(
        pattern=pattern,
        whole={word: meanings[word] for word in words if not word.endswith("*")},
        stems={word[:-1]: meanings[word] for word in words if word.endswith("*")},
    )


def _any_of(words: list[str]) -> str:
    """Write a pattern for any of the words, sorted by their first letter.

    They are grouped by it, because `re` tries alternatives in turn and there are hundreds of words.
    """
    groups = []
    for first, members in itertools.groupby(words, key=lambda word: word[0]):
        endings = [re.escape(word[1:]).replace(r"\*", "[a-z]*") for word in members]
        groups.append(f"{first}(?:{'|'.join(endings)})")
    return "|".join(groups)
