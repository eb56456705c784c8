"""The way of benchmarks/train.py from rung to rung, as far as the time allows; and its table."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from _harness import read_rows, run_for, to_arguments
from _train_data import ensure_data
from _train_one import Conditions, measure_rung, note
from _train_rivals import ROWS, Place, measure_rival

COLUMNS = (
    "rung",
    "batch",
    "samples_per_second",
    "tokens_per_second",
    "mfu_percent",
    "peak_gb",
    "first_loss",
    "last_loss",
    "error",
)
# A rung is not begun with fewer seconds left, and gets as many at least.
LEAST_SECONDS = 20


def climb(names: list[str], conditions: Conditions, options: argparse.Namespace) -> None:
    """Measure the rungs that have no result yet, one after the other, and write the table."""
    end = time.perf_counter() + options.seconds
    out = conditions.out
    ensure_data(out / "data", conditions.small)
    done = {row["rung"] for row in _results(out) if "error" not in row}
    for rival, folder in options.rival:
        place = Place(folder, options.rival_python)
        for name, row in ROWS.items():
            left = end - time.perf_counter()
            if row.rival == rival and name not in done and left >= LEAST_SECONDS:
                measure_rival(name, place, conditions, min(options.each, left))
    for name in names:
        left = end - time.perf_counter()
        if left < LEAST_SECONDS:
            print("the time is used up: start again to go on", flush=True)
            break
        if name in done:
            continue
        if conditions.small and not options.apart:
            # one process is enough where nothing is measured
            measure_rung(name, conditions)
        else:
            _measure_apart(name, conditions, max(LEAST_SECONDS, min(options.each, left)))
    if _results(out):
        table = results_table(out)
        (out / "table.md").write_text(table + "\n")
        print(table, flush=True)


def _results(out: Path) -> list[dict[str, Any]]:
    return read_rows(out / "results.jsonl")


def _measure_apart(name: str, conditions: Conditions, seconds: float) -> None:
    """Measure a rung in a process of its own, and note if it ended without a result."""
    out = conditions.out
    script = Path(__file__).with_name("train.py")
    settings = {"child": name, "steps": conditions.steps, "peak": conditions.peak}
    command = [sys.executable, str(script), str(out), *to_arguments(settings)]
    if conditions.profile:
        command.append("--profile")
    if conditions.small:
        command.append("--small")
    before = len(_results(out))
    ended = run_for(command, seconds, out / f"{name}.log")
    new = _results(out)[before:]
    if any(row["rung"] == name for row in new):
        print(json.dumps(new[-1]), flush=True)
    else:
        note(out, {"rung": name, "error": f"ended with {ended.code}, see {name}.log"})


def results_table(out: Path) -> str:
    """Give the results as Markdown, the newest of each rung."""
    newest = {row["rung"]: row for row in _results(out)}
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for row in newest.values():
        shown = {key: str(row.get(key, "")) for key in COLUMNS}
        for key in ("first_loss", "last_loss"):
            if key in row:
                shown[key] = f"{row[key]:.4f}"
        lines.append("| " + " | ".join(shown.values()) + " |")
    return "\n".join([*lines, *_beside_the_rivals(newest)])


def _beside_the_rivals(newest: dict[str, dict[str, Any]]) -> list[str]:
    """Say how many times as fast we are at equal settings, and best against best; nobody's defaults."""
    lines = []
    for name, wanted in ROWS.items():
        theirs = newest.get(name, {}).get("samples_per_second")
        ours = newest.get(wanted.beside, {}).get("samples_per_second")
        if theirs and ours:
            lines.append(f"{wanted.beside} beside {name}: {ours / theirs:.2f} times as fast")
    return ["", *lines] if lines else []
