"""Pairs as a hospital keeps them, made of the sample: patients' numbers, reports, DICOM files."""

from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from medtune.pairs import load_pairs


def own_pairs(sample_path: Path, patients: int = 6, pictures: int = 4) -> pd.DataFrame:
    """So many slices of each of so many patients, so to speak, under a hospital's names."""
    pairs = load_pairs(sample_path)
    apart = len(pairs) // (patients * pictures)
    rows = []
    for number in range(patients * pictures):
        row = pairs[number * apart]
        rows.append(
            {
                "patient_id": f"MRN{7000 + number // pictures}",
                "picture": row["image"],
                "impression": row["caption"],
            }
        )
    return pd.DataFrame(rows)


def write_slice(path: Path, grey: np.ndarray, patient: str, number: int) -> None:
    """Write a grey picture as a CT slice whose abdomen window shows it."""
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = CTImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = path.name
    ds.PatientID = patient
    ds.Modality = "CT"
    ds.InstanceNumber = number
    ds.Rows, ds.Columns = grey.shape
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.BitsAllocated = ds.BitsStored = 16
    ds.HighBit = 15
    ds.PixelRepresentation = 1
    ds.RescaleSlope = 1
    ds.RescaleIntercept = 0
    # the window called abdomen runs from -150 to 250
    hounsfield = np.rint(grey / 255 * 400 - 150).astype("<i2")
    ds.PixelData = hounsfield.tobytes()
    ds.save_as(path, enforce_file_format=True)
