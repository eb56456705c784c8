"""Several conditions side by side: the numbers are those of the scores they stand for."""

import math

import pytest

from medtune import scores

ORGANS = ["liver", "spleen", "heart", "colon", "aorta", "pancreas"]
REFERENCES = [
    f"The region of interest, located in the middle of the image, shows the {organ}."
    for organ in ORGANS
]
GROUPS = [f"patient {number}" for number in range(len(ORGANS))]
ANSWERS = {
    "tuned": [*REFERENCES[:5], REFERENCES[0]],
    "base": ["An image."] * len(REFERENCES),
}


def same_length(answer: str, reference: str) -> float:
    """1 or 0; no value for a reference about the heart."""
    if "heart" in reference:
        return math.nan
    return float(len(answer) == len(reference))


MEASURES = [
    scores.Measure("words", scores.standard_scores, "bleu"),
    scores.Measure("name right", scores.finding_scores, "structure_exact", 100),
    scores.Measure("same length", scores.pair_score(same_length), "same_length", 100),
]


@pytest.fixture(scope="module")
def scored() -> dict:
    return scores.score_conditions(ANSWERS, REFERENCES, MEASURES, groups=GROUPS)


@pytest.mark.parametrize("condition", ANSWERS)
def test_the_numbers_are_those_of_the_scores(scored, condition):
    texts = ANSWERS[condition]
    results = scored[condition].results
    words = scores.with_intervals(scores.standard_scores, texts, REFERENCES, groups=GROUPS)
    names = scores.with_intervals(scores.finding_scores, texts, REFERENCES, groups=GROUPS)
    assert results["words"] == words["intervals"]["bleu"]
    assert results["name right"]["value"] == 100 * names["structure_exact"]
    name_right = names["intervals"]["structure_exact"]
    assert results["name right"]["error"] == 100 * name_right["error"]
    if name_right["low"] is None:  # the base names nothing, in any group
        assert results["name right"]["low"] is None
    else:
        assert results["name right"]["low"] == 100 * name_right["low"]
    assert scored[condition].facts["bleu_signature"] == words["bleu_signature"]
    assert scored[condition].facts["by_kind"] == names["by_kind"]


def test_a_judge_of_one_answer_is_a_score():
    score = scores.pair_score(same_length)
    values = score(ANSWERS["tuned"], REFERENCES, per_sample=True)["same_length"]
    assert [value for value in values if value == value] == [1, 1, 1, 1, 0]
    assert score(ANSWERS["tuned"], REFERENCES) == {"same_length": 0.8}
    assert score(["a"], ["the heart"]) == {"same_length": None}
    with pytest.raises(ValueError, match="2 predictions, 1 references"):
        score(["a", "b"], ["c"])


def test_a_condition_that_never_speaks_of_a_matter_is_not_scored_on_it():
    def names_heart(text: str) -> bool:
        return "heart" in text

    score = scores.pair_score(same_length, speaks=names_heart)
    silent = ["an image of liver"] * len(REFERENCES)
    measures = [scores.Measure("length", score, "same_length")]
    scored = scores.score_conditions(
        {"tuned": REFERENCES, "base": silent}, REFERENCES, measures, groups=GROUPS
    )
    assert scored["tuned"].results["length"]["value"] == 1
    assert scored["base"].results["length"]["value"] is None
    assert scores.compare_conditions(scored["tuned"], scored["base"], groups=GROUPS) == {}
    # one answer that speaks is enough: then the four silent ones are wrong
    some = [REFERENCES[2], *silent[1:]]
    assert score(some, REFERENCES) == {"same_length": pytest.approx(1 / 5)}


def test_samples_of_one_patient_are_compared_by_their_slices():
    groups = ["held-out-block-0"] * 6
    options = {"groups": groups, "slices": range(6)}
    scored = scores.score_conditions(ANSWERS, REFERENCES, MEASURES, **options)
    assert scored["tuned"].results["words"]["label"] == "within one patient: 6 slices"
    found = scores.compare_conditions(scored["tuned"], scored["base"], **options)
    assert found["words"]["better"] and found["words"]["label"] == "within one patient: 6 slices"
    without = scores.compare_conditions(scored["tuned"], scored["base"], groups=groups)
    assert without["words"]["better"] is None and "slices" in without["words"]["reason"]


def test_a_comparison_is_the_paired_bootstrap_in_the_unit_of_the_measure(scored):
    found = scores.compare_conditions(scored["tuned"], scored["base"], groups=GROUPS)
    assert list(found) == ["words", "name right", "same length"]
    ours = scores.finding_scores(ANSWERS["tuned"], REFERENCES, per_sample=True)
    theirs = scores.finding_scores(ANSWERS["base"], REFERENCES, per_sample=True)
    wanted = scores.paired_bootstrap(ours["structure_exact"], theirs["structure_exact"], GROUPS)
    for end in ("difference", "low", "high", "error"):
        wanted[end] *= 100
    assert found["name right"] == wanted


def test_the_difference_of_a_corpus_score_is_that_of_the_corpus(scored):
    found = scores.compare_conditions(scored["tuned"], scored["base"], ["words"], groups=GROUPS)
    tuned = scored["tuned"].results["words"]["value"]
    base = scored["base"].results["words"]["value"]
    assert found["words"]["difference"] == pytest.approx(tuned - base)
    itself = scores.compare_conditions(scored["base"], scored["base"], ["words"], groups=GROUPS)
    assert itself["words"]["difference"] == itself["words"]["error"] == 0
    assert itself["words"]["better"] is itself["words"]["decided"] is False


def test_without_groups_there_are_values_and_no_intervals():
    scored = scores.score_conditions(ANSWERS, REFERENCES, MEASURES)
    result = scored["tuned"].results["name right"]
    assert result["value"] == pytest.approx(500 / 6)
    assert result["low"] is result["high"] is None
    assert result["reason"] == "no patients or series known"
    assert scores.compare_conditions(scored["tuned"], scored["base"], groups=None) == {}


def test_what_cannot_be_scored_has_no_value_and_is_not_compared():
    texts = ["nothing in particular"] * 6
    scored = scores.score_conditions({"a": texts, "b": texts}, texts, MEASURES, groups=GROUPS)
    assert scored["a"].results["name right"]["value"] is None
    found = scores.compare_conditions(scored["a"], scored["b"], groups=GROUPS)
    assert list(found) == ["words", "same length"]


def test_it_says_which_measures_there_are(scored):
    with pytest.raises(ValueError, match="'place' was not scored: there are words, name right"):
        scores.compare_conditions(scored["tuned"], scored["base"], ["place"], groups=GROUPS)


def test_each_score_is_called_once_a_condition():
    calls = []

    def counted(answers, references, *, columns):
        calls.append(answers)
        return scores.standard_scores(answers, references, columns=columns)

    measures = [scores.Measure(key, counted, key) for key in ("bleu", "chrf", "rouge1")]
    scores.score_conditions(ANSWERS, REFERENCES, measures)
    assert calls == list(ANSWERS.values())
