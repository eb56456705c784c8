"""Executing runs of tiny notebooks: work is kept, changes are seen, failures leave one line."""

# ruff: noqa: F811 (the fixture root comes from small_runs)

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
from small_runs import root, starts, write_notebook, write_params  # noqa: F401

from medtune import files, runs
from medtune.runs import execute
from medtune.runs.execute import plan_steps


def fingerprints(root: Path) -> list[str]:
    """The digests of what the two notebooks of the run 'small' depend on."""
    return [step.fingerprint for step in plan_steps("small", root)]


def finished(root: Path) -> list[bool]:
    return [step.finished for step in plan_steps("small", root)]


def test_a_run_executes_then_keeps_then_starts_again_where_something_changed(root, capsys):
    summary = runs.run("small", root=root)
    out = root / "papermill_runs" / "small" / "out"
    assert summary["notebooks"]["02_train"]["results"] == {"loss": 2e-4 * 5}
    assert json.loads((out / "summary.json").read_text()) == summary
    executed = nbformat.read(out / "02_train.ipynb", 4)
    injected = executed.cells[2].source
    assert "learning_rate = 0.0002" in injected and "layers" not in injected
    assert executed.cells[3].execution_count
    assert str(root) not in (out / "02_train.ipynb").read_text()
    source = (root / "notebooks" / "02_train.ipynb").read_text()
    assert "sample" not in source.split("outputs")[0], "sources are not touched"

    assert runs.run("small", root=root) == summary
    assert "02_train (2/2): finished before and unchanged" in capsys.readouterr().out
    assert (starts(root, "01_look"), starts(root, "02_train")) == (1, 1)

    # the second notebook changes: only it runs
    write_notebook(root, "02_train", body="print('new')")
    runs.run("small", root=root)
    state = json.loads((out / "state.json").read_text())
    assert (starts(root, "01_look"), starts(root, "02_train")) == (1, 1)
    assert "new" in (out / "02_train.ipynb").read_text()

    # both change
    write_params(root, "notebooks: [01_look, 02_train]\nshared: {steps: 6}")
    assert finished(root) == [False, False]
    assert fingerprints(root)[0] != state["01_look"]["fingerprint"]


def test_a_change_of_versions_is_seen(root, monkeypatch):
    before = fingerprints(root)
    assert before == fingerprints(root)
    monkeypatch.setattr(execute.metadata, "version", lambda name: "0")
    assert before[0] != fingerprints(root)[0]


def test_a_change_of_data_is_seen(root):
    without_sample = fingerprints(root)
    (root / "data").mkdir()
    (root / "data" / "build_sample.py").write_text("1")
    with_sample = fingerprints(root)
    (root / "data" / "build_sample.py").write_text("2")
    changed = fingerprints(root)
    assert len({without_sample[0], with_sample[0], changed[0]}) == 3
    # a folder that the second notebook's parameter names
    write_params(root, "notebooks: [01_look, 02_train]\n02_train: {adapter: ../data}")
    before = fingerprints(root)
    (root / "data" / "more.txt").write_text("2")
    after = fingerprints(root)
    assert before[0] == after[0] and before[1] != after[1]


def test_a_change_of_the_package_is_seen(root, tmp_path, monkeypatch):
    before = fingerprints(root)[0]
    package = tmp_path / "package"
    (package / "room").mkdir(parents=True)
    monkeypatch.setattr(execute, "PACKAGE", package)
    seen = {before, fingerprints(root)[0]}
    for name in ("top.py", "room/inner.py", "room/data.json", "room/terms.toml", "room/page.css"):
        (package / name).write_text("1")
        first = fingerprints(root)[0]
        (package / name).write_text("2")
        second = fingerprints(root)[0]
        assert not seen & {first, second} and first != second, name
        seen |= {first, second}
    # the same file elsewhere is another package
    (package / "room" / "inner.py").rename(package / "inner.py")
    assert fingerprints(root)[0] not in seen
    (package / "room" / "inner.pyc").write_text("what Python compiles is no change")
    assert fingerprints(root)[0] == fingerprints(root)[0] != before


def test_the_package_that_runs_is_fingerprinted_with_its_rooms():
    names = {file.relative_to(execute.PACKAGE).as_posix() for file in execute.package_files()}
    assert {"__init__.py", "cli/__init__.py", "runs/execute.py"} <= names


def test_of_a_long_failure_both_ends_are_told(root):
    """A launcher says at the end what its ranks died of."""
    bad = "raise RuntimeError('the command failed: ' + 'traceback ' * 300 + 'rank 1: SIGABRT')"
    write_notebook(root, "02_train", body=bad)
    with pytest.raises(
        ValueError, match=r"the command failed: trace.* \[…\] .*rank 1: SIGABRT; exec"
    ):
        runs.run("small", root=root)


def test_a_failure_is_one_line_and_the_next_start_continues(root):
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
    (row,) = runs.list_runs(root)
    assert row["finished"] == "1 of 2" and "KeyError" in row["note"]

    write_notebook(root, "02_train")
    runs.run("small", root=root)
    assert starts(root, "01_look") == 1 and not (root / failed).exists()
    (row,) = runs.list_runs(root)
    assert float(row.pop("minutes")) >= 0
    assert row == {"run": "small", "finished": "2 of 2", "note": ""}


def test_a_run_that_cannot_be_read_is_listed_with_its_mistake(root):
    write_params(root, "notebooks: [01_look]\nshared: {rank: 1}", "wrong")
    listed = {row["run"]: row for row in runs.list_runs(root)}
    assert listed["wrong"]["finished"] == "" and "no parameter 'rank'" in listed["wrong"]["note"]
    assert listed["small"]["finished"] == "0 of 2"


def test_an_interrupted_notebook_finds_its_files_again(root):
    once = "if len((out / 'starts.txt').read_text()) < 2: raise RuntimeError('once')"
    write_notebook(root, "02_train", body=once)
    with pytest.raises(ValueError, match="RuntimeError: once"):
        runs.run("small", root=root)
    # nothing changed, so what it left (a checkpoint, say) is still there
    runs.run("small", root=root)
    assert starts(root, "02_train") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"end": ""}, "wrote no summary.json that can be read"),
        ({"end": "(out / 'summary.json').write_text('{')"}, "no summary.json that can be read"),
        ({"body": "import os; os._exit(1)"}, "lost its Python process"),
        (
            {"body": "raise OSError(28, 'No space left on device')"},
            r"OSError: \[Errno 28\] No space left on device",
        ),
    ],
)
def test_a_notebook_that_ends_badly_has_failed(root, options, message):
    write_notebook(root, "01_look", **options)
    with pytest.raises(ValueError, match=message):
        runs.run("small", root=root)
    assert finished(root) == [False, False]
    assert (root / "papermill_runs/small/out/01_look.failed.ipynb").exists()


def test_an_error_that_is_no_unicode_is_remembered(root):
    """Python shows the bytes of a file name that is not UTF-8 as lone surrogates."""

    def fail(*_):
        raise ValueError("no such file: \udcff.png")

    (root / "papermill_runs" / "small" / "out").mkdir()
    with pytest.raises(ValueError, match="no such file"):
        execute.execute_all("small", root, fail)
    assert runs.list_runs(root)[0]["note"] == "no such file: \udcff.png"


def test_two_runs_of_one_folder_are_refused(root):
    out = root / "papermill_runs" / "small" / "out"
    out.mkdir()
    with (
        filelock.FileLock(out / ".lock"),
        pytest.raises(ValueError, match="is already in progress"),
    ):
        runs.run("small", root=root)


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_finished(root):
    write_notebook(root, "02_train", body="import time; time.sleep(200)")
    code = f"from medtune import runs; runs.run('small', root={str(root)!r})"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # a shell's background job ignores Ctrl-C, and what it starts inherits that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not starts(root, "02_train"):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert finished(root) == [True, False]
    assert "stopped" in runs.list_runs(root)[0]["note"]


def test_a_full_disk_leaves_the_old_file(root, monkeypatch):
    target = root / "summary.json"
    target.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_whole(target, "new")
    assert target.read_text() == "old"
    assert sorted(os.listdir(root)) == ["notebooks", "papermill_runs", "summary.json"]
