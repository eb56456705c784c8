"""DICOM as pictures: windows, polarity, frames, overlays, compressed pixels, and nothing of the patient."""

import hashlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, JPEGLSLossless, generate_uid

from medtune import dicom

REAL = Path(__file__).parents[2] / "shared" / "real" / "dicom"
SECRET = "Doe^Jane"


def make(path: Path, pixels: np.ndarray, **tags) -> Path:
    """A small CT file with a patient's name in it; `pixels` are (rows, columns) or (frames, rows, columns)."""
    file = Dataset()
    file.file_meta = FileMetaDataset()
    file.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file.file_meta.MediaStorageSOPClassUID = file.SOPClassUID = CTImageStorage
    file.file_meta.MediaStorageSOPInstanceUID = file.SOPInstanceUID = generate_uid()
    file.PatientName, file.PatientID, file.PatientBirthDate, file.Modality = SECRET, "MRN-4711", "19700101", "CT"
    file.StudyInstanceUID, file.SeriesInstanceUID = "1.2.3", "1.2.3.4"
    file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
    file.Rows, file.Columns = pixels.shape[-2:]
    if pixels.ndim == 3:
        file.NumberOfFrames = len(pixels)
    bits = pixels.dtype.itemsize * 8
    file.BitsAllocated = file.BitsStored = bits
    file.HighBit, file.PixelRepresentation = bits - 1, int(pixels.dtype.kind == "i")
    file.PixelData = pixels.tobytes()
    for tag, value in tags.items():
        setattr(file, tag, value)
    file.save_as(path, enforce_file_format=True)
    return path


RAMP = np.arange(-1024, -1024 + 64 * 64, dtype=np.int16).reshape(64, 64)


def test_a_named_window_maps_hounsfield_units_to_grey(tmp_path):
    path = make(tmp_path / "a.dcm", RAMP + 1000, RescaleSlope=1, RescaleIntercept=-1000)
    (frame,) = dicom.read_frames(path, window="abdomen")
    grey = np.asarray(frame)[..., 0]
    assert frame.mode == "RGB" and (np.asarray(frame) == grey[..., None]).all()
    assert (grey[RAMP <= -160] == 0).all() and (grey[RAMP >= 240] == 255).all()
    assert abs(int(grey[RAMP == 40][0]) - 128) <= 1
    assert (np.diff(grey.ravel().astype(int)) >= 0).all()


@given(center=st.floats(-500, 1500), width=st.floats(2, 3000))
def test_any_window_is_a_clipped_line(tmp_path_factory, center, width):
    path = tmp_path_factory.getbasetemp() / "ramp.dcm"
    if not path.exists():
        make(path, RAMP)
    grey = np.asarray(dicom.read_frames(path, window=(center, width))[0])[..., 0]
    expected = np.clip((RAMP - (center - width / 2)) / width, 0, 1) * 255
    assert np.abs(grey - expected).max() <= 0.51


def test_the_files_own_window_is_the_default(tmp_path):
    path = make(tmp_path / "a.dcm", RAMP, WindowCenter=[40, -600], WindowWidth=[400, 1500])
    assert dicom.read_frames(path)[0].tobytes() == dicom.read_frames(path, window=(40, 400))[0].tobytes()


def test_monochrome1_is_turned(tmp_path):
    one = dicom.read_frames(make(tmp_path / "a.dcm", RAMP, PhotometricInterpretation="MONOCHROME1"))[0]
    two = dicom.read_frames(make(tmp_path / "b.dcm", RAMP))[0]
    assert (np.asarray(one).astype(int) + np.asarray(two) == 255).all()


def test_every_frame_comes_in_order(tmp_path):
    frames = np.stack([np.full((8, 8), value, np.uint8) for value in (0, 100, 200)])
    read = dicom.read_frames(make(tmp_path / "a.dcm", frames), window=(100, 200))
    assert [int(np.asarray(frame)[0, 0, 0]) for frame in read] == [0, 128, 255]


def test_an_overlay_is_drawn_where_it_lies(tmp_path):
    marked = np.zeros((16, 16), np.uint8)
    marked[4:6, 8:10] = 1
    path = make(tmp_path / "a.dcm", np.zeros((16, 16), np.uint8))
    file = pydicom.dcmread(path)
    for element, kind, value in ((0x10, "US", 16), (0x11, "US", 16), (0x40, "CS", "G"), (0x50, "SS", [1, 1])):
        file.add_new((0x6000, element), kind, value)
    file.add_new((0x6000, 0x0100), "US", 1)
    file.add_new((0x6000, 0x0102), "US", 0)
    file.add_new((0x6000, 0x3000), "OB", np.packbits(marked, bitorder="little").tobytes())
    file.save_as(path)
    plain, drawn = dicom.read_frames(path)[0], dicom.read_frames(path, overlays=True)[0]
    assert ((np.asarray(drawn) == (255, 255, 0)).all(-1) == (marked == 1)).all()
    assert not np.asarray(plain).any()


def test_jpeg_ls_is_decoded_without_loss(tmp_path):
    path = make(tmp_path / "a.dcm", RAMP)
    file = pydicom.dcmread(path)
    file.compress(JPEGLSLossless, encoding_plugin="pyjpegls")
    file.save_as(tmp_path / "b.dcm")
    pair = [dicom.read_frames(tmp_path / name, window="lung")[0].tobytes() for name in ("a.dcm", "b.dcm")]
    assert pair[0] == pair[1]


@pytest.mark.parametrize("name", ["examples_palette.dcm", "examples_rgb_color.dcm", "examples_ybr_color.dcm"])
def test_colour_files_become_rgb(name):
    frames = dicom.read_frames(get_testdata_file(name, download=False))
    pixels = np.asarray(frames[0])
    assert frames[0].mode == "RGB" and pixels.max() > 100
    assert (np.ptp(pixels.astype(int), axis=-1) > 20).any(), "no colour left"


def test_a_series_is_sorted_along_the_scan(tmp_path):
    for number, z in ((1, 30.0), (2, 10.0), (3, 20.0)):
        pixels = np.full((4, 4), int(z), np.int16)
        place = {"ImagePositionPatient": [0, 0, z], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
        make(tmp_path / f"{number}.dcm", pixels, InstanceNumber=number, **place)
    make(tmp_path / "other.dcm", np.zeros((4, 4), np.int16), SeriesInstanceUID="9.9")
    (tmp_path / "notes.txt").write_text("not a picture")
    series = dicom.read_series(tmp_path, window=(20, 40))
    assert {name: len(frames) for name, frames in series.items()} == {"series-1": 3, "series-2": 1}
    values = [int(np.asarray(frame)[0, 0, 0]) for frame in series["series-1"]]
    assert values == sorted(values) and values[0] < values[-1]


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    outside = make(tmp_path / "outside.dcm", RAMP)
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "link.dcm").symlink_to(outside)
    with pytest.raises(FileNotFoundError, match="no DICOM picture"):
        dicom.read_series(tmp_path / "scans")


def test_the_description_identifies_nobody(tmp_path):
    path = make(tmp_path / "a.dcm", RAMP, BurnedInAnnotation="YES", PixelSpacing=[0.5, 0.5])
    safe = dicom.describe(path, salt="salt")
    assert safe["burned_in_annotation"] == "YES" and safe["pixel_spacing"] == [0.5, 0.5]
    text = repr(safe)
    assert not any(secret in text for secret in (SECRET, "Doe", "4711", "19700101", "1.2.3.4"))
    assert safe["group"] not in (hashlib.blake2b(b"MRN-4711", digest_size=8).hexdigest(), None)


def test_the_group_keeps_a_patient_together_under_one_salt_only(tmp_path):
    one, two = make(tmp_path / "a.dcm", RAMP), make(tmp_path / "b.dcm", RAMP, SeriesInstanceUID="5.6")
    other = make(tmp_path / "c.dcm", RAMP, PatientID="MRN-4712")
    group = [dicom.describe(path, salt="salt")["group"] for path in (one, two, other)]
    assert group[0] == group[1] != group[2] and group[0] != dicom.describe(one, salt="pepper")["group"]
    with pytest.raises(ValueError, match="needs a salt"):
        dicom.describe(one, salt="")


def test_bad_files_get_one_line_without_the_patient(tmp_path):
    good = make(tmp_path / "good.dcm", RAMP)
    report = pydicom.dcmread(good)
    del report.PixelData
    report.save_as(tmp_path / "report.dcm")
    (tmp_path / "cut.dcm").write_bytes(good.read_bytes()[:-3000])
    (tmp_path / "text.dcm").write_text("hello")
    (tmp_path / "empty.dcm").write_bytes(b"")
    for name, message in {
        "report": "no pixel data",
        "cut": "do not decode",
        "text": "no DICOM",
        "empty": "no DICOM",
    }.items():
        with pytest.raises(ValueError, match=message) as caught:
            dicom.read_frames(tmp_path / f"{name}.dcm")
        assert "\n" not in str(caught.value) and "Doe" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="no such DICOM file"):
        dicom.read_frames(tmp_path / "absent.dcm")
    with pytest.raises(ValueError, match="no window 'spleen'"):
        dicom.read_frames(good, window="spleen")


@pytest.mark.skipif(not REAL.is_dir(), reason="the real DICOM files are not here")
@pytest.mark.parametrize("path", sorted(REAL.glob("*.dcm")), ids=lambda path: path.stem)
def test_real_files(path):
    (frame,) = dicom.read_frames(path, overlays=True)
    assert frame.mode == "RGB" and np.asarray(frame).std() > 10
    safe, header = dicom.describe(path, salt="salt"), pydicom.dcmread(path, stop_before_pixels=True)
    assert (safe["rows"], safe["columns"]) == (header.Rows, header.Columns) == frame.size[::-1]
    assert not header.get("PatientID") or str(header.PatientID) not in repr(safe)
