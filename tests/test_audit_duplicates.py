"""Duplicates: the same file, the same pixels, nearly the same picture, the same words."""

import io
import itertools
import json

import datasets
import imagehash
import pytest
from look_alikes import CHANGES, encode, make_dataset, scan, trimmed
from PIL import Image, ImageDraw

from medtune import audit
from medtune.pairs import load_pairs


def found_pairs(dataset, **options) -> set[tuple[int, int]]:
    return {(i, j) for i, j, _ in audit.near_duplicates(dataset, **options)}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_pictures_are_found_and_others_are_not(change):
    originals = [scan(seed) for seed in range(25)]
    changed = [CHANGES[change](image) for image in originals]
    found = found_pairs(make_dataset([*originals, *changed]))
    right = {(i, i + 25) for i in range(25)}
    assert found <= right  # precision 1
    assert len(found) >= 24


@pytest.mark.parametrize("change", CHANGES)
def test_changed_x_rays_are_found(change, real):
    cells = load_pairs(real / "cxr.parquet").cast_column("image", datasets.Image(decode=False))
    originals = [cell["bytes"] for cell in cells["image"]]
    changed = []
    for data in originals:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        changed.append(CHANGES[change](image))
    right = {(i, i + len(originals)) for i in range(len(originals))}
    found = found_pairs(make_dataset([*originals, *changed]))
    assert len(found & right) / len(right) >= 0.95


def test_patients_are_no_duplicates_of_each_other(real):
    rows = load_pairs(real / "cxr.parquet")
    assert audit.near_duplicates(rows) == []
    group = {}
    for line in (real / "cxr_meta.jsonl").read_text().splitlines():
        meta = json.loads(line)
        group[meta["id"]] = meta["split_group"]
    groups = [group[name] for name in rows["id"]]
    loose = audit.near_duplicates(rows, max_distance=59)
    # only follow-up films of one patient are nearer
    assert loose and all(groups[i] == groups[j] for i, j, _ in loose)


def test_one_template_does_not_make_pictures_alike():
    """Same surround, lettering and box round other contents: a 64-bit hash calls them alike."""
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
    short_hashes = [imagehash.phash(picture) for picture in pictures]
    alike = [a - b <= 10 for a, b in itertools.combinations(short_hashes, 2)]
    assert sum(alike) > 5
    assert audit.near_duplicates(make_dataset(pictures)) == []


def test_large_sets_take_the_index_and_small_ones_agree():
    originals = [encode(scan(seed, (64, 64)), quality=95) for seed in range(520)]
    changed = [encode(scan(seed, (64, 64)), quality=60) for seed in range(40)]
    marks = audit.fingerprint(make_dataset([*originals, *changed]))
    pairs = audit.near_duplicates([], fingerprints=marks)
    assert {(i, j) for i, j, _ in pairs} == {(i, 520 + i) for i in range(40)}

    part = [*range(40), *range(520, 560)]
    digests = [marks.digests[row] for row in part]
    few = audit.Fingerprints(digests, marks.hashes[part], marks.features[part], [])
    small = audit.near_duplicates([], fingerprints=few)
    assert [(i, j - 40, d) for i, j, d in small] == [(i, j - 520, d) for i, j, d in pairs]


def test_distance_is_symmetric_and_order_free():
    first = scan(0)
    images = [first, trimmed(first, 0.02, 0.02, 0.02, 0.02), scan(1), CHANGES["brighter"](first)]
    forward = audit.near_duplicates(make_dataset(images))
    backward = audit.near_duplicates(make_dataset(images[::-1]))
    assert forward == sorted((3 - j, 3 - i, d) for i, j, d in backward)
    assert {(i, j) for i, j, _ in forward} == {(0, 1), (0, 3), (1, 3)}


def test_many_copies_of_one_file_stay_linear_and_still_leak():
    dataset = make_dataset([scan(0)] * 200 + [scan(1)])
    pairs = audit.near_duplicates(dataset)
    assert [(i, j) for i, j, _ in pairs] == [(0, j) for j in range(1, 200)]

    few = audit.near_duplicates(make_dataset([scan(0)] * 4))
    assert [(i, j) for i, j, _ in few] == [*itertools.combinations(range(4), 2)]

    splits = ["train"] * 199 + ["test"] * 2
    with pytest.raises(ValueError, match="the split leaks"):
        audit.audit_split(dataset, [str(i) for i in range(201)], splits)


def test_nothing_has_no_duplicates():
    assert audit.near_duplicates([]) == []


def test_exact_duplicates():
    picture = scan(0)
    png = encode(picture, "PNG")
    same_pixels = encode(picture, "PNG", compress_level=0)
    dataset = make_dataset([png, scan(1), same_pixels, png, encode(picture, "BMP"), b"broken"])
    assert audit.exact_duplicates(dataset) == [[0, 3]]
    assert audit.exact_duplicates(dataset, pixels=True) == [[0, 2, 3, 4]]
    nearly = make_dataset([encode(picture), encode(picture, quality=89)])
    assert audit.exact_duplicates(nearly, pixels=True) == []
