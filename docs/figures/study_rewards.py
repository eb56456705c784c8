"""What the full study of notebook 12 found, from its parquet.

    python docs/figures/study_rewards.py papermill_runs/rewards/out/results.parquet

writes results.json and effects.png to papermill_runs/reference/study-rewards: for each method,
weight of a miss and measure the mean over seeds of the difference to SFT that goes on for as many
minutes, the 95% t-interval of this mean over the seeds, the least and the greatest difference, and
in how many of the runs the whole interval of the run lies on the better or on the worse side of 0.
A method pays at a weight if missed or invented findings fall by more than the interval over seeds,
and names are not worse by more than two points.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

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
# points of names that may be lost
NAMES_LOST = 2.0
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
                        **interval_of(difference),
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
                    **interval_of(rise),
                    "least": float(rise.min()),
                    "greatest": float(rise.max()),
                    "better": None,
                    "worse": None,
                }
            )
    return rows


def interval_of(differences: pd.Series) -> dict[str, float | None]:
    """Give the 95% t-interval of a mean over seeds; None for both ends where there is one seed."""
    if len(differences) < 2:
        return {"low": None, "high": None}
    mean = float(differences.mean())
    half = float(stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences))
    return {"low": mean - half, "high": mean + half}


def verdicts_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Say of each method and weight whether it pays, by the rule above."""
    by_key = {(row["method"], row["missed"], row["measure"]): row for row in rows}
    verdicts = []
    for method, missed in dict.fromkeys((row["method"], row["missed"]) for row in rows):
        found = by_key.get((method, missed, "sensitivity"), {})
        alarms = by_key.get((method, missed, "false alarms"), {})
        names = by_key.get((method, missed, "name right"), {}).get("difference")
        fewer_missed = (found.get("low") or 0) > 0
        fewer_invented = (alarms.get("high") or 0) < 0
        names_hold = names is not None and names >= -NAMES_LOST
        verdicts.append(
            {
                "method": method,
                "missed": missed,
                "fewer missed": fewer_missed,
                "fewer invented": fewer_invented,
                "names hold": names_hold,
                "pays": (fewer_missed or fewer_invented) and names_hold,
            }
        )
    return verdicts


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


def read_command(about: str, parquet: Path, out: Path) -> argparse.Namespace:
    """Read the command line of a script that sums up a study; also for the other studies."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("parquet", nargs="?", type=Path, default=parquet)
    parser.add_argument("--out", type=Path, default=out)
    return parser.parse_args()


def write_sums(out: Path, table: pd.DataFrame, sums: dict[str, Any]) -> None:
    """Write how many runs there are, in which state, and the sums, to results.json."""
    out.mkdir(parents=True, exist_ok=True)
    found = {"runs": len(table), "states": table["state"].value_counts().to_dict(), **sums}
    (out / "results.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def main() -> None:
    """Write results and figure."""
    given = read_command(__doc__, RESULTS, FOLDER)
    table = pd.read_parquet(given.parquet)
    rows = rows_of(table)
    if not rows:
        raise SystemExit(f"{given.parquet} has no finished run: `medtune list rewards` says why")
    verdicts = verdicts_of(rows)
    write_sums(given.out, table, {"verdicts": verdicts, "rows": rows})
    draw(rows).savefig(given.out / "effects.png", dpi=110)
    print(pd.DataFrame(rows).round(2).to_string(index=False))
    print(pd.DataFrame(verdicts).to_string(index=False))


if __name__ == "__main__":
    main()
