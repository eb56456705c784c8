"""Sets of the hub in other shapes than image, id and caption."""

import datasets
import pytest
from pair_sources import AS_BYTES, group_of, image_id, jpeg, refused

from medtune.pairs import load_pairs


@pytest.fixture(params=["whole", "limit", "streaming"])
def load(request, monkeypatch):
    """A function that loads a set as if it came from the hub, in one of the three ways."""
    options = {"limit": {"limit": 9}, "streaming": {"streaming": True}}.get(request.param, {})

    def load(content: dict, **more) -> list[dict]:
        pairs = datasets.Dataset.from_dict(content)
        for name in ("image", "picture"):
            if name in content:
                pairs = pairs.cast_column(name, datasets.Image())
        if "images" in content:
            pairs = pairs.cast_column("images", datasets.List(datasets.Image()))

        def answer(name, config, split, streaming):
            return pairs.to_iterable_dataset() if streaming else pairs

        monkeypatch.setattr(datasets, "load_dataset", answer)
        rows = load_pairs("org/set", **options, **more)
        first = next(iter(rows))
        assert first["image"].size == (24, 16), "whoever reads a picture gets it decoded"
        return list(rows.cast_column("image", AS_BYTES))

    return load


def cells(*greys: int) -> list[dict]:
    return [{"bytes": jpeg(grey), "path": None} for grey in greys]


def test_a_set_without_ids_gets_those_of_its_pictures(load):
    rows = load({"image": cells(1, 2), "question": ["Q1", "Q2"], "answer": ["A1", "A2"]})
    assert [row["id"] for row in rows] == [image_id(jpeg(1)), image_id(jpeg(2))]
    assert [(row["question"], row["caption"]) for row in rows] == [("Q1", "A1"), ("Q2", "A2")]
    assert [row["image"]["bytes"] for row in rows] == [jpeg(1), jpeg(2)]


def test_names_of_files_and_of_patients_are_hashed(load):
    columns = {"image": cells(1, 2), "text": ["x", "y"], "image_id": ["p1/a.png", "s2"]}
    rows = load(columns | {"patient_id": [7, 8], "split": ["a", "b"]})
    assert rows[0]["id"].startswith("id-")
    assert rows[1]["id"] == "s2"
    assert [row["group"] for row in rows] == [group_of("7"), group_of("8")]
    assert [row["split"] for row in rows] == ["a", "b"]


def test_numbers_are_captions_only_where_they_are_meant(load):
    columns = {"picture": cells(1), "id": ["a"], "findings": [2.0]}
    rows = load(columns, columns={"image": "picture", "caption": "findings"})
    assert rows[0]["caption"] == "2"
    refused(ValueError, "float is no text", "org/set", columns={"image": "picture"})


def test_dialogues_of_the_hub(load):
    turns = [
        {"role": "user", "content": "<image>Q1"},
        {"role": "assistant", "content": "A1"},
        {"role": "user", "content": "Q2"},
        {"role": "assistant", "content": "A2"},
    ]
    rows = load({"messages": [turns], "images": [cells(1)]})
    assert [(row["question"], row["caption"]) for row in rows] == [("Q1", "A1"), ("Q2", "A2")]
    assert [row["image"]["bytes"] for row in rows] == [jpeg(1)] * 2
    assert len({row["id"] for row in rows}) == 2
    assert len({row["group"] for row in rows}) == 1


def test_several_pictures_of_one_report(load):
    rows = load({"images": [cells(1, 2)], "report": ["x"], "id": ["s"]})
    assert [row["id"] for row in rows] == ["s", "s-2"]
    assert [row["image"]["bytes"] for row in rows] == [jpeg(1), jpeg(2)]
    assert {row["group"] for row in rows} == {group_of("s")}
    rows = load({"images": [cells(1, 2), cells(3)], "report": ["x", "y"]})
    assert [row["id"] for row in rows] == [image_id(jpeg(grey)) for grey in (1, 2, 3)]
    first, second, other = (row["group"] for row in rows)
    assert first == second != other


def test_what_is_no_pair_is_refused(load):
    with pytest.raises(ValueError, match="org/set has no column caption, only image, label"):
        load({"image": cells(1), "label": [1]})
