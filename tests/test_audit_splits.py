"""Groups, and splits that cut none of them."""

import random
from collections import Counter

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
