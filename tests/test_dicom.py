"""DICOM files made with pydicom, and real ones where they are at hand, against pydicom's own figures."""

import io
import logging
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.sequence import Sequence
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

from medtune import dicom

REAL = Path(__file__).parents[2] / "shared" / "real" / "dicom"
real = pytest.mark.skipif(not REAL.is_dir(), reason="no real DICOM files in ../shared/real/dicom")
RAMP = np.arange(64 * 48, dtype=np.int16).reshape(64, 48) - 1024  # -1024 .. 2047


def data_set(array, *, photometric="MONOCHROME2", modality="CT", stored=None, **tags) -> Dataset:
    """A data set that holds an array (rows, columns), (frames, rows, columns) or (rows, columns, 3)."""
    array = np.asarray(array)
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = CTImageStorage
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    ds.StudyInstanceUID, ds.SeriesInstanceUID = generate_uid(), generate_uid()
    ds.PatientName, ds.PatientID, ds.Modality = "Doe^Jane", "PID-4711", modality
    colour = array.ndim == 3 and array.shape[-1] == 3
    ds.Rows, ds.Columns = array.shape[:2] if colour or array.ndim == 2 else array.shape[1:]
    if array.ndim == 3 and not colour:
        ds.NumberOfFrames = len(array)
    ds.SamplesPerPixel, ds.PhotometricInterpretation = (3, "RGB") if colour else (1, photometric)
    if colour:
        ds.PlanarConfiguration = 0
    ds.BitsAllocated = array.dtype.itemsize * 8
    ds.BitsStored = stored or ds.BitsAllocated
    ds.HighBit, ds.PixelRepresentation = ds.BitsStored - 1, int(array.dtype.kind == "i")
    ds.PixelData = array.tobytes()
    for tag, value in tags.items():
        setattr(ds, tag, value)
    return ds


def saved(tmp_path, ds, name="a.dcm") -> Path:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)
    return path


def grey(path, **options) -> np.ndarray:
    [image] = dicom.read_frames(path, **options)
    assert image.mode == "RGB"
    pixels = np.asarray(image)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def expected(ds) -> np.ndarray:
    """pydicom's own pipeline (as float, 0..255)."""
    values = apply_voi_lut(apply_modality_lut(ds.pixel_array, ds), ds).astype(float)
    low = -(2 ** (ds.BitsStored - 1)) if ds.PixelRepresentation else 0
    ends = low, low + 2**ds.BitsStored - 1
    low, high = (v * float(ds.get("RescaleSlope", 1)) + float(ds.get("RescaleIntercept", 0)) for v in ends)
    scaled = (values - low) / (high - low) * 255
    return 255 - scaled if ds.PhotometricInterpretation == "MONOCHROME1" else scaled


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_the_window_of_the_file_as_pydicom_applies_it(tmp_path, photometric, function):
    ds = data_set(RAMP, photometric=photometric, RescaleSlope=2, RescaleIntercept=-100)
    ds.WindowCenter, ds.WindowWidth, ds.VOILUTFunction = [100, 7], [900, 8], function
    assert np.abs(grey(saved(tmp_path, ds)) - expected(ds)).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("name", dicom.WINDOWS)
def test_a_named_window_maps_its_ends_to_black_and_white(tmp_path, name):
    centre, width = dicom.WINDOWS[name]
    ends = np.array([centre - width / 2 - 1, centre - 0.5, centre + width / 2 + 1]) + 1024
    path = saved(tmp_path, data_set(np.tile(ends.astype(np.int16), (8, 4)), RescaleSlope=1, RescaleIntercept=-1024))
    low, middle, high = grey(path, window=name)[0, :3]
    assert (low, high) == (0, 255) and abs(int(middle) - 128) <= 255 / width + 1


def test_a_window_of_ones_own_and_none_at_all(tmp_path):
    path = saved(tmp_path, data_set(RAMP, modality="MR"))
    own = grey(path, window=(0, 200))
    assert own.min() == 0 and own.max() == 255 and (own == 255).mean() > 0.6
    fitted = grey(path)
    assert fitted.min() == 0 and fitted.max() == 255 and len(np.unique(fitted)) > 250
    ct = saved(tmp_path, data_set(RAMP), "ct.dcm")
    assert (grey(ct) == grey(ct, window="abdomen")).all()


def test_padding_is_dark_and_does_not_bend_the_contrast(tmp_path):
    values = np.random.default_rng(0).integers(900, 1100, (64, 64)).astype(np.int16)
    values[:20] = 32000
    path = saved(tmp_path, data_set(values, modality="CR", photometric="MONOCHROME1", PixelPaddingValue=32000))
    shown = grey(path)
    assert (shown[:20] == shown[20:].min()).all() and shown[20:].max() == 255 and np.ptp(shown[20:]) > 240


def test_unused_bits_are_no_values_and_a_plane_kept_in_them_is_drawn(tmp_path):
    values = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)
    marked = values.copy()
    marked[10:20, 30:40] |= 1 << 15
    ds = data_set(marked, modality="MR", stored=12)
    ds.add_new((0x6000, 0x0010), "US", 64)
    ds.add_new((0x6000, 0x0011), "US", 64)
    ds.add_new((0x6000, 0x0102), "US", 15)
    plain = saved(tmp_path, data_set(values, modality="MR", stored=12), "plain.dcm")
    path = saved(tmp_path, ds)
    assert (grey(path) == grey(plain)).all()
    [drawn] = dicom.read_frames(path, overlays=True)
    yellow = (np.asarray(drawn) == (255, 255, 0)).all(-1)
    assert yellow[10:20, 30:40].all() and yellow.sum() == 100


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_a_voi_table_is_read_whatever_its_depth(tmp_path, bits):
    values = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    item = Dataset()
    item.LUTDescriptor = [4096, 0, bits]
    item.add_new("LUTData", "US", [int(i**2 / 4095**2 * (2**bits - 1)) for i in range(4096)])
    ds = data_set(values, modality="DX", stored=12, VOILUTSequence=Sequence([item]), WindowCenter=1, WindowWidth=2)
    assert np.abs(grey(saved(tmp_path, ds)) - (values / 4095.0) ** 2 * 255).max() <= 1.5


def test_overlay_planes_with_an_origin_outside(tmp_path):
    plane = np.zeros((64, 48), np.uint8)
    plane[5:9, 6:12] = 1
    ds = data_set(RAMP)
    for element, vr, value in ((0x10, "US", 64), (0x11, "US", 48), (0x40, "CS", "G"), (0x50, "SS", [-1, 3]),
                               (0x100, "US", 1), (0x102, "US", 0)):  # fmt: skip
        ds.add_new((0x6002, element), vr, value)
    ds.add_new((0x6002, 0x3000), "OW", np.packbits(plane.ravel(), bitorder="little").tobytes())
    path = saved(tmp_path, ds)
    [drawn] = dicom.read_frames(path, overlays=True)
    yellow = (np.asarray(drawn) == (255, 255, 0)).all(-1)
    assert yellow[3:7, 8:14].all() and yellow.sum() == 24
    assert (np.asarray(drawn)[~yellow] == np.asarray(dicom.read_frames(path)[0])[~yellow]).all()


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless, JPEG2000Lossless, JPEGLSLossless])
def test_frames_survive_every_lossless_compression(tmp_path, syntax):
    frames = np.stack([RAMP, RAMP[::-1], RAMP * 0 + 40])
    ds = data_set(frames, WindowCenter=40, WindowWidth=400)
    if syntax != ExplicitVRLittleEndian:
        ds.compress(syntax, generate_instance_uid=False)
    path = saved(tmp_path, ds)
    got = dicom.read_frames(path)
    one = grey(saved(tmp_path, data_set(RAMP, WindowCenter=40, WindowWidth=400), "one.dcm"))
    assert len(got) == 3
    assert (np.asarray(got[0])[..., 0] == one).all() and (np.asarray(got[1])[..., 0] == one[::-1]).all()
    assert dicom.describe(path, salt="s")["transfer_syntax"] == syntax.name


def test_colour_rgb_ybr_jpeg_and_palette(tmp_path):
    rng = np.random.default_rng(0)
    rgb = np.asarray(Image.fromarray(rng.integers(0, 255, (6, 8, 3), np.uint8)).resize((64, 48)))
    assert (np.asarray(dicom.read_frames(saved(tmp_path, data_set(rgb, modality="US")))[0]) == rgb).all()

    ybr = np.asarray(Image.fromarray(rgb).convert("YCbCr"))
    ds = data_set(ybr, modality="US")
    ds.PhotometricInterpretation = "YBR_FULL"
    assert np.abs(np.asarray(dicom.read_frames(saved(tmp_path, ds))[0]).astype(int) - rgb).max() <= 3

    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "JPEG", quality=95)
    ds = data_set(rgb, modality="US")
    ds.PhotometricInterpretation = "YBR_FULL_422"
    ds.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    ds.PixelData = pydicom.encaps.encapsulate([buffer.getvalue()])
    ds["PixelData"].is_undefined_length = True
    got = np.asarray(dicom.read_frames(saved(tmp_path, ds))[0]).astype(int)
    assert np.abs(got - np.asarray(Image.open(buffer).convert("RGB"))).mean() < 1

    index = np.arange(64 * 48, dtype=np.uint8).reshape(48, 64)
    tables = rng.integers(0, 2**16, (3, 256), np.uint16)
    ds = data_set(index, photometric="PALETTE COLOR", modality="NM")
    for name, table in zip(("Red", "Green", "Blue"), tables, strict=True):
        setattr(ds, f"{name}PaletteColorLookupTableDescriptor", [256, 0, 16])
        setattr(ds, f"{name}PaletteColorLookupTableData", table.tobytes())
    got = np.asarray(dicom.read_frames(saved(tmp_path, ds))[0])
    assert np.abs(got - tables[:, index].transpose(1, 2, 0) / 65535 * 255).max() <= 1
    with pytest.raises(ValueError, match="is no CT in grey"):
        dicom.read_frames(tmp_path / "a.dcm", window="lung")


def test_an_enhanced_file_windows_each_frame_by_its_own_group(tmp_path):
    ds = data_set(np.stack([RAMP, RAMP]))
    shared, groups = Dataset(), []
    for slope in (1, 3):
        scale, group = Dataset(), Dataset()
        scale.RescaleSlope, scale.RescaleIntercept, scale.RescaleType = slope, 10, "HU"
        group.PixelValueTransformationSequence = Sequence([scale])
        groups.append(group)
    view, measure = Dataset(), Dataset()
    view.WindowCenter, view.WindowWidth = 100, 500
    measure.PixelSpacing, measure.SliceThickness = [0.5, 0.7], 2
    shared.FrameVOILUTSequence, shared.PixelMeasuresSequence = Sequence([view]), Sequence([measure])
    ds.SharedFunctionalGroupsSequence, ds.PerFrameFunctionalGroupsSequence = Sequence([shared]), Sequence(groups)
    path = saved(tmp_path, ds)
    for frame, slope in zip(dicom.read_frames(path), (1, 3), strict=True):
        one = data_set(RAMP, RescaleSlope=slope, RescaleIntercept=10, WindowCenter=100, WindowWidth=500)
        assert (np.asarray(frame)[..., 0] == grey(saved(tmp_path, one, "one.dcm"))).all()
    assert dicom.describe(path, salt="s")["spacing"] == [0.5, 0.7]


def test_big_endian_floats_and_odd_bits(tmp_path):
    ds = data_set(RAMP, WindowCenter=40, WindowWidth=400)
    want = grey(saved(tmp_path, ds))
    ds.PixelData = RAMP.astype(">i2").tobytes()
    ds.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    path = tmp_path / "big.dcm"
    ds.save_as(path, implicit_vr=False, little_endian=False, enforce_file_format=True)
    assert (grey(path) == want).all()
    ds = data_set(np.zeros((64, 48), np.int32), modality="NM")
    del ds.PixelData, ds.BitsStored, ds.HighBit, ds.PixelRepresentation
    ds.FloatPixelData = np.linspace(0, 1, 64 * 48).astype(np.float32).tobytes()
    shown = grey(saved(tmp_path, ds, "float.dcm"))
    assert shown.max() <= 255  # small floats keep their order
    assert (np.diff(shown.ravel().astype(int)) >= 0).all() and np.ptp(shown) > 200


# ---- what goes wrong ------------------------------------------------------------------------------------------------


def refused(path, **options) -> str:
    with pytest.raises(ValueError) as caught:
        dicom.read_frames(path, **options)
    message = str(caught.value)
    assert "\n" not in message and "Doe" not in message and "4711" not in message
    if message.startswith("DICOM file"):
        assert caught.value.__suppress_context__ and caught.value.__cause__ is None  # a traceback would show those too
    return message


def test_each_kind_of_bad_file_has_its_own_line(tmp_path):
    text = tmp_path / "text.dcm"
    text.write_text("PatientName: Doe^Jane")
    assert "is not DICOM" in refused(text)
    text.write_bytes(b"")
    assert "is not DICOM" in refused(text)
    ds = data_set(RAMP)
    whole = saved(tmp_path, ds).read_bytes()
    del ds.PixelData
    assert "has no pixel data" in refused(saved(tmp_path, ds, "report.dcm"))
    short = tmp_path / "short.dcm"
    short.write_bytes(whole[:-1000])
    assert "is damaged or cut short" in refused(short)
    ds = data_set(RAMP)
    ds.Rows = ds.Columns = 65535
    assert "2^28 pixels" in refused(saved(tmp_path, ds, "bomb.dcm"))
    assert "choose one of brain" in refused(saved(tmp_path, data_set(RAMP)), window="heart")
    assert "is no CT in grey" in refused(saved(tmp_path, data_set(RAMP, modality="MR"), "mr.dcm"), window="bone")
    with pytest.raises(FileNotFoundError):
        dicom.read_frames(tmp_path / "none.dcm")
    with pytest.raises(OSError):
        dicom.read_frames(tmp_path)


def test_a_compression_without_a_decoder_says_what_to_install(tmp_path):
    """In a fresh interpreter where the GPL plugin cannot be imported, as on a user's machine."""
    ds = data_set(RAMP)
    ds.compress(JPEGLSLossless, generate_instance_uid=False)
    lossless = saved(tmp_path, ds, "jls.dcm")
    ds.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    unread = saved(tmp_path, ds, "lossless.dcm")
    code = (
        "import importlib.metadata as im, sys\n"
        "points = im.entry_points\n"
        "im.entry_points = lambda **k: [p for p in points(**k) if not p.value.startswith('libjpeg')]\n"
        "sys.modules['libjpeg'] = sys.modules['gdcm'] = None\n"
        "from medtune import dicom\n"
        f"print(len(dicom.read_frames({str(lossless)!r})))\n"
        f"try: dicom.read_frames({str(unread)!r})\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first == "1" and "JPEG Lossless" in second and "python-gdcm" in second and done.stderr == ""


WHOLE: list[bytes] = []


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_gives_a_picture_or_one_line(tmp_path, data):
    if not WHOLE:
        ds = data_set(RAMP, WindowCenter=40, WindowWidth=400)
        WHOLE.append(saved(tmp_path, ds).read_bytes())
        ds.compress(JPEG2000Lossless, generate_instance_uid=False)
        WHOLE.append(saved(tmp_path, ds).read_bytes())
    whole = bytearray(data.draw(st.sampled_from(WHOLE)))
    if data.draw(st.booleans()):
        whole = whole[: data.draw(st.integers(0, len(whole)))]
    for at in data.draw(st.lists(st.integers(0, max(len(whole) - 1, 0)), max_size=4)) if whole else []:
        whole[at] = data.draw(st.integers(0, 255))
    path = tmp_path / "hurt.dcm"
    path.write_bytes(whole)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for read in (dicom.read_frames, lambda p: dicom.describe(p, salt="s")):
            try:
                read(path)
            except ValueError as error:
                assert "\n" not in str(error) and "Doe" not in str(error) and "hurt.dcm" in str(error)


# ---- patient data ---------------------------------------------------------------------------------------------------


def test_nothing_that_names_a_patient_gets_out(tmp_path, caplog, capfd):
    ds = data_set(RAMP, BurnedInAnnotation="YES")
    for keyword in ("BodyPartExamined", "PatientName", "PatientID", "PatientBirthDate", "OtherPatientIDs", "StudyID",
                    "AccessionNumber",
                    "InstitutionName", "InstitutionAddress", "ReferringPhysicianName", "StudyDescription", "StudyDate",
                    "SeriesDescription", "DeviceSerialNumber", "PatientAddress", "ImageComments", "OperatorsName",
                    "StationName", "ProtocolName", "PatientComments", "AcquisitionDate"):  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            setattr(ds, keyword, "SECRET" if "Date" not in keyword else "19010203")
    ds.add_new((0x0009, 0x0010), "LO", "SECRET")
    ds.add_new((0x0009, 0x1001), "LO", "SECRET")
    path = saved(tmp_path, ds)
    caplog.clear()
    capfd.readouterr()
    with caplog.at_level(logging.DEBUG):
        about = dicom.describe(path, salt="pepper")
        dicom.read_frames(path, overlays=True)
    text = repr(about).lower() + caplog.text.lower() + "".join(capfd.readouterr()).lower()
    for hidden in ("secret", "19010203", str(ds.StudyInstanceUID), str(ds.SeriesInstanceUID), str(ds.SOPInstanceUID)):
        assert hidden not in text
    assert about["burned_in_annotation"] == "YES" and about["body_part"] is None and about["modality"] == "CT"


def test_the_group_follows_the_patient_and_the_salt(tmp_path):
    def group(salt="a", group_by="patient", **tags):
        return dicom.describe(saved(tmp_path, data_set(RAMP, **tags)), salt=salt, group_by=group_by)["group"]

    assert group() == group()  # two studies of one patient
    assert group() != group(salt="b") and group() != group(PatientID="PID-4712")
    assert group(group_by="study") != group(group_by="study")
    assert group(group_by="study", StudyInstanceUID="1.2") == group(PatientID="", StudyInstanceUID="1.2")
    assert group(PatientID=" PID-4711 ") == group()
    with pytest.raises(ValueError, match="salt"):
        dicom.describe(tmp_path / "a.dcm", salt="")


# ---- series ---------------------------------------------------------------------------------------------------------


def test_a_folder_becomes_series_in_the_order_of_their_slices(tmp_path):
    series, order = generate_uid(), [3, 0, 4, 1, 2]
    for name, z in enumerate(order):  # names and instance numbers lie about the order
        ds = data_set(np.full((16, 16), 100 * z, np.int16), SeriesInstanceUID=series, InstanceNumber=5 - name,
                      ImagePositionPatient=[0, 0, 2.5 * z], ImageOrientationPatient=[1, 0, 0, 0, 1, 0])  # fmt: skip
        saved(tmp_path, ds, f"one/{name}.dcm")
    for name, number in enumerate([2, 10, 1]):  # no geometry: instance number, as a number
        saved(tmp_path, data_set(RAMP, SeriesInstanceUID="1.9", InstanceNumber=number), f"two/{name}")
    scout = data_set(RAMP, SeriesInstanceUID=series, ImagePositionPatient=[0, 0, 0],
                     ImageOrientationPatient=[0, 1, 0, 0, 0, -1])  # fmt: skip
    saved(tmp_path, scout, "one/scout.dcm")
    (tmp_path / "one" / "notes.txt").write_text("no DICOM")
    (tmp_path / "empty").mkdir()
    outside = saved(tmp_path.parent / f"{tmp_path.name}-outside", data_set(RAMP))
    (tmp_path / "link.dcm").symlink_to(outside)
    files = dicom.series_files(tmp_path)
    slices = [f"{order.index(z)}.dcm" for z in range(5)]
    assert [[p.name for p in one] for one in files] == [slices, ["scout.dcm"], ["2", "0", "1"]]
    paths = dicom.series_files(tmp_path / "one")[0]
    pictures = [image for path in paths for image in dicom.read_frames(path, window=(200, 401))]
    levels = [np.asarray(image)[0, 0, 0] for image in pictures]
    assert levels == sorted(levels) and len(set(levels)) == 5
    with pytest.raises(ValueError, match="no DICOM pictures"):
        dicom.series_files(tmp_path / "empty")
    with pytest.raises(FileNotFoundError):
        dicom.series_files(tmp_path / "nowhere")


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(6)), st.tuples(*[st.floats(-1, 1)] * 4))
def test_slices_of_any_tilt_are_sorted_along_their_normal(order, turn):
    across = np.array([1, turn[0] * 0.3, turn[1] * 0.3])
    across /= np.linalg.norm(across)
    down = np.cross([turn[2] * 0.3, turn[3] * 0.3, 1], across)
    down /= np.linalg.norm(down)
    normal = np.cross(across, down)
    with tempfile.TemporaryDirectory() as folder:
        for name, step in enumerate(order):
            place, turned = ([f"{v:.6f}" for v in values] for values in (normal * step, (*across, *down)))
            ds = data_set(RAMP[:8, :8], SeriesInstanceUID="1.2")
            ds.ImagePositionPatient, ds.ImageOrientationPatient = place, turned
            saved(Path(folder), ds, f"{name}.dcm")
        [paths] = dicom.series_files(folder)
        assert [order[int(p.stem)] for p in paths] == list(range(6))


# ---- real files -----------------------------------------------------------------------------------------------------


@real
@pytest.mark.parametrize("name", ["cr_chest", "mr_brain", "mr_knee", "mr_liver_overlay"])
def test_real_files_with_a_window_match_pydicom(name):
    path = REAL / f"{name}.dcm"
    ds = pydicom.dcmread(path)
    got, want = grey(path).astype(float), expected(ds).clip(0, 255)
    kept = ds.pixel_array != ds.get("PixelPaddingValue", -99999)
    assert np.abs(got - want)[kept].max() <= 0.5 + 1e-6


@real
def test_real_ct_in_four_windows():
    shown = {name: grey(REAL / "ct_chest_ge.dcm", window=name) for name in ("brain", "lung", "abdomen", "bone")}
    assert shown["lung"][256, 120] > 40 > shown["abdomen"][256, 120]  # air in the lung is grey, then black
    assert (shown["bone"] == 255).mean() < (shown["abdomen"] == 255).mean() < (shown["brain"] == 255).mean()


@real
def test_real_overlay_marks_the_liver_lesion():
    path = REAL / "mr_liver_overlay.dcm"
    yellow = (np.asarray(dicom.read_frames(path, overlays=True)[0]) == (255, 255, 0)).all(-1)
    assert yellow.sum() == pydicom.dcmread(path).overlay_array(0x6000).sum() > 0
    assert yellow[230:280, 40:90].sum() > 40  # the ring around the lesion in the right lobe


@real
def test_real_files_describe_without_their_patients():
    for path in sorted(REAL.glob("*.dcm")):
        ds, about = pydicom.dcmread(path, stop_before_pixels=True), dicom.describe(path, salt="pepper")
        assert (about["modality"], about["rows"], about["columns"]) == (ds.Modality, ds.Rows, ds.Columns)
        assert str(ds.PatientID) not in map(str, about.values()) and len(about["group"]) == 16
        assert dicom.read_frames(path)[0].size == (ds.Columns, ds.Rows)
    assert len(dicom.series_files(REAL)) == 7
