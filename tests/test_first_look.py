"""The first minute: the slice that is shown is one of the sample's held-out ones."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

REPO = Path(__file__).parents[1]
SCRIPT = REPO / "data" / "first_look.py"
pytestmark = pytest.mark.slow


def test_it_is_a_held_out_picture_of_the_sample(sample_path):
    spec = importlib.util.spec_from_file_location("first_look", SCRIPT)
    first_look = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(first_look)
    row = first_look.draw_region(first_look.HELD_OUT)
    assert row["split"] == "test" and row["has_box"]
    wanted = [("id", "=", row["id"])]
    (built,) = pq.read_table(sample_path, filters=wanted).to_pylist()
    assert built["caption"] == row["caption"]
    assert built["image"]["bytes"] == row["image"]["bytes"]


@pytest.mark.timeout(600)
def test_the_base_says_what_it_sees_and_names_no_organ():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    base, true = done.stdout.split("What is true:")
    assert "green frame" in base and "lobe of the lung" not in base
    assert "lobe of the lung" in true
