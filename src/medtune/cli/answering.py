"""The subcommand on answers: evaluate. What compares the answers of several runs is beside it."""

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .app import app
from .benchmarks import evaluate_benchmark
from .options import (
    AllowEmptyCaptions,
    Asked,
    Captions,
    Column,
    Encoding,
    ImageRoot,
    Limit,
    Ray,
    Root,
    ScoreNames,
    Window,
    read_columns,
)
from .people import evaluate_run
from .printing import print_json, print_table

# How a message ends that is about answers without a group.
NO_INTERVALS = (
    "no intervals: not every row names its patient or series in a column group, and samples of one "
    "patient are no independent samples; give --column group=NAME or --references TABLE"
)

# --score-with NAME=COMMAND
PROGRAM_NAME = re.compile(r"([A-Za-z][\w-]*)=(?=.)")

# So many pictures that cannot be read are named one by one.
MOST_NAMED = 10


@app.command()
def evaluate(
    source: Annotated[
        Path | None,
        typer.Argument(
            help="A table of answers to score, a converted folder to answer and score, or pictures "
            "or slices to answer."
        ),
    ] = None,
    run: Annotated[
        str | None,
        typer.Option(
            help="Instead of a source: a finished run, whose tuned model answers about --data; its "
            "scores stand beside those of its own held-out pairs."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="With --run: pairs of other people, a converted folder or any source of pairs. With "
            "--benchmark: the folder or ZIP of its files, by default its set on the hub."
        ),
    ] = None,
    benchmark: Annotated[
        str | None,
        typer.Option(
            help="With --run: answer a published benchmark by its rules: vqa-rad, slake, slake-zh, "
            "path-vqa, omnimedvqa or iu-xray; or 'own', questions of your own in --data."
        ),
    ] = None,
    overlap: Annotated[
        bool,
        typer.Option(
            help="With --benchmark: count its pictures that the run was trained on, and those that "
            "its published split has on both sides. Each picture of them is read."
        ),
    ] = True,
    scores: ScoreNames = None,
    score_with: Annotated[
        list[str] | None,
        typer.Option(
            help="Another program that scores the answers, such as 'radgraph=conda run -n radgraph "
            "python radgraph_f1.py'. It gets two paths, answers to read and scores to write, both "
            "JSONL (docs/trust.md). May be repeated."
        ),
    ] = None,
    split: Annotated[
        str, typer.Option(help="For a converted folder: which of its splits is answered.")
    ] = "test",
    model: Annotated[
        str | None,
        typer.Option(
            help="Base or merged model that answers; by default the base that the adapter names, "
            "or the course's tiny one."
        ),
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="Folder of an adapter on the model.")] = None,
    question: Annotated[
        str | None,
        typer.Option(
            help="For pictures: what is asked of each; by default the question that its table has, "
            "or 'Describe this medical image.' Records bring their own."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Answers generated at once.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    report: Annotated[
        Path | None,
        typer.Option(help="For a series: text of a report, to set beside the answers."),
    ] = None,
    column: Column = None,
    captions: Captions = None,
    image_root: ImageRoot = None,
    allow_empty_captions: AllowEmptyCaptions = False,
    encoding: Encoding = None,
    window: Window = None,
    limit: Limit = None,
    references: Annotated[
        Path | None,
        typer.Option(
            help="For answers that bring no reference: a table with id and reference, or caption."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="JSONL of the answers to write, by default predictions.jsonl; one that is there is "
            "continued. With --run a folder, by default in that of the run."
        ),
    ] = None,
    ray: Ray = None,
    root: Root = None,
) -> None:
    """Score answers against references, after a model has given them if need be.

    Answers of other programs are read as well: --column answer=predict names their columns. The
    answers for a series are set beside a report. With --run and --data a finished run answers about
    other people, without training again; with --benchmark it answers the field's own questions.
    """
    asked = Asked(
        column=column or [],
        captions=captions,
        image_root=image_root,
        # what is only described needs no caption
        allow_empty_captions=allow_empty_captions or captions is None,
        encoding=encoding,
        window=window,
        limit=limit,
    )
    if run is not None or data is not None or benchmark is not None:
        _refuse_for_a_run(source, score_with)
        # scores need captions
        described = dataclasses.replace(asked, allow_empty_captions=allow_empty_captions)
        options = {
            "split": split,
            "batch_size": batch_size,
            "max_new_tokens": max_new_tokens,
            "out": out,
            "root": root,
            "ray": ray,
        }
        options["question"] = question
        if benchmark is None:
            _evaluate_on_others(run, data, described, **options)
        else:
            _evaluate_on_benchmark(benchmark, run, data, described, overlap=overlap, **options)
        return
    if source is None:
        raise ValueError("nothing to evaluate: give a source, or --run NAME and --data OTHER")
    out = out or Path("predictions.jsonl")
    if source.is_dir() and (source / f"{split}.jsonl").is_file():
        from medtune.records import read_records

        records = read_records(source, split)
        if limit is not None:
            records = records.select(range(min(limit, len(records))))
        rows = _answer(
            records,
            model,
            adapter,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            out=out,
            ray=ray,
        )
        _print_scores(rows, scores, score_with)
        print(f"answers: {out}", file=sys.stderr)
        return
    if source.is_dir() and (source / "dataset_info.json").is_file():
        there = ", ".join(sorted(file.stem for file in source.glob("*.jsonl")))
        raise ValueError(f"{source} has no split {split!r}, only {there}: give --split")
    if not source.is_dir():
        if source.is_file() and _is_picture(source):
            raise ValueError(
                f"{source} is a picture: give a folder of pictures, a converted folder, or a JSONL "
                "of answers"
            )
        _refuse_ray(source, ray)
        columns = read_columns(column)
        rows = _read_predictions(source, columns=columns, references=references, encoding=encoding)
        _print_scores(rows, scores, score_with)
        return
    if score_with:
        raise ValueError("--score-with needs references: give a table of answers or records")
    text = _report_text(report)
    pairs = _readable(asked.load(str(source)), source)
    answers = _answer(
        pairs,
        model,
        adapter,
        question=question,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        out=out,
        ray=ray,
    )
    _print_beside_report(answers, text)
    print(f"answers: {out}")


def _refuse_ray(source: Path, ray: str | None) -> None:
    """Raise ValueError where nothing is to be answered."""
    if ray:
        raise ValueError(
            f"--ray {ray}: {source} holds answers, which are scored here: leave it out"
        )


def _refuse_for_a_run(source: Path | None, score_with: list[str] | None) -> None:
    """Raise ValueError for what does not go with the answers of a finished run."""
    if source is not None:
        raise ValueError("give either a source, or both --run NAME and --data OTHER")
    if score_with:
        raise ValueError(
            "--score-with scores a table of answers: give it in a second call, with the "
            "answers.jsonl that this one writes"
        )


def _evaluate_on_others(run: str | None, data: Path | None, asked: Asked, **options: Any) -> None:
    if run is None or data is None:
        raise ValueError("give either a source, or both --run NAME and --data OTHER")
    evaluate_run(run, data, asked, **options)


def _evaluate_on_benchmark(  # noqa: PLR0913 - what is asked, of whom
    benchmark: str,
    run: str | None,
    data: Path | None,
    asked: Asked,
    *,
    question: str | None,
    **options: Any,
) -> None:
    if run is None:
        raise ValueError("--benchmark NAME is answered by a finished run: give --run NAME")
    if question is not None:
        raise ValueError("--question: a benchmark brings its own questions, leave it out")
    evaluate_benchmark(benchmark, run, data, asked, **options)


def _is_picture(file: Path) -> bool:
    """Say whether a file is a picture or DICOM, and no table of answers."""
    from medtune.pairs import PICTURE_SUFFIXES, is_dicom

    return file.suffix.lower() in PICTURE_SUFFIXES or is_dicom(file)


def _readable(pairs: Any, source: Path) -> Any:
    """Leave out the pictures that cannot be read, and name them on stderr."""
    import datasets

    good = []
    problems = []
    undecoded = pairs.cast_column("image", datasets.Image(decode=False))
    for number, row in enumerate(undecoded):
        problem = _problem_of(row)
        if problem is None:
            good.append(number)
        else:
            problems.append(problem)
    for problem in problems[:MOST_NAMED]:
        print(f"medtune: warning: left out: {problem}", file=sys.stderr)
    if len(problems) > MOST_NAMED:
        print(f"medtune: warning: and {len(problems) - MOST_NAMED} more", file=sys.stderr)
    if not good:
        raise ValueError(f"nothing of {source} can be read (first: {problems[0]})")
    return pairs.select(good)


def _problem_of(row: dict[str, Any]) -> str | None:
    """Say which picture cannot be read, and why; None if it can."""
    from medtune.pairs import reject_reason

    # what is asked here is the picture alone
    reason = reject_reason(row | {"id": "picture", "caption": "any"})
    if reason is None or row.get("problem"):
        return reason
    path = (row["image"] or {}).get("path")
    return f"{Path(path).name if path else row['id']}: {reason}"


def _answer(
    pairs: Any, model: str | None, adapter: str | None, ray: str | None, **options: Any
) -> list[dict]:
    """Load a model, here or on the machines of a cluster, and let it answer."""
    from medtune import models
    from medtune.answers import Tuned, answer_on_cluster, generate_answers

    base = model or _base_of(adapter)
    if model is None:
        print(f"answered by {base}, as no --model is given", file=sys.stderr)
    if ray:
        return answer_on_cluster(Tuned(base, adapter), pairs, ray=ray, **options)
    loaded = models.load_base(base, **_where_to_load())
    if adapter is not None:
        loaded = models.load_tuned(loaded, adapter)
    processor = models.load_processor(adapter or base)
    return generate_answers(loaded, processor, pairs, **options)


def _where_to_load() -> dict[str, Any]:
    """Load onto a GPU in half the bytes, where there is one."""
    import torch

    if not torch.cuda.is_available():
        return {}
    return {"dtype": "bfloat16", "device_map": {"": "cuda"}}


def _base_of(adapter: str | None) -> str:
    """Name the model to load where none is given: what the adapter names, or the tiny base.

    An adapter on a folder of one machine does not name it; then only the course's own base can be
    meant, and one that does not fit is refused when it is loaded.
    """
    from medtune import runs

    if adapter is not None:
        settings = Path(adapter) / "adapter_config.json"
        if not settings.is_file():
            raise FileNotFoundError(f"no adapter in {adapter}: adapter_config.json is missing")
        named = json.loads(settings.read_text("utf-8")).get("base_model_name_or_path")
        if named:
            return named
    try:
        return str(runs.find_root() / "data" / "tiny-vlm")
    except FileNotFoundError:
        raise ValueError("which model shall answer? Give --model FOLDER or a hub name") from None


def _print_scores(
    rows: list[dict[str, Any]], names: list[str] | None, commands: list[str] | None
) -> None:
    """Print scores; with intervals, if every row names its group."""
    from medtune.pairs import names_group
    from medtune.scores import mean_scores, with_intervals

    answers = [row["answer"] for row in rows]
    references = [row["reference"] for row in rows]
    grouped = all(names_group(row.get("group")) for row in rows)
    groups = [str(row["group"]) for row in rows] if grouped else None
    slices = [row.get("slice") for row in rows]
    found = {}
    for name, score in score_functions(names).items():
        found[name] = with_intervals(score, answers, references, groups=groups, slices=slices)
    for name, values in _values_of_programs(commands or [], rows, list(found)).items():
        found[name] = with_intervals(mean_scores, values, groups=groups, slices=slices)
    _show_scores(found)
    if not grouped:
        print(f"medtune: {NO_INTERVALS}", file=sys.stderr)


def _values_of_programs(
    commands: list[str], rows: list[dict[str, Any]], taken: list[str]
) -> dict[str, dict[str, list[float]]]:
    """Let other programs score the answers, each under the name before its '='."""
    from medtune.scores import run_scorer

    values: dict[str, dict[str, list[float]]] = {}
    for number, text in enumerate(commands, 1):
        named = PROGRAM_NAME.match(text)
        name = named[1] if named else f"program {number}"
        command = text[named.end() :] if named else text
        if name in values or name in taken:
            raise ValueError(f"--score-with: there is another score called {name!r}")
        values[name] = run_scorer(command, rows)
    return values


def _show_scores(found: dict[str, dict[str, Any]]) -> None:
    """Print a table for people at a terminal, and JSON with everything for programs in a pipe."""
    if not sys.stdout.isatty():
        print_json(found)
        return
    rows = []
    for name, scores in found.items():
        intervals = scores.get("intervals", {})
        for key, value in scores.items():
            if not isinstance(value, float):
                continue
            interval = intervals.get(key) or {}
            rows.append(
                {
                    "score": f"{name} {key}",
                    "value": value,
                    "low": interval.get("low"),
                    "high": interval.get("high"),
                }
            )
    print_table(rows)


def _report_text(report: Path | None) -> str:
    """Read a report before hours are spent on answers; empty where there is none."""
    return " ".join(report.read_text("utf-8").split()) if report else ""


def _print_beside_report(answers: list[dict[str, Any]], report: str) -> None:
    """Print what is found in each slice, which of it the report says, and the findings of both."""
    from medtune.scores import compare_with_report

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
    print_table(rows)
    print(f"\nreport: {report or '(none given)'}")
    print(f"findings in the report: {_listed(in_report)}")
    compared = compare_with_report([answer["answer"] for answer in answers], report)
    if report and compared:
        print()
        print_table(compared)


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


def score_functions(names: list[str] | None) -> dict[str, Any]:
    """Return the score functions of these names; without names, all."""
    from medtune import scores

    known = {
        "llamafactory": scores.llamafactory_scores,
        "standard": scores.standard_scores,
        "finding": scores.finding_scores,
        "listing": scores.listing_scores,
        "invented": scores.invented_scores,
    }
    unknown = sorted(set(names or []) - set(known))
    if unknown:
        raise ValueError(f"there is no score {unknown[0]!r}; there are {', '.join(known)}")
    return {name: known[name] for name in names or known}


def _read_predictions(path: Path, **options: Any) -> list[dict[str, Any]]:
    """Read a table of answers, or that of a run's tuned model by the run's name."""
    from medtune.answers import read_predictions

    if not path.exists() and path.name == str(path):
        from medtune import runs

        try:
            out = runs.find_root() / "papermill_runs" / path.name / "out"
        except FileNotFoundError:
            # not in a clone, so that no run is meant
            return read_predictions(path, **options)
        of_run = out / "05_evaluate" / "predictions_tuned.jsonl"
        if of_run.exists():
            path = of_run
    return read_predictions(path, **options)
