"""Which layers get an adapter, which learning rate a weight has, and how many weights are trained.

Needs torch. All of it goes by the names of modules and parameters, so it holds for a base model,
for a model with a peft adapter, and for the families Qwen-VL, Qwen3.5, Gemma-3, Gemma-4 and
Idefics3 alike.
"""

import re
from collections import defaultdict
from collections.abc import Iterable

import torch

# The parts of a vision-language model, by parameter name. The first match wins: the merger of
# Qwen-VL stands inside the vision tower, and the experts stand inside an MLP.
PARTS = {
    "experts": r"\.experts\b|\.shared_expert|\.mlp\.gate(\.|$)",
    # of Gemma-4, with the projection behind it
    "audio": r"audio_tower|embed_audio",
    "merger": r"merger|multi_modal_projector|connector|embed_vision",
    "vision": r"\bvisual\b|vision_tower|vision_model",
    "embeddings": r"embed_tokens",
    "head": r"lm_head",
    # three of four layers of Qwen3.5 are Gated DeltaNet, which stands in the place of attention
    "language attention": r"self_attn|linear_attn",
    "language MLP": r"\.mlp\.",
    # Gemma-4 gives each layer a small embedding of each token, with projections of its own
    "per-layer inputs": r"per_layer_",
}

# The parts that one word of `adapter_targets(model, which)` reaches.
TARGETS = {
    "experts": {"experts"},
    "vision": {"vision"},
    "merger": {"merger"},
    "attention": {"language attention"},
    "mlp": {"language MLP"},
    "language": {"language attention", "language MLP"},
    # LLaMA-Factory's `lora_target: all` freezes the vision tower and the merger
    "llamafactory-all": {"language attention", "language MLP", "experts", "per-layer inputs"},
    # peft's `all-linear` takes every Linear layer but the head. The audio tower is left out here:
    # no picture reaches it, so an adapter there would never learn.
    "all-linear": {
        "language attention",
        "language MLP",
        "experts",
        "per-layer inputs",
        "merger",
        "vision",
    },
}

# Parts whose weights may be bare parameters in place of Linear layers, with the number of
# dimensions of such a weight: fused experts are (experts, in, out), Gemma-3's merger is (in, out).
BARE_DIMENSIONS = {"experts": 3, "merger": 2}


def part_of(name: str) -> str:
    """Say to which part of the model a parameter or module belongs, by its name.

    Parameters
    ----------
    name : full name, as `named_parameters` or `named_modules` give it.

    Returns
    -------
    str : a key of `PARTS`, or "norms and other".

    Examples
    --------
    >>> part_of("base_model.model.model.visual.merger.linear_fc1.lora_A.default.weight")
    'merger'
    >>> part_of("model.language_model.layers.0.input_layernorm.weight")
    'norms and other'
    """
    for part, pattern in PARTS.items():
        if re.search(pattern, name):
            return part
    return "norms and other"


def adapter_targets(model: torch.nn.Module, which: str = "language") -> dict:
    r"""Name the layers that get an adapter, as keyword arguments for `peft.LoraConfig`.

    Parameters
    ----------
    model : the base model, without adapter.
    which : words of `TARGETS` joined by `+`, such as "language+merger". The head is never included.
        Names of layers such as "q_proj+v_proj" take of the language model these layers only.

    Returns
    -------
    dict : "target_modules", a pattern that matches exactly the chosen Linear layers. Experts, and
        Gemma-3's merger, are bare parameters: then "target_parameters" names them, and peft wants
        `lora_dropout=0`.

    Raises
    ------
    ValueError : an unknown word, or one that reaches nothing in this model.

    Examples
    --------
    >>> attention = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(2, 2)})
    >>> layer = torch.nn.ModuleDict({"self_attn": attention})
    >>> model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([layer])})
    >>> print(adapter_targets(model)["target_modules"])
    layers\.\d+\.self_attn\.(q_proj)
    """
    words = [word.strip() for word in which.split("+")]
    layer_names = {word for word in words if word.endswith("_proj")}
    for word in words:
        if word not in TARGETS and word not in layer_names:
            known = ", ".join(TARGETS)
            raise ValueError(
                f"Unknown adapter target {word!r}: use {known}, or several joined by +."
            )
    reach = {word: TARGETS.get(word, TARGETS["language"]) for word in words}
    parts = set().union(*reach.values())

    layers = _linear_layers(model, parts, layer_names)
    # only a part that is asked for by its own name is looked for among the bare parameters:
    # "all-linear" means what it says
    bare = _bare_parameters(model, set(words))

    reached = {part_of(name) for name in layers + bare}
    for word in words:
        if not reached & reach[word]:
            raise ValueError(f"This model has no layers for the adapter target {word!r}.")

    targets: dict = {"target_modules": _pattern_for(layers) or []}
    if bare:
        targets["target_parameters"] = sorted({_name_for_peft(name) for name in bare})
    return targets


def _linear_layers(model: torch.nn.Module, parts: set[str], layer_names: set[str]) -> list[str]:
    """List the full names of the Linear layers of these parts.

    `layer_names`, if there are any, are the only ones to take of the language model.
    """
    layers = []
    for name, module in model.named_modules():
        part = part_of(name)
        if not isinstance(module, torch.nn.Linear) or part not in parts:
            continue
        # SigLIP's pooling head is there, but Gemma-3 never calls it
        if "vision_tower.head" in name:
            continue
        leaf = name.rpartition(".")[2]
        if layer_names and part in TARGETS["language"] and leaf not in layer_names:
            continue
        layers.append(name)
    return layers


def _bare_parameters(model: torch.nn.Module, parts: set[str]) -> list[str]:
    """List the full names of the weights of these parts that no Linear layer holds."""
    # some families have a Linear expert for all tokens beside the fused ones
    of_linear = set()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            of_linear.update(id(parameter) for parameter in module.parameters())
    found = []
    for name, parameter in model.named_parameters():
        part = part_of(name)
        is_bare = id(parameter) not in of_linear and parameter.ndim == BARE_DIMENSIONS.get(part)
        if part in parts and is_bare:
            found.append(name)
    return found


def _name_for_peft(name: str) -> str:
    """Shorten the name of a bare parameter to the end by which peft finds it in every layer."""
    # mlp.experts.gate_up_proj, and multi_modal_projector.mm_input_projection_weight
    kept = 3 if part_of(name) == "experts" else 2
    return ".".join(name.split(".")[-kept:])


def _pattern_for(layers: Iterable[str]) -> str:
    """Write a regular expression for these layers, one alternative for layers of any number."""
    leaves = defaultdict(set)
    for layer in layers:
        parent, _, leaf = layer.rpartition(".")
        # layers.0.self_attn and layers.1.self_attn become one parent; the dots are escaped by then
        parent = re.sub(r"(?<=\.)\d+(?=\\\.|$)", r"\\d+", re.escape(parent))
        leaves[parent].add(re.escape(leaf))
    alternatives = []
    for parent, names in sorted(leaves.items()):
        alternatives.append(rf"{parent}\.({'|'.join(sorted(names))})")
    return "|".join(alternatives)


def parameter_groups(
    model: torch.nn.Module, learning_rate: float, rates: dict[str, float]
) -> list[dict]:
    """Group what is trained by learning rate, for an optimizer of `torch.optim`.

    Parameters
    ----------
    model : the model, with what is not trained frozen.
    learning_rate : for the parts that `rates` does not name.
    rates : learning rate by part (`PARTS`).

    Returns
    -------
    list of dict : one for each learning rate, with "params" and "lr".

    Raises
    ------
    ValueError : a rate for a part in which nothing is trained.

    Examples
    --------
    >>> linear = torch.nn.Linear(2, 2)
    >>> model = torch.nn.ModuleDict({"visual": linear, "lm_head": torch.nn.Linear(2, 2)})
    >>> groups = parameter_groups(model, 1e-4, {"vision": 1e-5})
    >>> [(group["lr"], len(group["params"])) for group in groups]
    [(1e-05, 2), (0.0001, 2)]
    """
    groups = defaultdict(list)
    trained_parts = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = part_of(name)
            trained_parts.add(part)
            groups[rates.get(part, learning_rate)].append(parameter)
    absent = sorted(set(rates) - trained_parts)
    if absent:
        raise ValueError(f"A learning rate for {absent[0]!r}, but nothing is trained there.")
    return [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]


def count_parameters(model: torch.nn.Module) -> dict[str, dict[str, int]]:
    """Count trained and frozen parameters by part, 4-bit weights at their true number.

    Parameters
    ----------
    model : a base model or one with an adapter. A head that is tied to the embeddings is counted
        there.

    Returns
    -------
    dict : by part (`PARTS`, "norms and other", "total") the numbers "trained" and "frozen"; parts
        that the model does not have are left out.

    Examples
    --------
    >>> count_parameters(torch.nn.ModuleDict({"lm_head": torch.nn.Linear(2, 3)}))
    {'head': {'trained': 9, 'frozen': 0}, 'total': {'trained': 9, 'frozen': 0}}
    """
    counts = {part: {"trained": 0, "frozen": 0} for part in [*PARTS, "norms and other", "total"]}
    for name, parameter in model.named_parameters():
        number = _true_number(parameter)
        state = "trained" if parameter.requires_grad else "frozen"
        counts[part_of(name)][state] += number
        counts["total"][state] += number
    return {part: count for part, count in counts.items() if count["trained"] or count["frozen"]}


def _true_number(parameter: torch.nn.Parameter) -> int:
    """Count the weights of a parameter; bitsandbytes packs two of 4 bits into a byte."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return parameter.numel()
    return state.shape.numel()
