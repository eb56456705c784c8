"""Read what a visitor sends: PNG, JPEG, DICOM and NIfTI files, a few or a whole series."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from medtune.pairs import (
    WINDOWS,
    Slab,
    Volume,
    choose_slices,
    copy_without_patient,
    is_dicom,
    is_nifti,
    open_volume,
    read_frames,
    series_files,
    to_rgb,
)

from .texts import TEXT

#: Most bytes of a file, and most pixels of a picture or of all frames of a file.
MAX_SIZE = 64_000_000
#: Most slices of one upload.
MAX_SLICES = 1000
#: Most voxels of a NIfTI file that a stranger sends: 512 x 512 x 256.
MAX_VOXELS = 2**26
# What numbers of patients are hashed with; copies have none.
SALT = "copies without patients"
#: Values so low are Hounsfield units of air: windows of CT then mean something.
AIR = -500
#: A longer edge of a picture is scaled down to so many pixels.
MAX_EDGE = 2048
#: Most pictures of one conversation.
MAX_PICTURES = 8


class _OneVolumeError(ValueError):
    """Two volumes came in one upload."""


@dataclass
class Upload:
    """What became of the files of one upload."""

    #: Pictures in RGB, without metadata.
    pictures: list = field(default_factory=list)
    #: (DICOM file, number of the frame), in the order of the series.
    slices: list[tuple[Path, int]] = field(default_factory=list)
    #: A NIfTI file, in the radiologist's view.
    volume: Volume | None = None
    #: Millimetres between two slices; None where nobody knows.
    spacing: float | None = None
    #: Why nobody knows, such as a slice that is missing; None for files that are no series.
    no_spacing: str | None = None
    #: The named windows that apply: those of `medtune.pairs.WINDOWS` for CT, else none.
    windows: dict[str, tuple[float, float]] = field(default_factory=dict)
    #: (name of a file, why it was refused in English and in Chinese).
    refused: list[tuple[str, list[str]]] = field(default_factory=list)
    #: Holds copies of the DICOM files without patient data; goes when nobody holds it any more.
    folder: tempfile.TemporaryDirectory | None = None

    @property
    def count(self) -> int:
        """How many slices there are."""
        return self.volume.count if self.volume else len(self.slices)

    def picture(self, number: int, window: str = "") -> Any:
        """Show a slice, counted from 0; "" is the window that the file brings along."""
        if self.volume:
            shown = self.volume.source.shown(number, window or self.volume.window)
            return Image.fromarray(shown)
        path, frame = self.slices[number]
        return read_frames(path, window=window or None)[frame]

    def slab(self, number: int, pictures: int, mm: float | None, window: str = "") -> list:
        """Show some slices around one of them.

        Parameters
        ----------
        number : the one in the middle, counted from 0.
        pictures : how many.
        mm : millimetres between two of them; None for neighbours.
        window : see `picture`.

        Raises
        ------
        ValueError : there are too few slices, or nobody knows how far apart they are.
        """
        if mm and self.spacing is None:
            raise ValueError("nobody knows how far apart these slices are: leave the mm empty")
        # of neighbours the distance does not matter
        step = self.spacing or 1.0
        chosen = choose_slices(Slab(pictures, mm or step), self.count, step, number)
        return [self.picture(one, window) for one in chosen]


def read_upload(
    files: Sequence[str | os.PathLike],
    room: int = MAX_PICTURES,
    *,
    scratch: str | os.PathLike | None = None,
) -> Upload:
    """Read PNG, JPEG, DICOM and NIfTI files that a stranger sent; the files stay as they are.

    One volume at a time: a second NIfTI file, or one beside DICOM slices, is refused.

    Parameters
    ----------
    files : paths of the files.
    room : most pictures to take; further ones are refused.
    scratch : the folder for the copies of DICOM files without patient data; by default one among
        the temporary files of this machine.

    Examples
    --------
    >>> file = Path(tempfile.mkdtemp()) / "a.png"
    >>> _ = file.write_text("no picture")
    >>> read_upload([file]).refused[0][1][0]
    'it is no PNG, JPEG, DICOM or NIfTI picture'
    """
    upload = Upload(folder=tempfile.TemporaryDirectory(prefix="medtune-", dir=scratch))
    frames: dict[str, int] = {}  # name of a copy -> number of its frames
    for number, file in enumerate(map(Path, files)):
        full = len(upload.pictures) >= room or sum(frames.values()) >= MAX_SLICES
        try:
            _check_size(file.stat().st_size, full)
            if is_dicom(file):
                copy = Path(upload.folder.name, f"{number:05}.dcm")
                frames[copy.name] = _read_dicom(file, copy, upload, full)
            elif is_nifti(file):
                _refuse_a_second(upload.volume or frames)
                _read_nifti(file, upload, MAX_VOXELS)
            else:
                upload.pictures.append(_read_picture(file, full))
        except Exception as error:  # decoders raise many kinds
            reasons = TEXT[_reason_key(error)]
            upload.refused.append((file.name, [reason.format(error) for reason in reasons]))
    if frames:
        for series in series_files(upload.folder.name):
            for path in series:
                upload.slices += [(path, frame) for frame in range(frames.get(path.name, 0))]
        # files of one slice each may be a series that lies in space
        if len(frames) == len(upload.slices) > 1:
            _measure(upload)
    return upload


def open_series(path: str | os.PathLike, *, scratch: str | os.PathLike | None = None) -> Upload:
    """Open a series of one's own: a folder of DICOM slices, or a NIfTI file.

    Parameters
    ----------
    path : the folder or the file.
    scratch : see `read_upload`.

    Returns
    -------
    Upload : with its slices, and without pictures of other kinds.

    Raises
    ------
    ValueError : it holds no series, or a file that cannot be read: one line.
    OSError : there is no such folder or file.

    Examples
    --------
    >>> open_series("no_such_folder")
    Traceback (most recent call last):
        ...
    FileNotFoundError: series=no_such_folder: there is no such folder or file
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"series={path}: there is no such folder or file")
    if path.is_file():
        upload = Upload()
        try:
            _read_nifti(path, upload, 2**30)
        except ValueError as error:
            raise ValueError(f"series={path}: {error}") from None
        return upload
    files = sorted(file for file in path.rglob("*") if file.is_file() and is_dicom(file))
    upload = read_upload(files, scratch=scratch)
    if upload.refused:
        _, [reason, _] = upload.refused[0]
        raise ValueError(f"series={path}: {len(upload.refused)} of its files: {reason}")
    if not upload.count:
        raise ValueError(f"series={path}: this folder holds no DICOM pictures")
    return upload


def _read_nifti(file: Path, upload: Upload, max_voxels: int) -> None:
    """Open a NIfTI file."""
    volume = open_volume(file, None, SALT, max_voxels)
    if volume.count > MAX_SLICES:
        raise Image.DecompressionBombError
    upload.volume, upload.spacing = volume, volume.view.spacing[0]
    is_ct = float(volume.source.values.min()) <= AIR
    upload.windows = WINDOWS if is_ct else {}


def _measure(upload: Upload) -> None:
    """Say how far apart the slices of a series are, or why nobody knows."""
    try:
        volume = open_volume(Path(upload.folder.name), None, SALT)
        upload.spacing = volume.view.spacing[0]
    except ValueError as error:
        upload.no_spacing = str(error)


def _refuse_a_second(volume: Any) -> None:
    """Refuse a file of another volume than the one that is there."""
    if volume:
        raise _OneVolumeError


def _check_size(size: int, full: bool = False) -> None:
    """Refuse a file or picture that is too large, or one too many."""
    if full or size > MAX_SIZE:
        raise Image.DecompressionBombError


def _read_dicom(file: Path, copy: Path, upload: Upload, full: bool) -> int:
    """Copy a DICOM file without its patient and return the number of its frames."""
    _refuse_a_second(upload.volume)
    about = copy_without_patient(file, copy)
    _check_size((about["rows"] or 0) * (about["columns"] or 0) * about["frames"], full)
    frames = len(read_frames(copy))
    if about["modality"] == "CT":
        upload.windows = WINDOWS
    return frames


def _read_picture(file: Path, full: bool) -> Any:
    with Image.open(file, formats=("PNG", "JPEG")) as image:
        _check_size(image.width * image.height, full)
        rgb = to_rgb(image)
    rgb.thumbnail((MAX_EDGE, MAX_EDGE))
    # made anew from its pixels, so that the file's metadata stay behind
    return Image.frombytes("RGB", rgb.size, rgb.tobytes())


def _reason_key(error: Exception) -> str:
    """The key in `TEXT` of what is wrong with a file."""
    if type(error) is _OneVolumeError:
        return "one_volume"
    if type(error) is UnidentifiedImageError:
        return "no_picture"
    if type(error) is Image.DecompressionBombError:
        return "much"
    return "damaged"
