"""What a conversion writes: records, questions, languages, splits, series of slices."""

import json
from collections import Counter

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shards import CAPTION, CHINESE, json_lines, pair, rejected, write_shard

from medtune.pairs import load_pairs
from medtune.records import QUESTIONS, check_folder, convert_pairs, read_records

# --- records ----------------------------------------------------------------------------------


def test_the_default_record_is_what_trl_reads(tmp_path):
    rows = [
        pair(0, group="g0", roi=[0.1, 0.2, 0.3, 0.4], has_box=False),
        pair(1, group=None, roi=None, has_box=True),
    ]
    source, out = write_shard(tmp_path / "a.parquet", rows), tmp_path / "out"
    summary = convert_pairs(source, out, questions="What is it?")
    first, second = json_lines(out / "train.jsonl")
    question = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    answer = [{"type": "text", "text": CAPTION.format(0)}]
    assert first == {
        "id": "id-00000",
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
        "instruction": "<image>What is it?",
        "output": CAPTION.format(0),
        "images": ["images/id-00000.jpg"],
        "group": "g0",
        "roi": [0.1, 0.2, 0.3, 0.4],
        "has_box": False,
    }
    assert second["roi"] is None and second.keys() == first.keys()
    assert summary == {
        "dialect": "prompt-completion",
        "rows": 2,
        "pairs": 2,
        "rejected": 0,
        "reasons": {},
        "records": {"train": 2},
        "text_only": 0,
        "text_only_rejected": 0,
        "copied": 2,
        "stripped": 0,
        "converted": 0,
        "split_by": "none",
        "splits_unused": 0,
        "unknown_groups": 1,
        "columns_left_out": [],
    }
    assert summary == json.loads((out / "convert.json").read_text())["summary"]
    written = {path.name for path in out.iterdir()}
    assert written == {"images", "train.jsonl", "dataset_info.json", "convert.json"}


def test_columns_that_start_with_nulls_keep_their_type(tmp_path):
    image = {"bytes": pair(0)["image"], "path": None}
    rows = [pair(i, image=image, roi=None, note=None) for i in range(1501)]
    rows[1500]["roi"] = [0.0, 0.5, 0.5, 1.0]
    schema = {
        "id": pa.string(),
        "caption": pa.string(),
        "roi": pa.list_(pa.float64()),
        "note": pa.string(),
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    }
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(schema)), tmp_path / "a.parquet")
    convert_pairs(tmp_path / "a.parquet", tmp_path / "out", keep=["note"])
    records = read_records(tmp_path / "out")
    assert records[-1]["roi"] == [0.0, 0.5, 0.5, 1.0] and records[0]["roi"] is None
    assert records.features["note"] == datasets.Value("string")


def test_values_that_json_lacks_become_null_or_a_reason(tmp_path):
    rows = [
        pair(0, age=float("nan"), doses=[1.0]),
        pair(1, age=3.0, doses=[float("nan")]),
        pair(2, age=4.0, doses=[2.0]),
    ]
    out = tmp_path / "out"
    source = write_shard(tmp_path / "a.parquet", rows)
    summary = convert_pairs(source, out, keep=["age", "doses"])
    assert [record["age"] for record in json_lines(out / "train.jsonl")] == [None, 4.0]
    assert summary["reasons"] == {"record": 1}
    assert rejected(out)["id-00001"].startswith("record: Out of range float")


def test_columns_whose_type_json_lacks_cannot_be_kept(tmp_path):
    table = pa.Table.from_pylist([pair(0, image={"bytes": pair(0)["image"], "path": None})])
    table = table.append_column("raw", pa.array([b"x"]))
    table = table.append_column("dose", pa.array([1], pa.decimal128(5, 2)))
    table = table.append_column("day", pa.array([0], pa.date32()))
    pq.write_table(table, tmp_path / "a.parquet")
    summary = convert_pairs(tmp_path / "a.parquet", tmp_path / "out")
    assert summary["columns_left_out"] == ["raw", "dose", "day"]
    assert not {"raw", "dose", "day"} & json_lines(tmp_path / "out" / "train.jsonl")[0].keys()
    for name in ("raw", "dose", "day"):
        with pytest.raises(ValueError, match=f"keep={name}: JSON has no value for it"):
            convert_pairs(tmp_path / "a.parquet", tmp_path / "kept", keep=[name])


def test_only_columns_that_are_named_go_into_the_records(tmp_path):
    told = {"name": "Mueller", "age": 71, "mrn": 5, "StudyDate": "19500102", "plane": "axial"}
    rows = [
        pair(i, group=None, structure="liver", slice=i, modality="CT", **told) for i in range(2)
    ]
    source, out = write_shard(tmp_path / "a.parquet", rows), tmp_path / "out"
    summary = convert_pairs(source, out, keep=["plane", "age"])
    assert summary["columns_left_out"] == ["name", "mrn", "StudyDate"]
    for record in read_records(out):
        assert not {"name", "mrn", "StudyDate"} & record.keys()
        assert record["plane"] == "axial" and record["age"] == 71
        assert record["structure"] == "liver" and record["modality"] == "CT"
    written = [file.read_bytes() for file in sorted(out.rglob("*")) if file.is_file()]
    assert not any(b"Mueller" in content or b"19500102" in content for content in written)
    with pytest.raises(ValueError, match="keep=weight: the source has no such column, only id"):
        convert_pairs(source, out, keep=["weight"])
    with pytest.raises(ValueError, match="keep=caption: a record has something else"):
        convert_pairs(source, out, keep=["caption"])
    with pytest.raises(ValueError, match="holds a conversion with other keep"):
        convert_pairs(source, out)


# --- questions and languages ------------------------------------------------------------------


def test_questions_are_drawn_by_id_and_seed_in_the_language_of_the_caption(tmp_path):
    rows = [pair(i, caption=(CAPTION, CHINESE)[i % 2].format(i)) for i in range(120)]
    source, drawn = write_shard(tmp_path / "a.parquet", rows), {}
    for name, seed in {"one": 0, "again": 0, "other": 1}.items():
        options = {"questions": QUESTIONS, "dialect": "messages", "seed": seed}
        convert_pairs(source, tmp_path / name, **options)
        records = json_lines(tmp_path / name / "train.jsonl")
        asked = [record["messages"][0]["content"] for record in records]
        drawn[name] = [text.removeprefix("<image>") for text in asked]
    assert drawn["one"] == drawn["again"] != drawn["other"]
    english, chinese = Counter(drawn["one"][::2]), Counter(drawn["one"][1::2])
    assert set(english) == set(QUESTIONS[:3]) and set(chinese) == set(QUESTIONS[3:])
    assert min(*english.values(), *chinese.values()) > 8
    convert_pairs(source, tmp_path / "fixed", questions="这是什么？", dialect="messages")
    records = json_lines(tmp_path / "fixed" / "train.jsonl")
    asked = {record["messages"][0]["content"] for record in records}
    assert asked == {"<image>这是什么？"}, "the only question there is"


def test_chinese_captions_on_request(tmp_path):
    rows = [
        pair(0, caption_zh=CHINESE.format(0)),
        pair(1, caption_zh=None),
        pair(2, caption=CHINESE.format(2)),
    ]
    convert_pairs(write_shard(tmp_path / "a.parquet", rows), tmp_path / "out", language="zh")
    records = json_lines(tmp_path / "out" / "train.jsonl")
    assert [record["output"] for record in records] == [CHINESE.format(0), CHINESE.format(2)]
    assert {record["instruction"] for record in records} == {"<image>请描述这张医学图像。"}
    assert rejected(tmp_path / "out") == {"id-00001": "caption: there is none in Chinese"}
    assert "caption_zh" not in records[0]
    source = tmp_path / "a.parquet"
    convert_pairs(source, tmp_path / "kept", language="zh", keep=["caption_zh"])
    kept = json_lines(tmp_path / "kept" / "train.jsonl")
    assert [record["caption_zh"] for record in kept] == [CHINESE.format(0), None]


# --- splits and series ------------------------------------------------------------------------


def test_splits_come_from_the_caller_the_column_or_the_file(tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    first = 0
    for name, count in {"train-00000": 3, "test-00000": 2, "validation-00000": 1}.items():
        write_shard(shards / f"{name}.parquet", [pair(first + i) for i in range(count)])
        first += count
    named = convert_pairs(shards, tmp_path / "named")
    assert named["records"] == {"train": 3, "validation": 1, "test": 2}
    said = convert_pairs(shards, tmp_path / "given", splits=["validation"] * 6)
    assert said["records"] == {"validation": 6}

    splits = ["test", "train", None, "../../x"]
    rows = [pair(number, split=split) for number, split in enumerate(splits)]
    column = convert_pairs(write_shard(tmp_path / "a.parquet", rows), tmp_path / "column")
    assert column["records"] == {"train": 1, "test": 1} and column["reasons"] == {"split": 2}
    with pytest.raises(ValueError, match="1 splits for 4 rows"):
        convert_pairs(tmp_path / "a.parquet", tmp_path / "wrong", splits=["train"])


def test_a_group_may_be_called_0(tmp_path):
    rows = [pair(i, group=i // 2) for i in range(4)]
    source, out = write_shard(tmp_path / "a.parquet", rows), tmp_path / "out"
    convert_pairs(source, out, pictures_per_sample=2)
    pictures = [record["images"] for record in json_lines(out / "train.jsonl")]
    assert [len(names) for names in pictures] == [2, 2]


def test_slices_of_one_series_make_one_sample(tmp_path):
    groups = ["a"] * 5 + ["b"] * 2 + [None] * 2
    rows = []
    for i, group in enumerate(groups):
        other = {"slice": i, "plane": "axial", "about": {"time": "now"}}
        rows.append(pair(i, group=group, **other))
    rows[1]["image"] = b""
    rows[3]["caption"] = rows[2]["caption"]
    source, out = write_shard(tmp_path / "a.parquet", rows), tmp_path / "out"
    keep = ["plane", "about"]
    convert_pairs(source, out, pictures_per_sample=2, dialect="messages", keep=keep)

    records = json_lines(out / "train.jsonl")
    ids = [record["id"] for record in records]
    assert ids == ["id-00000+1", "id-00003+1", "id-00005+1", "id-00007", "id-00008"]
    assert records[0]["images"] == ["images/id-00000.jpg", "images/id-00002.jpg"]
    question, answer = (message["content"] for message in records[0]["messages"])
    assert question.startswith("<image><image>Describe")
    assert answer == CAPTION.format(0) + "\n" + CAPTION.format(2)
    assert records[1]["messages"][1]["content"] == CAPTION.format(2) + "\n" + CAPTION.format(4)
    assert records[0]["about"] == {"time": "now"}, "names do not matter"
    assert records[0]["slice"] is None and records[0]["plane"] == "axial"
    assert records[3]["slice"] == 7
    assert check_folder(out)["ok"]
    with pytest.raises(ValueError, match="needs a column `group`"):
        lone = write_shard(tmp_path / "b.parquet", [pair(0)])
        convert_pairs(lone, tmp_path / "no", pictures_per_sample=2)


# --- wrong settings ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"dialect": "alpaca"},
        {"language": "fr"},
        {"share": 1.0},
        {"pictures_per_sample": 0},
        {"questions": " "},
        {"questions": "What <image> is it?"},
        {"questions": "<image>What?<image>"},
        {"questions": "<image>"},
    ],
)
def test_wrong_settings_are_named_before_anything_is_written(tmp_path, options):
    source = write_shard(tmp_path / "a.parquet", [pair(0)])
    with pytest.raises(ValueError) as caught:
        convert_pairs(source, tmp_path / "out", **options)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


# --- real data --------------------------------------------------------------------------------


def test_the_sample_set_converts_as_it_is(sample_path, tmp_path):
    pairs = load_pairs(sample_path, limit=300)
    summary = convert_pairs(pairs, tmp_path / "out")
    assert summary["copied"] == 300 and not summary["rejected"]
    assert sum(summary["records"].values()) == 300
    records = read_records(tmp_path / "out", "train")
    assert {"group", "roi", "fields", "modality", "has_box"} <= set(records.column_names)
    assert records[0]["images"][0].size == (512, 512)
    assert records.features["fields"] == pairs.features["fields"]
    assert check_folder(tmp_path / "out")["ok"]


def test_real_radiographs(real, tmp_path):
    summary = convert_pairs(real / "cxr.parquet", tmp_path / "out", strict=True)
    assert summary["records"] == {"train": 60} and summary["copied"] == 60


def test_real_dicom(real, tmp_path):
    pairs = load_pairs(real / "dicom", allow_empty_captions=True)
    captions = [f"A slice, number {i}." for i in range(len(pairs))]
    pairs = pairs.remove_columns("caption").add_column("caption", captions)
    summary = convert_pairs(pairs, tmp_path / "out", questions="What is this?")
    assert summary["rejected"] == 0 and sum(summary["records"].values()) == len(pairs)
    assert check_folder(tmp_path / "out")["ok"]
