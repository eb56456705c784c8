"""Know before you rent: shape twins of published models, and what training them takes.

`shapes.py` gives the published shapes as facts, `counts.py` says how many weights they have,
`activations.py` what a token and a patch take, and `memory.py` what a whole training takes on a
GPU. These three start at once. `twins.py` makes models of such a shape with random weights, and
`counting.py` counts on them.
"""

from typing import Any

from .memory import estimate, picture_size, recommend, smallest_card
from .shapes import model_facts, model_names

# What needs torch and Transformers, which take seconds to load: only on demand.
_TWINS = ("build_twin", "make_twin", "save_processor", "twin_config")

__all__ = [
    "build_twin",
    "estimate",
    "make_twin",
    "model_facts",
    "model_names",
    "picture_size",
    "recommend",
    "save_processor",
    "smallest_card",
    "twin_config",
]


def __getattr__(name: str) -> Any:
    """Load `twins.py` when one of its functions is asked for."""
    if name not in _TWINS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import twins

    return getattr(twins, name)
