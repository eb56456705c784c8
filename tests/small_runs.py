"""A repository of tiny notebooks, for the tests of runs and of the command."""

from pathlib import Path

import nbformat
import pytest

# What every tiny notebook does: it notes its start and writes a summary.
WRITE = """import json, pathlib
out = pathlib.Path(run_dir) / NAME
out.mkdir(parents=True, exist_ok=True)
with (out / "starts.txt").open("a") as file:
    file.write("x")
"""
SUMMARY = """summary = {"results": {"loss": learning_rate * steps}, "data": data}
(out / "summary.json").write_text(json.dumps(summary))
"""
PARAMETERS = """data: str = "sample"  # where the pairs come from
learning_rate: float = 1e-3  # step size
steps: int = 10
method: Literal["lora", "qlora"] = "lora"  # how
layers: list[int] = [1, 2]
adapter: str | None = None
run_dir: str = "../papermill_runs/small/out"  # where the run lies
"""


def write_notebook(
    root: Path, name: str, *, parameters: str = PARAMETERS, body: str = "", end: str = SUMMARY
) -> Path:
    """Write a notebook of five cells: the second declares parameters, the fourth is `body`."""
    cells = [
        nbformat.v4.new_code_cell("from typing import Literal"),
        nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(WRITE.replace("NAME", repr(name))),
        nbformat.v4.new_code_cell(body),
        nbformat.v4.new_code_cell(end),
    ]
    path = root / "notebooks" / f"{name}.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def write_params(root: Path, text: str, name: str = "small") -> Path:
    """Write the `params.yaml` of a run."""
    path = root / "papermill_runs" / name / "params.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    return path


def starts(root: Path, notebook: str, run: str = "small") -> int:
    """Count how often a notebook began since its folder was last made new."""
    file = root / "papermill_runs" / run / "out" / notebook / "starts.txt"
    return len(file.read_text()) if file.exists() else 0


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository of two notebooks and the run 'small'."""
    (tmp_path / "notebooks").mkdir()
    write_notebook(tmp_path, "01_look")
    write_notebook(tmp_path, "02_train")
    text = """notebooks: [01_look, 02_train]
shared:
  steps: 5
02_train:
  learning_rate: 2e-4
"""
    write_params(tmp_path, text)
    return tmp_path
