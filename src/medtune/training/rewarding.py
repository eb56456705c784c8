"""What `stage: grpo` learns from: the rewards that the settings name, and questions with the truth."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import datasets

from medtune.captions import parse_caption
from medtune.records import read_records
from medtune.rewards import (
    box_reward,
    finding_reward,
    format_reward,
    length_reward,
    name_reward,
)

from .settings import RewardArguments

# Columns that belong to TRL; all others are handed to the rewards.
OF_TRL = ("prompt", "images", "completion")

Reward = Callable[..., list[float | None]]


def reward_functions(script_args: RewardArguments) -> list[Reward]:
    """Return the functions that the settings name, with the settings' parameters.

    Parameters
    ----------
    script_args : see `RewardArguments`.

    Examples
    --------
    >>> [reward] = reward_functions(RewardArguments("records", missed_weight=-2.0))
    >>> reward(["No focal lesion."], reference=["Within it lies a cyst."])
    [-2.0]
    """
    functions = {
        "finding": partial(
            finding_reward,
            missed=script_args.missed_weight,
            invented=script_args.invented_weight,
            silent=script_args.silent_weight,
        ),
        "name": partial(name_reward, wrong_side=script_args.wrong_side_weight),
        "box": partial(box_reward, scale=script_args.box_scale),
        "format": partial(format_reward, pattern=script_args.answer_pattern),
        "length": partial(
            length_reward, shortest=script_args.shortest, longest=script_args.longest
        ),
    }
    return [functions[name] for name in script_args.rewards]


def read_questions(
    script_args: RewardArguments, functions: list[Reward], split: str
) -> datasets.Dataset:
    """Read the questions of a split with what is true of each; one that no reward can judge is left out.

    Where findings are rewarded, a record that says nothing of them is left out, too: silence is not
    the truth.

    Parameters
    ----------
    script_args : see `RewardArguments`.
    functions : from `reward_functions`.
    split : of the records.

    Returns
    -------
    datasets.Dataset : `id`, `prompt`, `images`, `completion`, `reference` (the record's caption) and
        `roi` where the records have it.

    Raises
    ------
    ValueError : no record can be judged.
    """
    records = read_records(script_args.data, split)
    records = records.add_column("reference", _references(records))
    wanted = ["id", "prompt", "images", "completion", "reference", "roi"]
    records = records.select_columns([name for name in wanted if name in records.column_names])
    if "roi" not in records.column_names and "box" in script_args.rewards:
        raise ValueError(
            f"rewards: box needs records with a column roi, and those of {script_args.data} have none"
        )
    known = records.remove_columns([name for name in OF_TRL if name in records.column_names])
    kept = []
    for number, row in enumerate(known):
        if _can_be_judged(row, script_args.rewards, functions):
            kept.append(number)
    if not kept:
        raise ValueError(
            f"none of the {len(records)} records of {split!r} can be judged by the rewards "
            f"{', '.join(script_args.rewards)}: their captions do not say what these compare"
        )
    if len(kept) < len(records):
        print(
            f"medtune train: {len(records) - len(kept)} of {len(records)} records of {split!r} are "
            "left out: the rewards cannot judge them",
            file=sys.stderr,
        )
    return records.select(kept)


def columns_of(rows: list[dict[str, Any]]) -> dict[str, list]:
    """Give the columns of rows that a reward is handed, by name.

    Examples
    --------
    >>> columns_of([{"id": "a", "prompt": "What?", "reference": "A cyst."}])
    {'id': ['a'], 'reference': ['A cyst.']}
    """
    columns = {}
    for name in rows[0]:
        if name not in OF_TRL:
            columns[name] = [row[name] for row in rows]
    return columns


def _references(records: datasets.Dataset) -> list[str]:
    references = []
    for record in records.select_columns(["completion"]):
        parts = record["completion"][-1]["content"]
        references.append("".join(part.get("text") or "" for part in parts))
    return references


def _can_be_judged(row: dict[str, Any], names: list[str], functions: list[Reward]) -> bool:
    """Say whether any reward has an opinion of the truth itself."""
    if "finding" in names:
        caption = parse_caption(row["reference"])
        if not (caption.findings or caption.negated):
            return False
    for function in functions:
        [reward] = function([row["reference"]], **columns_of([row]))
        if reward is not None:
            return True
    return False
