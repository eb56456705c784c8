"""The contract that every notebook keeps. That they run is tested in test_course*.py."""

import ast
import re
from pathlib import Path

import nbformat
import pytest

from medtune import runs

REPO = Path(__file__).parents[1]
NOTEBOOKS = sorted((REPO / "notebooks").glob("*.ipynb"))
DEFAULT_RUN_DIR = "../papermill_runs/tiny-cpu/out"
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
    assert re.fullmatch(r"\d\d[a-z]?(_[a-z0-9]+)+", path.stem)


def test_it_is_valid_and_without_outputs(path, cells):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert notebook.metadata.get("kernelspec", {}).get("name", "python3") == "python3"
    assert not any(cell.get("attachments") for cell in cells)
    for cell in cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, (
                "strip the outputs: nbstripout"
            )


def test_one_cell_of_typed_literals_with_a_comment_each(path, cells):
    (cell,) = tagged(cells, "parameters")
    assert all(isinstance(line, ast.AnnAssign) for line in ast.parse(cell.source).body), (
        "a type for each"
    )
    declared = runs.declared_parameters(path)
    assert not [name for name, parameter in declared.items() if not parameter.help], (
        "a comment for each"
    )
    assert (declared["run_dir"].type, declared["run_dir"].default) == (str, DEFAULT_RUN_DIR)


def test_the_beginning_says_what_to_expect(cells, code):
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")
    start = next(i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", []))
    opening = "\n".join(
        cell.source for cell in cells[:start] if cell.cell_type == "markdown"
    ).lower()
    for word in ("will do", "learn", "need", "minutes", "disk", "licen"):
        assert word in opening, f"the opening says nothing of {word!r}"
    assert re.search(r"^\|", opening, re.M), "a table of hardware, minutes and disk"
    before = "\n".join(cell.source for cell in cells[:start] if cell.cell_type == "code")
    assert re.search(r"^(import|from) ", before, re.M) and "version" in before, (
        "imports and versions come first"
    )


def test_the_end_says_what_to_see_and_where_to_go(path, cells, prose):
    headings = "\n".join(re.findall(r"^#+ .*$", prose, re.M)).lower()
    assert "what you should see" in headings and "exercise" in headings
    later = [other.stem for other in NOTEBOOKS if other.stem > path.stem]
    ending = "\n".join(
        cell.source for cell in cells[len(cells) // 2 :] if cell.cell_type == "markdown"
    )
    assert not later or any(name in ending for name in later), "name the next notebook"


def test_an_exercise_has_room_for_an_answer_and_its_solution_is_folded(cells):
    solutions = [cell for cell in tagged(cells, "solution") if cell.cell_type == "code"]
    assert solutions, "an exercise without a solution teaches half"
    for cell in solutions:
        assert cell.metadata.get("jupyter", {}).get("source_hidden"), "fold the solution"
        before = cells[cells.index(cell) - 1]
        assert "exercise" in before.metadata.get("tags", []), "an empty cell to answer in"
        assert all(line.startswith("#") for line in before.source.splitlines())


def test_it_checks_what_must_hold_and_writes_a_summary(path, code):
    assert any("assert " in source for source in code)
    assert any("summary.json" in source for source in code)
    assert any(path.stem in source for source in code), "results go to run_dir/NN_name/"


def test_plain_python_that_installs_nothing_and_runs_anywhere(code, prose):
    for source in code:
        ast.parse(source)  # neither magics nor shell lines
        assert not re.search(r"\b(pip|conda|apt-get)\b.{0,9}\binstall\b", source)
        assert not re.search(r"""["'](/|~/|[A-Za-z]:\\)[\w.]""", source), "no absolute path"
        assert not re.search(
            r"trust_remote_code\s*=\s*True|\bpickle\b|\blogin\(|push_to_hub\s*=\s*True", source
        )
    text = "\n".join(code) + prose
    assert "base64," not in text and not re.search(r"\bhf_[A-Za-z0-9]{20,}", text)


def test_only_its_own_files_are_read(code):
    """A notebook starts from files in the run folder: no other notebook is imported or executed."""
    assert not re.search(r"^\s*(import|from) (nbformat|papermill)", "\n".join(code), re.M)


def test_the_defaults_are_the_tiny_run():
    """So that "Run All" in JupyterLab is the same as `medtune run tiny-cpu`."""
    for notebook, values in runs.read_params("tiny-cpu", root=REPO).items():
        declared = runs.declared_parameters(REPO / "notebooks" / f"{notebook}.ipynb")
        assert values == {name: parameter.default for name, parameter in declared.items()}


@pytest.mark.parametrize(
    "executed",
    sorted((REPO / "papermill_runs" / "reference").glob("*/*.ipynb")),
    ids=lambda path: f"{path.parent.name}/{path.stem}",
)
def test_executed_references_show_the_code_of_today(executed):
    """Else run them again: medtune reference NAME.

    A default that the run gave another value may have changed since: it had no part in the run.
    """
    injected: list[str] = []
    for cell in nbformat.read(executed, 4).cells:
        if "injected-parameters" in cell.metadata.get("tags", []):
            injected = re.findall(r"^(\w+) = ", cell.source, re.MULTILINE)

    def sources(path: Path) -> list[str]:
        found = []
        for cell in nbformat.read(path, 4).cells:
            tags = cell.metadata.get("tags", [])
            # papermill adds a cell with the parameters of a run
            if cell.cell_type != "code" or "injected-parameters" in tags:
                continue
            source = cell.source
            if "parameters" in tags:
                for name in injected:
                    source = re.sub(rf"^({name}: \w+) = .*?(?=  # )", r"\1", source, flags=re.M)
            found.append(source)
        return found

    assert sources(executed) == sources(REPO / "notebooks" / executed.name)
