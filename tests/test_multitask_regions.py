"""medtune.multitask.add_regions: boxes and words of pictures with a drawn box and a caption."""

import datasets
import numpy as np
import pytest
from drawn_pictures import drawn_rows, write_drawn_pairs
from PIL import Image

from medtune import boxes, multitask
from medtune.captions import Caption
from medtune.multitask import add_regions
from medtune.pairs import load_pairs

LIVER = "The region of interest shows the liver. A cyst is seen within it."
BOX = (0.1, 0.2, 0.5, 0.6)


def noise(size=200):
    return Image.effect_noise((size, size), 60).convert("RGB")


def drawn(*several):
    """Draw boxes into noise."""
    image = noise()
    for box in several:
        image = boxes.draw_box(image, box)
    return image


def pairs_of(*rows, **more):
    """Pairs of (picture, caption); the ids are letters."""
    columns = {
        "image": [image for image, _ in rows],
        "id": [chr(97 + number) for number in range(len(rows))],
        "caption": [caption for _, caption in rows],
        **more,
    }
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


@pytest.fixture(scope="module")
def known(sample_path):
    """Pairs of the sample with a drawn box, with all that is known of them."""
    return drawn_rows(sample_path, every=250)


def test_the_regions_of_the_sample_come_back(known, tmp_path):
    """From pictures and captions alone, against what the sample knows of itself."""
    file = write_drawn_pairs(known, tmp_path / "shard.parquet")
    pairs = load_pairs(file)
    assert set(pairs.column_names) == {"image", "id", "caption"}
    found, report = add_regions(pairs)
    by_id = {row["id"]: row for row in known.remove_columns("image")}
    overlaps = []
    names_right = []
    for row in found:
        truth = by_id[row["id"]]
        overlaps.append(boxes.iou(row["roi"], truth["roi"]))
        names_right.append(row["structure"] == truth["structure"])
        # a caption is silent on findings where nobody could tell
        if truth["fields"]["finding_judged"]:
            assert row["target_diag"] in row["caption"]
        else:
            assert row["target_diag"] is None
        assert row["modality"] == "CT"
        assert boxes.find_box(row["image"]) is None, "the line is erased"
    assert len(known) >= 10
    assert report["rows"] == len(known)
    assert report["kept"] >= 0.95 * len(known)
    assert report["erased"] == report["kept"] == report["boxes"]["of a drawn line"]
    assert np.mean(overlaps) > 0.97
    assert min(overlaps) > 0.85
    assert np.mean(names_right) > 0.95


def test_what_is_left_out_is_counted_and_named():
    two = drawn(BOX, (0.55, 0.65, 0.9, 0.95))
    pairs = pairs_of(
        (drawn(BOX), LIVER),
        (noise(), LIVER),
        (two, LIVER),
        (drawn(BOX), "An axial CT scan."),
        (drawn(BOX), "A cyst is seen."),
        (drawn(BOX), " "),
    )
    found, report = add_regions(pairs)
    assert list(found["id"]) == ["a", "d", "e"], "only the box is needed"
    assert report["without"] == {"roi": 0, "structure": 2, "target_diag": 1, "modality": 2}
    assert report["rows"] == report["kept"] + sum(report["dropped"].values()) == 6
    reasons = {entry["id"]: entry["reason"] for entry in report["left_out"]}
    assert reasons.keys() == {"b", "c", "f"}
    assert reasons["b"] == "no drawn box"
    assert "several drawn boxes" in reasons["c"]
    assert reasons["f"] == "caption: is empty"
    assert report["dropped"]["caption cannot be used"] == 1

    found, report = add_regions(pairs, required=("roi", "structure", "target_diag"))
    assert list(found["id"]) == ["a"]
    assert report["dropped"]["the caption names no structure"] == 2
    found, _ = add_regions(pairs, required=())
    assert "b" in list(found["id"])

    found, report = add_regions(pairs, several="largest")
    assert list(found["id"]) == ["a", "c", "d", "e"]
    assert found[1]["roi"] == pytest.approx(BOX, abs=0.01)
    assert boxes.find_boxes(found[1]["image"]) == [], "all lines are erased"


def test_a_picture_that_cannot_be_read_stops_nothing(tmp_path):
    pairs = pairs_of((drawn(BOX), LIVER), (drawn(BOX), LIVER))
    raw = pairs.cast_column("image", datasets.Image(decode=False)).to_list()
    raw[1]["image"]["bytes"] = raw[1]["image"]["bytes"][:300]
    cut = datasets.Dataset.from_list(raw).cast_column("image", datasets.Image())
    found, report = add_regions(cut)
    assert len(found) == 1
    assert report["dropped"] == {"image cannot be used": 1}


def test_what_the_source_knows_stays():
    own = [0.3, 0.3, 0.7, 0.7]
    pairs = pairs_of(
        (noise(), LIVER), (drawn(BOX), LIVER), roi=[own, None], structure=["left lobe", None]
    )
    found, report = add_regions(pairs)
    assert found[0]["roi"] == own
    assert found[0]["structure"] == "left lobe"
    assert found[1]["structure"] == "liver"
    assert report["boxes"] == {"of a drawn line": 1, "of the source": 1}
    assert report["erased"] == 1


def test_a_box_that_is_none_is_left_out_and_a_mark_of_a_line_goes_with_it():
    pairs = pairs_of(
        (drawn(BOX), LIVER),
        (drawn(BOX), LIVER),
        roi=[None, [0.9, 0.1, 0.2, 0.3]],
        has_box=[True] * 2,
    )
    found, report = add_regions(pairs)
    assert list(found["id"]) == ["a"]
    assert list(found["has_box"]) == [False], "its line is erased"
    assert report["dropped"] == {"roi cannot be used": 1}
    assert "not x0 < x1" in report["left_out"][0]["reason"]


def test_lines_stay_if_they_are_wanted():
    found, report = add_regions(pairs_of((drawn(BOX), LIVER)), erase=False)
    assert boxes.find_box(found[0]["image"]) is not None
    assert report["erased"] == 0


def test_decoys_are_boxes_of_other_pictures():
    places = [(0.1, 0.2, 0.4, 0.5), (0.5, 0.1, 0.9, 0.4), (0.2, 0.6, 0.8, 0.9)]
    pairs = pairs_of(*((drawn(box), LIVER) for box in places))
    found, _ = add_regions(pairs, decoys=2)
    for row in found:
        assert len(row["decoys"]) == 2
        others = [other["roi"] for other in found if other["id"] != row["id"]]
        assert sorted(row["decoys"]) == sorted(others)
    again, _ = add_regions(pairs, decoys=2)
    assert list(found["decoys"]) == list(again["decoys"])
    alone, _ = add_regions(pairs.select([0]), decoys=2)
    assert alone[0]["decoys"] == [], "there is no other box"


def test_a_language_model_may_read_the_captions(monkeypatch):
    """What it cannot say is read by rules, and both are counted."""
    asked = {}

    def extract(texts, **endpoint):
        asked.update(endpoint, texts=texts)
        answer = Caption("MRI", "spleen", "cyst", target_diag="a cyst")
        return [answer] + [None] * (len(texts) - 1)

    monkeypatch.setattr("medtune.multitask.regions.extract_with_llm", extract)
    pairs = pairs_of((drawn(BOX), "Milz mit Zyste."), (noise(), LIVER), (drawn(BOX), LIVER))
    found, report = add_regions(
        pairs, endpoint={"base_url": "http://127.0.0.1:1/v1", "model": "small"}, required=()
    )
    assert asked["model"] == "small"
    assert len(asked["texts"]) == 3
    assert list(found["structure"]) == ["spleen", "liver", "liver"]
    assert list(found["modality"]) == ["MRI", None, None]
    assert report["read_by"] == {"language model": 1, "rules": 2}


def test_wrong_settings_are_one_line():
    pairs = pairs_of((drawn(BOX), LIVER))
    with pytest.raises(ValueError, match=r"required=\['box'\]: there are roi, structure"):
        add_regions(pairs, required=("box",))
    with pytest.raises(ValueError, match="several=all: choose drop or largest"):
        add_regions(pairs, several="all")
    with pytest.raises(ValueError, match="decoys=-1"):
        add_regions(pairs, decoys=-1)
    with pytest.raises(ValueError, match=r"no row is left of 1: \{'no drawn box': 1\}"):
        add_regions(pairs_of((noise(), LIVER)))


def test_the_boxes_are_fit_to_train_on():
    """What comes out goes into a batch as it is, with the question of the recipe."""
    found, _ = add_regions(pairs_of((drawn(BOX), LIVER), (drawn(BOX), "It is bright.")))
    for row in found:
        assert multitask.check_box(row["roi"]) == pytest.approx(BOX, abs=0.01)
