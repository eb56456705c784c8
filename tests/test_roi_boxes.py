"""Drawn boxes come back: any place, size, thickness and JPEG quality, and none where none was drawn."""

import io
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medtune import roi


def picture(seed: int, wide: int, high: int) -> Image.Image:
    """A grey picture with smooth parts, edges and noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:high, :wide]
    grey = 90 + 60 * np.sin(x / rng.uniform(15, 60)) * np.cos(y / rng.uniform(15, 60)) + rng.normal(0, 8, (high, wide))
    grey[np.hypot(x - wide / 2, y - high / 2) > 0.48 * min(wide, high)] = 5
    return Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8)).convert("RGB")


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return Image.open(io.BytesIO(buffer.getvalue()))


@st.composite
def boxes(draw):
    wide, high = draw(st.integers(64, 300)), draw(st.integers(64, 300))
    w, h = draw(st.integers(24, wide)), draw(st.integers(24, high))
    x, y = draw(st.integers(0, wide - w)), draw(st.integers(0, high - h))
    line = draw(st.integers(2, min(6, w // 4, h // 4)))
    return (wide, high), (x / wide, y / high, (x + w) / wide, (y + h) / high), line


@settings(max_examples=40, deadline=None)
@given(boxes(), st.integers(0, 9), st.sampled_from([60, 75, 90, 100]))
def test_every_edge_within_a_pixel(box, seed, quality):
    (wide, high), drawn, line = box
    found = roi.find_box(as_jpeg(roi.draw_box(picture(seed, wide, high), drawn, width=line), quality))
    assert found is not None
    assert np.abs((np.array(found) - drawn) * (wide, high, wide, high)).max() <= 1.01


@pytest.mark.slow
def test_mean_iou_of_larger_boxes():
    rng, scores = np.random.default_rng(0), []
    for seed in range(60):
        w, h = rng.integers(64, 300, 2)
        x, y = rng.integers(0, 512 - w), rng.integers(0, 512 - h)
        drawn = (x / 512, y / 512, (x + w) / 512, (y + h) / 512)
        image = roi.draw_box(picture(seed, 512, 512), drawn, width=int(rng.integers(1, 7)))
        found = roi.find_box(as_jpeg(image, int(rng.integers(60, 101))))
        scores.append(roi.iou(found, drawn) if found else 0)
    assert np.mean(scores) >= 0.98


def test_no_box_where_none_was_drawn():
    for seed in range(40):
        image = picture(seed, 256, 200)
        if seed % 2:  # green elsewhere: a filled patch, as in colour Doppler
            pixels = np.array(image)
            pixels[40:90, 60 : 60 + 2 * seed] = (20, 180 + seed, 30)
            image = Image.fromarray(pixels)
        assert roi.find_boxes(as_jpeg(image, 85)) == []


def test_several_boxes_come_largest_first():
    image = roi.draw_box(picture(1, 300, 300), (0.1, 0.1, 0.3, 0.3))
    found = roi.find_boxes(roi.draw_box(image, (0.4, 0.4, 0.9, 0.8)))
    assert np.allclose(found, [(0.4, 0.4, 0.9, 0.8), (0.1, 0.1, 0.3, 0.3)], atol=1 / 300)


@given(st.tuples(*[st.floats(0, 1)] * 4), st.tuples(*[st.floats(0, 1)] * 4))
def test_iou_is_a_symmetric_share(a, b):
    a, b = ((min(v[0], v[2]), min(v[1], v[3]), max(v[0], v[2]), max(v[1], v[3])) for v in (a, b))
    assert 0 <= roi.iou(a, b) <= 1 and roi.iou(a, b) == pytest.approx(roi.iou(b, a))
    if roi.area_share(a) > 1e-6:
        assert roi.iou(a, a) == pytest.approx(1)


def test_places_are_the_nine_of_the_grid():
    centers = [(x + 0.5) / 3 for x in range(3)]
    places = [roi.place_of((x, y, x, y)) for y in centers for x in centers]
    assert places[0] == "upper left" and places[4] == "center" and places[8] == "lower right" and len(set(places)) == 9


def test_an_erased_box_is_not_found_but_leaves_a_trace():
    box, plain = (0.2, 0.3, 0.7, 0.8), picture(3, 256, 256)
    drawn = roi.draw_box(plain, box)
    erased = roi.erase_box(drawn, box)
    assert roi.find_box(drawn) is not None and roi.find_box(erased) is None
    assert np.asarray(erased).tobytes() != np.asarray(plain).tobytes(), "inpainting cannot bring back what was there"


def test_the_published_finder_is_worse():
    box = (76 / 512, 61 / 512, 152 / 512, 122 / 512)
    image = as_jpeg(roi.draw_box(picture(4, 512, 512), box, width=3), 85)
    notebook = Path(__file__).parents[1] / "notebooks" / "02_convert_data.ipynb"
    cells, names = json.loads(notebook.read_text("utf-8"))["cells"], {"cv2": cv2, "np": np}
    exec(next(code for cell in cells if "def find_box_hsv_opening" in (code := "".join(cell["source"]))), names)
    theirs = names["find_box_hsv_opening"](image)[0]
    assert roi.iou(roi.find_box(image), box) > 0.97 > (roi.iou(theirs, box) if theirs else 0)


def test_a_small_probe_tells_erased_from_never_drawn(record_property):
    """The AUROC of a linear probe on pixel differences along the edge; far above chance, so an erased line leaks."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    features, labels = [], []
    for seed in range(120):
        x, y = np.random.default_rng(seed).integers(20, 120, 2)
        box, plain = (x / 256, y / 256, (x + 90) / 256, (y + 80) / 256), picture(seed, 256, 256)
        image = roi.erase_box(roi.draw_box(plain, box), box) if seed % 2 else plain
        band = np.asarray(image).astype(float)[y - 2 : y + 6, x + 10 : x + 80, 0]
        features.append([*np.abs(np.diff(band, axis=0)).mean(1), *np.abs(np.diff(band, axis=1)).mean(1)])
        labels.append(seed % 2)
    probe = LogisticRegression(max_iter=2000).fit(features[:80], labels[:80])
    auroc = roc_auc_score(labels[80:], probe.decision_function(features[80:]))
    record_property("auroc", auroc)
    print(f"erased against never drawn: AUROC {auroc:.3f}")
    assert auroc > 0.9
