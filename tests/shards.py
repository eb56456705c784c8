"""Small sources of pairs for the tests of training records, and looks at what became of them."""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CAPTION = "The image is a CT scan of the upper abdomen. It shows the spleen, number {}."
CHINESE = "图像为上腹部的轴位CT，显示脾脏，编号{}。"


# --- make -------------------------------------------------------------------------------------


def picture(seed: int = 0, mode: str = "RGB", size: tuple[int, int] = (24, 16)) -> Image.Image:
    """A picture of noise in blocks of 4 x 4 pixels."""
    bands = {"L": (), "RGB": (3,), "RGBA": (4,), "CMYK": (4,)}[mode]
    width, height = size[0] // 4, size[1] // 4
    random = np.random.default_rng(seed)
    noise = random.integers(0, 256, (height, width, *bands), dtype=np.uint8)
    return Image.frombytes(mode, (width, height), noise.tobytes()).resize(size)


def encode(image: Image.Image, form: str = "JPEG", **options) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turned by 90 degrees
    return exif


# Motorola byte order, one entry: orientation 1, upright.
UPRIGHT = bytes.fromhex("4578696600004d4d002a00000008000101120003000000010001000000000000")

# Pictures whose bytes can be copied.
KEPT = {
    "rgb.jpg": encode(picture(1), quality=90),
    "grey.jpg": encode(picture(1, "L")),
    "progressive.jpg": encode(picture(1), progressive=True),
    "upright.jpg": encode(picture(1), exif=UPRIGHT),
    "padded.jpg": encode(picture(1)) + b"\0\0",
    "rgb.png": encode(picture(1), "PNG"),
    "grey.png": encode(picture(1, "L"), "PNG"),
}

_SIXTEEN_BITS = np.arange(24 * 16, dtype=np.uint16).reshape(16, 24) * 150

# Pictures that must be made anew, since not every reader shows them alike.
CHANGED = {
    "turned.jpg": encode(picture(2), exif=_turned()),
    "cmyk.jpg": encode(picture(2, "CMYK")),
    "palette.png": encode(picture(2).convert("P"), "PNG"),
    "rgba.png": encode(picture(2, "RGBA"), "PNG"),
    "sixteen.png": encode(Image.fromarray(_SIXTEEN_BITS), "PNG"),
    "animated.gif": encode(picture(2), "GIF", save_all=True, append_images=[picture(3)]),
    "animated.png": encode(picture(2), "PNG", save_all=True, append_images=[picture(3)]),
    "still.webp": encode(picture(2), "WEBP", lossless=True),
    "still.tif": encode(picture(2), "TIFF"),
}


def pair(number: int, **changes) -> dict:
    """A row that is fit for training, with changes."""
    row = {
        "id": f"id-{number:05d}",
        "caption": CAPTION.format(number),
        "image": encode(picture(number)),
    }
    return row | changes


def write_shard(file: Path, rows: list[dict], **options) -> Path:
    """A parquet shard as the hub has them; a column that a row lacks is null there."""
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    columns["image"] = [{"bytes": data, "path": None} for data in columns["image"]]
    pq.write_table(pa.table(columns), file, **options)
    return file


# --- look -------------------------------------------------------------------------------------


def json_lines(file: Path) -> list[dict]:
    """The records of a file; none if there is no such file."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def rejected(folder: Path) -> dict[str, str]:
    """The reason by id."""
    return {entry["id"]: entry["reason"] for entry in json_lines(folder / "rejected.jsonl")}


def tree(folder: Path) -> dict[str, str]:
    """A hash of each file in a folder, to tell whether two folders are equal."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
