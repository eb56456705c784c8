"""Judge a single answer by the rules with which scores were published.

LLaVA-Med's rules are those most papers on VQA-RAD, SLAKE and PathVQA compare with: a closed
question is right if the reference is part of the answer, an open one counts the reference's words
that the answer has. The first is generous, "no" is part of "normal", so a strict rule stands beside it.
For Chinese there is no published rule but equality; ours is said where it is used.
"""

import difflib
import re
from collections import Counter
from collections.abc import Sequence

_ARTICLES = {"a", "an", "the"}
_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5",
    "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_CHINESE_PUNCTUATION = "，。、；：？！“”‘’（）《》【】,.;:?!"
_YES_OR_NO = {"yes", "no"}
# The words by which SLAKE's Chinese questions are answered; those of no hold those of yes.
_CHINESE_UNSURE = ("无法", "不确定", "不知道", "不清楚")
_CHINESE_NO = ("不", "没有", "否", "无")
_CHINESE_YES = ("是", "有", "包含", "可以", "正常", "存在", "能", "会", "健康")
_CHINESE_ANSWERS = {
    "是", "是的", "有", "包含", "可以", "正常", "存在", "能", "会", "健康",
    "不是", "否", "没有", "不包含", "不可以", "不正常", "不存在", "不能", "不会", "不健康",
}  # fmt: skip


def normal_form(text: str) -> str:
    """Write a text as answers to visual questions are compared.

    Small letters, numbers as digits, no articles, no full stops; a punctuation sign beside a blank
    vanishes and any other becomes a blank. (The published rule also spells out some contractions.)

    Parameters
    ----------
    text : an answer or a reference.

    Returns
    -------
    str : words between single blanks.

    Examples
    --------
    >>> normal_form("Two lesions, in the left-lower lobe.")
    '2 lesions in left lower lobe'
    """
    text = text.lower()
    has_number_with_comma = re.search(r"\d,\d", text) is not None
    changed = text
    for sign in _PUNCTUATION:
        beside_blank = f"{sign} " in text or f" {sign}" in text
        changed = changed.replace(sign, "" if beside_blank or has_number_with_comma else " ")
    # not the point of 1.5
    changed = re.sub(r"\.(?!\d)", "", changed)
    words = []
    for word in changed.split():
        word = _NUMBERS.get(word, word)
        if word not in _ARTICLES:
            words.append(word)
    return " ".join(words)


def tokens_of(text: str, language: str = "en") -> list[str]:
    """Give the words of a text in its normal form; of Chinese the characters.

    Examples
    --------
    >>> tokens_of("The left lung."), tokens_of("左肺。", "zh")
    (['left', 'lung'], ['左', '肺'])
    """
    if language != "zh":
        return normal_form(text).split()
    return [letter for letter in text.lower() if letter not in _CHINESE_PUNCTUATION + " "]


def judge_closed(answer: str, reference: str, language: str = "en") -> dict[str, float]:
    """Judge the answer to a question that has two answers, such as yes and no.

    Parameters
    ----------
    answer, reference : as the model and the benchmark wrote them.
    language : "en" or "zh".

    Returns
    -------
    dict : "accuracy", strict: of yes and no the answer has the right one and not the other, as whole
        words, and any other reference stands in it as whole words. In Chinese yes and no have many
        words (是, 包含; 不是, 没有): the answer must mean the same of the two. "published": the
        reference is part of the answer's text, which is LLaVA-Med's rule (there a miss that holds
        neither yes nor no counts, and others were forgotten; here all count); for Chinese both are
        equal.

    Examples
    --------
    >>> judge_closed("The heart is normal.", "no")
    {'accuracy': 0.0, 'published': 1.0}
    >>> judge_closed("不是", "是", "zh")["accuracy"], judge_closed("是的，有。", "是", "zh")["accuracy"]
    (0.0, 1.0)
    """
    if language == "zh":
        said = "".join(tokens_of(answer, "zh"))
        wanted = "".join(tokens_of(reference, "zh"))
        if wanted in _CHINESE_ANSWERS:
            strict = _says_yes(said) is _says_yes(wanted)
        else:
            strict = wanted in said
        return {"accuracy": float(strict), "published": float(said == wanted)}
    said = tokens_of(answer)
    wanted = tokens_of(reference)
    strict = _contains(said, wanted)
    if len(wanted) == 1 and wanted[0] in _YES_OR_NO:
        strict = _YES_OR_NO & set(said) == set(wanted)
    published = normal_form(reference) in normal_form(answer)
    return {"accuracy": float(strict), "published": float(published)}


def _says_yes(text: str) -> bool | None:
    """Say whether a Chinese answer means yes; None where it says neither.

    >>> _says_yes("图中不包含肝脏"), _says_yes("是的"), _says_yes("无法判断")
    (False, True, None)
    """
    if any(word in text for word in _CHINESE_UNSURE):
        return None
    if any(word in text for word in _CHINESE_NO):
        return False
    if any(word in text for word in _CHINESE_YES):
        return True
    return None


def _contains(words: Sequence[str], part: Sequence[str]) -> bool:
    """Say whether the words of a part stand one behind the other among others."""
    size = len(part)
    if not size:
        return False
    starts = range(len(words) - size + 1)
    return any(list(words[start : start + size]) == list(part) for start in starts)


def token_scores(answer: str, reference: str, language: str = "en") -> dict[str, float]:
    """Score the answer to an open question by the words that it shares with the reference.

    Parameters
    ----------
    answer, reference : as the model and the benchmark wrote them.
    language : "en" or "zh", where characters stand for words.

    Returns
    -------
    dict : "recall", "precision" and "f1" as LLaVA-Med counts, 0 to 1: a shared word counts as often
        as the answer says it, a missing one as often as the reference does. "exact": both are equal
        in their normal form.

    Examples
    --------
    >>> token_scores("the left lung", "left lower lung")
    {'recall': 0.6666666666666666, 'precision': 1.0, 'f1': 0.8, 'exact': 0.0}
    """
    said = Counter(tokens_of(answer, language))
    wanted = Counter(tokens_of(reference, language))
    shared = sum(count for word, count in said.items() if word in wanted)
    invented = sum(count for word, count in said.items() if word not in wanted)
    missing = sum(count for word, count in wanted.items() if word not in said)
    same = tokens_of(answer, language) == tokens_of(reference, language)
    if not shared:
        return {"recall": 0.0, "precision": 0.0, "f1": 0.0, "exact": float(same)}
    recall = shared / (shared + missing)
    precision = shared / (shared + invented)
    f1 = 2 * precision * recall / (precision + recall)
    return {"recall": recall, "precision": precision, "f1": f1, "exact": float(same)}


def judge_choice(answer: str, reference: str, options: Sequence[str]) -> dict[str, float]:
    """Judge the answer to a question with options.

    Parameters
    ----------
    answer : as the model wrote it.
    reference : the right option, word for word.
    options : all of them.

    Returns
    -------
    dict : "published": OmniMedVQA's rule, the option whose letters are most like the answer
        (`difflib`) is taken as chosen; even nonsense chooses one. "accuracy", strict: the answer
        has the words of the right option, and of no other option that is not part of it.

    Raises
    ------
    ValueError : the reference is none of the options.

    Examples
    --------
    >>> judge_choice("It is a CT scan.", "CT", ["CT", "MRI"])
    {'accuracy': 1.0, 'published': 1.0}
    >>> judge_choice("I cannot tell.", "MRI", ["CT", "MRI"])
    {'accuracy': 0.0, 'published': 1.0}
    """
    if reference not in options:
        raise ValueError("the reference is none of the options")
    likeness = []
    for option in options:
        likeness.append(difflib.SequenceMatcher(None, option, answer).ratio())
    most = max(likeness)
    # like the published rule: nothing alike is no choice
    chosen = options[likeness.index(most)] if most > 0 else None
    said = tokens_of(answer)
    wanted = tokens_of(reference)
    others = []
    for option in options:
        words = tokens_of(option)
        if not _contains(wanted, words):
            others.append(words)
    names_another = any(_contains(said, words) for words in others)
    strict = _contains(said, wanted) and not names_another
    return {"accuracy": float(strict), "published": float(chosen == reference)}
