"""JupyterLab as a learner uses it: open a notebook, change a parameter, Run All, see pictures and
no error.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

from medtune.pairs import load_pairs
from medtune.records import convert_pairs

REPO = Path(__file__).parents[1]
sys.path.insert(0, str(REPO / "docs"))
import catalogues  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
# Read from JupyterLab itself: cells out of sight are not in the page.
CELLS = "jupyterapp.shell.currentWidget.content.widgets.filter(cell => cell.model.type === 'code')"
DONE = f"""() => {{
    const cells = {CELLS};
    const failed = cells.some(cell => cell.model.outputs.toJSON().some(output => output.output_type === 'error'));
    return failed || cells.every(cell => cell.model.executionCount > 0 && cell.model.executionState === 'idle');
}}"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory, sample_path) -> Path:
    """A clone in which notebook 02 has run on a tenth of the pairs."""
    root = tmp_path_factory.mktemp("clone")
    left_out = shutil.ignore_patterns(".*", "zh")
    shutil.copytree(REPO / "notebooks", root / "notebooks", ignore=left_out)
    # the Chinese notebooks, as `make lab LANGUAGE=zh` writes them
    shutil.copytree(REPO / "docs" / "locale", root / "docs" / "locale")
    catalogues.write_notebooks(root)
    (root / "papermill_runs" / "tiny-cpu").mkdir(parents=True)
    (root / "data").symlink_to(REPO / "data")
    pairs = load_pairs(sample_path)
    boxed = [row for row, box in enumerate(pairs["has_box"]) if box]
    out = root / "papermill_runs" / "tiny-cpu" / "out" / "02_convert_data" / "data"
    convert_pairs(pairs.select(boxed[::10]), out)
    return root


@pytest.fixture(scope="module")
def lab(clone, tmp_path_factory) -> Iterator[str]:
    """The address of JupyterLab over the clone, started as `make lab` does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = tmp_path_factory.mktemp("home")
    # the tests draw without a screen; a notebook draws into itself
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    environment |= {
        "JUPYTER_CONFIG_DIR": str(home),
        "JUPYTER_DATA_DIR": str(home),
        "IPYTHONDIR": str(home),
    }
    options = [f"--port={port}", "--no-browser", "--allow-root", "--IdentityProvider.token=secret"]
    options += ["--LabApp.expose_app_in_browser=True", "--ServerApp.port_retries=0"]
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--ip=127.0.0.1",
        f"--notebook-dir={clone}",
        *options,
    ]
    with open(home / "log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    address = f"http://127.0.0.1:{port}/lab"
    for _ in range(120):
        try:
            urllib.request.urlopen(f"{address}?token=secret", timeout=5).close()
            break
        except OSError:
            assert server.poll() is None, (home / "log").read_text()
            time.sleep(1)
    yield address
    server.terminate()
    try:
        server.wait(60)
    except subprocess.TimeoutExpired:
        # a kernel that still computes keeps it waiting
        server.kill()
        server.wait(30)


def open_notebook(chromium, lab: str, name: str):
    """A page with the notebook and a kernel that waits."""
    page = chromium.new_page(viewport={"width": 1280, "height": 900})
    page.goto(f"{lab}/tree/notebooks/{name}.ipynb?token=secret", timeout=60_000)
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=120_000)
    if (news := page.get_by_role("button", name="No", exact=True)).is_visible():
        news.click()  # whether to fetch news
    return page


def run_all(page, path: Path) -> list:
    """Run All by the menu, wait, save; the code cells as they stand in the file."""
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.wait_for_function(DONE, timeout=600_000, polling=1000)
    page.keyboard.press("Control+s")
    page.wait_for_function(
        "() => !jupyterapp.shell.currentWidget.context.model.dirty", timeout=30_000
    )
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


def pictures_seen(page) -> list[int]:
    """Widths in pixels of the pictures among the outputs, each scrolled into view."""
    at = page.evaluate(
        "() => jupyterapp.shell.currentWidget.content.widgets"
        ".map((cell, i) => cell.model.type === 'code' && cell.model.outputs.toJSON()"
        ".some(output => output.data && output.data['image/png']) ? i : -1).filter(i => i >= 0)"
    )
    widths = []
    for index in at:
        page.evaluate(
            f"() => jupyterapp.shell.currentWidget.content.scrollToItem({index}, 'start')"
        )
        # Lab opens again, in a hidden tab, the notebook that was open before
        picture = page.locator(
            ".jp-NotebookPanel:not(.lm-mod-hidden) "
            f".jp-Cell[data-windowed-list-index='{index}'] .jp-RenderedImage img"
        ).first
        picture.wait_for(timeout=20_000)
        widths.append(picture.evaluate("image => image.naturalWidth"))
    return widths


def failures(cells: list) -> list[str]:
    return [
        f"{o.ename}: {o.evalue}" for cell in cells for o in cell.outputs if o.output_type == "error"
    ]


def test_run_all_of_01_in_chinese_shows_the_data(chromium, lab, clone):
    page = open_notebook(chromium, lab, "zh/01_explore_data")
    chinese = re.compile("[\u4e00-\u9fff]{6,}")
    page.locator(".jp-RenderedMarkdown", has_text=chinese).first.wait_for(timeout=20_000)
    cells = run_all(page, clone / "notebooks" / "zh" / "01_explore_data.ipynb")
    assert not failures(cells) and all(cell.execution_count for cell in cells)
    widths = pictures_seen(page)
    assert len(widths) >= 8 and min(widths) > 200
    assert (
        clone / "papermill_runs" / "tiny-cpu" / "out" / "01_explore_data" / "summary.json"
    ).is_file()
    page.close()


@pytest.mark.parametrize("folder", ["", "zh/"], ids=["in English", "in Chinese"])
def test_run_all_of_03_trains_with_a_changed_parameter(chromium, lab, clone, folder):
    out = clone / "papermill_runs" / "tiny-cpu" / "out" / "03_finetune_lora"
    shutil.rmtree(out, ignore_errors=True)
    page = open_notebook(chromium, lab, f"{folder}03_finetune_lora")
    line = page.locator(".cm-line", has_text=re.compile(r"^max_steps: int = 500"))
    line.get_by_text("500", exact=True).dblclick()
    page.keyboard.type("4")
    cells = run_all(page, clone / "notebooks" / f"{folder}03_finetune_lora.ipynb")
    assert not failures(cells) and all(cell.execution_count for cell in cells)
    (parameters,) = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    assert re.search(r"^max_steps: int = 4  #", parameters.source, re.M)
    widths = pictures_seen(page)
    assert len(widths) >= 3 and min(widths) > 200
    assert json.loads((out / "summary.json").read_text("utf-8"))["results"]["steps"] == 4
    page.close()
