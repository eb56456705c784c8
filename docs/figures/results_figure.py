"""Draw the README's picture: the same person, another person, the wrong picture, and a copier.

    python docs/figures/results_figure.py            # docs/images/results.svg and results.zh.svg
    python docs/figures/results_figure.py --check    # fail if a picture shows other numbers

Its numbers are those of the committed reference runs.
"""

import argparse
import html
import json
import re
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from results_table import NOT_SCORED, REPO, read_runs, value_of

from medtune import plots

FOLDER = REPO / "docs" / "images"
PEOPLE = REPO / "papermill_runs" / "reference" / "another-person"
# The pictures, and where a row or column has the words of their language.
PICTURES = ((1, "results.svg"), (2, "results.zh.svg"))
# key in a summary of 05, English, Chinese, and what the scores of people call it
ROWS = (
    ("name_accuracy", "structure named right", "结构名称正确", "name right"),
    ("sensitivity", "finding reported\nwhere there is one", "有病灶时报告了病灶", "sensitivity"),
    ("false alarms", "finding reported\nwhere there is none", "无病灶时误报病灶", "false alarms"),
)
# who answers, English, Chinese; those of PEOPLE by the name that its scores give them
BARS = (
    ("tuned", "same person, held-out slices", "同一个人，留出的层面"),
    ("at the course's pixel size", "another person, same pixel size", "另一个人，像素大小相同"),
    ("as scanned", "another person, as scanned", "另一个人，按原始扫描"),
    ("shuffled", "same person, wrong picture", "同一个人，给错的图片"),
    ("nearest_region", "copier of the nearest region, no model", "照抄最相似的区域，不用模型"),
)
COLOURS = ("#1a5fb4", "#3584e4", "#99c1f1", "#e5a50a", "#c01c28")
TITLES = {
    1: "What the tuned tiny model says, percent: mean of {n} seeds, range as a line",
    2: "微调后的小模型的回答，百分比：{n} 个随机种子的均值，竖线为范围",
}
# Distance of two bars, and their width, where measures stand 1 apart.
STEP = 0.17
WIDTH = 0.16

Drawn = dict[str, dict[str, list[float] | None]]


# ---- the numbers


def read_people() -> list[dict[str, Any]]:
    """Read the scores on another person, one file for each seed."""
    files = sorted(PEOPLE.glob("scores*.json"))
    return [json.loads(file.read_text("utf-8")) for file in files]


def bars(runs: list[dict[str, Any]], people: list[dict[str, Any]]) -> Drawn:
    """Compute what is drawn for each measure.

    Returns
    -------
    dict : by measure and answerer: mean, lowest and highest over the seeds, or None where one has no
        score.
    """
    drawn: Drawn = {}
    for key, _, _, score in ROWS:
        drawn[key] = {}
        for who, _, _ in BARS:
            if who in people[0]:
                values = [seed[who]["scores"][score]["value"] for seed in people]
            elif who == "nearest_region" and key == "name_accuracy":
                # it learns nothing, and so is the same for each seed
                values = [runs[0]["copiers"]["split by group"]["nearest region"]["name right"]]
            else:
                values = [value_of(run, key, who) for run in runs]
            known = None not in values
            drawn[key][who] = _rounded(mean(values), min(values), max(values)) if known else None
    return drawn


def _rounded(*values: float) -> list[float]:
    return [round(value, 1) for value in values]


def shown(path: Path) -> Drawn:
    """Read the numbers that a picture was drawn from."""
    text = path.read_text("utf-8")
    found = re.search(r"<dc:description>(.*?)</dc:description>", text, re.DOTALL)
    return json.loads(html.unescape(found.group(1))) if found else {}


# ---- the picture


def draw(drawn: Drawn, seeds: int, language: int, path: Path) -> None:
    """Draw one picture, in English (1) or Chinese (2); the file describes itself by its numbers."""
    style = {"svg.hashsalt": "medtune", "font.size": 11, "font.family": list(plots.font_families())}
    with matplotlib.rc_context(style):
        # not by pyplot, which would want a screen
        figure = Figure(figsize=(9, 4.4), layout="constrained")
        axis = figure.subplots()
        _draw_bars(axis, drawn, language)
        axis.set_xticks(range(len(ROWS)), [row[language] for row in ROWS])
        axis.set_ylim(0, 109)
        axis.set_yticks(range(0, 101, 20))
        axis.set_title(TITLES[language].format(n=seeds), fontsize=11, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=10)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None, "Description": json.dumps(drawn)})


def _draw_bars(axis: Any, drawn: Drawn, language: int) -> None:
    """Draw a bar for each answerer and measure, with its range and its height."""
    middle = (len(BARS) - 1) / 2
    for number, bar in enumerate(BARS):
        values = []
        places = []
        for place, row in enumerate(ROWS):
            value = drawn[row[0]][bar[0]]
            where = place + (number - middle) * STEP
            if value is None:
                axis.text(where, 1.5, NOT_SCORED[language], ha="center", rotation=90, fontsize=9)
            else:
                values.append(value)
                places.append(where)
        heights = [height for height, _, _ in values]
        below = [height - low for height, low, _ in values]
        above = [high - height for height, _, high in values]
        axis.bar(
            places,
            heights,
            WIDTH,
            color=COLOURS[number],
            label=bar[language],
            yerr=[below, above],
            ecolor="#333333",
        )
        for place, (height, _, high) in zip(places, values, strict=True):
            top = max(height, high) + 1.5
            axis.text(place, top, f"{height:.0f}", ha="center", fontsize=10)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if a picture shows other numbers"
    )
    args = parser.parse_args()
    runs = read_runs()
    drawn = bars(runs, read_people())
    for language, name in PICTURES:
        if not args.check:
            draw(drawn, len(runs), language, FOLDER / name)
            print(FOLDER / name)
        elif shown(FOLDER / name) != drawn:
            sys.exit(
                f"{name} shows other numbers than the reference runs: "
                "run docs/figures/results_figure.py"
            )


if __name__ == "__main__":
    main()
