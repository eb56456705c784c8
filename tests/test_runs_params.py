"""Parameters of runs: what notebooks declare, what a run says, and mistakes that are one line."""

# ruff: noqa: F811 (the fixture root comes from small_runs)

import os
import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from small_runs import root, write_notebook, write_params  # noqa: F401

from medtune import runs
from medtune.runs.params import check_value


def test_parameters_are_read_without_running(root):
    declared = runs.declared_parameters(root / "notebooks" / "01_look.ipynb")
    assert list(declared) == [
        "data",
        "learning_rate",
        "steps",
        "method",
        "layers",
        "adapter",
        "run_dir",
    ]
    assert declared["learning_rate"] == runs.Parameter("float", float, 1e-3, "step size")
    assert declared["layers"].type == list[int] and declared["adapter"].default is None
    assert declared["steps"].help == ""


def test_the_type_of_a_parameter_may_follow_from_its_default(root):
    path = write_notebook(root, "03_short", parameters="steps = 3  # how many")
    declared = runs.declared_parameters(path)
    assert declared["steps"] == runs.Parameter("int", int, 3, "how many")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("lr: float = 1 / 1000", "must read 'name: type = literal'"),
        ("import os", "must read 'name: type = literal'"),
        ("lr += 1", "must read 'name: type = literal'"),
        ("lr: float", "must read 'name: type = literal'"),
        ("lr: Path = 'x'", "must read 'name: type = literal'"),
        ("lr: __import__('os') = 1", "must read 'name: type = literal'"),
        ("lr: int = 1.5", "lr must be int"),
        ("lr: float =", "does not parse"),
    ],
)
def test_a_parameters_cell_holds_typed_literals_only(root, line, message):
    path = write_notebook(root, "03_odd", parameters=line)
    with pytest.raises(ValueError, match=re.escape(message)):
        runs.declared_parameters(path)


def test_a_notebook_without_a_parameters_cell_is_refused(root):
    path = write_notebook(root, "03_odd")
    path.write_text(path.read_text().replace('"parameters"', '"other"'))
    with pytest.raises(ValueError, match="0 cells are tagged 'parameters'"):
        runs.declared_parameters(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="is not a notebook"):
        runs.declared_parameters(path)


def test_own_section_over_shared_over_default(root):
    params = runs.read_params("small", root=root)
    assert list(params) == ["01_look", "02_train"]
    assert params["01_look"]["steps"] == params["02_train"]["steps"] == 5
    assert params["01_look"]["learning_rate"] == 1e-3
    # YAML alone reads 2e-4 as a text
    assert params["02_train"]["learning_rate"] == 2e-4
    assert params["02_train"]["run_dir"] == "../papermill_runs/small/out"


MISTAKES = [
    ("shared: {steps: 5, rank: 3}", "shared has no parameter 'rank'"),
    (
        "02_train: {learning_rat: 0.1}",
        "02_train has no parameter 'learning_rat': did you mean 'learning_rate'?",
    ),
    ("02_train: {steps: five}", "02_train.steps must be int, not 'five' (str)"),
    ("02_train: {steps: 1e3}", "02_train.steps must be int, not '1e3' (str)"),
    ("02_train: {steps: 2.0}", "02_train.steps must be int, not 2.0 (float)"),
    ("02_train: {steps: true}", "02_train.steps must be int, not True (bool)"),
    ("02_train: {learning_rate: fast}", "02_train.learning_rate must be float, not 'fast' (str)"),
    ("02_train: {learning_rate: true}", "02_train.learning_rate must be float, not True (bool)"),
    ("02_train: {data: 5}", "02_train.data must be str, not 5 (int)"),
    ("02_train: {data: null}", "02_train.data must be str, not None (NoneType)"),
    (
        "02_train: {method: full}",
        "02_train.method must be Literal['lora', 'qlora'], not 'full' (str)",
    ),
    ("02_train: {layers: [1, b]}", "02_train.layers must be list[int], not [1, 'b'] (list)"),
    ("02_train: {run_dir: /tmp}", "run_dir follows from the run's name"),
    ("02_train: [1]", "02_train must map names to values"),
    ("03_more: {steps: 1}", "unknown section '03_more'"),
    ("02_train: {steps: [}", "does not parse"),
    ("notebooks: []", "needs a list 'notebooks'"),
    ("notebooks: [../secret]", "is not '../secret'"),
]


@pytest.mark.parametrize(("text", "message"), MISTAKES)
def test_a_wrong_parameter_file_is_one_line_and_nothing_is_written(root, text, message):
    if not text.startswith("notebooks"):
        text = f"notebooks: [01_look, 02_train]\n{text}\n"
    write_params(root, text)
    with pytest.raises(ValueError) as error:
        runs.run("small", root=root)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert "papermill_runs/small/params.yaml" in str(error.value) or "secret" in text
    assert os.listdir(root / "papermill_runs" / "small") == ["params.yaml"]


def test_a_missing_run_or_notebook_is_named(root):
    with pytest.raises(FileNotFoundError, match="the runs here: small"):
        runs.read_params("large", root=root)
    for name in ("../small", ".hidden", "a/b", ""):
        with pytest.raises(ValueError, match="letters, digits"):
            runs.read_params(name, root=root)
    write_params(root, "notebooks: [09_none]")
    with pytest.raises(FileNotFoundError, match="09_none.ipynb"):
        runs.read_params("small", root=root)
    with pytest.raises(FileNotFoundError, match="start in a clone"):
        runs.find_root(root / "notebooks")


def test_the_root_is_found_from_below(root, monkeypatch):
    monkeypatch.chdir(root / "papermill_runs" / "small")
    assert runs.find_root() == root.resolve()


def test_elsewhere_the_root_is_the_clone_of_the_package(repo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert runs.find_root() == repo.resolve()


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_in_any_notation_arrives_exactly(number):
    parameter = runs.Parameter("float", float, 0.0, "")
    for text in (repr(number), f"{number:e}", f"{number:.17E}"):
        loaded = yaml.safe_load(text)
        assert check_value(loaded, parameter, "here") == float(text)
