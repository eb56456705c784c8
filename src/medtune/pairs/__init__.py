"""Any source becomes pairs: rows with `image`, `id`, `caption` and what else is known.

`load.py` loads a source; `find.py` finds out what it consists of, `archives.py` unpacks a ZIP, and
`hub.py` asks the Hugging Face hub, whose sets get our columns in `sets.py`. `sources.py` reads the
records of a table: of delimited text (`delimited.py`, in the encoding that `encodings.py` knows),
JSON (`json_tables.py`), Excel (`excel.py`), and parquet or Arrow (`shards.py`). `columns.py` says
which column is which. `record.py` turns one record into pairs, `dialogues.py` takes a dialogue
apart, `locate.py` finds the picture that a cell names, and `files_of_pictures.py` opens it.
`survey.py` looks over all ids first, `tables.py` yields the rows with ids and groups, and
`arrow.py` makes a data set of them; `reading.py` holds what these are told.

`volumes.py` opens a DICOM series or a NIfTI file as slices in the radiologist's view, and `slabs.py`
takes those of one question out of it.

`pictures.py` judges a single pair and makes its picture RGB, `dicom.py` reads DICOM files without
their patients; both stand alone. `series.py` puts slices into order, `sample.py` draws some of many
rows, `salt.py` hashes names of patients and of files.
"""

from .columns import split_of_word
from .dicom import (
    WINDOWS,
    copy_without_patient,
    describe,
    is_dicom,
    read_frames,
)
from .files_of_pictures import PICTURE_SUFFIXES
from .find import folder_of_zip
from .load import list_shards, load_pairs
from .pictures import picture_bytes, reject_reason, to_rgb
from .record import names_group
from .salt import safe_id, user_salt
from .sample import sample_rows
from .series import series_files
from .slabs import Slab, choose_slices
from .tables import split_of
from .volumes import Volume, is_nifti, open_volume

__all__ = [
    "PICTURE_SUFFIXES",
    "WINDOWS",
    "Slab",
    "Volume",
    "choose_slices",
    "copy_without_patient",
    "describe",
    "folder_of_zip",
    "is_dicom",
    "is_nifti",
    "list_shards",
    "load_pairs",
    "names_group",
    "open_volume",
    "picture_bytes",
    "read_frames",
    "reject_reason",
    "safe_id",
    "sample_rows",
    "series_files",
    "split_of",
    "split_of_word",
    "to_rgb",
    "user_salt",
]
