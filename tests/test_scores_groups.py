"""For whom a model is worse: groups, small groups, and looking often."""

import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import binomtest, fisher_exact, mannwhitneyu

from medtune.records import convert_pairs, read_records
from medtune.scores import bootstrap_interval, compare_groups, correct_for_looks


def closed_testing(p_values: list[float]) -> list[float]:
    """Holm's correction by its meaning: the worst of all sets with a hypothesis, each by Bonferroni."""
    numbers = range(len(p_values))
    corrected = []
    for number in numbers:
        worst = 0.0
        for size in range(1, len(p_values) + 1):
            for chosen in itertools.combinations(numbers, size):
                if number in chosen:
                    worst = max(worst, size * min(p_values[i] for i in chosen))
        corrected.append(min(1.0, worst))
    return corrected


@settings(deadline=None)
@given(p_values=st.lists(st.floats(0, 1), max_size=7))
def test_the_correction_is_closed_testing_with_bonferroni(p_values):
    assert correct_for_looks(p_values) == pytest.approx(closed_testing(p_values))


def test_a_group_that_is_worse_is_found_and_the_test_is_fishers():
    wrong = [1] * 15 + [0] * 5 + [1] * 4 + [0] * 36
    device = ["old"] * 20 + ["new"] * 40
    first, second = compare_groups(wrong, {"device": device})
    assert {first["group"], second["group"]} == {"old", "new"}
    old = first if first["group"] == "old" else second
    assert (old["value"], old["others"], old["samples"]) == (0.75, 0.1, 20)
    assert old["p"] == fisher_exact([[15, 5], [4, 36]]).pvalue
    # of two groups, the one's others are the other: that is one look
    assert old["p_corrected"] == pytest.approx(old["p"]) and old["differs"] is True
    three = compare_groups(wrong, {"device": device, "site": ["a"] * 30 + ["b"] * 30})
    assert three[0]["p_corrected"] == pytest.approx(2 * three[0]["p"])


def test_values_that_are_no_shares_are_ranked():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(0, 1, 30), rng.normal(2, 1, 30)])
    sex = ["f"] * 30 + ["m"] * 30
    [first, _] = compare_groups(values, {"sex": sex})
    assert first["p"] == mannwhitneyu(values[:30], values[30:]).pvalue


def null_table(rng, patients=20, each=6):
    """Answers that are right and wrong by patient, and columns that mean nothing."""
    chance = rng.beta(1, 2, patients)
    groups = np.repeat([f"p{number}" for number in range(patients)], each)
    wrong = (rng.random(patients * each) < np.repeat(chance, each)).astype(float)
    sex = np.repeat(rng.permutation(["f", "m"] * (patients // 2)), each)
    device = np.repeat(rng.permutation(["a", "b", "c", "d"] * (patients // 4)), each)
    return wrong, {"sex": sex.tolist(), "device": device.tolist()}, groups.tolist()


def test_where_nothing_differs_a_difference_is_seldom_found():
    """In 5 of 100 tables at most; samples of one patient that pass for independent find far more."""
    rng = np.random.default_rng(1)
    found = without_patients = 0
    tables = 100
    for _ in range(tables):
        wrong, traits, groups = null_table(rng)
        lines = compare_groups(wrong, traits, groups=groups, resamples=100)
        found += any(line["differs"] for line in lines)
        lines = compare_groups(wrong, traits)
        without_patients += any(line["differs"] for line in lines)
    # 5% and three standard errors
    assert found / tables <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / tables)
    assert without_patients > 2 * found


def test_a_difference_between_patients_is_found_as_well():
    rng = np.random.default_rng(2)
    groups = np.repeat([f"p{number}" for number in range(24)], 8)
    worse = np.repeat([True] * 12 + [False] * 12, 8)
    wrong = (rng.random(24 * 8) < np.where(worse, 0.7, 0.2)).astype(float)
    traits = {"hospital": np.where(worse, "A", "B").tolist()}
    for line in compare_groups(wrong, traits, groups=groups.tolist()):
        assert line["differs"] is True and line["units"] == 12
        assert line["low"] < line["value"] < line["high"]


def test_small_groups_are_named_and_not_compared():
    wrong = [1] * 4 + [0, 1] * 20
    age = ["under 18"] * 4 + ["18 to 60"] * 40
    lines = {line["group"]: line for line in compare_groups(wrong, {"age": age})}
    young = lines["under 18"]
    assert young["differs"] is None and young["p"] is None and young["value"] == 1
    assert young["reason"] == "4 samples are too few (10)"
    # so it does not count as a look either
    assert lines["18 to 60"]["p_corrected"] == lines["18 to 60"]["p"]


def test_many_samples_of_few_patients_are_a_small_group():
    wrong = [1.0] * 40 + [0.0, 1.0] * 50
    groups = ["a"] * 20 + ["b"] * 20 + [f"p{number // 5}" for number in range(100)]
    device = ["old"] * 40 + ["new"] * 100
    lines = compare_groups(wrong, {"device": device}, groups=groups)
    old = next(line for line in lines if line["group"] == "old")
    assert old["differs"] is None and old["reason"] == "2 patients or slices are too few (5)"


def test_where_all_answers_of_a_group_are_wrong_the_interval_is_exact():
    groups = [f"p{number // 3}" for number in range(60)]
    wrong = [1.0] * 18 + [0.0, 1.0, 0.0] * 14
    device = ["old"] * 18 + ["new"] * 42
    lines = compare_groups(wrong, {"device": device}, groups=groups)
    old = next(line for line in lines if line["group"] == "old")
    # six patients, each counted once
    exact = binomtest(6, 6).proportion_ci()
    assert (old["low"], old["high"]) == (exact.low, exact.high)
    new = next(line for line in lines if line["group"] == "new")
    own = bootstrap_interval(wrong[18:], groups[18:])
    assert new["low"] is not None and own["reason"] and new["units"] == 14


def test_nothing_is_lost_in_silence():
    values = [1, 0, None, 1, 0, 1]
    lines = compare_groups(values, {"sex": ["f", None, "f", math.nan, "", "f"]}, smallest=2)
    counts = {line["group"]: line["samples"] for line in lines}
    assert counts == {"f": 2, "(not known)": 3}
    [line] = compare_groups([1, 0, 1], {"site": ["here"] * 3}, smallest=2)
    assert line["reason"] == "there are no others to compare with"


def test_the_page_compares_a_column_that_was_kept(tmp_path, monkeypatch, capsys):
    """The Python of docs/trust.md, as it stands, on records of eight women and eight men."""
    lines = ["image,id,caption,group,sex"]
    answers = []
    for number in range(32):
        sex = "f" if number % 2 else "m"
        noise = np.random.default_rng(number).integers(0, 255, (32, 32), dtype="uint8")
        Image.fromarray(noise).save(tmp_path / f"{number}.png")
        reference = "The region shows the liver."
        lines.append(f"{number}.png,n{number},{reference},patient-{number % 16},{sex}")
        said = reference if sex == "f" or number < 4 else "The region shows the spleen."
        answers.append({"id": f"n{number}", "answer": said, "reference": reference})
    (tmp_path / "captions.csv").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    convert_pairs(tmp_path, tmp_path / "records", splits=["test"] * 32, keep=["sex"])
    ids = sorted(read_records("records", "test")["id"])
    if ids != sorted(answer["id"] for answer in answers):
        pytest.fail(f"the ids of the records are others: {ids[:2]}")
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    page = (Path(__file__).parents[1] / "docs" / "trust.md").read_text("utf-8")
    [program] = re.findall(r"```python\n(import pandas.*?)```", page, re.S)
    names: dict = {}
    exec(program, names)  # noqa: S102 - it is the page's own
    found = {line["group"]: line for line in names["found"]}
    assert found["f"]["value"] == 1 and found["m"]["value"] == 2 / 16
    assert found["m"]["differs"] is True and found["m"]["units"] == 8
    assert "p_corrected" in capsys.readouterr().out


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="age has 30 different numbers: cut it into ranges"):
        compare_groups([1] * 30, {"age": list(range(30))})
    with pytest.raises(ValueError, match="2 values, 1 sex"):
        compare_groups([1, 0], {"sex": ["f"]})
    with pytest.raises(ValueError, match="no values"):
        compare_groups([], {"sex": []})
