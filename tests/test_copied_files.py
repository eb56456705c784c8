"""Files that README says one may copy: each works in an empty folder, with what its first lines
name and no more.
"""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
PACKAGE = REPO / "src" / "medtune"
# What a file needs beside it.
COMPANIONS = {"captions/rules.py": ["captions/terms.toml"]}
# The name by which a package is installed, where it is imported under another one.
INSTALLED_AS = {"PIL": "pillow", "cv2": "opencv-python-headless", "sklearn": "scikit-learn"}
# Runs the examples of a file, as somebody does who has just copied it: the package is out of reach.
PROGRAM = """
import doctest, importlib, sys
sys.modules["medtune"] = None
copied = importlib.import_module(sys.argv[1])
failed, tried = doctest.testmod(
    copied, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
)
print(f"{tried} examples, {failed} failed")
"""


def listed_files() -> list[str]:
    """The files in the README's table of files to copy, by their path in the package."""
    text = (REPO / "README.md").read_text("utf-8")
    section = text.split("## Copy one file")[1].split("\n## ")[0]
    return re.findall(r"^\| \[`([\w/]+\.py)`\]", section, re.M)


@pytest.mark.parametrize("name", listed_files())
def test_a_copied_file_works_alone(name, tmp_path):
    for file in [name, *COMPANIONS.get(name, [])]:
        shutil.copy(PACKAGE / file, tmp_path)
    command = [sys.executable, "-c", PROGRAM, Path(name).stem]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    summary = re.fullmatch(r"(\d+) examples, 0 failed", done.stdout.strip().splitlines()[-1])
    assert summary, done.stdout[-2000:]
    assert int(summary[1]) > 0, "an example shows how the file is used"


@pytest.mark.parametrize("name", listed_files())
def test_its_first_lines_name_what_it_needs(name):
    tree = ast.parse((PACKAGE / name).read_text("utf-8"))
    opening = ast.get_docstring(tree).split("\n\n")[1]
    assert opening.startswith("Needs "), "the second paragraph says what it needs"
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import cannot be copied"
            imported.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
    for module in imported - set(sys.stdlib_module_names):
        package = INSTALLED_AS.get(module, module)
        assert re.search(rf"\b{re.escape(package)}\b", opening), f"{package} is not named"


def test_the_files_that_people_come_for_are_listed():
    wanted = {
        "pairs/dicom.py",
        "captions/rules.py",
        "boxes/find.py",
        "boxes/draw.py",
        "audit/near.py",
        "audit/splits.py",
        "models/adapters.py",
        "training/checks.py",
        "scores/text.py",
        "scores/intervals.py",
        "plots.py",
    }
    assert wanted <= set(listed_files())
