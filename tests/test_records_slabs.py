"""Slabs become records of several pictures, all of a slab or none of it, which can be trained on."""

import json
import re

import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread
from shards import json_lines, rejected, tree
from tiny_models import tiny_twin
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling
from volume_files import values, write_nifti, write_series

from medtune import cli, training
from medtune.models import load_processor
from medtune.pairs import load_pairs, series_files
from medtune.plan import estimate
from medtune.records import (
    DIALECTS,
    RecordStream,
    check_folder,
    convert_pairs,
    index_shards,
    read_records,
)

CAPTIONS = ["The liver is on three of the slices.", "No lesion is seen.", "A lung, seen twice."]
QUESTION = "On how many of the slices does the liver show?"


@pytest.fixture
def table(tmp_path):
    """A table of two series of two patients and a NIfTI file of a third."""
    random = np.random.default_rng(0)
    arrays = random.integers(-900, 900, (3, 6, 40, 30), dtype=np.int16)
    write_series(tmp_path / "first", arrays[0])
    write_series(tmp_path / "second", arrays[1], PatientID="PID-9999")
    write_nifti(tmp_path / "third.nii.gz", arrays[2])
    records = []
    names = ["first", "second", "third.nii.gz"]
    for name, caption in zip(names, CAPTIONS, strict=True):
        records.append({"image": name, "caption": caption, "question": QUESTION})
    file = tmp_path / "captions.json"
    file.write_text(json.dumps(records))
    return file


def only_records(folder) -> list[dict]:
    return [record for name in sorted(folder.glob("*.jsonl")) for record in json_lines(name)]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_slab_is_one_record_with_its_pictures_in_order(table, tmp_path, dialect):
    pairs = load_pairs(table, slab=3, slab_mm=3, window=(0, 2000))
    out = tmp_path / "out"
    report = convert_pairs(pairs, out, dialect=dialect, split_by="none")
    assert report["records"] == {"train": 3} and report["pairs"] == 9
    for number, record in enumerate(json_lines(out / "train.jsonl")):
        expected = pairs[3 * number : 3 * number + 3]["image"]
        assert len(record["images"]) == 3
        for name, picture in zip(record["images"], expected, strict=True):
            assert (np.asarray(Image.open(out / name)) == np.asarray(picture)).all()
        assert record["slices"] == [1, 2, 3] or record["slices"] == [2, 3, 4]
        assert record["spacing"] == [3.0, 0.8, 0.8] and record["plane"] == "axial"
        text = json.dumps(record)
        assert QUESTION in text and CAPTIONS[number] in text
        # the caption is that of the slab, and is not said once for each picture
        assert CAPTIONS[number] + "\\n" not in text
    assert check_folder(out)["ok"]


def test_the_command_makes_slabs_in_three_colours_and_splits_by_patient(table, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--slab", "4", "--window", "lung+mediastinum+bone", "--split-by", "patient"]
    with pytest.raises(SystemExit) as end:
        cli.main(["convert", str(table), str(out), *options])
    assert not end.value.code, capsys.readouterr().err
    records = only_records(out)
    assert [len(record["images"]) for record in records] == [4, 4, 4]
    assert len({record["group"] for record in records}) == 3
    picture = np.asarray(Image.open(out / records[0]["images"][1]))
    assert not (picture == picture[..., :1]).all()
    written = "".join(file.read_text() for file in out.glob("*.json*"))
    assert not re.search(r"PID|Doe|first|second|third", written)


def test_the_command_names_its_own_options(table, tmp_path, capsys):
    for options, message in [
        (["--slab-mm", "3"], "--slab-mm 3 needs --slab N"),
        (["--slab", "0"], "--slab 0 is not 1 slice or more"),
        (["--slab", "2", "--pictures-per-sample", "2"], "--pictures-per-sample 2 does not go"),
        (["--slab", "2", "--window", "lung+bone"], "three joined by +"),
    ]:
        with pytest.raises(SystemExit) as end:
            cli.main(["convert", str(table), str(tmp_path / "out"), *options])
        assert end.value.code == 1
        [line] = capsys.readouterr().err.splitlines()[-1:]
        assert message in line


def test_an_audit_and_a_list_of_ids_know_slabs(table, tmp_path, capsys):
    splits = tmp_path / "splits.csv"
    for command in (["audit", str(table), "--slab", "2", "--write", str(splits)],):
        with pytest.raises(SystemExit) as end:
            cli.main(command)
        assert not end.value.code, capsys.readouterr().err
    assert len(splits.read_text().splitlines()) == 7
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as end:
        cli.main(["convert", str(table), str(out), "--slab", "2", "--splits", str(splits)])
    assert not end.value.code, capsys.readouterr().err
    assert [len(record["images"]) for record in only_records(out)] == [2, 2, 2]
    with pytest.raises(SystemExit) as end:
        cli.main(["ids", str(table), "--slab", "2"])
    assert not end.value.code
    assert capsys.readouterr().out.count("dicom-") == 4


def test_a_slab_of_which_a_picture_is_left_out_is_no_record(table, tmp_path):
    pairs = load_pairs(table, slab=3, window=(0, 2000))
    rows = [dict(row) for row in pairs.select_columns(["id", "caption"])]
    captions = [row["caption"] for row in rows]
    captions[4] = ""
    pairs = pairs.remove_columns("caption").add_column("caption", captions)
    out = tmp_path / "out"
    report = convert_pairs(pairs, out, split_by="none")
    assert report["records"] == {"train": 2} and report["pairs"] == 6
    assert report["rejected"] == 3 and report["reasons"]["slab"] == 2
    said = rejected(out)
    assert said[rows[3]["id"]] == "slab: 1 of its 3 pictures were left out"
    assert len(list((out / "images").iterdir())) == 6


def test_a_bad_series_is_listed_and_the_others_are_converted(table, tmp_path):
    files = sorted((tmp_path / "second").iterdir())
    files[2].unlink()
    (tmp_path / "third.nii.gz").write_bytes(b"no volume")
    out = tmp_path / "out"
    report = convert_pairs(load_pairs(table, slab=3, strict=False), out, split_by="none")
    assert report["records"] == {"train": 1} and report["rejected"] == 2
    reasons = " ".join(rejected(out).values())
    assert "6 mm apart, others 3 mm: 1 missing" in reasons
    assert "NIfTI volume is damaged" in reasons
    assert "second" not in reasons and "third" not in reasons


def test_the_result_does_not_depend_on_a_restart(tmp_path):
    """As many slabs as make several blocks of rows, of which none ends with a slab."""
    write_nifti(tmp_path / "v.nii.gz", values(30, 4, 4))
    records = [
        {"image": "v.nii.gz", "id": f"s{number}", "caption": "x", "middle_slice": number}
        for number in range(30)
    ]
    (tmp_path / "t.json").write_text(json.dumps(records))
    pairs = load_pairs(tmp_path / "t.json", slab=5, slab_mm=3, window=(0, 2000))
    convert_pairs(pairs, tmp_path / "whole", split_by="none")
    parts = tmp_path / "parts"

    class Stop(Exception):
        pass

    from medtune.records import write

    kept = write.Writer.note
    calls = []

    def note(self, rows, waiting):
        kept(self, rows, waiting)
        calls.append(waiting)
        if len(calls) == 2:
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write.Writer, "note", note)
        with pytest.raises(Stop):
            convert_pairs(pairs, parts, split_by="none")
    assert calls[0] or calls[1], "a slab waits for its other pictures"
    convert_pairs(pairs, parts, split_by="none")
    assert tree(parts) == tree(tmp_path / "whole")


def test_a_stream_of_shards_does_not_tear_a_slab_apart(table, tmp_path):
    pairs = load_pairs(table, slab=3, window=(0, 2000))
    pairs.to_parquet(tmp_path / "pairs.parquet")
    with pytest.raises(ValueError, match="shards hold slabs"):
        RecordStream(index_shards(tmp_path / "pairs.parquet"), "train")
    again = convert_pairs(tmp_path / "pairs.parquet", tmp_path / "out", split_by="none")
    assert again["records"] == {"train": 3}


@pytest.mark.parametrize("family", ["tiny", "gemma-3"])
def test_the_check_and_the_collator_take_slabs(table, tmp_path, tiny_vlm, family):
    processor = load_processor(str(tiny_vlm if family == "tiny" else tiny_twin(family)))
    out = tmp_path / "out"
    convert_pairs(load_pairs(table, slab=3, window=(0, 2000)), out, split_by="none")
    report = check_folder(out, processor=processor)
    assert report["ok"], report["errors"]
    rows = read_records(out)
    collate = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    batch = collate([dict(row) for row in rows])
    assert training.check_image_tokens(batch, processor)["pictures"] == 9
    assert training.check_labels(batch, processor, CAPTIONS)["rows"] == 3
    assert report["tokens"]["max"] == int(batch["attention_mask"].sum(axis=1).max())
    # a length that one picture would fit into, and three do not
    one = convert_pairs(load_pairs(table, slab=1, window=(0, 2000)), tmp_path / "one")
    assert one["pairs"] == 3
    length = check_folder(tmp_path / "one", processor=processor)["tokens"]["max"]
    cut = check_folder(out, processor=processor, max_length=length)
    assert not cut["ok"] and len(cut["cut"]) == 3


def test_the_planner_counts_the_tokens_of_a_slab_as_the_processor_does(tiny_vlm):
    processor = load_processor(str(tiny_vlm))

    def tokens(pictures: int) -> tuple[int, int]:
        content = [{"type": "image"}] * pictures + [{"type": "text", "text": QUESTION}]
        text = processor.apply_chat_template([{"role": "user", "content": content}])
        shown = [Image.new("RGB", (64, 64))] * pictures
        ids = processor(images=shown, text=[text])["input_ids"][0]
        return len(ids), sum(token == processor.image_token_id for token in ids)

    name = "Qwen/Qwen3-VL-2B-Instruct"
    for pictures in (2, 5):
        more, of_pictures = tokens(pictures)
        one, of_one = tokens(1)
        beside = (more - of_pictures) - (one - of_one)
        found = estimate(name, pictures_per_sample=pictures, image_size=512)
        alone = estimate(name, image_size=512)
        assert found["image_tokens"] == pictures * alone["image_tokens"]
        assert found["tokens"] - alone["tokens"] - (pictures - 1) * 256 == beside > 0
        assert found["activations"] > alone["activations"]
    with pytest.raises(ValueError, match="pictures_per_sample=0"):
        estimate(name, pictures_per_sample=0)


def test_the_command_plans_a_slab(capsys):
    rows = []
    for pictures in ("1", "5"):
        with pytest.raises(SystemExit) as end:
            cli.main(["plan", "google/gemma-3-4b-it", "--pictures-per-sample", pictures])
        assert not end.value.code
        lines = capsys.readouterr().out.splitlines()
        rows.append(dict(line.split()[:2] for line in lines if len(line.split()) > 1))
    assert int(rows[1]["image_tokens"]) == 5 * int(rows[0]["image_tokens"])


def test_the_real_series_becomes_a_record(real, tmp_path):
    series = real / "second_person" / "dicom"
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "ct").symlink_to(series)
    table = tmp_path / "t.csv"
    table.write_text(f"image,caption\n{series},The liver and the spleen.\n")
    out = tmp_path / "out"
    pairs = load_pairs(table, slab=5, slab_mm=8, window="abdomen", image_root=series)
    report = convert_pairs(pairs, out, split_by="none")
    [record] = json_lines(out / "train.jsonl")
    assert report["records"] == {"train": 1} and len(record["images"]) == 5
    assert np.diff(record["slices"]).tolist() == [4] * 4
    names = " ".join(path.name for path in series.iterdir()) + str(out)
    patient = str(dcmread(next(series.iterdir())).PatientID)
    text = (out / "train.jsonl").read_text() + (out / "convert.json").read_text()
    assert not any(name in text for name in names.split())
    assert not patient or f'"{patient}"' not in text


@pytest.fixture
def real_scans(real, tmp_path):
    """The real series, a NIfTI file written from it, and the series without one slice; a table."""
    [files] = series_files(real / "second_person" / "dicom")
    heads = [dcmread(file) for file in files]
    hu = np.stack([ds.pixel_array * ds.RescaleSlope + ds.RescaleIntercept for ds in heads])
    write_nifti(
        tmp_path / "scan.nii.gz", hu.astype(np.int16), stored="RAS", size=(0.9765625, 0.9765625, 2)
    )
    for name, left_out in (("whole", None), ("part", 7)):
        (tmp_path / name).mkdir()
        for number, file in enumerate(files):
            if number != left_out:
                (tmp_path / name / f"{number}.dcm").write_bytes(file.read_bytes())
    table = tmp_path / "scans.csv"
    lines = [f"{name},{QUESTION},The liver." for name in ("whole", "scan.nii.gz", "part")]
    table.write_text("\n".join(["image,question,caption", *lines]) + "\n")
    return table


def test_real_series_go_from_the_command_to_the_planner_and_the_check(
    real_scans, tmp_path, tiny_vlm, capsys
):
    out = tmp_path / "out"
    options = ["--slab", "4", "--slab-mm", "6", "--window", "abdomen", "--split-by", "none"]
    # a ninth of the rows is more than may be lost without a word
    for allowed, code in ((["--most-rejected", "0.2"], 0), ([], 1)):
        with pytest.raises(SystemExit) as end:
            cli.main(["convert", str(real_scans), str(out), *options, *allowed])
        said = capsys.readouterr()
        assert (end.value.code or 0) == code, said.err
    assert "1 of 9 rows were rejected" in said.err
    # the series with a gap is no record, and is not left out in silence
    [reason] = rejected(out).values()
    assert "slices 7 and 8 of 19 lie 4 mm apart, others 2 mm: 1 missing" in reason

    processor = load_processor(str(tiny_vlm))
    rows = read_records(out)
    assert [len(row["images"]) for row in rows] == [4, 4]
    for one, other in zip(rows[0]["images"], rows[1]["images"], strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other)), "DICOM and NIfTI are one scan"
    report = check_folder(out, processor=processor)
    assert report["ok"], report["errors"]
    collate = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    batch = collate([dict(row) for row in rows])
    found = training.check_image_tokens(batch, processor)
    assert found["pictures"] == 8
    training.check_labels(batch, processor, ["The liver."] * 2)

    # the planner counts what the published model's processor makes of these pictures
    side, _ = rows[0]["images"][0].size
    published = load_processor(str(tiny_twin("qwen3-vl")), max_pixels=side**2)
    text = published.apply_chat_template(rows[0]["prompt"])
    ids = published(images=[rows[0]["images"]], text=[text])["input_ids"][0]
    planned = estimate("Qwen/Qwen3-VL-2B-Instruct", pictures_per_sample=4, image_size=side)
    assert planned["image_tokens"] == sum(token == published.image_token_id for token in ids)
