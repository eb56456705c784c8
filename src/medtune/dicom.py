"""DICOM slices and series as plain RGB pictures, and a description that carries no patient data along.

Follows DICOM PS3.3: pixels C.7.6.3, modality LUT C.11.1, windows and VOI LUT C.11.2, overlays C.9.2.
"""

import contextlib
import hashlib
import hmac
import itertools
import logging
import math
import re
import secrets
import warnings
from pathlib import Path

import numpy as np

#: Named CT windows as (centre, width) in Hounsfield units, after Radiopaedia, "Windowing (CT)".
WINDOWS = {"brain": (40, 80), "stroke": (40, 40), "subdural": (75, 215), "temporal bone": (600, 2800),
           "lung": (-600, 1500), "mediastinum": (50, 350), "abdomen": (50, 400), "liver": (30, 150),
           "bone": (400, 1800)}  # fmt: skip
# Body parts are passed on by list (PS3.16 annex L): what else stands in that tag may be free text.
_PARTS = """ABDOMEN|ANKLE|AORTA|ARM|BLADDER|BRAIN|BREAST|CHEST|CLAVICLE|COLON|[CLST]SPINE|ELBOW|ESOPHAGUS|EXTREMITY|EYE|
FEMUR|FINGER|FOOT|GALLBLADDER|HAND|HEAD|HEADNECK|HEART|HIP|HUMERUS|JAW|KIDNEY|KNEE|LEG|LIVER|LUNG|MEDIASTINUM|NECK|NOSE|
ORBIT|OVARY|PANCREAS|PELVIS|PROSTATE|RECTUM|RIB|SHOULDER|SINUS|SKULL|SPINE|SPLEEN|STERNUM|STOMACH|TESTIS|THIGH|THYROID|
TOE|UTERUS|WHOLEBODY|WRIST""".replace("\n", "")
# What a copy without the patient keeps beside pixels and their display.
_SHOWN = {"Modality", "InstanceNumber", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"}
_SHOWN |= {"SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "PlanePositionSequence"}
_SHOWN |= {"PlaneOrientationSequence", "PixelMeasuresSequence", "PixelValueTransformationSequence"}
_SHOWN |= {"FrameVOILUTSequence"}
_SALT = secrets.token_hex(16)


@contextlib.contextmanager
def _open(path, **options):
    """The data set of a file. What pydicom and its decoders say can quote tag values: none of it gets out."""
    from pydicom import dcmread
    from pydicom.errors import InvalidDicomError

    logger, problem, ds = logging.getLogger("pydicom"), None, None
    was = logger.disabled
    with warnings.catch_warnings(action="ignore"):
        logger.disabled = True
        try:
            ds = dcmread(path, **options)
            yield ds
        except InvalidDicomError:
            problem = "is not DICOM: there is no DICM mark after 128 bytes"
        except _Problem as error:
            problem = str(error)
        except Exception as error:  # decoders raise whatever they like
            if isinstance(error, OSError) and error.errno:
                raise
            problem = "is damaged or cut short"
            if "missing" in str(error) and "dependencies" in str(error):
                problem = f"is compressed as {ds.file_meta.TransferSyntaxUID.name}: pip install python-gdcm to read it"
        finally:
            logger.disabled = was
    if problem:
        raise ValueError(f"DICOM file {Path(path).name!r} {problem}") from None


class _Problem(Exception):
    """Words of our own, free of patient data."""


def _flat(ds, frame: int = 0):
    """A copy of the describing tags; what an enhanced file keeps for every frame or this one is lifted to the top."""
    from pydicom.dataset import Dataset

    flat = Dataset({tag: ds.get_item(tag) for tag in list(ds.keys()) if tag.group in (0x08, 0x18, 0x20, 0x28)})
    for name, at in (("SharedFunctionalGroupsSequence", 0), ("PerFrameFunctionalGroupsSequence", frame)):
        for element in (ds[name].value[at] if name in ds and at < len(ds[name].value) else ()):
            if element.VR == "SQ" and element.value:
                flat.update(element.value[0])
    return flat


def _numbers(ds, tag: str) -> list[float]:
    """The numbers of a tag; empty where it is missing or nonsense."""
    with contextlib.suppress(Exception):
        value = np.ravel(ds[tag].value).astype(float)
        return value.tolist() if np.isfinite(value).all() else []
    return []


def _grey(flat, stored, window) -> np.ndarray:
    """Stored values of one frame as 0..255: rescale, window, inversion; padding as dark as the darkest pixel."""
    from pydicom.pixels import apply_modality_lut, apply_windowing

    values = apply_modality_lut(stored, flat)
    ends = _numbers(flat, "PixelPaddingValue") + _numbers(flat, "PixelPaddingRangeLimit")
    padding = np.zeros(stored.shape, bool)
    if "PixelPaddingValue" in flat and ends:
        padding = (stored >= min(ends)) & (stored <= max(ends))
        padding &= not padding.all()
    inverse = flat.PhotometricInterpretation == "MONOCHROME1"
    centre, width = _numbers(flat, "WindowCenter"), _numbers(flat, "WindowWidth")
    if window is None and flat.get("VOILUTSequence"):  # pydicom wraps when a table of 8 bits has more than 256 entries
        data, (_, start, bits) = flat.VOILUTSequence[0].LUTData, flat.VOILUTSequence[0].LUTDescriptor
        table = np.frombuffer(data, "<u2") if isinstance(data, bytes) else np.atleast_1d(data)
        grey = table[np.clip(values - float(start), 0, len(table) - 1).astype(int)] * 255.0 / (2**bits - 1)
    else:
        if window is None and (not centre or not width or width[0] < 1):
            low, high = np.percentile(values[~padding], (0.5, 99.5))
            fitted = (low + high + 1) / 2, max(high - low + 1, 2)
            window = "abdomen" if flat.get("Modality") == "CT" else fitted
        if window is not None:
            flat.WindowCenter, flat.WindowWidth = WINDOWS[window] if isinstance(window, str) else window
            flat.VOILUTFunction = "LINEAR"
        for tag in ("RescaleSlope", "ModalityLUTSequence"):
            flat.pop(tag, None)
        flat.BitsStored, flat.PixelRepresentation = 8, 0  # pydicom windows to the stored range: ask for 0..255
        grey = apply_windowing(values, flat)
    grey = np.round(255 - grey if inverse else grey).clip(0, 255).astype(np.uint8)
    grey[padding] = grey[~padding].min()
    return grey


def _colour(ds, stored) -> np.ndarray:
    """One RGB or palette frame as uint8."""
    from pydicom.pixels import apply_color_lut

    bits = int(ds.BitsStored)
    if ds.PhotometricInterpretation == "PALETTE COLOR":
        count, start, _ = ds.RedPaletteColorLookupTableDescriptor
        stored = apply_color_lut(stored.clip(start, start + (count or 2**16) - 1), ds)[..., :3]
        bits = 8 * stored.dtype.itemsize
    return (stored if bits == 8 else stored * (255 / (2**bits - 1))).astype(np.uint8)


def _overlay(ds, raw, frame: int) -> np.ndarray:
    """Mask of what the overlay planes mark in one frame."""
    mask = np.zeros(raw.shape[:2], bool)
    for group in sorted({t.group for t in list(ds.keys()) if 0x6000 <= t.group < 0x6100 and t.group % 2 == 0}):
        if (group, 0x3000) in ds:
            planes = np.atleast_3d(ds.overlay_array(group).T).T  # (frames, rows, columns)
            first = ds[group, 0x0051].value - 1 if (group, 0x0051) in ds else 0
            plane = planes[min(max(frame - first, 0), len(planes) - 1)]
            origin = ds[group, 0x0050].value if (group, 0x0050) in ds else (1, 1)
            at = np.argwhere(plane) + np.array(origin) - 1
            mask[tuple(at[((at >= 0) & (at < mask.shape)).all(1)].T)] = True
        elif raw.ndim == 2 and (group, 0x0102) in ds:  # retired: in an unused bit of the pixels
            mask |= (raw >> int(ds[group, 0x0102].value)) & 1 == 1
    return mask


def read_frames(path, *, window=None, overlays: bool = False) -> list:
    """The frames of a DICOM file as RGB pictures of 8 bits, rows and columns as stored.

    Parameters
    ----------
    path : str or Path
    window : str or tuple of float, optional
        A name in `WINDOWS` (CT only) or (centre, width) in the file's units. Default: the file's own look-up table or
        first window; without one the abdomen window for CT, else the 0.5th to 99.5th percentile of the values.
    overlays : bool
        Draw overlay planes in yellow (green is left to boxes).

    Raises
    ------
    ValueError
        Not DICOM, no pixel data, damaged, no decoder, or a window that does not apply: one line, no patient data.

    Examples
    --------
    >>> from pydicom.data import get_testdata_file
    >>> [image] = read_frames(get_testdata_file("CT_small.dcm"), window="lung")
    >>> image.mode, image.size
    ('RGB', (128, 128))
    """
    from PIL import Image
    from pydicom.pixels import iter_pixels

    if isinstance(window, str) and window not in WINDOWS:
        raise ValueError(f"no CT window is called {window!r}: choose one of {', '.join(WINDOWS)}")
    frames = []
    with _open(path) as ds:
        if not any(name in ds for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
            raise _Problem("has no pixel data: it holds no picture, or was cut short")
        if int(ds.Rows) * int(ds.Columns) > 2**28:  # a header may promise any size: stop before memory does
            raise _Problem("promises more than 2^28 pixels a frame")
        grey = str(ds.PhotometricInterpretation).startswith("MONOCHROME")
        if window is not None and not (grey and (not isinstance(window, str) or ds.get("Modality") == "CT")):
            raise _Problem(f"is no CT in grey: the window {window!r} does not apply")
        raws = iter_pixels(ds, correct_unused_bits=False) if overlays else itertools.repeat(None)
        for number, (stored, raw) in enumerate(zip(iter_pixels(ds), raws, strict=False)):
            rgb = np.stack([_grey(_flat(ds, number), stored, window)] * 3, -1) if grey else _colour(ds, stored)
            if overlays:
                rgb[_overlay(ds, raw, number)] = (255, 255, 0)
            frames.append(Image.fromarray(rgb))
    return frames


def _position(flat) -> float | None:
    """Millimetres along the normal of the slice."""
    place, across = _numbers(flat, "ImagePositionPatient"), _numbers(flat, "ImageOrientationPatient")
    return float(np.dot(np.cross(across[:3], across[3:]), place)) if len(place) == 3 and len(across) == 6 else None


def series_files(folder) -> list[list[Path]]:
    """The DICOM pictures under a folder, one list a series, in the order of the slices.

    Sorted by position along the normal of the slices, without one by instance number, then by name. A series with
    several orientations (a scout) is taken apart. Other files are left out, so are links that leave the folder.
    """
    root, found = Path(folder).resolve(), {}
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    for path in sorted(p for p in root.rglob("*") if p.is_file() and p.resolve().is_relative_to(root)):
        with contextlib.suppress(ValueError), _open(path, stop_before_pixels=True) as ds:
            if "Rows" in ds:
                flat = _flat(ds)
                turned = tuple(np.round(_numbers(flat, "ImageOrientationPatient"), 2).tolist())
                number = (_numbers(flat, "InstanceNumber") or [math.inf])[0]
                key = str(ds.get("SeriesInstanceUID") or path.parent), turned
                found.setdefault(key, []).append((_position(flat), number, path))
    if not found:
        raise ValueError(f"no DICOM pictures in {folder}")
    return [[path for *_, path in sorted(one, key=lambda s: s[1:] if any(p[0] is None for p in one) else s)]
            for one in found.values()]


def describe(path, *, salt: str, group_by: str = "patient") -> dict:
    """What a DICOM file shows, from tags that identify nobody, and a key that keeps a patient's pictures together.

    Parameters
    ----------
    path : str or Path
    salt : str
        A secret of yours: without one, whoever has a list of patient numbers can turn the keys back.
    group_by : {"patient", "study", "series"}
        What `group` stands for; if a file lacks it, the next. De-identified sets often give every patient the same
        number: then use "study".

    Returns
    -------
    dict
        modality, body_part, rows, columns, frames, spacing (of rows and columns), slice_thickness, slice_position (mm),
        transfer_syntax, burned_in_annotation ("YES", "NO" or None: not said), group and series (salted hashes).

    Examples
    --------
    >>> from pydicom.data import get_testdata_file
    >>> about = describe(get_testdata_file("CT_small.dcm"), salt="a secret")
    >>> about["modality"], about["rows"], about["spacing"], len(about["group"])
    ('CT', 128, [0.661468, 0.661468], 16)
    """
    order = {"patient": "PatientID", "study": "StudyInstanceUID", "series": "SeriesInstanceUID"}
    if not salt or group_by not in order:
        raise ValueError("describe needs a salt that is not empty, and group_by patient, study or series")
    with _open(path, stop_before_pixels=True) as ds:
        flat, syntax = _flat(ds), ds.file_meta.get("TransferSyntaxUID")
        tags = ("Modality", "BodyPartExamined", "BurnedInAnnotation")
        modality, part, burned = (str(flat.get(tag) or "").strip() for tag in tags)
        spacing = _numbers(flat, "PixelSpacing") or _numbers(flat, "ImagerPixelSpacing")

        def key(first):
            names = list(order.values())
            text = next((f"{n}:{v}" for n in names[names.index(first) :] if (v := str(ds.get(n) or "").strip())), None)
            return text and hmac.new(salt.encode(), text.encode(), hashlib.sha256).hexdigest()[:16]

        return {
            "modality": modality if re.fullmatch("[A-Z]{2,4}", modality) else None,
            "body_part": part if re.fullmatch(_PARTS, part) else None,
            "rows": int(ds.Rows) if "Rows" in ds else None, "columns": int(ds.Columns) if "Columns" in ds else None,
            "frames": int(ds.get("NumberOfFrames") or 1),
            "spacing": spacing if spacing and min(spacing) > 0 else None,
            "slice_thickness": next(iter(_numbers(flat, "SliceThickness")), None), "slice_position": _position(flat),
            "transfer_syntax": syntax.name if syntax and syntax.is_transfer_syntax and not syntax.is_private else None,
            "burned_in_annotation": {"YES": "YES", "NO": "NO"}.get(burned),
            "group": key(order[group_by]), "series": key("SeriesInstanceUID"),
        }  # fmt: skip


def copy_without_patient(path, out) -> dict:
    """Write a copy of a DICOM picture that holds what `read_frames` and `series_files` need, and nothing else.

    Kept are the pixels, how to show them (group 0028), modality, position and number of the slice; no text, date, name
    or number of anybody, no overlay, and a hash in place of the series' UID, under which a series stays together.

    Returns
    -------
    dict
        What `describe` says of the original; its hashes are salted anew in each process.

    Examples
    --------
    >>> import tempfile
    >>> from pydicom import dcmread
    >>> from pydicom.data import get_testdata_file
    >>> out = tempfile.mkdtemp() + "/bare.dcm"
    >>> copy_without_patient(get_testdata_file("CT_small.dcm"), out)["frames"], "PatientName" in dcmread(out)
    (1, False)
    """
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import generate_uid

    def drop(ds, element):
        wanted = element.tag.group in (0x0028, 0x7FE0) or element.keyword in _SHOWN
        if not wanted or element.VR in ("LO", "LT", "PN", "SH", "ST", "UC", "UI", "UN", "UR", "UT"):
            del ds[element.tag]

    about = describe(path, salt=_SALT)
    with _open(path) as ds:
        ds.walk(drop)
        ds.SeriesInstanceUID = generate_uid(entropy_srcs=[about["series"] or str(path)])
        meta, ds.preamble = FileMetaDataset(), bytes(128)
        meta.TransferSyntaxUID = ds.file_meta.TransferSyntaxUID
        meta.MediaStorageSOPClassUID = meta.MediaStorageSOPInstanceUID = generate_uid()
        ds.file_meta = meta
        ds.save_as(out, enforce_file_format=True)
    return about
