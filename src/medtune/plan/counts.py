"""How many weights a model has and an adapter brings, without building the model where it can be.

`counts.json` beside this file holds what `build_counts` found on the models themselves, for every
word of `medtune.models.TARGETS`: a plan then starts at once, because neither torch nor Transformers
has to be loaded. What is not in the table (several words, single layers, whole modules) is counted
on the model.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .activations import BFLOAT16, FLOAT32
from .shapes import FACTS

TABLE = Path(__file__).with_name("counts.json")

# Half a byte, for every 64 weights a scale of one byte, and for every 256 of these one of float32.
NF4 = 1 / 2 + 1 / 64 + 4 / 64 / 256


@dataclass(frozen=True)
class Adapter:
    """Which weights an adapter brings."""

    #: words of `medtune.models.TARGETS` joined by +
    target: str
    #: rank of the two matrices at each layer
    rank: int
    #: layers that are trained as a whole beside it
    modules_to_save: tuple[str, ...]


@dataclass(frozen=True)
class Counts:
    """What is counted on the model itself, with its adapter."""

    #: bytes of the base model's weights
    weights: float
    #: bytes of what is trained
    trained: int
    #: number of weights that are trained
    trained_parameters: int
    #: parts in which something is trained
    parts: frozenset[str]


@cache
def _counts() -> dict:
    """Read the table, once: a recommendation counts for every setting that it tries."""
    return json.loads(TABLE.read_text("utf-8"))


def count(name: str, dtype: str, adapter: Adapter | None, *, four_bit: bool) -> Counts:
    """Count weights, and what is trained of them: of the adapter, or all where there is none.

    Parameters
    ----------
    name : full hub name of `model_names`.
    dtype : of the weights, "bfloat16" or "float32".
    adapter : None if all weights are trained.
    four_bit : whether bitsandbytes packs the Linear layers.

    Raises
    ------
    ValueError : the adapter's target is unknown, or reaches nothing in this model.

    Examples
    --------
    >>> adapter = Adapter("language", rank=8, modules_to_save=())
    >>> found = count("Qwen/Qwen3-VL-2B-Instruct", "bfloat16", adapter, four_bit=False)
    >>> found.trained_parameters, sorted(found.parts)
    (8716288, ['language MLP', 'language attention'])
    """
    shape = FACTS["same_shape"].get(name, name)
    known = _counts()[shape]
    itemsize = FLOAT32 if dtype == "float32" else BFLOAT16
    weights = known["weights"] * itemsize
    if four_bit:
        weights -= known["packed"] * (itemsize - NF4)
    if adapter is None:
        return Counts(
            weights=weights,
            trained=known["weights"] * itemsize,
            trained_parameters=known["weights"],
            parts=frozenset(known["parts"]),
        )
    reached = known["targets"].get(adapter.target)
    if reached is None or adapter.modules_to_save:
        # counted on the model, which is loaded for it; an unknown target is refused there
        from .counting import count_adapter

        found = count_adapter(name, dtype, adapter)
        parameters = found["parameters"]
        size = found["bytes"]
        parts = found["parts"]
    else:
        parameters = reached["per_rank"] * adapter.rank
        # adapters are float32 whatever the weights are
        size = parameters * FLOAT32
        parts = reached["parts"]
    if four_bit:
        # TRL keeps adapters on 4-bit weights in bfloat16
        size = parameters * BFLOAT16
    return Counts(
        weights=weights, trained=size, trained_parameters=parameters, parts=frozenset(parts)
    )
