"""Draw the README's picture from the committed reference runs: before and after, with the wrong picture beside it.

python benchmarks/results_figure.py            # writes docs/images/results.svg and results.zh.svg
python benchmarks/results_figure.py --check    # fails if a picture shows other numbers
"""

import argparse
import html
import json
import re
import sys
from pathlib import Path
from statistics import mean

from results_table import COLUMNS, REPO, read_runs

FOLDER = REPO / "docs" / "images"
# key, English, Chinese, and the paired comparison that belongs to it
ROWS = (
    ("name_accuracy", "structure named right, %", "结构名称正确，%", "name right"),
    ("place_accuracy", "place in the picture right, %", "图中位置正确，%", "place right"),
    ("bleu4_words", "BLEU-4 over words", "词级 BLEU-4", "word BLEU-4"),
)
COLOURS = ("#9aa5b1", "#1a5fb4", "#e5a50a", "#c8ccd0")
TITLES = {
    1: "The same questions about held-out slices: mean of {n} seeds, range as a line",
    2: "对留出层面提同样的问题：{n} 个随机种子的均值，竖线为范围",
}
COPIER = {1: "copier of the most similar region, no model", 2: "照抄最相似的区域，不用模型"}
NOTES = {1: "own minus shuffled picture\n{gain}", 2: "原图减打乱图片\n{gain}"}


def bars(runs: list[dict]) -> dict[str, dict[str, list[float]]]:
    """What is drawn: for each measure and answerer mean, lowest and highest over the seeds; and the paired gain."""
    drawn = {}
    for key, *_, pair in ROWS:
        values = {column: [run[key][column] for run in runs] for column, *_ in COLUMNS}
        drawn[key] = {column: [round(f(v), 1) for f in (mean, min, max)] for column, v in values.items()}
        gains = [run["paired"]["tuned_minus_shuffled"][pair] for run in runs]
        ends = mean(g["difference"] for g in gains), min(g["low"] for g in gains), max(g["high"] for g in gains)
        drawn[key]["gain"] = [round(value, 1) for value in ends]
        copied = runs[0]["copiers"]["split by group"]["nearest region"]  # the same for each seed: it learns nothing
        drawn[key]["copier"] = copied.get({"bleu4_words": "BLEU, words", "name_accuracy": "name right"}.get(key))
    return drawn


def draw(drawn: dict, seeds: int, language: int, path: Path) -> None:
    """Draw one picture, in English (1) or Chinese (2); its numbers stand in the file as a description too."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from medtune import plots

    plt.rcParams |= {"svg.hashsalt": "medtune", "font.size": 11, "font.family": list(plots.font_families())}
    figure, axis = plt.subplots(figsize=(9, 4.2), layout="constrained")
    for number, (column, *labels) in enumerate(COLUMNS):
        values = [drawn[row[0]][column] for row in ROWS]
        at = [place + (number - 1.5) * 0.2 for place in range(len(ROWS))]
        ends = [[v[0] - v[1] for v in values], [v[2] - v[0] for v in values]]
        heights = [value[0] for value in values]
        axis.bar(at, heights, 0.19, color=COLOURS[number], label=labels[language - 1], yerr=ends, ecolor="#333333")
        for x, (height, _, high) in zip(at, values, strict=True):
            axis.text(x, max(height, high) + 1.5, f"{height:.0f}", ha="center", fontsize=10)
    for place, (key, *_) in enumerate(ROWS):
        gain, low, high = drawn[key]["gain"]
        note = NOTES[language].format(gain=f"{gain:+.1f} [{low:.1f}, {high:.1f}]")
        axis.text(place, 113, note, ha="center", va="bottom", fontsize=9, color="#444444")
        if (copied := drawn[key]["copier"]) is not None:
            label = None if place else COPIER[language]
            axis.hlines(copied, place - 0.42, place + 0.42, "#c01c28", "dashed", linewidth=1.3, label=label)
            axis.text(place + 0.43, copied, f"{copied:.0f}", va="center", fontsize=10, color="#c01c28")
    axis.set_xticks(range(len(ROWS)), [row[language] for row in ROWS])
    axis.set_ylim(0, 132)
    axis.set_yticks(range(0, 101, 20))
    axis.set_title(TITLES[language].format(n=seeds), fontsize=11, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axis.get_legend_handles_labels()
    order = [*range(1, len(labels)), 0]  # the line last
    legend = [[handles[i] for i in order], [labels[i] for i in order]]
    figure.legend(*legend, loc="outside lower center", ncols=3, frameon=False, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Description": json.dumps(drawn)})
    plt.close(figure)


def shown(path: Path) -> dict:
    """The numbers that a picture was drawn from."""
    found = re.search(r"<dc:description>(.*?)</dc:description>", path.read_text("utf-8"), re.S)
    return json.loads(html.unescape(found.group(1))) if found else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a picture shows other numbers")
    args = parser.parse_args()
    runs = read_runs()
    drawn = bars(runs)
    for language, name in ((1, "results.svg"), (2, "results.zh.svg")):
        if args.check and shown(FOLDER / name) != drawn:
            sys.exit(f"{name} shows other numbers than the reference runs: run benchmarks/results_figure.py")
        if not args.check:
            draw(drawn, len(runs), language, FOLDER / name)
            print(FOLDER / name)


if __name__ == "__main__":
    main()
