"""DICOM files as pictures: window a slice or a series to RGB, and describe it without carrying the patient along.

pydicom reads the files; JPEG 2000 needs pylibjpeg-openjpeg, JPEG-LS needs pyjpegls. Nothing that identifies a patient
leaves this module: `describe` names the few tags that it reads, and turns identity into a salted hash.
"""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

# Centre and width in Hounsfield units.
WINDOWS = {
    "brain": (40, 80),
    "subdural": (75, 215),
    "lung": (-600, 1500),
    "mediastinum": (50, 350),
    "abdomen": (40, 400),
    "liver": (60, 160),
    "bone": (400, 1800),
}


def read_frames(path: str | Path, *, window: str | tuple[float, float] | None = None, overlays: bool = False) -> list:
    """Read a DICOM file as 8-bit RGB pictures, one for each frame.

    Grey frames go through the file's rescale (or modality table), then through `window`, the file's own VOI window or
    table, or, where it has neither, from the smallest to the largest stored value. MONOCHROME1 is turned so that dense
    is bright. Palette, YBR and RGB frames become RGB as they are.

    Parameters
    ----------
    window
        A name in `WINDOWS`, or (centre, width) in the file's rescaled units: Hounsfield units for CT.
    overlays
        Draw overlay planes (60xx), such as an outline of a lesion, in yellow.

    Returns
    -------
    list of PIL.Image.Image
        Mode RGB, in the order of the file.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        No DICOM, no pixel data, pixel data that do not decode, an unknown window. One line, without patient data.

    Examples
    --------
    >>> from pydicom.data import get_testdata_file
    >>> [(frame.size, frame.mode) for frame in read_frames(get_testdata_file("CT_small.dcm"), window="lung")]
    [((128, 128), 'RGB')]
    """
    from PIL import Image

    dataset, pixels = _read_pixels(Path(path))
    if str(dataset.PhotometricInterpretation).startswith("MONOCHROME"):
        grey = np.stack([_to_grey(frame, dataset, _bounds(window, path)) for frame in pixels])
        if dataset.PhotometricInterpretation == "MONOCHROME1":
            grey = 255 - grey
        colour = np.repeat(grey[..., None], 3, axis=-1)
    else:
        colour = _to_colour(pixels, dataset)
    if overlays:
        for group in (group for group in range(0x6000, 0x6020, 2) if (group, 0x3000) in dataset):
            plane = dataset.overlay_array(group).astype(bool)
            row, column = (int(v) - 1 for v in dataset.get((group, 0x0050), type("", (), {"value": (1, 1)})).value)
            for frame, marked in zip(colour, plane if plane.ndim == 3 else [plane] * len(colour), strict=False):
                at = frame[max(row, 0) : row + marked.shape[0], max(column, 0) : column + marked.shape[1]]
                at[marked[max(-row, 0) :, max(-column, 0) :][: at.shape[0], : at.shape[1]]] = (255, 255, 0)
    return [Image.fromarray(frame) for frame in colour]


def read_series(
    folder: str | Path, *, window: str | tuple[float, float] | None = None, overlays: bool = False
) -> "dict[str, list[Image.Image]]":
    """Read the DICOM files below a folder as series, each sorted along its scan direction.

    Files are grouped by SeriesInstanceUID and sorted by ImagePositionPatient along the normal of the slices, or by
    InstanceNumber where there is no geometry. Files that are no DICOM pictures are passed over, and so are links that
    leave the folder. The keys are "series-1", "series-2", ... in the order of the first file's name.

    Raises
    ------
    FileNotFoundError
        There is no such folder, or no DICOM picture in it.

    Examples
    --------
    >>> from pathlib import Path
    >>> from pydicom.data import get_testdata_file
    >>> series = read_series(Path(get_testdata_file("CT_small.dcm")).parent / "dicomdirtests" / "98892001" / "CT5N")
    >>> {name: len(frames) for name, frames in series.items()}
    {'series-1': 5}
    """
    import pydicom

    folder, series = Path(folder), {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if not path.resolve().is_relative_to(folder.resolve()) or not pydicom.misc.is_dicom(path):
            continue
        header = pydicom.dcmread(path, stop_before_pixels=True)
        if "Rows" in header:
            series.setdefault(str(header.get("SeriesInstanceUID", "")), []).append((_position(header), str(path)))
    if not series:
        raise FileNotFoundError(f"{folder}: there is no DICOM picture in this folder")
    return {
        f"series-{i}": [f for _, path in sorted(files) for f in read_frames(path, window=window, overlays=overlays)]
        for i, files in enumerate(series.values(), 1)
    }


def describe(path: str | Path, *, salt: str) -> dict[str, Any]:
    """Say what a DICOM file is, in tags that identify nobody.

    Returns
    -------
    dict
        ``modality``, ``body_part``, ``rows``, ``columns``, ``frames``, ``photometric``, ``pixel_spacing`` (mm),
        ``slice_thickness`` (mm), ``position`` (mm along the scan direction), ``transfer_syntax``,
        ``burned_in_annotation`` ("YES", "NO" or None: look at the picture where it is not "NO"), and ``group``: the
        first 16 hex digits of a keyed BLAKE2 hash of the patient's ID, or of the study's UID where there is no ID.
        The hash keeps one patient's pictures together; without the salt it cannot be turned back or compared.

    Raises
    ------
    ValueError
        `salt` is empty, or the file is no DICOM.

    Examples
    --------
    >>> from pydicom.data import get_testdata_file
    >>> safe = describe(get_testdata_file("CT_small.dcm"), salt="a secret of yours")
    >>> safe["modality"], safe["rows"], len(safe["group"]), "PatientName" in safe
    ('CT', 128, 16, False)
    """
    if not salt:
        raise ValueError(
            "describe needs a salt: any secret text, the same for all files whose patients belong together"
        )
    header = _read_header(Path(path))

    def number(name: str) -> Any:
        value = header.get(name)
        if value is None or value == "":
            return None
        return [float(v) for v in value] if hasattr(value, "__iter__") else float(value)

    identity = str(header.get("PatientID") or header.get("StudyInstanceUID") or header.get("SeriesInstanceUID") or "")
    key = hashlib.sha256(salt.encode()).digest()
    burned = str(header.get("BurnedInAnnotation", "")).upper()
    return {
        "modality": str(header.get("Modality", "")) or None,
        "body_part": str(header.get("BodyPartExamined", "")) or None,
        "rows": int(header.get("Rows", 0)),
        "columns": int(header.get("Columns", 0)),
        "frames": int(header.get("NumberOfFrames", 1) or 1),
        "photometric": str(header.get("PhotometricInterpretation", "")) or None,
        "pixel_spacing": number("PixelSpacing"),
        "slice_thickness": number("SliceThickness"),
        "position": _position(header)[0],
        "transfer_syntax": str(getattr(header.file_meta, "TransferSyntaxUID", "")) or None,
        "burned_in_annotation": burned if burned in ("YES", "NO") else None,
        "group": hashlib.blake2b(identity.encode(), key=key, digest_size=8).hexdigest() if identity else None,
    }


def _read_header(path: Path, **options: Any) -> Any:
    import pydicom

    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such DICOM file")
    try:
        return pydicom.dcmread(path, **({"stop_before_pixels": True} | options))
    except (pydicom.errors.InvalidDicomError, EOFError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: is no DICOM file that can be read ({type(error).__name__})") from None


def _read_pixels(path: Path) -> tuple[Any, np.ndarray]:
    """The data set and its frames, always with a leading axis for them."""
    dataset = _read_header(path, stop_before_pixels=False)
    if not any(name in dataset for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise ValueError(f"{path}: this DICOM file has no pixel data (a report or a plan?)")
    try:
        pixels = dataset.pixel_array
    except Exception as error:  # the decoders raise whatever they like, at times with the header's text
        raise ValueError(
            f"{path}: the pixel data do not decode ({type(error).__name__}): cut short or damaged?"
        ) from None
    single = int(dataset.get("NumberOfFrames", 1) or 1) == 1
    return dataset, pixels[None] if single else pixels


def _bounds(window: str | tuple[float, float] | None, path: str | Path) -> tuple[float, float] | None:
    if isinstance(window, str):
        if window not in WINDOWS:
            raise ValueError(f"{path}: there is no window {window!r}, only {', '.join(WINDOWS)}")
        window = WINDOWS[window]
    return window and (float(window[0]), max(float(window[1]), 1.0))


def _to_grey(frame: np.ndarray, dataset: Any, window: tuple[float, float] | None) -> np.ndarray:
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    values = apply_modality_lut(frame, dataset)
    if window is None and dataset.get("WindowCenter") not in (None, "") and dataset.get("WindowWidth"):
        center, width = (float(np.ravel(dataset[tag].value)[0]) for tag in ("WindowCenter", "WindowWidth"))
        window = (center, max(width, 1.0))
    if window:
        low, high = window[0] - window[1] / 2, window[0] + window[1] / 2
    else:
        values = apply_voi_lut(values, dataset)  # its table, if it has one
        low, high = float(values.min()), float(values.max())
    return np.clip((values - low) / max(high - low, 1e-9) * 255 + 0.5, 0, 255).astype(np.uint8)


def _to_colour(pixels: np.ndarray, dataset: Any) -> np.ndarray:
    from pydicom.pixels import apply_color_lut, convert_color_space

    photometric = str(dataset.PhotometricInterpretation)
    if photometric == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, dataset)[..., :3]
        return (pixels / (257 if pixels.dtype == np.uint16 else 1)).astype(np.uint8)
    if photometric.startswith("YBR") and dataset.file_meta.TransferSyntaxUID.is_compressed is False:
        pixels = convert_color_space(pixels, photometric, "RGB")
    return np.ascontiguousarray(pixels[..., :3]).astype(np.uint8)


def _position(header: Any) -> tuple[float, int]:
    """Sorts slices: mm along the normal of the slice, then the instance number."""
    number = int(header.get("InstanceNumber") or 0)
    place, axes = header.get("ImagePositionPatient"), header.get("ImageOrientationPatient")
    if place is None or axes is None or len(place) != 3 or len(axes) != 6:
        return 0.0, number
    normal = np.cross([float(v) for v in axes[:3]], [float(v) for v in axes[3:]])
    return round(float(np.dot(normal, [float(v) for v in place])), 4), number
