"""Sources in the forms that others publish and programs save."""

import base64
import io
import json
import sys
import zipfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pair_sources import (
    AS_BYTES,
    encoded,
    folder_of_pictures,
    group_of,
    image_id,
    jpeg,
    refused,
    write_parquet,
    write_table,
)
from PIL import Image

from medtune.pairs import archives, load_pairs, reject_reason


def loaded(source: Path, **options) -> list[dict]:
    """All rows of a source, bad ones too, with pictures as they are."""
    return list(load_pairs(source, strict=False, **options).cast_column("image", AS_BYTES))


def named(rows: list[dict]) -> list[tuple]:
    """The name of each row's picture, its caption and its split."""
    found = []
    for row in rows:
        name = row["image"] and Path(row["image"]["path"]).name
        found.append((name, row["caption"], row.get("split")))
    return found


@pytest.fixture
def pictures(tmp_path) -> Path:
    return folder_of_pictures(tmp_path)


# --- JSON of others -------------------------------------------------------------------------------


def test_r2gens_lists_of_splits(pictures):
    def record(name: str, *views: str) -> dict:
        return {"id": name, "image_path": [f"{view}.jpg" for view in views], "report": f"R {name}."}

    value = {
        "info": "a note",
        "train": [record("s1", "a", "b"), record("s2", "c")],
        "val": [record("s3", "a")],
        "test": [record("s4", "c"), "no record"],
        "holdout": [record("s5", "c")],
    }
    (pictures / "annotation.json").write_text(json.dumps(value))
    rows = loaded(pictures)
    assert [row["id"] for row in rows[:5]] == ["s1", "s1-2", "s2", "s3", "s4"]
    assert rows[0]["group"] == rows[1]["group"] == group_of("s1")
    assert named(rows[:5]) == [
        ("a.jpg", "R s1.", "train"),
        ("b.jpg", "R s1.", "train"),
        ("c.jpg", "R s2.", "train"),
        ("a.jpg", "R s3.", "validation"),
        ("c.jpg", "R s4.", "test"),
    ]
    assert "a record is a JSON object, not str" in rows[5]["problem"]
    assert "split: holdout is not known" in rows[6]["problem"]


def test_coco(pictures):
    images = [{"id": number, "file_name": f"{name}.jpg"} for number, name in enumerate("abc")]
    annotations = [
        {"id": 10, "image_id": 0, "caption": "A liver."},
        {"id": 11, "image_id": 1, "caption": "A spleen."},
        {"id": 12, "image_id": 1, "caption": "A normal spleen."},
        {"id": 13, "image_id": 99, "caption": "Nothing."},
        {"id": 14, "image_id": 0, "bbox": [0, 0, 1, 1]},
    ]
    value = {"images": images, "annotations": annotations}
    (pictures / "captions_train.json").write_text(json.dumps(value))
    rows = loaded(pictures)
    good = [row for row in rows if not row["problem"]]
    assert named(good) == [
        ("a.jpg", "A liver.", None),
        ("b.jpg", "A spleen.", None),
        ("b.jpg", "A normal spleen.", None),
    ]
    assert [row["id"] for row in good] == ["0", "1", "1-2"]
    assert good[1]["group"] == good[2]["group"] is not None
    problems = sorted(row["problem"].split(": ", 1)[1] for row in rows if row["problem"])
    assert [problem[:35] for problem in problems] == [
        "a picture in images has no caption",
        "an annotation has no caption: medtu",
        "an annotation has the image_id of n",
    ]


def test_karpathys_form_of_coco(pictures):
    image = {"filename": "a.jpg", "split": "val", "sentences": [{"raw": "A."}, {"raw": "B."}]}
    (pictures / "t.json").write_text(json.dumps({"images": [image], "dataset": "x"}))
    rows = loaded(pictures)
    assert named(rows) == [("a.jpg", "A.", "validation"), ("a.jpg", "B.", "validation")]
    assert len({row["id"] for row in rows}) == 2


@pytest.mark.parametrize(
    "value",
    [
        {"version": 1, "data": [{"image": "a.jpg", "caption": "x"}, {"image": "b.jpg", "caption": "y"}]},
        {"image": ["a.jpg", "b.jpg"], "caption": ["x", "y"]},
        {"image": {"0": "a.jpg", "1": "b.jpg"}, "caption": {"0": "x", "1": "y"}},
        {"s1": {"image": "a.jpg", "caption": "x"}, "s2": {"image": "b.jpg", "caption": "y"}},
    ],
)  # fmt: skip
def test_objects_that_hold_records(pictures, value):
    (pictures / "t.json").write_text(json.dumps(value))
    assert named(loaded(pictures)) == [("a.jpg", "x", None), ("b.jpg", "y", None)]


# --- folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_imagefolder_has_a_table_in_each_folder(tmp_path, suffix):
    for split in ("train", "val", "test"):
        (tmp_path / split).mkdir()
        records = []
        for number in range(2):
            Image.new("L", (8, 8), number).save(tmp_path / split / f"{number}.png")
            records.append({"file_name": f"{number}.png", "text": f"{split} {number}"})
        table = tmp_path / split / f"metadata.{suffix}"
        if suffix == "parquet":
            pq.write_table(pa.Table.from_pylist(records), table)
        else:
            write_table(table, records)
    rows = loaded(tmp_path)
    captions = {row["caption"]: (row["split"], row["image"]["path"]) for row in rows}
    assert captions["val 1"] == ("validation", str((tmp_path / "val" / "1.png").resolve()))
    assert len(captions) == 6
    assert {row["caption"] for row in loaded(tmp_path, split="test")} == {"test 0", "test 1"}


def test_a_bad_row_of_a_nested_table_says_in_which_folder(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        write_table(tmp_path / split / "metadata.csv", [{"file_name": "x.png", "text": "x"}])
    problems = [row["problem"] for row in loaded(tmp_path)]
    assert [problem.split(": ")[0] for problem in problems] == [
        "test - metadata.csv:2",
        "train - metadata.csv:2",
    ]


def test_rocos_text_file(tmp_path):
    folder = tmp_path / "radiology"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "ROCO_00001.jpg").write_bytes(jpeg())
    text = 'ROCO_00001\t Axial MRI, "so".\nROCO_00002\t"Open.\n'
    (folder / "captions.txt").write_text(text)
    (folder / "licence.txt").write_text("A licence\tand so on.\n")
    for source in (folder, folder / "captions.txt"):
        first, second = loaded(source)
        assert first["caption"] == ' Axial MRI, "so".'
        assert first["image"]["path"] == str((folder / "images" / "ROCO_00001.jpg").resolve())
        assert "picture ROCO_00002 is missing" in second["problem"]


def test_rocos_tables_of_ids(tmp_path):
    """Version 2 has no column for pictures: they lie beside the table, called by the id."""
    for split in ("train", "valid"):
        (tmp_path / split).mkdir()
        (tmp_path / split / f"ROCOv2_{split}_1.jpg").write_bytes(jpeg())
        records = [{"ID": f"ROCOv2_{split}_1", "Caption": f"Of {split}."}]
        write_table(tmp_path / f"{split}_captions.csv", records)
        write_table(tmp_path / f"{split}_concepts.csv", [{"ID": "x", "CUIs": "C1"}])
    rows = loaded(tmp_path)
    assert named(rows) == [
        ("ROCOv2_train_1.jpg", "Of train.", "train"),
        ("ROCOv2_valid_1.jpg", "Of valid.", "validation"),
    ]
    [row] = loaded(write_table(tmp_path / "t.csv", [{"id": "gone", "caption": "x"}]))
    assert "no picture is called by its id" in row["problem"]


def test_a_description_of_llama_factory_with_hub_entries(pictures):
    turns = [{"from": "human", "value": "<image>Q"}, {"from": "gpt", "value": "A"}]
    write_table(pictures / "one.json", [{"dialog": turns, "pics": ["a.jpg"]}])
    write_table(pictures / "texts.json", [{"instruction": "Q", "output": "A"}])
    columns = {"messages": "dialog", "images": "pics"}
    described = {
        "mine": {"file_name": "one.json", "formatting": "sharegpt", "columns": columns},
        "theirs": {"hf_hub_url": "llamafactory/x", "columns": columns},
        "texts": {"file_name": "texts.json"},
        "outside": {"file_name": "../secret.json", "columns": columns},
    }
    (pictures / "dataset_info.json").write_text(json.dumps(described))
    write_table(pictures.parent / "secret.json", [{"dialog": turns, "pics": ["a.jpg"]}])
    for source in (pictures, pictures / "dataset_info.json"):
        [row] = loaded(source)
        assert (row["question"], row["caption"]) == ("Q", "A")
    (pictures / "dataset_info.json").write_text(json.dumps({"theirs": described["theirs"]}))
    refused(ValueError, "names no file that lies here", pictures / "dataset_info.json")


@pytest.mark.parametrize("with_splits", [False, True])
def test_sets_that_datasets_saved(tmp_path, with_splits):
    rows = {"image": [Image.new("L", (8, 8), grey) for grey in (1, 2)], "text": ["x", "y"]}
    saved = datasets.Dataset.from_dict(rows | {"image_id": [1, 2]})
    saved = saved.cast_column("image", datasets.Image())
    if with_splits:
        splits = {"train": saved.select([0]), "test": saved.select([1])}
        datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    else:
        saved.save_to_disk(tmp_path / "saved")
    read = loaded(tmp_path / "saved")
    assert sorted((row["id"], row["caption"]) for row in read) == [("1", "x"), ("2", "y")]
    assert [row["image"]["bytes"][:4] for row in read] == [b"\x89PNG"] * 2
    if with_splits:
        assert {row["id"]: row["split"] for row in read} == {"1": "train", "2": "test"}
        assert [row["id"] for row in loaded(tmp_path / "saved", split="test")] == ["2"]


# --- parquet of any shape -------------------------------------------------------------------------

PNG = encoded(Image.new("L", (8, 8), 9), "PNG")
AS_TEXT = base64.b64encode(PNG).decode()


@pytest.mark.parametrize("options", [{}, {"limit": 9}, {"streaming": True}])
@pytest.mark.parametrize(
    "cell",
    [PNG, {"bytes": PNG, "path": None}, {"bytes": PNG, "path": "x.png"}, AS_TEXT, [PNG],
     [{"bytes": PNG, "path": None}], f"data:image/png;base64,{AS_TEXT}"],
)  # fmt: skip
def test_pictures_that_parquet_holds(tmp_path, cell, options):
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [cell, cell], "caption": ["x", "y"]}), file)
    rows = loaded(file, **options)
    assert [row["image"]["bytes"] for row in rows] == [PNG, PNG]
    assert [row["id"] for row in rows] == [image_id(PNG), image_id(PNG) + "-2"]
    assert [reject_reason(row) for row in rows] == [None, None]


@pytest.mark.parametrize("options", [{}, {"limit": 9}, {"streaming": True}])
def test_pictures_that_parquet_names(pictures, options):
    file = pictures / "a.parquet"
    table = {
        "image_path": ["images/a.jpg", "b.jpg", "none.jpg", "../x.jpg"],
        "caption": list("wxyz"),
        "id": list("1234"),
    }
    pq.write_table(pa.table(table), file)
    rows = loaded(file, **options)
    assert named(rows[:2]) == [("a.jpg", "w", None), ("b.jpg", "x", None)]
    assert "a.parquet:3: picture none.jpg is missing" in rows[2]["problem"]
    assert "image_root=FOLDER" in rows[3]["problem"]
    with pytest.raises(FileNotFoundError, match="a.parquet:3: picture none.jpg is missing"):
        list(load_pairs(file, limit=9))


def test_a_shard_follows_a_whole_path_only_where_a_root_is_named(pictures):
    secret = pictures / "images" / "a.jpg"
    file = write_parquet(pictures / "a.parquet", 1, image=[{"bytes": None, "path": str(secret)}])
    assert loaded(file)[0]["image"] is None
    assert loaded(file, image_root=pictures.parent)[0]["image"]["path"] == str(secret.resolve())


@pytest.mark.parametrize("options", [{}, {"limit": 9}, {"streaming": True}])
def test_several_pictures_questions_and_dialogues_in_parquet(tmp_path, options):
    cell = {"bytes": PNG, "path": None}
    other = {"bytes": jpeg(), "path": None}
    write_parquet(tmp_path / "lists.parquet", 1, image=None, images=[[cell, other]], id=["s"])
    rows = loaded(tmp_path / "lists.parquet", **options)
    assert [row["id"] for row in rows] == ["s", "s-2"]
    assert {row["group"] for row in rows} == {group_of("s")}
    vqa = {"image": [cell], "question": ["Which organ?"], "answer": ["The liver."]}
    pq.write_table(pa.table(vqa), tmp_path / "vqa.parquet")
    [row] = loaded(tmp_path / "vqa.parquet", **options)
    assert (row["question"], row["caption"]) == ("Which organ?", "The liver.")
    turns = []
    for question, answer in (("<image>Q1", "A1"), ("Q2", "A2")):
        turns.append({"role": "user", "content": question})
        turns.append({"role": "assistant", "content": answer})
    pq.write_table(pa.table({"messages": [turns], "images": [[cell]]}), tmp_path / "d.parquet")
    rows = loaded(tmp_path / "d.parquet", **options)
    assert [(row["question"], row["caption"]) for row in rows] == [("Q1", "A1"), ("Q2", "A2")]
    assert [row["image"]["bytes"] for row in rows] == [PNG, PNG]


@pytest.mark.parametrize("options", [{}, {"limit": 9}, {"streaming": True}])
def test_groups_splits_and_numbers_in_parquet(tmp_path, options):
    columns = {
        "subject_id": [7, 7, None],
        "Split": ["Train", "dev", "test"],
        "id": ["p1/s1", "p1/s1", "s3"],
        "caption": [1.0, float("nan"), 2.5],
        "question": ["How many?"] * 3,
    }
    rows = loaded(write_parquet(tmp_path / "a.parquet", **columns), **options)
    assert [row["group"] for row in rows] == [group_of("7"), group_of("7"), None]
    assert [row["split"] for row in rows] == ["train", "validation", "test"]
    assert [row["caption"] for row in rows] == ["1", None, "2.5"]
    assert rows[0]["id"].startswith("id-")
    assert rows[1]["id"] == rows[0]["id"] + "-2"
    assert loaded(tmp_path / "a.parquet", split="val", **options)[0]["split"] == "validation"


def test_a_column_of_numbers_is_no_caption(tmp_path):
    rows = loaded(write_parquet(tmp_path / "a.parquet", caption=[1.5, float("nan"), None]))
    assert "caption: float is no text" in rows[0]["problem"]
    assert [row["caption"] for row in rows] == [None] * 3


def test_another_salt_is_not_served_from_the_cache(tmp_path, monkeypatch):
    file = write_parquet(tmp_path / "a.parquet", patient_id=list("abc"))
    first = load_pairs(file)["group"][:]
    monkeypatch.setenv("MEDTUNE_SALT", "another")
    assert load_pairs(file)["group"][:] != first


# --- Excel ----------------------------------------------------------------------------------------


def test_excel_without_openpyxl_says_what_to_install(pictures, monkeypatch):
    (pictures / "t.xlsx").write_bytes(b"PK\3\4")
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    refused(ValueError, "pip install openpyxl", pictures / "t.xlsx")


def test_excel(pictures):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.active.append(["Image", "Caption", "Patient ID", "Count"])
    book.active.append(["a.jpg", "A liver.", 7, None])
    book.active.append([None, None, None, None])
    book.active.append(["none.jpg", "A spleen.", 7, 2])
    book.active.append(["b.jpg", 5, 7, 2])
    book.save(pictures / "t.xlsx")
    rows = loaded(pictures)
    assert named(rows[:1]) == [("a.jpg", "A liver.", None)]
    assert rows[0]["group"] == group_of("7")
    assert rows[1]["problem"].startswith("t.xlsx:4: picture none.jpg is missing")
    assert "caption: int is no text" in rows[2]["problem"]
    sheet = book.create_sheet("more")
    sheet.append(["x"])
    book.save(pictures / "t.xlsx")
    refused(ValueError, "has 2 sheets with data", pictures)
    book.worksheets[0].title = "Train"
    sheet.title = "test"
    sheet["A1"], sheet["B1"] = "image", "caption"
    sheet.append(["c.jpg", "A cyst."])
    book.save(pictures / "t.xlsx")
    splits = [row.get("split") for row in loaded(pictures) if not row["problem"]]
    assert splits == ["train", "test"]
    (pictures / "t.xlsx").write_bytes(b"PK\3\4")
    refused(ValueError, "t.xlsx is no Excel file", pictures)


# --- ZIP ------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


TABLE = b"image,caption\na.jpg,A liver.\n"


@pytest.mark.parametrize("inside", ["", "set/"])
def test_a_zip_is_unpacked_once(tmp_path, cache, inside):
    files = {f"{inside}captions.csv": TABLE, f"{inside}images/a.jpg": jpeg()}
    noise = {"__MACOSX/x": b"", ".DS_Store": b"x", f"{inside}images/._a.jpg": b"x"}
    source = zipped(tmp_path / "set.zip", files | noise)
    [row] = loaded(source)
    assert row["caption"] == "A liver."
    assert Path(row["image"]["path"]).read_bytes() == jpeg()
    assert Path(row["image"]["path"]).is_relative_to(cache.resolve())
    assert loaded(source) == [row]
    assert len(list((cache / "medtune" / "unpacked").iterdir())) == 1


def link(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.external_attr = 0o120777 << 16
    return entry


@pytest.mark.parametrize(
    "name", ["../a.jpg", "/a.jpg", "x/../../a.jpg", "C:\\a.jpg", "..\\a.jpg", "x" * 300, link("l")]
)
def test_a_zip_that_leads_out_of_its_folder_is_not_unpacked(tmp_path, cache, name):
    source = zipped(tmp_path / "set.zip", {"captions.csv": TABLE, name: b"/etc/hostname"})
    refused(ValueError, "holds a link or a name that leads out", source)
    assert list((cache / "medtune" / "unpacked").iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "set.zip"]


def test_a_zip_that_is_too_large_or_damaged(tmp_path, cache, monkeypatch):
    files = {f"{number}.txt": b"x" for number in range(9)}
    source = zipped(tmp_path / "many.zip", files)
    monkeypatch.setattr(archives, "MOST_FILES", 8)
    refused(ValueError, "would unpack to 9 files", source)
    monkeypatch.setattr(archives, "MOST_FILES", 10)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jpg", bytes(5_000_000))
    refused(ValueError, "a ZIP bomb", tmp_path / "bomb.zip")
    content = zipped(tmp_path / "cut.zip", {"a.jpg": jpeg()}).read_bytes()
    (tmp_path / "cut.zip").write_bytes(content[: len(content) // 2])
    refused(ValueError, "is no ZIP, or is damaged", tmp_path / "cut.zip")
    spoilt = content.replace(jpeg()[20:40], bytes(20))
    (tmp_path / "spoilt.zip").write_bytes(spoilt)
    refused(ValueError, "is no ZIP, or is damaged", tmp_path / "spoilt.zip")
    monkeypatch.setattr(archives, "MOST_BYTES", 4)
    refused(ValueError, "would unpack to 9 files", source)


def test_names_of_an_old_zip(tmp_path, cache):
    """Programs of before 2007 do not say how names are encoded: Chinese ones use GBK."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("XXXX.jpg", jpeg())
        archive.writestr("captions.csv", "image,caption\n胸片.jpg,A liver.\n")
    content = buffer.getvalue().replace(b"XXXX", "胸片".encode("gbk"))
    (tmp_path / "old.zip").write_bytes(content)
    assert loaded(tmp_path / "old.zip")[0]["problem"] is None


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("scan.nii.gz", "save its slices as PNG"),
        ("scan.nii", "save its slices as PNG"),
        ("set.tar.gz", "unpack it"),
        ("set.7z", "unpack it"),
        ("t.xls", "save it as CSV"),
        ("set.pkl", "save it as parquet"),
        ("echo.mp4", "take pictures out of it"),
    ],
)
def test_other_kinds_of_files_are_named_with_advice(tmp_path, name, advice):
    (tmp_path / name).write_bytes(b"\x1f\x8b")
    refused(ValueError, f"{name} is .*{advice}", tmp_path / name)
    write_table(tmp_path / "t.csv", [{"image": "a.jpg", "caption": "x"}])
    refused(ValueError, "is no table of captions", tmp_path, captions=tmp_path / name)
