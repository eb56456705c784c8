"""The medtune command: what it prints, and that a mistake is one line on stderr and exit code 1."""

# ruff: noqa: F811 (the fixture root comes from test_runs)

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_runs import root, starts, write_notebook, write_params  # noqa: F401

from medtune import __version__, cli

SAID = "The region of interest, located in the {} of the image, shows the {}."


@pytest.fixture
def medtune(capsys):
    """Run the command; gives the exit code, what it printed and what it complained about."""

    def call(*arguments) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return end.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """A folder of twelve pictures of four patients, and a table of captions."""
    random = np.random.default_rng(0)
    lines = ["image,id,caption,patient"]
    for i in range(12):
        Image.fromarray(random.integers(0, 255, (32, 32), dtype="uint8")).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,id-{i},Picture number {i} shows noise.,patient-{i % 4}")
    (tmp_path / "captions.csv").write_text("\n".join(lines))
    return tmp_path


TINY = Path(__file__).parents[1] / "data" / "tiny-vlm"


def write_answers(path: Path, places: list[str], structures: list[str]) -> Path:
    rows = [
        {"id": str(i), "answer": SAID.format(place, structure), "reference": SAID.format("center", "liver"), "group": g}
        for i, (place, structure, g) in enumerate(zip(places, structures, "abcdef", strict=True))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


COMMANDS = [
    *("run", "list", "params", "reference", "sample"),
    *("convert", "check", "audit", "evaluate", "compare", "version"),
]


def test_help_names_every_subcommand_and_loads_nothing_heavy():
    code = "import sys, medtune.cli as c\ntry: c.main(['--help'])\nfinally: print(sorted(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert all(f" {command} " in out for command in COMMANDS)
    assert "'typer'" in out and "'torch'" not in out and "'papermill'" not in out and "'datasets'" not in out


def test_version(medtune):
    code, out, _ = medtune("version")
    assert code == 0 and f"medtune       {__version__}" in out and "transformers" in out


def test_the_installed_command_answers():
    command = Path(sys.executable).with_name("medtune")
    done = subprocess.run([command, "run", "no/such"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.count("\n") == 1
    assert done.stderr.startswith("medtune: ")


def test_run_prints_a_table_and_continues(medtune, root):
    code, out, _ = medtune("run", "small", "--root", root, "--set", "02.steps=7", "--name", "seven")
    assert code == 0
    assert out.splitlines()[0].split() == ["notebook", "minutes", "results"]
    assert "02_train" in out and "loss 0.0014" in out and "papermill_runs/seven/out/" in out
    assert medtune("run", "seven", "--root", root)[1].count("finished before and unchanged") == 2
    assert starts(root, "02_train", "seven") == 1
    lines = medtune("list", "--root", root)[1].splitlines()
    assert [line.split()[0] for line in lines] == ["run", "seven", "small"]
    assert "2 of 2" in lines[1] and "0 of 2" in lines[2]
    code, out, _ = medtune("reference", "seven", "--root", root)
    assert Path(out.strip(), "02_train.ipynb").exists()


def test_params_shows_values_types_and_meaning(medtune, root):
    out = medtune("params", "small", "--root", root)[1]
    assert "02_train" in out and "0.0002" in out and "step size" in out and "Literal['lora', 'qlora']" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "large"], "there is no papermill_runs/large/params.yaml; the runs here: small"),
        (["run", "small", "--set", "steps=7"], "--name"),
        (["run", "small", "--set", "steps", "--name", "x"], "KEY=VALUE"),
        (["run", "small", "--set", "rank=7", "--name", "x"], "no parameter 'rank'"),
        (["run", "small", "--set", "steps=x", "--name", "x"], "must be int, not 'x'"),
        (["run", "small", "--set", "steps=7", "--name", "../x"], "is not '../x'"),
    ],
)
def test_a_mistake_is_one_line(medtune, root, arguments, message):
    code, out, err = medtune(*arguments, "--root", root)
    assert (code, out) == (1, "") and message in err and err.count("\n") == 1
    assert [path.name for path in (root / "papermill_runs").iterdir()] == ["small"]


def test_a_failing_notebook_is_one_line_and_debug_shows_more(medtune, root):
    write_notebook(root, "01_look", body="raise ValueError('two\\nlines')")
    code, _, err = medtune("run", "small", "--root", root)
    assert code == 1 and "01_look failed in cell [5]: ValueError: two lines" in err.splitlines()[-1]
    with pytest.raises(ValueError, match="01_look failed"):
        cli.main(["--debug", "run", "small", "--root", str(root)])


def test_a_full_disk_is_one_line(medtune, root, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "out/summary.json")

    monkeypatch.setattr("medtune.runs.run", full)
    assert medtune("run", "small", "--root", root) == (1, "", "medtune: No space left on device: out/summary.json\n")


def test_ctrl_c_says_how_to_go_on(medtune, root, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("medtune.runs.run", stop)
    code, _, err = medtune("run", "small", "--root", root)
    assert code == 130 and "'medtune run small' continues" in err


def test_sample_passes_options_on(root):
    (root / "data").mkdir()
    (root / "data" / "build_sample.py").write_text("import sys; print(sys.argv[1:]); sys.exit(3)")
    command = [Path(sys.executable).with_name("medtune"), "sample", "--root", root, "--seed", "7"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "['--seed', '7']\n")


def test_convert_then_check(medtune, pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "out"
    code, out, _ = medtune("convert", pairs, folder, "--limit", 5, "--question", "What is shown?")
    assert code == 0 and json.loads(out)["records"] == {"train": 5}
    assert len((folder / "train.jsonl").read_text().splitlines()) == 5
    assert medtune("check", folder)[0] == 0
    (folder / "train.jsonl").open("a").write('{"id": "x"}\n')
    code, out, err = medtune("check", folder)
    assert code == 1 and "does not conform" in err and err.count("\n") == 1 and len(out.splitlines()) > 2
    code, _, err = medtune("convert", pairs / "none.parquet", folder)
    assert code == 1 and "none.parquet" in err and err.count("\n") == 1


def test_audit_passes_a_split_by_patient_and_fails_one_that_cuts_patients(medtune, pairs):
    code, out, _ = medtune("audit", pairs, "--column", "patient")
    report = json.loads(out)
    assert code == 0 and report["groups_crossing"] == 0 and sum(report["rows"].values()) == 12
    table = pairs / "captions.csv"
    rows = table.read_text().splitlines()
    lines = [f"{row},{'test' if i < 4 else 'train'}" for i, row in enumerate(rows[1:])]
    table.write_text("\n".join([f"{rows[0]},split", *lines]))
    code, out, err = medtune("audit", pairs, "--column", "patient")
    assert code == 1 and json.loads(out)["groups_crossing"] == 4
    assert "leaks: 4 groups_crossing" in err and err.count("\n") == 1


def test_evaluate_and_compare(medtune, tmp_path):
    places, structures = ["center"] * 6, ["liver"] * 6
    good = write_answers(tmp_path / "good.jsonl", places, structures)
    poor = write_answers(tmp_path / "poor.jsonl", ["center"] * 3 + ["upper left"] * 3, ["spleen"] * 6)
    code, out, _ = medtune("evaluate", good)
    scores = json.loads(out)
    assert list(scores) == ["llamafactory", "standard", "finding"]
    assert scores["finding"]["structure_exact"] == 1 and "intervals" in scores["standard"]
    assert list(json.loads(medtune("evaluate", poor, "--score", "finding")[1])) == ["finding"]
    code, out, _ = medtune("compare", good, poor, "--score", "finding")
    rows = {line.split("  ")[0]: line for line in out.splitlines()}
    assert code == 0 and " 1 " in rows["finding structure_exact"] and " 0.5 " in rows["finding place_exact"]
    part = tmp_path / "part.jsonl"
    part.write_text("".join(good.read_text().splitlines(keepends=True)[:4]))
    assert medtune("compare", part, poor, "--score", "finding")[1].startswith("4 shared samples; 0 only in")
    other = tmp_path / "other.jsonl"
    other.write_text(good.read_text().replace('"id": "', '"id": "other-'))
    code, _, err = medtune("compare", good, other)
    assert code == 1 and "share no id" in err


def test_a_series_is_answered_slice_by_slice(medtune, tmp_path):
    from PIL import Image

    folder, report, out = tmp_path / "series", tmp_path / "report.txt", tmp_path / "answers.jsonl"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (64, 64), (80 * number,) * 3).save(folder / f"{number}.png")
    report.write_text("There is a solid nodule in the liver.")
    code, text, err = medtune("evaluate", folder, "--model", TINY, "--report", report, "--out", out)
    assert code == 0, err
    assert len(out.read_text().splitlines()) == 3 and "report: There is a solid nodule" in text
    assert sum(line.startswith(("1 ", "2 ", "3 ")) for line in text.splitlines()) == 3


def test_evaluate_refuses_what_it_cannot_score(medtune, tmp_path):
    good = write_answers(tmp_path / "good.jsonl", ["center"] * 6, ["liver"] * 6)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"id": "0", "answer": "x"}\n')
    for arguments, message in [
        (["evaluate", tmp_path / "none.jsonl"], "No such file or directory"),
        (["evaluate", bad], "bad.jsonl, line 1: needs JSON with id, answer and reference"),
        (["evaluate", good, "--score", "meteor"], "there is no score 'meteor'"),
    ]:
        code, out, err = medtune(*arguments)
        assert (code, out) == (1, "") and message in err and err.count("\n") == 1
