"""medtune evaluate --run NAME --data OTHER: a finished run is scored on other people."""

import json
import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medtune import cli
from medtune.files import only_writer
from medtune.records import convert_pairs, read_records

REPO = Path(__file__).parents[1]
PARAMS = """notebooks: [02_convert_data, 03_finetune_lora, 05_evaluate]
shared:
  model_name_or_path: ../data/tiny-vlm
"""
ORGANS = ["liver", "spleen", "right kidney", "left kidney"]
pytestmark = pytest.mark.timeout(400)  # a busy machine trains the small adapter slowly


def write_pairs(folder: Path, organs: list[str], patients: list[str]) -> Path:
    """A folder of pictures of organs, with a table that names the patient of each."""
    random = np.random.default_rng(len(organs))
    folder.mkdir()
    lines = ["image,id,caption,patient"]
    for i, (organ, patient) in enumerate(zip(organs, patients, strict=True)):
        noise = random.integers(0, 255, (64, 64), dtype="uint8")
        Image.fromarray(noise).save(folder / f"{i}.png")
        caption = f"The region of interest shows the {organ}. No focal lesion is seen within it."
        lines.append(f"{i}.png,{folder.name}-{i},{caption},{patient}")
    (folder / "captions.csv").write_text("\n".join(lines))
    return folder


@pytest.fixture
def clone(tmp_path, small_adapter) -> Path:
    """A root with one run that has records, an adapter, and answers to its own test pairs."""
    root = tmp_path / "clone"
    shutil.copytree(REPO / "notebooks", root / "notebooks", ignore=shutil.ignore_patterns(".*"))
    (root / "data").symlink_to(REPO / "data")
    run = root / "papermill_runs" / "small"
    run.mkdir(parents=True)
    (run / "params.yaml").write_text(PARAMS)
    shutil.copytree(small_adapter, run / "out" / "03_finetune_lora" / "adapter")

    pairs = write_pairs(tmp_path / "own", ORGANS * 4, [f"p{i // 2}" for i in range(16)])
    convert_pairs(pairs, run / "out" / "02_convert_data" / "data")
    test = read_records(run / "out" / "02_convert_data" / "data", "test")
    evaluated = run / "out" / "05_evaluate"
    evaluated.mkdir()
    lines = []
    for row in test:
        text = row["completion"][-1]["content"][0]["text"]
        answer = {"id": row["id"], "question": "?", "answer": text, "reference": text}
        lines.append(json.dumps(answer))
    (evaluated / "predictions_tuned.jsonl").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def evaluate(clone, capsys):
    def call(*arguments) -> tuple[int, str, str]:
        command = ["evaluate", *arguments, "--root", clone]
        if "--data" in arguments:
            command += ["--max-new-tokens", 8]
        with pytest.raises(SystemExit) as end:
            cli.main([str(argument) for argument in command])
        captured = capsys.readouterr()
        return end.value.code or 0, captured.out, captured.err

    return call


def test_scores_of_another_person_stand_beside_the_held_out_ones(evaluate, clone, tmp_path):
    other = write_pairs(tmp_path / "other", ["liver", "spleen", "prostate"], ["q"] * 3)
    code, out, err = evaluate("--run", "small", "--data", other)
    assert code == 0, err
    lines = {line.split("  ")[0]: line for line in out.splitlines()}
    assert "held out" in out.splitlines()[0] and "other" in out.splitlines()[0]
    # its own answers were written as the references are
    assert " 100" in lines["name right"]
    assert lines["pairs"].split()[-1] == "3"
    assert lines["of these about structures that were taught"].split()[-1] == "2"
    assert "1 pairs about structures that were not taught: prostate" in out

    folder = clone / "papermill_runs" / "small" / "out" / "another_person" / "other"
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    # pairs without a question are asked what the run was trained on
    trained = read_records(clone / "papermill_runs/small/out/02_convert_data/data", "train")
    parts = trained[0]["prompt"][-1]["content"]
    (text,) = [part["text"] for part in parts if part["type"] == "text"]
    assert {answer["question"] for answer in answers} == {text.strip()}
    # a hash of the patient's name: one patient
    assert len({answer["group"] for answer in answers}) == 1
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["other"]["not_taught"] == {"prostate": 1}
    assert scores["held out"]["scores"]["name right"]["value"] == 100

    # a second start answers nothing anew, and a converted folder is read as well
    # (each line says how long its answer took)
    written = (folder / "answers.jsonl").read_text()
    assert evaluate("--run", "small", "--data", other)[1] == out
    assert (folder / "answers.jsonl").read_text() == written
    converted = tmp_path / "converted"
    convert_pairs(other, converted, splits=["test"] * 3)
    code, out, err = evaluate("--run", "small", "--data", converted, "--out", tmp_path / "there")
    assert code == 0, err
    assert json.loads((tmp_path / "there" / "scores.json").read_text())["converted"]["pairs"] == 3


def test_what_cannot_be_evaluated_is_one_line(evaluate, clone, tmp_path):
    other = write_pairs(tmp_path / "other", ["liver"], ["q"])
    train_only = tmp_path / "train-only"
    convert_pairs(other, train_only, splits=["train"])
    for arguments, message in [
        ((), "give a source, or --run NAME and --data OTHER"),
        (("--run", "small"), "both --run NAME and --data OTHER"),
        ((other, "--run", "small", "--data", other), "either a source, or both"),
        (("--run", "none", "--data", other), "there is no papermill_runs/none/params.yaml"),
        (("--run", "small", "--data", tmp_path / "nowhere"), "there is no --data"),
        (("--run", "small", "--data", train_only), "has no split 'test', only train"),
    ]:
        code, out, err = evaluate(*arguments)
        assert (code, out) == (1, "") and message in err and err.count("\n") == 1

    own = clone / "papermill_runs" / "small" / "out"
    shutil.rmtree(own / "03_finetune_lora")
    code, _, err = evaluate("--run", "small", "--data", other)
    assert code == 1 and "medtune run small makes it" in err


def test_without_held_out_answers_the_other_person_is_scored_alone(evaluate, clone, tmp_path):
    shutil.rmtree(clone / "papermill_runs" / "small" / "out" / "05_evaluate")
    other = write_pairs(tmp_path / "other", ["liver"], ["q"])
    code, out, err = evaluate("--run", "small", "--data", other)
    assert code == 0 and "held-out scores are missing" in err
    assert "held out" not in out and "name right" in out


def hold(folder: Path, held, ended) -> None:
    with only_writer(folder / "scores.json", "a folder"):
        held.set()
        ended.wait(300)


def test_a_folder_that_another_process_writes_stays_as_it_is(evaluate, tmp_path):
    fork = multiprocessing.get_context("fork")
    held, ended = fork.Event(), fork.Event()
    there = tmp_path / "there"
    process = fork.Process(target=hold, args=(there, held, ended))
    process.start()
    try:
        assert held.wait(60)
        other = write_pairs(tmp_path / "other", ["liver"], ["q"])
        command = ("--run", "small", "--data", other, "--out", there)
        code, out, err = evaluate(*command)
        assert (code, out) == (1, "")
        assert [path.name for path in there.iterdir()] == [".scores.json.lock"]
        (line,) = [line for line in err.splitlines() if "medtune:" in line]
        assert f"--out {there} is being written by process {process.pid} on" in line
    finally:
        ended.set()
        process.join()
    assert evaluate(*command)[0] == 0


# ---- what is drawn


def answer_file(path: Path, wrong: int, **of_row) -> Path:
    """Twelve answers, the first of them wrong; `of_row` gives more columns by number."""
    lines = []
    for i in range(12):
        organ = "spleen" if i < wrong else "liver"
        row = {"id": str(i), "answer": f"The {organ}.", "reference": "The liver."}
        row |= {name: value(i) for name, value in of_row.items()}
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize(
    ("of_row", "label"),
    [
        ({"group": lambda i: f"patient {i // 2}"}, "over 6 groups"),
        (
            {"group": lambda i: f"held-out-block-{i // 6}", "slice": lambda i: i // 2},
            "within one patient, blocks fixed: 6 slices",
        ),
        ({"group": lambda i: "one"}, "their slices are not known"),
    ],
    ids=["patients", "slices of one patient", "one patient"],
)
def test_compare_draws_patients_or_the_slices_of_one(capsys, tmp_path, of_row, label):
    good = answer_file(tmp_path / "good.jsonl", 1, **of_row)
    poor = answer_file(tmp_path / "poor.jsonl", 11, **of_row)
    with pytest.raises(SystemExit):
        cli.main(["compare", str(good), str(poor), "--score", "finding"])
    out, err = capsys.readouterr()
    (line,) = [line for line in out.splitlines() if line.startswith("finding structure_exact")]
    assert label in line and err == ""
    assert ("  yes  " in line) == ("not known" not in label)
