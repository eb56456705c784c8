"""Draw the README's first picture: a drawn body, and what base and tuned model say of it.

    python docs/figures/phantom_figure.py --adapter papermill_runs/tiny-cpu/out/03_finetune_lora/adapter

The body is a drawing in Hounsfield units, so anybody may look at it and pass it on. It is nobody, and
no picture of the training: what is said of it proves nothing, the scores below it do.
"""

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from medtune import models, plots
from medtune.answers import generate_answers
from medtune.boxes import draw_box, magnify_box

REPO = Path(__file__).parents[2]
SIDE = 512
AIR, FAT, MUSCLE, BLOOD, BONE, LUNG = -1000, -100, 55, 150, 350, -840
LUNG_WINDOW = (-600, 1500)
# what is framed, in shares of the picture: the lung on the left of the picture, the body's right
BOX = (0.19, 0.27, 0.47, 0.69)
QUESTION = (
    "Describe this picture and the region in the green box."
    " The second picture shows the region magnified."
)
WHO = ("base", "tuned")
PICTURES = {
    "phantom.png": {"base": "The base model", "tuned": "After a few minutes of LoRA"},
    "phantom.zh.png": {"base": "基础模型", "tuned": "几分钟 LoRA 微调之后"},
}


def draw_body(seed: int = 0) -> np.ndarray:
    """Draw a slice of a chest, (512, 512), in Hounsfield units."""
    hu = np.full((SIDE, SIDE), AIR, np.float32)

    def ellipse(center, axes, value, angle=0):
        cv2.ellipse(hu, center, axes, angle, 0, 360, value, cv2.FILLED, cv2.LINE_AA)

    ellipse((256, 262), (212, 148), FAT)
    ellipse((256, 262), (196, 133), MUSCLE)
    # ribs, as an oblique slice cuts them
    for turn in np.arange(0, 360, 24):
        x, y = 182 * np.cos(np.radians(turn)), 120 * np.sin(np.radians(turn))
        ellipse((round(256 + x), round(262 + y)), (13, 6), BONE, turn + 90)
    ellipse((170, 248), (68, 99), LUNG, 6)
    ellipse((345, 248), (66, 99), LUNG, -6)
    ellipse((280, 222), (62, 56), MUSCLE, 35)
    ellipse((272, 212), (24, 28), BLOOD)
    ellipse((256, 336), (34, 26), BONE)
    ellipse((256, 364), (14, 12), MUSCLE)
    ellipse((256, 392), (9, 22), BONE)
    ellipse((296, 316), (15, 15), BLOOD)
    ellipse((256, 140), (24, 8), BONE)
    # vessels of the lungs: lines that branch away from the middle
    rng = np.random.default_rng(seed)
    for root in ((222, 248), (322, 262)):
        outwards = 180 if root[0] < 256 else 0
        for _ in range(9):
            point = np.array(root, float)
            turn = np.radians(outwards + rng.uniform(-75, 75))
            for thickness in (5, 4, 3, 2, 1):
                turn += rng.normal(0, 0.25)
                end = point + 17 * np.array([np.cos(turn), np.sin(turn)])
                inside = hu[tuple(np.clip(end[::-1].astype(int), 0, SIDE - 1))] < -500
                if not inside:
                    break
                ends = tuple(point.astype(int)), tuple(end.astype(int))
                cv2.line(hu, *ends, 20, thickness, cv2.LINE_AA)
                point = end
    # what is to be found
    ellipse((136, 300), (13, 12), 35, 20)
    hu = cv2.GaussianBlur(hu, (0, 0), 1.0)
    return hu + rng.normal(0, 25, hu.shape)


def picture_of(hu: np.ndarray) -> Image.Image:
    """Show Hounsfield units through the lung window."""
    center, width = LUNG_WINDOW
    grey = np.clip((hu - center + width / 2) / width * 255, 0, 255)
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def ask_both(pictures: list[Image.Image], base: str, adapter: str) -> dict[str, str]:
    """Ask the base and the tuned model about the pictures."""
    content = [{"type": "image"} for _ in pictures]
    content.append({"type": "text", "text": QUESTION})
    row = {"id": "phantom", "images": pictures, "prompt": [{"role": "user", "content": content}]}
    processor = models.load_processor(adapter)
    model = models.load_base(base)
    answers = {}
    for who in WHO:
        if who == "tuned":
            model = models.load_tuned(model, adapter)
        answers[who] = generate_answers(model, processor, [row], max_new_tokens=160)[0]["answer"]
    return answers


def draw(pictures: list[Image.Image], answers: dict[str, str], titles: dict, path: Path) -> None:
    """Draw the two pictures with the answers beside them; the file describes itself by these."""
    style = {"font.size": 11, "font.family": list(plots.font_families())}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(11, 3.4), layout="constrained")
        axes = figure.subplots(1, 3, width_ratios=(1, 1, 1.55))
        for axis, picture in zip(axes, pictures, strict=False):
            axis.imshow(picture)
        for axis in axes:
            axis.set_axis_off()
        place = 1.0
        for who in WHO:
            said = textwrap.fill(answers[who], 58)
            axes[2].text(0, place, titles[who], weight="bold", va="top")
            axes[2].text(0, place - 0.08, said, va="top", fontsize=10)
            place -= 0.17 + 0.065 * (said.count("\n") + 1)
        about: dict[str, Any] = {"Description": json.dumps(answers)}
        figure.savefig(path, dpi=110, metadata=about)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapter", required=True, help="folder of the adapter that 03 trained")
    parser.add_argument("--base", default=str(REPO / "data" / "tiny-vlm"))
    args = parser.parse_args()
    whole = picture_of(draw_body())
    pictures = [draw_box(whole, BOX), magnify_box(draw_box(whole, BOX), BOX)]
    answers = ask_both(pictures, args.base, args.adapter)
    for name, titles in PICTURES.items():
        draw(pictures, answers, titles, REPO / "docs" / "images" / name)
    print(json.dumps(answers, indent=1))


if __name__ == "__main__":
    main()
