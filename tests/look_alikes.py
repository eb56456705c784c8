"""Pictures that are as unlike as two patients, and changes that make a near-duplicate of one."""

import io

import datasets
import numpy as np
from PIL import Image, ImageDraw, ImageEnhance


def encode(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    if kind == "JPEG":
        options = {"quality": 90} | options
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def scan(seed: int, size: tuple[int, int] = (200, 160)) -> Image.Image:
    """Make a random picture with detail of every size, less of the fine, as in nature."""
    rng = np.random.default_rng(seed)
    total = np.zeros(size[::-1])
    for octave in range(6):
        cells = rng.normal(0, 1, (4 << octave, 5 << octave)).astype(np.float32)
        noise = Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC)
        total += np.asarray(noise) / 2**octave
    total = (total - total.min()) / np.ptp(total)
    return Image.fromarray((20 + 180 * total).astype(np.uint8))


def make_dataset(images: list, **columns) -> datasets.Dataset:
    """Make a Dataset of pictures, or of their bytes; columns replace the made ids and captions."""
    cells = []
    for image in images:
        data = image if isinstance(image, bytes) else encode(image)
        cells.append({"bytes": data, "path": None})
    table = {
        "image": cells,
        "id": [f"id-{number}" for number in range(len(cells))],
        "caption": [""] * len(cells),
    }
    return datasets.Dataset.from_dict(table | columns).cast_column("image", datasets.Image())


def patients(number: int = 12, films: int = 4) -> datasets.Dataset:
    """Make patients whose films are near-duplicates, each with the patient's caption."""
    images, captions, names = [], [], []
    for patient in range(number):
        for quality in range(60, 60 + films):
            images.append(encode(scan(patient), quality=quality))
            captions.append(f"Findings of {patient}.")
            names.append(f"p{patient}")
    return make_dataset(images, caption=captions, patient=names)


def trimmed(image: Image.Image, left: float, top: float, right: float, bottom: float):
    """Cut shares of the picture off its sides."""
    width, height = image.size
    edges = (width * left, height * top, width * (1 - right), height * (1 - bottom))
    return image.crop([round(edge) for edge in edges])


def framed(image: Image.Image) -> Image.Image:
    """Draw a green frame onto the picture."""
    image = image.convert("RGB")
    width, height = image.size
    frame = (width * 0.3, height * 0.3, width * 0.55, height * 0.5)
    line = max(1, width // 150)
    ImageDraw.Draw(image).rectangle(frame, outline=(0, 255, 0), width=line)
    return image


CHANGES = {
    "as PNG": lambda image: encode(image, "PNG"),
    "JPEG quality 30": lambda image: encode(image, quality=30),
    "half the size": lambda image: image.resize((image.width // 2, image.height // 2)),
    "twice the size": lambda image: image.resize((image.width * 2, image.height * 2)),
    "made square": lambda image: image.resize((256, 256)),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.2),
    "less contrast": lambda image: ImageEnhance.Contrast(image).enhance(0.8),
    "trimmed by 1%": lambda image: trimmed(image, 0.01, 0.01, 0.01, 0.01),
    "trimmed by 3%": lambda image: trimmed(image, 0.03, 0.03, 0.03, 0.03),
    "trimmed by 5%": lambda image: trimmed(image, 0.05, 0.05, 0.05, 0.05),
    "left side cut off": lambda image: trimmed(image, 0.03, 0, 0, 0),
    "bottom cut off": lambda image: trimmed(image, 0, 0, 0, 0.04),
    "corner cut off": lambda image: trimmed(image, 0.02, 0.02, 0, 0),
    "green frame drawn": framed,
}
