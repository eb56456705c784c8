"""Say what the DICOM files of a folder are, and put slices into the order of the patient.

Only the heads of the files are read, and of these only the tags that decide.
"""

import functools
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .dicom import is_dicom, kind_of, open_dicom, page_kind_of, shown_tags, tag_numbers

# Its warnings stand as plain lines on the screen unless the user's program says otherwise.
_LOG = logging.getLogger("medtune")

# What decides about kind, series and place; enhanced files keep the place in functional groups.
_DECIDING_TAGS = [
    "SOPClassUID", "Modality", "ImageType", "SeriesDescription", "SeriesInstanceUID", "Rows",
    "SamplesPerPixel", "InstanceNumber", "ImagePositionPatient", "ImageOrientationPatient",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
]  # fmt: skip

# Two slices are parallel if the parts of their directions, from -1 to 1, differ by less: files of
# one series differ in the last digits.
_PARALLEL = 0.02


@dataclass
class _Slice:
    """What decides about the place of a slice in its series.

    Attributes
    ----------
    path : Path
        The file.
    series : str
        The UID of the series, or the folder of the file where it has none.
    place : list of float
        Where the first pixel lies in the patient, in millimetres; empty where nobody knows.
    directions : list of float
        The directions of rows and columns, six numbers; empty where nobody knows.
    number : float
        The instance number; infinite where there is none.
    """

    path: Path
    series: str
    place: list[float]
    directions: list[float]
    number: float


@dataclass
class DicomFolder:
    """What the DICOM files of a folder are.

    Attributes
    ----------
    series : list of list of Path
        The pictures, a list for each series, in the order of the slices.
    left_out : dict of str to int
        How many files of each kind hold no picture of a patient, such as "structured report".
    unreadable : list of Path
        Files of which not even the head can be read.
    """

    series: list[list[Path]] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    unreadable: list[Path] = field(default_factory=list)


def natural_key(path: Path) -> tuple:
    """Give a key that sorts file names as people do: IM2 before IM10.

    Parameters
    ----------
    path : Path
        Every part of it counts.

    Returns
    -------
    tuple
        For `sorted`; the names themselves decide between those that differ in case only.

    Examples
    --------
    >>> names = ["IM10", "im1", "IM2", "a/IM3"]
    >>> sorted(names, key=lambda name: natural_key(Path(name)))
    ['a/IM3', 'im1', 'IM2', 'IM10']
    """
    parts = []
    for part in path.parts:
        # every second piece is a number, so that only numbers are compared with numbers
        pieces = re.split(r"([0-9]+)", part.casefold())
        pieces[1::2] = map(int, pieces[1::2])
        parts.append(pieces)
    return parts, str(path)


def sort_dicom(files: Iterable[Path]) -> DicomFolder:
    """Tell pictures from other DICOM files, and sort the pictures into series and by their place.

    The place is the position along the normal of the slices, without one the instance number, then
    the name: names and instance numbers often run against the anatomy. A series with several
    orientations (a scout) is taken apart. Pages of text, screenshots and doses are left out, unless
    there is nothing else.

    Parameters
    ----------
    files : iterable of Path
        DICOM files, from any folders.

    Returns
    -------
    DicomFolder
        Series in the order in which their first files come by name.

    Examples
    --------
    >>> from pydicom.data import get_testdata_file
    >>> names = ("CT_small.dcm", "rtplan.dcm")
    >>> found = sort_dicom([Path(get_testdata_file(name)) for name in names])
    >>> [[path.name for path in series] for series in found.series], found.left_out
    ([['CT_small.dcm']], {'RT plan': 1})
    """
    found = DicomFolder()
    left_out: Counter = Counter()
    slices: list[_Slice] = []
    pages: list[tuple[str, _Slice]] = []
    for path in sorted(files, key=natural_key):
        try:
            with open_dicom(path, stop_before_pixels=True, specific_tags=_DECIDING_TAGS) as ds:
                kind = kind_of(ds)
                page_kind = page_kind_of(ds)
                one = None if kind else _slice_of(path, ds)
        except (ValueError, OSError):
            found.unreadable.append(path)
            continue
        if kind:
            left_out[kind] += 1
        elif page_kind:
            pages.append((page_kind, one))
        else:
            slices.append(one)
    if slices:
        left_out.update(kind for kind, _ in pages)
    else:
        # somebody who gives nothing but a screenshot means it
        slices = [one for _, one in pages]
    for parallel in _parallel_slices(slices):
        found.series.append(_in_order(parallel))
    found.left_out = dict(left_out)
    return found


def _slice_of(path: Path, ds) -> _Slice:
    flat = shown_tags(ds)
    numbers = tag_numbers(flat, "InstanceNumber")
    return _Slice(
        path=path,
        series=str(ds.get("SeriesInstanceUID") or path.parent),
        place=tag_numbers(flat, "ImagePositionPatient"),
        directions=tag_numbers(flat, "ImageOrientationPatient"),
        number=numbers[0] if numbers else math.inf,
    )


def _parallel_slices(slices: list[_Slice]) -> list[list[_Slice]]:
    """Put together the slices of one series that lie in parallel."""
    stacks: dict[str, list[list[_Slice]]] = {}
    every: list[list[_Slice]] = []
    for one in slices:
        for stack in stacks.setdefault(one.series, []):
            if _are_parallel(stack[0], one):
                stack.append(one)
                break
        else:
            stack = [one]
            stacks[one.series].append(stack)
            every.append(stack)
    return every


def _are_parallel(one: _Slice, other: _Slice) -> bool:
    if len(one.directions) != len(other.directions):
        return False
    return np.allclose(one.directions, other.directions, rtol=0, atol=_PARALLEL)


def _in_order(slices: list[_Slice]) -> list[Path]:
    """Sort parallel slices; positions decide only if all slices have one."""
    directions = slices[0].directions
    has_positions = len(directions) == 6 and all(len(one.place) == 3 for one in slices)
    # One normal for all: seen from each slice's own, far from the origin, rounding could swap two.
    normal = np.cross(directions[:3], directions[3:]) if has_positions else None

    def key(one: _Slice) -> tuple:
        # to a thousandth of a millimetre: several pictures of one place are sorted by their number
        position = round(float(np.dot(normal, one.place)), 3) if has_positions else 0.0
        return position, one.number, natural_key(one.path)

    return [one.path for one in sorted(slices, key=key)]


def series_files(folder: str | os.PathLike) -> list[list[Path]]:
    """Find the DICOM pictures under a folder, one list a series, in the order of the slices.

    Sorted by position along the normal of the slices, without one by instance number, then by name:
    names and instance numbers often run against the anatomy. A series with several orientations (a
    scout) is taken apart.

    Parameters
    ----------
    folder : str or Path
        Searched to any depth. Files that are no DICOM pictures are left out, such as reports,
        segmentations and pages of doses, and so are links that leave the folder.

    Returns
    -------
    list of list of Path
        The files of each series, series in the order of the names of their first files.

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
    found = sort_folder(root)
    if not found.series:
        raise ValueError(f"no DICOM pictures in {folder}{_what_else(found)}")
    return found.series


def sort_folder(folder: Path) -> DicomFolder:
    """Sort the DICOM files under a folder, see `sort_dicom`; links that leave it are left out.

    Parameters
    ----------
    folder : Path
        Searched to any depth.

    Returns
    -------
    DicomFolder
        Without any series where there are no pictures.

    Examples
    --------
    >>> import tempfile
    >>> sort_folder(Path(tempfile.mkdtemp())).series
    []
    """
    root = folder.resolve()
    files = []
    for path in root.rglob("*"):
        stays_inside = path.is_file() and path.resolve().is_relative_to(root)
        if stays_inside and _can_be_dicom(path):
            files.append(path)
    return sort_dicom(files)


@functools.cache
def say_once(notice: str) -> None:
    """Warn in the log, for the first of the many folders that a table may name.

    Parameters
    ----------
    notice : str
        One line; the same is not said again by this process.
    """
    _LOG.warning(notice)


def _can_be_dicom(path: Path) -> bool:
    try:
        return is_dicom(path)
    except OSError:  # no permission to read it
        return False


def _what_else(found: DicomFolder) -> str:
    """Say what a folder without pictures holds instead."""
    said = counted(found.left_out)
    if found.unreadable:
        said = ", ".join(filter(None, [said, f"{len(found.unreadable)} that cannot be read"]))
    return f" (but {said})" if said else ""


def counted(kinds: dict[str, int]) -> str:
    """Say how many there are of each kind.

    Parameters
    ----------
    kinds : dict of str to int
        Kind, in the singular -> how many.

    Returns
    -------
    str
        The most frequent kind first; "" for none.

    Examples
    --------
    >>> counted({"DICOMDIR": 1, "structured report": 2})
    '2 structured reports, 1 DICOMDIR'
    >>> counted({"file of another kind": 3})
    '3 files of another kind'
    """
    said = []
    for kind, count in sorted(kinds.items(), key=lambda item: (-item[1], item[0])):
        # "file of another kind" becomes "files of another kind"
        noun = re.split(r"(?= of | without )", kind, maxsplit=1)
        if count > 1:
            noun[0] += "s"
        said.append(f"{count} {''.join(noun)}")
    return ", ".join(said)
