"""Draw findings whose truth is known, and what only looks like one.

A finding may be spoken of only where it could be seen: `shown_contrast` says by how many grey
levels it stands out in the window that is shown.
"""

from dataclasses import dataclass

import cv2
import numpy as np

# Where a finding may be drawn: (English, Chinese, HU relative to the region or None, absolute HU or
# None)
FINDINGS = {
    "airy": (("solid nodule", "实性结节", None, 35),),
    "solid": (("hypodense lesion", "低密度病灶", -75, None), ("cyst", "囊肿", None, 5)),
    "bone": (
        ("sclerotic lesion", "成骨性病灶", 650, None),
        ("lytic lesion", "溶骨性病灶", None, 40),
    ),
}
# half the diameter, in pixels
SMALLEST, LARGEST = 5.0, 18.0
# A finding is judged where it stands out by so many of 255 grey levels.
VISIBLE = 25
# Vessels, in HU above the region, by the kind of tissue that they run through.
VESSELS = {"airy": (None, 60), "solid": (110, None)}


@dataclass(frozen=True)
class Finding:
    """A finding that may be drawn.

    Attributes
    ----------
    name, name_zh : what the captions call it.
    center : column and row of its middle, in pixels.
    radii : half its axes, in pixels.
    angle : by which the first axis is turned, in radians.
    hu : its density.
    """

    name: str
    name_zh: str
    center: tuple[float, float]
    radii: tuple[float, float]
    angle: float
    hu: float

    @property
    def diameter(self) -> float:
        """The mean of its axes, in pixels."""
        return self.radii[0] + self.radii[1]


def plan_finding(
    hu: np.ndarray, part: np.ndarray, kind: str, rng: np.random.Generator
) -> Finding | None:
    """Choose a finding for a region, or None where none has room.

    Parameters
    ----------
    hu : the slice.
    part : the region, bool of the same shape.
    kind : of its tissue.
    """
    if kind not in FINDINGS:
        return None
    depth = cv2.distanceTransform(part.astype(np.uint8), cv2.DIST_L2, 5)
    room = float(depth.max()) - 1
    if room < SMALLEST:
        return None
    radius = rng.uniform(SMALLEST, min(LARGEST, room))
    fits = np.argwhere(depth > radius + 1)
    if not len(fits):
        return None
    row, column = fits[rng.integers(len(fits))]
    name, name_zh, relative, absolute = FINDINGS[kind][rng.integers(len(FINDINGS[kind]))]
    density = absolute if relative is None else float(np.median(hu[part])) + relative
    # no lesion is a circle; the larger axis still has room
    flatness = rng.uniform(0.75, 1)
    return Finding(
        name=name,
        name_zh=name_zh,
        center=(float(column), float(row)),
        radii=(float(radius), float(radius * flatness)),
        angle=float(rng.uniform(0, np.pi)),
        hu=float(density),
    )


def cover_of(finding: Finding, shape: tuple[int, int]) -> tuple[tuple[slice, slice], np.ndarray]:
    """Say how much of each pixel a finding covers.

    Returns
    -------
    tuple : the rows and columns around the finding, and the cover of each pixel there, 0..1.
    """
    column, row = finding.center
    reach = max(finding.radii) + 2
    rows = slice(max(int(row - reach), 0), min(int(row + reach) + 2, shape[0]))
    columns = slice(max(int(column - reach), 0), min(int(column + reach) + 2, shape[1]))
    y, x = np.mgrid[rows, columns]
    dx, dy = x - column, y - row
    along = dx * np.cos(finding.angle) + dy * np.sin(finding.angle)
    aside = dy * np.cos(finding.angle) - dx * np.sin(finding.angle)
    distance = np.hypot(along / finding.radii[0], aside / finding.radii[1])
    return (rows, columns), np.clip((1 - distance) * min(finding.radii) + 0.5, 0, 1)


def draw_finding(hu: np.ndarray, finding: Finding, rng: np.random.Generator) -> np.ndarray:
    """Draw a finding into a slice, and return the changed copy."""
    place, cover = cover_of(finding, hu.shape)
    texture = rng.normal(0, 12, cover.shape)
    out = hu.astype(np.float32)
    out[place] = out[place] * (1 - cover) + (finding.hu + texture) * cover
    return out


def shown_contrast(hu: np.ndarray, finding: Finding, window: tuple[float, float]) -> float:
    """Say by how many of 255 grey levels a finding would stand out from what it covers.

    Parameters
    ----------
    hu : the slice without the finding.
    finding : that may be drawn.
    window : centre and width in HU.
    """
    place, cover = cover_of(finding, hu.shape)
    center, width = window
    lowest = center - width / 2

    def grey(values):
        return np.clip((values - lowest) / width * 255, 0, 255)

    covered = grey(hu[place][cover > 0.5])
    return float(abs(covered.mean() - grey(finding.hu)))


def draw_vessel(
    hu: np.ndarray, part: np.ndarray, kind: str, rng: np.random.Generator
) -> np.ndarray:
    """Draw a piece of a vessel through a region: bright as a lesion may be, but long.

    In kinds of tissue without vessels of their own nothing is drawn.
    """
    if kind not in VESSELS:
        return hu
    relative, absolute = VESSELS[kind]
    density = absolute if relative is None else float(np.median(hu[part])) + relative
    inside = np.argwhere(part)
    start = inside[rng.integers(len(inside))][::-1].astype(float)
    direction = rng.uniform(0, 2 * np.pi)
    points = [start]
    for _ in range(6):
        direction += rng.normal(0, 0.35)
        step = 7 * np.array([np.cos(direction), np.sin(direction)])
        points.append(points[-1] + step)
    line = np.zeros(hu.shape, np.float32)
    thickness = int(rng.integers(2, 6))
    cv2.polylines(line, [np.rint(points).astype(np.int32)], False, 1.0, thickness)
    # it ends where the region ends
    cover = cv2.GaussianBlur(line, (0, 0), 0.7) * part
    return (hu * (1 - cover) + density * cover).astype(np.float32)
