"""Training records: pictures and JSON Lines that TRL and LLaMA-Factory read.

- `dialects`: the ways to write a record, and how a record of any of them is read
- `write`: `convert_pairs`; its parts are `sources` (open what holds the pairs), `splits` (which
  split each row goes to), `judge` (which rows become pairs), `strip` (what a copied picture tells
  besides its pixels, which stands alone), `reasons` (what is said of rows that are left out) and
  `progress` (what is noted, so that a killed run goes on); `spread` does it on a Ray cluster
- `check`: `check_folder`, with `prepare`, which does to a record what a training will do
- `read`: `read_records`
- `stream`: the same records made of parquet shards while they are read
"""

from .check import check_folder
from .dialects import DIALECTS, MARK, QUESTIONS, SPLITS
from .read import read_records
from .stream import RecordStream, ShardIndex, count_rejected, index_shards, names_shards
from .write import convert_pairs

__all__ = [
    "DIALECTS",
    "MARK",
    "QUESTIONS",
    "SPLITS",
    "RecordStream",
    "ShardIndex",
    "check_folder",
    "convert_pairs",
    "count_rejected",
    "index_shards",
    "names_shards",
    "read_records",
]
