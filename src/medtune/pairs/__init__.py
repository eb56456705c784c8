"""Any source becomes pairs: rows with `image`, `id`, `caption` and what else is known.

`load.py` finds out what a source is and loads it; `hub.py` asks the Hugging Face hub. `tables.py`
yields the rows of parquet files and tables, `record.py` turns one record, plain or a dialogue, into
pairs, `files_of_pictures.py` finds and opens the files that hold pictures, and `arrow.py` makes a
data set of the rows; `reading.py` holds what these four are told. `pictures.py` judges a single
pair and makes its picture RGB, `dicom.py` reads DICOM files without their patients; both stand
alone. `series.py` puts slices into order, `sample.py` draws some of many rows, `salt.py` hashes
names of patients and of files.
"""

from .dicom import (
    WINDOWS,
    copy_without_patient,
    describe,
    is_dicom,
    read_frames,
)
from .load import load_pairs
from .pictures import picture_bytes, reject_reason, to_rgb
from .record import names_group
from .salt import safe_id, user_salt
from .sample import sample_rows
from .series import series_files
from .tables import split_of

__all__ = [
    "WINDOWS",
    "copy_without_patient",
    "describe",
    "is_dicom",
    "load_pairs",
    "names_group",
    "picture_bytes",
    "read_frames",
    "reject_reason",
    "safe_id",
    "sample_rows",
    "series_files",
    "split_of",
    "to_rgb",
    "user_salt",
]
