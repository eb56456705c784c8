"""What `medtune evaluate --run NAME --data OTHER` does: a finished run on the data of other people."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .options import Asked
from .printing import print_table

# Where the notebooks of a run write.
CONVERTED = Path("02_convert_data") / "data"
EVALUATED = Path("05_evaluate")


@dataclass(frozen=True)
class Finished:
    """A run that has an adapter."""

    name: str
    #: Its folder of results.
    out: Path
    #: Base model, a folder or a hub name.
    base: str
    #: Number type of its weights in the evaluation, such as float32.
    dtype: str
    adapter: Path

    @property
    def converted(self) -> Path:
        """The folder of the records that it was trained and scored on."""
        return self.out / CONVERTED

    def magnifies(self) -> bool:
        """Say whether its records show each region once more, enlarged."""
        notes = self.converted / "convert.json"
        if not notes.is_file():
            return False
        return bool(json.loads(notes.read_text("utf-8"))["job"].get("magnify"))


def evaluate_run(  # noqa: PLR0913 - what is asked, of whom, and where it goes
    name: str,
    data: Path,
    asked: Asked,
    *,
    split: str,
    question: str | None,
    batch_size: int,
    max_new_tokens: int,
    out: Path | None,
    root: Path | None,
    ray: str | None,
) -> None:
    """Let a finished run answer about another data set, and print its scores beside its own.

    Raises
    ------
    FileNotFoundError : there is no such run or data, or the run has no adapter or records.
    ValueError : the data set has no such split, or answers of other settings stand in `out`.
    """
    from medtune.files import only_writer, write_whole
    from medtune.records import read_records
    from medtune.scores import score_people

    run = find_run(name, root)
    theirs = _records_of(data, asked, split)
    train = read_records(run.converted, "train")
    if question is None and "question" not in theirs.column_names:
        question = _question_of(train)
    folder = out or run.out / "another_person" / data.stem
    # records, answers and scores belong together: one call at a time writes them
    with only_writer(folder / "scores.json", f"out={folder}"):
        if "prompt" not in theirs.column_names and run.magnifies():
            theirs = _magnified(theirs, folder / "records", question)

        answers = answers_of_run(
            run,
            theirs,
            out=folder / "answers.jsonl",
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            question=question,
            ray=ray,
        )
        people = {}
        held_out = _held_out(run)
        if held_out:
            people["held out"] = held_out
        else:
            print(
                f"medtune: warning: {name} has no answers of {EVALUATED}: its held-out scores are missing",
                file=sys.stderr,
            )
        people[data.stem] = answers
        turns = train.select_columns(["completion"])["completion"]
        captions = [turn[-1]["content"][0]["text"] for turn in turns]
        found = score_people(people, captions)
        write_whole(folder / "scores.json", json.dumps(found, indent=1, ensure_ascii=False))
        _print_people(found)
        print(f"answers and scores: {folder}", file=sys.stderr)


def answers_of_run(
    run: Finished, rows: Any, ray: str | None, **options: Any
) -> list[dict[str, Any]]:
    """Let the tuned model of a run answer, here or on the machines of a cluster.

    The options are those of `generate_answers`.
    """
    import torch

    from medtune import models
    from medtune.answers import Tuned, answer_on_cluster, generate_answers

    if ray:
        tuned = Tuned(run.base, str(run.adapter.resolve()), run.dtype)
        return answer_on_cluster(tuned, rows, ray=ray, **options)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = models.load_base(run.base, dtype=run.dtype, device_map={"": device})
    model = models.load_tuned(base, str(run.adapter))
    processor = models.load_processor(str(run.adapter))
    return generate_answers(model, processor, rows, **options)


def find_run(name: str, root: Path | None) -> Finished:
    """Find a run that has records and an adapter.

    Raises
    ------
    FileNotFoundError : there is none of this name, or it has not been trained.
    """
    from medtune import runs

    params = runs.read_params(name, root=root)
    where = runs.find_root(root)
    settings = params.get("05_evaluate", {})
    out = where / "papermill_runs" / name / "out"
    adapter = out / settings.get("trained_by", "03_finetune_lora") / "adapter"
    if not (adapter / "adapter_config.json").is_file():
        raise FileNotFoundError(f"{name} has no adapter in {adapter}: medtune run {name} makes it")
    if not (out / CONVERTED).is_dir():
        raise FileNotFoundError(
            f"{name} has no records in {out / CONVERTED}: medtune run {name} makes them"
        )
    trained = params.get("03_finetune_lora", {})
    base = settings.get("model_name_or_path") or trained.get("model_name_or_path", "")
    # paths of parameters are relative to the notebooks
    beside_notebooks = where / "notebooks" / base
    if beside_notebooks.is_dir():
        base = str(beside_notebooks.resolve())
    return Finished(name, out, base, settings.get("dtype", "float32"), adapter)


def _records_of(data: Path, asked: Asked, split: str) -> Any:
    """Read a converted folder, or any source of pairs; with boxes drawn where there are some."""
    if not data.exists():
        raise FileNotFoundError(f"there is no --data {data}")
    if data.is_dir() and (data / f"{split}.jsonl").is_file():
        from medtune.records import read_records

        rows = read_records(data, split)
        if asked.limit is not None:
            rows = rows.select(range(min(asked.limit, len(rows))))
    elif data.is_dir() and (data / "dataset_info.json").is_file():
        there = ", ".join(sorted(file.stem for file in data.glob("*.jsonl")))
        raise ValueError(f"{data} has no split {split!r}, only {there}: give --split")
    else:
        rows = asked.load(str(data))
    if "has_box" in rows.column_names and any(rows["has_box"]):
        # the question speaks of the box
        rows = rows.filter(bool, input_columns="has_box")
    return rows


def _magnified(pairs: Any, folder: Path, question: str | None) -> Any:
    """Make records of pairs that show each region twice, as the run had them in its training."""
    from medtune.records import convert_pairs, read_records

    made = convert_pairs(
        pairs,
        folder,
        questions=question,
        splits=["test"] * len(pairs),
        magnify=True,
        overwrite=True,
    )
    if made["rejected"]:
        print(
            f"medtune: warning: {made['rejected']} of {made['rows']} pairs are left out, "
            f"{folder / 'rejected.jsonl'} says why",
            file=sys.stderr,
        )
    return read_records(folder, "test")


def _question_of(train: Any) -> str:
    """Give what the run was taught to answer, for pairs that bring no question."""
    content = train.select_columns(["prompt"])[0]["prompt"][-1]["content"]
    return "".join(part["text"] or "" for part in content if part["type"] == "text").strip()


def _held_out(run: Finished) -> list[dict[str, Any]]:
    """Read the tuned model's answers to the held-out pairs, with group and slice of each."""
    from medtune.answers import read_answers
    from medtune.records import read_records

    file = run.out / EVALUATED / "predictions_tuned.jsonl"
    if not file.is_file():
        return []
    # answers of older versions do not name their slice
    records = read_records(run.converted, "test")
    known = [name for name in ("group", "slice") if name in records.column_names]
    facts = {row["id"]: row for row in records.select_columns(["id", *known])}
    rows = []
    for answer in read_answers(file):
        rows.append(facts.get(answer["id"], {}) | answer)
    return rows


def _print_people(found: dict[str, dict[str, Any]]) -> None:
    first = next(iter(found.values()))
    rows = []
    for measure in first["scores"]:
        row = {"score, %": measure}
        for name, person in found.items():
            row[name] = score_cell(person["scores"][measure])
        rows.append(row)
    for key, said in _COUNTED.items():
        row = {"score, %": said}
        for name, person in found.items():
            value = person[key]
            row[name] = f"{value:.1f}" if isinstance(value, float) else value
        rows.append(row)
    print_table(rows)
    for name, person in found.items():
        if person["not_taught"]:
            pairs = sum(person["not_taught"].values())
            names = ", ".join(person["not_taught"])
            print(f"{name}: {pairs} pairs about structures that were not taught: {names}")
    lost = person["names_lost"][:LOST_SHOWN]
    if lost:
        print(f"\nmost names of {name} are lost here:")
        print_table(
            [
                {
                    "structure": row["structure"],
                    "pairs": row["pairs"],
                    "named right, %": row["right"],
                    "training pairs about it": row["training_pairs"],
                }
                for row in lost
            ]
        )


# structures with the most wrong names
LOST_SHOWN = 5


_COUNTED = {
    "names_by_region": "name right, each structure of a slice once",
    "pairs": "pairs",
    "scored": "of these about structures that were taught",
    "structures": "structures",
    "slices": "slices",
    "area": "median area of a region, % of the picture",
}


def score_cell(result: dict[str, Any]) -> str:
    """Write a score with its interval.

    Examples
    --------
    >>> score_cell({"value": 51.26, "low": 40.0, "high": 62.5})
    '51.3 [40.0, 62.5]'
    """
    if result["value"] is None:
        return "not scored"
    text = f"{result['value']:.1f}"
    if result["low"] is not None:
        text += f" [{result['low']:.1f}, {result['high']:.1f}]"
    return text
