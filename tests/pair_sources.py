"""Small sources of pairs for the tests of loading: JPEG files, parquet, tables, and a refusal."""

import csv
import hashlib
import hmac
import io
import json
import os
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from medtune.pairs import load_pairs

AS_BYTES = datasets.Image(decode=False)


# What programs write where there is no text: no captions.
NO_TEXT = {"nan", "<na>", "nat", "null"}


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    """The bytes of a picture file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg(value: int = 90, size: tuple[int, int] = (24, 16)) -> bytes:
    """A JPEG file of a ramp that begins at a grey value."""
    ramp = np.add.outer(np.arange(size[1]), np.arange(size[0])).astype(np.uint8) + np.uint8(value)
    return encoded(Image.fromarray(ramp).convert("RGB"), "JPEG")


def image_id(content: bytes) -> str:
    """The id that a plain picture gets where the source gives none."""
    salt = os.environ["MEDTUNE_SALT"].encode()
    return "image-" + hmac.new(salt, content, hashlib.sha256).hexdigest()[:16]


def group_of(patient: str) -> str:
    """The group that a patient's number becomes."""
    salt = os.environ["MEDTUNE_SALT"].encode()
    return "patient-" + hmac.new(salt, patient.encode(), hashlib.sha256).hexdigest()[:12]


def write_parquet(path: Path, rows: int = 3, start: int = 0, **columns) -> Path:
    """Write pairs; `columns` replaces a column, adds one or, where it is None, leaves it out."""
    numbers = range(start, start + rows)
    table = {
        "image": [{"bytes": jpeg(number), "path": None} for number in numbers],
        "id": [f"id-{number}" for number in numbers],
        "caption": [f"caption {number}" for number in numbers],
    }
    table |= columns
    kept = {name: values for name, values in table.items() if values is not None}
    pq.write_table(pa.table(kept), path)
    return path


def write_table(path: Path, records: list[dict]) -> Path:
    """Write records as CSV, TSV, JSON or JSON Lines, by the suffix."""
    if path.suffix in (".csv", ".tsv"):
        separator = "\t" if path.suffix == ".tsv" else ","
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, records[0], delimiter=separator)
            writer.writeheader()
            writer.writerows(records)
        return path
    if path.suffix == ".json":
        path.write_text(json.dumps(records), "utf-8")
        return path
    lines = [json.dumps(record) + "\n" for record in records]
    path.write_text("".join(lines), "utf-8")
    return path


def folder_of_pictures(folder: Path) -> Path:
    """Put images/a.jpg, b.jpg and c.jpg into a folder, each brighter than the one before."""
    (folder / "images").mkdir()
    for number, name in enumerate("abc"):
        (folder / "images" / f"{name}.jpg").write_bytes(jpeg(40 * number))
    return folder


def refused(kind: type[Exception] | tuple, pattern: str, *args, **options) -> str:
    """Load what cannot be loaded; the message is one line, as the command line prints it."""
    with pytest.raises(kind, match=pattern) as caught:
        load_pairs(*args, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message
