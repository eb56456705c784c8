"""Draw the README's picture of before and after, with the wrong picture beside it.

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
from results_table import COLUMNS, NOT_SCORED, REPO, Gain, read_runs

from medtune import plots

FOLDER = REPO / "docs" / "images"
# The pictures, and where a row or column has the words of their language.
PICTURES = ((1, "results.svg"), (2, "results.zh.svg"))
# key, English, Chinese, and the paired comparison that belongs to it
ROWS = (
    ("name_accuracy", "structure named right, %", "结构名称正确，%", "name right"),
    ("place_accuracy", "place in the picture right, %", "图中位置正确，%", "place right"),
    ("bleu4_words", "BLEU-4 over words", "词级 BLEU-4", "word BLEU-4"),
)
# What the copier's summary calls a measure; it has no place.
COPIED = {"name_accuracy": "name right", "bleu4_words": "BLEU, words"}
COLOURS = ("#9aa5b1", "#1a5fb4", "#e5a50a", "#c8ccd0")
RED = "#c01c28"
TITLES = {
    1: "The same questions about held-out slices: mean of {n} seeds, range as a line",
    2: "对留出层面提同样的问题：{n} 个随机种子的均值，竖线为范围",
}
COPIER = {1: "copier of the most similar region, no model", 2: "照抄最相似的区域，不用模型"}
NOTES = {1: "own minus shuffled picture\n{gain}", 2: "原图减打乱图片\n{gain}"}
# Distance of two bars, and their width, where measures stand 1 apart.
STEP = 0.2
WIDTH = 0.19

Drawn = dict[str, dict[str, Any]]


# ---- the numbers


def bars(runs: list[dict[str, Any]]) -> Drawn:
    """Compute what is drawn for each measure.

    Returns
    -------
    dict : by measure: for each answerer mean, lowest and highest over the seeds, or None; mean and
        envelope of the paired "gain"; and the "copier", or None.
    """
    # it learns nothing, and so is the same for each seed
    copied = runs[0]["copiers"]["split by group"]["nearest region"]
    drawn = {}
    for key, _, _, pair in ROWS:
        numbers: dict[str, Any] = {}
        for column, _, _ in COLUMNS:
            values = [run[key][column] for run in runs]
            if None in values:
                # not scored, such as the base on words that it was never taught
                numbers[column] = None
            else:
                numbers[column] = _rounded(mean(values), min(values), max(values))
        gain = Gain.of(runs, pair)
        numbers["gain"] = _rounded(gain.mean, gain.low, gain.high)
        numbers["copier"] = copied[COPIED[key]] if key in COPIED else None
        drawn[key] = numbers
    return drawn


def _rounded(*values: float | None) -> list[float | None]:
    return [None if value is None else round(value, 1) for value in values]


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
        figure = Figure(figsize=(9, 4.2), layout="constrained")
        axis = figure.subplots()
        _draw_bars(axis, drawn, language)
        _draw_notes(axis, drawn, language)
        _draw_copier(axis, drawn, language)
        axis.set_xticks(range(len(ROWS)), [row[language] for row in ROWS])
        axis.set_ylim(0, 132)
        axis.set_yticks(range(0, 101, 20))
        axis.set_title(TITLES[language].format(n=seeds), fontsize=11, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        _draw_legend(figure, axis)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None, "Description": json.dumps(drawn)})


def _draw_bars(axis: Any, drawn: Drawn, language: int) -> None:
    """Draw a bar for each answerer and measure, with its range and its height."""
    middle = (len(COLUMNS) - 1) / 2
    for number, column in enumerate(COLUMNS):
        values = []
        places = []
        for place, row in enumerate(ROWS):
            value = drawn[row[0]][column[0]]
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
            label=column[language],
            yerr=[below, above],
            ecolor="#333333",
        )
        for place, (height, _, high) in zip(places, values, strict=True):
            top = max(height, high) + 1.5
            axis.text(place, top, f"{height:.0f}", ha="center", fontsize=10)


def _draw_notes(axis: Any, drawn: Drawn, language: int) -> None:
    """Write the paired gain above each measure."""
    for place, row in enumerate(ROWS):
        note = NOTES[language].format(gain=Gain(*drawn[row[0]]["gain"]))
        axis.text(place, 113, note, ha="center", va="bottom", fontsize=9, color="#444444")


def _draw_copier(axis: Any, drawn: Drawn, language: int) -> None:
    """Draw as a line what copying gives."""
    for place, row in enumerate(ROWS):
        copied = drawn[row[0]]["copier"]
        if copied is None:
            continue
        # one entry of the legend is enough
        label = COPIER[language] if place == 0 else None
        axis.hlines(copied, place - 0.42, place + 0.42, RED, "dashed", linewidth=1.3, label=label)
        axis.text(place + 0.43, copied, f"{copied:.0f}", va="center", fontsize=10, color=RED)


def _draw_legend(figure: Any, axis: Any) -> None:
    """Draw the legend below, the line last."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        [*handles[1:], handles[0]],
        [*labels[1:], labels[0]],
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=10,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if a picture shows other numbers"
    )
    args = parser.parse_args()
    runs = read_runs()
    drawn = bars(runs)
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
