"""Find duplicates, split by patient, and prove that a split does not leak.

`near` hashes pictures and finds close hashes, `fingerprints` reads each picture of a data set once,
`spread` does so on a Ray cluster, `duplicates` lists what is there twice, `groups` says which
pictures belong together, `splits` deals groups out, `leaks` counts what crosses a split, `closest`
shows what looks most alike across it, and `keep` writes a split down. `ids` finds ids that repeat
across shards, `burned_in` warns of text in the pixels. `unknown` guesses groups where none are known,
and rates the guess. `near` and `splits` stand alone.
"""

from .burned_in import BurnedIn, burned_in_text
from .closest import closest_across
from .duplicates import duplicate_captions, exact_duplicates, near_duplicates
from .fingerprints import Fingerprints, fingerprint
from .groups import assign_groups
from .ids import RepeatedIds, repeated_ids
from .keep import write_splits
from .leaks import audit_split
from .near import near_pairs, picture_hash
from .splits import split_by_group
from .spread import Marked, fingerprint_on_cluster
from .unknown import count_unknown_groups, group_clues, guess_groups, rate_groups

__all__ = [
    "BurnedIn",
    "Fingerprints",
    "Marked",
    "RepeatedIds",
    "assign_groups",
    "audit_split",
    "burned_in_text",
    "closest_across",
    "count_unknown_groups",
    "duplicate_captions",
    "exact_duplicates",
    "fingerprint",
    "fingerprint_on_cluster",
    "group_clues",
    "guess_groups",
    "near_duplicates",
    "near_pairs",
    "picture_hash",
    "rate_groups",
    "repeated_ids",
    "split_by_group",
    "write_splits",
]
