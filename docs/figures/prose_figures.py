"""Hold the figures in prose against the committed files that they come from.

    python docs/figures/prose_figures.py            # write them anew
    python docs/figures/prose_figures.py --check    # fail if a page says something else

A figure carries a comment that no reader of the page sees, and that says where it comes from:

    The specificity is 0.74<!-- = tiny-cpu notebooks/07_locate_verify_diagnose/match/specificity .2f -->.

First a folder of `papermill_runs/reference/` (or a file in it, where it has several), then the way
through the file, then a format as Python's `format` takes it. On the way stand keys, numbers that
count from 0, and `session=i,rung=fast96` where one row of many is meant. Of the study of the knobs
the way names a setting, by what differs from the common one, such as `num_train_epochs=8.0`; the
figure is the mean over its seeds of the names that are right. A second setting behind a `|` is
subtracted. `computed` and a name stand for a function below.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal, localcontext
from functools import cache
from pathlib import Path
from typing import Any

import study_knobs

REPO = Path(__file__).parents[2]
REFERENCE = REPO / "papermill_runs" / "reference"
# What a folder of a reference run keeps its figures in.
FILES = ("summary.json", "result.json", "results.json", "measured.json")
LINES = ("results.jsonl", "profile.jsonl")

MARK = re.compile(r"<!-- = (.*?) -->")
# what was meant for one, whatever its spaces
ALMOST = re.compile(r"<!--\s*=")
NUMBER = re.compile(r"[+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?%?$")


# ---- from a marker to its figure


@dataclass(frozen=True)
class Figure:
    """A figure of a page with what its marker says.

    Parameters
    ----------
    text : the figure as it stands on the page.
    start, end : where it stands in the page's text.
    line : number of its line, from 1.
    marker : what the comment says: source, way and format.
    """

    text: str
    start: int
    end: int
    line: int
    marker: str

    def value(self) -> float:
        """Read what the marker points at."""
        source, way, _ = self._parts()
        if source == "computed":
            return COMPUTED[way]()
        if source == "study-knobs":
            return names_right(way)
        return follow(data_of(source), way)

    def wanted(self) -> str:
        """Write the figure as its format has it."""
        return write_number(self.value(), self._parts()[2])

    def _parts(self) -> tuple[str, str, str]:
        source, _, rest = self.marker.partition(" ")
        way, _, form = rest.rpartition(" ")
        if not way:
            raise ValueError("a marker has a source, a way and a format")
        return source, way, form


def figures_of(text: str) -> Iterator[Figure]:
    """Find the figures of a page that have a marker.

    Raises
    ------
    ValueError : a marker has no number before it, or is not written as one.
    """
    if len(ALMOST.findall(text)) != len(MARK.findall(text)):
        raise ValueError(
            "a marker reads `<!-- = SOURCE WAY FORMAT -->`, with these spaces, in one line"
        )
    for mark in MARK.finditer(text):
        line = text.count("\n", 0, mark.start()) + 1
        number = NUMBER.search(text, max(0, mark.start() - 40), mark.start())
        if not number:
            raise ValueError(f"line {line}: no number stands before the marker {mark[1]!r}")
        yield Figure(number[0], number.start(), number.end(), line, mark[1])


def write_number(value: float, form: str) -> str:
    """Format a value: halves are rounded up, as by hand, and an exponent is as short as it can be.

    >>> write_number(147.85, ".1f"), write_number(0.0000000853, ".0e"), write_number(0.357, ".0%")
    ('147.9', '9e-8', '36%')
    """
    with localcontext(rounding=ROUND_HALF_UP):
        written = format(Decimal(str(value)), form)
    return re.sub(r"e([+-])0+(?=\d)", r"e\1", written)


# ---- where values come from


@cache
def data_of(source: str) -> Any:
    """Read the file of a reference run: a folder's only one, or the one that is named."""
    place = REFERENCE / source
    if place.is_dir():
        found = [place / name for name in (*FILES, *LINES) if (place / name).is_file()]
        if len(found) != 1:
            raise ValueError(f"{source} has {len(found)} files of figures: name one")
        (place,) = found
    text = place.read_text("utf-8")
    if place.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    return json.loads(text)


def follow(data: Any, way: str) -> Any:
    """Go through keys, places in a list, and rows that are picked by what they hold.

    >>> follow({"rows": [{"batch": 4, "gb": 9.8}, {"batch": 8, "gb": 12.0}]}, "rows/batch=8/gb")
    12.0
    """
    for step in way.split("/"):
        if isinstance(data, list) and "=" in step:
            data = one_row(data, step)
        elif isinstance(data, list):
            data = data[int(step)]
        else:
            data = data[step]
    return data


def one_row(rows: list[dict], step: str) -> dict:
    """Pick the one row that holds all that a step names, such as `session=i,rung=fast96`."""
    wanted = dict(part.split("=") for part in step.split(","))
    found = []
    for row in rows:
        if all(str(row.get(key)) == value for key, value in wanted.items()):
            found.append(row)
    if len(found) != 1:
        raise ValueError(f"{len(found)} rows have {step}")
    return found[0]


@cache
def _study() -> Any:
    return study_knobs.load(study_knobs.FOLDER / "results.parquet")


def names_right(way: str) -> float:
    """Average the names right, in %, of a setting of the study; minus another one behind `|`."""
    one, _, other = way.partition("|")
    value = _mean_of_setting(one)
    return value - _mean_of_setting(other) if other else value


def _mean_of_setting(levels: str) -> float:
    given = {}
    if levels != "common":
        for part in levels.split(","):
            factor, level = part.split("=")
            given[factor] = _number_or_word(level)
    runs = study_knobs.setting(_study(), given)
    if runs.empty:
        raise ValueError(f"the study has no runs with {levels}")
    return float(runs[study_knobs.NAMES].mean())


def _number_or_word(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


# ---- figures that are computed from several


def minutes_of_the_course() -> float:
    """Add up the minutes of all notebooks of the committed run of the course."""
    return sum(data_of("tiny-cpu")["timing"].values())


def minutes_of_the_core() -> float:
    """Add up those of the core course: 00 to 03, 05 and 06."""
    core = ("00_", "01_", "02_", "03_", "05_", "06_")
    timing = data_of("tiny-cpu")["timing"]
    return sum(spent for notebook, spent in timing.items() if notebook.startswith(core))


def runs_of_the_study() -> float:
    """Count the finished runs of the study of the knobs."""
    return float(len(_study()))


COMPUTED: dict[str, Callable[[], float]] = {
    function.__name__: function
    for function in (
        minutes_of_the_course,
        minutes_of_the_core,
        runs_of_the_study,
    )
}


# ---- pages


def pages() -> list[Path]:
    """Return all pages that may hold figures."""
    return [REPO / "README.md", REPO / "README.zh-CN.md", *sorted((REPO / "docs").glob("*.md"))]


def problems(text: str) -> list[str]:
    """Say which figures of a page are not those of their files, and which markers lead nowhere."""
    found = []
    try:
        figures = list(figures_of(text))
    except ValueError as error:
        return [str(error)]
    for figure in figures:
        try:
            wanted = figure.wanted()
        except (ValueError, LookupError, OSError, TypeError) as error:
            found.append(f"line {figure.line}: {figure.marker}: {error!r}")
            continue
        if wanted != figure.text:
            found.append(f"line {figure.line}: {figure.text} should be {wanted} ({figure.marker})")
    return found


def rewritten(text: str) -> str:
    """Write each figure of a page as its file has it now."""
    for figure in reversed(list(figures_of(text))):
        text = text[: figure.start] + figure.wanted() + text[figure.end :]
    return text


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if a page differs"
    )
    args = parser.parse_args(arguments)
    wrong = []
    for page in pages():
        text = page.read_text("utf-8")
        if args.check:
            wrong += [f"{page.name}, {problem}" for problem in problems(text)]
        else:
            page.write_text(rewritten(text), "utf-8")
    if wrong:
        sys.exit("\n".join([*wrong, "run docs/figures/prose_figures.py"]))


if __name__ == "__main__":
    main()
