"""The page docs/recipes.md says of every recipe what its runs do, step by step.

A value in a code span, such as `02.limit = 800`, is the value of the parameter in all runs of the
recipe, or in those that the span names. Every parameter that a run sets must stand in its table.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from medtune.runs import read_params

REPO = Path(__file__).parents[1]
PAGE = REPO / "docs" / "recipes.md"
HEAD = ["step", "published", "here", "where", "how it differs"]
VERDICT = re.compile(r"as published\b|corrected, because \S|cannot, because \S")
VALUE = re.compile(
    r"(?:(?P<runs>[\w.-]+(?:, [\w.-]+)*): )?(?P<notebook>\d\db?|shared)\.(?P<key>\w+) = (?P<value>.+)"
)


@dataclass(frozen=True)
class Said:
    """What a code span says of a parameter.

    Parameters
    ----------
    runs : ends of the names of the runs that it speaks of; empty for all of the recipe.
    notebook : number of the notebook, or "shared".
    key : the parameter.
    value : what it is said to be.
    """

    runs: tuple[str, ...]
    notebook: str
    key: str
    value: Any

    def speaks_of(self, run: str) -> bool:
        return not self.runs or any(run.endswith(f"-{end}") for end in self.runs)


def problems(page: str) -> list[str]:
    """Say where the page and the runs part."""
    found = []
    for recipe, text in sections(page):
        runs = runs_of(page, recipe)
        if not runs:
            found.append(f"{recipe}: names no run")
        rows = list(rows_of(text))
        found += [f"{recipe}: {problem}" for problem in problems_of_rows(rows)]
        for run in runs:
            found += [f"{recipe}, {run}: {problem}" for problem in problems_of_run(run, rows)]
    return found + problems_of_links(page)


def sections(page: str) -> Iterator[tuple[str, str]]:
    """Cut out the recipes: R1 to R5."""
    for match in re.finditer(r"^## (R\d)\. .*?(?=^## )", page, re.M | re.S):
        yield match[1], match[0]


def runs_of(page: str, recipe: str) -> list[str]:
    """Name the runs that the page's first table lists for a recipe."""
    (line,) = re.findall(rf"^\| {recipe} \|.*$", page, re.M)
    return re.findall(r"papermill_runs/([\w.-]+)/params\.yaml", line)


def rows_of(text: str) -> Iterator[list[str]]:
    """Read the rows of the one table of steps in a section."""
    lines = re.sub(r"<!--.*?-->", "", text).splitlines()
    start = lines.index("| " + " | ".join(HEAD) + " |")
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            return
        yield [cell.strip() for cell in line.strip().strip("|").split("|")]


def problems_of_rows(rows: list[list[str]]) -> list[str]:
    """Every row has a step of its own, five cells, and a verdict."""
    found = []
    steps = [row[0] for row in rows]
    for row in rows:
        if len(row) != len(HEAD) or not all(row):
            found.append(f"{row[0]!r} has no five cells with something in them")
        elif not VERDICT.match(row[-1]):
            found.append(f"{row[0]!r} has no verdict: {row[-1]!r}")
        if steps.count(row[0]) > 1:
            found.append(f"{row[0]!r} stands there twice")
    return found


def problems_of_run(run: str, rows: list[list[str]]) -> list[str]:
    """Compare what the table says of a run with its parameters, both ways."""
    file, params = parameters_of(run)
    spans = re.findall(r"`([^`]+)`", "\n".join(" ".join(row) for row in rows))
    found = []
    numbers = ", ".join(name.partition("_")[0] for name in file["notebooks"])
    if f"notebooks = {numbers}" not in spans:
        found.append(f"the table does not say `notebooks = {numbers}`")

    mentioned = set()
    for said in filter(None, map(read_span, spans)):
        if said.speaks_of(run):
            mentioned.add((said.notebook, said.key))
            found += difference(said, params, file)
    for section, values in file.items():
        if section != "notebooks":
            for key in values:
                if (section.partition("_")[0], key) not in mentioned:
                    found.append(f"sets {section}.{key}, of which the table does not speak")
    return found


@cache
def parameters_of(run: str) -> tuple[dict, dict[str, dict]]:
    """Read what a run's file says, and all parameters of its notebooks."""
    file = REPO / "papermill_runs" / run / "params.yaml"
    return yaml.safe_load(file.read_text("utf-8")), read_params(run, root=REPO)


def read_span(span: str) -> Said | None:
    match = VALUE.fullmatch(span)
    if not match:
        return None
    runs = tuple(match["runs"].split(", ")) if match["runs"] else ()
    return Said(runs, match["notebook"], match["key"], read_value(match["value"]))


def read_value(text: str) -> Any:
    """Read a value as a run's file has it, where 5e-5 is a number."""
    value = yaml.safe_load(text)
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def difference(said: Said, params: dict[str, dict], file: dict[str, dict]) -> list[str]:
    """Compare a value of the table with the run's own."""
    if said.notebook == "shared":
        values = file["shared"]
    else:
        (name,) = [name for name in params if name.startswith(f"{said.notebook}_")] or [None]
        values = params.get(name, {})
    place = f"{said.notebook}.{said.key}"
    if said.key not in values:
        return [f"has no {place}"]
    if values[said.key] != said.value:
        return [f"{place} is {values[said.key]!r} and not {said.value!r}"]
    return []


def problems_of_links(page: str) -> list[str]:
    """Every file and every heading that the page links to is there."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page):
        name, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = PAGE.parent / name
        if not file.exists():
            found.append(f"no file {name}")
        elif anchor and anchor not in anchors_of(file):
            found.append(f"no heading {target}")
    return found


def anchors_of(file: Path) -> set[str]:
    """Name the headings of a page as links do."""
    headings = re.findall(r"^#+ (.+)$", file.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


# ---- the tests


@pytest.fixture(scope="module")
def page() -> str:
    return PAGE.read_text("utf-8")


def test_the_page_says_what_the_runs_do(page):
    assert problems(page) == []


def test_it_speaks_of_every_recipe_and_every_run(page):
    recipes = [recipe for recipe, _ in sections(page)]
    assert recipes == ["R1", "R2", "R3", "R4", "R5"]
    named = [run for recipe in recipes for run in runs_of(page, recipe)]
    published = set()
    for file in (REPO / "papermill_runs").glob("*/params.yaml"):
        # says whose run it is; what somebody made of one with `--set` begins with "Copied"
        if re.match(r"# R\d", file.read_text("utf-8")):
            published.add(file.parent.name)
    assert sorted(named) == sorted(published) and len(published) >= 9


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("`02.limit = 800`", "`02.limit = 801`", "gemma3-4b-qlora: 02.limit is 800 and not 801"),
        ("`02.limit = 800`", "800", "sets 02_convert_data.limit"),
        ("`03.lora_r = 16`", "`03.lora_rank = 16`", "has no 03.lora_rank"),
        ("`03.lora_r = 16`", "`04.lora_r = 16`", "has no 04.lora_r"),
        ("`zero3-b32: 03b.zero = zero3`", "`zero3-b32: 03b.zero = zero2`", "zero3-b32: 03b.zero"),
        ("`2gpu: 07.zero = zero2`", "ZeRO-2", "sets 07_locate_verify_diagnose.zero"),
        ("`shared.max_new_tokens = 256`", "`shared.max_new_tokens = 160`", "is 256 and not 160"),
        ("`notebooks = 01, 02, 07`", "`notebooks = 01, 02, 03, 07`", "`notebooks = 01, 02, 07`"),
        ("| as published; processor", "| like there; processor", "'files' has no verdict"),
        ("| as published; processor", "| corrected; processor", "'files' has no verdict"),
        ("| as published; processor", "| | as published; processor", "'files' has no five cells"),
        ("| reload |", "| files |", "'files' stands there twice"),
        ("](launch.md#which-stage)", "](launch.md#no-stage)", "no heading launch.md#no-stage"),
        ("](../constraints.txt)", "](../constraint.txt)", "no file ../constraint.txt"),
        ("/gemma3-4b-qlora/params.yaml) | one A40", "/) | one A40", "R4: names no run"),
    ],
)
def test_a_page_that_parts_from_the_runs_is_found(page, old, new, problem):
    broken = page.replace(old, new)
    assert broken != page
    assert problem in "\n".join(problems(broken))
