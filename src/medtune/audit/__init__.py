"""Find duplicates, split by patient, and prove that a split does not leak.

`near` hashes pictures and finds close hashes, `fingerprints` reads each picture of a data set once,
`duplicates` lists what is there twice, `groups` says which pictures belong together, `splits` deals
groups out, `leaks` counts what crosses a split, and `closest` shows what looks most alike across
it. `near` and `splits` stand alone.
"""

from .closest import closest_across
from .duplicates import duplicate_captions, exact_duplicates, near_duplicates
from .fingerprints import Fingerprints, fingerprint
from .groups import assign_groups
from .leaks import audit_split
from .near import near_pairs, picture_hash
from .splits import split_by_group

__all__ = [
    "Fingerprints",
    "assign_groups",
    "audit_split",
    "closest_across",
    "duplicate_captions",
    "exact_duplicates",
    "fingerprint",
    "near_duplicates",
    "near_pairs",
    "picture_hash",
    "split_by_group",
]
