"""Parameters: what a notebook declares, what a run says of it, and whether the two agree.

A notebook declares its parameters in one cell, which is read here and not executed. A run is a
folder `papermill_runs/<name>/` whose `params.yaml` holds a list `notebooks`, a mapping `shared`
(for every notebook that declares the key) and one mapping for each notebook. Paths in it are
relative to `notebooks/`.
"""

import ast
import contextlib
import difflib
import io
import json
import re
import tokenize
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from pydantic import TypeAdapter, ValidationError

# The names that the type of a parameter may be built from, as in `list[int]` or `str | None`.
ANNOTATIONS = {
    "int": int,
    "float": float,
    "str": str,
    "bool": bool,
    "list": list,
    "dict": dict,
    "Literal": Literal,
}
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"


class Parameter(NamedTuple):
    """One line of a notebook's parameters cell."""

    #: The type as it is written, such as `list[int]`.
    annotation: str
    #: The type itself.
    type: Any
    #: The value where a run says nothing.
    default: Any
    #: The comment behind the line.
    help: str


@dataclass(frozen=True)
class RunFile:
    """A run as its `params.yaml` says it, and the parameters that its notebooks declare."""

    #: Folder of the run in `papermill_runs/`.
    name: str
    #: The file as it stands: `notebooks`, `shared`, and a section for each notebook.
    sections: dict[str, Any]
    #: For each notebook, in order, its parameters by name.
    declared: dict[str, dict[str, Parameter]]

    @property
    def path(self) -> str:
        """The file, relative to the repository: it begins the messages about it."""
        return f"papermill_runs/{self.name}/params.yaml"


def find_root(root: str | Path | None = None) -> Path:
    """Find the repository, the folder that holds `notebooks/` and `papermill_runs/`.

    Parameters
    ----------
    root : the repository itself; by default the current folder or the first one above it that
        holds both, else the clone that medtune was installed from.

    Returns
    -------
    Path : the folder, absolute.

    Raises
    ------
    FileNotFoundError : there is no such folder.
    """
    if root:
        candidates = [Path(root)]
    else:
        # src/medtune/runs/params.py: the clone is three folders above this file's
        clone = Path(__file__).parents[3]
        candidates = [Path.cwd(), *Path.cwd().parents, clone]
    for folder in candidates:
        if (folder / "notebooks").is_dir() and (folder / "papermill_runs").is_dir():
            return folder.resolve()
    searched = root or "this folder or above"
    raise FileNotFoundError(f"no notebooks/ and papermill_runs/ in {searched}: start in a clone")


def declared_parameters(notebook: str | Path) -> dict[str, Parameter]:
    """Read what a notebook declares in its one cell tagged `parameters`, without running it.

    Parameters
    ----------
    notebook : an .ipynb file.

    Returns
    -------
    dict : the parameters by name, in the order of the cell.

    Raises
    ------
    ValueError : not exactly one cell has the tag, or a line in it is not `name: type = literal`.
    FileNotFoundError : there is no such notebook.

    Examples
    --------
    >>> import nbformat, tempfile
    >>> source = "lora_r: int = 16  # rank"
    >>> cell = nbformat.v4.new_code_cell(source, metadata={"tags": ["parameters"]})
    >>> file = Path(tempfile.mkdtemp(), "03.ipynb")
    >>> nbformat.write(nbformat.v4.new_notebook(cells=[cell]), file)
    >>> declared_parameters(file)["lora_r"]
    Parameter(annotation='int', type=<class 'int'>, default=16, help='rank')
    """
    source = _parameters_cell(notebook)
    try:
        lines = ast.parse(source).body
    except SyntaxError as error:
        message = f"{notebook}: the parameters cell does not parse: {error}"
        raise ValueError(message) from None
    comments = _comments(source)
    declared = {}
    for line in lines:
        try:
            name, parameter = _read_declaration(line, comments)
        except (ValueError, TypeError, NameError, AttributeError):
            written = ast.unparse(line).splitlines()[0]
            wrong = f"'name: type = literal', not {written!r}"
            raise ValueError(f"{notebook}: a parameter must read {wrong}") from None
        check_value(parameter.default, parameter, f"{notebook}: {name}")
        declared[name] = parameter
    return declared


def _parameters_cell(notebook: str | Path) -> str:
    """Return the source of the one cell tagged `parameters`."""
    tagged = [cell for cell in read_cells(notebook) if has_tag(cell, "parameters")]
    if len(tagged) != 1:
        found = f"{len(tagged)} cells are tagged 'parameters'"
        raise ValueError(f"{notebook}: {found}, there must be one")
    return "".join(tagged[0]["source"])


def _comments(source: str) -> dict[int, str]:
    """Map line numbers to the comments there, which the syntax tree of `ast` leaves out."""
    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("# ").strip()
    return comments


def _read_declaration(line: ast.stmt, comments: dict[int, str]) -> tuple[str, Parameter]:
    """Read `name: type = literal` or `name = literal`; anything else raises one of many errors."""
    if isinstance(line, ast.AnnAssign):
        target = line.target
    elif isinstance(line, ast.Assign):
        target = line.targets[0]
    else:
        raise ValueError("not an assignment")
    # refuses whatever would have to be computed
    default = ast.literal_eval(line.value)
    if isinstance(line, ast.AnnAssign):
        annotation = ast.unparse(line.annotation)
    else:
        annotation = type(default).__name__
    # without builtins, an annotation can say the names in ANNOTATIONS and nothing else
    kind = eval(annotation, {"__builtins__": {}}, ANNOTATIONS)
    return target.id, Parameter(annotation, kind, default, comments.get(line.end_lineno, ""))


def read_params(name: str, *, root: str | Path | None = None) -> dict[str, dict[str, Any]]:
    """Read all parameters of a run: its own section counts before `shared`, that before defaults.

    Parameters
    ----------
    name : folder in `papermill_runs/`, or `<study>/out/<run>` for a run of a study.
    root : the repository; see `find_root`.

    Returns
    -------
    dict : for each notebook, in order, a value for every parameter that it declares.

    Raises
    ------
    FileNotFoundError : the run or one of its notebooks is missing.
    ValueError : a section or a key is not declared, or a value has the wrong type.
    """
    return resolve(load_run(name, find_root(root)))


def load_run(name: str, root: Path) -> RunFile:
    """Load a run's `params.yaml` and the declarations of its notebooks; keys are not checked yet.

    Raises
    ------
    FileNotFoundError : the run or one of its notebooks is missing.
    ValueError : the file is not as the first lines of this module say.
    """
    # a run of its own, or <study>/out/<run>
    if not re.fullmatch(f"{NAME}(/out/{NAME})?", str(name)):
        raise ValueError(_not_a_name(name))
    where = f"papermill_runs/{name}/params.yaml"
    if not (root / where).is_file():
        others = (root / "papermill_runs").glob("*/params.yaml")
        known = sorted(path.parent.name for path in others)
        near = difflib.get_close_matches(str(name), known, n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        here = f"{meant}the runs here: {', '.join(known) or 'none'}"
        raise FileNotFoundError(f"there is no {where}; {here}")
    sections = read_yaml(root / where, where)
    _check_sections(sections, where)
    declared = {}
    for notebook in sections["notebooks"]:
        path = root / "notebooks" / f"{check_name(notebook)}.ipynb"
        declared[notebook] = declared_parameters(path)
    return RunFile(name, sections, declared)


def _check_sections(sections: dict[str, Any], where: str) -> None:
    """Raise ValueError if a `params.yaml` has sections that it cannot have."""
    notebooks = sections.get("notebooks")
    if not isinstance(notebooks, list) or not notebooks:
        raise ValueError(f"{where} needs a list 'notebooks'")
    for section, values in sections.items():
        if section == "notebooks":
            continue
        if section != "shared" and section not in notebooks:
            takes = "it takes notebooks, shared, and their names"
            raise ValueError(f"{where} has an unknown section {section!r}: {takes}")
        # a section whose lines are all comments is None
        if values is not None and not isinstance(values, dict):
            raise ValueError(f"{where}: {section} must map names to values")


def resolve(run_file: RunFile) -> dict[str, dict[str, Any]]:
    """Return every parameter of every notebook of a run, as `read_params` does.

    Raises
    ------
    ValueError : a key is not declared, or a value has the wrong type.
    """
    _check_keys(run_file)
    resolved = {}
    for notebook, parameters in run_file.declared.items():
        if "run_dir" not in parameters:
            lacking = "declares no run_dir: it would not know where to write"
            raise ValueError(f"{notebook} {lacking}")
        values = {key: parameter.default for key, parameter in parameters.items()}
        for section in ("shared", notebook):
            for key, value in (run_file.sections.get(section) or {}).items():
                if key in parameters:
                    where = f"{run_file.path}: {section}.{key}"
                    values[key] = check_value(value, parameters[key], where)
        values["run_dir"] = f"../papermill_runs/{run_file.name}/out"
        resolved[notebook] = values
    return resolved


def _check_keys(run_file: RunFile) -> None:
    """Raise ValueError for the first key of a run that none of the section's notebooks declares."""
    known = {"shared": merge(run_file.declared.values()), **run_file.declared}
    for section, parameters in known.items():
        for key in run_file.sections.get(section) or {}:
            check_key(key, parameters, f"{run_file.path}: {section}")


def merge(declarations: Iterable[dict[str, Parameter]]) -> dict[str, Parameter]:
    """Merge the parameters of several notebooks into one mapping; of one name the last counts."""
    merged: dict[str, Parameter] = {}
    for parameters in declarations:
        merged.update(parameters)
    return merged


def check_key(key: str, known: dict[str, Parameter], where: str) -> None:
    """Raise ValueError, beginning with `where`, if `key` is no parameter that a user may set."""
    if key == "run_dir":
        message = "run_dir follows from the run's name and is not set by hand"
        raise ValueError(f"{where}: {message}")
    if key in known:
        return
    near = difflib.get_close_matches(str(key), known, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known) or 'none'}"
    raise ValueError(f"{where} has no parameter {key!r}: {hint}")


def check_value(value: Any, parameter: Parameter, where: str) -> Any:
    """Return a value in the declared type, or raise ValueError, beginning with `where`.

    Nothing is converted but a whole number, or a number in a text, where a float is declared.

    Examples
    --------
    >>> rate = Parameter("float", float, 1e-3, "step size")
    >>> check_value("2e-4", rate, "shared.learning_rate")
    0.0002
    >>> check_value("fast", rate, "shared.learning_rate")
    Traceback (most recent call last):
    ...
    ValueError: shared.learning_rate must be float, not 'fast' (str)
    """
    # YAML 1.1 takes 2e-4, which has no dot, for a text
    if parameter.type is float and isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    try:
        return TypeAdapter(parameter.type).validate_python(value, strict=True)
    except ValidationError:
        given = f"{value!r} ({type(value).__name__})"
        raise ValueError(f"{where} must be {parameter.annotation}, not {given}") from None


def check_name(name: Any) -> str:
    """Return the name of a run, a study or a notebook; ValueError if it could lead elsewhere."""
    if not re.fullmatch(NAME, str(name)):
        raise ValueError(_not_a_name(name))
    return str(name)


def _not_a_name(name: Any) -> str:
    return f"a name here has letters, digits, '.', '_' and '-' only and is not {name!r}"


def read_yaml(path: Path, where: str) -> dict[str, Any]:
    """Read a YAML file that maps names to values; a ValueError about it begins with `where`."""
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        message = " ".join(str(error).split())
        raise ValueError(f"{where} does not parse: {message}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{where} must map names to values")
    return content


def read_cells(notebook: str | Path) -> list[dict[str, Any]]:
    """Read the cells of a notebook; ValueError if the file is not one."""
    try:
        return json.loads(Path(notebook).read_text("utf-8"))["cells"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{notebook} is not a notebook: {error!r}") from None


def has_tag(cell: dict[str, Any], tag: str) -> bool:
    """Tell whether a notebook's cell has a tag.

    Examples
    --------
    >>> has_tag({"metadata": {"tags": ["parameters"]}}, "parameters")
    True
    """
    return tag in cell.get("metadata", {}).get("tags", [])
