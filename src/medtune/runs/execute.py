"""Execute the notebooks of a run, and keep what is finished and unchanged.

`papermill_runs/<name>/params.yaml` says what to execute; results go to `out/` beside it. papermill
executes. Before that, the parameters are checked, and the fingerprints of what each notebook
depends on say where to continue.
"""

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import filelock

from medtune.files import one_line, write_json, write_whole

from .cores import choose_threads, look_at_cores
from .overrides import copy_run
from .params import check_name, declared_parameters, find_root, read_cells, read_params
from .usual import usual_minutes, warn_if_slow

PACKAGE = Path(__file__).parents[1]
# What a notebook's process gets beside what importing medtune sets: sets have the same order.
QUIET = {"PYTHONHASHSEED": "0"}


@dataclass
class Record:
    """What `out/state.json` remembers of a notebook that was started."""

    #: Digest of all that the results depend on, when it was started.
    fingerprint: str = ""
    #: Why it has not finished; empty if it has.
    error: str = ""
    #: How long it took; None if it has not finished.
    minutes: float | None = None


@dataclass(frozen=True)
class Step:
    """One notebook of a run."""

    #: Its name, without `.ipynb`.
    notebook: str
    #: A value for each parameter that it declares.
    values: dict[str, Any]
    #: Those of the values that are not the declared defaults.
    changed: dict[str, Any]
    #: Digest of all that its results depend on, as it is now.
    fingerprint: str
    #: What the last start left.
    record: Record
    #: Its results are there, and neither it nor a notebook before has changed since.
    finished: bool


Execute = Callable[[Step, str, Path, Path], None]
"""Executes a step: gets it, a label to show, the folder of the notebooks, and that of results."""


def run(
    name: str,
    *,
    overrides: dict[str, Any] | None = None,
    new_name: str | None = None,
    until: str | None = None,
    root: str | Path | None = None,
) -> dict[str, Any]:
    """Execute the notebooks of `papermill_runs/<name>`; what is finished and unchanged is kept.

    Unchanged means: the same cells, parameters, files that these name, medtune and package
    versions, here and in the notebooks before. An interrupted notebook finds its own files again
    and can resume; a changed one starts anew.

    Parameters
    ----------
    name : folder in `papermill_runs/`.
    overrides : `{"key": value}` for every notebook that has the key, `{"NOTEBOOK.key": value}` for
        one (a beginning of its name is enough). Text is read as the declared type, a path from the
        current folder. Needs `new_name`.
    new_name : copy the parameters, with the overrides, to a run of this name and execute that one.
    until : the last notebook to execute (a beginning of its name is enough); without it, all.
    root : the repository; see `find_root`.

    Returns
    -------
    dict : as in `out/summary.json`: "run", its name; "notebooks", for each its summary; "timing",
        for each its minutes.

    Raises
    ------
    ValueError : a parameter is wrong, a notebook fails, or the run is in progress elsewhere.
    OSError : a file is missing, or the disk is full.
    """
    root = find_root(root)
    if overrides and not new_name:
        message = "changed parameters need a run of their own: give it a name with --name"
        raise ValueError(message)
    if new_name:
        copy_run(name, new_name, overrides or {}, root)
        name = new_name
    # complains before anything is written
    last = _last_notebook(until, list(read_params(name, root=root)))
    out = root / "papermill_runs" / name / "out"
    out.mkdir(exist_ok=True)
    # before papermill starts the processes, which inherit it
    set_environment(QUIET)
    try:
        with filelock.FileLock(out / ".lock", timeout=0):
            # beside the progress, on the error stream: what a pipe gets is the table
            print(choose_threads(look_at_cores()), file=sys.stderr)
            usual = usual_minutes(name, root)

            def execute(step: Step, label: str, notebooks: Path, out: Path) -> None:
                with warn_if_slow(step.notebook, usual.get(step.notebook)):
                    execute_in_kernel(step, label, notebooks, out)
                found = json.loads((out / step.notebook / "summary.json").read_text("utf-8"))
                print(f"{label}: {results_of(found) or 'finished'}", file=sys.stderr)

            return execute_all(name, root, execute, last=last)
    except filelock.Timeout:
        where = f"papermill_runs/{name}/out"
        raise ValueError(f"run {name!r} is already in progress in {where}") from None


def _last_notebook(until: str | None, notebooks: list[str]) -> str | None:
    """Find the notebook whose name begins with `until`."""
    if until is None:
        return None
    found = [notebook for notebook in notebooks if notebook.startswith(until)]
    if until in found:
        return until
    if len(found) != 1:
        names = ", ".join(found or notebooks)
        many = "several notebooks begin" if found else "no notebook of the run begins"
        raise ValueError(f"until={until!r}: {many} with it; take one of {names}")
    return found[0]


def results_of(summary: dict[str, Any]) -> str:
    """Put the numbers of a notebook's summary into one line.

    Parameters
    ----------
    summary : content of a notebook's `summary.json`.

    Returns
    -------
    str : the numbers in its mapping "results", or else the first six of the summary itself; empty
        if it has none.

    Examples
    --------
    >>> results_of({"seed": 0, "results": {"loss": 0.12345, "passed": True, "steps": 500}})
    'loss 0.1235, steps 500'
    """
    numbers = []
    for key, value in summary.get("results", summary).items():
        # the very types: True is no result
        if type(value) in (int, float) and key != "seed":
            numbers.append(f"{key} {value:.4g}")
    if "results" not in summary:
        numbers = numbers[:6]
    return ", ".join(numbers)


def set_environment(variables: dict[str, str]) -> None:
    """Set the environment variables that are not set yet; the notebooks' processes inherit them."""
    for key, value in variables.items():
        os.environ.setdefault(key, value)


def list_runs(root: str | Path | None = None, *, study: str = "") -> list[dict[str, str]]:
    """List every run, or those of a study.

    Parameters
    ----------
    root : the repository; see `find_root`.
    study : name of a study; without it, the runs in `papermill_runs/`.

    Returns
    -------
    list of dict : for each run its name as "run", "finished" (such as "2 of 6"), "minutes", and
        "note", which says what went wrong.
    """
    root = find_root(root)
    folder = root / "papermill_runs"
    pattern = f"{check_name(study)}/out/*/params.yaml" if study else "*/params.yaml"
    names = sorted(str(path.parent.relative_to(folder)) for path in folder.glob(pattern))
    return [_describe_run(name, root) for name in names]


def _describe_run(name: str, root: Path) -> dict[str, str]:
    """Return one row of `list_runs`."""
    try:
        steps = plan_steps(name, root)
    except (ValueError, OSError) as error:
        return {"run": name, "finished": "", "minutes": "", "note": str(error)}
    done = [step for step in steps if step.finished]
    left = [step for step in steps if not step.finished]
    minutes = sum(step.record.minutes for step in done)
    return {
        "run": name,
        "finished": f"{len(done)} of {len(steps)}",
        "minutes": f"{minutes:.1f}",
        "note": left[0].record.error if left else "",
    }


def execute_all(
    name: str, root: Path, execute: Execute, *, last: str | None = None
) -> dict[str, Any]:
    """Execute what is not finished of a run, one notebook after the other; returns its summary.

    With `last` it ends after that notebook, and the summary has those that are finished.

    Raises
    ------
    ValueError : a parameter is wrong, or a notebook fails.
    OSError : a file is missing, or the disk is full.
    """
    steps = plan_steps(name, root)
    out = root / "papermill_runs" / name / "out"
    _remove_outdated(steps, out)
    names = [step.notebook for step in steps]
    left_out = set() if last is None else set(names[names.index(last) + 1 :])
    records = {}
    for step in steps:
        # what is left out today may have been interrupted before, and can be resumed
        if step.finished or (step.notebook in left_out and step.record.fingerprint):
            records[step.notebook] = step.record
    total = len(steps) - len(left_out)
    for number, step in enumerate(steps[:total], 1):
        label = f"{step.notebook} ({number}/{total})"
        if step.finished:
            print(f"{label}: finished before and unchanged")
            continue
        # a kill leaves this text behind
        stopped = f"{step.notebook} is running, or was stopped"
        record = Record(step.fingerprint, error=stopped)
        records[step.notebook] = record
        _write_state(out, records)
        start = time.monotonic()
        try:
            execute(step, label, root / "notebooks", out)
            record.minutes = round((time.monotonic() - start) / 60, 2)
            record.error = ""
        except Exception as error:
            record.error = str(error)
            raise
        finally:
            _write_state(out, records)
    return _write_summary(name, out, records)


def _remove_outdated(steps: list[Step], out: Path) -> None:
    """Remove what older versions of a run left: it must not stand beside the new results.

    The own files of a notebook that was interrupted and has not changed stay: it can resume.
    """
    for step in steps:
        if step.finished:
            continue
        for state in ("", ".running", ".failed"):
            (out / f"{step.notebook}{state}.ipynb").unlink(missing_ok=True)
        (out / "summary.json").unlink(missing_ok=True)
        interrupted = step.record.minutes is None
        unchanged = step.record.fingerprint == step.fingerprint
        if not (interrupted and unchanged):
            shutil.rmtree(out / step.notebook, ignore_errors=True)


def _write_summary(name: str, out: Path, records: dict[str, Record]) -> dict[str, Any]:
    """Write `summary.json` of what is finished and return its content."""
    summary: dict[str, Any] = {"run": name, "notebooks": {}, "timing": {}}
    for notebook, record in records.items():
        if record.minutes is None:
            continue
        text = (out / notebook / "summary.json").read_text("utf-8")
        summary["notebooks"][notebook] = json.loads(text)
        summary["timing"][notebook] = record.minutes
    write_json(out / "summary.json", summary)
    return summary


def execute_in_kernel(step: Step, label: str, notebooks: Path, out: Path) -> None:
    """Execute a notebook with papermill, in a Python process of its own.

    papermill writes the notebook after every cell: it is called `running` until it has finished,
    and `failed` if it does not.

    Raises
    ------
    ValueError : the notebook failed; one line says where and why.
    """
    # papermill takes two seconds to import, and listing runs needs none of it
    from papermill import PapermillExecutionError

    part = out / f"{step.notebook}.running.ipynb"
    failed = out / f"{step.notebook}.failed.ipynb"
    try:
        executed = _papermill(step, label, notebooks, part)
        # a notebook that wrote no results has not finished, even if no cell failed
        json.loads((out / step.notebook / "summary.json").read_text("utf-8"))
    except PapermillExecutionError as error:
        reason = _both_ends(one_line(f"{error.ename}: {error.evalue}", limit=10_000))
        problem = f"failed in cell [{error.exec_count}]: {reason}"
    except RuntimeError:
        # the kernel died
        problem = "lost its Python process, often for want of memory"
    except (FileNotFoundError, json.JSONDecodeError) as error:
        problem = f"wrote no summary.json that can be read ({error})"
    else:
        _keep(executed, step, part, out)
        return
    if part.exists():
        _forget_places(part)
        os.replace(part, failed)
    so_far = os.path.relpath(failed, notebooks.parent)
    raise ValueError(f"{step.notebook} {problem}; executed so far: {so_far}")


def _both_ends(text: str, most: int = 250) -> str:
    """Leave the middle out of a long error: what a launcher's ranks died of is said at its end."""
    if len(text) <= 2 * most:
        return text
    return f"{text[:most]} […] {text[-most:]}"


def _papermill(step: Step, label: str, notebooks: Path, part: Path) -> Any:
    """Let papermill execute a notebook and write it to `part`; returns the executed notebook."""
    from papermill import execute_notebook

    look = "{desc} {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} cells, {elapsed}"
    return execute_notebook(
        str(notebooks / f"{step.notebook}.ipynb"),
        str(part),
        step.changed,
        kernel_name="python3",
        language="python",
        cwd=str(notebooks),
        progress_bar={"desc": label, "bar_format": look},
        # or each kernel warns that it listens on a local port
        extra_arguments=["--log-level=ERROR"],
    )


def _forget_places(notebook: Path) -> None:
    """Remove what papermill notes of an executed notebook: times, and paths of this machine."""
    # after a full disk it may be cut off
    with contextlib.suppress(ValueError, KeyError):
        content = json.loads(notebook.read_text("utf-8"))
        del content["metadata"]["papermill"]
        notebook.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")


def _keep(executed: Any, step: Step, part: Path, out: Path) -> None:
    """Give a notebook that has finished its own name."""
    # what else papermill notes here is times and paths of this machine
    executed.metadata["papermill"] = {"parameters": step.changed}
    text = json.dumps(executed, indent=1, ensure_ascii=False) + "\n"
    part.write_text(text, "utf-8")
    os.replace(part, out / f"{step.notebook}.ipynb")


def plan_steps(name: str, root: Path) -> list[Step]:
    """Say for each notebook of a run what it depends on and whether its results are still right.

    Raises
    ------
    ValueError : a parameter is wrong.
    OSError : a file is missing.
    """
    out = root / "papermill_runs" / name / "out"
    params = read_params(name, root=root)
    records = _read_state(out)
    # each fingerprint includes the one before, so that a change goes on to all that follow
    fingerprint = _environment()
    kept = True
    steps = []
    for notebook, values in params.items():
        source = root / "notebooks" / f"{notebook}.ipynb"
        fingerprint = _fingerprint(fingerprint, source, values, root)
        record = records.get(notebook, Record())
        done = record.minutes is not None and (out / notebook / "summary.json").exists()
        kept = kept and done and record.fingerprint == fingerprint
        declared = declared_parameters(source)
        changed = {key: value for key, value in values.items() if value != declared[key].default}
        steps.append(Step(notebook, values, changed, fingerprint, record, kept))
    return steps


def _read_state(out: Path) -> dict[str, Record]:
    """Read what the last start left of each notebook; empty before the first."""
    file = out / "state.json"
    if not file.exists():
        return {}
    state = json.loads(file.read_text("utf-8"))
    return {notebook: Record(**remembered) for notebook, remembered in state.items()}


def _write_state(out: Path, records: dict[str, Record]) -> None:
    state = {notebook: asdict(record) for notebook, record in records.items()}
    # ASCII: an error may quote a file name that cannot be written as UTF-8
    write_whole(out / "state.json", json.dumps(state, indent=1))


def _fingerprint(before: str, source: Path, values: dict[str, Any], root: Path) -> str:
    """Digest a notebook's cells, its parameters, the files these name, and what came before."""
    cells = [[cell["cell_type"], "".join(cell["source"])] for cell in read_cells(source)]
    files = []
    for key, value in values.items():
        if isinstance(value, str) and key != "run_dir":
            files.append(_stamps(value, root))
    programs = [file.read_text("utf-8") for file in _programs_of(source)]
    everything = json.dumps([before, cells, values, files, programs], sort_keys=True)
    return hashlib.sha256(everything.encode()).hexdigest()


def _programs_of(notebook: Path) -> list[Path]:
    """Return the programs that a notebook shows and starts: they begin with its number."""
    number = notebook.stem.partition("_")[0]
    return sorted((notebook.parent / "programs").glob(f"{number}_*.py"))


def _stamps(value: str, root: Path) -> list[list[Any]]:
    """Return name, size and time of change of the files that a value names; empty if none.

    `sample` stands for the scripts that build the sample set.
    """
    if value == "sample":
        return _stamps_of(sorted((root / "data").glob("*.py")))
    path = root / "notebooks" / value
    # os.path.exists says no where Path.exists would fail, as for a text that is too long
    if not value or not os.path.exists(path):
        return []
    return _stamps_of([file for file in sorted([path, *path.rglob("*")]) if file.is_file()])


def _stamps_of(files: list[Path]) -> list[list[Any]]:
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _environment() -> str:
    """Return the versions of Python and of what medtune needs, and medtune's own files."""
    code = {}
    for file in package_files():
        code[file.relative_to(PACKAGE).as_posix()] = file.read_text("utf-8")
    return json.dumps([platform.python_version(), _package_versions(), code])


def _package_versions() -> list[str]:
    """Return lines such as `peft 0.21.0` for what medtune requires, its extras left out."""
    try:
        requirements = metadata.requires("medtune") or []
        always = [text for text in requirements if "extra ==" not in text]
        # a requirement reads peft<1,>=0.21
        names = sorted({re.split(r"[^\w.-]", text)[0] for text in always})
        return [f"{name} {metadata.version(name)}" for name in names]
    except metadata.PackageNotFoundError as error:
        # medtune is used from a clone without having been installed
        return [str(error)]


def package_files() -> list[Path]:
    """Return the files of medtune, code and data, that results can depend on."""
    kinds = (".py", ".json", ".toml", ".css")
    return sorted(file for file in PACKAGE.rglob("*.*") if file.suffix in kinds)
