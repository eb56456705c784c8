"""Find the pictures that lie in a folder, and open each: a plain picture, or the frames of DICOM."""

import functools
import hashlib
import hmac
import io
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .dicom import SUFFIXES as DICOM_SUFFIXES
from .dicom import describe, is_dicom, read_frames
from .series import counted, natural_key, say_once, sort_dicom
from .volumes import is_nifti

PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}

# Its warnings stand as plain lines on the screen unless the user's program says otherwise.
_LOG = logging.getLogger("medtune")


@dataclass
class Picture:
    """A picture, or one frame of a DICOM file, and what its file tells about it.

    Attributes
    ----------
    cell : dict
        `bytes` and `path`, one of them None, as `datasets.Image` wants it.
    file : Path
        The file that it came from.
    salt : str
        What the made-up id is hashed with.
    known : dict
        Columns that the file itself fills: of a DICOM file `modality`, and `burned_in`, which is
        "YES" or "NO" where the file says whether text was burnt into the pixels, else None.
    patient : str or None
        A hash that stands for the patient of a DICOM file.
    """

    cell: dict
    file: Path
    salt: str
    known: dict = field(default_factory=dict)
    patient: str | None = None

    @functools.cached_property
    def made_up_id(self) -> str:
        """The id for a record that gives none: a hash of the content, as names can name patients.

        All frames of a DICOM file, and all slices of a NIfTI file, have the same. The file is read
        only for those who ask.
        """
        kind = "image" if self.cell["bytes"] is None else "dicom"
        if is_nifti(self.file):
            kind = "nifti"
        key = hmac.new(self.salt.encode(), digestmod=hashlib.sha256)
        with open(self.file, "rb") as stream:
            while block := stream.read(1 << 20):
                key.update(block)
        return f"{kind}-{key.hexdigest()[:16]}"


@dataclass
class FoundFiles:
    """The files of a folder that hold pictures, and what else lies there; iterates over the first.

    Attributes
    ----------
    pictures : list of Path
        Absolute paths in order.
    left_out : dict of str to int
        How many files of each kind were left out, such as "structured report", "segmentation" or
        "file of another kind".
    """

    pictures: list[Path]
    left_out: dict[str, int] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Path]:
        return iter(self.pictures)

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def notice(self) -> str:
        """A line that says what was left out, such as "left out: 2 structured reports"; or ""."""
        return f"left out: {counted(self.left_out)}" if self.left_out else ""


def find_pictures(path: Path) -> FoundFiles:
    """Find the pictures and DICOM files of a folder and of the folders in it, in order.

    DICOM is known by its content, whatever a file is called. Its slices stand in the order of their
    series and places, see `medtune.pairs.series_files`; all else in the order of names, IM2 before
    IM10. Reports, segmentations, pages of doses and the like are left out and counted, which a line
    of the log says. A DICOM file that is damaged is among the pictures: opening it says why.

    Parameters
    ----------
    path : Path
        A folder, or one file.

    Returns
    -------
    FoundFiles
        Absolute paths, and how many files of each kind were left out.

    Examples
    --------
    >>> import tempfile
    >>> list(find_pictures(Path(tempfile.mkdtemp())))
    []
    """
    found = _sort_files([path] if path.is_file() else path.rglob("*"))
    if found.notice:
        _LOG.warning(found.notice)
    return found


def _sort_files(paths: Iterator[Path] | list[Path]) -> FoundFiles:
    """Tell pictures from other files, and put them into order."""
    plain: list[Path] = []
    dicom: list[Path] = []
    left_out: Counter = Counter()
    for path in paths:
        if not path.is_file():
            continue
        path = path.absolute()
        if path.name.startswith("."):
            # what a Mac puts beside IM1.png is called ._IM1.png; others are nobody's pictures
            if path.suffix.lower() in PICTURE_SUFFIXES | DICOM_SUFFIXES:
                left_out["hidden file"] += 1
        elif _holds_dicom(path):
            dicom.append(path)
        elif path.suffix.lower() in PICTURE_SUFFIXES:
            plain.append(path)
        else:
            left_out["file of another kind"] += 1
    sorted_dicom = sort_dicom(dicom)
    left_out.update(sorted_dicom.left_out)

    # A series stands where the first of its names would.
    blocks = [[file] for file in plain + sorted_dicom.unreadable] + sorted_dicom.series
    blocks.sort(key=lambda block: min(map(natural_key, block)))
    pictures = [file for block in blocks for file in block]
    return FoundFiles(pictures, dict(left_out))


def _holds_dicom(file: Path) -> bool:
    try:
        return is_dicom(file)
    except OSError:
        # no permission, or a disk that fails: opening it will say so
        return file.suffix.lower() in DICOM_SUFFIXES


def open_pictures(file: Path, window: Any, salt: str) -> Iterator[Picture]:
    """Yield a picture, or each frame of a DICOM file, or all pictures of a folder in order.

    Parameters
    ----------
    file : Path
        A picture, a DICOM file, or a folder of such.
    window : str, tuple of float or None
        The window for DICOM files, see `medtune.pairs.read_frames`.
    salt : str
        What ids that are made up, and patients' numbers, are hashed with.

    Yields
    ------
    Picture
        A plain picture is not opened, only named.

    Raises
    ------
    ValueError
        A DICOM file that cannot be read, or a folder without pictures: one line.
    OSError
        No such file, or no permission to read it.

    Examples
    --------
    >>> from pydicom.data import get_testdata_file
    >>> [slice] = open_pictures(Path(get_testdata_file("CT_small.dcm")), None, salt="a secret")
    >>> slice.known
    {'modality': 'CT', 'burned_in': None}
    """
    if file.is_dir():
        yield from _pictures_of_folder(file, window, salt)
    elif is_dicom(file):
        yield from _dicom_pictures(file, window, salt)
    else:
        yield Picture({"bytes": None, "path": str(file)}, file, salt)


def _pictures_of_folder(folder: Path, window: Any, salt: str) -> Iterator[Picture]:
    """Yield all pictures of a folder that a table names."""
    root = folder.resolve()
    # a table comes from elsewhere: it must not reach other files of this machine through a link
    inside = [path for path in folder.rglob("*") if path.resolve().is_relative_to(root)]
    found = _sort_files(inside)
    if not found.pictures:
        raise ValueError(f"folder {folder.name} holds no pictures")
    if found.notice:
        say_once(f"folders of slices: {found.notice}")
    for path in found:
        yield from open_pictures(path, window, salt)


def _dicom_pictures(file: Path, window: Any, salt: str) -> Iterator[Picture]:
    about = describe(file, salt=salt)
    known = {"modality": about["modality"], "burned_in": about["burned_in_annotation"]}
    # the window is meant for the CT slices of a folder: an X-ray among them keeps its own
    for frame in read_frames(file, window=window if about["modality"] == "CT" else None):
        # PNG keeps the grey levels of the window exactly
        buffer = io.BytesIO()
        frame.save(buffer, "PNG")
        cell = {"bytes": buffer.getvalue(), "path": None}
        yield Picture(cell, file, salt, dict(known), about["group"])
