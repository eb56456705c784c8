"""Find the pictures that lie in a folder, and open each: a plain picture, or the frames of DICOM."""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .dicom import describe, is_dicom, read_frames

PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}


@dataclass
class Picture:
    """A picture, or one frame of a DICOM file, and what its file tells about it.

    Attributes
    ----------
    cell : dict
        `bytes` and `path`, one of them None, as `datasets.Image` wants it.
    made_up_id : str
        The id for a record that gives none.
    known : dict
        Columns that the file itself fills, such as the modality of a DICOM file.
    patient : str or None
        A hash that stands for the patient of a DICOM file.
    """

    cell: dict
    made_up_id: str
    known: dict
    patient: str | None


def find_pictures(path: Path) -> list[Path]:
    """List the pictures and DICOM files of a folder and of the folders in it, in order.

    Parameters
    ----------
    path : Path
        A folder, or one file.

    Returns
    -------
    list of Path
        Absolute paths.

    Examples
    --------
    >>> import tempfile
    >>> find_pictures(Path(tempfile.mkdtemp()))
    []
    """
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    return [file.absolute() for file in files if file.is_file() and _is_picture(file)]


def _is_picture(file: Path) -> bool:
    # a DICOM file often has no suffix: then its first bytes tell
    return file.suffix.lower() in PICTURE_SUFFIXES or is_dicom(file)


def open_pictures(file: Path, window: Any, salt: str) -> Iterator[Picture]:
    """Yield a picture, or each frame of a DICOM file or of a folder of them."""
    if file.is_dir():
        for part in sorted(file.iterdir()):
            if is_dicom(part):
                yield from _dicom_pictures(part, window, salt)
    elif is_dicom(file):
        yield from _dicom_pictures(file, window, salt)
    else:
        cell = {"bytes": None, "path": str(file)}
        yield Picture(cell, made_up_id=file.stem, known={}, patient=None)


def _dicom_pictures(file: Path, window: Any, salt: str) -> Iterator[Picture]:
    about = describe(file, salt=salt)
    # the id is a hash of the content: the name of the file may name the patient
    made_up_id = "dicom-" + hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    for frame in read_frames(file, window=window):
        # PNG keeps the grey levels of the window exactly
        buffer = io.BytesIO()
        frame.save(buffer, "PNG")
        cell = {"bytes": buffer.getvalue(), "path": None}
        yield Picture(cell, made_up_id, {"modality": about["modality"]}, about["group"])
