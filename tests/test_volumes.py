"""The questions about slabs: their truth is in the pixels, and neither words nor slices give it away."""

import importlib.util
import sys
from collections import Counter, defaultdict
from pathlib import Path

import datasets
import numpy as np
import pytest
from scipy import ndimage

from medtune.records import convert_pairs, read_records
from medtune.scores import read_slab_answer

REPO = Path(__file__).parents[1]
SEED = 0
# of what always giving the most frequent answer would score, were the answers dealt out evenly
CHANCE = {
    "count": 1 / 5,
    "largest": 1 / 4,
    "size": 1 / 3,
    "present": 1 / 2,
    "direction": 1 / 4,
    "change": 1 / 5,
    "seen": 1 / 2,
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


@pytest.mark.parametrize("part", CHANCE)
@pytest.mark.parametrize("columns", [(), ("structure", "window"), ("group", "person")])
def test_a_table_of_the_texts_is_at_chance(built, columns, part):
    def keys(row):
        """What the table knows of a question; what was never seen is answered as the task mostly is."""
        question = row["question"].removeprefix(row["record"] or "").strip()
        return [(question, *(row[column] for column in columns)), question, row["task"]]

    answers = defaultdict(Counter)
    right = []
    for row in sorted(built, key=lambda row: row["split"] != "train"):
        truth = getattr(read_slab_answer(row["caption"]), part)
        if truth is None:
            continue
        if row["split"] == "train":
            for key in keys(row):
                answers[key][truth] += 1
        elif row["split"] == "test":
            known = next(answers[key] for key in keys(row) if key in answers)
            [(said, _)] = known.most_common(1)
            right.append(said == truth)
    chance = CHANCE[part]
    reach = 3 * np.sqrt(chance * (1 - chance) / len(right))
    assert len(right) > 60 and np.mean(right) < chance + reach


def test_the_record_says_what_is_known_and_nothing_of_what_is_seen(built):
    rows = [row for row in built if row["task"] == "record"]
    seen = defaultdict(list)
    for row in rows:
        answer = read_slab_answer(row["caption"])
        reports = [pair for known in (True, False) for pair in builder.REPORTS[known]]
        [said] = [
            i for i, pair in enumerate(reports) if any(row["record"].endswith(t) for t in pair)
        ]
        assert answer.known == (said < len(builder.REPORTS[True]))
        assert row["question"].startswith(row["record"] + "\n")
        seen[answer.known].append(answer.seen)
    assert all(0.42 < np.mean(values) < 0.58 for values in seen.values())


def test_every_answer_is_read_as_it_was_meant(built):
    parts = {
        "count": "count",
        "presence": "present",
        "direction": "direction",
        "change": "change",
        "record": "seen",
    }
    assert {row["task"] for row in built} == set(parts)
    for row in built:
        answer = read_slab_answer(row["caption"])
        assert getattr(answer, parts[row["task"]]) is not None, row["caption"]
        if row["task"] == "count" and answer.count:
            assert None not in (answer.largest, answer.size)


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
