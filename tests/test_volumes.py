"""The questions about slabs: their truth is in the pixels, and neither words nor slices give it away."""

import importlib.util
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import datasets
import numpy as np
import pytest
from scipy import ndimage

from medtune.records import convert_pairs, read_records
from medtune.scores import read_slab_answer, slab_scores

REPO = Path(__file__).parents[1]
SEED = 0
# of what always giving the most frequent answer would score, were the answers dealt out evenly:
# of each task the part of its answer, and its chance
CHANCE = {
    ("count", "count"): 1 / 5,
    ("count", "largest"): 1 / 4,
    ("count", "size"): 1 / 3,
    ("height", "height"): 1 / 4,
    ("presence", "present"): 1 / 2,
    ("direction", "direction"): 1 / 4,
    # the name of a vessel may tell along which axis it runs, and never which way
    ("border", "direction"): 1 / 2,
    ("change", "change"): 1 / 5,
    ("record", "seen"): 1 / 2,
}


def load_builder():
    spec = importlib.util.spec_from_file_location(
        "build_volumes", REPO / "data" / "build_volumes.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["build_volumes"] = module  # its worker processes look it up by this name
    spec.loader.exec_module(module)
    return module


builder = load_builder()
sample = builder.sample


@pytest.fixture(scope="module")
def source():
    made = builder.volumes_source(seed=SEED)
    sample.SOURCE = made
    return made


@pytest.fixture(scope="module")
def jobs(source):
    return builder.list_jobs(source, SEED)


@pytest.fixture(scope="module")
def slab(source, jobs):
    """A slab of the scanned person in which lesions have room."""
    job = next(job for job in jobs if job.person == 0 and 36 <= job.first <= 38)
    cuts = [sample.drawn_slice(sample.Job(job.first + i, SEED)) for i in range(4)]
    return builder.Slab(job, cuts, builder.roomy_regions(cuts))


@pytest.fixture(scope="module")
def built(volumes_path):
    """The text columns of the built set, one row a question."""
    rows = datasets.Dataset.from_parquet(str(volumes_path)).remove_columns("image")
    return list({row["slab"]: row for row in rows}.values())


# ---- what must not leak


def test_no_slice_of_a_slab_is_near_one_of_another_split():
    slices = {}
    for split in ("train", "validation", "test"):
        starts = builder.slab_starts(split)
        assert starts
        slices[split] = {first + i for first in starts for i in range(builder.PICTURES)}
        for first in starts:
            blocks = {builder.group_of(first + i) for i in range(builder.PICTURES)}
            assert len(blocks) == 1 or split == "train"
    for split in ("validation", "test"):
        for z in slices[split]:
            assert min(abs(z - other) for other in slices["train"]) > sample.GAP
    # no slice that the tiny base has seen is judged by
    assert all(sample.split_of(z) == "test" for z in slices["test"])


def test_people_are_of_one_split_and_names_of_groups_too(built):
    for column in ("person", "group"):
        splits = defaultdict(set)
        for row in built:
            splits[row[column]].add(row["split"])
        assert all(len(found) == 1 for found in splits.values()), column
    assert len({row["person"] for row in built if row["split"] == "test"}) == 6


def test_a_structure_is_asked_for_as_often_where_it_is_as_where_it_is_not(jobs):
    counts = Counter()
    for job in jobs:
        counts.update((job.split, name, there) for name, there in job.presence)
    assert sum(counts.values()) > 300
    for split, name, there in counts:
        assert counts[split, name, there] == counts[split, name, not there]


@pytest.mark.parametrize(("task", "part"), CHANCE)
@pytest.mark.parametrize("columns", [(), ("structure", "window"), ("group", "person")])
def test_a_table_of_the_texts_is_at_chance(built, columns, task, part):
    def keys(row):
        """What the table knows of a question; what was never seen is answered as the task mostly is."""
        # a record is hardly ever the same; the distance of the slices is
        record = row["record"] if row["task"] == "record" else None
        question = row["question"].removeprefix(record or "").strip()
        return [(question, *(row[column] for column in columns)), question, row["task"]]

    answers = defaultdict(Counter)
    right = []
    for row in sorted(built, key=lambda row: row["split"] != "train"):
        truth = getattr(read_slab_answer(row["caption"]), part)
        if truth is None or row["task"] != task:
            continue
        if row["split"] == "train":
            for key in keys(row):
                answers[key][truth] += 1
        elif row["split"] == "test":
            known = next(answers[key] for key in keys(row) if key in answers)
            [(said, _)] = known.most_common(1)
            right.append(said == truth)
    chance = CHANCE[task, part]
    reach = 3 * np.sqrt(chance * (1 - chance) / len(right))
    assert len(right) > 60 and np.mean(right) < chance + reach


def test_the_record_says_what_is_known_and_nothing_of_what_is_seen(built):
    rows = [row for row in built if row["task"] == "record"]
    seen = defaultdict(list)
    for row in rows:
        answer = read_slab_answer(row["caption"])
        value = float(re.search(r"(\d\.\d) mg/dl", row["record"])[1])
        assert answer.raised == (value > builder.HIGHEST_NORMAL)
        seen["raised", answer.raised].append(answer.seen)
        seen["known of raised", answer.raised].append(answer.known)
        reports = [pair for known in (True, False) for pair in builder.REPORTS[known]]
        [said] = [
            i for i, pair in enumerate(reports) if any(row["record"].endswith(t) for t in pair)
        ]
        assert answer.known == (said < len(builder.REPORTS[True]))
        assert row["question"].startswith(row["record"] + "\n")
        seen["known", answer.known].append(answer.seen)
    assert len(seen) == 6
    assert all(0.42 < np.mean(values) < 0.58 for values in seen.values())


def test_every_answer_is_read_as_it_was_meant(built):
    parts = {
        "count": "count",
        "height": "height",
        "presence": "present",
        "direction": "direction",
        "border": "direction",
        "change": "change",
        "record": "seen",
    }
    assert {row["task"] for row in built} == set(parts)
    for row in built:
        answer = read_slab_answer(row["caption"])
        assert getattr(answer, parts[row["task"]]) is not None, row["caption"]
        if row["task"] == "count" and answer.count:
            assert None not in (answer.largest, answer.size)
        shifts = slab_scores([row["caption"]], [row["caption"]])["shift_right"]
        assert (shifts == 1.0) == (row["task"] == "border")


def test_names_that_are_asked_for_are_shown_often_enough_in_training(source):
    pixels = builder.pixels_of_names(source)
    taught = builder.taught_names(pixels)
    # nearly all of the spleen lies in a held-out block
    assert "spleen" not in taught and {"heart", "liver", "stomach"} <= set(taught)
    for name in taught:
        shown = [builder.shown_in(pixels[name], first) for first in builder.slab_starts("train")]
        assert min(shown.count(True), shown.count(False)) >= builder.FEWEST_PLACES


# ---- truth in the pixels


def ask(function, slab, deal):
    """Pictures and answer, all drawn alike but for what was dealt out."""
    question = function(slab, deal, np.random.default_rng(5))
    pictures = [np.asarray(picture.convert("L"), float) for picture in question.pictures]
    return pictures, read_slab_answer(question.answer[0])


def test_the_lesion_is_in_the_slices_that_are_counted_and_widest_where_it_is_said(slab):
    empty, answer = ask(builder.ask_count, slab, 0)
    assert answer.count == 0
    # every third has a lesion of the same width
    for deal in (3, 6, 9, 12):
        pictures, answer = ask(builder.ask_count, slab, deal)
        areas = [
            int((np.abs(one - other) > 12).sum())
            for one, other in zip(pictures, empty, strict=True)
        ]
        assert sum(area > 0 for area in areas) == answer.count == deal % 5
        assert int(np.argmax(areas)) + 1 == answer.largest


def test_the_height_is_the_number_of_slices_times_their_distance(slab):
    counts = set()
    for deal in range(8):
        question = builder.ask_height(slab, deal, np.random.default_rng(5))
        spacing = int(re.search(r"(\d+) mm apart", question.record[0])[1])
        count = int(re.search(r"in (\d) pictures?,", question.answer[0])[1])
        assert spacing in builder.SPACINGS
        for language in range(2):
            assert read_slab_answer(question.answer[language]).height == count * spacing
            assert str(spacing) in question.record[language]
        counts.add(count)
    assert counts == {1, 2, 3, 4}


def test_the_lesion_of_a_height_is_in_so_many_slices(slab):
    """Where two questions differ in nothing but their slices, pictures differ where one has it."""
    for deal in (0, 2, 4, 6):
        question = builder.ask_height(slab, deal, np.random.default_rng(5))
        count = int(re.search(r"in (\d) pictures?,", question.answer[0])[1])
        # drawn again with no lesion at all
        shown = []
        drawn = builder.draw_finding
        try:
            builder.draw_finding = lambda hu, finding, rng: hu
            without = builder.ask_height(slab, deal, np.random.default_rng(5))
        finally:
            builder.draw_finding = drawn
        for one, other in zip(question.pictures, without.pictures, strict=True):
            one, other = (np.asarray(picture.convert("L"), float) for picture in (one, other))
            shown.append(bool((np.abs(one - other) > 12).any()))
        assert sum(shown) == count
        first = shown.index(True)
        assert all(shown[first : first + count]), "a lesion has no gap"


def test_what_is_real_shifts_where_it_is_said(source, jobs):
    """The mask, through the frame, moves as the answer says, and the other way from head to feet."""
    found = Counter()
    chosen = [job for job in jobs if job.split == "test"][:14]
    for job in chosen:
        cuts = [sample.drawn_slice(sample.Job(job.first + i, SEED, job.person)) for i in range(4)]
        one = builder.Slab(job, cuts, builder.roomy_regions(cuts))
        for deal in range(0, 4, 2):
            up = builder.ask_border(one, deal, np.random.default_rng(deal))
            down = builder.ask_border(one, deal + 1, np.random.default_rng(deal))
            if up is None:
                assert down is None
                continue
            opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
            said = [read_slab_answer(question.answer[0]).direction for question in (up, down)]
            assert said[1] == opposite[said[0]]
            assert up.slices == down.slices[::-1] and up.ask == down.ask
            for picture, other in zip(up.pictures, down.pictures[::-1], strict=True):
                assert picture.tobytes() == other.tobytes()
            found[said[0]] += 1
            if "lung" in up.structure:
                found["lung"] += 1
                check_lung(up, said[0])
    assert sum(found[way] for way in ("left", "right", "up", "down")) >= 8 and found["lung"] >= 3


def check_lung(question, direction):
    """A lung is dark: what is dark moves its middle or its share as its border does."""
    grey = [
        np.asarray(picture.convert("L"), float)[20:-20, 20:-20] for picture in question.pictures
    ]
    # the middle of what became dark, or bright, between the first and the last slice, beside the lung
    dark = [image < 110 for image in grey]
    axis, sign = {"left": (1, -1), "right": (1, 1), "up": (0, -1), "down": (0, 1)}[direction]
    lungs = [ndimage.center_of_mass(part)[axis] for part in dark]
    grows = dark[-1].sum() > dark[0].sum()
    size = grey[0].shape[axis]
    lies = np.sign(lungs[0] - (size - 1) / 2)
    assert sign == (-lies if grows else lies)


def test_the_vessel_goes_where_it_is_said(slab):
    asked = [ask(builder.ask_direction, slab, deal) for deal in range(4)]
    assert {answer.direction for _, answer in asked} == {"left", "right", "up", "down"}
    ways = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
    for pictures, answer in asked:
        middles = []
        for place in (0, 3):
            # the vessel is in another place of each of the four
            background = np.median([other[place] for other, _ in asked], axis=0)
            differs = ndimage.gaussian_filter(np.abs(pictures[place] - background), 3) > 20
            middles.append(np.array(ndimage.center_of_mass(differs)))
        moved = middles[1] - middles[0]
        assert np.dot(moved, ways[answer.direction]) > 50
        assert np.abs(np.dot(moved, ways[answer.direction][::-1])) < 10


def test_what_became_of_the_lesion_shows(slab):
    asked = {}
    for deal in range(5):
        pictures, answer = ask(builder.ask_change, slab, deal)
        asked[answer.change] = pictures[1]
    assert set(asked) == set(builder.CHANGES)
    areas = {}
    for change, now in asked.items():
        smooth = ndimage.gaussian_filter(np.abs(now - asked["gone"]), 2)
        areas[change] = int((smooth > 15).sum())
    assert areas["grown"] > 1.6 * areas["shrunk"] > 0 == areas["gone"]
    for change in ("same", "new"):
        assert areas["shrunk"] * 0.8 <= areas[change] <= areas["grown"] * 1.2


# ---- the form


def test_the_same_job_gives_the_same_rows_and_one_record_a_question(source, jobs, tmp_path):
    chosen = [
        next(job for job in jobs if job.split == split and job.presence)
        for split in ("train", "test")
    ]
    rows = [row for job in chosen for row in builder.make_rows(job)]
    assert rows == [row for job in chosen for row in builder.make_rows(job)]
    pairs = datasets.Dataset.from_list(
        rows, features=datasets.Features.from_arrow_schema(builder.schema())
    )
    kept = ["task", "language", "record", "person"]
    report = convert_pairs(pairs, tmp_path / "out", keep=kept)
    questions = list({row["slab"]: row for row in rows}.values())
    assert sum(report["records"].values()) == len(questions) and not report["rejected"]
    records = [*read_records(tmp_path / "out", "train"), *read_records(tmp_path / "out", "test")]
    for record, row in zip(records, questions, strict=True):
        assert len(record["images"]) == len(row["slices"]) in (2, 4)
        assert record["slice"] == row["slice"] and record["task"] == row["task"]
        assert record["completion"][0]["content"][0]["text"] == row["caption"]
        assert record["prompt"][0]["content"][-1]["text"] == row["question"]


@pytest.mark.slow
def test_a_part_can_be_built_and_is_the_same_again(tmp_path):
    paths = []
    for name in ("a", "b"):
        source = builder.volumes_source(seed=SEED)
        paths.append(builder.build(tmp_path / name, source, seed=SEED, jobs=2))
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert not list(tmp_path.rglob("*.part"))
