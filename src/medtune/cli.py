"""The `medtune` command: each subcommand calls one function of the package and prints the result.

What a user can put right (ValueError, OSError, ImportError) is one line on stderr and exit code 1;
with `--debug` before the subcommand it is a traceback. The rooms of the package are imported inside
the subcommands, so that `medtune --help` need not wait for torch.
"""

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from medtune import __version__
from medtune.files import read_json_lines

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)

# More characters than a row of a table has: in a pipe nothing is wrapped.
WIDE = 1_000_000

# Arguments and options that several commands take.
Run = Annotated[str, typer.Argument(help="Folder in papermill_runs/, such as tiny-cpu.")]
Root = Annotated[
    Path | None,
    typer.Option(
        help="The clone with notebooks/ and papermill_runs/; by default the current folder or "
        "one above it."
    ),
]
Source = Annotated[
    str,
    typer.Argument(help="'sample', a parquet file, a table, a folder, DICOM, or a hub id."),
]
Limit = Annotated[int | None, typer.Option(help="Take so many of the first rows only.")]
Config = Annotated[
    str | None, typer.Option(help="Configuration of a hub data set, such as 25M_demo.")
]
Split = Annotated[str | None, typer.Option(help="Take this split only.")]
ScoreNames = Annotated[
    list[str] | None,
    typer.Option(
        "--score",
        help="llamafactory, standard or finding; may be repeated. By default all of them.",
    ),
]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; always leaves by SystemExit.

    Parameters
    ----------
    arguments : what follows `medtune` on the command line; by default, those of this process.

    Examples
    --------
    >>> try:
    ...     main(["run", "no/such/run"])
    ... except SystemExit as end:
    ...     end.code
    1
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if arguments is None:
        arguments = sys.argv[1:]
    try:
        app(arguments)
    except (ValueError, OSError, ImportError) as error:
        if arguments[:1] == ["--debug"]:
            raise
        print(f"medtune: {_in_one_line(error)}", file=sys.stderr)
        sys.exit(1)


def _in_one_line(error: Exception) -> str:
    """Return an error's message; that of an OSError without its number, but with its file."""
    if isinstance(error, OSError) and error.filename:
        message = f"{error.strerror}: {error.filename}"
    else:
        message = str(error) or type(error).__name__
    return " ".join(message.split())


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error, not only its message.")
    ] = False,
) -> None:
    """Fine-tune multimodal language models on medical images, and check what they learned."""
    # main looks for --debug itself; here it is declared, so that --help shows it


@app.command()
def version() -> None:
    """Print the versions that matter in a bug report."""
    rows = [
        {"package": "medtune", "version": __version__},
        {"package": "python", "version": platform.python_version()},
    ]
    for package in (
        "torch",
        "transformers",
        "trl",
        "peft",
        "bitsandbytes",
        "datasets",
        "deepspeed",
        "papermill",
    ):
        rows.append({"package": package, "version": metadata.version(package)})
    _print_table(rows)


# ---- runs


@app.command()
def run(
    name: Run,
    root: Root = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="[NOTEBOOK.]KEY=VALUE, another value of a parameter; may be repeated.",
        ),
    ] = None,
    new_name: Annotated[
        str | None, typer.Option("--name", help="Name of the new run that --set makes.")
    ] = None,
) -> None:
    """Execute the notebooks of a run.

    A second start continues, and a change starts again where it matters.
    """
    from medtune import runs

    overrides = {}
    for change in changes or []:
        key, equals, value = change.partition("=")
        if not equals:
            raise ValueError(f"--set takes KEY=VALUE, not {change!r}")
        overrides[key] = value
    try:
        summary = runs.run(name, overrides=overrides, new_name=new_name, root=root)
    except KeyboardInterrupt:
        advice = f"'medtune run {new_name or name}' continues"
        print(f"\nmedtune: stopped; {advice}", file=sys.stderr)
        # what a shell gives a command that Ctrl-C ended
        raise typer.Exit(130) from None
    minutes = summary["timing"]
    rows = []
    for notebook, of_notebook in summary["notebooks"].items():
        results = _results(of_notebook)
        rows.append({"notebook": notebook, "minutes": minutes[notebook], "results": results})
    _print_table(rows)
    where = f"papermill_runs/{summary['run']}/out/"
    print(f"{sum(minutes.values()):.1f} minutes. Executed notebooks and results: {where}")


def _results(summary: dict[str, Any]) -> str:
    """Put the numbers of a notebook's summary into one cell.

    Those in its mapping `results`, or else the first six of the summary itself.
    """
    numbers = []
    for key, value in summary.get("results", summary).items():
        # the very types: True is no result
        if type(value) in (int, float) and key != "seed":
            numbers.append(f"{key} {value:.4g}")
    if "results" not in summary:
        numbers = numbers[:6]
    return ", ".join(numbers)


@app.command("list")
def list_runs(
    study: Annotated[
        str,
        typer.Argument(help="List the runs of this study; without it, those in papermill_runs/."),
    ] = "",
    root: Root = None,
) -> None:
    """List the runs: what is finished, the minutes, and what went wrong."""
    from medtune import runs

    _print_table(runs.list_runs(root, study=study))


@app.command()
def params(name: Run, root: Root = None) -> None:
    """Show every parameter of a run, its value, type and meaning.

    Change one with 'medtune run --set'.
    """
    from medtune import runs

    root = runs.find_root(root)
    for notebook, values in runs.read_params(name, root=root).items():
        declared = runs.declared_parameters(root / "notebooks" / f"{notebook}.ipynb")
        rows = []
        for key, value in values.items():
            parameter = declared[key]
            rows.append(
                {
                    "key": key,
                    "value": repr(value),
                    "type": parameter.annotation,
                    "meaning": parameter.help,
                }
            )
        print(f"\n{notebook}")
        _print_table(rows)


@app.command()
def reference(name: Run, root: Root = None) -> None:
    """Keep a small executed copy of a finished run in papermill_runs/reference/."""
    from medtune import runs

    print(runs.write_reference(name, root=root))


@app.command("study")
def run_study(
    file: Annotated[
        Path, typer.Argument(help="YAML with base, factors, and perhaps fixed, search, prune.")
    ],
    processes: Annotated[
        int | None, typer.Option(help="Execute so many runs at a time; by default as many as fit.")
    ] = None,
    root: Root = None,
) -> None:
    """Run an experiment: every combination of some parameters' levels.

    A second start continues.
    """
    from medtune.runs import study

    table = study.run_study(file, processes=processes, root=root)
    states = table["state"].value_counts().to_dict()
    print(f"papermill_runs/{file.stem}/out/results.parquet: {states}")
    failed = int((table["state"] == "FAIL").sum())
    if failed:
        advice = f"'medtune list {file.stem}' says why; start again to try them again"
        raise ValueError(f"{failed} runs failed: {advice}")


# ---- before anything is rented


@app.command()
def plan(
    model: Annotated[
        str,
        typer.Argument(help="Hub name of a published model, such as Qwen/Qwen3-VL-2B-Instruct."),
    ],
    method: Annotated[
        str,
        typer.Option(help="lora, qlora (the weights in 4 bits), or full (all weights trained)."),
    ] = "lora",
    target: Annotated[
        str,
        typer.Option(
            help="Which layers get an adapter, as in notebook 03, such as language, attention "
            "or all-linear."
        ),
    ] = "language",
    lora_r: Annotated[int, typer.Option(help="Rank of the adapters.")] = 8,
    modules_to_save: Annotated[
        list[str] | None,
        typer.Option(
            help="Module trained whole beside the adapters, such as lm_head; may be repeated."
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Samples of each GPU in one forward pass; left out, the largest that fits is "
            "recommended, with checkpointing and the ZeRO stage to go with it."
        ),
    ] = None,
    checkpointing: Annotated[
        bool,
        typer.Option(
            help="Activations are recomputed in the backward pass, to save memory; counts with "
            "--batch-size only."
        ),
    ] = True,
    zero_stage: Annotated[
        int,
        typer.Option(
            help="What DeepSpeed splits over the GPUs: 0 nothing, 1 optimizer states, 2 "
            "gradients too, 3 weights too; counts with --batch-size only."
        ),
    ] = 0,
    gpus: Annotated[int, typer.Option(help="Number of GPUs.")] = 1,
    gpu_gb: Annotated[float, typer.Option(help="Memory of each GPU in GB (10^9 bytes).")] = 80.0,
    image_size: Annotated[
        int, typer.Option(help="Side of the square picture in a sample, in pixels.")
    ] = 512,
    text_tokens: Annotated[
        int, typer.Option(help="Tokens of a sample besides those of the picture.")
    ] = 150,
    accumulation: Annotated[
        bool,
        typer.Option(
            help="Several batches make a step, so the gradients of one are there while the next "
            "is computed."
        ),
    ] = False,
    pairs: Annotated[
        int,
        typer.Option(help="Samples of an epoch, to tell its hours; needs --samples-per-second."),
    ] = 0,
    samples_per_second: Annotated[
        float, typer.Option(help="Speed of all GPUs together, to tell the hours of an epoch.")
    ] = 0.0,
) -> None:
    """Say what training a model takes: GB on each GPU by part, disk, and hours.

    The documentation of medtune.plan.estimate explains each line.
    """
    from medtune.plan import estimate, recommend

    options = {
        "method": method,
        "target": target,
        "lora_r": lora_r,
        "modules_to_save": tuple(modules_to_save or ()),
        "gpus": gpus,
        "gpu_gb": gpu_gb,
        "image_size": image_size,
        "text_tokens": text_tokens,
        "accumulation": accumulation,
        "pairs": pairs,
        "samples_per_second": samples_per_second,
    }
    if batch_size:
        options["checkpointing"] = checkpointing
        options["zero_stage"] = zero_stage
        found = estimate(model, batch_size=batch_size, **options)
    else:
        found = recommend(model, **options)
    _print_table([{"what": key, "value": value} for key, value in found.items()])


@app.command()
def rehearse(
    name: Run,
    steps: Annotated[int, typer.Option(help="Optimizer steps of each training.")] = 2,
    root: Root = None,
    scale: Annotated[
        str | None,
        typer.Option(
            help="full, the shape of the model, or tiny; by default full where there is a GPU."
        ),
    ] = None,
) -> None:
    """Run a run's notebooks offline for a few steps, on random weights of the model's shape."""
    from medtune.runs.rehearse import rehearse as start

    minutes = start(name, steps=steps, scale=scale, root=root)["timing"]
    rows = [{"notebook": notebook, "minutes": value} for notebook, value in minutes.items()]
    _print_table(rows)
    where = f"papermill_runs/{name}-rehearsal/out/"
    print(f"Random weights: no score means anything. Results: {where}")


# ---- data


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def sample(context: typer.Context, root: Root = None) -> None:
    """Build the sample set in data/sample/; options go to data/build_sample.py."""
    from medtune import runs

    script = runs.find_root(root) / "data" / "build_sample.py"
    done = subprocess.run([sys.executable, script, *context.args])
    raise typer.Exit(done.returncode)


@app.command()
def convert(
    source: Source,
    out: Annotated[
        Path,
        typer.Argument(help="Folder to write: pictures, one JSONL a split, dataset_info.json."),
    ],
    dialect: Annotated[
        str, typer.Option(help="prompt-completion (TRL), messages or sharegpt.")
    ] = "prompt-completion",
    question: Annotated[
        list[str] | None,
        typer.Option(
            help="The question put to each picture; of several, which may be given by repeating "
            "the option, one is drawn by the pair's id."
        ),
    ] = None,
    language: Annotated[str, typer.Option(help="Language of the captions: en or zh.")] = "en",
    seed: Annotated[int, typer.Option(help="Seed of what is drawn.")] = 0,
    system_prompt: Annotated[
        str | None, typer.Option(help="A text put before every dialogue.")
    ] = None,
    text_only: Annotated[
        Path | None, typer.Option(help="JSONL of dialogues without pictures to mix in.")
    ] = None,
    share: Annotated[
        float, typer.Option(help="Share of text-only dialogues among the training records.")
    ] = 0.1,
    pictures_per_sample: Annotated[
        int, typer.Option(help="So many neighbouring slices of a group in one question.")
    ] = 1,
    jpeg_quality: Annotated[
        int | None, typer.Option(help="Save pictures that need converting as JPEG of this quality.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Number of threads; the result does not depend on it.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first bad pair.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a conversion with other settings.")
    ] = False,
    config: Config = None,
    split: Split = None,
    limit: Limit = None,
) -> None:
    """Write pairs as pictures and training records."""
    from medtune.pairs import load_pairs
    from medtune.records import convert_pairs

    pairs = source
    if config or split or limit:
        pairs = load_pairs(source, config=config, split=split, limit=limit)
    report = convert_pairs(
        pairs,
        out,
        dialect=dialect,
        questions=question,
        language=language,
        seed=seed,
        system_prompt=system_prompt,
        text_only=text_only,
        share=share,
        pictures_per_sample=pictures_per_sample,
        jpeg_quality=jpeg_quality,
        workers=workers,
        strict=strict,
        overwrite=overwrite,
    )
    _print_json(report)
    if not sum(report["records"].values()):
        reasons = ", ".join(f"{count} {kind}" for kind, count in report["reasons"].items())
        raise ValueError(
            f"nothing of {source} became a record ({reasons or 'it has no rows'}): read the "
            f"reasons in {out / 'rejected.jsonl'}"
        )


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(help="A converted folder.")],
    model: Annotated[
        str | None, typer.Option(help="Count tokens with this model's processor.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Report the records that have more tokens than this.")
    ] = None,
) -> None:
    """Check a converted folder: does it conform, and what is wrong where?"""
    from medtune.records import check_folder

    processor = None
    if model:
        # loads torch, which checking alone does not need
        from medtune.models import load_processor

        processor = load_processor(model)
    report = check_folder(folder, processor=processor, max_length=max_length)
    _print_table(report["table"])
    if not report["ok"]:
        where = f"every error stands in {folder / 'check.json'}"
        raise ValueError(f"{folder} does not conform; {where}")


@app.command()
def audit(
    source: Source,
    config: Config = None,
    split: Split = None,
    limit: Limit = None,
    seed: Annotated[int, typer.Option(help="Seed of the split that is made.")] = 0,
    column: Annotated[str | None, typer.Option(help="Column that names the patient.")] = None,
    id_pattern: Annotated[
        str | None,
        typer.Option(help="Regular expression for the id, whose group is the patient."),
    ] = None,
) -> None:
    """Look for duplicates and for patients on both sides of the split.

    Pairs without a split get one by patient.
    """
    from medtune.audit import (
        assign_groups,
        audit_split,
        fingerprint,
        near_duplicates,
        split_by_group,
    )
    from medtune.pairs import load_pairs

    pairs = load_pairs(source, config=config, split=split, limit=limit)
    has_split = "split" in pairs.column_names
    marks = fingerprint(pairs)
    # a new split keeps together what looks alike; of a given one, that is for the report to say
    alike = None if has_split else near_duplicates(pairs, fingerprints=marks)
    groups = assign_groups(
        pairs, column=column, id_pattern=id_pattern, pairs=alike, fingerprints=marks
    )
    splits = pairs["split"] if has_split else split_by_group(groups, seed=seed)
    report = audit_split(pairs, groups, splits, fingerprints=marks, raise_on_leak=False)
    _print_json(report)
    leaks = []
    for kind in ("groups_crossing", "near_duplicates_crossing", "exact_duplicates_crossing"):
        if report[kind]:
            leaks.append(f"{report[kind]} {kind}")
    if marks.unreadable:
        first = pairs["id"][marks.unreadable[0]]  # the row itself would be decoded
        raise ValueError(
            f"{len(marks.unreadable)} pictures of {source} cannot be read, so nothing can be said "
            f"of them (first: id {first}); 'medtune convert {source} OUT' lists them with the "
            "reasons in OUT/rejected.jsonl"
        )
    if leaks:
        raise ValueError(f"the split of {source} leaks: {', '.join(leaks)}")


# ---- training, answers and scores


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="A YAML of TRL's keys; see docs/launch.md.")],
) -> None:
    """Fine-tune as a YAML says, in one process; options override it.

    For several processes: torchrun -m medtune.training --config train.yaml
    """
    from medtune.training.launch import main as start

    start(["--config", str(config), *context.args])


@app.command()
def evaluate(
    source: Annotated[
        Path, typer.Argument(help="JSONL of answers to score, or a folder of slices to answer.")
    ],
    scores: ScoreNames = None,
    model: Annotated[
        str, typer.Option(help="For a folder: base or merged model that answers.")
    ] = "data/tiny-vlm",
    adapter: Annotated[
        str | None, typer.Option(help="For a folder: folder of an adapter on the model.")
    ] = None,
    question: Annotated[
        str, typer.Option(help="For a folder: what is asked of each slice.")
    ] = "Describe this medical image.",
    report: Annotated[
        Path | None, typer.Option(help="For a folder: text of a report, to set beside the answers.")
    ] = None,
    window: Annotated[
        str | None, typer.Option(help="For a folder of DICOM: a window such as lung.")
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            help="For a folder: JSONL of the answers to write; one that is there is continued."
        ),
    ] = Path("predictions.jsonl"),
) -> None:
    """Score answers against references; or answer for each slice of a series.

    The answers for a series are set beside a report.
    """
    if not source.is_dir():
        _score_file(source, scores)
        return
    text = " ".join(report.read_text("utf-8").split()) if report else ""
    answers = _answer_series(source, model, adapter, question, window, out)
    _print_beside_report(answers, text)
    print(f"answers: {out}")


def _score_file(file: Path, names: list[str] | None) -> None:
    """Print the scores of a file of answers; with intervals, if every row names its group."""
    from medtune.pairs import names_group
    from medtune.scores import with_intervals

    rows = _read_predictions(file)
    answers = [row["answer"] for row in rows]
    references = [row["reference"] for row in rows]
    found = {}
    for name, score in _score_functions(names).items():
        if all(names_group(row.get("group")) for row in rows):
            groups = [str(row["group"]) for row in rows]
            found[name] = with_intervals(score, answers, references, groups=groups)
        else:
            found[name] = score(answers, references)
    _print_json(found)


def _answer_series(
    folder: Path, model: str, adapter: str | None, question: str, window: str | None, out: Path
) -> list[dict[str, Any]]:
    """Let a model answer for each slice of a series."""
    from medtune import models
    from medtune.answers import generate_answers
    from medtune.pairs import load_pairs

    slices = load_pairs(folder, window=window, allow_empty_captions=True)
    loaded = models.load_base(model)
    if adapter is not None:
        loaded = models.load_tuned(loaded, adapter)
    processor = models.load_processor(adapter or model)
    return generate_answers(loaded, processor, slices, question=question, out=out)


def _print_beside_report(answers: list[dict[str, Any]], report: str) -> None:
    """Print what is found in each slice, and which of it the report says, too."""
    # by the rules that score captions: affirmed findings, under their common names
    in_report = _findings(report)
    rows = []
    for number, answer in enumerate(answers, 1):
        said = _findings(answer["answer"])
        rows.append(
            {
                "slice": number,
                "findings": _listed(said),
                "also in the report": _listed(said & in_report),
                "answer": " ".join(answer["answer"].split()),
            }
        )
    _print_table(rows)
    print(f"\nreport: {report or '(none given)'}")
    print(f"findings in the report: {_listed(in_report)}")


def _findings(text: str) -> set[str]:
    """Return the findings that a text affirms."""
    from medtune.captions import entities

    found = set()
    for kind, value, negated in entities(text):
        if kind == "finding" and not negated:
            found.add(value)
    return found


def _listed(words: set[str]) -> str:
    return ", ".join(sorted(words)) or "-"


@app.command()
def compare(
    a: Annotated[
        Path,
        typer.Argument(help="A run's name, or a JSONL of answers, such as the tuned model's."),
    ],
    b: Annotated[
        Path, typer.Argument(help="Another of these, with answers to some of the same ids.")
    ],
    scores: ScoreNames = None,
    seed: Annotated[int, typer.Option(help="Seed of the resampling behind the intervals.")] = 0,
) -> None:
    """Compare two runs on the samples they share.

    For each score the difference, a minus b, and its interval.
    """
    from medtune.pairs import names_group
    from medtune.scores import paired_bootstrap

    of_a = {row["id"]: row for row in _read_predictions(a)}
    of_b = {row["id"]: row for row in _read_predictions(b)}
    shared = [key for key in of_a if key in of_b]
    if not shared:
        raise ValueError(f"{a} and {b} share no id: they answer different samples")
    # a sample without a group is a group of its own
    groups = []
    for key in shared:
        group = of_a[key].get("group")
        groups.append(str(group) if names_group(group) else key)
    references = [of_a[key]["reference"] for key in shared]
    answers_a = [of_a[key]["answer"] for key in shared]
    answers_b = [of_b[key]["answer"] for key in shared]
    only_a = len(of_a) - len(shared)
    only_b = len(of_b) - len(shared)
    print(f"{len(shared)} shared samples; {only_a} only in {a}, {only_b} only in {b}")
    rows = []
    for name, score in _score_functions(scores).items():
        samples_a = score(answers_a, references, per_sample=True)
        samples_b = score(answers_b, references, per_sample=True)
        for column in samples_a:
            # rows of counts have no difference of their own
            if not isinstance(samples_a[column][0], float):
                continue
            result = paired_bootstrap(samples_a[column], samples_b[column], groups, seed=seed)
            shown = {key: result[key] for key in ("difference", "low", "high", "label")}
            rows.append({"score": f"{name} {column}", **shown})
    _print_table(rows)


def _score_functions(names: list[str] | None) -> dict[str, Any]:
    """Return the score functions of these names; without names, all."""
    from medtune import scores

    known = {
        "llamafactory": scores.llamafactory_scores,
        "standard": scores.standard_scores,
        "finding": scores.finding_scores,
    }
    unknown = sorted(set(names or []) - set(known))
    if unknown:
        raise ValueError(f"there is no score {unknown[0]!r}; there are {', '.join(known)}")
    return {name: known[name] for name in names or known}


def _read_predictions(path: Path) -> list[dict[str, Any]]:
    """Read a JSONL of answers, or that of a run's tuned model by the run's name."""
    if not path.exists() and path.name == str(path):
        from medtune import runs

        out = runs.find_root() / "papermill_runs" / path.name / "out"
        of_run = out / "05_evaluate" / "predictions_tuned.jsonl"
        if of_run.exists():
            path = of_run
    rows = []
    for number, row in read_json_lines(path):
        try:
            if isinstance(row, ValueError):
                raise row
            for key in ("id", "answer", "reference"):
                row[key]
        except (ValueError, KeyError, TypeError) as error:
            needs = "needs JSON with id, answer and reference"
            raise ValueError(f"{path}, line {number}: {needs} ({error!r})") from None
        rows.append(row)
    return rows


# ---- the chat page


@app.command()
def chat(
    base: Annotated[str, typer.Argument(help="Base model: folder or hub name.")],
    adapter: Annotated[str | None, typer.Option(help="Folder of an adapter on the base.")] = None,
    tuned: Annotated[
        str | None, typer.Option(help="Folder of a merged model, instead of an adapter.")
    ] = None,
    multitask: Annotated[
        str | None,
        typer.Option(help="Folder of a multi-task model, which adds a box and a match score."),
    ] = None,
    max_pixels: Annotated[
        int | None, typer.Option(help="Most pixels of a picture after resizing.")
    ] = None,
    feedback: Annotated[
        Path, typer.Option(help="Folder where thumbs and corrections are saved.")
    ] = Path("chat_feedback"),
    host: Annotated[
        str,
        typer.Option(
            help="Address to serve at; another than this one needs MEDTUNE_CHAT_PASSWORD in "
            "the environment."
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(help="Port to serve at; by default the first free one from 7860.")
    ] = None,
) -> None:
    """Serve a page that asks base and tuned model about your pictures, side by side."""
    from medtune.chat import launch, load_models

    models = load_models(base, adapter, tuned=tuned, heads=multitask, max_pixels=max_pixels)
    # not an option: other users of the machine see a command line
    password = os.environ.get("MEDTUNE_CHAT_PASSWORD")
    page = launch(models, feedback=feedback, host=host, port=port, password=password)
    # until Ctrl-C: the page is served by a thread of its own
    page.block_thread()


# ---- how results are printed


def _print_json(result: Any) -> None:
    print(json.dumps(result, indent=1, ensure_ascii=False, default=str))


def _print_table(rows: list[dict[str, Any]]) -> None:
    """Print rows under their keys, aligned.

    A terminal wraps what is too long within its column; in a pipe each row is one plain line, so
    that other programs can read it.
    """
    if not rows:
        print("(none)")
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for key in rows[0]:
        table.add_column(Text(key), overflow="fold")
    for row in rows:
        # as Text: rich would read [lora] in a string as a mark-up
        table.add_row(*[Text(_cell(value)) for value in row.values()])
    at_terminal = sys.stdout.isatty()
    console = Console(
        width=None if at_terminal else WIDE,
        force_terminal=at_terminal,
        force_jupyter=False,
    )
    with console.capture() as captured:
        console.print(table)
    # rich fills the last column with spaces
    for line in captured.get().rstrip("\n").split("\n"):
        print(line.rstrip())


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)
