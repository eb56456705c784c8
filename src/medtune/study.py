"""Studies: the levels of some parameters of a run become many runs, side by side, and one table.

Optuna keeps the queue, chooses and prunes; `medtune.runs` knows parameters and folders; the objective stands here.
"""

import contextlib
import functools
import itertools
import json
import os
import re
import threading
from pathlib import Path
from typing import Any

from . import runs

# The keys of a study file, with their types and what holds where one is left out.
STUDY: dict[str, Any] = {"base": "", "factors": [], "fixed": {}, "search": 0, "prune": False}
STUDY |= {"notebooks": ["03_finetune_lora", "05_evaluate"], "minimize": "03_finetune_lora.eval_loss.after"}
ASKING = threading.Lock()


def run_study(file: str | Path, *, processes: int | None = None, root: str | Path | None = None) -> Any:
    """Run an experiment: the combinations of some parameters' levels, on several processes; returns a table.

    A second start continues: what is finished and unchanged is kept, what failed is tried again. The notebooks' cells
    are executed in processes that stay, so that nothing is imported twice; the results are papermill's.

    Parameters
    ----------
    file
        YAML. ``base``: the run that gives all other parameters, and the results of the notebooks before.
        ``factors``: maps ``[NOTEBOOK.]key`` to a list of levels; or a list of such grids, where what two of them share
        is one run. Optional: ``fixed``: values for all runs (``report_to`` is tensorboard unless said);
        ``notebooks`` (03 and 05); ``search: 20``: so many runs of one grid that Optuna's TPE chooses, to ``minimize`` a
        column; ``prune: true``: Optuna's median pruner stops a run whose loss on held-out pairs lags behind.
    processes
        By default one a GPU, or one a CPU core with 3 GB of free memory.

    Returns a DataFrame, also written to ``papermill_runs/<stem of file>/out/results.parquet``: one row a run with
    ``run``, ``state``, ``error``, the parameters, every number of the notebooks' summaries (such as
    ``05_evaluate.name_accuracy.tuned``), and the log of the training as lists: ``train_step``, ``train_loss``,
    ``eval_step``, ``eval_loss``. Raises ValueError or OSError, before anything is written, if no notebook declares a
    factor, a level has the wrong type, two runs are the same, or the file was changed since its first start.
    """
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    import filelock
    import pandas as pd
    import psutil

    file, root = Path(file), runs.find_root(root)
    # affinity is unknown to macOS
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    says, points = read_study(file, root=root)
    found = ",".join(path.name.removeprefix("nvidia") for path in sorted(Path("/dev").glob("nvidia[0-9]*")))
    gpus = (os.environ.get("CUDA_VISIBLE_DEVICES") or found).split(",")
    fit = len(gpus) if gpus[0] else min(len(cores), psutil.virtual_memory().available // 3_000_000_000)
    processes, out = processes or max(1, fit), root / "papermill_runs" / runs._safe(file.stem) / "out"
    share = max(1, len(cores) // processes)
    shares = [cores[first : first + share] for first in range(0, len(cores) - share + 1, share)]
    for key, value in (runs.QUIET | {"OMP_NUM_THREADS": str(share)}).items():
        os.environ.setdefault(key, value)
    out.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(out / ".lock", timeout=0):
        for _ in range(2):  # what failed, or was lost with its process, is tried once more
            queue = _fill_queue(says, points, out, root)
            queue.ask = functools.partial(_ask, queue)
            waiting = sum(trial.state.name == "WAITING" for trial in queue.trials)
            if left := waiting or max(0, says["search"] - len(queue.trials)):
                where = {"initializer": _settle, "initargs": (gpus, shares, root), "mp_context": get_context("spawn")}
                with ProcessPoolExecutor(min(processes, left), **where) as pool:
                    work = functools.partial(_objective, pool, says, points, out, root)
                    queue.optimize(work, left, n_jobs=processes, catch=(Exception,), show_progress_bar=True)
        ended = [trial for trial in queue.trials if trial.state.is_finished() and "found" in trial.user_attrs]
        last = {t.user_attrs["run"]: {"state": t.state.name, **t.user_attrs["found"]} for t in ended}
        table = pd.DataFrame([{"run": run, "error": "", **row} for run, row in last.items()])
        table.to_parquet(out / ".results.part")
        os.replace(out / ".results.part", out / "results.parquet")
    return table


def _ask(queue: Any) -> Any:
    """Ask Optuna for a run, one thread at a time: SQLite locks no rows, so two could be given the same one."""
    with ASKING:
        return type(queue).ask(queue)


def read_study(file: str | Path, *, root: str | Path | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a study file says, and its runs: for each name the parameters of each notebook."""
    file, root = Path(file), runs.find_root(root)
    says = STUDY | runs._read_yaml(file, file.name)
    says["factors"] = [says["factors"]] if isinstance(says["factors"], dict) else says["factors"]
    if wrong := [k for k, v in says.items() if type(v) is not type(STUDY.get(k)) or k in ("base", "factors") and not v]:
        raise ValueError(f"{file.name}: {wrong[0]!r} is missing, unknown or of a wrong type (of {', '.join(STUDY)})")
    raw, known = runs._load(says["base"], root)
    paths = {n: root / "notebooks" / f"{runs._safe(n)}.ipynb" for n in says["notebooks"]}
    declared = {n: known.get(n) or runs.declared_parameters(path) for n, path in paths.items()}
    base = says["of the base"] = runs._resolve(raw, known | declared, says["base"])
    says["before"] = [n for n in known if n < min(declared)]  # their results are shared, such as 02's converted data
    if any(values.get("report_to") == "none" for values in base.values()):  # curves to look at while it runs
        says["fixed"] = {"report_to": "tensorboard"} | says["fixed"]
    for before in says["before"][-1:]:
        if not (root / "papermill_runs" / says["base"] / "out" / before / "summary.json").exists():
            raise FileNotFoundError(f"{before} of run {says['base']!r} is not finished: start it with 'medtune run'")

    def change(values: dict[str, dict], pair: tuple[str, Any]) -> dict[str, dict]:
        (section, _, key), where = pair[0].rpartition("."), f"{file.name}: {pair[0]}"
        among = {n: known for n, known in declared.items() if n.startswith(section)}
        runs._known(key, {k: p for known in among.values() for k, p in known.items()}, where)
        new = {n: {key: runs._check(pair[1], known[key], where)} for n, known in among.items() if key in known}
        return {n: v | new.get(n, {}) for n, v in values.items()}

    usual, points = {n: {k: v for k, v in base[n].items() if k != "run_dir"} for n in declared}, {}
    usual = functools.reduce(change, says["fixed"].items(), usual)
    for grid in says["factors"]:
        if wrong := [factor for factor, levels in grid.items() if not isinstance(levels, list)]:
            raise ValueError(f"{file.name}: {wrong[0]} needs a list of levels")
        before = set(points)
        for levels in itertools.product(*grid.values()):
            values = functools.reduce(change, zip(grid, levels, strict=True), usual)
            off = {k: v for n in values for k, v in values[n].items() if v != usual[n][k]}
            run = re.sub(r"[^A-Za-z0-9._-]+", "-", "_".join(f"{k}-{v}" for k, v in off.items())) or "base"
            if run in points.keys() - before:
                raise ValueError(f"{file.name}: two runs are the same, {run}")
            points[run] = values
    return says, points


def _fill_queue(says: dict[str, Any], points: dict[str, Any], out: Path, root: Path) -> Any:
    """The study as Optuna keeps it; what is not finished waits in its queue."""
    import optuna
    import yaml

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = optuna.storages.RDBStorage(f"sqlite:///{out / 'study.db'}", {"connect_args": {"timeout": 60}})
    queue = optuna.create_study(study_name="study", storage=storage, load_if_exists=True)  # TPE and median pruner
    if queue.user_attrs.get("says", says) != says:
        raise ValueError(f"{out.parent.name}.yaml or its base was changed since the first start: take another name")
    queue.set_user_attr("says", says)
    for trial in queue.get_trials(states=[optuna.trial.TrialState.RUNNING]):  # its process is no more
        queue.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    states = {trial.user_attrs.get("run"): trial.state.name for trial in queue.trials}
    for run, values in points.items():
        (out / run / "out").mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump({"notebooks": list(values), **values}, sort_keys=False, allow_unicode=True)
        runs._write(out / run / "params.yaml", text)
        for before in says["before"]:
            if not (out / run / "out" / before).is_symlink():
                (out / run / "out" / before).symlink_to(root / "papermill_runs" / says["base"] / "out" / before)
        finished = all(step.finished for step in runs._plan(f"{out.parent.name}/out/{run}", root))
        if not (finished or says["search"] or states.get(run) in ("PRUNED", "WAITING")):
            queue.enqueue_trial(_levels(says, values), user_attrs={"run": run})
    return queue


def _levels(says: dict[str, Any], values: dict[str, dict]) -> dict[str, Any]:
    """The level of each factor in a run."""
    factors = {factor: factor.rpartition(".") for grid in says["factors"] for factor in grid}
    return {f: next(v[k] for n, v in values.items() if n.startswith(s) and k in v) for f, (s, _, k) in factors.items()}


def _objective(pool: Any, says: dict[str, Any], points: dict[str, Any], out: Path, root: Path, trial: Any) -> float:
    levels = {run: _levels(says, values) for run, values in points.items()}
    choices = {f: list(dict.fromkeys(at[f] for at in levels.values())) for f in next(iter(levels.values()))}
    chosen = {factor: trial.suggest_categorical(factor, some) for factor, some in choices.items()}
    run = next(run for run, at in levels.items() if at == chosen)
    given = {key: value for values in points[run].values() for key, value in values.items()}
    found = {key: value if isinstance(value, int | float | str) else str(value) for key, value in given.items()}
    trial.set_user_attr("run", run)
    try:
        tell = trial if says["prune"] else None  # or every evaluation would write to the storage
        found |= pool.submit(_run_here, f"{out.parent.name}/out/{run}", root, tell).result()
        return found[says["minimize"]]
    except Exception as error:
        found["error"] = str(error)
        raise
    finally:
        trial.set_user_attr("found", found)


def _settle(gpus: list[str], shares: list[list[int]], root: Path) -> None:
    """Begin a process of a study: GPUs and shares of the CPU cores take turns, and figures go nowhere."""
    from multiprocessing import current_process

    number = int(current_process().name.rpartition("-")[2])
    os.environ |= {"MPLBACKEND": "agg", "CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]}
    if hasattr(os, "sched_setaffinity"):  # not on macOS; it also bounds the processes that load data
        os.sched_setaffinity(0, shares[number % len(shares)])
    os.chdir(root / "notebooks")


def _run_here(name: str, root: Path, trial: Any) -> dict[str, Any]:
    """Execute a study's run in this process; returns the numbers of its summaries and its training curves."""
    import pandas as pd

    out, found = root / "papermill_runs" / name / "out", {}
    with open(out / "log.txt", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        summary = runs._execute_all(name, root, functools.partial(_execute_here, trial=trial))
    numbers = pd.json_normalize(summary["notebooks"]).iloc[0].to_dict()
    logged = [entry for path in out.glob("*/log.json") for entry in json.loads(path.read_text("utf-8"))]
    for part, key in (("train", "loss"), ("eval", "eval_loss")):
        entries = [entry for entry in logged if key in entry]
        found |= {f"{part}_step": [e["step"] for e in entries], f"{part}_loss": [e[key] for e in entries]}
    return found | {key: value for key, value in numbers.items() if isinstance(value, int | float)}


def _execute_here(step: runs.Step, label: str, notebooks: Path, out: Path, *, trial: Any) -> None:
    """Execute a notebook's cells, but for the exercises' solutions, in this process; the trial can prune it."""
    from IPython.display import display
    from optuna import TrialPruned

    def report(self: Any, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        trial.report(metrics["eval_loss"], state.global_step)
        if trial.should_prune():
            raise TrialPruned(f"pruned at step {state.global_step}: held-out loss {metrics['eval_loss']:.3f}")

    space: dict[str, Any] = {"__name__": "__main__", "display": display}
    cells = [c for c in runs._read_cells(notebooks / f"{step.notebook}.ipynb") if c["cell_type"] == "code"]
    for number, cell in enumerate(cells, 1):
        tags, trainer = cell["metadata"].get("tags", []), space.get("trainer")
        try:
            exec("" if "solution" in tags else "".join(cell["source"]), space)
        except TrialPruned:
            raise
        except Exception as error:
            raise ValueError(f"{step.notebook} failed in cell [{number}]: {type(error).__name__}: {error}") from error
        space |= step.values if "parameters" in tags else {}
        if trial and space.get("trainer") is not trainer:
            from transformers import TrainerCallback

            space["trainer"].add_callback(type("Report", (TrainerCallback,), {"on_evaluate": report})())
