"""The drawn body: a CT with a mask in the form of the course's own, whose pictures anybody may see."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

REPO = Path(__file__).parents[1]
sys.path.insert(0, str(REPO / "data"))
from build_sample import STRUCTURES, TEST_BLOCKS, VALIDATION_BLOCKS  # noqa: E402
from ct import Scan, read_course_scan  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def draw(folder: Path) -> Scan:
    """Draw a body as a user does, and read it as the course reads its CT."""
    script = REPO / "data" / "phantom.py"
    subprocess.run([sys.executable, script, folder], check=True, capture_output=True)
    return read_course_scan(folder)


@pytest.fixture(scope="module")
def body(tmp_path_factory) -> Scan:
    return draw(tmp_path_factory.mktemp("phantom"))


@pytest.fixture(scope="module")
def course() -> Scan:
    return read_course_scan()


def middle_of(scan: Scan, name: str) -> np.ndarray:
    """Slice, row and column of the middle of a structure."""
    [label] = [number for number, known in scan.names.items() if known == name]
    return np.argwhere(scan.mask == label).mean(axis=0)


def test_it_has_the_form_of_the_courses_ct(body, course):
    assert body.hu.shape == course.hu.shape
    assert (body.mm_per_pixel, body.mm_per_slice) == (course.mm_per_pixel, course.mm_per_slice)
    assert set(body.names.values()) <= set(course.names.values())
    assert set(np.unique(body.mask)) == {0, *body.names}


def test_nothing_of_the_ct_is_in_it(body, course):
    """Where both show soft tissue they are no more alike than two bodies are."""
    both = (np.abs(body.hu) < 200) & (np.abs(course.hu) < 200)
    inside = np.corrcoef(body.hu[both].astype(float), course.hu[both].astype(float))[0, 1]
    assert inside < 0.5
    assert (body.hu == course.hu).mean() < 0.3, "but for air"


def test_most_names_of_the_course_can_be_asked_of_it(body):
    known = set()
    for name in body.names.values():
        for stem in STRUCTURES:
            if name.startswith(stem):
                known.add(stem)
    assert len(known) >= 0.9 * len(STRUCTURES)


@pytest.mark.parametrize("block", [*TEST_BLOCKS, *VALIDATION_BLOCKS])
def test_each_held_out_block_shows_some_structures(body, block):
    first, last = block
    assert len(np.unique(body.mask[first : last + 1])) - 1 >= 10


def test_it_lies_as_a_radiologist_sees_it(body):
    # the patient's right is on the left, the front above, the head end last
    assert middle_of(body, "liver")[2] < middle_of(body, "spleen")[2]
    assert middle_of(body, "sternum")[1] < middle_of(body, "heart")[1]
    assert middle_of(body, "heart")[1] < middle_of(body, "vertebrae_T8")[1]
    assert middle_of(body, "kidney_left")[0] < middle_of(body, "heart")[0]
    assert middle_of(body, "heart")[0] < middle_of(body, "thyroid_gland")[0]


def test_each_tissue_has_its_density(body):
    means = {}
    for number, name in body.names.items():
        means[name] = body.hu[body.mask == number].mean()
    assert means["lung_upper_lobe_left"] < -700
    assert 20 < means["liver"] < 140
    assert means["aorta"] > means["autochthon_left"]
    assert means["vertebrae_L1"] > 150


def test_it_is_the_same_each_time(body, tmp_path):
    again = draw(tmp_path)
    assert np.array_equal(again.hu, body.hu) and np.array_equal(again.mask, body.mask)
    assert again.names == body.names
