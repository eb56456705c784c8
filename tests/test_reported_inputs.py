"""Inputs that people reported problems with, rebuilt small beside the clone: each gives what its
table of cases expects.

They are built where they are found and belong to nobody here; our own tests of each kind stand with
the functions.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from medtune import cli, records
from medtune.chat import read_upload, save_feedback
from medtune.pairs import load_pairs, read_frames, series_files

REPO = Path(__file__).parents[1]
CASES = REPO.parent / "shared" / "cases"
TINY = REPO / "data" / "tiny-vlm"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not CASES.is_dir(), reason="no reported inputs beside this clone"),
]


@pytest.fixture
def case(tmp_path, monkeypatch):
    """Build the input of a case, and stand in its folder."""
    monkeypatch.setenv("BASE", str(TINY))
    monkeypatch.setenv("REPO", str(REPO))

    def build(name: str) -> Path:
        (folder,) = CASES.glob(f"{name}_*")
        work = tmp_path / "case" / "work"
        work.mkdir(parents=True)
        # some of them read their own make.py once more
        (work.parent / "make.py").write_bytes((folder / "make.py").read_bytes())
        subprocess.run([sys.executable, "../make.py"], cwd=work, check=True)
        monkeypatch.chdir(work)
        return work

    return build


@pytest.fixture
def medtune(capsys):
    """Run the command; gives the exit code, what it printed and what it complained about."""

    def call(*arguments) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return end.value.code or 0, captured.out, captured.err

    return call


def train(*arguments) -> tuple[int, str]:
    """Train in a process of its own; gives the exit code and all that it printed."""
    program = Path(sys.executable).with_name("medtune")
    command = [program, "train", *arguments, "--model_name_or_path", TINY]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def lines_of(file: str | Path) -> list[dict]:
    return [json.loads(line) for line in Path(file).read_text("utf-8").split("\n") if line]


def said(record: dict) -> tuple[str, str]:
    """Question and answer of a record in the dialect of TRL."""
    question = [part["text"] for part in record["prompt"][-1]["content"] if part["type"] == "text"]
    return "".join(question), record["completion"][0]["content"][0]["text"]


def converted(medtune, *arguments, out: str = "out") -> tuple[int, list[dict], list[dict], str]:
    """Convert: exit code, records of all splits, rejections, and the complaint."""
    source, *options = arguments
    code, _, err = medtune("convert", source, out, *options)
    found = []
    for split in ("train", "validation", "test"):
        file = Path(out) / f"{split}.jsonl"
        if file.is_file():
            found += lines_of(file)
    rejected = Path(out) / "rejected.jsonl"
    return code, found, lines_of(rejected) if rejected.is_file() else [], err


# ---- tables


def test_l01_captions_that_are_not_there_are_rejected(case, medtune):
    case("L01")
    code, found, rejected, err = converted(medtune, ".")
    assert [said(record)[1] for record in found] == [
        "The heart is normal in size.",
        "No pleural effusion.",
    ]
    assert len(rejected) == 2 and all("caption" in row["reason"] for row in rejected)
    assert code == 1 and "2 of 4 rows were rejected" in err


def test_l02_a_comma_too_many_is_one_named_rejection(case, medtune):
    case("L02")
    _, found, rejected, err = converted(medtune, "captions.csv")
    assert [said(record)[1] for record in found] == ["Normal chest.", "Quoted, as it should be."]
    assert len(rejected) == 1 and "captions.csv:3" in rejected[0]["reason"]
    assert "Traceback" not in err


def test_l03_a_quotation_mark_in_a_tsv_is_a_letter(case, medtune):
    case("L03")
    code, found, rejected, _ = converted(medtune, "captions.tsv")
    assert code == 0 and rejected == []
    assert [said(record)[1] for record in found][1] == '"Double bubble sign in a newborn.'
    assert len(found) == 5


@pytest.mark.parametrize("table", ["a.csv", "b.csv"])
def test_l04_headers_in_any_case_and_with_blanks(case, medtune, table):
    case("L04")
    code, found, _, _ = converted(medtune, table)
    assert code == 0 and [said(record)[1] for record in found] == ["Normal chest.", "Rib fracture."]


@pytest.mark.parametrize(
    ("table", "encoding", "answer"),
    [
        ("gbk.csv", "gb18030", "右肺上叶结节影。"),
        ("zh/gbk2.csv", "gb18030", "右肺上叶结节影。"),
        ("latin1.csv", "latin-1", "Nódulo pulmonar."),
    ],
)
def test_l05_another_encoding_is_said_and_taken(case, medtune, table, encoding, answer):
    case("L05")
    code, _, err = medtune("convert", table, "out")
    assert code == 1 and "not UTF-8" in err and "--encoding" in err and err.count("\n") == 1
    code, found, _, err = converted(medtune, table, "--encoding", encoding, out="out2")
    assert code == 0, err
    assert said(found[1])[1] == answer


def test_l07_paths_of_windows(case, medtune):
    case("L07")
    code, found, _, _ = converted(medtune, "captions.csv")
    assert code == 0 and len(found) == 2
    assert medtune("check", "out")[0] == 0


def test_l08_the_questions_of_the_data_are_asked(case, medtune):
    case("L08")
    code, found, rejected, _ = converted(medtune, "llava_med_instruct.json")
    assert code == 0 and rejected == [] and len(found) == 6
    assert [said(record) for record in found[:3]] == [
        ("Is there evidence of a pleural effusion?", "No."),
        ("Which organ is shown?", "The lungs."),
        ("What is the modality?", "X-ray."),
    ]


def test_l09_question_and_answer_of_vqa_rad(case, medtune):
    case("L09")
    code, found, _, err = converted(medtune, "VQA_RAD.json")
    assert code == 0, err
    assert [said(record) for record in found] == [
        ("How many lesions are there?", "2"),
        ("Is the aorta enlarged?", "No"),
    ]


def test_l11_words_for_splits(case, medtune):
    case("L11")
    code, found, rejected, _ = converted(medtune, "captions.jsonl")
    assert code == 0 and rejected == [] and len(found) == 6
    assert [len(lines_of(f"out/{split}.jsonl")) for split in ("train", "validation", "test")] == [
        2,
        3,
        1,
    ]


def test_l12_two_views_of_one_report(case, medtune):
    case("L12")
    code, found, rejected, _ = converted(medtune, "reports.csv", "--split-by", "none")
    assert code == 0 and rejected == [] and len(found) == 6
    assert len({record["id"] for record in found}) == 6
    assert len({record["group"] for record in found}) == 3, "the views of a report stay together"
    _, found, _, _ = converted(
        medtune, "reports.csv", "--pictures-per-sample", 2, "--split-by", "none", out="two"
    )
    assert [len(record["images"]) for record in found] == [2, 2, 2]


def test_l13_an_id_that_is_a_path(case, medtune):
    case("L13")
    code, found, _, _ = converted(medtune, "m.jsonl")
    assert code == 0 and len({record["id"] for record in found}) == 2
    assert not any("p10" in json.dumps(record) for record in found)


def test_l14_an_image_folder_with_a_table_in_each_split(case, medtune):
    case("L14")
    code, found, _, _ = converted(medtune, "data")
    assert code == 0 and len(found) == 4
    assert {said(record)[1] for record in lines_of("out/test.jsonl")} == {
        "Report a of test.",
        "Report b of test.",
    }
    assert medtune("audit", "data")[0] == 0


@pytest.mark.parametrize(
    ("name", "count"), [("paths", 2), ("list", 4), ("b64", 2), ("llava", 2), ("vqa", 2)]
)
def test_l16_parquet_of_any_shape(case, medtune, name, count):
    case("L16")
    code, found, rejected, err = converted(medtune, f"{name}.parquet", "--split-by", "none")
    assert code == 0, err
    assert rejected == [] and sum(len(record["images"]) for record in found) == count
    if name == "vqa":
        assert said(found[1]) == ("Where is the fracture?", "rib")


def test_l18_an_option_says_which_column_is_the_picture(case, medtune):
    case("L18")
    code, _, err = medtune("convert", "merged.csv", "first")
    assert code == 1 and err.count("\n") == 1
    code, found, _, err = converted(
        medtune,
        "merged.csv",
        *("--column", "image=filename", "--column", "caption=impression"),
    )
    assert code == 0, err
    assert {said(record)[1] for record in found} == {"Normal chest."} and len(found) == 4


@pytest.mark.parametrize("source", ["radiology", "radiology/captions.txt"])
def test_l19_captions_of_roco(case, medtune, source):
    case("L19")
    code, found, _, err = converted(medtune, source)
    assert code == 0, err
    assert [said(record)[1].strip() for record in found] == [
        "Axial MRI, number 1.",
        "Axial MRI, number 6.",
    ]


def test_l19_a_table_without_a_header_is_a_clear_line(case, medtune):
    case("L19")
    code, _, err = medtune("convert", "captions.tsv", "out")
    assert code == 1 and err.count("\n") == 1
    reasons = [row["reason"] for row in lines_of("out/rejected.jsonl")]
    assert ["captions.tsv:1" in reasons[0], "captions.tsv:2" in reasons[1]] == [True, True]


def test_l21_a_missing_picture_with_and_without_a_limit(case, medtune):
    case("L21")
    for number, options in enumerate([[], ["--limit", 10]]):
        code, found, rejected, _ = converted(medtune, "captions.csv", *options, out=f"o{number}")
        assert (code, len(found), len(rejected)) == (1, 5, 1), options
        # the line, and not the name of the file, which can be that of a patient
        assert "captions.csv:4: picture is missing" in rejected[0]["reason"]
        code, found, _, _ = converted(
            medtune, "captions.csv", *options, "--most-rejected", 0.2, out=f"p{number}"
        )
        assert (code, len(found)) == (0, 5)
    code, _, err = medtune("convert", "captions.csv", "strict", "--strict")
    assert code == 1 and "picture is missing" in err
    code, _, err = medtune("audit", "captions.csv")
    assert code == 1 and "cannot be read" in err


def test_l22_absolute_paths_want_a_root(case, medtune):
    work = case("L22")
    for source in ("data/train.json", "data2/train.json"):
        code, _, err = medtune("convert", source, f"out-{source.replace('/', '-')}")
        folder = Path(f"out-{source.replace('/', '-')}")
        reasons = (folder / "rejected.jsonl").read_text("utf-8") if folder.exists() else ""
        assert code == 1 and "image_root" in reasons + err or "--image-root" in reasons + err
        code, found, _, err = converted(
            medtune, source, "--image-root", work, out=f"good-{source[:5].strip('/')}"
        )
        assert code == 0, err
        assert len(found) == 2


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("urls.csv", "https"),
        ("captions.xlsx", "captions.xlsx"),
        ("pics.zip", "pics.zip"),
        ("scan.nii.gz", "NIfTI"),
    ],
)
def test_l22_what_cannot_be_read_is_named(case, medtune, source, named):
    case("L22")
    code, _, err = medtune("convert", source, "out")
    rejected = Path("out/rejected.jsonl")
    reasons = rejected.read_text("utf-8") if rejected.exists() else ""
    assert code == 1 and err.count("\n") == 1 and named in reasons + err
    offered = set(re.findall(r"--[a-z][a-z-]+", err))
    known = {option for command in commands() for option in options_of(command)}
    assert offered <= known, "no option is offered that does not exist"


def commands() -> list:
    import typer

    return list(typer.main.get_command(cli.app).commands.values())


def options_of(command) -> list[str]:
    return [option for parameter in command.params for option in parameter.opts]


@pytest.mark.parametrize("folder", ["nfd", "link", "upper", "space", "sub"])
def test_l24_names_of_files(case, medtune, folder):
    case("L24")
    code, found, _, err = converted(medtune, f"{folder}/captions.csv")
    assert code == 0, err
    assert len(found) == 1


# ---- pictures


def test_p01_a_strip_is_named_before_training(case, medtune):
    case("P01")
    code, found, _, _ = converted(medtune, "captions.csv", "--most-rejected", 1)
    strip = [record["id"] for record in found if said(record)[1] == "An ECG strip."]
    code, _, _ = medtune("check", "out", "--model", TINY)
    errors = json.loads(Path("out/check.json").read_text("utf-8"))["errors"]
    assert code == 1 and [error["id"] for error in errors] == strip


def test_p03_broken_files_are_named(case, medtune):
    case("P03")
    code, found, rejected, _ = converted(medtune, "captions.csv")
    assert code == 1 and {said(record)[1] for record in found} >= {"A ok.jpg.", "A trail.jpg."}
    assert len(found) + len(rejected) == 8
    assert " at 0x" not in json.dumps(rejected)
    for name in ("zeros.jpg", "html.jpg", "nifti.png", "trunc.jpg"):
        folder = Path(f"one-{name}")
        folder.mkdir()
        (folder / name).write_bytes(Path(name).read_bytes())
        code, _, err = medtune("evaluate", folder, "--model", TINY, "--out", f"{name}.jsonl")
        assert code == 1 and name in err and " at 0x" not in err and err.count("\n") <= 2, err


# ---- records and their check


def test_c01_images_may_be_one_name(case, medtune):
    case("C01")
    assert medtune("check", "data")[0] == 0
    assert len(records.read_records("data")[0]["images"]) == 1


def test_c03_a_byte_order_mark_is_no_letter(case, medtune):
    case("C03")
    assert medtune("check", "data")[0] == 0
    assert medtune("check", "data2")[0] == 0
    assert medtune("convert", "data2", "out")[0] == 0


@pytest.mark.parametrize("folder", ["data", "data2"])
def test_c04_no_video(case, medtune, folder):
    case("C04")
    code, out, _ = medtune("check", folder)
    assert code == 1 and "video" in out
    with pytest.raises(ValueError, match="video"):
        records.read_records(folder)


def test_c06_control_tokens_are_found(case, medtune):
    case("C06")
    _, found, rejected, _ = converted(medtune, "captions.csv", "--most-rejected", 1)
    code, _, _ = medtune("check", "out", "--model", TINY)
    errors = json.loads(Path("out/check.json").read_text("utf-8"))["errors"]
    assert len({error["id"] for error in errors}) + len(rejected) == 4
    assert code == 1 or len(rejected) == 4


def test_t09_every_answer_of_a_dialogue_is_learned(case):
    case("T09")
    rows = records.read_records("data")
    answers = [row["completion"][0]["content"][0]["text"] for row in rows]
    assert answers == ["No.", "The lungs.", "X-ray."] * 2


# ---- training


def test_t01_the_strip_is_named_and_training_does_not_die_on_it(case, medtune):
    case("T01")
    converted(medtune, "captions.csv", out="data")
    (strip,) = [row["id"] for row in lines_of("data/train.jsonl") if "strip" in said(row)[1]]
    code, printed = train("train.yaml")
    assert code == 1 and strip in printed.strip().splitlines()[-1]
    assert "Traceback" not in printed


def test_t03_a_cut_answer_is_told_before_training(case, medtune):
    case("T03")
    converted(medtune, "captions.csv", out="data")
    for file in ("train.yaml", "late.yaml"):
        code, printed = train(file)
        assert code == 1 and "max_length" in printed.strip().splitlines()[-1]
        assert "Traceback" not in printed
    assert medtune("check", "data", "--model", TINY, "--max-length", 70)[0] == 1
    assert not json.loads(Path("data/check.json").read_text("utf-8"))["ok"]


def test_t05_a_finished_run_is_not_trained_on(case, medtune):
    case("T05")
    converted(medtune, "captions.csv", out="data")
    assert train("a.yaml")[0] == 0
    log = Path("t/log.json").read_bytes()
    code, printed = train("a.yaml", "--resume")
    assert code == 0 and "finished" in printed and Path("t/log.json").read_bytes() == log
    assert train("a.yaml", "--resume", "--lora_r", 8)[0] == 1


def test_m05_captions_that_begin_with_a_blank(case, medtune):
    from medtune.plan import make_twin

    case("M05")
    converted(medtune, "captions.tsv", out="data")
    for name in ("google/gemma-3-4b-it", "HuggingFaceTB/SmolVLM-256M-Instruct"):
        make_twin(name, "twin", scale="tiny")
        program = Path(sys.executable).with_name("medtune")
        command = [program, "train", "a.yaml", "--model_name_or_path", "twin"]
        command += ["--output_dir", f"t-{name[:5]}"]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-1500:]


@pytest.mark.parametrize("run", ["table", "parquet", "sep"])
def test_n01_notebook_02_on_a_table(case, medtune, run):
    case("N01")
    code, _, err = medtune("run", run, "--root", "root")
    assert code == 0, err[-1500:]


# ---- answers


def test_g01_a_line_separator_inside_a_text_ends_no_line(case, medtune, tmp_path):
    from PIL import Image

    case("G01")
    code, out, err = medtune("evaluate", "preds.jsonl", "--score", "standard")
    assert code == 0, err
    picture = [Image.new("RGB", (9, 9))]
    for number, caption in enumerate(["Two lines:\u2028second line.", "Another."]):
        save_feedback(tmp_path, str(number), picture, caption=caption, rating="corrected")
    assert len(load_pairs(tmp_path)) == 2


def test_g03_a_picture_is_no_table_of_answers(case, medtune):
    case("G03")
    code, _, err = medtune("evaluate", "0.png", "--model", TINY)
    assert code == 1 and "folder" in err and "JSONL" in err and err.count("\n") == 1
    code, _, err = medtune("evaluate", ".", "--model", TINY, "--adapter", "nowhere")
    assert code == 1 and "nowhere" in err.splitlines()[-1]


def test_a01_an_audit_fails_over_what_it_cannot_read(case, medtune):
    case("A01")
    code, _, err = medtune("audit", "bad.csv")
    assert code == 1 and "cannot be read" in err
    assert medtune("audit", "pats.csv", "--column", "patient")[0] == 0
    code, _, err = medtune("audit", "pats.csv", "--id-pattern", "^(p[0-9]+")
    assert code == 1 and err.count("\n") == 1
    code, _, err = medtune("audit", "val.csv", "--column", "group=patient")
    assert code in (0, 1) and "Traceback" not in err


# ---- DICOM


def test_d01_files_named_by_uid(case, medtune):
    case("D01")
    for folder in ("scan", "scan_dcm"):
        code, _, err = medtune("evaluate", folder, "--model", TINY, "--out", f"{folder}.jsonl")
        assert code == 0, err
        assert len(lines_of(f"{folder}.jsonl")) == 3
    assert len(series_files("scan")[0]) == 3
    assert not read_upload(sorted(Path("scan").iterdir())).refused


def test_d02_slices_stand_by_position(case):
    case("D02")
    rows = load_pairs("scan", allow_empty_captions=True)
    brightness = [row["image"].getpixel((0, 0))[0] for row in rows]
    assert brightness == sorted(brightness) and len(brightness) == 12
    of_series = [read_frames(file)[0].getpixel((0, 0))[0] for file in series_files("scan")[0]]
    assert of_series == brightness


@pytest.mark.parametrize("folder", ["sr", "dicomdir", "dose", "seg"])
def test_d03_what_is_no_slice_is_left_out_and_told(case, medtune, folder):
    case("D03")
    code, out, err = medtune("evaluate", folder, "--model", TINY, "--window", "lung")
    assert code == 0, err
    assert len(lines_of("predictions.jsonl")) == 2
    assert "left out" in (out + err)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mpeg4.dcm", "MPEG"),
        ("pdf.dcm", "PDF"),
        ("ext12.dcm", "12"),
    ],
)
def test_d05_what_is_missing_is_said_by_name(case, name, words):
    case("D05")
    try:
        frames = read_frames(name)
    except ValueError as error:
        assert words.lower() in str(error).lower() and "damaged" not in str(error)
    else:
        assert frames, "a decoder is installed that reads it"


def test_d05_no_preamble_is_read(case):
    case("D05")
    assert np.asarray(read_frames("nopreamble.dcm")[0]).shape == (32, 32, 3)


def test_d06_pixels_are_those_of_the_standard(case):
    case("D06")
    program = Path("check.py").read_text("utf-8")
    program = program.replace("from medtune import dicom", "from medtune.pairs import dicom")
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr[-1500:]
    for line in done.stdout.splitlines():
        found = re.search(r"largest difference ([\d.]+)", line)
        assert found and float(found[1]) <= 1.01, line
