"""Which files of a folder are pictures, in which order, and what is said about the others."""

import itertools
import logging
import os
import random
import re
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from dicom_files import data_set, saved
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import Dataset

from medtune import pairs
from medtune.pairs.files_of_pictures import find_pictures, open_pictures
from medtune.pairs.series import natural_key

SALT = "of this test"
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"


def ct_slice(number: int, **tags) -> Dataset:
    """A slice whose grey level tells its place."""
    ds = data_set(np.full((8, 8), 10 * number, np.int16), WindowCenter=128, WindowWidth=256)
    ds.SeriesInstanceUID = "1.2.3.4"
    ds.InstanceNumber = number
    ds.ImagePositionPatient = [0, 0, 2.5 * number]
    ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    for tag, value in tags.items():
        setattr(ds, tag, value)
    return ds


def without_picture(storage_class: str, modality: str) -> Dataset:
    ds = ct_slice(9, SOPClassUID=storage_class, Modality=modality)
    del ds.PixelData, ds.Rows, ds.Columns
    return ds


def names(files) -> list[str]:
    return [file.name for file in files]


def shown_order(folder: Path) -> list[int]:
    """Say which slices a folder gives, by their grey level."""
    levels = []
    for file in find_pictures(folder):
        for picture in open_pictures(file, None, SALT):
            with tempfile.SpooledTemporaryFile() as stream:
                stream.write(picture.cell["bytes"])
                stream.seek(0)
                levels.append(Image.open(stream).getpixel((0, 0))[0])
    return [round(level / 10) for level in levels]


def png(path: Path, level: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), level).save(path, "PNG")
    return path


# --- order ----------------------------------------------------------------------------------------


def test_plain_pictures_stand_in_the_order_of_people(tmp_path):
    wanted = ["a1.png", "a2.png", "A10.png", "b.png", "p1/9.png", "p1/10.png", "p10/1.png"]
    for name in random.Random(0).sample(wanted, len(wanted)):
        png(tmp_path / name)
    found = [str(file.relative_to(tmp_path)) for file in find_pictures(tmp_path)]
    assert found == wanted
    assert find_pictures(tmp_path).notice == ""


@settings(max_examples=25, deadline=None)
@given(
    places=st.permutations(range(1, 8)),
    kind=st.sampled_from(["IM{}", "IM{:03}.dcm", "1.2.840.113619.2.55.3.{}", "{}", "{}.img"]),
    numbers=st.permutations(range(1, 8)),
)
def test_slices_stand_by_position_whatever_they_are_called(places, kind, numbers):
    with tempfile.TemporaryDirectory() as folder:
        for name, place in enumerate(places):
            ds = ct_slice(place, InstanceNumber=numbers[name])
            saved(Path(folder), ds, kind.format(name + 1))
        assert shown_order(Path(folder)) == list(range(1, 8))
        assert len(pairs.series_files(folder)) == 1


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(1, 13)))
def test_without_a_position_numbers_and_then_names_decide(order):
    with tempfile.TemporaryDirectory() as folder:
        for name, place in enumerate(order, 1):
            ds = ct_slice(place)
            del ds.ImagePositionPatient
            saved(Path(folder) / "numbered", ds, f"IM{name}")
            ds = ct_slice(name)
            del ds.ImagePositionPatient, ds.InstanceNumber
            saved(Path(folder) / "named", ds, f"IM{name}")
        assert shown_order(Path(folder) / "numbered") == list(range(1, 13))
        assert shown_order(Path(folder) / "named") == list(range(1, 13))


@given(st.lists(st.from_regex(r"[A-Za-z0-9._ -]{1,8}", fullmatch=True), unique=True, max_size=9))
def test_the_natural_order_is_one_order_and_counts_numbers(some):
    in_order = sorted(map(Path, some), key=natural_key)
    assert sorted(reversed(in_order), key=natural_key) == in_order
    for one, other in itertools.pairwise(range(8, 13)):
        assert natural_key(Path(f"x{one}y")) < natural_key(Path(f"x{other}y"))


def test_series_and_orientations_are_not_mixed(tmp_path):
    for number in (1, 2, 3):
        saved(tmp_path, ct_slice(number), f"{2 * number}.dcm")
        saved(tmp_path, ct_slice(3 + number, SeriesInstanceUID="1.2.3.5"), f"{2 * number + 1}.dcm")
    scout = ct_slice(9, ImageOrientationPatient=[0, 1, 0, 0, 0, -1])
    saved(tmp_path, scout, "1.dcm")
    png(tmp_path / "0.png")
    found = names(find_pictures(tmp_path))
    assert found == ["0.png", "1.dcm", "2.dcm", "4.dcm", "6.dcm", "3.dcm", "5.dcm", "7.dcm"]


def test_last_digits_of_the_orientation_do_not_split_a_series(tmp_path):
    for number in range(1, 7):
        tilt = 0.7049 + 0.0001 * number  # on both sides of what rounds to 0.70 and 0.71
        directions = [1, 0, 0, 0, tilt, -((1 - tilt**2) ** 0.5)]
        ds = ct_slice(number, ImageOrientationPatient=[f"{value:.8f}" for value in directions])
        ds.ImagePositionPatient = [-250, -250, 3 * number]
        saved(tmp_path, ds, f"{7 - number}")
    [files] = pairs.series_files(tmp_path)
    assert names(files) == ["6", "5", "4", "3", "2", "1"]


def item_of(**tags) -> list[Dataset]:
    item = Dataset()
    for tag, value in tags.items():
        setattr(item, tag, value)
    return [item]


def test_enhanced_files_keep_their_place_in_groups(tmp_path):
    for name, place in enumerate([3, 1, 4, 2], 1):
        ds = ct_slice(place, InstanceNumber=name)
        position = item_of(ImagePositionPatient=[0, 0, 2.5 * place])
        directions = item_of(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
        del ds.ImagePositionPatient, ds.ImageOrientationPatient
        ds.PerFrameFunctionalGroupsSequence = item_of(PlanePositionSequence=position)
        ds.SharedFunctionalGroupsSequence = item_of(PlaneOrientationSequence=directions)
        saved(tmp_path, ds, f"IM{name}")
    assert shown_order(tmp_path) == [1, 2, 3, 4]


def test_a_series_that_lies_in_several_folders(tmp_path):
    for number in range(1, 13):
        saved(tmp_path / f"DIR{number % 3}", ct_slice(number), f"IM{number}")
    assert shown_order(tmp_path) == list(range(1, 13))


def test_coronal_slices_stand_along_their_own_normal(tmp_path):
    for name, place in enumerate([2, 3, 1], 1):
        ds = ct_slice(place, ImageOrientationPatient=[1, 0, 0, 0, 0, -1])
        ds.ImagePositionPatient = [-100, 2.5 * place, 200 - name]
        saved(tmp_path, ds, f"{name}.dcm")
    assert shown_order(tmp_path) == [1, 2, 3]


# --- which files ----------------------------------------------------------------------------------


def test_dicom_is_known_by_its_content(tmp_path):
    called = ["IM0001", "1.2.840.113619.2.55.3.604688119.2", "x.dcm", "x.png", "x.bak"]
    for number, name in enumerate(called, 1):
        saved(tmp_path, ct_slice(number), name)
    for name in ("notes.txt", "scan.nii.gz", ".DS_Store"):
        (tmp_path / name).write_text("no picture")
    assert names(find_pictures(tmp_path)) == called
    assert find_pictures(tmp_path).notice == "left out: 2 files of another kind"
    png(tmp_path / "real.dcm")
    [picture] = open_pictures(tmp_path / "real.dcm", None, SALT)
    assert picture.cell["path"] == str(tmp_path / "real.dcm")


OTHERS = {
    "1.2.840.10008.5.1.4.1.1.88.22": ("SR", "structured report"),
    "1.2.840.10008.5.1.4.1.1.88.67": ("SR", "radiation dose report"),
    "1.2.840.10008.1.3.10": ("OT", "DICOMDIR"),
    "1.2.840.10008.5.1.4.1.1.481.3": ("RTSTRUCT", "RT structure set"),
    "1.2.840.10008.5.1.4.1.1.104.1": ("DOC", "encapsulated PDF"),
    "1.2.840.10008.5.1.4.1.1.11.1": ("PR", "presentation state"),
}


def test_what_is_no_picture_is_left_out_and_counted_by_kind(tmp_path, caplog):
    for number in (1, 2):
        saved(tmp_path, ct_slice(number), f"{number}.dcm")
    for number, (storage_class, (modality, _)) in enumerate(OTHERS.items()):
        saved(tmp_path, without_picture(storage_class, modality), f"other{number}")
    second = without_picture("1.2.840.10008.5.1.4.1.1.88.11", "SR")
    saved(tmp_path, second, "other.dcm")
    mask = ct_slice(9, Modality="SEG", SOPClassUID="1.2.840.10008.5.1.4.1.1.66.4")
    saved(tmp_path, mask, "seg.dcm")
    with caplog.at_level(logging.WARNING, "medtune"):
        found = find_pictures(tmp_path)
    assert names(found) == ["1.dcm", "2.dcm"]
    wanted = {kind: 1 for _, kind in OTHERS.values()} | {"structured report": 2, "segmentation": 1}
    assert found.left_out == wanted
    assert caplog.messages == [found.notice]
    assert found.notice.startswith("left out: 2 structured reports, 1 DICOMDIR, ")
    assert [names(series) for series in pairs.series_files(tmp_path)] == [["1.dcm", "2.dcm"]]


def colour_capture(**tags) -> Dataset:
    ds = data_set(np.zeros((8, 8, 3), np.uint8), SOPClassUID=SECONDARY_CAPTURE)
    ds.SeriesInstanceUID = "1.2.3.4"
    for tag, value in tags.items():
        setattr(ds, tag, value)
    return ds


@pytest.mark.parametrize(
    ("page", "kind"),
    [
        (colour_capture(), "screenshot"),
        (colour_capture(ImageType=["DERIVED", "SECONDARY", "DOSE_INFO"]), "dose report page"),
        (ct_slice(9, SeriesDescription="Dose Report"), "dose report page"),
        (ct_slice(9, SeriesDescription="Patient Protocol"), "dose report page"),
        (ct_slice(9, ImageType=["DERIVED", "SECONDARY", "OTHER", "CT_SOM5 PROT"]), None),
        (ct_slice(9, SOPClassUID="1.2.840.10008.5.1.4.1.1.481.2", Modality="RTDOSE"), "RT dose"),
        (ct_slice(9, SOPClassUID=SECONDARY_CAPTURE, Modality="DOC"), "document page"),
    ],
)
def test_pages_are_no_slices_unless_there_is_nothing_else(tmp_path, page, kind):
    kind = kind or "dose report page"
    saved(tmp_path, page, "page.dcm")
    assert names(find_pictures(tmp_path)) == ["page.dcm"]
    for number in (1, 2):
        saved(tmp_path, ct_slice(number), f"{number}.dcm")
    found = find_pictures(tmp_path)
    assert names(found) == ["1.dcm", "2.dcm"]
    assert found.left_out == {kind: 1}


@pytest.mark.parametrize(
    "picture",
    [
        ct_slice(9, SeriesDescription="LOW DOSE THORAX", ImageType=["ORIGINAL", "PRIMARY"]),
        ct_slice(9, SOPClassUID=SECONDARY_CAPTURE, Modality="CR"),
        colour_capture(Modality="US"),
        colour_capture(Modality="ES"),
        colour_capture(Modality="OT"),
    ],
)
def test_pictures_that_only_look_like_pages_stay(tmp_path, picture):
    saved(tmp_path, ct_slice(1), "1.dcm")
    saved(tmp_path, picture, "2.dcm")
    assert sorted(names(find_pictures(tmp_path))) == ["1.dcm", "2.dcm"]
    assert find_pictures(tmp_path).left_out == {}


def test_an_odd_file_stops_nothing_and_is_not_lost(tmp_path):
    for number in (1, 2, 3):
        saved(tmp_path, ct_slice(number), f"{number}.dcm")
    content = (tmp_path / "2.dcm").read_bytes()
    (tmp_path / "cut.dcm").write_bytes(content[:200])
    (tmp_path / "page.dcm").write_text("<html>404 Not Found</html>")
    (tmp_path / "empty.dcm").touch()
    (tmp_path / "nifti.dcm").write_bytes(b"\x5c\x01\0\0" + bytes(400))
    found = find_pictures(tmp_path)
    assert sorted(names(found)) == sorted(names(tmp_path.iterdir()))
    assert shown_order_of_readable(found) == [1, 2, 3]
    rows = pairs.load_pairs(tmp_path, allow_empty_captions=True, strict=False, salt=SALT)
    problems = [problem for problem in rows["problem"] if problem]
    assert len(problems) == 4 and len(rows) == 7
    for name in ("cut", "page", "empty", "nifti"):
        assert any(f"{name}.dcm" in problem for problem in problems)
    with pytest.raises(ValueError, match=r"(cut|page|empty|nifti)\.dcm"):
        pairs.load_pairs(tmp_path, allow_empty_captions=True, strict=True, salt=SALT)


def shown_order_of_readable(files) -> list[int]:
    numbers = []
    for file in files:
        try:
            pairs.read_frames(file)
        except ValueError:
            continue
        numbers.append(int(file.stem))
    return numbers


WHOLE: dict[str, bytes] = {}


def whole(kind: str) -> bytes:
    """The content of a sound file; made once."""
    if not WHOLE:
        with tempfile.TemporaryDirectory() as folder:
            WHOLE["slice"] = saved(Path(folder), ct_slice(1)).read_bytes()
            report = without_picture("1.2.840.10008.5.1.4.1.1.88.22", "SR")
            WHOLE["report"] = saved(Path(folder), report).read_bytes()
            WHOLE["png"] = png(Path(folder, "a.png")).read_bytes()
    return WHOLE[kind]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_file_is_a_picture_or_counted_whatever_it_holds(data):
    endings = st.sampled_from(["", ".dcm", ".1", ".png", ".txt"])
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="error"):
        count = data.draw(st.integers(1, 5))
        for number in range(count):
            content = bytearray(whole(data.draw(st.sampled_from(["slice", "report", "png"]))))
            for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=4)):
                content[place] = data.draw(st.integers(0, 255))
            content = content[: data.draw(st.integers(0, len(content)))]
            Path(folder, f"{number}{data.draw(endings)}").write_bytes(content)
        found = find_pictures(Path(folder))
        assert len(found) + sum(found.left_out.values()) == count
        assert len(set(found)) == len(found)
        for file in found:
            try:
                list(open_pictures(file, None, SALT))
            except ValueError as error:
                assert file.name in str(error)
                assert "\n" not in str(error) and "Doe" not in str(error)


def test_hidden_files_are_counted(tmp_path):
    png(tmp_path / "1.png")
    (tmp_path / "._1.png").write_bytes(b"\0\x05\x16\x07" + bytes(100))
    found = find_pictures(tmp_path)
    assert names(found) == ["1.png"]
    assert found.notice == "left out: 1 hidden file"


@pytest.mark.skipif(os.geteuid() == 0, reason="everything may be read by root")
def test_a_file_without_permission_is_named_when_it_is_opened(tmp_path):
    path = saved(tmp_path, ct_slice(1), "1.dcm")
    path.chmod(0)
    assert names(find_pictures(tmp_path)) == ["1.dcm"]
    with pytest.raises(PermissionError):
        list(open_pictures(path, None, SALT))


# --- opening --------------------------------------------------------------------------------------


def test_ids_are_salted_hashes_of_the_content(tmp_path):
    one = png(tmp_path / "Jane Doe.png", 1)
    same = png(tmp_path / "copy.png", 1)
    other = png(tmp_path / "other.png", 2)

    def made_up(file: Path, salt: str = SALT) -> str:
        return next(open_pictures(file, None, salt)).made_up_id

    assert re.fullmatch("image-[0-9a-f]{16}", made_up(one))
    assert made_up(one) == made_up(same)
    assert len({made_up(one), made_up(other), made_up(one, "another")}) == 3
    frames = list(open_pictures(saved(tmp_path, cine(), "Jane.dcm"), None, SALT))
    assert len(frames) == 3
    assert len({frame.made_up_id for frame in frames}) == 1
    assert re.fullmatch("dicom-[0-9a-f]{16}", frames[0].made_up_id)
    rows = pairs.load_pairs(tmp_path / "Jane.dcm", allow_empty_captions=True, salt=SALT)
    base = frames[0].made_up_id
    assert rows["id"][:] == [base, f"{base}-2", f"{base}-3"]


def cine() -> Dataset:
    return data_set(np.arange(3 * 64, dtype=np.int16).reshape(3, 8, 8))


def flagged(flag: str | None) -> Dataset:
    ds = ct_slice(1)
    with warnings.catch_warnings(action="ignore"):
        ds.BurnedInAnnotation = flag
    return ds


@pytest.mark.parametrize(
    ("flag", "known"), [("YES", "YES"), ("no", "NO"), ("X", None), (None, None)]
)
def test_the_flag_for_text_in_the_pixels_is_a_column(tmp_path, flag, known):
    path = saved(tmp_path, flagged(flag))
    [picture] = open_pictures(path, None, SALT)
    assert picture.known == {"modality": "CT", "burned_in": known}
    # nothing is assumed of a screen that says nothing
    path = saved(tmp_path, colour_capture())
    assert next(open_pictures(path, None, SALT)).known["burned_in"] is None


def test_a_folder_that_a_table_names(tmp_path, caplog):
    for number in range(1, 13):
        saved(tmp_path / "volume", ct_slice(number), f"IM{number}")
    saved(tmp_path / "volume", without_picture("1.2.840.10008.5.1.4.1.1.88.22", "SR"), "report")
    outside = saved(tmp_path, ct_slice(99), "outside.dcm")
    (tmp_path / "volume" / "IM0").symlink_to(outside)
    levels = []
    with caplog.at_level(logging.WARNING, "medtune"):
        for picture in open_pictures(tmp_path / "volume", None, SALT):
            levels.append(picture.file.name)
    assert levels == [f"IM{number}" for number in range(1, 13)]
    assert any("1 structured report" in message for message in caplog.messages)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="folder empty holds no pictures"):
        list(open_pictures(tmp_path / "empty", None, SALT))
