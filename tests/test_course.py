"""The story of the course from end to end: data, adapter, scores, merged model, chat."""

import json
from pathlib import Path

import course
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


@pytest.fixture(scope="module")
def out(tmp_path_factory, sample_path) -> Path:
    return course.run_chain(
        tmp_path_factory.mktemp("clone"), course.STORY, course.STORY_SHORTER, "short"
    )


def test_every_notebook_of_the_tiny_run_is_in_a_chain():
    assert sorted({*course.STORY, *course.TRAININGS}) == sorted(course.tiny_run())


def test_the_notebooks_run_and_leave_a_summary(out):
    course.check_outputs(out, course.STORY)


def test_a_second_start_keeps_everything(out):
    course.check_second_start(out, course.STORY)


def summary_of(out: Path, notebook: str) -> dict:
    return json.loads((out / notebook / "summary.json").read_text("utf-8"))


def test_drawn_boxes_are_found_again(out):
    finders = summary_of(out, "02_convert_data")["box_finders"]
    assert finders["boxes.find_box"]["mean IoU"] >= 0.98


def test_the_held_out_loss_fell(out):
    losses = summary_of(out, "03_finetune_lora")["eval_loss"]
    assert losses["after"] < losses["before"]


def test_it_learned_from_the_picture(out):
    scores = summary_of(out, "05_evaluate")
    names = scores["name_accuracy"]
    assert scores["n"] >= 290 and scores["names_in_references"] >= 30
    assert names["base"] == 0 and names["tuned"] > 30
    assert names["shuffled"] < 15
    assert names["shuffled"] <= scores["most_frequent_name"]["name_accuracy"] + 3
    assert scores["uses_picture"] is True
    assert scores["place_accuracy"]["tuned"] >= scores["place_accuracy"]["base"] - 5
    assert all(
        scores["paired"]["tuned_minus_shuffled"][m]["low"] > 0
        for m in ("name right", "word BLEU-4")
    )
    merged = summary_of(out, "06_merge_export")
    assert (
        merged["answers"] == merged["answers_same_merged"] == merged["answers_same_reloaded"] == 20
    )


def test_the_threshold_keeps_its_promise_where_it_was_chosen(out):
    trust = summary_of(out, "13_when_to_trust")
    assert trust["kept"]["validation"]["answered_wrong"] <= trust["settings"]["risk"]
    assert set(trust["kept"]) == {"validation", "test"}
    # the wrong picture makes it invent
    own = trust["invented"]["own picture"]
    wrong = trust["invented"]["wrong picture"]
    assert own["structures_invented"] < wrong["structures_invented"]
    # what the chat page reads
    written = json.loads((out / "13_when_to_trust" / "threshold.json").read_text("utf-8"))
    assert written == trust["threshold"]
