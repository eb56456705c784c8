"""What the full study of notebook 12 found, from its parquet.

    python docs/figures/study_rewards.py papermill_runs/rewards/out/results.parquet

writes results.json and effects.png to papermill_runs/reference/study-rewards: for each method,
weight of a miss and measure the mean over seeds of the difference to SFT that goes on for as many
minutes, the least and the greatest of them, and in how many of the runs the whole interval lies
on the better or on the worse side of 0.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

REPO = Path(__file__).parents[2]
FOLDER = REPO / "papermill_runs" / "reference" / "study-rewards"
RESULTS = REPO / "papermill_runs" / "rewards" / "out" / "results.parquet"
NOTEBOOK = "12_reward_what_is_true"
METHODS = ["DPO", "GRPO"]
# each measure, and the sign of a change for the better
MEASURES = {
    "sensitivity": 1,
    "false alarms": -1,
    "invents a finding": -1,
    "kind right": 1,
    "name right": 1,
}
COLOURS = {"DPO": "#0072B2", "GRPO": "#D55E00"}


def rows_of(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Sum up the runs of a study, one row a method, weight and measure."""
    finished = table[table["state"] == "COMPLETE"]
    rows = []
    for missed, runs in finished.groupby(f"{NOTEBOOK}.settings.missed"):
        for method in METHODS:
            for measure, sign in MEASURES.items():
                column = f"{NOTEBOOK}.minus_sft.{method}.{measure}."
                if column + "difference" not in runs:
                    continue
                known = runs.dropna(subset=[column + "difference"])
                if known.empty:
                    continue
                low = sign * known[column + ("low" if sign > 0 else "high")]
                high = sign * known[column + ("high" if sign > 0 else "low")]
                difference = known[column + "difference"]
                rows.append(
                    {
                        "method": method,
                        "missed": float(missed),
                        "measure": measure,
                        "runs": len(known),
                        "difference": float(difference.mean()),
                        "least": float(difference.min()),
                        "greatest": float(difference.max()),
                        "better": int((low > 0).sum()),
                        "worse": int((high < 0).sum()),
                    }
                )
            wrong = f"{NOTEBOOK}.wrong_picture_reward."
            rise = runs[wrong + method] - runs[wrong + "start"]
            rows.append(
                {
                    "method": method,
                    "missed": float(missed),
                    "measure": "reward with the wrong picture, minus the start's",
                    "runs": len(runs),
                    "difference": float(rise.mean()),
                    "least": float(rise.min()),
                    "greatest": float(rise.max()),
                    "better": None,
                    "worse": None,
                }
            )
    return rows


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Draw each measure in a field: the mean difference over the weights, with least and greatest."""
    figure = Figure(figsize=(3.0 * len(MEASURES), 3.0), layout="constrained")
    fields = figure.subplots(1, len(MEASURES))
    for axis, measure in zip(fields, MEASURES, strict=True):
        for method in METHODS:
            points = [row for row in rows if (row["method"], row["measure"]) == (method, measure)]
            places = [row["missed"] for row in points]
            means = [row["difference"] for row in points]
            below = [row["difference"] - row["least"] for row in points]
            above = [row["greatest"] - row["difference"] for row in points]
            axis.errorbar(
                places, means, [below, above], fmt="o-", color=COLOURS[method], label=method
            )
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.set_title(measure, fontsize=10)
        axis.set_xlabel("reward of a miss")
    fields[0].set_ylabel("points, against SFT that goes on")
    fields[0].legend()
    return figure


def main() -> None:
    """Write results and figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parquet", nargs="?", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=FOLDER)
    given = parser.parse_args()
    table = pd.read_parquet(given.parquet)
    rows = rows_of(table)
    if not rows:
        raise SystemExit(f"{given.parquet} has no finished run: `medtune list rewards` says why")
    given.out.mkdir(parents=True, exist_ok=True)
    found = {"runs": len(table), "states": table["state"].value_counts().to_dict(), "rows": rows}
    (given.out / "results.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    draw(rows).savefig(given.out / "effects.png", dpi=110)
    print(pd.DataFrame(rows).round(2).to_string(index=False))


if __name__ == "__main__":
    main()
