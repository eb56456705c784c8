"""Reading a converted folder: what changed is read anew, and nothing from elsewhere."""

import json

import pytest
from shards import pair, picture, write_shard

from medtune.records import convert_pairs, read_records


def test_a_changed_file_is_read_anew(tmp_path):
    out = tmp_path / "out"
    for text in ("A liver.", "A spleen."):
        source = write_shard(tmp_path / "a.parquet", [pair(0, caption=text)])
        convert_pairs(source, out, overwrite=True)
        assert read_records(out)[0]["completion"][0]["content"][0]["text"] == text
    with pytest.raises(FileNotFoundError, match="test.jsonl does not exist, only train"):
        read_records(out, "test")


def test_records_whose_pictures_lie_elsewhere_are_not_read(tmp_path):
    picture(0).save(tmp_path / "a.jpg")
    (tmp_path / "out").mkdir()
    said = [
        {"role": "user", "content": "<image>What?"},
        {"role": "assistant", "content": "A liver."},
    ]
    for image in ("../a.jpg", str(tmp_path / "a.jpg")):
        record = {"id": "a", "messages": said, "images": [image]}
        (tmp_path / "out" / "train.jsonl").write_text(json.dumps(record))
        with pytest.raises(ValueError, match="train.jsonl:1: a picture lies outside the folder"):
            read_records(tmp_path / "out")
