"""The story of the course from end to end: data, adapter, scores, merged model, chat."""

import json
from pathlib import Path

import course
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


@pytest.fixture(scope="module")
def out(tmp_path_factory, sample_path) -> Path:
    return course.run_chain(tmp_path_factory.mktemp("clone"), course.STORY, course.STORY_SHORTER, "short")


def test_every_notebook_of_the_tiny_run_is_in_a_chain():
    assert sorted({*course.STORY, *course.TRAININGS}) == course.tiny_run()


def test_the_notebooks_run_and_leave_a_summary(out):
    course.check_outputs(out, course.STORY)


def test_a_second_start_keeps_everything(out):
    course.check_second_start(out, course.STORY)


def test_it_learned_from_the_picture(out):
    scores = json.loads((out / "05_evaluate" / "summary.json").read_text("utf-8"))
    assert scores["name_accuracy"]["base"] == 0 and scores["name_accuracy"]["tuned"] >= 30
    assert scores["name_accuracy"]["shuffled"] <= scores["most_frequent_name"]["name_accuracy"] + 3
    assert scores["place_accuracy"]["tuned"] >= scores["place_accuracy"]["base"] - 5
    assert all(scores["paired"]["tuned_minus_shuffled"][m]["low"] > 0 for m in ("name right", "word BLEU-4"))
    merged = json.loads((out / "06_merge_export" / "summary.json").read_text("utf-8"))
    assert merged["answers"] == merged["answers_same_merged"] == merged["answers_same_reloaded"] == 20
