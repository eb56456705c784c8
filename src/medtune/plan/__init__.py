"""Know before you rent: shape twins of published models, and what training them takes.

`shapes.py` gives the published shapes as facts, `twins.py` makes models of such a shape with random
weights, `activations.py` says what a token and a patch take, and `memory.py` what a whole training
takes on a GPU.
"""

from .memory import estimate, picture_size, recommend
from .shapes import model_facts, model_names
from .twins import build_twin, make_twin, save_processor, twin_config

__all__ = [
    "build_twin",
    "estimate",
    "make_twin",
    "model_facts",
    "model_names",
    "picture_size",
    "recommend",
    "save_processor",
    "twin_config",
]
