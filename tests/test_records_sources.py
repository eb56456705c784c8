"""What can be converted: shards, broken ones too, data sets, folders with a table."""

import base64
import io
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from shards import CHANGED, KEPT, encode, json_lines, pair, picture, tree, write_shard

from medtune.pairs import load_pairs, safe_id
from medtune.records import check_folder, convert_pairs


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
    (copy,) = (out / "images").iterdir()
    assert copy.read_bytes() == (folder / "a.png").read_bytes()
    assert copy.name != "a.png", "names of files may name patients"
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


# --- sources of others ------------------------------------------------------------------------


def _two_views(folder: Path) -> Path:
    """Three reports with two films each, whose id repeats."""
    lines = ["uid,filename,projection,findings\n"]
    for number in range(3):
        for view in ("frontal", "lateral"):
            picture(2 * number + (view == "lateral")).save(folder / f"{number}_{view}.png")
            lines.append(f"{number},{number}_{view}.png,{view},Report number {number}.\n")
    (folder / "reports.csv").write_text("".join(lines))
    return folder / "reports.csv"


def test_two_views_of_one_report(tmp_path):
    source = _two_views(tmp_path)
    apart = convert_pairs(source, tmp_path / "apart")
    assert apart["pairs"] == 6 and apart["split_by"] == "patient"
    for split in apart["records"]:
        assert len(json_lines(tmp_path / "apart" / f"{split}.jsonl")) == 2, "a report stays whole"
    options = {"pictures_per_sample": 2, "split_by": "none"}
    joined = convert_pairs(source, tmp_path / "joined", **options)
    assert joined["pairs"] == 6 and joined["records"] == {"train": 3}
    records = json_lines(tmp_path / "joined" / "train.jsonl")
    assert [record["output"] for record in records] == [f"Report number {i}." for i in range(3)]
    assert [len(record["images"]) for record in records] == [2, 2, 2]
    assert check_folder(tmp_path / "joined")["ok"]


def test_views_whose_id_repeats_in_parquet(tmp_path):
    rows = [pair(0, id="s1"), pair(1, id="s1"), pair(0, id="s1"), pair(2, id="s2")]
    source, out = write_shard(tmp_path / "a.parquet", rows), tmp_path / "out"
    summary = convert_pairs(source, out)
    assert summary["pairs"] == 3 and summary["reasons"] == {"id": 1}
    first, second, other = json_lines(out / "train.jsonl")
    assert [first["id"], second["id"], other["id"]] == ["s1", "s1-2", "s2"]
    assert first["group"] == second["group"] != other["group"]


def test_ids_that_are_paths_in_json(tmp_path):
    picture(0).save(tmp_path / "0.jpg")
    record = {"id": "p10/p1000003/s5041426", "image": "0.jpg", "caption": "No acute process."}
    (tmp_path / "m.jsonl").write_text(json.dumps(record))
    summary = convert_pairs(tmp_path / "m.jsonl", tmp_path / "out")
    assert summary["records"] == {"train": 1} and not summary["rejected"]
    (written,) = json_lines(tmp_path / "out" / "train.jsonl")
    assert written["id"] == safe_id(record["id"])


FORMS = {
    "paths": {"image_path": ["0.png", "1.png"], "caption": ["Normal.", "Rib fracture."]},
    "base64": {
        "image": [base64.b64encode(encode(picture(i), "PNG")).decode() for i in range(2)],
        "caption": ["Normal.", "Rib fracture."],
    },
    "without ids": {
        "image": [{"bytes": encode(picture(i), "PNG"), "path": None} for i in range(2)],
        "question": ["Is it normal?", "Where is the fracture?"],
        "answer": ["yes", "rib"],
    },
    "patients": {
        "image": [{"bytes": encode(picture(i), "PNG"), "path": None} for i in range(2)],
        "id": ["a", "b"],
        "caption": ["Normal.", "Rib fracture."],
        "patient_id": ["Mueller", "Mueller"],
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_parquet_as_others_publish_it(tmp_path, form):
    for i in range(2):
        picture(i).save(tmp_path / f"{i}.png")
    pq.write_table(pa.table(FORMS[form]), tmp_path / "a.parquet")
    summary = convert_pairs(tmp_path / "a.parquet", tmp_path / "out")
    assert summary["records"] == {"train": 2} and not summary["rejected"]
    records = json_lines(tmp_path / "out" / "train.jsonl")
    for number, record in enumerate(records):
        shown = Image.open(tmp_path / "out" / record["images"][0])
        assert shown.tobytes() == picture(number).tobytes()
    if form == "without ids":
        asked = [record["instruction"].removeprefix("<image>") for record in records]
        assert asked == FORMS[form]["question"]
    if form == "patients":
        first, second = (record["group"] for record in records)
        assert first == second and "Mueller" not in first


def test_a_shard_cannot_name_files_of_this_machine(tmp_path):
    picture(0).save(tmp_path / "secret.png")
    cell = {"bytes": None, "path": str(tmp_path / "secret.png")}
    columns = {"image": [cell, cell], "id": ["a", "b"], "caption": ["A liver."] * 2}
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    columns["image"] = pa.array(columns["image"], kind)
    (tmp_path / "shards").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "shards" / "a.parquet")
    summary = convert_pairs(tmp_path / "shards" / "a.parquet", tmp_path / "out")
    assert not summary["records"] and summary["rejected"] == 2


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
