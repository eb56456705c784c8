"""The proof that a split does not leak."""

import json

import pytest
from look_alikes import make_dataset, patients, scan

from medtune import audit
from medtune.pairs import load_pairs


def test_audit_passes_a_clean_split_and_shows_what_a_random_one_leaks():
    dataset = patients()
    groups = audit.assign_groups(dataset, column="patient")
    splits = audit.split_by_group(groups)
    report = audit.audit_split(dataset, groups, splits)
    for kind in ("groups", "near_duplicates", "exact_duplicates", "captions"):
        assert report[f"{kind}_crossing"] == 0
    assert report["held_out_leaked"] == 0 and report["leaking_pairs"] == []
    assert sum(report["rows"].values()) == 48 and sum(report["groups"].values()) == 12
    assert report["near_duplicates"] == 12 * 6
    assert report["random_split"]["near_duplicates_crossing"] > 10
    assert report["random_split"]["held_out_leaked"] > 0.8
    assert json.dumps(report) == json.dumps(audit.audit_split(dataset, groups, splits))
    # the patients are found without the column
    assert audit.assign_groups(dataset) == [f"cluster-{i // 4 * 4:05d}" for i in range(48)]


def test_look_alikes_that_are_known_are_not_looked_for_again():
    dataset = patients(4, 2)
    groups = audit.assign_groups(dataset, column="patient")
    splits = ["train", "test"] * 4
    marks = audit.fingerprint(dataset)
    near = audit.near_duplicates(dataset, fingerprints=marks)
    options = {"fingerprints": marks, "raise_on_leak": False}
    searched = audit.audit_split(dataset, groups, splits, **options)
    assert searched["near_duplicates_crossing"] > 0
    assert audit.audit_split(dataset, groups, splits, near=near, **options) == searched
    # what is given counts
    none = audit.audit_split(dataset, groups, splits, near=[], **options)
    assert none["near_duplicates"] == none["near_duplicates_crossing"] == 0


def test_audit_fails_closed():
    dataset = patients(4, 2)
    names = [str(i) for i in range(8)]
    clean = ["train"] * 4 + ["validation"] * 2 + ["test"] * 2
    assert audit.audit_split(dataset, names, clean)["groups_crossing"] == 0

    with pytest.raises(ValueError, match="1 groups and 0 near-duplicate pairs cross") as caught:
        audit.audit_split(dataset, ["a", *names[1:7], "a"], clean)
    assert "\n" not in str(caught.value)

    leaky = ["test", *clean[1:]]
    message = "0 groups and 1 near-duplicate pairs .* rows 0 and 1 at distance"
    with pytest.raises(ValueError, match=message):
        audit.audit_split(dataset, names, leaky)
    report = audit.audit_split(dataset, names, leaky, raise_on_leak=False)
    assert [pair[:2] for pair in report["leaking_pairs"]] == [(0, 1)]
    assert report["held_out_leaked"] == pytest.approx(1 / 5) and report["captions_crossing"] == 1

    gap = [None, *clean[1:]]  # a row in no split cannot leak
    assert audit.audit_split(dataset, names, gap)["rows"]["unassigned"] == 1

    with pytest.raises(ValueError, match="8 rows, 8 groups and 7 splits"):
        audit.audit_split(dataset, names, clean[:-1])


def test_what_cannot_be_read_cannot_be_cleared():
    broken = make_dataset([scan(0), b"broken", scan(1)])
    with pytest.raises(ValueError, match=r"1 pictures cannot be read.*row 1"):
        audit.audit_split(broken, ["a", "b", "c"], ["train", "train", "test"])


def test_pictures_as_files_and_bad_rows_are_named(tmp_path):
    for number in range(3):
        scan(number).save(tmp_path / f"{number}.png")
    (tmp_path / "2.png").write_text("no picture")
    lines = [f"{number}.png,s{number},Finding {number}." for number in range(4)]
    (tmp_path / "captions.csv").write_text("\n".join(["image,id,caption", *lines]))
    pairs = load_pairs(tmp_path, strict=False)
    groups = audit.assign_groups(pairs)
    assert len(set(groups)) == 4
    splits = ["train", "test", "train", "test"]
    report = audit.audit_split(pairs, groups, splits, raise_on_leak=False)
    assert report["unreadable"] == 2
    # the id of a row that is missing its picture is where it stands in the table
    assert report["unreadable_ids"][0] == "s2"
    assert report["rows"] == {"train": 2, "test": 2}
    with pytest.raises(ValueError, match=r"2 pictures .*\(first: row 2, id s2, file 2\.png\)"):
        audit.audit_split(pairs, groups, splits)
    sound = pairs.select([0, 1])
    assert audit.audit_split(sound, groups[:2], splits[:2])["unreadable_ids"] == []


@pytest.mark.slow
def test_audit_of_the_sample(sample_path):
    """The blocks' gaps hold: no slice near a block is a near-duplicate of one beyond the gap."""
    dataset = load_pairs(sample_path)
    marks = audit.fingerprint(dataset)
    groups = audit.assign_groups(dataset)
    report = audit.audit_split(dataset, groups, dataset["split"], fingerprints=marks)
    assert report["near_duplicates"] > 1000 and report["held_out_leaked"] == 0
    assert report["random_split"]["near_duplicates_crossing"] > 100
