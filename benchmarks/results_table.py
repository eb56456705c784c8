"""Compute the README's table of before and after from the committed reference runs; nothing in it is typed by hand.

python benchmarks/results_table.py            # prints the table and writes it into both READMEs
python benchmarks/results_table.py --check    # fails if a README says something else
"""

import argparse
import json
import re
import sys
from pathlib import Path
from statistics import mean

REPO = Path(__file__).parents[1]
RUNS = ("tiny-cpu", "tiny-cpu-seed1", "tiny-cpu-seed2")
ROWS = (
    ("name_accuracy", "structure in the box named right, %", "方框中的结构名称正确，%"),
    ("place_accuracy", "place in the picture right, %", "图中位置正确，%"),
    ("finding_accuracy", "finding right (or rightly none), %", "病灶判断正确（含正确的“无”），%"),
    ("bleu4_words", "BLEU-4 over words (sacreBLEU)", "词级 BLEU-4（sacreBLEU）"),
    ("bleu4_characters", "BLEU-4 over characters (as LLaMA-Factory)", "字符级 BLEU-4（同 LLaMA-Factory）"),
)
COLUMNS = (
    ("base", "base", "基础模型"),
    ("tuned", "tuned", "微调后"),
    ("shuffled", "tuned, shuffled picture", "微调后，图片打乱"),
    ("most_frequent", "most frequent caption", "最常见的描述"),
)


def read_runs() -> list[dict]:
    """Return the summaries of 05, 03 and 02 of each reference run."""
    summaries = []
    for name in RUNS:
        path = REPO / "papermill_runs" / "reference" / name / "summary.json"
        notebooks = json.loads(path.read_text("utf-8"))["notebooks"]
        others = {"training": notebooks["03_finetune_lora"], "copiers": notebooks["02_convert_data"]["copiers"]}
        summaries.append(notebooks["05_evaluate"] | others)
    return summaries


def build_table(runs: list[dict], language: int) -> str:
    """Write the table in English (1) or Chinese (2): the mean over the runs, and their range where they differ."""

    def cell(key: str, column: str) -> str:
        values = [run[key][column] for run in runs]
        text = f"{mean(values):.1f}"
        return text if max(values) - min(values) < 0.05 else f"{text} ({min(values):.1f} to {max(values):.1f})"

    head = ["", *(column[language] for column in COLUMNS)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in ROWS:
        lines.append("| " + " | ".join([row[language], *(cell(row[0], column[0]) for column in COLUMNS)]) + " |")
    first, training = runs[0], runs[0]["training"]
    views = training["max_steps"] * training["effective_batch_size"]
    pairs = [run["paired"]["tuned_minus_shuffled"] for run in runs]
    gains = {
        key: f"{mean(p[key]['difference'] for p in pairs):+.1f} "
        f"[{min(p[key]['low'] for p in pairs):.1f}, {max(p[key]['high'] for p in pairs):.1f}]"
        for key in ("name right", "word BLEU-4")
    }
    floor = first["most_frequent_name"]["name_accuracy"]
    copied = first["copiers"]["split by group"]["nearest region"]
    if language == 1:
        lines += [
            "",
            f"Mean (range) of {len(runs)} seeds; {first['n']} held-out pairs, {first['names_in_references']} names; "
            f"{views} training views in {training['max_steps']} steps. "
            f"Own minus shuffled picture: names {gains['name right']}, word BLEU-4 {gains['word BLEU-4']} (95% "
            f"intervals within one patient, the widest of the seeds). The most frequent name scores {floor:.1f}%. "
            f"Copying the caption of the most similar framed region of the training slices, without any model, names "
            f"{copied['name right']:.1f}% right, word BLEU-4 {copied['BLEU, words']:.1f} (notebook 02).",
        ]
    else:
        lines += [
            "",
            f"{len(runs)} 个随机种子的均值（范围），{first['n']} 对留出数据，{first['names_in_references']} 个名称；"
            f"{training['max_steps']} 步共 {views} 个样本。原图减去打乱图片："
            f"名称 {gains['name right']}，词级 BLEU-4 {gains['word BLEU-4']}（同一患者内的 95% 区间）。"
            f"总说最常见的名称可得 {floor:.1f}%。不用任何模型，照抄训练层面中最相似的框内区域的描述，名称正确率为 "
            f"{copied['name right']:.1f}%（见 02）。",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a README differs")
    args = parser.parse_args()
    runs = read_runs()
    for language, readme in ((1, REPO / "README.md"), (2, REPO / "README.zh-CN.md")):
        table = build_table(runs, language)
        text = readme.read_text("utf-8")
        block = f"<!-- results -->\n{table}\n<!-- /results -->"
        wanted = re.sub(r"<!-- results -->.*<!-- /results -->", lambda _, b=block: b, text, flags=re.S)
        if args.check and wanted != text:
            sys.exit(f"{readme.name} does not hold the table of the reference runs: run benchmarks/results_table.py")
        if not args.check:
            readme.write_text(wanted, "utf-8")
            print(table + "\n")


if __name__ == "__main__":
    main()
