"""Read a volume, a series of DICOM slices or a NIfTI file, as slices in the radiologist's view.

Axial slices show the patient's right on the left and the front above, and come from the feet to the
head. Coronal ones show the right on the left and the head above, front first. Sagittal ones show
the front on the left and the head above, the patient's left side first. Slices follow the normal of
the picture, as in `medtune.pairs.series_files`.

Affines are as nibabel has them: of (column, row, slice) they give millimetres to the patient's
right-to-left (R), back-to-front (A) and upwards (S).
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform
from PIL import Image

from .dicom import (
    default_window,
    describe,
    is_dicom,
    open_dicom,
    read_frames,
    show_values,
    shown_tags,
    tag_numbers,
)
from .series import counted, say_once, sort_folder

VOLUME_SUFFIXES = (".nii", ".nii.gz")

# Where columns, rows and slices of a shown volume lead: L is the patient's left, P the back, I the
# feet, S the head, R the right.
VIEWS = {
    "axial": ("L", "P", "S"),
    "coronal": ("L", "I", "P"),
    "sagittal": ("P", "I", "R"),
}
# The plane of slices that follow the patient's first (right), second (front) or third (up) axis.
_PLANES = ("sagittal", "coronal", "axial")

# DICOM counts to the patient's left and back, nibabel to the right and front.
_DICOM_TO_NIBABEL = np.diag([-1.0, -1.0, 1.0, 1.0])

# Two slices nearer than this, in mm, lie at one place; steps that differ by less are even.
_SAME_PLACE = 0.01
_EVEN = 0.05  # of a step
_ROUNDED = 0.11  # mm: some scanners write places with one digit
# Slices that are shifted against each other by more degrees than this came from a tilted gantry.
_TILT = 1.0
# Voxels that differ by more than this are no cubes, and say along which axis the slices lie.
_LONGER = 1.2

# What a NIfTI file may count its places in (xyzt_units) -> mm.
_MM = {"mm": 1.0, "unknown": 1.0, "meter": 1000.0, "micron": 0.001}
# A header may promise any size, so stop before memory does: 1024 x 1024 x 1024.
MAX_VOXELS = 2**30
# So many slices tell which values a volume without a window holds.
_LOOKED_AT = 16


class _Problem(ValueError):
    """Words of our own about a volume, free of patient data; the volume's kind comes in front."""


@dataclass(frozen=True)
class View:
    """How the slices of a volume are shown.

    Attributes
    ----------
    plane : str
        "axial", "coronal" or "sagittal"; of oblique slices the nearest.
    spacing : tuple of float
        Millimetres between two slices, two rows and two columns, as they are shown.
    turn : numpy.ndarray
        What turns the stored (columns, rows, slices), as nibabel's `apply_orientation` takes it.
    """

    plane: str
    spacing: tuple[float, float, float]
    turn: np.ndarray


def view_of(affine: np.ndarray, axis: int | None = None) -> View:
    """Find out how to turn a stored volume into the radiologist's view.

    Parameters
    ----------
    affine : numpy.ndarray
        Of the three stored axes, in millimetres, as nibabel has it.
    axis : int, optional
        The stored axis that the slices follow. By default the one along which voxels are longest,
        as volumes are scanned; of cubes the one that leads from the feet to the head.

    Returns
    -------
    View
        With the slices as last axis.

    Raises
    ------
    ValueError
        The affine gives no spacing, or slices that are shifted against each other.

    Examples
    --------
    >>> stored = np.diag([-0.8, -0.8, 3.0, 1.0])  # to the left, to the back, upwards
    >>> view = view_of(stored)
    >>> view.plane, view.spacing, view.turn.tolist()
    ('axial', (3.0, 0.8, 0.8), [[0.0, 1.0], [1.0, 1.0], [2.0, 1.0]])
    """
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or sizes.min() <= 0:
        raise _Problem("says no spacing: nobody knows how large anything in it is")
    _refuse_tilt(affine[:3, :3] / sizes)
    here = io_orientation(affine)
    if axis is None:
        axis = _slice_axis(here, sizes)
    plane = _PLANES[int(here[axis, 0])]
    turn = ornt_transform(here, axcodes2ornt(VIEWS[plane]))
    shown = np.empty(3)
    # the millimetres of each stored axis go where the axis goes
    shown[turn[:, 0].astype(int)] = sizes
    columns, rows, slices = (float(size) for size in shown)
    return View(plane, (slices, rows, columns), turn)


def _refuse_tilt(directions: np.ndarray) -> None:
    """Raise ValueError unless the three directions, the columns, stand upright on each other."""
    for one, other in ((0, 1), (0, 2), (1, 2)):
        cosine = float(np.dot(directions[:, one], directions[:, other]))
        tilt = abs(90 - math.degrees(math.acos(np.clip(cosine, -1, 1))))
        if tilt > _TILT:
            raise _Problem(
                f"has slices that are shifted against each other, by {tilt:.0f} degrees (gantry "
                "tilt): have it resampled to an upright grid first"
            )


def _slice_axis(here: np.ndarray, sizes: np.ndarray) -> int:
    longest = int(np.argmax(sizes))
    others = np.delete(sizes, longest)
    if sizes[longest] > _LONGER * others.max():
        return longest
    upwards = 2
    return int(np.flatnonzero(here[:, 0] == upwards)[0])


# --- what holds the slices ------------------------------------------------------------------------


@dataclass(frozen=True)
class Volume:
    """A volume whose slices can be shown one by one.

    Attributes
    ----------
    view : View
        How they are shown.
    count : int
        How many there are.
    window : str or tuple
        The window in which all of them are shown.
    source : NiftiVoxels or DicomSlices
        Where their values come from.
    known : dict
        What the file itself says, as `medtune.pairs.files_of_pictures.Picture` has it.
    patient : str or None
        A hash that stands for the patient of a DICOM series.
    """

    view: View
    count: int
    window: Any
    source: "NiftiVoxels | DicomSlices"
    known: dict
    patient: str | None = None

    def picture(self, number: int) -> Image.Image:
        """Show a slice, counted from 0 in the order of the view, as RGB.

        Raises
        ------
        ValueError, OSError
            It cannot be read.
        """
        return Image.fromarray(self.source.shown(number, self.window))

    def file_of(self, number: int) -> Path:
        """Give the file that holds a slice."""
        return self.source.file_of(number)


@dataclass(frozen=True)
class NiftiVoxels:
    """The voxels of a NIfTI file.

    Attributes
    ----------
    file : Path
        The file.
    values : numpy.ndarray
        (columns, rows, slices), turned into the view.
    """

    file: Path
    values: np.ndarray

    def file_of(self, number: int) -> Path:
        """Give the file that holds a slice: it is one for all."""
        return self.file

    def shown(self, number: int, window: Any) -> np.ndarray:
        """Give a slice in a window as (rows, columns, 3) of uint8."""
        return show_values(self.values[:, :, number].T, window)


@dataclass(frozen=True)
class DicomSlices:
    """The files of a DICOM series.

    Attributes
    ----------
    files : tuple of Path
        In the order of the view.
    turn : numpy.ndarray
        How to turn what is stored, see `View`.
    """

    files: tuple[Path, ...]
    turn: np.ndarray

    def file_of(self, number: int) -> Path:
        """Give the file that holds a slice."""
        return self.files[number]

    def shown(self, number: int, window: Any) -> np.ndarray:
        """Give a slice in a window as (rows, columns, 3) of uint8."""
        [frame] = read_frames(self.files[number], window=window)
        # (rows, columns, colours) becomes (columns, rows, one slice, colours), and back
        stored = np.asarray(frame).swapaxes(0, 1)[:, :, np.newaxis]
        return np.ascontiguousarray(apply_orientation(stored, self.turn)[:, :, 0].swapaxes(0, 1))


def is_nifti(file: Path) -> bool:
    """Say whether a file is called as NIfTI volumes are.

    Parameters
    ----------
    file : Path
        Only its name counts.

    Returns
    -------
    bool
        True for .nii and .nii.gz.

    Examples
    --------
    >>> is_nifti(Path("ct.NII.gz")), is_nifti(Path("ct.dcm"))
    (True, False)
    """
    return file.name.lower().endswith(VOLUME_SUFFIXES)


def open_volume(path: Path, window: Any, salt: str, max_voxels: int = MAX_VOXELS) -> Volume:
    """Open a NIfTI file, or a folder that holds one series of DICOM slices.

    Parameters
    ----------
    path : Path
        The file or the folder.
    window : str, tuple or None
        The window for CT, or three for three colours, see `medtune.pairs.read_frames`. By default
        the series' own (that of its middle slice), else abdomen for CT; otherwise, and for every
        NIfTI file, which does not say what it holds, what spans all but the darkest and the
        brightest half per cent. All slices are shown in one window, so that they can be compared.
    salt : str
        What the number of a patient is hashed with.
    max_voxels : int
        A NIfTI file of more is refused before it is read.

    Returns
    -------
    Volume
        Pixels of DICOM slices are read when they are shown.

    Raises
    ------
    ValueError
        One line without names: it is no volume; it holds several series, a slice twice, a gap, no
        spacing, or slices that are shifted against each other.
    OSError
        No permission to read it.

    Examples
    --------
    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "mr.nii.gz"
    >>> image = nibabel.Nifti1Image(np.zeros((4, 4, 3), np.int16), np.diag([1.0, 1.0, 5.0, 1.0]))
    >>> nibabel.save(image, file)
    >>> volume = open_volume(file, None, salt="a secret")
    >>> volume.count, volume.view.plane, volume.view.spacing
    (3, 'axial', (5.0, 1.0, 1.0))
    """
    if path.is_dir():
        return _open_series(path, window, salt)
    if is_nifti(path):
        return _open_nifti(path, window, max_voxels)
    if is_dicom(path):
        raise ValueError("DICOM file is one slice: give the folder of its series")
    raise ValueError("picture is no volume: give a folder of DICOM slices, or a NIfTI file")


# --- NIfTI ----------------------------------------------------------------------------------------


def _open_nifti(file: Path, window: Any, max_voxels: int) -> Volume:
    # nibabel mends broken headers, and tells the log, with words of the file
    with _one_line(), nibabel.imageglobals.LoggingOutputSuppressor():
        image = nibabel.load(file)
        if not isinstance(image, nibabel.nifti1.Nifti1Pair):
            raise _Problem("is no NIfTI, whatever it is called")
        _check_header(image, _header_as_written(file, image), max_voxels)
        view = view_of(_affine_in_mm(image))
        stored = np.asanyarray(image.dataobj)
    values = apply_orientation(stored.reshape(stored.shape[:3]), view.turn)
    return Volume(
        view=view,
        count=values.shape[2],
        window=window or _fitted_window(values),
        source=NiftiVoxels(file, values),
        known={},
    )


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """Say in our own words what is wrong with a NIfTI file: its header may name a patient."""
    try:
        yield
    except _Problem as problem:
        raise ValueError(f"NIfTI volume {problem}") from None
    except Exception as error:  # nibabel, gzip, zlib and numpy raise many kinds
        # an errno comes from the system, not from the content: no permission, a failing disk
        if isinstance(error, OSError) and error.errno:
            raise
        raise ValueError("NIfTI volume is damaged, cut short, or no NIfTI") from None


def _header_as_written(file: Path, image: Any) -> Any:
    """Read the header once more as it stands: nibabel sets sizes of 0 to 1 mm, which nobody wrote."""
    with nibabel.openers.Opener(str(file)) as stream:
        return type(image.header).from_fileobj(stream, check=False)


def _check_header(image: Any, written: Any, max_voxels: int) -> None:
    """Refuse what is no single volume of numbers that says how it lies."""
    if len(image.shape) < 3 or min(image.shape) < 1 or math.prod(image.shape[3:]) != 1:
        sizes = " x ".join(str(size) for size in image.shape)
        raise _Problem(f"has the shape {sizes}: give one volume, of three dimensions")
    if math.prod(image.shape) > max_voxels:
        raise _Problem(f"promises more than {max_voxels:,} voxels: cut it into parts")
    if image.get_data_dtype().kind not in "iuf":
        raise _Problem("holds colours or other things than numbers: give the values themselves")
    zooms = np.array(written["pixdim"][1:4], dtype=float)
    if written["sform_code"] == 0:
        if not np.isfinite(zooms).all() or (zooms == 0).any():
            raise _Problem("says no spacing: nobody knows how large anything in it is")
        if written["qform_code"] == 0:
            raise _Problem(
                "does not say how it lies in the patient (neither sform nor qform): nobody knows "
                "left from right; have it converted from DICOM again"
            )


def _affine_in_mm(image: Any) -> np.ndarray:
    unit, _ = image.header.get_xyzt_units()
    factor = _MM[unit]
    return np.diag([factor, factor, factor, 1.0]) @ image.affine


def _fitted_window(values: np.ndarray) -> tuple[float, float]:
    """Give the (centre, width) that spans all but the outer half per cents of the whole volume."""
    count = values.shape[2]
    numbers = np.unique(np.linspace(0, count - 1, min(count, _LOOKED_AT)).round().astype(int))
    looked_at = values[:, :, numbers]
    finite = looked_at[np.isfinite(looked_at)]
    if not finite.size:
        return 0.0, 1.0
    low, high = np.percentile(finite, (0.5, 99.5))
    return float(low + high) / 2, max(float(high - low), 1.0)


# --- DICOM ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Head:
    """What the head of a slice says about its place.

    Attributes
    ----------
    place : list of float
        Where its first pixel lies, in mm.
    directions : list of float
        Where rows and columns lead.
    spacing : list of float
        Millimetres between two rows and two columns.
    size : tuple of int
        Rows and columns.
    frames : int
        How many pictures the file holds.
    """

    place: list[float]
    directions: list[float]
    spacing: list[float]
    size: tuple[int, int]
    frames: int


def _open_series(folder: Path, window: Any, salt: str) -> Volume:
    files = _files_of_one_series(folder)
    heads = [_head_of(file) for file in files]
    _check_heads(heads)
    _check_steps(heads)
    try:
        # DICOM slices are shown in the plane in which they are stored
        view = view_of(_affine_of(heads), axis=2)
    except _Problem as problem:
        raise ValueError(f"DICOM series {problem}") from None
    if view.turn[2, 1] < 0:
        files = files[::-1]
    # the order of the files is that of the view by now, and each is turned in its own plane
    in_plane = view.turn.copy()
    in_plane[2, 1] = 1
    about = describe(files[0], salt=salt)
    # a window is meant for CT: other kinds of pictures have values of their own
    wanted = window if about["modality"] == "CT" else None
    return Volume(
        view=view,
        count=len(files),
        window=wanted or default_window(files),
        source=DicomSlices(tuple(files), in_plane),
        known={"modality": about["modality"], "burned_in": about["burned_in_annotation"]},
        patient=about["group"],
    )


def _files_of_one_series(folder: Path) -> list[Path]:
    found = sort_folder(folder)
    # a slice that is cut short looks like a file that never had pixels
    damaged = len(found.unreadable) + found.left_out.pop("file without pixels", 0)
    if damaged:
        raise ValueError(
            f"DICOM series: {damaged} files of the folder cannot be read, so that "
            "slices may be missing; have the series sent again"
        )
    if not found.series:
        raise ValueError("folder holds no DICOM pictures: a volume is one series of them")
    if len(found.series) > 1:
        counts = ", ".join(str(len(files)) for files in found.series)
        raise ValueError(
            f"folder holds {len(found.series)} DICOM series (of {counts} slices), or one in "
            "several directions: put the slices of one into a folder of their own"
        )
    if found.left_out:
        say_once(f"folders of slices: left out: {counted(found.left_out)}")
    return found.series[0]


def _head_of(file: Path) -> _Head:
    with open_dicom(file, stop_before_pixels=True) as ds:
        flat = shown_tags(ds)
        return _Head(
            place=tag_numbers(flat, "ImagePositionPatient"),
            directions=tag_numbers(flat, "ImageOrientationPatient"),
            spacing=tag_numbers(flat, "PixelSpacing"),
            size=(int(ds.get("Rows") or 0), int(ds.get("Columns") or 0)),
            frames=int(ds.get("NumberOfFrames") or 1),
        )


def _check_heads(heads: list[_Head]) -> None:
    """Refuse a series whose slices do not say where they lie, or do not fit on each other."""
    for number, head in enumerate(heads, start=1):
        where = f"DICOM series: slice {number} of {len(heads)}"
        if head.frames > 1:
            raise ValueError(
                f"{where} holds {head.frames} frames: save it as files of one slice each"
            )
        if len(head.place) != 3 or len(head.directions) != 6:
            raise ValueError(f"{where} does not say where it lies: have the series exported again")
        if len(head.spacing) != 2 or min(head.spacing) <= 0:
            raise ValueError(
                f"{where} says no spacing of its pixels: have the series exported again"
            )
        same_pixels = np.allclose(head.spacing, heads[0].spacing, rtol=1e-3)
        if head.size != heads[0].size or not same_pixels:
            raise ValueError(
                f"{where} has pixels of another number or size than the first: these are two "
                "series, give the folder of one"
            )
    if len(heads) < 2:
        raise ValueError("DICOM series has 1 slice, so that no distance between slices is known")


def _positions(heads: list[_Head]) -> np.ndarray:
    """Give the place of each slice along the normal, in mm; they ascend, as the files are sorted."""
    directions = heads[0].directions
    normal = np.cross(directions[:3], directions[3:])
    return np.array([np.dot(normal, head.place) for head in heads])


def _check_steps(heads: list[_Head]) -> None:
    """Refuse a series with a slice that is there twice, or one that is missing."""
    steps = np.diff(_positions(heads))
    usual = float(np.median(steps))
    for number, step in enumerate(steps, start=1):
        where = f"DICOM series: slices {number} and {number + 1} of {len(heads)}"
        if step < _SAME_PLACE:
            raise ValueError(
                f"{where} lie at one place: a slice is there twice, or two series (phases) are "
                "mixed; keep one of them"
            )
        if step > 1.5 * usual:
            missing = max(round(step / usual) - 1, 1)
            raise ValueError(
                f"{where} lie {step:g} mm apart, others {usual:g} mm: {missing} missing between "
                "them; have the series sent again"
            )
        if abs(step - usual) > max(_EVEN * usual, _ROUNDED):
            raise ValueError(
                f"{where} lie {step:g} mm apart, others {usual:g} mm: give a series of even steps"
            )


def _affine_of(heads: list[_Head]) -> np.ndarray:
    """Give nibabel's affine of (column, row, slice) for slices in order."""
    first, last = heads[0], heads[-1]
    row_mm, column_mm = first.spacing
    affine = np.eye(4)
    affine[:3, 0] = np.array(first.directions[:3]) * column_mm
    affine[:3, 1] = np.array(first.directions[3:]) * row_mm
    affine[:3, 2] = (np.array(last.place) - np.array(first.place)) / (len(heads) - 1)
    affine[:3, 3] = first.place
    return _DICOM_TO_NIBABEL @ affine
