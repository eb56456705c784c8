"""Runs: a folder with a ``params.yaml`` in, executed notebooks and their results out.

``papermill_runs/<name>/params.yaml`` holds a list ``notebooks``, a mapping ``shared`` (for whoever has the key) and one
mapping per notebook; paths in it are relative to ``notebooks/``. Results go to ``out/`` beside it. papermill executes;
this module checks the parameters first and continues from the first notebook whose inputs changed.
"""

import ast
import contextlib
import difflib
import hashlib
import io
import json
import os
import platform
import re
import shutil
import time
import tokenize
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

TYPES = {t.__name__: t for t in (int, float, str, bool, list, dict)} | {"Literal": Literal}
QUIET = {"HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONHASHSEED": "0"}


class Parameter(NamedTuple):
    """One line of a notebook's parameters cell."""

    annotation: str
    type: Any
    default: Any
    help: str


class Step(NamedTuple):
    """One notebook of a run: its parameters, those off their default, a fingerprint of its inputs, its record."""

    notebook: str
    values: dict[str, Any]
    changed: dict[str, Any]
    fingerprint: str
    record: dict[str, Any]
    finished: bool


def find_root(root: str | Path | None = None) -> Path:
    """The repository: `root` itself, else the current folder or one above it, else the clone that medtune runs from."""
    for folder in [Path(root)] if root else [Path.cwd(), *Path.cwd().parents, Path(__file__).parents[2]]:
        if (folder / "notebooks").is_dir() and (folder / "papermill_runs").is_dir():
            return folder.resolve()
    raise FileNotFoundError(f"no notebooks/ and papermill_runs/ in {root or 'this folder or above'}: start in a clone")


def declared_parameters(notebook: str | Path) -> dict[str, Parameter]:
    """What a notebook declares in its one cell tagged ``parameters``, read without running it.

    Raises ValueError if there is not exactly one such cell, or a line in it is not ``name: type = literal``.

    Examples
    --------
    >>> import nbformat, tempfile
    >>> cell = nbformat.v4.new_code_cell("lora_r: int = 16  # rank", metadata={"tags": ["parameters"]})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     nbformat.write(nbformat.v4.new_notebook(cells=[cell]), f"{folder}/03.ipynb")
    ...     declared_parameters(f"{folder}/03.ipynb")["lora_r"]
    Parameter(annotation='int', type=<class 'int'>, default=16, help='rank')
    """
    cells = [c for c in _read_cells(notebook) if "parameters" in c.get("metadata", {}).get("tags", [])]
    if len(cells) != 1:
        raise ValueError(f"{notebook}: {len(cells)} cells are tagged 'parameters', there must be one")
    source, found = "".join(cells[0]["source"]), {}
    try:
        lines = ast.parse(source).body
    except SyntaxError as error:
        raise ValueError(f"{notebook}: the parameters cell does not parse: {error}") from None
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string.lstrip("# ").strip() for t in tokens if t.type == tokenize.COMMENT}
    for line in lines:
        try:
            target = line.targets[0] if isinstance(line, ast.Assign) else line.target
            default = ast.literal_eval(line.value)
            annotation = ast.unparse(line.annotation) if isinstance(line, ast.AnnAssign) else type(default).__name__
            kind = eval(annotation, {"__builtins__": {}}, TYPES)  # can say the names in TYPES and nothing else
            found[target.id] = Parameter(annotation, kind, default, comments.get(line.end_lineno, ""))
        except (AttributeError, ValueError, TypeError, NameError):
            wrong = f"'name: type = literal', not {ast.unparse(line).splitlines()[0]!r}"
            raise ValueError(f"{notebook}: a parameter must read {wrong}") from None
        _check(default, found[target.id], f"{notebook}: {target.id}")
    return found


def read_params(name: str, *, root: str | Path | None = None) -> dict[str, dict[str, Any]]:
    """The parameters of a run: for each notebook, in order, all it declares (own section over shared over default).

    Raises FileNotFoundError or ValueError if a file is missing, a key is not declared, or a value has the wrong type.
    """
    return _resolve(*_load(name, find_root(root)), name)


def run(
    name: str, *, overrides: dict[str, Any] | None = None, new_name: str | None = None, root: str | Path | None = None
) -> dict[str, Any]:
    """Execute the notebooks of ``papermill_runs/<name>``; what is finished and unchanged is kept.

    Unchanged means: the same cells, parameters, files that these name, medtune and package versions, here and in the
    notebooks before. An interrupted notebook finds its own files again and can resume; a changed one starts anew.

    Parameters
    ----------
    overrides
        ``{"key": value}`` for every notebook that has the key, ``{"NOTEBOOK.key": value}`` for one (a beginning of its
        name is enough). Text is read as the declared type, a path from the current folder. Needs `new_name`.
    new_name
        Copy the parameters, with the overrides, to a run of this name and execute that one.

    Returns ``out/summary.json``: ``run``, ``notebooks`` (summaries), ``timing`` (minutes). Raises ValueError or OSError
    if a parameter is wrong, a notebook fails, the run is in progress, or the disk is full.
    """
    import filelock

    root = find_root(root)
    if overrides and not new_name:
        raise ValueError("changed parameters need a run of their own: give it a name with --name")
    if new_name:
        _copy(name, new_name, overrides or {}, root)
        name = new_name
    read_params(name, root=root)  # complains before anything is written
    out = root / "papermill_runs" / name / "out"
    out.mkdir(exist_ok=True)
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)  # the notebooks' processes inherit them
    try:
        with filelock.FileLock(out / ".lock", timeout=0):
            return _execute_all(name, root, _execute)
    except filelock.Timeout:
        raise ValueError(f"run {name!r} is already in progress in papermill_runs/{name}/out") from None


def list_runs(root: str | Path | None = None, *, study: str = "") -> list[dict[str, str]]:
    """Every run, or those of a study: ``run``, ``finished`` (such as "2 of 6"), ``minutes``, ``note`` if it failed."""
    rows, folder = [], find_root(root) / "papermill_runs"
    root, where = folder.parent, f"{_safe(study)}/out/*" if study else "*"
    for name in sorted(str(path.parent.relative_to(folder)) for path in folder.glob(f"{where}/params.yaml")):
        finished = minutes = ""
        try:
            plan = _plan(name, root)
            finished = f"{sum(step.finished for step in plan)} of {len(plan)}"
            minutes = f"{sum(step.record['minutes'] for step in plan if step.finished):.1f}"
            note = next((s.record.get("error", "") for s in plan if not s.finished), "")
        except (ValueError, OSError) as error:
            note = str(error)
        rows.append({"run": name, "finished": finished, "minutes": minutes, "note": note})
    return rows


def write_reference(name: str, *, root: str | Path | None = None, max_mb: float = 3.0) -> Path:
    """Copy a finished run's notebooks and summary, `max_mb` (10^6 bytes) at most, to ``papermill_runs/reference/``.

    Without paths of this machine and patients' pictures (figures of cells tagged ``shows-pictures``). Raises ValueError
    if the run is not finished or takes more.
    """
    root = find_root(root)
    plan, out, texts = _plan(name, root), root / "papermill_runs" / name / "out", {}
    if missing := [step.notebook for step in plan if not step.finished]:
        raise ValueError(f"run {name!r} has no finished {missing[0]}: start 'medtune run {name}' first")
    for file in [*(f"{step.notebook}.ipynb" for step in plan), "summary.json"]:
        text = (out / file).read_text("utf-8").replace(str(root), ".").replace(str(Path.home()), "~")
        texts[file] = _without_pictures(text) if file.endswith(".ipynb") else text
    if (size := sum(len(text.encode()) for text in texts.values()) / 1e6) > max_mb:
        raise ValueError(f"run {name!r} has {size:.1f} MB, a reference may have {max_mb:g}: use smaller figures")
    shutil.rmtree(target := root / "papermill_runs" / "reference" / name, ignore_errors=True)
    target.mkdir(parents=True)
    for file, text in texts.items():
        _write(target / file, text)
    return target


def _without_pictures(notebook: str) -> str:
    executed, instead = json.loads(notebook), "(a figure with a patient's pictures: run the notebook to see it)"
    for cell in (cell for cell in executed["cells"] if "shows-pictures" in cell["metadata"].get("tags", [])):
        for output in cell["outputs"]:
            output |= {"data": {"text/plain": instead}} if "data" in output else {}
    return json.dumps(executed, indent=1, ensure_ascii=False) + "\n"


def _execute_all(name: str, root: Path, execute: Callable) -> dict[str, Any]:
    plan, notebooks, out = _plan(name, root), root / "notebooks", root / "papermill_runs" / name / "out"
    state = {step.notebook: step.record for step in plan if step.finished}
    for step in plan[len(state) :]:  # nothing of an older version may stand beside the new results
        for file in (out / f"{step.notebook}.ipynb", out / f"{step.notebook}.failed.ipynb", out / "summary.json"):
            file.unlink(missing_ok=True)
        if step.record.get("fingerprint") != step.fingerprint or "minutes" in step.record:
            shutil.rmtree(out / step.notebook, ignore_errors=True)
    for i, step in enumerate(plan, 1):
        label, start = f"{step.notebook} ({i}/{len(plan)})", time.monotonic()
        if step.finished:
            print(f"{label}: finished before and unchanged")
            continue
        record = {"fingerprint": step.fingerprint, "error": f"{step.notebook} is running, or was stopped"}
        state[step.notebook] = record
        _write(out / "state.json", json.dumps(state, indent=1))
        try:
            execute(step, label, notebooks, out)
            record |= {"minutes": round((time.monotonic() - start) / 60, 2), "error": ""}
        except Exception as error:
            record["error"] = str(error)
            raise
        finally:
            _write(out / "state.json", json.dumps(state, indent=1))
    timing = {notebook: record["minutes"] for notebook, record in state.items()}
    summaries = {n: json.loads((out / n / "summary.json").read_text("utf-8")) for n in timing}
    summary = {"run": name, "notebooks": summaries, "timing": timing}
    _write(out / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False))
    return summary


def _execute(step: Step, label: str, notebooks: Path, out: Path) -> None:
    from papermill import PapermillExecutionError, execute_notebook

    source, part, problem = notebooks / f"{step.notebook}.ipynb", out / f"{step.notebook}.failed.ipynb", None
    bar = {"desc": label, "bar_format": "{desc} {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} cells, {elapsed}"}
    how = {"kernel_name": "python3", "language": "python", "cwd": str(notebooks), "progress_bar": bar}
    how["extra_arguments"] = ["--log-level=ERROR"]  # or each kernel warns that it listens on a local port
    try:  # papermill writes after every cell: the file is called failed until the notebook has finished
        executed = execute_notebook(str(source), str(part), step.changed, **how)
        json.loads((out / step.notebook / "summary.json").read_text("utf-8"))
    except PapermillExecutionError as error:
        problem = f"failed in cell [{error.exec_count}]: " + " ".join(f"{error.ename}: {error.evalue}".split())[:500]
    except RuntimeError:  # the kernel died
        problem = "lost its Python process, often for want of memory"
    except (FileNotFoundError, json.JSONDecodeError) as error:
        problem = f"wrote no summary.json that can be read ({error})"
    if problem:
        raise ValueError(f"{step.notebook} {problem}; executed so far: {os.path.relpath(part, notebooks.parent)}")
    executed.metadata["papermill"] = {"parameters": step.changed}  # the rest is times and paths of this machine
    part.write_text(json.dumps(executed, indent=1, ensure_ascii=False) + "\n", "utf-8")
    os.replace(part, out / f"{step.notebook}.ipynb")


def _plan(name: str, root: Path) -> list[Step]:
    out, steps, kept = root / "papermill_runs" / name / "out", [], True
    params, chain = read_params(name, root=root), _environment()
    state = json.loads((out / "state.json").read_text("utf-8")) if (out / "state.json").exists() else {}
    for notebook, values in params.items():
        source = root / "notebooks" / f"{notebook}.ipynb"
        cells = [[c["cell_type"], "".join(c["source"])] for c in _read_cells(source)]
        files = [_stamp(v, root) for k, v in values.items() if isinstance(v, str) and k != "run_dir"]
        chain = hashlib.sha256(json.dumps([chain, cells, values, files], sort_keys=True).encode()).hexdigest()
        record, done = state.get(notebook, {}), out / notebook / "summary.json"
        kept = kept and record.get("fingerprint") == chain and "minutes" in record and done.exists()
        declared = declared_parameters(source)
        changed = {k: v for k, v in values.items() if v != declared[k].default}
        steps.append(Step(notebook, values, changed, chain, record, kept))
    return steps


def _environment() -> str:
    try:
        needed = {re.split(r"[^\w.-]", r)[0] for r in metadata.requires("medtune") or [] if "extra ==" not in r}
        versions = [f"{name} {metadata.version(name)}" for name in sorted(needed)]
    except metadata.PackageNotFoundError as error:
        versions = [str(error)]
    files = sorted(f for f in Path(__file__).parent.rglob("*.*") if f.suffix in (".py", ".json", ".toml"))  # and data
    code = {str(file.relative_to(Path(__file__).parent)): file.read_text("utf-8") for file in files}
    return json.dumps([platform.python_version(), versions, code])


def _stamp(value: str, root: Path) -> list[list[Any]]:
    """Tells whether the file or folder that a value names has changed; empty if it names neither."""
    path = root / "data" / "build_sample.py" if value == "sample" else root / "notebooks" / value
    paths = sorted([path, *path.rglob("*")]) if value and os.path.exists(path) else []
    return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in paths if p.is_file()]


def _load(name: str, root: Path) -> tuple[dict[str, Any], dict[str, dict[str, Parameter]]]:
    """A params.yaml as it stands, and what each of its notebooks declares."""
    where = f"papermill_runs/{_safe(name, '(/out/[A-Za-z0-9][A-Za-z0-9._-]*)?')}/params.yaml"  # or a study's run
    if not (root / where).is_file():
        runs = ", ".join(sorted(path.parent.name for path in (root / "papermill_runs").glob("*/params.yaml")))
        raise FileNotFoundError(f"there is no {where}; the runs here: {runs or 'none'}")
    raw = _read_yaml(root / where, where)
    if not isinstance(raw.get("notebooks"), list) or not raw["notebooks"]:
        raise ValueError(f"{where} needs a list 'notebooks'")
    for section, values in raw.items():
        if section not in ("notebooks", "shared", *raw["notebooks"]):
            raise ValueError(f"{where} has an unknown section {section!r}: it takes notebooks, shared, and their names")
        if section != "notebooks" and not isinstance(values, dict | None):
            raise ValueError(f"{where}: {section} must map names to values")
    return raw, {n: declared_parameters(root / "notebooks" / f"{_safe(n)}.ipynb") for n in raw["notebooks"]}


def _resolve(raw: dict, declared: dict[str, dict[str, Parameter]], name: str) -> dict[str, dict[str, Any]]:
    where, resolved = f"papermill_runs/{name}/params.yaml", {}
    for section, known in {"shared": {k: p for d in declared.values() for k, p in d.items()}, **declared}.items():
        for key in raw.get(section) or {}:
            _known(key, known, f"{where}: {section}")
    for notebook, parameters in declared.items():
        if "run_dir" not in parameters:
            raise ValueError(f"{notebook} declares no run_dir: it would not know where to write")
        values = {key: parameter.default for key, parameter in parameters.items()}
        for section in ("shared", notebook):
            for key, value in (raw.get(section) or {}).items():
                if key in parameters:
                    values[key] = _check(value, parameters[key], f"{where}: {section}.{key}")
        resolved[notebook] = values | {"run_dir": f"../papermill_runs/{name}/out"}
    return resolved


def _copy(name: str, new_name: str, overrides: dict[str, Any], root: Path) -> None:
    """Write the new run's params.yaml; one that is there already must say the same."""
    raw, declared = _load(name, root)
    resolved = _resolve(raw, declared, name)
    for given, value in overrides.items():
        section, _, key = given.rpartition(".")
        among = [n for n in declared if n == section] or [n for n in declared if n.startswith(section)]
        if section and len(among) != 1:
            raise ValueError(f"--set {given}: {section!r} begins {len(among)} of the notebooks {', '.join(declared)}")
        _known(key, {k: p for n in among for k, p in declared[n].items()}, f"--set {given}: {section or name}")
        owners = [n for n in among if key in declared[n]]
        if len({json.dumps(resolved[n][key]) for n in owners}) > 1:
            raise ValueError(f"--set {given}: say which one, {' or '.join(f'{n}.{key}' for n in owners)}")
        for owner in owners:
            raw[owner] = {k: v for k, v in (raw.get(owner) or {}).items() if k != key}
            home = "shared" if len(owners) > 1 else owner
            raw[home] = (raw.get(home) or {}) | {key: _read(value, declared[owner][key], f"--set {given}", root)}
    raw = {section: values for section, values in raw.items() if values}
    _resolve(raw, declared, new_name)
    target = root / "papermill_runs" / _safe(new_name) / "params.yaml"
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        changes = ", ".join(f"{key}={value}" for key, value in overrides.items())
        text = yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)
        _write(target, f"# Copied from {name}, with: {changes or 'no change'}\n{text}")
    elif _load(new_name, root)[0] != raw:
        raise ValueError(f"run {new_name!r} exists with other parameters: edit its params.yaml, or take another name")


def _read(value: Any, parameter: Parameter, where: str, root: Path) -> Any:
    """An override's value: text is read as YAML where that fits the type; a path is taken from the current folder."""
    if isinstance(value, str):
        try:
            value = _check(yaml.safe_load(value), parameter, where)
        except (ValueError, yaml.YAMLError):
            value = _check(value, parameter, where)
    if isinstance(value, str) and (Path(value).is_file() or "/" in value):
        if Path(value).exists():
            return value if os.path.isabs(value) else os.path.relpath(value, root / "notebooks")
        if value.startswith((".", "/")) and not (root / "notebooks" / value).exists():
            raise FileNotFoundError(f"{where}: there is no {value}")
    return value


def _known(key: str, known: dict[str, Parameter], where: str) -> None:
    if key == "run_dir":
        raise ValueError(f"{where}: run_dir follows from the run's name and is not set by hand")
    if key not in known:
        near = difflib.get_close_matches(str(key), known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known) or 'none'}"
        raise ValueError(f"{where} has no parameter {key!r}: {hint}")


def _check(value: Any, parameter: Parameter, where: str) -> Any:
    from pydantic import TypeAdapter, ValidationError

    if parameter.type is float and isinstance(value, str):  # YAML 1.1 takes 2e-4, which has no dot, for a text
        with contextlib.suppress(ValueError):
            value = float(value)
    try:
        return TypeAdapter(parameter.type).validate_python(value, strict=True)
    except ValidationError:
        raise ValueError(f"{where} must be {parameter.annotation}, not {value!r} ({type(value).__name__})") from None


def _read_yaml(path: Path, where: str) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{where} does not parse: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{where} must map names to values")
    return raw


def _safe(name: Any, also: str = "") -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*" + also, str(name)):
        raise ValueError(f"a name here has letters, digits, '.', '_' and '-' only and is not {name!r}")
    return str(name)


def _read_cells(notebook: str | Path) -> list[dict[str, Any]]:
    try:
        return json.loads(Path(notebook).read_text("utf-8"))["cells"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{notebook} is not a notebook: {error!r}") from None


def _write(path: Path, text: str) -> None:
    """Write all or nothing."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text, "utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
