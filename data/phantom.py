"""Draw a body that is nobody: a CT with a mask in the form of the course's own, free to hand on.

    python data/phantom.py data/phantom
    python data/build_sample.py --ct-folder data/phantom --out data/phantom/sample

The course's CT may not be passed on, so its pictures stay on the machine they were made on. This one
is a drawing: ellipsoids, tubes and curves with the names of the mask's structures, bent a little, with
noise. It has as many slices as the course's CT and the same regions of the body at about the same
heights, so that the same blocks are held out. It looks like a body from afar; nothing that a model
says of it tells how it would do on people.
"""

import argparse
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import nibabel
import numpy as np
from scipy import ndimage

SLICES, SIDE = 133, 512
MM_PER_PIXEL, MM_PER_SLICE = 0.703125, 2.5
PIXELS_PER_SLICE = MM_PER_SLICE / MM_PER_PIXEL
MIDDLE = 256
# Hounsfield units
AIR, LUNG, FAT, FLUID = -1000, -850, -95, 10
SOFT, MUSCLE, LIVER = 45, 52, 85
BLOOD, MARROW, BONE = 220, 230, 420
NOISE = 11

Pair = tuple[float, float]


@dataclass(frozen=True)
class Blob:
    """An ellipsoid: centre and radii in pixels across and along, in slices upwards.

    Attributes
    ----------
    turn : degrees in the plane.
    inside : HU of a core of 0.6 of the size, None for none.
    """

    name: str
    hu: int
    center: tuple[float, float, float]
    radii: tuple[float, float, float]
    turn: float = 0
    inside: int | None = None


@dataclass(frozen=True)
class Tube:
    """A tube along a line of points (x, y, slice, radius in pixels)."""

    name: str
    hu: int
    points: tuple[tuple[float, float, float, float], ...]
    inside: int | None = None


@dataclass
class Body:
    """What is drawn so far: HU and labels, (slices, rows, columns), and a number for each name."""

    hu: np.ndarray = field(default_factory=lambda: np.full((SLICES, SIDE, SIDE), AIR, np.float32))
    mask: np.ndarray = field(default_factory=lambda: np.zeros((SLICES, SIDE, SIDE), np.uint8))
    numbers: dict[str, int] = field(default_factory=dict)

    def number(self, name: str) -> int:
        """Give the label of a name; "" is none."""
        return self.numbers.setdefault(name, len(self.numbers) + 1) if name else 0

    def ellipse(  # noqa: PLR0913 - each says a part of what is drawn
        self, z: int, name: str, hu: float, center: Pair, radii: Pair, turn: float = 0
    ) -> None:
        """Draw a filled ellipse into a slice; one that lies outside of it, or is a point, is left out."""
        if not 0 <= z < SLICES or min(radii) < 0.7:
            return
        shape = (tuple(round(16 * v) for v in center), tuple(round(16 * v) for v in radii))
        angles = (turn, 0, 360)
        # sixteenths of a pixel
        cv2.ellipse(self.hu[z], *shape, *angles, float(hu), cv2.FILLED, cv2.LINE_AA, 4)
        cv2.ellipse(self.mask[z], *shape, *angles, self.number(name), cv2.FILLED, cv2.LINE_8, 4)

    def blob(self, blob: Blob) -> None:
        """Draw an ellipsoid slice by slice."""
        x, y, middle = blob.center
        across, along, up = blob.radii
        for z in range(int(np.ceil(middle - up)), int(middle + up) + 1):
            share = np.sqrt(max(0.0, 1 - ((z - middle) / up) ** 2))
            self.ellipse(z, blob.name, blob.hu, (x, y), (across * share, along * share), blob.turn)
            if blob.inside is not None:
                core = (0.6 * across * share, 0.6 * along * share)
                self.ellipse(z, blob.name, blob.inside, (x, y), core, blob.turn)

    def tube(self, tube: Tube) -> None:
        """Draw a tube as balls along its line."""
        points = np.array(tube.points, float)
        steps = np.diff(points[:, :3], axis=0) * (1, 1, PIXELS_PER_SLICE)
        lengths = np.concatenate([[0], np.cumsum(np.linalg.norm(steps, axis=1))])
        along = np.arange(0, lengths[-1], 1.5)
        x, y, middle, radius = (np.interp(along, lengths, column) for column in points.T)
        for z in range(SLICES):
            apart = np.abs(middle - z) * PIXELS_PER_SLICE
            near = np.flatnonzero(apart < radius)
            cut = np.sqrt(radius[near] ** 2 - apart[near] ** 2)
            for at, size in zip(near, cut, strict=True):
                self.ellipse(z, tube.name, tube.hu, (x[at], y[at]), (size, size))
            if tube.inside is not None:
                for at, size in zip(near, cut, strict=True):
                    self.ellipse(z, tube.name, tube.inside, (x[at], y[at]), (size - 3, size - 3))


def over_height(z: float, *points: tuple[float, float]) -> float:
    """Read a value off a line through (slice, value)."""
    return float(np.interp(z, *zip(*points, strict=True)))


# ---- the parts of the body


def spine_y(z: float) -> float:
    """Say how far back the middle of the vertebrae lies."""
    return over_height(z, (0, 276), (35, 306), (72, 330), (105, 316), (132, 256))


def chest_size(z: float) -> tuple[float, float]:
    """Give the half axes of the body's wall."""
    across = over_height(z, (0, 176), (40, 190), (75, 200), (105, 196), (122, 138), (132, 84))
    along = over_height(z, (0, 118), (40, 132), (75, 138), (105, 124), (122, 100), (132, 80))
    return across, along


def chest_middle(z: float) -> float:
    """Say at which row the body's middle lies."""
    return over_height(z, (0, 232), (40, 246), (75, 262), (105, 262), (132, 246))


def draw_wall(body: Body) -> None:
    """Draw skin, fat, muscles and shoulders, and what fills the belly."""
    for z in range(SLICES):
        across, along = chest_size(z)
        center = (MIDDLE, chest_middle(z))
        shoulder = over_height(z, (98, 0), (116, 1), (132, 1))
        for side in (-1, 1):
            if shoulder:
                at = (MIDDLE + side * over_height(z, (98, 150), (132, 178)), center[1] + 22)
                body.ellipse(z, "", FAT, at, (74 * shoulder, 70 * shoulder))
                body.ellipse(z, "", MUSCLE, at, (62 * shoulder, 58 * shoulder))
        body.ellipse(z, "", FAT, center, (across + 14, along + 14))
        body.ellipse(z, "", MUSCLE, center, (across, along))
        if z < 48:
            body.ellipse(z, "", FAT, center, (across - 12, along - 14))
        elif z < 116:
            # between the lungs
            body.ellipse(z, "", FAT, (MIDDLE, center[1] - 14), (54, along - 22))
        for side, name in ((-1, "autochthon_right"), (1, "autochthon_left")):
            at = (MIDDLE + side * 36, spine_y(z) + 44)
            body.ellipse(z, name, MUSCLE, at, (32, 17), side * -10)
        for side, name in ((-1, "iliopsoas_right"), (1, "iliopsoas_left")):
            if z < 20:
                size = over_height(z, (0, 17), (20, 7))
                body.ellipse(
                    z, name, MUSCLE, (MIDDLE + side * 48, spine_y(z) - 2), (size * 0.8, size)
                )


def draw_lungs(body: Body) -> None:
    """Draw the lungs, divided into lobes along oblique planes, with a tree of vessels in each."""
    rng = np.random.default_rng(5)
    rows = np.arange(SIDE)[:, None]
    for side, word in ((-1, "right"), (1, "left")):
        for z in range(26, 126):
            # the domes of the diaphragm: the front begins higher than the back
            width = over_height(z, (26, 24), (40, 56), (60, 78), (90, 80), (112, 60), (126, 10))
            depth = over_height(z, (26, 30), (40, 70), (60, 108), (90, 110), (112, 78), (126, 14))
            x = MIDDLE + side * over_height(z, (26, 120), (60, 108), (100, 96), (126, 74))
            y = chest_middle(z) + over_height(z, (26, 66), (48, 40), (66, 6), (126, 10))
            shape = filled_ellipse((x, y), (width, depth), side * 6)
            across, along = chest_size(z)
            shape &= filled_ellipse((MIDDLE, chest_middle(z)), (across - 9, along - 12))
            body.hu[z][shape > 0] = LUNG
            lower = rows > chest_middle(z) - 30 + 2.1 * (z - 62)
            names = np.where(
                lower,
                body.number(f"lung_lower_lobe_{word}"),
                body.number(f"lung_upper_lobe_{word}"),
            )
            if word == "right":
                middle = body.number("lung_middle_lobe_right")
                names = np.where(~lower & (z < 74), middle, names)
            names = np.broadcast_to(names, shape.shape)
            body.mask[z][shape > 0] = names[shape > 0]
        for height in (66, 80, 96):
            grow_vessels(body, rng, (MIDDLE + side * 50, 258, height), side)


def filled_ellipse(center: Pair, radii: Pair, turn: float = 0) -> np.ndarray:
    """Mark the pixels of an ellipse with 1."""
    shape = np.zeros((SIDE, SIDE), np.uint8)
    whole = [tuple(round(value) for value in pair) for pair in (center, radii)]
    return cv2.ellipse(shape, *whole, turn, 0, 360, 1, cv2.FILLED)


def grow_vessels(body: Body, rng: np.random.Generator, root: tuple, side: int) -> None:
    """Let vessels branch away from the root of a lung; they carry the lobe's name."""
    ends = [(np.array(root, float), np.array([side, 0, 0], float), 6.0)] * 10
    lung = body.mask.copy()
    while ends:
        at, heading, radius = ends.pop()
        for _ in range(int(rng.integers(4, 8))):
            heading = heading + rng.normal(0, 0.35, 3)
            heading /= np.linalg.norm(heading)
            at = at + 5 * heading / (1, 1, PIXELS_PER_SLICE)
            x, y, z = np.rint(at).astype(int)
            if not (0 <= z < SLICES and 0 <= y < SIDE and 0 <= x < SIDE and lung[z, y, x]):
                break
            for near in range(z - 2, z + 3):
                size = radius**2 - ((near - at[2]) * PIXELS_PER_SLICE) ** 2
                if 0 <= near < SLICES and size > 0.5:
                    spot = (round(16 * at[0]), round(16 * at[1]))
                    cv2.circle(body.hu[near], spot, round(16 * size**0.5), 40, -1, cv2.LINE_AA, 4)
        else:
            if radius > 1.6:
                for _ in range(2):
                    ends.append((at, heading + rng.normal(0, 0.55, 3), 0.74 * radius))


VERTEBRAE = [
    "L3",
    "L2",
    "L1",
    "T12",
    "T11",
    "T10",
    "T9",
    "T8",
    "T7",
    "T6",
    "T5",
    "T4",
    "T3",
    "T2",
    "T1",
    "C7",
    "C6",
]
VERTEBRA_STARTS = (0, 10, 21, 32, 42, 51, 60, 69, 78, 86, 94, 101, 108, 114, 120, 125, 129, 133)


def draw_spine(body: Body) -> None:
    """Draw vertebrae with discs between them, and the spinal cord."""
    levels = zip(VERTEBRAE, VERTEBRA_STARTS, VERTEBRA_STARTS[1:], strict=False)
    for level, first, last in levels:
        name = f"vertebrae_{level}"
        for z in range(first, last):
            y = spine_y(z)
            size = over_height(z, (0, 30), (60, 23), (110, 20), (132, 15))
            disc = z == last - 1
            if not disc:
                # processes: one to the back, one to each side
                body.ellipse(z, name, MARROW, (MIDDLE, y + 2.05 * size), (4, 0.8 * size))
                for side in (-1, 1):
                    at = (MIDDLE + side * 1.15 * size, y + 1.1 * size)
                    body.ellipse(z, name, MARROW, at, (0.6 * size, 5), side * 14)
            body.ellipse(
                z,
                "" if disc else name,
                80 if disc else BONE,
                (MIDDLE, y),
                (1.16 * size, 0.86 * size),
            )
            if not disc:
                body.ellipse(z, name, MARROW, (MIDDLE, y), (1.03 * size, 0.73 * size))
                body.ellipse(z, name, BONE, (MIDDLE, y + 1.25 * size), (0.75 * size, 0.66 * size))
            canal = (MIDDLE, y + 1.2 * size)
            body.ellipse(z, "", FLUID, canal, (0.52 * size, 0.44 * size))
            body.ellipse(z, "spinal_cord", 38, canal, (max(5, 0.36 * size), max(4, 0.28 * size)))


def draw_ribs(body: Body) -> None:
    """Draw twelve pairs of ribs that fall from the back to the front, their cartilage, the sternum."""
    for number in range(1, 13):
        back = over_height(number, (1, 119), (4, 104), (8, 76), (12, 27))
        fall = over_height(number, (1, 12), (5, 40), (8, 46), (12, 12))
        end = over_height(number, (1, 0.80), (7, 0.80), (10, 0.62), (12, 0.32))
        for side, word in ((-1, "right"), (1, "left")):
            line = []
            for share in np.linspace(0, 1, 90):
                z = back - fall * share
                across, along = chest_size(z)
                # from beside the spine, round the side, to the front
                turn = np.pi * (0.06 + 0.94 * share)
                x = MIDDLE + side * (across - 5) * np.sin(turn)
                y = chest_middle(z) + (along - 6) * np.cos(turn) * 0.97
                line.append((x, y, z, 6.0))
            bony = round(end * len(line))
            body.tube(Tube(f"rib_{word}_{number}", BONE, tuple(line[:bony]), inside=MARROW + 60))
            if number < 8:
                rest = [
                    (x, y, z + 0.35 * fall * (i / 18), 6.0)
                    for i, (x, y, z, _) in enumerate(line[bony:])
                ]
                body.tube(Tube("costal_cartilages", 110, tuple(rest)))
    for z in range(60, 117):
        y = chest_middle(z) - chest_size(z)[1] + 8
        wide = over_height(z, (60, 12), (70, 22), (108, 24), (117, 34))
        body.ellipse(z, "sternum", BONE - 100, (MIDDLE, y), (wide, 9))
        body.ellipse(z, "sternum", MARROW - 60, (MIDDLE, y), (wide - 3, 6))


def draw_shoulders(body: Body) -> None:
    """Draw shoulder blades, collar bones and the heads of the upper arms."""
    for side, word in ((-1, "right"), (1, "left")):

        def beside(x: float, at: int = side) -> float:
            return MIDDLE + at * x

        for z in range(76, 131):
            length = over_height(z, (76, 8), (100, 46), (131, 40))
            at = (
                beside(over_height(z, (76, 118), (131, 132))),
                chest_middle(z) + over_height(z, (76, 104), (131, 62)),
            )
            body.ellipse(z, f"scapula_{word}", BONE, at, (length, 5), side * -38)
        points = ((beside(30), 172, 116, 8), (beside(84), 176, 119, 7), (beside(146), 226, 124, 8))
        body.tube(Tube(f"clavicula_{word}", BONE, points, inside=MARROW + 60))
        for z in range(117, SLICES):
            size = over_height(z, (117, 20), (126, 30), (132, 26))
            at = (beside(186), 276)
            body.ellipse(z, f"humerus_{word}", BONE, at, (size, size))
            body.ellipse(z, f"humerus_{word}", MARROW - 40, at, (size - 5, size - 5))


def draw_belly(body: Body) -> None:
    """Draw the organs below the diaphragm."""
    rng = np.random.default_rng(2)
    liver = [
        Blob("liver", LIVER, (172, 226, 40), (94, 96, 27), 10),
        Blob("liver", LIVER, (168, 236, 24), (82, 84, 20), 6),
        Blob("liver", LIVER, (262, 172, 42), (76, 46, 16), 12),
    ]
    parts = [
        *liver,
        Blob("gallbladder", 12, (206, 190, 16), (17, 24, 8), 20),
        Blob("spleen", 125, (386, 296, 40), (36, 52, 13), -28),
        Blob("stomach", SOFT, (326, 204, 30), (52, 64, 15), 24, inside=18),
        Blob("stomach", SOFT, (300, 176, 14), (60, 34, 9), -10, inside=18),
        Blob("pancreas", 78, (236, 212, 14), (30, 20, 9), 12),
        Blob("pancreas", 78, (296, 222, 21), (56, 13, 6), -24),
        Blob("kidney_right", 190, (178, 268, 11), (34, 40, 14), -24, inside=120),
        Blob("kidney_left", 190, (336, 270, 13), (34, 40, 14), 24, inside=120),
        Blob("adrenal_gland_right", 62, (214, 266, 29), (7, 18, 5), 18),
        Blob("adrenal_gland_left", 62, (312, 264, 28), (9, 17, 6), -22),
        Blob("duodenum", 40, (204, 214, 8), (20, 22, 9), 0, inside=15),
        Blob("duodenum", 40, (256, 236, 3), (56, 13, 4), 0, inside=15),
    ]
    for part in parts:
        body.blob(part)
    # the gas of the stomach lies in front
    body.blob(Blob("stomach", -900, (330, 172, 32), (32, 22, 9), 24))
    for _ in range(26):
        x, y, z = rng.uniform((258, 150, 0), (372, 226, 12))
        body.blob(Blob("small_bowel", 55, (x, y, z), (16, 14, 5), rng.uniform(0, 180), inside=20))
    colon = [(92, 236, 0, 25), (98, 206, 14, 26), (150, 148, 12, 22), (256, 128, 8, 20)]
    colon += [(352, 150, 18, 22), (410, 214, 34, 25), (414, 250, 16, 22), (410, 262, 0, 20)]
    body.tube(Tube("colon", 45, tuple(colon), inside=-60))
    for share in np.linspace(0.02, 0.98, 30):
        at = share * (len(colon) - 1)
        low = int(at)
        x, y, z, _ = np.array(colon[low]) + (at - low) * (
            np.array(colon[low + 1]) - np.array(colon[low])
        )
        body.blob(Blob("colon", -880, (x, y - 4, z), (13, 9, 4), rng.uniform(0, 180)))


def draw_heart_and_vessels(body: Body) -> None:
    """Draw the heart, the great vessels and the pipes of the neck."""
    body.blob(Blob("heart", 95, (288, 226, 66), (84, 66, 20), 34))
    body.blob(Blob("heart", BLOOD, (314, 238, 64), (42, 30, 14), 34))
    body.blob(Blob("heart", BLOOD - 30, (262, 204, 66), (44, 28, 14), 28))
    body.blob(Blob("heart", BLOOD, (276, 256, 72), (38, 20, 6), 0))
    body.blob(Blob("atrial_appendage_left", BLOOD, (304, 246, 80), (18, 14, 4), 20))
    for side in (-1, 1):
        root = ((MIDDLE + 18 + side * 26, 272, 76, 8), (MIDDLE + 18 + side * 58, 276, 78, 6))
        body.tube(Tube("pulmonary_vein", BLOOD, root))
    tubes = [
        Tube("inferior_vena_cava", 105, ((226, 244, 0, 14), (226, 246, 40, 14), (222, 236, 58, 14))),
        Tube("superior_vena_cava", 290, ((214, 236, 70, 12), (214, 222, 100, 11))),
        Tube("aorta", 250, ((262, 222, 78, 18), (244, 210, 94, 18), (262, 222, 103, 17),
                            (288, 264, 104, 16), (294, 296, 96, 16), (292, 304, 80, 15),
                            (280, 296, 50, 15), (266, 260, 24, 14), (262, 236, 0, 12))),
        Tube("portal_vein_and_splenic_vein", 150, ((372, 280, 34, 6), (310, 244, 26, 7),
                                                   (246, 224, 23, 9), (206, 214, 30, 9))),
        Tube("brachiocephalic_trunk", 250, ((246, 212, 104, 8), (228, 214, 114, 7))),
        Tube("common_carotid_artery_left", 240, ((264, 216, 105, 5), (274, 226, 132, 5))),
        Tube("common_carotid_artery_right", 240, ((226, 214, 115, 5), (222, 222, 132, 5))),
        Tube("subclavian_artery_left", 240, ((282, 244, 105, 6), (292, 246, 118, 6), (350, 234, 122, 5))),
        Tube("subclavian_artery_right", 240, ((222, 216, 115, 6), (180, 232, 121, 5))),
        Tube("brachiocephalic_vein_left", 180, ((216, 216, 101, 9), (262, 200, 106, 8), (296, 206, 116, 8))),
        Tube("brachiocephalic_vein_right", 280, ((212, 216, 101, 9), (200, 210, 115, 8))),
        Tube("trachea", 20, ((250, 262, 86, 14), (252, 234, 126, 13)), inside=-960),
        Tube("trachea", 20, ((250, 262, 86, 11), (210, 266, 80, 8)), inside=-950),
        Tube("trachea", 20, ((250, 262, 86, 11), (294, 268, 79, 8)), inside=-950),
        Tube("esophagus", 40, ((292, 234, 44, 9), (262, 282, 62, 9), (258, 286, 90, 9), (258, 262, 124, 8))),
    ]  # fmt: skip
    for tube in tubes:
        body.tube(tube)
    for side in (-1, 1):
        body.blob(Blob("thyroid_gland", 150, (252 + side * 22, 228, 124), (10, 15, 6), side * 10))


def draw_body() -> Body:
    """Draw all of it; what is drawn later lies in front."""
    body = Body()
    draw_wall(body)
    draw_lungs(body)
    draw_belly(body)
    draw_heart_and_vessels(body)
    draw_ribs(body)
    draw_shoulders(body)
    draw_spine(body)
    return body


def make_natural(body: Body, seed: int = 0) -> None:
    """Bend everything a little, mottle the organs, and add the noise of a scanner."""
    rng = np.random.default_rng(seed)
    shape = (SLICES, SIDE, SIDE)
    # over some slices the body has moved so far that they are no twins, as in a real one
    bends = [smooth_noise(rng, (SLICES // 7, 8, 8), shape) * 6 for _ in range(2)]
    mottle = smooth_noise(rng, (45, 60, 60), shape) * 7
    columns, rows = np.meshgrid(
        np.arange(SIDE, dtype=np.float32), np.arange(SIDE, dtype=np.float32)
    )
    for z in range(SLICES):
        moved = columns + bends[0][z], rows + bends[1][z]
        hu = cv2.remap(body.hu[z], *moved, cv2.INTER_LINEAR, borderValue=AIR)
        body.mask[z] = cv2.remap(body.mask[z], *moved, cv2.INTER_NEAREST, borderValue=0)
        hu = hu + np.where(hu > -200, mottle[z], mottle[z] * 2)
        noise = ndimage.gaussian_filter(rng.normal(0, 1, hu.shape), 0.8)
        body.hu[z] = ndimage.gaussian_filter(hu, 0.7) + NOISE * noise / noise.std()


def smooth_noise(rng: np.random.Generator, grid: tuple, shape: tuple) -> np.ndarray:
    """Draw normal numbers on a coarse grid, and read them off in between."""
    coarse = rng.normal(0, 1, grid).astype(np.float32)
    factors = [size / cells for size, cells in zip(shape, grid, strict=True)]
    return ndimage.zoom(coarse, factors, order=1)[: shape[0], : shape[1], : shape[2]]


def write(body: Body, folder: Path) -> None:
    """Write CT, mask and table under the names that `data/ct.py` looks for."""
    folder.mkdir(parents=True, exist_ok=True)
    affine = np.diag([-MM_PER_PIXEL, -MM_PER_PIXEL, MM_PER_SLICE, 1.0])
    volumes = {
        "cxr.nii.gz": np.rint(body.hu).clip(-1024, 3071).astype(np.int16),
        "mask.nii.gz": body.mask,
    }
    for name, volume in volumes.items():
        image = nibabel.Nifti1Image(volume.transpose(2, 1, 0), affine)
        image.header.set_xyzt_units("mm")
        nibabel.save(image, folder / name)
    lines = ["id,structure", *(f"{number},{name}" for name, number in body.numbers.items())]
    (folder / "structures.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="what is written")
    folder = parser.parse_args().folder
    body = draw_body()
    make_natural(body)
    write(body, folder)
    print(f"{folder}: {SLICES} slices, {len(body.numbers)} structures")


if __name__ == "__main__":
    main()
