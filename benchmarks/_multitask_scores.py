"""Score what the ablation left: one line a run in `runs.jsonl`, and the tables of notebook 07."""

import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import sacrebleu
from _harness import read_rows
from _multitask_arms import ARMS

from medtune.files import write_json, write_whole
from medtune.scores import bootstrap_interval, box_scores, finding_scores, with_intervals

# The threshold, below which no answer is given, keeps back this share of true validation pairs.
KEPT_BACK = 0.1
TEXT_COLUMNS = {"place": "place right", "entity_f1": "entity F1", "bleu": "word BLEU-4"}
COLUMNS = {
    "iou": "mean IoU",
    "iou_above_0.5": "IoU over 0.5",
    "auroc": "match AUROC",
    **TEXT_COLUMNS,
}
# What an arm did not learn, so that its score says nothing.
UNTRAINED = {
    "text alone": {"iou", "iou_above_0.5", "auroc"},
    "box alone": {"auroc", "place", "entity_f1", "bleu"},
    "match alone": {"iou", "iou_above_0.5", "place", "entity_f1", "bleu"},
}
ALL_PAIRS = "all 2962 pairs"

Run = dict[str, Any]


def collect(results: list[Path], out: Path, parquet: Path) -> None:
    """Score all runs; of earlier results stays what is not scored anew."""
    columns = ["caption", "roi", "slice", "group", "split", "has_box"]
    rows = pq.read_table(parquet, columns=columns).to_pylist()
    rows.sort(key=lambda row: row["slice"])
    files = []
    for folder in results:
        files += folder.glob("*.json.gz")
    runs = []
    for file in sorted(files):
        with gzip.open(file, "rt", encoding="utf-8") as opened:
            runs.append(score_run(json.load(opened), rows))
    known = {(run["arm"], run["seed"]) for run in runs}
    for run in read_rows(out / "runs.jsonl"):
        if (run["arm"], run["seed"]) not in known:
            runs.append(run)
    order = list(ARMS)
    runs.sort(key=lambda run: (order.index(run["arm"]), run["seed"]))
    write_whole(out / "runs.jsonl", "".join(json.dumps(run) + "\n" for run in runs))
    write_json(out / "summary.json", summarise(runs))


def auroc(rows: np.ndarray) -> float:
    """Give the area under the curve of rows [label, score]; NaN without both labels."""
    true = rows[rows[:, 0] == 1, 1]
    wrong = rows[rows[:, 0] == 0, 1]
    # how often a true pair has more than a wrong one; half of the ties
    difference = true[:, None] - wrong
    if not difference.size:
        return math.nan
    return float(((difference > 0) + (difference == 0) / 2).mean())


def score_run(run: Run, rows: list[dict[str, Any]]) -> Run:
    """Score what one run found on the test split."""
    drawn = run["config"]["drawn"]
    test = [row for row in rows if row["split"] == "test" and row["has_box"] == drawn]
    found = run["test"]
    scores = {name: run[name] for name in ("arm", "seed", "seconds", "config")}
    scores |= _box_columns(found, test)
    scores |= _match_columns(found, test)
    if "answers" in found:
        scores |= _text_columns(found["answers"], [row["caption"] for row in test])
    if "right_drafts" in found:
        scores |= _chain_columns(found, run["validation"]["right"])
    if (run["arm"], run["seed"]) == ("all three", 0):
        scores["log"] = run["log"]
    return scores


def _box_columns(found: dict[str, Any], test: list[dict[str, Any]]) -> Run:
    true = [row["roi"] for row in test]
    groups = [row["group"] for row in test]
    boxes = with_intervals(box_scores, found["boxes"], true, groups=groups)
    interval = boxes["intervals"]["iou"]
    return {
        "iou": boxes["iou"],
        "iou_above_0.5": boxes["iou_above_0.5"],
        "iou_interval": [interval["low"], interval["high"]],
    }


def _match_columns(found: dict[str, Any], test: list[dict[str, Any]]) -> Run:
    """Compare the scores of the records that have a mismatched partner with those of the pairs."""
    numbers = [number for number, _ in found["pairs"]]
    judged = [(1, found["right"][number]) for number in numbers]
    judged += [(0, score) for score in found["wrong"]]
    groups = [test[number]["group"] for number in numbers]
    match = bootstrap_interval(judged, groups * 2, statistic=auroc, resamples=300)
    return {
        "auroc": match["value"],
        "auroc_interval": [match["low"], match["high"]],
        "pairs": len(numbers),
    }


def _text_columns(answers: list[str], references: list[str]) -> Run:
    finding = finding_scores(answers, references)
    return {
        "place": finding["place_exact"],
        "entity_f1": finding["f1"],
        "bleu": sacrebleu.corpus_bleu(answers, [references]).score,
    }


def _chain_columns(found: dict[str, Any], validation: list[float]) -> Run:
    """Say how often the model answers, asked rightly and in vain, by the scores of its drafts."""
    threshold = sorted(validation)[int(KEPT_BACK * len(validation))]

    def share_answered(scores: list[float]) -> float:
        return sum(score >= threshold for score in scores) / len(scores)

    return {
        "answered_rightly": share_answered(found["right_drafts"]),
        "answered_in_vain": share_answered(found["wrong_drafts"]),
        "threshold": threshold,
    }


# ---- the tables


def summarise(runs: list[Run]) -> dict[str, Any]:
    """Put mean and range over seeds into two tables: the arms, and the text by number of pairs."""
    of_arm: dict[str, list[Run]] = {}
    for arm in ARMS:
        own = [run for run in runs if run["arm"] == arm]
        if own:
            of_arm[arm] = own
    arms = {}
    for arm, own in of_arm.items():
        # those with fewer pairs are in the other table
        if "pairs" not in arm:
            cells = {label: _cell(own, key) for key, label in COLUMNS.items()}
            arms[arm] = {"seeds": len(own), **cells}
    return {
        "arms": arms,
        "by_pairs": _text_by_pairs(of_arm),
        "runs": len(runs),
        "steps": runs[0]["config"]["steps"],
    }


def _text_by_pairs(of_arm: dict[str, list[Run]]) -> dict[str, dict[str, str]]:
    """Compare the text with and without heads, a line for each number of pairs."""
    lines: dict[str, dict[str, str]] = {}
    for arm, own in of_arm.items():
        task, _, pairs = arm.partition(", ")
        if task not in ("all three", "text alone"):
            continue
        heads = "with heads" if task == "all three" else "without"
        line = lines.setdefault(pairs or ALL_PAIRS, {})
        for key, label in TEXT_COLUMNS.items():
            line[f"{label}, {heads}"] = _cell(own, key)
    by_number = sorted(lines, key=lambda pairs: int(pairs.split()[-2]))
    return {pairs: lines[pairs] for pairs in by_number}


def _cell(runs: list[Run], key: str) -> str:
    """Write mean and range of the runs of one arm, or "-" for what it did not learn."""
    task = runs[0]["arm"].split(",")[0]
    values = [run[key] for run in runs if key in run]
    if not values or key in UNTRAINED.get(task, ()):
        return "-"
    digits = 1 if key == "bleu" else 3
    mean = sum(values) / len(values)
    return f"{mean:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
