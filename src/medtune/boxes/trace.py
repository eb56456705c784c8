"""Measure the trace that a box leaves in the pixels beneath its outline, drawn or erased.

Needs numpy and pillow.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

# The band around the upper edge: so many rows above it and from it on downwards.
_ABOVE = 2
_BELOW = 6
# The corners are left out: there the left and the right edge begin.
_CORNER = 4


def edge_differences(image: Image.Image, box: Sequence[float]) -> list[float]:
    """Say how much neighbouring pixels differ in a band along the upper edge of a box.

    Noise differs from pixel to pixel, a line that was drawn ends sharply, and paint over an erased
    line is smooth. So these numbers tell a linear probe what the eye does not see.

    Parameters
    ----------
    image : PIL.Image.Image
        A picture in any mode.
    box : sequence of float
        (x0, y0, x1, y1) as shares of width and height, 0..1.

    Returns
    -------
    list of float
        Means of absolute differences in grey, 0..255: 7 from each row of the band to the next, and
        8 from pixel to pixel within each row.

    Raises
    ------
    ValueError
        If the band leaves the picture, or the box is too narrow for one.

    Examples
    --------
    >>> from PIL import Image, ImageDraw
    >>> picture = Image.new("L", (200, 100), 100)
    >>> ImageDraw.Draw(picture).rectangle((50, 10, 99, 59), outline=255, width=3)
    >>> edge_differences(picture, (0.25, 0.1, 0.5, 0.6))[:7]
    [0.0, 155.0, 0.0, 0.0, 155.0, 0.0, 0.0]
    """
    grey = np.asarray(image.convert("L")).astype(float)
    height, width = grey.shape
    x0, y0, x1, _ = box
    top = int(y0 * height)
    left = int(x0 * width) + _CORNER
    right = int(x1 * width) - _CORNER
    if top < _ABOVE or top + _BELOW > height or right - left < 2:
        raise ValueError(
            f"box {tuple(box)} has no band along its upper edge: it must stand {_ABOVE} pixels"
            f" below the upper edge of the picture, and be {2 * _CORNER + 2} pixels wide"
        )
    band = grey[top - _ABOVE : top + _BELOW, left:right]
    from_row_to_row = np.abs(np.diff(band, axis=0)).mean(axis=1)
    within_rows = np.abs(np.diff(band, axis=1)).mean(axis=1)
    return [*from_row_to_row.tolist(), *within_rows.tolist()]
