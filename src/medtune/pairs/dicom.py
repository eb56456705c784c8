"""DICOM slices and series as plain RGB pictures, and a description that carries no patient data.

Needs numpy, pillow and pydicom. Compressed files want the decoders that pydicom looks for, such as
pylibjpeg.

Follows DICOM PS3.3: pixels C.7.6.3, modality LUT C.11.1, windows and VOI LUT C.11.2, overlays
C.9.2, functional groups of enhanced files C.7.6.16.
"""

import contextlib
import hashlib
import hmac
import itertools
import logging
import math
import os
import re
import secrets
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydicom import dcmread
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.errors import InvalidDicomError
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_windowing, iter_pixels
from pydicom.uid import generate_uid

#: Named CT windows as (centre, width) in Hounsfield units, after Radiopaedia, "Windowing (CT)".
WINDOWS = {
    "brain": (40, 80),
    "stroke": (40, 40),
    "subdural": (75, 215),
    "temporal bone": (600, 2800),
    "lung": (-600, 1500),
    "mediastinum": (50, 350),
    "abdomen": (50, 400),
    "liver": (30, 150),
    "bone": (400, 1800),
}

SUFFIXES = {".dcm", ".dicom", ".ima"}

# Body parts are passed on by list (PS3.16 annex L): what else stands in that tag may be free text.
_BODY_PARTS = {
    "ABDOMEN", "ANKLE", "AORTA", "ARM", "BLADDER", "BRAIN", "BREAST", "CHEST", "CLAVICLE", "COLON",
    "CSPINE", "ELBOW", "ESOPHAGUS", "EXTREMITY", "EYE", "FEMUR", "FINGER", "FOOT", "GALLBLADDER",
    "HAND", "HEAD", "HEADNECK", "HEART", "HIP", "HUMERUS", "JAW", "KIDNEY", "KNEE", "LEG", "LIVER",
    "LSPINE", "LUNG", "MEDIASTINUM", "NECK", "NOSE", "ORBIT", "OVARY", "PANCREAS", "PELVIS",
    "PROSTATE", "RECTUM", "RIB", "SHOULDER", "SINUS", "SKULL", "SPINE", "SPLEEN", "SSPINE",
    "STERNUM", "STOMACH", "TESTIS", "THIGH", "THYROID", "TOE", "TSPINE", "UTERUS", "WHOLEBODY",
    "WRIST",
}  # fmt: skip

# What a copy without the patient keeps beside the pixels and how to show them (group 0028).
_KEPT_TAGS = {
    "Modality", "InstanceNumber", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "PlanePositionSequence",
    "PlaneOrientationSequence", "PixelMeasuresSequence", "PixelValueTransformationSequence",
    "FrameVOILUTSequence",
}  # fmt: skip

# Value representations that can name somebody, even inside a kept group: text of any length, names
# of persons, identifiers, addresses, and values of an unknown kind.
_TELLING_VRS = {"LO", "LT", "PN", "SH", "ST", "UC", "UI", "UN", "UR", "UT"}

# The salt of this process for `copy_without_patient`: a series stays together within one process,
# and nobody can turn the hashes back.
_PROCESS_SALT = secrets.token_hex(16)

# 16384 x 16384: a header may promise any size, so stop before memory does.
_MAX_PIXELS = 2**28

_YELLOW = (255, 255, 0)


def is_dicom(file: str | os.PathLike) -> bool:
    """Say whether a file is DICOM: by its suffix or, if it has none, by the mark in its content.

    The standard puts the mark, the four letters DICM, at byte 128.

    Parameters
    ----------
    file : str or Path
        A file. It is opened only if its name has no suffix.

    Returns
    -------
    bool
        True for .dcm, .dicom and .ima, whatever they hold, and for a marked file without suffix.

    Examples
    --------
    >>> is_dicom("slice.dcm"), is_dicom("slice.png")
    (True, False)
    """
    file = Path(file)
    if file.suffix:
        return file.suffix.lower() in SUFFIXES
    with open(file, "rb") as stream:
        return stream.read(132)[128:] == b"DICM"


# --- opening a file without letting anything about the patient out --------------------------------


class _Problem(Exception):
    """Words of our own about a file, free of patient data."""


@contextlib.contextmanager
def _silent_pydicom() -> Iterator[None]:
    """Keep pydicom and its decoders quiet: their warnings and log lines can quote tag values."""
    logger = logging.getLogger("pydicom")
    was_disabled = logger.disabled
    with warnings.catch_warnings(action="ignore"):
        logger.disabled = True
        try:
            yield
        finally:
            logger.disabled = was_disabled


@contextlib.contextmanager
def _open(path: str | os.PathLike, **options: Any) -> Iterator[Dataset]:
    """Give the data set of a file; whatever goes wrong while it is open becomes one clean line."""
    ds = None
    with _silent_pydicom():
        try:
            ds = dcmread(path, **options)
            yield ds
        except Exception as error:  # decoders raise whatever they like
            # an errno comes from the system, not from the content: no such file, no permission
            if isinstance(error, OSError) and error.errno:
                raise
            problem = _reason(error, ds)
            # from None: a traceback would print the original error, which can quote tag values
            raise ValueError(f"DICOM file {Path(path).name!r} {problem}") from None


def _reason(error: Exception, ds: Dataset | None) -> str:
    """Say in our own words why a file, of which perhaps the head was read, is of no use."""
    words = str(error)
    if isinstance(error, _Problem):
        return words
    if isinstance(error, InvalidDicomError):
        return "is not DICOM: there is no DICM mark after 128 bytes"
    # pydicom has no error of its own for a missing decoder, only this sentence
    if ds is not None and "missing" in words and "dependencies" in words:
        compression = ds.file_meta.TransferSyntaxUID.name
        return f"is compressed as {compression}: pip install python-gdcm to read it"
    return "is damaged or cut short"


def _flat(ds: Dataset, frame: int = 0) -> Dataset:
    """Copy the describing tags, as a plain file has them at the top, for one frame.

    An enhanced file keeps window, rescale, position and spacing in functional groups: one item that
    all frames share and one item for each frame. Here they are lifted to the top.
    """
    describing = {}
    for tag in list(ds.keys()):
        if tag.group in (0x0008, 0x0018, 0x0020, 0x0028):
            # get_item does not decode the value: a broken tag that nobody asks for does no harm
            describing[tag] = ds.get_item(tag)
    flat = Dataset(describing)
    groups_of_all = ("SharedFunctionalGroupsSequence", 0)
    groups_of_one = ("PerFrameFunctionalGroupsSequence", frame)
    for name, index in (groups_of_all, groups_of_one):
        if name not in ds or index >= len(ds[name].value):
            continue
        for element in ds[name].value[index]:
            if element.VR == "SQ" and element.value:
                flat.update(element.value[0])
    return flat


def _numbers(ds: Dataset, tag: str) -> list[float]:
    """Give the numbers of a tag; none where it is missing or nonsense."""
    try:
        values = np.ravel(ds[tag].value).astype(float)
    except (
        Exception
    ):  # no such tag, text, or bytes that pydicom cannot decode: it raises many kinds
        return []
    # an empty tag has the value None, which becomes NaN here
    return values.tolist() if np.isfinite(values).all() else []


# --- pixels ---------------------------------------------------------------------------------------


def read_frames(
    path: str | os.PathLike,
    *,
    window: str | tuple[float, float] | None = None,
    overlays: bool = False,
) -> list[Image.Image]:
    """Read the frames of a DICOM file as RGB pictures of 8 bits, rows and columns as stored.

    Parameters
    ----------
    path : str or Path
        The file; a slice has one frame, a cine or an enhanced file several.
    window : str or tuple of float, optional
        A name in `WINDOWS` (CT only, Hounsfield units) or (centre, width) in the file's units after
        its rescale. Default: the file's own look-up table or first window; without one the abdomen
        window for CT, else the 0.5th to 99.5th percentile of the values.
    overlays : bool
        Draw overlay planes in yellow (green is left to boxes).

    Returns
    -------
    list of PIL.Image.Image
        One RGB picture a frame. Padding, what lies outside of the scanned circle, is as dark as the
        darkest pixel that was measured.

    Raises
    ------
    ValueError
        Not DICOM, no pixel data, damaged, no decoder, or a window that does not apply: one line
        without patient data.
    OSError
        No such file, or no permission to read it.

    Examples
    --------
    >>> from pydicom.data import get_testdata_file
    >>> [image] = read_frames(get_testdata_file("CT_small.dcm"), window="lung")
    >>> image.mode, image.size
    ('RGB', (128, 128))
    """
    if isinstance(window, str) and window not in WINDOWS:
        names = ", ".join(WINDOWS)
        raise ValueError(f"no CT window is called {window!r}: choose one of {names}")
    frames = []
    with _open(path) as ds:
        _check_pixels(ds, window)
        # A retired kind of overlay lies in bits of the pixels that the values do not use. pydicom
        # clears those, so the frames are read a second time as they are stored.
        raw_frames = itertools.repeat(None)
        if overlays:
            raw_frames = iter_pixels(ds, correct_unused_bits=False)
        pairs = zip(iter_pixels(ds), raw_frames, strict=False)
        for number, (stored, raw) in enumerate(pairs):
            if _is_grey(ds):
                grey = _grey(_flat(ds, number), stored, window)
                rgb = np.stack([grey, grey, grey], axis=-1)
            else:
                rgb = _colour(ds, stored)
            if overlays:
                rgb[_overlay_mask(ds, raw, number)] = _YELLOW
            frames.append(Image.fromarray(rgb))
    return frames


def _is_grey(ds: Dataset) -> bool:
    return str(ds.PhotometricInterpretation).startswith("MONOCHROME")


def _check_pixels(ds: Dataset, window: str | tuple[float, float] | None) -> None:
    """Refuse a file without pixels, a size that no memory holds, and a window that has no sense."""
    if not any(name in ds for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise _Problem("has no pixel data: it holds no picture, or was cut short")
    if int(ds.Rows) * int(ds.Columns) > _MAX_PIXELS:
        raise _Problem("promises more than 2^28 pixels a frame")
    if window is None:
        return
    # a named window is in Hounsfield units, which only CT has
    is_named = isinstance(window, str)
    if not _is_grey(ds) or (is_named and ds.get("Modality") != "CT"):
        raise _Problem(f"is no CT in grey: the window {window!r} does not apply")


def _grey(flat: Dataset, stored: np.ndarray, window: Any) -> np.ndarray:
    """Turn the stored values of one frame, (rows, columns), into grey levels from 0 to 255.

    In the order of the standard: rescale (to Hounsfield units in CT), window or table, inversion.
    Changes `flat`, which is a copy made for this frame.
    """
    values = apply_modality_lut(stored, flat)
    padding = _padding_mask(flat, stored)
    if window is None and flat.get("VOILUTSequence"):
        grey = _through_table(flat, values)
    else:
        _set_window(flat, values, padding, window)
        grey = _through_window(flat, values)
    if flat.PhotometricInterpretation == "MONOCHROME1":  # there the smallest value is white
        grey = 255 - grey
    grey = np.round(grey).clip(0, 255).astype(np.uint8)
    grey[padding] = grey[~padding].min()
    return grey


def _padding_mask(flat: Dataset, stored: np.ndarray) -> np.ndarray:
    """Mark the pixels that were not measured; they would bend the contrast and shine when inverted.

    One value stands for padding, or all values between it and a limit.
    """
    nowhere = np.zeros(stored.shape, bool)
    ends = _numbers(flat, "PixelPaddingValue") + _numbers(flat, "PixelPaddingRangeLimit")
    if "PixelPaddingValue" not in flat or not ends:
        return nowhere
    mask = (stored >= min(ends)) & (stored <= max(ends))
    # a picture of nothing but padding is shown as it is: there is no darkest pixel to take
    return nowhere if mask.all() else mask


def _through_table(flat: Dataset, values: np.ndarray) -> np.ndarray:
    """Look values up in the file's VOI table, as float from 0 to 255.

    pydicom's own function wraps around when a table of 8 bits has more than 256 entries.
    """
    data = flat.VOILUTSequence[0].LUTData
    _, start, bits = flat.VOILUTSequence[0].LUTDescriptor
    table = np.frombuffer(data, "<u2") if isinstance(data, bytes) else np.atleast_1d(data)
    # values before the first entry take the first, values after the last take the last
    index = np.clip(values - float(start), 0, len(table) - 1).astype(int)
    return table[index] * 255.0 / (2**bits - 1)


def _set_window(flat: Dataset, values: np.ndarray, padding: np.ndarray, window: Any) -> None:
    """Write the window to use into `flat`; nothing to do where the file's own is good."""
    if window is None:
        if _has_window(flat):
            return
        is_ct = flat.get("Modality") == "CT"
        window = WINDOWS["abdomen"] if is_ct else _fitted_window(values[~padding])
    if isinstance(window, str):
        window = WINDOWS[window]
    flat.WindowCenter, flat.WindowWidth = window
    # the file's own function belongs to the file's own window
    flat.VOILUTFunction = "LINEAR"


def _has_window(flat: Dataset) -> bool:
    centre = _numbers(flat, "WindowCenter")
    width = _numbers(flat, "WindowWidth")
    return bool(centre) and bool(width) and width[0] >= 1  # the standard allows no less than 1


def _fitted_window(values: np.ndarray) -> tuple[float, float]:
    """Give the (centre, width) that spans all but the darkest and the brightest half per cent."""
    low, high = np.percentile(values, (0.5, 99.5))
    # The linear function of the standard runs from centre - 0.5 - (width - 1) / 2 to
    # centre - 0.5 + (width - 1) / 2: with these terms from low to high.
    centre = (low + high + 1) / 2
    width = max(high - low + 1, 2)
    return centre, width


def _through_window(flat: Dataset, values: np.ndarray) -> np.ndarray:
    """Apply the window that stands in `flat`, as float from 0 to 255."""
    # pydicom maps onto the range of the stored bits, stretched by the rescale or by the modality
    # table: say that there is no rescale and that 8 bits without sign are stored, and it is 0..255.
    for tag in ("RescaleSlope", "ModalityLUTSequence"):
        flat.pop(tag, None)
    flat.BitsStored = 8
    flat.PixelRepresentation = 0
    return apply_windowing(values, flat)


def _colour(ds: Dataset, stored: np.ndarray) -> np.ndarray:
    """Turn one RGB or palette frame into (rows, columns, 3) of uint8."""
    bits = int(ds.BitsStored)
    if ds.PhotometricInterpretation == "PALETTE COLOR":
        count, start, _ = ds.RedPaletteColorLookupTableDescriptor
        last = start + (count or 2**16) - 1  # 65536 entries do not fit into the tag: it says 0
        inside = stored.clip(start, last)
        stored = apply_color_lut(inside, ds)[..., :3]  # a fourth channel is transparency
        bits = 8 * stored.dtype.itemsize
    if bits != 8:
        stored = stored * (255 / (2**bits - 1))
    return stored.astype(np.uint8)


def _overlay_mask(ds: Dataset, raw: np.ndarray, frame: int) -> np.ndarray:
    """Mark what the overlay planes of a file mark in one frame, as (rows, columns) of bool.

    Up to 16 planes stand in the groups 6000, 6002, ... 601E, older files go on to 60FE.
    """
    mask = np.zeros(raw.shape[:2], bool)
    groups = {tag.group for tag in list(ds.keys()) if 0x6000 <= tag.group < 0x6100}
    for group in sorted(groups):
        if group % 2:  # odd groups are private
            continue
        if (group, 0x3000) in ds:  # overlay data
            mask |= _overlay_plane(ds, group, frame, mask.shape)
        elif raw.ndim == 2 and (group, 0x0102) in ds:  # retired: in an unused bit of the pixels
            bit = int(ds[group, 0x0102].value)
            mask |= (raw >> bit) & 1 == 1
    return mask


def _overlay_plane(ds: Dataset, group: int, frame: int, shape: tuple[int, int]) -> np.ndarray:
    """Put one overlay plane where it belongs on a picture; what hangs over the edge is cut off."""
    planes = ds.overlay_array(group)
    if planes.ndim == 2:
        planes = planes[np.newaxis]  # (frames, rows, columns)
    # frames of the overlay may begin at a later frame of the picture, counted from 1
    first = ds[group, 0x0051].value - 1 if (group, 0x0051) in ds else 0
    number = min(max(frame - first, 0), len(planes) - 1)
    # row and column of the plane's first pixel, counted from 1; it may lie outside of the picture
    origin = ds[group, 0x0050].value if (group, 0x0050) in ds else (1, 1)
    marked = np.argwhere(planes[number]) + np.array(origin) - 1
    inside = ((marked >= 0) & (marked < shape)).all(axis=1)
    rows, columns = marked[inside].T
    mask = np.zeros(shape, bool)
    mask[rows, columns] = True
    return mask


# --- series ---------------------------------------------------------------------------------------


@dataclass
class _Slice:
    """What decides about the place of a slice in its series.

    Attributes
    ----------
    position : float or None
        Millimetres along the normal of the slice; None where the file does not say it.
    number : float
        The instance number; infinite where there is none.
    path : Path
        The file.
    """

    position: float | None
    number: float
    path: Path


def series_files(folder: str | os.PathLike) -> list[list[Path]]:
    """Find the DICOM pictures under a folder, one list a series, in the order of the slices.

    Sorted by position along the normal of the slices, without one by instance number, then by name:
    names and instance numbers often run against the anatomy. A series with several orientations (a
    scout) is taken apart.

    Parameters
    ----------
    folder : str or Path
        Searched to any depth. Files that are no DICOM pictures are left out, and so are links that
        leave the folder.

    Returns
    -------
    list of list of Path
        The files of each series, series in the order in which they were found.

    Raises
    ------
    FileNotFoundError
        There is no such folder.
    ValueError
        It holds no DICOM pictures.

    Examples
    --------
    >>> import shutil, tempfile
    >>> from pydicom.data import get_testdata_file
    >>> folder = tempfile.mkdtemp()
    >>> _ = shutil.copy(get_testdata_file("CT_small.dcm"), folder)
    >>> [[file.name for file in series] for series in series_files(folder)]
    [['CT_small.dcm']]
    """
    root = Path(folder).resolve()
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    found: dict[tuple, list[_Slice]] = {}
    for path in sorted(root.rglob("*")):
        if not path.is_file() or not path.resolve().is_relative_to(root):
            continue
        # a ValueError says that this is no DICOM file or a damaged one
        with contextlib.suppress(ValueError), _open(path, stop_before_pixels=True) as ds:
            if "Rows" not in ds:
                continue
            flat = _flat(ds)
            # files of one series differ in the last digits of their orientation
            orientation = np.round(_numbers(flat, "ImageOrientationPatient"), 2).tolist()
            series = str(ds.get("SeriesInstanceUID") or path.parent)
            numbers = _numbers(flat, "InstanceNumber")
            one = _Slice(_position(flat), numbers[0] if numbers else math.inf, path)
            found.setdefault((series, tuple(orientation)), []).append(one)
    if not found:
        raise ValueError(f"no DICOM pictures in {folder}")
    return [_in_order(slices) for slices in found.values()]


def _in_order(slices: list[_Slice]) -> list[Path]:
    """Sort the slices of a series; positions decide only if all slices have one."""
    if any(one.position is None for one in slices):
        slices = sorted(slices, key=lambda one: (one.number, one.path))
    else:
        slices = sorted(slices, key=lambda one: (one.position, one.number, one.path))
    return [one.path for one in slices]


def _position(flat: Dataset) -> float | None:
    """Give the millimetres along the normal of the slice."""
    place = _numbers(flat, "ImagePositionPatient")
    orientation = _numbers(flat, "ImageOrientationPatient")
    if len(place) != 3 or len(orientation) != 6:
        return None
    along_rows = orientation[:3]
    along_columns = orientation[3:]
    normal = np.cross(along_rows, along_columns)
    return float(np.dot(normal, place))


# --- what may be said about a file ----------------------------------------------------------------


def describe(path: str | os.PathLike, *, salt: str, group_by: str = "patient") -> dict:
    """Say what a DICOM file shows, and give a key that keeps a patient's pictures together.

    Taken over are only tags that identify nobody, and of these only values of the expected form.

    Parameters
    ----------
    path : str or Path
        The file; its pixels are not read.
    salt : str
        A secret of yours: without one, whoever has a list of patient numbers can turn the keys
        back.
    group_by : {"patient", "study", "series"}
        What `group` stands for; if a file lacks it, the next. De-identified sets often give every
        patient the same number: then use "study".

    Returns
    -------
    dict
        modality, body_part, rows, columns, frames, spacing (of rows and columns, mm),
        slice_thickness (mm), slice_position (mm along the normal), transfer_syntax,
        burned_in_annotation ("YES", "NO" or None: not said), group and series (salted hashes of 16
        signs). What the file does not say is None.

    Raises
    ------
    ValueError
        An empty salt, an unknown `group_by`, or a file that is not DICOM or is damaged.

    Examples
    --------
    >>> from pydicom.data import get_testdata_file
    >>> about = describe(get_testdata_file("CT_small.dcm"), salt="a secret")
    >>> about["modality"], about["rows"], about["spacing"], len(about["group"])
    ('CT', 128, [0.661468, 0.661468], 16)
    """
    levels = {
        "patient": ["PatientID", "StudyInstanceUID", "SeriesInstanceUID"],
        "study": ["StudyInstanceUID", "SeriesInstanceUID"],
        "series": ["SeriesInstanceUID"],
    }
    if not salt or group_by not in levels:
        raise ValueError(
            "describe needs a salt that is not empty, and group_by patient, study or series"
        )
    with _open(path, stop_before_pixels=True) as ds:
        flat = _flat(ds)
        modality = _text(flat, "Modality")
        body_part = _text(flat, "BodyPartExamined")
        burned_in = _text(flat, "BurnedInAnnotation")
        # X-ray pictures have no spacing in the patient, but one on the detector
        spacing = _numbers(flat, "PixelSpacing") or _numbers(flat, "ImagerPixelSpacing")
        thickness = _numbers(flat, "SliceThickness")
        return {
            "modality": modality if re.fullmatch("[A-Z]{2,4}", modality) else None,
            "body_part": body_part if body_part in _BODY_PARTS else None,
            "rows": int(ds.Rows) if "Rows" in ds else None,
            "columns": int(ds.Columns) if "Columns" in ds else None,
            "frames": int(ds.get("NumberOfFrames") or 1),
            "spacing": spacing if spacing and min(spacing) > 0 else None,
            "slice_thickness": thickness[0] if thickness else None,
            "slice_position": _position(flat),
            "transfer_syntax": _transfer_syntax(ds),
            "burned_in_annotation": burned_in if burned_in in ("YES", "NO") else None,
            "group": _hashed(ds, levels[group_by], salt),
            "series": _hashed(ds, levels["series"], salt),
        }


def _text(ds: Dataset, tag: str) -> str:
    return str(ds.get(tag) or "").strip()


def _transfer_syntax(ds: Dataset) -> str | None:
    """Give the name of the compression if it is one of the standard: any text can stand there."""
    syntax = ds.file_meta.get("TransferSyntaxUID")
    if syntax and syntax.is_transfer_syntax and not syntax.is_private:
        return syntax.name
    return None


def _hashed(ds: Dataset, tags: list[str], salt: str) -> str | None:
    """Hash the first of these tags that says something, or give None."""
    for tag in tags:
        value = _text(ds, tag)
        if value:
            # the tag goes in, so that a patient and a study of the same number differ
            text = f"{tag}:{value}"
            return hmac.new(salt.encode(), text.encode(), hashlib.sha256).hexdigest()[:16]
    return None


def copy_without_patient(path: str | os.PathLike, out: str | os.PathLike) -> dict:
    """Write a copy of a DICOM picture that holds what `read_frames` and `series_files` need.

    Kept are the pixels, how to show them (group 0028), modality, position and number of the slice,
    and nothing else: no text, date, name or number of anybody, no overlay, and a hash in place of
    the series' UID, under which a series stays together. What is burnt into the pixels stays.

    Parameters
    ----------
    path : str or Path
        The original, which stays as it is.
    out : str or Path
        The copy; a file that is there is replaced.

    Returns
    -------
    dict
        What `describe` says of the original; its hashes are salted anew in each process.

    Raises
    ------
    ValueError
        The original is not DICOM or is damaged: one line without patient data.

    Examples
    --------
    >>> import tempfile
    >>> from pydicom import dcmread
    >>> from pydicom.data import get_testdata_file
    >>> out = tempfile.mkdtemp() + "/bare.dcm"
    >>> copy_without_patient(get_testdata_file("CT_small.dcm"), out)["frames"]
    1
    >>> "PatientName" in dcmread(out)
    False
    """
    about = describe(path, salt=_PROCESS_SALT)
    with _open(path) as ds:
        ds.walk(_drop_unless_kept)
        ds.SeriesInstanceUID = generate_uid(entropy_srcs=[about["series"] or str(path)])
        # The format asks for both UIDs in the head of the file: random ones say nothing. Any text
        # may stand in the preamble, the 128 bytes before the mark.
        head = FileMetaDataset()
        head.TransferSyntaxUID = ds.file_meta.TransferSyntaxUID
        head.MediaStorageSOPClassUID = head.MediaStorageSOPInstanceUID = generate_uid()
        ds.file_meta = head
        ds.preamble = bytes(128)
        ds.save_as(out, enforce_file_format=True)
    return about


def _drop_unless_kept(ds: Dataset, element: DataElement) -> None:
    """Delete an element that a copy must not keep; called for every one, inside sequences too."""
    # 0028: how to show the pixels; 7FE0: the pixels
    is_wanted = element.tag.group in (0x0028, 0x7FE0) or element.keyword in _KEPT_TAGS
    if not is_wanted or element.VR in _TELLING_VRS:
        del ds[element.tag]
