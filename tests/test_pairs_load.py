"""Loading pairs: parquet, splits, the sample set, DICOM files, and sources that are not there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydicom
import pytest
from pair_sources import AS_BYTES, folder_of_pictures, jpeg, refused, write_parquet, write_table
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from medtune.pairs import load_pairs, picture_bytes, reject_reason, split_of
from medtune.records import convert_pairs

# --- parquet --------------------------------------------------------------------------------------


def test_parquet_pictures_stay_the_bytes_of_the_source(tmp_path):
    rows = load_pairs(write_parquet(tmp_path / "a.parquet"))
    assert rows.column_names == ["image", "id", "caption"]
    kept = [row["image"]["bytes"] for row in rows.cast_column("image", AS_BYTES)]
    assert kept == [jpeg(number) for number in range(3)]
    assert rows[1]["image"].size == (24, 16)


@pytest.mark.parametrize(
    "options", [{}, {"limit": 4}, {"streaming": True}, {"streaming": True, "limit": 4}]
)
def test_folder_of_shards_in_order(tmp_path, options):
    write_parquet(tmp_path / "train-00000.parquet", 3)
    write_parquet(tmp_path / "train-00001.parquet", 3, start=3)
    rows = load_pairs(tmp_path, **options)
    kind = datasets.IterableDataset if options.get("streaming") else datasets.Dataset
    assert isinstance(rows, kind)
    expected = 4 if "limit" in options else 6
    assert [row["id"] for row in rows] == [f"id-{number}" for number in range(expected)]


@pytest.mark.parametrize("streaming", [False, True])
def test_other_names_and_types(tmp_path, streaming):
    file = write_parquet(
        tmp_path / "a.parquet",
        id=None,
        caption=None,
        image_id=[7, 8, 9],
        report=["x", "y", "z"],
    )
    row = next(iter(load_pairs(file, streaming=streaming)))
    assert (row["id"], row["caption"]) == ("7", "x")
    exchanged = load_pairs(file, columns={"caption": "image_id", "id": "report"})
    assert exchanged[0]["caption"] == "7"


@pytest.mark.parametrize("options", [{}, {"limit": 9}, {"streaming": True}])
def test_shards_with_different_columns(tmp_path, options):
    write_parquet(tmp_path / "a.parquet", 1, group=["g"], old=["w"], older=["y"])
    write_parquet(tmp_path / "b.parquet", 1, start=1, report=["r"], old=["x"], older=["y"])
    rows = list(load_pairs(tmp_path, columns={"id": "old", "caption": "older"}, **options))
    assert [(row["id"], row["caption"]) for row in rows] == [("w", "y"), ("x", "y")]
    assert [row["group"] for row in rows] == ["g", None]
    assert [row["report"] for row in rows] == [None, "r"]


def test_a_picture_that_only_has_a_path_is_not_looked_up(tmp_path):
    """A shard from elsewhere must not name files of this machine."""
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(jpeg())
    cells = [{"bytes": None, "path": str(secret)}, {"bytes": jpeg(), "path": "/etc/hostname"}]
    file = write_parquet(tmp_path / "a.parquet", 2, image=cells)
    rows = load_pairs(file).cast_column("image", AS_BYTES)
    assert rows["image"] == [None, {"bytes": jpeg(), "path": None}]
    assert "no picture" in reject_reason(rows[0])


def test_a_changed_file_is_not_served_from_the_cache(tmp_path):
    file = write_parquet(tmp_path / "a.parquet")
    load_pairs(file)
    write_parquet(file, start=50)
    assert load_pairs(file)["id"][0] == "id-50"


def test_a_cut_parquet_file(tmp_path):
    whole = write_parquet(tmp_path / "whole.parquet").read_bytes()
    folder = tmp_path / "cut"
    folder.mkdir()
    cut = folder / "cut.parquet"
    cut.write_bytes(whole[: len(whole) // 2])
    write_parquet(folder / "good.parquet")
    refused(ValueError, "cut.parquet is cut off", cut)
    refused(ValueError, "cut.parquet is cut off", folder)
    cut.write_bytes(b"")
    refused(ValueError, "cut.parquet is cut off", cut)


def test_a_parquet_file_with_a_damaged_middle(tmp_path):
    whole = write_parquet(tmp_path / "whole.parquet").read_bytes()
    spoilt = tmp_path / "spoilt.parquet"
    middle = len(whole) // 3
    spoilt.write_bytes(whole[:middle] + os.urandom(200) + whole[middle + 200 :])
    # the footer is whole: damage is noticed when rows are read, if it hits what makes pages
    # readable
    try:
        load_pairs(spoilt)
    except ValueError as error:
        assert "\n" not in str(error)


def test_parquet_without_what_pairs_need(tmp_path):
    no_caption = write_parquet(tmp_path / "b.parquet", caption=None)
    refused(ValueError, "no column caption, only image, id", no_caption)
    no_picture = write_parquet(tmp_path / "c.parquet", image=None, id=None)
    refused(ValueError, "no column image, only caption", no_picture)
    good = write_parquet(tmp_path / "whole.parquet")
    refused(ValueError, "no column nothing", good, columns={"caption": "nothing"})
    no_rows = write_parquet(tmp_path / "d.parquet", 0, image=pa.array([], pa.binary()))
    refused(ValueError, "holds no pairs", no_rows)


# --- splits ---------------------------------------------------------------------------------------


def test_split_by_column(tmp_path):
    splits = ["train", "test", "test"]
    write_parquet(tmp_path / "a.parquet", split=splits, group=["g1", "g2", "g2"])
    assert load_pairs(tmp_path, split="test")["id"] == ["id-1", "id-2"]
    streamed = load_pairs(tmp_path, split="test", streaming=True)
    assert [row["group"] for row in streamed] == ["g2", "g2"]
    refused(ValueError, "no pairs of split validation", tmp_path, split="validation")


def test_split_by_file_name(tmp_path):
    write_parquet(tmp_path / "train-00000-of-00001.parquet", 2)
    write_parquet(tmp_path / "test-00000-of-00001.parquet", 1, start=5)
    assert load_pairs(tmp_path, split="test")["id"] == ["id-5"]
    refused(ValueError, "no column split", tmp_path, split="validation")


def test_names_of_files_that_tell_a_split():
    named = {
        "train-00000.parquet": "train",
        "validation.jsonl": "validation",
        "valid.csv": "validation",
        "val_2.json": "validation",
        "Dev.csv": "validation",
        "test.jsonl": "test",
        "testing.jsonl": None,
        "captions.csv": None,
    }
    assert {name: split_of(Path(name)) for name in named} == named


def write_three_splits(folder: Path) -> None:
    for split, name in zip(("train", "validation", "test"), "abc", strict=True):
        record = {
            "id": f"id-{name}",
            "prompt": [{"role": "user", "content": "Q"}],
            "completion": [{"role": "assistant", "content": f"caption {name}"}],
            "images": [f"images/{name}.jpg"],
            "roi": [0.1, 0.2, 0.3, 0.4],
        }
        write_table(folder / f"{split}.jsonl", [record])


def test_converted_folder_with_its_splits(tmp_path):
    folder = folder_of_pictures(tmp_path)
    write_three_splits(folder)
    (folder / "dataset_info.json").write_text("{}")
    (folder / "rejected.jsonl").write_text('{"reason": "x"}\n')
    rows = load_pairs(folder)
    splits = dict(zip(rows["id"], rows["split"], strict=True))
    assert splits == {"id-a": "train", "id-b": "validation", "id-c": "test"}
    assert rows[0]["roi"] == [0.1, 0.2, 0.3, 0.4]
    assert load_pairs(folder, split="test")["caption"] == ["caption c"]
    assert load_pairs(folder, split="dev")["id"] == ["id-b"]  # a common word for validation
    refused(ValueError, "no pairs of split holdout", folder, split="holdout")


def test_a_stream_tells_the_splits_too(tmp_path):
    """It reads one table at a time, and so may each worker of a loader."""
    folder = folder_of_pictures(tmp_path)
    write_three_splits(folder)
    splits = {row["id"]: row["split"] for row in load_pairs(folder, streaming=True)}
    assert splits == {"id-a": "train", "id-b": "validation", "id-c": "test"}


@pytest.mark.parametrize("dialect", ["prompt-completion", "messages", "sharegpt"])
def test_what_convert_writes_is_read_back(tmp_path, dialect):
    splits = ["train", "train", "validation", "test"]
    source = load_pairs(write_parquet(tmp_path / "a.parquet", 4, split=splits))
    convert_pairs(source, tmp_path / "out", dialect=dialect, workers=1)
    back = load_pairs(tmp_path / "out")
    for column in ("id", "caption", "split"):
        assert sorted(back[column]) == sorted(source[column])
    kept = {}
    for row in back.cast_column("image", AS_BYTES):
        kept[row["id"]] = picture_bytes(row["image"])
    assert kept == {f"id-{number}": jpeg(number) for number in range(4)}


# --- the sample set and real pictures -------------------------------------------------------------


def test_sample(sample_path, monkeypatch, tmp_path):
    monkeypatch.setenv("MEDTUNE_SAMPLE", str(sample_path))
    test = load_pairs("sample", split="test")
    assert set(test["split"]) == {"test"}
    columns = {"image", "id", "caption", "caption_zh", "group", "roi", "has_box", "modality"}
    assert columns | {"fields"} <= set(test.column_names)
    assert test[0]["image"].size == (512, 512)
    monkeypatch.delenv("MEDTUNE_SAMPLE")
    assert len(load_pairs("sample", limit=2)) == 2  # found above this file, wherever one stands
    monkeypatch.setenv("MEDTUNE_SAMPLE", str(tmp_path / "none.parquet"))
    refused(FileNotFoundError, "make sample", "sample")


def test_real_x_rays(real):
    rows = load_pairs(real / "cxr.parquet")
    assert len(rows) == 60
    reasons = [reject_reason(row) for row in rows.cast_column("image", AS_BYTES)]
    assert reasons == [None] * 60


# --- DICOM ----------------------------------------------------------------------------------------


def write_dicom(path: Path, patient: str, number: int = 1, frames: int = 1) -> Path:
    """Write a CT of 12 x 16 pixels whose tags name a patient."""
    file = Dataset()
    file.file_meta = FileMetaDataset()
    file.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file.file_meta.MediaStorageSOPClassUID = CTImageStorage
    file.SOPClassUID = CTImageStorage
    file.SOPInstanceUID = generate_uid(entropy_srcs=[patient, str(number)])
    file.SeriesInstanceUID = generate_uid(entropy_srcs=[patient])
    file.StudyInstanceUID = file.SeriesInstanceUID
    file.PatientName = f"{patient}^Secret"
    file.PatientID = f"ID-{patient}"
    file.PatientBirthDate = "19630101"
    file.Modality = "CT"
    file.InstanceNumber = number
    file.PhotometricInterpretation = "MONOCHROME2"
    file.Rows = 16
    file.Columns = 12
    file.SamplesPerPixel = 1
    file.BitsAllocated = 16
    file.BitsStored = 12
    file.HighBit = 11
    file.PixelRepresentation = 0
    file.RescaleIntercept = -1024
    file.RescaleSlope = 1
    file.WindowCenter = 40
    file.WindowWidth = 400
    if frames > 1:
        file.NumberOfFrames = frames
    file.PixelData = (np.arange(frames * 192, dtype=np.uint16) * 7 + number).tobytes()
    file.save_as(path, enforce_file_format=True)
    return path


@pytest.fixture
def scans(tmp_path) -> Path:
    """Two slices of each of two patients."""
    for patient in ("Doe", "Roe"):
        for number in (1, 2):
            write_dicom(tmp_path / f"{patient}{number}.dcm", patient, number)
    return tmp_path


def test_dicom_folder(scans):
    refused(ValueError, "4 pictures and no table", scans)
    rows = load_pairs(scans, allow_empty_captions=True)
    doe, same, roe, too = rows["group"]
    assert doe == same != roe == too
    assert load_pairs(scans, allow_empty_captions=True)["group"] == rows["group"]
    assert len(set(rows["id"])) == 4
    assert [row["image"].mode for row in rows] == ["RGB"] * 4
    assert [row["image"].size for row in rows] == [(12, 16)] * 4
    assert rows["modality"] == ["CT"] * 4
    told = json.dumps(list(rows.remove_columns("image")))
    assert not re.search("Doe|Roe|Secret|1963", told)


def test_a_salt_makes_the_groups_agree_between_calls(scans):
    def groups(salt: str) -> list[str]:
        return load_pairs(scans, allow_empty_captions=True, salt=salt)["group"][:]

    first = groups("one")
    assert first == groups("one")
    assert first != groups("two")
    assert len(set(first)) == 2


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
    assert len(set(rows["group"])) == 3
    assert rows["group"][4] == rows["group"][5]
    streamed = list(load_pairs(scans, streaming=True))
    assert [row["id"] for row in streamed] == rows["id"]
    assert [row["group"] for row in streamed] == rows["group"]


def test_dicom_without_pixels(scans):
    file = pydicom.dcmread(scans / "Doe1.dcm")
    del file.PixelData
    file.save_as(scans / "Doe1.dcm")
    message = refused(ValueError, "Doe1.dcm", scans, allow_empty_captions=True)
    assert "pixel" in message.lower()
    rows = load_pairs(scans, allow_empty_captions=True, strict=False)
    assert [bool(problem) for problem in rows["problem"]] == [True, False, False, False]


def test_real_dicom(real):
    rows = load_pairs(real / "dicom", allow_empty_captions=True)
    assert len(rows) >= 7
    assert {row["image"].mode for row in rows} == {"RGB"}
    brain = load_pairs(real / "dicom" / "mr_brain.dcm", allow_empty_captions=True)
    assert brain["modality"] == ["MR"]


# --- sources that are not there -------------------------------------------------------------------


@pytest.mark.parametrize(
    "source", ["missing.parquet", "data/missing.parquet", "./a/b", "sampel", "a/b.csv", "x.dcm"]
)
def test_no_such_source(source):
    refused(FileNotFoundError, "no such file or folder", source)


def test_no_such_folder_and_no_hub(tmp_path):
    refused(FileNotFoundError, "no such file or folder", tmp_path / "none")
    refused(ConnectionError, "no path some/set here, and no hub in reach", "some/set")


# --- memory ---------------------------------------------------------------------------------------

PEAK = """
import sys, datasets
from medtune.pairs import load_pairs

rows = load_pairs(sys.argv[1], streaming=True, limit=5_000)
rows = rows.cast_column("image", datasets.Image(decode=False))
count = sum(row["image"] is not None for row in rows)
for line in open("/proc/self/status"):
    if line.startswith("VmHWM"):  # the most memory that the process has held, in KB
        print(count, int(line.split()[1]) // 1024)
"""


def write_large_parquet(file: Path, rows: int) -> None:
    """A quarter of a megabyte a row."""
    noise = {"bytes": np.random.default_rng(0).bytes(250_000), "path": None}
    ids = [str(number) for number in range(rows)]
    table = pa.table({"image": [noise] * rows, "id": ids, "caption": ["x"] * rows})
    pq.write_table(table, file, row_group_size=50, use_dictionary=False, compression="none")


def write_large_table(file: Path, rows: int) -> None:
    """60 KB a row."""
    (file.parent / "a.jpg").write_bytes(jpeg())
    words = "liver " * 10_000
    records = [{"image": "a.jpg", "caption": f"{number} {words}"} for number in range(rows)]
    write_table(file, records)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_streaming_takes_no_more_memory_for_more_pairs(tmp_path, kind):
    write = write_large_parquet if kind == "parquet" else write_large_table
    peaks = []
    for rows in (200, 2_000):
        file = tmp_path / f"{rows}.{kind}"
        write(file, rows)
        command = [sys.executable, "-c", PEAK, str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        count, peak = done.stdout.split()
        assert int(count) == rows
        peaks.append(int(peak))
    assert peaks[1] < peaks[0] + 60, f"peak memory in MB: {peaks}"
