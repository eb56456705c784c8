"""Cut out what lies in a box, and look closely at a box and what is around it.

A box is (x0, y0, x1, y1) in shares of width and height; a view is a box that may leave the picture.
"""

from collections.abc import Sequence

from PIL import Image

Box = tuple[float, float, float, float]


def crop_box(image: Image.Image, box: Sequence[float]) -> Image.Image:
    """Cut out what lies in a box; what lies outside of the picture is black.

    Parameters
    ----------
    image : a picture in any mode.
    box : (x0, y0, x1, y1) as shares of width and height.

    Returns
    -------
    PIL.Image.Image : the part, in the mode of the picture.

    Examples
    --------
    >>> crop_box(Image.new("L", (200, 100)), (0.25, 0.5, 0.75, 1.0)).size
    (100, 50)
    """
    x0, y0, x1, y1 = box
    width, height = image.size
    edges = (x0 * width, y0 * height, x1 * width, y1 * height)
    return image.crop(tuple(round(edge) for edge in edges))


def view_around(box: Sequence[float], *, scale: float = 1.2) -> Box:
    """Give the view that shows a box in its middle, with a rim around it.

    Parameters
    ----------
    box : (x0, y0, x1, y1) as shares of width and height.
    scale : the sides of the view are so many times the longer side of the box.

    Returns
    -------
    tuple : the view, which may leave the picture.

    Examples
    --------
    >>> view_around((0.25, 0.25, 0.75, 0.5), scale=2)
    (0.0, -0.125, 1.0, 0.875)
    """
    x0, y0, x1, y1 = box
    side = scale * max(x1 - x0, y1 - y0)
    left = (x0 + x1 - side) / 2
    top = (y0 + y1 - side) / 2
    return left, top, left + side, top + side


def magnify_box(image: Image.Image, box: Sequence[float], *, scale: float = 1.1) -> Image.Image:
    """Show a box and a thin rim around it, enlarged to a square as wide as the picture's longer side.

    Small things in a region are lost when a whole picture is scaled down to what a model takes;
    beside the picture, this second one keeps them.

    Parameters
    ----------
    image : a picture in any mode.
    box : (x0, y0, x1, y1) as shares of width and height.
    scale : the sides of what is shown are so many times the longer side of the box.

    Returns
    -------
    PIL.Image.Image : the square, in the mode of the picture; black where it leaves the picture.

    Raises
    ------
    ValueError : the box is empty or not within the picture.

    Examples
    --------
    >>> magnify_box(Image.new("L", (200, 100)), (0.25, 0.5, 0.75, 1.0)).size
    (200, 200)
    """
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
        raise ValueError(f"box={[round(edge, 3) for edge in box]} is no part of the picture")
    width, height = image.size
    # at least two pixels, or there is nothing to enlarge
    half = max(scale * max((x1 - x0) * width, (y1 - y0) * height) / 2, 1)
    x, y = (x0 + x1) / 2 * width, (y0 + y1) / 2 * height
    part = image.crop((round(x - half), round(y - half), round(x + half), round(y + half)))
    side = max(width, height)
    return part.resize((side, side), Image.Resampling.BICUBIC)


def box_in_view(box: Sequence[float], view: Sequence[float]) -> Box:
    """Say where a box of the picture lies in a view of it.

    Parameters
    ----------
    box : (x0, y0, x1, y1) as shares of width and height of the picture.
    view : the same of the view.

    Returns
    -------
    tuple : the box as shares of width and height of the view.

    Examples
    --------
    >>> box_in_view((0.25, 0.5, 0.5, 0.75), (0.0, 0.5, 0.5, 1.0))
    (0.5, 0.0, 1.0, 0.5)
    """
    x0, y0, x1, y1 = box
    left, top, right, bottom = view
    width = right - left
    height = bottom - top
    return (x0 - left) / width, (y0 - top) / height, (x1 - left) / width, (y1 - top) / height
