"""A new run from an old one: its `params.yaml` with some parameters changed."""

import json
import os
from pathlib import Path
from typing import Any

import yaml

from medtune.files import write_whole

from .params import Parameter, RunFile, check_key, check_name, check_value, load_run, merge, resolve

# Parameters that may name a folder.
FOLDERS = {"data", "image_root", "model_name_or_path", "dicom_folder"}


def copy_run(name: str, new_name: str, overrides: dict[str, Any], root: Path) -> None:
    """Write the `params.yaml` of a new run; one that is there already must say the same.

    Parameters
    ----------
    name : the run to copy.
    new_name : the run to write.
    overrides : what differs; see `medtune.runs.run`.
    root : the repository.

    Raises
    ------
    ValueError : an override does not fit, or a run of the new name has other parameters.
    FileNotFoundError : an override names a file that is not there.
    """
    old = load_run(name, root)
    sections = dict(old.sections)
    usual = resolve(old)
    for given, value in overrides.items():
        _override(sections, given, value, old, usual, root)
    sections = {section: values for section, values in sections.items() if values}
    # complains before anything is written
    resolve(RunFile(new_name, sections, old.declared))
    target = root / "papermill_runs" / check_name(new_name) / "params.yaml"
    if target.exists():
        if load_run(new_name, root).sections != sections:
            advice = "edit its params.yaml, or take another name"
            raise ValueError(f"run {new_name!r} exists with other parameters: {advice}")
        return
    target.parent.mkdir(exist_ok=True)
    changes = ", ".join(f"{key}={value}" for key, value in overrides.items())
    text = yaml.safe_dump(sections, sort_keys=False, allow_unicode=True)
    write_whole(target, f"# Copied from {name}, with: {changes or 'no change'}\n{text}")


def _override(  # noqa: PLR0913 (the run is there twice: as it was, and as it becomes)
    sections: dict[str, Any],
    given: str,
    value: Any,
    old: RunFile,
    usual: dict[str, dict[str, Any]],
    root: Path,
) -> None:
    """Set one parameter, `key` or `NOTEBOOK.key`, in the sections of the new run."""
    where = f"--set {given}"
    section, _, key = given.rpartition(".")
    owners = _owners(section, key, old, where)
    values_now = {json.dumps(usual[notebook][key]) for notebook in owners}
    if len(values_now) > 1:
        choices = " or ".join(f"{notebook}.{key}" for notebook in owners)
        raise ValueError(f"{where}: say which one, {choices}")
    # what several notebooks share is said once
    home = "shared" if len(owners) > 1 else owners[0]
    for owner in owners:
        own_values = dict(sections.get(owner) or {})
        # a section of its own would count before shared
        own_values.pop(key, None)
        sections[owner] = own_values
        new_value = _read_value(key, value, old.declared[owner][key], where, root)
        sections[home] = {**(sections.get(home) or {}), key: new_value}


def _owners(section: str, key: str, run_file: RunFile, where: str) -> list[str]:
    """Return the notebooks that declare `key`: among all, or the one whose name begins so."""
    declared = run_file.declared
    if section in declared:
        among = [section]
    else:
        among = [notebook for notebook in declared if notebook.startswith(section)]
    if section and len(among) != 1:
        begins = f"{section!r} begins {len(among)} of the notebooks {', '.join(declared)}"
        raise ValueError(f"{where}: {begins}")
    known = merge(declared[notebook] for notebook in among)
    check_key(key, known, f"{where}: {section or run_file.name}")
    return [notebook for notebook in among if key in declared[notebook]]


def _read_value(key: str, value: Any, parameter: Parameter, where: str, root: Path) -> Any:
    """Return an override's value: text in the declared type, a path relative to `notebooks/`."""
    if isinstance(value, str):
        value = _read_text(value, parameter, where)
    if not isinstance(value, str):
        return value
    # a bare word can be a file, but a folder of that name may be there by chance: it counts only
    # where a folder is asked for, and 'sample' is always the data set
    is_folder = key in FOLDERS and value != "sample" and os.path.isdir(value)
    if "/" not in value and not os.path.isfile(value) and not is_folder:
        return value
    # os.path says no where pathlib fails, as for a question that is too long for a file's name
    if os.path.exists(value):
        return value if os.path.isabs(value) else os.path.relpath(value, root / "notebooks")
    # 'org/name' may be a name on the hub, '../name' cannot
    if value.startswith((".", "/")) and not os.path.exists(root / "notebooks" / value):
        raise FileNotFoundError(f"{where}: there is no {value}")
    return value


def _read_text(text: str, parameter: Parameter, where: str) -> Any:
    """Read a text as YAML where that fits the declared type, else as it stands: `123` as a name."""
    try:
        return check_value(yaml.safe_load(text), parameter, where)
    except (ValueError, yaml.YAMLError):
        return check_value(text, parameter, where)
