"""Fields, entities, negation and language of medical captions, English and Chinese; a local LLM only when asked.

Rules come first: `TERMS` lists the words that are known. `extract_with_llm` and `translate` ask an OpenAI-compatible
endpoint such as Ollama's, and only one that the caller names.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
import tempfile
import tomllib
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

# kind -> "name: other words for it; ...": the words are data and stand in captions.toml, beside this file.
TERMS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
PLACES = ("upper left", "upper middle", "upper right", "middle left", "center", "middle right",
          "lower left", "lower middle", "lower right")  # fmt: skip
GENERIC = ("lesion", "abnormality")  # left out where a finding of the same polarity has a name of its own
_SIDES = {"left": "left", "right": "right", "左": "left", "右": "right"}  # every other word for a side: bilateral

# One spelling and one order of words, applied in turn to a sentence in lower case, so that the terms stay short.
_V, _S = "(upper|middle|mid|lower)", "(left|right|bilateral|both)"
_REWRITES = [(re.compile(old), new) for old, new in (
    (r"(?<=[a-z0-9])[-‐-―](?=[a-z0-9])", " "), ("haem", "hem"), ("oe(?=dem|soph)", "e"), ("centre", "center"),
    ("(?:(?<=tum)|(?<=neighb))our", "or"), (r"\s+", " "), ("(?<=密度)(?:病灶|病变|影)", "灶"),
    (r"\b(?:left (?:and|or) right|right (?:and|or) left)\b", "bilateral"),
    (rf"\b{_V} {_S} (?=lobe|zone|lung)", r"\2 \1 "),
    (rf"\b((?:{_S} )?){_V} (?:and|to|or) {_V} (lobe|zone|lung)s?", r"\1\3 \5 and \1\4 \5"),
    (rf"\b{_V} (lobe|zone|field)s? of (?:the )?{_S} lungs?", r"\3 \1 \2"),
    (rf"\b{_S} {_V} (?:(?:lung|pulmonary) )?(?:zone|field|lung)s?\b(?! lobe)", r"\1 lung \2 zone"),
    ("([左右双两]侧?)([上中下])肺(?![叶炎癌])", r"\1肺\2野"),
)]  # fmt: skip
_W = r"(?:upper|lower|top|bottom|left|right|middle|mid|center|central|centrally)"
_LINK = r"(?:[ ,]+(?:and|to|in|at|on|the|horizontally|vertically|slightly|side|area|part|portion|region))*[ ,]+"
_PART = r" (?:part|portion|side|corner|area|region|section|third|half|aspect|edge)\b"
_OF = r" of (?:the|this) (?:\w+ ){0,2}?(?:image|picture|frame|scan|slice|view|photo\w*|radiograph|x ray|brain)\b"
_END = r"(?= ?[.,;:)]| (?:and )?(?:is|which|that|it|occup|cover|show|exhibit|appear|contain)|\s*$)"
_ZH1, _ZH = "[左右上下中]", "左上|右上|左下|右下|左中|右中|上中|中上|下中|中下|中央|中心|中间|正中"
_PLACE_RULES = [(kind, re.compile(rule)) for kind, rule in (
    ("finding place", rf"\bin its ({_W}(?:{_LINK}{_W}){{0,3}})(?:{_PART}|(?<=center)\b)"),
    ("finding place", f"其({_ZH}|{_ZH1}(?=[部侧方]))"),
    ("place", rf"\b({_W}(?:{_LINK}{_W}){{0,5}})(?:{_PART})?{_OF}"),
    ("place", rf"\b({_W}(?:{_LINK}{_W}){{1,5}}|(?<=the )center|centrally)(?:{_PART})?{_END}"),
    ("place", f"(?:图像?|图片|画面|影像|视野)的?({_ZH}|{_ZH1}(?=[部侧方角边]))"), ("place", f"[位处]于({_ZH})"),
)]  # fmt: skip
_AREA = re.compile(r"(less than |under |below |不足|不到|小于|< ?)?(\d+(?:\.\d+)?) ?(?:%|percent|per cent)")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)(?: ?[x×*] ?(\d+(?:\.\d+)?))? ?(mm|millimet|毫米|cm|centimet|厘米)")
_BESIDE = re.compile(
    r"\b(?:bordered by|borders|adjacent to|next to|neighboring|abut(?:s|ting)|beside|surrounded by)\b[^.;]{0,200}?"
    r"(?=[.;]| and (?:is|has|it|shows)\b|, (?:which|and it)\b|$)|\bsurrounding .{1,14}|周围[^型].{0,3}"
    r"|与[^,。;]{1,60}?(?:相邻|毗邻|邻接)|(?:毗邻|紧邻|邻近)[^,。;]+")
_ADVICE = re.compile(
    r"\brecommend|\badvis(?:ed|able)\b|\bshould be\b|clinical correlation|(?:further|additional) \w+ (?:is|are|may be) "
    r"(?:need|requir|necess|suggest|indicat|warrant)|\bwarrants?\b|建议|推荐|请结合|必要时|需进一步|应进一步")
_RELATION = re.compile(
    "related|relation|border|adjacent|next to|neighbo|abut|compress|displac|mass effect|pressure|invad|surround|extend"
    "|affect|due to|associat|secondary|caus|effac|obscur|关系|相邻|毗邻|邻近|压迫|推移|受压|侵犯|周围|累及|占位效应")
_NO = re.compile(
    r"\b(?:no(?! doubt\b| longer\b)|not(?! only\b| necessarily\b| (?:be )?(?:exclud|rul))|without|absence of|absent|nor"
    r"|negative for|free of|clear of|lack(?:s|ing)?|neither|never|fail(?:s|ed)? to|rule[sd] out|rather than"
    r"|(?<!partial )resolution of)\b|未[见发显探检提]|没有|不伴|无(?![法关创])|(?<![能法以待需未])排除")
_NOT_SEEN = re.compile(
    r"\b(?:is|are|was|were|been) (?:not|no longer) (?:\w+ ){0,2}?(?:seen|visible|visuali[sz]ed|identified|detected"
    r"|noted|present|evident|demonstrated|observed|found)\b|\b(?:is|are|was|were) (?:absent|ruled out|excluded|gone)\b"
    r"|\b(?:has|have) (?:\w+ )?(?:resolved|disappeared)\b|(?:缺如|未显示|未见(?:显示)?|已?消失)(?=[,。;]|$)")
_EDGE = re.compile(  # where a negation ends: a list goes on after a comma, a new statement does not
    r"[.;:()!?。]|,(?= ?[\u4e00-\u9fff]|(?: and| but)? (?:the|there|it|its|this|these|that|with|which|where|an? [a-z ]"
    r"{1,40} (?:is|are|was|were))\b)|\b(?:but|however|although|though|except|while|whereas|yet|despite|due to|because"
    r"|and the(?:re)?|which)\b|但|然而|伴有|仅见|可见")
_WITHIN = re.compile(r"\b(?:in|of|within|at|on|to|from|over|near|around) (?:the |both )?$")
_ROI = re.compile(r"region of interest|\broi\b|\bframe|\bbox\b|inside it|感兴趣区|方框|绿框|框内", re.I)
_TIPS = re.compile(r"(?:tips?|诊断提示)[*\s]*[:：](.+?)(?=\n\W*\w[^\n:：]{1,40}[:：]|\n\s*\n|\Z)", re.I | re.S)
_LANGUAGES = {"en": "English", "zh": "Chinese (简体中文)"}
_EXTRACT = (
    "Read the medical caption and answer with one JSON object of the schema. Use only what it says, else null. place is"
    f" one of {', '.join(PLACES)}; area_share is 0..1; negated lists the findings said to be absent; target_diag is the"
    " words that carry the diagnosis.")
_Entity = tuple[str, str, bool]


def detect_language(text: str) -> str:
    """Return "zh" when Chinese characters outnumber Latin words, else (empty text too) "en".

    Examples
    --------
    >>> detect_language("轴位CT图像"), detect_language("The spleen (脾脏)."), detect_language("")
    ('zh', 'en', 'en')
    """
    return "zh" if len(re.findall("[\u3400-\u9fff\uf900-\ufaff]", text)) > len(re.findall("[A-Za-z]+", text)) else "en"


def _normalise(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).lower()
    for old, new in _REWRITES:
        text = old.sub(new, text)
    return text.strip()


@functools.cache
def _matcher() -> tuple[re.Pattern[str], dict[str, tuple[str, str]]]:
    entries = [(kind, entry.partition(":")) for kind, block in TERMS.items() for entry in block.split(";")]
    words = {_normalise(w): (k, " ".join(n.split())) for k, (n, _, others) in entries for w in (n, *others.split(","))}
    words = {w: words[w] for w in sorted(words, key=lambda w: (w[:1], -len(w))) if w}  # the longest first

    def any_of(latin: bool) -> str:  # grouped by first letter, because `re` tries alternatives in turn
        groups = itertools.groupby((w for w in words if w.isascii() == latin), key=lambda w: w[0])
        return "|".join(f"{c}(?:{'|'.join(re.escape(w[1:]) for w in g)})" for c, g in groups).replace(r"\*", "[a-z]*")

    return re.compile(
        rf"(?<![a-z0-9])(?:(left|right|bilateral|both)(?: sided)? (?:the )?)?({any_of(True)})(?:e?s)?(?![a-z0-9])"
        rf"|(?:([左右双两])侧?的?)?({any_of(False)})"
    ), words


def _place(words: str) -> str | None:
    up, down, left, right = (bool(re.search(w, words)) for w in ("up|top|上", "low|bottom|下", "left|左", "right|右"))
    return None if up and down or left and right else PLACES[3 * (1 - up + down) + 1 - left + right]


def _find(sentence: str) -> list[_Entity]:
    text = _normalise(sentence)
    hits: list[tuple[int, str, str, str | None]] = []  # start, kind, value, side
    for kind, rule in _PLACE_RULES:
        for m in list(rule.finditer(text)):
            if place := _place(m[1]):
                hits.append((m.start(), kind, place, None))
                text = text[: m.start()] + " " * len(m[0]) + text[m.end() :]  # its left is not the patient's
    for m in _AREA.finditer(text):
        near = text[max(0, m.start() - 60) : m.end() + 40]
        if float(m[2]) <= 100 and re.search("area|occup|account|cover|image|占|面积", near):
            hits.append((m.start(), "area", f"{'<' if m[1] else ''}{float(m[2]):g}%", None))
    for m in _SIZE.finditer(text):
        mm = max(float(m[1]), float(m[2] or 0)) * (10 if m[3] in ("cm", "centimet", "厘米") else 1)
        hits.append((m.start(), "size", f"{mm:g} mm", None))
    pattern, words = _matcher()
    beside, rest = [m.span() for m in _BESIDE.finditer(text)], text
    for m in pattern.finditer(text):
        rest = rest[: m.start()] + " " * len(m[0]) + rest[m.end() :]
        side, word = m[1] or m[3], m[2] or m[4]
        kind, value = words.get(word) or next(v for w, v in words.items() if w[-1] == "*" and word.startswith(w[:-1]))
        if kind == "paired":
            kind, value = "structure", f"{_SIDES[side]} {value}" if side in _SIDES else value
        elif value.startswith(("left ", "right ")):
            side = value.split()[0]
        if kind == "structure" and any(a <= m.start() < b for a, b in beside):
            kind, side = "neighbour", None
        if kind != "ignore":
            hits.append((m.start(), kind, value.removesuffix(" window"), side))
    for m in re.finditer(r"\b(?:left|right|bilateral(?:ly)?|both)\b|[左右]|[双两]侧", rest):
        hits.append((m.start(), "side", "", m[0]))
    hits.sort(key=lambda h: h[0])
    denied: set[int] = set()
    for start, end in itertools.pairwise([0, *(m.start() for m in _EDGE.finditer(rest)), len(rest) + 1]):
        gone, no = _NOT_SEEN.search(rest, start, end), _NO.search(rest, start, end)
        start, end = (start, gone.start()) if gone else (no.end(), end) if no else (0, 0)
        part = [h for h in hits if start <= h[0] < end]
        if part and part[0][1] == "change":  # "no regression of the mass": the mass stays
            part = part[:1]
        named = {h[0] for h in part if h[1] in ("finding", "device", "density", "change", "side")}
        denied |= named or {h[0] for h in part if h[1] == "structure" and not _WITHIN.search(text[: h[0]][-14:])}
    if advice := _ADVICE.search(text):  # what should be looked for has not been found
        hits = [h for h in hits if h[0] <= text.rfind(",", 0, advice.start())]
    found = [(kind, value, start in denied) for start, kind, value, _ in hits if kind != "side"]
    return found + [("side", _SIDES.get(side, "bilateral"), start in denied) for start, _, _, side in hits if side]


@functools.lru_cache(maxsize=8192)
def _analyse(text: str) -> tuple[tuple[str, list[_Entity]], ...]:
    sentences = re.split(r"(?<=[。！；;\n])|(?<=[.!?？])(?=\s)", text)
    pieces = [s[i : i + 2000] for s in sentences for i in range(0, len(s), 2000)]  # long ones would take too long
    return tuple((piece.strip(), _find(piece)) for piece in pieces)


def entities(text: str) -> set[tuple[str, str, bool]]:
    """Return what a caption names as (kind, value, negated), in the same English words for both languages.

    Kinds: modality, view, window, level, structure, neighbour, side (the patient's), zone (of the lung), place and
    finding place (of the 3x3 grid), area ("4%", "<1%"), size ("14 mm"), density, finding, change, device. `negated` is
    True for what is said to be absent. "May be a mass" counts as a mass; what advice names does not count. Takes any
    string; ValueError for anything else.

    Examples
    --------
    >>> found = entities("No pleural effusion. A 2 cm cyst in the left kidney.")
    >>> sorted(found)[:2], found == entities("左肾可见一个2厘米的囊肿。无胸腔积液。")
    ([('finding', 'cyst', False), ('finding', 'pleural effusion', True)], True)
    """
    if not isinstance(text, str):
        raise ValueError(f"a caption must be text, not {type(text).__name__}")
    found = {entity for _, named in _analyse(text) for entity in named}
    specific = {negated for kind, value, negated in found if kind == "finding" and value not in GENERIC}
    return {e for e in found if not (e[0] == "finding" and e[1] in GENERIC and e[2] in specific)}


@dataclass
class Caption:
    """The fields of one caption; None or an empty list where it does not say.

    `area_share` is 0..1 of the picture; `place` and `finding_place` are in `PLACES`; `side` is the patient's;
    `findings` are asserted, `finding` is the first, `negated` are said to be absent. The last three are sentences.
    """

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


def parse_caption(text: str) -> Caption:
    """Read the fields of a caption by rules; takes any string, ValueError for anything else.

    `target_diag` is the text under "Clinical Diagnosis Tips" (临床诊断提示), else the sentences that assert a finding,
    else those that deny one.

    Examples
    --------
    >>> c = parse_caption("The region of interest, located in the upper left of the image, covers about 4% of its area "
    ...                   "and shows the left kidney. No focal lesion is seen within it.")
    >>> c.structure, c.place, c.area_share, c.finding, c.negated, c.target_diag
    ('left kidney', 'upper left', 0.04, None, ['lesion'], 'No focal lesion is seen within it.')
    """
    kept, sentences, language = entities(text), _analyse(text), detect_language(text)

    def values(kind: str, no: bool = False) -> list[str]:
        return list(dict.fromkeys(e[1] for _, named in sentences for e in named if e in kept and e[::2] == (kind, no)))

    def quote(sentences: Iterable[str]) -> str | None:
        return ("" if language == "zh" else " ").join(sentences) or None

    # The sentence about the region names the structure; else one with a finding; else the first that names any.
    order = sorted(sentences, key=lambda s: (not _ROI.search(s[0]), ("finding", False) not in [e[::2] for e in s[1]]))
    structure, near = next(((v, s) for _, s in order for k, v, n in s if k == "structure" and not n), (None, ()))
    sides = {v for k, v, n in near if k == "side" and not n} if structure else set(values("side"))
    sides = {s for s in _SIDES if structure and structure.startswith(s + " ")} or sides
    findings, negated, size, area = values("finding"), values("finding", True), values("size"), values("area")
    told, tips = {("finding", v, not findings) for v in findings or negated}, _TIPS.search(text)
    one = ("modality", "finding", "level", "view", "window", "place", "density", "finding_place")
    return Caption(
        **{k: next(iter(values(k.replace("_", " "))), None) for k in one}, structure=structure,
        findings=findings, negated=negated, neighbours=values("neighbour"), language=language,
        side=sides.pop() if len(sides) == 1 else "bilateral" if sides else None,
        area_share=float(area[0].strip("<%")) / 100 if area else None, size_mm=float(size[0][:-3]) if size else None,
        relation=quote(s for s, _ in sentences if _RELATION.search(s.lower())),
        advice=quote(s for s, _ in sentences if _ADVICE.search(s.lower())),
        target_diag=tips[1].strip() if tips else quote(s for s, found in sentences if told & set(found)),
    )  # fmt: skip


def _ask(
    texts: Sequence[str], task: str, read: Callable[[str, str], object], wanted: dict[str, Any], *,
    base_url: str | None = None, model: str | None = None, api_key: str = "none", cache_dir: str | Path | None = None,
    timeout: float = 60.0, retries: int = 2, workers: int = 4, strict: bool = True,
) -> list:  # fmt: skip
    if not (model and base_url and base_url.startswith(("http://", "https://"))):
        raise ValueError("no LLM endpoint is configured: pass base_url, say 'http://localhost:11434/v1', and model")
    try:
        import openai
    except ImportError as error:
        raise ImportError("asking an LLM needs two packages: pip install openai pydantic") from error
    from tqdm import tqdm

    client = openai.OpenAI(base_url=base_url, api_key=api_key, timeout=timeout, max_retries=retries)
    options: dict[str, Any] = {"model": model, "temperature": 0, **wanted}
    texts = [t.encode("utf-8", "replace").decode() for t in texts]

    def ask(text: str) -> object:
        messages: Any = [{"role": "system", "content": task}, {"role": "user", "content": text}]
        path = Path(cache_dir or "", hashlib.sha256(json.dumps([messages, options]).encode()).hexdigest() + ".json")
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # not there, or damaged: ask
            if cache_dir:
                return read(text, json.loads(path.read_text("utf-8"))["answer"])
        for _ in range(retries + 1):
            try:
                reply = client.chat.completions.create(messages=messages, **options)
                value = read(text, answer := str(reply.choices[0].message.content))
            except openai.APITimeoutError as error:
                raise TimeoutError(f"{base_url} did not answer within {timeout:g} s, {retries + 1} times") from error
            except openai.OpenAIError as error:
                raise OSError(f"{base_url}: {type(error).__name__}: {str(error)[:200]}".replace("\n", " ")) from error
            except (ValueError, AttributeError, TypeError, IndexError) as error:  # nonsense: say why, ask again
                reason = " ".join(str(error).split())[:300]
                messages[2:] = [{"role": "user", "content": f"Your answer was refused: {reason}. Try again."}]
                continue
            if cache_dir:
                path.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.NamedTemporaryFile("w", dir=path.parent, encoding="utf-8", delete=False) as f:
                    json.dump({"model": model, "answer": answer}, f, ensure_ascii=False)
                os.replace(f.name, path)
            return value
        if strict:
            raise ValueError(f"text {texts.index(text)}: {model} was refused {retries + 1} times, at last for {reason}")
        return None

    todo = list(dict.fromkeys(texts))
    with ThreadPoolExecutor(workers) as pool:  # an error cancels what has not begun; what is answered is in the cache
        answers = dict(zip(todo, tqdm(pool.map(ask, todo), total=len(todo), disable=len(todo) < 2), strict=True))
    return [answers[t] for t in texts]


def extract_with_llm(texts: Sequence[str], **endpoint: Any) -> list[Caption | None]:
    """Let an LLM behind an OpenAI-compatible endpoint read the fields of captions; its answers are validated.

    Parameters
    ----------
    texts : sequence of str
        Captions; equal ones are asked once.
    base_url, model, api_key : str
        For Ollama "http://localhost:11434/v1" and, say, "qwen3:4b". Captions leave this machine if the URL does.
    cache_dir : path, optional
        One small JSON file per text: a second call asks only for what is missing. It holds answers: keep it safe.
    timeout, retries, workers, strict : float seconds, int, int, bool; default 60, 2, 4, True
        Retries when the endpoint fails or an answer is refused. Not strict: None where an answer stays wrong.

    Raises
    ------
    ValueError, OSError, ImportError
        No endpoint is configured or an answer stays wrong; the endpoint fails or is too slow; a package is missing.
    """

    from pydantic import TypeAdapter

    adapter = TypeAdapter(Caption)
    schema = {"name": "Caption", "schema": adapter.json_schema()}

    def read(text: str, answer: str) -> Caption:
        caption = adapter.validate_json(answer[answer.find("{") : answer.rfind("}") + 1])
        if not 0 <= (caption.area_share or 0) <= 1 or caption.place not in (None, *PLACES):
            raise ValueError(f"area_share must be 0..1 and place null or one of {', '.join(PLACES)}")
        known: dict[str, Any] = {"language": detect_language(text)}
        for name in ("modality", "structure", "finding", "level", "view", "density"):  # in the words of the rules
            same = [v for k, v, _ in entities(getattr(caption, name) or "") if k == name]
            known |= {name: same[0]} if len(same) == 1 else {}
        return replace(caption, **known)

    wanted = {"response_format": {"type": "json_schema", "json_schema": schema}}
    return _ask(texts, _EXTRACT, read, wanted, **endpoint)


def translate(texts: Sequence[str], to: str = "zh", **endpoint: Any) -> list[str | None]:
    """Translate captions to "en" or "zh"; `endpoint` and errors as for `extract_with_llm`.

    An answer in the wrong language, without a number of the text, or with left and right swapped is refused.
    """
    if to not in _LANGUAGES:
        raise ValueError(f"cannot translate to {to!r}: choose en or zh")

    def read(text: str, answer: str) -> str:
        lost = set(re.findall(r"\d+(?:\.\d+)?", text)) - set(re.findall(r"\d+(?:\.\d+)?", answer))
        sides = [{v for k, v, _ in entities(t) if k == "side"} for t in (text, answer)]
        if detect_language(answer) != to or lost or sides in ([{"left"}, {"right"}], [{"right"}, {"left"}]):
            raise ValueError(f"answer in {_LANGUAGES[to]}, keep every number and every side")
        return answer.strip()

    return _ask(texts, f"Translate the caption into {_LANGUAGES[to]}. Answer with nothing else.", read, {}, **endpoint)
