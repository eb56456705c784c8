"""Loading pairs from every kind of source, and judging single pairs."""

import csv
import hashlib
import http.server
import io
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medtune import data
from medtune.data import load_pairs, picture_bytes, reject_reason, to_rgb

AS_BYTES = datasets.Image(decode=False)


def jpeg(value: int = 90, size=(24, 16), **options) -> bytes:
    ramp = np.add.outer(np.arange(size[1]), np.arange(size[0])).astype(np.uint8) + np.uint8(value)
    Image.fromarray(ramp).convert("RGB").save(buffer := io.BytesIO(), "JPEG", **options)
    return buffer.getvalue()


def write_parquet(path: Path, rows: int = 3, start: int = 0, **columns) -> Path:
    table = {
        "image": [{"bytes": jpeg(start + i), "path": None} for i in range(rows)],
        "id": [f"id-{start + i}" for i in range(rows)],
        "caption": [f"caption {start + i}" for i in range(rows)],
    }
    pq.write_table(pa.table({k: v for k, v in (table | columns).items() if v is not None}), path)
    return path


@pytest.fixture
def pictures(tmp_path) -> Path:
    (tmp_path / "images").mkdir()
    for i, name in enumerate("abc"):
        (tmp_path / "images" / f"{name}.jpg").write_bytes(jpeg(40 * i))
    return tmp_path


def refused(kind: type[Exception], pattern: str, *args, **options) -> str:
    """Load what cannot be loaded; the error has the kind that the command line turns into one line, and is one line."""
    with pytest.raises(kind, match=pattern) as caught:
        load_pairs(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- parquet ------------------------------------------------------------------------------------------------------


def test_parquet_pictures_stay_the_bytes_of_the_source(tmp_path):
    rows = load_pairs(write_parquet(tmp_path / "a.parquet"))
    assert rows.column_names == ["image", "id", "caption"]
    assert [row["image"]["bytes"] for row in rows.cast_column("image", AS_BYTES)] == [jpeg(i) for i in range(3)]
    assert rows[1]["image"].size == (24, 16)


@pytest.mark.parametrize("options", [{}, {"limit": 4}, {"streaming": True}, {"streaming": True, "limit": 4}])
def test_folder_of_shards_in_order(tmp_path, options):
    write_parquet(tmp_path / "train-00000.parquet", 3)
    write_parquet(tmp_path / "train-00001.parquet", 3, start=3)
    rows = load_pairs(tmp_path, **options)
    assert isinstance(rows, datasets.IterableDataset if options.get("streaming") else datasets.Dataset)
    assert [row["id"] for row in rows] == [f"id-{i}" for i in range(4 if "limit" in options else 6)]


@pytest.mark.parametrize("streaming", [False, True])
def test_other_names_and_types(tmp_path, streaming):
    file = write_parquet(tmp_path / "a.parquet", id=None, caption=None, image_id=[7, 8, 9], report=["x", "y", "z"])
    row = next(iter(load_pairs(file, streaming=streaming)))
    assert (row["id"], row["caption"]) == ("7", "x")
    assert next(iter(load_pairs(file, columns={"caption": "image_id", "id": "report"})))["caption"] == "7"


@pytest.mark.parametrize("options", [{}, {"limit": 9}, {"streaming": True}])
def test_shards_with_different_columns(tmp_path, options):
    write_parquet(tmp_path / "a.parquet", 1, group=["g"], old=["x"], older=["y"])
    write_parquet(tmp_path / "b.parquet", 1, start=1, report=["r"], old=["x"], older=["y"])
    rows = list(load_pairs(tmp_path, columns={"id": "old", "caption": "older"}, **options))
    assert [(row["id"], row["caption"], row["group"], row["report"]) for row in rows] == [
        ("x", "y", "g", None),
        ("x", "y", None, "r"),
    ]


def test_a_picture_that_only_has_a_path_is_not_looked_up(tmp_path):
    """A shard from elsewhere must not name files of this machine."""
    (tmp_path / "secret.jpg").write_bytes(jpeg())
    cells = [{"bytes": None, "path": str(tmp_path / "secret.jpg")}, {"bytes": jpeg(), "path": "/etc/hostname"}]
    rows = load_pairs(write_parquet(tmp_path / "a.parquet", 2, image=cells)).cast_column("image", AS_BYTES)
    assert rows["image"] == [None, {"bytes": jpeg(), "path": None}]
    assert "no picture" in reject_reason(rows[0])


def test_split_by_column_and_by_file_name(tmp_path):
    write_parquet(tmp_path / "a.parquet", split=["train", "test", "test"], group=["g1", "g2", "g2"])
    assert load_pairs(tmp_path, split="test")["id"] == ["id-1", "id-2"]
    assert [row["group"] for row in load_pairs(tmp_path, split="test", streaming=True)] == ["g2", "g2"]
    refused(ValueError, "no pairs of split validation", tmp_path, split="validation")
    named = tmp_path / "named"
    named.mkdir()
    write_parquet(named / "train-00000-of-00001.parquet", 2)
    write_parquet(named / "test-00000-of-00001.parquet", 1, start=5)
    assert load_pairs(named, split="test")["id"] == ["id-5"]
    refused(ValueError, "no column split", named, split="validation")


def test_a_changed_file_is_not_served_from_the_cache(tmp_path):
    file = write_parquet(tmp_path / "a.parquet")
    load_pairs(file)
    write_parquet(file, start=50)
    assert load_pairs(file)["id"][0] == "id-50"


def test_bad_parquet(tmp_path):
    whole = write_parquet(tmp_path / "whole.parquet").read_bytes()
    (tmp_path / "cut").mkdir()
    cut = tmp_path / "cut" / "cut.parquet"
    cut.write_bytes(whole[: len(whole) // 2])
    write_parquet(tmp_path / "cut" / "good.parquet")
    refused(ValueError, "cut.parquet is cut off", cut)
    refused(ValueError, "cut.parquet is cut off", cut.parent)
    cut.write_bytes(b"")
    refused(ValueError, "cut.parquet is cut off", cut)
    spoilt = tmp_path / "spoilt.parquet"
    middle = len(whole) // 3
    spoilt.write_bytes(whole[:middle] + os.urandom(200) + whole[middle + 200 :])
    try:  # damage between whole footers is noticed when the rows are read, if it hits what makes pages readable
        load_pairs(spoilt)
    except ValueError as error:
        assert "\n" not in str(error)
    refused(ValueError, r"no column caption, only image, id", write_parquet(tmp_path / "b.parquet", caption=None))
    refused(ValueError, r"no column image or id", write_parquet(tmp_path / "c.parquet", image=None, id=None))
    refused(ValueError, r"no column nothing", tmp_path / "whole.parquet", columns={"caption": "nothing"})
    refused(ValueError, "holds no pairs", write_parquet(tmp_path / "d.parquet", 0, image=pa.array([], pa.binary())))


def test_sample(sample_path, monkeypatch, tmp_path):
    monkeypatch.setenv("MEDTUNE_SAMPLE", str(sample_path))
    test = load_pairs("sample", split="test")
    assert set(test["split"]) == {"test"}
    assert {"image", "id", "caption", "caption_zh", "group", "roi", "has_box", "modality", "fields"} <= {
        *test.column_names
    }
    assert test[0]["image"].size == (512, 512)
    monkeypatch.delenv("MEDTUNE_SAMPLE")
    assert len(load_pairs("sample", limit=2)) == 2  # found above this file, wherever one stands
    monkeypatch.setenv("MEDTUNE_SAMPLE", str(tmp_path / "none.parquet"))
    refused(FileNotFoundError, "make sample", "sample")


def test_real_x_rays(real):
    rows = load_pairs(real / "cxr.parquet")
    assert len(rows) == 60
    assert [reject_reason(row) for row in rows.cast_column("image", AS_BYTES)] == [None] * 60


# --- tables of captions -------------------------------------------------------------------------------------------


def write_table(path: Path, records: list[dict]) -> Path:
    if path.suffix in (".csv", ".tsv"):
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, records[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(records)
    else:
        lines = [json.dumps(record) for record in records]
        path.write_text("\n".join(lines) + "\n" if path.suffix == ".jsonl" else "[" + ",".join(lines) + "]", "utf-8")
    return path


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl"])
@settings(max_examples=15, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), min_size=1, max_size=4)
)
def test_captions_come_out_of_a_table_as_they_went_in(tmp_path_factory, suffix, texts):
    folder = tmp_path_factory.mktemp("table")
    (folder / "a.jpg").write_bytes(jpeg())
    write_table(folder / f"t.{suffix}", [{"id": f"n{i}", "image": "a.jpg", "caption": t} for i, t in enumerate(texts)])
    rows = load_pairs(folder)
    assert rows["caption"] == texts
    assert rows["id"] == [f"n{i}" for i in range(len(texts))]
    assert rows.cast_column("image", AS_BYTES)[0]["image"]["path"] == str((folder / "a.jpg").resolve())


def test_table_in_the_wild(pictures):
    table = pictures / "metadata.csv"
    table.write_bytes('\ufefffile_name;text;patient\nimages/a.jpg;Leber;p1\nb.jpg;"zwei\nZeilen; ja";p2\n'.encode())
    rows = load_pairs(pictures, columns={"group": "patient"})
    assert rows["caption"] == ["Leber", "zwei\nZeilen; ja"]
    assert (rows["id"], rows["group"]) == (["a", "b"], ["p1", "p2"])  # ids are made from the picture's name
    assert [row["image"].size for row in rows] == [(24, 16)] * 2
    (pictures / "other.jsonl").write_text('{"image": "c.jpg", "caption": "Milz"}\n')
    assert load_pairs(pictures)["caption"] == rows["caption"]  # metadata and captions are names that say it
    assert load_pairs(pictures, captions=pictures / "other.jsonl")["id"] == ["c"]
    table.rename(pictures / "this.csv")
    refused(ValueError, r"several tables \(other.jsonl, this.csv\)", pictures)


def test_values_of_several_kinds_are_kept(pictures):
    kinds = [{"k": 1, "m": {"a": [1]}}, {"k": "x"}, {"k": {"a": 2}, "m": {"a": [2]}}]
    write_table(
        pictures / "t.jsonl", [{"image": f"{n}.jpg", "caption": n, **k} for n, k in zip("abc", kinds, strict=True)]
    )
    rows = load_pairs(pictures)
    assert rows["k"] == ["1", "x", '{"a": 2}']
    assert rows[0]["m"] == {"a": [1]} and rows[1]["m"] is None


def test_pictures_without_a_table(pictures):
    refused(ValueError, "3 pictures and no table of captions", pictures)
    rows = load_pairs(pictures, allow_empty_captions=True)
    assert (rows["id"], rows["caption"]) == (["a", "b", "c"], [""] * 3)
    (pictures / "empty").mkdir()
    refused(ValueError, "holds no pairs", pictures / "empty")


OUTSIDE = "outside the folder"


@pytest.mark.parametrize(
    ("name", "kind", "pattern"),
    [
        ("nowhere.jpg", FileNotFoundError, "nowhere.jpg is missing"),
        ("../secret.jpg", ValueError, OUTSIDE),
        ("/etc/hostname", ValueError, OUTSIDE),
        ("link.jpg", ValueError, OUTSIDE),
        ("linked/secret.jpg", ValueError, OUTSIDE),
        ("a\0.jpg", ValueError, "no picture name"),
        ("", ValueError, "no picture name"),
        ("x" * 5000, (ValueError, OSError), "t.jsonl:1: "),
    ],
)
def test_pictures_that_a_table_must_not_name(pictures, name, kind, pattern):
    folder = pictures / "set"
    (pictures / "images").rename(folder)
    (pictures / "secret.jpg").write_bytes(jpeg())
    (folder / "link.jpg").symlink_to(pictures / "secret.jpg")
    (folder / "linked").symlink_to(pictures)
    write_table(folder / "t.jsonl", [{"image": name, "caption": "x"}, {"image": "a.jpg", "caption": "y"}])
    refused(kind, pattern, folder)
    rows = load_pairs(folder, strict=False)  # nothing is lost: the bad row says what is wrong with it
    assert (rows["id"], rows["caption"]) == (["t.jsonl:1", "a"], [None, "y"])
    reasons = [reject_reason(row) for row in rows.cast_column("image", AS_BYTES)]
    assert reasons[1] is None and re.search(pattern, reasons[0])
    if pattern == OUTSIDE and name != "/etc/hostname":
        allowed = folder if name.startswith("..") else pictures.parent
        assert len(load_pairs(folder, image_root=allowed, strict=False)) == 2


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_records_stay_countable(pictures, streaming):
    lines = [
        '{"image": "a.jpg", "caption": "good"}',
        "{broken",
        "[1]",
        '{"image": "b.jpg"}',
        '{"messages": [3], "images": ["c.jpg"]}',
        '{"image": "c.jpg", "caption": "lone \\ud800"}',
        '{"image": "c.jpg", "caption": "good"}',
    ]
    (pictures / "t.jsonl").write_text("\n".join(lines))
    refused(ValueError, "^t.jsonl:2: not JSON", pictures)
    rows = list(load_pairs(pictures, strict=False, streaming=streaming))
    problems = [row["problem"] for row in rows]
    assert [bool(p) for p in problems] == [False, True, True, True, True, False, False]
    assert "no column caption" in problems[3] and problems[4].startswith("t.jsonl:5: ")
    assert [bool(reject_reason(row)) for row in rows] == [False, True, True, True, True, True, False]


def test_bytes_that_are_no_utf8_are_rejected_not_guessed(pictures):
    (pictures / "t.csv").write_bytes(b"image,caption\na.jpg,caf\xe9\nb.jpg,caf\xc3\xa9\n")
    reasons = [reject_reason(row) for row in load_pairs(pictures)]
    assert reasons[0].startswith("caption: holds characters") and reasons[1] is None


def test_bad_tables(pictures):
    table = pictures / "t.json"
    table.write_text('[{"image": "a.jpg"')
    refused(ValueError, "is not JSON .*cut off", pictures)
    table.write_text("[]")
    refused(ValueError, "holds no pairs", pictures)
    table.unlink()
    (pictures / "t.csv").write_text("picture,words\na.jpg,x\n")
    refused(ValueError, "no column image or caption, only picture, words", pictures)
    refused(FileNotFoundError, "No such file.*none.csv", pictures, captions=pictures / "none.csv")


# --- dialogues ----------------------------------------------------------------------------------------------------


def dialogue(dialect: str, question: str, answer: str, images: list[str]) -> dict:
    if dialect == "messages":
        turns = [{"role": "system", "content": "S"}, {"role": "user", "content": f"<image>{question}"}]
        return {"messages": [*turns, {"role": "assistant", "content": answer}], "images": images}
    if dialect == "conversations":
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        return {"conversations": turns, "images": images}
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    return {"prompt": [asked], "completion": [said], "images": images, "instruction": question, "output": answer}


words = st.text(st.characters(exclude_categories=["Cs", "Zs", "Cc"]), min_size=1).map(
    lambda t: t.replace("<image>", "x")
)


@pytest.mark.parametrize("dialect", ["messages", "conversations", "prompt-completion"])
@settings(max_examples=15, deadline=None)
@given(spoken=st.lists(st.tuples(words, words), min_size=1, max_size=4))
def test_dialogues_back_into_pairs(tmp_path_factory, dialect, spoken):
    folder = tmp_path_factory.mktemp("dialogue")
    (folder / "a.jpg").write_bytes(jpeg())
    spoken = [(q.strip() or "q", a.strip() or "a") for q, a in spoken]
    write_table(folder / "t.json", [dialogue(dialect, q, a, ["a.jpg"]) for q, a in spoken])
    rows = load_pairs(folder)
    assert list(zip(rows["question"], rows["caption"], strict=True)) == spoken
    assert rows["id"] == ["a", *(f"a-{i}" for i in range(2, len(spoken) + 1))]
    assert set(rows.column_names) == {"image", "id", "caption", "question"}


def test_dialogues_with_several_turns_pictures_or_none(pictures):
    turns = [
        {"role": r, "content": t}
        for r, t in zip(("user", "assistant") * 2, ("<image>q1", "a1", "q2", "a2"), strict=True)
    ]
    records = [
        {"id": "two", "messages": turns, "images": ["a.jpg"], "group": "p1"},
        {"messages": turns[:2], "images": []},  # text only: no pair
        {"id": "both", "messages": turns[:2], "images": ["images/b.jpg", "images/c.jpg"], "group": "p2"},
    ]
    rows = load_pairs(write_table(pictures / "sharegpt.json", records))
    assert rows["id"] == ["two", "two-2", "both", "both-2"]
    assert (rows["question"], rows["caption"]) == (["q1", "q2", "q1", "q1"], ["a1", "a2", "a1", "a1"])
    assert rows["group"] == ["p1", "p1", "p2", "p2"]
    assert [row["image"].getpixel((0, 0))[0] // 40 for row in rows] == [0, 0, 1, 2]


def test_converted_folder_with_its_splits(pictures):
    for split, name in zip(("train", "validation", "test"), "abc", strict=True):
        record = dialogue("prompt-completion", "Q", f"caption {name}", [f"images/{name}.jpg"])
        write_table(pictures / f"{split}.jsonl", [{"id": f"id-{name}", **record, "roi": [0.1, 0.2, 0.3, 0.4]}])
    (pictures / "dataset_info.json").write_text("{}")
    (pictures / "rejected.jsonl").write_text('{"reason": "x"}\n')
    rows = load_pairs(pictures)
    assert dict(zip(rows["id"], rows["split"], strict=True)) == {"id-a": "train", "id-b": "validation", "id-c": "test"}
    assert rows[0]["roi"] == [0.1, 0.2, 0.3, 0.4]
    assert load_pairs(pictures, split="test")["caption"] == ["caption c"]
    refused(ValueError, "no pairs of split dev", pictures, split="dev")


@pytest.mark.parametrize("dialect", ["prompt-completion", "messages", "sharegpt"])
def test_what_convert_writes_is_read_back(tmp_path, dialect):
    from medtune.convert import convert_pairs

    source = load_pairs(write_parquet(tmp_path / "a.parquet", 4, split=["train", "train", "validation", "test"]))
    convert_pairs(source, tmp_path / "out", dialect=dialect, workers=1)
    back = load_pairs(tmp_path / "out")
    for column in ("id", "caption", "split"):
        assert sorted(back[column]) == sorted(source[column])
    kept = {row["id"]: picture_bytes(row["image"]) for row in back.cast_column("image", AS_BYTES)}
    assert kept == {f"id-{i}": jpeg(i) for i in range(4)}


# --- DICOM --------------------------------------------------------------------------------------------------------


def write_dicom(path: Path, patient: str, number: int = 1, frames: int = 1) -> Path:
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    file = Dataset()
    file.file_meta = FileMetaDataset()
    file.file_meta.TransferSyntaxUID, file.file_meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
    file.SOPClassUID, file.SOPInstanceUID = CTImageStorage, generate_uid(entropy_srcs=[patient, str(number)])
    file.SeriesInstanceUID = file.StudyInstanceUID = generate_uid(entropy_srcs=[patient])
    file.PatientName, file.PatientID, file.PatientBirthDate = f"{patient}^Secret", f"ID-{patient}", "19630101"
    file.Modality, file.InstanceNumber, file.PhotometricInterpretation = "CT", number, "MONOCHROME2"
    file.Rows, file.Columns, file.SamplesPerPixel = 16, 12, 1
    file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 16, 12, 11, 0
    file.RescaleIntercept, file.RescaleSlope, file.WindowCenter, file.WindowWidth = -1024, 1, 40, 400
    if frames > 1:
        file.NumberOfFrames = frames
    file.PixelData = (np.arange(frames * 192, dtype=np.uint16) * 7 + number).tobytes()
    file.save_as(path, enforce_file_format=True)
    return path


@pytest.fixture
def scans(tmp_path) -> Path:
    pytest.importorskip("medtune.dicom")
    for patient in ("Doe", "Roe"):
        for number in (1, 2):
            write_dicom(tmp_path / f"{patient}{number}.dcm", patient, number)
    return tmp_path


def test_dicom_folder(scans):
    refused(ValueError, "4 pictures and no table", scans)
    rows = load_pairs(scans, allow_empty_captions=True)
    assert rows["group"] == ["dicom-0001", "dicom-0001", "dicom-0002", "dicom-0002"]
    assert len(set(rows["id"])) == 4 and [row["image"].mode for row in rows] == ["RGB"] * 4
    assert [row["image"].size for row in rows] == [(12, 16)] * 4
    assert rows["modality"] == ["CT"] * 4
    told = json.dumps([{k: v for k, v in row.items() if k != "image"} for row in rows])
    assert not re.search("Doe|Roe|Secret|1963", told)
    salted = [load_pairs(scans, allow_empty_captions=True, salt=salt)["group"] for salt in ("one", "one", "two")]
    assert salted[0] == salted[1] != salted[2] and len(set(salted[0])) == 2


def test_dicom_with_captions_frames_and_a_series(scans):
    write_dicom(scans / "cine.dcm", "Poe", frames=3)
    (scans / "series").mkdir()
    for number in (1, 2):
        write_dicom(scans / "series" / f"{number}.dcm", "Moe", number)
    records = [
        {"id": "one", "image": "Doe1.dcm", "caption": "x"},
        {"id": "cine", "image": "cine.dcm", "caption": "y"},
        {"id": "volume", "image": "series", "caption": "z"},
    ]
    rows = load_pairs(write_table(scans / "captions.jsonl", records))
    assert rows["id"] == ["one", "cine", "cine-2", "cine-3", "volume", "volume-2"]
    assert rows["caption"] == ["x", "y", "y", "y", "z", "z"]
    assert len(set(rows["group"])) == 3 and rows["group"][4] == rows["group"][5]
    streamed = list(load_pairs(scans, streaming=True))
    assert [row["id"] for row in streamed] == rows["id"] and [row["group"] for row in streamed] == rows["group"]


def test_real_dicom(real):
    pytest.importorskip("medtune.dicom")
    rows = load_pairs(real / "dicom", allow_empty_captions=True)
    assert len(rows) >= 7 and {row["image"].mode for row in rows} == {"RGB"}
    assert load_pairs(real / "dicom" / "mr_brain.dcm", allow_empty_captions=True)["modality"] == ["MR"]


def test_dicom_without_pixels(scans):
    import pydicom

    file = pydicom.dcmread(scans / "Doe1.dcm")
    del file.PixelData
    file.save_as(scans / "Doe1.dcm")
    message = refused(ValueError, "Doe1.dcm", scans, allow_empty_captions=True)
    assert "pixel" in message.lower()
    rows = load_pairs(scans, allow_empty_captions=True, strict=False)
    assert [bool(problem) for problem in rows["problem"]] == [True, False, False, False]


# --- sources that are not there, and the hub ----------------------------------------------------------------------


def test_no_such_source(tmp_path):
    for source in (
        "missing.parquet",
        "data/missing.parquet",
        tmp_path / "none",
        "./a/b",
        "sampel",
        "a/b.csv",
        "x.dcm",
        "",
    ):
        if source:
            refused(FileNotFoundError, "no such file or folder", source)
    refused(ConnectionError, "no path some/set here, and no hub in reach", "some/set")


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's interface as `datasets` asks of it."""

    protocol_version = "HTTP/1.1"
    commit = "a" * 40
    files: dict[str, bytes] = {}

    def log_message(self, *_):
        pass

    def answer(self, status: int, body: bytes = b"{}", **headers):
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found = re.match(r"/(api/)?datasets/(\w+/\w+)/?([^?]*)", self.path)
        api, repo, rest = found.groups() if found else (None, None, "")
        if repo == "org/gated":
            return self.answer(401, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
        if repo == "org/halfway" and "parquet" in rest and not api:  # its card is public, its files are not
            return self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
        if repo not in ("org/pairs", "org/halfway"):
            return self.answer(401, X_Error_Code="RepoNotFound")
        name = re.sub(r"^(resolve|tree|revision)/[^/]+/?", "", rest)
        if api and rest.startswith("tree/"):
            entries = {}
            for path, body in self.files.items():
                if path.startswith(name):
                    inside = path[len(name) :].strip("/")
                    top = f"{name}/{inside.split('/')[0]}".strip("/")
                    kind = "directory" if "/" in inside else "file"
                    entries[top] = {"type": kind, "path": top, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
            return self.answer(200, json.dumps(list(entries.values())).encode(), Content_Type="application/json")
        if api:
            about = {"id": repo, "sha": self.commit, "tags": [], "siblings": [{"rfilename": f} for f in self.files]}
            return self.answer(200, json.dumps(about).encode(), Content_Type="application/json")
        if name not in self.files:
            return self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=self.commit)
        body, headers = self.files[name], {"X_Repo_Commit": self.commit, "Accept_Ranges": "bytes"}
        headers["ETag"] = f'"{hashlib.sha1(body).hexdigest()}"'
        if asked := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(asked[1]), min(int(asked[2] or len(body)), len(body) - 1)
            return self.answer(
                206, body[first : last + 1], Content_Range=f"bytes {first}-{last}/{len(body)}", **headers
            )
        return self.answer(200, body, **headers)

    do_HEAD = do_POST = do_GET


ASK = """
import json, sys, time
from medtune.data import load_pairs
for source, options in json.loads(sys.argv[1]):
    try:
        rows = load_pairs(source, **options)
        first = next(iter(rows))
        answer = [type(rows).__name__, sorted(rows.column_names), first["id"], first["caption"], first["image"].size]
        answer.append(len(rows) if hasattr(rows, "__len__") else None)
    except Exception as error:
        answer = [type(error).__name__, str(error)]
    print(json.dumps(answer), flush=True)
"""


@pytest.mark.slow
def test_hub(tmp_path):
    """`datasets` reads its endpoint when it is imported, hence the processes; the server is real HTTP on loopback."""
    table = write_parquet(tmp_path / "t.parquet", id=None, image_id=["r1", "r2", "r3"], cui=[["C1"]] * 3)
    Hub.files = {f"data/train-0000{i}-of-00002.parquet": table.read_bytes() for i in range(2)}
    configs = [{"config_name": name, "data_files": "data/train-*"} for name in ("25M_demo", "25M_full")]
    Hub.files["README.md"] = f"---\nconfigs: {json.dumps(configs)}\n---\n".encode()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "",
    }

    def ask(*questions, **changed):
        command = [sys.executable, "-W", "ignore", "-c", ASK, json.dumps(questions)]
        done = subprocess.run(
            command, env=environment | changed, capture_output=True, text=True, cwd=tmp_path, timeout=100
        )
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    demo = {"config": "25M_demo"}
    online = ask(
        ("org/pairs", demo | {"streaming": True}),
        ("org/pairs", demo | {"limit": 4}),
        ("org/pairs", demo),
        ("org/pairs", {}),
        ("org/pairs", {"config": "none"}),
        ("org/pairs", demo | {"split": "test"}),
        ("org/gated", {}),
        ("org/halfway", demo | {"streaming": True}),
        ("org/halfway", demo),
        ("org/none", {}),
    )
    columns = [["caption", "cui", "id", "image"], "r1", "caption 0", [24, 16]]
    assert online[:3] == [["IterableDataset", *columns, None], ["Dataset", *columns, 4], ["Dataset", *columns, 6]]
    assert online[3][0] == online[4][0] == "ValueError" and all("'25M_demo', '25M_full'" in o[1] for o in online[3:5])
    assert online[5][0] == "ValueError" and "['train']" in online[5][1]
    for answer in online[6:9]:
        assert answer[0] == "PermissionError", answer
        assert re.search(
            r"request access at https://huggingface.co/datasets/org/\w+, then run `hf auth login`", answer[1]
        )
    assert online[9][0] == "FileNotFoundError" and "no such hub data set" in online[9][1]
    offline = ask(("org/pairs", demo), ("org/gated", {}), HF_HUB_OFFLINE="1")
    assert offline[0] == online[2]  # from the local cache
    assert offline[1][0] == "ConnectionError" and "offline" in offline[1][1]
    assert all("\n" not in answer[1] for answer in online[3:] + offline[1:])
    server.shutdown()


# --- memory -------------------------------------------------------------------------------------------------------

PEAK = """
import sys, datasets
from medtune.data import load_pairs
rows = load_pairs(sys.argv[1], streaming=True, limit=5_000).cast_column("image", datasets.Image(decode=False))
count = sum(row["image"] is not None for row in rows)
print(count, next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) // 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_streaming_takes_no_more_memory_for_more_pairs(tmp_path, kind):
    peaks = []
    for rows in (200, 2_000):
        file = tmp_path / f"{rows}.{kind}"
        if kind == "parquet":  # 50 and 500 MB
            noise = {"bytes": np.random.default_rng(0).bytes(250_000), "path": None}
            table = pa.table({"image": [noise] * rows, "id": list(map(str, range(rows))), "caption": ["x"] * rows})
            pq.write_table(table, file, row_group_size=50, use_dictionary=False, compression="none")
        else:  # 12 and 120 MB
            (tmp_path / "a.jpg").write_bytes(jpeg())
            write_table(file, [{"image": "a.jpg", "caption": f"{i} " + "liver " * 10_000} for i in range(rows)])
        command = [sys.executable, "-c", PEAK, str(file)]
        count, peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        assert int(count) == rows
        peaks.append(int(peak))
    assert peaks[1] < peaks[0] + 60, f"peak memory in MB: {peaks}"


# --- one pair -----------------------------------------------------------------------------------------------------


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    image.save(buffer := io.BytesIO(), kind, **options)
    return buffer.getvalue()


def animation() -> Image.Image:
    frames = [Image.new("L", (8, 8), value) for value in (10, 200)]
    return Image.open(io.BytesIO(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])))


def turned() -> Image.Image:
    image = Image.new("L", (8, 4))
    image.putpixel((0, 0), 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees to the right
    return Image.open(io.BytesIO(encoded(image, "PNG", exif=exif)))


def sixteen_bit() -> Image.Image:
    return Image.open(io.BytesIO(encoded(Image.fromarray(np.array([[100, 2148], [4196, 100]], np.uint16)), "PNG")))


def see_through_palette() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putdata([0, 1])
    return Image.open(io.BytesIO(encoded(image, "PNG", transparency=0)))


@pytest.mark.parametrize(
    ("image", "pixels"),
    [
        (Image.new("RGB", (1, 1), (1, 2, 3)), [(1, 2, 3)]),
        (Image.new("L", (1, 1), 7), [(7, 7, 7)]),
        (Image.new("1", (1, 1), 1), [(255, 255, 255)]),
        (Image.new("RGBA", (1, 1), (200, 100, 50, 0)), [(0, 0, 0)]),  # transparent: the black background
        (Image.new("LA", (1, 1), (200, 255)), [(200, 200, 200)]),
        (see_through_palette(), [(0, 0, 0), (0, 255, 0)]),
        (Image.new("CMYK", (1, 1), (0, 255, 255, 0)), [(255, 0, 0)]),
        (sixteen_bit(), [(0, 0, 0), (128, 128, 128), (255, 255, 255), (0, 0, 0)]),
        (Image.fromarray(np.array([[np.nan, 0.5, 1.0]], np.float32)), [(0, 0, 0), (128, 128, 128), (255, 255, 255)]),
        (Image.new("I;16", (1, 1), 3000), [(0, 0, 0)]),  # flat: nothing to stretch
        (animation(), [(10, 10, 10)] * 64),  # the first frame
    ],
)
def test_to_rgb(image, pixels):
    rgb = to_rgb(image)
    assert rgb.mode == "RGB"
    assert [rgb.getpixel((x, y)) for y in range(rgb.height) for x in range(rgb.width)] == pixels


def test_to_rgb_turns_by_exif_once():
    rgb = to_rgb(turned())
    assert rgb.size == (4, 8) and rgb.getpixel((3, 0)) == (255, 255, 255)
    assert to_rgb(rgb).size == (4, 8)
    seen = animation()
    seen.seek(1)
    assert to_rgb(seen).getpixel((0, 0)) == (10, 10, 10)


def pair(**changed) -> dict:
    return {"id": "a-1", "caption": "A liver.", "image": {"bytes": jpeg(), "path": None}} | changed


BAD = {
    "id missing": (pair(id=None), "id: is empty"),
    "id of spaces": (pair(id="  "), "id: is empty"),
    "id climbs": (pair(id="../../etc/passwd"), "id: '../../etc/passwd' would leave a folder"),
    "id with a slash": (pair(id="a/b"), "id: 'a/b' would leave a folder"),
    "id with a backslash": (pair(id="a\\b"), "id: .* would leave a folder"),
    "id hidden": (pair(id=".a"), "id: '.a' would leave a folder"),
    "id of 300 characters": (pair(id="x" * 300), "id: has 300 characters"),
    "id with NUL": (pair(id="a\0b"), "id: 'a.*b' holds a control character"),
    "id with a surrogate": (pair(id="a\ud800"), "id: .* not valid Unicode"),
    "caption missing": (pair(caption=None), "caption: is empty"),
    "caption empty": (pair(caption=" \n"), "caption: is empty"),
    "caption with a surrogate": (pair(caption="lone \udfff"), "caption: holds characters that are not valid"),
    "caption of 50,000 words": (pair(caption="liver " * 50_000), "caption: has 50000 words, more than 2000"),
    "caption of 50,000 signs": (pair(caption="肝" * 50_000), "caption: has 50000 words"),
    "no picture": (pair(image=None), "image: .*there is no picture"),
    "no bytes": (pair(image={"bytes": b"", "path": None}), "image: has zero bytes"),
    "no file": (pair(image={"bytes": None, "path": "/nowhere/a.jpg"}), "image: .*No such file"),
    "not a picture": (pair(image=b"GIF89a, or so it says"), "image: cannot be decoded"),
    "cut JPEG": (pair(image=jpeg(size=(200, 200))[:-300]), "image: cannot be decoded .*truncated"),
    "cut PNG": (pair(image=encoded(Image.effect_noise((99, 99), 9), "PNG")[:-300]), "image: cannot be decoded"),
    "bomb": (pair(image=encoded(Image.new("1", (30_000, 5_000)), "PNG")), "image: 30000 x 5000 pixels, more than"),
    "greater bomb": (pair(image=encoded(Image.new("1", (30_000, 12_000)), "PNG")), "image: .*decompression bomb"),
    "loader's word": (pair(problem="t.jsonl:3: not JSON"), "t.jsonl:3: not JSON"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.filterwarnings("error")
def test_reject_reason(case):
    row, pattern = BAD[case]
    reason = reject_reason(row)
    assert re.match(pattern, reason) and "\n" not in reason


def test_what_is_unusual_but_good_is_not_rejected():
    odd = [Image.new("CMYK", (9, 9)), Image.new("I;16", (9, 9), 900), Image.new("RGBA", (9, 9)), Image.new("P", (9, 9))]
    kinds = ["JPEG", "PNG", "PNG", "GIF"]
    for image, kind in [*zip(odd, kinds, strict=True), (animation(), "GIF"), (turned(), "PNG")]:
        assert reject_reason(pair(image=encoded(image, kind))) is None
    assert reject_reason(pair(image=Image.new("L", (4, 4)))) is None
    assert reject_reason(pair(id="8031efe0-1b5c-11ef-8929-000066532cad", caption="肝脏。")) is None
    assert reject_reason(pair(caption="a b c"), max_words=2) == "caption: has 3 words, more than 2"
    assert "24 x 16" in reject_reason(pair(), max_pixels=100)


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(["JPEG", "PNG"]), share=st.floats(0, 0.97), size=st.integers(16, 90))
def test_a_picture_cut_anywhere_is_rejected(kind, share, size):
    whole = encoded(Image.effect_noise((size, size), 60).convert("RGB"), kind)
    assert reject_reason(pair(image=whole)) is None
    assert reject_reason(pair(image=whole[: int(len(whole) * share)])).startswith("image: ")


@given(st.binary(max_size=200), st.text(max_size=30), st.text(max_size=30))
def test_reject_reason_never_raises(image, name, caption):
    assert isinstance(reject_reason({"image": image, "id": name, "caption": caption}), str | None)


def test_picture_bytes(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"abc")
    path = str(tmp_path / "a.jpg")
    for cell in (b"abc", {"bytes": b"abc", "path": "elsewhere"}, {"bytes": None, "path": path}, path, Path(path)):
        assert picture_bytes(cell) == b"abc"
    assert picture_bytes({"bytes": b"", "path": None}) == b""
    with pytest.raises(ValueError, match="no picture"):
        picture_bytes({"bytes": None, "path": None})


def test_module_is_light():
    heavy = "datasets|torch|pandas|pyarrow|PIL|numpy|cv2|sklearn"
    code = f"import sys, re, medtune.data, medtune.audit; print([m for m in sys.modules if re.fullmatch({heavy!r}, m)])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
    assert set(data.SPLITS.values()) == {"train", "validation", "test"}
