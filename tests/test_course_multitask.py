"""Recipe R3 under its own name, on pairs in the form of MedTrinity: a picture with a drawn box, an id
and a caption, and nothing else. Its notebooks run whole, at the size of a rehearsal.
"""

import json
import shutil
from pathlib import Path

import datasets
import pytest
import yaml
from course import REPO, check_outputs, medtune
from drawn_pictures import drawn_rows, write_drawn_pairs

from medtune import boxes
from medtune.records import read_records

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


@pytest.fixture(scope="module")
def pairs(sample_path, tmp_path_factory) -> Path:
    """Some 90 pairs; one picture has no box, and one has more than one."""
    rows = list(drawn_rows(sample_path, every=38).select_columns(["image", "id", "caption"]))
    first, second = rows[:2]
    plain = boxes.erase_box(first["image"], boxes.find_box(first["image"]))
    rows.append(first | {"id": "no-box", "image": plain})
    crowded = second["image"]
    for place in ((0.05, 0.05, 0.3, 0.3), (0.65, 0.7, 0.95, 0.95)):
        crowded = boxes.draw_box(crowded, place)
    rows.append(second | {"id": "boxes", "image": crowded})
    written = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    return write_drawn_pairs(written, tmp_path_factory.mktemp("pairs") / "pairs.parquet")


def rehearse(name: str, pairs: Path, root: Path, notebooks: list[str]) -> Path:
    """Rehearse a profile on these pairs in a copy of the clone; return the results of 07."""
    shutil.copytree(REPO / "notebooks", root / "notebooks", ignore=shutil.ignore_patterns(".*"))
    params = yaml.safe_load((REPO / "papermill_runs" / name / "params.yaml").read_text("utf-8"))
    assert set(notebooks) <= set(params["notebooks"])
    params["notebooks"] = notebooks
    params["shared"]["data"] = str(pairs)
    folder = root / "papermill_runs" / name
    folder.mkdir(parents=True)
    (folder / "params.yaml").write_text(yaml.safe_dump(params, allow_unicode=True), "utf-8")
    (root / "papermill_runs" / "reference").symlink_to(REPO / "papermill_runs" / "reference")
    (root / "data").symlink_to(REPO / "data")
    table = medtune("rehearse", name, "--scale", "tiny", "--steps", "2", "--root", root)
    assert "on the run's own data" in table
    out = root / "papermill_runs" / f"{name}-rehearsal" / "out"
    check_outputs(out, notebooks)
    return out / "07_locate_verify_diagnose"


def check_heads(out: Path, pairs: Path) -> dict:
    """Boxes, words, heads and match are there, and what was left out is named."""
    summary = json.loads((out / "summary.json").read_text("utf-8"))
    regions = summary["regions"]
    assert regions["rows"] == len(datasets.Dataset.from_parquet(str(pairs)))
    assert regions["kept"] + sum(regions["dropped"].values()) == regions["rows"]
    left_out = json.loads((out / "left_out.json").read_text("utf-8"))
    reasons = {entry["id"]: entry["reason"] for entry in left_out}
    assert reasons["no-box"] == "no drawn box"
    assert "several drawn boxes" in reasons["boxes"]

    train = read_records(out / "records", "train")
    assert {"roi", "structure", "target_diag", "decoys"} <= set(train.column_names)
    for row in train.select(range(5)):
        assert boxes.find_box(row["images"][0]) is None, "no line is left to be learned"
        assert len(row["decoys"]) == 3
    assert 0 <= summary["line_probe_auroc"]["erased among decoys"] <= 1

    assert summary["locate"] == "region"
    assert summary["iou"]["model"] >= 0
    assert 0 <= summary["match"]["auroc"] <= 1
    assert (out / "model" / "multitask.safetensors").is_file()
    assert (out / "result.png").is_file()
    log = json.loads((out / "log.json").read_text("utf-8"))
    trained = [entry for entry in log if "match_loss" in entry]
    assert trained
    assert all("box_loss" in entry for entry in trained)
    return summary


def test_the_profile_gives_boxes_heads_and_match(pairs, tmp_path):
    name = "qwen3-vl-2b-multitask"
    notebooks = ["01_explore_data", "02_convert_data", "07_locate_verify_diagnose"]
    out = rehearse(name, pairs, tmp_path, notebooks)
    summary = check_heads(out, pairs)
    assert summary["num_processes"] == 1
    asked = read_records(out.parent / "02_convert_data" / "data", "train")[0]["prompt"]
    text = asked[-1]["content"][-1]["text"]
    assert text.endswith("\nFocus on the region of interest."), "the published line break"


def test_the_profile_of_two_cards_trains_with_deepspeed(pairs, tmp_path):
    """Without cards the two ranks run on the CPU."""
    notebooks = ["02_convert_data", "07_locate_verify_diagnose"]
    out = rehearse("qwen3-vl-2b-multitask-2gpu", pairs, tmp_path, notebooks)
    summary = check_heads(out, pairs)
    assert (summary["num_processes"], summary["zero"]) == (2, "zero2")
    assert (out / "launched" / "model" / "multitask.safetensors").is_file()
    settings = yaml.safe_load((out / "train.yaml").read_text("utf-8"))
    assert settings["deepspeed"] == "zero2"
    heads = json.loads((out / "heads.json").read_text("utf-8"))
    assert heads["collator"]["diagnosis_weight"] == 2.0
    question = heads["collator"]["question"]
    assert question.endswith("\nFocus on the region of interest.")
