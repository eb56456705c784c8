"""Regions of interest: find a green box drawn in a picture, draw one, erase one, compare and name them.

A box is `(x0, y0, x1, y1)`, outer edges, half-open, as shares of width and height (0..1). Published image-text sets
mark regions with a green rectangle, mostly saved as JPEG with 4:2:0 chroma: the colour of a line then lies on a grid of
2x2 pixels, its brightness keeps every pixel. The finder uses colour to find a line and brightness to place it.
"""

import functools
import itertools

import numpy as np
from PIL import Image, ImageDraw

_OUT, _IN, _REACH = 10, 14, 4  # pixels looked at outside and inside an edge; how far a first guess may be off
_SWAP = [1, 0, 3, 2]  # (x0, y0, x1, y1) -> (y0, x0, y1, x1)


def find_boxes(image) -> list[tuple[float, float, float, float]]:
    """All green rectangles drawn as outlines in a picture, the largest first.

    Meant for lines 1 to 6 pixels thick and at most a quarter of the side, sides from 8 pixels, green over red and blue
    by 60 or more. Green areas, circles, text and open frames are no boxes; now and then a small "B" passes for one.

    Parameters
    ----------
    image : PIL.Image.Image or numpy.ndarray
        Any mode, or uint8 of shape (height, width, 3).

    Returns
    -------
    list of tuple of float
        Boxes as shares of the picture, 0..1.

    Examples
    --------
    >>> from PIL import Image
    >>> image = draw_box(Image.new("RGB", (200, 100), "gray"), (0.25, 0.1, 0.5, 0.6))
    >>> find_boxes(image)
    [(0.25, 0.1, 0.5, 0.6)]
    """
    pixels = np.asarray(image.convert("RGB") if hasattr(image, "convert") else image)[..., :3].astype(np.float32)
    red, green, blue = np.moveaxis(pixels, -1, 0)
    planes = np.stack([0.299 * red + 0.587 * green + 0.114 * blue, green - red, green - blue], -1)
    excess = planes[..., 1:].min(-1)
    high, wide = excess.shape
    if min(high, wide) < 8 or np.ptp(excess) < 5:  # a grey picture
        return []
    least = 8 if np.median(np.abs(planes[..., 1:])) < 3 else 20  # any colour in a grey picture was drawn
    padded = np.pad(planes, ((_OUT, _OUT), (_OUT, _OUT), (0, 0)), constant_values=np.nan)
    found, seen = [], set()
    for guess in map(tuple, _guesses(excess).tolist()):
        box, width = _refine(padded, guess)
        if box and box not in seen and (contrast := _contrast(padded, box, width, least)) is not None:
            found.append((contrast, box, width))
        seen.add(box)
    kept: list[tuple] = []
    for contrast, box, width in sorted(found, reverse=True):  # keep the best of near twins; drop echoes of its sides
        shared = [(sum(abs(a - b) <= 6 for a, b in zip(box, other, strict=True)), best) for other, _, best in kept]
        if not any(sides == 4 or (sides >= 2 and contrast < 0.5 * best) for sides, best in shared):
            kept.append((box, width, contrast))
    return [(x0 / wide, y0 / high, x1 / wide, y1 / high) for (x0, y0, x1, y1), *_ in _fewest(kept)]


def _fewest(kept: list[tuple]) -> list[tuple]:
    """The fewest boxes that draw every line: where boxes cross or touch, they frame further rectangles."""
    kept = sorted(kept, key=lambda k: (k[0][0] - k[0][2]) * (k[0][3] - k[0][1]))[:12]
    if len(kept) < 2:
        return kept
    lows, highs = (np.array([k[0][i : i + 2] for k in kept])[:, None] for i in (0, 2))
    corner = np.array([[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]])
    path = np.concatenate([np.linspace(a, b, 24) for a, b in itertools.pairwise(corner)])
    outline = lows + path * (highs - lows - 1)  # (boxes, points, 2)
    depth = np.minimum(outline[:, :, None] - lows[:, 0], highs[:, 0] - 1 - outline[:, :, None]).min(-1)
    drawn = (depth >= -2) & (depth <= np.array([k[1] for k in kept]) + 1)  # (boxes, points, drawn by)
    for count in range(1, len(kept)):
        for some in reversed(list(itertools.combinations(range(len(kept)), count))):
            if (drawn[:, :, some].any(-1).mean(1) > 0.9).all():
                return [kept[i] for i in some]
    return kept


def _lines(excess, across: tuple[int, int], blur: tuple[int, int] | None = None) -> np.ndarray:
    """Mask (uint8) of thin green lines: a top-hat over half of its peak nearby."""
    import cv2

    excess = cv2.blur(excess, blur) if blur else excess
    ground = cv2.morphologyEx(excess, cv2.MORPH_OPEN, np.ones(across, np.uint8), borderType=cv2.BORDER_REPLICATE)
    top = excess - ground
    peak = cv2.dilate(top, np.ones([min(k, 9) for k in across], np.uint8))
    return ((top > 0.5 * peak) & (top > np.maximum(max(4, 2 * np.median(top)), 0.1 * (60 - ground)))).astype(np.uint8)


def _strokes(mask, opening: tuple[int, int] | None = None) -> np.ndarray:
    """Bounds of the connected parts of a mask, the 200 longest; with an opening straight strokes of even width."""
    import cv2

    mask = cv2.morphologyEx(mask, cv2.MORPH_OPEN, np.ones(opening, np.uint8)) if opening else mask
    _, _, stats, centre = cv2.connectedComponentsWithStats(mask)
    x, y, w, h, area = stats[1:].astype(int).T
    if opening:  # what touches a stroke must not move it
        cx, cy = centre[1:].T + 0.5
        if opening[0] > 1:
            w, x = area / h, cx - area / h / 2
        else:
            h, y = area / w, cy - area / w / 2
    order = np.argsort(-np.maximum(w, h), kind="stable")
    return np.stack([x, y, x + w, y + h], 1)[order][:200].round().astype(int)


def _pairs(strokes) -> np.ndarray:
    """Boxes whose left and right sides are two upright strokes of similar extent."""
    i, j = np.nonzero(strokes[:, None, 0] < strokes[None, :, 0])
    low, high = np.stack([strokes[i, 1], strokes[j, 1]]), np.stack([strokes[i, 3], strokes[j, 3]])
    same = high.min(0) - low.max(0) > 0.4 * (high.max(0) - low.min(0))
    i, j, low, high = i[same], j[same], low[:, same], high[:, same]
    spans = (low.min(0), high.max(0)), (low[0], high[0]), (low[1], high[1])
    return np.concatenate([np.stack([strokes[i, 0], a, strokes[j, 2], b], 1) for a, b in spans])


def _guesses(excess) -> np.ndarray:
    """Boxes in pixels, (n, 4), each within a few pixels of a rectangle whose four sides are covered by green lines."""
    import cv2

    rows, columns, both = _lines(excess, (17, 1), (9, 1)), _lines(excess, (1, 17), (1, 9)), _lines(excess, (17, 17))
    near = [cv2.dilate(m, np.ones((7, 1), np.uint8)) for m in (rows | both, np.ascontiguousarray((columns | both).T))]
    sums = [np.pad(m.cumsum(1, dtype=np.int32), ((0, 0), (1, 0))) for m in near]

    def best(boxes, count, covered, apart):
        boxes = boxes.clip(0, excess.shape[::-1] * 2)
        boxes = np.unique(boxes[(boxes[:, 2:] - boxes[:, :2]).min(1) >= 6], axis=0)
        sides = []
        for total, (x0, y0, x1, y1) in zip(sums, (boxes.T, boxes[:, _SWAP].T), strict=True):
            sides += [(total[y, x1] - total[y, x0]) / (x1 - x0) for y in (y0, y1 - 1)]
        score = (np.mean(sides, 0) - 0.5) * np.log((boxes[:, 2:] - boxes[:, :2]).sum(1))
        boxes, picked = boxes[(o := np.argsort(-score, kind="stable"))][np.min(sides, 0)[o] >= covered], []
        while len(boxes) and len(picked) < count:
            picked.append(boxes[0])
            boxes = boxes[np.abs(boxes - boxes[0]).max(1) > apart]
        return np.array(picked, int).reshape(-1, 4)

    upright = best(_pairs(_strokes(columns, (11, 1))), 150, 0, 1)
    level = best(_pairs(_strokes(rows, (1, 11))[:, _SWAP])[:, _SWAP], 150, 0, 1)
    i, j = np.nonzero(np.abs(upright[:, None] - level).max(-1) <= 14)
    mixed = np.stack([upright[i, 0], level[j, 1], upright[i, 2], level[j, 3]], 1)
    return best(np.concatenate([_strokes(both), upright, level, mixed]), 60, 0.5, 2)


def _sides(padded, box) -> tuple[np.ndarray, ...]:
    """Top, bottom, left and right side as strips (across, along, 3), from outside to inside, edge at row _OUT."""
    x0, y0, x1, y1 = box
    ky, kx = _OUT + min(_IN, (y1 - y0 + 1) // 2), _OUT + min(_IN, (x1 - x0 + 1) // 2)
    upright = padded[y0 : y1 + 2 * _OUT, x0 + _OUT : x1 + _OUT]
    level = padded[y0 + _OUT : y1 + _OUT, x0 : x1 + 2 * _OUT].transpose(1, 0, 2)
    return upright[:ky], upright[::-1][:ky], level[:kx], level[::-1][:kx]


@functools.lru_cache(maxsize=256)
def _templates(size: int, edge: int) -> tuple[np.ndarray, np.ndarray]:
    """Colour across a line, free of trend: (full or halved at either phase, shift, width 1..6, size), and the trend."""
    y = np.arange(size)
    start = edge + np.arange(-_REACH, _REACH + 1)[:, None, None]
    seen = [((y >= start) & (y < start + np.arange(1, 7)[:, None])).astype(float)]
    for phase in (0, 1):
        cell = np.arange((size - 1 + phase) // 2 + 1)[:, None]
        pool = ((y + phase) // 2 == cell).astype(float)
        spread = np.maximum(0, 1 - np.abs(y + phase - 2 * cell - 0.5) / 2)  # the decoder interpolates linearly
        seen.append(seen[0] @ (pool / pool.sum(1, keepdims=True)).T @ (spread / spread.sum(0)))
    trend = np.linalg.qr(np.stack([np.ones(size), y - y.mean()], 1))[0]
    flat = np.stack(seen)
    flat -= flat @ trend @ trend.T
    return flat / np.maximum(np.linalg.norm(flat, axis=-1, keepdims=True), 1e-3), trend


def _fit(strip) -> tuple[np.ndarray, np.ndarray]:
    """Cost and brightness of a line at every (shift, width) of one side: colour by template, brightness by segments."""
    lead, margin = int(np.isnan(strip[:_OUT, 0, 0]).sum()), min(12, strip.shape[1] // 3)
    strip = strip[lead:, margin : strip.shape[1] - margin : max(1, strip.shape[1] // 64)]
    size, edge = len(strip), _OUT - lead
    unit, trend = _templates(size, edge)
    colour = np.median(strip[..., 1:], 1)
    colour -= trend @ (trend.T @ colour)
    rest = ((colour**2).sum() - ((unit @ colour).clip(0) ** 2).sum(-1)).min(0).clip(0)
    cost = size * np.log(rest / size / 2 + 50)
    first, second = (np.concatenate([[0], (strip[..., 0] ** k).mean(1).cumsum()]) for k in (1, 2))
    a = edge + np.arange(-_REACH, _REACH + 1)[:, None] + np.zeros(6, int)
    outside = (a < 0) | (a + np.arange(1, 7) > size)
    a, b = a.clip(0, size), (a + np.arange(1, 7)).clip(0, size)
    for u, v in ((0 * a, a), (a, b), (b, 0 * b + size)):  # outside, line, inside: each of its own mean and spread
        n = np.maximum(v - u, 1)
        cost = cost + (v - u) * np.log(((second[v] - second[u]) / n - ((first[v] - first[u]) / n) ** 2).clip(0) + 6)
    return np.where(outside, 1e6, cost + 4 * ((a > 0) & (a < 3))), (first[b] - first[a]) / np.maximum(b - a, 1)


def _refine(padded, box) -> tuple[tuple[int, ...] | None, int]:
    """The box and line width that fit best near a guess, with one width and one brightness on all four sides."""
    level, (high, wide) = None, (n - 2 * _OUT for n in padded.shape[:2])
    for _ in range(4):
        costs, luma = (np.stack(v) for v in zip(*map(_fit, _sides(padded, box)), strict=True))
        costs += 0 if level is None else 10 * np.log1p(((luma - level) / 4) ** 2)
        width = int(costs.min(1).sum(0).argmin())
        shift = costs[..., width].argmin(1)
        four = np.sort(luma[np.arange(4), shift, width])
        y0, y1, x0, x1 = (shift - _REACH).tolist()
        box, last = (box[0] + x0, box[1] + y0, box[2] - x1, box[3] - y1), (box, level)
        if min(box[2] - box[0], box[3] - box[1]) < 7 or min(box) < 0 or box[2] > wide or box[3] > high:
            return None, 0
        if (four[2:] - four[:2]).min() > 30:  # not even three sides agree
            return None, 0
        level = np.median(four)
        if last[1] is not None and last[0] == box:
            break
    return box, width + 1


def _contrast(padded, box, width: int, least: float) -> float | None:
    """How far a frame stands out from what is around it; None when it is not one closed green line of one colour."""
    import cv2

    greens, luma, shares, hollow, contrast, half = [], [], [], [], [], (width + 1) // 2
    for side in _sides(padded, box):
        n, last = side.shape[1], _OUT + width
        middle = slice(min(12, n // 3), n - min(12, n // 3))
        inner = side[last + 2 : last + 6] if len(side) > last + 2 else side[-1:]
        outer = side[4:8][np.isfinite(side[4:8, 0, 0])]
        profile = np.median(side[:, middle], 1)
        inside = np.median(inner[:, middle], 1).mean(0)
        around = np.median(outer[:, middle], 1).mean(0) if len(outer) else inside
        line, both = profile[_OUT:last].mean(0), (inside + around) / 2
        # JPEG spreads the colour of a line over its neighbours but keeps the sum: add it up again
        window = profile[8 : last + 2]
        ground = np.where(np.arange(len(window))[:, None] < 2 + width / 2, around, inside)
        ink = both + np.nansum(window - ground, 0) / width
        mix = np.clip((line - both)[1:].sum() / max((ink - both)[1:].sum(), 1e-3), 0.2, 1)
        # share of line colour at each place along the side, against what is just outside of it
        inward = np.clip(np.arange(n), min(width + 3, n // 2), max(n - width - 4, n // 2))
        beside = cv2.blur((outer.mean(0) if len(outer) else inner.mean(0)[inward])[None], (9, 1))[0]
        step = np.concatenate([np.full((n, 1), line[0]), beside[:, 1:] + mix * (ink[1:] - beside[:, 1:])], 1) - beside
        here = side[_OUT : _OUT + half].mean(0) - beside
        power = (step**2).sum(1)
        drawn = np.where(power < 60, 1, (here * step).sum(1) / np.maximum(power, 60)) > 0.5
        bright = np.where(abs(step[:, 0]) < 12, 1, here[:, 0] / np.where(step[:, 0] == 0, 1, step[:, 0]))
        greens.append(ink[1:].min())
        luma.append(line[0])
        shares.append((drawn.mean(), bright[:half].mean(), bright[-half:].mean()))
        line, inside, around = line[1:].min(), inside[1:].min(), around[1:].min()
        hollow.append(line - inside > max(0.3 * (line - min(inside, around)), 0.25 * greens[-1]))
        hollow[-1] |= abs(luma[-1] - np.median(inner[:, middle, 0])) > 12
        contrast.append(line - max(inside, around))
    drawn, first, second = np.array(shares).T  # sides: top, bottom, left, right
    corners = first[0] + first[2], second[0] + first[3], first[1] + second[2], second[1] + second[3]
    good = np.mean(greens) > least and min(greens) > 0.15 * np.mean(greens) and np.ptp(luma) < 12 and all(hollow)
    good = good and drawn.min() > 0.85 and drawn.mean() > 0.93 and min(corners) > 0.6
    return float(min(contrast)) if good else None


def find_box(image) -> tuple[float, float, float, float] | None:
    """The largest box that `find_boxes` finds, or None."""
    return next(iter(find_boxes(image)), None)


def _pixels(image, box) -> tuple[int, int, int, int]:
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
        raise ValueError(f"box {tuple(box)} is not x0 < x1 and y0 < y1 within 0..1: give shares of width and height")
    width, height = image.size
    return round(x0 * width), round(y0 * height), round(x1 * width), round(y1 * height)


def draw_box(image, box, *, width: int = 3, color: tuple[int, int, int] = (0, 255, 0)):
    """A copy of a picture (RGB) with the outline of a box drawn `width` pixels inward from its outer edges.

    Raises
    ------
    ValueError
        If the box leaves the picture, is empty, or is thinner than its line.
    """
    x0, y0, x1, y1 = _pixels(image, box)
    if not 1 <= width <= min(x1 - x0, y1 - y0) / 2:
        raise ValueError(f"a line of {width} pixels does not fit a box of {x1 - x0} x {y1 - y0} pixels")
    copy = image.convert("RGB").copy()
    ImageDraw.Draw(copy).rectangle((x0, y0, x1 - 1, y1 - 1), outline=tuple(color), width=width)
    return copy


def erase_box(image, box, *, width: int = 3):
    """A copy of a picture (RGB) with the drawn outline of a box painted over from its surroundings (cv2 inpainting).

    This hides a box from the eye, not from a model: the smooth band that is left is a trace, and a linear probe on
    pixels around the edges still tells erased from never drawn (`tests/test_roi_boxes.py` reports its AUROC). To train
    without a drawn box, use pictures that never had one.
    """
    import cv2

    x0, y0, x1, y1 = _pixels(image, box)
    mask = np.zeros(image.size[::-1], np.uint8)
    mask[max(y0 - 2, 0) : y1 + 2, max(x0 - 2, 0) : x1 + 2] = 255  # JPEG spreads colour by up to 2 pixels
    mask[y0 + width + 2 : max(y1 - width - 2, 0), x0 + width + 2 : max(x1 - width - 2, 0)] = 0
    return Image.fromarray(cv2.inpaint(np.asarray(image.convert("RGB")), mask, 3, cv2.INPAINT_TELEA))


def iou(a, b) -> float:
    """Intersection over union of two boxes in the same units, 0..1; 0 for an empty box.

    >>> iou((0, 0, 2, 1), (1, 0, 3, 1))
    0.3333333333333333
    """
    across = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    union = area_share(a) + area_share(b) - across
    return across / union if union > 0 else 0.0


def area_share(box) -> float:
    """Share of the picture that a box covers, 0..1."""
    return max(0, box[2] - box[0]) * max(0, box[3] - box[1])


def place_of(box) -> str:
    """Where the centre of a box lies on the picture's 3x3 grid (left = left of the picture).

    >>> place_of((0.0, 0.0, 0.2, 0.2)), place_of((0.4, 0.4, 0.6, 0.6)), place_of((0.4, 0.7, 0.6, 1.0))
    ('upper left', 'center', 'lower middle')
    """
    x, y = (min(int(3 * (box[i] + box[i + 2]) / 2), 2) for i in (0, 1))
    place = f"{('upper', 'middle', 'lower')[y]} {('left', 'middle', 'right')[x]}"
    return "center" if place == "middle middle" else place
