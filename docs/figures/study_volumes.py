"""What a study of notebook 11 found, from its parquet.

    python docs/figures/study_volumes.py papermill_runs/volumes/out/results.parquet

writes results.json and controls.png to papermill_runs/reference/study-volumes. For each setting (all
parameters that vary, but the seed): the mean over seeds of each score, before and after training, and
of each score minus the one with a control, with the 95% t-interval of this mean over the seeds. A
control is passed if this interval lies above 0.
"""

import re
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from study_rewards import interval_of, read_command, write_sums

REPO = Path(__file__).parents[2]
FOLDER = REPO / "papermill_runs" / "reference" / "study-volumes"
RESULTS = REPO / "papermill_runs" / "volumes" / "out" / "results.parquet"
NOTEBOOK = "11_volumes_priors_records"
WHO = ("base", "no pixel", "tuned")
PASSED, NOT_PASSED = "#009E73", "#D55E00"


def settings_of(table: pd.DataFrame) -> pd.Series:
    """Name the setting of each run: the parameters that vary in the study, without the seed."""
    notes = {"run", "state", "error", "seed"}
    lists = {"train_step", "train_loss", "eval_step", "eval_loss"}
    varying = []
    for column in table.columns:
        if "." not in column and column not in notes | lists and table[column].nunique() > 1:
            varying.append(column)
    names = []
    for _, row in table.iterrows():
        names.append(", ".join(f"{column} {row[column]}" for column in varying) or "all")
    return pd.Series(names, index=table.index)


def mean_of(values: pd.Series) -> dict[str, Any]:
    """Give the mean over seeds, its interval, and the least and the greatest value."""
    return {
        "runs": len(values),
        "mean": float(values.mean()),
        **interval_of(values),
        "least": float(values.min()),
        "greatest": float(values.max()),
    }


def scores_of(runs: pd.DataFrame) -> list[dict[str, Any]]:
    """Sum up the scores of one setting, one row a score."""
    rows = []
    for column in runs.columns:
        found = re.fullmatch(rf"{NOTEBOOK}\.scores\.({'|'.join(WHO)})\.(.+)", column)
        if found:
            known = runs[column].dropna()
            if len(known):
                rows.append({"who": found[1], "part": found[2], **mean_of(known)})
    return rows


def controls_of(runs: pd.DataFrame) -> list[dict[str, Any]]:
    """Sum up what the controls took away in one setting, one row a control and part."""
    rows = []
    for column in runs.columns:
        found = re.fullmatch(rf"{NOTEBOOK}\.differences\.([^.]+)\.(.+)\.difference", column)
        if not found:
            continue
        known = runs[column].dropna()
        if known.empty:
            continue
        row = {"control": found[1], "part": found[2], **mean_of(known)}
        row["passed"] = row["low"] is not None and row["low"] > 0
        row["passed_alone"] = int((runs[column.removesuffix("difference") + "low"] > 0).sum())
        rows.append(row)
    return rows


def draw(settings: dict[str, dict[str, Any]]) -> Figure:
    """Draw each setting in a field: score minus score with the control, and its interval."""
    lines = max(len(found["controls"]) for found in settings.values())
    figure = Figure(figsize=(2.5 + 3.2 * len(settings), 1 + 0.24 * lines), layout="constrained")
    fields = figure.subplots(1, len(settings), sharey=True, squeeze=False)[0]
    for axis, (name, found) in zip(fields, settings.items(), strict=True):
        for place, row in enumerate(found["controls"]):
            colour = PASSED if row["passed"] else NOT_PASSED
            axis.plot(row["mean"], place, "o", color=colour)
            if row["low"] is not None:
                axis.plot([row["low"], row["high"]], [place, place], color=colour)
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set_title(name.replace(", ", "\n"), fontsize=9)
        axis.set_xlabel("points")
        # an interval of three seeds may be wider than all there is
        axis.set_xlim(-60, 100)
    rows = next(iter(settings.values()))["controls"]
    fields[0].set_yticks(range(len(rows)), [f"{row['part']}: {row['control']}" for row in rows])
    fields[0].tick_params(axis="y", labelsize=8)
    fields[0].invert_yaxis()
    return figure


def main() -> None:
    """Write results and figure."""
    given = read_command(__doc__, RESULTS, FOLDER)
    table = pd.read_parquet(given.parquet)
    finished = table[table["state"] == "COMPLETE"]
    if finished.empty:
        raise SystemExit(f"{given.parquet} has no finished run: `medtune list volumes` says why")
    settings = {}
    for name, runs in finished.groupby(settings_of(finished), sort=False):
        settings[name] = {"scores": scores_of(runs), "controls": controls_of(runs)}
    write_sums(given.out, table, {"settings": settings})
    draw(settings).savefig(given.out / "controls.png", dpi=110)
    for name, sums in settings.items():
        scores = pd.DataFrame(sums["scores"]).pivot(index="part", columns="who", values="mean")
        print(name)
        print(scores.round(0).to_string())
        controls = pd.DataFrame(sums["controls"])
        print(controls.round(1).to_string(index=False))
        print(f"{controls['passed'].sum()} of {len(controls)} controls are passed over the seeds")


if __name__ == "__main__":
    main()
