"""Text scores against the libraries that they equal, and what they do with bad input."""

import importlib.util
import json

import numpy as np
import pandas as pd
import pytest
import sacrebleu
from example_captions import EN, EN_DENIED, ZH
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh

from medtune.captions import detect_language
from medtune.scores import finding_scores, llamafactory_scores, standard_scores
from medtune.scores.text import _language

TEXT_SCORES = [llamafactory_scores, standard_scores, finding_scores]

# --- LLaMA-Factory's scores -----------------------------------------------------------------------


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


SPACES = [
    "\n", "\n\n", " \n \n", "\r\n", "\t", "\x0b", "\x1c", "\x85", "\xa0", "\u2028", "\u3000", " ",
]  # fmt: skip
WORDS = [
    "the", "spleen", "left kidney", "CT", "4%", "3.5", "3.5%", ".5%", "a.b", "-", "_", "x-ray",
    "AT&T", "C++", "c#", "T恤", "B超", "4S店", "QQ", "+", "#", "&", "é", "ß", "脾脏", "左肾",
    "低密度病灶", "约14毫米", "位于", "的", "龘", "😀",
]  # fmt: skip
STOPS = [
    ".", "。", "！", "？", "?", "!", "”", "’", "......", "……", "。”", "？’", "，", ",", "(", "（",
    "：", "%", "\ud800",
]  # fmt: skip
PIECES = [*WORDS, *STOPS, *SPACES, *[" "] * 12]
TEXTS = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=40).map("".join),
    st.text(max_size=60),
    st.text("ab .\n。", max_size=60),
    st.text("ATCc&#+.%-_ 1", max_size=30),
    st.sampled_from(["", " ", "\n", "。", "...", EN, EN_DENIED, ZH]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6))
def test_llamafactory_scores_equal_the_libraries(library_scores, pairs):
    predictions = [prediction for prediction, _ in pairs]
    references = [reference for _, reference in pairs]
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
    wrong = EN.replace("spleen", "liver")
    assert llamafactory_scores([wrong], [EN])["bleu-4"] > 90
    assert finding_scores([wrong], [EN])["structure_exact"] == 0


# --- bad input, all text scores -------------------------------------------------------------------


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
    zeros = {
        "bleu-4",
        "rouge-1",
        "rouge-l",
        "bleu",
        "chrf",
        "rougeL",
        "precision",
        "recall",
        "f1",
        "structure_exact",
    }
    for answer in ("", "?!...", "。"):
        scores = score([answer], ["The image shows the spleen"])
        for name in zeros & scores.keys():
            assert scores[name] == 0, name
        json.dumps(scores, allow_nan=False)
    json.dumps(score(["", "。"], ["", "。"]), allow_nan=False)


@pytest.mark.parametrize("score", [standard_scores, finding_scores])
def test_long_answers_stay_possible(score):
    words = " ".join(f"word{i}" for i in range(20_000))
    scores = score([words, words], ["word5 word7 word6", words])
    assert scores.get("rougeL", 50) > 49


def test_any_iterable_of_strings_will_do():
    expected = llamafactory_scores(["a b", "c"], ["a", "c"])
    assert llamafactory_scores(pd.Series(["a b", "c"]), ("a", "c")) == expected
    assert llamafactory_scores(iter(["a b", "c"]), np.array(["a", "c"])) == expected


# --- sacreBLEU and rouge_score --------------------------------------------------------------------


class Characters:
    """sacreBLEU's Chinese tokenizer, for rouge_score."""

    def tokenize(self, text):
        return TokenizerZh()(text.lower()).split()


@pytest.mark.parametrize("language", ["en", "zh"])
def test_standard_scores_are_those_of_the_libraries(language):
    texts = {
        "en": [EN, EN_DENIED, "The liver, nothing else"],
        "zh": [ZH, ZH[:40], "肝脏CT。"],
    }
    tokenizer = {"en": "13a", "zh": "zh"}[language]
    predictions = texts[language]
    references = predictions[1:] + predictions[:1]
    scores = standard_scores(predictions, references)
    bleu = sacrebleu.corpus_bleu(predictions, [references], tokenize=tokenizer).score
    chrf = sacrebleu.corpus_chrf(predictions, [references]).score
    assert scores["bleu"] == pytest.approx(bleu)
    assert scores["chrf"] == pytest.approx(chrf)
    assert scores["tokenizer"] == tokenizer and f"tok:{tokenizer}" in scores["bleu_signature"]
    assert "nrefs:1" in scores["chrf_signature"] and scores["note"] is None

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
    theirs = RougeScorer(["rougeL"]).score(texts[1], texts[0])["rougeL"].fmeasure
    assert standard_scores(texts[:1], texts[1:])["rougeL"] == pytest.approx(100 * theirs)


def test_answers_in_another_language_are_pointed_out():
    scores = standard_scores([EN], [ZH])
    assert scores["prediction_language"] == "en" and scores["reference_language"] == "zh"
    assert "'en'" in scores["note"] and scores["bleu"] < 5
    # a published table starts at 0.8: that is the right caption in the wrong language
    assert llamafactory_scores([EN], [ZH])["bleu-4"] < 2
    # ... while what is said is the same
    assert finding_scores([EN], [ZH])["f1"] == 1


@given(st.one_of(TEXTS, st.text("aA1 脾肾。\uf900\u33ff", max_size=12)))
@settings(deadline=None)
def test_the_language_is_that_of_the_captions(text):
    assert _language(text) == detect_language(text)
