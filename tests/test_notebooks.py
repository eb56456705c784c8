"""The notebooks: the contract that each of them keeps, and the whole course executed from end to end."""

import ast
import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from medtune import runs

REPO = Path(__file__).parents[1]
NOTEBOOKS = sorted((REPO / "notebooks").glob("*.ipynb"))
XRAYS = REPO.parent / "shared" / "real" / "cxr.parquet"
DEFAULT_RUN_DIR = "../papermill_runs/tiny-cpu/out"
# What the test of the course shortens; everything that a notebook checks still has to hold.
SHORTER = {
    "03.max_steps": 300,
    "04.parity_steps": 2,
    "04.samples": 64,
    "04.eval_samples": 8,
    "07.max_steps": 30,
    "07.eval_samples": 16,
    "07.vain_samples": 8,
    "08.max_steps": 4,
    "08.eval_samples": 4,
    "08.learning_rates": [0.002, 0.004],
    "10.steps": 4,
    "10.fast_steps": 4,
    "10.pairs": 40,
}
pytestmark = pytest.mark.filterwarnings("error::nbformat.warnings.MissingIDFieldWarning")


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request) -> Path:
    return request.param


@pytest.fixture
def cells(path: Path) -> list:
    return nbformat.read(path, 4).cells


@pytest.fixture
def code(cells) -> list[str]:
    return [cell.source for cell in cells if cell.cell_type == "code"]


@pytest.fixture
def prose(cells) -> str:
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def tagged(cells: list, tag: str) -> list:
    return [cell for cell in cells if tag in cell.metadata.get("tags", [])]


def test_the_name_is_a_number_and_words(path):
    assert re.fullmatch(r"\d\d(_[a-z0-9]+)+", path.stem)


def test_it_is_valid_and_without_outputs(path, cells):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert notebook.metadata.get("kernelspec", {}).get("name", "python3") == "python3"
    assert not any(cell.get("attachments") for cell in cells)
    for cell in cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, "strip the outputs: nbstripout"


def test_one_cell_of_typed_literals_with_a_comment_each(path, cells):
    (cell,) = tagged(cells, "parameters")
    assert all(isinstance(line, ast.AnnAssign) for line in ast.parse(cell.source).body), "a type for each"
    declared = runs.declared_parameters(path)
    assert not [name for name, parameter in declared.items() if not parameter.help], "a comment for each"
    assert (declared["run_dir"].type, declared["run_dir"].default) == (str, DEFAULT_RUN_DIR)


def test_the_length_of_a_lesson(code, prose):
    assert 20 <= len(code) <= 35
    lines = [len([line for line in source.splitlines() if line.strip()]) for source in code]
    assert statistics.median(lines) <= 8
    assert 800 <= len(re.findall(r"\w[\w'’-]*", prose)) <= 2000


def test_the_beginning_says_what_to_expect(cells, code):
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")
    start = next(i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", []))
    opening = "\n".join(cell.source for cell in cells[:start] if cell.cell_type == "markdown").lower()
    for word in ("will do", "learn", "need", "minutes", "disk", "licen"):
        assert word in opening, f"the opening says nothing of {word!r}"
    assert re.search(r"^\|", opening, re.M), "a table of hardware, minutes and disk"
    before = "\n".join(cell.source for cell in cells[:start] if cell.cell_type == "code")
    assert re.search(r"^(import|from) ", before, re.M) and "version" in before, "imports and versions come first"


def test_the_end_says_what_to_see_and_where_to_go(path, cells, prose):
    headings = "\n".join(re.findall(r"^#+ .*$", prose, re.M)).lower()
    assert "what you should see" in headings and "exercise" in headings
    assert 2 <= len([cell for cell in tagged(cells, "solution") if cell.cell_type == "code"]) <= 4
    later = [other.stem for other in NOTEBOOKS if other.stem > path.stem]
    ending = "\n".join(cell.source for cell in cells[len(cells) // 2 :] if cell.cell_type == "markdown")
    assert not later or any(name in ending for name in later), "name the next notebook"


def test_it_checks_what_must_hold_and_writes_a_summary(path, code):
    assert any("assert " in source for source in code)
    assert any("summary.json" in source for source in code)
    assert any(path.stem in source for source in code), "results go to run_dir/NN_name/"


def test_plain_python_that_installs_nothing_and_runs_anywhere(code, prose):
    for source in code:
        ast.parse(source)  # neither magics nor shell lines
        assert not re.search(r"\b(pip|conda|apt-get)\b.{0,9}\binstall\b", source)
        assert not re.search(r"""["'](/|~/|[A-Za-z]:\\)[\w.]""", source), "no absolute path"
        assert not re.search(r"trust_remote_code\s*=\s*True|\bpickle\b|\blogin\(|push_to_hub\s*=\s*True", source)
    text = "\n".join(code) + prose
    assert "base64," not in text and not re.search(r"\bhf_[A-Za-z0-9]{20,}", text)


def test_only_its_own_files_are_read(code):
    """A notebook starts from files in the run folder: no other notebook is imported or executed."""
    assert not re.search(r"^\s*(import|from) (nbformat|papermill)", "\n".join(code), re.M)


# ---- the course from end to end


def copy_of_the_clone(folder: Path) -> Path:
    """A root of its own for a run: notebooks and parameters copied, data linked."""
    shutil.copytree(REPO / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns(".*"))
    (folder / "papermill_runs" / "tiny-cpu").mkdir(parents=True)
    shutil.copy(REPO / "papermill_runs" / "tiny-cpu" / "params.yaml", folder / "papermill_runs" / "tiny-cpu")
    (folder / "papermill_runs" / "reference").symlink_to(REPO / "papermill_runs" / "reference")
    (folder / "data").symlink_to(REPO / "data")
    return folder


def medtune(*arguments) -> str:
    """The command as a user starts it; fails with what it complained about."""
    command = [Path(sys.executable).with_name("medtune"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def keys(value, above: str = "") -> list[str]:
    """All keys of nested mappings, as dotted paths."""
    if not isinstance(value, dict):
        return []
    return [path for key, inner in value.items() for path in (f"{above}{key}", *keys(inner, f"{above}{key}."))]


@pytest.fixture(scope="module")
def course(tmp_path_factory, sample_path) -> Path:
    """The output folder of the tiny-cpu run, with fewer steps: enough for the floors that notebook 05 asserts."""
    root = copy_of_the_clone(tmp_path_factory.mktemp("clone"))
    changes = [part for key, value in SHORTER.items() for part in ("--set", f"{key}={value}")]
    table = medtune("run", "tiny-cpu", *changes, "--name", "short", "--root", root)
    assert all(name in table for name in runs.read_params("tiny-cpu", root=root))
    return root / "papermill_runs" / "short" / "out"


def test_the_defaults_are_the_tiny_run():
    """So that "Run All" in JupyterLab is the same as `medtune run tiny-cpu`."""
    for notebook, values in runs.read_params("tiny-cpu", root=REPO).items():
        declared = runs.declared_parameters(REPO / "notebooks" / f"{notebook}.ipynb")
        assert values == {name: parameter.default for name, parameter in declared.items()}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_course_runs_and_each_notebook_leaves_a_summary(course):
    summary = json.loads((course / "summary.json").read_text("utf-8"))
    notebooks = runs.read_params("tiny-cpu", root=REPO)
    assert list(summary["notebooks"]) == list(notebooks)
    for name in notebooks:
        executed = nbformat.read(course / f"{name}.ipynb", 4)
        outputs = [output for cell in executed.cells if cell.cell_type == "code" for output in cell.outputs]
        assert outputs and not any(output.output_type == "error" for output in outputs)
        timed = [key for key in keys(summary["notebooks"][name]) if re.search(r"second|minute|date|_time\b", key)]
        assert all(key.startswith("timing") for key in timed), f"{name}: times belong under 'timing', not {timed}"


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_second_start_keeps_everything(course):
    out = medtune("run", "short", "--root", course.parents[2])
    assert out.count("finished before and unchanged") == len(runs.read_params("tiny-cpu", root=REPO))


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_it_learned_from_the_picture(course):
    scores = json.loads((course / "05_evaluate" / "summary.json").read_text("utf-8"))
    assert scores["name_accuracy"]["base"] == 0 and scores["name_accuracy"]["tuned"] >= 30
    assert scores["name_accuracy"]["shuffled"] <= scores["most_frequent_name"]["name_accuracy"] + 3
    assert scores["place_accuracy"]["tuned"] >= scores["place_accuracy"]["base"] - 5
    assert all(scores["paired"]["tuned_minus_shuffled"][m]["low"] > 0 for m in ("name right", "word BLEU-4"))
    merged = json.loads((course / "06_merge_export" / "summary.json").read_text("utf-8"))
    assert merged["answers"] == merged["answers_same_merged"] == merged["answers_same_reloaded"] == 20


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(not XRAYS.is_file(), reason="the real X-rays are not here")
def test_real_xrays_go_through_all_notebooks(tmp_path):
    root = copy_of_the_clone(tmp_path)
    params = root / "papermill_runs" / "tiny-cpu" / "params.yaml"  # the core: data in, scores and a merged model out
    params.write_text(re.sub(r"^  - (0[4789]|10).*\n", "", params.read_text("utf-8"), flags=re.M), "utf-8")
    changes = ["--set", f"data={XRAYS}", "--set", "03.max_steps=10", "--name", "xrays"]
    medtune("run", "tiny-cpu", *changes, "--root", root)
    scores = json.loads((root / "papermill_runs" / "xrays" / "out" / "05_evaluate" / "summary.json").read_text("utf-8"))
    assert scores["n"] < 20 and scores["uses_picture"] is not True, "so few pairs prove nothing, and it says so"
