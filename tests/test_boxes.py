"""Drawn boxes come back: any place, size, thickness and JPEG quality; and none that nobody drew."""

import io
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medtune import boxes


def picture(seed: int, wide: int, high: int) -> Image.Image:
    """A grey picture with smooth parts, edges and noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:high, :wide]
    waves = np.sin(x / rng.uniform(15, 60)) * np.cos(y / rng.uniform(15, 60))
    grey = 90 + 60 * waves + rng.normal(0, 8, (high, wide))
    from_centre = np.hypot(x - wide / 2, y - high / 2)
    grey[from_centre > 0.48 * min(wide, high)] = 5
    return Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8)).convert("RGB")


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return Image.open(io.BytesIO(buffer.getvalue()))


@st.composite
def drawings(draw):
    """Choose the size of a picture, a box in it, and the width of its line."""
    wide = draw(st.integers(64, 300))
    high = draw(st.integers(64, 300))
    w = draw(st.integers(24, wide))
    h = draw(st.integers(24, high))
    x = draw(st.integers(0, wide - w))
    y = draw(st.integers(0, high - h))
    line = draw(st.integers(2, min(6, w // 4, h // 4)))
    box = (x / wide, y / high, (x + w) / wide, (y + h) / high)
    return (wide, high), box, line


@settings(max_examples=40, deadline=None)
@given(drawings(), st.integers(0, 9), st.sampled_from([60, 75, 90, 100]))
def test_every_edge_within_a_pixel(drawing, seed, quality):
    (wide, high), box, line = drawing
    image = boxes.draw_box(picture(seed, wide, high), box, width=line)
    found = boxes.find_box(as_jpeg(image, quality))
    assert found is not None
    pixels_off = (np.array(found) - box) * (wide, high, wide, high)
    assert np.abs(pixels_off).max() <= 1.01


@pytest.mark.slow
def test_mean_iou_of_larger_boxes():
    rng = np.random.default_rng(0)
    scores = []
    for seed in range(60):
        w, h = rng.integers(64, 300, 2)
        x = rng.integers(0, 512 - w)
        y = rng.integers(0, 512 - h)
        drawn = (x / 512, y / 512, (x + w) / 512, (y + h) / 512)
        image = boxes.draw_box(picture(seed, 512, 512), drawn, width=int(rng.integers(1, 7)))
        found = boxes.find_box(as_jpeg(image, int(rng.integers(60, 101))))
        scores.append(boxes.iou(found, drawn) if found else 0)
    assert np.mean(scores) >= 0.98


def test_no_box_where_none_was_drawn():
    for seed in range(40):
        image = picture(seed, 256, 200)
        if seed % 2:  # green elsewhere: a filled patch, as in colour Doppler
            pixels = np.array(image)
            pixels[40:90, 60 : 60 + 2 * seed] = (20, 180 + seed, 30)
            image = Image.fromarray(pixels)
        assert boxes.find_boxes(as_jpeg(image, 85)) == []


def test_several_boxes_come_largest_first():
    image = boxes.draw_box(picture(1, 300, 300), (0.1, 0.1, 0.3, 0.3))
    found = boxes.find_boxes(boxes.draw_box(image, (0.4, 0.4, 0.9, 0.8)))
    assert np.allclose(found, [(0.4, 0.4, 0.9, 0.8), (0.1, 0.1, 0.3, 0.3)], atol=1 / 300)


@pytest.mark.parametrize("line", [2, 3, 5])
def test_the_width_of_a_line_is_told(line):
    image = boxes.draw_box(picture(2, 300, 200), (0.2, 0.25, 0.7, 0.8), width=line)
    (outline,) = boxes.find_outlines(as_jpeg(image, 85))
    assert abs(outline.width - line) <= 1
    assert outline.box == boxes.find_box(as_jpeg(image, 85))


SHARES = st.tuples(*[st.floats(0, 1)] * 4)


def in_order(box):
    x0, y0, x1, y1 = box
    return min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)


@given(SHARES, SHARES)
def test_iou_is_a_symmetric_share(a, b):
    a = in_order(a)
    b = in_order(b)
    assert 0 <= boxes.iou(a, b) <= 1 and boxes.iou(a, b) == pytest.approx(boxes.iou(b, a))
    if boxes.area_share(a) > 1e-6:
        assert boxes.iou(a, a) == pytest.approx(1)


def test_places_are_the_nine_of_the_grid():
    centers = [(x + 0.5) / 3 for x in range(3)]
    places = [boxes.place_of((x, y, x, y)) for y in centers for x in centers]
    assert (places[0], places[4], places[8]) == ("upper left", "center", "lower right")
    assert len(set(places)) == 9


def test_an_erased_box_is_not_found_but_leaves_a_trace():
    box = (0.2, 0.3, 0.7, 0.8)
    plain = picture(3, 256, 256)
    drawn = boxes.draw_box(plain, box)
    erased = boxes.erase_box(drawn, box)
    assert boxes.find_box(drawn) is not None and boxes.find_box(erased) is None
    # inpainting cannot bring back what was there
    assert np.asarray(erased).tobytes() != np.asarray(plain).tobytes()


def published_finder():
    """Take the finder that the notebook shows for comparison."""
    notebook = Path(__file__).parents[1] / "notebooks" / "02_convert_data.ipynb"
    names = {"cv2": cv2, "np": np}
    for cell in json.loads(notebook.read_text("utf-8"))["cells"]:
        code = "".join(cell["source"])
        if "def find_box_hsv_opening" in code:
            exec(code, names)
            return names["find_box_hsv_opening"]
    raise LookupError(f"{notebook.name} has no such finder")


def test_the_published_finder_is_worse():
    box = (76 / 512, 61 / 512, 152 / 512, 122 / 512)
    image = as_jpeg(boxes.draw_box(picture(4, 512, 512), box, width=3), 85)
    theirs = published_finder()(image)[0]
    assert boxes.iou(boxes.find_box(image), box) > 0.97 > (boxes.iou(theirs, box) if theirs else 0)


def test_a_small_probe_tells_erased_from_never_drawn(record_property):
    """The AUROC of a linear probe on pixel differences along the edge shows that the line leaks."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    features = []
    labels = []
    for seed in range(120):
        x, y = np.random.default_rng(seed).integers(20, 120, 2)
        box = (x / 256, y / 256, (x + 90) / 256, (y + 80) / 256)
        image = picture(seed, 256, 256)
        erased = seed % 2
        if erased:
            image = boxes.erase_box(boxes.draw_box(image, box), box)
        band = np.asarray(image).astype(float)[y - 2 : y + 6, x + 10 : x + 80, 0]
        down = np.abs(np.diff(band, axis=0)).mean(1)
        along = np.abs(np.diff(band, axis=1)).mean(1)
        features.append([*down, *along])
        labels.append(erased)
    probe = LogisticRegression(max_iter=2000).fit(features[:80], labels[:80])
    auroc = roc_auc_score(labels[80:], probe.decision_function(features[80:]))
    record_property("auroc", auroc)
    print(f"erased against never drawn: AUROC {auroc:.3f}")
    assert auroc > 0.9


def band_features(image, box):
    """What a probe sees along the upper edge of a box: grey, and how green it is."""
    pixels = np.asarray(image.convert("RGB")).astype(float)
    top = int(box[1] * image.height)
    left = int(box[0] * image.width) + 4
    right = int(box[2] * image.width) - 4
    band = pixels[top - 4 : top + 10, left:right]
    green = band[..., 1] - band[..., 0]
    return [*boxes.edge_differences(image, box), *green.mean(1), *green.std(1)]


@pytest.mark.parametrize("quality", [None, 85])
def test_beside_decoys_a_probe_cannot_tell_which_line_was_there(record_property, quality):
    """Without decoys it always can; the pictures are PNG, and JPEG as most published ones are."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features = {0: [], 1: []}
    for seed in range(100):
        rng = np.random.default_rng(seed)
        places = []
        for row in rng.permutation([20, 140]):
            x = rng.integers(10, 140)
            y = row + rng.integers(0, 20)
            places.append((x / 256, y / 256, (x + 90) / 256, (y + 80) / 256))
        true, decoy = places
        image = boxes.draw_box(picture(seed, 256, 256), true)
        if quality:
            image = as_jpeg(image, quality)
        for count, shown in features.items():
            erased = boxes.erase_box(image, true, decoys=[decoy][:count])
            assert boxes.find_box(erased) is None
            shown.append(band_features(erased, true))
            shown.append(band_features(erased, decoy))
    labels = [1, 0] * 100
    aurocs = {}
    for count, shown in features.items():
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
        probe.fit(shown[:100], labels[:100])
        aurocs[count] = roc_auc_score(labels[100:], probe.decision_function(shown[100:]))
    record_property("aurocs", aurocs)
    print(f"true line against another place: {aurocs[0]:.3f}, against a decoy: {aurocs[1]:.3f}")
    assert aurocs[0] > 0.9
    # a decoy in a JPEG was compressed once, the line twice: a little of that can be seen
    assert 0.3 < aurocs[1] < 0.8


def test_a_decoy_must_fit_its_line():
    image = boxes.draw_box(picture(5, 128, 128), (0.2, 0.2, 0.8, 0.8))
    with pytest.raises(ValueError, match="does not fit a box"):
        boxes.erase_box(image, (0.2, 0.2, 0.8, 0.8), decoys=[(0.5, 0.5, 0.52, 0.52)])
