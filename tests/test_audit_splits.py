"""Groups, and splits that cut none of them."""

import csv
import os
import random
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from look_alikes import encode, make_dataset, scan, trimmed

from medtune import audit

SPLITS = ("train", "validation", "test")


def test_assign_groups():
    names = ["p1_a", "p1_b", "p2_a", "p3_a"]
    images = [scan(i) for i in range(4)]
    dataset = make_dataset(images, id=names, patient=["x", "y", "x", None])
    assert audit.assign_groups(dataset, id_pattern=r"^(p\d)_") == ["p1", "p1", "p2", "p3"]
    assert audit.assign_groups(dataset, id_pattern=r"^p\d") == ["p1", "p1", "p2", "p3"]
    assert audit.assign_groups(dataset, column="patient") == ["x", "y", "x", "row-3"]
    joined = audit.assign_groups(dataset, column="patient", pairs=[(1, 2, 0)])  # y is x after all
    assert joined == ["x", "x", "x", "row-3"]
    grouped = dataset.rename_column("patient", "group")
    assert audit.assign_groups(grouped) == ["x", "y", "x", "row-3"]
    numbered = make_dataset(images, id=names, group=[0, 0, None, 0])
    assert audit.assign_groups(numbered) == ["0", "0", "row-2", "0"]
    with pytest.raises(ValueError, match="no column 'doctor' .*image, id"):
        audit.assign_groups(dataset, column="doctor")
    with pytest.raises(ValueError, match=r"does not match 1 of 4 ids, first 'p3_a'"):
        audit.assign_groups(dataset, id_pattern="p[12]")
    with pytest.raises(ValueError, match="no regular expression"):
        audit.assign_groups(dataset, id_pattern="(")
    # a parenthesis that may be left out names nobody where it is
    for pattern in (r"^(p[12])?", r"^(p[12]|)"):
        with pytest.raises(ValueError, match=r"matches 'p3_a', but finds no group"):
            audit.assign_groups(dataset, id_pattern=pattern)


def test_rows_that_are_bad_need_no_id_that_fits():
    dataset = make_dataset(
        [scan(0), scan(1), b"broken"],
        id=["p1_a", "p2_a", "table.csv:4"],
        problem=[None, None, "table.csv:4: picture x.png is missing"],
    )
    assert audit.assign_groups(dataset, id_pattern=r"^(p\d)_") == ["p1", "p2", "row-2"]


def test_clusters_when_nothing_is_known():
    # each picture is like its neighbour, the ends are unlike: one cluster all the same
    chain = [scan(0)]
    for _ in range(4):
        chain.append(trimmed(chain[-1], 0.04, 0, 0, 0))
    dataset = make_dataset([scan(1), *chain, scan(2), encode(scan(1), quality=40)])
    assert (1, 5) not in {(i, j) for i, j, _ in audit.near_duplicates(dataset)}
    groups = audit.assign_groups(dataset)
    in_chain = ["cluster-00001"] * 5
    assert groups == ["cluster-00000", *in_chain, "cluster-00006", "cluster-00000"]
    splits = audit.split_by_group(groups, shares=(2, 1, 1))
    assert audit.audit_split(dataset, groups, splits)["groups_crossing"] == 0


# --- keeping a split ------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=("C",)), min_size=1).filter(str.strip),
            st.sampled_from([*SPLITS, None]),
            st.text("ab,\"\n;' 脾", max_size=5),
        ),
        unique_by=lambda row: row[0],
        max_size=8,
    )
)
@settings(max_examples=50, deadline=None)
def test_a_kept_split_is_read_back(rows):
    columns = list(zip(*rows, strict=True)) or [(), (), ()]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "splits.csv")
        audit.write_splits(file, *columns)
        with open(file, encoding="utf-8", newline="") as text:
            read = [(row["id"], row["split"], row["group"]) for row in csv.DictReader(text)]
    assert read == [(name, split or "", group) for name, split, group in rows]


def test_a_split_is_kept_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "splits.csv"
    audit.write_splits(file, ["a", "b", "a"], ["train", "test", "train"], ["p", "q", "p"])
    before = file.read_text("utf-8")
    assert before == "id,split,group\na,train,p\nb,test,q\n"
    with pytest.raises(ValueError, match="3 ids, 2 splits and 3 groups"):
        audit.write_splits(file, ["a", "b", "c"], ["train", "test"], ["p", "q", "r"])
    with pytest.raises(ValueError, match="row 1 has no id"):
        audit.write_splits(file, ["a", None], ["train", "test"], ["p", "q"])
    with pytest.raises(ValueError, match="the id 'a' stands in two splits"):
        audit.write_splits(file, ["a", "a"], ["train", "test"], ["p", "p"])

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError):
        audit.write_splits(file, ["c"], ["train"], ["p"])
    assert file.read_text("utf-8") == before
    assert [path.name for path in tmp_path.iterdir()] == ["splits.csv"]


# --- dealing out ----------------------------------------------------------------------------------

SHARES = [(0.8, 0.1, 0.1), (0.8, 0.2), (1, 1, 1), (0.5, 0, 0.5), (0.9, 0.05, 0.05), (1,)]


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=40),
    shares=st.sampled_from(SHARES),
    stratified=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_split_by_group(sizes, shares, stratified, seed):
    groups, kinds = [], []
    for number, size in enumerate(sizes):
        groups += [f"g{number}"] * size
        kinds += [("CT", "MR", None)[number % 3]] * size
    stratify = kinds if stratified else None
    used = sum(share > 0 for share in shares)
    if len(sizes) < used:
        with pytest.raises(ValueError, match="give finer groups"):
            audit.split_by_group(groups, shares=shares, seed=seed)
        return

    splits = audit.split_by_group(groups, shares=shares, stratify=stratify, seed=seed)
    assert len(set(zip(groups, splits, strict=True))) == len(sizes), "no group is cut"
    count = Counter(splits)
    wanted = dict(zip(SPLITS, shares, strict=False))
    assert set(count) == {name for name, share in wanted.items() if share > 0}, "none is empty"
    for name, share in wanted.items():
        missed_by = abs(count[name] - share / sum(shares) * len(groups))
        assert missed_by <= max(sizes) * (4 if stratified else 2)

    # the order of the rows does not matter
    order = random.Random(seed).sample(range(len(groups)), len(groups))
    moved_groups = [groups[i] for i in order]
    moved_kinds = [kinds[i] for i in order] if stratified else None
    again = audit.split_by_group(moved_groups, shares=shares, stratify=moved_kinds, seed=seed)
    assert again == [splits[i] for i in order]


def test_split_shares_strata_and_seeds():
    groups = []
    for number in range(300):
        groups += [f"p{number:03d}"] * (1 + number % 5)
    kinds = ["CT" if int(name[1:]) % 10 else "US" for name in groups]
    splits = audit.split_by_group(groups, stratify=kinds)
    table = Counter(zip(splits, kinds, strict=True))
    for split, share in zip(SPLITS, (0.8, 0.1, 0.1), strict=True):
        for kind in ("CT", "US"):
            assert table[split, kind] / kinds.count(kind) == pytest.approx(share, abs=0.02)
    assert splits == audit.split_by_group(groups, stratify=kinds)
    assert splits != audit.split_by_group(groups, stratify=kinds, seed=1)

    # held out are groups of every size, not just the small ones
    held_out = {group for group, split in zip(groups, splits, strict=True) if split != "train"}
    assert len({groups.count(group) for group in held_out}) == 5
    for bad in ((0, 0, 0), (-1, 1), (1, 1, 1, 1)):
        with pytest.raises(ValueError, match="shares"):
            audit.split_by_group(groups, shares=bad)
