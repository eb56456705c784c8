"""The second stage of the base's pretraining: what it draws is what it says."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medtune import models

REPO = Path(__file__).parents[1]
SCRIPT = REPO / "data" / "tiny-vlm" / "pretrain_people.py"
sys.path.insert(0, str(SCRIPT.parent))
import pretrain_people as stage  # noqa: E402


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_a_point_comes_to_lie_where_the_renderer_shows_it(seed):
    """The captions go from the CT to the picture, the renderer from the picture to the CT."""
    rng = np.random.default_rng(seed)
    body = stage.draw_body(rng)
    points = rng.uniform(60, 450, (12, 2))
    there = stage.to_person(body, points)
    back = stage.MIDDLE + (there - stage.MIDDLE) / body.scale + stage.displacement(body, there)
    inside = ((there > 0) & (there < 511)).all(1)
    # the table of cv2.remap has steps of a 32nd of a cell; steep places converge slowly
    assert np.median(np.abs(back - points)[inside]) < 0.5
    assert np.abs(back - points)[inside].max(initial=0) < 6


def blank(z=0, **changes):
    """A picture of the scanned person without a turn: 40 HU everywhere in a window from 0 to 200."""
    flat = np.zeros((stage.FIELD, stage.FIELD, 2), np.float32)
    body = stage.Body(flat, np.ones(2, np.float32), np.zeros(256, np.float32))
    plain = {
        "z": z,
        "body": body,
        "turn": np.eye(3)[:2],
        "window": (100.0, 200.0),
        "box": np.array([128.0, 128.0, 384.0, 384.0]),
        "line": 0.0,
        "spot": stage.NO_SPOT,
        "vessel": stage.NO_VESSEL,
    }
    return stage.Picture(**plain | changes)


def shown(*pictures):
    batch = {
        "z": torch.tensor([p.z for p in pictures]),
        "field": torch.from_numpy(np.stack([p.body.field for p in pictures])),
        "scale": torch.from_numpy(np.stack([p.body.scale for p in pictures])),
        "contrast": torch.from_numpy(np.stack([p.body.contrast for p in pictures])),
        "turn": torch.from_numpy(np.stack([p.turn for p in pictures])).float(),
        "window": torch.tensor([p.window for p in pictures], dtype=torch.float32),
        "box": torch.from_numpy(np.stack([p.box for p in pictures])).float(),
        "line": torch.tensor([p.line for p in pictures], dtype=torch.float32),
        "spot": torch.from_numpy(np.stack([p.spot for p in pictures])),
        "vessel": torch.from_numpy(np.stack([p.vessel for p in pictures])),
        "view": torch.tensor([p.view for p in pictures], dtype=torch.float32),
        "noise": torch.tensor([p.noise for p in pictures], dtype=torch.float32),
    }
    volume = torch.full((1, 512, 512), 40.0)
    return stage.render(volume, torch.zeros((1, 512, 512), dtype=torch.uint8), batch)


def test_a_frame_stands_where_its_box_is_also_when_it_is_magnified():
    picture = blank(line=16.0)
    whole, close = shown(picture, stage.magnified(picture))[0]
    green = whole[1] - whole[0] > 0.5
    rows, columns = np.nonzero(green.numpy())
    # 128 of 512 is 48 of 192
    assert (rows.min(), columns.min(), rows.max() + 1, columns.max() + 1) == (48, 48, 144, 144)
    rows, columns = np.nonzero((close[1] - close[0] > 0.5).numpy())
    # the frame of 256 fills 1 of 1.1 of the part that is shown
    edge = 192 * (1 - 1 / (2 * stage.MAGNIFIED)) / 2
    assert rows.min() == pytest.approx(edge, abs=1.1)
    assert rows.max() + 1 == pytest.approx(192 - edge, abs=1.1)


def test_a_spot_has_its_size_and_its_tokens_know_where_it_is():
    spot = np.array([320, 192, 40, 40, 0, 180], np.float32)
    pictures, tokens = shown(blank(spot=spot), blank())
    bright = pictures[0, 0] > 0.55
    assert float(bright.sum()) == pytest.approx(np.pi * (40 * 192 / 512) ** 2, rel=0.05)
    rows, columns = np.nonzero(bright.numpy())
    assert columns.mean() == pytest.approx(320 * 192 / 512 - 0.5, abs=0.5)
    assert rows.mean() == pytest.approx(192 * 192 / 512 - 0.5, abs=0.5)
    # 6 x 6 tokens: the spot's middle lies in the fourth column of the third row
    assert int(tokens[0].argmax()) in (2 * 6 + 3, 1 * 6 + 3)
    assert tokens[1].max() == 0 and pictures[1].std() < 0.02


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_steps_on_a_cpu(tmp_path):
    """Both stages run: their shortcut is the model (a script stops otherwise), and what the second
    saves takes two pictures.
    """
    options = ["--steps", "2", "--batch-size", "20", "--workers", "0", "--device", "cpu"]
    first = tmp_path / "first"
    stages = {
        first: [SCRIPT.with_name("pretrain.py")],
        tmp_path: [SCRIPT, "--base", first],
    }
    for out, script in stages.items():
        command = [sys.executable, *map(str, script), "--out", str(out), *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-2000:]
    facts = json.loads((tmp_path / "pretrain_log.json").read_text())
    assert facts["steps"] == 2 and facts["parameters"] <= 8_000_000
    assert (tmp_path / "model.safetensors").stat().st_size <= 16_000_000
    processor, model = models.load_processor(tmp_path), models.load_base(tmp_path)
    assert model.config.vision_config.temporal_patch_size == 2
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What changed?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    pictures = [Image.new("RGB", (512, 512), shade) for shade in ("grey", "white")]
    inputs = processor(images=pictures, text=text, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    assert torch.isfinite(logits).all()
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 72
