"""Yes/no questions about what is in a picture, and how they are scored."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from medtune.answers import generate_answers
from medtune.benchmarks import existence_questions, existence_scores
from medtune.models import load_base, load_processor

NAMES = ["aorta", "colon", "heart", "liver", "spleen", "trachea"]
pictures = st.lists(st.sets(st.sampled_from(NAMES)), min_size=1, max_size=10)


@settings(deadline=None)
@given(pictures=pictures, each=st.integers(1, 3), seed=st.integers(0, 5))
def test_every_question_is_answered_by_its_own_picture(pictures, each, seed):
    asked = existence_questions(pictures, each=each, seed=seed)
    assert asked == existence_questions(pictures, each=each, seed=seed)
    assert len({question.key for question in asked}) == len(asked)
    counts = Counter((question.sample, question.kind) for question in asked)
    for question in asked:
        there = question.name in pictures[question.sample]
        assert there == (question.kind == "present") == (question.reference == "Yes.")
        assert question.name in question.question
        # as many about what is absent as about what is present, as far as there are names
        assert counts[question.sample, question.kind] <= counts[question.sample, "present"] <= each


def test_the_frequent_and_the_neighbouring_are_what_they_say():
    pictures = [{"heart"}] * 5 + [{"liver", "spleen"}, {"liver", "spleen"}, {"liver", "colon"}]
    chosen = {
        (question.sample, question.kind): question.name
        for question in existence_questions([{"liver"}, *pictures])
    }
    assert chosen[0, "frequent"] == "heart" and chosen[0, "neighbouring"] == "spleen"
    assert chosen[1, "frequent"] == "liver" and (1, "neighbouring") not in chosen
    # a box shows one structure; what lies beside it is known from the whole picture
    boxes = [{"liver"}, {"spleen"}, {"heart"}]
    together = [{"liver", "heart"}, {"liver", "heart"}, {"liver", "spleen"}]
    asked = existence_questions(boxes, together=together, question="Does the box show the {}?")
    [beside] = [one for one in asked if one.sample == 0 and one.kind == "neighbouring"]
    assert beside.question == "Does the box show the heart?"


@settings(deadline=None)
@given(said=st.lists(st.booleans(), min_size=8, max_size=8))
def test_the_rates_are_those_of_scikit_learn(said):
    asked = existence_questions([{"liver"}, {"heart"}])
    answers = ["Yes, it does." if yes else "No." for yes in said]
    scores = existence_scores(asked, answers[: len(asked)])
    for kind, found in scores.items():
        rows = [row for row, one in enumerate(asked) if one.kind in ("present", kind)]
        wanted = [asked[row].kind == "present" for row in rows]
        own = [said[row] for row in rows]
        assert found["accuracy"] == pytest.approx(accuracy_score(wanted, own))
        for name, oracle in (
            ("f1", f1_score),
            ("precision", precision_score),
            ("recall", recall_score),
        ):
            assert found[name] == pytest.approx(oracle(wanted, own, zero_division=0))
        assert found["yes"] == pytest.approx(sum(own) / len(own)) and found["unclear"] == 0


def test_who_always_says_yes_is_found_out():
    asked = existence_questions(
        [{"liver", "spleen"}, {"heart", "liver"}, {"aorta", "heart"}], each=2
    )
    found = existence_scores(asked, ["Yes."] * len(asked))
    assert found["random"]["accuracy"] == 0.5 and found["random"]["yes"] == 1
    assert found["random"]["recall"] == 1


def test_an_answer_that_is_neither_is_wrong_and_counted():
    asked = existence_questions([{"liver"}, {"heart"}])
    found = existence_scores(asked, ["The image is a normal CT scan."] * len(asked))["random"]
    # "no" is part of "normal", and this is no answer
    assert (found["accuracy"], found["unclear"], found["yes"]) == (0, 1, 0)
    found = existence_scores(asked, ["Yes and no."] * len(asked))["random"]
    assert (found["accuracy"], found["unclear"]) == (0, 1)


def test_chinese_answers_are_read():
    asked = existence_questions([{"肝脏"}, {"心脏"}], question="图像中有{}吗？请回答是或不是。")
    answers = ["是的。" if one.kind == "present" else "没有。" for one in asked]
    found = existence_scores(asked, answers, language="zh")
    assert found["random"]["accuracy"] == found["random"]["f1"] == 1


def test_the_accuracy_has_an_interval_over_patients():
    asked = existence_questions([{NAMES[number % 5]} for number in range(20)])
    answers = ["Yes." if one.sample % 3 else "No." for one in asked]
    groups = [f"p{one.sample // 2}" for one in asked]
    found = existence_scores(asked, answers, groups=groups)["random"]
    assert found["accuracy"] == 0.5
    mixed = ["Yes." if one.kind == "present" or one.sample % 3 == 0 else "No." for one in asked]
    found = existence_scores(asked, mixed, groups=groups)["random"]
    assert found["low"] < found["accuracy"] < found["high"]


def test_a_model_answers_them(tiny_vlm):
    asked = existence_questions([{"liver"}, {"heart"}])
    rows = []
    for one in asked:
        picture = Image.new("RGB", (64, 64), (60 * one.sample,) * 3)
        rows.append(
            {"id": one.key, "image": picture, "question": one.question, "caption": one.reference}
        )
    model, processor = load_base(str(tiny_vlm)), load_processor(str(tiny_vlm))
    answers = generate_answers(model, processor, rows, max_new_tokens=4)
    assert [answer["reference"] for answer in answers] == [one.reference for one in asked]
    found = existence_scores(asked, [answer["answer"] for answer in answers])
    # the tiny base describes, whatever is asked
    assert found["random"]["unclear"] == 1


def test_what_cannot_be_asked_is_refused():
    with pytest.raises(ValueError, match="present is empty"):
        existence_questions([])
    with pytest.raises(ValueError, match="each=0"):
        existence_questions([{"liver"}], each=0)
    with pytest.raises(ValueError, match="question must hold"):
        existence_questions([{"liver"}], question="What?")
    with pytest.raises(ValueError, match="answers must hold"):
        existence_scores(existence_questions([{"liver"}, {"heart"}]), ["Yes."])
