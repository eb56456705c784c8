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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydicom import dcmread
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import apply_color_lut, apply_windowing, get_decoder, iter_pixels
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    generate_uid,
)

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

# How files of JPEG, PNG, GIF, BMP, TIFF and WebP begin.
_PICTURE_MARKS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"RIFF")
# How a data set without the mark begins: group 0002 or 0008, the latter in either order of bytes.
_FIRST_GROUPS = (b"\x02\x00", b"\x08\x00", b"\x00\x08")

# Storage classes that hold no picture of a patient (PS3.4 annex B), by the part of the UID after
# 1.2.840.10008.5.1.4.1.1, with all that stand below it; None: a picture all the same. The first
# that fits counts.
_KINDS_BY_CLASS = {
    "4.2": "spectroscopy file",
    "9": "waveform",
    "11": "presentation state",
    "66.1": "registration",
    "66.3": "registration",
    "66.4": "segmentation",
    "66.5": "segmentation",
    "66": "raw data file",
    "67": "value mapping",
    "68": "surface scan",
    "78": "eye measurement",
    "79.1": "eye measurement",
    "80.1": "eye measurement",
    "88.59": "key object selection",
    "88.67": "radiation dose report",
    "88.68": "radiation dose report",
    "88.73": "radiation dose report",
    "88.76": "radiation dose report",
    "88": "structured report",
    "91": "annotation",
    "104.1": "encapsulated PDF",
    "104": "encapsulated document",
    "481.1": None,
    "481.2": None,
    "481.23": None,
    "481.24": None,
    "481.3": "RT structure set",
    "481.5": "RT plan",
    "481.8": "RT plan",
    "481": "radiotherapy record",
}
_STORAGE = "1.2.840.10008.5.1.4.1.1."
_DICOMDIR = "1.2.840.10008.1.3.10"
_KINDS_BY_MODALITY = {
    "KO": "key object selection",
    "PR": "presentation state",
    "REG": "registration",
    "RTPLAN": "RT plan",
    "RTRECORD": "radiotherapy record",
    "RTSTRUCT": "RT structure set",
    "SEG": "segmentation",
    "SR": "structured report",
}
# MPEG-2, MPEG-4, HEVC and SMPTE streams
_VIDEO = re.compile(r"1\.2\.840\.10008\.1\.2\.(4\.10[0-8](\.1)?|7\.\d+)")
_PAGE = re.compile(r"dose[ _-]*(report|info|record|sheet|summary|page)|patient protocol", re.I)

# The package that reads a compression; pydicom tries several, this one is the easiest to get.
_READERS = {
    JPEGBaseline8Bit: "pillow",
    JPEGExtended12Bit: "pylibjpeg-libjpeg",
    JPEGLossless: "python-gdcm",
    JPEGLosslessSV1: "python-gdcm",
    JPEGLSLossless: "pyjpegls",
    JPEGLSNearLossless: "pyjpegls",
    JPEG2000Lossless: "pylibjpeg-openjpeg",
    JPEG2000: "pylibjpeg-openjpeg",
    HTJ2KLossless: "pylibjpeg-openjpeg",
    HTJ2KLosslessRPCL: "pylibjpeg-openjpeg",
    HTJ2K: "pylibjpeg-openjpeg",
}
# Too new for pydicom's list of names.
_NEW_COMPRESSIONS = {
    "1.2.840.10008.1.2.4.110": "JPEG XL Lossless",
    "1.2.840.10008.1.2.4.111": "JPEG XL JPEG Recompression",
    "1.2.840.10008.1.2.4.112": "JPEG XL",
}

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

# So many slices tell which values a series holds.
_MOST_LOOKED_AT = 16

_YELLOW = (255, 255, 0)


def is_dicom(file: str | os.PathLike) -> bool:
    """Say whether a file is DICOM: by its content, not by its name.

    The standard puts a mark, the four letters DICM, at byte 128. Some files lack it: then the first
    tags tell. A file that is called .dcm and is no picture of another kind counts too, so that
    reading it says what is wrong with it.

    Parameters
    ----------
    file : str or Path
        A file; only its beginning is read.

    Returns
    -------
    bool
        True for DICOM, whatever the file is called.

    Raises
    ------
    OSError
        No such file, or no permission to read it.

    Examples
    --------
    >>> from pydicom.data import get_testdata_file
    >>> is_dicom(get_testdata_file("CT_small.dcm")), is_dicom(__file__)
    (True, False)
    """
    file = Path(file)
    head = _head(file)
    if _is_marked(head):
        return True
    if file.suffix.lower() in SUFFIXES:
        return not head.startswith(_PICTURE_MARKS)
    if not head.startswith(_FIRST_GROUPS):
        return False
    try:
        with open_dicom(file, stop_before_pixels=True, specific_tags=["SOPClassUID", "Rows"]):
            return True
    except ValueError:
        return False


def _head(file: str | os.PathLike) -> bytes:
    with open(file, "rb") as stream:
        return stream.read(132)


def _is_marked(head: bytes) -> bool:
    return head[128:] == b"DICM"


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
def open_dicom(path: str | os.PathLike, **options: Any) -> Iterator[Dataset]:
    """Give the data set of a file; whatever goes wrong while it is open becomes one clean line.

    Parameters
    ----------
    path : str or Path
        A DICOM file, with or without the mark.
    **options
        What `pydicom.dcmread` takes, such as `stop_before_pixels=True`.

    Yields
    ------
    pydicom.dataset.Dataset
        With a transfer syntax in its `file_meta`, even where the file names none.

    Raises
    ------
    ValueError
        It is no DICOM file, or what is done with it inside of the `with` block fails: one line that
        names the file, without patient data.
    OSError
        No such file, or no permission to read it.

    Examples
    --------
    >>> from pydicom.data import get_testdata_file
    >>> with open_dicom(get_testdata_file("CT_small.dcm"), stop_before_pixels=True) as ds:
    ...     ds.Rows
    128
    """
    ds = None
    with _silent_pydicom():
        try:
            ds = _read(path, options)
            yield ds
        except Exception as error:  # decoders raise whatever they like
            # an errno comes from the system, not from the content: no such file, no permission
            if isinstance(error, OSError) and error.errno:
                raise
            problem = _reason(error, ds)
            # from None: a traceback would print the original error, which can quote tag values
            raise ValueError(f"DICOM file {Path(path).name!r} {problem}") from None


def _read(path: str | os.PathLike, options: dict[str, Any]) -> Dataset:
    """Read a data set, with or without the mark, and say how it is encoded if the file does not."""
    head = _head(path)
    if not head:
        raise _Problem("is not DICOM: the file is empty")
    is_marked = _is_marked(head)
    try:
        ds = dcmread(path, force=not is_marked, **options)
    except Exception:
        # what is wrong inside of a file that is no DICOM is nobody's business
        if is_marked:
            raise
        ds = Dataset()
    # without the mark any file can be read as if it were DICOM, and gives tags that nobody wrote
    if not is_marked and "SOPClassUID" not in ds and "Rows" not in ds:
        raise _Problem("is not DICOM: it has neither a DICM mark nor the tags of a picture")
    ds.syntax_is_guessed = not ds.file_meta.get("TransferSyntaxUID")
    if ds.syntax_is_guessed:
        ds.file_meta.TransferSyntaxUID = _guessed_syntax(ds)
    return ds


def _guessed_syntax(ds: Dataset) -> UID:
    """Give the syntax by which pydicom could read the tags of a file that does not name it."""
    is_implicit, is_little_endian = ds.original_encoding
    if is_implicit:
        return ImplicitVRLittleEndian
    return ExplicitVRLittleEndian if is_little_endian else ExplicitVRBigEndian


def _reason(error: Exception, ds: Dataset | None) -> str:
    """Say in our own words why a file, of which perhaps the head was read, is of no use."""
    words = str(error)
    if isinstance(error, _Problem):
        return words
    # a decoder of some plugin may be there and refuse: pydicom has only this sentence for it
    if ds is not None and "missing" in words and "dependencies" in words:
        return _needed_package(ds.file_meta.TransferSyntaxUID)
    if ds is not None and ds.syntax_is_guessed:
        assumed = ds.file_meta.TransferSyntaxUID.name
        return f"is damaged, or no {assumed}, which was assumed: it names no transfer syntax"
    return "is damaged or cut short"


def _compression(syntax: UID) -> str:
    """Give the name of a compression if it is one of the standard: any text can stand there."""
    if syntax in _NEW_COMPRESSIONS:
        return _NEW_COMPRESSIONS[syntax]
    is_known = syntax.is_transfer_syntax and not syntax.is_private and syntax.name != syntax
    return syntax.name if is_known else "something that the standard does not name"


def _needed_package(syntax: UID) -> str:
    """Say what reads a compression that nothing here reads."""
    said = f"is compressed as {_compression(syntax)}"
    if syntax in _READERS:
        return f"{said}: pip install {_READERS[syntax]} to read it"
    return f"{said}, which nothing here can read: have it sent uncompressed"


# --- what kind of file it is ----------------------------------------------------------------------


def kind_of(ds: Dataset) -> str | None:
    """Say what a DICOM file is that holds no picture of a patient.

    Parameters
    ----------
    ds : pydicom.dataset.Dataset
        An open file, of which the pixels need not be read.

    Returns
    -------
    str or None
        Such as "structured report", "segmentation", "DICOMDIR" or "video"; None for a picture.

    Examples
    --------
    >>> from pydicom.data import get_testdata_file
    >>> kind_of(dcmread(get_testdata_file("rtplan.dcm")))
    'RT plan'
    >>> kind_of(dcmread(get_testdata_file("CT_small.dcm")))
    """
    storage_class = _storage_class(ds)
    if storage_class == _DICOMDIR:
        return "DICOMDIR"
    below = storage_class.removeprefix(_STORAGE)
    for beginning, kind in _KINDS_BY_CLASS.items():
        if below == beginning or below.startswith(f"{beginning}."):
            if kind:
                return kind
            break
    modality = _text(ds, "Modality")
    if modality in _KINDS_BY_MODALITY:
        return _KINDS_BY_MODALITY[modality]
    if _VIDEO.fullmatch(str(ds.file_meta.get("TransferSyntaxUID", ""))):
        return "video"
    # a picture without a size is damaged, but of other classes nothing is missing
    if "Rows" not in ds and storage_class and "Image" not in UID(storage_class).name:
        return "file without pixels"
    return None


def page_kind_of(ds: Dataset) -> str | None:
    """Say what a picture is that shows no part of a patient: a page of text, a screenshot, a dose.

    Parameters
    ----------
    ds : pydicom.dataset.Dataset
        An open file, of which the pixels need not be read.

    Returns
    -------
    str or None
        Such as "dose report page" or "screenshot"; None for other pictures.

    Examples
    --------
    >>> from pydicom.data import get_testdata_file
    >>> page_kind_of(dcmread(get_testdata_file("rtdose.dcm")))
    'RT dose'
    """
    storage_class = _storage_class(ds)
    if storage_class == f"{_STORAGE}481.2":
        return "RT dose"
    image_type = ds.get("ImageType") or ""
    kinds = image_type if isinstance(image_type, str) else " ".join(map(str, image_type))
    # Siemens writes CT_SOM5 PROT, others DOSE_INFO or the like, or they say it in the description
    if re.search(r"DOSE|\bPROT\b", kinds.upper()) or _PAGE.search(_text(ds, "SeriesDescription")):
        return "dose report page"
    modality = _text(ds, "Modality")
    if modality == "DOC":
        return "document page"
    # No scanner makes slices in colour: what is saved of them in colour is a screen, such as the
    # table of doses. Ultrasound, endoscopy and photographs are in colour by nature.
    is_capture = storage_class.removeprefix(_STORAGE).split(".")[0] == "7"
    has_colours = (tag_numbers(ds, "SamplesPerPixel") or [1])[0] > 1
    if is_capture and has_colours and modality in ("CT", "MR", "PT", "NM"):
        return "screenshot"
    return None


def _storage_class(ds: Dataset) -> str:
    in_data = _text(ds, "SOPClassUID")
    return in_data or str(ds.file_meta.get("MediaStorageSOPClassUID") or "").strip()


def shown_tags(ds: Dataset, frame: int = 0) -> Dataset:
    """Copy the describing tags, as a plain file has them at the top, for one frame.

    An enhanced file keeps window, rescale, position and spacing in functional groups: one item that
    all frames share and one item for each frame. Here they are lifted to the top.

    Parameters
    ----------
    ds : pydicom.dataset.Dataset
        An open file.
    frame : int
        The number of the frame, from 0.

    Returns
    -------
    pydicom.dataset.Dataset
        The groups 0008, 0018, 0020 and 0028 of the file and what was lifted; values are not
        decoded until somebody asks for them.

    Examples
    --------
    >>> from pydicom.data import get_testdata_file
    >>> flat = shown_tags(dcmread(get_testdata_file("CT_small.dcm")))
    >>> "Rows" in flat, "PatientName" in flat
    (True, False)
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


def tag_numbers(ds: Dataset, tag: str) -> list[float]:
    """Give the numbers of a tag.

    Parameters
    ----------
    ds : pydicom.dataset.Dataset
        Any data set.
    tag : str
        The keyword of a tag with one value or several.

    Returns
    -------
    list of float
        None at all where the tag is missing, or any of its values is empty, not finite or nonsense.

    Examples
    --------
    >>> from pydicom.data import get_testdata_file
    >>> ds = dcmread(get_testdata_file("CT_small.dcm"))
    >>> tag_numbers(ds, "PixelSpacing"), tag_numbers(ds, "WindowWidth")
    ([0.661468, 0.661468], [])
    """
    try:
        values = np.ravel(ds[tag].value).astype(float)
    # no such tag, text, or bytes that pydicom cannot decode: it raises many kinds
    except Exception:
        return []
    # an empty tag has the value None, which becomes NaN here
    return values.tolist() if np.isfinite(values).all() else []


def _numbers_in_place(ds: Dataset, tag: str) -> list[float]:
    """Give the numbers of a tag in their places; NaN for one that is empty or nonsense."""
    try:
        values = ds[tag].value
    except Exception:  # see above
        return []
    numbers = []
    for value in [values] if isinstance(values, str | float | int) else values or []:
        try:
            numbers.append(float(value))
        except (TypeError, ValueError):
            numbers.append(math.nan)
    return numbers


# --- pixels ---------------------------------------------------------------------------------------


def read_frames(
    path: str | os.PathLike,
    *,
    window: str | tuple | None = None,
    overlays: bool = False,
) -> list[Image.Image]:
    """Read the frames of a DICOM file as RGB pictures of 8 bits, rows and columns as stored.

    Parameters
    ----------
    path : str or Path
        The file; a slice has one frame, a cine or an enhanced file several.
    window : str or tuple, optional
        A name in `WINDOWS` (CT only, Hounsfield units) or (centre, width) in the file's units after
        its rescale; of three such, each makes one of the colours red, green and blue. Default: the
        file's own look-up table or first window; without one the abdomen window for CT, else the
        0.5th to 99.5th percentile of the values.
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
    check_window(window)
    frames = []
    with open_dicom(path) as ds:
        _check_kind(ds)
        _fill_in(ds)
        _check_pixels(ds, window)
        # A retired kind of overlay lies in bits of the pixels that the values do not use. pydicom
        # clears those, so the frames are read a second time as they are stored.
        raw_frames = itertools.repeat(None)
        if overlays:
            raw_frames = iter_pixels(ds, correct_unused_bits=False)
        pairs = zip(iter_pixels(ds), raw_frames, strict=False)
        for number, (stored, raw) in enumerate(pairs):
            if _is_grey(ds):
                rgb = _in_windows(ds, number, stored, window)
            else:
                rgb = _colour(ds, stored)
            if overlays:
                rgb[_overlay_mask(ds, raw, number)] = _YELLOW
            frames.append(Image.fromarray(rgb))
        promised = int(ds.get("NumberOfFrames") or 1)
        if len(frames) < promised:
            raise _Problem(f"promises {promised} frames and holds {len(frames)}: it was cut short")
    return frames


def _is_grey(ds: Dataset) -> bool:
    return str(ds.PhotometricInterpretation).startswith("MONOCHROME")


def _in_windows(ds: Dataset, number: int, stored: np.ndarray, window: Any) -> np.ndarray:
    """Turn a grey frame into (rows, columns, 3): of one window grey, of three coloured."""
    if not are_three_windows(window):
        grey = _grey(shown_tags(ds, number), stored, window)
        return np.stack([grey, grey, grey], axis=-1)
    colours = [_grey(shown_tags(ds, number), stored, one) for one in window]
    return np.stack(colours, axis=-1)


def are_three_windows(window: Any) -> bool:
    """Say whether three windows are given, one for each of the colours red, green and blue.

    Parameters
    ----------
    window : any value
        What `read_frames` takes.

    Returns
    -------
    bool
        False for one window, and for none.

    Examples
    --------
    >>> are_three_windows(("lung", "mediastinum", "bone")), are_three_windows((40, 400))
    (True, False)
    """
    return isinstance(window, tuple | list) and len(window) == 3


def check_window(window: Any) -> None:
    """Refuse a window that has no sense for any file.

    Parameters
    ----------
    window : any value
        What `read_frames` takes.

    Raises
    ------
    ValueError
        It is no name of a window, no (centre, width), and not three of these.

    Examples
    --------
    >>> check_window(("lung", "mediastinum", (400, 1800)))
    """
    if are_three_windows(window):
        for one in window:
            if one is None or are_three_windows(one):
                raise ValueError("window: each of three windows is a name, or centre and width")
            check_window(one)
        return
    if window is None or window in list(WINDOWS):
        return
    if isinstance(window, str):
        names = ", ".join(WINDOWS)
        raise ValueError(f"no CT window is called {window!r}: choose one of {names}")
    try:
        centre, width = map(float, window)
        is_good = math.isfinite(centre) and math.isfinite(width) and width >= 1
    except (TypeError, ValueError):
        is_good = False
    if not is_good:
        raise ValueError(f"window={window!r} is no centre and width, of which the width is from 1")


def _check_kind(ds: Dataset) -> None:
    """Refuse files that hold something else than pictures."""
    kind = kind_of(ds)
    if kind == "video":
        syntax = _compression(ds.file_meta.TransferSyntaxUID)
        raise _Problem(f"is a video ({syntax}), which is not read: save frames of it as pictures")
    if kind:
        article = "an" if kind.startswith(("RT ", "a", "e")) else "a"
        raise _Problem(f"is {article} {kind}, which holds no picture to read")


def _fill_in(ds: Dataset) -> None:
    """Give tags that are missing or empty the value that the standard or the pixels imply.

    pydicom refuses to decode without them.
    """
    _set_default(ds, "SamplesPerPixel", 1)
    is_colour = ds.SamplesPerPixel == 3
    is_jpeg = ds.file_meta.TransferSyntaxUID in (JPEGBaseline8Bit, JPEGExtended12Bit)
    coloured = "YBR_FULL_422" if is_jpeg else "RGB"
    _set_default(ds, "PhotometricInterpretation", coloured if is_colour else "MONOCHROME2")
    named = _text(ds, "PhotometricInterpretation").upper()
    # a name that contradicts the number of samples counts less than the number
    if is_colour and (named.startswith("MONOCHROME") or named == "PALETTE COLOR"):
        named = coloured
    elif not is_colour and not named.startswith(("MONOCHROME", "PALETTE")):
        named = "MONOCHROME2"
    ds.PhotometricInterpretation = named
    _set_default(ds, "PlanarConfiguration", 0)
    _set_default(ds, "PixelRepresentation", 0)
    if "PixelData" in ds and ds.get("BitsAllocated"):
        _set_default(ds, "BitsStored", ds.BitsAllocated)


def _set_default(ds: Dataset, tag: str, value: Any) -> None:
    if tag not in ds or ds[tag].value in (None, ""):
        setattr(ds, tag, value)


def _check_pixels(ds: Dataset, window: str | tuple | None) -> None:
    """Refuse a file without pixels or a decoder for them, a size that no memory holds, and a
    window that has no sense.
    """
    if not any(name in ds for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise _Problem("has no pixel data: it holds no picture, or was cut short")
    # without these nobody knows what the pixels are; the standard has no default
    needed = ["Rows", "Columns"]
    if "PixelData" in ds:
        needed.append("BitsAllocated")
    missing = [name for name in needed if not ds.get(name)]
    if missing and ds.syntax_is_guessed:
        missing.insert(0, "TransferSyntaxUID")
    if missing:
        raise _Problem(f"does not say how its pixels are stored: {', '.join(missing)} missing")
    if int(ds.Rows) * int(ds.Columns) > _MAX_PIXELS:
        raise _Problem("promises more than 2^28 pixels a frame")
    _check_decoder(ds)
    if window is None:
        return
    # a named window is in Hounsfield units, which only CT has
    windows = window if are_three_windows(window) else [window]
    is_named = any(isinstance(one, str) for one in windows)
    if not _is_grey(ds) or (is_named and ds.get("Modality") != "CT"):
        raise _Problem(f"is no CT in grey: the window {window!r} does not apply")


def _check_decoder(ds: Dataset) -> None:
    """Say which package is missing, before pydicom tries what is there and fails."""
    syntax = ds.file_meta.TransferSyntaxUID
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise _Problem(_needed_package(syntax)) from None
    # Of the plugins that say that they read this syntax only one reads its deeper samples.
    is_deep_jpeg = syntax == JPEGExtended12Bit and ds.BitsAllocated > 8
    if is_deep_jpeg and "pylibjpeg" not in decoder.available_plugins:
        package = _READERS[JPEGExtended12Bit]
        raise _Problem(
            f"is a JPEG of 12 bits ({_compression(syntax)}): pip install {package} (licence: GPL) "
            "to read it"
        )
    if not decoder.is_available:
        raise _Problem(_needed_package(syntax))


def _grey(flat: Dataset, stored: np.ndarray, window: Any) -> np.ndarray:
    """Turn the stored values of one frame, (rows, columns), into grey levels from 0 to 255.

    In the order of the standard: rescale (to Hounsfield units in CT), window or table, inversion.
    Changes `flat`, which is a copy made for this frame.
    """
    values = _modality_values(flat, stored)
    padding = _padding_mask(flat, stored) | np.isnan(values)
    values[np.isnan(values)] = 0  # no value at all: as dark as padding in the end
    table = _first_table(flat, "VOILUTSequence") if window is None else None
    if table:
        grey = table.look_up(values) * 255.0 / (2**table.bits - 1)
    else:
        _set_window(flat, values, padding, window)
        grey = _through_window(flat, values)
    if flat.PhotometricInterpretation == "MONOCHROME1":  # there the smallest value is white
        grey = 255 - grey
    grey = np.round(grey).clip(0, 255).astype(np.uint8)
    grey[padding] = 0 if padding.all() else grey[~padding].min()
    return grey


def _modality_values(flat: Dataset, stored: np.ndarray) -> np.ndarray:
    """Turn stored values into those of the modality, as float: by a table, or slope and intercept.

    pydicom's own function reads no table of 8 bits that is packed into words, and nothing where one
    of slope and intercept is empty.
    """
    table = _first_table(flat, "ModalityLUTSequence")
    if table:
        return table.look_up(np.nan_to_num(stored)).astype(float)
    slope = (tag_numbers(flat, "RescaleSlope") or [1.0])[0]
    intercept = (tag_numbers(flat, "RescaleIntercept") or [0.0])[0]
    # a slope of 0 would leave nothing of the picture: nobody means that
    return stored.astype(float) * (slope or 1.0) + intercept


def _padding_mask(flat: Dataset, stored: np.ndarray) -> np.ndarray:
    """Mark the pixels that were not measured; they would bend the contrast and shine when inverted.

    One value stands for padding, or all values between it and a limit.
    """
    nowhere = np.zeros(stored.shape, bool)
    for name in ("PixelPadding", "FloatPixelPadding", "DoubleFloatPixelPadding"):
        value = tag_numbers(flat, f"{name}Value")
        if value:
            ends = value + tag_numbers(flat, f"{name}RangeLimit")
            break
    else:
        return nowhere
    if stored.dtype.kind == "i":
        # the same bits, if they were written as a number without sign
        ends = [end - 2**16 if end >= 2**15 and stored.itemsize == 2 else end for end in ends]
    mask = (stored >= min(ends)) & (stored <= max(ends))
    # a picture of nothing but padding is shown as it is: there is no darkest pixel to take
    return nowhere if mask.all() else mask


@dataclass
class _Table:
    """A look-up table of the modality or of the VOI.

    Attributes
    ----------
    entries : numpy.ndarray
        What each value becomes.
    start : int
        The value of the first entry.
    bits : int
        How many bits the entries use.
    """

    entries: np.ndarray
    start: int
    bits: int

    def look_up(self, values: np.ndarray) -> np.ndarray:
        # values before the first entry take the first, values after the last take the last
        places = np.rint(np.clip(values - float(self.start), 0, len(self.entries) - 1))
        return self.entries[places.astype(int)]


def _first_table(flat: Dataset, sequence: str) -> _Table | None:
    """Read the first table of a sequence; None where there is none, or an empty one.

    pydicom's own functions wrap around when a table of 8 bits has more than 256 entries.
    """
    if not flat.get(sequence):
        return None
    item = flat[sequence].value[0]
    descriptor = tag_numbers(item, "LUTDescriptor")
    if len(descriptor) != 3 or "LUTData" not in item or not item.LUTData:
        return None
    count, start, bits = map(int, descriptor)
    if flat.get("PixelRepresentation") == 1 and start >= 2**15:
        start -= 2**16  # the same bits, if it was written as a number without sign
    count = count or 2**16  # 65536 does not fit into the tag: it says 0
    entries, bits = _table_entries(item, count, bits)
    return _Table(entries, start, bits)


def _table_entries(item: Dataset, count: int, bits: int) -> tuple[np.ndarray, int]:
    """Give the entries of a table and how many bits they really use."""
    data = item.LUTData
    if isinstance(data, bytes):
        is_big_endian = item.original_encoding[1] is False
        data = data if len(data) % 2 == 0 else data + b"\0"
        entries = np.frombuffer(data, ">u2" if is_big_endian else "<u2").astype(int)
    else:
        entries = np.atleast_1d(data).astype(int) & 0xFFFF
    # Two entries of 8 bits may share a word, the earlier one in its lower half.
    if bits <= 8 and count > 1 and len(entries) == (count + 1) // 2:
        entries = np.stack([entries & 255, entries >> 8], axis=-1).ravel()
    entries = entries[:count]
    if bits == 8 and entries.max() > 255 and (entries & 255 == entries >> 8).all():
        entries = entries & 255  # some write each byte twice
    used = max(8, int(entries.max()).bit_length())
    # Many write 16 for the size of a word, whatever the entries use; taken at its word such a table
    # of 12 bits would give a black picture. Other sizes are believed, unless the entries are larger.
    if bits == 16 or not 8 <= bits <= 16 or used > bits:
        bits = used
    return entries, bits


def _set_window(flat: Dataset, values: np.ndarray, padding: np.ndarray, window: Any) -> None:
    """Write the window to use, and the function that goes with it, into `flat`."""
    function = "LINEAR"
    if window is None:
        named = _text(flat, "VOILUTFunction").upper()
        own_function = named if named in ("LINEAR_EXACT", "SIGMOID") else "LINEAR"
        window = _own_window(flat, own_function)
        if window:
            function = own_function
        elif flat.get("Modality") == "CT":
            window = WINDOWS["abdomen"]
        else:
            window = _fitted_window(values[~padding])
            function = "LINEAR_EXACT"
    if isinstance(window, str):
        window = WINDOWS[window]
    flat.WindowCenter, flat.WindowWidth = window
    flat.VOILUTFunction = function


def _own_window(flat: Dataset, function: str) -> tuple[float, float] | None:
    """Give the first window of the file that has both centre and width."""
    centres = _numbers_in_place(flat, "WindowCenter")
    widths = _numbers_in_place(flat, "WindowWidth")
    for centre, width in zip(centres, widths, strict=False):
        # the standard allows no less than 1 for the linear function, and more than 0 for others
        is_wide_enough = width >= 1 if function == "LINEAR" else width > 0
        if math.isfinite(centre) and math.isfinite(width) and is_wide_enough:
            return centre, width
    return None


def _fitted_window(values: np.ndarray) -> tuple[float, float]:
    """Give the (centre, width) that spans all but the darkest and the brightest half per cent."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 1.0
    low, high = np.percentile(finite, (0.5, 99.5))
    return (low + high) / 2, (high - low) or 1.0


def default_window(paths: Sequence[str | os.PathLike]) -> tuple[float, float]:
    """Give one window for the grey slices of a series, as `read_frames` would choose one for each.

    The function of a window, a curve or a look-up table, is left out: slices that are to be
    compared want one window for all.

    Parameters
    ----------
    paths : sequence of str or Path
        The files, of one frame each, in order.

    Returns
    -------
    tuple of float
        Centre and width: the first window of the middle file, else abdomen for CT, else what spans
        all but the darkest and the brightest half per cent of the values, of up to 16 files.

    Raises
    ------
    ValueError
        Not DICOM, no pixel data, damaged, or no decoder: one line without patient data.
    OSError
        No such file, or no permission to read it.

    Examples
    --------
    >>> from pydicom.data import get_testdata_file
    >>> default_window([get_testdata_file("CT_small.dcm")])
    (50, 400)
    """
    with open_dicom(paths[len(paths) // 2], stop_before_pixels=True) as ds:
        flat = shown_tags(ds)
        own = _own_window(flat, "LINEAR")
        if own:
            return own
        if flat.get("Modality") == "CT":
            return WINDOWS["abdomen"]
    looked_at = np.linspace(0, len(paths) - 1, min(len(paths), _MOST_LOOKED_AT)).round()
    values = [_measured_values(paths[int(number)]) for number in looked_at]
    return _fitted_window(np.concatenate(values))


def _measured_values(path: str | os.PathLike) -> np.ndarray:
    """Give the values of the first frame of a grey file, in one line, without padding."""
    with open_dicom(path) as ds:
        _check_kind(ds)
        _fill_in(ds)
        _check_pixels(ds, None)
        flat = shown_tags(ds)
        stored = next(iter_pixels(ds))
        return _modality_values(flat, stored)[~_padding_mask(flat, stored)]


def show_values(values: np.ndarray, window: Any) -> np.ndarray:
    """Show values, such as Hounsfield units, in a window, exactly as `read_frames` does.

    Parameters
    ----------
    values : numpy.ndarray
        Numbers of any shape; what is not finite becomes as dark as the darkest of the others.
    window : str or tuple
        A name in `WINDOWS`, (centre, width), or three of these for three colours.

    Returns
    -------
    numpy.ndarray
        uint8, with the three colours as last axis.

    Raises
    ------
    ValueError
        There is no such window.

    Examples
    --------
    >>> show_values(np.array([-150, 50, 250]), (50, 400))[:, 0].tolist()
    [0, 128, 255]
    """
    check_window(window)
    windows = window if are_three_windows(window) else [window] * 3
    finite = np.isfinite(values)
    colours = []
    for one in windows:
        flat = Dataset()
        flat.PhotometricInterpretation = "MONOCHROME2"
        _set_window(flat, values, ~finite, one)
        grey = _through_window(flat, np.where(finite, values, 0).astype(float))
        grey = np.round(grey).clip(0, 255).astype(np.uint8)
        if not finite.all():
            grey[~finite] = grey[finite].min() if finite.any() else 0
        colours.append(grey)
    return np.stack(colours, axis=-1)


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
        if bits == 16 and _palette_has_bytes(ds):
            bits = 8
    if bits != 8:
        stored = stored * (255 / (2**bits - 1))
    return stored.astype(np.uint8)


def _palette_has_bytes(ds: Dataset) -> bool:
    """Say whether a palette that says 16 bits, for the size of a word, uses only 8 of them."""
    for colour in ("Red", "Green", "Blue"):
        data = ds.get(f"{colour}PaletteColorLookupTableData") or b"\xff\xff"
        if np.frombuffer(data, np.uint16).max() > 255:
            return False
    return True


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
    ('CT', 128, [0.661468, 0.661468], 20)
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
    with open_dicom(path, stop_before_pixels=True) as ds:
        flat = shown_tags(ds)
        modality = _text(flat, "Modality")
        body_part = _text(flat, "BodyPartExamined")
        burned_in = _text(flat, "BurnedInAnnotation").upper()
        # X-ray pictures have no spacing in the patient, but one on the detector
        spacing = tag_numbers(flat, "PixelSpacing") or tag_numbers(flat, "ImagerPixelSpacing")
        thickness = tag_numbers(flat, "SliceThickness")
        return {
            "modality": modality if re.fullmatch("[A-Z]{2,4}", modality) else None,
            "body_part": body_part if body_part in _BODY_PARTS else None,
            "rows": int(ds.get("Rows") or 0) or None,
            "columns": int(ds.get("Columns") or 0) or None,
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
    syntax = ds.file_meta.TransferSyntaxUID
    if syntax.is_transfer_syntax and not syntax.is_private:
        return syntax.name
    return None


def _position(flat: Dataset) -> float | None:
    """Give the millimetres along the normal of the slice."""
    place = tag_numbers(flat, "ImagePositionPatient")
    orientation = tag_numbers(flat, "ImageOrientationPatient")
    if len(place) != 3 or len(orientation) != 6:
        return None
    normal = np.cross(orientation[:3], orientation[3:])  # along the rows, along the columns
    return float(np.dot(normal, place))


def _hashed(ds: Dataset, tags: list[str], salt: str) -> str | None:
    """Hash the first of these tags that says something, or give None."""
    for tag in tags:
        value = _text(ds, tag)
        if value:
            if tag == "PatientID":
                # as a table's column of patients is hashed, so that both name the same group
                return "patient-" + _keyed_hash(value, salt)[:12]
            # the tag goes in, so that a study and a series of the same number differ
            return _keyed_hash(f"{tag}:{value}", salt)[:16]
    return None


def _keyed_hash(text: str, salt: str) -> str:
    return hmac.new(salt.encode(), text.encode(), hashlib.sha256).hexdigest()


def copy_without_patient(path: str | os.PathLike, out: str | os.PathLike) -> dict:
    """Write a copy of a DICOM picture that holds what `read_frames` and `series_files` need.

    Kept are the pixels, how to show them (group 0028), modality, position and number of the slice,
    and nothing else: no text, date, name or number of anybody, no overlay, and a hash in place of
    the series' UID, if there is one, under which a series stays together. What is burnt into the pixels stays.

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
    with open_dicom(path) as ds:
        ds.walk(_drop_unless_kept)
        # files that name no series stay together, as `series_files` has them
        if about["series"]:
            ds.SeriesInstanceUID = generate_uid(entropy_srcs=[about["series"]])
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
