"""Studies: the levels of some parameters of a run become many runs, side by side, and one table.

Optuna keeps the queue, chooses and prunes. Parameters and folders are those of every run. What a
study file says becomes a list of runs (`read_study`); `run_study` puts those that are left into the
queue and executes them in a pool of processes; the last part of this file happens in these.
"""

import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import re
import threading
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import filelock
import optuna
import pandas as pd
import psutil
import yaml
from IPython.display import display

from medtune.files import write_whole

from .execute import QUIET, Step, execute_all, plan_steps, set_environment
from .params import (
    Parameter,
    check_key,
    check_name,
    check_value,
    declared_parameters,
    find_root,
    has_tag,
    load_run,
    merge,
    read_cells,
    read_yaml,
    resolve,
)

# The keys of a study file, and what holds where one is left out; the types must be these.
DEFAULTS: dict[str, Any] = {
    "base": "",
    "factors": [],
    "fixed": {},
    "search": 0,
    "prune": False,
    "notebooks": ["03_finetune_lora", "05_evaluate"],
    "minimize": "03_finetune_lora.eval_loss.after",
}
# Bytes of free memory that a run without a GPU should find.
MEMORY_OF_A_RUN = 3_000_000_000
# How often what fails is started; see `run_study`.
TRIES = 2
# Held by the thread that asks Optuna for a run; see `_ask_alone`.
ASKING = threading.Lock()

Values = dict[str, dict[str, Any]]
"""The parameters of a run: for each notebook, a value for each of its parameters."""


@dataclass(frozen=True)
class Study:
    """A study that runs: what its file says, and where it writes."""

    #: The study file with its defaults; see `read_study`.
    says: dict[str, Any]
    #: Name of each run, and its parameters.
    points: dict[str, Values]
    #: Folder of the runs, the queue and the table: `papermill_runs/<stem of the file>/out`.
    out: Path
    #: The repository.
    root: Path

    def name_of(self, run: str) -> str:
        """Return the name by which `medtune.runs` knows one of the runs."""
        return f"{self.out.parent.name}/out/{run}"

    @property
    def base_out(self) -> Path:
        """Results of the base run."""
        return self.root / "papermill_runs" / self.says["base"] / "out"


@dataclass(frozen=True)
class Machine:
    """How the processes of a study share the machine."""

    #: How many runs are executed at a time.
    processes: int
    #: Their numbers as CUDA takes them; one empty text where there is none.
    gpus: list[str]
    #: Shares of the CPU cores, of one size; the processes take turns.
    cores: list[list[int]]


def run_study(
    file: str | Path, *, processes: int | None = None, root: str | Path | None = None
) -> pd.DataFrame:
    """Run an experiment: the combinations of some parameters' levels, on several processes.

    A second start continues: what is finished and unchanged is kept, what failed is tried again.
    The notebooks' cells are executed in processes that stay, so that nothing is imported twice; the
    results are papermill's.

    Parameters
    ----------
    file : YAML. `base`: the run that gives all other parameters, and the results of the notebooks
        before. `factors`: maps `[NOTEBOOK.]key` to a list of levels; or a list of such grids, where
        what two of them share is one run. Optional: `fixed`: values for all runs (`report_to` is
        tensorboard unless said); `notebooks` (03 and 05); `search: 20`: so many runs of one grid
        that Optuna's TPE chooses, to `minimize` a column; `prune: true`: Optuna's median pruner
        stops a run whose loss on held-out pairs lags behind.
    processes : by default one a GPU, or one a CPU core with 3 GB of free memory.
    root : the repository; see `medtune.runs.find_root`.

    Returns
    -------
    pandas.DataFrame : also written to `papermill_runs/<stem of file>/out/results.parquet`. One row
        a run, with "run", "state", "error", the parameters, every number of the notebooks'
        summaries (such as "05_evaluate.name_accuracy.tuned"), and the log of the training as lists:
        "train_step", "train_loss", "eval_step", "eval_loss".

    Raises
    ------
    ValueError, OSError : before anything is written, if no notebook declares a factor, a level has
        the wrong type, two runs are the same, or the file was changed since its first start.
    """
    file = Path(file)
    root = find_root(root)
    says, points = read_study(file, root=root)
    out = root / "papermill_runs" / check_name(file.stem) / "out"
    study = Study(says, points, out, root)
    machine = _share_machine(processes)
    set_environment({**QUIET, "OMP_NUM_THREADS": str(len(machine.cores[0]))})
    out.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(out / ".lock", timeout=0):
        # what failed, or was lost with its process, is in the queue again the second time
        for _ in range(TRIES):
            queue = _fill_queue(study)
            _work_off(queue, study, machine)
        table = _tabulate(queue)
        # the table is there whole or not at all, like all results
        part = out / ".results.part"
        table.to_parquet(part)
        os.replace(part, out / "results.parquet")
    return table


# ---- what a study file says


def read_study(
    file: str | Path, *, root: str | Path | None = None
) -> tuple[dict[str, Any], dict[str, Values]]:
    """Read a study file and list the runs that it asks for; nothing is written or executed.

    Parameters
    ----------
    file : YAML; see `run_study`.
    root : the repository; see `medtune.runs.find_root`.

    Returns
    -------
    tuple : what the file says, its defaults filled in, with "of the base" (the base's parameters)
        and "before" (the notebooks whose results are the base's); and for the name of each run the
        parameters of its notebooks.

    Raises
    ------
    ValueError : a key, a factor or a level is wrong, or two runs are the same.
    FileNotFoundError : the base or its results are missing.
    """
    file = Path(file)
    root = find_root(root)
    says = _read_file(file)
    base = load_run(says["base"], root)
    declared = {}
    for notebook in says["notebooks"]:
        path = root / "notebooks" / f"{check_name(notebook)}.ipynb"
        declared[notebook] = base.declared.get(notebook) or declared_parameters(path)
    values_of_base = resolve(replace(base, declared={**base.declared, **declared}))
    says["of the base"] = values_of_base
    # their results are shared, such as 02's converted data
    says["before"] = [notebook for notebook in base.declared if notebook < min(declared)]
    # curves to look at while it runs
    if any(values.get("report_to") == "none" for values in values_of_base.values()):
        says["fixed"] = {"report_to": "tensorboard", **says["fixed"]}
    _check_finished(says, root)
    usual = {}
    for notebook in declared:
        values = values_of_base[notebook]
        usual[notebook] = {key: value for key, value in values.items() if key != "run_dir"}
    for key, value in says["fixed"].items():
        usual = _with_level(usual, key, value, declared, file.name)
    points: dict[str, Values] = {}
    for grid in says["factors"]:
        points.update(_points_of(grid, usual, declared, file.name))
    return says, points


def _read_file(file: Path) -> dict[str, Any]:
    """Read a study file, fill in what it leaves out, and check keys and types."""
    says = {**DEFAULTS, **read_yaml(file, file.name)}
    # one grid may stand without its list
    if isinstance(says["factors"], dict):
        says["factors"] = [says["factors"]]
    for key, value in says.items():
        unknown = key not in DEFAULTS
        missing = key in ("base", "factors") and not value
        # the very type: True is no number of runs
        if unknown or missing or type(value) is not type(DEFAULTS[key]):
            problem = f"{key!r} is missing, unknown or of a wrong type"
            raise ValueError(f"{file.name}: {problem} (of {', '.join(DEFAULTS)})")
    for grid in says["factors"]:
        if not isinstance(grid, dict):
            raise ValueError(f"{file.name}: factors must map parameters to levels, not {grid!r}")
    return says


def _check_finished(says: dict[str, Any], root: Path) -> None:
    """Raise FileNotFoundError if the base run has not come to the study's first notebook."""
    if not says["before"]:
        return
    last = says["before"][-1]
    base = root / "papermill_runs" / says["base"]
    if not (base / "out" / last / "summary.json").exists():
        advice = "start it with 'medtune run'"
        raise FileNotFoundError(f"{last} of run {says['base']!r} is not finished: {advice}")


def _with_level(
    values: Values,
    factor: str,
    level: Any,
    declared: dict[str, dict[str, Parameter]],
    file_name: str,
) -> Values:
    """Return parameters in which a factor, `key` or `NOTEBOOK.key`, has another level."""
    where = f"{file_name}: {factor}"
    section, _, key = factor.rpartition(".")
    among = [notebook for notebook in declared if notebook.startswith(section)]
    check_key(key, merge(declared[notebook] for notebook in among), where)
    changed = dict(values)
    # a key such as seed may be declared by several notebooks: it changes in all of them
    for notebook in among:
        if key in declared[notebook]:
            checked = check_value(level, declared[notebook][key], where)
            changed[notebook] = {**values[notebook], key: checked}
    return changed


def _points_of(
    grid: dict[str, list[Any]],
    usual: Values,
    declared: dict[str, dict[str, Parameter]],
    file_name: str,
) -> dict[str, Values]:
    """Return the runs of one grid: every combination of its levels, by the run's name."""
    for factor, levels in grid.items():
        if not isinstance(levels, list):
            raise ValueError(f"{file_name}: {factor} needs a list of levels")
    points: dict[str, Values] = {}
    for levels in itertools.product(*grid.values()):
        values = usual
        for factor, level in zip(grid, levels, strict=True):
            values = _with_level(values, factor, level, declared, file_name)
        run = _name_of(values, usual)
        if run in points:
            raise ValueError(f"{file_name}: two runs are the same, {run}")
        points[run] = values
    return points


def _name_of(values: Values, usual: Values) -> str:
    """Name a run by what is not as usual in it, such as `lora_r-4_seed-1`."""
    unusual = {}
    for notebook, parameters in values.items():
        for key, value in parameters.items():
            if value != usual[notebook][key]:
                unusual[key] = value
    text = "_".join(f"{key}-{value}" for key, value in unusual.items())
    # a folder's name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text) or "base"


# ---- the queue, and the processes that work it off


def _share_machine(processes: int | None) -> Machine:
    """Share GPUs and CPU cores among so many processes; by default among as many as fit."""
    if hasattr(os, "sched_getaffinity"):
        cores = sorted(os.sched_getaffinity(0))
    else:
        # affinity is unknown to macOS
        cores = list(range(os.cpu_count() or 1))
    devices = sorted(Path("/dev").glob("nvidia[0-9]*"))
    found = ",".join(path.name.removeprefix("nvidia") for path in devices)
    gpus = (os.environ.get("CUDA_VISIBLE_DEVICES") or found).split(",")
    if not processes:
        fit_in_memory = psutil.virtual_memory().available // MEMORY_OF_A_RUN
        # without a GPU the list is one empty text
        fit = len(gpus) if gpus[0] else min(len(cores), fit_in_memory)
        processes = max(1, fit)
    size = max(1, len(cores) // processes)
    first_cores = range(0, len(cores) - size + 1, size)
    shares = [cores[first : first + size] for first in first_cores]
    return Machine(processes, gpus, shares)


def _fill_queue(study: Study) -> optuna.Study:
    """Open the study's queue in `study.db`; what is not finished waits in it afterwards.

    Raises
    ------
    ValueError : the study file or its base was changed since the queue was made.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    database = f"sqlite:///{study.out / 'study.db'}"
    # so many seconds may another process keep the database
    storage = optuna.storages.RDBStorage(database, {"connect_args": {"timeout": 60}})
    # without further words the sampler is TPE and the pruner the median
    queue = optuna.create_study(study_name="study", storage=storage, load_if_exists=True)
    if queue.user_attrs.get("says", study.says) != study.says:
        file = f"{study.out.parent.name}.yaml"
        problem = "or its base was changed since the first start: take another name"
        raise ValueError(f"{file} {problem}")
    queue.set_user_attr("says", study.says)
    for trial in queue.get_trials(states=[optuna.trial.TrialState.RUNNING]):
        # we hold the lock, so its process is no more
        queue.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    states = {trial.user_attrs.get("run"): trial.state.name for trial in queue.trials}
    for run, values in study.points.items():
        _write_run(study, run, values)
        steps = plan_steps(study.name_of(run), study.root)
        finished = all(step.finished for step in steps)
        settled = finished or states.get(run) in ("PRUNED", "WAITING")
        # a search chooses its runs when it comes to them
        if not settled and not study.says["search"]:
            queue.enqueue_trial(_levels(study.says, values), user_attrs={"run": run})
    return queue


def _write_run(study: Study, run: str, values: Values) -> None:
    """Write a run's `params.yaml`, and link the results of the base's earlier notebooks."""
    results = study.out / run / "out"
    results.mkdir(parents=True, exist_ok=True)
    content = {"notebooks": list(values), **values}
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    write_whole(study.out / run / "params.yaml", text)
    for before in study.says["before"]:
        link = results / before
        if not link.is_symlink():
            link.symlink_to(study.base_out / before)


def _work_off(queue: optuna.Study, study: Study, machine: Machine) -> None:
    """Execute what waits in the queue, or what is left of a search, and return when all is done."""
    waiting = sum(trial.state.name == "WAITING" for trial in queue.trials)
    left = waiting or max(0, study.says["search"] - len(queue.trials))
    if not left:
        return
    # no function of this function: a trial that goes to another process takes its queue along
    queue.ask = functools.partial(_ask_alone, queue)
    # not by fork: threads and CUDA do not survive it
    pool = ProcessPoolExecutor(
        min(machine.processes, left),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin_process,
        initargs=(machine, study.root),
    )
    with pool:
        queue.optimize(
            functools.partial(_objective, pool, study),
            left,
            n_jobs=machine.processes,
            # a run that fails must not end the others
            catch=(Exception,),
            show_progress_bar=True,
        )


def _ask_alone(queue: optuna.Study) -> optuna.Trial:
    """Ask for a run, one thread at a time: SQLite locks no rows, so two could get the same one."""
    with ASKING:
        return type(queue).ask(queue)


def _objective(pool: ProcessPoolExecutor, study: Study, trial: optuna.Trial) -> float:
    """Execute the run that Optuna chose in a process of the pool; returns what is minimized."""
    run = _choose(study, trial)
    trial.set_user_attr("run", run)
    found = {}
    for values in study.points[run].values():
        for key, value in values.items():
            # a cell of the table holds no list
            found[key] = value if isinstance(value, int | float | str) else str(value)
    # told of every evaluation, a trial writes to the database each time: only where it must
    watcher = trial if study.says["prune"] else None
    try:
        work = pool.submit(_run_here, study.name_of(run), study.root, watcher)
        found |= work.result()
        return found[study.says["minimize"]]
    except Exception as error:
        found["error"] = str(error)
        raise
    finally:
        trial.set_user_attr("found", found)


def _choose(study: Study, trial: optuna.Trial) -> str:
    """Let Optuna choose a level of each factor; returns the run that has them."""
    levels = {run: _levels(study.says, values) for run, values in study.points.items()}
    factors = next(iter(levels.values()))
    chosen = {}
    for factor in factors:
        # in the order of the file, each once
        choices = list(dict.fromkeys(of_run[factor] for of_run in levels.values()))
        chosen[factor] = trial.suggest_categorical(factor, choices)
    return next(run for run, of_run in levels.items() if of_run == chosen)


def _levels(says: dict[str, Any], values: Values) -> dict[str, Any]:
    """Return the level that each factor of a study has in a run."""
    levels = {}
    for grid in says["factors"]:
        for factor in grid:
            section, _, key = factor.rpartition(".")
            for notebook, parameters in values.items():
                if notebook.startswith(section) and key in parameters:
                    levels[factor] = parameters[key]
                    break
    return levels


def _tabulate(queue: optuna.Study) -> pd.DataFrame:
    """Make the table of a study: one row a run, from its last try."""
    last = {}
    for trial in queue.trials:
        attributes = trial.user_attrs
        # nothing was found where all was killed
        if trial.state.is_finished() and "found" in attributes:
            last[attributes["run"]] = {"state": trial.state.name, **attributes["found"]}
    return pd.DataFrame([{"run": run, "error": "", **row} for run, row in last.items()])


# ---- what happens in a process of the pool


def _begin_process(machine: Machine, root: Path) -> None:
    """Begin a process: GPUs and shares of the CPU cores take turns, and figures go nowhere."""
    # such as SpawnProcess-3
    number = int(multiprocessing.current_process().name.rpartition("-")[2])
    os.environ["MPLBACKEND"] = "agg"
    os.environ["CUDA_VISIBLE_DEVICES"] = machine.gpus[number % len(machine.gpus)]
    # unknown to macOS; it also bounds the processes that load data
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, machine.cores[number % len(machine.cores)])
    os.chdir(root / "notebooks")


def _run_here(name: str, root: Path, trial: optuna.Trial | None) -> dict[str, Any]:
    """Execute a run in this process; returns the numbers of its summaries and its curves."""
    out = root / "papermill_runs" / name / "out"
    execute = functools.partial(_execute_here, trial=trial)
    with (
        open(out / "log.txt", "a") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        summary = execute_all(name, root, execute)
    found = _curves(out)
    # one row with columns such as 03_finetune_lora.eval_loss.after
    # (texts and lists are left out; True counts as a number)
    flat = pd.json_normalize(summary["notebooks"]).iloc[0].to_dict()
    for key, value in flat.items():
        if isinstance(value, int | float):
            found[key] = value
    return found


def _curves(out: Path) -> dict[str, list]:
    """Read steps and losses from the log of a run's training."""
    logged = []
    for path in out.glob("*/log.json"):
        logged += json.loads(path.read_text("utf-8"))
    curves = {}
    for part, key in (("train", "loss"), ("eval", "eval_loss")):
        entries = [entry for entry in logged if key in entry]
        curves[f"{part}_step"] = [entry["step"] for entry in entries]
        curves[f"{part}_loss"] = [entry[key] for entry in entries]
    return curves


def _execute_here(
    step: Step, label: str, notebooks: Path, out: Path, *, trial: optuna.Trial | None
) -> None:
    """Execute a notebook's cells, but for the exercises' solutions, in this process.

    With a trial, its trainer reports to Optuna, which may stop it.
    """
    # what a kernel gives its cells: they call display without importing it
    space: dict[str, Any] = {"__name__": "__main__", "display": display}
    cells = read_cells(notebooks / f"{step.notebook}.ipynb")
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    for number, cell in enumerate(code, 1):
        if has_tag(cell, "solution"):
            continue
        trainer = space.get("trainer")
        try:
            exec("".join(cell["source"]), space)
        except optuna.TrialPruned:
            raise
        except Exception as error:
            problem = f"failed in cell [{number}]: {type(error).__name__}: {error}"
            raise ValueError(f"{step.notebook} {problem}") from error
        # the run's values over the defaults that the cell has just set
        if has_tag(cell, "parameters"):
            space.update(step.values)
        if trial and space.get("trainer") is not trainer:
            space["trainer"].add_callback(_pruning_callback(trial))


def _pruning_callback(trial: optuna.Trial) -> Any:
    """Make a callback for a trainer that reports each evaluation and stops where Optuna says so."""
    # loads torch, which the notebook of a trainer has loaded already
    from transformers import TrainerCallback

    class Report(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            loss = metrics["eval_loss"]
            trial.report(loss, state.global_step)
            if trial.should_prune():
                stopped = f"pruned at step {state.global_step}: held-out loss {loss:.3f}"
                raise optuna.TrialPruned(stopped)

    return Report()
