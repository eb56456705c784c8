"""Judging single pairs, and making any picture RGB."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pair_sources import encoded, jpeg
from PIL import Image

from medtune.pairs import picture_bytes, reject_reason, to_rgb

# --- pictures of every kind -----------------------------------------------------------------------


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def animation() -> Image.Image:
    frames = [Image.new("L", (8, 8), value) for value in (10, 200)]
    return opened(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))


def turned() -> Image.Image:
    image = Image.new("L", (8, 4))
    image.putpixel((0, 0), 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees to the right
    return opened(encoded(image, "PNG", exif=exif))


def sixteen_bit() -> Image.Image:
    values = np.array([[100, 2148], [4196, 100]], np.uint16)
    return opened(encoded(Image.fromarray(values), "PNG"))


def see_through_palette() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putdata([0, 1])
    return opened(encoded(image, "PNG", transparency=0))


def floats() -> Image.Image:
    return Image.fromarray(np.array([[np.nan, 0.5, 1.0]], np.float32))


@pytest.mark.parametrize(
    ("image", "pixels"),
    [
        (Image.new("RGB", (1, 1), (1, 2, 3)), [(1, 2, 3)]),
        (Image.new("L", (1, 1), 7), [(7, 7, 7)]),
        (Image.new("1", (1, 1), 1), [(255, 255, 255)]),
        # transparent: the black background
        (Image.new("RGBA", (1, 1), (200, 100, 50, 0)), [(0, 0, 0)]),
        (Image.new("LA", (1, 1), (200, 255)), [(200, 200, 200)]),
        (see_through_palette(), [(0, 0, 0), (0, 255, 0)]),
        (Image.new("CMYK", (1, 1), (0, 255, 255, 0)), [(255, 0, 0)]),
        (sixteen_bit(), [(0, 0, 0), (128, 128, 128), (255, 255, 255), (0, 0, 0)]),
        (floats(), [(0, 0, 0), (128, 128, 128), (255, 255, 255)]),
        # flat: nothing to stretch
        (Image.new("I;16", (1, 1), 3000), [(0, 0, 0)]),
        # the first frame
        (animation(), [(10, 10, 10)] * 64),
    ],
)
def test_to_rgb(image, pixels):
    rgb = to_rgb(image)
    assert rgb.mode == "RGB"
    assert rgb.width * rgb.height == len(pixels)
    for number, pixel in enumerate(pixels):
        row, column = divmod(number, rgb.width)
        assert rgb.getpixel((column, row)) == pixel


def test_to_rgb_turns_by_exif_once():
    rgb = to_rgb(turned())
    assert rgb.size == (4, 8)
    assert rgb.getpixel((3, 0)) == (255, 255, 255)
    assert to_rgb(rgb).size == (4, 8)


def test_to_rgb_winds_an_animation_back():
    seen = animation()
    seen.seek(1)
    assert to_rgb(seen).getpixel((0, 0)) == (10, 10, 10)


# --- what must not be trained on ------------------------------------------------------------------


def pair(**changed) -> dict:
    good = {"id": "a-1", "caption": "A liver.", "image": {"bytes": jpeg(), "path": None}}
    return good | changed


def cut_png() -> bytes:
    return encoded(Image.effect_noise((99, 99), 9), "PNG")[:-300]


def empty_png(width: int, height: int) -> bytes:
    """A file of a few kilobytes that unpacks into a large picture."""
    return encoded(Image.new("1", (width, height)), "PNG")


BAD = {
    "id missing": (pair(id=None), "id: is empty"),
    "id of spaces": (pair(id="  "), "id: is empty"),
    "id climbs": (pair(id="../../etc/passwd"), "id: '../../etc/passwd' would leave a folder"),
    "id with a slash": (pair(id="a/b"), "id: 'a/b' would leave a folder"),
    "id with a backslash": (pair(id="a\\b"), "id: .* would leave a folder"),
    "id hidden": (pair(id=".a"), "id: '.a' would leave a folder"),
    "id of 300 characters": (pair(id="x" * 300), "id: has 300 characters"),
    "id with NUL": (pair(id="a\0b"), "id: 'a.*b' holds a control character"),
    "id with a surrogate": (pair(id="a\ud800"), "id: .* not valid Unicode"),
    "caption missing": (pair(caption=None), "caption: is empty"),
    "caption empty": (pair(caption=" \n"), "caption: is empty"),
    "caption of a program": (pair(caption=" NaN"), "caption: is empty"),
    "caption with a surrogate": (
        pair(caption="lone \udfff"),
        "caption: holds characters that are not valid",
    ),
    "caption of 50,000 words": (
        pair(caption="liver " * 50_000),
        "caption: has 50000 words, more than 2000",
    ),
    "caption of 50,000 signs": (pair(caption="肝" * 50_000), "caption: has 50000 words"),
    "no picture": (pair(image=None), "image: .*there is no picture"),
    "no bytes": (pair(image={"bytes": b"", "path": None}), "image: has zero bytes"),
    "no file": (
        pair(image={"bytes": None, "path": "/nowhere/a.jpg"}),
        "image: .*No such file",
    ),
    "not a picture": (pair(image=b"GIF89a, or so it says"), "image: cannot be decoded"),
    "cut JPEG": (
        pair(image=jpeg(size=(200, 200))[:-300]),
        "image: cannot be decoded .*truncated",
    ),
    "cut PNG": (pair(image=cut_png()), "image: cannot be decoded"),
    "bomb": (pair(image=empty_png(30_000, 5_000)), "image: 30000 x 5000 pixels, more than"),
    "greater bomb": (pair(image=empty_png(30_000, 12_000)), "image: .*decompression bomb"),
    "loader's word": (pair(problem="t.jsonl:3: not JSON"), "t.jsonl:3: not JSON"),
}


def test_none_is_a_word():
    """To "Which lobe is affected?" it is an answer."""
    assert reject_reason(pair(caption="None")) is None


@pytest.mark.parametrize("case", BAD)
@pytest.mark.filterwarnings("error")
def test_reject_reason(case):
    row, pattern = BAD[case]
    reason = reject_reason(row)
    assert re.match(pattern, reason)
    assert "\n" not in reason
    # a memory address would make the list of the rejected differ from run to run
    assert " at 0x" not in reason


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (Image.new("CMYK", (9, 9)), "JPEG"),
        (Image.new("I;16", (9, 9), 900), "PNG"),
        (Image.new("RGBA", (9, 9)), "PNG"),
        (Image.new("P", (9, 9)), "GIF"),
        (animation(), "GIF"),
        (turned(), "PNG"),
    ],
)
def test_an_unusual_picture_is_not_rejected(image, kind):
    assert reject_reason(pair(image=encoded(image, kind))) is None


def test_what_is_unusual_but_good_is_not_rejected():
    assert reject_reason(pair(image=Image.new("L", (4, 4)))) is None
    hexadecimal = "8031efe0-1b5c-11ef-8929-000066532cad"
    assert reject_reason(pair(id=hexadecimal, caption="肝脏。")) is None


def test_limits_are_the_callers():
    reason = reject_reason(pair(caption="a b c"), max_words=2)
    assert reason == "caption: has 3 words, more than 2"
    assert "24 x 16" in reject_reason(pair(), max_pixels=100)


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(["JPEG", "PNG"]), share=st.floats(0, 0.97), size=st.integers(16, 90))
def test_a_picture_cut_anywhere_is_rejected(kind, share, size):
    whole = encoded(Image.effect_noise((size, size), 60).convert("RGB"), kind)
    assert reject_reason(pair(image=whole)) is None
    cut = whole[: int(len(whole) * share)]
    assert reject_reason(pair(image=cut)).startswith("image: ")


@given(st.binary(max_size=200), st.text(max_size=30), st.text(max_size=30))
def test_reject_reason_never_raises(image, name, caption):
    reason = reject_reason({"image": image, "id": name, "caption": caption})
    assert isinstance(reason, str | None)


# --- the bytes of the source ----------------------------------------------------------------------


def test_picture_bytes(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"abc")
    path = str(tmp_path / "a.jpg")
    cells = [
        b"abc",
        {"bytes": b"abc", "path": "elsewhere"},
        {"bytes": None, "path": path},
        path,
        Path(path),
    ]
    for cell in cells:
        assert picture_bytes(cell) == b"abc"
    assert picture_bytes({"bytes": b"", "path": None}) == b""
    with pytest.raises(ValueError, match="no picture"):
        picture_bytes({"bytes": None, "path": None})
