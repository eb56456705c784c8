"""The field's own benchmarks by name: their questions, their answer rules, and what leaks.

`published.py` says which benchmarks are known, and how each is published. `load.py` reads one, from
its files (`forms.py`, found by `places.py`) or from the hub. `rules.py` judges a single answer as the field does, and
`score.py` all of them, closed and open questions apart. `overlap.py` counts pictures of a benchmark
that the training set has seen. `polling.py` makes yes/no questions about what is in a picture and what
is not from captions of one's own.
"""

from .load import Loaded, load_benchmark, own_questions, pictures_of
from .overlap import Shared, count_shared
from .polling import ExistenceQuestion, existence_questions, existence_scores
from .published import Benchmark, find_benchmark
from .score import score_benchmark

__all__ = [
    "Benchmark",
    "ExistenceQuestion",
    "Loaded",
    "Shared",
    "count_shared",
    "existence_questions",
    "existence_scores",
    "find_benchmark",
    "load_benchmark",
    "own_questions",
    "pictures_of",
    "score_benchmark",
]
