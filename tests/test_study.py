"""Studies: levels become runs, Optuna keeps the queue, what is finished is kept, mistakes are one line."""

import importlib.util
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
from scipy import stats

from medtune import runs, study

REPO = Path(__file__).parents[1]
PARAMETERS = {
    "02_convert_data": ["limit: int = 0"],
    "03_finetune_lora": ["lora_r: int = 16", "learning_rate: float = 1e-3", "target: str = 'all'", "seed: int = 0"],
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
log = [{"step": i, "loss": 1 / i, "eval_loss": abs(lora_r - 8) + learning_rate * seed + 1 / i} for i in (1, 2)]
(out / "log.json").write_text(json.dumps(log))
summary = {"lora_r": lora_r, "eval_loss": {"after": log[-1]["eval_loss"]}, "note": "text", "processes": os.getpid()}
""",
    "05_evaluate": """
trained = json.loads((out.parent / "03_finetune_lora" / "summary.json").read_text())
summary = {"name_accuracy": {"tuned": 100 / (1 + trained["eval_loss"]["after"]) + seed, "base": None}, "n": samples}
""",
}


def write_notebook(root: Path, name: str, body: str | None = None) -> None:
    lines = ['run_dir: str = "../papermill_runs/base/out"', *PARAMETERS[name]]
    begin = f"import json, os, pathlib\nout = pathlib.Path(run_dir) / {name!r}\nout.mkdir(parents=True, exist_ok=True)"
    cells = [
        nbformat.v4.new_code_cell("\n".join(lines), metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(f"{begin}\nsummary = {{}}\n" + (BODY[name] if body is None else body)),
        nbformat.v4.new_code_cell("(out / 'summary.json').write_text(json.dumps(summary))"),
        nbformat.v4.new_code_cell("raise RuntimeError('an exercise is not executed')", metadata={"tags": ["solution"]}),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), root / "notebooks" / f"{name}.ipynb")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository whose run 'base' has its converted data."""
    for folder in ("notebooks", "papermill_runs/base/out/02_convert_data"):
        (tmp_path / folder).mkdir(parents=True)
    for name in PARAMETERS:
        write_notebook(tmp_path, name)
    (tmp_path / "papermill_runs" / "base" / "params.yaml").write_text(yaml.safe_dump({"notebooks": list(PARAMETERS)}))
    (tmp_path / "papermill_runs" / "base" / "out" / "02_convert_data" / "summary.json").write_text("{}")
    return tmp_path


def write_study(root: Path, name: str = "knobs", **says) -> Path:
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"base": "base", **says}))
    return path


def starts(root: Path, run: str, study: str = "knobs") -> int:
    return len((root / "papermill_runs" / study / "out" / run / "out" / "03_finetune_lora" / "starts.txt").read_text())


def test_a_grid_becomes_runs_in_folders_and_one_table(root):
    file = write_study(root, factors={"lora_r": [4, 8], "03.seed": [0, 1]}, fixed={"samples": 7})
    table = study.run_study(file, processes=2, root=root).set_index("run")
    out = root / "papermill_runs" / "knobs" / "out"
    assert set(table.index) == {"lora_r-4", "lora_r-8", "lora_r-4_seed-1", "lora_r-8_seed-1"}
    assert set(table["state"]) == {"COMPLETE"}
    assert table.loc["lora_r-4_seed-1", "03_finetune_lora.eval_loss.after"] == pytest.approx(4.501)
    assert list(table["05_evaluate.n"]) == [7] * 4 and "03_finetune_lora.note" not in table
    assert list(table.loc["lora_r-8", "train_step"]) == [1, 2]
    assert list(table.loc["lora_r-8", "eval_loss"]) == [1.0, 0.5]
    kept = pd.read_parquet(out / "results.parquet").set_index("run")
    pd.testing.assert_frame_equal(kept[["lora_r", "seed"]], table[["lora_r", "seed"]])
    says = yaml.safe_load((out / "lora_r-4_seed-1" / "params.yaml").read_text())
    assert says["03_finetune_lora"]["lora_r"] == 4 and says["05_evaluate"]["seed"] == 0, "only 03's seed was varied"
    assert json.loads((out / "lora_r-4" / "out" / "summary.json").read_text())["run"] == "knobs/out/lora_r-4"
    listed = {row["run"]: row["finished"] for row in runs.list_runs(root, study="knobs")}
    assert listed == {f"knobs/out/{run}": "2 of 2" for run in table.index}
    stored = optuna.load_study(study_name="study", storage=f"sqlite:///{out / 'study.db'}")
    assert {trial.params["lora_r"] for trial in stored.trials} == {4, 8}, "Optuna's own tools know the factors"


def test_a_second_start_keeps_what_is_finished(root):
    file = write_study(root, factors={"lora_r": [4, 8]})
    study.run_study(file, processes=1, root=root)
    first = (root / "papermill_runs/knobs/out/lora_r-4/out/05_evaluate/summary.json").stat().st_mtime_ns
    table = study.run_study(file, processes=1, root=root)
    assert len(table) == 2 and starts(root, "lora_r-4") == starts(root, "lora_r-8") == 1
    assert (root / "papermill_runs/knobs/out/lora_r-4/out/05_evaluate/summary.json").stat().st_mtime_ns == first
    write_notebook(root, "05_evaluate", BODY["05_evaluate"] + "\nsummary['n'] = 99")  # only 05 changes: 03 is kept
    table = study.run_study(file, processes=1, root=root)
    assert list(table["05_evaluate.n"]) == [99, 99] and starts(root, "lora_r-4") == 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_several_grids_share_a_run_and_search_takes_some(root):
    grids = [{"lora_r": [8, 16]}, {"learning_rate": [1e-3, 2e-3]}]
    says, points = study.read_study(write_study(root, factors=grids), root=root)
    assert list(points) == ["lora_r-8", "base", "learning_rate-0.002"]
    file = write_study(root, "found", factors={"lora_r": [2, 4, 8, 16, 32, 64], "seed": [0, 1]}, search=3)
    table = study.run_study(file, processes=1, root=root)
    assert 1 <= len(table) <= 3 and set(table["state"]) == {"COMPLETE"}
    assert len(study.run_study(file, processes=1, root=root)) == len(table), "the search is over"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_failed_run_is_kept_shown_and_tried_again(root, capsys):
    file = write_study(root, factors={"target": ["all", "experts"]})
    table = study.run_study(file, processes=1, root=root).set_index("run")
    assert dict(table["state"]) == {"base": "COMPLETE", "target-experts": "FAIL"}
    assert "03_finetune_lora failed in cell [2]: ValueError: no experts" in table.loc["target-experts", "error"]
    assert table.loc["target-experts", "target"] == "experts"
    notes = {row["run"]: row["note"] for row in runs.list_runs(root, study="knobs")}
    assert "no experts" in notes["knobs/out/target-experts"] and not notes["knobs/out/base"]
    write_notebook(root, "03_finetune_lora", BODY["03_finetune_lora"].replace("raise ValueError", "str"))
    assert set(study.run_study(file, processes=1, root=root)["state"]) == {"COMPLETE"}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_process_that_dies_costs_one_retry(root):
    file = write_study(root, factors={"target": ["killed", "all"]})
    table = study.run_study(file, processes=1, root=root).set_index("run")
    assert dict(table["state"]) == {"base": "COMPLETE", "target-killed": "COMPLETE"}
    assert starts(root, "target-killed") == 2


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_killed_study_continues(root):
    wait = "import time; time.sleep(60 * (lora_r == 8 and len((out / 'starts.txt').read_text()) == 1))"
    write_notebook(root, "03_finetune_lora", BODY["03_finetune_lora"] + wait)
    file = write_study(root, factors={"lora_r": [4, 8]})
    call = f"study.run_study({str(file)!r}, processes=1, root={str(root)!r})"
    script = root / "start.py"
    script.write_text(f"from medtune import study\nif __name__ == '__main__': {call}")
    process = subprocess.Popen([sys.executable, script], start_new_session=True, stderr=subprocess.DEVNULL)
    waiting = root / "papermill_runs/knobs/out/lora_r-8/out/03_finetune_lora/log.json"
    while not waiting.exists():
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    table = study.run_study(file, processes=1, root=root)
    assert set(table["state"]) == {"COMPLETE"} and (starts(root, "lora_r-4"), starts(root, "lora_r-8")) == (1, 2)


MISTAKES = [
    ({"factors": {"lora_rank": [4, 8]}}, "knobs.yaml: lora_rank has no parameter 'lora_rank': did you mean 'lora_r'?"),
    ({"factors": {"05.lora_r": [4, 8]}}, "05.lora_r has no parameter 'lora_r'"),
    ({"factors": {"run_dir": ["x"]}}, "run_dir follows from the run's name"),
    ({"factors": {"lora_r": [4, 8.5]}}, "knobs.yaml: lora_r must be int, not 8.5 (float)"),
    ({"factors": {"lora_r": [4, "8"]}}, "knobs.yaml: lora_r must be int, not '8' (str)"),
    ({"factors": {"lora_r": 4}}, "lora_r needs a list of levels"),
    ({"factors": {"lora_r": [4, 4]}}, "two runs are the same, lora_r-4"),
    ({"factors": {"learning_rate": [2e-3, "2e-3"]}}, "two runs are the same, learning_rate-0.002"),
    ({"factors": {"seed": [0, 1]}, "fixed": {"lora_r": "x"}}, "lora_r must be int"),
    ({"factors": {"seed": [0]}, "seeds": [1]}, "'seeds' is missing, unknown or of a wrong type (of base, factors"),
    ({"factors": {"seed": [0]}, "search": "3"}, "'search' is missing, unknown or of a wrong type"),
    ({"factors": {"seed": [0]}, "base": "bases"}, "there is no papermill_runs/bases/params.yaml"),
    ({"factors": {"seed": [0]}, "notebooks": ["04_x"]}, "No such file or directory"),
    ({}, "knobs.yaml: 'factors' is missing"),
]


@pytest.mark.parametrize(("says", "message"), MISTAKES, ids=[message[:40] for _, message in MISTAKES])
def test_a_mistake_is_one_line_and_nothing_is_written(root, says, message):
    with pytest.raises((ValueError, OSError), match=re.escape(message)) as error:
        study.run_study(write_study(root, **says), root=root)
    assert "\n" not in str(error.value)
    assert not (root / "papermill_runs" / "knobs").exists()


def test_the_data_of_the_base_must_be_there(root):
    (root / "papermill_runs/base/out/02_convert_data/summary.json").unlink()
    with pytest.raises(FileNotFoundError, match="02_convert_data of run 'base' is not finished"):
        study.run_study(write_study(root, factors={"seed": [0]}), root=root)
    assert not (root / "papermill_runs" / "knobs").exists()


def test_a_changed_study_file_is_refused(root):
    study.run_study(write_study(root, factors={"lora_r": [4]}), processes=1, root=root)
    before = (root / "papermill_runs/knobs/out/results.parquet").read_bytes()
    for says in ({"factors": {"lora_r": [4, 8]}}, {"factors": {"lora_r": [4]}, "fixed": {"samples": 5}}):
        with pytest.raises(ValueError, match="was changed since the first start"):
            study.run_study(write_study(root, **says), root=root)
    assert (root / "papermill_runs/knobs/out/results.parquet").read_bytes() == before
    assert not (root / "papermill_runs/knobs/out/lora_r-8").exists()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_prune_stops_what_lags_behind(root):
    """Optuna's median pruner, fed by the trainer's evaluations; ten runs, of which the last is the worst by far."""
    body = """
class Trainer:
    def add_callback(self, callback):
        self.callback = callback
    def train(self):
        from types import SimpleNamespace
        for step in (1, 2, 3):
            metrics = {"eval_loss": float(lora_r)}
            self.callback.on_evaluate(None, SimpleNamespace(global_step=step), None, metrics=metrics)
trainer = Trainer()
"""
    write_notebook(root, "03_finetune_lora", body)
    notebook = nbformat.read(root / "notebooks" / "03_finetune_lora.ipynb", 4)
    train = "trainer.train()\nsummary = {'eval_loss': {'after': float(lora_r)}}"
    notebook.cells.insert(2, nbformat.v4.new_code_cell(train))
    nbformat.write(notebook, root / "notebooks" / "03_finetune_lora.ipynb")
    file = write_study(root, factors={"lora_r": [1, 2, 3, 4, 5, 6, 100]}, prune=True)
    table = study.run_study(file, processes=1, root=root).set_index("lora_r")
    assert table.loc[100, "state"] == "PRUNED" and table.loc[1, "state"] == "COMPLETE", list(table["error"])
    assert "pruned at step" in table.loc[100, "error"]
    again = study.run_study(file, processes=1, root=root).set_index("lora_r")
    assert again.loc[100, "state"] == "PRUNED", "a pruned run is not started again"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_command_says_what_failed(root):
    file = write_study(root, factors={"target": ["all", "experts"]})
    command = [Path(sys.executable).with_name("medtune"), "study", file, "--processes", "1", "--root", root]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "'COMPLETE': 1, 'FAIL': 1" in done.stdout
    assert "medtune: 1 runs failed: 'medtune list knobs' says why" in done.stderr
    command = [Path(sys.executable).with_name("medtune"), "list", "knobs", "--root", root]
    assert "no experts in this model" in subprocess.run(command, capture_output=True, text=True).stdout


# ---- with the real notebooks and the tiny model


@pytest.fixture(scope="module")
def clone(tmp_path_factory, sample_path) -> Path:
    """A root with the course's notebooks and a run 'base' whose data are converted: a few of the sample's pairs."""
    from medtune import convert, data

    root = tmp_path_factory.mktemp("clone")
    shutil.copytree(REPO / "notebooks", root / "notebooks", ignore=shutil.ignore_patterns(".*"))
    (root / "data").symlink_to(REPO / "data")
    out = root / "papermill_runs" / "base" / "out" / "02_convert_data"
    out.mkdir(parents=True)
    notebooks = ["02_convert_data", "03_finetune_lora", "05_evaluate"]
    (out.parents[1] / "params.yaml").write_text(yaml.safe_dump({"notebooks": notebooks}))
    pairs = data.load_pairs(str(sample_path))
    boxed = [i for i, box in enumerate(pairs["has_box"]) if box]
    pairs = pairs.select(boxed[::40])
    convert.convert_pairs(pairs, out / "data", splits=list(pairs["split"]))
    (out / "summary.json").write_text("{}")
    return root


FEW = {"max_steps": 3, "eval_steps": 3, "save_steps": 100, "per_device_train_batch_size": 2, "max_new_tokens": 12}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_studys_run_is_what_papermill_makes_of_it(clone):
    """The same cells with the same parameters, in a process that stays and in kernels of their own."""
    few = FEW | {"03.eval_samples": 4, "05.eval_samples": 4}
    file = write_study(clone, "same", fixed=few, factors={"lora_r": [4]})
    (row,) = study.run_study(file, processes=1, root=clone).to_dict("records")
    assert row["state"] == "COMPLETE", row["error"]
    run = clone / "papermill_runs" / "same" / "out" / row["run"]
    alone = clone / "papermill_runs" / "alone"
    alone.mkdir()
    shutil.copy(run / "params.yaml", alone)
    (alone / "out").mkdir()
    (alone / "out" / "02_convert_data").symlink_to(run / "out" / "02_convert_data")
    summary = runs.run("alone", root=clone)["notebooks"]
    for notebook, numbers in summary.items():
        ours = json.loads((run / "out" / notebook / "summary.json").read_text("utf-8"))
        assert {k: v for k, v in ours.items() if k != "timing"} == {k: v for k, v in numbers.items() if k != "timing"}
    assert row["03_finetune_lora.eval_loss.after"] == summary["03_finetune_lora"]["eval_loss"]["after"]
    answers = [(folder / "out" / "05_evaluate" / "predictions_tuned.jsonl") for folder in (run, alone)]
    ours, theirs = ([json.loads(line)["answer"] for line in path.read_text("utf-8").splitlines()] for path in answers)
    assert ours == theirs and len(ours) == 4
    assert list(run.rglob("events.out.tfevents*")), "curves for TensorBoard, unless the file says otherwise"


# ---- the full study that was run once

KEPT = REPO / "papermill_runs" / "reference" / "study-knobs"


@pytest.fixture(scope="module")
def judge():
    spec = importlib.util.spec_from_file_location("study_knobs", REPO / "benchmarks" / "study_knobs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("intervals", "expected"),
    [
        ([(1, 5), (0.5, 9)], "supported"),
        ([(1, 5), (-9, -1)], "not supported"),
        ([(-1.5, 1.9), (-0.5, 1.5)], "not supported"),
        ([(1, 5), (-3, 9)], "undecided"),
    ],
)
def test_a_verdict_follows_from_the_intervals(judge, intervals, expected):
    effects = [{"claim": "better", judge.NAMES: {"low": low, "high": high}} for low, high in intervals]
    assert judge.verdict(effects) == expected


def test_an_interval_over_seeds_is_scipys(judge):
    values = [1.0, 2.0, 4.5]
    low, high = stats.ttest_1samp(values, 0).confidence_interval()
    found = judge.interval(values)
    assert (found["low"], found["high"]) == pytest.approx((low, high))


@pytest.mark.skipif(not KEPT.is_dir(), reason="the full study has not been run yet")
def test_what_is_kept_of_the_full_study_follows_from_its_table(judge):
    everything, table = pd.read_parquet(KEPT / "results.parquet"), judge.load(KEPT / "results.parquet")
    assert len(everything) >= 100 and table["seed"].nunique() == 3
    verdicts = json.loads((KEPT / "verdicts.json").read_text("utf-8"))
    again = json.loads(json.dumps(judge.judge(table)))
    assert [(v["claim"], v["verdict"]) for v in again] == [(v["claim"], v["verdict"]) for v in verdicts]
    page = (REPO / "docs" / "knobs.md").read_text("utf-8")
    assert all(f"| {v['recipe']} | {v['claim']} | **{v['verdict']}** |" in page for v in verdicts)
    says = yaml.safe_load((REPO / "papermill_runs" / "knobs.yaml").read_text("utf-8"))
    assert len({factor for grid in says["factors"] for factor in grid} - {"seed"}) >= 5
