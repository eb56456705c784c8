"""Draw the outline of a box into a picture, erase one, compare boxes and name their place.

Needs numpy, pillow and opencv-python-headless.

A box is (x0, y0, x1, y1): its outer edges as shares of width and height, 0..1.
"""

import io
from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image, ImageDraw

_ROWS = ("upper", "middle", "lower")
_COLUMNS = ("left", "middle", "right")


def draw_box(
    image: Image.Image,
    box: Sequence[float],
    *,
    width: int = 3,
    color: tuple[int, int, int] = (0, 255, 0),
) -> Image.Image:
    """Copy a picture and draw the outline of a box, `width` pixels inward from its outer edges.

    Parameters
    ----------
    image : PIL.Image.Image
        A picture in any mode.
    box : sequence of float
        (x0, y0, x1, y1) as shares of width and height, 0..1.
    width : int, default 3
        Thickness of the line in pixels.
    color : tuple of int, default green
        Red, green and blue of the line, 0..255.

    Returns
    -------
    PIL.Image.Image
        A new picture in mode RGB.

    Raises
    ------
    ValueError
        If the box leaves the picture, is empty, or is thinner than its line.

    Examples
    --------
    >>> from PIL import Image
    >>> picture = Image.new("RGB", (200, 100), "gray")
    >>> drawn = draw_box(picture, (0.25, 0.1, 0.5, 0.6))
    >>> drawn.getpixel((50, 10)), drawn.getpixel((53, 13))
    ((0, 255, 0), (128, 128, 128))
    """
    x0, y0, x1, y1 = _in_pixels(image, box)
    if not 1 <= width <= min(x1 - x0, y1 - y0) / 2:
        raise ValueError(
            f"a line of {width} pixels does not fit a box of {x1 - x0} x {y1 - y0} pixels"
        )
    copy = image.convert("RGB").copy()
    # Pillow includes the last pixel, a box does not
    corners = (x0, y0, x1 - 1, y1 - 1)
    ImageDraw.Draw(copy).rectangle(corners, outline=tuple(color), width=width)
    return copy


def erase_box(
    image: Image.Image,
    box: Sequence[float],
    *,
    width: int = 3,
    decoys: Sequence[Sequence[float]] = (),
) -> Image.Image:
    """Copy a picture and paint over the drawn outline of a box from its surroundings.

    This hides a box from the eye, not from a model: the smooth band that is left is a trace, and a
    linear probe on pixels around the edges still tells erased from never drawn
    (`tests/test_boxes.py` reports its AUROC). To train without a drawn box, use pictures that never
    had one; where there are none, `decoys` leave the same trace elsewhere, so that the trace no
    longer says which box was there.

    Parameters
    ----------
    image : PIL.Image.Image
        A picture in any mode.
    box : sequence of float
        (x0, y0, x1, y1) as shares of width and height, 0..1.
    width : int, default 3
        Thickness of the drawn line in pixels.
    decoys : sequence of boxes
        Boxes of which outlines are drawn like this one, and erased with it. Of a JPEG, as Pillow
        opened it, they are compressed like the rest in between. Best are the boxes of other
        pictures: then neither place nor size tells which one is true.

    Returns
    -------
    PIL.Image.Image
        A new picture in mode RGB.

    Raises
    ------
    ValueError
        If a box leaves the picture or is empty, or a decoy is thinner than its line.

    Examples
    --------
    >>> from PIL import Image, ImageDraw
    >>> picture = Image.new("RGB", (200, 100), "gray")
    >>> ImageDraw.Draw(picture).rectangle((50, 10, 99, 59), outline=(0, 255, 0), width=3)
    >>> erase_box(picture, (0.25, 0.1, 0.5, 0.6)).getpixel((50, 10))
    (128, 128, 128)
    """
    drawn = image.convert("RGB")
    if decoys:
        drawn = _draw_alike(image, box, decoys, width)
    mask = np.zeros((image.height, image.width), np.uint8)
    for outline in (box, *decoys):
        mask |= _mask_outline(image, outline, width)
    pixels = np.asarray(drawn)
    if _is_grey(pixels[mask == 0]):
        # all colour here comes from lines, and JPEG spreads it farther than a mask can reach
        pixels = np.asarray(drawn.convert("L").convert("RGB"))
    painted = cv2.inpaint(pixels, mask, 3, cv2.INPAINT_TELEA)
    return Image.fromarray(painted)


def _is_grey(pixels: np.ndarray) -> bool:
    """Tell whether pixels, (n, 3), are grey but for a few."""
    if not len(pixels):
        return False
    return bool(np.percentile(np.ptp(pixels, axis=1), 90) < 8)


def _draw_alike(
    image: Image.Image, box: Sequence[float], decoys: Sequence[Sequence[float]], width: int
) -> Image.Image:
    """Draw decoys in the colour of an outline that is there, and compress them as it was."""
    x0, y0, x1, y1 = _in_pixels(image, box)
    pixels = np.asarray(image.convert("RGB"))
    upper_side = pixels[y0 : y0 + width, x0:x1].reshape(-1, 3)
    lower_side = pixels[y1 - width : y1, x0:x1].reshape(-1, 3)
    colour = np.median(np.concatenate([upper_side, lower_side]), axis=0).astype(int)
    drawn = image.convert("RGB")
    for decoy in decoys:
        drawn = draw_box(drawn, decoy, width=width, color=tuple(colour.tolist()))
    # only what comes fresh from a file of this kind has these tables
    tables = getattr(image, "quantization", None)
    if image.format != "JPEG" or not tables:
        return drawn
    file = io.BytesIO()
    # a line of one colour is the same in 4:2:0, which nearly all JPEG files are
    drawn.save(file, "JPEG", qtables=tables, subsampling="4:2:0")
    return Image.open(file).convert("RGB")


def _mask_outline(image: Image.Image, box: Sequence[float], width: int) -> np.ndarray:
    """Mark the outline of a box, and what JPEG spreads of it, with 255 in (height, width)."""
    x0, y0, x1, y1 = _in_pixels(image, box)
    # JPEG spreads the colour of a line by up to 2 pixels
    spread = 2
    mask = np.zeros((image.height, image.width), np.uint8)
    mask[max(y0 - spread, 0) : y1 + spread, max(x0 - spread, 0) : x1 + spread] = 255
    # the inside stays as it is; an end below 0 would count from the other side of the picture
    inset = width + spread
    mask[y0 + inset : max(y1 - inset, 0), x0 + inset : max(x1 - inset, 0)] = 0
    return mask


def _in_pixels(image: Image.Image, box: Sequence[float]) -> tuple[int, int, int, int]:
    """Check a box and turn its shares into pixels."""
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
        raise ValueError(
            f"box {tuple(box)} is not x0 < x1 and y0 < y1 within 0..1:"
            " give shares of width and height"
        )
    width, height = image.size
    return round(x0 * width), round(y0 * height), round(x1 * width), round(y1 * height)


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Compute the intersection over union of two boxes.

    Parameters
    ----------
    a, b : sequence of float
        (x0, y0, x1, y1) of each, both in the same units.

    Returns
    -------
    float
        0..1: 1 for equal boxes, 0 where they do not meet or one is empty.

    Examples
    --------
    >>> iou((0, 0, 2, 1), (1, 0, 3, 1))
    0.3333333333333333
    """
    width = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    intersection = width * height
    union = area_share(a) + area_share(b) - intersection
    return intersection / union if union > 0 else 0.0


def area_share(box: Sequence[float]) -> float:
    """Compute the share of the picture that a box covers.

    Parameters
    ----------
    box : sequence of float
        (x0, y0, x1, y1) as shares of width and height, 0..1.

    Returns
    -------
    float
        0..1; 0 for an empty box.

    Examples
    --------
    >>> area_share((0.25, 0.5, 0.75, 1.0))
    0.25
    """
    x0, y0, x1, y1 = box
    return max(0, x1 - x0) * max(0, y1 - y0)


def place_of(box: Sequence[float]) -> str:
    """Name where the centre of a box lies on the picture's 3x3 grid.

    Parameters
    ----------
    box : sequence of float
        (x0, y0, x1, y1) as shares of width and height, 0..1.

    Returns
    -------
    str
        "upper left", "upper middle" and so on; "center" in the middle. Left is the left of the
        picture, not of the patient.

    Examples
    --------
    >>> place_of((0.0, 0.0, 0.2, 0.2))
    'upper left'
    >>> place_of((0.4, 0.4, 0.6, 0.6))
    'center'
    >>> place_of((0.4, 0.7, 0.6, 1.0))
    'lower middle'
    """
    x0, y0, x1, y1 = box
    # a centre on the right or lower edge of the picture still lies in the last third
    column = min(int(3 * (x0 + x1) / 2), 2)
    row = min(int(3 * (y0 + y1) / 2), 2)
    if (row, column) == (1, 1):
        return "center"
    return f"{_ROWS[row]} {_COLUMNS[column]}"
