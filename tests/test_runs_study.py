"""Studies: levels become runs, Optuna keeps the queue, what is finished is kept."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import optuna
import pandas as pd
import pytest
import yaml

from medtune import runs
from medtune.pairs import load_pairs
from medtune.records import convert_pairs
from medtune.runs.study import read_study, run_study

PARAMETERS = {
    "02_convert_data": ["limit: int = 0"],
    "03_finetune_lora": [
        "lora_r: int = 16",
        "learning_rate: float = 1e-3",
        "target: str = 'all'",
        "seed: int = 0",
    ],
    "05_evaluate": ["samples: int = 4", "seed: int = 0"],
}
BODY = {
    "02_convert_data": "",
    "03_finetune_lora": """
(out / "starts.txt").open("a").write("x")
data = (out.parent / "02_convert_data" / "summary.json").read_text()
if target == "experts":
    raise ValueError("no experts in this model")
if target == "killed" and len((out / "starts.txt").read_text()) == 1:
    import os; os._exit(9)
log = []
for i in (1, 2):
    held_out = abs(lora_r - 8) + learning_rate * seed + 1 / i
    log.append({"step": i, "loss": 1 / i, "eval_loss": held_out})
(out / "log.json").write_text(json.dumps(log))
summary = {
    "lora_r": lora_r,
    "eval_loss": {"after": log[-1]["eval_loss"]},
    "note": "text",
    "processes": os.getpid(),
}
""",
    "05_evaluate": """
trained = json.loads((out.parent / "03_finetune_lora" / "summary.json").read_text())
accuracy = 100 / (1 + trained["eval_loss"]["after"]) + seed
summary = {"name_accuracy": {"tuned": accuracy, "base": None}, "n": samples}
""",
}
BEGIN = """import json, os, pathlib
out = pathlib.Path(run_dir) / NAME
out.mkdir(parents=True, exist_ok=True)
summary = {}
"""


def write_notebook(root: Path, name: str, body: str | None = None) -> None:
    """Write a notebook that sets parameters, does what its body says, and writes a summary."""
    parameters = ['run_dir: str = "../papermill_runs/base/out"', *PARAMETERS[name]]
    work = BEGIN.replace("NAME", repr(name)) + (BODY[name] if body is None else body)
    exercise = "raise RuntimeError('an exercise is not executed')"
    cells = [
        nbformat.v4.new_code_cell("\n".join(parameters), metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(work),
        nbformat.v4.new_code_cell("(out / 'summary.json').write_text(json.dumps(summary))"),
        nbformat.v4.new_code_cell(exercise, metadata={"tags": ["solution"]}),
    ]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbformat.write(notebook, root / "notebooks" / f"{name}.ipynb")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository whose run 'base' has its converted data."""
    base = tmp_path / "papermill_runs" / "base"
    (tmp_path / "notebooks").mkdir()
    for name in PARAMETERS:
        write_notebook(tmp_path, name)
    (base / "out" / "02_convert_data").mkdir(parents=True)
    (base / "out" / "02_convert_data" / "summary.json").write_text("{}")
    (base / "params.yaml").write_text(yaml.safe_dump({"notebooks": list(PARAMETERS)}))
    return tmp_path


def write_study(root: Path, name: str = "knobs", **says) -> Path:
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"base": "base", **says}))
    return path


def starts(root: Path, run: str, study: str = "knobs") -> int:
    """Count how often notebook 03 of a run began."""
    out = root / "papermill_runs" / study / "out" / run / "out"
    return len((out / "03_finetune_lora" / "starts.txt").read_text())


def test_a_grid_becomes_runs_in_folders_and_one_table(root):
    factors = {"lora_r": [4, 8], "03.seed": [0, 1]}
    file = write_study(root, factors=factors, fixed={"samples": 7})
    table = run_study(file, processes=2, root=root).set_index("run")
    out = root / "papermill_runs" / "knobs" / "out"
    assert set(table.index) == {"lora_r-4", "lora_r-8", "lora_r-4_seed-1", "lora_r-8_seed-1"}
    assert set(table["state"]) == {"COMPLETE"}
    loss = table.loc["lora_r-4_seed-1", "03_finetune_lora.eval_loss.after"]
    assert loss == pytest.approx(4.501)
    assert list(table["05_evaluate.n"]) == [7] * 4 and "03_finetune_lora.note" not in table
    assert list(table.loc["lora_r-8", "train_step"]) == [1, 2]
    assert list(table.loc["lora_r-8", "eval_loss"]) == [1.0, 0.5]
    kept = pd.read_parquet(out / "results.parquet").set_index("run")
    pd.testing.assert_frame_equal(kept[["lora_r", "seed"]], table[["lora_r", "seed"]])
    says = yaml.safe_load((out / "lora_r-4_seed-1" / "params.yaml").read_text())
    assert says["03_finetune_lora"]["lora_r"] == 4
    assert says["05_evaluate"]["seed"] == 0, "only 03's seed was varied"
    summary = json.loads((out / "lora_r-4" / "out" / "summary.json").read_text())
    assert summary["run"] == "knobs/out/lora_r-4"
    listed = {row["run"]: row["finished"] for row in runs.list_runs(root, study="knobs")}
    assert listed == {f"knobs/out/{run}": "2 of 2" for run in table.index}
    stored = optuna.load_study(study_name="study", storage=f"sqlite:///{out / 'study.db'}")
    ranks = {trial.params["lora_r"] for trial in stored.trials}
    assert ranks == {4, 8}, "Optuna's own tools know the factors"


def test_a_second_start_keeps_what_is_finished(root):
    file = write_study(root, factors={"lora_r": [4, 8]})
    summary = root / "papermill_runs/knobs/out/lora_r-4/out/05_evaluate/summary.json"
    run_study(file, processes=1, root=root)
    first = summary.stat().st_mtime_ns
    table = run_study(file, processes=1, root=root)
    assert len(table) == 2 and starts(root, "lora_r-4") == starts(root, "lora_r-8") == 1
    assert summary.stat().st_mtime_ns == first
    # only 05 changes: 03 is kept
    write_notebook(root, "05_evaluate", BODY["05_evaluate"] + "\nsummary['n'] = 99")
    table = run_study(file, processes=1, root=root)
    assert list(table["05_evaluate.n"]) == [99, 99] and starts(root, "lora_r-4") == 1


def test_several_grids_share_a_run(root):
    grids = [{"lora_r": [8, 16]}, {"learning_rate": [1e-3, 2e-3]}]
    says, points = read_study(write_study(root, factors=grids), root=root)
    assert list(points) == ["lora_r-8", "base", "learning_rate-0.002"]
    assert says["before"] == ["02_convert_data"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_search_takes_some_of_a_grid(root):
    factors = {"lora_r": [2, 4, 8, 16, 32, 64], "seed": [0, 1]}
    file = write_study(root, "found", factors=factors, search=3)
    table = run_study(file, processes=1, root=root)
    assert 1 <= len(table) <= 3 and set(table["state"]) == {"COMPLETE"}
    again = run_study(file, processes=1, root=root)
    assert len(again) == len(table), "the search is over"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_failed_run_is_kept_shown_and_tried_again(root):
    file = write_study(root, factors={"target": ["all", "experts"]})
    table = run_study(file, processes=1, root=root).set_index("run")
    assert dict(table["state"]) == {"base": "COMPLETE", "target-experts": "FAIL"}
    error = table.loc["target-experts", "error"]
    assert "03_finetune_lora failed in cell [2]: ValueError: no experts" in error
    assert table.loc["target-experts", "target"] == "experts"
    notes = {row["run"]: row["note"] for row in runs.list_runs(root, study="knobs")}
    assert "no experts" in notes["knobs/out/target-experts"] and not notes["knobs/out/base"]
    mended = BODY["03_finetune_lora"].replace("raise ValueError", "str")
    write_notebook(root, "03_finetune_lora", mended)
    assert set(run_study(file, processes=1, root=root)["state"]) == {"COMPLETE"}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_process_that_dies_costs_one_retry(root):
    file = write_study(root, factors={"target": ["killed", "all"]})
    table = run_study(file, processes=1, root=root).set_index("run")
    assert dict(table["state"]) == {"base": "COMPLETE", "target-killed": "COMPLETE"}
    assert starts(root, "target-killed") == 2


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_killed_study_continues(root):
    wait = """
first_start = len((out / 'starts.txt').read_text()) == 1
if lora_r == 8 and first_start:
    import time; time.sleep(60)
"""
    write_notebook(root, "03_finetune_lora", BODY["03_finetune_lora"] + wait)
    file = write_study(root, factors={"lora_r": [4, 8]})
    script = root / "start.py"
    script.write_text(f"""from medtune.runs.study import run_study
if __name__ == '__main__':
    run_study({str(file)!r}, processes=1, root={str(root)!r})
""")
    process = subprocess.Popen(
        [sys.executable, script], start_new_session=True, stderr=subprocess.DEVNULL
    )
    waiting = root / "papermill_runs/knobs/out/lora_r-8/out/03_finetune_lora/log.json"
    while not waiting.exists():
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    table = run_study(file, processes=1, root=root)
    assert set(table["state"]) == {"COMPLETE"}
    assert (starts(root, "lora_r-4"), starts(root, "lora_r-8")) == (1, 2)


MISTAKES = [
    (
        {"factors": {"lora_rank": [4, 8]}},
        "knobs.yaml: lora_rank has no parameter 'lora_rank': did you mean 'lora_r'?",
    ),
    ({"factors": {"05.lora_r": [4, 8]}}, "05.lora_r has no parameter 'lora_r'"),
    ({"factors": {"run_dir": ["x"]}}, "run_dir follows from the run's name"),
    ({"factors": {"lora_r": [4, 8.5]}}, "knobs.yaml: lora_r must be int, not 8.5 (float)"),
    ({"factors": {"lora_r": [4, "8"]}}, "knobs.yaml: lora_r must be int, not '8' (str)"),
    ({"factors": {"lora_r": 4}}, "lora_r needs a list of levels"),
    ({"factors": ["lora_r"]}, "factors must map parameters to levels, not 'lora_r'"),
    ({"factors": {"lora_r": [4, 4]}}, "two runs are the same, lora_r-4"),
    (
        {"factors": {"learning_rate": [2e-3, "2e-3"]}},
        "two runs are the same, learning_rate-0.002",
    ),
    ({"factors": {"seed": [0, 1]}, "fixed": {"lora_r": "x"}}, "lora_r must be int"),
    (
        {"factors": {"seed": [0]}, "seeds": [1]},
        "'seeds' is missing, unknown or of a wrong type (of base, factors",
    ),
    ({"factors": {"seed": [0]}, "seeds": None}, "'seeds' is missing, unknown"),
    (
        {"factors": {"seed": [0]}, "search": "3"},
        "'search' is missing, unknown or of a wrong type",
    ),
    (
        {"factors": {"seed": [0]}, "base": "bases"},
        "there is no papermill_runs/bases/params.yaml",
    ),
    ({"factors": {"seed": [0]}, "notebooks": ["04_x"]}, "No such file or directory"),
    ({}, "knobs.yaml: 'factors' is missing"),
]


@pytest.mark.parametrize(("says", "message"), MISTAKES, ids=[text[:40] for _, text in MISTAKES])
def test_a_mistake_is_one_line_and_nothing_is_written(root, says, message):
    with pytest.raises((ValueError, OSError), match=re.escape(message)) as error:
        run_study(write_study(root, **says), root=root)
    assert "\n" not in str(error.value)
    assert not (root / "papermill_runs" / "knobs").exists()


def test_the_data_of_the_base_must_be_there(root):
    (root / "papermill_runs/base/out/02_convert_data/summary.json").unlink()
    with pytest.raises(FileNotFoundError, match="02_convert_data of run 'base' is not finished"):
        run_study(write_study(root, factors={"seed": [0]}), root=root)
    assert not (root / "papermill_runs" / "knobs").exists()


def test_a_changed_study_file_is_refused(root):
    out = root / "papermill_runs" / "knobs" / "out"
    run_study(write_study(root, factors={"lora_r": [4]}), processes=1, root=root)
    before = (out / "results.parquet").read_bytes()
    for says in (
        {"factors": {"lora_r": [4, 8]}},
        {"factors": {"lora_r": [4]}, "fixed": {"samples": 5}},
    ):
        with pytest.raises(ValueError, match="was changed since the first start"):
            run_study(write_study(root, **says), root=root)
    assert (out / "results.parquet").read_bytes() == before
    assert not (out / "lora_r-8").exists()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_prune_stops_what_lags_behind(root):
    """Optuna's median pruner, fed by the trainer; the last of seven runs is the worst by far."""
    body = """
class Trainer:
    def add_callback(self, callback):
        self.callback = callback
    def train(self):
        from types import SimpleNamespace
        for step in (1, 2, 3):
            state = SimpleNamespace(global_step=step)
            metrics = {"eval_loss": float(lora_r)}
            self.callback.on_evaluate(None, state, None, metrics=metrics)
trainer = Trainer()
"""
    write_notebook(root, "03_finetune_lora", body)
    path = root / "notebooks" / "03_finetune_lora.ipynb"
    notebook = nbformat.read(path, 4)
    train = "trainer.train()\nsummary = {'eval_loss': {'after': float(lora_r)}}"
    notebook.cells.insert(2, nbformat.v4.new_code_cell(train))
    nbformat.write(notebook, path)
    file = write_study(root, factors={"lora_r": [1, 2, 3, 4, 5, 6, 100]}, prune=True)
    table = run_study(file, processes=1, root=root).set_index("lora_r")
    assert table.loc[100, "state"] == "PRUNED", list(table["error"])
    assert table.loc[1, "state"] == "COMPLETE", list(table["error"])
    assert "pruned at step" in table.loc[100, "error"]
    again = run_study(file, processes=1, root=root).set_index("lora_r")
    assert again.loc[100, "state"] == "PRUNED", "a pruned run is not started again"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_command_says_what_failed(root):
    file = write_study(root, factors={"target": ["all", "experts"]})
    medtune = Path(sys.executable).with_name("medtune")
    command = [medtune, "study", file, "--processes", "1", "--root", root]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "'COMPLETE': 1, 'FAIL': 1" in done.stdout
    assert "medtune: 1 runs failed: 'medtune list knobs' says why" in done.stderr
    command = [medtune, "list", "knobs", "--root", root]
    listed = subprocess.run(command, capture_output=True, text=True)
    assert "no experts in this model" in listed.stdout


# ---- with the real notebooks and the tiny model


@pytest.fixture(scope="module")
def clone(tmp_path_factory, sample_path, repo) -> Path:
    """A root with the course's notebooks and a run 'base' with a few converted pairs."""
    root = tmp_path_factory.mktemp("clone")
    hidden = shutil.ignore_patterns(".*")
    shutil.copytree(repo / "notebooks", root / "notebooks", ignore=hidden)
    (root / "data").symlink_to(repo / "data")
    base = root / "papermill_runs" / "base"
    out = base / "out" / "02_convert_data"
    out.mkdir(parents=True)
    notebooks = ["02_convert_data", "03_finetune_lora", "05_evaluate"]
    (base / "params.yaml").write_text(yaml.safe_dump({"notebooks": notebooks}))
    pairs = load_pairs(str(sample_path))
    boxed = [i for i, box in enumerate(pairs["has_box"]) if box]
    pairs = pairs.select(boxed[::40])
    convert_pairs(pairs, out / "data", splits=list(pairs["split"]))
    (out / "summary.json").write_text("{}")
    return root


def without_timing(summary: dict) -> dict:
    return {key: value for key, value in summary.items() if key != "timing"}


def read_answers(run: Path) -> list[str]:
    file = run / "out" / "05_evaluate" / "predictions_tuned.jsonl"
    return [json.loads(line)["answer"] for line in file.read_text("utf-8").splitlines()]


FEW = {
    "max_steps": 3,
    "eval_steps": 3,
    "save_steps": 100,
    "per_device_train_batch_size": 2,
    "max_new_tokens": 12,
    "03.eval_samples": 4,
    "05.eval_samples": 4,
}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_studys_run_is_what_papermill_makes_of_it(clone):
    """The same cells and parameters, in a process that stays and in kernels of their own."""
    file = write_study(clone, "same", fixed=FEW, factors={"lora_r": [4]})
    (row,) = run_study(file, processes=1, root=clone).to_dict("records")
    assert row["state"] == "COMPLETE", row["error"]
    run = clone / "papermill_runs" / "same" / "out" / row["run"]
    alone = clone / "papermill_runs" / "alone"
    (alone / "out").mkdir(parents=True)
    shutil.copy(run / "params.yaml", alone)
    (alone / "out" / "02_convert_data").symlink_to(run / "out" / "02_convert_data")
    theirs = runs.run("alone", root=clone)["notebooks"]
    for notebook, summary in theirs.items():
        ours = json.loads((run / "out" / notebook / "summary.json").read_text("utf-8"))
        assert without_timing(ours) == without_timing(summary)
    loss = theirs["03_finetune_lora"]["eval_loss"]["after"]
    assert row["03_finetune_lora.eval_loss.after"] == loss
    assert read_answers(run) == read_answers(alone) and len(read_answers(run)) == 4
    curves = list(run.rglob("events.out.tfevents*"))
    assert curves, "curves for TensorBoard, unless the file says otherwise"
