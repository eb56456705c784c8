"""Read the files that a visitor sends: PNG, JPEG and DICOM, a few or a whole series."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from medtune.pairs import (
    WINDOWS,
    copy_without_patient,
    is_dicom,
    read_frames,
    series_files,
    to_rgb,
)

from .texts import TEXT

#: Most bytes of a file, and most pixels of a picture or of all frames of a file.
MAX_SIZE = 64_000_000
#: Most slices of one upload.
MAX_SLICES = 1000
#: A longer edge of a picture is scaled down to so many pixels.
MAX_EDGE = 2048
#: Most pictures of one conversation.
MAX_PICTURES = 8


@dataclass
class Upload:
    """What became of the files of one upload."""

    #: Pictures in RGB, without metadata.
    pictures: list = field(default_factory=list)
    #: (DICOM file, number of the frame), in the order of the series.
    slices: list[tuple[Path, int]] = field(default_factory=list)
    #: The named windows that apply: those of `medtune.pairs.WINDOWS` for CT, else none.
    windows: dict[str, tuple[float, float]] = field(default_factory=dict)
    #: (name of a file, why it was refused in English and in Chinese).
    refused: list[tuple[str, list[str]]] = field(default_factory=list)
    #: Holds copies of the DICOM files without patient data; goes when nobody holds it any more.
    folder: tempfile.TemporaryDirectory | None = None


def read_upload(
    files: Sequence[str | os.PathLike],
    room: int = MAX_PICTURES,
    *,
    scratch: str | os.PathLike | None = None,
) -> Upload:
    """Read PNG, JPEG and DICOM files that a stranger sent; the files stay as they are.

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
    'it is no PNG, JPEG or DICOM picture'
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
            else:
                upload.pictures.append(_read_picture(file, full))
        except Exception as error:  # decoders raise many kinds
            reasons = TEXT[_reason_key(error)]
            upload.refused.append((file.name, [reason.format(error) for reason in reasons]))
    if frames:
        for series in series_files(upload.folder.name):
            for path in series:
                upload.slices += [(path, frame) for frame in range(frames.get(path.name, 0))]
    return upload


def _check_size(size: int, full: bool = False) -> None:
    """Refuse a file or picture that is too large, or one too many."""
    if full or size > MAX_SIZE:
        raise Image.DecompressionBombError


def _read_dicom(file: Path, copy: Path, upload: Upload, full: bool) -> int:
    """Copy a DICOM file without its patient and return the number of its frames."""
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
    if type(error) is UnidentifiedImageError:
        return "no_picture"
    if type(error) is Image.DecompressionBombError:
        return "much"
    return "damaged"
