"""DICOM files made with pydicom, and real ones where they are at hand, against pydicom itself."""

import contextlib
import io
import logging
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_files import data_set, saved
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

from medtune import pairs

REAL = Path(__file__).parents[2] / "shared" / "real" / "dicom"
real = pytest.mark.skipif(not REAL.is_dir(), reason="no real DICOM files in ../shared/real/dicom")
RAMP = np.arange(64 * 48, dtype=np.int16).reshape(64, 48) - 1024  # -1024 .. 2047
YELLOW = (255, 255, 0)


def pixels_of(path, **options) -> np.ndarray:
    """The only frame of a file, (rows, columns, 3)."""
    [image] = pairs.read_frames(path, **options)
    assert image.mode == "RGB"
    return np.asarray(image)


def grey(path, **options) -> np.ndarray:
    """The only frame of a grey file, (rows, columns)."""
    pixels = pixels_of(path, **options)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def expected(ds: Dataset) -> np.ndarray:
    """pydicom's own pipeline (as float, 0..255)."""
    values = apply_voi_lut(apply_modality_lut(ds.pixel_array, ds), ds).astype(float)
    # it maps onto the range of the stored bits after the rescale
    lowest = -(2 ** (ds.BitsStored - 1)) if ds.PixelRepresentation else 0
    highest = lowest + 2**ds.BitsStored - 1
    slope = float(ds.get("RescaleSlope", 1))
    intercept = float(ds.get("RescaleIntercept", 0))
    low = lowest * slope + intercept
    high = highest * slope + intercept
    scaled = (values - low) / (high - low) * 255
    return 255 - scaled if ds.PhotometricInterpretation == "MONOCHROME1" else scaled


# --- windows and tables ---------------------------------------------------------------------------


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_the_window_of_the_file_as_pydicom_applies_it(tmp_path, photometric, function):
    ds = data_set(RAMP, photometric=photometric, RescaleSlope=2, RescaleIntercept=-100)
    ds.WindowCenter = [100, 7]
    ds.WindowWidth = [900, 8]
    ds.VOILUTFunction = function
    difference = grey(saved(tmp_path, ds)) - expected(ds)
    assert np.abs(difference).max() <= 0.5 + 1e-6


WIDE = np.add.outer(np.arange(32), np.arange(32)).astype(np.int16) * 30 - 500


def linear(values, centre, width):
    """PS3.3 C.11.2.1.2.1, onto 0..255."""
    return (((values - (centre - 0.5)) / (width - 1) + 0.5) * 255).clip(0, 255)


def linear_exact(values, centre, width):
    """PS3.3 C.11.2.1.3.2."""
    return (((values - centre) / width + 0.5) * 255).clip(0, 255)


def sigmoid(values, centre, width):
    """PS3.3 C.11.2.1.3.1."""
    return 255 / (1 + np.exp(-4 * (values - centre) / width))


FORMULAS = {
    "two windows": (
        {"WindowCenter": [40, -600], "WindowWidth": [400, 1500]},
        linear(WIDE, 40, 400),
    ),
    "inverted": ({"PhotometricInterpretation": "MONOCHROME1"}, 255 - linear(WIDE, 40, 400)),
    "exact": ({"VOILUTFunction": "LINEAR_EXACT"}, linear_exact(WIDE, 40, 400)),
    "sigmoid": ({"VOILUTFunction": "SIGMOID"}, sigmoid(WIDE, 40, 400)),
    "an unknown function": ({"VOILUTFunction": "CUBIC"}, linear(WIDE, 40, 400)),
    "rescale": (
        {"RescaleSlope": 0.5, "RescaleIntercept": -100},
        linear(WIDE * 0.5 - 100, 40, 400),
    ),
    "width 0": ({"WindowWidth": 0}, linear(WIDE, 50, 400)),
    "width 1": ({"WindowWidth": 1}, np.where(WIDE <= 39, 0, 255)),
    "no photometric interpretation": ({"PhotometricInterpretation": None}, linear(WIDE, 40, 400)),
    "lower case": ({"PhotometricInterpretation": "monochrome2"}, linear(WIDE, 40, 400)),
}


@pytest.mark.parametrize("case", FORMULAS)
def test_grey_levels_follow_the_formulas_of_the_standard(tmp_path, case):
    tags, want = FORMULAS[case]
    ds = data_set(WIDE, WindowCenter=40, WindowWidth=400)
    with warnings.catch_warnings(action="ignore"):
        for tag, value in tags.items():
            setattr(ds, tag, value)
        path = saved(tmp_path, ds)
    assert np.abs(grey(path) - want).max() <= 0.51


def test_signed_values_of_12_bits_in_words_of_16(tmp_path):
    stored = (WIDE & 0x0FFF).astype(np.uint16)
    ds = data_set(stored, stored=12, WindowCenter=40, WindowWidth=400, PixelRepresentation=1)
    assert np.abs(grey(saved(tmp_path, ds)) - linear(WIDE, 40, 400)).max() <= 0.51


@pytest.mark.parametrize("name", pairs.WINDOWS)
def test_a_named_window_maps_its_ends_to_black_and_white(tmp_path, name):
    centre, width = pairs.WINDOWS[name]
    below = centre - width / 2 - 1
    above = centre + width / 2 + 1
    stored = np.array([below, centre - 0.5, above]) + 1024
    array = np.tile(stored.astype(np.int16), (8, 4))
    path = saved(tmp_path, data_set(array, RescaleSlope=1, RescaleIntercept=-1024))
    low, middle, high = grey(path, window=name)[0, :3]
    assert (low, high) == (0, 255)
    assert abs(int(middle) - 128) <= 255 / width + 1


def test_a_window_of_ones_own_and_none_at_all(tmp_path):
    path = saved(tmp_path, data_set(RAMP, modality="MR"))
    own = grey(path, window=(0, 200))
    assert (own.min(), own.max()) == (0, 255)
    assert (own == 255).mean() > 0.6
    fitted = grey(path)
    assert (fitted.min(), fitted.max()) == (0, 255)
    assert len(np.unique(fitted)) > 250
    ct = saved(tmp_path, data_set(RAMP), "ct.dcm")
    assert (grey(ct) == grey(ct, window="abdomen")).all()


def test_padding_is_dark_and_does_not_bend_the_contrast(tmp_path):
    values = np.random.default_rng(0).integers(900, 1100, (64, 64)).astype(np.int16)
    values[:20] = 32000
    ds = data_set(values, modality="CR", photometric="MONOCHROME1", PixelPaddingValue=32000)
    shown = grey(saved(tmp_path, ds))
    padding = shown[:20]
    measured = shown[20:]
    assert (padding == measured.min()).all()
    assert measured.max() == 255
    assert np.ptp(measured) > 240


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_a_voi_table_is_read_whatever_its_depth(tmp_path, bits):
    values = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    squares = (np.arange(4096) / 4095) ** 2
    item = Dataset()
    item.LUTDescriptor = [4096, 0, bits]
    item.add_new("LUTData", "US", [int(square * (2**bits - 1)) for square in squares])
    ds = data_set(values, modality="DX", stored=12, WindowCenter=1, WindowWidth=2)
    ds.VOILUTSequence = Sequence([item])
    difference = grey(saved(tmp_path, ds)) - (values / 4095.0) ** 2 * 255
    assert np.abs(difference).max() <= 1.5


@pytest.mark.parametrize("count", [255, 256, 4096])
@pytest.mark.parametrize("as_words", [False, True])
@pytest.mark.parametrize("sequence", ["VOILUTSequence", "ModalityLUTSequence"])
def test_a_table_of_bytes_that_share_words(tmp_path, count, as_words, sequence):
    """PS3.3 C.11.2.1.1: two entries of 8 bits stand in a word, the earlier in its lower half."""
    values = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    entries = (np.arange(count) * 255 // (count - 1)).astype(np.uint8)
    packed = entries.tobytes() + bytes(count % 2)
    item = Dataset()
    item.LUTDescriptor = [count, 0, 8]
    if as_words:
        item.add_new("LUTData", "US", np.frombuffer(packed, "<u2").tolist())
    else:
        item.add_new("LUTData", "OW", packed)
    ds = data_set(values, modality="CR", stored=12)
    setattr(ds, sequence, Sequence([item]))
    if sequence == "ModalityLUTSequence":
        item.ModalityLUTType = "US"
        ds.WindowCenter, ds.WindowWidth = 128, 256
    want = entries[values.clip(0, count - 1)]
    assert (grey(saved(tmp_path, ds)) == want).all()


@pytest.mark.parametrize("used", [8, 10, 12, 14, 16])
def test_a_table_that_says_16_bits_for_the_size_of_its_words(tmp_path, used):
    values = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    top = 2**used - 1
    item = Dataset()
    item.LUTDescriptor = [4096, 0, 16]
    item.add_new("LUTData", "US", [entry * top // 4095 for entry in range(4096)])
    ds = data_set(values, modality="CR", stored=12, VOILUTSequence=Sequence([item]))
    difference = grey(saved(tmp_path, ds)) - (values.astype(int) * top // 4095) / top * 255
    assert np.abs(difference).max() <= 0.51


@pytest.mark.parametrize("bits", [8, 12])
def test_a_table_of_a_big_endian_file(tmp_path, bits):
    values = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    top = 2**bits - 1
    entries = np.arange(4096) * top // 4095
    words = entries.astype("<u2")
    if bits == 8:
        words = np.frombuffer(entries.astype(np.uint8).tobytes(), "<u2")
    item = Dataset()
    item.LUTDescriptor = [4096, 0, bits]
    item.add_new("LUTData", "OW", words.astype(">u2").tobytes())
    ds = data_set(values, modality="CR", stored=12, VOILUTSequence=Sequence([item]))
    ds.PixelData = values.astype(">u2").tobytes()
    ds.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    path = tmp_path / "big.dcm"
    ds.save_as(path, implicit_vr=False, little_endian=False, enforce_file_format=True)
    assert np.abs(grey(path) - entries.reshape(64, 64) / top * 255).max() <= 0.51


def test_a_table_that_begins_below_zero(tmp_path):
    """Also where its start was written as a number without sign."""
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [3072, 2**16 - 1024, 12])
    item.add_new("LUTData", "US", list(range(0, 4096, 4))[:1024] + [4095] * 2048)
    ds = data_set(RAMP, modality="CR", VOILUTSequence=Sequence([item]))
    want = np.where(RAMP < 0, (RAMP + 1024) * 4, 4095) / 4095 * 255
    assert np.abs(grey(saved(tmp_path, ds)) - want).max() <= 0.51


def test_values_that_are_no_numbers_are_dark_and_infinite_ones_are_extreme(tmp_path):
    ramp = np.linspace(-5, 5, 64 * 48).reshape(64, 48).astype(np.float32)
    values = ramp.copy()
    values[0] = np.nan
    values[1] = np.inf
    values[2] = -np.inf
    for photometric in ("MONOCHROME2", "MONOCHROME1"):
        ds = data_set(np.zeros((64, 48), np.int32), modality="NM", photometric=photometric)
        del ds.PixelData, ds.BitsStored, ds.HighBit, ds.PixelRepresentation
        ds.FloatPixelData = values.tobytes()
        ds.WindowCenter, ds.WindowWidth, ds.VOILUTFunction = 0, 8, "LINEAR_EXACT"
        shown = grey(saved(tmp_path, ds))
        want = ((ramp / 8 + 0.5) * 255).clip(0, 255)
        bright, dark = 255, 0
        if photometric == "MONOCHROME1":
            want = 255 - want
            bright, dark = 0, 255
        assert np.abs(shown[3:] - want[3:]).max() <= 0.51
        assert (shown[0] == 0).all()
        assert (shown[1] == bright).all() and (shown[2] == dark).all()
        del ds.WindowCenter, ds.WindowWidth, ds.VOILUTFunction
        fitted = grey(saved(tmp_path, ds))[3:].astype(int)
        assert np.ptp(fitted) == 255
        assert len(np.unique(fitted)) > 240


def test_a_picture_without_any_finite_value_is_black(tmp_path):
    ds = data_set(np.zeros((64, 48), np.int32), modality="NM", photometric="MONOCHROME1")
    del ds.PixelData, ds.BitsStored, ds.HighBit, ds.PixelRepresentation
    ds.FloatPixelData = np.full((64, 48), np.nan, np.float32).tobytes()
    assert (grey(saved(tmp_path, ds)) == 0).all()


def test_tiny_floats_keep_their_contrast(tmp_path):
    ds = data_set(RAMP, modality="PT", RescaleSlope="1e-7", RescaleIntercept=0)
    assert len(np.unique(grey(saved(tmp_path, ds)))) > 240


@pytest.mark.parametrize("value", ["", None, "NaN"])
@pytest.mark.parametrize(
    "tag", ["RescaleSlope", "RescaleIntercept", "VOILUTFunction", "VOILUTSequence"]
)
def test_an_empty_tag_has_its_default(tmp_path, tag, value):
    if tag.startswith("VOI") and value == "NaN":
        value = "" if tag == "VOILUTFunction" else None
    ds = data_set(RAMP, WindowCenter=40, WindowWidth=400, RescaleSlope=1, RescaleIntercept=0)
    want = grey(saved(tmp_path, ds))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        setattr(ds, tag, value or None)
    assert (grey(saved(tmp_path, ds)) == want).all()
    if tag in ds:
        del ds[tag]
    assert (grey(saved(tmp_path, ds)) == want).all()


def test_an_intercept_counts_without_a_slope(tmp_path):
    ds = data_set(RAMP, WindowCenter=40, WindowWidth=400, RescaleIntercept=-100)
    want = ((RAMP - 100 - 39.5) / 399 + 0.5) * 255
    assert np.abs(grey(saved(tmp_path, ds)) - want.clip(0, 255)).max() <= 0.51


@pytest.mark.parametrize(
    ("centre", "width", "window"),
    [
        ("", "", "abdomen"),
        (None, 400, "abdomen"),
        (40, None, "abdomen"),
        (40, 0, "abdomen"),
        (40, "-400", "abdomen"),
        (["", "40"], ["", "80"], (40, 80)),
        (["30", "40"], ["", "80"], (40, 80)),
        (["40", ""], ["80", ""], (40, 80)),
        (["40", "50"], ["80"], (40, 80)),
    ],
)
def test_the_first_window_that_is_whole_counts(tmp_path, centre, width, window):
    ds = data_set(RAMP, WindowCenter=centre, WindowWidth=width)
    path = saved(tmp_path, ds)
    assert (grey(path) == grey(path, window=window)).all()


def test_narrow_windows_of_the_exact_functions(tmp_path):
    ramp = np.linspace(0, 1, 64 * 48).reshape(64, 48).astype(np.float32)
    ds = data_set(np.zeros((64, 48), np.int32), modality="PT")
    del ds.PixelData, ds.BitsStored, ds.HighBit, ds.PixelRepresentation
    ds.FloatPixelData = ramp.tobytes()
    ds.WindowCenter, ds.WindowWidth, ds.VOILUTFunction = 0.5, 0.5, "LINEAR_EXACT"
    want = ((ramp - 0.5) / 0.5 + 0.5) * 255
    assert np.abs(grey(saved(tmp_path, ds)) - want.clip(0, 255)).max() <= 0.51


@pytest.mark.parametrize(
    "tag",
    ["PhotometricInterpretation", "SamplesPerPixel", "PixelRepresentation", "BitsStored"],
)
@pytest.mark.parametrize("is_empty", [True, False])
def test_pixel_tags_that_are_missing_or_empty(tmp_path, tag, is_empty):
    values = RAMP.clip(0).astype(np.uint16)
    ds = data_set(values, WindowCenter=40, WindowWidth=400)
    want = grey(saved(tmp_path, ds))
    if is_empty:
        setattr(ds, tag, None)
    else:
        del ds[tag]
    assert (grey(saved(tmp_path, ds)) == want).all()


def test_colour_pixel_tags_that_are_missing(tmp_path, colours):
    for tag in ("PhotometricInterpretation", "PlanarConfiguration"):
        ds = data_set(colours, modality="US")
        del ds[tag]
        assert (pixels_of(saved(tmp_path, ds)) == colours).all()


def test_padding_written_without_a_sign(tmp_path):
    values = RAMP.copy()
    values[:4] = -2000
    ds = data_set(values, photometric="MONOCHROME1", WindowCenter=40, WindowWidth=400)
    ds.add_new("PixelPaddingValue", "US", 2**16 - 2000)
    shown = grey(saved(tmp_path, ds))
    assert (shown[:4] == shown[4:].min()).all()


# --- overlays -------------------------------------------------------------------------------------


def test_unused_bits_are_no_values_and_a_plane_kept_in_them_is_drawn(tmp_path):
    values = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)
    marked = values.copy()
    marked[10:20, 30:40] |= 1 << 15
    ds = data_set(marked, modality="MR", stored=12)
    ds.add_new((0x6000, 0x0010), "US", 64)  # rows
    ds.add_new((0x6000, 0x0011), "US", 64)  # columns
    ds.add_new((0x6000, 0x0102), "US", 15)  # the bit
    plain = saved(tmp_path, data_set(values, modality="MR", stored=12), "plain.dcm")
    path = saved(tmp_path, ds)
    assert (grey(path) == grey(plain)).all()
    yellow = (pixels_of(path, overlays=True) == YELLOW).all(-1)
    assert yellow[10:20, 30:40].all()
    assert yellow.sum() == 100


def test_overlay_planes_with_an_origin_outside(tmp_path):
    plane = np.zeros((64, 48), np.uint8)
    plane[5:9, 6:12] = 1
    ds = data_set(RAMP)
    ds.add_new((0x6002, 0x0010), "US", 64)  # rows
    ds.add_new((0x6002, 0x0011), "US", 48)  # columns
    ds.add_new((0x6002, 0x0040), "CS", "G")  # graphics
    ds.add_new((0x6002, 0x0050), "SS", [-1, 3])  # origin, counted from 1
    ds.add_new((0x6002, 0x0100), "US", 1)  # bits allocated
    ds.add_new((0x6002, 0x0102), "US", 0)  # bit position
    packed = np.packbits(plane.ravel(), bitorder="little")
    ds.add_new((0x6002, 0x3000), "OW", packed.tobytes())
    path = saved(tmp_path, ds)
    drawn = pixels_of(path, overlays=True)
    yellow = (drawn == YELLOW).all(-1)
    assert yellow[3:7, 8:14].all()
    assert yellow.sum() == 24
    assert (drawn[~yellow] == pixels_of(path)[~yellow]).all()


# --- compression, colour, enhanced files, unusual numbers -----------------------------------------


@pytest.mark.parametrize(
    "syntax", [ExplicitVRLittleEndian, RLELossless, JPEG2000Lossless, JPEGLSLossless]
)
def test_frames_survive_every_lossless_compression(tmp_path, syntax):
    frames = np.stack([RAMP, RAMP[::-1], np.full_like(RAMP, 40)])
    ds = data_set(frames, WindowCenter=40, WindowWidth=400)
    if syntax != ExplicitVRLittleEndian:
        ds.compress(syntax, generate_instance_uid=False)
    path = saved(tmp_path, ds)
    first, second, third = (np.asarray(image)[..., 0] for image in pairs.read_frames(path))
    plain = grey(saved(tmp_path, data_set(RAMP, WindowCenter=40, WindowWidth=400), "one.dcm"))
    assert (first == plain).all()
    assert (second == plain[::-1]).all()
    assert np.ptp(third) == 0
    assert pairs.describe(path, salt="s")["transfer_syntax"] == syntax.name


@pytest.fixture
def colours() -> np.ndarray:
    """A smooth colour picture of 48 rows and 64 columns."""
    noise = np.random.default_rng(0).integers(0, 255, (6, 8, 3), np.uint8)
    return np.asarray(Image.fromarray(noise).resize((64, 48)))


def test_colour_rgb(tmp_path, colours):
    path = saved(tmp_path, data_set(colours, modality="US"))
    assert (pixels_of(path) == colours).all()


def test_colour_ybr(tmp_path, colours):
    ybr = np.asarray(Image.fromarray(colours).convert("YCbCr"))
    ds = data_set(ybr, modality="US")
    ds.PhotometricInterpretation = "YBR_FULL"
    got = pixels_of(saved(tmp_path, ds)).astype(int)
    assert np.abs(got - colours).max() <= 3


def test_colour_jpeg(tmp_path, colours):
    buffer = io.BytesIO()
    Image.fromarray(colours).save(buffer, "JPEG", quality=95)
    ds = data_set(colours, modality="US")
    ds.PhotometricInterpretation = "YBR_FULL_422"
    ds.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    ds.PixelData = pydicom.encaps.encapsulate([buffer.getvalue()])
    ds["PixelData"].is_undefined_length = True
    got = pixels_of(saved(tmp_path, ds)).astype(int)
    assert np.abs(got - np.asarray(Image.open(buffer).convert("RGB"))).mean() < 1


def test_colour_palette(tmp_path):
    index = np.arange(64 * 48, dtype=np.uint8).reshape(48, 64)
    tables = np.random.default_rng(0).integers(0, 2**16, (3, 256), np.uint16)
    ds = data_set(index, photometric="PALETTE COLOR", modality="NM")
    for name, table in zip(("Red", "Green", "Blue"), tables, strict=True):
        setattr(ds, f"{name}PaletteColorLookupTableDescriptor", [256, 0, 16])
        setattr(ds, f"{name}PaletteColorLookupTableData", table.tobytes())
    path = saved(tmp_path, ds)
    want = tables[:, index].transpose(1, 2, 0) / 65535 * 255
    assert np.abs(pixels_of(path) - want).max() <= 1
    with pytest.raises(ValueError, match="is no CT in grey"):
        pairs.read_frames(path, window="lung")


def item_of(**tags) -> Sequence:
    """A sequence of one item."""
    item = Dataset()
    for tag, value in tags.items():
        setattr(item, tag, value)
    return Sequence([item])


def test_a_palette_of_bytes_that_says_16_bits(tmp_path):
    index = np.arange(64 * 48, dtype=np.uint8).reshape(48, 64)
    tables = np.random.default_rng(0).integers(0, 256, (3, 256), np.uint16)
    ds = data_set(index, photometric="PALETTE COLOR", modality="US")
    for name, table in zip(("Red", "Green", "Blue"), tables, strict=True):
        setattr(ds, f"{name}PaletteColorLookupTableDescriptor", [256, 0, 16])
        setattr(ds, f"{name}PaletteColorLookupTableData", table.tobytes())
    assert (pixels_of(saved(tmp_path, ds)) == tables[:, index].transpose(1, 2, 0)).all()


def test_an_enhanced_file_windows_each_frame_by_its_own_group(tmp_path):
    slopes = (1, 3)
    frame_groups = []
    for slope in slopes:
        scale = item_of(RescaleSlope=slope, RescaleIntercept=10, RescaleType="HU")
        frame_groups += item_of(PixelValueTransformationSequence=scale)
    ds = data_set(np.stack([RAMP, RAMP]))
    ds.PerFrameFunctionalGroupsSequence = Sequence(frame_groups)
    ds.SharedFunctionalGroupsSequence = item_of(
        FrameVOILUTSequence=item_of(WindowCenter=100, WindowWidth=500),
        PixelMeasuresSequence=item_of(PixelSpacing=[0.5, 0.7], SliceThickness=2),
    )
    path = saved(tmp_path, ds)
    for frame, slope in zip(pairs.read_frames(path), slopes, strict=True):
        one = data_set(RAMP, RescaleSlope=slope, RescaleIntercept=10)
        one.WindowCenter = 100
        one.WindowWidth = 500
        want = grey(saved(tmp_path, one, "one.dcm"))
        assert (np.asarray(frame)[..., 0] == want).all()
    assert pairs.describe(path, salt="s")["spacing"] == [0.5, 0.7]


def test_big_endian(tmp_path):
    ds = data_set(RAMP, WindowCenter=40, WindowWidth=400)
    want = grey(saved(tmp_path, ds))
    ds.PixelData = RAMP.astype(">i2").tobytes()
    ds.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    path = tmp_path / "big.dcm"
    ds.save_as(path, implicit_vr=False, little_endian=False, enforce_file_format=True)
    assert (grey(path) == want).all()


def test_small_floats_keep_their_order(tmp_path):
    ds = data_set(np.zeros((64, 48), np.int32), modality="NM")
    del ds.PixelData, ds.BitsStored, ds.HighBit, ds.PixelRepresentation
    ds.FloatPixelData = np.linspace(0, 1, 64 * 48).astype(np.float32).tobytes()
    shown = grey(saved(tmp_path, ds)).ravel().astype(int)
    assert shown.max() <= 255
    assert (np.diff(shown) >= 0).all()
    assert np.ptp(shown) > 200


# --- which files are DICOM ------------------------------------------------------------------------


def test_is_dicom(tmp_path):
    unmarked = tmp_path / "README"
    unmarked.write_text("no DICOM")
    assert not pairs.is_dicom(unmarked)
    # whatever it is called: without an ending, by its UID, even as another picture
    for name in ("IM0001", "1.2.840.113619.2.55.3.604688119.1", "a.dcm", "a.png", "a.txt"):
        assert pairs.is_dicom(saved(tmp_path, data_set(RAMP), name))
    # a picture of another kind that somebody called .dcm
    Image.new("L", (8, 8)).save(tmp_path / "png.dcm", "PNG")
    assert not pairs.is_dicom(tmp_path / "png.dcm")
    # what is no picture at all counts, so that reading it says why it is none
    for name in ("text.dcm", "text.DICOM", "text.ima"):
        (tmp_path / name).write_text("no DICOM")
        assert pairs.is_dicom(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        pairs.is_dicom(tmp_path / "none.dcm")


@pytest.mark.parametrize("implicit", [True, False])
@pytest.mark.parametrize("name", ["IM1", "1.2.3.456", "a.dcm", "a.bin"])
def test_a_file_without_preamble_and_mark(tmp_path, implicit, name):
    ds = data_set(RAMP, WindowCenter=40, WindowWidth=400)
    want = grey(saved(tmp_path, ds))
    del ds.file_meta
    path = tmp_path / name
    ds.save_as(path, implicit_vr=implicit, little_endian=True, enforce_file_format=False)
    assert path.read_bytes()[128:132] != b"DICM"
    assert pairs.is_dicom(path)
    assert (grey(path) == want).all()
    assert pairs.describe(path, salt="s")["modality"] == "CT"
    assert pairs.copy_without_patient(path, tmp_path / "copy.dcm")["frames"] == 1
    assert (grey(tmp_path / "copy.dcm") == want).all()


@settings(max_examples=150, deadline=None)
@given(
    head=st.sampled_from([b"", b"\x08\x00\x05\x00", b"\x02\x00\x00\x00", bytes(128) + b"DICM"]),
    rest=st.binary(max_size=400),
    name=st.sampled_from(["x", "x.dcm", "x.1", "x.png"]),
)
def test_random_bytes_never_give_anything_but_a_named_error(head, rest, name):
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("error")
        path = Path(folder) / name
        path.write_bytes(head + rest)
        pairs.is_dicom(path)
        with pytest.raises(ValueError, match=r"^DICOM file 'x[^\n]*$"):
            pairs.read_frames(path)
        with contextlib.suppress(ValueError):
            pairs.series_files(folder)


# --- what goes wrong ------------------------------------------------------------------------------


def refused(path, **options) -> str:
    """Read what cannot be read; nothing about the patient is in the error or behind it."""
    with pytest.raises(ValueError) as caught:
        pairs.read_frames(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert "Doe" not in message and "4711" not in message
    if message.startswith("DICOM file"):
        # a traceback would show those too
        assert caught.value.__suppress_context__
        assert caught.value.__cause__ is None
    return message


def test_each_kind_of_bad_file_has_its_own_line(tmp_path):
    text = tmp_path / "text.dcm"
    text.write_text("PatientName: Doe^Jane")
    assert "is not DICOM" in refused(text)
    text.write_bytes(b"")
    assert "is not DICOM" in refused(text)

    ds = data_set(RAMP)
    whole = saved(tmp_path, ds).read_bytes()
    short = tmp_path / "short.dcm"
    short.write_bytes(whole[:-1000])
    assert "is damaged or cut short" in refused(short)
    del ds.PixelData
    assert "has no pixel data" in refused(saved(tmp_path, ds, "report.dcm"))

    ds = data_set(RAMP)
    ds.Rows = ds.Columns = 65535
    assert "2^28 pixels" in refused(saved(tmp_path, ds, "bomb.dcm"))


VIDEO = UID("1.2.840.10008.1.2.4.102")
HIERARCHICAL_JPEG = UID("1.2.840.10008.1.2.4.59")


@pytest.mark.parametrize(
    ("syntax", "words"),
    [
        (VIDEO, "is a video (MPEG-4 AVC/H.264 High Profile / Level 4.1)"),
        (UID("1.2.840.10008.1.2.4.107"), "is a video (HEVC/H.265"),
        (HIERARCHICAL_JPEG, "JPEG Extended, Hierarchical (Process 16 and 18), which nothing"),
        (UID("1.2.3.4.5"), "compressed as something that the standard does not name"),
        (JPEGExtended12Bit, "is a JPEG of 12 bits"),
    ],
)
def test_a_compression_that_nothing_reads_is_named(tmp_path, syntax, words):
    ds = data_set(RAMP, stored=12)
    ds.file_meta.TransferSyntaxUID = syntax
    ds.PixelData = pydicom.encaps.encapsulate([b"\0\0\0\x18ftypmp42" + bytes(200)])
    ds["PixelData"].is_undefined_length = True
    path = tmp_path / "a.dcm"
    ds.save_as(path, implicit_vr=False, little_endian=True, enforce_file_format=True)
    message = refused(path)
    assert words in message
    assert "damaged" not in message
    if syntax == JPEGExtended12Bit:
        assert "pip install pylibjpeg-libjpeg" in message


def test_a_compression_newer_than_pydicom_is_named(tmp_path):
    ds = data_set(RAMP)
    ds.file_meta.TransferSyntaxUID = UID("1.2.840.10008.1.2.4.100")
    ds.PixelData = pydicom.encaps.encapsulate([bytes(200)])
    ds["PixelData"].is_undefined_length = True
    path = saved(tmp_path, ds)
    # pydicom does not write what it does not know
    path.write_bytes(path.read_bytes().replace(b".1.2.4.100", b".1.2.4.110"))
    assert "is compressed as JPEG XL Lossless, which nothing here can read" in refused(path)


KINDS = [
    ("1.2.840.10008.5.1.4.1.1.88.22", "SR", "structured report"),
    ("1.2.840.10008.5.1.4.1.1.88.33", "SR", "structured report"),
    ("1.2.840.10008.5.1.4.1.1.88.67", "SR", "radiation dose report"),
    ("1.2.840.10008.5.1.4.1.1.88.59", "KO", "key object selection"),
    ("1.2.840.10008.1.3.10", "CT", "DICOMDIR"),
    ("1.2.840.10008.5.1.4.1.1.104.1", "DOC", "encapsulated PDF"),
    ("1.2.840.10008.5.1.4.1.1.104.2", "DOC", "encapsulated document"),
    ("1.2.840.10008.5.1.4.1.1.11.1", "PR", "presentation state"),
    ("1.2.840.10008.5.1.4.1.1.481.3", "RTSTRUCT", "RT structure set"),
    ("1.2.840.10008.5.1.4.1.1.481.5", "RTPLAN", "RT plan"),
    ("1.2.840.10008.5.1.4.1.1.66.1", "REG", "registration"),
    ("1.2.840.10008.5.1.4.1.1.66", "MR", "raw data file"),
    ("1.2.840.10008.5.1.4.1.1.9.1.1", "ECG", "waveform"),
    ("1.2.840.10008.5.1.4.38.1", "OT", "file without pixels"),
    ("1.3.12.2.1107.5.9.1", "SR", "structured report"),
]


@pytest.mark.parametrize(("storage_class", "modality", "kind"), KINDS)
def test_what_is_no_picture_is_called_by_its_name(tmp_path, storage_class, modality, kind):
    ds = data_set(RAMP, modality=modality, SOPClassUID=storage_class)
    del ds.PixelData, ds.Rows, ds.Columns
    message = refused(saved(tmp_path, ds))
    assert re.search(rf" is an? {kind}, which holds no picture to read$", message)


def test_a_segmentation_is_no_picture(tmp_path):
    mask = np.zeros((32, 32), np.uint8)
    ds = data_set(mask, modality="SEG", SOPClassUID="1.2.840.10008.5.1.4.1.1.66.4")
    assert "is a segmentation" in refused(saved(tmp_path, ds))


def test_missing_sizes_and_a_missing_syntax_are_named(tmp_path):
    ds = data_set(RAMP)
    del ds.Rows, ds.Columns
    assert "Rows, Columns missing" in refused(saved(tmp_path, ds))
    ds.file_meta = FileMetaDataset()
    bare = tmp_path / "bare.dcm"
    ds.save_as(bare, implicit_vr=True, little_endian=True, enforce_file_format=False)
    assert "TransferSyntaxUID, Rows, Columns missing" in refused(bare)
    ds = data_set(RAMP[:-1])
    ds.Rows = 64  # more than there are
    path = saved(tmp_path, ds)
    meta = pydicom.dcmread(path)
    del meta.file_meta.TransferSyntaxUID
    meta.save_as(path, implicit_vr=False, little_endian=True, enforce_file_format=False)
    assert "it names no transfer syntax" in refused(path)


def test_a_file_that_names_no_syntax_is_read_all_the_same(tmp_path):
    ds = data_set(RAMP, WindowCenter=40, WindowWidth=400)
    want = grey(saved(tmp_path, ds))
    del ds.file_meta.TransferSyntaxUID
    for implicit in (True, False):
        path = tmp_path / "none.dcm"
        ds.save_as(path, implicit_vr=implicit, little_endian=True, enforce_file_format=False)
        assert (grey(path) == want).all()


def test_fewer_frames_than_promised_are_no_silent_loss(tmp_path):
    ds = data_set(np.stack([RAMP, RAMP]))
    ds.compress(RLELossless, generate_instance_uid=False)
    ds.NumberOfFrames = 3
    assert "3 frames" in refused(saved(tmp_path, ds)) or "cut short" in refused(tmp_path / "a.dcm")


@pytest.mark.parametrize("window", [(40, 0), (40, float("nan")), (40,), ("a", "b"), 7, [1, 2, 3]])
def test_a_window_that_is_none(tmp_path, window):
    assert "window=" in refused(saved(tmp_path, data_set(RAMP)), window=window)


def test_a_window_that_does_not_apply(tmp_path):
    ct = saved(tmp_path, data_set(RAMP))
    assert "choose one of brain" in refused(ct, window="heart")
    mr = saved(tmp_path, data_set(RAMP, modality="MR"), "mr.dcm")
    assert "is no CT in grey" in refused(mr, window="bone")


def test_what_the_system_refuses_keeps_its_kind(tmp_path):
    with pytest.raises(FileNotFoundError):
        pairs.read_frames(tmp_path / "none.dcm")
    with pytest.raises(OSError):
        pairs.read_frames(tmp_path)


WITHOUT_DECODERS = """
import importlib.metadata, sys

all_entry_points = importlib.metadata.entry_points

def without_libjpeg(**selected):
    points = all_entry_points(**selected)
    if not selected:  # this is how others ask, and it gives all in another form
        return points
    return [point for point in points if not point.value.startswith("libjpeg")]

importlib.metadata.entry_points = without_libjpeg
sys.modules["libjpeg"] = None
sys.modules["gdcm"] = None

from medtune.pairs import read_frames

print(len(read_frames(sys.argv[1])))
try:
    read_frames(sys.argv[2])
except ValueError as error:
    print(error)
"""


def test_a_compression_without_a_decoder_says_what_to_install(tmp_path):
    """In a fresh interpreter where the GPL plugin cannot be imported, as on a user's machine."""
    ds = data_set(RAMP)
    ds.compress(JPEGLSLossless, generate_instance_uid=False)
    readable = saved(tmp_path, ds, "jls.dcm")
    ds.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    unreadable = saved(tmp_path, ds, "lossless.dcm")
    command = [sys.executable, "-c", WITHOUT_DECODERS, str(readable), str(unreadable)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first == "1"
    assert "JPEG Lossless" in second
    assert "python-gdcm" in second
    assert done.stderr == ""


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory) -> list[bytes]:
    """A plain file and a compressed one."""
    folder = tmp_path_factory.mktemp("whole")
    ds = data_set(RAMP, WindowCenter=40, WindowWidth=400)
    plain = saved(folder, ds).read_bytes()
    ds.compress(JPEG2000Lossless, generate_instance_uid=False)
    compressed = saved(folder, ds).read_bytes()
    return [plain, compressed]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_damaged_file_gives_a_picture_or_one_line(tmp_path, whole_files, data):
    content = bytearray(data.draw(st.sampled_from(whole_files)))
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    if content:
        places = st.lists(st.integers(0, len(content) - 1), max_size=4)
        for place in data.draw(places):
            content[place] = data.draw(st.integers(0, 255))
    path = tmp_path / "hurt.dcm"
    path.write_bytes(content)

    def describe(path):
        return pairs.describe(path, salt="s")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for read in (pairs.read_frames, describe):
            try:
                read(path)
            except ValueError as error:
                message = str(error)
                assert "\n" not in message
                assert "Doe" not in message
                assert "hurt.dcm" in message


# --- patient data ---------------------------------------------------------------------------------

TELLING_TAGS = (
    "BodyPartExamined", "PatientName", "PatientID", "PatientBirthDate", "OtherPatientIDs",
    "StudyID", "AccessionNumber", "InstitutionName", "InstitutionAddress",
    "ReferringPhysicianName", "StudyDescription", "StudyDate", "SeriesDescription",
    "DeviceSerialNumber", "PatientAddress", "ImageComments", "OperatorsName", "StationName",
    "ProtocolName", "PatientComments", "AcquisitionDate",
)  # fmt: skip


def telling_file(folder: Path) -> tuple[Path, list[str]]:
    """Write a file full of names and dates; give it and what must not get out, in lower case."""
    ds = data_set(RAMP, BurnedInAnnotation="YES")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for tag in TELLING_TAGS:
            setattr(ds, tag, "19010203" if "Date" in tag else "SECRET")
    ds.add_new((0x0009, 0x0010), "LO", "SECRET")  # a private block
    ds.add_new((0x0009, 0x1001), "LO", "SECRET")
    uids = [ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SOPInstanceUID]
    return saved(folder, ds), ["secret", "19010203", *map(str, uids)]


def test_nothing_that_names_a_patient_gets_out(tmp_path, caplog, capfd):
    path, hidden = telling_file(tmp_path)
    caplog.clear()
    capfd.readouterr()
    with caplog.at_level(logging.DEBUG):
        about = pairs.describe(path, salt="pepper")
        pairs.read_frames(path, overlays=True)
    printed = "".join(capfd.readouterr())
    text = (repr(about) + caplog.text + printed).lower()
    for word in hidden:
        assert word not in text
    assert about["burned_in_annotation"] == "YES"
    assert about["body_part"] is None
    assert about["modality"] == "CT"


def test_a_copy_holds_the_picture_and_not_the_patient(tmp_path):
    path, hidden = telling_file(tmp_path)
    original = path.read_bytes()
    copy = tmp_path / "copy.dcm"
    assert pairs.copy_without_patient(path, copy)["modality"] == "CT"
    assert (grey(copy) == grey(path)).all()
    content = copy.read_bytes().lower()
    for word in hidden:
        assert word.encode() not in content
    assert path.read_bytes() == original


def test_the_group_follows_the_patient_and_the_salt(tmp_path):
    def group(salt="a", group_by="patient", **tags):
        path = saved(tmp_path, data_set(RAMP, **tags))
        return pairs.describe(path, salt=salt, group_by=group_by)["group"]

    assert group() == group()  # two studies of one patient
    assert group() != group(salt="b")
    assert group() != group(PatientID="PID-4712")
    assert group(PatientID=" PID-4711 ") == group()
    # a table that names the patient comes to the same group
    table = tmp_path / "table" / "captions.csv"
    table.parent.mkdir()
    Image.new("L", (8, 8)).save(table.parent / "a.png")
    table.write_text("image,caption,patient_id\na.png,A square.,PID-4711\n")
    assert pairs.load_pairs(table, salt="a")[0]["group"] == group()
    assert group(group_by="study") != group(group_by="study")
    # without a patient's number the study stands for the patient
    study = group(group_by="study", StudyInstanceUID="1.2")
    assert study == group(PatientID="", StudyInstanceUID="1.2")
    with pytest.raises(ValueError, match="salt"):
        pairs.describe(tmp_path / "a.dcm", salt="")


# --- series ---------------------------------------------------------------------------------------


def names_of(files: list[Path]) -> list[str]:
    return [file.name for file in files]


def test_slices_are_sorted_by_position(tmp_path):
    series = generate_uid()
    heights = [3, 0, 4, 1, 2]
    for number, height in enumerate(heights):  # names and instance numbers lie about the order
        ds = data_set(np.full((16, 16), 100 * height, np.int16), SeriesInstanceUID=series)
        ds.InstanceNumber = 5 - number
        ds.ImagePositionPatient = [0, 0, 2.5 * height]
        ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        saved(tmp_path, ds, f"{number}.dcm")
    scout = data_set(RAMP, SeriesInstanceUID=series)
    scout.ImagePositionPatient = [0, 0, 0]
    scout.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]
    saved(tmp_path, scout, "scout.dcm")
    slices, scouts = pairs.series_files(tmp_path)
    assert names_of(slices) == [f"{heights.index(height)}.dcm" for height in range(5)]
    assert names_of(scouts) == ["scout.dcm"]
    levels = [grey(path, window=(200, 401))[0, 0] for path in slices]
    assert levels == sorted(levels)
    assert len(set(levels)) == 5


def test_slices_without_a_position_are_sorted_by_their_number(tmp_path):
    """As a number: 10 comes after 2."""
    for name, number in enumerate([2, 10, 1]):
        ds = data_set(RAMP, SeriesInstanceUID="1.9", InstanceNumber=number)
        saved(tmp_path, ds, str(name))
    [files] = pairs.series_files(tmp_path)
    assert names_of(files) == ["2", "0", "1"]


def test_a_folder_of_other_files_and_links(tmp_path):
    folder = tmp_path / "folder"
    saved(folder, data_set(RAMP), "one/a.dcm")
    saved(folder, data_set(RAMP), "two/b.dcm")
    (folder / "notes.txt").write_text("no DICOM")
    outside = saved(tmp_path, data_set(RAMP), "outside.dcm")
    (folder / "link.dcm").symlink_to(outside)
    files = pairs.series_files(folder)
    assert [names_of(series) for series in files] == [["a.dcm"], ["b.dcm"]]


def test_no_series(tmp_path):
    with pytest.raises(ValueError, match="no DICOM pictures"):
        pairs.series_files(tmp_path)
    with pytest.raises(FileNotFoundError):
        pairs.series_files(tmp_path / "nowhere")


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(6)), st.tuples(*[st.floats(-1, 1)] * 4))
def test_slices_of_any_tilt_are_sorted_along_their_normal(order, tilt):
    along_rows = np.array([1, tilt[0] * 0.3, tilt[1] * 0.3])
    along_rows /= np.linalg.norm(along_rows)
    along_columns = np.cross([tilt[2] * 0.3, tilt[3] * 0.3, 1], along_rows)
    along_columns /= np.linalg.norm(along_columns)
    normal = np.cross(along_rows, along_columns)

    def as_text(values):  # a decimal string holds 16 characters
        return [f"{value:.6f}" for value in values]

    with tempfile.TemporaryDirectory() as folder:
        for name, step in enumerate(order):
            ds = data_set(RAMP[:8, :8], SeriesInstanceUID="1.2")
            ds.ImagePositionPatient = as_text(normal * step)
            ds.ImageOrientationPatient = as_text((*along_rows, *along_columns))
            saved(Path(folder), ds, f"{name}.dcm")
        [paths] = pairs.series_files(folder)
    assert [order[int(path.stem)] for path in paths] == list(range(6))


# --- real files -----------------------------------------------------------------------------------


@real
@pytest.mark.parametrize("name", ["cr_chest", "mr_brain", "mr_knee", "mr_liver_overlay"])
def test_real_files_with_a_window_match_pydicom(name):
    path = REAL / f"{name}.dcm"
    ds = pydicom.dcmread(path)
    got = grey(path).astype(float)
    want = expected(ds).clip(0, 255)
    measured = ds.pixel_array != ds.get("PixelPaddingValue", -99999)
    assert np.abs(got - want)[measured].max() <= 0.5 + 1e-6


@real
def test_real_ct_in_four_windows():
    path = REAL / "ct_chest_ge.dcm"
    shown = {name: grey(path, window=name) for name in ("brain", "lung", "abdomen", "bone")}
    # air in the lung is grey, then black
    assert shown["lung"][256, 120] > 40 > shown["abdomen"][256, 120]
    white = {name: (pixels == 255).mean() for name, pixels in shown.items()}
    assert white["bone"] < white["abdomen"] < white["brain"]


@real
def test_real_overlay_marks_the_liver_lesion():
    path = REAL / "mr_liver_overlay.dcm"
    yellow = (pixels_of(path, overlays=True) == YELLOW).all(-1)
    assert yellow.sum() == pydicom.dcmread(path).overlay_array(0x6000).sum() > 0
    assert yellow[230:280, 40:90].sum() > 40  # the ring around the lesion in the right lobe


@real
def test_real_files_describe_without_their_patients():
    for path in sorted(REAL.glob("*.dcm")):
        ds = pydicom.dcmread(path, stop_before_pixels=True)
        about = pairs.describe(path, salt="pepper")
        assert about["modality"] == ds.Modality
        assert (about["rows"], about["columns"]) == (ds.Rows, ds.Columns)
        assert len(about["group"]) == (20 if ds.PatientID else 16)
        assert str(ds.PatientID) not in map(str, about.values())
        assert pairs.read_frames(path)[0].size == (ds.Columns, ds.Rows)
    assert len(pairs.series_files(REAL)) == 7
