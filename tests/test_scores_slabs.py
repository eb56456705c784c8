"""medtune.scores.slabs: what an answer says of slices, changes and records is read as it is meant."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medtune.scores import (
    Measure,
    SlabAnswer,
    bootstrap_interval,
    read_slab_answer,
    score_conditions,
    slab_scores,
)

WORDS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}


@given(st.integers(0, 6), st.integers(1, 6), st.booleans())
def test_a_count_is_read_in_digits_and_in_words(count, pictures, words):
    said, of = (WORDS.get(count, "none"), WORDS[pictures]) if words else (count, pictures)
    for text in (f"In {said} of the {of} pictures.", f"It shows on {said} out of {of} slices"):
        assert read_slab_answer(text).count == count
    assert read_slab_answer(f"在{pictures}张图中的{count}张里。").count == count


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("In all of the 4 slices.", SlabAnswer(count=4)),
        ("In all of the slices.", SlabAnswer()),
        ("In none of the pictures.", SlabAnswer(count=0)),
        (
            "In 3 of the 4 pictures. It is largest in picture 2, about a third as wide as the frame.",
            SlabAnswer(count=3, largest=2, size="third"),
        ),
        (
            "The lesion is seen on two of four images; slice 3 shows it at its largest, a fifth.",
            SlabAnswer(count=2, largest=3, size="fifth"),
        ),
        (
            "在4张图中的2张里。在图4里最大，宽度约为方框的十分之一。",
            SlabAnswer(count=2, largest=4, size="tenth"),
        ),
        ("Yes, the left kidney is there.", SlabAnswer(present=True)),
        ("No, the heart is not there.", SlabAnswer(present=False)),
        ("有左肾。", SlabAnswer(present=True)),
        ("没有左肾。", SlabAnswer(present=False)),
        ("It moves to the left.", SlabAnswer(direction="left")),
        ("It moves up.", SlabAnswer(direction="up")),
        (
            "It moves from the middle right to the middle left part.",
            SlabAnswer(direction="left"),
        ),
        (
            "It moves from the lower middle to the upper middle part.",
            SlabAnswer(direction="up"),
        ),
        ("它从左中部移到右中部。", SlabAnswer(direction="right")),
        ("它向下移动。", SlabAnswer(direction="down")),
        ("It shifts upwards.", SlabAnswer(direction="up")),
        ("它向左偏移。", SlabAnswer(direction="left")),
        ("It is in 3 pictures, so it is 9 mm high.", SlabAnswer(height=9)),
        ("它在3张图里，所以高9毫米。", SlabAnswer(height=9)),
        ("7.5 millimetres, or 3 slices.", SlabAnswer(height=7.5)),
        ("Between 6 mm and 9 mm.", SlabAnswer()),
        (
            "The creatinine is raised. There is no lesion in it.",
            SlabAnswer(raised=True, seen=False),
        ),
        ("肌酐正常。里面没有病灶。", SlabAnswer(raised=False, seen=False)),
        ("The lesion has grown.", SlabAnswer(change="grown")),
        ("It is smaller now.", SlabAnswer(change="shrunk")),
        ("The lesion has not changed.", SlabAnswer(change="same")),
        ("The lesion has not grown.", SlabAnswer()),
        ("The lesion is gone.", SlabAnswer(change="gone")),
        ("病灶变大了。", SlabAnswer(change="grown")),
        ("病灶没有变大。", SlabAnswer()),
        ("病灶没有变化。", SlabAnswer(change="same")),
        ("病灶是新的。", SlabAnswer(change="new")),
        ("病灶不见了。", SlabAnswer(change="gone")),
        (
            "The record knows of no lesion. A dark lesion is in its upper left part.",
            SlabAnswer(known=False, seen=True),
        ),
        (
            "The record knows of a lesion. There is no lesion in it.",
            SlabAnswer(known=True, seen=False),
        ),
        ("病历里有已知的病灶。里面没有病灶。", SlabAnswer(known=True, seen=False)),
        ("病历里没有已知的病灶。里面中央有一个亮的病灶。", SlabAnswer(known=False, seen=True)),
        # contradictions, and what says nothing
        ("In 2 of the 4 pictures, in 3 of the 4 pictures.", SlabAnswer()),
        ("It has grown and it has shrunk.", SlabAnswer()),
        ("It moves to the left and to the right.", SlabAnswer()),
        ("There is a green frame in the center of the image.", SlabAnswer()),
        ("", SlabAnswer()),
    ],
)
def test_what_is_said_is_read_and_nothing_else(text, expected):
    assert read_slab_answer(text) == expected


def test_a_score_counts_what_the_reference_says():
    references = ["In 3 of the 4 pictures. It is largest in picture 2.", "The lesion is new."]
    scores = slab_scores(["In 2 of the 4 pictures. It is largest in picture 2.", "?"], references)
    assert (scores["count_right"], scores["count_within_one"]) == (0.0, 1.0)
    assert scores["largest_right"] == 1.0
    # nobody spoke of a change at all, or of a direction
    assert scores["change_right"] is None and scores["direction_right"] is None
    rows = slab_scores(
        ["In 5 of the 9 slices", "The lesion is the same."], references, per_sample=True
    )
    assert rows["count_within_one"][0] == 0.0 and math.isnan(rows["count_within_one"][1])
    assert rows["change_right"][1] == 0.0 and rows["largest_right"][0] != 0.0


def test_growth_is_asked_of_lesions_that_are_in_both_pictures():
    references = ["The lesion has grown.", "The lesion is the same.", "The lesion is gone."]
    scores = slab_scores(["The lesion has grown.", "The lesion is new.", "?"], references)
    assert scores["growth_right"] == 0.5 and scores["change_right"] == pytest.approx(1 / 3)


def test_it_fits_into_a_table_with_intervals():
    references = ["It moves up.", "It moves down."] * 6
    answers = {"right": references, "half": ["It moves up."] * 12}
    groups = [f"p{number}" for number in range(12)]
    measures = [Measure("direction", slab_scores, "direction_right", 100)]
    scored = score_conditions(answers, references, measures, groups=groups)
    assert scored["right"].results["direction"]["value"] == 100
    rows = slab_scores(answers["half"], references, per_sample=True)["direction_right"]
    interval = bootstrap_interval(rows, groups)
    assert scored["half"].results["direction"]["low"] == pytest.approx(100 * interval["low"])
    with pytest.raises(ValueError, match="1 predictions"):
        slab_scores(["It moves up."], references)
