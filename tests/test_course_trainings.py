"""The notebooks that train by themselves: launches, heads, a study. They need the records of 02
only.
"""

import json
from pathlib import Path

import course
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


@pytest.fixture(scope="module")
def out(tmp_path_factory, sample_path) -> Path:
    return course.run_chain(
        tmp_path_factory.mktemp("clone"), course.TRAININGS, course.TRAININGS_SHORTER, "short"
    )


def test_the_notebooks_run_and_leave_a_summary(out):
    course.check_outputs(out, course.TRAININGS)


def test_a_second_start_keeps_everything(out):
    course.check_second_start(out, course.TRAININGS)


def test_the_small_study_has_its_runs(out):
    summary = json.loads((out / "08_study_the_knobs" / "summary.json").read_text("utf-8"))
    assert (
        summary["runs"] == 2
        and summary["failed"] == 0
        and summary["effects"]["lora_r"]["difference"] == 0
    )
