"""What answers name that is not there, and what they leave out."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medtune.scores import (
    bootstrap_interval,
    invented_scores,
    named_in_pictures,
    paired_bootstrap,
    with_intervals,
)

ORGANS = ["liver", "spleen", "heart", "pancreas", "aorta"]
FINDINGS = ["cyst", "solid nodule", "sclerotic lesion"]


def caption(structure: str, *, beside: tuple[str, ...] = (), finding: str = "") -> str:
    border = f" It is bordered by the {' and the '.join(beside)}." if beside else ""
    if finding:
        end = f" Within it lies a {finding}."
    else:
        end = " No focal lesion is seen within it."
    return f"The region of interest shows the {structure}.{border}{end}"


def test_each_count_of_a_small_set():
    references = [
        caption("liver", beside=("spleen",), finding="cyst"),
        caption("heart"),
        caption("spleen", finding="solid nodule"),
        caption("aorta"),
    ]
    answers = [
        caption("liver", beside=("pancreas",), finding="sclerotic lesion"),  # another name
        caption("heart", finding="cyst"),  # of nothing
        caption("spleen", finding="solid nodule"),  # all right
        "I cannot tell.",
    ]
    scores = invented_scores(answers, references)
    # named: liver, pancreas; heart; spleen
    assert scores["structures_invented"] == 1 / 4 and scores["invents_structure"] == 1 / 4
    # wanted: liver, spleen; heart; spleen; aorta
    assert scores["structures_missed"] == 2 / 5
    assert scores["findings_invented"] == 2 / 3 and scores["invents_finding"] == 2 / 4
    assert scores["findings_missed"] == 1 / 2 and scores["finding_of_nothing"] == 1 / 3
    by_name = scores["by_name"]
    counts = {"kind": "structure", "wanted": 2, "named": 1, "invented": 0, "missed": 1}
    assert by_name["spleen"] == counts and next(iter(by_name)) == "spleen"
    assert by_name["cyst"] == {
        "kind": "finding", "wanted": 1, "named": 1, "invented": 1, "missed": 1
    }  # fmt: skip


def test_what_another_caption_of_the_picture_names_is_not_invented():
    references = [caption("liver"), caption("spleen", beside=("pancreas",)), caption("heart")]
    present = named_in_pictures(references, [4, 4, 5])
    assert present == [{"liver", "spleen", "pancreas"}] * 2 + [{"heart"}]
    answers = [caption("pancreas"), caption("heart"), caption("heart")]
    alone = invented_scores(answers, references, per_sample=True)
    together = invented_scores(answers, references, present=present, per_sample=True)
    assert alone["invents_structure"] == [1, 1, 0]
    assert together["invents_structure"] == [0, 1, 0]
    # a name at the wrong place is still a miss
    assert together["structures_missed"] == alone["structures_missed"] == [1, 1, 0]


def test_a_general_word_invents_nothing_where_something_is():
    references = [caption("liver", finding="cyst"), caption("liver")]
    scores = invented_scores(["The liver has a lesion."] * 2, references, per_sample=True)
    assert scores["invents_finding"] == [0, 1]
    # it does not give the name either
    assert scores["findings_missed"][0] == 1 and math.isnan(scores["findings_missed"][1])


def test_what_is_denied_is_not_named():
    scores = invented_scores(["No cyst is seen in the liver."], [caption("liver")])
    assert scores["invents_finding"] == 0 and scores["findings_invented"] is None


def test_both_languages_have_the_same_names():
    chinese = "感兴趣区域显示肝脏。其内可见一个囊肿。"
    scores = invented_scores([chinese], [caption("liver", finding="cyst")])
    assert scores["structures_invented"] == 0 and scores["findings_missed"] == 0


samples = st.lists(
    st.tuples(
        st.sampled_from(ORGANS),
        st.sampled_from(ORGANS),
        st.sampled_from(["", *FINDINGS]),
        st.sampled_from(["", *FINDINGS]),
    ),
    min_size=1,
    max_size=12,
)


@settings(deadline=None)
@given(samples=samples)
def test_named_and_wanted_meet_in_what_is_right(samples):
    answers = [caption(said, finding=finding) for said, _, finding, _ in samples]
    references = [caption(there, finding=finding) for _, there, _, finding in samples]
    scores = invented_scores(answers, references)
    wrong = sum(said != there for said, there, _, _ in samples)
    assert scores["structures_invented"] == pytest.approx(wrong / len(samples))
    for row in scores["by_name"].values():
        # what is named and not invented is what is wanted and not missed
        assert row["named"] - row["invented"] == row["wanted"] - row["missed"]
    swapped = invented_scores(references, answers)
    for kind in ("structures", "findings"):
        assert scores[f"{kind}_invented"] == swapped[f"{kind}_missed"]


def test_the_intervals_are_those_of_the_house():
    rng = np.random.default_rng(0)
    references = [caption(ORGANS[number % 5]) for number in range(60)]
    answers = [text if rng.random() < 0.7 else caption("stomach") for text in references]
    groups = ["block-1"] * 30 + ["block-2"] * 30
    slices = [number // 3 for number in range(60)]
    scores = with_intervals(invented_scores, answers, references, groups=groups, slices=slices)
    values = invented_scores(answers, references, per_sample=True)
    own = bootstrap_interval(values["invents_structure"], groups, slices=slices)
    assert scores["intervals"]["invents_structure"] == own
    share = scores["intervals"]["structures_invented"]
    assert share["low"] < scores["structures_invented"] < share["high"]
    assert share["label"] == "within one patient, blocks fixed: 20 slices"
    # one name an answer: both measures are the same
    assert (share["low"], share["high"]) == (pytest.approx(own["low"]), pytest.approx(own["high"]))
    paired = paired_bootstrap(values["invents_structure"], [0.0] * 60, groups, slices=slices)
    assert paired["better"]


def test_lists_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="2 answers, 1 present"):
        invented_scores(["a", "b"], ["a", "b"], present=[set()])
    with pytest.raises(ValueError, match="1 captions, 2 pictures"):
        named_in_pictures(["a"], [1, 2])
