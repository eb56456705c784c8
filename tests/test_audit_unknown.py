"""Groups that are guessed where nobody names them, what the guess is worth, and who must accept it."""

import csv
import itertools
import json

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from look_alikes import encode, make_dataset, scan
from PIL import Image, ImageEnhance

from medtune import audit, cli
from medtune.audit.unknown import GUESS_DISTANCE
from medtune.pairs import load_pairs


def brute_force(guessed: list[str], known: list[str]) -> dict[str, int]:
    """Look at every pair of rows."""
    counts = {"pairs": 0, "found": 0, "wrong": 0}
    for i, j in itertools.combinations(range(len(known)), 2):
        belongs = known[i] == known[j]
        together = guessed[i] == guessed[j]
        counts["pairs"] += belongs
        counts["found"] += belongs and together
        counts["wrong"] += together and not belongs
    return counts


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xyz")), max_size=20))
def test_a_guess_is_rated_pair_by_pair(rows):
    guessed = [guess for guess, _ in rows]
    known = [truth for _, truth in rows]
    assert audit.rate_groups(guessed, known) == brute_force(guessed, known)


def test_a_guess_is_rated_row_by_row():
    with pytest.raises(ValueError, match="zip"):
        audit.rate_groups(["a"], ["a", "b"])


def test_each_clue_finds_its_own_pairs():
    first = scan(0)
    brighter = ImageEnhance.Brightness(first).enhance(1.2)
    pictures = [first, brighter, scan(1), scan(2), scan(3), scan(4), scan(5)]
    captions = ["one", "two", "three", "Three ", "five", "six", "seven"]
    ids = ["p1-1", "p2-1", "p3-1", "p4-1", "p2-2", "p3-2", "p1-2"]
    dataset = make_dataset(pictures, id=ids, caption=captions)
    clues = audit.group_clues(dataset)
    assert [(i, j) for i, j, _ in clues["look alike"]] == [(0, 1)]
    assert clues["same caption"] == [(2, 3, 0)]
    assert clues["same id but for a number"] == [(0, 6, 0), (1, 4, 0), (2, 5, 0)]
    groups = audit.guess_groups(7, [pair for found in clues.values() for pair in found])
    assert groups[0] == groups[1] == groups[4] == groups[6]
    assert groups[2] == groups[3] == groups[5] != groups[0]


@pytest.mark.parametrize(
    "ids",
    [
        [f"image_{number:04d}" for number in range(9)],
        [f"8031efe0-1b5c-11ef-8929-00006653{number:04d}" for number in range(9)],
        [f"{number}.png" for number in range(9)],
        [None] * 9,
    ],
)
def test_ids_that_only_count_say_nothing(ids):
    rows = {"image": [b""] * 9, "id": ids, "caption": [""] * 9}
    clues = audit.group_clues(datasets.Dataset.from_dict(rows))
    assert clues == {"look alike": [], "same caption": [], "same id but for a number": []}


@given(st.lists(st.text(max_size=12), min_size=1, max_size=12))
def test_any_ids_can_be_looked_at(ids):
    rows = {"image": [b""] * len(ids), "id": ids, "caption": [""] * len(ids)}
    pairs = audit.group_clues(datasets.Dataset.from_dict(rows))["same id but for a number"]
    assert all(0 <= i < j < len(ids) for i, j, _ in pairs)


def test_a_caption_on_many_pictures_is_a_template():
    rows = {"image": [b""] * 11, "id": list("abcdefghijk"), "caption": ["Normal chest."] * 11}
    assert audit.group_clues(datasets.Dataset.from_dict(rows))["same caption"] == []


@pytest.mark.slow
def test_the_distance_is_what_known_groups_say(sample_path):
    """The claim beside GUESS_DISTANCE, on the slices that it was chosen on."""
    pairs = load_pairs(sample_path)
    drawn = [row for row, has_box in enumerate(pairs["has_box"]) if has_box]
    pairs = pairs.select(drawn)
    known = list(pairs["group"])
    marks = audit.fingerprint(pairs)
    near = audit.near_pairs(marks.hashes, GUESS_DISTANCE)

    def rate(distance: int) -> dict[str, int]:
        close = [pair for pair in near if pair[2] <= distance]
        return audit.rate_groups(audit.guess_groups(len(pairs), close), known)

    copies, guess = rate(20), rate(GUESS_DISTANCE)
    assert guess["found"] > 3 * copies["found"]
    assert guess["wrong"] < 0.15 * (guess["found"] + guess["wrong"])
    # the honest part: most of what belongs together is not found by looks
    assert guess["found"] < 0.01 * guess["pairs"]


# --- the command line -------------------------------------------------------------------------


@pytest.fixture
def medtune(capsys):
    """Run the command; gives the exit code, what it printed and what it complained about."""

    def call(*arguments) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return end.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture
def nameless(tmp_path):
    """Five pictures of which nobody knows the patient, each with a brighter copy."""
    lines = ["image,id,caption"]
    for number in range(5):
        picture = scan(number, (64, 64))
        for copy in range(2):
            name = f"{number}-{copy}.png"
            ImageEnhance.Brightness(picture).enhance(1 + 0.1 * copy).save(tmp_path / name)
            lines.append(f"{name},{'abcde'[number]}{copy},Picture {number} as copy {copy}.")
    (tmp_path / "captions.csv").write_text("\n".join(lines))
    return tmp_path


def test_no_split_of_unknown_patients_unless_it_is_accepted(medtune, nameless, tmp_path_factory):
    place = tmp_path_factory.mktemp("out")
    file = place / "splits.csv"
    code, _, err = medtune("audit", nameless, "--write", file)
    last = err.splitlines()[-1]
    assert code == 1 and not file.exists()
    assert last.startswith("medtune: 10 of 10 pairs name no patient")
    assert "--column group=NAME" in last and "--accept-unknown-groups" in last

    code, out, err = medtune("audit", nameless, "--write", file, "--accept-unknown-groups")
    assert code == 0 and "no patients are known (10 of 10 pairs name none)" in err
    assert json.loads(out)["unknown_groups"] == 10
    rows = list(csv.DictReader(file.open()))
    for number in "abcde":
        # what looks alike is on one side
        assert len({row["split"] for row in rows if row["id"][0] == number}) == 1

    code, _, err = medtune("convert", nameless, place / "no", "--split-by", "patient")
    assert code == 1 and err.splitlines()[-1] == last and not (place / "no").exists()


def test_convert_deals_out_by_a_guess_that_is_accepted(medtune, nameless, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "records"
    options = ["--split-by", "patient", "--accept-unknown-groups"]
    code, printed, _ = medtune("convert", nameless, out, *options)
    report = json.loads(printed)
    assert code == 0 and report["split_by"] == "patient"
    assert sorted(report["records"]) == ["test", "train", "validation"]
    splits = {}
    for split in report["records"]:
        for line in (out / f"{split}.jsonl").read_text().splitlines():
            splits.setdefault(json.loads(line)["id"][0], set()).add(split)
    assert len(splits) == 5 and all(len(found) == 1 for found in splits.values())


def test_known_patients_are_asked_for_nothing(medtune, nameless, tmp_path_factory):
    table = nameless / "captions.csv"
    header, *rows = table.read_text().splitlines()
    lines = [f"{header},patient"]
    for row in rows:
        lines.append(f"{row},{row.split(',')[1][0]}")
    table.write_text("\n".join(lines))
    place = tmp_path_factory.mktemp("out")
    code, out, err = medtune("audit", nameless, "--write", place / "splits.csv")
    assert code == 0 and json.loads(out)["unknown_groups"] == 0 and "name no" not in err
    code, out, _ = medtune("convert", nameless, place / "records")
    assert code == 0 and json.loads(out)["unknown_groups"] == 0


def test_a_given_split_of_unknown_patients_is_kept_and_said(medtune, tmp_path, tmp_path_factory):
    lines = ["image,id,caption,split"]
    for number in range(6):
        noise = np.random.default_rng(number).integers(0, 255, (32, 32), dtype="uint8")
        (tmp_path / f"{number}.png").write_bytes(encode(Image.fromarray(noise), "PNG"))
        split = "test" if number > 3 else "train"
        lines.append(f"{number}.png,id-{number},Picture {number}.,{split}")
    (tmp_path / "captions.csv").write_text("\n".join(lines))
    out = tmp_path_factory.mktemp("out") / "records"
    code, printed, err = medtune("convert", tmp_path, out)
    assert code == 0 and json.loads(printed)["records"] == {"train": 4, "test": 2}
    assert "6 of 6 pairs name no patient: whether the split that is given parts a patient" in err
