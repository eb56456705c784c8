"""Virtual people: one person's CT, bent as other people's bodies differ.

A slice of a virtual person is cut out of the one CT along a curved plane, and bent within that
plane. The curved plane stays inside the block of slices that belong to one split, so that no voxel
that is held out gets into a training picture. All virtual people have the same diseases, the same
organs and the same scanner: they teach a model not to count pixels, and they are no sample of
people.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from ct import LOWEST

# knots of the displacement: heights, rows, columns
KNOTS = (5, 6, 6)
# standard deviation of the displacement at a knot, in pixels
SHIFT = 14.0
# knots of the rise: heights, rows, columns
RISE_KNOTS = (5, 4, 4)
# standard deviation of the rise at a knot, in slices
RISE = 4.0
# of the offset of a structure, in HU: how much contrast agent it holds
CONTRAST = 25.0
# an edge between two structures blurs over so many pixels
EDGE = 2.0


@dataclass(frozen=True)
class Person:
    """How a virtual person differs from the scanned one.

    Attributes
    ----------
    number : 0 is the scanned person.
    shifts : displacement in pixels, (heights, rows, columns, 2) for x and y; smooth in between.
    rises : how many slices higher the curved plane lies than the flat one, (heights, rows,
        columns); smooth in between.
    scale : of the body from side to side and from front to back.
    zoom : how much larger the scanner shows everything; the pixels are smaller by that factor.
    contrast : offset in HU of each label, (256,).
    noise : standard deviation in HU.
    blur : of the picture, in pixels.
    arms : the arms lie beside the body.
    """

    number: int
    shifts: np.ndarray
    rises: np.ndarray
    scale: tuple[float, float]
    zoom: float
    contrast: np.ndarray
    noise: float
    blur: float
    arms: bool


def scanned_person() -> Person:
    """Return the person who was scanned, unchanged."""
    return Person(
        number=0,
        shifts=np.zeros((*KNOTS, 2)),
        rises=np.zeros(RISE_KNOTS),
        scale=(1.0, 1.0),
        zoom=1.0,
        contrast=np.zeros(256),
        noise=0.0,
        blur=0.0,
        arms=False,
    )


def draw_person(number: int, seed: int) -> Person:
    """Draw a virtual person; the same number and seed give the same one."""
    rng = np.random.default_rng([seed, number, 7])
    contrast = rng.normal(0, CONTRAST, 256)
    # what has no label is fat, skin and air: contrast agent does not change them
    contrast[0] = 0
    return Person(
        number=number,
        shifts=rng.normal(0, SHIFT, (*KNOTS, 2)),
        scale=(float(rng.uniform(0.85, 1.15)), float(rng.uniform(0.85, 1.15))),
        zoom=float(rng.uniform(0.65, 1.35)),
        contrast=contrast,
        noise=float(rng.uniform(0, 15)),
        blur=float(rng.uniform(0, 1)),
        arms=bool(rng.random() < 0.3),
        # drawn last: all the rest of a person is as it was before people had them
        rises=rng.normal(0, RISE, RISE_KNOTS),
    )


def curved_slice(
    person: Person, hu: np.ndarray, mask: np.ndarray, z: int, allowed: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Cut a body along a curved plane, as its organs would lie in the slice of another person.

    Another person's liver reaches higher, or lies more to the front: their slice shows together
    what lies at several heights here.

    Parameters
    ----------
    person : whose slice it becomes.
    hu, mask : the CT and its mask, (slices, rows, columns).
    z : the slice in which the plane would lie if it were flat.
    allowed : first and last slice that the plane may touch; where it would leave them it is flat.

    Returns
    -------
    tuple : HU as float32, between two slices a mixture of both, and the nearest slice's mask.
    """
    first, last = allowed
    if person.number == 0 or first == last:
        return hu[z].astype(np.float32), mask[z]
    height = z / (len(hu) - 1)
    rise = _between_knots(person.rises, height, hu.shape[1:])
    place = np.clip(z + rise, first, last)
    # the slice below, and the share of the one above; at the very top that share is 1
    below = np.minimum(place.astype(int), last - 1)
    above = place - below
    y, x = np.indices(hu.shape[1:], sparse=True)
    mixed = (1 - above) * hu[below, y, x] + above * hu[below + 1, y, x]
    nearest = np.rint(place).astype(int)
    return mixed.astype(np.float32), mask[nearest, y, x]


def slice_of(
    person: Person, hu: np.ndarray, mask: np.ndarray, height: float, noise_seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one slice of a virtual person.

    Parameters
    ----------
    person : whose slice it becomes.
    hu, mask : a slice of the CT and of its mask, (rows, columns).
    height : of the slice, 0 for the lowest one to 1 for the highest.
    noise_seed : two slices of a person have different noise.

    Returns
    -------
    tuple : the changed HU as float32, and the changed mask.
    """
    if person.number == 0:
        return hu.astype(np.float32), mask
    across, down = _where_from(person, hu.shape, height)
    bent = cv2.remap(
        hu.astype(np.float32), across, down, cv2.INTER_LINEAR, borderValue=float(LOWEST)
    )
    labels = cv2.remap(mask, across, down, cv2.INTER_NEAREST)
    bent += cv2.GaussianBlur(person.contrast[labels].astype(np.float32), (0, 0), EDGE)
    if person.arms:
        bent = _with_arms(bent)
    if person.blur > 0.3:
        bent = cv2.GaussianBlur(bent, (0, 0), person.blur)
    rng = np.random.default_rng([person.number, noise_seed])
    bent += rng.normal(0, person.noise, bent.shape).astype(np.float32)
    return np.maximum(bent, LOWEST), labels


def _where_from(person: Person, shape: tuple, height: float) -> tuple[np.ndarray, np.ndarray]:
    """Return for each pixel the column and the row of the CT that it shows, float32."""
    rows, columns = shape
    smooth = _between_knots(person.shifts, height, shape)
    y, x = np.mgrid[:rows, :columns].astype(np.float32)
    middle_x, middle_y = (columns - 1) / 2, (rows - 1) / 2
    across = middle_x + (x - middle_x) / (person.scale[0] * person.zoom) + smooth[..., 0]
    down = middle_y + (y - middle_y) / (person.scale[1] * person.zoom) + smooth[..., 1]
    return across.astype(np.float32), down.astype(np.float32)


def _between_knots(knots: np.ndarray, height: float, shape: tuple) -> np.ndarray:
    """Return a field that is smooth between its knots, for one height: (rows, columns, ...)."""
    rows, columns = shape
    knot = height * (len(knots) - 1)
    below = min(int(knot), len(knots) - 2)
    part = knot - below
    field = (1 - part) * knots[below] + part * knots[below + 1]
    return cv2.resize(field.astype(np.float32), (columns, rows), interpolation=cv2.INTER_CUBIC)


def _with_arms(hu: np.ndarray) -> np.ndarray:
    """Draw an arm on each side of the body, where it has room: muscle around a tube of bone."""
    rows, columns = hu.shape
    body = np.argwhere(cv2.blur(hu, (9, 9)) > -300)
    if not len(body):
        return hu
    out = hu.copy()
    (top, left), (bottom, right) = body.min(0), body.max(0)
    size = (bottom - top) / 8
    y, x = np.mgrid[:rows, :columns]
    for middle in (left - 1.2 * size, right + 1.2 * size):
        distance = np.hypot(x - middle, (y - (top + bottom) / 2) / 1.2)
        for radius, value in ((size, 50), (0.3 * size, 900), (0.18 * size, 60)):
            cover = np.clip(radius - distance + 0.5, 0, 1)
            out = out * (1 - cover) + value * cover
    return out.astype(np.float32)
