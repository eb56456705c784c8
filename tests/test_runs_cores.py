"""A run tells what came out, stops where it is told to, minds busy cores and slow notebooks."""

# ruff: noqa: F811 (the fixture root comes from small_runs)

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from small_runs import root, starts, write_notebook, write_params  # noqa: F401

from medtune import runs
from medtune.runs.cores import VARIABLE, Cores, choose_threads, look_at_cores
from medtune.runs.usual import usual_minutes, warn_if_slow

BURN = "while True: pass"


@pytest.fixture
def free_threads(monkeypatch) -> None:
    """The number of threads is not set, and is as before at the end."""
    # set and deleted: so that monkeypatch knows the variable
    monkeypatch.setenv(VARIABLE, "1")
    monkeypatch.delenv(VARIABLE)


# ---- cores


@pytest.mark.parametrize(
    ("cores", "threads", "says"),
    [
        (Cores(2, 2, 2), None, "all of 2 cores free: 2 threads"),
        (Cores(1, 1, 1), None, "all of 1 core free: 1 thread"),
        (Cores(2, 2, 1), "1", "1 of 2 cores is free: 1 thread"),
        (Cores(64, 4, 4), "4", "the time of 4"),
        (Cores(16, 16, 9), "9", "9 of 16 cores are free: 9 threads"),
    ],
)
def test_as_many_threads_as_cores_are_free(free_threads, cores, threads, says):
    assert says in choose_threads(cores)
    assert os.environ.get(VARIABLE) == threads


def test_what_the_user_has_set_stays(monkeypatch):
    monkeypatch.setenv(VARIABLE, "7")
    assert f"{VARIABLE}=7" in choose_threads(Cores(8, 8, 2))
    assert os.environ[VARIABLE] == "7"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_affinity_counts():
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    code += "from medtune.runs.cores import look_at_cores; print(look_at_cores(0.05))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "Cores(visible=1, allowed=1, free=1)"


def test_a_busy_core_is_not_free():
    """As many processes as there are cores take all of them; one core is always left to us."""
    burning = [subprocess.Popen([sys.executable, "-c", BURN]) for _ in range(psutil.cpu_count())]
    try:
        # the system needs a moment to spread them
        deadline = time.monotonic() + 20
        while look_at_cores(0.5).free > 1 and time.monotonic() < deadline:
            pass
        cores = look_at_cores(1.0)
    finally:
        for process in burning:
            process.kill()
            process.wait()
    assert cores.free <= max(1, cores.visible // 2)
    assert cores.allowed >= cores.free


# ---- a result as each notebook ends, and an end before the last


def test_a_run_tells_results_as_it_goes(root, capsys):
    runs.run("small", root=root)
    captured = capsys.readouterr()
    # what is piped on is the table alone
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert re.search(r"thread", lines[0])
    # the bar of progress writes into lines, too
    told = [line for line in lines if re.match(r"0\w+ \(\d/\d\): ", line) and "%|" not in line]
    assert told == ["01_look (1/2): loss 0.005", "02_train (2/2): loss 0.001"]


def test_a_run_ends_where_it_is_told_to_and_goes_on_later(root):
    write_notebook(root, "03_more")
    write_params(root, "notebooks: [01_look, 02_train, 03_more]")
    out = root / "papermill_runs" / "small" / "out"
    summary = runs.run("small", until="02", root=root)
    assert list(summary["notebooks"]) == list(summary["timing"]) == ["01_look", "02_train"]
    assert json.loads((out / "summary.json").read_text()) == summary
    assert not (out / "03_more").exists()
    with pytest.raises(ValueError, match="no finished 03_more"):
        runs.write_reference("small", root=root)
    # what is finished is kept, and the rest follows
    whole = runs.run("small", root=root)
    assert list(whole["notebooks"]) == ["01_look", "02_train", "03_more"]
    assert [starts(root, name) for name in ("01_look", "02_train", "03_more")] == [1, 1, 1]
    # told to end early again, it forgets nothing
    assert list(runs.run("small", until="01_look", root=root)["notebooks"]) == list(
        whole["notebooks"]
    )


def test_what_is_left_out_can_still_resume(root):
    write_notebook(root, "02_train", body="raise RuntimeError('stop')")
    with pytest.raises(ValueError, match="stop"):
        runs.run("small", root=root)
    runs.run("small", until="01", root=root)
    with pytest.raises(ValueError, match="stop"):
        runs.run("small", root=root)
    # its folder was kept: it has begun twice in it
    assert starts(root, "02_train") == 2


@pytest.mark.parametrize(
    ("until", "found"), [("0", "several notebooks begin"), ("07", "no notebook of the run begins")]
)
def test_an_end_that_is_no_notebook_is_refused(root, until, found):
    with pytest.raises(ValueError, match=f"until='{until}': {found} with it; take one of 01"):
        runs.run("small", until=until, root=root)
    assert not (root / "papermill_runs" / "small" / "out").exists()


def test_the_command_names_its_own_option(root):
    command = [Path(sys.executable).with_name("medtune"), "run", "small", "--until", "07"]
    done = subprocess.run([*command, "--root", str(root)], capture_output=True, text=True)
    assert done.returncode == 1 and "--until" in done.stderr and "Traceback" not in done.stderr


# ---- slow notebooks


def keep_reference(root, minutes: float) -> None:
    folder = root / "papermill_runs" / "reference" / "small"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"timing": {"01_look": minutes}}))


def test_a_notebook_that_takes_far_longer_than_usual_is_named(root, capsys):
    keep_reference(root, 1e-4)
    runs.run("small", root=root)
    said = capsys.readouterr().err
    assert said.count("01_look has taken 5 times") == 1
    assert "OMP_NUM_THREADS=1" in said and "02_train has" not in said


def test_a_notebook_in_its_usual_time_is_not(root, capsys):
    keep_reference(root, 60)
    runs.run("small", root=root)
    assert "5 times" not in capsys.readouterr().err


def test_a_warning_does_not_come_after_the_end(capsys):
    with pytest.raises(KeyError), warn_if_slow("01_look", 0.2 / 300):
        raise KeyError
    time.sleep(0.4)
    assert capsys.readouterr().err == ""


def test_a_reference_that_cannot_be_read_warns_of_nothing(root):
    keep_reference(root, 1)
    assert usual_minutes("small", root) == {"01_look": 1}
    (root / "papermill_runs" / "reference" / "small" / "summary.json").write_text("{")
    assert usual_minutes("small", root) == {}
