"""Duplicates, groups, splits, and the proof that a split does not leak."""

import io
import itertools
import json
import random
import weakref
from collections import Counter

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageEnhance

from medtune import audit
from medtune.data import load_pairs


def encode(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    image.save(buffer := io.BytesIO(), kind, **({"quality": 90} if kind == "JPEG" else {}) | options)
    return buffer.getvalue()


def scan(seed: int, size=(200, 160)) -> Image.Image:
    """A random picture with detail of every size, less of the fine, as in nature; as unlike another as two patients."""
    rng = np.random.default_rng(seed)
    total = np.zeros(size[::-1])
    for octave in range(6):
        noise = Image.fromarray(rng.normal(0, 1, (4 << octave, 5 << octave)).astype(np.float32))
        total += np.asarray(noise.resize(size, Image.Resampling.BICUBIC)) / 2**octave
    total = (total - total.min()) / np.ptp(total)
    return Image.fromarray((20 + 180 * total).astype(np.uint8))


def make(images: list, **columns) -> datasets.Dataset:
    cells = [{"bytes": i if isinstance(i, bytes) else encode(i), "path": None} for i in images]
    table = {"image": cells, "id": [f"id-{i}" for i in range(len(cells))], "caption": [""] * len(cells)} | columns
    return datasets.Dataset.from_dict(table).cast_column("image", datasets.Image())


def trimmed(image: Image.Image, left: float, top: float, right: float, bottom: float) -> Image.Image:
    w, h = image.size
    return image.crop((round(w * left), round(h * top), round(w * (1 - right)), round(h * (1 - bottom))))


def framed(image: Image.Image) -> Image.Image:
    image = image.convert("RGB")
    w, h = image.size
    ImageDraw.Draw(image).rectangle((w * 0.3, h * 0.3, w * 0.55, h * 0.5), outline=(0, 255, 0), width=max(1, w // 150))
    return image


CHANGES = {
    "as PNG": lambda i: encode(i, "PNG"),
    "JPEG quality 30": lambda i: encode(i, quality=30),
    "half the size": lambda i: i.resize((i.width // 2, i.height // 2)),
    "twice the size": lambda i: i.resize((i.width * 2, i.height * 2)),
    "made square": lambda i: i.resize((256, 256)),
    "brighter": lambda i: ImageEnhance.Brightness(i).enhance(1.2),
    "less contrast": lambda i: ImageEnhance.Contrast(i).enhance(0.8),
    "trimmed by 1%": lambda i: trimmed(i, 0.01, 0.01, 0.01, 0.01),
    "trimmed by 3%": lambda i: trimmed(i, 0.03, 0.03, 0.03, 0.03),
    "trimmed by 5%": lambda i: trimmed(i, 0.05, 0.05, 0.05, 0.05),
    "left side cut off": lambda i: trimmed(i, 0.03, 0, 0, 0),
    "bottom cut off": lambda i: trimmed(i, 0, 0, 0, 0.04),
    "corner cut off": lambda i: trimmed(i, 0.02, 0.02, 0, 0),
    "green frame drawn": framed,
}


def recall(originals: list, changed: list, **options) -> float:
    pairs = {(i, j) for i, j, _ in audit.near_duplicates(make([*originals, *changed]), **options)}
    return sum((i, i + len(originals)) in pairs for i in range(len(originals))) / len(originals)


# --- fingerprints and near-duplicates -----------------------------------------------------------------------------


@pytest.mark.parametrize("change", CHANGES)
def test_changed_pictures_are_found_and_others_are_not(change):
    originals = [scan(seed) for seed in range(25)]
    changed = [CHANGES[change](image) for image in originals]
    pairs = audit.near_duplicates(make([*originals, *changed]))
    right = {(i, i + 25) for i in range(25)}
    found = {(i, j) for i, j, _ in pairs}
    assert found <= right  # precision 1
    assert len(found) >= 24


@pytest.mark.parametrize("change", CHANGES)
def test_changed_x_rays_are_found(change, real):
    cells = load_pairs(real / "cxr.parquet").cast_column("image", datasets.Image(decode=False))
    originals = [cell["bytes"] for cell in cells["image"]]
    changed = [CHANGES[change](Image.open(io.BytesIO(data)).convert("RGB")) for data in originals]
    assert recall(originals, changed) >= 0.95


def test_patients_are_no_duplicates_of_each_other(real):
    rows = load_pairs(real / "cxr.parquet")
    assert audit.near_duplicates(rows) == []
    group = {}
    for line in (real / "cxr_meta.jsonl").read_text().splitlines():
        meta = json.loads(line)
        group[meta["id"]] = meta["split_group"]
    groups = [group[name] for name in rows["id"]]
    loose = audit.near_duplicates(rows, max_distance=59)
    assert loose and all(groups[i] == groups[j] for i, j, _ in loose)  # only follow-up films of one patient are nearer


def test_one_template_does_not_make_pictures_alike():
    """Same black surround, disc, lettering and green box round different contents: a 64-bit hash calls them alike."""
    import imagehash

    disc = Image.new("L", (256, 256))
    ImageDraw.Draw(disc).ellipse((58, 58, 198, 198), fill=255)
    pictures = []
    for seed in range(30):
        picture = Image.new("RGB", (256, 256))
        picture.paste(scan(seed, (256, 256)).convert("RGB"), (0, 0), disc)
        draw = ImageDraw.Draw(picture)
        draw.text((6, 6), "HOSPITAL  US 12", fill=(255, 255, 255), font_size=22)
        draw.rectangle((90, 90, 165, 165), outline=(0, 255, 0), width=4)
        draw.rectangle((0, 238, 255, 255), fill=(90, 90, 120))
        pictures.append(picture)
    hashes = [imagehash.phash(picture) for picture in pictures]
    assert sum(a - b <= 10 for a, b in itertools.combinations(hashes, 2)) > 5
    assert audit.near_duplicates(make(pictures)) == []


def naive_join(left, right, limit):
    views = len(audit.VIEWS)
    distance = np.bitwise_count(left[:, None] ^ right[None]).sum(-1)
    return {
        (int(i), int(j) // views, int(distance[i, j])) for i, j in np.argwhere(distance <= limit) if i != j // views
    }


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), limit=st.sampled_from([0, 7, 15, 20, 31, 47, 60]), n=st.sampled_from([3, 520]))
def test_index_finds_what_comparing_all_finds(seed, limit, n):
    rng = np.random.default_rng(seed)
    centres = rng.integers(0, 2**64, (40, 4), dtype=np.uint64)
    right = centres[rng.integers(0, 40, n * len(audit.VIEWS))]
    for _ in range(int(rng.integers(0, 40))):  # flip random bits, so that all distances around the limit occur
        rows = rng.integers(0, len(right), len(right) // 2)
        right[rows, rng.integers(0, 4, len(rows))] ^= np.uint64(1) << rng.integers(0, 64, len(rows), dtype=np.uint64)
    left = np.ascontiguousarray(right[:: len(audit.VIEWS)])
    i, j, distance = audit._join(left, right, limit)
    assert set(zip(i.tolist(), j.tolist(), distance.tolist(), strict=True)) == naive_join(left, right, limit)


def test_large_sets_take_the_index_and_small_ones_agree():
    originals = [encode(scan(seed, (64, 64)), quality=95) for seed in range(520)]
    changed = [encode(scan(seed, (64, 64)), quality=60) for seed in range(40)]
    marks = audit.fingerprint(make([*originals, *changed]))
    pairs = audit.near_duplicates([], fingerprints=marks)
    assert {(i, j) for i, j, _ in pairs} == {(i, 520 + i) for i in range(40)}
    part = [*range(40), *range(520, 560)]
    few = audit.Fingerprints([marks.digests[r] for r in part], marks.hashes[part], marks.features[part], [])
    assert [(i, j - 40, d) for i, j, d in audit.near_duplicates([], fingerprints=few)] == [
        (i, j - 520, d) for i, j, d in pairs
    ]


def test_distance_is_symmetric_and_order_free():
    images = [scan(0), trimmed(scan(0), 0.02, 0.02, 0.02, 0.02), scan(1), CHANGES["brighter"](scan(0))]
    forward = audit.near_duplicates(make(images))
    backward = audit.near_duplicates(make(images[::-1]))
    assert forward == sorted((3 - j, 3 - i, d) for i, j, d in backward)
    assert {(i, j) for i, j, _ in forward} == {(0, 1), (0, 3), (1, 3)}


def test_many_copies_of_one_file_stay_linear_and_still_leak():
    dataset = make([scan(0)] * 200 + [scan(1)])
    pairs = audit.near_duplicates(dataset)
    assert [(i, j) for i, j, _ in pairs] == [(0, j) for j in range(1, 200)]
    few = make([scan(0)] * 4)
    assert [(i, j) for i, j, _ in audit.near_duplicates(few)] == [*itertools.combinations(range(4), 2)]
    splits = ["train"] * 199 + ["test"] * 2
    with pytest.raises(ValueError, match="the split leaks"):
        audit.audit_split(dataset, [str(i) for i in range(201)], splits)


def test_unusual_and_broken_pictures():
    grey16 = Image.fromarray(np.asarray(scan(3), np.uint16) * 16)
    images = [scan(3), encode(grey16, "PNG"), encode(scan(3).convert("CMYK")), b"no picture", b"", scan(4)]
    marks = audit.fingerprint(make(images))
    assert marks.unreadable == [3, 4]
    assert marks.digests[3] is None and marks.hashes.shape == (6, len(audit.VIEWS), 4)
    assert {(i, j) for i, j, _ in audit.near_duplicates([], fingerprints=marks)} == {(0, 1), (0, 2), (1, 2)}
    turned = scan(5).rotate(90, expand=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert audit.near_duplicates(make([scan(5), encode(turned, exif=exif), turned]))[0][:2] == (0, 1)


def test_fingerprint_of_a_stream_holds_few_pictures_at_a_time():
    class Cell(dict):  # a dict that weak references can see
        __hash__ = object.__hash__

    alive, most = weakref.WeakSet(), 0
    data = encode(scan(0))

    def rows():
        nonlocal most
        for _ in range(300):
            cell = Cell(bytes=data, path=None)
            alive.add(cell)
            most = max(most, len(alive))
            yield {"image": cell}
            del cell

    marks = audit.fingerprint(rows(), workers=2)
    assert len(marks.digests) == 300 and most <= 50
    stream = make([scan(0), scan(1)]).to_iterable_dataset()
    assert np.array_equal(audit.fingerprint(stream).hashes, audit.fingerprint(make([scan(0), scan(1)])).hashes)
    assert audit.fingerprint([]).hashes.shape == (0, len(audit.VIEWS), 4)
    assert audit.near_duplicates([]) == []


def test_exact_duplicates():
    picture = scan(0)
    same_pixels = encode(picture, "PNG", compress_level=0)
    dataset = make(
        [encode(picture, "PNG"), scan(1), same_pixels, encode(picture, "PNG"), encode(picture, "BMP"), b"broken"]
    )
    assert audit.exact_duplicates(dataset) == [[0, 3]]
    assert audit.exact_duplicates(dataset, pixels=True) == [[0, 2, 3, 4]]
    assert audit.exact_duplicates(make([encode(picture), encode(picture, quality=89)]), pixels=True) == []


# --- groups and splits --------------------------------------------------------------------------------------------


def test_assign_groups():
    dataset = make([scan(i) for i in range(4)], id=["p1_a", "p1_b", "p2_a", "p3_a"], patient=["x", "y", "x", None])
    assert audit.assign_groups(dataset, id_pattern=r"^(p\d)_") == ["p1", "p1", "p2", "p3"]
    assert audit.assign_groups(dataset, id_pattern=r"^p\d") == ["p1", "p1", "p2", "p3"]
    assert audit.assign_groups(dataset, column="patient") == ["x", "y", "x", "row-3"]
    joined = audit.assign_groups(dataset, column="patient", pairs=[(1, 2, 0)])  # y is x after all
    assert joined == ["x", "x", "x", "row-3"]
    assert audit.assign_groups(dataset.rename_column("patient", "group")) == ["x", "y", "x", "row-3"]
    with pytest.raises(ValueError, match="no column 'doctor' .*image, id"):
        audit.assign_groups(dataset, column="doctor")
    with pytest.raises(ValueError, match=r"does not match 1 of 4 ids, first 'p3_a'"):
        audit.assign_groups(dataset, id_pattern="p[12]")
    with pytest.raises(ValueError, match="no regular expression"):
        audit.assign_groups(dataset, id_pattern="(")


def test_clusters_when_nothing_is_known():
    chain = [scan(0)]  # each like its neighbour, the ends unlike: one cluster all the same
    for _ in range(4):
        chain.append(trimmed(chain[-1], 0.04, 0, 0, 0))
    dataset = make([scan(1), *chain, scan(2), encode(scan(1), quality=40)])
    assert (1, 5) not in {(i, j) for i, j, _ in audit.near_duplicates(dataset)}
    groups = audit.assign_groups(dataset)
    assert groups == ["cluster-00000"] + ["cluster-00001"] * 5 + ["cluster-00006", "cluster-00000"]
    assert audit.audit_split(dataset, groups, audit.split_by_group(groups, shares=(2, 1, 1)))["groups_crossing"] == 0


shares = st.sampled_from([(0.8, 0.1, 0.1), (0.8, 0.2), (1, 1, 1), (0.5, 0, 0.5), (0.9, 0.05, 0.05), (1,)])


@given(
    data=st.data(), sizes=st.lists(st.integers(1, 30), min_size=1, max_size=40), shares=shares, seed=st.integers(0, 99)
)
@settings(max_examples=80, deadline=None)
def test_split_by_group(data, sizes, shares, seed):
    groups = [f"g{i}" for i, size in enumerate(sizes) for _ in range(size)]
    kinds = [("CT", "MR", None)[i % 3] for i, size in enumerate(sizes) for _ in range(size)]
    stratify = data.draw(st.sampled_from([None, kinds]))
    used = sum(share > 0 for share in shares)
    if len(sizes) < used:
        with pytest.raises(ValueError, match="give finer groups"):
            audit.split_by_group(groups, shares=shares, seed=seed)
        return
    splits = audit.split_by_group(groups, shares=shares, stratify=stratify, seed=seed)
    assert len({*zip(groups, splits, strict=True)}) == len(sizes)  # no group is cut
    count = Counter(splits)
    assert {*count} == {name for name, share in zip(audit.SPLITS, shares, strict=False) if share > 0}  # none is empty
    for name, share in zip(audit.SPLITS, shares, strict=False):
        assert abs(count[name] - share / sum(shares) * len(groups)) <= max(sizes) * (2 if stratify is None else 4)
    order = random.Random(seed).sample(range(len(groups)), len(groups))  # the order of the rows does not matter
    moved = [groups[i] for i in order], None if stratify is None else [stratify[i] for i in order]
    again = audit.split_by_group(moved[0], shares=shares, stratify=moved[1], seed=seed)
    assert again == [splits[i] for i in order]


def test_split_shares_strata_and_seeds():
    groups = [f"p{i:03d}" for i in range(300) for _ in range(1 + i % 5)]
    kinds = ["CT" if int(name[1:]) % 10 else "US" for name in groups]
    splits = audit.split_by_group(groups, stratify=kinds)
    table = Counter(zip(splits, kinds, strict=True))
    for split, share in zip(audit.SPLITS, (0.8, 0.1, 0.1), strict=True):
        for kind in ("CT", "US"):
            assert table[split, kind] / kinds.count(kind) == pytest.approx(share, abs=0.02)
    assert splits == audit.split_by_group(groups, stratify=kinds)
    assert splits != audit.split_by_group(groups, stratify=kinds, seed=1)
    held_out = {g for g, s in zip(groups, splits, strict=True) if s != "train"}
    assert len({groups.count(g) for g in held_out}) == 5  # held out are groups of every size, not just the small ones
    for bad in ((0, 0, 0), (-1, 1), (1, 1, 1, 1)):
        with pytest.raises(ValueError, match="shares"):
            audit.split_by_group(groups, shares=bad)


# --- the report ---------------------------------------------------------------------------------------------------


def patients(n: int = 12, films: int = 4) -> datasets.Dataset:
    """Patients whose films are near-duplicates of one another, each with the patient's caption."""
    images = [encode(scan(p), quality=q) for p in range(n) for q in range(60, 60 + films)]
    return make(images, caption=[f"Findings of {p}." for p in range(n) for _ in range(films)],
                patient=[f"p{p}" for p in range(n) for _ in range(films)])  # fmt: skip


def test_audit_passes_a_clean_split_and_shows_what_a_random_one_leaks():
    dataset = patients()
    groups = audit.assign_groups(dataset, column="patient")
    splits = audit.split_by_group(groups)
    report = audit.audit_split(dataset, groups, splits)
    clean = [report[f"{k}_crossing"] for k in ("groups", "near_duplicates", "exact_duplicates", "captions")]
    assert clean == [0, 0, 0, 0] and report["held_out_leaked"] == 0 and report["leaking_pairs"] == []
    assert sum(report["rows"].values()) == 48 and sum(report["groups"].values()) == 12
    assert report["near_duplicates"] == 12 * 6
    assert report["random_split"]["near_duplicates_crossing"] > 10
    assert report["random_split"]["held_out_leaked"] > 0.8
    assert json.dumps(report) == json.dumps(audit.audit_split(dataset, groups, splits))
    assert audit.assign_groups(dataset) == [f"cluster-{i // 4 * 4:05d}" for i in range(48)]  # found without the column


def test_audit_fails_closed():
    dataset = patients(4, 2)
    names = [str(i) for i in range(8)]
    clean = ["train"] * 4 + ["validation"] * 2 + ["test"] * 2
    assert audit.audit_split(dataset, names, clean)["groups_crossing"] == 0
    with pytest.raises(ValueError, match="1 groups and 0 near-duplicate pairs cross") as caught:
        audit.audit_split(dataset, ["a", *names[1:7], "a"], clean)
    assert "\n" not in str(caught.value)
    leaky = ["test", *clean[1:]]
    with pytest.raises(ValueError, match="0 groups and 1 near-duplicate pairs .* rows 0 and 1 at distance"):
        audit.audit_split(dataset, names, leaky)
    report = audit.audit_split(dataset, names, leaky, raise_on_leak=False)
    assert [pair[:2] for pair in report["leaking_pairs"]] == [(0, 1)]
    assert report["held_out_leaked"] == pytest.approx(1 / 5) and report["captions_crossing"] == 1
    gap = [None, *clean[1:]]  # a row in no split cannot leak
    assert audit.audit_split(dataset, names, gap)["rows"]["unassigned"] == 1
    broken = make([scan(0), b"broken", scan(1)])
    with pytest.raises(ValueError, match=r"1 pictures cannot be read.*row 1"):
        audit.audit_split(broken, ["a", "b", "c"], ["train", "train", "test"])
    with pytest.raises(ValueError, match="8 rows, 8 groups and 7 splits"):
        audit.audit_split(dataset, names, clean[:-1])


@pytest.mark.slow
def test_audit_of_the_sample(sample_path):
    """The blocks' gaps hold: no slice near a block is a near-duplicate of one beyond the gap."""
    dataset = load_pairs(sample_path)
    marks = audit.fingerprint(dataset)
    report = audit.audit_split(dataset, audit.assign_groups(dataset), dataset["split"], fingerprints=marks)
    assert report["near_duplicates"] > 1000 and report["held_out_leaked"] == 0
    assert report["random_split"]["near_duplicates_crossing"] > 100


# --- baselines ----------------------------------------------------------------------------------------------------


def test_caption_copier_lives_on_leaks():
    dataset = patients()
    captions = np.array(dataset["caption"])

    def score(splits):
        train, test = (np.flatnonzero([(s == "train") == side for s in splits]) for side in (True, False))
        copied = audit.nearest_caption_copier(dataset.select(train), dataset.select(test))
        return np.mean(np.array(copied) == captions[test])

    whole = audit.split_by_group(dataset["patient"])
    assert score(whole) == 0
    assert score(random.Random(0).sample(whole, len(whole))) > 0.9
    assert audit.most_frequent_caption({"caption": ["b", "a", "a", "b"]}) == "b"
    marks = audit.fingerprint(dataset)
    assert audit.nearest_caption_copier(dataset, dataset, fingerprints=(marks, marks)) == captions.tolist()
