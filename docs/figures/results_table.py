"""Compute the README's table of before and after from the committed reference runs.

    python docs/figures/results_table.py            # print it, and write it into both READMEs
    python docs/figures/results_table.py --check    # fail if a README says something else

Nothing in it is typed by hand.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

REPO = Path(__file__).parents[2]
RUNS = ("tiny-cpu", "tiny-cpu-seed1", "tiny-cpu-seed2")
# key of the summary, English, Chinese
ROWS = (
    ("name_accuracy", "structure in the box named right, %", "方框中的结构名称正确，%"),
    ("place_accuracy", "place in the picture right, %", "图中位置正确，%"),
    ("sensitivity", "finding reported where there is one, %", "有病灶时报告了病灶，%"),
    ("false alarms", "finding reported where there is none, %", "无病灶时误报病灶，%"),
    ("bleu4_words", "BLEU-4 over words (sacreBLEU)", "词级 BLEU-4（sacreBLEU）"),
    (
        "bleu4_characters",
        "BLEU-4 over characters (as LLaMA-Factory)",
        "字符级 BLEU-4（同 LLaMA-Factory）",
    ),
)
COLUMNS = (
    ("base", "base", "基础模型"),
    ("tuned", "tuned", "微调后"),
    ("shuffled", "tuned, shuffled picture", "微调后，图片打乱"),
    ("most_frequent", "most frequent caption", "最常见的描述"),
)
NOT_SCORED = {1: "not scored", 2: "不评分"}
# The READMEs, and where a row or column has the words of their language.
READMES = ((1, REPO / "README.md"), (2, REPO / "README.zh-CN.md"))
ENGLISH_NOTE = (
    "Mean (range) of {runs} seeds; {pairs} held-out pairs, {names} names; {views} training views "
    "in {steps} steps. Own minus shuffled picture: names {name_gain}, word BLEU-4 {bleu_gain}; the "
    "ends are the lowest and the highest of the seeds' own 95% intervals, each within one patient: "
    "an envelope, no interval over seeds. The most frequent name scores "
    "{floor:.1f}%. Copying the caption of the most similar framed region of the training slices, "
    "without any model, names {copied_names:.1f}% right, word BLEU-4 {copied_bleu:.1f} "
    "(notebook 02)."
)
CHINESE_NOTE = (
    "{runs} 个随机种子的均值（范围），{pairs} 个留出的图文对，{names} 个名称；"
    "{steps} 步共训练 {views} 个样本。"
    "原图减去打乱的图片：名称 {name_gain}，词级 BLEU-4 {bleu_gain}；括号内的两端是各种子"
    "自己的 95% 区间的最低端和最高端，均在同一患者内：这是包络，不是跨种子的区间。"
    "总说最常见的名称可得 {floor:.1f}%。不用任何模型，照抄训练层面中最相似的框内区域的描述，"
    "名称正确率为 {copied_names:.1f}%，词级 BLEU-4 为 {copied_bleu:.1f}（见 02）。"
)

Run = dict[str, Any]


@dataclass(frozen=True)
class Gain:
    """What the own picture gives beyond another one, in points.

    The ends are an envelope: each seed has its own interval over slices of one patient, and these
    are the lowest and the highest end of them. No interval over seeds comes of three.

    Parameters
    ----------
    mean : over the seeds.
    low, high : ends of the envelope; None if a seed has no interval.
    """

    mean: float
    low: float | None
    high: float | None

    @classmethod
    def of(cls, runs: list[Run], score: str) -> "Gain":
        """Sum up the paired comparisons of all runs."""
        pairs = [run["paired"]["tuned_minus_shuffled"][score] for run in runs]
        gain = mean(pair["difference"] for pair in pairs)
        if any(pair["low"] is None for pair in pairs):
            return cls(gain, None, None)
        return cls(gain, min(pair["low"] for pair in pairs), max(pair["high"] for pair in pairs))

    def __str__(self) -> str:
        if self.low is None:
            return f"{self.mean:+.1f}"
        return f"{self.mean:+.1f} ({self.low:.1f} to {self.high:.1f})"


def read_runs() -> list[Run]:
    """Return the summary of 05 of each reference run, with what is needed of 03 and 02."""
    summaries = []
    for name in RUNS:
        path = REPO / "papermill_runs" / "reference" / name / "summary.json"
        notebooks = json.loads(path.read_text("utf-8"))["notebooks"]
        others = {
            "training": notebooks["03_finetune_lora"],
            "copiers": notebooks["02_convert_data"]["copiers"],
        }
        summaries.append(notebooks["05_evaluate"] | others)
    return summaries


def value_of(run: Run, measure: str, who: str) -> float | None:
    """Look up a score in a summary of 05, which keeps those of findings apart."""
    table = run["detection"] if measure in run["detection"] else run
    return table[measure].get(who)


def build_table(runs: list[Run], language: int) -> str:
    """Write the table in English (1) or Chinese (2)."""
    head = [""]
    for column in COLUMNS:
        head.append(column[language])
    lines = [_line(head), "|---" * len(head) + "|"]
    for row in ROWS:
        cells = [row[language]]
        for column in COLUMNS:
            cells.append(_cell([value_of(run, row[0], column[0]) for run in runs], language))
        lines.append(_line(cells))
    table = "\n".join([*lines, "", _note(runs, language)])
    # a range is written with the English word
    return table if language == 1 else table.replace(" to ", " 到 ")


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(values: list[float | None], language: int) -> str:
    """Write the mean over the runs, and their range where they differ."""
    if None in values:
        # a base that was never taught the words cannot be wrong about findings
        return NOT_SCORED[language]
    text = f"{mean(values):.1f}"
    if max(values) - min(values) < 0.05:
        return text
    return f"{text} ({min(values):.1f} to {max(values):.1f})"


def _note(runs: list[Run], language: int) -> str:
    """Write the sentences below the table."""
    first = runs[0]
    training = first["training"]
    # it learns nothing, and so is the same for each seed
    copied = first["copiers"]["split by group"]["nearest region"]
    template = ENGLISH_NOTE if language == 1 else CHINESE_NOTE
    return template.format(
        runs=len(runs),
        pairs=first["n"],
        names=first["names_in_references"],
        views=training["max_steps"] * training["effective_batch_size"],
        steps=training["max_steps"],
        name_gain=Gain.of(runs, "name right"),
        bleu_gain=Gain.of(runs, "word BLEU-4"),
        floor=first["most_frequent_name"]["name_accuracy"],
        copied_names=copied["name right"],
        copied_bleu=copied["BLEU, words"],
    )


def _with_table(text: str, table: str) -> str:
    """Put a table into the place of the one in a README."""
    before, _, rest = text.partition("<!-- results -->")
    _, _, after = rest.partition("<!-- /results -->")
    return f"{before}<!-- results -->\n{table}\n<!-- /results -->{after}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if a README differs"
    )
    args = parser.parse_args()
    runs = read_runs()
    for language, readme in READMES:
        table = build_table(runs, language)
        text = readme.read_text("utf-8")
        wanted = _with_table(text, table)
        if not args.check:
            readme.write_text(wanted, "utf-8")
            print(table + "\n")
        elif wanted != text:
            sys.exit(
                f"{readme.name} does not hold the table of the reference runs: "
                "run docs/figures/results_table.py"
            )


if __name__ == "__main__":
    main()
