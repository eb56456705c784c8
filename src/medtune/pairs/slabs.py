"""Take a slab out of a volume: some slices of one series, as several pictures of one question."""

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .files_of_pictures import Picture
from .series import natural_key, sort_folder
from .volumes import Volume, is_nifti, open_volume

# A table may say in this column which slice is the middle of the slab, counted from 0.
MIDDLE = "middle_slice"

# Columns that a slab fills; what a table has under these names is left out.
SLAB_COLUMNS = ("slab", "slice", "slices", "plane", "spacing")


@dataclass(frozen=True)
class Slab:
    """Which slices of a volume are shown together.

    Attributes
    ----------
    pictures : int
        How many.
    mm : float or None
        Millimetres between two of them; None spreads them evenly over the whole volume.
    """

    pictures: int
    mm: float | None = None


def slab_asked_for(pictures: int | None, mm: float | None) -> Slab | None:
    """Check what the caller asked for.

    Parameters
    ----------
    pictures : int or None
        How many slices; None for no slabs.
    mm : float or None
        Millimetres between two slices.

    Returns
    -------
    Slab or None
        None for no slabs.

    Raises
    ------
    ValueError
        Numbers that cannot be, or a distance without a number of slices.

    Examples
    --------
    >>> slab_asked_for(5, 10), slab_asked_for(None, None)
    (Slab(pictures=5, mm=10), None)
    """
    if pictures is None:
        if mm is not None:
            raise ValueError(f"slab_mm={mm:g} needs slab=N, the number of slices in a question")
        return None
    if isinstance(pictures, bool) or not isinstance(pictures, int) or pictures < 1:
        raise ValueError(f"slab={pictures} is not 1 slice or more")
    if mm is not None and not (math.isfinite(mm) and mm > 0):
        raise ValueError(f"slab_mm={mm:g} is no distance in millimetres")
    return Slab(pictures, mm)


def choose_slices(slab: Slab, count: int, step: float, middle: int | None = None) -> list[int]:
    """Choose the slices of a slab.

    Parameters
    ----------
    slab : Slab
        How many, and how far apart.
    count : int
        How many slices the volume has.
    step : float
        Millimetres between two of them.
    middle : int, optional
        The slice around which they are taken; by default the middle of the volume. Where the slab
        would leave the volume it is moved inwards. It wants a distance in millimetres.

    Returns
    -------
    list of int
        Numbers from 0, ascending, each only once; the nearest to the distance that was asked for.

    Raises
    ------
    ValueError
        The volume is too small, its slices are too far apart, or there is no such middle.

    Examples
    --------
    >>> choose_slices(Slab(4), count=20, step=2.0)
    [2, 7, 12, 17]
    >>> choose_slices(Slab(3, mm=4), count=20, step=2.0, middle=6)
    [4, 6, 8]
    """
    if slab.pictures > count:
        raise ValueError(f"volume has {count} slices, fewer than slab={slab.pictures}")
    if middle is not None and not 0 <= middle < count:
        raise ValueError(f"{MIDDLE}: {middle} is none of the slices from 0 to {count - 1}")
    if slab.mm is None:
        if middle is not None:
            raise ValueError(f"{MIDDLE} wants a distance between slices: give slab_mm=MILLIMETRES")
        # each stands for a part of the volume of the same size, and lies in the middle of it
        return [(2 * part + 1) * count // (2 * slab.pictures) for part in range(slab.pictures)]
    # half a hundredth: the spacing of files is rounded
    if slab.mm < 0.995 * step and slab.pictures > 1:
        raise ValueError(
            f"volume has slices {step:g} mm apart, so that slab_mm={slab.mm:g} would show one twice"
        )
    every = max(slab.mm / step, 1.0)
    length = (slab.pictures - 1) * every
    if length > count - 1 + 0.25:
        raise ValueError(
            f"volume of {(count - 1) * step:g} mm is too short for slab={slab.pictures} slices "
            f"that lie slab_mm={slab.mm:g} apart"
        )
    around = (count - 1) / 2 if middle is None else middle
    first = min(max(around - length / 2, 0), max(count - 1 - length, 0))
    # halves go up, all of them: rint would send them to the even neighbour, here up and there down
    wanted = first + every * np.arange(slab.pictures)
    return [int(number) for number in np.floor(wanted + 0.5 + 1e-6)]


def open_slab(path: Path, slab: Slab, window: Any, salt: str, middle: Any) -> Iterator[Picture]:
    """Yield the pictures of a slab.

    Parameters
    ----------
    path : Path
        A NIfTI file, or the folder of one DICOM series.
    slab : Slab
        Which slices.
    window : str, tuple or None
        See `medtune.pairs.volumes.open_volume`.
    salt : str
        What ids that are made up, and patients' numbers, are hashed with.
    middle : any value
        What a table says about the slice in the middle; None where it says nothing.

    Yields
    ------
    Picture
        Besides what the file says it knows `slice`, its number from 0; `slices`, those of all
        pictures of the slab; `spacing`, the millimetres between two slices, rows and columns of the
        volume; and `plane`.

    Raises
    ------
    ValueError
        It is no volume, or one that has no such slab: one line without names.
    OSError
        No permission to read it.
    """
    volume = open_volume(path, window, salt)
    numbers = choose_slices(slab, volume.count, volume.view.spacing[0], _number(middle))
    known = volume.known | {
        "plane": volume.view.plane,
        "spacing": [round(size, 4) for size in volume.view.spacing],
        "slices": numbers,
    }
    for number in numbers:
        cell = {"bytes": _png(volume, number), "path": None}
        yield Picture(cell, volume.file_of(number), salt, known | {"slice": number}, volume.patient)


def _number(middle: Any) -> int | None:
    if middle is None or middle != middle or middle == "":
        return None
    try:
        number = float(middle)
        if number.is_integer():
            return int(number)
    except (TypeError, ValueError):
        pass
    raise ValueError(f"{MIDDLE}: it is no whole number")


def _png(volume: Volume, number: int) -> bytes:
    buffer = io.BytesIO()
    volume.picture(number).save(buffer, "PNG")
    return buffer.getvalue()


def find_volumes(path: Path) -> list[Path]:
    """Find the NIfTI files under a folder, and the folders that hold DICOM slices.

    Parameters
    ----------
    path : Path
        A folder, or one file.

    Returns
    -------
    list of Path
        In the order of names.

    Examples
    --------
    >>> import tempfile
    >>> find_volumes(Path(tempfile.mkdtemp()))
    []
    """
    if path.is_file():
        return [path.resolve()]
    found = {file.resolve() for file in path.rglob("*") if file.is_file() and is_nifti(file)}
    sorted_files = sort_folder(path)
    # a folder whose files cannot be read is among them: opening it says why
    for files in [*sorted_files.series, sorted_files.unreadable]:
        found |= {file.parent for file in files}
    return sorted(found, key=natural_key)
