"""Virtual people, findings that can be seen, and the CT of another person."""

import dataclasses
import sys
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from dicom_files import data_set, saved
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from medtune.captions import entities, parse_caption

REPO = Path(__file__).parents[1]
sys.path.insert(0, str(REPO / "data"))
import build_sample as builder  # noqa: E402
import ct as ct_reader  # noqa: E402
import findings  # noqa: E402
import people  # noqa: E402

SEEDS = st.integers(0, 10_000)
WINDOWS = st.sampled_from([window for window, _ in builder.WINDOWS.values()])


def ellipse(x0, y0, a, b):
    y, x = np.mgrid[:512, :512]
    return ((x - x0) / a) ** 2 + ((y - y0) / b) ** 2 <= 1


SPLEEN, LUNG = ellipse(330, 260, 70, 50), ellipse(180, 240, 60, 80)
HU = np.where(SPLEEN, 60, np.where(LUNG, -820, -100)).astype(np.int16)
MASK = (SPLEEN * 1 + LUNG * 2).astype(np.uint8)
NAMES = {1: "spleen", 2: "lung_lower_lobe_right"}


# ---- virtual people


def test_the_scanned_person_is_left_as_scanned():
    hu, mask = people.slice_of(people.scanned_person(), HU, MASK, 0.5)
    assert (hu == HU).all() and (mask == MASK).all()


@given(number=st.integers(1, 500), seed=SEEDS, height=st.floats(0, 1))
@settings(max_examples=25, deadline=None)
def test_the_mask_bends_with_the_voxels(number, seed, height):
    person = people.draw_person(number, seed)
    hu, mask = people.slice_of(person, HU, MASK, height)
    assert hu.dtype == np.float32 and hu.shape == mask.shape == (512, 512)
    assert set(np.unique(mask)) <= {0, 1, 2}
    for label, value in ((1, 60), (2, -820)):
        # away from the edges, which blur
        inner = ndimage.binary_erosion(mask == label, iterations=6)
        if inner.sum() > 500:
            assert hu[inner].mean() == pytest.approx(value + person.contrast[label], abs=3)


def test_a_number_is_one_person():
    again = people.draw_person(3, 0)
    first, other = people.draw_person(3, 0), people.draw_person(4, 0)
    assert (first.shifts == again.shifts).all() and first.zoom == again.zoom
    assert (first.shifts != other.shifts).all() and first.zoom != other.zoom
    same = people.slice_of(first, HU, MASK, 0.3), people.slice_of(again, HU, MASK, 0.3)
    assert (same[0][0] == same[1][0]).all()


def test_neighbouring_slices_of_a_person_are_bent_alike():
    """A person is one body: heights that are near each other have nearly the same shape."""
    person = dataclasses.replace(people.draw_person(5, 0), noise=0.0)
    masks = [people.slice_of(person, HU, MASK, height)[1] for height in (0.40, 0.41, 0.90)]

    def overlap(a, b):
        return ((a == 1) & (b == 1)).sum() / ((a == 1) | (b == 1)).sum()

    assert overlap(masks[0], masks[1]) > 0.95 > overlap(masks[0], masks[2])


def test_arms_lie_beside_the_body_and_change_nothing_in_it():
    body = np.where(ellipse(256, 256, 120, 90), 40, -1000).astype(np.int16)
    mask = np.zeros_like(body, dtype=np.uint8)
    plain = dataclasses.replace(people.draw_person(1, 0), noise=0.0, blur=0.0, zoom=0.8)
    without = people.slice_of(dataclasses.replace(plain, arms=False), body, mask, 0.5)[0]
    with_arms = people.slice_of(dataclasses.replace(plain, arms=True), body, mask, 0.5)[0]
    changed = with_arms != without
    assert changed.sum() > 1000 and not changed[without > 0].any()
    # two arms with a bone each
    _, count = ndimage.label(ndimage.binary_closing(with_arms > 700, iterations=8))
    assert count == 2


# ---- the curved plane


def ramp(slices=24, side=40):
    """A body whose HU are linear in all directions; its mask numbers the slices from 1."""
    z, y, x = np.mgrid[:slices, :side, :side]
    return (40 * z + 3 * y - 2 * x).astype(np.int16), (z + 1).astype(np.uint8)


BLOCKS = st.tuples(st.integers(0, 23), st.integers(0, 23)).map(sorted)


@given(st.integers(1, 500), SEEDS, BLOCKS, st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_the_curved_plane_stays_in_its_block_and_cuts_exactly(number, seed, block, where):
    first, last = block
    z = first + round(where * (last - first))
    volume, labels = ramp()
    person = people.draw_person(number, seed)
    hu, mask = people.curved_slice(person, volume, labels, z, (first, last))
    assert hu.dtype == np.float32 and hu.shape == mask.shape == volume.shape[1:]
    y, x = np.mgrid[:40, :40]
    # what is linear stays linear between two slices, so the HU tell the height
    height = (hu - 3 * y + 2 * x) / 40
    assert height.min() >= first - 1e-4 and height.max() <= last + 1e-4
    assert (np.abs(mask - 1.0 - height) <= 0.5 + 1e-4).all(), "the nearest slice's label"
    again = people.curved_slice(people.draw_person(number, seed), volume, labels, z, (first, last))
    assert (again[0] == hu).all() and (again[1] == mask).all()


@given(st.integers(0, 23), SEEDS)
@settings(max_examples=20, deadline=None)
def test_a_plane_that_does_not_rise_is_the_slice_itself(z, seed):
    volume, labels = ramp()
    drawn = people.draw_person(1, seed)
    flat = dataclasses.replace(drawn, rises=np.zeros_like(drawn.rises))
    for person, block in (
        (flat, (0, 23)),
        (flat, (z, 23)),
        (flat, (0, z)),
        (people.scanned_person(), (0, 23)),
        (dataclasses.replace(drawn, number=0), (0, 23)),
        # a block of one slice leaves no room
        (drawn, (z, z)),
    ):
        hu, mask = people.curved_slice(person, volume, labels, z, block)
        assert (hu == volume[z]).all() and (mask == labels[z]).all()


def test_the_plane_is_curved_and_smooth():
    volume, labels = ramp(slices=133, side=128)
    person = people.draw_person(2, 0)
    hu, _ = people.curved_slice(person, volume, labels, 60, (0, 132))
    y, x = np.mgrid[:128, :128]
    height = (hu - 3 * y + 2 * x) / 40
    assert np.ptp(height) > people.RISE, "several slices lie in one picture"
    steps = [np.abs(np.diff(height, axis=axis)).max() for axis in (0, 1)]
    assert max(steps) < 1, "no step in it is higher than a slice"
    next_hu, _ = people.curved_slice(person, volume, labels, 61, (0, 132))
    # a body has one shape: the next slice lies nearly one higher everywhere
    assert np.abs((next_hu - hu) / 40 - 1).max() < 1


def test_no_voxel_of_another_split_gets_into_a_picture(monkeypatch):
    """Each slice of this body has a value and a label of its own; a picture tells where it is from."""
    shape = (builder.SLICES, 64, 64)
    z = np.arange(builder.SLICES)[:, None, None]
    volume = np.broadcast_to(1000 + 200 * z, shape).astype(np.int16)
    labels = np.broadcast_to(z + 1, shape).astype(np.uint8)
    drawn = [people.scanned_person()]
    for number in range(1, builder.PEOPLE + builder.VALIDATION_PEOPLE + 1):
        person = people.draw_person(number, 0)
        # nothing that would hide the value, and bent for a picture an eighth as wide
        plain = {"noise": 0.0, "arms": False, "contrast": np.zeros(256)}
        plain["shifts"] = person.shifts / 8
        drawn.append(dataclasses.replace(person, **plain))
    scan = ct_reader.Scan(volume, labels, {}, 0.7, 2.5)
    source = builder.Source(scan, builder.course_levels(), drawn)
    monkeypatch.setattr(builder, "SOURCE", source, raising=False)
    mixed = 0
    for job in builder.jobs_of(source, 0, 3):
        cut = builder.drawn_slice(job, curved=True)
        seen = {int(label) - 1 for label in np.unique(cut.mask) if label}
        assert seen, job
        splits = {builder.split_of(slice_number) for slice_number in seen}
        assert splits == {builder.split_of(job.z)}, job
        # what lies outside of the body comes from nowhere, and blurs into its edge
        inner = ndimage.binary_erosion(cut.mask > 0, iterations=6)
        heights = (cut.hu[inner] - 1000) / 200
        first, last = builder.block_around(job.z)
        assert heights.min() >= first - 1e-3 and heights.max() <= last + 1e-3, job
        mixed += len(seen) > 1
        # slabs of neighbouring slices stay flat
        assert set(np.unique(builder.drawn_slice(job).mask)) <= {0, job.z + 1}
    assert mixed > 200, "or the test says nothing"


def test_a_block_ends_where_its_split_ends():
    for z in range(builder.SLICES):
        first, last = builder.block_around(z)
        assert first <= z <= last
        inside = {builder.split_of(other) for other in range(first, last + 1)}
        assert inside == {builder.split_of(z)}
        beyond = [other for other in (first - 1, last + 1) if 0 <= other < builder.SLICES]
        assert all(builder.split_of(other) != builder.split_of(z) for other in beyond)


# ---- what is drawn of whom


def tiny_source(**options):
    scan = ct_reader.Scan(
        hu=np.stack([HU] * builder.SLICES),
        mask=np.stack([MASK] * builder.SLICES),
        names=NAMES,
        mm_per_pixel=0.7,
        mm_per_slice=2.5,
    )
    return builder.Source(scan, builder.course_levels(), **options)


def test_virtual_people_are_of_training_slices_only():
    drawn = [people.scanned_person(), *(people.draw_person(n, 0) for n in range(1, 10))]
    source = tiny_source(people=drawn)
    jobs = builder.jobs_of(source, 0, 3)
    trained = {job.person for job in jobs if builder.split_of(job.z) == "train"}
    chosen_by = {job.person for job in jobs if builder.split_of(job.z) == "validation"}
    judged_by = {job.person for job in jobs if builder.split_of(job.z) == "test"}
    assert trained == set(range(1, 7)), "all of them, in turn"
    # who is chosen by was never trained on, and the scanned person is judged by
    assert chosen_by == {0, 7, 8, 9} and judged_by == {0}
    views = [(job.z, job.person, job.first_view) for job in jobs]
    assert len(views) == len(set(views))
    of_a_slice = [job for job in jobs if job.z == 60]
    assert len({job.person for job in of_a_slice}) == 3


def test_no_row_of_a_person_repeats_anothers_picture(monkeypatch):
    drawn = [people.scanned_person(), *(people.draw_person(n, 0) for n in range(1, 6))]
    monkeypatch.setattr(builder, "SOURCE", tiny_source(people=drawn), raising=False)
    jobs = [job for job in builder.jobs_of(builder.SOURCE, 0, 2) if job.z in (60, 44)]
    rows = [row for job in jobs for row in builder.make_rows(job)]
    assert len({row["id"] for row in rows}) == len(rows) > 12
    assert {row["person"] for row in rows} >= {"scanned", "virtual-01"}
    assert {row["split"] for row in rows} == {"train", "validation"}


# ---- findings


@given(seed=SEEDS, kind=st.sampled_from(["airy", "solid", "bone"]), window=WINDOWS)
@settings(max_examples=40, deadline=None)
def test_the_contrast_is_that_of_the_picture(seed, kind, window):
    """Measured on the shown pictures with and without the finding."""
    rng = np.random.default_rng(seed)
    part = {"airy": LUNG}.get(kind, SPLEEN)
    finding = findings.plan_finding(HU, part, kind, rng)
    said = findings.shown_contrast(HU, finding, window)
    center, width = window
    changed = findings.draw_finding(HU, finding, rng)
    place, cover = findings.cover_of(finding, HU.shape)
    shown = [
        np.clip((hu - center + width / 2) / width * 255, 0, 255)
        for hu in (HU[place], changed[place])
    ]
    seen = abs((shown[1] - shown[0])[cover == 1].mean())
    # its texture of 12 HU is cut off where the window ends
    assert seen == pytest.approx(said, abs=12 / width * 255)
    outside = np.ones(HU.shape, bool)
    outside[place] = cover == 0
    assert (changed[outside] == HU[outside]).all() and part[place][cover > 0].all()


def test_there_is_no_finding_without_room():
    rng = np.random.default_rng(0)
    assert findings.plan_finding(HU, ellipse(330, 260, 5, 5), "solid", rng) is None
    assert findings.plan_finding(HU, SPLEEN, "vessel", rng) is None


@given(SEEDS, st.sampled_from(["airy", "solid"]))
@settings(max_examples=20, deadline=None)
def test_a_vessel_is_long_and_stays_in_its_region(seed, kind):
    part = {"airy": LUNG, "solid": SPLEEN}[kind]
    changed = findings.draw_vessel(HU, part, kind, np.random.default_rng(seed))
    assert not (changed != HU)[~part].any() and changed.max() > HU[part].max()
    bone = findings.draw_vessel(HU, part, "bone", np.random.default_rng(seed))
    assert (bone == HU).all()


def judged_views(region_name, wanted):
    cut = builder.Slice(HU, MASK, NAMES, ("upper abdomen", "上腹部"), 0.7)
    regions = builder.find_regions(cut.mask, cut.names)
    (region,) = (r for r in regions if r["info"][0] == region_name)
    made = []
    for seed in range(wanted):
        view = builder.make_view(cut, region, np.random.default_rng(seed))
        if view:
            made.append(view)
    return made


@pytest.mark.parametrize("name", ["spleen", "right lower lobe of the lung"])
def test_neither_tissue_nor_window_tells_of_a_finding(name):
    """Half of those that could be seen are there, in each window, and no other is spoken of."""
    views = judged_views(name, 160)
    windows = {}
    for view in views:
        facts = view["facts"]
        windows.setdefault(facts["window"], []).append(facts)
        said = parse_caption(view["caption"])
        assert said.finding == facts["finding"] and said.size_mm is None
        assert (said.negated == ["lesion"]) == (facts["finding_judged"] and not facts["finding"])
        assert entities(view["caption"]) == entities(view["caption_zh"]), view["caption"]
        if facts["finding"]:
            assert facts["finding_judged"] and facts["finding_contrast"] >= builder.VISIBLE
            assert f"about {facts['finding_size']} as wide as the region" in view["caption"]
        if not facts["finding_judged"]:
            assert "lesion" not in view["caption"] and "病灶" not in view["caption_zh"]
    spoken = 0
    for shown in windows.values():
        judged = [facts["finding"] is not None for facts in shown if facts["finding_judged"]]
        spoken += len(judged)
        if len(judged) >= 20:
            # four standard errors of a fair coin
            assert abs(np.mean(judged) - 0.5) < 4 * 0.5 / np.sqrt(len(judged)), len(judged)
    assert spoken > 60


def test_a_dark_lesion_is_not_spoken_of_in_the_lung_window():
    views = judged_views("spleen", 120)
    lung = [view["facts"] for view in views if view["facts"]["window"] == "lung"]
    assert lung and not any(facts["finding_judged"] for facts in lung)


# ---- the CT of another person


def volume():
    rng = np.random.default_rng(0)
    hu = rng.integers(-1000, 1500, (6, 40, 48)).astype(np.int16)
    mask = np.zeros((6, 40, 48), np.uint8)
    mask[:, 10:20, 5:15], mask[:, 22:30, 20:30] = 1, 3
    return hu, mask


def write_structures(folder):
    path = folder / "structures.csv"
    path.write_text("id,structure\n1,spleen\n2,liver\n3,vertebrae_T12\n")
    return path


def write_nifti(path, array, axes, size=(0.8, 0.8, 3.0)):
    """Write an array of (slices, rows, columns) in the radiologist's view along other axes."""
    # (columns to the left, rows to the back, slices upwards) is L, P, S
    affine = np.diag([-size[0], -size[1], size[2], 1.0])
    image = nibabel.Nifti1Image(array.transpose(2, 1, 0), affine)
    here = nibabel.orientations.axcodes2ornt(("L", "P", "S"))
    wanted = nibabel.orientations.axcodes2ornt(axes)
    nibabel.save(image.as_reoriented(nibabel.orientations.ornt_transform(here, wanted)), path)


ORDERS = st.permutations([("L", "R"), ("A", "P"), ("S", "I")])


@given(ORDERS, st.tuples(*[st.integers(0, 1)] * 3), ORDERS, st.tuples(*[st.integers(0, 1)] * 3))
@settings(max_examples=20, deadline=None)
def test_a_nifti_comes_into_one_orientation(tmp_path_factory, order, ends, other, other_ends):
    folder = tmp_path_factory.mktemp("nifti")
    hu, mask = volume()
    axes = [pair[end] for pair, end in zip(order, ends, strict=True)]
    write_nifti(folder / "ct.nii.gz", hu, axes)
    axes = [pair[end] for pair, end in zip(other, other_ends, strict=True)]
    write_nifti(folder / "mask.nii.gz", mask, axes)
    structures = write_structures(folder)
    scan = ct_reader.read_scan(folder / "ct.nii.gz", folder / "mask.nii.gz", structures)
    assert (scan.hu == hu).all() and (scan.mask == mask).all()
    assert (scan.mm_per_pixel, scan.mm_per_slice) == (pytest.approx(0.8), pytest.approx(3.0))
    assert builder.levels_of(scan) == [1] * 6


def write_dicom(folder, hu, order):
    uid = pydicom.uid.generate_uid()
    for i, z in enumerate(order):
        ds = data_set(
            hu[z],
            SeriesInstanceUID=uid,
            RescaleSlope=1,
            RescaleIntercept=0,
            PixelSpacing=[0.8, 0.8],
            ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
            ImagePositionPatient=[0, 0, 3.0 * z],
        )
        saved(folder, ds, f"{i}.dcm")


def test_a_dicom_folder_comes_by_its_positions(tmp_path):
    hu, mask = volume()
    write_dicom(tmp_path / "ct", hu, [3, 0, 5, 2, 4, 1])
    write_nifti(tmp_path / "mask.nii.gz", mask, ("R", "A", "S"))
    structures = write_structures(tmp_path)
    scan = ct_reader.read_scan(tmp_path / "ct", tmp_path / "mask.nii.gz", structures)
    assert (scan.hu == hu).all() and (scan.mask == mask).all()
    assert (scan.mm_per_pixel, scan.mm_per_slice) == (0.8, 3.0)
    write_dicom(tmp_path / "gap", hu, [0, 1, 3, 4, 5])
    with pytest.raises(ValueError, match="slices are missing"):
        ct_reader.read_scan(tmp_path / "gap", tmp_path / "mask.nii.gz", structures)


def test_what_does_not_fit_is_said_in_one_line(tmp_path):
    hu, mask = volume()
    write_nifti(tmp_path / "ct.nii.gz", hu, ("R", "A", "S"))
    write_nifti(tmp_path / "mask.nii.gz", mask, ("R", "A", "S"))
    structures = write_structures(tmp_path)
    write_nifti(tmp_path / "short.nii.gz", mask[:4], ("R", "A", "S"))
    write_nifti(tmp_path / "small.nii.gz", mask, ("R", "A", "S"), (0.2, 0.2, 3.0))
    write_nifti(tmp_path / "strange.nii.gz", np.where(mask == 3, 9, mask), ("R", "A", "S"))
    (tmp_path / "text.nii.gz").write_text("no image")
    (tmp_path / "no-columns.csv").write_text("a,b\n1,2\n")
    for name, table, words in (
        ("short.nii.gz", structures, "not that of the CT"),
        ("small.nii.gz", structures, "mm away from the CT"),
        ("strange.nii.gz", structures, "label 9"),
        ("text.nii.gz", structures, "not a NIfTI file"),
        ("mask.nii.gz", tmp_path / "no-columns.csv", "columns id and structure"),
    ):
        with pytest.raises(ValueError, match=words) as raised:
            ct_reader.read_scan(tmp_path / "ct.nii.gz", tmp_path / name, table)
        assert "\n" not in str(raised.value) and str(tmp_path) in str(raised.value)


def test_another_size_of_pixels_keeps_the_middle_and_the_millimetres():
    scan = ct_reader.Scan(np.stack([HU]), np.stack([MASK]), NAMES, 0.9, 2.0)
    other = ct_reader.at_pixel_size(scan, 0.6, 512)
    assert other.hu.shape == (1, 512, 512) and other.mm_per_pixel == 0.6
    before = (scan.mask == 1).sum() * 0.9**2
    assert (other.mask == 1).sum() * 0.6**2 == pytest.approx(before, rel=0.02)
    inner = ndimage.binary_erosion(other.mask[0] == 1, iterations=3)
    assert (other.hu[0][inner] == 60).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--mask", "m.nii.gz"], "--mask needs --ct-folder"),
        (["--mm-per-pixel", "0.7"], "--mm-per-pixel is for another person"),
        (["--ct-folder", "a", "--mask", "b", "--people", "3"], "not allowed with"),
        (["--people", "0"], "1 or more"),
        (["--views", "0"], "1 or more"),
        (["--ct-folder", "a", "--mask", "b", "--mm-per-pixel", "-1"], "more than 0"),
    ],
)
def test_options_that_do_not_go_together(monkeypatch, capsys, options, words):
    monkeypatch.setattr(sys, "argv", ["build_sample.py", *options])
    with pytest.raises(SystemExit) as stopped:
        builder.main()
    assert stopped.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.slow
def test_the_second_person(real, tmp_path, monkeypatch):
    """Real DICOM slices of somebody else become a set to judge by, with the levels that they show."""
    folder = real / "second_person"
    if not folder.is_dir():
        pytest.skip("no CT of another person beside this clone")
    source = builder.another_source(
        folder / "dicom", folder / "mask.nii.gz", folder / "structures.csv"
    )
    scan = source.scan
    liver = [label for label, name in scan.names.items() if name == "liver"]
    assert scan.hu[np.isin(scan.mask, liver)].mean() == pytest.approx(89, abs=2)
    assert {builder.LEVELS[level][1] for level in source.levels} == {"upper abdomen"}
    monkeypatch.setattr(builder, "SOURCE", source, raising=False)
    jobs = builder.jobs_of(source, 0, 1)
    assert len(jobs) == 20
    rows = [row for job in jobs[::8] for row in builder.make_rows(job)]
    assert {row["split"] for row in rows} == {"test"}
    assert {row["group"] for row in rows} == {"another-person"}
    assert {"liver", "spleen", "vertebra", "aorta"} <= {row["structure"] for row in rows}
    for row in rows:
        assert entities(row["caption"]) == entities(row["caption_zh"])
