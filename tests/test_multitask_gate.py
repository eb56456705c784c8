"""medtune.multitask.gate: an answer that does not match its picture is not given."""

import ast
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multitask_twins import ORGANS, make_records, tuned, twins_below

from medtune import multitask
from medtune.multitask import choose_threshold, locate_verify_diagnose


@pytest.fixture(scope="session")
def twin(tmp_path_factory):
    return twins_below(tmp_path_factory)


def test_no_diagnosis_under_the_threshold(twin):
    processor, model = tuned(twin("qwen3-vl"))
    images = [row["images"][0] for row in make_records()[:3]]
    questions = [f"Where is the {organ}?" for organ in ORGANS[:3]]

    def diagnose(count, threshold):
        return locate_verify_diagnose(
            model,
            processor,
            images[:count],
            questions[:count],
            threshold=threshold,
            max_new_tokens=6,
        )

    loose = diagnose(3, 0.0)
    scores = [result["match_score"] for result in loose]
    assert all(isinstance(result["answer"], str) for result in loose)
    middle = sorted(scores)[1]
    for result, score in zip(diagnose(3, middle), scores, strict=True):
        held = score < middle
        assert (result["answer"] is None) == held
        assert ("no diagnosis" in result["reason"]) == held
        assert f"threshold {middle:.3f}" in result["reason"]
        assert len(result["box"]) == 4
    (alone,) = diagnose(1, 0.0)
    assert alone["answer"] == loose[0]["answer"]
    assert alone["match_score"] == pytest.approx(scores[0], abs=1e-5)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60), st.floats(0.01, 1))
def test_the_threshold_keeps_the_sensitivity(scores, sensitivity):
    threshold = choose_threshold(scores, sensitivity)
    kept = [score for score in scores if score >= threshold]
    assert len(kept) >= sensitivity * len(scores) - 1e-6
    higher = [score for score in scores if score > threshold]
    assert len(higher) < sensitivity * len(scores) + 1e-6, "no higher threshold would do"


def test_it_needs_three_other_rooms():
    """Who copies the folder knows what to copy with it."""
    named = set()
    for file in Path(multitask.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                named.add(node.module)
    rooms = {module for module in named if module.startswith("medtune")}
    siblings = {"medtune.answers", "medtune.captions", "medtune.models"}
    assert rooms == siblings | {"medtune.files"}
