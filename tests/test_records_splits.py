"""Which split a row goes to, and that every row is a pair or rejected."""

import json
import shutil
import tempfile
from pathlib import Path

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shards import KEPT, encode, json_lines, pair, picture, rejected, write_shard

from medtune.pairs import split_of_word
from medtune.records import SPLITS, check_folder, convert_pairs


def groups_of_splits(folder: Path) -> dict[str, set]:
    """The groups in each split that there is."""
    found = {}
    for split in SPLITS:
        records = json_lines(folder / f"{split}.jsonl")
        if records:
            found[split] = {record["group"] for record in records}
    return found


# --- by patient -------------------------------------------------------------------------------


def test_known_patients_are_dealt_out_and_it_is_said(tmp_path):
    rows = [pair(i, group=f"p{i // 3}") for i in range(60)]
    source, out = write_shard(tmp_path / "a.parquet", rows), tmp_path / "out"
    summary = convert_pairs(source, out)
    assert summary["split_by"] == "patient"
    assert summary["records"] == {"train": 48, "validation": 6, "test": 6}
    apart = groups_of_splits(out)
    assert sum(map(len, apart.values())) == len(set.union(*apart.values())) == 20
    assert check_folder(out)["ok"]
    other = convert_pairs(source, tmp_path / "other", seed=1)
    assert other["records"] == summary["records"]
    assert groups_of_splits(tmp_path / "other") != apart
    asked = convert_pairs(source, tmp_path / "asked", split_by="patient")
    assert asked["split_by"] == "patient" and groups_of_splits(tmp_path / "asked") == apart
    all_of_it = convert_pairs(source, tmp_path / "none", split_by="none")
    assert all_of_it["split_by"] == "none" and all_of_it["records"] == {"train": 60}


def test_a_rejected_row_needs_no_patient(tmp_path):
    for i in range(6):
        picture(i).save(tmp_path / f"{i}.png")
    lines = [f"{i}.png,A liver {i}.,p{i}\n" for i in range(6)]
    (tmp_path / "c.csv").write_text(
        "image,caption,group\n" + "".join(lines) + "gone.png,A liver.,\n"
    )
    summary = convert_pairs(tmp_path / "c.csv", tmp_path / "out")
    assert summary["split_by"] == "patient" and summary["rejected"] == 1
    assert set(summary["records"]) == set(SPLITS)


@pytest.mark.parametrize("groups", [["a", "a", "b", "b"], [None] * 4])
def test_unknown_or_few_patients_are_not_dealt_out(tmp_path, groups):
    rows = [pair(i, group=group) for i, group in enumerate(groups)]
    source = write_shard(tmp_path / "a.parquet", rows)
    summary = convert_pairs(source, tmp_path / "out")
    assert summary["split_by"] == "none" and summary["records"] == {"train": 4}
    with pytest.raises(ValueError, match=r"split_by=patient needs|cannot fill 3 splits"):
        convert_pairs(source, tmp_path / "asked", split_by="patient")


def test_a_row_that_names_no_patient_is_rejected_where_others_do(tmp_path):
    """Its patient may be one of the others, so that it fits into no part."""
    groups = ["a", "b", None, "c", "d"]
    source = write_shard(
        tmp_path / "a.parquet", [pair(i, group=group) for i, group in enumerate(groups)]
    )
    summary = convert_pairs(source, tmp_path / "out")
    assert summary["split_by"] == "patient" and summary["rejected"] == 1
    assert sum(summary["records"].values()) == 4
    assert "names no patient" in (tmp_path / "out" / "rejected.jsonl").read_text()
    whole = convert_pairs(source, tmp_path / "whole", split_by="none")
    assert whole["records"] == {"train": 5}

    groups = ["a", "b", "c", None, None, None, None]
    source = write_shard(
        tmp_path / "b.parquet", [pair(i, group=group) for i, group in enumerate(groups)]
    )
    with pytest.raises(ValueError, match=r"4 of 7 rows name no patient.*split_by=none"):
        convert_pairs(source, tmp_path / "most")


def test_a_split_of_the_source_is_kept(tmp_path):
    words = ["Train", " val ", "dev", "TEST", "valid", "training"]
    rows = [pair(i, group=f"p{i}", split=word) for i, word in enumerate(words)]
    source = write_shard(tmp_path / "a.parquet", rows)
    summary = convert_pairs(source, tmp_path / "out")
    assert summary["split_by"] == "source"
    assert summary["records"] == {"train": 2, "validation": 3, "test": 1}
    assert convert_pairs(source, tmp_path / "b", split_by="none")["records"] == summary["records"]
    dealt = convert_pairs(source, tmp_path / "c", split_by="patient")
    assert dealt["split_by"] == "patient" and dealt["records"]["train"] == 4


def test_an_empty_column_split_says_nothing(tmp_path):
    source = write_shard(tmp_path / "a.parquet", [pair(i, split=None) for i in range(3)])
    assert convert_pairs(source, tmp_path / "out")["records"] == {"train": 3}


@settings(max_examples=100)
@given(st.text(max_size=12) | st.none() | st.integers() | st.floats())
def test_any_cell_is_a_split_or_none(cell):
    assert split_of_word(cell) in (*SPLITS, None)


def test_wrong_wishes_are_named(tmp_path):
    source = write_shard(tmp_path / "a.parquet", [pair(0)])
    with pytest.raises(ValueError, match="split_by=site must be patient or none"):
        convert_pairs(source, tmp_path / "out", split_by="site")
    with pytest.raises(ValueError, match="leave split_by=patient out"):
        convert_pairs(source, tmp_path / "out", splits=["train"], split_by="patient")
    assert not (tmp_path / "out").exists()


# --- a file of splits -------------------------------------------------------------------------


def test_a_file_of_splits_is_joined_by_id(tmp_path):
    names = ["id-00000", "p1/s1", "id-00002", "id-00003", "id-00004"]
    rows = [pair(i, id=name) for i, name in enumerate(names)]
    source, out = write_shard(tmp_path / "a.parquet", rows), tmp_path / "out"
    file = tmp_path / "splits.csv"
    # as a spreadsheet saves it, in another order, with ids as the source has them
    file.write_text(
        "Split, ID,group\nval,id-00000,a\nTrain,p1/s1,b\ntest,id-00002,\n,id-00003,a\ntrain,gone,c\n",
        "utf-8-sig",
    )
    summary = convert_pairs(source, out, splits=file)
    assert summary["records"] == {"train": 1, "validation": 1, "test": 1}
    assert summary["split_by"] == "given" and summary["splits_unused"] == 1
    reason = "split: splits.csv has none for this id"
    assert rejected(out) == {"id-00003": reason, "id-00004": reason}
    assert groups_of_splits(out) == {"train": {"b"}, "validation": {"a"}, "test": {None}}
    assert convert_pairs(source, out, splits=str(file)) == summary
    file.write_text(file.read_text("utf-8").replace("val,", "test,"))
    with pytest.raises(ValueError, match="holds a conversion with other splits"):
        convert_pairs(source, out, splits=file)


def test_a_group_of_the_source_counts_more_than_that_of_the_file(tmp_path):
    rows = [pair(0, group=7), pair(1, group=None)]
    source, out = write_shard(tmp_path / "a.parquet", rows), tmp_path / "out"
    file = tmp_path / "splits.csv"
    file.write_text("id,split,group\nid-00000,train,x\nid-00001,test,y\n")
    convert_pairs(source, out, splits=file)
    assert groups_of_splits(out) == {"train": {"7"}, "test": {"y"}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,part\na,train\n", "has no columns id and split"),
        ("", "has no columns id and split"),
        ("id,split\nid-00000,hold-out\n", "line 2: 'hold-out' is none of train"),
        ("id,split\nid-00000,train\nid-00000,test\n", "line 3: the id stands above already"),
        ("id,split\nother,train\n", "has a split for none of the ids"),
        (b"id,split\nid-\xff,train\n", "is no CSV in UTF-8"),
    ],
)
def test_a_wrong_file_of_splits_is_one_line(tmp_path, text, message):
    source = write_shard(tmp_path / "a.parquet", [pair(0)])
    file = tmp_path / "splits.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as caught:
        convert_pairs(source, tmp_path / "out", splits=file)
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError):
        convert_pairs(source, tmp_path / "out", splits=tmp_path / "nowhere.csv")


# --- every row is a pair or rejected ----------------------------------------------------------

PICTURES = [KEPT["rgb.jpg"], KEPT["grey.png"], encode(picture(2), "BMP"), b"", b"no picture", None]
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "id": st.sampled_from(["a", "b", "c-2", "x/y", "", None, "n" * 300]),
            "caption": st.sampled_from(["A liver.", "A spleen.", " ", None, "<image>", "脾脏。"]),
            "image": st.sampled_from(PICTURES),
            "group": st.sampled_from(["g", "h", "", None]),
            "split": st.sampled_from(["train", "val", "hold-out", None]),
            "question": st.sampled_from(["What?", "Where?", "<video>?", None]),
        }
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(1, 3), st.booleans(), st.sampled_from(["en", "zh"]))
def test_every_row_is_a_pair_or_rejected(rows, pictures, from_file, language):
    folder = Path(tempfile.mkdtemp())
    try:
        file = write_shard(folder / "a.parquet", rows)
        features = datasets.Dataset.from_parquet(str(file), keep_in_memory=True).features
        source = file
        if not from_file or features["id"] != datasets.Value("string"):
            source = datasets.Dataset.from_list(
                [row | {"image": {"bytes": row["image"], "path": None}} for row in rows]
            )
        out = folder / "out"
        summary = convert_pairs(source, out, pictures_per_sample=pictures, language=language)
        records = []
        for split in summary["records"]:
            records += json_lines(out / f"{split}.jsonl")
        shown = sum(len(record["images"]) for record in records)
        assert summary["rows"] == len(rows) == summary["pairs"] + summary["rejected"]
        assert summary["pairs"] == shown
        assert len(records) == sum(summary["records"].values())
        listed = json_lines(out / "rejected.jsonl")
        assert len(listed) == summary["rejected"] == sum(summary["reasons"].values())
        assert len({entry["row"] for entry in listed}) == len(listed)
        assert json.dumps(listed).count("hold-out") <= len(listed)
        if records:
            report = check_folder(out)
            checks = {error["check"] for error in report["errors"]}
            assert checks <= {"groups apart"}, report["errors"]
    finally:
        shutil.rmtree(folder)
