"""Second stage of the tiny base's pretraining: virtual people, spots, and several pictures in one
question.

It starts from the model that `pretrain.py` made, and goes on in the same plain words. What is new:

* every sample is another virtual person, so that no body's pixels can be counted;
* a second picture may show the frame magnified, and there small round spots can be told from
  vessels;
* two pictures may be the same place earlier and now, four pictures a series of neighbouring slices;
* patches have two frames (`temporal_patch_size` 2), of which a picture fills both: the form that
  Qwen's published models have.

It sees the CT's TRAINING slices only, and never an organ's name, a finding or the wording of the
clinical captions.

    python data/tiny-vlm/pretrain_people.py --base FIRST --out FOLDER --minutes 9.5 --compile
"""

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, IterableDataset

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import build_sample
import pretrain
from pretrain import GRID, IMAGE_TOKENS, MERGE, PATCH, SIDE

FRAMES = 2
INNER = 608
LENGTH = 208
# how many of a batch's samples have one, two and four pictures
LAYOUTS = {1: 0.25, 2: 0.55, 4: 0.20}
# knots of a displacement, and the grid on which it is linear
KNOTS, FIELD = 6, 32
# largest standard deviation of a displacement at a knot, in pixels: with more, tissue folds
SHIFT = 14.0
# the sentence on the spot counts so much more than the others
SPOT_WEIGHT = 3.0
# half the side of a magnified picture, as a share of the frame's longer side
MAGNIFIED = 0.55

ASK_MAGNIFIED = (
    (
        "Describe the picture. The second shows the frame magnified.",
        "请描述图片。第二张是方框的放大图。",
    ),
    ("What do you see? Picture 2 is the frame, larger.", "你看到了什么？图2是放大的方框。"),
)
ASK_CHANGE = (
    (
        "Picture 1 is earlier, picture 2 is now. How has the spot changed?",
        "图1是以前，图2是现在。斑点有什么变化？",
    ),
    ("Compare the spot in the two pictures.", "比较两张图里的斑点。"),
)
CHANGES = {
    "grown": ("The spot has grown.", "斑点变大了。"),
    "shrunk": ("The spot has shrunk.", "斑点变小了。"),
    "same": ("The spot is the same.", "斑点没有变化。"),
    "new": ("The spot is new.", "斑点是新的。"),
    "gone": ("The spot is gone.", "斑点不见了。"),
    "none": ("There is no spot in either picture.", "两张图里都没有斑点。"),
}


# ---------------------------------------------------------------- a virtual person in one slice
@dataclass(frozen=True)
class Body:
    """How a person's slice differs from the scanned one.

    Attributes
    ----------
    field : displacement in pixels, (FIELD, FIELD, 2) for x and y, linear in between.
    scale : from side to side and from front to back.
    contrast : offset in HU of each label, (256,).
    """

    field: np.ndarray
    scale: np.ndarray
    contrast: np.ndarray


MIDDLE = 255.5


def draw_body(rng: np.random.Generator) -> Body:
    knots = rng.normal(0, rng.uniform(0, SHIFT), (KNOTS, KNOTS, 2)).astype(np.float32)
    field = cv2.resize(knots, (FIELD, FIELD), interpolation=cv2.INTER_CUBIC)
    contrast = rng.normal(0, 25, 256).astype(np.float32)
    contrast[0] = 0
    return Body(field, rng.uniform(0.85, 1.15, 2).astype(np.float32), contrast)


def displacement(body: Body, points: np.ndarray) -> np.ndarray:
    """Look up the displacement at points (n, 2) of a person's slice."""
    at = (points / 511 * (FIELD - 1)).astype(np.float32)
    return cv2.remap(
        body.field,
        at[None, :, 0],
        at[None, :, 1],
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REPLICATE,
    )[0]


def to_person(body: Body, points: np.ndarray) -> np.ndarray:
    """Say where points (n, 2) of the CT come to lie in the person's slice.

    The renderer knows the way back; here it is inverted by going there step by step.
    """
    there = points
    for _ in range(20):
        there = MIDDLE + (points - MIDDLE - displacement(body, there)) * body.scale
    return there


# ---------------------------------------------------------------- pictures as numbers
@dataclass
class Picture:
    """What the renderer needs for one picture, in pixels of a picture of 512.

    Attributes
    ----------
    z : slice of the CT.
    body : whose slice.
    turn : (2, 3) from the person's slice to the picture.
    window : centre and width in HU.
    box, line : frame and its thickness; no frame where the thickness is 0.
    spot : x, y, two radii, angle and HU; no spot where the first radius is 0.
    vessel : three points x, y, then half the thickness and HU.
    view : x, y of the middle and half the side of what is shown: a whole picture or a part of it.
    noise : in HU.
    """

    z: int
    body: Body
    turn: np.ndarray
    window: tuple[float, float]
    box: np.ndarray
    line: float
    spot: np.ndarray
    vessel: np.ndarray
    view: tuple[float, float, float] = (256.0, 256.0, 256.0)
    noise: float = 0.0


NO_SPOT = np.zeros(6, np.float32)
NO_VESSEL = np.zeros(8, np.float32)


def draw_turn(rng: np.random.Generator) -> np.ndarray:
    turn = cv2.getRotationMatrix2D((MIDDLE, MIDDLE), rng.uniform(-12, 12), rng.uniform(0.62, 1.45))
    turn[:, 2] += rng.uniform(-60, 60, 2)
    return turn


def moved(turn: np.ndarray, points: np.ndarray) -> np.ndarray:
    return points @ turn[:, :2].T + turn[:, 2]


def draw_window(kind: str, rng: np.random.Generator) -> tuple[float, float]:
    usual = build_sample.USUAL_WINDOW.get(kind, "soft tissue")
    names = list(build_sample.WINDOWS)
    name = usual if rng.random() < 0.6 else names[rng.integers(len(names))]
    center, width = build_sample.WINDOWS[name][0]
    if rng.random() < 0.15:
        center, width = center + rng.uniform(-60, 60), width * rng.uniform(0.7, 1.4)
    return center, width


def draw_spot(
    region: dict, body: Body, turn: np.ndarray, window: tuple, rng: np.random.Generator
) -> tuple[np.ndarray, bool] | None:
    """Draw a round spot that shows in this window, or None where none has room.

    Returns its numbers, and whether it is brighter than what it lies in.
    """
    if not len(region["points"]):
        return None
    x, y, room = region["points"][rng.integers(len(region["points"]))]
    x, y = moved(turn, to_person(body, np.array([[x, y]])))[0]
    zoom = math.sqrt(abs(np.linalg.det(turn[:, :2])) * body.scale.prod())
    radius = rng.uniform(5, min(18, room)) * zoom
    center, width = window
    now = float(np.clip((region["mean"] - center + width / 2) / width, 0, 1))
    bright = bool(rng.random() < 0.5) if 0.3 < now < 0.7 else now <= 0.3
    # from 25 of 255 grey levels on, as in the course's findings
    target = now + (1 if bright else -1) * rng.uniform(0.1, 0.6)
    level = center - width / 2 + target * width
    radii = radius, radius * rng.uniform(0.75, 1)
    return np.array([x, y, *radii, rng.uniform(0, math.pi), level], np.float32), bright


def draw_vessel(
    region: dict, body: Body, turn: np.ndarray, window: tuple, rng: np.random.Generator
) -> np.ndarray:
    """Draw a bent piece of a vessel through the region: bright, but long."""
    hull = moved(turn, to_person(body, region["hull"]))
    start = hull.mean(0) + rng.normal(0, 0.3, 2) * np.ptp(hull, axis=0)
    points, direction = [start], rng.uniform(0, 2 * math.pi)
    for _ in range(2):
        direction += rng.normal(0, 0.5)
        step = rng.uniform(12, 35)
        points.append(points[-1] + step * np.array([math.cos(direction), math.sin(direction)]))
    now = region["mean"]
    level = now + rng.uniform(0.12, 0.6) * window[1]
    return np.array([*np.concatenate(points), rng.uniform(1.2, 3.5), level], np.float32)


def magnified(picture: Picture) -> Picture:
    """Show the frame of a picture as large as it goes."""
    x0, y0, x1, y1 = picture.box
    half = MAGNIFIED * max(x1 - x0, y1 - y0)
    view = ((x0 + x1) / 2, (y0 + y1) / 2, half)
    return Picture(**{**vars(picture), "view": view})


# ---------------------------------------------------------------- one training sample
@dataclass
class Sample:
    pictures: list[Picture]
    question: str
    answer: str
    # the part of the answer that counts more
    weighed: str = ""


def framed(  # noqa: PLR0913 - a frame needs all of it
    region: dict,
    body: Body,
    turn: np.ndarray,
    window: tuple,
    rng: np.random.Generator,
    with_spot: bool,
) -> tuple[Picture, dict] | None:
    """Frame a region, and give the picture and its facts; None where it left the picture."""
    hull = moved(turn, to_person(body, region["hull"]))
    box = np.concatenate([hull.min(0), hull.max(0) + 1])
    line = rng.uniform(2.8, 4.2)
    edge = rng.integers(2, 7) + line
    outer = np.clip(box + np.array([-edge, -edge, edge, edge]), 0, 512)
    inside_share = np.prod(np.maximum(outer[2:] - outer[:2], 0)) / np.prod(box[2:] - box[:2])
    if min(outer[2:] - outer[:2]) < 10 or inside_share < 0.8:
        return None
    center, width = window
    grey = float(np.clip((region["mean"] - center + width / 2) / width, 0, 0.999))
    facts = {k: region[k] for k in ("kind", "shape", "near", "side", "depth")}
    facts |= {
        "height": region["z"] / (build_sample.SLICES - 1),
        "level": sum(region["z"] >= row[0] for row in build_sample.LEVELS) - 1,
        "bright": int(grey * 5),
        "spot": None,
        "box": outer / 512,
        "place": build_sample.place_index(
            (outer[0] + outer[2]) / 1024, (outer[1] + outer[3]) / 1024
        ),
        "share": float(np.prod(outer[2:] - outer[:2]) / 512**2),
    }
    spot = NO_SPOT
    if with_spot:
        found = draw_spot(region, body, turn, window, rng)
        if found:
            spot, bright = found
            within = (spot[:2] - box[:2]) / np.maximum(box[2:] - box[:2], 1)
            facts["spot"] = {
                "shade": (("dark", "暗"), ("bright", "亮"))[bright],
                "place": build_sample.place_index(*np.clip(within, 0, 0.999)),
            }
    vessel = draw_vessel(region, body, turn, window, rng) if rng.random() < 0.35 else NO_VESSEL
    noise = rng.uniform(0, 15)
    picture = Picture(region["z"], body, turn, window, outer, line, spot, vessel, noise=noise)
    return picture, facts


def framed_at_random(region: dict, rng: np.random.Generator) -> tuple[Picture, dict] | None:
    """Frame a region of a new person, half the time with a spot."""
    body, turn = draw_body(rng), draw_turn(rng)
    window = draw_window(region["kind"], rng)
    return framed(region, body, turn, window, rng, rng.random() < 0.5)


def one_picture(regions: list, weights: np.ndarray, rng: np.random.Generator) -> Sample:
    """Ask about one picture: describe, answer one thing, or find a part that has no frame."""
    region = regions[rng.choice(len(regions), p=weights)]
    made = framed_at_random(region, rng)
    if made is None:
        return one_picture(regions, weights, rng)
    picture, facts = made
    if rng.random() < 0.25:
        picture.line, facts["find"] = 0.0, True
    question, answer = pretrain.write_text(facts, rng)
    return Sample([picture], question, answer)


def with_magnified(regions: list, weights: np.ndarray, rng: np.random.Generator) -> Sample:
    """Ask about a picture with its frame magnified beside it."""
    region = regions[rng.choice(len(regions), p=weights)]
    made = framed_at_random(region, rng)
    if made is None:
        return with_magnified(regions, weights, rng)
    picture, facts = made
    zh = bool(rng.random() < 0.2)
    spot = pretrain.spot_words(facts["spot"], zh)
    if rng.random() < 0.4:
        question, answer = pretrain.say(pretrain.QUESTIONS["spot"], zh), spot
    else:
        parts = pretrain.sentences(facts, zh)
        known = [key for key in pretrain.ORDER if key in parts]
        if rng.random() < 0.3:
            known = list(rng.permutation(known)[: rng.integers(2, len(known) + 1)])
        question = pretrain.say(ASK_MAGNIFIED[rng.integers(len(ASK_MAGNIFIED))], zh)
        answer = ("" if zh else " ").join(parts[key] for key in known)
    return Sample([picture, magnified(picture)], question, answer, spot)


def earlier_and_now(regions: list, weights: np.ndarray, rng: np.random.Generator) -> Sample:
    """Ask how a spot changed between two pictures of the same place, shown magnified."""
    region = regions[rng.choice(len(regions), p=weights)]
    body, turn, window = draw_body(rng), draw_turn(rng), draw_window(region["kind"], rng)
    made = framed(region, body, turn, window, rng, True)
    if made is None or made[1]["spot"] is None:
        return earlier_and_now(regions, weights, rng)
    now, _ = made
    change = list(CHANGES)[rng.integers(len(CHANGES))]
    factor = {"grown": rng.uniform(0.45, 0.7), "shrunk": rng.uniform(1.45, 2.2)}.get(change, 1.0)
    earlier = Picture(**vars(now))
    earlier.spot = now.spot.copy()
    earlier.spot[2:4] *= factor
    # two scans of one person differ: a little turned, a little shifted, other noise
    again = cv2.getRotationMatrix2D((MIDDLE, MIDDLE), rng.uniform(-3, 3), rng.uniform(0.97, 1.03))
    again[:, 2] += rng.uniform(-6, 6, 2)
    earlier.turn = again @ np.vstack([turn, [0, 0, 1]])
    earlier.spot[:2] = moved(again, earlier.spot[None, :2])[0]
    earlier.noise = rng.uniform(0, 15)
    if change in ("new", "none"):
        earlier.spot = NO_SPOT
    if change in ("gone", "none"):
        now.spot = NO_SPOT
    zh = bool(rng.random() < 0.2)
    question = pretrain.say(ASK_CHANGE[rng.integers(len(ASK_CHANGE))], zh)
    return Sample([magnified(earlier), magnified(now)], question, pretrain.say(CHANGES[change], zh))


def series(
    regions: list, trained: set[int], weights: np.ndarray, rng: np.random.Generator
) -> Sample:
    """Ask about four slices of one person, from below to above."""
    region = regions[rng.choice(len(regions), p=weights)]
    step = int(rng.integers(1, 4))
    first = region["z"] - step * int(rng.integers(0, 4))
    slices = [first + step * i for i in range(4)]
    if any(z not in trained for z in slices):
        return series(regions, trained, weights, rng)
    made = framed(
        region, draw_body(rng), draw_turn(rng), draw_window(region["kind"], rng), rng, True
    )
    if made is None or made[1]["spot"] is None:
        return series(regions, trained, weights, rng)
    picture, facts = made
    count = int(rng.integers(0, 5))
    start = int(rng.integers(0, 5 - count))
    largest = start + int(rng.integers(0, max(count, 1)))
    shown = []
    close = rng.random() < 0.5
    for i, z in enumerate(slices):
        one = Picture(**vars(picture))
        one.z, one.vessel, one.spot = z, NO_VESSEL, NO_SPOT
        if start <= i < start + count:
            one.spot = picture.spot.copy()
            one.spot[2:4] *= 0.72 ** abs(i - largest)
        shown.append(magnified(one) if close else one)
    zh = bool(rng.random() < 0.2)
    dice = rng.random()
    if dice < 0.45 or count == 0:
        question = ("In how many of the pictures is the spot?", "斑点出现在几张图里？")
        answer = (f"In {count} of the 4 pictures.", f"在4张图中的{count}张里。")
    elif dice < 0.8:
        question = ("In which picture is the spot largest?", "哪张图里的斑点最大？")
        answer = (f"In picture {largest + 1}.", f"在图{largest + 1}里。")
    else:
        kind = pretrain.KINDS[facts["kind"]]
        question = ("What kind of thing is in the frame?", "方框里是什么？")
        answer = (f"It is {kind[0]}.", f"它是{kind[1]}。")
    return Sample(shown, pretrain.say(question, zh), pretrain.say(answer, zh))


def draw_sample(count: int, source: tuple, rng: np.random.Generator) -> Sample:
    """Draw a sample with so many pictures."""
    regions, trained, weights = source
    if count == 1:
        return one_picture(regions, weights, rng)
    if count == 4:
        return series(regions, trained, weights, rng)
    if rng.random() < 0.15:
        return earlier_and_now(regions, weights, rng)
    return with_magnified(regions, weights, rng)


# ---------------------------------------------------------------- batches
def counts_of(batch_size: int) -> list[int]:
    """Say how many pictures each sample of a batch has: the same in every batch, so that the shapes
    are.
    """
    counts = []
    for pictures, share in LAYOUTS.items():
        counts += [pictures] * round(batch_size * share)
    return counts[:batch_size] + [1] * (batch_size - len(counts))


def picture_ids(count: int, tokenizer) -> list[int]:
    one = "<|vision_start|>" + "<|image_pad|>" * IMAGE_TOKENS + "<|vision_end|>"
    return tokenizer.encode("<|im_start|>user\n" + one * count).ids


def make_batch(source: tuple, tokenizer, batch_size: int, seed: int, number: int) -> dict:
    """Draw a batch: the pictures as numbers, token ids, labels and the weight of each label."""
    rng = np.random.default_rng([seed, number])
    counts = counts_of(batch_size)
    samples = [draw_sample(count, source, rng) for count in counts]
    lead = "<|im_end|>\n<|im_start|>assistant\n"
    lead_length = len(tokenizer.encode(lead).ids)
    ids = np.zeros((batch_size, LENGTH), np.int64)
    labels = np.full((batch_size, LENGTH), -100, np.int64)
    weights = np.ones((batch_size, LENGTH), np.float32)
    for row, (count, sample) in enumerate(zip(counts, samples, strict=True)):
        before = picture_ids(count, tokenizer) + tokenizer.encode(sample.question).ids
        said = tokenizer.encode(f"{lead}{sample.answer}<|im_end|>\n")
        full = (before + said.ids)[:LENGTH]
        start = len(before) + lead_length
        ids[row, : len(full)] = full
        labels[row, start : len(full)] = full[start:]
        where = sample.answer.find(sample.weighed) if sample.weighed else -1
        if where >= 0:
            first, last = len(lead) + where, len(lead) + where + len(sample.weighed)
            for i, (a, b) in enumerate(said.offsets):
                if b > first and a < last and len(before) + i < LENGTH:
                    weights[row, len(before) + i] = SPOT_WEIGHT
    pictures = [picture for sample in samples for picture in sample.pictures]
    numbers = {
        "z": np.array([p.z for p in pictures]),
        "field": np.stack([p.body.field for p in pictures]),
        "scale": np.stack([p.body.scale for p in pictures]),
        "contrast": np.stack([p.body.contrast for p in pictures]),
        "turn": np.stack([p.turn for p in pictures]).astype(np.float32),
        "window": np.array([p.window for p in pictures], np.float32),
        "box": np.stack([p.box for p in pictures]).astype(np.float32),
        "line": np.array([p.line for p in pictures], np.float32),
        "spot": np.stack([p.spot for p in pictures]),
        "vessel": np.stack([p.vessel for p in pictures]),
        "view": np.array([p.view for p in pictures], np.float32),
        "noise": np.array([p.noise for p in pictures], np.float32),
    }
    batch = {key: torch.from_numpy(value) for key, value in numbers.items()}
    batch["ids"], batch["labels"] = torch.from_numpy(ids), torch.from_numpy(labels)
    batch["weights"] = torch.from_numpy(weights)
    return batch


class Batches(IterableDataset):
    """Endless batches, each from a seed of its own: no worker repeats another."""

    def __init__(self, source, tokenizer, batch_size, seed):
        self.args = (source, tokenizer, batch_size, seed)

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        cv2.setNumThreads(1)
        number = worker
        while True:
            yield make_batch(*self.args, number)
            number += workers


# ---------------------------------------------------------------- pictures, drawn on the device
def ellipse_cover(spot: torch.Tensor, x: torch.Tensor, y: torch.Tensor, soft: torch.Tensor):
    """How much of each pixel a spot covers; `soft` is the width of its edge in pixels of 512."""
    sx, sy, first, second, angle, _ = spot.T[:, :, None, None]
    dx, dy = x - sx, y - sy
    along = dx * torch.cos(angle) + dy * torch.sin(angle)
    aside = dy * torch.cos(angle) - dx * torch.sin(angle)
    distance = torch.hypot(along / first.clamp(min=0.1), aside / second.clamp(min=0.1))
    cover = ((1 - distance) * torch.minimum(first, second) / soft + 0.5).clamp(0, 1)
    return cover * (first > 0)


def vessel_cover(vessel: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    points, half = vessel[:, :6].reshape(-1, 3, 2), vessel[:, 6, None, None]
    nearest = torch.full_like(x, 1e4)
    for i in range(2):
        ax, ay = points[:, i, 0, None, None], points[:, i, 1, None, None]
        bx, by = points[:, i + 1, 0, None, None], points[:, i + 1, 1, None, None]
        length = ((bx - ax) ** 2 + (by - ay) ** 2).clamp(min=1e-3)
        along = (((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / length).clamp(0, 1)
        distance = torch.hypot(x - ax - along * (bx - ax), y - ay - along * (by - ay))
        nearest = torch.minimum(nearest, distance)
    return (half - nearest + 0.5).clamp(0, 1) * (half > 0)


def box_cover(box: torch.Tensor, x: torch.Tensor, y: torch.Tensor, step: torch.Tensor):
    """The share of each pixel that a rectangle covers: the rectangle drawn with smooth edges."""
    x0, y0, x1, y1 = box.T[:, :, None, None]
    across = torch.minimum(x + step / 2, x1) - torch.maximum(x - step / 2, x0)
    down = torch.minimum(y + step / 2, y1) - torch.maximum(y - step / 2, y0)
    return (across / step).clamp(0, 1) * (down / step).clamp(0, 1)


def render(
    volume: torch.Tensor, labels: torch.Tensor, b: dict, res: int = 2 * SIDE
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw pictures (n, 3, SIDE, SIDE) in 0..1, and the cover of the spot for each image token."""
    dev, n = volume.device, len(b["z"])
    middle_x, middle_y, half = b["view"].T[:, :, None, None]
    axis = (torch.arange(res, device=dev) + 0.5) / res * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    step = 2 * half / res
    # pixels of the picture of 512 that is shown, or of a part of it
    x, y = middle_x - 0.5 + x * half, middle_y - 0.5 + y * half

    full = torch.eye(3, device=dev).repeat(n, 1, 1)
    full[:, :2] = b["turn"]
    back = torch.linalg.inv(full)[:, :2]
    place = torch.stack([x, y, torch.ones_like(x)], -1)
    person = torch.einsum("nij,nhwj->nhwi", back, place)
    field = b["field"].permute(0, 3, 1, 2)
    shift = F.grid_sample(
        field, person / 511 * 2 - 1, mode="bilinear", padding_mode="border", align_corners=True
    ).permute(0, 2, 3, 1)
    source = MIDDLE + (person - MIDDLE) / b["scale"][:, None, None] + shift
    where = (source + 0.5) / 256 - 1
    hu = F.grid_sample(
        volume[b["z"]][:, None].float() + 1024, where, mode="bilinear", align_corners=False
    )[:, 0]
    label = F.grid_sample(
        labels[b["z"]][:, None].float(), where, mode="nearest", align_corners=False
    )[:, 0].long()
    offset = torch.gather(b["contrast"], 1, label.flatten(1)).reshape(n, 1, res, res)
    hu = hu - 1024 + F.avg_pool2d(offset, 5, 1, 2)[:, 0]

    vessel = vessel_cover(b["vessel"], x, y)
    hu = hu * (1 - vessel) + b["vessel"][:, 7, None, None] * vessel
    spot = ellipse_cover(b["spot"], x, y, step.clamp(min=1))
    hu = hu * (1 - spot) + (b["spot"][:, 5, None, None] + 12 * torch.randn_like(hu)) * spot
    hu = hu + b["noise"][:, None, None] * torch.randn_like(hu)

    center, width = b["window"].T[:, :, None, None]
    grey = ((hu - center + width / 2) / width).clamp(0, 1)
    line = b["line"][:, None] * torch.tensor([1.0, 1, -1, -1], device=dev)
    frame = box_cover(b["box"], x, y, step) - box_cover(b["box"] + line, x, y, step)
    frame = frame.clamp(0, 1)[:, None]
    green = torch.tensor([0.0, 1, 0], device=dev)[None, :, None, None]
    # what lies outside of the picture of 512 is black in a magnified part
    inside = ((x > -0.5) & (x < 511.5) & (y > -0.5) & (y < 511.5))[:, None]
    picture = (grey[:, None] * (1 - frame) + green * frame) * inside
    picture = F.interpolate(picture, size=(SIDE, SIDE), mode="bicubic", antialias=True)
    picture = (picture + torch.randn_like(picture) * 0.006).clamp(0, 1)
    tokens = F.adaptive_avg_pool2d(spot[:, None], GRID // MERGE).flatten(1)
    return picture, tokens


# ---------------------------------------------------------------- the model
def without_weakest(weights: dict, layers: int, inner: int) -> dict:
    """Drop the weakest units of the language model's MLPs, so that `inner` are left in each."""
    for layer in range(layers):
        name = f"model.language_model.layers.{layer}.mlp."
        gate, up, down = (weights[f"{name}{part}_proj.weight"] for part in ("gate", "up", "down"))
        strength = gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)
        kept = strength.topk(inner).indices.sort().values
        weights[f"{name}gate_proj.weight"] = gate[kept]
        weights[f"{name}up_proj.weight"] = up[kept]
        weights[f"{name}down_proj.weight"] = down[:, kept]
    return weights


def grown_model(folder: Path):
    """Load the first stage's model, with patches of two frames that both show the picture.

    The second frame costs 123,000 parameters. The MLPs of the language model give them back, for the
    model is to stay under 8 million.
    """
    from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

    old = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    config = old.config
    frames = config.vision_config.temporal_patch_size
    config.vision_config.temporal_patch_size = FRAMES
    config.text_config.intermediate_size = INNER
    model = Qwen3VLForConditionalGeneration(config)
    weights = old.state_dict()
    for key, weight in weights.items():
        if key.endswith("patch_embed.proj.weight"):
            # (out, channels, frames, rows, columns): the frames are the same picture
            weights[key] = weight.sum(2, keepdim=True).repeat(1, 1, FRAMES, 1, 1) / FRAMES
    weights = without_weakest(weights, config.text_config.num_hidden_layers, INNER)
    model.load_state_dict(weights)
    model.generation_config = old.generation_config
    processor = AutoProcessor.from_pretrained(folder)
    processor.image_processor.temporal_patch_size = FRAMES
    print(f"patches had {frames} frame, and have {FRAMES} now", flush=True)
    return processor, model


class Fast(torch.nn.Module):
    """The model's own computation for a batch whose samples always have the same numbers of
    pictures.

    The library walks over the pictures one by one; here they are one batched call, and where each
    token stands is known beforehand.
    """

    def __init__(self, model, counts: list[int], ids: torch.Tensor):
        super().__init__()
        self.model = model
        device = ids.device
        tables = {
            count: self.positions(ids[counts.index(count)][None], count) for count in set(counts)
        }
        cos = torch.stack([tables[count][0] for count in counts])
        sin = torch.stack([tables[count][1] for count in counts])
        vision = tables[counts[0]][2]
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.register_buffer("vision_cos", vision[0], persistent=False)
        self.register_buffer("vision_sin", vision[1], persistent=False)
        rows, columns = (ids == model.config.image_token_id).nonzero(as_tuple=True)
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)
        g = GRID // MERGE
        order = torch.arange(GRID * GRID).reshape(g, MERGE, g, MERGE).permute(0, 2, 1, 3)
        self.register_buffer("order", order.reshape(-1).to(device), persistent=False)

    def positions(self, ids: torch.Tensor, count: int):
        """Ask the library where the tokens of a sample with so many pictures stand."""
        caught = {}
        text, visual = self.model.model.language_model, self.model.model.visual
        hooks = [
            part.register_forward_pre_hook(
                lambda m, a, kw, key=key: caught.update({key: kw["position_embeddings"]}),
                with_kwargs=True,
            )
            for key, part in (("text", text.layers[0]), ("vision", visual.blocks[0]))
        ]
        width = 3 * FRAMES * PATCH * PATCH
        with torch.no_grad():
            self.model(
                input_ids=ids,
                pixel_values=torch.zeros(count * GRID * GRID, width, device=ids.device),
                image_grid_thw=torch.tensor([[1, GRID, GRID]] * count, device=ids.device),
                mm_token_type_ids=(ids == self.model.config.image_token_id).int(),
            )
        for hook in hooks:
            hook.remove()
        cos, sin = caught["text"]
        vision = [table[: GRID * GRID].detach() for table in caught["vision"]]
        return cos[0].detach(), sin[0].detach(), vision

    # a block sees one picture at a time, whatever their number
    vision_block = pretrain.Fast.vision_block

    def forward(self, ids, patches):
        visual, text = self.model.model.visual, self.model.model.language_model
        conv = visual.patch_embed.proj
        # both frames are the same, so their weights may be added up
        weight = conv.weight.sum(2).flatten(1)
        h = F.linear(patches, weight, conv.bias) + visual.pos_embed.weight[self.order]
        deep = []
        for i, block in enumerate(visual.blocks):
            h = self.vision_block(block, h)
            if i in visual.deepstack_visual_indexes:
                merger = visual.deepstack_merger_list[visual.deepstack_visual_indexes.index(i)]
                deep.append(merger(h.reshape(-1, h.shape[-1])))
        pictures = visual.merger(h.reshape(-1, h.shape[-1]))
        x = text.embed_tokens(ids).to(pictures.dtype)
        where = (self.rows, self.columns)
        x = x.index_put(where, pictures)
        places = (self.cos.to(x.dtype), self.sin.to(x.dtype))
        for i, layer in enumerate(text.layers):
            x = layer(x, attention_mask=None, position_embeddings=places)
            if i < len(deep):
                x = x.index_put(where, deep[i].to(x.dtype), accumulate=True)
        return self.model.lm_head(text.norm(x)), pictures


def check_fast(fast: Fast, model, batch: dict, patches: torch.Tensor, counts: list[int]) -> float:
    """Return the largest difference between the shortcut's logits and the model's own."""
    gap = 0.0
    ids = batch["ids"]
    with torch.no_grad():
        mine, _ = fast(ids, patches)
        first = 0
        for row, count in enumerate(counts):
            mine_too = row in (counts.index(c) for c in set(counts))
            if mine_too:
                part = patches[first : first + count]
                both = part.reshape(-1, 3, 1, PATCH * PATCH).expand(-1, -1, FRAMES, -1)
                own = model(
                    input_ids=ids[row : row + 1],
                    pixel_values=both.reshape(len(both), -1),
                    image_grid_thw=torch.tensor([[1, GRID, GRID]] * count, device=ids.device),
                    mm_token_type_ids=(ids[row : row + 1] == model.config.image_token_id).int(),
                ).logits
                gap = max(gap, float((mine[row] - own[0]).abs().max()))
            first += count
    return gap


def loss_of(logits, pictures, head, batch, spots) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighed loss of the answers, and that of the head that says in which tokens a spot lies."""
    losses = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        batch["labels"][:, 1:].flatten(),
        ignore_index=-100,
        reduction="none",
    )
    known = (batch["labels"][:, 1:] != -100).flatten()
    weights = batch["weights"][:, 1:].flatten() * known
    words = (losses * weights).sum() / weights.sum()
    said = head(pictures.float())[:, 0]
    there = (spots.flatten() > 0.15).float()
    return words, F.binary_cross_entropy_with_logits(said, there)


def rate_of(args: argparse.Namespace, step: int, share: float) -> float:
    """Warm up over 300 steps, then fall as a cosine to a fiftieth."""
    cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share))
    return args.learning_rate * min(1, (step + 1) / 300) * cosine


def share_done(args: argparse.Namespace, step: int, clock: float | None) -> float:
    """Say how much of the training is done, by steps or by the clock."""
    if args.steps:
        return step / args.steps
    return 0.0 if clock is None else (time.time() - clock) / (60 * args.minutes)


def train(args: argparse.Namespace) -> None:  # noqa: PLR0915 - the whole recipe in its order
    torch.manual_seed(args.seed)
    device, started = torch.device(args.device), time.time()
    hu, mask, regions = pretrain.collect(args.ct_folder)
    pretrain.HU_FOR_WORKERS = hu
    names: dict[str, int] = {}
    for region in regions:
        names[region["name"]] = names.get(region["name"], 0) + 1
    weights = np.array([names[region["name"]] ** -0.5 for region in regions])
    weights /= weights.sum()
    slices = {region["z"] for region in regions}
    processor, model = grown_model(args.base)
    model.to(device)
    size = sum(p.numel() for p in model.parameters())
    print(f"{len(regions)} training regions; {size:,} parameters", flush=True)

    source = (regions, slices, weights)
    rust = processor.tokenizer.backend_tokenizer
    loader = iter(
        DataLoader(
            Batches(source, rust, args.batch_size, args.seed),
            batch_size=None,
            num_workers=args.workers,
            prefetch_factor=8 if args.workers else None,
            pin_memory=device.type == "cuda",
        )
    )
    volume = torch.from_numpy(hu).to(device, torch.float16)
    labels = torch.from_numpy(mask).to(device)
    first = {key: value.to(device) for key, value in next(loader).items()}
    counts = counts_of(args.batch_size)
    fast = Fast(model, counts, first["ids"]).to(device)
    gap = check_fast(
        fast, model, first, pretrain.patchify(render(volume, labels, first)[0]), counts
    )
    print(f"the fast forward differs from the model by {gap:.1e}", flush=True)
    if gap > 1e-2:
        raise RuntimeError(f"the fast forward differs from the model by {gap:.2e}")
    head = torch.nn.Linear(256, 1).to(device)
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=args.learning_rate,
        betas=(0.9, 0.98),
        fused=device.type == "cuda",
    )
    run = torch.compile(fast) if args.compile else fast
    draw = torch.compile(render) if args.compile else render
    log, step, clock = [], 0, None
    while True:
        share = share_done(args, step, clock)
        if share >= 1:
            break
        rate = rate_of(args, step, share)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = {key: value.to(device, non_blocking=True) for key, value in next(loader).items()}
        with torch.no_grad():
            picture, spots = draw(volume, labels, batch)
            patches = pretrain.patchify(picture)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits, pictures = run(batch["ids"], patches)
        words, seen = loss_of(logits, pictures, head, batch, spots)
        (words + args.head_weight * seen).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step == 5:
            if device.type == "cuda":
                torch.cuda.synchronize()
            clock = time.time()
        if step % args.log_every == 0:
            line = {
                "step": step,
                "loss": round(words.item(), 4),
                "spots": round(seen.item(), 4),
                "lr": rate,
            }
            log.append(line)
            if clock:
                speed = (step - 5) * sum(counts) / (time.time() - clock)
                print(json.dumps(line | {"pictures_per_s": round(speed)}), flush=True)
    rated = rate_answers(run, draw, (volume, labels), loader, counts, device)
    print(json.dumps(rated), flush=True)
    log.append(rated)
    save(args, model, processor, log, step, sum(counts), device, started)


@torch.no_grad()
def rate_answers(  # noqa: PLR0913 - the parts of the training
    run, draw, scan, loader, counts: list[int], device, batches: int = 8
) -> dict:
    """Say what share of answers is right to the last token, on people who were not drawn before.

    The answers are given word by word, so each token is guessed after the right ones. `spot_decided`
    is the share of sentences on a spot whose first token is right: in English it says whether there
    is one.
    """
    right: dict[str, list] = {}
    for _ in range(batches):
        batch = {key: value.to(device, non_blocking=True) for key, value in next(loader).items()}
        picture, _ = draw(*scan, batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits, _ = run(batch["ids"], pretrain.patchify(picture))
        labels, weights = batch["labels"][:, 1:], batch["weights"][:, 1:]
        hit = ((logits[:, :-1].argmax(-1) == labels) | (labels == -100)).cpu()
        weighed = ((weights > 1) & (labels != -100)).cpu()
        for row, count in enumerate(counts):
            right.setdefault(f"answers_{count}", []).append(bool(hit[row].all()))
            if weighed[row].any():
                spot = hit[row][weighed[row]]
                right.setdefault("spot_decided", []).append(bool(spot[0]))
                right.setdefault("spot_sentences", []).append(bool(spot.all()))
    return {key: round(float(np.mean(values)), 3) for key, values in right.items()}


def save(  # noqa: PLR0913 - what the log says
    args, model, processor, log, step, pictures, device, started
) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(args.out)
    processor.save_pretrained(args.out)
    facts = {
        "command": "python data/tiny-vlm/pretrain_people.py --base FIRST"
        f" --steps {step} --batch-size {args.batch_size} --learning-rate {args.learning_rate}"
        f" --head-weight {args.head_weight} --seed {args.seed}" + " --compile" * args.compile,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": step,
        "pictures": step * pictures,
        "minutes": round((time.time() - started) / 60, 1),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }
    (args.out / "pretrain_log.json").write_text(json.dumps(facts | {"log": log}, indent=1) + "\n")
    print(json.dumps(facts), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--base", type=Path, required=True, help="the first stage's model, made by pretrain.py"
    )
    parser.add_argument(
        "--ct-folder", help="folder with cxr.nii.gz, mask.nii.gz and structures.csv"
    )
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="training time, unless --steps is given"
    )
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=320)
    parser.add_argument("--learning-rate", type=float, default=8e-4)
    parser.add_argument(
        "--head-weight", type=float, default=0.5, help="of the loss of the spots' tokens"
    )
    parser.add_argument("--workers", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
