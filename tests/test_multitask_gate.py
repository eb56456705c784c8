"""medtune.multitask.gate: an answer that does not match its picture is not given."""

import ast
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from multitask_twins import ORGANS, make_records, tuned, twins_below
from PIL import Image

from medtune import multitask
from medtune.multitask import choose_threshold, draw_result, locate_verify_diagnose


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


@pytest.mark.parametrize(
    "box", [[0.25, 0.5, 0.75, 0.9], [0.0, 0.0, 0.3, 0.3], [0.5, 0.5, 0.5, 0.5]]
)
def test_box_and_score_are_drawn(box):
    """A box at the edge of the picture, and one without any extent, are drawn, too."""
    picture = Image.new("RGB", (200, 100))
    result = {"box": box, "match_score": 0.123, "answer": None}
    held = np.asarray(draw_result(picture, result))
    given = np.asarray(draw_result(picture, result | {"answer": "A cyst."}))
    other = np.asarray(draw_result(picture, result | {"match_score": 0.987}))
    x = min(round(box[0] * 200), 199)
    y = min(round(box[1] * 100), 99)
    assert held[y, x].tolist() == [255, 0, 0]
    assert given[y, x].tolist() == [255, 165, 0]
    assert not np.array_equal(held, other), "the score is written"
    assert np.asarray(picture).max() == 0, "the picture itself stays"


def test_it_needs_five_other_rooms():
    """Who copies the folder knows what to copy with it."""
    named = set()
    for file in Path(multitask.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                named.add(node.module)
    rooms = {module for module in named if module.startswith("medtune")}
    siblings = {"medtune.answers", "medtune.captions", "medtune.models"}
    siblings |= {"medtune.boxes", "medtune.pairs"}
    assert rooms == siblings | {"medtune.files"}
