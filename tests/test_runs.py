"""Runs over tiny notebooks that are written here: parameters are checked, work is kept, failures leave one line."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import nbformat
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from medtune import runs

WRITE = """import json, pathlib
out = pathlib.Path(run_dir) / NAME
out.mkdir(parents=True, exist_ok=True)
with (out / "starts.txt").open("a") as file:
    file.write("x")
"""
SUMMARY = '(out / "summary.json").write_text(json.dumps({"results": {"loss": learning_rate * steps}, "data": data}))'
PARAMETERS = """data: str = "sample"  # where the pairs come from
learning_rate: float = 1e-3  # step size
steps: int = 10
method: Literal["lora", "qlora"] = "lora"  # how
layers: list[int] = [1, 2]
adapter: str | None = None
run_dir: str = "../papermill_runs/small/out"  # where the run lies
"""


def write_notebook(root: Path, name: str, *, parameters: str = PARAMETERS, body: str = "", end: str = SUMMARY) -> Path:
    """A notebook with a parameters cell, which notes each start in its folder and writes a summary."""
    cells = [
        nbformat.v4.new_code_cell("from typing import Literal"),
        nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(WRITE.replace("NAME", repr(name))),
        nbformat.v4.new_code_cell(body),
        nbformat.v4.new_code_cell(end),
    ]
    path = root / "notebooks" / f"{name}.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def write_params(root: Path, text: str, name: str = "small") -> Path:
    path = root / "papermill_runs" / name / "params.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    return path


def starts(root: Path, notebook: str, run: str = "small") -> int:
    """How often a notebook began since its folder was last made new."""
    file = root / "papermill_runs" / run / "out" / notebook / "starts.txt"
    return len(file.read_text()) if file.exists() else 0


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository of two notebooks and the run 'small'."""
    (tmp_path / "notebooks").mkdir()
    write_notebook(tmp_path, "01_look")
    write_notebook(tmp_path, "02_train")
    write_params(tmp_path, "notebooks: [01_look, 02_train]\nshared:\n  steps: 5\n02_train:\n  learning_rate: 2e-4\n")
    return tmp_path


def test_parameters_are_read_without_running(root):
    declared = runs.declared_parameters(root / "notebooks" / "01_look.ipynb")
    assert list(declared) == ["data", "learning_rate", "steps", "method", "layers", "adapter", "run_dir"]
    assert declared["learning_rate"] == runs.Parameter("float", float, 1e-3, "step size")
    assert declared["layers"].type == list[int] and declared["adapter"].default is None
    assert declared["steps"].help == ""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("lr: float = 1 / 1000", "must read 'name: type = literal'"),
        ("import os", "must read 'name: type = literal'"),
        ("lr: Path = 'x'", "must read 'name: type = literal'"),
        ("lr: __import__('os') = 1", "must read 'name: type = literal'"),
        ("lr: int = 1.5", "lr must be int"),
        ("lr: float =", "does not parse"),
    ],
)
def test_a_parameters_cell_holds_typed_literals_only(root, line, message):
    path = write_notebook(root, "03_odd", parameters=line)
    with pytest.raises(ValueError, match=re.escape(message)):
        runs.declared_parameters(path)


def test_a_notebook_without_a_parameters_cell_is_refused(root):
    path = write_notebook(root, "03_odd")
    path.write_text(path.read_text().replace('"parameters"', '"other"'))
    with pytest.raises(ValueError, match="0 cells are tagged 'parameters'"):
        runs.declared_parameters(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="is not a notebook"):
        runs.declared_parameters(path)


def test_own_section_over_shared_over_default(root):
    params = runs.read_params("small", root=root)
    assert list(params) == ["01_look", "02_train"]
    assert params["01_look"]["steps"] == params["02_train"]["steps"] == 5
    assert params["01_look"]["learning_rate"] == 1e-3
    assert params["02_train"]["learning_rate"] == 2e-4  # YAML alone reads 2e-4 as a text
    assert params["02_train"]["run_dir"] == "../papermill_runs/small/out"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("shared: {steps: 5, rank: 3}", "shared has no parameter 'rank'"),
        ("02_train: {learning_rat: 0.1}", "02_train has no parameter 'learning_rat': did you mean 'learning_rate'?"),
        ("02_train: {steps: five}", "02_train.steps must be int, not 'five' (str)"),
        ("02_train: {steps: 1e3}", "02_train.steps must be int, not '1e3' (str)"),
        ("02_train: {steps: 2.0}", "02_train.steps must be int, not 2.0 (float)"),
        ("02_train: {steps: true}", "02_train.steps must be int, not True (bool)"),
        ("02_train: {learning_rate: fast}", "02_train.learning_rate must be float, not 'fast' (str)"),
        ("02_train: {learning_rate: true}", "02_train.learning_rate must be float, not True (bool)"),
        ("02_train: {data: 5}", "02_train.data must be str, not 5 (int)"),
        ("02_train: {data: null}", "02_train.data must be str, not None (NoneType)"),
        ("02_train: {method: full}", "02_train.method must be Literal['lora', 'qlora'], not 'full' (str)"),
        ("02_train: {layers: [1, b]}", "02_train.layers must be list[int], not [1, 'b'] (list)"),
        ("02_train: {run_dir: /tmp}", "run_dir follows from the run's name"),
        ("02_train: [1]", "02_train must map names to values"),
        ("03_more: {steps: 1}", "unknown section '03_more'"),
        ("02_train: {steps: [}", "does not parse"),
        ("notebooks: []", "needs a list 'notebooks'"),
        ("notebooks: [../secret]", "is not '../secret'"),
    ],
)
def test_a_wrong_parameter_file_is_one_line_and_nothing_is_written(root, text, message):
    write_params(root, text if text.startswith("notebooks") else f"notebooks: [01_look, 02_train]\n{text}\n")
    with pytest.raises(ValueError) as error:
        runs.run("small", root=root)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert "papermill_runs/small/params.yaml" in str(error.value) or "secret" in text
    assert os.listdir(root / "papermill_runs" / "small") == ["params.yaml"]


def test_a_missing_run_or_notebook_is_named(root):
    with pytest.raises(FileNotFoundError, match="the runs here: small"):
        runs.read_params("large", root=root)
    for name in ("../small", ".hidden", "a/b", ""):
        with pytest.raises(ValueError, match="letters, digits"):
            runs.read_params(name, root=root)
    write_params(root, "notebooks: [09_none]")
    with pytest.raises(FileNotFoundError, match="09_none.ipynb"):
        runs.read_params("small", root=root)
    with pytest.raises(FileNotFoundError, match="start in a clone"):
        runs.find_root(root / "notebooks")


def test_the_root_is_found_from_below(root, monkeypatch):
    monkeypatch.chdir(root / "papermill_runs" / "small")
    assert runs.find_root() == root.resolve()


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_in_any_notation_arrives_exactly(number):
    parameter = runs.Parameter("float", float, 0.0, "")
    for text in (repr(number), f"{number:e}", f"{number:.17E}"):
        loaded = yaml.safe_load(text)
        assert runs._check(loaded, parameter, "here") == float(text)


def overridden(root: Path, overrides: dict, name: str = "new") -> dict:
    """The resolved parameters of a copy, without executing it."""
    runs._copy("small", name, overrides, root)
    return runs.read_params(name, root=root)


def test_an_override_goes_to_every_notebook_that_declares_it(root):
    params = overridden(root, {"steps": "7", "02.learning_rate": "5e-5", "data": "123"})
    assert params["01_look"]["steps"] == params["02_train"]["steps"] == 7
    assert (params["01_look"]["learning_rate"], params["02_train"]["learning_rate"]) == (1e-3, 5e-5)
    assert params["01_look"]["data"] == "123"  # a text stays a text
    assert runs.read_params("small", root=root)["01_look"]["steps"] == 5
    written = yaml.safe_load((root / "papermill_runs" / "new" / "params.yaml").read_text())
    assert written["shared"] == {"steps": 7, "data": "123"} and written["02_train"] == {"learning_rate": 5e-5}


def test_override_values_follow_the_declared_type(root):
    overrides = {"adapter": "null", "layers": "[3, 4]", "method": "qlora", "data": "no", "steps": 3}
    values = overridden(root, overrides)["02_train"]
    assert [values[key] for key in overrides] == [None, [3, 4], "qlora", "no", 3]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"rank": "4"}, "--set rank: small has no parameter 'rank'"),
        ({"step": "4"}, "did you mean 'steps'?"),
        ({"02_train.rank": "4"}, "02_train has no parameter 'rank'"),
        ({"09.steps": "4"}, "'09' begins 0 of the notebooks 01_look, 02_train"),
        ({"0.steps": "4"}, "'0' begins 2 of the notebooks 01_look, 02_train"),
        ({"steps": "many"}, "--set steps must be int, not 'many' (str)"),
        ({"learning_rate": "0.1"}, "say which one, 01_look.learning_rate or 02_train.learning_rate"),
        ({"run_dir": "x"}, "run_dir follows from the run's name"),
        ({"data": "../nowhere.parquet"}, "--set data: there is no ../nowhere.parquet"),
    ],
)
def test_a_wrong_override_leaves_no_run_behind(root, overrides, message):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        runs.run("small", overrides=overrides, new_name="new", root=root)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert os.listdir(root / "papermill_runs") == ["small"]


def test_a_path_is_taken_from_the_current_folder(root, monkeypatch):
    (root / "mine").mkdir()
    (root / "mine" / "a.parquet").write_text("x")
    monkeypatch.chdir(root / "mine")
    assert overridden(root, {"data": "a.parquet"}, "one")["01_look"]["data"] == "../mine/a.parquet"
    assert overridden(root, {"data": "../mine"}, "two")["01_look"]["data"] == "../mine"
    assert overridden(root, {"data": "org/name"}, "three")["01_look"]["data"] == "org/name"  # a hub id
    absolute = str(root / "mine" / "a.parquet")
    assert overridden(root, {"data": absolute}, "four")["01_look"]["data"] == absolute
    (root / "mine" / "sample").mkdir()
    assert overridden(root, {"data": "sample"}, "five")["01_look"]["data"] == "sample"  # the built-in name wins


def test_overrides_need_a_name_and_a_name_is_not_used_twice(root):
    with pytest.raises(ValueError, match="--name"):
        runs.run("small", overrides={"steps": "7"}, root=root)
    with pytest.raises(ValueError, match="letters, digits"):
        runs.run("small", overrides={"steps": "7"}, new_name="../x", root=root)
    overridden(root, {"steps": "7"})
    overridden(root, {"steps": "7"})  # the same again is the same run
    for name in ("new", "small"):
        with pytest.raises(ValueError, match="exists with other parameters"):
            overridden(root, {"steps": "8"}, name)


def test_a_run_executes_then_keeps_then_starts_again_where_something_changed(root, capsys):
    summary = runs.run("small", root=root)
    out = root / "papermill_runs" / "small" / "out"
    assert summary["notebooks"]["02_train"]["results"] == {"loss": 2e-4 * 5}
    assert json.loads((out / "summary.json").read_text()) == summary
    executed = nbformat.read(out / "02_train.ipynb", 4)
    assert "learning_rate = 0.0002" in executed.cells[2].source and "layers" not in executed.cells[2].source
    assert executed.cells[3].execution_count and str(root) not in (out / "02_train.ipynb").read_text()
    assert "sample" not in (root / "notebooks" / "02_train.ipynb").read_text().split("outputs")[0]  # sources untouched

    assert runs.run("small", root=root) == summary
    assert "02_train (2/2): finished before and unchanged" in capsys.readouterr().out
    assert (starts(root, "01_look"), starts(root, "02_train")) == (1, 1)

    write_notebook(root, "02_train", body="print('new')")  # the second notebook changes: only it runs
    runs.run("small", root=root)
    state = json.loads((out / "state.json").read_text())
    first = state["01_look"]["fingerprint"]
    assert (starts(root, "01_look"), starts(root, "02_train")) == (1, 1)
    assert "new" in (out / "02_train.ipynb").read_text()

    write_params(root, "notebooks: [01_look, 02_train]\nshared: {steps: 6}")  # both change
    assert [step.finished for step in runs._plan("small", root)] == [False, False]
    assert runs._plan("small", root)[0].fingerprint != first


def test_a_change_of_code_version_or_data_is_seen(root, monkeypatch):
    before = [step.fingerprint for step in runs._plan("small", root)]
    assert before == [step.fingerprint for step in runs._plan("small", root)]
    monkeypatch.setattr(runs.metadata, "version", lambda name: "0")
    assert before[0] != runs._plan("small", root)[0].fingerprint
    monkeypatch.undo()
    (root / "data").mkdir()
    (root / "data" / "build_sample.py").write_text("1")
    with_sample = [step.fingerprint for step in runs._plan("small", root)]
    (root / "data" / "build_sample.py").write_text("2")
    assert len({before[0], with_sample[0], runs._plan("small", root)[0].fingerprint}) == 3
    write_params(root, "notebooks: [01_look, 02_train]\n02_train: {adapter: ../data}")
    last = [step.fingerprint for step in runs._plan("small", root)]
    (root / "data" / "more.txt").write_text("2")
    now = [step.fingerprint for step in runs._plan("small", root)]
    assert last[0] == now[0] and last[1] != now[1]
    monkeypatch.setattr(runs, "__file__", str(root / "data" / "runs.py"))  # another package source
    assert now[0] != runs._plan("small", root)[0].fingerprint


def test_a_failure_is_one_line_and_the_next_start_continues(root, capsys):
    bad = "raise KeyError(f'no such\\nthing')"
    write_notebook(root, "02_train", body=bad)
    with pytest.raises(ValueError) as error:
        runs.run("small", root=root)
    failed = "papermill_runs/small/out/02_train.failed.ipynb"
    assert re.search(r"02_train failed in cell \[5\]: KeyError: .*thing", str(error.value))
    assert str(error.value).endswith(failed) and "\n" not in str(error.value)
    out = root / "papermill_runs" / "small" / "out"
    assert "no such" in (root / failed).read_text()
    assert not (out / "02_train.ipynb").exists() and not (out / "summary.json").exists()
    assert runs.list_runs(root)[0]["finished"] == "1 of 2" and "KeyError" in runs.list_runs(root)[0]["note"]

    write_notebook(root, "02_train")
    runs.run("small", root=root)
    assert starts(root, "01_look") == 1 and not (root / failed).exists()
    assert runs.list_runs(root)[0] | {"minutes": ""} == {
        "run": "small",
        "finished": "2 of 2",
        "minutes": "",
        "note": "",
    }


def test_an_interrupted_notebook_finds_its_files_again(root):
    write_notebook(root, "02_train", body="if len((out / 'starts.txt').read_text()) < 2: raise RuntimeError('once')")
    with pytest.raises(ValueError, match="RuntimeError: once"):
        runs.run("small", root=root)
    runs.run("small", root=root)  # nothing changed, so what it left (a checkpoint, say) is still there
    assert starts(root, "02_train") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"end": ""}, "wrote no summary.json that can be read"),
        ({"end": "(out / 'summary.json').write_text('{')"}, "wrote no summary.json that can be read"),
        ({"body": "import os; os._exit(1)"}, "lost its Python process"),
        ({"body": "raise OSError(28, 'No space left on device')"}, r"OSError: \[Errno 28\] No space left on device"),
    ],
)
def test_a_notebook_that_ends_badly_has_failed(root, options, message):
    write_notebook(root, "01_look", **options)
    with pytest.raises(ValueError, match=message):
        runs.run("small", root=root)
    assert not runs._plan("small", root)[0].finished
    assert (root / "papermill_runs/small/out/01_look.failed.ipynb").exists()


def test_two_runs_of_one_folder_are_refused(root):
    out = root / "papermill_runs" / "small" / "out"
    out.mkdir()
    with filelock.FileLock(out / ".lock"), pytest.raises(ValueError, match="is already in progress"):
        runs.run("small", root=root)


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_finished(root):
    write_notebook(root, "02_train", body="import time; time.sleep(200)")
    code = f"from medtune import runs; runs.run('small', root={str(root)!r})"
    # a shell's background job ignores Ctrl-C, and what it starts inherits that
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE}
    listen = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    process = subprocess.Popen([sys.executable, "-c", code], **pipes, **listen)
    while not starts(root, "02_train"):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert [step.finished for step in runs._plan("small", root)] == [True, False]
    assert "stopped" in runs.list_runs(root)[0]["note"]


def test_a_full_disk_leaves_the_old_file(root, monkeypatch):
    target = root / "summary.json"
    target.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        runs._write(target, "new")
    assert target.read_text() == "old" and sorted(os.listdir(root)) == ["notebooks", "papermill_runs", "summary.json"]


def test_a_reference_is_small_and_names_no_machine(root):
    with pytest.raises(ValueError, match="no finished 01_look"):
        runs.write_reference("small", root=root)
    write_notebook(root, "02_train", body="import os; print(os.path.abspath('x'))")
    runs.run("small", root=root)
    with pytest.raises(ValueError, match="use smaller figures"):
        runs.write_reference("small", root=root, max_mb=0.001)
    assert not (root / "papermill_runs" / "reference").exists()
    target = runs.write_reference("small", root=root)
    assert sorted(os.listdir(target)) == ["01_look.ipynb", "02_train.ipynb", "summary.json"]
    assert str(root) not in (target / "02_train.ipynb").read_text()
    assert [row["run"] for row in runs.list_runs(root)] == ["small"]


def test_a_reference_hands_no_patient_pictures_on(root):
    draw = 'from IPython.display import display\ndisplay({"image/" + "png": "aGk=", "text/plain": "figure"}, raw=True)'
    path = write_notebook(root, "01_look", body=draw)
    notebook = nbformat.read(path, 4)
    next(cell for cell in notebook.cells if cell.source == draw).metadata["tags"] = ["shows-pictures"]
    nbformat.write(notebook, path)
    runs.run("small", root=root)
    executed = root / "papermill_runs" / "small" / "out" / "01_look.ipynb"
    assert "image/png" in executed.read_text()
    kept = (runs.write_reference("small", root=root) / "01_look.ipynb").read_text()
    nbformat.validate(nbformat.reads(kept, 4))
    assert "image/png" not in kept and "run the notebook to see it" in kept
