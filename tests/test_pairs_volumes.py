"""Volumes come into the radiologist's view, whole and in order, and keep their millimetres; what is
not a whole volume is named in one line.
"""

import gzip
import itertools

import nibabel
import numpy as np
import pytest
from dicom_files import data_set, saved
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from pair_sources import refused, write_table
from pydicom import dcmread
from volume_files import values, write_nifti, write_series

from medtune.pairs import load_pairs, read_frames, series_files

# What shows -1000 as black and 1000 as white, in steps of less than 8.
WIDE = (0, 2000)
# Columns, rows and slices of a radiologist's view lead there, by plane.
VIEWS = {"axial": "LPS", "coronal": "LIP", "sagittal": "PIR"}
# Where the header of a NIfTI file says what (nifti1.h).
XYZT_UNITS, PIXDIM, QFORM_CODE, SFORM_CODE, SROW = 123, 76, 252, 254, 280
ORDERS = st.permutations([("L", "R"), ("A", "P"), ("S", "I")])
ENDS = st.tuples(*[st.integers(0, 1)] * 3)


def shown(array: np.ndarray) -> np.ndarray:
    """The grey levels of values in the window WIDE, by the formula of the standard (PS3.3 C.11.2)."""
    centre, width = WIDE
    grey = ((array - (centre - 0.5)) / (width - 1) + 0.5) * 255
    return np.round(grey).clip(0, 255).astype(np.uint8)


def with_bytes(file, changes):
    """Change bytes of a NIfTI file, by their place in the header: place -> bytes."""
    content = bytearray(file.read_bytes())
    for place, new in changes.items():
        content[place : place + len(new)] = new
    file.write_bytes(content)
    return file


def slab_of(source, count, **options):
    """The rows of a slab of the one volume in a source."""
    options = {"window": WIDE, "allow_empty_captions": True} | options
    return load_pairs(source, slab=count, **options)


def greys(rows) -> np.ndarray:
    """The pictures of the rows as (slices, rows, columns); they are grey."""
    pictures = np.stack([np.asarray(image) for image in rows["image"]])
    assert (pictures == pictures[..., :1]).all()
    return pictures[..., 0]


# --- geometry -------------------------------------------------------------------------------------


@given(ORDERS, ENDS, st.sampled_from(sorted(VIEWS)))
@settings(max_examples=30, deadline=None)
def test_a_nifti_of_any_orientation_is_shown_as_a_radiologist_wants_it(
    tmp_path_factory, order, ends, plane
):
    folder = tmp_path_factory.mktemp("nifti")
    stored = "".join(pair[end] for pair, end in zip(order, ends, strict=True))
    array = values()
    write_nifti(folder / "v.nii.gz", array, VIEWS[plane], stored, size=(0.7, 0.9, 4.0))
    rows = slab_of(folder, len(array))
    assert (greys(rows) == shown(array)).all()
    assert rows["plane"][:] == [plane] * len(array)
    # the millimetres go where their axes go: slices, rows, columns
    assert rows["spacing"][0] == pytest.approx([4.0, 0.9, 0.7], abs=1e-3)
    assert rows["slice"][:] == list(range(len(array)))


@given(ORDERS, ENDS)
@settings(max_examples=30, deadline=None)
def test_a_dicom_series_of_any_orientation_is_shown_as_the_same_nifti_is(
    tmp_path_factory, order, ends
):
    """nibabel turns what is written: the same volume as files of slices along its third axis."""
    folder = tmp_path_factory.mktemp("dicom")
    stored = "".join(pair[end] for pair, end in zip(order, ends, strict=True))
    file = write_nifti(folder / "v.nii", values(), "LPS", stored, size=(1.0, 1.0, 1.0))
    image = nibabel.load(file)
    array = np.asarray(image.dataobj).transpose(2, 1, 0)
    write_series(folder / "series", np.ascontiguousarray(array), affine=image.affine)

    rows = slab_of(folder / "series", len(array))
    plane = rows["plane"][0]
    turn = ornt_transform(io_orientation(image.affine), axcodes2ornt(tuple(VIEWS[plane])))
    assert turn[2, 0] == 2, "the slices are those that are stored"
    expected = np.asarray(image.as_reoriented(turn).dataobj).transpose(2, 1, 0)
    assert (greys(rows) == shown(expected)).all()


@given(st.floats(-0.3, 0.3), st.floats(-0.3, 0.3), st.floats(-0.3, 0.3))
@settings(max_examples=20, deadline=None)
def test_an_oblique_series_keeps_the_nearest_plane_and_its_own_order(tmp_path_factory, x, y, z):
    folder = tmp_path_factory.mktemp("oblique")
    turned = nibabel.eulerangles.euler2mat(z, y, x) @ np.diag([-0.8, -0.8, 3.0])
    affine = np.eye(4)
    affine[:3, :3] = turned
    array = values()
    files = write_series(folder, array, affine=affine)
    rows = slab_of(folder, len(array))
    assert (greys(rows) == shown(array)).all()
    assert rows["plane"][0] == "axial"
    assert rows["spacing"][0] == pytest.approx([3.0, 0.8, 0.8], abs=1e-3)
    # what the room says elsewhere about the order of a series
    assert series_files(folder) == [files]


@given(
    st.integers(1, 12),
    st.integers(1, 40),
    st.one_of(st.none(), st.floats(1.0, 30.0)),
    st.one_of(st.none(), st.integers(0, 39)),
)
@settings(max_examples=40, deadline=None)
def test_the_slices_of_a_slab_ascend_and_lie_as_far_apart_as_asked(
    tmp_path_factory, pictures, count, mm, middle
):
    folder = tmp_path_factory.mktemp("slab")
    write_nifti(folder / "v.nii", values(count, 2, 2), size=(0.5, 0.5, 1.5))
    table = [{"image": "v.nii", "caption": "x", "middle_slice": middle}]
    write_table(folder / "captions.json", table)
    options = {"slab_mm": mm, "window": WIDE}
    try:
        rows = load_pairs(folder, slab=pictures, **options)
    except ValueError as error:
        assert (
            pictures > count
            or mm is None
            or mm < 1.49
            or (middle or 0) >= count
            or ((pictures - 1) * mm / 1.5 > count - 1)
        ), error
        return
    numbers = rows["slice"][:]
    assert len(numbers) == pictures == len(set(numbers))
    assert numbers == sorted(numbers) and numbers[0] >= 0 and numbers[-1] < count
    assert rows["slices"][0] == numbers
    steps = np.diff(numbers)
    if mm is None:
        # spread evenly: no part of the volume is farther from a slice than another
        gaps = [*steps, 2 * numbers[0] + 1, 2 * (count - 1 - numbers[-1]) + 1]
        assert max(gaps) - min(gaps) <= 2
    else:
        assert (np.abs(steps - mm / 1.5) <= 1).all()
        if middle is not None and pictures % 2 and numbers[0] > 0 and numbers[-1] < count - 1:
            assert numbers[pictures // 2] == middle


def test_the_unit_of_a_nifti_is_read(tmp_path):
    metres = (0.0008, 0.0008, 0.003)
    file = write_nifti(tmp_path / "v.nii", values(), size=metres)
    with_bytes(file, {XYZT_UNITS: b"\1"})
    assert slab_of(tmp_path, 2)["spacing"][0] == pytest.approx([3.0, 0.8, 0.8])


def test_a_qform_alone_says_how_a_volume_lies(tmp_path):
    file = write_nifti(tmp_path / "v.nii", values(), stored="SRA")
    image = nibabel.load(file)
    image.set_qform(image.affine, 1)
    nibabel.save(image, tmp_path / "q.nii")
    file.unlink()
    with_bytes(tmp_path / "q.nii", {SFORM_CODE: bytes(2), SROW: bytes(48)})
    assert (greys(slab_of(tmp_path, 6)) == shown(values())).all()


# --- windows --------------------------------------------------------------------------------------


def test_three_windows_are_three_colours_of_dicom_and_nifti(tmp_path):
    three = ((-600, 1500), "mediastinum", (400, 1800))
    write_series(tmp_path / "dicom", values())
    write_nifti(tmp_path / "v.nii.gz", values())
    by_dicom = slab_of(tmp_path / "dicom", 3, window=three)["image"]
    by_nifti = slab_of(tmp_path / "v.nii.gz", 3, window=three)["image"]
    alone = [greys(slab_of(tmp_path / "dicom", 3, window=one)) for one in three]
    for number, (one, other) in enumerate(zip(by_dicom, by_nifti, strict=True)):
        expected = np.stack([window[number] for window in alone], axis=-1)
        assert (np.asarray(one) == expected).all() and (np.asarray(other) == expected).all()
    [frame] = read_frames(tmp_path / "dicom" / "004.dcm", window=three)
    assert len({band.tobytes() for band in frame.split()}) == 3


@pytest.mark.parametrize(
    "window", [("lung", "bone", "no such"), ("lung", "bone", None), ("lung", "bone", (40, 0))]
)
def test_a_wrong_window_of_three_is_named(tmp_path, window):
    write_series(tmp_path / "dicom", values())
    refused(ValueError, "window", tmp_path, slab=2, window=window, allow_empty_captions=True)


def test_all_slices_of_a_volume_are_shown_in_one_window(tmp_path):
    """Else a lesion that is the same on two slices would look different."""
    array = values()
    write_series(tmp_path / "mr", array, modality="MR")
    write_nifti(tmp_path / "v.nii.gz", array)
    for source in ("mr", "v.nii.gz"):
        rows = slab_of(tmp_path / source, 6, window=None)
        pictures = greys(rows).astype(int)
        # brighter from slice to slice, as the values are, and not each stretched to its own range
        means = pictures.mean(axis=(1, 2))
        assert (np.diff(means) > 5).all()


def test_values_that_are_no_numbers_are_dark(tmp_path):
    array = values().astype(np.float32)
    array[3, 2, 1] = np.nan
    write_nifti(tmp_path / "v.nii.gz", array)
    picture = greys(slab_of(tmp_path, 6))[3]
    assert picture[2, 1] == picture.min()


# --- tables, ids and groups -----------------------------------------------------------------------


def test_a_table_names_series_and_volumes(tmp_path):
    write_series(tmp_path / "first", values())
    write_nifti(tmp_path / "second.nii.gz", values())
    records = [
        {"image": "first", "caption": "A liver.", "patient_id": 7, "slice": 3},
        {"image": "second.nii.gz", "caption": "A lung.", "patient_id": 8, "slice": 3},
    ]
    rows = load_pairs(write_table(tmp_path / "t.csv", records), slab=3, slab_mm=6, window=WIDE)
    assert len(set(rows["id"])) == 6
    assert rows["caption"][:] == ["A liver."] * 3 + ["A lung."] * 3
    assert rows["slab"][:] == [rows["id"][0]] * 3 + [rows["id"][3]] * 3
    assert len(set(rows["group"])) == 2
    assert rows["slice"][:] == [1, 3, 5, 1, 3, 5], "the table's own column does not count"
    assert (greys(rows)[:3] == shown(values()[[1, 3, 5]])).all()
    assert "PID-4711" not in str(rows.to_dict()) and "Doe" not in str(rows.to_dict())


def test_two_questions_about_one_series_are_two_slabs(tmp_path):
    write_series(tmp_path / "series", values())
    records = [
        {"image": "series", "caption": "A liver.", "question": "What?", "middle_slice": 1},
        {"image": "series", "caption": "A lung.", "question": "What?", "middle_slice": 4},
    ]
    table = write_table(tmp_path / "t.jsonl", records)
    rows = load_pairs(table, slab=3, slab_mm=3, window=WIDE)
    assert len(set(rows["id"])) == 6 and len(set(rows["slab"])) == 2 == len({*rows["slab"]})
    assert rows["slices"][0] == [0, 1, 2] and rows["slices"][5] == [3, 4, 5]
    assert len(set(rows["group"])) == 1
    streamed = list(load_pairs(table, slab=3, slab_mm=3, window=WIDE, streaming=True))
    assert [row["id"] for row in streamed] == rows["id"][:]


def test_a_bad_volume_is_one_row_and_the_others_go_on(tmp_path):
    write_series(tmp_path / "good", values())
    (tmp_path / "bad.nii.gz").write_bytes(b"no gzip")
    records = [{"image": "bad.nii.gz", "caption": "x"}, {"image": "good", "caption": "y"}]
    rows = load_pairs(write_table(tmp_path / "t.csv", records), slab=2, window=WIDE, strict=False)
    assert len(rows) == 3
    assert "NIfTI volume is damaged" in rows["problem"][0]
    assert rows["problem"][1:] == [None, None]


# --- what is no whole volume ----------------------------------------------------------------------


def refused_series(folder, pattern, **options):
    said = refused(
        ValueError, pattern, folder, **({"slab": 3, "allow_empty_captions": True} | options)
    )
    assert "PID" not in said and "Doe" not in said
    return said


@pytest.mark.parametrize("number", range(1, 7))
def test_a_missing_slice_is_named_by_its_place(tmp_path, number):
    files = write_series(tmp_path, values(8))
    files[number].unlink()
    refused_series(
        tmp_path,
        f"slices {number} and {number + 1} of 7 lie 6 mm apart, others 3 mm: 1 missing",
    )


def test_a_doubled_slice_is_named_by_its_place(tmp_path):
    files = write_series(tmp_path, values())
    ds = dcmread(files[2])
    ds.InstanceNumber = 99
    saved(tmp_path, ds, "again.dcm")
    refused_series(tmp_path, "slices 3 and 4 of 7 lie at one place")


def test_mixed_series_are_counted(tmp_path):
    write_series(tmp_path / "a", values(), SeriesInstanceUID="1.2.3")
    write_series(tmp_path / "b", values(3), SeriesInstanceUID="1.2.4")
    # each in a folder of its own is what is wanted
    assert len(slab_of(tmp_path, 2)) == 4
    table = write_table(tmp_path / "t.csv", [{"image": ".", "caption": "x"}])
    refused(ValueError, r"2 DICOM series \(of 6, 3 slices\)", table, slab=2)


def test_a_series_of_two_sizes_is_named(tmp_path):
    files = write_series(tmp_path, values())
    ds = dcmread(files[4])
    ds.PixelSpacing = [1.6, 1.6]
    ds.save_as(files[4])
    refused_series(tmp_path, "slice 5 of 6 has pixels of another number or size")


def test_a_tilted_gantry_is_named_with_its_angle(tmp_path):
    # the table moves along the patient, the slices lean by 15 degrees
    lean = np.tan(np.radians(15)) * 3.0
    affine = np.diag([-0.8, -0.8, 3.0, 1.0])
    affine[1, 2] = lean
    write_series(tmp_path / "dicom", values(), affine=affine)
    refused_series(tmp_path / "dicom", r"shifted against each other, by 15 degrees \(gantry tilt\)")
    image = nibabel.Nifti1Image(values().transpose(2, 1, 0), affine)
    nibabel.save(image, tmp_path / "v.nii.gz")
    refused_series(tmp_path / "v.nii.gz", r"by 15 degrees \(gantry tilt\)")


@pytest.mark.parametrize(
    ("tag", "message"),
    [
        ("PixelSpacing", "says no spacing of its pixels"),
        ("ImagePositionPatient", "does not say where it lies"),
        ("ImageOrientationPatient", "does not say where it lies"),
    ],
)
def test_a_series_without_spacing_or_place_is_named(tmp_path, tag, message):
    files = write_series(tmp_path, values())
    for file in files:
        ds = dcmread(file)
        del ds[tag]
        ds.save_as(file)
    refused_series(tmp_path, message)


def test_a_nifti_without_spacing_or_orientation_is_named(tmp_path):
    file = tmp_path / "v.nii"
    write_nifti(file, values())
    no_place = {QFORM_CODE: bytes(2), SFORM_CODE: bytes(2)}
    refused_series(with_bytes(file, no_place), "neither sform nor qform")
    no_size = {PIXDIM + 4: bytes(12), QFORM_CODE: b"\1\0"}
    refused_series(with_bytes(file, no_size), "says no spacing")
    write_nifti(file, values())
    refused_series(with_bytes(file, {SROW: bytes(48)}), "says no spacing")


def test_other_nifti_files_are_named(tmp_path):
    film = nibabel.Nifti1Image(np.zeros((4, 4, 3, 5), np.int16), np.eye(4))
    nibabel.save(film, tmp_path / "v.nii.gz")
    refused_series(tmp_path / "v.nii.gz", "has the shape 4 x 4 x 3 x 5: give one volume")
    colours = np.zeros((4, 4, 3), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    nibabel.save(nibabel.Nifti1Image(colours, np.eye(4)), tmp_path / "v.nii.gz")
    refused_series(tmp_path / "v.nii.gz", "holds colours")


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_a_damaged_nifti_gives_one_line_or_a_slab(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    file = folder / "v.nii"
    write_nifti(file, values())
    content = bytearray(file.read_bytes())
    content[148:160] = b"Doe^Jane 471"  # descrip, where a name may stand
    for _ in range(data.draw(st.integers(1, 4))):
        # sizes, types and the affine stand in the head
        content[data.draw(st.integers(0, 347))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.sampled_from([len(content), 400, 100, 0]))]
    if data.draw(st.booleans()):
        file.unlink()
        file = folder / "v.nii.gz"
        zipped = gzip.compress(bytes(content))
        content = zipped[: data.draw(st.sampled_from([len(zipped), len(zipped) // 2]))]
    file.write_bytes(content)
    try:
        slab_of(file, 2)
    except ValueError as error:
        assert "\n" not in str(error) and "Jane" not in str(error)
        assert "NIfTI volume" in str(error) or "slices" in str(error)


def test_a_slice_that_was_cut_short_is_never_left_out_in_silence(tmp_path):
    """Wherever the last file ends: without it the others would look like a whole series."""
    files = write_series(tmp_path, values())
    whole = files[5].read_bytes()
    for length in range(132, len(whole), 19):
        files[5].write_bytes(whole[:length])
        refused_series(tmp_path, "DICOM", slab=6)


def test_what_is_no_volume_is_named(tmp_path):
    write_series(tmp_path / "series", values())
    refused_series(tmp_path / "series" / "001.dcm", "is one slice: give the folder")
    (tmp_path / "empty").mkdir()
    refused_series(tmp_path / "empty", "neither NIfTI files nor DICOM slices")
    frames = data_set(values(), ImagePositionPatient=[0, 0, 0], PixelSpacing=[1, 1])
    saved(tmp_path / "enhanced", frames)
    refused_series(tmp_path / "enhanced", "slice 1 of 1 holds 6 frames")
    refused_series(tmp_path / "series", "6 slices, fewer than slab=7", slab=7)
    refused_series(tmp_path / "series", "3 mm apart, so that slab_mm=1 would show", slab_mm=1)
    refused_series(tmp_path / "series", "volume of 15 mm is too short", slab_mm=9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slab": 0}, "slab=0 is not 1"),
        ({"slab_mm": 3.0}, "slab_mm=3 needs slab=N"),
        ({"slab": 2, "slab_mm": 0.0}, "no distance"),
        ({"slab": 2}, "no table of captions"),
        ({}, "give slab=N"),
    ],
)
def test_wrong_wishes_are_named(tmp_path, options, message):
    write_nifti(tmp_path / "v.nii.gz", values())
    refused(ValueError, message, tmp_path / "v.nii.gz", **options)


def test_shards_and_the_hub_hold_no_volumes(tmp_path, sample_path):
    refused(ValueError, "single pictures in shards", sample_path, slab=2)
    refused(ValueError, "not of a hub set", "nobody/nothing", slab=2)


# --- the real series ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_series(real):
    return real / "second_person" / "dicom"


def test_a_real_series_is_the_same_as_nifti_and_with_a_slice_missing_is_refused(
    real_series, tmp_path
):
    """Of 20 slices as a scanner wrote them."""
    [files] = series_files(real_series)
    rows = slab_of(real_series, 5, window="abdomen")
    assert rows["slice"][:] == [2, 6, 10, 14, 18]
    assert rows["plane"][0] == "axial"
    assert rows["spacing"][0] == pytest.approx([2, 0.9766, 0.9766], abs=1e-4)
    for number, picture in zip(rows["slice"], rows["image"], strict=True):
        [frame] = read_frames(files[number], window="abdomen")
        assert (np.asarray(picture) == np.asarray(frame)).all(), "it lies as it is stored already"

    heads = [dcmread(file) for file in files]
    hu = np.stack([ds.pixel_array * ds.RescaleSlope + ds.RescaleIntercept for ds in heads])
    write_nifti(
        tmp_path / "v.nii.gz",
        hu.astype(np.int16),
        stored="RAS",
        size=(0.9765625, 0.9765625, 2.0),
    )
    nifti = slab_of(tmp_path / "v.nii.gz", 5, window="abdomen")
    for one, other in itertools.zip_longest(rows["image"], nifti["image"]):
        assert (np.asarray(one) == np.asarray(other)).all()

    (tmp_path / "part").mkdir()
    for number, file in enumerate(files):
        if number != 7:
            (tmp_path / "part" / file.name).write_bytes(file.read_bytes())
    refused_series(tmp_path / "part", "slices 7 and 8 of 19 lie 4 mm apart, others 2 mm: 1 missing")


def test_the_liver_of_the_real_series_lies_on_the_left_of_the_picture(real, real_series):
    """Its mask says where: the patient's right is shown on the left, the back below."""
    mask = nibabel.load(real / "second_person" / "mask.nii.gz")
    names = (real / "second_person" / "structures.csv").read_text().splitlines()
    number_of = {line.split(",")[1]: int(line.split(",")[0]) for line in names[1:]}
    turned = mask.as_reoriented(
        ornt_transform(io_orientation(mask.affine), axcodes2ornt(("L", "P", "S")))
    )
    labels = np.asarray(turned.dataobj).transpose(2, 1, 0)
    pictures = greys(slab_of(real_series, 20, window=(-600, 1500)))
    assert pictures.shape == labels.shape
    columns = np.nonzero(labels == number_of["liver"])[2]
    assert columns.mean() < labels.shape[2] / 2
    # what the mask calls liver is soft tissue on the pictures, on every slice
    assert (pictures[labels == number_of["liver"]] > 150).mean() > 0.98
