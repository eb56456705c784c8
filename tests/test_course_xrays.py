"""Real X-rays go through the notebooks: data in, an adapter, scores and a merged model out."""

import json

import course
import pytest

XRAYS = course.REPO.parent / "shared" / "real" / "cxr.parquet"


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.skipif(not XRAYS.is_file(), reason="the real X-rays are not here")
def test_real_xrays_go_through_the_notebooks(tmp_path):
    notebooks = course.CORE
    # nobody says which of them are of one patient
    shorter = {"data": XRAYS, "accept_unknown_groups": True, "03.max_steps": 10}
    out = course.run_chain(tmp_path, notebooks, shorter, "xrays")
    scores = json.loads((out / "05_evaluate" / "summary.json").read_text("utf-8"))
    assert scores["n"] < 20 and scores["uses_picture"] is not True, (
        "so few pairs prove nothing, and it says so"
    )
