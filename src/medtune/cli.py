"""The ``medtune`` command: each subcommand calls one function of the package and prints what it returns.

What a user can put right (ValueError, OSError, ImportError) is one line on stderr and exit code 1; with ``--debug``
before the subcommand it is a traceback.
"""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__, runs, sizing

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)

Run = Annotated[str, typer.Argument(help="Folder in papermill_runs/, such as tiny-cpu.")]
Root = Annotated[Path | None, typer.Option(help="The clone with notebooks/ and papermill_runs/; found from here.")]
Source = Annotated[str, typer.Argument(help="'sample', a parquet file, a table, a folder, DICOM, or a hub id.")]
Limit = Annotated[int | None, typer.Option(help="Take the first rows only.")]
Config = Annotated[str | None, typer.Option(help="Configuration of a hub data set, such as 25M_demo.")]
Split = Annotated[str | None, typer.Option(help="Take this split only.")]
Scores = Annotated[list[str] | None, typer.Option("--score", help="llamafactory, standard, finding; all.")]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; always leaves by SystemExit.

    Examples
    --------
    >>> try:
    ...     main(["run", "no/such/run"])
    ... except SystemExit as end:
    ...     end.code
    1
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        app(arguments)
    except (ValueError, OSError, ImportError) as error:
        if arguments[:1] == ["--debug"]:
            raise
        named = isinstance(error, OSError) and error.filename
        text = f"{error.strerror}: {error.filename}" if named else str(error)
        print("medtune: " + " ".join((text or type(error).__name__).split()), file=sys.stderr)
        sys.exit(1)


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """Fine-tune multimodal language models on medical images, and check what they learned."""


@app.command()
def version() -> None:
    """Print the versions that matter in a bug report."""
    import platform
    from importlib import metadata

    names = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "deepspeed", "papermill")
    numbers = {"medtune": __version__, "python": platform.python_version()} | {n: metadata.version(n) for n in names}
    _table([{"package": name, "version": number} for name, number in numbers.items()])


@app.command()
def run(
    name: Run, root: Root = None,
    changes: Annotated[list[str] | None, typer.Option("--set", help="[NOTEBOOK.]KEY=VALUE; may be repeated.")] = None,
    new_name: Annotated[str | None, typer.Option("--name", help="Name of the new run that --set makes.")] = None,
) -> None:  # fmt: skip
    """Execute the notebooks of a run; a second start continues, and a change starts again where it matters."""
    if wrong := [change for change in changes or [] if not change.partition("=")[1]]:
        raise ValueError(f"--set takes KEY=VALUE, not {wrong[0]!r}")
    overrides = dict(change.split("=", 1) for change in changes or [])
    try:
        summary = runs.run(name, overrides=overrides, new_name=new_name, root=root)
    except KeyboardInterrupt:
        print(f"\nmedtune: stopped; 'medtune run {new_name or name}' continues", file=sys.stderr)
        raise typer.Exit(130) from None
    minutes = summary["timing"]
    _table([{"notebook": n, "minutes": minutes[n], "results": _results(s)} for n, s in summary["notebooks"].items()])
    print(f"{sum(minutes.values()):.1f} minutes. Executed notebooks and results: papermill_runs/{summary['run']}/out/")


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="Hub name of a published model, such as Qwen/Qwen3-VL-2B-Instruct.")],
    method: str = "lora", target: str = "language", lora_r: int = 8, modules_to_save: list[str] | None = None,
    batch_size: Annotated[int | None, typer.Option(help="Of each GPU; left out, one is recommended.")] = None,
    checkpointing: bool = True, zero_stage: int = 0, gpus: int = 1, gpu_gb: float = 80.0, image_size: int = 512,
    text_tokens: int = 150, accumulation: bool = False, pairs: int = 0, samples_per_second: float = 0.0,
) -> None:  # fmt: skip
    """Say what training takes: GB on each GPU by part, disk, hours; medtune.sizing.plan explains each option."""
    options = {key: value for key, value in locals().items() if key != "model"}
    options["modules_to_save"] = tuple(modules_to_save or ())
    fixed = {key: options.pop(key) for key in ("batch_size", "checkpointing", "zero_stage")}
    found = sizing.plan(model, **options, **fixed) if batch_size else sizing.recommend(model, **options)
    _table([{"what": key, "value": value} for key, value in found.items()])


@app.command()
def rehearse(
    name: Run, steps: int = 2, root: Root = None,
    scale: Annotated[str | None, typer.Option(help="full or tiny; by default full where there is a GPU.")] = None,
) -> None:  # fmt: skip
    """Run a run's notebooks offline for a few steps, on random weights of the model's shape."""
    minutes = sizing.rehearse(name, steps=steps, scale=scale, root=root)["timing"]
    _table([{"notebook": notebook, "minutes": value} for notebook, value in minutes.items()])
    print(f"Random weights: no score means anything. Results: papermill_runs/{name}-rehearsal/out/")


@app.command("list")
def list_runs(
    study: Annotated[str, typer.Argument(help="The runs of this study; without it those of papermill_runs/.")] = "",
    root: Root = None,
) -> None:
    """List the runs: what is finished, the minutes, and what went wrong."""
    _table(runs.list_runs(root, study=study))


@app.command("study")
def run_study(
    file: Annotated[Path, typer.Argument(help="YAML with base, factors, and perhaps fixed, search, prune.")],
    processes: Annotated[int | None, typer.Option(help="Runs at a time; by default what fits.")] = None,
    root: Root = None,
) -> None:
    """Run an experiment: every combination of some parameters' levels; a second start continues."""
    from . import study

    table = study.run_study(file, processes=processes, root=root)
    print(f"papermill_runs/{file.stem}/out/results.parquet: {table['state'].value_counts().to_dict()}")
    if failed := int((table["state"] == "FAIL").sum()):
        raise ValueError(f"{failed} runs failed: 'medtune list {file.stem}' says why; start again to try them again")


@app.command()
def params(name: Run, root: Root = None) -> None:
    """Show every parameter of a run, its value, type and meaning; change one with 'medtune run --set'."""
    root = runs.find_root(root)
    for notebook, values in runs.read_params(name, root=root).items():
        declared = runs.declared_parameters(root / "notebooks" / f"{notebook}.ipynb")
        print(f"\n{notebook}")
        rows = [(k, repr(v), declared[k]) for k, v in values.items()]
        _table([{"key": k, "value": v, "type": d.annotation, "meaning": d.help} for k, v, d in rows])


@app.command()
def reference(name: Run, root: Root = None) -> None:
    """Keep a small executed copy of a finished run in papermill_runs/reference/."""
    print(runs.write_reference(name, root=root))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def sample(context: typer.Context, root: Root = None) -> None:
    """Build the sample set in data/sample/; options go to data/build_sample.py."""
    import subprocess

    script = runs.find_root(root) / "data" / "build_sample.py"
    raise typer.Exit(subprocess.run([sys.executable, script, *context.args]).returncode)


@app.command()
def convert(
    source: Source,
    out: Annotated[Path, typer.Argument(help="Folder to write: pictures, one JSONL a split, dataset_info.json.")],
    dialect: Annotated[str, typer.Option(help="prompt-completion (TRL), messages or sharegpt.")] = "prompt-completion",
    question: Annotated[list[str] | None, typer.Option(help="The question; several are drawn from by id.")] = None,
    language: Annotated[str, typer.Option(help="Of the captions: en or zh.")] = "en",
    seed: int = 0,
    system_prompt: Annotated[str | None, typer.Option(help="Put before every dialogue.")] = None,
    text_only: Annotated[Path | None, typer.Option(help="JSONL of dialogues without pictures to mix in.")] = None,
    share: Annotated[float, typer.Option(help="Share of text-only dialogues among the training records.")] = 0.1,
    pictures_per_sample: Annotated[int, typer.Option(help="Neighbouring slices of a group in one question.")] = 1,
    jpeg_quality: Annotated[int | None, typer.Option(help="Save pictures that need converting as JPEG.")] = None,
    workers: Annotated[int | None, typer.Option(help="Threads; the result does not depend on them.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first bad pair.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a conversion with other settings.")] = False,
    config: Config = None, split: Split = None, limit: Limit = None,
) -> None:  # fmt: skip
    """Write pairs as pictures and training records."""
    from . import convert, data

    pairs = data.load_pairs(source, config=config, split=split, limit=limit) if config or split or limit else source
    options = {"dialect": dialect, "questions": question, "language": language, "seed": seed, "workers": workers}
    options |= {"system_prompt": system_prompt, "text_only": text_only, "share": share, "jpeg_quality": jpeg_quality}
    options["pictures_per_sample"] = pictures_per_sample
    _json(convert.convert_pairs(pairs, out, **options, strict=strict, overwrite=overwrite))


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(help="A converted folder.")],
    model: Annotated[str | None, typer.Option(help="Count tokens with this model's processor.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Report the records that are longer than this.")] = None,
) -> None:
    """Check a converted folder: does it conform, and what is wrong where?"""
    from . import convert, models

    processor = models.load_processor(model) if model else None
    report = convert.check_folder(folder, processor=processor, max_length=max_length)
    _table(report["table"])
    if not report["ok"]:
        raise ValueError(f"{folder} does not conform; every error stands in {folder / 'check.json'}")


@app.command()
def audit(
    source: Source, config: Config = None, split: Split = None, limit: Limit = None, seed: int = 0,
    column: Annotated[str | None, typer.Option(help="Column that names the patient.")] = None,
    id_pattern: Annotated[str | None, typer.Option(help="Pattern: its group in the id is the patient.")] = None,
) -> None:  # fmt: skip
    """Look for duplicates and for patients on both sides of the split; without a split, make one by patient."""
    from . import audit, data

    pairs = data.load_pairs(source, config=config, split=split, limit=limit)
    marks, given = audit.fingerprint(pairs), "split" in pairs.column_names
    alike = None if given else audit.near_duplicates(pairs, fingerprints=marks)  # a new split keeps them together
    groups = audit.assign_groups(pairs, column=column, id_pattern=id_pattern, pairs=alike, fingerprints=marks)
    splits = pairs["split"] if given else audit.split_by_group(groups, seed=seed)
    report = audit.audit_split(pairs, groups, splits, fingerprints=marks, raise_on_leak=False)
    _json(report)
    kinds = [f"{kind}_crossing" for kind in ("groups", "near_duplicates", "exact_duplicates")]
    if leaks := [f"{report[kind]} {kind}" for kind in kinds if report[kind]]:
        raise ValueError(f"the split of {source} leaks: {', '.join(leaks)}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context, config: Annotated[Path, typer.Argument(help="A YAML of TRL's keys, see docs/launch.md.")]
) -> None:
    """Fine-tune as a YAML says, in one process; options override it. For many: torchrun -m medtune.train --config."""
    from .train import main as start

    start(["--config", str(config), *context.args])


@app.command()
def evaluate(
    source: Annotated[Path, typer.Argument(help="JSONL of answers to score, or a folder of slices to answer.")],
    scores: Scores = None,
    model: Annotated[str, typer.Option(help="For a folder: base or merged model.")] = "data/tiny-vlm",
    adapter: Annotated[str | None, typer.Option(help="For a folder: an adapter on the model.")] = None,
    question: Annotated[str, typer.Option(help="For a folder: asked of each slice.")] = "Describe this medical image.",
    report: Annotated[Path | None, typer.Option(help="For a folder: a report's text, to set beside.")] = None,
    window: Annotated[str | None, typer.Option(help="For DICOM: a window such as lung.")] = None,
    out: Annotated[Path, typer.Option(help="For a folder: file of answers, continued.")] = Path("predictions.jsonl"),
) -> None:
    """Score answers against references; or answer for each slice of a series and set it beside a report."""
    from . import metrics

    if not source.is_dir():
        rows = _predictions(source)
        answers, references = [row["answer"] for row in rows], [row["reference"] for row in rows]
        groups = [row["group"] for row in rows] if all(row.get("group") for row in rows) else None
        _json({name: score(answers, references, groups=groups) for name, score in _scores(metrics, scores).items()})
        return
    from . import captions, data, generate, models

    text = " ".join(report.read_text("utf-8").split()) if report else ""
    slices = data.load_pairs(source, window=window, allow_empty_captions=True)
    tuned = models.load_base(model) if adapter is None else models.load_tuned(models.load_base(model), adapter)
    processor = models.load_processor(adapter or model)
    answers = generate.generate_answers(tuned, processor, slices, question=question, out=out)

    def findings(text: str) -> set[str]:
        return {value for kind, value, no in captions.entities(text) if kind == "finding" and not no}

    def listed(words: set[str]) -> str:
        return ", ".join(sorted(words)) or "-"

    asked, rows = findings(text), []
    for number, answer in enumerate(answers, 1):
        said = findings(answer["answer"])
        row = {"slice": number, "findings": listed(said), "also in the report": listed(said & asked)}
        rows.append(row | {"answer": " ".join(answer["answer"].split())})
    _table(rows)
    print(f"\nreport: {text or '(none given)'}\nfindings in the report: {listed(asked)}\nanswers: {out}")


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="A run's name, or a JSONL of answers, such as the tuned model's.")],
    b: Annotated[Path, typer.Argument(help="Another, with answers to some of the same ids.")],
    scores: Scores = None, seed: int = 0,
) -> None:  # fmt: skip
    """Compare two runs on the samples they share: the difference a minus b of each score, and its interval."""
    from . import metrics

    one, two = ({row["id"]: row for row in _predictions(path)} for path in (a, b))
    shared = [key for key in one if key in two]
    if not shared:
        raise ValueError(f"{a} and {b} share no id: they answer different samples")
    groups = [one[key].get("group") or key for key in shared]
    references = [one[key]["reference"] for key in shared]
    print(f"{len(shared)} shared samples; {len(one) - len(shared)} only in {a}, {len(two) - len(shared)} only in {b}")
    rows = []
    for name, score in _scores(metrics, scores).items():
        per_a, per_b = (score([side[k]["answer"] for k in shared], references, per_sample=True) for side in (one, two))
        for column in per_a:
            if isinstance(per_a[column][0], float):  # rows of counts have no difference of their own
                result = metrics.paired_bootstrap(per_a[column], per_b[column], groups, seed=seed)
                shown = {key: result[key] for key in ("difference", "low", "high", "label")}
                rows.append({"score": f"{name} {column}", **shown})
    _table(rows)


@app.command()
def chat(
    base: Annotated[str, typer.Argument(help="Base model: folder or hub name.")],
    adapter: Annotated[str | None, typer.Option(help="Folder of an adapter on the base.")] = None,
    tuned: Annotated[str | None, typer.Option(help="Folder of a merged model, instead of an adapter.")] = None,
    multitask: Annotated[str | None, typer.Option(help="Folder of a multi-task model: box and match score.")] = None,
    max_pixels: Annotated[int | None, typer.Option(help="Most pixels of a picture after resizing.")] = None,
    feedback: Annotated[Path, typer.Option(help="Folder for thumbs and corrections.")] = Path("chat_feedback"),
    host: Annotated[str, typer.Option(help="Another needs MEDTUNE_CHAT_PASSWORD in the environment.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Default: the first free one from 7860 on.")] = None,
) -> None:
    """Serve a page that asks base and tuned model about your pictures, side by side."""
    from . import chat

    models = chat.load_models(base, adapter, tuned=tuned, heads=multitask, max_pixels=max_pixels)
    password = os.environ.get("MEDTUNE_CHAT_PASSWORD")  # not an option: other users see a command line
    chat.launch(models, feedback=feedback, host=host, port=port, password=password).block_thread()


def _predictions(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL of answers, or of a run's tuned model."""
    if not path.exists():
        of_run = runs.find_root() / "papermill_runs" / path.name / "out" / "05_evaluate" / "predictions_tuned.jsonl"
        path = of_run if of_run.exists() and path.name == str(path) else path
    rows = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            row["id"], row["answer"], row["reference"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: needs JSON with id, answer and reference ({error!r})") from None
        rows.append(row)
    return rows


def _scores(metrics: Any, names: list[str] | None) -> dict[str, Any]:
    known = {n: getattr(metrics, f"{n}_scores") for n in ("llamafactory", "standard", "finding")}
    if unknown := set(names or []) - known.keys():
        raise ValueError(f"there is no score {sorted(unknown)[0]!r}; there are {', '.join(known)}")
    return {name: known[name] for name in names or known}


def _results(summary: dict[str, Any]) -> str:
    """The numbers of a summary in one cell: those in its mapping ``results``, or else its first six."""
    numbers = [(k, v) for k, v in summary.get("results", summary).items() if type(v) in (int, float) and k != "seed"]
    return ", ".join(f"{key} {value:.4g}" for key, value in (numbers if "results" in summary else numbers[:6]))


def _json(result: Any) -> None:
    print(json.dumps(result, indent=1, ensure_ascii=False, default=str))


def _table(rows: list[dict[str, Any]]) -> None:
    """Print rows under their keys, aligned."""
    lines = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)] if rows else [["(none)"]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)
