"""Controls for questions about several pictures, an earlier picture or a record.

Each takes converted records and gives the same questions with something changed, for
`generate_answers`. A model that uses the order of its slices, the earlier picture or the record
answers worse then; one that does not has read its answer elsewhere.
"""

import copy
import random
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from .prompts import prompt_of

Row = dict[str, Any]


def shuffle_slices(records: Iterable[Mapping[str, Any]], seed: int = 0) -> list[Row]:
    """Show each record its own pictures in another order, none of them at its own place.

    Parameters
    ----------
    records : `datasets.Dataset` or list of dicts with `prompt` and `images`.
    seed : the same seed gives the same orders again.

    Returns
    -------
    list of dict : the records, with their own ids and references.

    Raises
    ------
    ValueError : a record has fewer than two pictures.

    Examples
    --------
    >>> row = {"id": "a", "prompt": [], "images": ["first", "second"]}
    >>> shuffle_slices([row])[0]["images"]
    ['second', 'first']
    """
    rng = random.Random(seed)
    changed = []
    for row in records:
        pictures = _pictures(row, "shuffle_slices")
        places = list(range(len(pictures)))
        while any(place == own for own, place in enumerate(places)):
            rng.shuffle(places)
        changed.append({**row, "images": [pictures[place] for place in places]})
    return changed


def repeat_slice(records: Iterable[Mapping[str, Any]], seed: int = 0) -> list[Row]:
    """Show each record one of its pictures as often as it has pictures.

    Parameters
    ----------
    records : `datasets.Dataset` or list of dicts with `prompt` and `images`.
    seed : chooses the picture.

    Returns
    -------
    list of dict : the records, with their own ids and references.

    Raises
    ------
    ValueError : a record has fewer than two pictures.

    Examples
    --------
    >>> row = {"id": "a", "prompt": [], "images": ["first", "second"]}
    >>> len(set(repeat_slice([row])[0]["images"]))
    1
    """
    rng = random.Random(seed)
    changed = []
    for row in records:
        pictures = _pictures(row, "repeat_slice")
        changed.append({**row, "images": [rng.choice(pictures)] * len(pictures)})
    return changed


def swap_earlier(records: Iterable[Mapping[str, Any]], seed: int = 0) -> list[Row]:
    """Show each record the first picture of another person in place of its own first one.

    Parameters
    ----------
    records : `datasets.Dataset` or list of dicts with `prompt`, `images` and `person`; of another
        `task`, where it is known, nobody lends a picture.
    seed : chooses the other.

    Returns
    -------
    list of dict : the records, with their own ids and references.

    Raises
    ------
    ValueError : a record has fewer than two pictures or no person, or there is no other person.

    Examples
    --------
    >>> rows = [{"id": name, "prompt": [], "images": [name + "1", name + "2"], "person": name}
    ...         for name in "ab"]
    >>> swap_earlier(rows)[0]["images"]
    ['b1', 'a2']
    """
    rows = [dict(row) for row in records]
    donors = _donors(rows, "swap_earlier", partial(_another, "person"), seed)
    changed = []
    for row, donor in zip(rows, donors, strict=True):
        pictures = _pictures(row, "swap_earlier")
        changed.append({**row, "images": [donor["images"][0], *pictures[1:]]})
    return changed


def swap_pictures(records: Iterable[Mapping[str, Any]], seed: int = 0) -> list[Row]:
    """Show each record all pictures of another one of the same kind, whatever its answer.

    `shuffle_pictures` avoids rows with the same answer, so that a model that looks does worse than
    chance; here it comes out at chance.

    Parameters
    ----------
    records : `datasets.Dataset` or list of dicts with `prompt` and `images`; of another `task`,
        where it is known, nobody lends pictures.
    seed : chooses the other.

    Returns
    -------
    list of dict : the records, with their own ids and references.

    Raises
    ------
    ValueError : there is no other record of this kind with as many pictures.

    Examples
    --------
    >>> rows = [{"id": name, "prompt": [], "images": [name]} for name in "ab"]
    >>> swap_pictures(rows)[0]["images"]
    ['b']
    """
    rows = [dict(row) for row in records]
    donors = _donors(rows, "swap_pictures", _another_row, seed)
    return [{**row, "images": donor["images"]} for row, donor in zip(rows, donors, strict=True)]


def swap_record(records: Iterable[Mapping[str, Any]], seed: int = 0) -> list[Row]:
    """Ask each question with the patient's record of another one.

    Parameters
    ----------
    records : `datasets.Dataset` or list of dicts with `prompt`, and with `record`, a text that
        stands in the question.
    seed : chooses the other.

    Returns
    -------
    list of dict : the records, with their own ids and references.

    Raises
    ------
    ValueError : a question does not hold its record, or there is no other record of this kind.

    Examples
    --------
    >>> rows = [{"id": name, "prompt": [{"role": "user", "content": name + ": well?"}], "images": [],
    ...          "record": name} for name in ("well", "ill")]
    >>> swap_record(rows)[1]["prompt"][0]["content"]
    'well: well?'
    """
    rows = [dict(row) for row in records]
    donors = _donors(rows, "swap_record", partial(_another, "record"), seed)
    return [
        _with_record(row, donor["record"], "swap_record")
        for row, donor in zip(rows, donors, strict=True)
    ]


def record_alone(records: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Ask each question without its pictures: what the record alone tells.

    Parameters
    ----------
    records : `datasets.Dataset` or list of dicts with `prompt`.

    Returns
    -------
    list of dict : the records, with their own ids and references.

    Examples
    --------
    >>> parts = [{"type": "image"}, {"type": "text", "text": "Well?"}]
    >>> row = {"id": "a", "prompt": [{"role": "user", "content": parts}], "images": ["first"]}
    >>> record_alone([row])[0]["prompt"][0]["content"]
    [{'type': 'text', 'text': 'Well?'}]
    """
    changed = []
    for row in records:
        messages = []
        for message in prompt_of(row).messages:
            content = message["content"]
            if not isinstance(content, str):
                content = [part for part in content if part["type"] != "image"]
            messages.append({**message, "content": content})
        changed.append({**row, "prompt": messages, "images": []})
    return changed


def picture_alone(records: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Ask each question without the patient's record: what the pictures alone tell.

    Parameters
    ----------
    records : `datasets.Dataset` or list of dicts with `prompt`, and with `record`, a text that
        stands in the question.

    Returns
    -------
    list of dict : the records, with their own ids and references.

    Raises
    ------
    ValueError : a question does not hold its record.

    Examples
    --------
    >>> row = {"id": "a", "prompt": [{"role": "user", "content": "ill: well?"}], "images": [],
    ...        "record": "ill: "}
    >>> picture_alone([row])[0]["prompt"][0]["content"]
    'well?'
    """
    return [_with_record(row, "", "picture_alone") for row in records]


def _pictures(row: Mapping[str, Any], name: str) -> list[Any]:
    pictures = list(row["images"])
    if len(pictures) < 2:
        raise ValueError(
            f"{name} needs two pictures or more in each question, but the one with id "
            f"{row.get('id')} has {len(pictures)}"
        )
    return pictures


def _another_row(row: Row, other: Row) -> bool:
    return other is not row


def _another(column: str, row: Row, other: Row) -> bool:
    return None not in (row.get(column), other.get(column)) and row[column] != other[column]


def _donors(rows: list[Row], name: str, fits: Callable[[Row, Row], bool], seed: int) -> list[Row]:
    """Choose for each row another one of the same kind that fits."""
    rng = random.Random(seed)
    of_kind: dict[tuple, list[Row]] = {}
    for row in rows:
        of_kind.setdefault(_kind(row), []).append(row)
    donors = []
    for row in rows:
        others = [other for other in of_kind[_kind(row)] if fits(row, other)]
        if not others:
            raise ValueError(
                f"{name} finds no other row for the one with id {row.get('id')}: give more rows of "
                "its kind, with the columns that it names"
            )
        # a record in another language would stand out
        alike = [other for other in others if other.get("language") == row.get("language")]
        donors.append(rng.choice(alike or others))
    return donors


def _kind(row: Row) -> tuple:
    return (len(row["images"]), row.get("task"))


def _with_record(row: Mapping[str, Any], text: str, name: str) -> Row:
    """Put another text in the place of a record in the question."""
    own = row.get("record")
    messages = copy.deepcopy(list(row["prompt"]))
    question = messages[-1]
    replaced = 0
    if own and isinstance(question["content"], str):
        replaced = question["content"].count(own)
        question["content"] = question["content"].replace(own, text).lstrip()
    elif own:
        for part in question["content"]:
            said = part.get("text") or ""
            if own in said:
                replaced += 1
                part["text"] = said.replace(own, text).lstrip()
    if not replaced:
        raise ValueError(
            f"{name} needs a column `record` with a text that stands in the question; the one with "
            f"id {row.get('id')} has none"
        )
    return {**row, "prompt": messages}
