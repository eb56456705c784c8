"""The published shapes of the models, as facts: widths, layers, parameters, special tokens.

They stand in `shapes.json` beside this file: "models" by hub name, "same_shape" for models that
share the shape of another, "families" with what all models of one type have in common, and "text",
a few sentences.

"parameters" is what the hub counts in a model's files, and "not_loaded" what Transformers leaves of
it: the layer of Qwen3.5 that foretells several tokens at once, and keys and values of those layers
of Gemma-4 that use another layer's. The sizes are those of the published config.json. Those of
Qwen3.5, Gemma-4, Qwen3-VL-4B and 8B and Qwen2.5-VL-3B were read where public repositories repeat
them (THUDM/slime, mlx-vlm, vLLM's tests) and in the defaults of Transformers, which are those of
Qwen3.5-9B, Qwen3.5-35B-A3B and Gemma-4-E2B. They agree with the published numbers of parameters to
the last weight, Gemma-4's but for the bounds of its clipped layers.
"""

import json
from pathlib import Path
from typing import Any

from medtune.modelscope import PREFIX

FACTS: dict[str, Any] = json.loads(Path(__file__).with_name("shapes.json").read_text("utf-8"))


def model_names() -> list[str]:
    """Name the models whose shape is known, by hub name.

    Examples
    --------
    >>> "Qwen/Qwen3-VL-2B-Instruct" in model_names()
    True
    """
    return [*FACTS["models"], *FACTS["same_shape"]]


def model_facts(name: str) -> dict[str, Any]:
    """Give the facts of one model.

    Parameters
    ----------
    name : a hub name of `model_names`, in capitals or not; it may leave out the owner.

    Returns
    -------
    dict : the full "name", the published number of "parameters", the "licence", and the "config" as
        Transformers writes it.

    Raises
    ------
    ValueError : the shape of this model is not known here.

    Examples
    --------
    >>> model_facts("gemma-3-4b-pt")["parameters"]
    4300079472
    """
    # the same models are on ModelScope, under the same names
    wanted = name.removeprefix(PREFIX).lower()
    for known in model_names():
        short = known.split("/")[1]
        if wanted in (known.lower(), short.lower()):
            shape = FACTS["same_shape"].get(known, known)
            return FACTS["models"][shape] | {"name": known}
    raise ValueError(
        f"The shape of {name} is not known here; known are {', '.join(model_names())}."
    )


def family_facts(name: str) -> dict[str, Any]:
    """Give what a model has in common with all of its type: tokens, chat template, pictures."""
    model_type = model_facts(name)["config"]["model_type"]
    return FACTS["families"][model_type]
