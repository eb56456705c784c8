"""Subcommands that set runs beside each other: compare, curves."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from .answering import score_functions
from .app import app
from .options import Root, ScoreNames
from .printing import print_table


@dataclass(frozen=True)
class Answered:
    """The answers of one side of a comparison."""

    #: As it is called in tables.
    name: str
    #: By id: "answer", "reference", and "group" and "seconds" where they are known.
    answers: dict[str, dict[str, Any]]
    #: Answers that were generated at once; None where nothing says it.
    batch_size: int | None = None


@app.command()
def compare(
    sides: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN RUN...",
            help="Two or more: a run's name, or a file of answers, such as the tuned model's.",
        ),
    ],
    scores: ScoreNames = None,
    seed: Annotated[int, typer.Option(help="Seed of the resampling behind the intervals.")] = 0,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Answers generated at once, for the steps a second; by default as the run says."
        ),
    ] = None,
    root: Root = None,
) -> None:
    """Compare two or more runs on the samples they share.

    First the table that LLaMA-Factory prints after predicting, with a column for each run, and for
    the base of a run that is given by its name. Then for each score the difference of the first run
    and each other, its 95% interval, and whether that leaves out 0, which decides between the two.
    """
    from medtune.scores import predict_table

    if len(sides) < 2:
        raise ValueError("compare takes two or more runs or files of answers")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: give 1 or more")
    tuned = []
    bases: list[Answered] = []
    for side in sides:
        one, base = _read_side(side, tuned, root)
        tuned.append(one)
        if base and all(base.answers != known.answers for known in bases):
            bases.append(base)
    shared = _shared_by(tuned)
    _print_shared(tuned, shared)

    columns = [base for base in bases if all(key in base.answers for key in shared)]
    columns += tuned
    rows = {one.name: [one.answers[key] for key in shared] for one in columns}
    sizes = {one.name: batch_size or one.batch_size for one in columns}
    _print_side_by_side(predict_table(rows, batch_size=sizes))

    groups = _groups_of(tuned, shared)
    slices = _slices_of(tuned, shared)
    for other in tuned[1:]:
        print(f"\n{tuned[0].name} minus {other.name}")
        print_table(_differences(tuned[0], other, shared, (groups, slices), scores, seed))


def _read_side(
    side: str, before: list[Answered], root: Path | None
) -> tuple[Answered, Answered | None]:
    """Read the answers that one argument names, and those of its base if it is a run."""
    name = side
    taken = [one.name for one in before]
    if name in taken:
        name = f"{side} ({taken.count(side) + 1})"
    folder = _folder_of_run(side, root)
    if folder is None:
        return Answered(name, _read_answers(Path(side))), None
    size = _batch_size_of(side, root)
    tuned = Answered(name, _read_answers(folder / "predictions_tuned.jsonl"), size)
    untuned = folder / "predictions_base.jsonl"
    if not untuned.is_file():
        return tuned, None
    return tuned, Answered(f"base of {name}", _read_answers(untuned), size)


def _folder_of_run(side: str, root: Path | None) -> Path | None:
    """Give the folder of a run's answers, None if a file is meant."""
    from medtune import runs

    if Path(side).exists() or Path(side).name != side:
        return None
    try:
        folder = runs.find_root(root) / "papermill_runs" / side / "out" / "05_evaluate"
    except FileNotFoundError:
        # not in a clone, so that no run is meant
        return None
    return folder if (folder / "predictions_tuned.jsonl").is_file() else None


def _batch_size_of(name: str, root: Path | None) -> int | None:
    from medtune import runs

    try:
        return runs.read_params(name, root=root)["05_evaluate"]["batch_size"]
    except (OSError, ValueError, KeyError):
        # the answers are there, and more than their speed does not depend on it
        return None


def _read_answers(file: Path) -> dict[str, dict[str, Any]]:
    """Read a table of answers by id; in those of our own the seconds are kept."""
    from medtune.answers import read_answers, read_predictions

    answers = {row["id"]: row for row in read_predictions(file)}
    try:
        ours = read_answers(file)
    except ValueError:
        # a table of another program, which does not say them
        return answers
    for row in ours:
        seconds = row.get("seconds") if isinstance(row, dict) else None
        if seconds is not None and str(row.get("id")) in answers:
            answers[str(row["id"])]["seconds"] = seconds
    return answers


def _shared_by(sides: list[Answered]) -> list[str]:
    """Give the ids that all have answered, in the order of the first."""
    first, *others = sides
    shared = []
    for key in first.answers:
        if all(key in other.answers for other in others):
            shared.append(key)
    if not shared:
        names = " and ".join(one.name for one in sides)
        raise ValueError(f"{names} share no id: they answer different samples")
    return shared


def _print_shared(sides: list[Answered], shared: list[str]) -> None:
    more = []
    for one in sides:
        more.append(f"{len(one.answers) - len(shared)} only in {one.name}")
    said = ", ".join(more) if len(sides) == 2 else ", ".join(more).replace("only in", "more in")
    print(f"{len(shared)} shared samples; {said}")


def _print_side_by_side(table: dict[str, dict[str, float | None]]) -> None:
    rows = []
    first = next(iter(table.values()))
    for key in first:
        row: dict[str, Any] = {"on the shared samples": key}
        for name, values in table.items():
            row[name] = values[key]
        rows.append(row)
    print_table(rows)


def _groups_of(sides: list[Answered], shared: list[str]) -> list[str]:
    """Give the group of each sample; one without is a group of its own, which is said."""
    from medtune.pairs import names_group

    groups = []
    alone = 0
    for key in shared:
        named = [one.answers[key].get("group") for one in sides]
        known = [group for group in named if names_group(group)]
        if known:
            groups.append(str(known[0]))
        else:
            groups.append(key)
            alone += 1
    if alone:
        print(
            f"medtune: warning: {alone} samples name no group and count as patients of their own: "
            "if patients have several, the intervals are too narrow",
            file=sys.stderr,
        )
    return groups


def _slices_of(sides: list[Answered], shared: list[str]) -> list[str | None]:
    """Give the slice of each sample, by which those of one patient are drawn."""
    slices = []
    for key in shared:
        named = [one.answers[key].get("slice") for one in sides]
        known = [name for name in named if name is not None]
        slices.append(known[0] if known else None)
    return slices


def _differences(  # noqa: PLR0913 - two sides, what they share, and how it is scored
    a: Answered,
    b: Answered,
    shared: list[str],
    units: tuple[list[str], list[str | None]],
    names: list[str] | None,
    seed: int,
) -> list[dict[str, Any]]:
    """Give for each score the difference of two sides, a minus b, with its interval."""
    from medtune.scores import paired_bootstrap

    groups, slices = units
    references = [a.answers[key]["reference"] for key in shared]
    answers_a = [a.answers[key]["answer"] for key in shared]
    answers_b = [b.answers[key]["answer"] for key in shared]
    rows = []
    for name, score in score_functions(names).items():
        samples_a = score(answers_a, references, per_sample=True)
        samples_b = score(answers_b, references, per_sample=True)
        for column in samples_a:
            # rows of counts have no difference of their own
            if not isinstance(samples_a[column][0], float):
                continue
            result = paired_bootstrap(
                samples_a[column], samples_b[column], groups, slices=slices, seed=seed
            )
            shown = {key: result[key] for key in ("difference", "low", "high")}
            shown["decided"] = "yes" if result["decided"] else "no"
            shown["label"] = result["label"]
            if result["low"] is None:
                shown["label"] += f"; {result['reason']}"
            rows.append({"score": f"{name} {column}", **shown})
    return rows


@app.command()
def curves(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...", help="A run's name, or a folder with the log.json of a training."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The picture to write: PNG, SVG or PDF.")] = Path(
        "curves.png"
    ),
    root: Root = None,
) -> None:
    """Draw the losses of one or more trainings in one picture, over the steps and the samples.

    Also of a training that is still going on.
    """
    from medtune import plots
    from medtune.runs import read_log

    if out.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--out {out}: a name that ends in .png, .svg or .pdf")
    logs = {}
    sizes = {}
    rows = []
    for run in dict.fromkeys(runs):
        log = read_log(run, root=root)
        logs[run] = log.history
        sizes[run] = log.samples_per_step
        rows.append({"run": run, **_end_of(log)})
    figure = plots.plot_losses(logs, samples_per_step=sizes)
    figure.savefig(out, dpi=150)
    print_table(rows)
    print(f"picture: {out}", file=sys.stderr)


def _end_of(log: Any) -> dict[str, Any]:
    """Say in numbers how far a training came and where its losses end."""
    end: dict[str, Any] = {"steps": log.history[-1]["step"], "samples seen": None}
    if log.samples_per_step:
        end["samples seen"] = end["steps"] * log.samples_per_step
    for key, title in (("loss", "last loss"), ("eval_loss", "last held-out loss")):
        values = [entry[key] for entry in log.history if key in entry]
        end[title] = values[-1] if values else None
    return end
