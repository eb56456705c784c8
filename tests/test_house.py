"""The house: what is installed agrees with what is written, starting is cheap, imports point one
way.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import medtune

REPO = Path(__file__).parents[1]
PACKAGE = REPO / "src" / "medtune"
MODULES = sorted(PACKAGE.rglob("*.py"))
# The rooms in the order of the course: data flows one way, so each imports only from those before
# it.
ROOMS = [
    "files",
    "cluster",
    "modelscope",
    "pairs",
    "captions",
    "boxes",
    "audit",
    "records",
    "models",
    "plan",
    "rewards",
    "training",
    "answers",
]
ROOMS += ["scores", "benchmarks", "multitask", "runs", "deploy", "chat", "cli"]
# They start at once, and so load nothing heavy.
LIGHT = ["medtune", "medtune.files", "medtune.cli", "medtune.runs"]
HEAVY = [
    *(
        "accelerate",
        "bitsandbytes",
        "cv2",
        "datasets",
        "deepspeed",
        "evaluate",
        "gradio",
        "jieba",
        "matplotlib",
        "nltk",
    ),
    *(
        "openai",
        "optuna",
        "pandas",
        "papermill",
        "peft",
        "scipy",
        "sentence_transformers",
        "sklearn",
        "torch",
    ),
    *("transformers", "trl"),
]
CARRIED = {".py", ".json", ".toml", ".html", ".css"}
TARGETS = [
    "tutorial",
    "course",
    "catalogues",
    "test",
    "test-fast",
    "test-latest",
    "lab",
    "sample",
    "reference",
    "site",
    "lint",
]
TARGETS += ["constraints", "clean"]
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
COVERED = sorted(set(EXTRAS) - {"gpu"})  # [gpu] cannot be resolved beside a CPU build of torch


def pins() -> dict[str, str]:
    """Canonical name to version, from constraints.txt."""
    lines = [
        line
        for line in (REPO / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    assert all(re.fullmatch(r"[\w.-]+==[\w.!]+", line) for line in lines), (
        "exact versions only, from no special place"
    )
    found = {
        canonicalize_name(name): version for name, version in (line.split("==") for line in lines)
    }
    assert len(found) == len(lines)
    return found


def requirements(*extras: str) -> list[Requirement]:
    """What pyproject.toml asks for."""
    return [
        Requirement(text)
        for text in [*PROJECT["dependencies"], *(t for e in extras for t in EXTRAS[e])]
    ]


def tracked() -> list[Path]:
    """Files that are or would be in git."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(
        command, cwd=REPO, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [REPO / name for name in names if (REPO / name).is_file()]


def make(*arguments: str, path: str | None = None) -> subprocess.CompletedProcess:
    environment = {
        "PATH": path if path is not None else os.environ["PATH"],
        "HOME": os.environ.get("HOME", "/"),
    }
    command = [shutil.which("make"), *arguments]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True, env=environment)


def test_every_requirement_is_pinned_within_its_range():
    pinned = pins()
    for requirement in requirements(*COVERED):
        version = pinned.get(canonicalize_name(requirement.name))
        assert version, f"{requirement.name} is missing: run 'make constraints'"
        assert requirement.specifier.contains(version), f"{requirement} is pinned to {version}"


def test_the_pins_are_complete():
    """Whatever a pinned package asks for is pinned too (for those that are installed as pinned)."""
    pinned = pins()
    installed = {
        canonicalize_name(d.name): d.version.split("+")[0] for d in metadata.distributions()
    }
    todo = [(canonicalize_name(r.name), r.extras) for r in requirements(*COVERED)]
    seen = set()
    while todo:
        name, extras = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        assert name in pinned, f"{name} is not pinned: run 'make constraints'"
        for text in metadata.requires(name) or [] if installed.get(name) == pinned[name] else []:
            needed = Requirement(text)
            if not needed.marker or any(
                needed.marker.evaluate({"extra": extra}) for extra in extras or {""}
            ):
                todo.append((canonicalize_name(needed.name), needed.extras))
    assert len(seen) > 100


def test_no_package_under_the_gpl_and_no_gpu_pins():
    assert not {"pylibjpeg-libjpeg", "torchvision", "liger-kernel"} & pins().keys()
    assert pins()["torch"] == "2.13.0"


def test_the_conda_environment_is_the_same():
    environment = yaml.safe_load((REPO / "environment.yml").read_text())
    assert environment["name"] == "medtune"
    conda = dict(
        line.partition("=")[::2] for line in environment["dependencies"] if isinstance(line, str)
    )
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(
        conda["python"] + ".0"
    )
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert "pip" in conda and "-c constraints.txt" in pip
    (install,) = [line for line in pip if line.startswith("-e")]
    assert sorted(re.fullmatch(r"-e \.\[(.*)\]", install).group(1).split(",")) == COVERED
    ranges = {r.name: r.specifier for r in requirements()}
    exact = [line.split("==") for line in pip if "==" in line]
    assert ["torch", "2.13.0"] in exact
    for name, version in exact:
        assert pins()[name] == version and ranges[name].contains(version)


def test_make_installs_what_the_pins_cover():
    text = (REPO / "Makefile").read_text()
    assert sorted(re.search(r"^EXTRAS := (.*)$", text, re.M).group(1).split(",")) == COVERED
    assert re.search(r"^TORCH := (.*)$", text, re.M).group(1) == f"torch=={pins()['torch']}"


def test_make_lists_its_targets_and_knows_what_to_do():
    listed = make().stdout
    for target in TARGETS:
        assert re.search(rf"^{target} +\w", listed, re.M), target
    plan = make("-n", "tutorial", "VENV=/nowhere/venv").stdout
    assert (
        plan.index("-m venv")
        < plan.index("-c constraints.txt")
        < plan.index("medtune run tiny-cpu")
    )
    assert "--ip=127.0.0.1" in make("-n", "lab").stdout


def test_make_installs_again_only_after_a_change(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pip").touch()
    for stamp in (".core", ".all"):
        (tmp_path / stamp).touch()
    same = make("-n", "test", f"VENV={tmp_path}").stdout
    assert "pip install" not in same and "pytest" in same
    for changed in ("pyproject.toml", "constraints.txt"):
        assert "pip install" in make("-n", "test", f"VENV={tmp_path}", "-W", changed).stdout


def test_make_says_what_is_missing_without_python(tmp_path):
    done = make(f"{tmp_path}/venv/bin/pip", path=str(tmp_path))
    assert (
        done.returncode != 0
        and "Python 3.11 or newer" in done.stderr
        and "python3-venv" in done.stderr
    )
    assert not (tmp_path / "venv").exists()


def test_ci_calls_make_test():
    script = REPO / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    assert script.read_text().rstrip().endswith("make test")


def test_the_hooks_use_tools_of_the_environment():
    config = yaml.safe_load((REPO / ".pre-commit-config.yaml").read_text())
    hooks = [hook for source in config["repos"] for hook in source["hooks"]]
    assert {"nbstripout", "ruff"} <= {hook["id"] for hook in hooks}
    names = {r.name for r in requirements("dev")}
    assert all(hook["language"] == "system" and hook["entry"].split()[0] in names for hook in hooks)
    strip, *options = next(hook["entry"].split() for hook in hooks if hook["id"] == "nbstripout")
    notebooks = sorted((REPO / "notebooks").glob("*.ipynb"))
    subprocess.run(
        [Path(sys.executable).parent / strip, *options, "--verify", *notebooks], check=True
    )


def test_the_package_says_what_it_is():
    about = metadata.metadata("medtune")
    assert about["License-Expression"] == "Apache-2.0" == PROJECT["license"]
    assert metadata.version("medtune") == medtune.__version__
    assert (REPO / "src" / "medtune" / "py.typed").exists()
    assert (
        "Apache License" in (REPO / "LICENSE").read_text()
        and "Unreleased" in (REPO / "CHANGELOG.md").read_text()
    )
    assert PROJECT["scripts"] == {"medtune": "medtune.cli:main"}


def test_the_wheel_carries_the_types_and_the_licence(tmp_path):
    shutil.copytree(REPO / "src" / "medtune", tmp_path / "src" / "medtune")
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(REPO / name, tmp_path)
    (tmp_path / "README.md").write_text("medtune")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation"]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
    (wheel,) = (tmp_path / "dist").glob("medtune-*-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    carried = [
        path for path in PACKAGE.rglob("*") if path.suffix in CARRIED or path.name == "py.typed"
    ]
    assert {f"medtune/{path.relative_to(PACKAGE)}" for path in carried} <= set(names)
    assert any(name.endswith("LICENSE") for name in names) and not any(
        "test" in name for name in names
    )


@pytest.mark.parametrize("module", LIGHT)
def test_what_must_start_at_once_loads_nothing_heavy(module):
    code = f"import sys, {module}; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """The rooms that a file imports from, at its top or inside a function; its own is left out."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module == "medtune":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            package, _, rest = node.module.partition(".")
            found |= {rest.split(".")[0]} if package == "medtune" else set()
        elif (
            isinstance(node, ast.ImportFrom)
            and node.level > len(path.relative_to(PACKAGE).parts) - 1
        ):
            found |= (
                {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
            )
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.split(".")[1]
                for alias in node.names
                if alias.name.startswith("medtune.")
            }
    return (found & {*ROOMS, "plots"}) - {room_of(path)}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_from_rooms_before_it(path):
    room = room_of(path)
    if room in ("__init__", "plots"):
        assert not imported_rooms(path)
        return
    before = ROOMS[: ROOMS.index(room)]
    assert imported_rooms(path) <= {*before, "plots"}


@pytest.mark.slow
def test_every_room_shows_its_public_names():
    code = """
import importlib, sys
for name in sys.argv[1:]:
    room = importlib.import_module(f"medtune.{name}")
    missing = [public for public in room.__all__ if not hasattr(room, public)]
    print(name, missing)
"""
    rooms = [room for room in ROOMS if (PACKAGE / room / "__init__.py").exists()]
    command = [sys.executable, "-c", code, *rooms]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    assert lines == [f"{room} []" for room in rooms], done.stderr[-2000:]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_public_functions_are_documented(path):
    tree = ast.parse(path.read_text("utf-8"))
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path.stem}.{node.name} has no docstring"


@pytest.mark.parametrize("what", [["check"], ["format", "--check"]])
def test_ruff_is_content(what):
    command = [sys.executable, "-m", "ruff", *what, "."]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_clone_stays_small():
    sizes = {path.relative_to(REPO): path.stat().st_size / 1e6 for path in tracked()}
    assert sum(sizes.values()) < 40
    assert not {path: size for path, size in sizes.items() if size > 17}


def test_no_file_names_a_place_of_one_machine():
    """Neither a folder of somebody's machine nor the host of a package registry."""
    hosts = [
        "pypi" + ".org",
        "python" + "hosted",
        "npm" + "js",
        "deb." + "debian",
        "download." + "pytorch",
    ]
    pattern = re.compile(rf"(?<![\w.])/(?:{'wo'}rk|{'ro'}ot)/|{'|'.join(map(re.escape, hosts))}")
    for path in tracked():
        if path.suffix not in {".safetensors", ".parquet", ".png", ".jpg", ".dcm"}:
            hit = pattern.search(path.read_text("utf-8", errors="ignore"))
            assert not hit, f"{path.relative_to(REPO)} has {hit.group()!r}"
