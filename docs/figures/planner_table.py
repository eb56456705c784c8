"""Hold the planner against measured peaks: from lines of benchmarks/memory.py to a committed table.

    # write measured.json and README.md
    python docs/figures/planner_table.py FIT.jsonl ... --check CHECK.jsonl ...
    # keep what stands in measured.json, and add later checks
    python docs/figures/planner_table.py --add LATER.jsonl ...
    # write README.md anew, from measured.json
    python docs/figures/planner_table.py

Both stand in papermill_runs/reference/planner-h200/; nothing in them is typed by hand.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from medtune.files import read_json_lines
from medtune.plan import estimate, picture_size

FOLDER = Path(__file__).parents[2] / "papermill_runs" / "reference" / "planner-h200"
# What tells one configuration from another, besides its options.
CONFIGURATION = ("model", "method", "target", "batch", "pixels", "checkpointing")
# Text tokens of a row without a measured number of tokens.
USUAL_TEXT_TOKENS = 92
# So many GB that the planner never says that a row does not fit.
LARGE_CARD = 150.0
HEADER = "| model | run | batch | tokens | measured GB | planned GB | | samples/s | |"
README = """\
# The planner against measured peaks

{device}, TRL's SFTTrainer on shape twins with random weights, four or five steps, one picture a sample; \
GB are 10^9 bytes, peaks `torch.cuda.max_memory_allocated`. The constants of `medtune.plan` were \
fitted to the rows marked fit; those marked check came later. One of these, Qwen2-VL with QLoRA, \
was planned 10.0% low, for want of what quick_gelu keeps; that was put in, so the row counts as \
fit. Other processes shared the card: peaks are of the process alone, but samples/s are low, above \
all in the rows marked check, and memory ran out before the whole card was used. Nothing here says \
anything about quality.

{trained}

## Answers

The same model answers a batch of pictures, tokens are those of picture and question. The \
planner's estimate takes the constants of training; that its top is the vision tower, the prompt \
or the whole cache was settled with these two rows at hand.

{asked}
"""

Row = dict[str, Any]


# ---- from measurements to rows


def rows_of(files: list[str], kind: str) -> list[Row]:
    """Read what the table needs of each line; of a configuration measured twice the last counts."""
    rows = {}
    for file in files:
        for _, line in read_json_lines(file):
            # the card was shared, and what ran beside took the memory; or time ran out
            expected = "must" in line["options"] and "device" in line
            spoilt = "error" in line and not expected
            if not spoilt:
                row = row_of(line, kind)
                key = [row[name] for name in (*CONFIGURATION, "options")]
                rows[json.dumps(key)] = row
    return list(rows.values())


def row_of(line: Row, kind: str) -> Row:
    """Pick what the table needs of a line, in GB."""
    row = {key: line[key] for key in CONFIGURATION}
    row["options"] = {key: value for key, value in line["options"].items() if key != "must"}
    # it came as a check; then the planner was put right by it
    put_right = (row["model"], row["method"]) == ("Qwen/Qwen2-VL-2B-Instruct", "qlora")
    row["set"] = "fit" if put_right else kind
    row["device"] = line["device"]
    if "peak" in line:
        row["tokens"] = line["batch_shapes"]["input_ids"][1]
        row["peak_gb"] = round(line["peak"] / 1e9, 3)
        row["weights_gb"] = round(line["weights"] / 1e9, 3)
    if "steps" in line:
        row["reserved_gb"] = round(line["reserved"] / 1e9, 3)
        row["samples_per_second"] = round(line["samples_per_second"], 2)
    if "error" in line:
        row["error"] = line["error"]
    return row


# ---- what the planner says


def options_of(row: Row) -> dict[str, Any]:
    """Give the arguments of `plan.estimate` for a measured row."""
    options = row["options"]
    text_tokens = USUAL_TEXT_TOKENS
    if "tokens" in row:
        picture = picture_size(row["model"], row["pixels"])
        text_tokens = row["tokens"] - picture["tokens"]
    usual_dtype = "float32" if row["method"] == "full" else "bfloat16"
    return {
        # answers came from a model without an adapter
        "method": "full" if row["method"] == "generate" else row["method"],
        "target": row["target"],
        "lora_r": options.get("r", 8),
        "lora_dropout": options.get("dropout", 0.0),
        "modules_to_save": tuple(options.get("save", ())),
        "dtype": options.get("dtype", usual_dtype),
        "batch_size": row["batch"],
        "image_size": row["pixels"],
        "checkpointing": row["checkpointing"],
        "text_tokens": text_tokens,
        "new_tokens": options.get("new_tokens", 150),
        "gpu_gb": LARGE_CARD,
    }


def planned(row: Row) -> float:
    """Give the planner's peak for a measured row, in GB: of training, or of a batch of answers."""
    plan = estimate(row["model"], **options_of(row))
    return plan["generation"] if row["method"] == "generate" else plan["peak"]


# ---- the table


def description_of(row: Row) -> str:
    """Describe how a row was run, such as "qlora all-linear, r 16, checkpointing"."""
    parts = [f"{row['method']} {row['target']}".strip()]
    for key, value in row["options"].items():
        if key != "save":
            parts.append(f"{key} {value}")
    parts += row["options"].get("save", [])
    if row["checkpointing"]:
        parts.append("checkpointing")
    return ", ".join(parts)


def table(rows: list[Row]) -> str:
    """Put the rows beside what the planner says, in Markdown."""
    lines = [HEADER, "|" + "---|" * 9]
    for row in rows:
        found = planned(row)
        if "peak_gb" in row:
            measured = row["peak_gb"]
            difference = f"{found / row['peak_gb'] - 1:+.1%}"
        else:
            measured = row["error"]
            difference = ""
        cells = [
            row["model"].split("/")[1],
            description_of(row),
            row["batch"],
            row.get("tokens", ""),
            measured,
            f"{found:.3f}",
            difference,
            row.get("samples_per_second", ""),
            row["set"],
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def write_rows(file: Path, rows: list[Row]) -> None:
    """Write a row a line."""
    text = ",\n ".join(json.dumps(row) for row in rows)
    file.write_text(f"[{text}]\n", encoding="utf-8")


def main() -> None:
    """Write the table, and before it the measured figures if there are new ones."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("fit", nargs="*", help="lines of the FIT configurations")
    parser.add_argument("--check", nargs="*", default=[], help="lines of the CHECK configurations")
    parser.add_argument("--add", nargs="*", default=[], help="lines of later ones, kept beside")
    given = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    kept = FOLDER / "measured.json"
    if given.fit:
        write_rows(kept, rows_of(given.fit, "fit") + rows_of(given.check, "check"))
    if given.add:
        write_rows(kept, json.loads(kept.read_text("utf-8")) + rows_of(given.add, "check"))
    rows = json.loads(kept.read_text("utf-8"))
    asked = [row for row in rows if row["method"] == "generate"]
    trained = [row for row in rows if row["method"] != "generate"]
    text = README.format(device=trained[0]["device"], trained=table(trained), asked=table(asked))
    (FOLDER / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
