"""A second picture that shows the region of interest magnified."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from medtune.boxes import magnify_box
from medtune.pairs import load_pairs
from medtune.records import RecordStream, check_folder, convert_pairs, index_shards, read_records

MEDTUNE = Path(sys.executable).with_name("medtune")
shares = st.floats(0, 0.6)


def picture_of_quarters(side=80):
    """Four even quarters of different grey."""
    grey = np.zeros((side, side), np.uint8)
    half = side // 2
    grey[:half, half:] = 80
    grey[half:, :half] = 160
    grey[half:, half:] = 240
    return Image.fromarray(grey).convert("RGB")


@given(x=shares, y=shares, width=st.floats(0.05, 0.4), height=st.floats(0.05, 0.4))
def test_the_middle_of_a_box_is_the_middle_of_what_is_shown(x, y, width, height):
    ramp = np.tile(np.linspace(0, 255, 400), (300, 1)).astype(np.uint8)
    image = Image.fromarray(ramp)
    shown = magnify_box(image, (x, y, x + width, y + height))
    assert shown.size == (400, 400)
    middle = np.asarray(shown)[200, 200]
    wanted = 255 * (x + width / 2)
    # a pixel is 0.64 grey levels, and the view begins at a whole one
    assert abs(float(middle) - wanted) < 3


def test_a_box_fills_most_of_what_is_shown_and_outside_is_black():
    shown = np.asarray(magnify_box(picture_of_quarters(), (0.5, 0.5, 1.0, 1.0), scale=1.5))
    assert (shown[40, 40] == 240).all()
    # the view leaves the picture at the right and below
    assert (shown[40, 79] == 0).all() and (shown[79, 40] == 0).all()


@pytest.mark.parametrize("box", [(0.5, 0.5, 0.5, 0.9), (-0.2, 0, 0.5, 0.5), (0.1, 0.1, 1.2, 0.5)])
def test_what_is_no_box_is_refused(box):
    with pytest.raises(ValueError, match="no part of the picture"):
        magnify_box(picture_of_quarters(), box)


@pytest.fixture
def shard(tmp_path):
    """Three pairs, of which one does not know its region."""
    import io

    rows = []
    for number, roi in enumerate([[0.5, 0.5, 1.0, 1.0], None, [0.0, 0.0, 0.5, 0.5]]):
        buffer = io.BytesIO()
        picture_of_quarters().save(buffer, "PNG")
        rows.append(
            {
                "image": {"bytes": buffer.getvalue(), "path": None},
                "id": f"pair-{number}",
                "caption": f"Quarter {number} is grey.",
                "roi": roi,
            }
        )
    file = tmp_path / "shard.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file


def test_records_show_the_region_once_more(shard, tmp_path):
    report = convert_pairs(shard, tmp_path / "out", magnify=True, questions="What is it?")
    assert report["records"] == {"train": 2} and report["reasons"] == {"roi": 1}
    [left_out] = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(left_out)["id"] == "pair-1"
    records = read_records(tmp_path / "out")
    for record in records:
        types = [part["type"] for part in record["prompt"][0]["content"]]
        assert types == ["image", "image", "text"]
        whole, region = record["images"]
        wanted = magnify_box(picture_of_quarters(), record["roi"])
        assert whole.size == region.size
        # JPEG is not exact
        difference = np.asarray(region, float) - np.asarray(wanted, float)
        assert np.abs(difference).mean() < 3
    assert check_folder(tmp_path / "out")["ok"]


def test_a_stream_has_the_records_of_the_folder(shard, tmp_path):
    how = {"magnify": True, "questions": "What is it?"}
    convert_pairs(shard, tmp_path / "out", **how)
    folder = read_records(tmp_path / "out")
    stream = RecordStream(index_shards(shard), "train", most_rejected=0.5, **how)
    for streamed, written in zip(stream.records(), folder, strict=True):
        assert streamed["prompt"] == written["prompt"]
        assert streamed["images"] == written["images"]


def test_whoever_knows_no_region_is_told(shard, tmp_path):
    pairs = load_pairs(shard).remove_columns("roi")
    with pytest.raises(ValueError, match="magnify=True needs a column `roi`"):
        convert_pairs(pairs, tmp_path / "out", magnify=True)
    with pytest.raises(ValueError, match="pictures_per_sample=2"):
        convert_pairs(load_pairs(shard), tmp_path / "out", magnify=True, pictures_per_sample=2)
    assert not (tmp_path / "out").exists()


def test_the_command_names_its_options(shard, tmp_path):
    table = pq.read_table(shard).drop_columns("roi")
    pq.write_table(table, tmp_path / "plain.parquet")
    done = subprocess.run(
        [MEDTUNE, "convert", "plain.parquet", "out", "--magnify"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode != 0
    [line] = done.stderr.strip().splitlines()
    assert "--magnify" in line and "--column roi=NAME" in line
