"""Runs beside each other, by the command: the published table of predicting, and losses."""

import json
from pathlib import Path

import pytest
from PIL import Image
from tiny_training import make_data, make_model

from medtune import cli, runs, scores
from medtune.answers import generation_speed

REFERENCE = "The region of interest, located in the center of the image, shows the {}."
ORGANS = ["liver", "spleen", "left kidney", "right kidney", "stomach", "colon"]


@pytest.fixture
def medtune(capsys):
    """Run the command; gives the exit code, what it printed and what it complained about."""

    def call(*arguments) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return end.value.code or 0, captured.out, captured.err

    return call


def answers_of(organs: list[str], *, seconds: float | None = None) -> list[dict]:
    """Six answers of six groups; the references name the organs in their order."""
    rows = []
    for number, (named, right) in enumerate(zip(organs, ORGANS, strict=True)):
        row = {"id": str(number), "group": f"g{number}", "answer": REFERENCE.format(named)}
        row["reference"] = REFERENCE.format(right)
        if seconds is not None:
            row |= {"seconds": seconds, "tokens": 20}
        rows.append(row)
    return rows


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def table_of(text: str, title: str) -> dict[str, dict[str, str]]:
    """Read a printed table: the cells of each row by its first, up to an empty line."""
    lines = text.splitlines()
    (start,) = [number for number, line in enumerate(lines) if line.startswith(title)]
    columns = [name.strip() for name in lines[start].split("  ") if name.strip()]
    table = {}
    for line in lines[start + 1 :]:
        if not line:
            break
        cells = [cell.strip() for cell in line.split("  ") if cell.strip()]
        table[cells[0]] = dict(zip(columns[1:], cells[1:], strict=True))
    return table


# ---- compare


def make_run(root: Path, name: str, tuned: list[dict], base: list[dict], batch_size: int) -> None:
    """A finished run of notebook 05: its parameters, and the answers that it left."""
    folder = root / "papermill_runs" / name
    write_lines(folder / "out" / "05_evaluate" / "predictions_tuned.jsonl", tuned)
    write_lines(folder / "out" / "05_evaluate" / "predictions_base.jsonl", base)
    params = f"notebooks: [05_evaluate]\n05_evaluate:\n  batch_size: {batch_size}\n"
    (folder / "params.yaml").write_text(params)


@pytest.fixture
def root(tmp_path, repo) -> Path:
    """Two runs on the same base, as the two published ones, and a third on another."""
    (tmp_path / "notebooks").symlink_to(repo / "notebooks")
    base = answers_of(["frame"] * 6, seconds=5.0)
    first = answers_of([*ORGANS[:2], *ORGANS[:4]], seconds=4.0)
    make_run(tmp_path, "zero3-b32", first, base, 4)
    make_run(tmp_path, "zero2-b4", answers_of(ORGANS, seconds=1.0), base, 2)
    make_run(tmp_path, "other-base", answers_of(ORGANS), answers_of(["shape"] * 6), 2)
    return tmp_path


def test_base_and_runs_stand_side_by_side_as_published(medtune, root):
    code, out, err = medtune("compare", "zero3-b32", "zero2-b4", "--root", root)
    assert (code, err) == (0, "")
    assert out.startswith("6 shared samples; 0 only in zero3-b32, 0 only in zero2-b4\n")
    table = table_of(out, "on the shared samples")
    assert list(table) == list(scores.PREDICT_NAMES)
    # one base, though each run has its answers
    assert list(table["predict_runtime"]) == ["base of zero3-b32", "zero3-b32", "zero2-b4"]
    assert list(table["predict_runtime"].values()) == ["30", "24", "6"]
    # 6 answers in batches of 4 are 2 steps, in batches of 2 they are 3
    steps = table["predict_steps_per_second"]
    assert [steps["zero3-b32"], steps["zero2-b4"]] == [f"{2 / 24:.3f}", "0.5"]
    assert table["predict_bleu-4"]["zero2-b4"] == "100"

    tuned = (
        root / "papermill_runs" / "zero3-b32" / "out" / "05_evaluate" / "predictions_tuned.jsonl"
    )
    rows = [json.loads(line) for line in tuned.read_text().splitlines()]
    (theirs,) = scores.predict_table({"run": rows}, batch_size=4).values()
    shown = {key: float(row["zero3-b32"]) for key, row in table.items()}
    assert shown == pytest.approx({key: float(f"{value:.4g}") for key, value in theirs.items()})
    assert theirs["predict_runtime"] == generation_speed(rows)["predict_runtime"]


def test_each_other_run_is_compared_with_the_first(medtune, root):
    names = ["zero2-b4", "zero3-b32", "other-base"]
    code, out, err = medtune("compare", *names, "--score", "finding", "--root", root)
    assert (code, err) == (0, "")
    columns = list(table_of(out, "on the shared samples")["predict_rouge-1"])
    assert columns == ["base of zero2-b4", "base of other-base", *names]
    assert "zero2-b4 minus zero3-b32" in out and "zero2-b4 minus other-base" in out
    first, second = out.split("zero2-b4 minus ")[1:]
    exact = [table_of(part, "score")["finding structure_exact"] for part in (first, second)]
    assert [row["difference"] for row in exact] == [f"{4 / 6:.4g}", "0"]
    # answers that say no time have no speed
    assert table_of(out, "on the shared samples")["predict_runtime"]["other-base"] == "-"


def test_files_of_answers_need_no_run(medtune, tmp_path):
    ours = write_lines(tmp_path / "ours.jsonl", answers_of(ORGANS, seconds=2.0))
    theirs = []
    for row in answers_of(["liver"] * 6)[:4]:
        theirs.append({"id": row["id"], "predict": row["answer"], "label": row["reference"]})
    other = write_lines(tmp_path / "generated_predictions.jsonl", theirs)
    code, out, _ = medtune("compare", ours, other, "--score", "finding", "--batch-size", "4")
    assert code == 0
    assert out.startswith(f"4 shared samples; 2 only in {ours}, 0 only in {other}\n")
    table = table_of(out, "on the shared samples")
    assert table["predict_runtime"] == {str(ours): "8", str(other): "-"}
    assert table["predict_steps_per_second"] == {str(ours): "0.125", str(other): "-"}
    # the same one twice is two columns
    code, out, _ = medtune("compare", ours, ours, "--score", "finding")
    assert code == 0 and list(table_of(out, "on the")["predict_rouge-l"]) == [
        str(ours),
        f"{ours} (2)",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["zero2-b4"], "compare takes two or more runs or files"),
        (["zero2-b4", "zero3-b32", "--batch-size", "0"], "--batch-size 0: give 1 or more"),
        (["zero2-b4", "no-such-run"], "no-such-run"),
    ],
)
def test_what_cannot_be_compared_is_one_line(medtune, root, arguments, said):
    code, out, err = medtune("compare", *arguments, "--root", root)
    assert code == 1 and said in err and err.count("\n") == 1 and not out


# ---- curves


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_vlm) -> Path:
    """Two trainings of one pass over 32 pairs: 2 steps of 16, and 8 steps of 4."""
    place = tmp_path_factory.mktemp("trained")
    make_model(place / "model", tiny_vlm, experts=False)
    make_data(place / "data", {"train": 32, "validation": 4})
    settings = [
        f"data: {place}/data",
        f"model_name_or_path: {place}/model",
        "num_train_epochs: 1",
        "learning_rate: 2e-3",
        "per_device_train_batch_size: 4",
        "logging_steps: 1",
        "eval_strategy: epoch",
        "save_strategy: 'no'",
        "disable_tqdm: true",
    ]
    (place / "train.yaml").write_text("\n".join(settings) + "\n")
    for name, accumulated in (("large", 4), ("small", 1)):
        words = ["--output_dir", place / name, "--gradient_accumulation_steps", accumulated]
        with pytest.raises(SystemExit) as end:
            cli.main([str(word) for word in ["train", place / "train.yaml", *words]])
        assert not end.value.code
    return place


@pytest.mark.slow
def test_losses_of_two_trainings_stand_over_steps_and_samples(medtune, trained, tmp_path):
    out = tmp_path / "curves.png"
    code, said, err = medtune("curves", trained / "large", trained / "small", "--out", out)
    assert code == 0, err
    table = table_of(said, "run")
    steps = {Path(run).name: [row["steps"], row["samples seen"]] for run, row in table.items()}
    assert steps == {"large": ["2", "32"], "small": ["8", "32"]}
    assert all(float(row["last held-out loss"]) > 0 for row in table.values())
    with Image.open(out) as picture:
        assert picture.width > picture.height > 300

    # a notebook writes the same log, with a summary beside it
    folder = tmp_path / "papermill_runs" / "mine" / "out" / "03_finetune_lora"
    folder.mkdir(parents=True)
    (tmp_path / "notebooks").mkdir()
    (folder / "log.json").write_bytes((trained / "small" / "log.json").read_bytes())
    (folder / "summary.json").write_text('{"effective_batch_size": 4}')
    log = runs.read_log("mine", root=tmp_path)
    assert log == runs.read_log(trained / "small")
    assert [entry["step"] for entry in log.history if "loss" in entry] == list(range(1, 9))


@pytest.mark.parametrize(
    ("log", "said"),
    [
        (None, "no log.json of a training in"),
        ("[", "is no log of a training"),
        ('{"loss": 1}', "is no log of a training"),
        ("[]", "has not logged a step yet"),
    ],
)
def test_a_log_that_is_none_is_one_line(medtune, tmp_path, log, said):
    if log is not None:
        (tmp_path / "log.json").write_text(log)
    code, out, err = medtune("curves", tmp_path, "--out", tmp_path / "a.png")
    assert code == 1 and said in err and err.count("\n") == 1 and not out
    code, _, err = medtune("curves", tmp_path, "--out", tmp_path / "a.txt")
    assert code == 1 and "a name that ends in .png" in err
