"""Hold the planner against measured peaks: from the lines of benchmarks/memory.py to the committed table.

    python benchmarks/planner_table.py FIT.jsonl ... --check CHECK.jsonl ...   # write measured.json and README.md
    python benchmarks/planner_table.py                                         # README.md anew, from measured.json

Both stand in papermill_runs/reference/planner-h200/; nothing in them is typed by hand.
"""

import argparse
import json
from pathlib import Path

from medtune import sizing

FOLDER = Path(__file__).parents[1] / "papermill_runs" / "reference" / "planner-h200"


def rows_of(files: list[str], kind: str) -> list[dict]:
    """What the table needs of each line, in GB; a configuration measured twice counts with its last line."""
    rows = {}
    for line in (json.loads(line) for file in files for line in Path(file).read_text("utf-8").splitlines()):
        row = {key: line[key] for key in ("model", "method", "target", "batch", "pixels", "checkpointing")}
        options = {key: value for key, value in line["options"].items() if key != "must"}
        later = (row["model"], row["method"]) == ("Qwen/Qwen2-VL-2B-Instruct", "qlora")  # seen, then put right
        row |= {"options": options, "set": "fit" if later else kind, "device": line["device"]}
        shapes = line.get("batch_shapes", {})
        if "peak" in line:
            row |= {"tokens": shapes["input_ids"][1], "peak_gb": round(line["peak"] / 1e9, 3)}
            row |= {"weights_gb": round(line["weights"] / 1e9, 3)}
        if "steps" in line:
            row |= {"reserved_gb": round(line["reserved"] / 1e9, 3)}
            row |= {"samples_per_second": round(line["samples_per_second"], 2)}
        if "error" in line and "must" not in line["options"]:
            continue  # the card was shared, and what ran beside took the memory
        if "error" in line:
            row["error"] = line["error"]
        rows[json.dumps([row[key] for key in list(row)[:6]] + [options])] = row
    return list(rows.values())


def options_of(row: dict) -> dict:
    """The arguments of `sizing.plan` for a measured row; answers came from a model without an adapter."""
    options = row["options"]
    dtype = options.get("dtype", "float32" if row["method"] == "full" else "bfloat16")
    picture = sizing.picture_size(row["model"], row["pixels"])
    return {
        "method": "full" if row["method"] == "generate" else row["method"],
        "target": row["target"],
        "lora_r": options.get("r", 8),
        "lora_dropout": options.get("dropout", 0.0),
        "modules_to_save": tuple(options.get("save", ())),
        "dtype": dtype,
        "batch_size": row["batch"],
        "image_size": row["pixels"],
        "checkpointing": row["checkpointing"],
        "text_tokens": row["tokens"] - picture["tokens"] if "tokens" in row else 92,
        "new_tokens": options.get("new_tokens", 150),
        "gpu_gb": 150.0,
    }


def planned(row: dict) -> float:
    """The planner's peak for a measured row, in GB: of training, or of the answers to a batch."""
    return sizing.plan(row["model"], **options_of(row))["generation" if row["method"] == "generate" else "peak"]


def table(rows: list[dict]) -> str:
    """The rows beside what the planner says, in Markdown."""
    lines = ["| model | run | batch | tokens | measured GB | planned GB | | samples/s | |", "|" + "---|" * 9]
    for row in rows:
        options = {key: value for key, value in row["options"].items() if key != "save"}
        extra = [f"{key} {value}" for key, value in options.items()] + row["options"].get("save", [])
        how = ", ".join([f"{row['method']} {row['target']}".strip(), *extra])
        how += ", checkpointing" if row["checkpointing"] else ""
        found = planned(row)
        measured, off = row.get("peak_gb", row.get("error")), ""
        if "peak_gb" in row:
            off = f"{found / row['peak_gb'] - 1:+.1%}"
        cells = [row["model"].split("/")[1], how, row["batch"], row.get("tokens", ""), measured, f"{found:.3f}"]
        lines.append(f"| {' | '.join(map(str, [*cells, off, row.get('samples_per_second', ''), row['set']]))} |")
    return "\n".join(lines)


def main() -> None:
    """Write the table, and before it the measured figures if there are new ones."""
    parser = argparse.ArgumentParser()
    parser.add_argument("fit", nargs="*")
    parser.add_argument("--check", nargs="*", default=[])
    given = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    if given.fit:
        rows = rows_of(given.fit, "fit") + rows_of(given.check, "check")
        text = ",\n ".join(json.dumps(row) for row in rows)
        (FOLDER / "measured.json").write_text(f"[{text}]\n", encoding="utf-8")
    rows = json.loads((FOLDER / "measured.json").read_text("utf-8"))
    asked = [row for row in rows if row["method"] == "generate"]
    trained = [row for row in rows if row not in asked]
    text = (
        f"# The planner against measured peaks\n\n{trained[0]['device']}, TRL's SFTTrainer on shape twins with random "
        "weights, five steps, one picture a sample; GB are 10^9 bytes, peaks `torch.cuda.max_memory_allocated`. The "
        "constants of `medtune.sizing` were fitted to the rows marked fit; those marked check came later. One of these,"
        " Qwen2-VL with QLoRA, was planned 10.0% low, for want of what quick_gelu keeps; that was put in, so the row "
        "counts as fit. Other processes shared the card: peaks are of the process alone, but samples/s are low, above "
        "all in the rows marked check, and memory ran out before the whole card was used. Nothing here says anything "
        f"about quality.\n\n{table(trained)}\n\n## Answers\n\nThe same model answers a batch of pictures, tokens are "
        "those of picture and question. The planner's estimate takes the constants of training; that its top is the "
        f"vision tower, the prompt or the whole cache was settled with these two rows at hand.\n\n{table(asked)}\n"
    )
    (FOLDER / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
