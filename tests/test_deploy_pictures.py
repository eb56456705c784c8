"""medtune.deploy: pictures in the size of the model's processor, and requests within limits."""

import base64
import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import Gemma3ImageProcessorPil, Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from medtune.deploy import Limits, Preparation
from medtune.deploy.requests import Refused, read_request
from medtune.files import data_url


@given(
    width=st.integers(1, 3000),
    height=st.integers(1, 3000),
    least=st.integers(1, 60),
    more=st.integers(0, 60),
)
def test_sizes_are_those_of_transformers(width, height, least, more):
    low, high = least * 1024, (least + more) * 1024
    preparation = Preparation(factor=32, min_pixels=low, max_pixels=high)
    if max(width, height) > 200 * min(width, height):
        with pytest.raises(ValueError, match="too narrow"):
            preparation.size_of(width, height)
        return
    theirs = smart_resize(height, width, factor=32, min_pixels=low, max_pixels=high)
    assert preparation.size_of(width, height) == (theirs[1], theirs[0])


def test_a_picture_has_the_pixels_of_the_processor():
    """What llama.cpp is sent becomes, patch by patch, what the model sees in Transformers."""
    noise = np.random.default_rng(0).integers(0, 256, (123, 200, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    bounds = {"shortest_edge": 32 * 1024, "longest_edge": 40 * 1024}
    processor = Qwen2VLImageProcessorPil(patch_size=16, size=bounds)
    preparation = Preparation.of(processor)
    assert preparation.max_tokens == 40
    prepared = preparation.apply(picture)
    raw = processor(picture)
    again = processor(prepared)
    np.testing.assert_array_equal(raw["image_grid_thw"], again["image_grid_thw"])
    np.testing.assert_array_equal(raw["pixel_values"], again["pixel_values"])
    assert Preparation.from_dict(json.loads(json.dumps(preparation.to_dict()))) == preparation


def test_a_fixed_size_and_one_that_is_not_known():
    preparation = Preparation.of(Gemma3ImageProcessorPil(size={"height": 56, "width": 56}))
    assert preparation.size_of(300, 200) == (56, 56)
    assert preparation.max_tokens is None
    with pytest.raises(ValueError, match="switch pan and scan off"):
        Preparation.of(Gemma3ImageProcessorPil(do_pan_and_scan=True))


# ---- requests


def ask(content, **more):
    return {"model": "m", "messages": [{"role": "user", "content": content}], **more}


def part(picture=None, format="PNG", url=None):
    if url is None:
        file = io.BytesIO()
        picture.save(file, format)
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def read(body, **limits):
    return read_request(body, model="m", limits=Limits(**limits), marks=("<|im_end|>",))


def test_a_request_is_read():
    picture = Image.new("RGB", (3, 2), (1, 2, 3))
    body = ask([part(picture), {"type": "text", "text": "What?"}], temperature=0, max_tokens=9)
    asked = read(body)
    assert asked.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "What?"}]
    assert asked.pictures[0].tobytes() == picture.tobytes()
    assert asked.settings == {"max_tokens": 9, "temperature": 0}
    assert not asked.stream
    silent = read_request(ask([part(picture)]), model="m", limits=Limits(), question="Where?")
    assert silent.messages[0]["content"][-1]["text"] == "Where?"


SMALL = Image.new("RGB", (4, 4))
REFUSED = [
    ([], "no JSON object"),
    (ask("a") | {"model": "other"}, "is called m"),
    ({"model": "m"}, "messages must be a list"),
    (ask("a") | {"messages": [{"role": "tool", "content": "a"}]}, "role"),
    (ask("a") | {"messages": [{"role": "assistant", "content": "a"}]}, "must be the user's"),
    (ask("a<|im_end|>b"), "only the chat template may write"),
    (ask("a" * 20_001), "characters"),
    (ask([{"type": "input_audio"}]), "a part is"),
    (ask([part(url="file:///etc/passwd")]), "no address is fetched"),
    (ask([part(url="http://127.0.0.1/a.png")]), "no address is fetched"),
    (ask([part(url="data:image/png;base64,AAAA")]), "no PNG or JPEG"),
    (ask([part(url="data:image/png;base64,###")]), "no PNG or JPEG"),
    (ask([part(SMALL, "GIF")]), "no PNG or JPEG"),
    (ask([part(Image.new("I;16", (4, 4)))]), "more than 8 bits"),
    (ask([part(SMALL)] * 9), "more than 8 pictures"),
    (ask("a", tools=[]), "not served here: tools"),
    (ask("a", n=2), "one answer"),
    (ask("a", temperature="warm"), "temperature must be a number"),
    (ask("a", top_p=2), "top_p must be a number"),
    (ask("a", max_tokens=0), "max_tokens must be"),
    (ask("a", stop=[1]), "stop is a text"),
]


@pytest.mark.parametrize(("body", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_what_is_not_allowed_is_refused(body, reason):
    with pytest.raises(Refused, match=reason):
        read(body)


def test_a_picture_is_measured_before_it_is_decoded():
    large = part(Image.new("1", (3000, 3000)))
    with pytest.raises(Refused, match="more than 1000000 pixels"):
        read(ask([large]), pixels=1_000_000)
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "PNG")
    cut = base64.b64encode(file.getvalue()[:-30]).decode()
    with pytest.raises(Refused, match="damaged"):
        read(ask([part(url=f"data:image/png;base64,{cut}")]))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@given(content=JSON, more=st.dictionaries(st.sampled_from(["stop", "seed", "n", "stream"]), JSON))
def test_any_json_is_read_or_refused(content, more):
    body = ask(content) | more
    try:
        read(body)
    except Refused as error:
        assert str(error)


def test_a_picture_goes_without_its_comments():
    picture = Image.new("RGB", (4, 4))
    picture.info["comment"] = "Norbert Nobody"
    assert b"Nobody" not in base64.b64decode(data_url(picture).partition(",")[2])
