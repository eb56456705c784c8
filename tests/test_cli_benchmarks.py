"""medtune evaluate --run NAME --benchmark NAME: a finished run on the field's own questions."""

import json
import shutil
from pathlib import Path

import pytest
from benchmark_files import draw, write_r2gen, write_slake, write_vqa_rad

from medtune import cli
from medtune.records import convert_pairs

REPO = Path(__file__).parents[1]
PARAMS = """notebooks: [02_convert_data, 03_finetune_lora, 05_evaluate]
shared:
  model_name_or_path: ../data/tiny-vlm
"""
pytestmark = pytest.mark.timeout(400)  # a busy machine trains the small adapter slowly


@pytest.fixture
def clone(tmp_path, small_adapter) -> Path:
    """A root with one run, whose training set holds a picture of VQA-RAD's test part, rescaled."""
    root = tmp_path / "clone"
    shutil.copytree(REPO / "notebooks", root / "notebooks", ignore=shutil.ignore_patterns(".*"))
    (root / "data").symlink_to(REPO / "data")
    run = root / "papermill_runs" / "small"
    run.mkdir(parents=True)
    (run / "params.yaml").write_text(PARAMS)
    shutil.copytree(small_adapter, run / "out" / "03_finetune_lora" / "adapter")
    pairs = tmp_path / "own"
    lines = ["image,id,caption"]
    for number, seed in enumerate((1, 70, 71, 72)):
        draw(pairs / f"{number}.png", seed, size=128)
        lines.append(f"{number}.png,p{number},The region shows the liver.")
    (pairs / "captions.csv").write_text("\n".join(lines))
    convert_pairs(pairs, run / "out" / "02_convert_data" / "data", splits=["train"] * 4)
    return root


@pytest.fixture
def evaluate(clone, capsys):
    def call(*arguments) -> tuple[int, str, str]:
        command = ["evaluate", *arguments, "--root", clone, "--max-new-tokens", 8]
        with pytest.raises(SystemExit) as end:
            cli.main([str(argument) for argument in command])
        captured = capsys.readouterr()
        return end.value.code or 0, captured.out, captured.err

    return call


def test_a_run_answers_a_benchmark_and_says_what_leaks(evaluate, clone, tmp_path):
    folder = write_vqa_rad(tmp_path / "VQA_RAD")
    asked = ("--run", "small", "--benchmark", "vqa-rad", "--data", folder)
    code, out, err = evaluate(*asked)
    assert code == 0, err
    lines = {line.split("  ")[0]: line.split("  ")[-1].strip() for line in out.splitlines()}
    assert "VQA-RAD, test" in out.splitlines()[0]
    assert lines["closed questions"] == "2" and lines["open questions"] == "2"
    assert lines["closed: always 'no' (no picture)"] == "50.0"
    assert {"closed: accuracy, whole words", "open: recall of words"} <= set(lines)
    assert lines["of its pictures, in this run's training set"] == "1 of 3"
    assert lines["of its pictures, in its own train part"] == "1 of 3"
    assert "1 of 3 pictures stand in the training set of small (0 as the same file)" in err
    assert "the published split leaks: 1 of 3 pictures of test" in err
    assert "split is one of questions, not of pictures" in err
    assert "no interval: 2 groups are too few" in err

    kept = clone / "papermill_runs" / "small" / "out" / "benchmarks" / "vqa-rad-test"
    answers = [json.loads(line) for line in (kept / "answers.jsonl").read_text().splitlines()]
    assert {answer["id"] for answer in answers} == {"2", "3", "4", "5"}
    scores = json.loads((kept / "scores.json").read_text())
    assert scores["in_training_set"] == {"pictures": 3, "exact": 0, "near": 1, "unreadable": 0}
    # a second start answers nothing anew
    written = (kept / "answers.jsonl").read_text()
    assert evaluate(*asked)[1] == out and (kept / "answers.jsonl").read_text() == written


def test_chinese_questions_reports_and_own_questions_are_answered(evaluate, tmp_path):
    slake = write_slake(tmp_path / "slake")
    reports = write_r2gen(tmp_path / "r2gen")
    own = tmp_path / "questions"
    draw(own / "a.png", 5)
    (own / "questions.csv").write_text("image,question,answer\na.png,A cyst?,no\n")
    for name, folder, title in [
        ("slake-zh", slake, "SLAKE, Chinese, test"),
        ("iu-xray", reports, "IU X-Ray (Open-i), findings, test"),
        ("own", own, "own questions, test"),
    ]:
        out = tmp_path / f"out-{name}"
        options = ("--run", "small", "--benchmark", name, "--data", folder, "--out", out)
        code, printed, err = evaluate(*options, "--no-overlap")
        assert code == 0, err
        assert title in printed and "training set" not in printed
        assert "in_training_set" not in json.loads((out / "scores.json").read_text())


def test_what_cannot_be_asked_is_one_line(evaluate, tmp_path):
    folder = write_vqa_rad(tmp_path / "VQA_RAD")
    known = ("--run", "small", "--benchmark")
    for arguments, message in [
        (("--benchmark", "vqa-rad"), "give --run NAME"),
        ((folder, *known, "vqa-rad"), "give either a source, or both"),
        ((*known, "vqa-rad", "--question", "What?"), "a benchmark brings its own questions"),
        ((*known, "medqa"), "--benchmark medqa: there is none of this name"),
        ((*known, "own"), "give your questions and answers, --data SOURCE"),
        ((*known, "iu-xray"), "give its files, --data FOLDER"),
        ((*known, "vqa-rad", "--data", tmp_path / "none"), "there is no --data"),
        ((*known, "slake", "--data", folder), "does not hold SLAKE, English as it was published"),
        ((*known, "vqa-rad", "--data", folder, "--split", "dev"), "give --split NAME"),
        (("--run", "none", "--benchmark", "vqa-rad"), "there is no papermill_runs/none"),
    ]:
        code, out, err = evaluate(*arguments)
        assert (code, out) == (1, "") and message in err and err.count("\n") == 1, err
