"""A series of answers beside one report."""

from hypothesis import given
from hypothesis import strategies as st

from medtune.scores import compare_with_report
from medtune.scores.series import _ranges


def numbers_of(text: str) -> list[int]:
    """Read "3, 7-9" back."""
    numbers = []
    for part in text.split(", "):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


@given(st.sets(st.integers(1, 60), min_size=1))
def test_ranges_can_be_read_back(numbers):
    assert numbers_of(_ranges(sorted(numbers))) == sorted(numbers)


def test_each_finding_stands_once_with_its_slices():
    answers = ["Liver with a cyst.", "No cyst. Ascites.", "Ascites and a mass.", "Normal liver."]
    rows = compare_with_report(answers, "Cyst of the liver, gallstones. No mass.")
    found = {row["finding"]: (row["slices"], row["of"], row["report"]) for row in rows}
    assert found == {
        "cyst": ("1", "1 of 4", "says it"),
        "stone": ("-", "0 of 4", "says it"),
        "mass": ("3", "1 of 4", "denies it"),
        "ascites": ("2-3", "2 of 4", "is silent"),
    }
    assert [row["report"] for row in rows] == ["says it", "says it", "denies it", "is silent"]


def test_a_chinese_report_is_read_too():
    (row,) = compare_with_report(["肝内见囊肿。"], "肝囊肿。未见腹水。")
    assert (row["slices"], row["report"]) == ("1", "says it")


def test_no_answers_and_no_findings():
    assert compare_with_report([], "Normal.") == []
    assert compare_with_report(["Normal liver."], "") == []
