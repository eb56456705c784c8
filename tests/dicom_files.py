"""DICOM files for tests, made with pydicom: a patient called Doe^Jane with the number PID-4711."""

from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid


def data_set(array, *, photometric="MONOCHROME2", modality="CT", stored=None, **tags) -> Dataset:
    """A data set of an array (rows, columns), (frames, rows, columns) or (rows, columns, 3)."""
    array = np.asarray(array)
    is_colour = array.ndim == 3 and array.shape[-1] == 3
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = CTImageStorage
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    ds.StudyInstanceUID = generate_uid()
    ds.SeriesInstanceUID = generate_uid()
    ds.PatientName = "Doe^Jane"
    ds.PatientID = "PID-4711"
    ds.Modality = modality
    if is_colour:
        ds.Rows, ds.Columns = array.shape[:2]
        ds.SamplesPerPixel = 3
        ds.PhotometricInterpretation = "RGB"
        ds.PlanarConfiguration = 0
    else:
        ds.Rows, ds.Columns = array.shape[-2:]
        ds.SamplesPerPixel = 1
        ds.PhotometricInterpretation = photometric
        if array.ndim == 3:
            ds.NumberOfFrames = len(array)
    ds.BitsAllocated = array.dtype.itemsize * 8
    ds.BitsStored = stored or ds.BitsAllocated
    ds.HighBit = ds.BitsStored - 1
    ds.PixelRepresentation = int(array.dtype.kind == "i")
    ds.PixelData = array.tobytes()
    for tag, value in tags.items():
        setattr(ds, tag, value)
    return ds


def saved(folder: Path, ds: Dataset, name: str = "a.dcm") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)
    return path
