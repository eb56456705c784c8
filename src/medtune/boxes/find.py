"""Find the green rectangles that are drawn as outlines in a picture.

Needs numpy, pillow and opencv-python-headless.

Published image-text sets mark regions with a green rectangle, mostly saved as JPEG with 4:2:0
chroma: the colour of a line then lies on a grid of 2x2 pixels, its brightness keeps every pixel. So
colour finds a line here, and brightness places it. In four steps:

1. `_guess_boxes`: pixels that are greener than what is around them, in thin lines; lines become
   strokes, and strokes in pairs become guesses, each a few pixels off at most.
2. `_refine`: every guess is moved, side by side, to where a line of 1 to 6 pixels fits best.
3. `_contrast`: is it one closed line of one green, and does it stand out? Else it is no box.
4. `_without_echoes` and `_fewest_that_draw_all`: one line may be found several times, and boxes
   that cross frame further rectangles; those go.

Boxes inside this file are (x0, y0, x1, y1) in whole pixels, half-open: x1 is the first column that
is outside. A plane is an array (height, width), a strip one side of a box with what lies around it.
"""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

# Pixels of a strip outside and inside the edge of a box: enough for the widest line, for its colour
# that JPEG spreads, and for some of what is around.
_OUTSIDE = 10
_INSIDE = 14

# How many pixels a guess may be off at each side, and the places tried for it: -4..4.
_REACH = 4
_SHIFTS = np.arange(-_REACH, _REACH + 1)

# Widths of a line that are tried, in pixels.
_WIDTHS = np.arange(1, 7)

# Index that turns (x0, y0, x1, y1) into (y0, x0, y1, x1): what is made for upright lines then does
# for level ones.
_SWAP_XY = [1, 0, 3, 2]

_Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Outline:
    """A rectangle that is drawn in a picture.

    Parameters
    ----------
    box : tuple of float
        (x0, y0, x1, y1), outer edges, as shares of width and height, 0..1.
    width : int
        Thickness of the line in pixels; it goes inward from the outer edges.
    """

    box: tuple[float, float, float, float]
    width: int


@dataclass
class _Frame:
    """A rectangle that was found."""

    #: How many grey levels greener the line is than what is around it, at its weakest side.
    contrast: float
    box: _Box
    #: Of the line, in pixels.
    width: int

    def area(self) -> int:
        x0, y0, x1, y1 = self.box
        return (x1 - x0) * (y1 - y0)


def find_box(
    image: Image.Image | np.ndarray,
) -> tuple[float, float, float, float] | None:
    """Find the largest green rectangle that is drawn as an outline in a picture.

    Parameters
    ----------
    image : PIL.Image.Image or numpy.ndarray
        Any mode, or uint8 of shape (height, width, 3).

    Returns
    -------
    tuple of float or None
        (x0, y0, x1, y1), outer edges, as shares of width and height, 0..1; None without a box.

    Examples
    --------
    >>> from PIL import Image
    >>> find_box(Image.new("RGB", (200, 100), "gray")) is None
    True
    """
    boxes = find_boxes(image)
    return boxes[0] if boxes else None


def find_boxes(
    image: Image.Image | np.ndarray,
) -> list[tuple[float, float, float, float]]:
    """Find all green rectangles that are drawn as outlines in a picture, the largest first.

    Meant for lines 1 to 6 pixels thick and at most a quarter of the side, sides from 8 pixels,
    green over red and blue by 60 or more. Green areas, circles, text and open frames are no boxes;
    now and then a small "B" passes for one.

    Parameters
    ----------
    image : PIL.Image.Image or numpy.ndarray
        Any mode, or uint8 of shape (height, width, 3).

    Returns
    -------
    list of tuple of float
        (x0, y0, x1, y1) of each box, outer edges, as shares of width and height, 0..1.

    Examples
    --------
    Pillow draws the line inward from the edges, and includes the last pixel:

    >>> from PIL import Image, ImageDraw
    >>> image = Image.new("RGB", (200, 100), "gray")
    >>> ImageDraw.Draw(image).rectangle((50, 10, 99, 59), outline=(0, 255, 0), width=3)
    >>> find_boxes(image)
    [(0.25, 0.1, 0.5, 0.6)]
    """
    return [outline.box for outline in find_outlines(image)]


def find_outlines(image: Image.Image | np.ndarray) -> list[Outline]:
    """Find the same as `find_boxes`, and say how thick each line is.

    Parameters
    ----------
    image : PIL.Image.Image or numpy.ndarray
        Any mode, or uint8 of shape (height, width, 3).

    Returns
    -------
    list of Outline
        Box and thickness of each, the largest first.

    Examples
    --------
    >>> from PIL import Image, ImageDraw
    >>> image = Image.new("RGB", (200, 100), "gray")
    >>> ImageDraw.Draw(image).rectangle((50, 10, 99, 59), outline=(0, 255, 0), width=3)
    >>> find_outlines(image)
    [Outline(box=(0.25, 0.1, 0.5, 0.6), width=3)]
    """
    planes = _colour_planes(image)
    greenness = planes[..., 1:].min(-1)
    high, wide = greenness.shape
    if min(high, wide) < 8:
        return []
    # a grey picture, as most are: nothing is greener than the rest
    if np.ptp(greenness) < 5:
        return []
    frames = _frames_near(_guess_boxes(greenness), planes)
    outlines = []
    for frame in _fewest_that_draw_all(_without_echoes(frames)):
        x0, y0, x1, y1 = frame.box
        box = (x0 / wide, y0 / high, x1 / wide, y1 / high)
        outlines.append(Outline(box, frame.width))
    return outlines


def _colour_planes(image: Image.Image | np.ndarray) -> np.ndarray:
    """Turn a picture into (height, width, 3): brightness, green minus red, green minus blue."""
    rgb = np.asarray(image.convert("RGB") if hasattr(image, "convert") else image)
    red, green, blue = np.moveaxis(rgb[..., :3].astype(np.float32), -1, 0)
    brightness = 0.299 * red + 0.587 * green + 0.114 * blue  # as JPEG weighs them
    return np.stack([brightness, green - red, green - blue], -1)


def _frames_near(guesses: np.ndarray, planes: np.ndarray) -> list[_Frame]:
    """Refine every guess and keep what is a drawn frame; the same box comes once."""
    # whatever is green in a picture that is grey elsewhere was drawn, however pale it is
    picture_is_grey = np.median(np.abs(planes[..., 1:])) < 3
    least_green = 8 if picture_is_grey else 20
    margin = (_OUTSIDE, _OUTSIDE)
    padded = np.pad(planes, (margin, margin, (0, 0)), constant_values=np.nan)
    frames = []
    seen = set()
    for guess in guesses.tolist():
        box, width = _refine(padded, tuple(guess))
        if box is None or box in seen:
            continue
        seen.add(box)
        contrast = _contrast(padded, box, width, least_green)
        if contrast is not None:
            frames.append(_Frame(contrast, box, width))
    return frames


# ------------------------------------------------------------ 1. from pixels to guesses


def _guess_boxes(greenness: np.ndarray) -> np.ndarray:
    """Guess boxes, (n, 4), whose four sides are covered by thin green lines.

    A picture with a box that touches other green, or has pale sides, gives a broken line. So the
    sides are put together in several ways, and `_best_boxes` sorts the guesses out.
    """
    # A level line is thin from top to bottom: it goes under an opening of 17 rows.
    level_mask = _line_mask(greenness, opening=(17, 1), blur=(9, 1))
    upright_mask = _line_mask(greenness, opening=(1, 17), blur=(1, 9))
    any_mask = _line_mask(greenness, opening=(17, 17))
    coverage = _Coverage.of_masks(level_mask | any_mask, upright_mask | any_mask)

    # from pairs of upright strokes, and from pairs of level ones
    upright_strokes = _straight_strokes(upright_mask, opening=(11, 1))
    level_strokes = _straight_strokes(level_mask, opening=(1, 11))
    upright = _best_boxes(_pair_up(upright_strokes), coverage, count=150, least_covered=0, apart=1)
    from_level = _pair_up(level_strokes[:, _SWAP_XY])[:, _SWAP_XY]
    level = _best_boxes(from_level, coverage, count=150, least_covered=0, apart=1)

    # left and right of the one, top and bottom of the other, where they nearly agree
    distance = np.abs(upright[:, None] - level).max(-1)
    i, j = np.nonzero(distance <= 14)
    mixed = np.stack([upright[i, 0], level[j, 1], upright[i, 2], level[j, 3]], 1)

    # a closed line is one connected part, and its bounds are the box
    whole = _part_bounds(any_mask)
    guesses = np.concatenate([whole, upright, level, mixed])
    return _best_boxes(guesses, coverage, count=60, least_covered=0.5, apart=2)


def _line_mask(
    greenness: np.ndarray, opening: tuple[int, int], blur: tuple[int, int] | None = None
) -> np.ndarray:
    """Mark, with 1 in an array (height, width) of uint8, the pixels of thin green lines.

    `opening` is (rows, columns): what is greener than its surroundings and does not fill so many
    rows and columns stands out. `blur` is (columns, rows), along the line, against noise.
    """
    if blur:
        greenness = cv2.blur(greenness, blur)
    # the green that remains without anything thin: the ground that a line is drawn on
    ground = cv2.morphologyEx(
        greenness,
        cv2.MORPH_OPEN,
        np.ones(opening, np.uint8),
        borderType=cv2.BORDER_REPLICATE,
    )
    height_of_line = greenness - ground
    # JPEG spreads a line: only what is over half of the peak within 4 pixels belongs to it
    around = np.ones([min(size, 9) for size in opening], np.uint8)
    peak = cv2.dilate(height_of_line, around)
    # over the noise, and over a tenth of what the faintest line (60) adds to its ground
    noise = max(4, 2 * np.median(height_of_line))
    least = np.maximum(noise, 0.1 * (60 - ground))
    return ((height_of_line > 0.5 * peak) & (height_of_line > least)).astype(np.uint8)


def _part_bounds(mask: np.ndarray) -> np.ndarray:
    """Return the bounds, (n, 4), of the connected parts of a mask, the 200 longest."""
    _, _, stats, _ = cv2.connectedComponentsWithStats(mask)
    x, y, width, height, _ = stats[1:].astype(int).T  # part 0 is the background
    return _longest(x, y, width, height)


def _straight_strokes(mask: np.ndarray, opening: tuple[int, int]) -> np.ndarray:
    """Return the bounds, (n, 4), of straight strokes in a mask, the 200 longest.

    `opening` is (rows, columns): a stroke is at least as long as that. Its thickness is its area
    over its length, around its centre of mass, so that what touches a stroke does not move it.
    """
    mask = cv2.morphologyEx(mask, cv2.MORPH_OPEN, np.ones(opening, np.uint8))
    _, _, stats, centres = cv2.connectedComponentsWithStats(mask)
    x, y, width, height, area = stats[1:].astype(int).T
    centre_x, centre_y = centres[1:].T + 0.5  # cv2 counts from the middle of a pixel
    upright = opening[0] > 1
    if upright:
        width = area / height
        x = centre_x - width / 2
    else:
        height = area / width
        y = centre_y - height / 2
    return _longest(x, y, width, height)


def _longest(x: np.ndarray, y: np.ndarray, width: np.ndarray, height: np.ndarray) -> np.ndarray:
    """Return the bounds, (n, 4) of int, of the 200 longest of some parts."""
    order = np.argsort(-np.maximum(width, height), kind="stable")
    bounds = np.stack([x, y, x + width, y + height], 1)
    return bounds[order][:200].round().astype(int)


def _pair_up(strokes: np.ndarray) -> np.ndarray:
    """Return the boxes, (n, 4), whose left and right sides are two upright strokes that match.

    Strokes match when they stand side by side over more than 40% of the height that both cover
    together. Each pair gives three boxes: as high as both together, as the left one, as the right
    one.
    """
    i, j = np.nonzero(strokes[:, None, 0] < strokes[None, :, 0])  # i is left of j
    tops = np.stack([strokes[i, 1], strokes[j, 1]])
    bottoms = np.stack([strokes[i, 3], strokes[j, 3]])
    shared = bottoms.min(0) - tops.max(0)
    together = bottoms.max(0) - tops.min(0)
    match = shared > 0.4 * together
    tops = tops[:, match]
    bottoms = bottoms[:, match]

    left = strokes[i[match], 0]
    right = strokes[j[match], 2]
    as_both = np.stack([left, tops.min(0), right, bottoms.max(0)], 1)
    as_left = np.stack([left, tops[0], right, bottoms[0]], 1)
    as_right = np.stack([left, tops[1], right, bottoms[1]], 1)
    return np.concatenate([as_both, as_left, as_right])


@dataclass
class _Coverage:
    """How many pixels of any side of any box lie on a green line, or at most 3 pixels beside it.

    The entries are sums from the edge of the picture on, so that the count for a side is the
    difference of two of them, however long it is.
    """

    #: (height, width + 1): in row y, the pixels before column x that lie on a level line.
    level: np.ndarray
    #: (width, height + 1): in column x, the pixels above row y that lie on an upright line.
    upright: np.ndarray

    @classmethod
    def of_masks(cls, level_mask: np.ndarray, upright_mask: np.ndarray) -> "_Coverage":
        """Count in two masks (height, width) of lines."""
        turned = np.ascontiguousarray(upright_mask.T)
        return cls(cls._count(level_mask), cls._count(turned))

    @staticmethod
    def _count(mask: np.ndarray) -> np.ndarray:
        near = cv2.dilate(mask, np.ones((7, 1), np.uint8))
        return np.pad(near.cumsum(1, dtype=np.int32), ((0, 0), (1, 0)))

    def clip(self, boxes: np.ndarray) -> np.ndarray:
        """Cut boxes, (n, 4), to the picture."""
        high, wide = len(self.level), len(self.upright)
        return boxes.clip(0, (wide, high, wide, high))

    def shares(self, boxes: np.ndarray) -> np.ndarray:
        """Return the covered share, 0..1, of top, bottom, left and right of boxes: (4, n)."""
        x0, y0, x1, y1 = boxes.T
        return np.stack(
            [
                (self.level[y0, x1] - self.level[y0, x0]) / (x1 - x0),
                (self.level[y1 - 1, x1] - self.level[y1 - 1, x0]) / (x1 - x0),
                (self.upright[x0, y1] - self.upright[x0, y0]) / (y1 - y0),
                (self.upright[x1 - 1, y1] - self.upright[x1 - 1, y0]) / (y1 - y0),
            ]
        )


def _best_boxes(
    boxes: np.ndarray, coverage: _Coverage, *, count: int, least_covered: float, apart: int
) -> np.ndarray:
    """Choose `count` boxes, (n, 4), whose sides lie on green lines; near twins count once.

    A box is out when one of its sides is covered by less than `least_covered`, or when every edge
    is at most `apart` pixels from that of a better one.
    """
    boxes = coverage.clip(boxes)
    sizes = boxes[:, 2:] - boxes[:, :2]
    boxes = np.unique(boxes[sizes.min(1) >= 6], axis=0)

    shares = coverage.shares(boxes)
    half_circumference = (boxes[:, 2:] - boxes[:, :2]).sum(1)
    # of two that are equally well covered the larger one is less likely to be chance
    score = (shares.mean(0) - 0.5) * np.log(half_circumference)
    order = np.argsort(-score, kind="stable")
    boxes = boxes[order][shares.min(0)[order] >= least_covered]

    chosen = []
    while len(boxes) and len(chosen) < count:
        best = boxes[0]
        chosen.append(best)
        boxes = boxes[np.abs(boxes - best).max(1) > apart]
    return np.array(chosen, int).reshape(-1, 4)


# ------------------------------------------------------------ 2. from a guess to the exact box


def _refine(padded: np.ndarray, box: _Box) -> tuple[_Box | None, int]:
    """Move the edges of a guess to the line that fits best; returns the box and the line's width.

    The four sides move on their own, but have one width together, and from the second round on one
    brightness. (None, 0) when the sides do not agree or the box leaves the picture. `padded` holds
    the planes with `_OUTSIDE` pixels of NaN around.
    """
    high = padded.shape[0] - 2 * _OUTSIDE
    wide = padded.shape[1] - 2 * _OUTSIDE
    line_brightness = None
    width = 0
    for _ in range(4):
        fits = [_fit_line(strip) for strip in _cut_sides(padded, box)]
        cost = np.stack([fit.cost for fit in fits])  # (4 sides, shifts, widths)
        brightness = np.stack([fit.brightness for fit in fits])
        if line_brightness is not None:
            cost += 10 * np.log1p(((brightness - line_brightness) / 4) ** 2)
        width = int(cost.min(1).sum(0).argmin())  # an index of _WIDTHS
        shifts = cost[..., width].argmin(1)

        top, bottom, left, right = (shifts - _REACH).tolist()
        moved = (box[0] + left, box[1] + top, box[2] - right, box[3] - bottom)
        # an edge that is right beside its opposite, or outside of the picture
        if min(moved[2] - moved[0], moved[3] - moved[1]) < 7:
            return None, 0
        if min(moved) < 0 or moved[2] > wide or moved[3] > high:
            return None, 0
        # neither the three darkest sides nor the three brightest are about equally bright
        four = np.sort(brightness[np.arange(4), shifts, width])
        if (four[2:] - four[:2]).min() > 30:
            return None, 0

        settled = moved == box and line_brightness is not None
        box = moved
        line_brightness = np.median(four)
        if settled:
            break
    return box, int(_WIDTHS[width])


def _cut_sides(padded: np.ndarray, box: _Box) -> list[np.ndarray]:
    """Cut out top, bottom, left and right side of a box as strips, each seen from outside.

    A strip is an array (across, along, 3). Its rows 0..9 lie outside of the box, row 10 is the
    first inside, and it ends 14 rows further or at the middle of the box.
    """
    x0, y0, x1, y1 = box
    rows = _OUTSIDE + min(_INSIDE, (y1 - y0 + 1) // 2)
    columns = _OUTSIDE + min(_INSIDE, (x1 - x0 + 1) // 2)
    # padding shifts every index by _OUTSIDE: what begins at y0 here begins _OUTSIDE above the box
    over_height = padded[y0 : y1 + 2 * _OUTSIDE, x0 + _OUTSIDE : x1 + _OUTSIDE]
    over_width = padded[y0 + _OUTSIDE : y1 + _OUTSIDE, x0 : x1 + 2 * _OUTSIDE].transpose(1, 0, 2)
    return [
        over_height[:rows],
        over_height[::-1][:rows],
        over_width[:columns],
        over_width[::-1][:columns],
    ]


@dataclass
class _LineFit:
    """How well a line fits at one side of a box, for every shift and width: arrays (9, 6)."""

    #: How much the line leaves unexplained, as a sum of logs of variances: the smaller the better.
    cost: np.ndarray
    #: The mean brightness of the line, 0..255.
    brightness: np.ndarray


def _fit_line(strip: np.ndarray) -> _LineFit:
    """Try a line at every shift and width of one side: its colour, and its brightness."""
    # Rows of NaN lie outside of the picture.
    missing = int(np.isnan(strip[:_OUTSIDE, 0, 0]).sum())
    # The corners belong to other sides, and 64 to 128 pixels of a long side are enough.
    length = strip.shape[1]
    margin = min(12, length // 3)
    step = max(1, length // 64)
    strip = strip[missing:, margin : length - margin : step]
    size = len(strip)
    edge = _OUTSIDE - missing

    cost = _colour_cost(np.median(strip[..., 1:], 1), edge)
    start = np.broadcast_to(edge + _SHIFTS[:, None], cost.shape)
    stop = start + _WIDTHS
    outside_strip = (start < 0) | (stop > size)
    start = start.clip(0, size)
    stop = stop.clip(0, size)

    sums = _running_sum(strip[..., 0])
    square_sums = _running_sum(strip[..., 0] ** 2)
    for segment_cost in _segment_costs(sums, square_sums, start, stop):
        cost = cost + segment_cost
    # one or two pixels between the line and the edge of the picture are rather part of the line
    cost = cost + 4 * ((start > 0) & (start < 3))
    brightness = (sums[stop] - sums[start]) / np.maximum(stop - start, 1)
    return _LineFit(np.where(outside_strip, 1e6, cost), brightness)


def _colour_cost(colour: np.ndarray, edge: int) -> np.ndarray:
    """Compare colour across a side, (size, 2), with a line's at every shift and width: (9, 6).

    What a template does not explain is the rest; the cost is the log of the rest's variance, over
    50 for the noise that there is anyway.
    """
    size = len(colour)
    templates, trend = _line_templates(size, edge)
    # in place: it stays float32
    colour -= trend @ (trend.T @ colour)
    # a line is greener than its ground, so a template that fits upside down explains nothing
    explained = ((templates @ colour).clip(0) ** 2).sum(-1)
    rest = ((colour**2).sum() - explained).min(0).clip(0)  # whichever way JPEG has blurred it
    return size * np.log(rest / size / 2 + 50)


@functools.lru_cache(maxsize=256)
def _line_templates(size: int, edge: int) -> tuple[np.ndarray, np.ndarray]:
    """Compute how the colour of a line looks across a strip of `size` rows, and the trend.

    Templates are (3, shifts, widths, size), of length 1 and free of trend: the line as it was
    drawn, and as it is after JPEG has halved the rows, where row 0 may be the first of a pair or
    the second. The trend, (size, 2), is a constant and a slope: the ground may change from outside
    to inside.
    """
    row = np.arange(size)
    start = edge + _SHIFTS[:, None, None]
    stop = start + _WIDTHS[:, None]
    drawn = ((row >= start) & (row < stop)).astype(float)
    ways = [drawn]
    for phase in (0, 1):
        halve, restore = _chroma_halving(size, phase)
        ways.append(drawn @ halve @ restore)
    templates = np.stack(ways)

    slope = row - row.mean()
    trend = np.linalg.qr(np.stack([np.ones(size), slope], 1))[0]
    templates -= templates @ trend @ trend.T
    lengths = np.linalg.norm(templates, axis=-1, keepdims=True)
    return templates / np.maximum(lengths, 1e-3), trend


def _chroma_halving(size: int, phase: int) -> tuple[np.ndarray, np.ndarray]:
    """Build what 4:2:0 chroma does to a column of `size` values, as two matrices to multiply with.

    The first, (size, cells), takes the mean of each pair; the second, (cells, size), is the
    decoder, which interpolates linearly between the middles of the pairs. `phase` is 1 where row 0
    is the second of its pair.
    """
    row = np.arange(size)
    cell = np.arange((size - 1 + phase) // 2 + 1)[:, None]
    members = ((row + phase) // 2 == cell).astype(float)
    halve = (members / members.sum(1, keepdims=True)).T
    distance = np.abs(row + phase - 2 * cell - 0.5)  # in rows, from the middle of a pair
    weight = np.maximum(0, 1 - distance / 2)
    restore = weight / weight.sum(0)
    return halve, restore


def _segment_costs(
    sums: np.ndarray, square_sums: np.ndarray, start: np.ndarray, stop: np.ndarray
) -> Iterator[np.ndarray]:
    """Yield how uneven the brightness is outside of a line, on it and inside of it.

    Each of the three has a mean and a spread of its own; the cost is the log of its variance, over
    6 for the noise that there is anyway, times its rows. `sums` and `square_sums` are running sums
    of brightness and of its square; `start` and `stop` are the first row of the line and the first
    behind it, for every shift and width.
    """
    first = np.zeros_like(start)
    last = np.full_like(start, len(sums) - 1)
    for begin, end in ((first, start), (start, stop), (stop, last)):
        rows = end - begin
        divisor = np.maximum(rows, 1)  # a segment may be empty
        mean = (sums[end] - sums[begin]) / divisor
        mean_square = (square_sums[end] - square_sums[begin]) / divisor
        variance = (mean_square - mean**2).clip(0)
        yield rows * np.log(variance + 6)


def _running_sum(values: np.ndarray) -> np.ndarray:
    """Sum the means of rows from the first on: entry k holds those of k rows, in float64."""
    return np.concatenate([[0], values.mean(1).cumsum()])


# ------------------------------------------------------------ 3. is it a drawn frame?


@dataclass
class _SideLook:
    """What one side of a refined box looks like. Green is over red and blue, in grey levels."""

    #: Green of the ink that was drawn.
    ink_green: float
    #: Brightness of the line, 0..255.
    brightness: float
    #: Share of its pixels that show the line, 0..1.
    drawn: float
    #: How far the line shows at the first and at the last pixels, 0 = not, 1 = as in the middle.
    #: First is left or top.
    at_first_corner: float
    at_last_corner: float
    #: What lies inside of the line differs from it: it is no edge of a green area.
    hollow: bool
    #: How much greener the line is than the greener of its two sides.
    contrast: float


def _contrast(padded: np.ndarray, box: _Box, width: int, least_green: float) -> float | None:
    """Tell how far a frame stands out; None when it is not one closed green line of one colour."""
    sides = [_look_at(strip, width) for strip in _cut_sides(padded, box)]
    greens = [side.ink_green for side in sides]
    green_enough = np.mean(greens) > least_green and min(greens) > 0.15 * np.mean(greens)
    one_brightness = np.ptp([side.brightness for side in sides]) < 12
    hollow = all(side.hollow for side in sides)
    drawn = np.array([side.drawn for side in sides])
    closed = drawn.min() > 0.85 and drawn.mean() > 0.93 and _weakest_corner(sides) > 0.6
    if green_enough and one_brightness and hollow and closed:
        return float(min(side.contrast for side in sides))
    return None


def _weakest_corner(sides: list[_SideLook]) -> float:
    """Return how far the lines reach the corner that they reach least, 0..2 from both sides."""
    top, bottom, left, right = sides
    return min(
        top.at_first_corner + left.at_first_corner,
        bottom.at_first_corner + left.at_last_corner,
        top.at_last_corner + right.at_first_corner,
        bottom.at_last_corner + right.at_last_corner,
    )


def _look_at(strip: np.ndarray, width: int) -> _SideLook:
    """Measure one side of a box from its strip (across, along, 3); the line has `width` pixels."""
    length = strip.shape[1]
    margin = min(12, length // 3)
    middle = slice(margin, length - margin)  # without the corners
    inner, outer = _rows_beside(strip, width)

    profile = np.median(strip[:, middle], 1)  # (across, 3)
    inside = np.median(inner[:, middle], 1).mean(0)
    around = np.median(outer[:, middle], 1).mean(0) if len(outer) else inside
    line = profile[_OUTSIDE : _OUTSIDE + width].mean(0)
    ground = (inside + around) / 2
    ink = _gather_ink(profile, width, inside, around)

    beside = _colour_beside(inner, outer, width)
    step = _expected_step(line, ink, ground, beside)
    shown, brightness_shown = _shown_along(strip, width, step, beside)

    line_green = line[1:].min()
    inside_green = inside[1:].min()
    around_green = around[1:].min()
    ink_green = ink[1:].min()
    # less green inside, by a part of what the line adds to the paler side and of its ink
    fall = max(0.3 * (line_green - min(inside_green, around_green)), 0.25 * ink_green)
    differs_in_green = line_green - inside_green > fall
    differs_in_brightness = abs(line[0] - np.median(inner[:, middle, 0])) > 12
    half = (width + 1) // 2
    return _SideLook(
        ink_green=ink_green,
        brightness=line[0],
        drawn=shown.mean(),
        at_first_corner=brightness_shown[:half].mean(),
        at_last_corner=brightness_shown[-half:].mean(),
        hollow=bool(differs_in_green or differs_in_brightness),
        contrast=line_green - max(inside_green, around_green),
    )


def _rows_beside(strip: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Take the rows of a strip inside of its line and outside of it, four where there are.

    They begin two rows away from the line: JPEG spreads its colour so far.
    """
    behind_line = _OUTSIDE + width
    inner = strip[behind_line + 2 : behind_line + 6]
    if len(inner) == 0:
        inner = strip[-1:]
    outer = strip[_OUTSIDE - 6 : _OUTSIDE - 2]
    in_picture = np.isfinite(outer[:, 0, 0])
    return inner, outer[in_picture]


def _colour_beside(inner: np.ndarray, outer: np.ndarray, width: int) -> np.ndarray:
    """Compute the colour next to a line, outside if it can, at each place along it: (along, 3)."""
    if len(outer):
        beside = outer.mean(0)
    else:
        # at their ends the inner rows are other lines: take the colour from next to them
        length = inner.shape[1]
        first = min(width + 3, length // 2)
        last = max(length - width - 4, length // 2)
        beside = inner.mean(0)[np.clip(np.arange(length), first, last)]
    return cv2.blur(beside[None], (9, 1))[0]


def _gather_ink(
    profile: np.ndarray, width: int, inside: np.ndarray, around: np.ndarray
) -> np.ndarray:
    """Compute the colour that was drawn, (3,), from the profile across a side, (across, 3).

    JPEG spreads the colour of a line over its neighbours but keeps the sum: what is over the
    ground, from two rows before the line to two rows behind it, is added up again.
    """
    window = profile[_OUTSIDE - 2 : _OUTSIDE + width + 2]
    row = np.arange(len(window))[:, None]
    ground = np.where(row < 2 + width / 2, around, inside)  # they meet in the middle of the line
    return (inside + around) / 2 + np.nansum(window - ground, 0) / width


def _expected_step(
    line: np.ndarray, ink: np.ndarray, ground: np.ndarray, beside: np.ndarray
) -> np.ndarray:
    """Compute how the line should differ from what is beside it, at each place along a side.

    `beside` and the result are (along, 3). A line has one brightness everywhere; of its colour a
    pixel shows a share, the same along the side, and the rest is the colour beside it.
    """
    ink_over_ground = max((ink - ground)[1:].sum(), 1e-3)
    share = np.clip((line - ground)[1:].sum() / ink_over_ground, 0.2, 1)
    brightness = np.full((len(beside), 1), line[0])
    colour = beside[:, 1:] + share * (ink[1:] - beside[:, 1:])
    return np.concatenate([brightness, colour], 1) - beside


def _shown_along(
    strip: np.ndarray, width: int, step: np.ndarray, beside: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Tell where along a side the line shows.

    Returns where more than half of the expected step is there, (along,) of bool, and the share of
    the step in brightness alone. Where line and surroundings look alike there is nothing to be
    seen: that counts as shown.
    """
    # the outer half of the line: it is line even where the width is taken a pixel too large
    half = (width + 1) // 2
    found = strip[_OUTSIDE : _OUTSIDE + half].mean(0) - beside

    power = (step**2).sum(1)
    share = (found * step).sum(1) / np.maximum(power, 60)
    shown = np.where(power < 60, 1, share) > 0.5

    brightness_step = np.where(step[:, 0] == 0, 1, step[:, 0])
    brightness_share = found[:, 0] / brightness_step
    return shown, np.where(np.abs(step[:, 0]) < 12, 1, brightness_share)


# ------------------------------------------------------------ 4. one box for each drawn line


def _without_echoes(frames: list[_Frame]) -> list[_Frame]:
    """Keep the best of near twins, and drop echoes: boxes made of sides of a better one.

    Two boxes share a side where its edges are at most 6 pixels apart: the widest line.
    """
    best_first = sorted(frames, key=lambda f: (f.contrast, f.box, f.width), reverse=True)
    kept: list[_Frame] = []
    for frame in best_first:
        if not any(_is_echo(frame, better) for better in kept):
            kept.append(frame)
    return kept


def _is_echo(frame: _Frame, better: _Frame) -> bool:
    shared = sum(abs(a - b) <= 6 for a, b in zip(frame.box, better.box, strict=True))
    return shared == 4 or (shared >= 2 and frame.contrast < 0.5 * better.contrast)


def _fewest_that_draw_all(frames: list[_Frame]) -> list[_Frame]:
    """Return the fewest frames that draw every line, the largest first.

    Where boxes cross or touch, their lines frame further rectangles, which nobody has drawn.
    """
    # the 12 largest: the search below tries up to 2 to the power of that
    frames = sorted(frames, key=lambda frame: -frame.area())[:12]
    if len(frames) < 2:
        return frames
    drawn = _drawn_by(frames)
    for count in range(1, len(frames)):
        # the last combination first: it holds the smallest boxes, whose lines may frame a large one
        for chosen in reversed(list(itertools.combinations(range(len(frames)), count))):
            share_drawn = drawn[:, :, list(chosen)].any(-1).mean(1)  # of each frame's outline
            if (share_drawn > 0.9).all():
                return [frames[i] for i in chosen]
    return frames


def _drawn_by(frames: list[_Frame]) -> np.ndarray:
    """Tell which points on the outline of each frame lie on the line of which frame.

    The result is (frames, points, frames): [i, p, k] says that frame k draws point p of frame i.
    """
    low = np.array([frame.box[:2] for frame in frames])[:, None]  # (frames, 1, 2): x0, y0
    high = np.array([frame.box[2:] for frame in frames])[:, None]
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]])
    sides = [np.linspace(start, end, 24) for start, end in itertools.pairwise(corners)]
    outlines = low + np.concatenate(sides) * (high - low - 1)  # (frames, points, 2)

    # how deep a point lies inside of each frame, in pixels from its nearest edge
    from_low = outlines[:, :, None] - low[:, 0]
    from_high = high[:, 0] - 1 - outlines[:, :, None]
    depth = np.minimum(from_low, from_high).min(-1)
    widths = np.array([frame.width for frame in frames])
    return (depth >= -2) & (depth <= widths + 1)
