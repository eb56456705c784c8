"""What the full study of notebook 08 found: verdicts on the recipes' rules, from its parquet.

    python docs/figures/study_knobs.py

writes verdicts.json and figures beside the parquet, and the table of docs/knobs.md. Every figure is
computed here. An effect is the mean difference of two settings over seeds, paired by seed, all else
equal; its interval is the 95% t-interval over the seeds' differences (with three seeds a factor of
4.3 on the standard error: wide, and honest). A rule is *supported* if every comparison that it
makes shows what it claims ("better": the interval lies above zero; "no worse": above -2 points),
*not supported* if the interval of one lies below zero or none shows a gain of 2 points, else it is
*undecided* at this scale.
"""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

REPO = Path(__file__).parents[2]
FOLDER = REPO / "papermill_runs" / "reference" / "study-knobs"
NAMES, LOSS, BLEU = "names right, %", "held-out loss", "word BLEU-4"
TRAINING_LOSS, GAP = "training loss", "gap"
# column of the parquet: what it is called here
RESPONSES = {
    "05_evaluate.name_accuracy.tuned": NAMES,
    "05_evaluate.name_accuracy.shuffled": "names right, wrong picture, %",
    "05_evaluate.finding_accuracy.tuned": "finding right, %",
    "05_evaluate.bleu4_words.tuned": BLEU,
    "03_finetune_lora.eval_loss.after": LOSS,
    "03_finetune_lora.timing.train_seconds": "training, s",
}
FACTORS = [
    "train_samples",
    "num_train_epochs",
    "lora_r",
    "lora_alpha",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "lora_dropout",
    "target",
]
# points of NAMES that make no difference in practice
SMALL = 2.0
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]

# Some factors and their levels.
Levels = dict[str, Any]


# ---- the rules

BETTER, NO_WORSE = "better", "no worse"
RATES = (4e-3, 1.6e-2)


@dataclass(frozen=True)
class Comparison:
    """One thing that a rule claims.

    Parameters
    ----------
    a, b : two settings, by what differs from the common one.
    claim : `a` is BETTER than `b`, or NO_WORSE.
    """

    a: Levels
    b: Levels
    claim: str = BETTER


@dataclass(frozen=True)
class Rule:
    """A rule of a published recipe.

    Parameters
    ----------
    recipe : who says it.
    claim : in what words.
    comparisons : what it claims, as far as the study can tell.
    """

    recipe: str
    claim: str
    comparisons: list[Comparison]


def _pairs(number: int, **levels: Any) -> Levels:
    """Give a setting of so many training pairs."""
    return {"train_samples": number, **levels}


def _rank(rank: int) -> Levels:
    """Give a setting of a rank, with twice as much alpha."""
    return {"lora_r": rank, "lora_alpha": 2 * rank}


def _schedule_comparisons() -> Iterable[Comparison]:
    for rate in RATES:
        linear = {"learning_rate": rate, "lr_scheduler_type": "linear"}
        yield Comparison({"learning_rate": rate}, linear)
        yield Comparison({"learning_rate": rate}, {**linear, "warmup_steps": 0.0})


def _warmup_comparisons() -> Iterable[Comparison]:
    for rate in RATES:
        yield Comparison({"learning_rate": rate}, {"learning_rate": rate, "warmup_steps": 0.0})


def _alpha_comparisons() -> Iterable[Comparison]:
    for rate, alphas in ((4e-3, (8, 16, 64)), (1e-3, (8, 64))):
        for alpha in alphas:
            yield Comparison(
                {"learning_rate": rate, "lora_alpha": 32},
                {"learning_rate": rate, "lora_alpha": alpha},
            )


def _epochs(number: float) -> Levels:
    return {"num_train_epochs": number}


RULES = [
    Rule("R1", "cosine with warmup beats linear", list(_schedule_comparisons())),
    Rule("R1", "warmup helps cosine", list(_warmup_comparisons())),
    Rule(
        "R1",
        "3 epochs are the turning point at 16k pairs (here 1,152)",
        [
            Comparison(_epochs(3.0), _epochs(1.0)),
            Comparison(_epochs(3.0), _epochs(2.0)),
            Comparison(_epochs(3.0), _epochs(4.0), NO_WORSE),
            Comparison(_epochs(3.0), _epochs(6.0), NO_WORSE),
            Comparison(_epochs(3.0), _epochs(8.0), NO_WORSE),
        ],
    ),
    Rule(
        "R1",
        "6 to 8 epochs are the turning point at 5k pairs (here 384)",
        [
            Comparison(_pairs(384, **_epochs(8.0)), _pairs(384, **_epochs(2.0))),
            Comparison(_pairs(384, **_epochs(8.0)), _pairs(384, **_epochs(3.0))),
            Comparison(_pairs(384, **_epochs(8.0)), _pairs(384, **_epochs(4.0))),
            Comparison(_pairs(384, **_epochs(8.0)), _pairs(384, **_epochs(12.0)), NO_WORSE),
        ],
    ),
    Rule(
        "R1",
        # a knee: up to there more helps, beyond it does not
        "rank 32 is the knee of benefit and cost (alpha = 2 x rank)",
        [
            *(Comparison(_rank(32), _rank(rank)) for rank in (2, 4, 8, 16)),
            Comparison(_rank(32), _rank(64), NO_WORSE),
        ],
    ),
    Rule(
        "R1",
        "a rank below 8 is too little",
        [Comparison(_rank(8), _rank(rank)) for rank in (4, 2)],
    ),
    Rule("R1", "alpha is twice the rank (rank 16)", list(_alpha_comparisons())),
    Rule(
        "R1",
        "dropout 0.05 up to 10k pairs (here 384)",
        [Comparison(_pairs(384, lora_dropout=0.05), _pairs(384))],
    ),
    Rule(
        "R1",
        "no dropout above 10k pairs (here 1,152 and 2,688)",
        [Comparison(_pairs(number), _pairs(number, lora_dropout=0.05)) for number in (1152, 2688)],
    ),
    Rule(
        "R1",
        # R1 sets it and gives no rule
        "its setting: all linear layers of the language model, not a part, nor those of the vision "
        "tower too",
        [Comparison({}, {"target": part}) for part in ("attention", "mlp", "all-linear")],
    ),
    Rule(
        "R5",
        "a lower training loss overfits: stop earlier",
        [
            Comparison(_pairs(384, **_epochs(6.0)), _pairs(384, **_epochs(12.0))),
            Comparison(_epochs(4.0), _epochs(8.0)),
        ],
    ),
]


# ---- effects


def load(path: Path) -> pd.DataFrame:
    """Read the finished runs: factors, seed, responses, and how training and held-out loss differ."""
    table = pd.read_parquet(path)
    table = table[table["state"] == "COMPLETE"].rename(columns=RESPONSES)
    table[TRAINING_LOSS] = [_mean_at_the_end(losses) for losses in table["train_loss"]]
    table["lowest held-out loss"] = [min(losses) for losses in table["eval_loss"]]
    table[GAP] = table[LOSS] - table[TRAINING_LOSS]
    return table.reset_index(drop=True)


def _mean_at_the_end(losses: Sequence[float]) -> float:
    """Average the last tenth of the steps."""
    return np.mean(losses[-max(1, len(losses) // 10) :])


def common_setting(table: pd.DataFrame) -> Levels:
    """Give the level of each factor that most runs have."""
    return {factor: table[factor].mode()[0] for factor in FACTORS}


def with_levels(table: pd.DataFrame, levels: Levels) -> pd.DataFrame:
    """Pick the runs that have all these levels."""
    fits = [table[factor] == level for factor, level in levels.items()]
    return table[np.logical_and.reduce(fits)]


def setting(table: pd.DataFrame, levels: Levels) -> pd.DataFrame:
    """Pick the runs, one a seed, with these levels and the common ones elsewhere."""
    chosen = with_levels(table, common_setting(table) | levels)
    return chosen.set_index("seed").sort_index()


def interval(values: Iterable[float]) -> dict[str, float]:
    """Give mean and 95% t-interval; no interval from fewer than two."""
    values = np.asarray(values, float)
    mean = float(values.mean())
    seeds = len(values)
    half = float("nan")
    if seeds > 1:
        half = float(stats.t.ppf(0.975, seeds - 1) * values.std(ddof=1) / seeds**0.5)
    return {"mean": mean, "low": mean - half, "high": mean + half, "seeds": seeds}


def effect(table: pd.DataFrame, comparison: Comparison) -> dict[str, Any]:
    """Subtract setting `b` from setting `a` in each response, paired by seed."""
    one = setting(table, comparison.a)
    other = setting(table, comparison.b)
    seeds = one.index.intersection(other.index)
    found = {
        "claim": comparison.claim,
        "a": comparison.a,
        "b": comparison.b,
        "seeds": len(seeds),
    }
    for name in (NAMES, BLEU, LOSS, GAP):
        found[name] = interval(one.loc[seeds, name] - other.loc[seeds, name])
    return found


# ---- verdicts


def verdict(effects: Sequence[Mapping[str, Any]]) -> str:
    """Judge by the names that are right, which a caption's fixed wording cannot earn."""
    names = [found[NAMES] for found in effects]
    gains = [found[NAMES] for found in effects if found["claim"] == BETTER]
    one_is_worse = any(found["high"] < 0 for found in names)
    no_gain = all(-SMALL < gain["low"] <= gain["high"] < SMALL for gain in gains)
    if one_is_worse or no_gain:
        return "not supported"
    if all(_shows_its_claim(found) for found in effects):
        return "supported"
    return "undecided"


def _shows_its_claim(found: Mapping[str, Any]) -> bool:
    least = 0 if found["claim"] == BETTER else -SMALL
    return found[NAMES]["low"] > least


def judge(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Judge every rule by its comparisons, as far as their runs have finished."""
    verdicts = []
    for rule in RULES:
        effects = []
        for comparison in rule.comparisons:
            found = effect(table, comparison)
            if found["seeds"] > 1:
                effects.append(found)
        complete = len(effects) == len(rule.comparisons)
        verdicts.append(
            {
                "recipe": rule.recipe,
                "claim": rule.claim,
                "effects": effects,
                "verdict": verdict(effects) if complete else "undecided",
            }
        )
    return verdicts


# ---- the table of docs/knobs.md

SHORT_NAMES = {
    "num_train_epochs": "epochs",
    "train_samples": "pairs",
    "learning_rate": "rate",
    "warmup_steps": "warmup",
    "lora_r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    # its levels say what it is
    "lr_scheduler_type": "",
}


def label(level: Any) -> str:
    """Write a level: numbers as short as they can be."""
    return f"{level:g}" if isinstance(level, float | int) else str(level)


def in_words(levels: Levels) -> str:
    """Write levels, such as "pairs 384, epochs 8"."""
    parts = []
    for factor, level in levels.items():
        parts.append(f"{SHORT_NAMES.get(factor, factor)} {label(level)}".strip())
    return ", ".join(parts)


def describe(found: Mapping[str, Any], common: Levels) -> str:
    """Write a comparison, such as "rank 32 minus rank 16", and where it was made.

    The place is left out where it is the common setting.
    """
    one = common | found["a"]
    other = common | found["b"]
    differing = [factor for factor in common if one[factor] != other[factor]]
    text = in_words({factor: one[factor] for factor in differing})
    text += f" minus {in_words({factor: other[factor] for factor in differing})}"
    place = {}
    for factor, level in found["a"].items():
        if factor not in differing and common[factor] != level:
            place[factor] = level
    return f"{text} (at {in_words(place)})" if place else text


def cell(found: Mapping[str, float], digits: int = 1) -> str:
    """Write a mean with its interval."""
    mean, low, high = (f"{found[key]:+.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def markdown(verdicts: Sequence[dict], table: pd.DataFrame, runs: int, failed: int) -> str:
    """Write the computed part of docs/knobs.md."""
    common = common_setting(table)
    lines = [
        f"{runs} runs, {failed} of them failed; {table['seed'].nunique()} seeds.",
        "",
        "| who | the rule | verdict | compared | names right, points | word BLEU-4 | held-out loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for rule in verdicts:
        # only in the first row of a rule
        first = [rule["recipe"], rule["claim"], f"**{rule['verdict']}**"]
        for found in rule["effects"]:
            cells = [
                *first,
                describe(found, common),
                cell(found[NAMES]),
                cell(found[BLEU]),
                cell(found[LOSS], digits=3),
            ]
            lines.append(f"| {' | '.join(cells)} |")
            first = ["", "", ""]
    return "\n".join(lines)


def write_into_page(page: Path, text: str) -> None:
    """Put the table into the place of the one in docs/knobs.md."""
    before, _, rest = page.read_text("utf-8").partition("<!-- verdicts -->")
    _, _, after = rest.partition("<!-- /verdicts -->")
    page.write_text(f"{before}<!-- verdicts -->\n{text}\n<!-- /verdicts -->{after}", "utf-8")


# ---- figures


@dataclass(frozen=True)
class Curve:
    """A line of a figure.

    Parameters
    ----------
    runs : what it sums up.
    factor : along the x axis.
    label : in the legend; None for no entry.
    colour : of line and dots.
    log : the levels are numbers, on an axis to the base of 2; otherwise they stand side by side.
    """

    runs: pd.DataFrame
    factor: str
    label: str | None
    colour: str
    log: bool = False


def draw_curve(axis: Axes, curve: Curve, response: str) -> None:
    """Draw the mean over seeds with its interval, and each seed as a dot."""
    of_level = {}
    for level, runs in curve.runs.groupby(curve.factor):
        of_level[level] = runs[response]
    levels = sorted(of_level)
    places = levels if curve.log else list(range(len(levels)))
    found = [interval(of_level[level]) for level in levels]
    axis.errorbar(
        places,
        [one["mean"] for one in found],
        [
            [one["mean"] - one["low"] for one in found],
            [one["high"] - one["mean"] for one in found],
        ],
        color=curve.colour,
        marker="o",
        capsize=3,
        label=curve.label,
    )
    for place, level in zip(places, levels, strict=True):
        values = of_level[level]
        axis.plot([place] * len(values), values, ".", color=curve.colour, alpha=0.5, markersize=4)
    if curve.log:
        axis.set_xscale("log", base=2)
    axis.set_xticks(places, labels=[label(level) for level in levels])
    axis.minorticks_off()


class Study:
    """The runs, of which a figure shows those that differ in some factors only."""

    def __init__(self, table: pd.DataFrame):
        self.table = table
        self.common = common_setting(table)

    def vary(self, *free: str, **fixed: Any) -> pd.DataFrame:
        """Pick the runs in which only the free factors differ from the common setting."""
        held = self.common | fixed
        for factor in free:
            del held[factor]
        return with_levels(self.table, held)


def effects_figure(study: Study) -> Figure:
    """Draw the effects of rank, alpha, dropout and schedule."""
    ranks = study.vary("lora_r", "lora_alpha")
    ranks = ranks[ranks["lora_alpha"] == 2 * ranks["lora_r"]]
    panels = {"rank, alpha = 2 x rank": [Curve(ranks, "lora_r", None, COLOURS[0], log=True)]}

    curves = []
    for colour, rate in zip(COLOURS, (4e-3, 1e-3), strict=False):
        runs = study.vary("lora_alpha", learning_rate=rate)
        curves.append(Curve(runs, "lora_alpha", f"rate {rate:g}", colour, log=True))
    panels["alpha at rank 16"] = curves

    curves = []
    for colour, pairs in zip(COLOURS, (384, 1152, 2688), strict=False):
        runs = study.vary("lora_dropout", train_samples=pairs)
        curves.append(Curve(runs, "lora_dropout", f"{pairs} pairs", colour))
    panels["dropout"] = curves

    schedules = study.vary("lr_scheduler_type", "warmup_steps", "learning_rate")
    warmup = schedules["warmup_steps"].map("\nwarmup {:g}".format)
    schedules = schedules.assign(schedule=schedules["lr_scheduler_type"] + warmup)
    curves = []
    for colour, rate in zip(COLOURS, RATES, strict=False):
        runs = schedules[schedules["learning_rate"] == rate]
        curves.append(Curve(runs, "schedule", f"rate {rate:g}", colour))
    panels["schedule"] = curves

    figure = Figure(figsize=(12, 5.4), layout="constrained")
    for row, response in zip(figure.subplots(2, 4), (NAMES, LOSS), strict=True):
        for axis, (title, curves) in zip(row, panels.items(), strict=True):
            for curve in curves:
                draw_curve(axis, curve, response)
            axis.set(title=title, ylabel=response)
            if curves[0].label:
                axis.legend()
    return figure


def epochs_figure(study: Study) -> Figure:
    """Draw what more epochs do, for two sizes of the data."""
    figure = Figure(figsize=(12, 3), layout="constrained")
    axes = figure.subplots(1, 4)
    for axis, response in zip(axes, (NAMES, LOSS, TRAINING_LOSS, GAP), strict=True):
        for colour, pairs in zip(COLOURS, (384, 1152), strict=False):
            runs = study.vary("num_train_epochs", train_samples=pairs)
            curve = Curve(runs, "num_train_epochs", f"{pairs} pairs", colour, log=True)
            draw_curve(axis, curve, response)
        axis.set(title=response, xlabel="epochs")
    axes[0].legend()
    return figure


def curves_figure(study: Study) -> Figure:
    """Draw learning curves of two settings, and all runs by their training loss."""
    figure = Figure(figsize=(12, 3), layout="constrained")
    small, large, everything = figure.subplots(1, 3)
    _draw_learning_curves(small, study, pairs=384, epochs=12.0)
    _draw_learning_curves(large, study, pairs=1152, epochs=8.0)
    everything.scatter(
        study.table[TRAINING_LOSS],
        study.table[NAMES],
        s=10,
        c=np.log2(study.table["train_samples"] / 384),
        cmap="viridis",
    )
    everything.set(
        title="all runs (brighter: more pairs)",
        xlabel="training loss at the end",
        ylabel=NAMES,
        xscale="log",
    )
    return figure


def _draw_learning_curves(axis: Axes, study: Study, *, pairs: int, epochs: float) -> None:
    """Draw training and held-out loss of each seed."""
    runs = study.vary(train_samples=pairs, num_train_epochs=epochs)
    training_label, held_out_label = "training", "held-out"
    for _, run in runs.iterrows():
        axis.plot(
            run["train_step"],
            run["train_loss"],
            color=COLOURS[0],
            alpha=0.6,
            label=training_label,
        )
        axis.plot(
            run["eval_step"],
            run["eval_loss"],
            color=COLOURS[1],
            alpha=0.9,
            label=held_out_label,
        )
        # one entry of the legend is enough; what begins with _ has none
        training_label, held_out_label = "_training", "_held-out"
    axis.set(
        title=f"{pairs} pairs, {epochs:g} epochs, each seed",
        xlabel="step",
        ylabel="loss",
        yscale="log",
    )
    axis.legend()


def save_figures(table: pd.DataFrame, folder: Path) -> None:
    """Save effects, epochs by data size, and learning curves, as small PNGs."""
    style = {
        "font.size": 8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
    }
    study = Study(table)
    with matplotlib.rc_context(style):
        effects_figure(study).savefig(folder / "effects.png", dpi=80)
        epochs_figure(study).savefig(folder / "epochs.png", dpi=80)
        curves_figure(study).savefig(folder / "curves.png", dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="has results.parquet")
    parser.add_argument("--page", type=Path, default=REPO / "docs" / "knobs.md")
    options = parser.parse_args()
    path = options.folder / "results.parquet"
    everything = pd.read_parquet(path)
    table = load(path)
    verdicts = judge(table)
    (options.folder / "verdicts.json").write_text(json.dumps(verdicts, indent=1) + "\n", "utf-8")
    save_figures(table, options.folder)
    failed = int((everything["state"] != "COMPLETE").sum())
    text = markdown(verdicts, table, len(everything), failed)
    write_into_page(options.page, text)
    print(text)


if __name__ == "__main__":
    main()
