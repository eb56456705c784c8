"""What the full study of notebook 08 found: verdicts on the recipes' rules, from the parquet that it left.

python benchmarks/study_knobs.py   # writes verdicts.json and figures beside the parquet, and the table of docs/knobs.md

Every figure is computed here. An effect is the mean difference of two settings over seeds, paired by seed, all else
equal; its interval is the 95% t-interval over the seeds' differences (with three seeds a factor of 4.3 on the standard
error: wide, and honest). A rule is *supported* if every comparison that it makes shows what it claims ("better": the
interval lies above zero; "no worse": above -2 points), *not supported* if the interval of one lies below zero or none
shows a gain of 2 points, else it is *undecided* at this scale.
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

REPO = Path(__file__).parents[1]
FOLDER = REPO / "papermill_runs" / "reference" / "study-knobs"
NAMES, LOSS, BLEU = "names right, %", "held-out loss", "word BLEU-4"
RESPONSES = {  # column of the parquet: what it is called here
    "05_evaluate.name_accuracy.tuned": NAMES,
    "05_evaluate.name_accuracy.shuffled": "names right, wrong picture, %",
    "05_evaluate.finding_accuracy.tuned": "finding right, %",
    "05_evaluate.bleu4_words.tuned": BLEU,
    "03_finetune_lora.eval_loss.after": LOSS,
    "03_finetune_lora.timing.train_seconds": "training, s",
}
FACTORS = ["train_samples", "num_train_epochs", "lora_r", "lora_alpha", "learning_rate", "lr_scheduler_type"]
FACTORS += ["warmup_steps", "lora_dropout", "target"]
SMALL = 2.0  # points of NAMES that make no difference in practice
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]


def load(path: Path) -> pd.DataFrame:
    """The finished runs: factors, seed, responses, training loss at the end, and the gap to held-out pairs."""
    table = pd.read_parquet(path)
    table = table[table["state"] == "COMPLETE"].rename(columns=RESPONSES)
    late = [np.mean(losses[-max(1, len(losses) // 10) :]) for losses in table["train_loss"]]
    table = table.assign(**{"training loss": late, "lowest held-out loss": [min(x) for x in table["eval_loss"]]})
    table["gap"] = table[LOSS] - table["training loss"]
    return table.reset_index(drop=True)


def setting(table: pd.DataFrame, **levels) -> pd.DataFrame:
    """The runs, one a seed, with these levels and the common ones elsewhere."""
    wanted = {factor: table[factor].mode()[0] for factor in FACTORS} | levels
    chosen = table[np.logical_and.reduce([table[factor] == level for factor, level in wanted.items()])]
    return chosen.set_index("seed").sort_index()


def interval(values) -> dict[str, float]:
    """Mean and 95% t-interval; no interval from fewer than two."""
    values = np.asarray(values, float)
    mean, n = float(values.mean()), len(values)
    half = float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / n**0.5) if n > 1 else float("nan")
    return {"mean": mean, "low": mean - half, "high": mean + half, "seeds": n}


def effect(table: pd.DataFrame, a: dict, b: dict) -> dict:
    """Setting `a` minus setting `b` of each response, paired by seed."""
    one, two = setting(table, **a), setting(table, **b)
    seeds = one.index.intersection(two.index)
    found = {name: interval(one.loc[seeds, name] - two.loc[seeds, name]) for name in (NAMES, BLEU, LOSS, "gap")}
    return {"a": a, "b": b, "seeds": len(seeds), **found}


def size(pairs: int) -> dict:
    return {"train_samples": pairs}


# A rule: who says it, in what words, and comparisons: of which setting it claims that it is better, or no worse.
BETTER, NO_WORSE = "better", "no worse"
RATES = (4e-3, 1.6e-2)
RULES = [
    ("R1", "cosine with warmup beats linear", [
        ({"learning_rate": rate}, {"learning_rate": rate, "lr_scheduler_type": "linear"} | warmup, BETTER)
        for rate in RATES for warmup in ({}, {"warmup_steps": 0.0})
    ]),
    ("R1", "warmup helps cosine", [
        ({"learning_rate": rate}, {"learning_rate": rate, "warmup_steps": 0.0}, BETTER) for rate in RATES
    ]),
    ("R1", "3 epochs are the turning point at 16k pairs (here 1,152)", [
        ({"num_train_epochs": 3.0}, {"num_train_epochs": other}, BETTER if other < 3 else NO_WORSE)
        for other in (1.0, 2.0, 4.0, 6.0, 8.0)
    ]),
    ("R1", "6 to 8 epochs are the turning point at 5k pairs (here 384)", [
        (size(384) | {"num_train_epochs": 8.0}, size(384) | {"num_train_epochs": other}, kind)
        for other, kind in ((2.0, BETTER), (3.0, BETTER), (4.0, BETTER), (12.0, NO_WORSE))
    ]),
    ("R1", "rank 32 is the best value (alpha = 2 x rank)", [
        ({"lora_r": 32, "lora_alpha": 64}, {"lora_r": rank, "lora_alpha": 2 * rank}, BETTER)
        for rank in (2, 4, 8, 16, 64)
    ]),
    ("R1", "a rank below 8 is too little", [
        ({"lora_r": 8, "lora_alpha": 16}, {"lora_r": rank, "lora_alpha": 2 * rank}, BETTER) for rank in (4, 2)
    ]),
    ("R1", "alpha is twice the rank (rank 16)", [
        ({"learning_rate": rate, "lora_alpha": 32}, {"learning_rate": rate, "lora_alpha": alpha}, BETTER)
        for rate, alphas in ((4e-3, (8, 16, 64)), (1e-3, (8, 64))) for alpha in alphas
    ]),
    ("R1", "dropout 0.05 up to 10k pairs (here 384)", [(size(384) | {"lora_dropout": 0.05}, size(384), BETTER)]),
    ("R1", "no dropout above 10k pairs (here 1,152 and 2,688)", [
        (size(pairs), size(pairs) | {"lora_dropout": 0.05}, BETTER) for pairs in (1152, 2688)
    ]),
    ("R1", "all linear layers of the language model, rather than a part", [
        ({}, {"target": part}, BETTER) for part in ("attention", "mlp")
    ]),
    ("R5", "a lower training loss overfits: stop earlier", [
        (size(384) | {"num_train_epochs": 6.0}, size(384) | {"num_train_epochs": 12.0}, BETTER),
        ({"num_train_epochs": 4.0}, {"num_train_epochs": 8.0}, BETTER),
    ]),
]  # fmt: skip


def verdict(effects: list[dict]) -> str:
    """Judged by the names that are right, which a caption's fixed wording cannot earn."""
    names, gains = [one[NAMES] for one in effects], [one[NAMES] for one in effects if one["claim"] == BETTER]
    if any(found["high"] < 0 for found in names) or all(-SMALL < f["low"] <= f["high"] < SMALL for f in gains):
        return "not supported"
    shown = [one[NAMES]["low"] > (0 if one["claim"] == BETTER else -SMALL) for one in effects]
    return "supported" if all(shown) else "undecided"


def judge(table: pd.DataFrame) -> list[dict]:
    """Every rule with its comparisons, as far as their runs have finished, and the verdict."""
    found = []
    for recipe, claim, comparisons in RULES:
        effects = [{"claim": kind, **effect(table, a, b)} for a, b, kind in comparisons]
        effects = [one for one in effects if one["seeds"] > 1]
        complete = len(effects) == len(comparisons)
        found.append({"recipe": recipe, "claim": claim, "effects": effects,
                      "verdict": verdict(effects) if effects and complete else "undecided"})  # fmt: skip
    return found


def words(one: dict, common: dict) -> str:
    """A comparison in words: "rank 32 minus rank 16", and where it was made if not at the common setting."""
    short = {"num_train_epochs": "epochs", "train_samples": "pairs", "learning_rate": "rate", "warmup_steps": "warmup"}
    short["lora_r"] = "rank"

    def say(levels):
        texts = {k: f"{v:g}" if isinstance(v, float | int) else v for k, v in levels.items()}
        return ", ".join(f"{short.get(k, k.removeprefix('lora_'))} {v}" for k, v in texts.items())

    a, b = common | one["a"], common | one["b"]
    parts = [say({k: side[k] for k in common if a[k] != b[k]}) for side in (a, b)]
    same = say({k: v for k, v in one["a"].items() if b[k] == v and common[k] != v})
    return f"{parts[0]} minus {parts[1]}" + (f" (at {same})" if same else "")


def cell(found: dict, digits: int = 1) -> str:
    return f"{found['mean']:+.{digits}f} [{found['low']:+.{digits}f}, {found['high']:+.{digits}f}]"


def markdown(verdicts: list[dict], table: pd.DataFrame, runs: int, failed: int) -> str:
    """The computed part of docs/knobs.md."""
    common = {factor: table[factor].mode()[0] for factor in FACTORS}
    lines = [f"{runs} runs, {failed} of them failed; {table['seed'].nunique()} seeds.", ""]
    lines += ["| who | the rule | verdict | compared | names right, points | word BLEU-4 | held-out loss |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for rule in verdicts:
        for number, one in enumerate(rule["effects"]):
            first = [rule["recipe"], rule["claim"], f"**{rule['verdict']}**"] if number == 0 else ["", "", ""]
            pair = words(one, common).replace("lr_scheduler_type ", "")
            lines += ["| " + " | ".join([*first, pair, cell(one[NAMES]), cell(one[BLEU]), cell(one[LOSS], 3)]) + " |"]
    return "\n".join(lines)


def line(axis, table, x, response, label, colour, scale=None) -> None:
    """Mean over seeds with its interval, and each seed as a dot."""
    levels = sorted(table[x].unique(), key=str if table[x].dtype == object else None)
    places = levels if scale else range(len(levels))
    found = [interval(table[table[x] == level][response]) for level in levels]
    low, high = ([f["mean"] - f["low"] for f in found], [f["high"] - f["mean"] for f in found])
    means = [f["mean"] for f in found]
    axis.errorbar(places, means, [low, high], color=colour, marker="o", capsize=3, label=label)
    for place, level in zip(places, levels, strict=True):
        values = table[table[x] == level][response]
        axis.plot([place] * len(values), values, ".", color=colour, alpha=0.5, markersize=4)
    if scale:
        axis.set_xscale(scale, base=2)
    axis.set_xticks(list(places), labels=[f"{v:g}" if isinstance(v, float | int) else v for v in levels])
    axis.minorticks_off()


def figures(table: pd.DataFrame, folder: Path) -> None:
    """Main effects, epochs by data size, learning curves, and cost, as small PNGs."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    common = {factor: table[factor].mode()[0] for factor in FACTORS}

    def vary(*free, **fixed):
        held = {f: v for f, v in (common | fixed).items() if f not in free}
        return table[np.logical_and.reduce([table[f] == v for f, v in held.items()])]

    plt.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
    figure, axes = plt.subplots(2, 4, figsize=(12, 5.4), layout="constrained")
    titles = ("rank, alpha = 2 x rank", "alpha at rank 16", "dropout", "schedule")
    both = vary("lr_scheduler_type", "warmup_steps", "learning_rate")
    both = both.assign(schedule=both["lr_scheduler_type"] + both["warmup_steps"].map(lambda w: f"\nwarmup {w:g}"))
    ranks = vary("lora_r", "lora_alpha")
    for row, response in zip(axes, (NAMES, LOSS), strict=True):
        line(row[0], ranks[ranks["lora_alpha"] == 2 * ranks["lora_r"]], "lora_r", response, None, COLOURS[0], "log")
        for colour, rate in zip(COLOURS, (4e-3, 1e-3), strict=False):
            some = vary("lora_alpha", learning_rate=rate)
            line(row[1], some, "lora_alpha", response, f"rate {rate:g}", colour, "log")
        for colour, pairs in zip(COLOURS, (384, 1152, 2688), strict=False):
            line(row[2], vary("lora_dropout", train_samples=pairs), "lora_dropout", response, f"{pairs} pairs", colour)
        for colour, rate in zip(COLOURS, RATES, strict=False):
            line(row[3], both[both["learning_rate"] == rate], "schedule", response, f"rate {rate:g}", colour)
        for axis, title in zip(row, titles, strict=True):
            axis.set(title=title, ylabel=response)
            axis.legend() if axis.get_legend_handles_labels()[0] else None
    figure.savefig(folder / "effects.png", dpi=80)

    figure, axes = plt.subplots(1, 4, figsize=(12, 3), layout="constrained")
    for axis, response in zip(axes, (NAMES, LOSS, "training loss", "gap"), strict=True):
        for colour, pairs in zip(COLOURS, (384, 1152), strict=False):
            some = vary("num_train_epochs", train_samples=pairs)
            line(axis, some, "num_train_epochs", response, f"{pairs} pairs", colour, "log")
        axis.set(title=response, xlabel="epochs")
    axes[0].legend()
    figure.savefig(folder / "epochs.png", dpi=80)

    figure, axes = plt.subplots(1, 3, figsize=(12, 3), layout="constrained")
    for axis, pairs, epochs in ((axes[0], 384, 12.0), (axes[1], 1152, 8.0)):
        for _, row in vary(train_samples=pairs, num_train_epochs=epochs).iterrows():
            axis.plot(row["train_step"], row["train_loss"], color=COLOURS[0], alpha=0.6, label="training")
            axis.plot(row["eval_step"], row["eval_loss"], color=COLOURS[1], alpha=0.9, label="held-out")
        axis.set(title=f"{pairs} pairs, {epochs:g} epochs, each seed", xlabel="step", ylabel="loss", yscale="log")
        handles = dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
        axis.legend(handles.values(), handles.keys())
    axes[2].scatter(table["training loss"], table[NAMES], s=10, c=np.log2(table["train_samples"] / 384), cmap="viridis")
    axes[2].set(title="all runs (brighter: more pairs)", xlabel="training loss at the end", ylabel=NAMES, xscale="log")
    figure.savefig(folder / "curves.png", dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description="Judge the recipes' rules by the full study.")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--page", type=Path, default=REPO / "docs" / "knobs.md")
    options = parser.parse_args()
    path = options.folder / "results.parquet"
    everything, table = pd.read_parquet(path), load(path)
    verdicts = judge(table)
    (options.folder / "verdicts.json").write_text(json.dumps(verdicts, indent=1) + "\n", "utf-8")
    figures(table, options.folder)
    text = markdown(verdicts, table, len(everything), int((everything["state"] != "COMPLETE").sum()))
    page = options.page.read_text("utf-8")
    whole = re.sub(r"(?s)<!-- verdicts -->.*<!-- /verdicts -->", f"<!-- verdicts -->\n{text}\n<!-- /verdicts -->", page)
    options.page.write_text(whole, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
