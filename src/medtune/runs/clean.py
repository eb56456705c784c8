"""Remove what a run left on this machine: pictures, records, answers, checkpoints, caches.

The run's `params.yaml` stays, so that the run can be started again. Outside of the run's folder
only caches go that name nothing but pictures of this run.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from medtune.files import read_json_lines

from .params import check_name, find_root

LOCK = ".lock"
# Go first: a run that is half removed must not look finished.
FIRST = ("state.json", "summary.json")
# Any of these makes a folder one of a model.
MODEL_FILES = ("config.json", "adapter_config.json")
# What the parts of a run are called in the list; the first whose pattern fits a path counts.
HOLDS = {
    "*/checkpoints": "checkpoints",
    "*/checkpoint-*": "checkpoints",
    "*/data": "records and pictures",
    "*/feedback": "what visitors said, and their pictures",
    "*/predictions*": "answers",
    "*.ipynb": "executed notebook, with pictures",
}
# Columns of the sets that medtune lets `datasets` keep on disk.
RECORDS = {"id", "prompt", "completion", "images"}
PAIRS = {"id", "image", "caption"}
# A cache that cannot be told apart safely is shown where it has this share of the run's ids.
SHARE = 0.5


@dataclass(frozen=True)
class Left:
    """One thing that a run left."""

    path: Path
    #: What it holds, in words.
    holds: str
    #: What becomes of it: "remove", "keep", or "tell" for what cannot be told apart safely.
    then: str


def clean(
    name: str,
    root: str | Path | None = None,
    *,
    dry_run: bool = False,
    keep_model: bool = False,
) -> list[dict[str, Any]]:
    """Remove what a run left, and list it; `params.yaml` stays.

    Goes: all of the run's `out/`, and those caches of `datasets` in which every picture is one of
    this run. A cache of pairs of the source does not say where they came from: it is only shown.
    Your own data, the weights of the hub, and the feedback of a chat page that was started
    elsewhere stay as they are.

    Parameters
    ----------
    name : folder in `papermill_runs/`, `<study>/out/<run>`, or a study.
    root : the repository; see `find_root`.
    dry_run : only list.
    keep_model : keep the folders of final models and adapters, which hold no pictures. The run's
        next start replaces them: copy them first.

    Returns
    -------
    list of dict : for each thing "what" it is, "where" it lies, its "MB", and what was "done":
        removed, would be removed, kept, or remove it yourself.

    Raises
    ------
    FileNotFoundError : there is no such run.
    ValueError : the run is in progress, or its folder is a link to another place.
    OSError : something could not be removed; what could be, was.

    Examples
    --------
    >>> import tempfile
    >>> root = Path(tempfile.mkdtemp())
    >>> (root / "notebooks").mkdir()
    >>> answers = root / "papermill_runs" / "mine" / "out" / "05_evaluate"
    >>> answers.mkdir(parents=True)
    >>> _ = (answers / "predictions_base.jsonl").write_text("{}")
    >>> _ = (root / "papermill_runs" / "mine" / "params.yaml").write_text("notebooks: []")
    >>> [(row["what"], row["done"]) for row in clean("mine", root)]
    [('answers', 'removed')]
    >>> answers.exists()
    False
    """
    root = find_root(root)
    out = _find_out(name, root)
    with contextlib.ExitStack() as locks:
        for lock in _locks(name, root):
            _hold(locks, lock, name)
        found = [*_left_in(out, out, keep_model), *_caches(out)]
        rows = [_describe(left, root, dry_run) for left in found]
        if not dry_run:
            _remove_all([left.path for left in found if left.then == "remove"], out)
    return rows


def _find_out(name: str, root: Path) -> Path:
    """Find the folder with the results of a run or a study; it must lie where it seems to lie."""
    for part in Path(name).parts:
        check_name(part)
    folder = root / "papermill_runs" / name
    study_file = root / "papermill_runs" / f"{name}.yaml"
    if not (folder / "params.yaml").is_file() and not study_file.is_file():
        raise FileNotFoundError(f"there is no papermill_runs/{name}/params.yaml: nothing to clean")
    out = folder / "out"
    if out.resolve() != out:
        raise ValueError(
            f"papermill_runs/{name}/out is or lies behind a link to {out.resolve()}: medtune "
            "removes nothing outside the run's folder, remove that one yourself"
        )
    return out


def _locks(name: str, root: Path) -> list[Path]:
    """Name the locks of a run; a study holds one for all of its runs."""
    runs = root / "papermill_runs"
    locks = [runs / name / "out" / LOCK]
    study, inside, _ = name.partition("/out/")
    if inside:
        locks.append(runs / study / "out" / LOCK)
    return locks


def _hold(locks: contextlib.ExitStack, lock: Path, name: str) -> None:
    """Hold a lock until the end, or raise ValueError if the run does."""
    if not lock.parent.is_dir():
        return
    try:
        locks.enter_context(filelock.FileLock(lock, timeout=0))
    except filelock.Timeout:
        raise ValueError(f"run {name!r} is in progress: stop it first") from None


def _left_in(folder: Path, out: Path, keep_model: bool) -> Iterator[Left]:
    """List what is in a folder of results: files, and what is in the folder of each notebook."""
    for path in sorted(_inside(folder)):
        if path == out / LOCK:
            continue
        if _is_model(path):
            yield Left(path, "model", "keep" if keep_model else "remove")
        elif path.parent == out and _is_folder(path) and not _inside(path):
            yield Left(path, "an empty folder", "remove")
        elif _is_folder(path) and (path.parent == out or keep_model and _holds_model(path)):
            yield from _left_in(path, out, keep_model)
        else:
            yield Left(path, _describe_kind(path.relative_to(out)), "remove")


def _describe_kind(relative: Path) -> str:
    for pattern, holds in HOLDS.items():
        if relative.match(pattern):
            return holds
    return "results"


def _is_model(path: Path) -> bool:
    """Tell whether a folder is a final model; a checkpoint has the state of a training besides."""
    if not _is_folder(path) or path.name.startswith("checkpoint"):
        return False
    has_weights = any(path.glob("*.safetensors"))
    return has_weights and any((path / file).is_file() for file in MODEL_FILES)


def _holds_model(path: Path) -> bool:
    """Tell whether there is a final model somewhere below a folder."""
    if path.name.startswith("checkpoint"):
        return False
    inside = [child for child in _inside(path) if _is_folder(child)]
    return any(_is_model(child) or _holds_model(child) for child in inside)


def _is_folder(path: Path) -> bool:
    """Tell whether a path is a folder itself and no link to one."""
    return path.is_dir() and not path.is_symlink()


def _inside(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


# ---- the caches of `datasets`


def _caches(out: Path) -> Iterator[Left]:
    """List the folders in which `datasets` keeps records of a run, or perhaps its pairs."""
    # imported here: it takes seconds, and other commands on runs need none of it
    from datasets import config

    ids = _ids(out)
    for folder in sorted(Path(config.HF_DATASETS_CACHE, "generator").glob("*")):
        then = _whose(folder, out, ids)
        if then == "remove":
            yield Left(folder, "cache of the run's records", then)
        elif then == "tell":
            yield Left(folder, "cache of texts or pictures with the same ids", then)


def _ids(out: Path) -> set[str]:
    """Collect the ids of the records of a run."""
    ids = set()
    for file in out.glob("*/data/*.jsonl"):
        for _, record in read_json_lines(file):
            if isinstance(record, dict) and "id" in record:
                ids.add(str(record["id"]))
    return ids


def _whose(folder: Path, out: Path, ids: set[str]) -> str:
    """Tell whether a cached set is of a run.

    Records name the files of their pictures: if all of these lie in the run's folder, it is, and
    "remove" comes back. Where no file is named, as for pairs that hold the pictures themselves, the
    ids are all there is to go by: "tell" if they are like the run's. Otherwise the result is empty.
    """
    found: set[str] = set()
    pictures = 0
    # also what a kill left, in a folder that is called incomplete
    for file in sorted(folder.glob("*/generator-*.arrow")):
        for batch in _batches(file):
            columns = set(batch.schema.names)
            if columns >= RECORDS:
                files = _files_of_pictures(batch)
                if not all(_lies_in(out, one) for one in files):
                    return ""
                pictures += len(files)
            elif not columns >= PAIRS or not ids:
                # a large cache is not read where there is nothing to compare it with
                return ""
            found |= {str(one) for one in batch.column("id").to_pylist()}
    if pictures:
        return "remove"
    if ids and len(found & ids) >= SHARE * len(ids):
        return "tell"
    return ""


def _files_of_pictures(batch: Any) -> list[str | None]:
    """Give the files that the records of a batch name."""
    files = []
    for pictures in batch.column("images").to_pylist():
        files += [picture["path"] for picture in pictures or ()]
    return files


def _lies_in(out: Path, file: str | None) -> bool:
    return file is not None and Path(os.path.normpath(file)).is_relative_to(out)


def _batches(file: Path) -> Iterator[Any]:
    """Yield the batches of an Arrow file, as far as it can be read."""
    import pyarrow

    with (
        contextlib.suppress(OSError, pyarrow.ArrowInvalid),
        pyarrow.memory_map(str(file)) as memory,
    ):
        yield from pyarrow.ipc.open_stream(memory)


# ---- list and remove


def _describe(left: Left, root: Path, dry_run: bool) -> dict[str, Any]:
    """Give one row of the list."""
    where = left.path
    if where.is_relative_to(root):
        where = where.relative_to(root)
    done = {
        "remove": "would be removed" if dry_run else "removed",
        "keep": "kept",
        "tell": "remove it yourself, if it is of this source",
    }
    megabytes = round(_bytes(left.path) / 1e6, 1)
    return {"what": left.holds, "where": str(where), "MB": megabytes, "done": done[left.then]}


def _bytes(path: Path) -> int:
    """Count the bytes of a file or of all files in a folder; links are not followed."""
    if path.is_symlink() or path.is_file():
        return path.lstat().st_size
    total = 0
    for folder, _, files in os.walk(path):
        for file in files:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(folder, file)).st_size
    return total


def _remove_all(paths: list[Path], out: Path) -> None:
    """Remove files and folders; one that cannot be removed does not keep the others."""
    failed: list[OSError] = []
    for path in sorted(paths, key=lambda path: path.name not in FIRST):
        _remove(path, failed)
    _remove_empty_folders(out)
    if failed:
        first = failed[0]
        raise OSError(
            f"{len(failed)} of the run's files could not be removed, the first is "
            f"{first.filename} ({first.strerror}): make it yours to write, and start again"
        )


def _remove(path: Path, failed: list[OSError]) -> None:
    """Remove a file, a link (not what it leads to) or a folder; note what did not work."""

    def note(_function: Any, _path: str, info: Any) -> None:
        failed.append(info[1])

    if _is_folder(path):
        shutil.rmtree(path, onerror=note)
        return
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        failed.append(error)


def _remove_empty_folders(out: Path) -> None:
    """Remove the folders of notebooks that are empty now, and `out/` with its lock if it is."""
    for folder in _inside(out):
        if _is_folder(folder):
            with contextlib.suppress(OSError):
                folder.rmdir()
    if [path.name for path in _inside(out)] == [LOCK]:
        # Windows removes no file that is open; an empty lock is nothing of a patient
        with contextlib.suppress(OSError):
            (out / LOCK).unlink()
            out.rmdir()
