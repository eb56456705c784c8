"""Build questions about several pictures, with answers that are known: slabs, an earlier picture, a
record.

Everything is made from the course's CT and its mask, as `build_sample.py` makes its pictures: the
same virtual people, the same held-out blocks of slices, the same drawn findings. Seven tasks:

* ``count``: in how many of four neighbouring slices is the lesion, in which is it largest, and how
  wide is it there;
* ``height``: the question says how far apart the slices are: how high is the lesion, in mm;
* ``presence``: is the named structure in this slab at all;
* ``direction``: which way does a drawn vessel move from slice to slice;
* ``border``: which way does a real vessel, or the border of a lung, shift from slice to slice;
* ``change``: an earlier picture and one of now: what became of the lesion;
* ``record``: a short record says whether a lesion is known, and how high a laboratory value is; the
  picture says whether there is a lesion.

Each answer is dealt out after all that the question says is fixed, so that words alone never tell it.

Run ``python data/build_volumes.py`` (or ``make sample``); see ``data/README.md``.
"""

import argparse
import multiprocessing
import os
import sys
import uuid
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw
from tqdm import tqdm

# the other files of this folder, also when this one is loaded by its path
sys.path.insert(0, str(Path(__file__).resolve().parent))
import build_sample as sample
from build_sample import PLACES, WINDOWS
from findings import FINDINGS, VESSELS, VISIBLE, Finding, draw_finding, draw_vessel, shown_contrast
from people import draw_person, scanned_person

# slices of a slab; they are neighbours, since a held-out block has five or six
PICTURES = 4
# The sample's validation blocks have two slices, too few for a slab: these are held out instead, one
# with organs of the belly and one without, so that presence can be asked for.
# The tiny base has seen them, so they serve to watch a training and to choose, not to judge.
VALIDATION_BLOCKS = ((60, 64), (104, 108))
# Virtual people to train on, to choose by and to judge by; the scanned person is among the last.
PEOPLE, VALIDATION_PEOPLE, TEST_PEOPLE = 24, 6, 5
# how many people each training slab is shown of
PEOPLE_A_SLAB = 6
TASKS = ("count", "height", "presence", "direction", "border", "change", "record")
# Questions of each task about a slab. Who reads has to read many: a record has most to learn.
QUESTIONS = {
    "count": 2,
    "height": 2,
    "presence": 3,
    "direction": 2,
    "border": 2,
    "change": 3,
    "record": 4,
}

SIDE = 256
# half of what a magnified picture shows, as a share of the frame's side
MAGNIFIED = 0.55
# thickness of a frame, in pixels of the whole slice
LINE = 3.5
# smallest and largest half width of a lesion, in pixels, and what a region must have room for
SMALLEST, LARGEST, ROOM = 8.0, 18.0, 9.0
# a lesion is so much narrower one slice above or below
FALL = 0.78
# a frame of an earlier picture may lie so many pixels beside that of now
SHIFT = 5.0
CHINESE = 0.2
# A structure is in a slab if it has so many pixels in one of its slices, and is not if it has none.
PRESENT = 600
NAMES = ("heart", "liver", "spleen", "stomach", "colon", "left kidney")
# A name is asked for only if training has so many places with it and so many without: the spleen,
# for one, lies almost whole in a held-out block, and nobody can learn what is never shown.
FEWEST_PLACES = 8

# What a question may say of the distance of two slices, in mm. A virtual person may be so tall.
SPACINGS = (2, 3, 4, 5)

# Real vessels, by their names in the mask: English, Chinese
REAL_VESSELS = {
    "aorta": ("aorta", "主动脉"),
    "inferior_vena_cava": ("inferior vena cava", "下腔静脉"),
    "superior_vena_cava": ("superior vena cava", "上腔静脉"),
    "pulmonary_vein": ("pulmonary vein", "肺静脉"),
    "brachiocephalic_vein_left": ("left brachiocephalic vein", "左头臂静脉"),
    "brachiocephalic_vein_right": ("right brachiocephalic vein", "右头臂静脉"),
    "common_carotid_artery_left": ("left carotid artery", "左颈总动脉"),
    "common_carotid_artery_right": ("right carotid artery", "右颈总动脉"),
    "subclavian_artery_left": ("left subclavian artery", "左锁骨下动脉"),
}
LUNGS = {  # prefix of the lobes' names, side: English, Chinese
    "left": ("left lung", "左肺"),
    "right": ("right lung", "右肺"),
}
# A shift is asked for where it is so large a share of the frame's side, and this many times as large
# as that along the other axis.
LEAST_SHIFT, STRAIGHT = 0.12, 1.6
SHIFTS = {  # English, Chinese
    "left": ("It shifts to the left.", "它向左偏移。"),
    "right": ("It shifts to the right.", "它向右偏移。"),
    "up": ("It shifts upwards.", "它向上偏移。"),
    "down": ("It shifts downwards.", "它向下偏移。"),
}

# width of a lesion as a share of its frame, well inside the limits of `build_sample.SIZES`
SHARES = ((0.08, 0.13), (0.17, 0.23), (0.28, 0.38))
COUNTS = tuple(range(PICTURES + 1))
DIRECTIONS = {  # (across, down): English, Chinese
    "left": (
        (-1, 0),
        "It moves from the middle right to the middle left part.",
        "它从右中部移到左中部。",
    ),
    "right": (
        (1, 0),
        "It moves from the middle left to the middle right part.",
        "它从左中部移到右中部。",
    ),
    "up": (
        (0, -1),
        "It moves from the lower middle to the upper middle part.",
        "它从下中部移到上中部。",
    ),
    "down": (
        (0, 1),
        "It moves from the upper middle to the lower middle part.",
        "它从上中部移到下中部。",
    ),
}
PRESENCE = {  # English, Chinese
    True: ("Yes, it is there.", "有。"),
    False: ("No, it is not there.", "没有。"),
}
CHANGES = {  # English, Chinese
    "grown": ("The lesion has grown.", "病灶变大了。"),
    "shrunk": ("The lesion has shrunk.", "病灶变小了。"),
    "same": ("The lesion is the same.", "病灶没有变化。"),
    "new": ("The lesion is new.", "病灶是新的。"),
    "gone": ("The lesion is gone.", "病灶不见了。"),
}
ASK = {  # English, Chinese
    "count": (
        "In how many of the pictures is the lesion, in which is it largest, and how wide is it there?",
        "病灶出现在几张图里？在哪张图里最大，有多宽？",
    ),
    "height": (
        "In how many pictures is the lesion, and how high is it in mm?",
        "病灶出现在几张图里？高多少毫米？",
    ),
    "presence": ("Is the {} in any of the pictures?", "图里有没有{}？"),
    "direction": (
        "Which way does the bright vessel move from picture 1 to picture 4?",
        "从图1到图4，亮的血管怎样移动？",
    ),
    "border": (
        "Which way does the {} shift from picture 1 to picture 4?",
        "从图1到图4，{}向哪边偏移？",
    ),
    "change": (
        "Picture 1 is earlier, picture 2 is now. How has the lesion changed?",
        "图1是以前，图2是现在。病灶有什么变化？",
    ),
    "record": (
        "Does the record know of a lesion, is the creatinine raised, and is there a lesion in the "
        "frame? Picture 2 is the frame, larger.",
        "病历里有没有已知的病灶？肌酐高不高？方框里有没有病灶？图2是放大的方框。",
    ),
}
SPACING = ("The pictures are {} mm apart.", "相邻两张图相距{}毫米。")
BORDER_OF = ("border of the {}", "{}的边缘")
KNOWN = {  # what the record knows: English, Chinese
    True: ("The record knows of a lesion.", "病历里有已知的病灶。"),
    False: ("The record knows of no lesion.", "病历里没有已知的病灶。"),
}
RAISED = {  # what the record says of the creatinine: English, Chinese
    True: ("The creatinine is raised.", "肌酐升高。"),
    False: ("The creatinine is normal.", "肌酐正常。"),
}
# mg/dl; what lies between is neither
HIGHEST_NORMAL, LOWEST_RAISED = 1.2, 1.4
# what an earlier report said: English, Chinese
REPORTS = {
    True: (
        ("Earlier report: a lesion is known.", "以前的报告：有已知病灶。"),
        ("Last year a lesion was seen.", "去年发现一个病灶。"),
        ("A lesion was found before.", "以前发现过病灶。"),
    ),
    False: (
        ("Earlier report: no lesion.", "以前的报告：没有病灶。"),
        ("Last year no lesion was seen.", "去年没有发现病灶。"),
        ("No lesion was found before.", "以前没有发现过病灶。"),
    ),
}
COMPLAINTS = (
    ("cough", "咳嗽"),
    ("pain", "疼痛"),
    ("weight loss", "体重下降"),
    ("fever", "发热"),
    ("check-up", "体检"),
)


# ---------------------------------------------------------------- which slices, whose
def split_of(z: int) -> str | None:
    """Return the split of a slice for slabs: that of the sample, with validation blocks of its own."""
    for low, high in VALIDATION_BLOCKS:
        if low <= z <= high:
            return "validation"
        if low - sample.GAP <= z <= high + sample.GAP:
            return None
    split = sample.split_of(z)
    return None if split == "validation" else split


def group_of(z: int) -> str:
    """Return the block of slices that `z` belongs to, as the sample names it."""
    for number, (low, high) in enumerate(VALIDATION_BLOCKS):
        if low <= z <= high:
            return f"held-out-block-{8 + number}"
    return sample.group_of(z)


@dataclass(frozen=True)
class Job:
    """All questions about one slab of one person.

    Attributes
    ----------
    first : its lowest slice.
    split : where its questions go.
    person : number of the person.
    turn : number of the job in its split; the answers are dealt out by it.
    seed : of all that is drawn.
    presence : structures to ask for, each with whether it is there.
    """

    first: int
    split: str
    person: int
    turn: int
    seed: int
    presence: tuple[tuple[str, bool], ...] = field(default=())


def slab_starts(split: str) -> list[int]:
    """List the lowest slices of all slabs that lie in one split and, if held out, in one block."""
    starts = []
    for first in range(sample.SLICES - PICTURES + 1):
        slices = range(first, first + PICTURES)
        if all(split_of(z) == split for z in slices):
            starts.append(first)
    return starts


def people_of(split: str) -> list[int]:
    """Number the people whose slabs a split shows; 0 is the scanned person."""
    if split == "train":
        return list(range(1, PEOPLE + 1))
    first = PEOPLE + 1
    if split == "validation":
        return list(range(first, first + VALIDATION_PEOPLE))
    first += VALIDATION_PEOPLE
    return [0, *range(first, first + TEST_PEOPLE)]


def list_jobs(source: sample.Source, seed: int) -> list[Job]:
    """List the slabs of all splits, in an order that says nothing of place or person."""
    jobs = []
    for number, split in enumerate(("train", "validation", "test")):
        rng = np.random.default_rng([seed, number, 13])
        people = people_of(split)
        shown = []
        for place, first in enumerate(slab_starts(split)):
            # a training slab is shown of a few people, who take turns; a held-out one of all
            chosen = people
            if split == "train":
                turns = range(place * PEOPLE_A_SLAB, (place + 1) * PEOPLE_A_SLAB)
                chosen = [people[turn % len(people)] for turn in turns]
            shown += [(first, person) for person in chosen]
        shown = [shown[i] for i in rng.permutation(len(shown))]
        of_split = [
            Job(first, split, person, turn, seed) for turn, (first, person) in enumerate(shown)
        ]
        jobs += deal_presence(of_split, source, rng)
    return jobs


def deal_presence(jobs: list[Job], source: sample.Source, rng: np.random.Generator) -> list[Job]:
    """Choose which structures each slab is asked for: each as often where it is as where it is not.

    So neither the name nor the question tells the answer.
    """
    pixels = pixels_of_names(source)
    asked: dict[int, list[tuple[str, bool]]] = {job.turn: [] for job in jobs}
    names = taught_names(pixels)
    most = len(jobs) * QUESTIONS["presence"] // (2 * len(names)) + 1
    for name in names:
        there = []
        absent = []
        for job in jobs:
            is_there = shown_in(pixels[name], job.first)
            if is_there is not None:
                (there if is_there else absent).append(job.turn)
        times = min(len(there), len(absent), most)
        for turns, answer in ((there, True), (absent, False)):
            for turn in rng.permutation(turns)[:times]:
                asked[int(turn)].append((name, answer))
    return [replace(job, presence=tuple(asked[job.turn])) for job in jobs]


def shown_in(pixels: list[int], first: int) -> bool | None:
    """Say whether a slab shows what has so many pixels in each slice; None if it shows too little."""
    largest = max(pixels[first : first + PICTURES])
    if 0 < largest < PRESENT:
        return None
    return largest > 0


def taught_names(pixels: dict[str, list[int]]) -> list[str]:
    """List the names that training shows in enough places, and in enough places not."""
    taught = []
    for name in NAMES:
        shown = [shown_in(pixels[name], first) for first in slab_starts("train")]
        if min(shown.count(True), shown.count(False)) >= FEWEST_PLACES:
            taught.append(name)
    return taught


def pixels_of_names(source: sample.Source) -> dict[str, list[int]]:
    """Count the pixels of each structure in each slice of the CT."""
    scan = source.scan
    labels: dict[str, list[int]] = {name: [] for name in NAMES}
    for label, raw in scan.names.items():
        info = sample.describe_structure(raw)
        if info and info[0] in labels:
            labels[info[0]].append(label)
    counts = [np.bincount(plane.ravel(), minlength=256) for plane in scan.mask]
    return {name: [int(count[own].sum()) for count in counts] for name, own in labels.items()}


# ---------------------------------------------------------------- places for a lesion
@dataclass(frozen=True)
class Region:
    """A structure that goes through all slices of a slab.

    Attributes
    ----------
    english, chinese, kind : what it is.
    part : where it lies in every slice, bool.
    depth : distance of each pixel to its edge, in pixels.
    window : in which it is shown.
    """

    english: str
    chinese: str
    kind: str
    part: np.ndarray
    depth: np.ndarray
    window: str


def roomy_regions(cuts: list[sample.Slice]) -> list[Region]:
    """List the structures in which a lesion has room, in the same place of every slice."""
    regions = []
    for label, raw in cuts[0].names.items():
        info = sample.describe_structure(raw)
        if info is None or info[2] not in FINDINGS:
            continue
        part = np.logical_and.reduce([cut.mask == label for cut in cuts])
        if part.sum() < 4 * ROOM**2:
            continue
        depth = cv2.distanceTransform(part.astype(np.uint8), cv2.DIST_L2, 5)
        if depth.max() > ROOM + 1:
            window = sample.USUAL_WINDOW.get(info[2], "soft tissue")
            regions.append(Region(*info, part, depth, window))
    return regions


@dataclass(frozen=True)
class Plan:
    """A lesion and its frame, before the answer is dealt out.

    Attributes
    ----------
    lesion : as wide as it gets.
    shade : "dark" or "bright" beside its surroundings, English and Chinese.
    corner : left and upper edge of the frame, in pixels of the slice.
    side : of the frame.
    cell : in which of the nine parts of the frame the lesion lies.
    size : which of SHARES its width is of the frame.
    """

    lesion: Finding
    shade: tuple[str, str]
    corner: tuple[float, float]
    side: float
    cell: int
    size: int


def shows_body(mask: np.ndarray, corner: tuple[float, float], side: float) -> bool:
    """Say whether enough of a frame is body, and not the air around it."""
    left, top = (max(0, round(value)) for value in corner)
    inside = mask[top : round(corner[1] + side), left : round(corner[0] + side)] > 0
    return inside.sum() > 0.4 * side**2


def plan_lesion(
    cut: sample.Slice, region: Region, size: int, rng: np.random.Generator, margin: float = 5.0
) -> Plan | None:
    """Plan a lesion that would show in the region's window, and a frame around it.

    Returns None where none would show, whatever the answer will be.
    """
    hu = cut.hu
    share = rng.uniform(*SHARES[size])
    # a larger frame would show more than half of the body
    most = min(LARGEST, float(region.depth.max()) - 1, 110 * share)
    if most < SMALLEST:
        return None
    radius = rng.uniform(SMALLEST, most)
    fits = np.argwhere(region.depth > radius)
    row, column = fits[rng.integers(len(fits))]
    kinds = FINDINGS[region.kind]
    name, name_zh, relative, absolute = kinds[rng.integers(len(kinds))]
    usual = float(np.median(hu[region.part]))
    density = absolute if relative is None else usual + relative
    lesion = Finding(
        name,
        name_zh,
        (float(column), float(row)),
        (radius, radius * rng.uniform(0.85, 1)),
        float(rng.uniform(0, np.pi)),
        float(density),
    )
    if shown_contrast(hu, lesion, WINDOWS[region.window][0]) < VISIBLE:
        return None
    side = 2 * radius / share
    cell = int(rng.integers(9))
    # where in the frame the lesion lies: well inside a cell, and off the frame itself
    edge = (radius + margin) / side
    within = [(part + rng.uniform(0.3, 0.7)) / 3 for part in (cell % 3, cell // 3)]
    within = [float(np.clip(share_of_side, edge, 1 - edge)) for share_of_side in within]
    corner = (column - within[0] * side, row - within[1] * side)
    if not shows_body(cut.mask, corner, side):
        return None
    cell = sample.place_index(*within)
    shade = ("bright", "亮") if density > usual else ("dark", "暗")
    return Plan(lesion, shade, corner, side, cell, size)


def resized(lesion: Finding, factor: float) -> Finding:
    """Make a lesion wider or narrower in the same place."""
    return replace(lesion, radii=(lesion.radii[0] * factor, lesion.radii[1] * factor))


# ---------------------------------------------------------------- pictures
def magnify(
    hu: np.ndarray,
    corner: tuple[float, float],
    side: float,
    window: str,
    moved: np.ndarray | None = None,
) -> Image.Image:
    """Show a frame as large as it goes; `moved` (2, 3) moves the slice below it."""
    half = MAGNIFIED * side
    zoom = SIDE / (2 * half)
    left = corner[0] + side / 2 - half
    top = corner[1] + side / 2 - half
    view = np.array([[zoom, 0, -zoom * left], [0, zoom, -zoom * top]])
    if moved is not None:
        view = view @ np.vstack([moved, [0, 0, 1]])
    shown = cv2.warpAffine(hu, view, (SIDE, SIDE), borderValue=-1024.0)
    picture = Image.fromarray(sample.window_picture(shown, window)).convert("RGB")
    edge = (half - side / 2) * zoom
    box = (edge, edge, SIDE - edge, SIDE - edge)
    return framed(picture, box, max(2, round(LINE * zoom)))


def whole(hu: np.ndarray, turn: np.ndarray, window: str) -> Image.Image:
    """Show a whole slice, turned by `turn` (2, 3) in pixels of the slice."""
    zoom = SIDE / sample.SIDE
    # what is made smaller is smoothed before, or noise becomes speckle
    smooth = cv2.GaussianBlur(hu, (0, 0), 0.6)
    shown = cv2.warpAffine(smooth, zoom * turn, (SIDE, SIDE), borderValue=-1024.0)
    return Image.fromarray(sample.window_picture(shown, window)).convert("RGB")


def whole_with_frame(
    cut: sample.Slice, hu: np.ndarray, plan: "Plan", window: str, rng: np.random.Generator
) -> Image.Image:
    """Show a whole slice with the frame of a plan, not turned, since frames stand upright."""
    turn = turn_to_body(cut.mask, 0, rng.uniform(0.75, 0.9))
    scale = SIDE / sample.SIDE
    corners = np.array([plan.corner, np.add(plan.corner, plan.side)])
    corners = scale * (corners @ turn[:, :2].T + turn[:, 2])
    return framed(whole(hu, turn, window), tuple(corners.ravel()), 2)


def framed(picture: Image.Image, box: tuple[float, ...], line: int) -> Image.Image:
    """Draw a green frame; `box` is its inner edge."""
    outer = [box[0] - line, box[1] - line, box[2] + line, box[3] + line]
    out = picture.copy()
    corners = [round(value) for value in outer]
    ImageDraw.Draw(out).rectangle(corners, outline=(0, 255, 0), width=line)
    return out


def turn_to_body(mask: np.ndarray, angle: float, share: float) -> np.ndarray:
    """Turn a whole slice, and zoom it so that the organs fill this share of the picture.

    Returns the matrix (2, 3) in pixels of the slice.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    middle = np.array([columns[0] + columns[-1], rows[0] + rows[-1]]) / 2
    extent = max(columns[-1] - columns[0], rows[-1] - rows[0])
    turn = cv2.getRotationMatrix2D(tuple(middle), angle, share * sample.SIDE / extent)
    turn[:, 2] += sample.SIDE / 2 - middle
    return turn


def another_scan(plan: Plan, rng: np.random.Generator) -> np.ndarray:
    """Say how a second scan of the same person lies: a little turned and shifted."""
    middle = (plan.corner[0] + plan.side / 2, plan.corner[1] + plan.side / 2)
    moved = cv2.getRotationMatrix2D(middle, rng.uniform(-3, 3), rng.uniform(0.97, 1.03))
    moved[:, 2] += rng.uniform(-SHIFT, SHIFT, 2)
    return moved


def with_noise(hu: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return hu + rng.normal(0, rng.uniform(0, 12), hu.shape).astype(np.float32)


# ---------------------------------------------------------------- the tasks
@dataclass
class Question:
    """One question with its pictures.

    Attributes
    ----------
    task : one of TASKS.
    pictures : in the order in which they are shown.
    slices : the slice of each.
    ask, answer : (English, Chinese).
    window, structure : as in the sample.
    record : what the record, or the distance of the slices, says, (English, Chinese), or None.
    """

    task: str
    pictures: list[Image.Image]
    slices: list[int]
    ask: tuple[str, str]
    answer: tuple[str, str]
    window: str
    structure: str
    record: tuple[str, str] | None = None


@dataclass(frozen=True)
class Slab:
    """The slices of a job as they are drawn, and the regions in which a lesion has room."""

    job: Job
    cuts: list[sample.Slice]
    regions: list[Region]

    def slices(self) -> list[int]:
        """Number its slices, the lowest first."""
        return list(range(self.job.first, self.job.first + PICTURES))


def some_plan(
    slab: Slab, cut: sample.Slice, size: int, rng: np.random.Generator, margin: float = 5.0
) -> tuple[Region, Plan] | None:
    """Plan a lesion in some region of the slab; None where none would show."""
    for _ in range(20):
        if not slab.regions:
            return None
        region = slab.regions[rng.integers(len(slab.regions))]
        plan = plan_lesion(cut, region, size, rng, margin)
        if plan is not None:
            return region, plan
    return None


def ask_count(slab: Slab, deal: int, rng: np.random.Generator) -> Question | None:
    """In how many slices is the lesion, where is it largest, and how wide?"""
    size = deal % len(SHARES)
    planned = some_plan(slab, slab.cuts[0], size, rng)
    if planned is None:
        return None
    region, plan = planned
    # The answer is dealt out after all that the pictures without it show. 3, 4 and 5 have no common
    # divisor, so that all combinations come up equally often.
    count = COUNTS[deal % len(COUNTS)]
    largest = deal % PICTURES
    first = first_slice(count, largest, rng)
    pictures = draw_lesion(slab, plan, region.window, range(first, first + count), largest, rng)
    answer = count_words(count, largest, size)
    return Question(
        "count", pictures, slab.slices(), ASK["count"], answer, region.window, region.english
    )


def draw_lesion(  # noqa: PLR0913 - what makes the pictures of one lesion
    slab: Slab,
    plan: Plan,
    window: str,
    places: range,
    largest: int,
    rng: np.random.Generator,
) -> list[Image.Image]:
    """Draw a lesion into some slices of a slab, smaller the farther from its largest one."""
    pictures = []
    for place, cut in enumerate(slab.cuts):
        hu = cut.hu
        if place in places:
            hu = draw_finding(hu, resized(plan.lesion, FALL ** abs(place - largest)), rng)
        pictures.append(magnify(hu, plan.corner, plan.side, window))
    return pictures


def first_slice(count: int, largest: int, rng: np.random.Generator) -> int:
    """Draw the first of `count` slices in a row that hold the largest one; 0 where there are none."""
    if count == 0:
        return 0
    lowest = max(0, largest - count + 1)
    highest = min(largest, PICTURES - count)
    return int(rng.integers(lowest, highest + 1))


def count_words(count: int, largest: int, size: int) -> tuple[str, str]:
    """Say in how many pictures a lesion is, and in which, counted from 0, it is how wide."""
    english = f"In {count} of the {PICTURES} pictures."
    chinese = f"在{PICTURES}张图中的{count}张里。"
    if count:
        _, width, width_zh = sample.SIZES[size]
        english += f" It is largest in picture {largest + 1}, about {width} as wide as the frame."
        chinese += f"在图{largest + 1}里最大，宽度约为方框的{width_zh}。"
    return english, chinese


def ask_height(slab: Slab, deal: int, rng: np.random.Generator) -> Question | None:
    """In how many slices is the lesion, and how high is it, if the question says how far they are?"""
    planned = some_plan(slab, slab.cuts[0], 1 + deal % 2, rng)
    if planned is None:
        return None
    region, plan = planned
    spacing = SPACINGS[rng.integers(len(SPACINGS))]
    count = 1 + deal // 2 % PICTURES
    first = int(rng.integers(PICTURES - count + 1))
    largest = first + int(rng.integers(count))
    pictures = draw_lesion(slab, plan, region.window, range(first, first + count), largest, rng)
    # a slice that shows it stands for as much height as the slices are apart
    height = count * spacing
    noun = "picture" if count == 1 else "pictures"
    answer = (
        f"It is in {count} {noun}, so it is {height} mm high.",
        f"它在{count}张图里，所以高{height}毫米。",
    )
    record = (SPACING[0].format(spacing), SPACING[1].format(spacing))
    return Question(
        "height",
        pictures,
        slab.slices(),
        ASK["height"],
        answer,
        region.window,
        region.english,
        record,
    )


def ask_presence(
    slab: Slab,
    name: str,
    there: bool,
    rng: np.random.Generator,  # noqa: FBT001
) -> Question:
    """Is the structure in this slab at all?"""
    chinese = next(
        info[1]
        for info in map(sample.describe_structure, slab.cuts[0].names.values())
        if info and info[0] == name
    )
    turn = turn_to_body(slab.cuts[0].mask, rng.uniform(-8, 8), rng.uniform(0.75, 0.9))
    pictures = [whole(cut.hu, turn, "soft tissue") for cut in slab.cuts]
    ask = (ASK["presence"][0].format(name), ASK["presence"][1].format(chinese))
    answer = PRESENCE[there]
    return Question("presence", pictures, slab.slices(), ask, answer, "soft tissue", name)


@dataclass(frozen=True)
class Way:
    """Where a vessel goes, before it is dealt out in which direction.

    Attributes
    ----------
    region : in which all of it lies.
    middle : column and row of its middle.
    length : from the first slice to the last, in pixels.
    side : of the frame around it.
    radius : of the vessel.
    """

    region: Region
    middle: tuple[float, float]
    length: float
    side: float
    radius: float

    def point(self, direction: str, reach: float) -> tuple[float, float]:
        """Go from the middle, with a reach of -1 to the beginning and with 1 to the end."""
        (across, down), *_ = DIRECTIONS[direction]
        step = reach * self.length / 2
        return (float(self.middle[0] + step * across), float(self.middle[1] + step * down))

    def has_room(self) -> bool:
        """Say whether the vessel could go in each direction without leaving the region."""
        for direction in DIRECTIONS:
            for reach in (1 / 3, 1):
                if depth_at(self.region, self.point(direction, reach)) <= self.radius:
                    return False
        return True


def plan_way(slab: Slab, rng: np.random.Generator) -> Way | None:
    """Plan where a vessel could go in any of the four directions; None where there is no room."""
    regions = [region for region in slab.regions if region.kind in VESSELS]
    if not regions:
        return None
    for _ in range(40):
        region = regions[rng.integers(len(regions))]
        side = rng.uniform(50, 120)
        radius = side * rng.uniform(0.07, 0.1)
        # from well inside one third of the frame to well inside the last
        length = side * rng.uniform(0.5, 0.64)
        fits = np.argwhere(region.depth > radius)
        if not len(fits):
            continue
        row, column = fits[rng.integers(len(fits))]
        way = Way(region, (float(column), float(row)), length, side, radius)
        if way.has_room():
            return way
    return None


def ask_direction(slab: Slab, deal: int, rng: np.random.Generator) -> Question | None:
    """Which way does a vessel move from slice to slice?"""
    way = plan_way(slab, rng)
    if way is None:
        return None
    region = way.region
    relative, absolute = VESSELS[region.kind]
    usual = float(np.median(slab.cuts[0].hu[region.part]))
    density = absolute if relative is None else usual + relative
    shape = (way.radius, way.radius * rng.uniform(0.75, 1))
    vessel = Finding("vessel", "血管", (0, 0), shape, float(rng.uniform(0, np.pi)), density)
    shift = rng.uniform(-0.05, 0.05, 2) * way.side
    corner = tuple(np.array(way.middle) - way.side / 2 + shift)

    direction = list(DIRECTIONS)[deal % len(DIRECTIONS)]
    pictures = []
    for place, cut in enumerate(slab.cuts):
        center = way.point(direction, 2 * place / (PICTURES - 1) - 1)
        hu = draw_finding(cut.hu, replace(vessel, center=center), rng)
        pictures.append(magnify(hu, corner, way.side, region.window))
    _, english, chinese = DIRECTIONS[direction]
    return Question(
        "direction",
        pictures,
        slab.slices(),
        ASK["direction"],
        (english, chinese),
        region.window,
        region.english,
    )


def depth_at(region: Region, point: tuple[float, float]) -> float:
    """Say how far a point (column, row) lies from the region's edge; 0 outside."""
    column, row = (round(value) for value in point)
    rows, columns = region.depth.shape
    if not (0 <= row < rows and 0 <= column < columns):
        return 0.0
    return float(region.depth[row, column])


@dataclass(frozen=True)
class Shift:
    """Something real that shifts from the first slice of a slab to the last.

    Attributes
    ----------
    name : English, Chinese.
    is_lung : whether it is a lung's border, and not a vessel.
    direction : one of SHIFTS, from the lowest slice to the highest.
    corner, side : of the frame around it, in pixels of the slice.
    """

    name: tuple[str, str]
    is_lung: bool
    direction: str
    corner: tuple[float, float]
    side: float


def direction_of(across: float, down: float) -> str | None:
    """Name the axis along which something moves; None where it moves aslant."""
    if abs(across) >= STRAIGHT * abs(down):
        return "right" if across > 0 else "left"
    if abs(down) >= STRAIGHT * abs(across):
        return "down" if down > 0 else "up"
    return None


def only_part(part: np.ndarray) -> bool:
    """Say whether a structure is in a slice in one piece, large enough to have a middle."""
    return part.sum() >= 30 and cv2.connectedComponents(part.astype(np.uint8))[0] == 2


def middle_of(part: np.ndarray) -> np.ndarray:
    """Give the middle of a structure: column, row."""
    rows, columns = np.nonzero(part)
    return np.array([columns.mean(), rows.mean()])


def shift_of_vessel(slab: Slab, raw: str, rng: np.random.Generator) -> Shift | None:
    """Follow a vessel of the mask through the slab; None where it hardly moves, or aslant."""
    label = next(label for label, name in slab.cuts[0].names.items() if name == raw)
    parts = [cut.mask == label for cut in slab.cuts]
    if not all(only_part(part) for part in parts):
        return None
    middles = np.array([middle_of(part) for part in parts])
    across, down = middles[-1] - middles[0]
    direction = direction_of(across, down)
    moved = max(abs(across), abs(down))
    widest = max(2 * np.sqrt(part.sum() / np.pi) for part in parts)
    side = max(moved / rng.uniform(0.15, 0.35), 1.3 * widest + moved)
    if direction is None or moved < LEAST_SHIFT * side:
        return None
    middle = (middles[0] + middles[-1]) / 2 + rng.uniform(-0.05, 0.05, 2) * side
    left, top = middle - side / 2
    return Shift(REAL_VESSELS[raw], False, direction, (float(left), float(top)), float(side))


def shift_of_lung(slab: Slab, side_of_body: str, rng: np.random.Generator) -> Shift | None:
    """Look for a frame in which the border of a lung shifts, straight across or straight down."""
    lobes = [
        label
        for label, name in slab.cuts[0].names.items()
        if name.startswith("lung_") and name.endswith(side_of_body)
    ]
    lungs = [np.isin(cut.mask, lobes) for cut in slab.cuts]
    # where the first and the last slice differ, a border has moved
    differs = np.argwhere(lungs[0] != lungs[-1])
    if not len(differs):
        return None
    for _ in range(60):
        row, column = differs[rng.integers(len(differs))]
        side = int(rng.integers(24, 64))
        left, top = int(column - side // 2), int(row - side // 2)
        if min(left, top) < 0 or max(left, top) + side > slab.cuts[0].mask.shape[0]:
            continue
        inside = [lung[top : top + side, left : left + side] for lung in lungs]
        direction = direction_of_border(inside)
        if direction is not None:
            corner = (float(left), float(top))
            return Shift(LUNGS[side_of_body], True, direction, corner, float(side))
    return None


def direction_of_border(inside: list[np.ndarray]) -> str | None:
    """Say which way a border that stands upright, or lies flat, moves through a frame.

    `inside` has the lung's pixels in each slice. None where it is no such border, or where it goes
    to and fro.
    """
    shares = np.array([part.mean() for part in inside])
    steps = np.diff(shares)
    change = shares[-1] - shares[0]
    goes_one_way = (np.sign(change) * steps >= -0.01).all()
    if abs(change) < LEAST_SHIFT or not goes_one_way:
        return None
    if shares.min() < 0.15 or shares.max() > 0.85:
        return None
    middle = (inside[0].shape[0] - 1) / 2
    towards = [middle_of(part) - middle for part in (inside[0], inside[-1])]
    # the lung lies on this side of its border
    sides = {direction_of(*vector / STRAIGHT) for vector in towards}
    straight = all(max(abs(vector)) >= 3 * min(abs(vector)) for vector in towards)
    if len(sides) != 1 or not straight:
        return None
    [lies] = sides
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    # a lung that grows pushes its border away from itself
    return opposite[lies] if change > 0 else lies


def ask_border(slab: Slab, deal: int, rng: np.random.Generator) -> Question | None:
    """Which way does a real vessel, or the border of a lung, shift from slice to slice?"""
    shifts = []
    # half of the questions are about lungs, where there is one
    for number in rng.permutation(len(REAL_VESSELS)):
        shift = shift_of_vessel(slab, list(REAL_VESSELS)[number], rng)
        if shift is not None:
            shifts.append(shift)
            break
    for side_of_body in rng.permutation(list(LUNGS)):
        shift = shift_of_lung(slab, str(side_of_body), rng)
        if shift is not None:
            shifts.append(shift)
            break
    if not shifts:
        return None
    shift = shifts[deal // 2 % len(shifts)]
    window = "lung" if shift.is_lung else "soft tissue"
    pictures = [magnify(cut.hu, shift.corner, shift.side, window) for cut in slab.cuts]
    slices = slab.slices()
    direction = shift.direction
    if deal % 2:
        # The order is dealt out last: from the head to the feet everything goes the other way.
        opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
        pictures, slices, direction = pictures[::-1], slices[::-1], opposite[direction]
    name, name_zh = shift.name
    if shift.is_lung:
        name, name_zh = BORDER_OF[0].format(name), BORDER_OF[1].format(name_zh)
    ask = (ASK["border"][0].format(name), ASK["border"][1].format(name_zh))
    return Question("border", pictures, slices, ask, SHIFTS[direction], window, shift.name[0])


def ask_change(slab: Slab, deal: int, rng: np.random.Generator) -> Question | None:
    """What became of the lesion between an earlier picture and now?"""
    place = int(rng.integers(PICTURES))
    cut = slab.cuts[place]
    size = 1 + deal // len(CHANGES) % 2
    planned = some_plan(slab, cut, size, rng, margin=SHIFT + 8)
    if planned is None:
        return None
    region, plan = planned
    hu = cut.hu
    if rng.random() < 0.3:
        hu = draw_vessel(hu, region.part, region.kind, rng)
    smaller = rng.uniform(0.45, 0.7)
    # of the others both sizes are shown, so that a single picture does not tell
    either = smaller if rng.random() < 0.5 else 1.0
    factors = {  # earlier, now
        "grown": (smaller, 1.0),
        "shrunk": (1.0, smaller),
        "same": (either, either),
        "new": (None, either),
        "gone": (either, None),
    }
    change = list(CHANGES)[deal % len(CHANGES)]
    pictures = []
    for number, factor in enumerate(factors[change]):
        shown = hu
        if factor is not None:
            denser = replace(plan.lesion, hu=plan.lesion.hu + rng.normal(0, 8))
            shown = draw_finding(shown, resized(denser, factor), rng)
        moved = another_scan(plan, rng) if number == 0 else None
        pictures.append(
            magnify(with_noise(shown, rng), plan.corner, plan.side, region.window, moved)
        )
    z = slab.slices()[place]
    return Question(
        "change", pictures, [z, z], ASK["change"], CHANGES[change], region.window, region.english
    )


def ask_record(slab: Slab, deal: int, rng: np.random.Generator) -> Question | None:
    """What does the record know, how high is its laboratory value, and what does the picture show?

    All in one answer: a question whose pictures are paid for teaches both words of the record.
    """
    place = int(rng.integers(PICTURES))
    cut = slab.cuts[place]
    planned = some_plan(slab, cut, 1 + deal // 8 % 2, rng)
    if planned is None:
        return None
    region, plan = planned
    known, raised = bool(deal % 2), bool(deal // 4 % 2)
    record = write_record(known, raised, rng)
    hu = cut.hu
    if rng.random() < 0.3:
        hu = draw_vessel(hu, region.part, region.kind, rng)
    seen = ("There is no lesion in it.", "里面没有病灶。")
    if deal // 2 % 2:
        hu = draw_finding(hu, plan.lesion, rng)
        spot, spot_zh = PLACES[plan.cell]
        shade, shade_zh = plan.shade
        seen = (
            f"A {shade} lesion is in its {spot} part.",
            f"里面{spot_zh}有一个{shade_zh}的病灶。",
        )
    pictures = [
        whole_with_frame(cut, hu, plan, region.window, rng),
        magnify(hu, plan.corner, plan.side, region.window),
    ]
    z = slab.slices()[place]
    answer = (
        f"{KNOWN[known][0]} {RAISED[raised][0]} {seen[0]}",
        KNOWN[known][1] + RAISED[raised][1] + seen[1],
    )
    return Question(
        "record",
        pictures,
        [z, z],
        ASK["record"],
        answer,
        region.window,
        region.english,
        record,
    )


def write_record(
    known: bool,  # noqa: FBT001
    raised: bool,  # noqa: FBT001
    rng: np.random.Generator,
) -> tuple[str, str]:
    """Write a short record: one sentence says whether a lesion is known, one has the creatinine."""
    woman = rng.random() < 0.5
    age = int(rng.integers(30, 86))
    complaint, complaint_zh = COMPLAINTS[rng.integers(len(COMPLAINTS))]
    creatinine = rng.uniform(LOWEST_RAISED, 3.5) if raised else rng.uniform(0.5, HIGHEST_NORMAL)
    report, report_zh = REPORTS[known][rng.integers(len(REPORTS[known]))]
    sex = "woman" if woman else "man"
    english = (
        f"Record: {sex}, {age} years, {complaint}. Creatinine {creatinine:.1f} mg/dl "
        f"(normal: up to {HIGHEST_NORMAL}). {report}"
    )
    chinese = (
        f"病历：{'女' if woman else '男'}，{age}岁，{complaint_zh}。"
        f"肌酐{creatinine:.1f} mg/dl（正常值：不超过{HIGHEST_NORMAL}）。{report_zh}"
    )
    return english, chinese


# ---------------------------------------------------------------- rows
ASKERS = {
    "count": ask_count,
    "height": ask_height,
    "direction": ask_direction,
    "border": ask_border,
    "change": ask_change,
    "record": ask_record,
}


def make_rows(job: Job) -> list[dict]:
    """Make the rows of all questions about one slab; how many workers there are does not matter."""
    slices = range(job.first, job.first + PICTURES)
    cuts = [sample.drawn_slice(sample.Job(z, job.seed, job.person)) for z in slices]
    slab = Slab(job, cuts, roomy_regions(cuts))
    rows = []
    for number, task in enumerate(TASKS):
        rng = np.random.default_rng([job.seed, job.first, job.person, number])
        questions = []
        if task == "presence":
            questions = [ask_presence(slab, *asked, rng) for asked in job.presence]
        else:
            for part in range(QUESTIONS[task]):
                deal = job.turn * QUESTIONS[task] + part
                questions.append(ASKERS[task](slab, deal, rng))
        for part, question in enumerate(questions):
            chinese = bool(rng.random() < CHINESE)
            if question is not None:
                rows += rows_of(job, question, f"{task}/{part}", chinese=chinese)
    return rows


def rows_of(job: Job, question: Question, key: str, *, chinese: bool) -> list[dict]:
    """Make one row a picture, which `convert_pairs` puts together again."""
    own = f"medtune-volumes/{job.seed}/{job.first}/{job.person}/{key}"
    slab = str(uuid.uuid5(uuid.NAMESPACE_URL, own))
    ask = question.ask[chinese]
    record = None
    if question.record:
        record = question.record[chinese]
        ask = f"{record}\n{ask}"
    middle = question.slices[len(question.slices) // 2]
    row = {
        "caption": question.answer[chinese],
        "question": ask,
        "group": group_of(middle),
        "split": job.split,
        "slab": slab,
        # that of the whole slab: intervals draw slabs of one place together
        "slice": middle,
        "slices": question.slices,
        "task": question.task,
        "language": "zh" if chinese else "en",
        "record": record,
        "structure": question.structure,
        "window": question.window,
        "modality": "CT",
        "person": f"virtual-{job.person:02d}" if job.person else "scanned",
    }
    rows = []
    for number, picture in enumerate(question.pictures):
        image = {"bytes": sample.jpeg_bytes(picture), "path": None}
        rows.append({"image": image, "id": f"{slab}-{number + 1}", **row})
    return rows


def schema() -> pa.Schema:
    """Return the parquet schema; the metadata tells `datasets` that `image` holds pictures."""
    from datasets import Features, List, Value
    from datasets import Image as ImageFeature

    texts = (
        "id caption question group split slab task language record structure window modality person"
    )
    features = {"image": ImageFeature()} | {name: Value("string") for name in texts.split()}
    features |= {"slice": Value("int64"), "slices": List(Value("int64"))}
    return Features(features).arrow_schema


def volumes_source(folder: str | Path | None = None, seed: int = 0) -> sample.Source:
    """Prepare the course's CT with all people of the slabs."""
    scan = sample.read_course_scan(folder)
    people = PEOPLE + VALIDATION_PEOPLE + TEST_PEOPLE
    drawn = [draw_person(number, seed) for number in range(1, people + 1)]
    return sample.Source(scan, sample.course_levels(), [scanned_person(), *drawn])


def build(out: Path, source: sample.Source, *, seed: int = 0, jobs: int = 0) -> Path:
    """Write `out`/volumes.parquet and return its path; deterministic for a seed.

    With `jobs` above 0 only the first so many slabs of each split are made.
    """
    sample.SOURCE = source
    out.mkdir(parents=True, exist_ok=True)
    target, part = out / "volumes.parquet", out / ".volumes.parquet.part"
    todo = [job for job in list_jobs(source, seed) if not jobs or job.turn < jobs]
    table = schema()
    try:
        with (
            ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as pool,
            pq.ParquetWriter(part, table) as writer,
        ):
            made = tqdm(pool.map(make_rows, todo), total=len(todo), desc="slabs", unit="slab")
            for rows in made:
                if rows:
                    writer.write_table(pa.Table.from_pylist(rows, schema=table))
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the course's questions about slabs.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "volumes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--ct-folder", help="a folder with the course's cxr.nii.gz, mask.nii.gz and structures.csv"
    )
    parser.add_argument(
        "--slabs", type=int, default=0, help="slabs of each split; default: all of them"
    )
    args = parser.parse_args()
    if args.slabs < 0:
        parser.error("--slabs is 0 or more")
    try:
        source = volumes_source(args.ct_folder, args.seed)
        target = build(args.out, source, seed=args.seed, jobs=args.slabs)
    except (OSError, ValueError) as error:
        sys.exit(f"build_volumes: {error}")
    pictures = pq.read_metadata(target).num_rows
    questions = len(pq.read_table(target, columns=["slab"])["slab"].unique())
    megabytes = target.stat().st_size / 1e6
    print(f"{target}: {questions} questions, {pictures} pictures, {megabytes:.0f} MB")


if __name__ == "__main__":
    main()
