"""The check of a folder finds each fault, in any dialect, also in what others wrote."""

import json
from collections import Counter

import pytest
from shards import json_lines, pair, picture, write_shard

from medtune.records import DIALECTS, check_folder, convert_pairs


@pytest.mark.parametrize("dialect", DIALECTS)
def test_check_finds_each_fault(tmp_path, dialect):
    out = tmp_path / "out"
    rows = [pair(i, group=f"g{i}", split=("train", "test")[i % 2]) for i in range(24)]
    convert_pairs(write_shard(tmp_path / "a.parquet", rows), out, dialect=dialect)
    assert check_folder(out)["ok"]

    # pictures: missing, no picture, cut, two that lie elsewhere
    images = out / "images"
    (images / "id-00000.jpg").unlink()
    (images / "id-00002.jpg").write_bytes(b"no picture")
    whole = (images / "id-00004.jpg").read_bytes()
    (images / "id-00004.jpg").write_bytes(whole[:-200])
    (tmp_path / "outside.jpg").write_bytes(whole)
    (images / "id-00006.jpg").unlink()
    (images / "id-00006.jpg").symlink_to(tmp_path / "outside.jpg")
    train = json_lines(out / "train.jsonl")
    train[4]["images"] = ["../outside.jpg"]

    # records: a picture too many, an empty answer, two answers, an id twice, no turns, a cut line
    turns = {
        "prompt-completion": "completion",
        "messages": "messages",
        "sharegpt": "conversations",
        "conversations": "conversations",
    }[dialect]
    says = "value" if turns == "conversations" else "content"
    empty = [{"type": "text", "text": " "}] if dialect == "prompt-completion" else " "
    train[5]["images"] *= 2
    train[6][turns][-1][says] = empty
    train[7][turns].append(train[7][turns][-1])
    train[8]["id"] = train[9]["id"]
    train[10]["group"] = "g1"  # which the test split has too
    del train[11][turns]
    (out / "train.jsonl").write_text("\n".join(map(json.dumps, train)) + "\n{cut")

    report = check_folder(out)
    found = {(error["place"], error["check"]) for error in report["errors"]}
    expected = {
        ("train.jsonl:1", "pictures open"),
        ("train.jsonl:2", "pictures open"),
        ("train.jsonl:3", "pictures open"),
        ("train.jsonl:4", "pictures open"),
        ("train.jsonl:5", "pictures open"),
        ("train.jsonl:6", "image marks"),
        ("train.jsonl:7", "no empty turn"),
        ("train.jsonl:8", "roles alternate"),
        ("train.jsonl:10", "ids differ"),
        ("train.jsonl:12", "readable"),
        ("train.jsonl:13", "readable"),
        ("test.jsonl:1", "groups apart"),
    }
    assert found == expected and not report["ok"]
    assert report["records"] == {"train.jsonl": 13, "test.jsonl": 12}
    counts = {row["check"]: row["errors"] for row in report["table"] if row["errors"]}
    assert counts == Counter(check for _, check in expected)
    assert report == json.loads((out / "check.json").read_text())
    assert report["errors"][0]["problem"] == "images/id-00000.jpg: it is missing"


def test_check_reads_what_others_wrote(tmp_path):
    """A ShareGPT list of one of the recipes, with its own tags and without dataset_info.json."""
    picture(0).save(tmp_path / "a.jpg")
    said = [{"from": "user", "value": "<image>诊断？"}, {"from": "assistant", "value": "肝脏。"}]
    records = [
        {"conversations": said, "images": ["a.jpg"]},
        {"conversations": said[::-1], "images": "a.jpg"},
    ]
    (tmp_path / "mllm.json").write_text(json.dumps(records, ensure_ascii=False), "utf-8")
    (error,) = check_folder(tmp_path)["errors"]
    assert error["place"] == "mllm.json:2" and error["check"] == "roles alternate"

    odd = [
        {"messages": said, "id": ["a"], "images": 5},
        7,
        "x",
        None,
        {},
        {"messages": [1]},
        {"prompt": 1},
    ]
    (tmp_path / "odd.jsonl").write_text("\n".join(map(json.dumps, odd)))
    errors = check_folder(tmp_path)["errors"][1:]
    assert [error["check"] for error in errors] == ["pictures open", *["readable"] * 6]


def test_a_group_called_0_stays_in_one_split(tmp_path):
    for split in ("train", "test"):
        said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "A liver."}]
        record = {"id": split, "group": 0, "messages": said}
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(record))
    (error,) = check_folder(tmp_path)["errors"]
    assert error["check"] == "groups apart" and "group 0 is in" in error["problem"]


def test_what_cannot_be_checked_is_said(tmp_path):
    with pytest.raises(ValueError, match="holds no records"):
        check_folder(tmp_path)
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="which a processor counts: give one"):
        check_folder(tmp_path, max_length=100)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "A liver."}]
    (tmp_path / "train.jsonl").write_text(json.dumps({"messages": said}))
    (tmp_path / "check.json").mkdir()  # in the place of the report
    with pytest.raises(OSError, match="cannot write .*check.json .*: make room") as caught:
        check_folder(tmp_path)
    assert "\n" not in str(caught.value)
