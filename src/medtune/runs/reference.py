"""Keep a small executed copy of a finished run, without machine paths and patients' pictures."""

import base64
import io
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
LENT = (
    "(the figure as a run on a drawn body shows it, whose pictures may be handed on, with that run's "
    "texts and numbers: run the notebook to see your own)\n"
)
# 10^6 bytes of a reference with the figures that it was lent
MOST_MB_LENT = 5.0
# lent figures are there to be looked at, and a page should stay light
JPEG_QUALITY = 60
MOST_PIXELS_ACROSS = 1000
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
    _check_size(name, texts, max_mb)
    target = root / "papermill_runs" / "reference" / name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for file, text in texts.items():
        write_whole(target / file, text)
    return target


def lend_pictures(name: str, run: str, *, root: str | Path | None = None) -> list[str]:
    """Put the figures of a run on pictures that may be shown into a reference that has none there.

    A cell of the reference gets the figures of the same cell of the run: the same notebook, the same
    id, the same code. Cells tagged `own-pictures` show other pictures than the run's data and get
    none. They become JPEGs, and a line above says whose they are. `write_reference`
    writes the reference anew, without them.

    Parameters
    ----------
    name : folder in `papermill_runs/reference/`.
    run : a run of the same notebooks on pictures that anybody may see, such as `phantom`, which is
        on a drawn body. Nothing tells them from patients' pictures: look at what was lent.
    root : the repository; see `find_root`.

    Returns
    -------
    list of str : the cells that now have figures, as `notebook: cell id`.

    Raises
    ------
    ValueError : there is no such reference, the run is on the sample (a patient's pictures), it has
        executed none of the notebooks, or the reference would grow beyond 5 MB.
    """
    root = find_root(root)
    folder = root / "papermill_runs" / "reference" / name
    texts = {file.name: file.read_text("utf-8") for file in sorted(folder.glob("*.ipynb"))}
    if not texts:
        raise ValueError(f"there is no reference {name!r} in papermill_runs/reference")
    filled = _with_lent(texts, run, root)
    written = {file: _as_text(notebook) for file, notebook in filled.items()}
    _check_size(name, texts | written, MOST_MB_LENT)
    lent = []
    for file, notebook in filled.items():
        write_whole(folder / file, written[file])
        cells = [cell for cell in notebook["cells"] if _has_lent(cell)]
        lent += [f"{Path(file).stem}: {cell['id']}" for cell in cells]
    return lent


def _check_size(name: str, texts: dict[str, str], max_mb: float) -> None:
    size = sum(len(text.encode()) for text in texts.values()) / 1e6
    if size > max_mb:
        allowed = f"a reference may have {max_mb:g}: use smaller figures"
        raise ValueError(f"run {name!r} has {size:.1f} MB, {allowed}")


def _with_lent(texts: dict[str, str], run: str, root: Path) -> dict[str, Any]:
    """Give the notebooks among some references that a run has figures for, with these in them."""
    steps = plan_steps(run, root)
    if any(step.values.get("data", "") == "sample" for step in steps):
        raise ValueError(f"run {run!r} is on the sample, whose pictures show a patient")
    filled = {}
    for step in steps:
        file = f"{step.notebook}.ipynb"
        # only a notebook that has finished is called so; the code of its cells is compared below
        executed = root / "papermill_runs" / run / "out" / file
        if file not in texts or not executed.exists():
            continue
        own = {cell["id"]: cell for cell in json.loads(executed.read_text("utf-8"))["cells"]}
        notebook = json.loads(texts[file])
        for cell in notebook["cells"]:
            other = own.get(cell["id"])
            if other and _takes_figures(cell) and _code(other) == _code(cell):
                _lend(cell, other)
        filled[file] = notebook
    if not filled:
        raise ValueError(f"run {run!r} has executed none of these notebooks: 'medtune run {run}'")
    return filled


def _takes_figures(cell: dict[str, Any]) -> bool:
    """Say whether a cell shows pictures of the run's data, and not of a file of its own."""
    return has_tag(cell, "shows-pictures") and not has_tag(cell, "own-pictures")


def _as_text(notebook: dict[str, Any]) -> str:
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def _code(cell: dict[str, Any]) -> str:
    """Join the code of a cell: some programs write it as one text, others as lines."""
    return "".join(cell["source"])


def _lend(cell: dict[str, Any], other: dict[str, Any]) -> None:
    """Give a cell the figures of another in place of its own; what it printed stays."""
    figures = [output for output in other["outputs"] if "image/png" in output.get("data", {})]
    if not figures:
        return
    printed = [
        output for output in cell["outputs"] if "data" not in output and not _is_lent(output)
    ]
    note = {"output_type": "stream", "name": "stdout", "text": LENT}
    shown = []
    for figure in figures:
        data = {"image/jpeg": _jpeg(figure["data"]["image/png"]), "text/plain": "a figure"}
        shown.append({"output_type": "display_data", "data": data, "metadata": {}})
    cell["outputs"] = [*printed, note, *shown]


def _jpeg(png: str) -> str:
    """Make a light JPEG of a PNG; both as base64."""
    # imported here: listing runs needs none of it
    from PIL import Image

    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    picture.thumbnail((MOST_PIXELS_ACROSS, 10 * MOST_PIXELS_ACROSS))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def _is_lent(output: dict[str, Any]) -> bool:
    return "".join(output.get("text", "")) == LENT


def _has_lent(cell: dict[str, Any]) -> bool:
    return any(_is_lent(output) for output in cell.get("outputs", []))


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
    return _as_text(executed)


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
