"""All findings of a picture: what is listed right, missed, invented and contradicted."""

import math

import numpy as np
import pytest
from example_captions import EN, EN_DENIED, ZH
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, precision_recall_fscore_support
from sklearn.preprocessing import MultiLabelBinarizer

from medtune.captions import detect_language
from medtune.scores import (
    LISTING_QUESTIONS,
    RATIOS,
    listing_scores,
    paired_bootstrap,
    read_listing,
    with_intervals,
)

# findings that the rules know, each in both languages
WORDS = {
    "nodule": "结节",
    "cyst": "囊肿",
    "pleural effusion": "胸腔积液",
    "pneumothorax": "气胸",
    "fracture": "骨折",
    "hernia": "疝",
    "stone": "结石",
}
sets = st.sets(st.sampled_from(sorted(WORDS)))


def english(findings, denied=()):
    return "\n".join([f"- {name.capitalize()}" for name in findings] + [f"No {n}." for n in denied])


def chinese(findings, denied=()):
    said = [f"可见{WORDS[name]}。" for name in findings]
    return "".join(said + [f"未见{WORDS[name]}。" for name in denied])


@given(st.lists(st.tuples(sets, sets, sets), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_scores_are_those_of_scikit_learn(samples):
    """Answers are lists in English, references sentences in Chinese that also deny something."""
    said = [one for one, _, _ in samples]
    wanted = [other for _, other, _ in samples]
    answers = [english(sorted(findings)) for findings in said]
    references = []
    for _, findings, denied in samples:
        references.append(chinese(sorted(findings), sorted(denied - findings)))
    scores = listing_scores(answers, references)

    binarizer = MultiLabelBinarizer(classes=sorted(WORDS)).fit([WORDS])
    truth, guess = binarizer.transform(wanted), binarizer.transform(said)
    micro = precision_recall_fscore_support(truth, guess, average="micro", zero_division=0)
    assert [scores[name] for name in RATIOS] == pytest.approx(micro[:3])
    by_picture = precision_recall_fscore_support(truth, guess, average="samples", zero_division=1)
    # where only one of the two sets is empty scikit-learn's F1 is 0, and so is ours
    assert scores["picture_f1"] == pytest.approx(by_picture[2])
    assert scores["all_right"] == accuracy_score(truth, guess)
    each = precision_recall_fscore_support(truth, guess, average=None, zero_division=0)
    for place, name in enumerate(binarizer.classes_):
        found = scores["by_finding"].get(name)
        if found is None:
            assert each[3][place] == 0 and guess[:, place].sum() == 0
            continue
        shown = [found[key] for key in ("precision", "recall", "f1", "support")]
        assert shown == pytest.approx([column[place] for column in each])
        assert found["listed"] == guess[:, place].sum()
        assert scores["invented"].get(name, 0) == (guess > truth)[:, place].sum()
        assert scores["missed"].get(name, 0) == (guess < truth)[:, place].sum()


def test_synonyms_and_languages_are_one():
    answers = ["1. Haematoma\n2. Pleural effusions on both sides", "肿物；骨折", ZH]
    references = ["血肿，双侧胸腔积液。", "A space-occupying lesion and a fractured rib.", EN]
    scores = listing_scores(answers, references)
    assert scores["precision"] == scores["recall"] == scores["all_right"] == 1
    assert scores["invented"] == scores["missed"] == scores["contradicted"] == {}


def test_a_denied_finding_is_not_listed():
    # the reference denies what the answer finds, and the other way round
    scores = listing_scores([EN, EN_DENIED], [EN_DENIED, EN])
    assert scores["f1"] == scores["all_right"] == scores["picture_f1"] == 0
    (name,) = scores["invented"]
    assert scores["missed"] == {name: 1}
    nothing = listing_scores(["No abnormal finding.", ""], ["未见异常。", EN_DENIED])
    assert nothing["all_right"] == nothing["picture_f1"] == 1 and nothing["by_finding"] == {}
    silent = listing_scores([""], ["A cyst. No mass."])
    assert silent["missed"] == {"cyst": 1} and silent["contradicted"] == {}
    contradicted = listing_scores(["A mass. No cyst."], ["A cyst. No mass."])
    assert contradicted["contradicted"] == {"cyst": 1, "mass": 1}


@pytest.mark.parametrize(
    ("text", "findings", "denied"),
    [
        ("Pleural effusion: absent", set(), {"pleural effusion"}),
        ("1. Pleural effusion: No.\n2. Nodule: present", {"nodule"}, {"pleural effusion"}),
        ("- 胸腔积液：无\n- 结节：有", {"nodule"}, {"pleural effusion"}),
        ("Findings: a nodule and a cyst", {"nodule", "cyst"}, set()),
        ("A nodule. CT is recommended to exclude a tumor.", {"nodule"}, set()),
        ("A nodule in one lung; no nodule in the other.", {"nodule"}, set()),
        ("", set(), set()),
    ],
)
def test_lists_as_models_write_them(text, findings, denied):
    listing = read_listing(text)
    assert listing.findings == findings and listing.denied == denied


@pytest.mark.parametrize(
    "text",
    [
        "A nodule.\nDifferential diagnosis: metastasis, tuberculosis.",
        "A nodule.\n\n**Differential diagnosis**\n- metastasis\n- tuberculosis",
        "A nodule. The differential diagnosis includes metastasis and tuberculosis.",
        "右肺结节。\n鉴别诊断：转移、结核。",
        "鉴别诊断：\n1. 转移\n2. 结核\n\n所见：结节。",
    ],
)
def test_what_could_be_is_no_finding(text):
    listing = read_listing(text)
    assert listing.findings == {"nodule"}
    assert listing.differential == {"metastasis", "tuberculosis"}


def test_differentials_are_compared_where_the_reference_has_one():
    reference = "A nodule. Differential diagnosis: metastasis, tuberculosis."
    answers = [
        "A nodule. Differential diagnosis: tuberculosis.",
        "Metastasis.",
        "A nodule.",
        "肿块",
    ]
    scores = listing_scores(answers, [reference, reference, reference, "A mass."])
    assert scores["differential_recall"] == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert listing_scores(["A mass."], ["A mass."])["differential_recall"] is None
    samples = listing_scores(answers, [reference] * 3 + ["A mass."], per_sample=True)
    assert math.isnan(samples["differential_recall"][3])


def test_scores_by_sample_make_the_score_and_carry_intervals():
    answers = ["A nodule.", "A cyst and a stone.", "", "A hernia.", "A fracture.", "A cyst."]
    references = ["A nodule.", "A cyst.", "A stone.", "No hernia.", "骨折。", "A cyst. A stone."]
    scores = listing_scores(answers, references)
    samples = listing_scores(answers, references, per_sample=True)
    rows = np.array(samples["findings"])
    for name, ratio in RATIOS.items():
        assert ratio(rows) == scores[name]
    assert np.mean(samples["picture_f1"]) == scores["picture_f1"]
    assert samples["invented"][1] == ["stone"] and samples["missed"][2] == ["stone"]
    assert scores["invented_per_picture"] == pytest.approx(2 / 6)
    assert scores["missed_per_picture"] == pytest.approx(2 / 6)

    groups = [f"patient-{number}" for number in range(6)]
    found = with_intervals(listing_scores, answers, references, groups=groups)
    assert found["f1"] == scores["f1"] and found["by_finding"] == scores["by_finding"]
    interval = found["intervals"]["f1"]
    assert interval["low"] <= scores["f1"] <= interval["high"]
    other = listing_scores(references, references, per_sample=True)
    better = paired_bootstrap(other["findings"], rows, groups, statistic=RATIOS["f1"])
    assert better["difference"] == pytest.approx(1 - scores["f1"])


def test_questions_and_slips():
    languages = [detect_language(question) for question in LISTING_QUESTIONS]
    assert languages == ["en", "en", "zh", "zh"]
    with pytest.raises(ValueError, match="2 predictions, 1 references"):
        listing_scores(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="an answer must be text, not NoneType"):
        read_listing(None)


@given(st.text(max_size=80))
@settings(max_examples=200, deadline=None)
def test_any_text_can_be_read(text):
    assert listing_scores([text], [text])["all_right"] == 1
