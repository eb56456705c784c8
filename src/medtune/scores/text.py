"""Compare the words of answers and references: what LLaMA-Factory prints, and what papers print.

Needs numpy, jieba, rouge_chinese, rouge_score, sacrebleu and rapidfuzz.

Two scores called BLEU-4 can differ by a factor of ten: one counts characters, the other words.
`llamafactory_scores` gives what LLaMA-Factory prints, `standard_scores` what sacreBLEU and
rouge_score do.

Both raise ValueError for lists of different length, empty lists, and an answer that is not a
string. An empty answer or one of punctuation alone is no error: it scores 0 where it shares nothing
with the reference.
"""

import functools
import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import jieba
import numpy as np
from rapidfuzz.distance import LCSseq
from rouge_chinese import Rouge
from rouge_score import scoring
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.metrics.base import Metric
from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh

_ROUGE = Rouge()

Column = tuple[Sequence, Callable[[np.ndarray], float]]
"""The rows of a score, one a sample, and the statistic of an array of rows that is the score."""


def _mean_percent(values: np.ndarray) -> float:
    return float(np.mean(values))


# An interval of the score stays within them.
_mean_percent.bounds = (0.0, 100.0)


def text_pairs(predictions: Iterable[str], references: Iterable[str]) -> list[tuple[str, str]]:
    """Pair each answer with its reference, and refuse what cannot be scored.

    Raises
    ------
    ValueError : lists of different length, empty lists, or something that is not a string.

    Examples
    --------
    >>> text_pairs(["a cyst"], ["no cyst"])
    [('a cyst', 'no cyst')]
    """
    answers = _strings("predictions", predictions)
    wanted = _strings("references", references)
    if len(answers) != len(wanted):
        raise ValueError(
            f"{len(answers)} predictions, {len(wanted)} references: give one of each per sample"
        )
    if not answers:
        raise ValueError("no predictions and no references: there is nothing to score")
    return list(zip(answers, wanted, strict=True))


def _strings(name: str, texts: Iterable[str]) -> list[str]:
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise ValueError(f"{name} is of type {type(texts).__name__}: give a list of strings")
    texts = list(texts)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            shown = repr(text)[:40]
            raise ValueError(
                f"{name}[{number}] is {shown}, not a string: write '' for an empty answer"
            )
    return texts


def common_words(a: Sequence[str], b: Sequence[str]) -> int:
    """Count the words of the longest common subsequence, in milliseconds even for 20,000 words.

    Examples
    --------
    >>> common_words("the left kidney".split(), "the right kidney".split())
    2
    """
    # rapidfuzz compares hashes. Small whole numbers are their own hash, so no two words can be
    # taken for one.
    number: dict[str, int] = {}
    a_numbers = [number.setdefault(word, len(number)) for word in a]
    b_numbers = [number.setdefault(word, len(number)) for word in b]
    return LCSseq.similarity(a_numbers, b_numbers)


# --- LLaMA-Factory's scores -----------------------------------------------------------------------


def llamafactory_scores(
    predictions: Iterable[str],
    references: Iterable[str],
    *,
    per_sample: bool = False,
    columns: bool = False,
) -> dict[str, Any]:
    """Compute what LLaMA-Factory 0.9.5 reports after `do_predict`, to 1e-4, but faster.

    BLEU-4 counts characters (nltk, smoothing method 3). ROUGE counts words of jieba, each n-gram
    once (rouge_chinese). Two templated captions that name different organs easily score 50 or more
    on this BLEU.

    Parameters
    ----------
    predictions, references : the answers and what they should be, one of each a sample.
    per_sample : give a list for each score instead, with one value a sample, as a paired bootstrap
        takes it.
    columns : give (rows, statistic) for each score instead: the score is the statistic of the rows,
        one row a sample, as a bootstrap takes them.

    Returns
    -------
    dict : "bleu-4", "rouge-1", "rouge-2", "rouge-l" in percent, each the mean of values that are
        rounded to 4 places.

    Raises
    ------
    ValueError : see `text_pairs`.

    Examples
    --------
    >>> llamafactory_scores(["the left kidney"], ["the right kidney"])["bleu-4"]
    60.5782
    """
    # Without this jieba tells on stderr how it loads its dictionary.
    jieba.setLogLevel("WARNING")
    jieba.initialize()

    samples: dict[str, list[float]] = {"bleu-4": [], "rouge-1": [], "rouge-2": [], "rouge-l": []}
    # Captions from a template come again and again: the same pair is scored once.
    score_once = functools.cache(_llamafactory_pair)
    for answer, reference in text_pairs(predictions, references):
        values = score_once(answer, reference)
        for column, value in zip(samples.values(), values, strict=True):
            column.append(value)

    if per_sample:
        return samples
    if columns:
        return {name: (values, _mean_percent) for name, values in samples.items()}
    return {name: float(np.mean(values)) for name, values in samples.items()}


def _llamafactory_pair(answer: str, reference: str) -> list[float]:
    """Score one answer: BLEU-4, ROUGE-1, ROUGE-2 and ROUGE-L in percent."""
    said = _analyse(answer)
    wanted = _analyse(reference)
    common = common_words(said.words, wanted.words)
    values = [
        _character_bleu(said, wanted),
        _set_f_score(set(said.words), set(wanted.words)),
        _set_f_score(set(pairwise(said.words)), set(pairwise(wanted.words))),
        _f_score(common, len(said.words), len(wanted.words)),
    ]
    return [round(100 * value, 4) for value in values]


@dataclass(frozen=True)
class _Analysis:
    """What LLaMA-Factory's scores count in one text.

    Attributes
    ----------
    length : number of characters.
    grams : how often each run of 1, 2, 3 and 4 characters occurs.
    words : the words of jieba, one list over all sentences.
    """

    length: int
    grams: list[Counter]
    words: list[str]


# Short memory: the n-grams of a long answer take megabytes.
@functools.lru_cache(maxsize=256)
def _analyse(text: str) -> _Analysis:
    grams = [_character_grams(text, size) for size in (1, 2, 3, 4)]
    return _Analysis(len(text), grams, _jieba_words(text))


def _character_grams(text: str, size: int) -> Counter:
    return Counter([text[start : start + size] for start in range(len(text) - size + 1)])


def _jieba_words(text: str) -> list[str]:
    """Cut a text as `" ".join(jieba.cut(text))` and then rouge_chinese's sentence splitter do."""
    # jieba cuts each run of word characters by itself, so that each needs to be cut only once.
    runs = jieba.re_han_default.split(text)
    joined = " ".join(_cut_run(run) for run in runs if run)
    if not joined.split():
        return []
    sentences = []
    for sentence in _ROUGE.cut_sent(joined):
        if sentence:
            sentences.append(" ".join(sentence.split()))
    # rouge_chinese counts a blank line inside a text as one empty word. A split at single blanks
    # leaves it; one at any white space would not.
    return " ".join(sentences).split(" ")


@functools.lru_cache(maxsize=1 << 16)
def _cut_run(run: str) -> str:
    """Cut one run of characters into words with blanks between them, as jieba does."""
    word_characters = run.isascii() and jieba.re_han_default.match(run)
    if word_characters and not _may_hold_known_word(run):
        # jieba would look every part up in its dictionary, find none, and cut by this pattern in
        # the end. To do only that is what makes English fast.
        parts = jieba.finalseg.re_skip.split(run)
        return " ".join(filter(None, parts))
    return " ".join(jieba.cut(run))


def _may_hold_known_word(run: str) -> bool:
    """Say whether two neighbours begin a word of jieba's dictionary, which holds all beginnings."""
    neighbours = map(operator.add, run, run[1:])
    return not jieba.dt.FREQ.keys().isdisjoint(neighbours)


def _character_bleu(said: _Analysis, wanted: _Analysis) -> float:
    """Compute BLEU-4 over characters as nltk's `sentence_bleu` with smoothing method 3, 0 to 1."""
    log_precision = 0.0
    orders_missed = 0
    for order, (ours, theirs) in enumerate(zip(said.grams, wanted.grams, strict=True)):
        matches: float = sum(
            min(times, theirs[gram]) for gram, times in ours.items() if gram in theirs
        )
        if matches == 0 and order == 0:
            return 0.0  # not one character in common
        if matches == 0:
            # The smoothing: 1/2 of a match for the first order without one, 1/4 for the next.
            orders_missed += 1
            matches = 0.5**orders_missed
        total = max(1, said.length - order)
        log_precision += 0.25 * math.log(matches / total)
    brevity = min(0.0, 1 - wanted.length / said.length)
    return math.exp(log_precision + brevity)


def _set_f_score(said: set, wanted: set) -> float:
    return _f_score(len(said & wanted), len(said), len(wanted))


def _f_score(matches: int, predicted: int, wanted: int) -> float:
    precision = matches / max(predicted, 1)
    recall = matches / max(wanted, 1)
    # rouge_chinese adds the small number against a division by 0.
    return 2 * precision * recall / (precision + recall + 1e-8)


# --- the scores of papers -------------------------------------------------------------------------


class _Tokenizer(Protocol):
    """What rouge_score takes as a tokenizer."""

    def tokenize(self, text: str) -> list[str]: ...


class _ChineseCharacters:
    """sacreBLEU's `zh` tokenizer for rouge_score: single characters, and words where Latin."""

    def __init__(self) -> None:
        self._cut = TokenizerZh()

    def tokenize(self, text: str) -> list[str]:
        return self._cut(text.lower()).split()


@dataclass(frozen=True)
class _Libraries:
    """The scorers of sacreBLEU and rouge_score, set up for one language.

    Attributes
    ----------
    tokenizer : sacreBLEU's name of its tokenizer.
    words : cuts a text into the words that ROUGE counts.
    corpus_bleu, chrf : score the whole corpus, chrf single sentences too.
    sentence_bleu : leaves out orders that are longer than the answer, as is usual for sentences.
    rouge : ROUGE-1 and ROUGE-2; its ROUGE-L would take minutes for a long answer.
    """

    tokenizer: str
    words: _Tokenizer
    corpus_bleu: BLEU
    sentence_bleu: BLEU
    chrf: CHRF
    rouge: RougeScorer

    @classmethod
    def of_language(cls, language: str) -> "_Libraries":
        """Set the libraries up for references in "en" or "zh"."""
        chinese = language == "zh"
        tokenizer = "zh" if chinese else "13a"
        words = _ChineseCharacters() if chinese else DefaultTokenizer()
        return cls(
            tokenizer=tokenizer,
            words=words,
            corpus_bleu=BLEU(tokenize=tokenizer),
            sentence_bleu=BLEU(tokenize=tokenizer, effective_order=True),
            chrf=CHRF(),
            rouge=RougeScorer(["rouge1", "rouge2"], tokenizer=words),
        )


def standard_scores(
    predictions: Iterable[str],
    references: Iterable[str],
    *,
    per_sample: bool = False,
    columns: bool = False,
) -> dict[str, Any]:
    """Compute what papers compare: corpus BLEU and chrF of sacreBLEU, ROUGE of rouge_score.

    If most references are Chinese, BLEU and ROUGE take single characters (sacreBLEU's `zh`
    tokenizer). METEOR is not among them: it needs NLTK's WordNet data, which no package carries.

    Parameters
    ----------
    predictions, references : the answers and what they should be, one of each a sample.
    per_sample : give lists of sentence scores instead, one value a sample. The mean of BLEU or chrF
        over sentences is not that of the corpus.
    columns : give (rows, statistic) in place of each score: the score is the statistic of the rows,
        one row a sample, as a bootstrap takes them.

    Returns
    -------
    dict : "bleu", "chrf", "rouge1", "rouge2", "rougeL" in percent, and what was done: "tokenizer",
        "bleu_signature", "chrf_signature", "prediction_language", "reference_language" and "note"
        (a warning, or None).

    Raises
    ------
    ValueError : see `text_pairs`.

    Examples
    --------
    >>> scores = standard_scores(["a cyst in the liver"], ["a cyst in the left liver"])
    >>> round(scores["bleu"], 1), scores["tokenizer"], scores["reference_language"]
    (57.9, '13a', 'en')
    """
    pairs = text_pairs(predictions, references)
    answers = [answer for answer, _ in pairs]
    wanted = [reference for _, reference in pairs]
    answer_language = _most_common_language(answers)
    wanted_language = _most_common_language(wanted)

    libraries = _Libraries.of_language(wanted_language)
    samples = _sentence_scores(pairs, libraries)
    if per_sample:
        return samples

    # A corpus score is not the mean of its sentences' scores: it comes from counts that are summed
    # over the samples.
    scores: dict[str, Column] = {
        "bleu": _corpus_column(libraries.corpus_bleu, answers, wanted),
        "chrf": _corpus_column(libraries.chrf, answers, wanted),
    }
    for name in ("rouge1", "rouge2", "rougeL"):
        scores[name] = samples[name], _mean_percent

    note = None
    if answer_language != wanted_language:
        note = (
            f"answers in '{answer_language}' against references in '{wanted_language}' say nothing"
        )
    facts = {
        "tokenizer": libraries.tokenizer,
        "prediction_language": answer_language,
        "reference_language": wanted_language,
        # sacreBLEU knows its signature only after it has seen references.
        "bleu_signature": str(libraries.corpus_bleu.get_signature()),
        "chrf_signature": str(libraries.chrf.get_signature()),
        "note": note,
    }
    if columns:
        return scores | facts
    values = {}
    for name, (rows, statistic) in scores.items():
        values[name] = float(statistic(np.asarray(rows, dtype=float)))
    return values | facts


def _most_common_language(texts: list[str]) -> str:
    return Counter(_language(text) for text in texts).most_common(1)[0][0]


def _language(text: str) -> str:
    """Say "zh" when Chinese characters outnumber Latin words, else (empty text too) "en"."""
    # The same rule as in `medtune.captions`; it is repeated so that this file stands alone.
    chinese_characters = len(re.findall("[\u3400-\u9fff\uf900-\ufaff]", text))
    latin_words = len(re.findall("[A-Za-z]+", text))
    return "zh" if chinese_characters > latin_words else "en"


def _sentence_scores(pairs: list[tuple[str, str]], libraries: _Libraries) -> dict[str, list[float]]:
    """Score each answer by itself, in percent."""
    samples: dict[str, list[float]] = {
        "bleu": [],
        "chrf": [],
        "rouge1": [],
        "rouge2": [],
        "rougeL": [],
    }
    for answer, reference in pairs:
        rouge = libraries.rouge.score(reference, answer)
        samples["bleu"].append(libraries.sentence_bleu.sentence_score(answer, [reference]).score)
        samples["chrf"].append(libraries.chrf.sentence_score(answer, [reference]).score)
        samples["rouge1"].append(100 * rouge["rouge1"].fmeasure)
        samples["rouge2"].append(100 * rouge["rouge2"].fmeasure)
        samples["rougeL"].append(100 * _rouge_l(answer, reference, libraries.words))
    return samples


def _rouge_l(answer: str, reference: str, words: _Tokenizer) -> float:
    """Compute rouge_score's rougeL, 0 to 1, without its table of all words by all words."""
    said = words.tokenize(answer)
    wanted = words.tokenize(reference)
    common = common_words(said, wanted)
    return scoring.fmeasure(common / max(len(said), 1), common / max(len(wanted), 1))


def _corpus_column(metric: Metric, answers: list[str], references: list[str]) -> Column:
    """Give the counts of each sample, and the score of their sum, which is the corpus score.

    Both functions of sacreBLEU are private to it; its own bootstrap calls them in the same way.
    """
    counts = metric._extract_corpus_statistics(answers, [references])

    def score_of_sum(rows: np.ndarray) -> float:
        return metric._compute_score_from_stats(rows.sum(axis=0).tolist()).score

    score_of_sum.bounds = (0.0, 100.0)  # as those of `_mean_percent`
    return counts, score_of_sum
