"""A new run from an old one: which notebooks an override reaches, and how its value is read."""

# ruff: noqa: F811 (the fixture root comes from small_runs)

import os
from pathlib import Path

import pytest
import yaml
from small_runs import root  # noqa: F401

from medtune import runs
from medtune.runs.overrides import copy_run


def overridden(root: Path, overrides: dict, name: str = "new") -> dict:
    """The resolved parameters of a copy of the run 'small', without executing it."""
    copy_run("small", name, overrides, root)
    return runs.read_params(name, root=root)


def test_an_override_goes_to_every_notebook_that_declares_it(root):
    params = overridden(root, {"steps": "7", "02.learning_rate": "5e-5", "data": "123"})
    assert params["01_look"]["steps"] == params["02_train"]["steps"] == 7
    assert params["01_look"]["learning_rate"] == 1e-3
    assert params["02_train"]["learning_rate"] == 5e-5
    assert params["01_look"]["data"] == "123", "a text stays a text"
    assert runs.read_params("small", root=root)["01_look"]["steps"] == 5
    written = yaml.safe_load((root / "papermill_runs" / "new" / "params.yaml").read_text())
    assert written["shared"] == {"steps": 7, "data": "123"}
    assert written["02_train"] == {"learning_rate": 5e-5}


def test_override_values_follow_the_declared_type(root):
    overrides = {
        "adapter": "null",
        "layers": "[3, 4]",
        "method": "qlora",
        "data": "no",
        "steps": 3,
    }
    values = overridden(root, overrides)["02_train"]
    assert [values[key] for key in overrides] == [None, [3, 4], "qlora", "no", 3]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"rank": "4"}, "--set rank: small has no parameter 'rank'"),
        ({"step": "4"}, "did you mean 'steps'?"),
        ({"02_train.rank": "4"}, "02_train has no parameter 'rank'"),
        ({"09.steps": "4"}, "'09' begins 0 of the notebooks 01_look, 02_train"),
        ({"0.steps": "4"}, "'0' begins 2 of the notebooks 01_look, 02_train"),
        ({"steps": "many"}, "--set steps must be int, not 'many' (str)"),
        (
            {"learning_rate": "0.1"},
            "say which one, 01_look.learning_rate or 02_train.learning_rate",
        ),
        ({"run_dir": "x"}, "run_dir follows from the run's name"),
        ({"data": "../nowhere.parquet"}, "--set data: there is no ../nowhere.parquet"),
    ],
)
def test_a_wrong_override_leaves_no_run_behind(root, overrides, message):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        runs.run("small", overrides=overrides, new_name="new", root=root)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert os.listdir(root / "papermill_runs") == ["small"]


def test_a_path_is_taken_from_the_current_folder(root, monkeypatch):
    (root / "mine").mkdir()
    (root / "mine" / "a.parquet").write_text("x")
    (root / "mine" / "sample").mkdir()
    (root / "mine" / "pictures").mkdir()
    (root / "mine" / "qlora").mkdir()
    monkeypatch.chdir(root / "mine")
    absolute = str(root / "mine" / "a.parquet")
    for number, (given, taken) in enumerate(
        [
            ("a.parquet", "../mine/a.parquet"),
            ("../mine", "../mine"),
            ("pictures", "../mine/pictures"),
            ("org/name", "org/name"),  # on the hub
            (absolute, absolute),
            ("sample", "sample"),  # the built-in name wins
        ]
    ):
        params = overridden(root, {"data": given}, f"new-{number}")
        assert params["01_look"]["data"] == taken
    # a folder that has the name of a method by chance
    assert overridden(root, {"method": "qlora"}, "other")["01_look"]["method"] == "qlora"


def test_a_long_text_with_a_slash_is_no_path(root):
    question = "/".join(["What is shown?"] * 50)
    assert overridden(root, {"data": question})["01_look"]["data"] == question


def test_overrides_need_a_name_and_a_name_is_not_used_twice(root):
    with pytest.raises(ValueError, match="--name"):
        runs.run("small", overrides={"steps": "7"}, root=root)
    with pytest.raises(ValueError, match="letters, digits"):
        runs.run("small", overrides={"steps": "7"}, new_name="../x", root=root)
    overridden(root, {"steps": "7"})
    # the same again is the same run
    overridden(root, {"steps": "7"})
    for name in ("new", "small"):
        with pytest.raises(ValueError, match="exists with other parameters"):
            overridden(root, {"steps": "8"}, name)
