"""The medtune command: what it prints, and that a mistake is one line on stderr and exit code 1."""

# ruff: noqa: F811 (the fixture root comes from small_runs)

import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from small_runs import root, starts, write_notebook, write_params  # noqa: F401

from medtune import __version__, cli
from medtune.cli.printing import print_table

TINY = Path(__file__).parents[1] / "data" / "tiny-vlm"
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
        noise = random.integers(0, 255, (32, 32), dtype="uint8")
        Image.fromarray(noise).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,id-{i},Picture number {i} shows noise.,patient-{i % 4}")
    (tmp_path / "captions.csv").write_text("\n".join(lines))
    return tmp_path


def write_answers(path: Path, places: list[str], structures: list[str]) -> Path:
    """Write six answers, each of a group of its own; the references are the liver in the center."""
    rows = []
    for i, (place, structure, group) in enumerate(zip(places, structures, "abcdef", strict=True)):
        rows.append(
            {
                "id": str(i),
                "answer": SAID.format(place, structure),
                "reference": SAID.format("center", "liver"),
                "group": group,
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---- the command itself

COMMANDS = [
    "run",
    "list",
    "params",
    "reference",
    "sample",
    "convert",
    "check",
    "audit",
    "evaluate",
    "compare",
    "card",
    "curves",
    "version",
    "clean",
    "ids",
    "translate",
    "prefer",
]
# each of these takes a good part of a second, or more
HEAVY = ["torch", "transformers", "papermill", "datasets", "pandas", "numpy", "pydantic"]


def test_help_names_every_subcommand_and_loads_nothing_heavy():
    code = """import sys, medtune.cli as c
try: c.main(['--help'])
finally: print(sorted(sys.modules))"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert all(f" {command} " in out for command in COMMANDS)
    assert "'typer'" in out
    assert not [module for module in HEAVY if f"'{module}'" in out]


@pytest.mark.parametrize("arguments", [["list"], ["params", "small"]])
def test_looking_at_runs_loads_no_large_library(root, arguments):
    code = f"""import sys, medtune.cli as c
try: c.main({[*arguments, "--root", str(root)]})
finally: print(sorted(sys.modules))"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    loaded = [module for module in ("torch", "papermill", "pandas") if f"'{module}'" in out]
    assert "small" in out or "02_train" in out
    assert not loaded


def test_every_argument_and_option_has_a_sentence_of_help():
    group = typer.main.get_command(cli.app)
    for name, command in group.commands.items():
        assert command.help, name
        for parameter in command.params:
            assert parameter.help, f"{name}: {parameter.name}"
            assert parameter.help.rstrip()[-1] == ".", f"{name}: {parameter.name}"


def test_version(medtune):
    code, out, _ = medtune("version")
    assert code == 0 and f"medtune       {__version__}" in out and "transformers" in out


def test_the_installed_command_answers():
    command = Path(sys.executable).with_name("medtune")
    done = subprocess.run([command, "run", "no/such"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.count("\n") == 1
    assert done.stderr.startswith("medtune: ")


# ---- tables

ROWS = [
    {"key": "question", "value": "[bold] " + "word " * 60, "score": 0.123456, "none": None},
    {"key": "图片", "value": "[1, 2]", "score": 12.0, "none": True},
]


def test_in_a_pipe_a_table_is_plain_lines_of_any_length(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    print_table(ROWS)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and "\x1b" not in "".join(lines)
    assert [line.split()[0] for line in lines] == ["key", "question", "图片"]
    assert "[bold] " + "word " * 59 + "word" in lines[1] and "0.1235" in lines[1]
    assert lines[1].endswith("-") and lines[2].split()[-2:] == ["12", "True"]
    assert all(line == line.rstrip() for line in lines)


def test_a_table_without_rows_says_so(capsys):
    print_table([])
    assert capsys.readouterr().out == "(none)\n"


def test_at_a_terminal_long_values_are_wrapped_and_nothing_is_lost(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "60")
    print_table([{"key": "path", "value": "x" * 200}])
    lines = terminal.getvalue().splitlines()
    assert len(lines) > 4 and "".join(lines).count("x") == 200


def test_a_real_terminal_shows_a_table(root):
    """Through a pseudo terminal, as a user sees it."""
    ours, theirs = pty.openpty()
    command = [Path(sys.executable).with_name("medtune"), "list", "--root", root]
    done = subprocess.run(command, stdout=theirs, stdin=theirs)
    os.close(theirs)
    shown = os.read(ours, 10_000).decode()
    os.close(ours)
    assert done.returncode == 0 and "small" in shown and "0 of 2" in shown


# ---- runs


def test_run_prints_a_table_and_continues(medtune, root):
    code, out, _ = medtune("run", "small", "--root", root, "--set", "02.steps=7", "--name", "seven")
    assert code == 0
    assert out.splitlines()[0].split() == ["notebook", "minutes", "results"]
    assert "02_train" in out and "loss 0.0014" in out and "papermill_runs/seven/out/" in out
    _, again, _ = medtune("run", "seven", "--root", root)
    assert again.count("finished before and unchanged") == 2
    assert starts(root, "02_train", "seven") == 1
    _, listed, _ = medtune("list", "--root", root)
    lines = listed.splitlines()
    assert [line.split()[0] for line in lines] == ["run", "seven", "small"]
    assert "2 of 2" in lines[1] and "0 of 2" in lines[2]
    code, out, _ = medtune("reference", "seven", "--root", root)
    assert Path(out.strip(), "02_train.ipynb").exists()


def test_params_shows_values_types_and_meaning(medtune, root):
    _, out, _ = medtune("params", "small", "--root", root)
    for shown in ("02_train", "0.0002", "step size", "Literal['lora', 'qlora']"):
        assert shown in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "large"], "there is no papermill_runs/large/params.yaml; the runs here: small"),
        (["run", "smal"], "smal/params.yaml; did you mean small? the runs here: small"),
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


def test_a_run_says_which_clone_it_is_in(medtune, root, tmp_path_factory, monkeypatch):
    """Outside of a clone it is the one that medtune was installed from; inside nobody need be told."""
    for folder, told in ((tmp_path_factory.mktemp("elsewhere"), True), (root / "notebooks", False)):
        monkeypatch.chdir(folder)
        # a mistake, so that nothing is run
        code, _, err = medtune("run", "no-such-run")
        assert code == 1 and ("the clone that medtune was installed from" in err) == told


def test_a_failing_notebook_is_one_line_and_debug_shows_more(medtune, root):
    write_notebook(root, "01_look", body="raise ValueError('two\\nlines')")
    code, _, err = medtune("run", "small", "--root", root)
    last = err.splitlines()[-1]
    assert code == 1 and "01_look failed in cell [5]: ValueError: two lines" in last
    with pytest.raises(ValueError, match="01_look failed"):
        cli.main(["--debug", "run", "small", "--root", str(root)])


def test_a_full_disk_is_one_line(medtune, root, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "out/summary.json")

    monkeypatch.setattr("medtune.runs.run", full)
    code, out, err = medtune("run", "small", "--root", root)
    assert (code, out) == (1, "")
    assert err == "medtune: No space left on device: out/summary.json\n"


def test_ctrl_c_says_how_to_go_on(medtune, root, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("medtune.runs.run", stop)
    code, _, err = medtune("run", "small", "--root", root)
    assert code == 130 and "'medtune run small' continues" in err


# ---- data


def test_sample_passes_options_on(root):
    (root / "data").mkdir()
    script = root / "data" / "build_sample.py"
    script.write_text("import sys; print(sys.argv[1:]); sys.exit(3)")
    medtune = Path(sys.executable).with_name("medtune")
    command = [medtune, "sample", "--root", root, "--seed", "7"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "['--seed', '7']\n")


def test_convert_then_check(medtune, pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "out"
    question = "What is shown?"
    code, out, _ = medtune("convert", pairs, folder, "--limit", 5, "--question", question)
    report = json.loads(out)
    assert code == 0 and sum(report["records"].values()) == 5
    # patients are known by the name of their column, and the source has no split
    assert report["split_by"] == "patient" and report["records"]["train"] < 5
    records = folder / "train.jsonl"
    whole = folder.with_name("whole")
    code, out, _ = medtune("convert", pairs, whole, "--limit", 5, "--split-by", "none")
    assert code == 0 and json.loads(out)["records"] == {"train": 5}
    code, _, _ = medtune("check", folder)
    assert code == 0
    records.open("a").write('{"id": "x"}\n')
    code, out, err = medtune("check", folder)
    assert code == 1 and "does not conform" in err and err.count("\n") == 1
    assert len(out.splitlines()) > 2
    code, _, err = medtune("convert", pairs / "none.parquet", folder)
    assert code == 1 and "none.parquet" in err and err.count("\n") == 1


def test_audit_passes_a_split_by_patient_and_fails_one_that_cuts_patients(medtune, pairs):
    code, out, _ = medtune("audit", pairs, "--column", "patient")
    report = json.loads(out)
    assert code == 0 and report["groups_crossing"] == 0 and sum(report["rows"].values()) == 12
    table = pairs / "captions.csv"
    header, *rows = table.read_text().splitlines()
    lines = [f"{header},split"]
    for i, row in enumerate(rows):
        split = "test" if i < 4 else "train"
        lines.append(f"{row},{split}")
    table.write_text("\n".join(lines))
    code, out, err = medtune("audit", pairs, "--column", "patient")
    assert code == 1 and json.loads(out)["groups_crossing"] == 4
    assert "leaks: 4 groups_crossing" in err.splitlines()[-1]
    splits = pairs / "splits.csv"
    code, out, _ = medtune(
        "audit", pairs, "--column", "group=patient", "--split-by", "patient", "--write", splits
    )
    assert code == 0 and json.loads(out)["groups_crossing"] == 0
    lines = splits.read_text().splitlines()
    assert lines[0] == "id,split,group" and len(lines) == 13
    assert "patient-0" not in splits.read_text(), "a hash stands for a patient"
    code, out, _ = medtune("convert", pairs, pairs / "out", "--splits", splits)
    assert code == 0
    kept = {line.split(",")[0]: line.split(",")[1] for line in lines[1:]}
    for split in ("train", "validation", "test"):
        written = (pairs / "out" / f"{split}.jsonl").read_text().splitlines()
        assert {json.loads(line)["id"] for line in written} == {
            name for name, its_split in kept.items() if its_split == split
        }


def test_audit_and_convert_fail_over_pictures_that_cannot_be_read(medtune, pairs, tmp_path_factory):
    (pairs / "3.png").write_bytes(b"no picture")
    code, out, err = medtune("audit", pairs, "--column", "patient")
    assert code == 1 and json.loads(out)["unreadable"] == 1
    last = err.splitlines()[-1]
    assert "1 pictures of" in last and "first: id id-3" in last

    folder = tmp_path_factory.mktemp("converted")
    code, out, _ = medtune("convert", pairs, folder / "some")
    assert code == 0 and sum(json.loads(out)["records"].values()) == 11
    # a twelfth of the rows is more than a twentieth
    code, _, err = medtune("convert", pairs, folder / "few", "--most-rejected", 0.05)
    assert code == 1 and "1 of 12 rows were rejected (1 image)" in err
    assert "--most-rejected 0.05" in err and err.count("\n") == 1
    for file in pairs.glob("*.png"):
        file.write_bytes(b"no picture")
    code, out, err = medtune("convert", pairs, folder / "none")
    assert code == 1 and json.loads(out)["reasons"] == {"image": 12}
    assert "nothing of" in err and "(12 image)" in err and err.count("\n") == 1
    assert len((folder / "none" / "rejected.jsonl").read_text().splitlines()) == 12


# ---- answers and scores


def test_a_group_called_0_is_a_group(medtune, tmp_path):
    file = write_answers(tmp_path / "answers.jsonl", ["center"] * 6, ["liver"] * 6)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for i, row in enumerate(rows):
        row["group"] = i
    file.write_text("\n".join(map(json.dumps, rows)))
    code, out, err = medtune("evaluate", file, "--score", "standard")
    assert code == 0, err
    assert "intervals" in json.loads(out)["standard"]


def test_evaluate_scores_a_file_of_answers(medtune, tmp_path):
    good = write_answers(tmp_path / "good.jsonl", ["center"] * 6, ["liver"] * 6)
    code, out, _ = medtune("evaluate", good)
    scores = json.loads(out)
    assert code == 0
    assert list(scores) == ["llamafactory", "standard", "finding", "listing", "invented"]
    assert scores["finding"]["structure_exact"] == 1 and "intervals" in scores["standard"]
    _, out, _ = medtune("evaluate", good, "--score", "finding")
    assert list(json.loads(out)) == ["finding"]


def test_without_groups_there_are_scores_and_no_intervals(medtune, tmp_path):
    rows = [{"id": str(i), "answer": "a liver", "reference": "a liver"} for i in range(3)]
    # lines end at line feeds only, and blank ones are passed over
    rows[0]["answer"] = rows[0]["reference"] = "a\u2028liver"
    file = tmp_path / "answers.jsonl"
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    file.write_text(text, "utf-8")
    code, out, err = medtune("evaluate", file, "--score", "standard")
    assert code == 0, err
    assert "intervals" not in json.loads(out)["standard"]


def test_the_answers_of_a_run_are_found_by_its_name(medtune, root, monkeypatch):
    folder = root / "papermill_runs" / "small" / "out" / "05_evaluate"
    folder.mkdir(parents=True)
    write_answers(folder / "predictions_tuned.jsonl", ["center"] * 6, ["liver"] * 6)
    monkeypatch.chdir(root)
    code, out, err = medtune("evaluate", "small", "--score", "finding")
    assert code == 0, err
    assert json.loads(out)["finding"]["structure_exact"] == 1


def test_compare_shows_the_differences_of_two(medtune, tmp_path):
    good = write_answers(tmp_path / "good.jsonl", ["center"] * 6, ["liver"] * 6)
    places = ["center"] * 3 + ["upper left"] * 3
    poor = write_answers(tmp_path / "poor.jsonl", places, ["spleen"] * 6)
    code, out, _ = medtune("compare", good, poor, "--score", "finding")
    rows = {line.split("  ")[0]: line for line in out.splitlines()}
    assert code == 0
    assert " 1 " in rows["finding structure_exact"] and " 0.5 " in rows["finding place_exact"]
    part = tmp_path / "part.jsonl"
    part.write_text("".join(good.read_text().splitlines(keepends=True)[:4]))
    _, out, err = medtune("compare", part, poor, "--score", "finding")
    assert err == "", "each answer names its group"
    assert out.startswith("4 shared samples; 0 only in")
    other = tmp_path / "other.jsonl"
    other.write_text(good.read_text().replace('"id": "', '"id": "other-'))
    code, _, err = medtune("compare", good, other)
    assert code == 1 and "share no id" in err


def test_a_series_is_answered_slice_by_slice(medtune, tmp_path):
    folder = tmp_path / "series"
    report = tmp_path / "report.txt"
    out = tmp_path / "answers.jsonl"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (64, 64), (80 * number,) * 3).save(folder / f"{number}.png")
    report.write_text("There is a solid nodule in the liver.")
    code, text, err = medtune("evaluate", folder, "--model", TINY, "--report", report, "--out", out)
    assert code == 0, err
    assert len(out.read_text().splitlines()) == 3
    assert "report: There is a solid nodule" in text
    assert sum(line.startswith(("1 ", "2 ", "3 ")) for line in text.splitlines()) == 3


def test_evaluate_refuses_what_it_cannot_score(medtune, tmp_path):
    good = write_answers(tmp_path / "good.jsonl", ["center"] * 6, ["liver"] * 6)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"id": "0", "answer": "x"}\n')
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"id": "0", "answ')
    lacks = "1 of 1 lines are no answers: line 1: "
    for arguments, message in [
        (["evaluate", tmp_path / "none.jsonl"], "No such file or directory"),
        (
            ["evaluate", bad],
            f"bad.jsonl: {lacks}it has no reference: name its column, --column reference=NAME",
        ),
        (["evaluate", broken], f"broken.jsonl: {lacks}"),
        (["evaluate", good, "--score", "meteor"], "there is no score 'meteor'"),
    ]:
        code, out, err = medtune(*arguments)
        assert (code, out) == (1, "") and message in err and err.count("\n") == 1


# ---- messages name what a command has


def test_a_message_names_options_and_no_arguments_of_functions(medtune, pairs):
    """The package says `columns={...}`; a command has --column."""
    table = pairs / "captions.csv"
    table.write_text(table.read_text().replace("caption,", "words,"))
    code, _, err = medtune("convert", pairs, pairs / "out")
    assert code == 1 and "--column caption=" in err and "columns=" not in err
    (pairs / "other.csv").write_text("a,b\n1,2\n")
    (pairs / "captions.csv").rename(pairs / "words.csv")
    code, _, err = medtune("convert", pairs, pairs / "out2")
    assert code == 1 and "--captions" in err and "captions=" not in err
    code, _, err = medtune("convert", pairs, pairs / "out3", "--column", "caption")
    assert code == 1 and "OURS=THEIRS" in err and err.count("\n") == 1
    code, _, err = medtune("convert", pairs, pairs / "out3", "--column", "scanner=a")
    assert code == 1 and "'scanner' is none of our columns" in err and "group" in err
    words = ["--captions", pairs / "words.csv", "--column", "caption=words"]
    code, _, err = medtune("convert", pairs, pairs / "out3", *words, "--column", "image=Imag")
    assert code == 1 and "--column image=image" in err, "the column that is most like it"
    code, _, err = medtune("convert", pairs, pairs / "out4", "--most-rejected", 2)
    assert code == 1 and "--most-rejected" in err


def test_every_option_of_a_source_is_passed_on(medtune, pairs, tmp_path):
    """A table elsewhere, in another encoding, under other names."""
    lines = (pairs / "captions.csv").read_text().splitlines()
    lines[0] = "scan;number;impression;case"
    rows = [line.replace(",", ";").replace("noise", "Rauschen für alle") for line in lines[1:]]
    table = tmp_path / "elsewhere.csv"
    table.write_text("\n".join([lines[0], *rows]), encoding="latin-1")
    (pairs / "captions.csv").unlink()
    options = ["--captions", table, "--encoding", "latin-1", "--image-root", pairs]
    for pair in ("image=scan", "id=number", "caption=impression", "group=case"):
        options += ["--column", pair]
    code, out, err = medtune("convert", pairs, tmp_path / "out", *options)
    assert code == 0, err
    report = json.loads(out)
    assert report["split_by"] == "patient" and sum(report["records"].values()) == 12
    text = (tmp_path / "out" / "train.jsonl").read_text("utf-8")
    assert "Rauschen für alle" in text and "patient-1" not in text


# ---- answers of a converted folder


@pytest.fixture
def converted(medtune, pairs, tmp_path_factory) -> Path:
    """Twelve pairs of four patients as records, in three splits."""
    folder = tmp_path_factory.mktemp("records") / "out"
    assert medtune("convert", pairs, folder)[0] == 0
    return folder


def test_a_converted_folder_is_answered_and_scored(medtune, converted, tmp_path):
    out = tmp_path / "answers.jsonl"
    options = ["--model", TINY, "--max-new-tokens", 4, "--out", out]
    code, printed, err = medtune("evaluate", converted, *options)
    assert code == 0, err
    assert list(json.loads(printed)) == [
        "llamafactory",
        "standard",
        "finding",
        "listing",
        "invented",
    ]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    test = [json.loads(line) for line in (converted / "test.jsonl").read_text().splitlines()]
    assert {row["id"]: row["group"] for row in rows} == {
        record["id"]: record["group"] for record in test
    }
    code, _, err = medtune("evaluate", converted, "--split", "nowhere", *options)
    assert code == 1 and "--split" in err and "train" in err


def test_prefer_makes_pairs_of_answers_to_converted_records(medtune, converted, tmp_path):
    from medtune.records import read_records
    from medtune.rewards import read_preferences

    said = tmp_path / "said.csv"
    finding = "Within it lies a cyst."
    lines = [f"{name},It shows the liver. {finding}" for name in read_records(converted)["id"]]
    said.write_text("\n".join(["id,predict", *lines]))
    code, out, err = medtune("prefer", converted, said, "--kind", "own")
    assert code == 0, err
    pairs = read_preferences(converted)
    assert f"{len(pairs)} pairs: {converted}/preferences/train.jsonl" in out
    for row in pairs:
        assert finding in row["rejected"][0]["content"][0]["text"]
        assert finding not in row["chosen"][0]["content"][0]["text"]
    for arguments, message in (
        ([converted, said, "--kind", "wrong"], "'wrong'"),
        ([converted, said, "--split", "test"], "no reference for id"),
        ([tmp_path, said], "medtune convert"),
    ):
        code, _, err = medtune("prefer", *arguments)
        last = err.strip().splitlines()[-1]
        assert code == 1 and last.startswith("medtune: ") and message in last


def test_without_a_model_the_adapters_base_answers(medtune, converted, small_adapter, tmp_path):
    out = tmp_path / "answers.jsonl"
    options = ["--adapter", small_adapter, "--max-new-tokens", 4, "--out", out]
    code, _, err = medtune("evaluate", converted, "--split", "validation", *options)
    assert code == 0, err
    code, _, err = medtune("evaluate", converted, "--adapter", "nowhere", "--out", out)
    assert code == 1 and "nowhere" in err.splitlines()[-1]


def test_without_groups_it_is_said_why_there_are_no_intervals(medtune, tmp_path):
    rows = [{"id": str(i), "answer": "a liver", "reference": "a liver"} for i in range(3)]
    file = tmp_path / "answers.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    code, _, err = medtune("evaluate", file, "--score", "standard")
    assert code == 0 and "no intervals" in err and "--column group=NAME" in err


def test_compare_warns_of_answers_without_a_group(medtune, tmp_path):
    file = write_answers(tmp_path / "a.jsonl", ["center"] * 6, ["liver"] * 6)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows[:2]:
        del row["group"]
    file.write_text("\n".join(map(json.dumps, rows)))
    code, _, err = medtune("compare", file, file, "--score", "finding")
    assert code == 0 and "2 samples name no group" in err


# ---- what is not known is said


def test_convert_and_audit_warn_where_no_patient_is_known(medtune, pairs, tmp_path):
    table = pairs / "captions.csv"
    table.write_text(table.read_text().replace(",patient", ",ward", 1))
    code, out, err = medtune("convert", pairs, tmp_path / "out")
    assert code == 0 and json.loads(out)["records"] == {"train": 12}
    assert "neither patients nor a split are known" in err and "--column group=NAME" in err
    assert "warning: no patients are known" in medtune("audit", pairs)[2]
    # our word for the patient is group, and people say patient
    code, out, err = medtune("convert", pairs, tmp_path / "dealt", "--column", "patient=ward")
    assert code == 0 and json.loads(out)["split_by"] == "patient" and "warning" not in err


def test_a_row_without_a_patient_gets_no_split(medtune, pairs, tmp_path):
    """Its patient may be one of the others: audit and convert say the same of it."""
    table = pairs / "captions.csv"
    table.write_text(table.read_text().replace("patient-3", "", 1))
    splits = tmp_path / "splits.csv"
    code, _, err = medtune("audit", pairs, "--write", splits)
    assert "1 rows name no patient (first: row 3, id id-3)" in err
    assert "id-3,," in splits.read_text()
    for number, options in enumerate([["--splits", splits], []]):
        out = tmp_path / str(number)
        code, printed, err = medtune("convert", pairs, out, *options)
        assert code == 0, err
        report = json.loads(printed)
        assert report["rejected"] == 1 and sum(report["records"].values()) == 11
        assert "id-3" in (out / "rejected.jsonl").read_text()


def test_ids_says_which_file_an_id_stands_for(medtune, pairs):
    table = pairs / "captions.csv"
    table.write_text(table.read_text().replace("image,id,", "image,number,", 1))
    code, out, _ = medtune("ids", pairs)
    lines = out.splitlines()
    assert code == 0 and len(lines) == 13
    name, row, file = lines[4].split()
    assert name.startswith("image-") and row == "3" and file.endswith("3.png")
    code, out, _ = medtune("ids", pairs, "--only", name)
    assert code == 0 and len(out.splitlines()) == 2
    assert medtune("ids", pairs, "--only", "nobody")[0] == 1


def test_a_part_of_the_records_is_answered(medtune, converted, tmp_path):
    out = tmp_path / "answers.jsonl"
    options = ["--model", TINY, "--max-new-tokens", 2, "--out", out, "--limit", 2]
    code, _, err = medtune("evaluate", converted, "--split", "train", *options)
    assert code == 0, err
    assert len(out.read_text().splitlines()) == 2
