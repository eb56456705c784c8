"""Preference pairs on disk: beside the records that they are about, and read as TRL wants them.

A line of `preferences/train.jsonl` in a converted folder has the id of a record, `chosen` and
`rejected`. Question and pictures stay in the record, so that they cannot differ from it. Pairs that
people rated are written the same way.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from medtune.files import read_json_lines, write_whole
from medtune.records import read_records

from .preferences import KINDS, preference_pairs

# Beside the records, in a folder of its own: every file of JSON Lines among them is a split.
FOLDER = "preferences"


def write_preferences(
    folder: str | os.PathLike,
    answers: Sequence[Mapping[str, Any]],
    *,
    split: str = "train",
    kinds: Sequence[str] = KINDS,
    seed: int = 0,
) -> dict[str, int]:
    """Make preference pairs of answers about records, and write them beside these.

    Parameters
    ----------
    folder : str or path
        What `medtune convert` wrote.
    answers : sequence of mapping
        "id" and "answer" of each, as `medtune.answers.read_predictions` gives them; several of one
        record are welcome. The truth is the record's own caption.
    split : str
        The split of the records.
    kinds : sequence of str
        The kinds of pairs, see `preference_pairs`.
    seed : int
        Draws the sentences that are put in.

    Returns
    -------
    dict
        How many pairs of each kind were written to `preferences/<split>.jsonl`.

    Raises
    ------
    OSError
        There is no such split, or the disk is full.
    ValueError
        An answer to no record of the split, an unknown kind, or nothing to make a pair of.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> turns = [("user", "What?"), ("assistant", "The left kidney. Within it lies a cyst.")]
    >>> said = [{"role": role, "content": text} for role, text in turns]
    >>> _ = (folder / "train.jsonl").write_text(json.dumps({"id": "a", "messages": said}))
    >>> answers = [{"id": "a", "answer": "The left kidney. No focal lesion is seen."}]
    >>> write_preferences(folder, answers)
    {'own': 1, 'side': 1}
    >>> read_preferences(folder)["rejected"][0][-1]["content"][0]["text"]
    'The left kidney. No focal lesion is seen.'
    """
    references = {}
    for record in read_records(folder, split).select_columns(["id", "completion"]):
        references[record["id"]] = _text_of(record["completion"][-1])
    for answer in answers:
        if answer["id"] not in references:
            raise ValueError(
                f"an answer is about {answer['id']!r}, which is no record of {split!r} in {folder}: "
                f"preferences are made of answers to the records of split={split}"
            )
    said = [answer["answer"] for answer in answers]
    truth = [references[answer["id"]] for answer in answers]
    pairs = preference_pairs(said, truth, kinds=kinds, seed=seed)
    if not pairs:
        raise ValueError(
            f"{len(said)} answers make no pair: their records say nothing of findings, or the kinds "
            f"{', '.join(kinds)} do not occur"
        )
    lines = []
    for pair in pairs:
        line = {"id": answers[pair.row]["id"], "kind": pair.kind}
        line |= {"chosen": pair.chosen, "rejected": pair.rejected}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    file = _file_of(folder, split)
    file.parent.mkdir(exist_ok=True)
    write_whole(file, "".join(lines))
    return dict(Counter(pair.kind for pair in pairs))


def read_preferences(folder: str | os.PathLike, split: str = "train") -> datasets.Dataset:
    """Read the preference pairs of a split as the data set that TRL's `DPOTrainer` wants.

    Parameters
    ----------
    folder : str or path
        A converted folder with `preferences/<split>.jsonl`.
    split : str
        Which of its splits.

    Returns
    -------
    datasets.Dataset
        `id`, `prompt` and `images` of the record, `chosen` and `rejected` as turns.

    Raises
    ------
    FileNotFoundError
        There is no such file, or no such split.
    ValueError
        A line is no pair, or about no record of the split.

    Examples
    --------
    >>> read_preferences("no-folder")
    Traceback (most recent call last):
    FileNotFoundError: no-folder/preferences/train.jsonl does not exist: write it with `medtune prefer`
    """
    file = _file_of(folder, split)
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: write it with `medtune prefer`")
    records = read_records(folder, split)
    row_of = {name: row for row, name in enumerate(records["id"])}
    rows = []
    better = []
    worse = []
    for number, line in read_json_lines(file):
        pair = _checked(line, f"{file}:{number}", row_of, split)
        rows.append(row_of[pair["id"]])
        better.append(_answer_turn(pair["chosen"]))
        worse.append(_answer_turn(pair["rejected"]))
    if not rows:
        raise ValueError(f"{file} is empty: write it with `medtune prefer`")
    questions = records.select(rows).select_columns(["id", "prompt", "images"])
    return questions.add_column("chosen", better).add_column("rejected", worse)


def _file_of(folder: str | os.PathLike, split: str) -> Path:
    return Path(folder) / FOLDER / f"{split}.jsonl"


def _checked(line: Any, place: str, known: Mapping[str, int], split: str) -> dict[str, str]:
    """Return a line that is a pair about a known record; raise `ValueError` for any other."""
    if isinstance(line, ValueError):
        raise ValueError(f"{place} is no JSON: {line}")
    if not isinstance(line, dict):
        raise ValueError(f"{place} is no pair: write id, chosen and rejected")
    for key in ("id", "chosen", "rejected"):
        if not isinstance(line.get(key), str) or not line[key].strip():
            raise ValueError(f"{place} has no {key}: write id, chosen and rejected, each a text")
    if line["id"] not in known:
        raise ValueError(f"{place} is about {line['id']!r}, which is no record of {split!r}")
    return line


def _text_of(turn: Mapping[str, Any]) -> str:
    return "".join(part.get("text") or "" for part in turn["content"])


def _answer_turn(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]
