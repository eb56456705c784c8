"""Pretrain the course's tiny base model: a real Qwen3-VL of under 8 million parameters that sees
and speaks plainly.

It learns, in plain English and Chinese, to say where a green frame is, how bright, big and shaped
its content is, which
coarse kind of tissue it is, where in the body it lies and what is next to it. It sees procedurally
drawn pictures and
the CT's TRAINING slices only, and never an organ's name, a finding or the wording of the clinical
captions.

    python data/tiny-vlm/pretrain.py --out data/tiny-vlm --minutes 8

makes the model again: about ten minutes on one GPU, a night on a CPU (``--device cpu --steps N
--batch-size 32``).
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch.utils.data import DataLoader, IterableDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import build_sample

SIDE, PATCH, MERGE = 192, 16, 2
GRID = SIDE // PATCH
IMAGE_TOKENS = (GRID // MERGE) ** 2
LENGTH = 160
SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
TEMPLATE = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string %}
{{- message.content }}
{%- else %}
{%- for part in message.content %}
{%- if part.type == 'image' or 'image' in part or 'image_url' in part %}
{{- '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif 'text' in part %}
{{- part.text }}
{%- endif %}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# ---------------------------------------------------------------- plain words, (English, Chinese)
KINDS = {
    "solid": ("solid soft tissue", "实心的软组织"),
    "hollow": ("a soft hollow tube", "空心的软管"),
    "gland": ("a small soft lump", "小的软块"),
    "airy": ("airy spongy tissue", "含气的海绵样组织"),
    "air pipe": ("an air pipe", "通气的管子"),
    "bone": ("hard bone", "坚硬的骨头"),
    "pump": ("a thick-walled blood chamber", "厚壁的血腔"),
    "vessel": ("a blood tube", "输血的管子"),
    "cord": ("a soft cord inside bone", "骨头里的软索"),
    "muscle": ("muscle", "肌肉"),
    "gristle": ("gristle", "脆骨"),
    "other": ("fat or skin", "脂肪或皮肤"),
    "air": ("empty air", "空气"),
}
BRIGHT = (("black", "黑"), ("dark", "暗"), ("grey", "灰"), ("bright", "亮"), ("white", "白"))
SHAPES = {
    "round": ("round", "圆形"),
    "oval": ("oval", "椭圆形"),
    "long": ("long and thin", "细长形"),
    "odd": ("uneven", "不规则形"),
}
SIDES = (
    ("the far right of the body", "身体最右侧"), ("the right of the body", "身体右侧"),
    ("the middle of the body", "身体正中"), ("the left of the body", "身体左侧"),
    ("the far left of the body", "身体最左侧"),
)  # fmt: skip
DEPTHS = (
    ("at the front", "最前面"),
    ("towards the front", "偏前"),
    ("halfway back", "前后居中"),
    ("towards the back", "偏后"),
    ("at the back", "最后面"),
)
LEVELS = (
    ("the middle belly", "肚子中段"),
    ("the upper belly", "肚子上段"),
    ("the lower trunk", "胸腔下段"),
    ("the middle trunk", "胸腔中段"),
    ("the upper trunk", "胸腔上段"),
    ("the neck base", "脖子根"),
)
SIZES = (
    (0.01, "tiny", "极小"),
    (0.03, "small", "小"),
    (0.08, "medium", "中等"),
    (0.2, "large", "大"),
    (9, "huge", "极大"),
)
DRAWN = {
    "circle": ("circle", "圆"),
    "square": ("square", "方块"),
    "bar": ("bar", "长条"),
    "ring": ("ring", "圆环"),
    "cross": ("cross", "十字"),
}
DIRECTIONS = (
    ("Above it", "上面"),
    ("right of it", "右面"),
    ("below it", "下面"),
    ("left of it", "左面"),
)
ASK = (
    ("Describe the picture.", "请描述这张图片。"),
    ("What do you see?", "你看到了什么？"),
    ("Look at the green frame and describe what is inside.", "看绿色方框，描述里面的内容。"),
    (
        "Describe this picture and the region in the green box.",
        "请描述这张图片和绿色方框中的区域。",
    ),
    ("What is in this picture?", "这张图里是什么？"),
)


def say(pair: tuple[str, str], zh: bool) -> str:
    return pair[zh]


def spot_words(spot: dict | None, zh: bool) -> str:
    if spot is None:
        return "里面没有斑点。" if zh else "There is no spot in it."
    shade = spot["shade"][zh]
    place = build_sample.PLACES[spot["place"]][zh]
    return (
        f"里面{place}有一个{shade}的圆斑。"
        if zh
        else f"A {shade} round spot is in its {place} part."
    )


def sentences(f: dict, zh: bool) -> dict[str, str]:
    """Put each known fact into one plain sentence."""
    place = build_sample.PLACES[f["place"]][zh]
    share = build_sample.share_words(f["share"])[zh]
    size = next(s for s in SIZES if f["share"] < s[0])[1 + zh]
    out = {
        "place": f"绿色方框位于图像的{place}，{share}，大小{size}。"
        if zh
        else f"There is a green frame in the {place} of the image; it covers {share} of its area and is {size}.",
        "bright": f"里面的亮度是{BRIGHT[f['bright']][1]}。"
        if zh
        else f"Inside it is {BRIGHT[f['bright']][0]}.",
    }
    if "level" in f:
        level, percent = say(LEVELS[f["level"]], zh), 5 * round(f["height"] * 20)
        out["level"] = (
            f"这一层在{level}，高度{percent}。"
            if zh
            else f"The slice is at {level}, height {percent}."
        )
        where, deep = say(SIDES[f["side"]], zh), say(DEPTHS[f["depth"]], zh)
        out["where"] = f"它在{where}，{deep}。" if zh else f"It lies in {where}, {deep}."
    if "kind" in f:
        kind, shape = say(KINDS[f["kind"]], zh), say(SHAPES[f["shape"]], zh)
        out["kind"] = f"它是{kind}，{shape}。" if zh else f"It is {kind}, {shape} in shape."
        near = [say(KINDS[k], zh) for k in f["near"]]
        names = [d[zh] for d in DIRECTIONS]
        out["near"] = (
            f"它的{names[0]}是{near[0]}，{names[1]}是{near[1]}，{names[2]}是{near[2]}，{names[3]}是{near[3]}。"
            if zh
            else f"{names[0]} is {near[0]}, {names[1]} {near[1]}, {names[2]} {near[2]}, {names[3]} {near[3]}."
        )
        out["spot"] = spot_words(f["spot"], zh)
    if "drawn" in f:
        what = say(DRAWN[f["drawn"]], zh)
        out["kind"] = f"它是画出来的{what}。" if zh else f"It is a drawn {what}."
    return out


QUESTIONS = {
    "place": ("Where is the green frame?", "绿色方框在哪里？"),
    "bright": ("How bright is it inside the frame?", "方框里有多亮？"),
    "level": ("How high in the body is this slice?", "这一层在身体的什么高度？"),
    "where": ("Where in the body is the framed part?", "框住的部分在身体的什么位置？"),
    "kind": ("What kind of thing is in the frame?", "方框里是什么？"),
    "near": ("What is next to the framed part?", "框住的部分旁边是什么？"),
    "spot": ("Is there a spot in it?", "里面有斑点吗？"),
}
ORDER = ("place", "kind", "where", "level", "near", "bright", "spot")


def write_text(
    f: dict, rng: np.random.Generator, words: list[str] | None = None
) -> tuple[str, str]:
    """Write one question and its answer in plain words."""
    zh = bool(rng.random() < 0.2)
    if words:
        said = " ".join(words[i] for i in rng.integers(0, len(words), rng.integers(3, 14)))
        return ("请重复：" if zh else "Say again: ") + said, said
    if f.get("find"):
        what = (
            say(KINDS[f["kind"]], zh),
            say(SHAPES[f["shape"]], zh),
            say(SIDES[f["side"]], zh),
            say(DEPTHS[f["depth"]], zh),
        )
        place, (x0, y0, x1, y1) = (
            build_sample.PLACES[f["place"]][zh],
            (2 * round(float(v) * 50) for v in f["box"]),
        )
        if zh:
            return (
                f"找出{what[0]}，{what[1]}，在{what[2]}，{what[3]}。",
                f"它在图像的{place}，横向{x0}到{x1}，纵向{y0}到{y1}。",
            )
        return (
            f"Find {what[0]}, {what[1]}, in {what[2]}, {what[3]}.",
            f"It is in the {place} of the image, from {x0} to {x1} across and {y0} to {y1} down.",
        )
    parts = sentences(f, zh)
    if rng.random() < 0.7:
        known = [k for k in ORDER if k in parts]
        if rng.random() < 0.3:  # another order and a part of the facts
            known = list(rng.permutation(known)[: rng.integers(2, len(known) + 1)])
        return say(ASK[rng.integers(len(ASK))], zh), ("" if zh else " ").join(
            parts[k] for k in known
        )
    key = "spot" if f.get("spot") and rng.random() < 0.5 else str(rng.choice(list(parts)))
    return say(QUESTIONS[key], zh), parts[key]


# ---------------------------------------------------------------- facts of the training slices
def body_box(hu: np.ndarray) -> tuple[int, int, int, int]:
    """Return the body's bounding box (x0, y0, x1, y1) in a slice; the table is a separate, thinner
    part.
    """
    solid = ndimage.binary_opening(hu > -300, iterations=4)
    parts, n = ndimage.label(solid)
    biggest = (
        ndimage.binary_fill_holes(parts == 1 + np.argmax(np.bincount(parts.ravel())[1:]))
        if n
        else solid
    )
    rows, columns = np.flatnonzero(biggest.any(1)), np.flatnonzero(biggest.any(0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def deep_points(part: np.ndarray, room: float = 6.0) -> np.ndarray:
    """Return up to 500 points (x, y, distance to the region's edge) where a round spot has room."""
    depth = cv2.distanceTransform(part.astype(np.uint8), cv2.DIST_L2, 5)
    points = np.argwhere(depth >= room)
    points = points[:: max(1, len(points) // 500)]
    return np.column_stack([points[:, ::-1], depth[points[:, 0], points[:, 1]]]).astype(np.float32)


def shape_of(part: np.ndarray, hull: np.ndarray) -> str:
    area = float(part.sum())
    solidity = area / max(cv2.contourArea(hull), area)
    (_, _), (a, b), _ = cv2.minAreaRect(hull)
    ratio = max(a, b) / max(min(a, b), 1)
    return (
        "odd" if solidity < 0.75 else "round" if ratio < 1.35 else "oval" if ratio < 2.5 else "long"
    )


def collect(folder: str | None) -> tuple[np.ndarray, np.ndarray, list[dict]]:
    """Load the CT, blank out every slice that is not for training, and list the facts of the
    training regions.
    """
    scan = build_sample.read_course_scan(folder)
    hu, mask, names = scan.hu, scan.mask, scan.names
    kind_of = np.array(["other"] * 256, dtype=object)
    for label, name in names.items():
        info = build_sample.describe_structure(name)
        if info:
            kind_of[label] = info[2]
    regions = []
    for z in range(len(hu)):
        if build_sample.split_of(z) != "train":
            hu[z], mask[z] = -1024, 0  # nobody below can look at a held-out slice
            continue
        x0, y0, x1, y1 = body_box(hu[z])
        for region in build_sample.find_regions(mask[z], names):
            part = region["part"]
            hull = cv2.convexHull(np.argwhere(part)[:, ::-1].astype(np.int32).reshape(-1, 1, 2))
            rows, columns = np.nonzero(part)
            cx, cy = columns.mean(), rows.mean()
            reach = [  # points just outside the region: above, right, below, left
                (cx, rows.min() - 8),
                (columns.max() + 8, cy),
                (cx, rows.max() + 8),
                (columns.min() - 8, cy),
            ]
            near = []
            for x, y in reach:
                y, x = int(np.clip(y, 5, 506)), int(np.clip(x, 5, 506))
                window = mask[z, y - 5 : y + 6, x - 5 : x + 6]
                labels = window[(window > 0) & (window != region["label"])]
                if len(labels) > 15:
                    near.append(kind_of[np.bincount(labels).argmax()])
                else:
                    near.append(
                        "air" if hu[z, y - 5 : y + 6, x - 5 : x + 6].mean() < -700 else "other"
                    )
            regions.append(
                {
                    "z": z,
                    "hull": hull.reshape(-1, 2).astype(np.float32),
                    "mean": float(hu[z][part].mean()),
                    "kind": region["info"][2],
                    "name": region["info"][0],
                    "shape": shape_of(part, hull),
                    "near": near,
                    "side": min(int((cx - x0) / (x1 - x0) * 5), 4),
                    "depth": min(int((cy - y0) / (y1 - y0) * 5), 4),
                    "points": deep_points(part),
                    "body": (x0, y0, x1, y1),
                }
            )
    return hu, mask, regions


# ---------------------------------------------------------------- one training sample
def draw_plan(  # noqa: PLR0915 - one sample is drawn here, from top to bottom
    regions: list[dict], rng: np.random.Generator, weights: np.ndarray, words: list[str]
) -> tuple[dict, str, str]:
    """Choose a picture (as numbers for the renderer) and write its question and answer."""
    region = regions[rng.choice(len(regions), p=weights)]
    angle, zoom = rng.uniform(-12, 12), rng.uniform(0.92, 1.45)
    turn = cv2.getRotationMatrix2D((256, 256), angle, zoom)
    turn[:, 2] += rng.uniform(-65, 65, 2)
    center, width = (
        [(40, 400), (-600, 1500), (400, 1800)][rng.integers(3)]
        if rng.random() < 0.4
        else build_sample.WINDOWS[
            {"airy": "lung", "bone": "bone"}.get(region["kind"], "soft tissue")
        ][0]
    )
    if rng.random() < 0.15:
        center, width = center + rng.uniform(-60, 60), width * rng.uniform(0.7, 1.4)
    plan = {
        "z": region["z"],
        "turn": turn,
        "window": (center, width),
        "drawn": -1,
        "spot": (0.0, 0.0, 0.0, 0.0),
        "line": rng.uniform(2.8, 4.2),
    }
    facts: dict = {"height": region["z"] / (build_sample.SLICES - 1)}
    facts["level"] = sum(region["z"] >= row[0] for row in build_sample.LEVELS) - 1
    dice = rng.random()
    grey = lambda hu: int(np.clip((hu - center + width / 2) / width, 0, 0.999) * 5)  # noqa: E731
    if dice < 0.14:  # a drawn figure on the dimmed picture
        size, x, y = rng.uniform(25, 120), rng.uniform(60, 452), rng.uniform(60, 452)
        shade, name = rng.random(), str(rng.choice(list(DRAWN)))
        plan |= {
            "drawn": list(DRAWN).index(name),
            "figure": (x, y, size / 2, shade),
            "dim": rng.uniform(0, 0.6),
        }
        box = np.array([x - size / 2, y - size / 2, x + size / 2, y + size / 2])
        facts = {"drawn": name, "bright": int(np.clip(shade, 0, 0.999) * 5)}
    elif dice < 0.18:  # a frame anywhere in the body
        bx0, by0, bx1, by1 = region["body"]
        x, y = rng.uniform(bx0 + 20, bx1 - 20), rng.uniform(by0 + 20, by1 - 20)
        half = rng.uniform(10, 45, 2)
        corners = np.array(
            [
                [x - half[0], y - half[1]],
                [x + half[0], y + half[1]],
                [x - half[0], y + half[1]],
                [x + half[0], y - half[1]],
            ]
        )
        moved = corners @ turn[:, :2].T + turn[:, 2]
        box = np.concatenate([moved.min(0), moved.max(0)])
        facts |= {
            "side": min(int((x - bx0) / (bx1 - bx0) * 5), 4),
            "depth": min(int((y - by0) / (by1 - by0) * 5), 4),
            "bright": -1,
            "center": (x, y),
        }
    else:
        moved = region["hull"] @ turn[:, :2].T + turn[:, 2]
        box = np.concatenate([moved.min(0), moved.max(0) + 1])
        facts |= {k: region[k] for k in ("kind", "shape", "near", "side", "depth")}
        facts |= {"bright": grey(region["mean"]), "spot": None}
        if dice < 0.38:  # the same region without a frame: to be found
            plan["line"], facts["find"] = 0.0, True
        elif len(region["points"]) and rng.random() < 0.55:
            x, y, room = region["points"][rng.integers(len(region["points"]))]
            x, y = turn[:, :2] @ (x, y) + turn[:, 2]
            now = float(np.clip((region["mean"] - center + width / 2) / width, 0, 1))
            bright = bool(rng.random() < 0.5) if 0.3 < now < 0.7 else now <= 0.3
            target = now + (1 if bright else -1) * rng.uniform(0.16, 0.6)
            radius = rng.uniform(5, min(18, room))
            plan["spot"] = (x, y, radius * zoom, center - width / 2 + target * width)
            words2 = (("dark", "暗"), ("bright", "亮"))[bright]
            inside = build_sample.place_index(
                *np.clip((np.array([x, y]) - box[:2]) / np.maximum(box[2:] - box[:2], 1), 0, 0.999)
            )
            facts["spot"] = {"shade": words2, "place": inside}
    edge = rng.integers(2, 7) + plan["line"]
    box = np.clip(box + np.array([-edge, -edge, edge, edge]), 0, 512)
    if box[2] - box[0] < 8 or box[3] - box[1] < 8:
        return draw_plan(regions, rng, weights, words)
    plan["box"], facts["box"] = box, box / 512
    facts["place"] = build_sample.place_index((box[0] + box[2]) / 1024, (box[1] + box[3]) / 1024)
    facts["share"] = float((box[2] - box[0]) * (box[3] - box[1]) / 512**2)
    if facts["bright"] < 0:
        x, y = (int(v) for v in facts["center"])
        facts["bright"] = grey(
            float(HU_FOR_WORKERS[region["z"], max(y - 8, 0) : y + 8, max(x - 8, 0) : x + 8].mean())
        )
    question, answer = write_text(facts, rng, words if rng.random() < 0.06 else None)
    return plan, question, answer


class Batches(IterableDataset):
    """Endless batches of plans and token ids, each from a seed of its own: no worker repeats another."""

    def __init__(  # noqa: PLR0913 - what `make_batch` takes
        self, regions, weights, tokenizer, batch_size, seed, words
    ):
        self.args = (regions, weights, tokenizer, batch_size, seed, words)

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        cv2.setNumThreads(1)
        number = worker
        while True:
            yield make_batch(*self.args, number)
            number += workers


def make_batch(  # noqa: PLR0913 - each worker is sent all of it
    regions, weights, tokenizer, batch_size, seed, words, number
):
    rng = np.random.default_rng([seed, number])
    plans, prompts, answers = zip(
        *(draw_plan(regions, rng, weights, words) for _ in range(batch_size)), strict=True
    )
    heads = tokenizer.encode_batch(
        [f"<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>\n" for a in answers]
    )
    tails = tokenizer.encode_batch(list(prompts))
    n_head = len(tokenizer.encode("<|im_end|>\n<|im_start|>assistant\n").ids)
    ids = np.zeros((batch_size, LENGTH), np.int64)
    labels = np.full((batch_size, LENGTH), -100, np.int64)
    prefix = prefix_ids(tokenizer)
    for i, (question, answer) in enumerate(zip(tails, heads, strict=True)):
        full = (prefix + question.ids + answer.ids)[:LENGTH]
        start = len(prefix) + len(question.ids) + n_head
        ids[i, : len(full)] = full
        labels[i, start : len(full)] = full[start:]
    numbers = {
        "z": np.array([p["z"] for p in plans]),
        "turn": np.stack([p["turn"] for p in plans]).astype(np.float32),
        "window": np.array([p["window"] for p in plans], np.float32),
        "box": np.stack([p["box"] for p in plans]).astype(np.float32),
        "line": np.array([p["line"] for p in plans], np.float32),
        "spot": np.array([p["spot"] for p in plans], np.float32),
        "drawn": np.array([p["drawn"] for p in plans]),
        "figure": np.array([p.get("figure", (0, 0, 1, 0)) for p in plans], np.float32),
        "dim": np.array([p.get("dim", 1.0) for p in plans], np.float32),
    }
    return {k: torch.from_numpy(v) for k, v in numbers.items()} | {
        "ids": torch.from_numpy(ids),
        "labels": torch.from_numpy(labels),
    }


def prefix_ids(tokenizer) -> list[int]:
    return tokenizer.encode(
        "<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * IMAGE_TOKENS + "<|vision_end|>"
    ).ids


# ---------------------------------------------------------------- pictures, drawn on the device
def render(volume: torch.Tensor, b: dict, res: int = 384) -> torch.Tensor:
    """Draw a batch of pictures, (B, 3, SIDE, SIDE) in 0..1: turn, spot, window, figure, frame."""
    n, dev = len(b["z"]), volume.device
    step = 512 / res
    axis = (torch.arange(res, device=dev) + 0.5) * step - 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    full = torch.eye(3, device=dev).repeat(n, 1, 1)
    full[:, :2] = b["turn"]
    back = torch.linalg.inv(full)[:, :2]
    source = torch.einsum("nij,hwj->nhwi", back, torch.stack([x, y, torch.ones_like(x)], -1))
    hu = (
        F.grid_sample(
            volume[b["z"]][:, None] + 1024.0,
            (source + 0.5) / 256 - 1,
            mode="bilinear",
            padding_mode="zeros",
            align_corners=False,
        )[:, 0]
        - 1024.0
    )
    sx, sy, radius, level = b["spot"].T[:, :, None, None]
    disc = torch.clamp(radius + 0.5 - torch.hypot(x - sx, y - sy), 0, 1) * (radius > 0)
    hu = hu * (1 - disc) + (level + 12 * torch.randn_like(hu)) * disc
    center, width = b["window"].T[:, :, None, None]
    grey = torch.clamp((hu - center + width / 2) / width, 0, 1) * b["dim"][:, None, None]
    fx, fy, half, shade = b["figure"].T[:, :, None, None]
    dx, dy = (x - fx) / half, (y - fy) / half
    r = torch.hypot(dx, dy)
    shapes = torch.stack(
        [
            r < 1,
            (dx.abs() < 1) & (dy.abs() < 1),
            (dx.abs() < 1) & (dy.abs() < 0.25),
            (r < 1) & (r > 0.65),
            ((dx.abs() < 0.25) & (dy.abs() < 1)) | ((dy.abs() < 0.25) & (dx.abs() < 1)),
        ],
        1,
    )
    mine = torch.gather(
        shapes, 1, b["drawn"].clamp(min=0)[:, None, None, None].expand(-1, 1, res, res)
    )[:, 0]
    grey = torch.where(mine & (b["drawn"] >= 0)[:, None, None], shade, grey)

    def cover(box: torch.Tensor) -> torch.Tensor:
        # The share of each pixel that a rectangle covers: the rectangle drawn with smooth edges.
        x0, y0, x1, y1 = box.T[:, :, None]
        left, right = axis + 0.5 - step / 2, axis + 0.5 + step / 2
        across = (torch.minimum(right[None], x1) - torch.maximum(left[None], x0)).clamp(
            0, step
        ) / step
        down = (torch.minimum(right[None], y1) - torch.maximum(left[None], y0)).clamp(
            0, step
        ) / step
        return down[:, :, None] * across[:, None, :]

    line = b["line"][:, None] * torch.tensor([1.0, 1, -1, -1], device=dev)
    frame = (cover(b["box"]) - cover(b["box"] + line)).clamp(0, 1)
    green = torch.tensor([0.0, 1, 0], device=dev)[None, :, None, None]
    picture = grey[:, None] * (1 - frame[:, None]) + green * frame[:, None]
    picture = F.interpolate(
        picture, size=(SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False
    )
    return (picture + torch.randn_like(picture) * 0.006).clamp(0, 1)


def patchify(picture: torch.Tensor) -> torch.Tensor:
    """Cut pictures into the processor's rows of patches: (B, 144, 3 * 16 * 16), in the order of the
    2x2 merge.
    """
    n, g = len(picture), GRID // MERGE
    p = ((picture - 0.5) / 0.5).reshape(n, 3, g, MERGE, PATCH, g, MERGE, PATCH)
    return p.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(n, GRID * GRID, 3 * PATCH * PATCH)


# ---------------------------------------------------------------- tokenizer, processor, model
def make_tokenizer(regions: list[dict], vocab_size: int, words_file: Path):
    """Train the byte-level BPE on plain sentences and on a list of everyday words, none of them
    clinical.
    """
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )
    from transformers import Qwen2Tokenizer

    rng = np.random.default_rng(0)
    weights = np.full(len(regions), 1 / len(regions))
    corpus = [" ".join(draw_plan(regions, rng, weights, [])[1:]) for _ in range(3000)]
    everyday = words_file.read_text(encoding="utf-8").split()
    # The commonest words stand first in the list and count most.
    corpus += [
        form
        for i, w in enumerate(everyday)
        for form in [" " + w] * (60 if i < 160 else 4) + [w] * 3
    ]
    tok = Tokenizer(models.BPE())
    tok.normalizer = normalizers.NFC()
    split = (  # Qwen's own rule; Qwen2Tokenizer builds the same one when it loads the folder
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=SPECIAL,
        ),
    )
    raw = json.loads(tok.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=raw["vocab"],
        merges=[tuple(m) for m in raw["merges"]],
        unk_token=None,
        bos_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=2048,
        extra_special_tokens={
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_start_token": "<|vision_start|>",
            "vision_end_token": "<|vision_end|>",
        },
    )
    tokenizer.add_tokens(
        [AddedToken(t, special=True, normalized=False) for t in SPECIAL], special_tokens=True
    )
    return tokenizer


def make_processor(tokenizer):
    """Bind tokenizer, picture processor and chat template.

    Qwen3VLProcessor also wants a video processor, which needs torchvision. PaddleOCRVLProcessor is
    the same code for
    pictures only, so plain AutoProcessor loads the folder with torchvision and without.
    """
    from transformers import PaddleOCRVLProcessor, Qwen2VLImageProcessorPil

    pictures = Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=1,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        # or rounding makes some squares 160
        size={"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE + 1136},
    )
    return PaddleOCRVLProcessor(
        image_processor=pictures, tokenizer=tokenizer, chat_template=TEMPLATE
    )


# text layers, text inner, vision width, vision layers, vision heads, DeepStack layers
SHAPES_OF_MODEL = {
    "a": (5, 640, 160, 8, 5, [3]),
    "b": (4, 768, 192, 5, 6, [2]),
}


def make_model(tokenizer, shape: str):
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    layers, inner, width, depth, heads, deepstack = SHAPES_OF_MODEL[shape]
    ids = tokenizer.convert_tokens_to_ids
    rope = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [12, 10, 10],
        "mrope_interleaved": True,
    }
    config = Qwen3VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=2048,
            rope_parameters=rope,
            eos_token_id=ids("<|im_end|>"),
            pad_token_id=ids("<|endoftext|>"),
            bos_token_id=None,
            tie_word_embeddings=True,
        ),
        vision_config=dict(
            depth=depth,
            hidden_size=width,
            intermediate_size=4 * width,
            num_heads=heads,
            out_hidden_size=256,
            patch_size=PATCH,
            spatial_merge_size=MERGE,
            temporal_patch_size=1,
            num_position_embeddings=GRID * GRID,
            deepstack_visual_indexes=deepstack,
        ),
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = [ids("<|im_end|>"), ids("<|endoftext|>")]
    model.generation_config.pad_token_id = ids("<|endoftext|>")
    return model


class Fast(torch.nn.Module):
    """The same computation as the model's own forward, for a batch of equal pictures in one fixed
    layout.

    The library walks over the pictures one by one; here they are one batched call, so that a GPU is
    kept busy.
    """

    def __init__(self, model, ids: torch.Tensor, patches: torch.Tensor):
        super().__init__()
        self.model, caught = model, {}
        self.start = int((ids[0] == model.config.image_token_id).nonzero()[0])
        text, visual = model.model.language_model, model.model.visual
        hooks = [
            part.register_forward_pre_hook(
                lambda m, a, kw, key=key: caught.update({key: kw["position_embeddings"]}),
                with_kwargs=True,
            )
            for key, part in (("text", text.layers[0]), ("vision", visual.blocks[0]))
        ]
        kinds = (ids[:1] == model.config.image_token_id).int()
        grid = torch.tensor([[1, GRID, GRID]], device=ids.device)
        with torch.no_grad():
            self.expected = model(
                input_ids=ids[:1],
                pixel_values=patches[0],
                image_grid_thw=grid,
                mm_token_type_ids=kinds,
            ).logits
        for hook in hooks:
            hook.remove()
        for key, (cos, sin) in caught.items():
            self.register_buffer(key + "_cos", cos.detach(), persistent=False)
            self.register_buffer(key + "_sin", sin.detach(), persistent=False)
        g = GRID // MERGE
        order = (
            torch.arange(GRID * GRID).reshape(g, MERGE, g, MERGE).permute(0, 2, 1, 3).reshape(-1)
        )
        self.register_buffer("order", order.to(ids.device), persistent=False)

    def vision_block(self, block, h):
        n, s, w = h.shape
        x, a = block.norm1(h), block.attn
        q, k, v = a.qkv(x).reshape(n, s, 3, a.num_heads, -1).permute(2, 0, 3, 1, 4)

        def turn(t):
            first, second = t.chunk(2, -1)
            cos, sin = self.vision_cos[:s].to(t.dtype), self.vision_sin[:s].to(t.dtype)
            return t * cos + torch.cat((-second, first), -1) * sin

        x = F.scaled_dot_product_attention(turn(q), turn(k), v).transpose(1, 2).reshape(n, s, w)
        h = h + a.proj(x)
        return h + block.mlp(block.norm2(h))

    def forward(self, ids, patches):
        visual, text = self.model.model.visual, self.model.model.language_model
        conv = visual.patch_embed.proj
        h = (
            F.linear(patches, conv.weight.flatten(1), conv.bias)
            + visual.pos_embed.weight[self.order]
        )
        n, deep = len(h), []
        for i, block in enumerate(visual.blocks):
            h = self.vision_block(block, h)
            if i in visual.deepstack_visual_indexes:
                merger = visual.deepstack_merger_list[visual.deepstack_visual_indexes.index(i)]
                deep.append(merger(h.reshape(-1, h.shape[-1])).reshape(n, IMAGE_TOKENS, -1))
        pictures = visual.merger(h.reshape(-1, h.shape[-1])).reshape(n, IMAGE_TOKENS, -1)
        a, z = self.start, self.start + IMAGE_TOKENS
        e = text.embed_tokens(ids)
        x = torch.cat([e[:, :a].to(pictures.dtype), pictures, e[:, z:].to(pictures.dtype)], 1)
        places = (self.text_cos.to(x.dtype), self.text_sin.to(x.dtype))
        for i, layer in enumerate(text.layers):
            x = layer(x, attention_mask=None, position_embeddings=places)
            if i < len(deep):
                x = torch.cat([x[:, :a], x[:, a:z] + deep[i], x[:, z:]], 1)
        return self.model.lm_head(text.norm(x))


def train(args: argparse.Namespace) -> None:  # noqa: PLR0915 - the whole recipe in its order
    global HU_FOR_WORKERS
    torch.manual_seed(args.seed)
    device, started = torch.device(args.device), time.time()
    HU_FOR_WORKERS, _, regions = collect(args.ct_folder)
    counts: dict[str, int] = {}
    for r in regions:
        counts[r["name"]] = counts.get(r["name"], 0) + 1
    weights = np.array([counts[r["name"]] ** -0.5 for r in regions])
    weights /= weights.sum()
    tokenizer = make_tokenizer(regions, args.vocab_size, Path(__file__).parent / "words.txt")
    processor, model = make_processor(tokenizer), make_model(tokenizer, args.shape)
    print(
        f"{len(regions)} training regions; {sum(p.numel() for p in model.parameters()):,} parameters",
        flush=True,
    )
    model.to(device)
    rust = tokenizer.backend_tokenizer
    words = [
        t
        for t in (tokenizer.decode([i]).strip() for i in range(len(SPECIAL) + 256, len(tokenizer)))
        if t and "�" not in t
    ]
    batches = Batches(regions, weights, rust, args.batch_size, args.seed, words)
    loader = iter(
        DataLoader(
            batches,
            batch_size=None,
            num_workers=args.workers,
            prefetch_factor=8 if args.workers else None,
            pin_memory=device.type == "cuda",
        )
    )
    volume = torch.from_numpy(HU_FOR_WORKERS.astype(np.float32)).to(device)
    first = {k: v.to(device) for k, v in next(loader).items()}
    fast = Fast(model, first["ids"], patchify(render(volume, first)).float()[:1].detach()).to(
        device
    )
    with torch.no_grad():  # the shortcut must be the model
        torch.manual_seed(1)
        patches = patchify(render(volume, first))
        grid = torch.tensor([[1, GRID, GRID]], device=device)
        own = model(
            input_ids=first["ids"][:1],
            pixel_values=patches[0],
            image_grid_thw=grid,
            mm_token_type_ids=(first["ids"][:1] == model.config.image_token_id).int(),
        ).logits
        gap = float((fast(first["ids"][:1], patches[:1]) - own).abs().max())
    if gap > 1e-3:
        raise RuntimeError(f"the fast forward differs from the model by {gap:.2e}")
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}],
        lr=args.learning_rate,
        betas=(0.9, 0.98),
        fused=device.type == "cuda",
    )
    run = torch.compile(fast) if args.compile else fast
    log, step, clock = [], 0, None
    while True:
        share = (
            step / args.steps
            if args.steps
            else (0 if clock is None else (time.time() - clock) / (60 * args.minutes))
        )
        if share >= 1:
            break
        rate = (
            args.learning_rate
            * min(1, (step + 1) / 300)
            * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        b = {k: v.to(device, non_blocking=True) for k, v in next(loader).items()}
        with torch.no_grad():
            patches = patchify(render(volume, b))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = run(b["ids"], patches)
            loss = F.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(),
                b["labels"][:, 1:].flatten(),
                ignore_index=-100,
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step == 5:
            if device.type == "cuda":
                torch.cuda.synchronize()
            clock = time.time()
        if step % 100 == 0:
            log.append(
                {
                    "step": step,
                    "views": step * args.batch_size,
                    "loss": round(loss.item(), 4),
                    "lr": rate,
                }
            )
            if step % 500 == 0:
                print(
                    json.dumps(
                        log[-1]
                        | {
                            "views_per_s": round(
                                (step - 5) * args.batch_size / (time.time() - clock)
                            )
                        }
                    ),
                    flush=True,
                )
    args.out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(args.out)
    processor.save_pretrained(args.out)
    facts = {
        "command": f"python data/tiny-vlm/pretrain.py --out data/tiny-vlm --shape {args.shape} --steps {step}"
        f" --batch-size {args.batch_size} --learning-rate {args.learning_rate} --vocab-size {args.vocab_size}"
        f" --seed {args.seed}" + " --compile" * args.compile,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": step,
        "views": step * args.batch_size,
        "minutes": round((time.time() - started) / 60, 1),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "final_loss": log[-1]["loss"] if log else None,
    }
    (args.out / "pretrain_log.json").write_text(json.dumps(facts | {"log": log}, indent=1) + "\n")
    print(json.dumps(facts), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--ct-folder", help="folder with cxr.nii.gz, mask.nii.gz and structures.csv"
    )
    parser.add_argument("--shape", choices=SHAPES_OF_MODEL, default="a")
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="training time, unless --steps is given"
    )
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--vocab-size", type=int, default=2800)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
