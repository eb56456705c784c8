"""Training records without sense: pictures of noise, and answers of random words."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def save_noise_pictures(folder: Path, count: int, noise_side: int, side: int) -> None:
    """Save pictures `0.jpg`, `1.jpg` ...: squares of noise, enlarged so that they compress."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0)
    for number in range(count):
        pixels = noise.integers(0, 255, (noise_side, noise_side, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).resize((side, side))
        picture.save(folder / f"{number}.jpg", quality=90)


def random_answers(words: Sequence[str], count: int, shortest: int, longest: int) -> list[str]:
    """Draw answers of unequal length, from `shortest` to `longest` words."""
    draw = random.Random(0)
    answers = []
    for _ in range(count):
        length = draw.randint(shortest, longest)
        answers.append(" ".join(draw.choice(words) for _ in range(length)))
    return answers


def record(number: int, picture: str, question: str, answer: str) -> dict[str, Any]:
    """Write a record as `medtune convert` does, with one picture."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    reply = [{"type": "text", "text": answer}]
    return {
        "id": str(number),
        "images": [picture],
        "prompt": [{"role": "user", "content": content}],
        "completion": [{"role": "assistant", "content": reply}],
    }
