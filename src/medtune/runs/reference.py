"""Keep a small executed copy of a finished run, without machine paths and patients' pictures."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from medtune.files import write_whole

from .execute import plan_steps
from .params import find_root, has_tag

INSTEAD = "(a figure with a patient's pictures: run the notebook to see it)"
# Lines such as "[2026-11-30 07:31:20,066] [WARNING] [real_accelerator.py:213:get_accelerator] ...".
DEEPSPEED_LOG = re.compile(r"\[\d{4}-\d\d-\d\d [\d:,]+\] \[(INFO|WARNING)\] \[\w+\.py:")


def write_reference(
    name: str,
    *,
    root: str | Path | None = None,
    max_mb: float = 4.0,
    own_data: bool = False,
) -> Path:
    """Copy a finished run's notebooks and summary to `papermill_runs/reference/<name>/`.

    Left out are the paths of this machine, and patients' pictures: the figures of cells tagged
    `shows-pictures`.

    Parameters
    ----------
    name : folder in `papermill_runs/`.
    root : the repository; see `find_root`.
    max_mb : what the copy may take at most, in MB (10^6 bytes).
    own_data : also of a run on other data than the sample, whose captions and ids the notebooks
        print. A reference is made to be handed on.

    Returns
    -------
    Path : the folder of the copy; one that was there is replaced.

    Raises
    ------
    ValueError : the run is not finished, it is on data of your own, or the copy would take more
        than `max_mb`.
    """
    root = find_root(root)
    out = root / "papermill_runs" / name / "out"
    steps = plan_steps(name, root)
    missing = [step.notebook for step in steps if not step.finished]
    if missing:
        advice = f"start 'medtune run {name}' first"
        raise ValueError(f"run {name!r} has no finished {missing[0]}: {advice}")
    for step in steps:
        data = step.values.get("data", "sample")
        if data != "sample" and not own_data:
            raise ValueError(
                f"run {name!r} is on {data}: its notebooks show captions and ids of it, and a "
                "reference is made to be handed on; own_data=True keeps one nevertheless"
            )
    texts = {}
    for step in steps:
        file = f"{step.notebook}.ipynb"
        texts[file] = _without_pictures(_without_places(out / file, root))
    texts["summary.json"] = _without_places(out / "summary.json", root)
    size = sum(len(text.encode()) for text in texts.values()) / 1e6
    if size > max_mb:
        allowed = f"a reference may have {max_mb:g}: use smaller figures"
        raise ValueError(f"run {name!r} has {size:.1f} MB, {allowed}")
    target = root / "papermill_runs" / "reference" / name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for file, text in texts.items():
        write_whole(target / file, text)
    return target


def _without_places(file: Path, root: Path) -> str:
    """Read a file; shorten the paths of Python, the repository and the user's home in it."""
    text = file.read_text("utf-8").replace(sys.executable, "python")
    # a virtual environment may lie outside the repository; without one this is a system folder
    if sys.prefix != sys.base_prefix:
        text = text.replace(sys.prefix, ".venv")
    return text.replace(str(root), ".").replace(str(Path.home()), "~")


def _without_pictures(notebook: str) -> str:
    """Replace the figures of cells tagged `shows-pictures` in an executed notebook.

    Progress bars go, which no longer move, and what libraries say on stderr or log as they start.
    """
    executed = json.loads(notebook)
    executed["metadata"].pop("widgets", None)
    for cell in executed["cells"]:
        if "outputs" not in cell:
            continue
        cell["outputs"] = [output for output in cell["outputs"] if not _is_passing(output)]
        if not has_tag(cell, "shows-pictures"):
            continue
        for output in cell["outputs"]:
            # printed text has no data
            if "data" in output:
                output["data"] = {"text/plain": INSTEAD}
    return json.dumps(executed, indent=1, ensure_ascii=False) + "\n"


def _is_passing(output: dict[str, Any]) -> bool:
    """Say whether an output is of no use once a run is over; takes DeepSpeed's lines out of it."""
    if "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
        return True
    if output.get("name") == "stderr":
        return True
    if output.get("name") != "stdout":
        return False
    lines = "".join(output["text"]).splitlines(keepends=True)
    kept = [line for line in lines if not DEEPSPEED_LOG.match(line)]
    output["text"] = "".join(kept)
    return not kept
