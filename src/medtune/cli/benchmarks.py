"""What `medtune evaluate --run NAME --benchmark NAME` does: a finished run on the field's questions."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from .options import Asked
from .people import Finished, answers_of_run, find_run, score_cell
from .printing import print_table


def evaluate_benchmark(  # noqa: PLR0913 - what is asked, of whom, and where it goes
    name: str,
    run_name: str,
    data: Path | None,
    asked: Asked,
    *,
    split: str,
    overlap: bool,
    batch_size: int,
    max_new_tokens: int,
    out: Path | None,
    root: Path | None,
    ray: str | None,
) -> None:
    """Let a finished run answer a benchmark, and print its scores with what they are worth.

    Raises
    ------
    FileNotFoundError : there is no such run, or the benchmark's files are not there.
    ConnectionError : the hub is out of reach.
    ValueError : no such benchmark or part of it, or answers of other settings stand in `out`.
    """
    from medtune.benchmarks import score_benchmark
    from medtune.files import only_writer, write_whole
    from medtune.pairs import to_rgb

    run = find_run(run_name, root)
    loaded = _load(name, data, asked, split)
    title = f"{loaded.benchmark.title}, {loaded.split}"
    _say_what_is_left_out(loaded)
    found: dict[str, Any] = {
        "benchmark": loaded.benchmark.name,
        "split": loaded.split,
        "first_rows_only": asked.limit,
        "left_out": dict(loaded.left_out),
        "split_note": loaded.benchmark.split_note,
    }
    _warn_of_split(loaded)
    if overlap:
        found["in_training_set"] = _in_training_set(loaded, run)
        found["in_own_train"] = _in_own_train(loaded, data, asked)
    folder = out or run.out / "benchmarks" / f"{loaded.benchmark.name}-{loaded.split}"
    with only_writer(folder / "scores.json", f"out={folder}"):
        answers = answers_of_run(
            run,
            loaded.rows,
            out=folder / "answers.jsonl",
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            # their pictures are as somebody published them: CMYK, 16 bits, palettes
            image_transform=to_rgb,
            ray=ray,
        )
        found |= score_benchmark(answers, loaded.facts)
        write_whole(folder / "scores.json", json.dumps(found, indent=1, ensure_ascii=False))
    _print_scores(title, found)
    print(f"answers and scores: {folder}", file=sys.stderr)


def _load(name: str, data: Path | None, asked: Asked, split: str) -> Any:
    from medtune.benchmarks import find_benchmark, load_benchmark, own_questions

    if data is not None and not data.exists():
        raise FileNotFoundError(f"there is no --data {data}")
    if find_benchmark(name).form != "pairs":
        return load_benchmark(name, data, split=split, limit=asked.limit)
    if data is None:
        raise ValueError("--benchmark own: give your questions and answers, --data SOURCE")
    described = dataclasses.replace(asked, allow_empty_captions=False)
    return own_questions(described.load(str(data)), split=split)


def _say_what_is_left_out(loaded: Any) -> None:
    for why, count in loaded.left_out.most_common():
        print(f"medtune: warning: {count} questions left out: {why}", file=sys.stderr)


def _warn_of_split(loaded: Any) -> None:
    note = loaded.benchmark.split_note
    if note:
        print(f"medtune: warning: {loaded.benchmark.title}: {note}", file=sys.stderr)


def _in_training_set(loaded: Any, run: Finished) -> dict[str, int]:
    """Count the pictures that the run was trained on."""
    from medtune.benchmarks import count_shared, pictures_of
    from medtune.records import read_records

    known = pictures_of(read_records(run.converted, "train"))
    shared = count_shared(loaded.pictures(), known)
    if shared.near:
        print(
            f"medtune: warning: {shared.near} of {shared.pictures} pictures stand in the training "
            f"set of {run.name} ({shared.exact} as the same file): these are not held out",
            file=sys.stderr,
        )
    return dataclasses.asdict(shared)


def _in_own_train(loaded: Any, data: Path | None, asked: Asked) -> dict[str, int] | None:
    """Count the pictures that the benchmark's own training part has too; None where it is not there."""
    from medtune.benchmarks import count_shared, load_benchmark

    benchmark = loaded.benchmark
    if "train" not in benchmark.splits or loaded.split == "train":
        return None
    # the first rows come as a stream: the training part would have to be downloaded for this alone
    if data is None and asked.limit is not None:
        return None
    try:
        train = load_benchmark(benchmark.name, data, split="train")
    except (OSError, ValueError) as error:
        print(
            f"medtune: warning: whether the published split leaks is not counted: {error}",
            file=sys.stderr,
        )
        return None
    shared = count_shared(loaded.pictures(), train.pictures())
    if shared.near:
        print(
            f"medtune: warning: the published split leaks: {shared.near} of {shared.pictures} "
            f"pictures of {loaded.split} stand in its train part too ({shared.exact} as the same "
            "file); a model trained on it has seen them",
            file=sys.stderr,
        )
    return dataclasses.asdict(shared)


def _print_scores(title: str, found: dict[str, Any]) -> None:
    rows = []
    for name, result in found["scores"].items():
        rows.append({"score, %": name, title: score_cell(result)})
    for name, value in found["controls"].items():
        rows.append({"score, %": f"{name} (no picture)", title: f"{value:.1f}"})
    for kind, count in found["questions"].items():
        what = "reports" if kind == "report" else f"{kind} questions"
        rows.append({"score, %": what, title: count})
    rows.append({"score, %": "pictures or cases", title: found["groups"]})
    for key, what in (
        ("in_training_set", "of its pictures, in this run's training set"),
        ("in_own_train", "of its pictures, in its own train part"),
    ):
        shared = found.get(key)
        if shared is not None:
            rows.append({"score, %": what, title: f"{shared['near']} of {shared['pictures']}"})
    print_table(rows)
    first = [result for result in found["scores"].values() if result["low"] is None]
    if first:
        print(f"medtune: no interval: {first[0]['reason']}", file=sys.stderr)
