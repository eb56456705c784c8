"""medtune.answers.slab_controls: what is changed is changed, all else stays, and it can be asked."""

import copy
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from medtune.answers import (
    generate_answers,
    picture_alone,
    prompt_of,
    record_alone,
    repeat_slice,
    shuffle_slices,
    swap_earlier,
    swap_pictures,
    swap_record,
)
from medtune.models import load_base, load_processor

CONTROLS = {
    "shuffle": shuffle_slices,
    "repeat": repeat_slice,
    "earlier": swap_earlier,
    "pictures": swap_pictures,
    "record": swap_record,
    "record alone": record_alone,
    "picture alone": picture_alone,
}


def make_records(count: int = 6, pictures: int = 2) -> list[dict]:
    """Questions about pictures that are all different, of three people."""
    rng = np.random.default_rng(0)
    records = []
    for number in range(count):
        record = f"Record: {40 + number} years."
        content = [{"type": "image", "text": None} for _ in range(pictures)]
        content.append({"type": "text", "text": f"{record}\nWhat is it?"})
        images = [
            Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8))
            for _ in range(pictures)
        ]
        reference = [{"type": "text", "text": f"answer {number}"}]
        records.append(
            {
                "id": f"r{number}",
                "prompt": [{"role": "user", "content": content}],
                "completion": [{"role": "assistant", "content": reference}],
                "images": images,
                "record": record,
                "person": f"p{number % 3}",
                "task": "record",
                "language": "zh" if number % 2 else "en",
            }
        )
    return records


def asked(row: dict) -> str:
    return "".join(part.get("text") or "" for part in row["prompt"][-1]["content"])


@pytest.mark.parametrize("name", CONTROLS)
def test_ids_and_references_stay_and_the_source_is_not_touched(name):
    records = make_records(12, 4)
    before = copy.deepcopy(records)
    changed = CONTROLS[name](records)
    assert [row["id"] for row in changed] == [row["id"] for row in records]
    assert [prompt_of(row).reference for row in changed] == [
        prompt_of(row).reference for row in records
    ]
    assert records == before
    assert all(
        row["images"] != old["images"] or asked(row) != asked(old)
        for row, old in zip(changed, records, strict=True)
    )
    # the same seed changes them alike
    assert changed == CONTROLS[name](records)


@given(st.integers(2, 6), st.integers(0, 50))
def test_shuffled_slices_are_the_same_slices_at_other_places(pictures, seed):
    records = [{"id": "a", "prompt": [], "images": list(range(pictures))}]
    [row] = shuffle_slices(records, seed)
    assert Counter(row["images"]) == Counter(range(pictures))
    assert all(place != number for place, number in enumerate(row["images"]))
    [row] = repeat_slice(records, seed)
    assert len(row["images"]) == pictures and len(set(row["images"])) == 1


def test_others_lend_pictures_and_records_of_the_same_kind_only():
    records = make_records(12)
    owner = {id(image): row for row in records for image in row["images"]}
    for row, old in zip(swap_earlier(records), records, strict=True):
        lender = owner[id(row["images"][0])]
        assert lender["person"] != old["person"] and lender["language"] == old["language"]
        assert row["images"][1] is old["images"][1] and row["images"][0] is lender["images"][0]
    for row, old in zip(swap_pictures(records), records, strict=True):
        lender = owner[id(row["images"][0])]
        assert lender is not old and lender["language"] == old["language"]
    for row, old in zip(swap_record(records), records, strict=True):
        assert old["record"] not in asked(row) and asked(row).endswith("\nWhat is it?")
        assert row["images"] == old["images"]


def test_one_half_alone_leaves_the_other_out():
    records = make_records()
    for row, old in zip(record_alone(records), records, strict=True):
        assert not prompt_of(row).pictures and asked(row) == asked(old)
        assert not any(part["type"] == "image" for part in row["prompt"][-1]["content"])
    # where nobody else speaks the language, somebody who does not
    few = [records[0], {**records[1], "person": "p1"}]
    assert swap_record(few)[0]["prompt"] != few[0]["prompt"]
    for row in picture_alone(records):
        assert asked(row) == "What is it?" and len(row["images"]) == 2


def test_what_cannot_be_changed_is_said_in_one_line():
    records = make_records()
    with pytest.raises(ValueError, match="shuffle_slices needs two pictures or more.*id r0 has 1"):
        shuffle_slices(make_records(pictures=1))
    alone = [{**row, "person": "p0"} for row in records]
    with pytest.raises(ValueError, match="swap_earlier finds no other row for the one with id r0"):
        swap_earlier(alone)
    with pytest.raises(ValueError, match="swap_pictures finds no other"):
        swap_pictures(records[:1])
    for control in (swap_record, picture_alone):
        with pytest.raises(ValueError, match=r"record"):
            control([{**row, "record": None} for row in records])
    with pytest.raises(ValueError, match="picture_alone needs a column `record`"):
        picture_alone([{**row, "record": "something else"} for row in records])


def test_the_changed_records_can_be_asked(tiny_vlm):
    model = load_base(str(tiny_vlm), dtype="float32", quantization_config=None)
    processor = load_processor(str(tiny_vlm))
    records = make_records()
    for name, control in CONTROLS.items():
        answers = generate_answers(model, processor, control(records), max_new_tokens=2)
        assert [answer["id"] for answer in answers] == [row["id"] for row in records], name
