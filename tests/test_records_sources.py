"""What can be converted: shards, broken ones too, data sets, folders with a table."""

import io
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
from shards import CHANGED, KEPT, encode, json_lines, pair, picture, tree, write_shard

from medtune.pairs import load_pairs
from medtune.records import convert_pairs


def test_a_data_set_and_its_file_give_the_same(tmp_path):
    pictures = [*KEPT.values(), *CHANGED.values()]
    rows = [pair(number, image=data) for number, data in enumerate(pictures)]
    source = write_shard(tmp_path / "a.parquet", rows)
    convert_pairs(source, tmp_path / "direct")
    pairs = load_pairs(source)
    convert_pairs(pairs, tmp_path / "loaded")
    backwards = range(15, -1, -1)
    convert_pairs(pairs.select(backwards).select(backwards), tmp_path / "indexed")
    direct, loaded, indexed = (tree(tmp_path / name) for name in ("direct", "loaded", "indexed"))
    assert direct.pop("convert.json") != loaded.pop("convert.json") != indexed.pop("convert.json")
    assert direct == loaded == indexed and len(direct) == 18


def test_pictures_in_files_and_other_columns_are_loaded(tmp_path):
    folder, out = tmp_path / "set", tmp_path / "out"
    folder.mkdir()
    picture(5).save(folder / "a.png")
    (folder / "captions.csv").write_text("image,caption\na.png,A liver.\nb.png,A spleen.\n")
    summary = convert_pairs(folder, out)
    assert summary["records"] == {"train": 1} and summary["rejected"] == 1
    assert convert_pairs(folder, out) == summary, "the same source is known again"
    assert (out / "images" / "a.png").read_bytes() == (folder / "a.png").read_bytes()
    row = {"image": encode(picture(0)), "image_id": "x", "caption": "A liver.", "cui": ["C1"]}
    write_shard(tmp_path / "other.parquet", [row])
    convert_pairs(tmp_path / "other.parquet", tmp_path / "other")
    assert json_lines(tmp_path / "other" / "train.jsonl")[0]["id"] == "x"


def test_ids_that_are_numbers(tmp_path):
    write_shard(tmp_path / "a.parquet", [pair(0, id=7), pair(1, id=8)])
    convert_pairs(tmp_path / "a.parquet", tmp_path / "file")
    records = json_lines(tmp_path / "file" / "train.jsonl")
    assert [record["id"] for record in records] == ["7", "8"]
    rows = {"image": [picture(0)] * 2, "id": [7, 7], "caption": ["A liver."] * 2}
    pairs = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    assert convert_pairs(pairs, tmp_path / "set")["rejected"] == 1


def test_only_pairs_are_converted(tmp_path):
    out = tmp_path / "out"
    for wrong in (datasets.Dataset.from_dict({"a": [1]}), [1, 2]):
        with pytest.raises(ValueError, match="image, id and caption"):
            convert_pairs(wrong, out)
    with pytest.raises(FileNotFoundError):
        convert_pairs(tmp_path / "nowhere.parquet", out)
    pairs = load_pairs(write_shard(tmp_path / "a.parquet", [pair(0)]))
    with pytest.raises(ValueError, match="holds no pairs"):
        convert_pairs(pairs.select([]), out)
    assert not out.exists()


# --- broken shards ----------------------------------------------------------------------------


@pytest.fixture
def three_shards(tmp_path) -> Path:
    """A folder of three shards, of 40 rows each in two row groups."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(3):
        rows = [pair(shard * 100 + i) for i in range(40)]
        write_shard(folder / f"{shard}.parquet", rows, row_group_size=20)
    return folder


def test_a_shard_cut_in_the_middle_does_not_stop_the_others(tmp_path, three_shards):
    cut = three_shards / "1.parquet"
    whole = cut.read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    summary = convert_pairs(three_shards, tmp_path / "out")
    assert summary["records"] == {"train": 80} and summary["reasons"] == {"shard": 1}
    entry = json_lines(tmp_path / "out" / "rejected.jsonl")[0]
    assert "1.parquet is cut off" in entry["reason"]
    with pytest.raises(ValueError, match="^row 40, id 'None': shard: 1.parquet is cut off"):
        convert_pairs(three_shards, tmp_path / "strict", strict=True)
    with pytest.raises(ValueError, match="1.parquet is cut off, fetch it again"):
        convert_pairs(cut, tmp_path / "alone")


def test_a_shard_with_a_spoilt_page_is_read_up_to_there(tmp_path, three_shards):
    shard = three_shards / "1.parquet"
    spoilt = bytearray(shard.read_bytes())
    column = pq.ParquetFile(io.BytesIO(spoilt)).metadata.row_group(1).column(2)
    offsets = (column.dictionary_page_offset, column.data_page_offset)
    start = min(offset for offset in offsets if offset)
    spoilt[start : start + 400] = b"\xff" * 400
    shard.write_bytes(spoilt)
    summary = convert_pairs(three_shards, tmp_path / "out")
    assert summary["records"]["train"] + summary["rejected"] == 120
    assert summary["records"]["train"] >= 80
    entry = json_lines(tmp_path / "out" / "rejected.jsonl")[0]
    assert "1.parquet breaks off here" in entry["reason"]
