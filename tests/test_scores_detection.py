"""Findings: reported where there are some, where there are none, and rivals that see no pixel."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix

from medtune import scores

CYST = "The region shows the liver. Within it lies a cyst."
NODULE = "The region shows the lung. Within it lies a solid nodule."
NONE = "The region shows the liver. No focal lesion is seen within it."
SILENT = "The region shows the liver."


@given(st.lists(st.tuples(st.sampled_from([CYST, NODULE, NONE]), st.sampled_from([CYST, NONE]))))
def test_shares_are_those_of_the_confusion_matrix(pairs):
    if not pairs:
        return
    answers = [answer for answer, _ in pairs]
    references = [reference for _, reference in pairs]
    found = scores.detection_scores(answers, references)
    wanted = [reference != NONE for reference in references]
    said = [answer != NONE for answer in answers]
    table = confusion_matrix(wanted, said, labels=[False, True])
    for name, (none, some) in {"false_alarms": table[0], "sensitivity": table[1]}.items():
        if none + some == 0:
            assert found[name] is None
        else:
            assert found[name] == pytest.approx(some / (none + some))
    right = [answer == reference for answer, reference in pairs if reference != NONE]
    assert found["kind_right"] == (pytest.approx(sum(right) / len(right)) if right else None)


def test_answers_that_never_speak_of_findings_are_not_scored():
    silent = scores.detection_scores([SILENT] * 2, [CYST, NONE])
    assert silent == {"sensitivity": None, "false_alarms": None, "kind_right": None}
    # one that speaks is enough: then a silent answer reports nothing
    some = scores.detection_scores([SILENT, NONE], [CYST, NONE], per_sample=True)
    assert some["sensitivity"][0] == 0 and math.isnan(some["sensitivity"][1])
    assert some["false_alarms"][1] == 0


def test_the_table_without_pixels_answers_what_its_kind_mostly_says():
    known = [NODULE, NODULE, NONE, NONE, CYST, NONE.replace("liver", "spleen")]
    kinds = ["airy", "airy", "airy", "solid", "solid", "solid"]
    answers = scores.answer_by_kind(known, kinds, ["airy", "solid", "never seen"])
    assert answers[0] == NODULE
    # of the two silent ones the liver is first; of all captions "no lesion" is as frequent
    assert answers[1] == NONE
    assert answers[2] in (NODULE, NONE)
    with pytest.raises(ValueError, match="2 captions, 1 known"):
        scores.answer_by_kind([NONE, CYST], ["solid"], ["solid"])


# ---- other people


def rows_of(person: str, answers: list[str], references: list[str]) -> list[dict]:
    rows = []
    for number, (answer, reference) in enumerate(zip(answers, references, strict=True)):
        row = {"answer": answer, "reference": reference, "group": person, "slice": number // 2}
        rows.append(row)
    return rows


def test_another_person_is_scored_over_what_was_taught():
    heart = "The region shows the heart. No focal lesion is seen within it."
    people = {
        "held out": rows_of("one", [CYST, NONE] * 6, [CYST, NONE] * 6),
        "another": rows_of("two", [CYST, NONE, NONE] * 4, [CYST, CYST, heart] * 4),
    }
    found = scores.score_people(people, [CYST, NONE])
    own, other = found["held out"], found["another"]
    assert own["scores"]["sensitivity"]["value"] == 100 and own["not_taught"] == {}
    assert other["pairs"] == 12 and other["scored"] == 8 and other["not_taught"] == {"heart": 4}
    # the wrong names of the heart do not count
    assert other["scores"]["name right"]["value"] == 100
    assert other["scores"]["sensitivity"]["value"] == 50
    assert other["scores"]["false alarms"]["value"] is None
    assert other["slices"] == 6 and other["structures"] == 2
    assert other["scores"]["sensitivity"]["label"] == "within one patient: 6 slices"


def test_a_structure_of_a_slice_counts_once_however_many_pictures_show_it():
    liver = "The region shows the liver."
    spleen = "The region shows the spleen."
    # the liver of slice 1 in three pictures, all right; the spleen of it and of slice 2 in one each
    rows = [{"answer": liver, "reference": liver, "slice": 1}] * 3
    rows += [{"answer": liver, "reference": spleen, "slice": slice_} for slice_ in (1, 2)]
    found = scores.score_people({"another": rows}, [liver, spleen])["another"]
    assert found["scores"]["name right"]["value"] == 60
    assert found["names_by_region"] == pytest.approx(100 / 3)
    assert found["names_lost"] == [
        {"structure": "spleen", "pairs": 2, "right": 0.0, "training_pairs": 1},
        {"structure": "liver", "pairs": 3, "right": 100.0, "training_pairs": 1},
    ]
    unknown = [{"answer": liver, "reference": liver}]
    assert scores.score_people({"x": unknown}, [liver])["x"]["names_by_region"] is None


def test_what_differs_between_people_is_counted():
    lung = "shown with a lung window. The region of interest covers about 10% of its area"
    soft = "shown with a soft tissue window. The region of interest covers about 2% of its area"
    start = "The image is a computed tomography (CT) scan of the chest in axial view, "
    end = " and shows the liver. It has high density."
    wide = rows_of("one", [""] * 4, [start + lung + end] * 4)
    narrow = rows_of("two", [""] * 4, [start + soft + end] * 3 + [start + lung + end])
    found = scores.score_people({"wide": wide, "narrow": narrow}, [start + soft + end])
    assert found["wide"]["area"] == 10 and found["narrow"]["area"] == 2
    assert found["narrow"]["windows"] == {"soft tissue": 75.0, "lung": 25.0}
    assert found["wide"]["densities"] == {"high density": 100.0}


def test_nobody_and_nothing_taught():
    with pytest.raises(ValueError, match="people is empty"):
        scores.score_people({}, [NONE])
    with pytest.raises(ValueError, match="'one' has no answers"):
        scores.score_people({"one": []}, [NONE])
    found = scores.score_people({"one": rows_of("one", [NONE], [NONE])}, ["The spleen."])["one"]
    assert found["scored"] == 0 and found["not_taught"] == {"liver": 1}
    assert found["scores"]["name right"]["value"] is None
