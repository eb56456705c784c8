"""Twenty-four pairs of one's own, in the four ways that people keep them, go through the core.

Nothing is learned from so few: what counts is that every notebook of the core runs to its end, and
that what comes out are the pictures and captions that went in.
"""

import json
from pathlib import Path

import course
import numpy as np
import pandas as pd
import pytest
from own_data import own_pairs, write_slice
from pydicom.uid import generate_uid

from medtune.pairs import picture_bytes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

CORE = course.CORE
SHORT = {
    "03.max_steps": 4,
    "03.eval_steps": 4,
    "03.save_steps": 4,
    "03.eval_samples": 2,
    "max_new_tokens": 12,
    "06.samples": 2,
    "06.merge_onto_4bit": False,
}


def folder_with_a_table(folder: Path, own: pd.DataFrame) -> dict:
    """PNG files, and a table beside them under names that are known."""
    names = []
    for number, picture in enumerate(own["picture"]):
        names.append(f"{number}.png")
        picture.save(folder / names[-1])
    table = own.rename(columns={"impression": "Report"}).assign(File_Name=names)
    table.drop(columns="picture").to_csv(folder / "captions.csv", index=False)
    return {"data": folder}


def a_table_elsewhere(folder: Path, own: pd.DataFrame) -> dict:
    """PNG files in one folder, a table in another one under names that nobody can know."""
    (folder / "pictures").mkdir()
    (folder / "lists").mkdir()
    names = []
    for number, picture in enumerate(own["picture"]):
        names.append(f"{number}.png")
        picture.save(folder / "pictures" / names[-1])
    table = own.assign(scan=names).drop(columns="picture")
    table.to_csv(folder / "lists" / "export.csv", index=False, encoding="latin-1", sep=";")
    columns = {"image": "scan", "caption": "impression", "group": "patient_id"}
    return {
        "data": folder / "pictures",
        "captions": folder / "lists" / "export.csv",
        "encoding": "latin-1",
        "columns": json.dumps(columns),
    }


def parquet_with_paths(folder: Path, own: pd.DataFrame) -> dict:
    """A parquet file that names its pictures."""
    names = []
    for number, picture in enumerate(own["picture"]):
        names.append(f"{number}.png")
        picture.save(folder / names[-1])
    table = own.rename(columns={"impression": "caption", "patient_id": "group"})
    table.assign(image=names).drop(columns="picture").to_parquet(folder / "pairs.parquet")
    return {"data": folder / "pairs.parquet"}


def dicom_with_a_table(folder: Path, own: pd.DataFrame) -> dict:
    """CT slices named by their UID, without an ending, and a table that names them."""
    names = []
    for number, row in own.iterrows():
        grey = np.asarray(row["picture"].convert("L"))
        names.append(generate_uid(entropy_srcs=[str(number)]))
        write_slice(folder / names[-1], grey, str(row["patient_id"]), number)
    table = own.assign(image=names).drop(columns=["picture", "patient_id"])
    table.to_csv(folder / "reports.csv", index=False)
    return {"data": folder, "columns": '{"caption": "impression"}', "window": "abdomen"}


LAYOUTS = [folder_with_a_table, a_table_elsewhere, parquet_with_paths, dicom_with_a_table]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_goes_through_the_core(layout, sample_path, tmp_path):
    own = own_pairs(sample_path)
    source = tmp_path / "own"
    source.mkdir()
    options = layout(source, own)
    out = course.run_chain(tmp_path / "clone", CORE, options | SHORT, "own")
    course.check_outputs(out, CORE)

    converted = json.loads((out / "02_convert_data" / "summary.json").read_text("utf-8"))
    results = converted["results"]
    assert results["pairs"] == 24 and results["rejected"] == 0
    assert results["groups"] <= 6, "patients are known"
    records = []
    for split in ("train", "validation", "test"):
        lines = (out / "02_convert_data" / "data" / f"{split}.jsonl").read_text("utf-8")
        records += [json.loads(line) for line in lines.split("\n") if line]
    said = {record["completion"][0]["content"][0]["text"] for record in records}
    assert said == set(own["impression"])
    written = "".join(json.dumps(record) for record in records)
    assert "MRN" not in written or layout is parquet_with_paths, "a pseudonym stands for a patient"
    picture = out / "02_convert_data" / "data" / records[0]["images"][0]
    assert picture_bytes(picture), "the picture is there"
