"""Judge a single pair, and make any picture an upright RGB one.

Needs numpy and pillow.
"""

import io
import os
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

# Control characters, lone surrogates (UTF-8 cannot hold them) and the sign for undecodable bytes.
_NOT_IN_ID = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff\ufffd]")
_NOT_IN_CAPTION = re.compile(r"[\x00\ud800-\udfff\ufffd]")
# An id becomes a file name: neither a separator of folders nor a dot in front ("..", hidden files).
_LEAVES_FOLDER = re.compile(r"[/\\]|^\.")
# A word is a run of signs between spaces; Chinese has no spaces, so each of its signs is one.
_WORD = re.compile(r"[\u3400-\u9fff]|[^\s\u3400-\u9fff]+")
# Pillow names the stream it read, with its address in memory: another one in every run.
_ADDRESS = re.compile(r" ?<[^<>]* at 0x[0-9a-fA-F]+>")
# What programs write where there is no text. "None" is not among them: it is an answer too.
NO_TEXT = {"nan", "<na>", "nat", "null"}
# File systems allow 255 bytes for a name: this leaves room for a number and a suffix.
_MAX_ID_BYTES = 200


def picture_bytes(cell: dict | bytes | str | os.PathLike | None) -> bytes:
    """Give the bytes of a picture as the source holds them.

    Parameters
    ----------
    cell : dict, bytes, str or Path
        `{"bytes": ..., "path": ...}` as `datasets.Image(decode=False)` gives it (the bytes count,
        if there are any), the bytes themselves, or the path of a file.

    Returns
    -------
    bytes
        The encoded picture, such as the content of a JPEG file.

    Raises
    ------
    ValueError
        There is neither bytes nor path.
    OSError
        The file cannot be read.

    Examples
    --------
    >>> picture_bytes({"bytes": b"GIF89a", "path": None})
    b'GIF89a'
    """
    if isinstance(cell, dict):
        content = cell.get("bytes")
        # empty bytes are a picture of zero bytes, which somebody else shall judge
        cell = content if content is not None else cell.get("path")
    if cell is None:
        raise ValueError("there is no picture")
    if isinstance(cell, bytes):
        return cell
    return Path(cell).read_bytes()


def to_rgb(image: Image.Image) -> Image.Image:
    """Make any picture an upright RGB one.

    The first frame of an animation; EXIF rotation applied; 16-bit and float values stretched from
    the picture's darkest to its brightest to 0..255 (absolute values are lost: window DICOM files
    instead); transparency over black, the background of a radiograph; palette, grey, CMYK and the
    rest converted.

    Parameters
    ----------
    image : PIL.Image.Image
        A picture of any mode; an animation is wound back to its first frame.

    Returns
    -------
    PIL.Image.Image
        A picture in mode RGB, of the same size or, after a rotation by 90 degrees, with width and
        height exchanged.

    Examples
    --------
    >>> to_rgb(Image.new("RGBA", (2, 2), (255, 255, 255, 0))).getpixel((0, 0))
    (0, 0, 0)
    """
    if getattr(image, "n_frames", 1) > 1:
        image.seek(0)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # 16 and 32 bits, and floats
        image = _stretched(image)
    if image.has_transparency_data:
        image = _over_black(image)
    return image.convert("RGB")


def _stretched(image: Image.Image) -> Image.Image:
    """Stretch values from the darkest to the brightest to 0..255.

    Pillow's own conversion of such pictures cuts off what is above 255: all is white.
    """
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    low = values.min()
    high = values.max()
    spread = max(high - low, 1e-12)  # a flat picture becomes black, not a division by zero
    levels = (values - low) * (255 / spread)
    return Image.fromarray((levels + 0.5).astype(np.uint8))


def _over_black(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    black = Image.new("RGBA", image.size, (0, 0, 0, 255))
    return Image.alpha_composite(black, image)


def reject_reason(row: dict, *, max_pixels: int = 50_000_000, max_words: int = 2_000) -> str | None:
    """Say why a pair must not be trained on, or None when it is fine.

    Parameters
    ----------
    row : dict
        `id`, `caption` and `image`: a cell as `datasets.Image(decode=False)` gives it, bytes, a
        path, or a PIL image. The picture is decoded to the end, a JPEG at 1/8 of its size, which
        finds a cut one at a fraction of the cost. A `problem` that the loader noted is the reason.
    max_pixels : int
        The most pixels that a picture may have.
    max_words : int
        The most words that a caption may have; a Chinese sign counts as a word.

    Returns
    -------
    str or None
        One line that starts with the column. The function never raises because of a bad pair.

    Examples
    --------
    >>> reject_reason({"id": "a", "caption": " ", "image": b""})
    'caption: is empty'
    >>> reject_reason({"id": "../a", "caption": "A liver.", "image": b""})
    "id: '../a' would leave a folder; use letters, digits, '.', '_' and '-'"
    """
    if row.get("problem"):
        return row["problem"]
    # the cheap questions first: decoding a picture takes a thousand times as long
    return (
        _id_problem(row.get("id"))
        or _caption_problem(row.get("caption"), max_words)
        or _picture_problem(row.get("image"), max_pixels)
    )


def _id_problem(name: Any) -> str | None:
    if not isinstance(name, str) or not name.strip():
        return "id: is empty"
    if len(name.encode("utf-8", "replace")) > _MAX_ID_BYTES:
        return f"id: has {len(name)} characters, more than {_MAX_ID_BYTES} bytes"
    if _NOT_IN_ID.search(name):
        return f"id: {name!r} holds a control character or one that is not valid Unicode"
    if _LEAVES_FOLDER.search(name):
        return f"id: {name!r} would leave a folder; use letters, digits, '.', '_' and '-'"
    return None


def _caption_problem(caption: Any, max_words: int) -> str | None:
    if not isinstance(caption, str) or caption.strip().lower() in {"", *NO_TEXT}:
        return "caption: is empty"
    if _NOT_IN_CAPTION.search(caption):
        return "caption: holds characters that are not valid Unicode (surrogates, U+FFFD or NUL)"
    words = len(_WORD.findall(caption))
    if words > max_words:
        return f"caption: has {words} words, more than {max_words}"
    return None


def _picture_problem(picture: Any, max_pixels: int) -> str | None:
    try:
        if isinstance(picture, Image.Image):
            image = picture
        else:
            data = picture_bytes(picture)
            if not data:
                return "image: has zero bytes"
            image = _opened(data)
        if image.width * image.height > max_pixels:
            size = f"{image.width} x {image.height}"
            return f"image: {size} pixels, more than {max_pixels} (a decompression bomb?)"
        # Only a JPEG follows this wish, and is then decoded at 1/8 of its size.
        image.draft("L", (max(1, image.width // 8), max(1, image.height // 8)))
        image.load()
    except Exception as error:  # decoders raise many kinds
        words = _ADDRESS.sub("", " ".join(str(error).split()))[:300] or type(error).__name__
        return f"image: cannot be decoded ({words})"
    return None


def _opened(data: bytes) -> Image.Image:
    """Read the head of a picture; Pillow warns about large ones, and our own limit comes next."""
    with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
        return Image.open(io.BytesIO(data))
