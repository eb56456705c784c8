"""Read JSON and JSON Lines: lists of records, and the objects that published sets are.

Known objects are those of R2Gen (lists named after splits) and of COCO (images and annotations).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .columns import our_names, shown, split_of_word
from .encodings import open_text

# A record, or why there is none, with the number at which it stands, from 1.
Numbered = tuple[int, Any]


def read_json_rows(table: Path, encoding: str | None) -> Iterator[Numbered]:
    """Yield (line number from 1, record) of JSON Lines; a line that is not JSON comes as its error.

    Only a line feed ends a line: other signs that Unicode counts as line ends may stand in a text.

    Parameters
    ----------
    table : Path
        The file.
    encoding : str or None
        Its encoding; None for UTF-8, with or without a byte order mark.

    Yields
    ------
    tuple of int and any value
        Blank lines are left out.

    Raises
    ------
    ValueError, OSError
        The file cannot be read, or is not in this encoding.
    """
    with open_text(table, encoding, newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, ValueError(f"not JSON ({error or 'too deep'})")


def read_json(table: Path, encoding: str | None) -> Iterator[Numbered]:
    """Yield (number from 1, record) of a JSON file.

    Parameters
    ----------
    table : Path
        A list of records, or one of the known objects.
    encoding : str or None
        Its encoding; None for UTF-8, with or without a byte order mark.

    Yields
    ------
    tuple of int and any value
        What makes no record comes as a ValueError that says why.

    Raises
    ------
    ValueError, OSError
        The file cannot be read, is not in this encoding, or is an object of no known form.
    """
    with open_text(table, encoding, newline=None) as text:
        try:
            value = json.load(text)
        except (ValueError, RecursionError) as error:
            problem = f"{error or 'too deep'}"
        else:
            yield from enumerate(_records_of(value, table), 1)
            return
    # many publish JSON Lines under this ending
    if not _begins_with_object(table, encoding):
        raise ValueError(f"{table} is not JSON ({problem}): is it cut off?")
    yield from read_json_rows(table, encoding)


def _begins_with_object(table: Path, encoding: str | None) -> bool:
    """Say whether the first line is a whole record."""
    for _, record in read_json_rows(table, encoding):
        return isinstance(record, dict)
    return False


def _records_of(value: Any, table: Path) -> Iterator[Any]:
    if isinstance(value, list):
        return iter(value)
    if isinstance(value, dict):
        for read in (_lists_of_splits, _coco, _columns, _records_by_id, _only_list):
            records = read(value)
            if records is not None:
                return records
    kind = type(value).__name__
    names = f" with {shown(value)}" if isinstance(value, dict) else ""
    raise ValueError(
        f"{table} is no list of records but one {kind}{names}: medtune reads lists, COCO (images, "
        "annotations) and lists named train, val, test"
    )


def _lists_of_splits(value: dict) -> Iterator[Any] | None:
    """R2Gen's form: a list of records for each split; other keys hold notes about the set."""
    lists = {name: entry for name, entry in value.items() if isinstance(entry, list)}
    if not any(split_of_word(name) for name in lists):
        return None
    # a list of another name comes too: its records are rejected for their split, not lost
    return _with_splits(lists)


def _with_splits(lists: dict[str, list]) -> Iterator[Any]:
    for name, records in lists.items():
        for record in records:
            yield {**record, "split": name} if isinstance(record, dict) else record


def _columns(value: dict) -> Iterator[dict] | None:
    """Read a list, or an object by row numbers, for each column: what pandas writes by default."""
    if not {"image", "caption"} <= set(our_names(value, {}, "").values()):
        return None
    columns = {}
    for name, cells in value.items():
        if isinstance(cells, dict):
            columns[name] = cells
        elif isinstance(cells, list):
            columns[name] = dict(enumerate(cells))
        else:
            return None
    return _rows_of(columns)


def _rows_of(columns: dict[str, dict]) -> Iterator[dict]:
    rows: dict[Any, None] = {}
    for cells in columns.values():
        rows.update(dict.fromkeys(cells))
    for row in rows:
        yield {name: cells.get(row) for name, cells in columns.items()}


def _records_by_id(value: dict) -> Iterator[dict] | None:
    """Read an object that holds a record for each id."""
    if not value or not all(isinstance(record, dict) for record in value.values()):
        return None
    return ({"id": name} | record for name, record in value.items())


def _only_list(value: dict) -> Iterator[Any] | None:
    """Read the one list of records beside notes, as in {"version": ..., "data": [...]}."""
    lists = []
    for entry in value.values():
        if isinstance(entry, list) and entry and isinstance(entry[0], dict):
            lists.append(entry)
    return iter(lists[0]) if len(lists) == 1 else None


# --- COCO -----------------------------------------------------------------------------------------


def _coco(value: dict) -> Iterator[Any] | None:
    """Read COCO's form, where captions name their picture by number, or Karpathy's of the same."""
    images = value.get("images")
    if not isinstance(images, list):
        return None
    if isinstance(value.get("annotations"), list):
        return _coco_records(images, value["annotations"])
    if any(isinstance(image, dict) and "sentences" in image for image in images):
        return _karpathy_records(images)
    return None


def _coco_records(images: list, annotations: list) -> Iterator[Any]:
    captions: dict[Any, list] = {}
    for annotation in annotations:
        if isinstance(annotation, dict) and "caption" in annotation:
            captions.setdefault(annotation.get("image_id"), []).append(annotation["caption"])
        else:
            yield ValueError("an annotation has no caption: medtune learns texts, not boxes")
    known = set()
    for image in images:
        if not isinstance(image, dict):
            yield image
            continue
        known.add(image.get("id"))
        yield from _image_records(image, captions.get(image.get("id"), []))
    for number in captions:
        if number not in known:
            yield ValueError("an annotation has the image_id of no picture in images")


def _karpathy_records(images: list) -> Iterator[Any]:
    for image in images:
        if not isinstance(image, dict):
            yield image
            continue
        sentences = image.get("sentences") or []
        texts = [sentence.get("raw") for sentence in sentences if isinstance(sentence, dict)]
        yield from _image_records(image, texts)


def _image_records(image: dict, captions: list) -> Iterator[Any]:
    """Yield a record for each caption of a picture; those of one picture are of one group."""
    if not captions:
        yield ValueError("a picture in images has no caption")
    known = {name: cell for name, cell in image.items() if name != "sentences"}
    for number, caption in enumerate(captions, 1):
        record = known | {"caption": caption}
        if len(captions) > 1 and image.get("id") is not None:
            record["id"] = str(image["id"]) if number == 1 else f"{image['id']}-{number}"
            # the number of the picture among those of this file: nobody's name
            record.setdefault("group", f"picture-{image['id']}")
        yield record
