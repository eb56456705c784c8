"""Volumes for tests, as DICOM series and as NIfTI files, of numbers that all differ."""

import nibabel
import numpy as np
from dicom_files import data_set, saved
from nibabel.orientations import axcodes2ornt, ornt_transform
from pydicom.uid import generate_uid


def values(slices: int = 6, rows: int = 5, columns: int = 4) -> np.ndarray:
    """Numbers of which no two are equal, (slices, rows, columns), as wide apart as WIDE shows."""
    count = slices * rows * columns
    return np.linspace(-900, 900, count).round().astype(np.int16).reshape(slices, rows, columns)


def write_nifti(path, array, view="LPS", stored="LPS", size=(0.8, 0.8, 3.0)):
    """Write (slices, rows, columns) of a view, with millimetres of its axes, along other axes."""
    affine = np.eye(4)
    here = axcodes2ornt(tuple(view))
    for axis, (world, sign) in enumerate(here.astype(int)):
        affine[:3, axis] = 0
        affine[world, axis] = sign * size[axis]
    affine[:3, 3] = (-20, 30, 100)
    image = nibabel.Nifti1Image(array.transpose(2, 1, 0), affine)
    image = image.as_reoriented(ornt_transform(here, axcodes2ornt(tuple(stored))))
    nibabel.save(image, path)
    return path


def write_series(folder, array, size=(0.8, 0.8, 3.0), affine=None, **tags):
    """Write (slices, rows, columns) as DICOM files whose names and numbers run the other way.

    The affine is nibabel's; by default that of an axial volume.
    """
    if affine is None:
        affine = np.diag([-size[0], -size[1], size[2], 1.0])
    affine = np.diag([-1, -1, 1, 1]) @ affine
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    directions = affine[:3, :2] / spacing[:2]
    common = {
        "SeriesInstanceUID": generate_uid(),
        "PixelSpacing": [spacing[1], spacing[0]],
        "ImageOrientationPatient": [*directions[:, 0], *directions[:, 1]],
        "RescaleSlope": 1,
        "RescaleIntercept": 0,
    }
    files = []
    for number, plane in enumerate(array):
        place = (affine @ [0, 0, number, 1])[:3]
        back = len(array) - number
        ds = data_set(plane, **(common | {"ImagePositionPatient": [*place]} | tags))
        ds.InstanceNumber = back
        files.append(saved(folder, ds, f"{back:03d}.dcm"))
    return files
