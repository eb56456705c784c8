"""What activations take: bytes a token and a patch, in a step of training and when a model answers.

The terms were read off what PyTorch saves for the backward pass in each layer under autocast. Where
several things come and go together, one number was fitted to peaks measured on a GPU; a comment
says so. Measured and planned peaks stand side by side in `papermill_runs/reference/planner-h200/`.

A language model may have layers of several kinds: Qwen3.5 has Gated DeltaNet layers, which hold a
state in the place of keys and values, and Gemma-4 layers that share the keys of another. A Gated
DeltaNet layer is counted as Transformers computes it without the package flash-linear-attention.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from .shapes import family_facts, model_facts

# Bytes of a number, and of an element of the mask that dropout keeps.
BFLOAT16 = 2
FLOAT32 = 4
MASK = 1

# Tokens that a Gated DeltaNet layer computes at once; a sample is filled up to a multiple of it.
CHUNK = 64


@dataclass(frozen=True)
class DeltaShape:
    """Sizes of a Gated DeltaNet layer."""

    #: width of all value heads together, to which those of the keys are repeated
    values: int
    #: width of queries, keys and values in front of the convolution
    channels: int
    #: number of value heads
    heads: int
    #: numbers in the state of one head
    state: int


@dataclass(frozen=True)
class LanguageShape:
    """Sizes of the layers of one kind; a width is how many numbers a token has at that place."""

    #: width between the layers
    hidden: int
    #: number of layers of this kind
    layers: int
    #: width of all query heads together
    queries: int
    #: width of all key heads together, and of all value heads; 0 where another layer's are used
    keys: int
    #: number of projections that read the input of attention
    projections: int
    #: the result of attention is multiplied by a gate
    gated: bool
    #: sizes of the Gated DeltaNet that stands in the place of attention, if one does
    delta: DeltaShape | None
    #: width of what Gemma-4 adds to each layer for each token, else 0
    per_layer_input: int
    #: width inside the expert that all tokens visit beside theirs, 0 in a model without
    shared_inner: int
    #: width inside the MLP, or inside all experts together that a token visits
    inner: int
    #: number of experts in a layer, 0 in a model without
    experts: int
    #: number of experts that a token visits, 0 in a model without
    visited: int
    #: width inside one expert, 0 in a model without
    expert_inner: int
    #: number of norms of the whole width in a layer
    norms: int
    #: width of queries and keys together where they have norms of their own, else 0
    normed_heads: int
    #: keys and values are repeated for every query head before attention
    repeats_keys: bool


@dataclass(frozen=True)
class VisionShape:
    """Sizes of a vision tower; a width is how many numbers a patch has at that place."""

    #: width between the blocks
    width: int
    #: width inside the MLP
    inner: int
    #: number of blocks
    blocks: int
    #: number of mergers into the language model, with those of DeepStack
    mergers: int
    #: number of norms of the whole width in a block
    norms: int
    #: width of what has norms in attention, else 0
    normed_heads: int
    #: the MLP multiplies two branches
    gated: bool
    #: the activation is quick_gelu, written out in three steps
    quick_gelu: bool
    #: gradients pass through the frozen tower when checkpointing asks for them at the input
    gradients_reach: bool


@dataclass(frozen=True)
class Training:
    """What of a fine-tune decides what a step takes."""

    #: "lora", "qlora" or "full"
    method: str
    #: type of the weights, "bfloat16" or "float32"
    dtype: str
    #: the parts in which something is trained, as `medtune.models.part_of` names them
    parts: frozenset[str]
    #: adapters have dropout
    dropout: bool
    #: activations are recomputed in the backward pass
    checkpointing: bool
    #: several batches make a step
    accumulation: bool

    @property
    def four_bit(self) -> bool:
        """The frozen weights are packed in 4 bits."""
        return self.method == "qlora"


@dataclass(frozen=True)
class Activations:
    """What a step of training holds for the backward pass, and what comes and goes in it."""

    #: bytes a token that all layers of the language model keep
    kept: int
    #: bytes that they keep for a token of whole chunks, in Gated DeltaNet layers
    kept_in_chunks: int
    #: bytes a token that come and go while one layer is computed
    work: int
    #: bytes for a token of whole chunks that do so
    work_in_chunks: int
    #: bytes a patch that the vision tower keeps
    vision_kept: int
    #: bytes a patch that come and go while one block is computed
    vision_work: int
    #: bytes that experts keep when they are added up with their adapters, for any number of tokens
    experts_kept: int
    #: bytes that come and go while the experts of one layer are added up
    experts_work: float


@dataclass(frozen=True)
class AnswerActivations:
    """What answering takes, where nothing waits for a backward pass."""

    #: bytes a token of prompt or answer, for the keys and values of all layers
    cache: int
    #: bytes a sample, for the states of Gated DeltaNet layers
    state: int
    #: bytes a token of the prompt that come and go while one layer is computed
    work: int
    #: bytes a patch that come and go while one block is computed
    vision_work: int


def language_shapes(name: str) -> list[LanguageShape]:
    """Read the sizes of a model's language model from its published configuration.

    Parameters
    ----------
    name : a hub name of `model_names`.

    Returns
    -------
    list of LanguageShape : one for each kind of layer.

    Examples
    --------
    >>> [(shape.layers, shape.delta is None) for shape in language_shapes("Qwen/Qwen3.5-2B")]
    [(18, False), (6, True)]
    """
    text = model_facts(name)["config"]["text_config"]
    number = text["num_hidden_layers"]
    kinds = text.get("layer_types") or ["full_attention"] * number
    # the last layers of Gemma-4 have no keys of their own
    first_shared = number - text.get("num_kv_shared_layers", 0)
    counted = Counter((kind, layer >= first_shared) for layer, kind in enumerate(kinds))
    return [
        _layers_of_a_kind(name, kind, layers, shares_keys=shares)
        for (kind, shares), layers in counted.items()
    ]


def _layers_of_a_kind(name: str, kind: str, layers: int, *, shares_keys: bool) -> LanguageShape:
    """Read the sizes of the layers of one kind, as the configuration calls it."""
    text = model_facts(name)["config"]["text_config"]
    family = family_facts(name)
    hidden = text["hidden_size"]
    head = text.get("head_dim", hidden // text["num_attention_heads"])
    if kind == "full_attention":
        head = text.get("global_head_dim", head)
    queries = text["num_attention_heads"] * head
    keys = 0 if shares_keys else text["num_key_value_heads"] * head
    normed = queries + keys * family.get("normed_keys", 1)
    projections = 1 if shares_keys else 3
    delta = None
    if kind == "linear_attention":
        delta = _delta_shape(text)
        queries = delta.values
        keys = 0
        normed = 0
        # queries, keys and values in one, the gate, and two numbers for each head
        projections = 4
    visited = text.get("num_experts_per_tok", 0)
    expert_inner = text["moe_intermediate_size"] if visited else 0
    inner = visited * expert_inner if visited else text["intermediate_size"]
    if shares_keys and text.get("use_double_wide_mlp"):
        inner *= 2
    return LanguageShape(
        hidden=hidden,
        layers=layers,
        queries=queries,
        keys=keys,
        projections=projections,
        gated=family.get("gated_attention", False),
        delta=delta,
        per_layer_input=text.get("hidden_size_per_layer_input", 0),
        shared_inner=text.get("shared_expert_intermediate_size", 0),
        inner=inner,
        experts=text.get("num_experts", 0),
        visited=visited,
        expert_inner=expert_inner,
        norms=family["norms"],
        normed_heads=normed if family["qk_norm"] else 0,
        repeats_keys=family["repeats_kv"],
    )


def _delta_shape(text: dict[str, Any]) -> DeltaShape:
    """Read the sizes of a Gated DeltaNet layer from the configuration of a language model."""
    heads = text["linear_num_value_heads"]
    values = heads * text["linear_value_head_dim"]
    keys = text["linear_num_key_heads"] * text["linear_key_head_dim"]
    return DeltaShape(
        values=values,
        channels=2 * keys + values,
        heads=heads,
        state=text["linear_key_head_dim"] * text["linear_value_head_dim"],
    )


def vision_shape(name: str) -> VisionShape:
    """Read the sizes of a model's vision tower from its published configuration."""
    vision = model_facts(name)["config"]["vision_config"]
    family = family_facts(name)
    # Qwen2-VL says embed_dim where others say hidden_size, and mlp_ratio for intermediate_size
    width = vision.get("embed_dim") or vision["hidden_size"]
    return VisionShape(
        width=width,
        inner=vision.get("intermediate_size") or width * vision["mlp_ratio"],
        blocks=vision.get("depth") or vision["num_hidden_layers"],
        mergers=1 + len(vision.get("deepstack_visual_indexes", [])),
        norms=family.get("vision_norms", 2),
        # of queries, keys and values
        normed_heads=3 * width if family.get("vision_head_norms") else 0,
        gated=family.get("gated_vision", False),
        quick_gelu=family["quick_gelu"],
        gradients_reach=family["gradients_reach_vision"],
    )


def training_activations(name: str, training: Training) -> Activations:
    """Say what a step of training keeps and what comes and goes in it.

    Parameters
    ----------
    name : a hub name of `model_names`.
    training : what is trained, and how.
    """
    kinds = language_shapes(name)
    vision = vision_shape(name)
    experts = _experts(kinds[0]) if "experts" in training.parts else 0
    layers = sum(shape.layers for shape in kinds)
    # of the kinds of layers, the widest
    widest = max(kinds, key=lambda shape: _language_work(shape, training) + _chunks(shape))
    in_chunks = 0
    if not training.checkpointing:
        in_chunks = sum(shape.layers * _chunks(shape) for shape in kinds)
    return Activations(
        kept=_language_kept(kinds, training),
        kept_in_chunks=in_chunks,
        work=_language_work(widest, training),
        work_in_chunks=_work_in_chunks(widest, training),
        vision_kept=_vision_kept(vision, training),
        vision_work=_vision_work(vision, training),
        experts_kept=0 if training.checkpointing else layers * experts,
        # of the three matrices two are one weight, whose sum has its gradient beside it: 2 x 2/3
        experts_work=experts * 4 / 3,
    )


def answer_activations(name: str) -> AnswerActivations:
    """Say what answering takes, where no activation waits for a backward pass.

    Parameters
    ----------
    name : a hub name of `model_names`.
    """
    cache = 0
    state = 0
    work = 0
    for shape in language_shapes(name):
        cache += shape.layers * 2 * BFLOAT16 * shape.keys
        if shape.delta:
            state += shape.layers * FLOAT32 * shape.delta.heads * shape.delta.state
        work = max(work, _passing_mlp(shape), _passing_delta(shape))
    return AnswerActivations(
        cache=cache,
        state=state,
        work=work,
        vision_work=_passing_vision_block(vision_shape(name)),
    )


# --- the language model, bytes a token ----------------------------------------------------------


def _language_kept(kinds: list[LanguageShape], training: Training) -> int:
    """Bytes that all layers keep until the backward pass, but for whole chunks."""
    kept = 0
    for shape in kinds:
        # checkpointing keeps the input of a layer and what its router said
        checkpoint = BFLOAT16 * (shape.hidden + shape.per_layer_input) + _router(shape)
        layer = checkpoint if training.checkpointing else _language_layer(shape, training)
        kept += shape.layers * layer
    # behind the layers: the last norm, in float32, and what the head reads of it
    end = 2 * FLOAT32 * kinds[0].hidden
    return kept + end


def _language_layer(shape: LanguageShape, training: Training) -> int:
    """Bytes that one layer keeps where nothing is recomputed, but for whole chunks."""
    # norms compute in float32 and keep their input so
    norms = FLOAT32 * shape.norms * shape.hidden
    head_norms = FLOAT32 * shape.normed_heads
    attention = _delta(shape) if shape.delta else _attention(shape)
    # the activation keeps its input, and its product with the other branch keeps both factors
    mlp = 3 * BFLOAT16 * (shape.inner + shape.shared_inner)
    if shape.shared_inner:
        # what the shared expert says is multiplied by a gate of its own
        mlp += BFLOAT16 * shape.hidden
    experts = _routed(shape) + _router(shape)
    # its activation and its product
    per_layer = 2 * BFLOAT16 * shape.per_layer_input
    inputs = _inputs_of_language_weights(shape, training)
    return norms + head_norms + attention + mlp + experts + per_layer + inputs


def _attention(shape: LanguageShape) -> int:
    """Bytes that attention keeps: the queries, its result, which is as wide, keys and values."""
    keys = shape.queries if shape.repeats_keys else shape.keys
    kept = 2 * BFLOAT16 * shape.queries + 2 * BFLOAT16 * keys
    if shape.gated:
        # both factors
        kept += 2 * BFLOAT16 * shape.queries
    return kept


def _delta(shape: LanguageShape) -> int:
    """Bytes that a Gated DeltaNet keeps for each token, before and behind its chunks."""
    delta = shape.delta
    # what the convolution reads and what its activation does
    convolution = 2 * BFLOAT16 * delta.channels
    # queries and keys are normed in float32; so is the result, which has a gate
    normed = 2 * FLOAT32 * delta.values
    gated_result = (3 * FLOAT32 + BFLOAT16) * delta.values
    return convolution + normed + gated_result


def _chunks(shape: LanguageShape) -> int:
    """Bytes that a Gated DeltaNet keeps for each token of whole chunks."""
    if not shape.delta:
        return 0
    delta = shape.delta
    # keys and values, weighed and decayed, in float32, and as factors of products in bfloat16
    wide = (6 * FLOAT32 + 8 * BFLOAT16) * delta.values
    # what each token of a chunk is to each other
    pairs = (2 * FLOAT32 + 3 * BFLOAT16) * delta.heads * CHUNK
    # the state behind each chunk, in float32 and twice as a factor
    states = (FLOAT32 + 2 * BFLOAT16) * delta.heads * delta.state // CHUNK
    return wide + pairs + states


def _inputs_of_language_weights(shape: LanguageShape, training: Training) -> int:
    """Bytes of the inputs of weights that are trained: the gradient of a weight needs its input."""
    if training.method == "full":
        # the weights of two norms, and what the projections behind each of them read
        norms_and_projections = 4 * BFLOAT16 * shape.hidden
        head_norms = BFLOAT16 * shape.normed_heads
        down_projection = BFLOAT16 * shape.inner
        return norms_and_projections + head_norms + down_projection

    if training.four_bit and not training.dropout:
        # Adapters on 4-bit weights are in bfloat16 themselves: those of q, k and v keep one tensor
        # between them, and so do those of gate and up. The output's input is attention's result,
        # or its product with the gate.
        attention = BFLOAT16 * shape.hidden
        if shape.gated:
            attention += BFLOAT16 * shape.queries
        mlp = BFLOAT16 * (shape.hidden + shape.inner)
    else:
        # every adapter keeps a copy of its own, and the mask if there is dropout
        copy = BFLOAT16 + MASK if training.dropout else BFLOAT16
        # q, k, v (or what a layer has in their place) and the output
        attention = copy * (shape.projections * shape.hidden + shape.queries)
        # gate, up and down
        mlp = copy * (2 * shape.hidden + shape.inner)

    inputs = 0
    if "language attention" in training.parts:
        inputs += attention
    if "language MLP" in training.parts:
        inputs += mlp
    return inputs


def _language_work(shape: LanguageShape, training: Training) -> int:
    """Bytes that come and go while the backward pass is in one layer."""
    if not training.checkpointing:
        return max(_passing_mlp(shape), _passing_delta(shape))
    # the layer is computed once more, with gradients of its MLP beside it; their number is fitted
    gradients = (2 if training.four_bit else 4) * BFLOAT16 * shape.inner
    return _language_layer(shape, training) + gradients + _routed(shape)


def _work_in_chunks(shape: LanguageShape, training: Training) -> int:
    """Bytes for each token of whole chunks that come and go in the backward pass of one layer."""
    # computed once more
    return _chunks(shape) if training.checkpointing else 0


def _passing_delta(shape: LanguageShape) -> int:
    """Bytes of what passes through a Gated DeltaNet: eight tensors in float32, not yet fitted."""
    return 8 * FLOAT32 * shape.delta.values if shape.delta else 0


def _passing_mlp(shape: LanguageShape) -> int:
    """Bytes of what passes through an MLP, the widest place of a layer; fitted: seven tensors."""
    return 7 * BFLOAT16 * shape.inner


def _routed(shape: LanguageShape) -> int:
    """Bytes of the copies of a token, one for each expert that it visits."""
    return BFLOAT16 * shape.visited * shape.hidden


def _router(shape: LanguageShape) -> int:
    """Bytes of what the router says of every expert."""
    return FLOAT32 * shape.experts


def _experts(shape: LanguageShape) -> int:
    """Bytes of one layer's experts (gate, up and down), added up with their adapters."""
    return 3 * BFLOAT16 * shape.experts * shape.hidden * shape.expert_inner


# --- the vision tower, bytes a patch ------------------------------------------------------------


def _is_reached(shape: VisionShape, training: Training) -> bool:
    """Say whether the backward pass goes into the vision tower."""
    if "vision" in training.parts:
        return True
    # checkpointing wants gradients at the input, in some families at that of the frozen tower too
    return training.checkpointing and shape.gradients_reach


def _vision_kept(shape: VisionShape, training: Training) -> int:
    """Bytes that the tower and its mergers keep until the backward pass."""
    if not _is_reached(shape, training):
        return 0
    if training.checkpointing:
        # the input of the block, which 4-bit layers leave in float32
        block = (FLOAT32 if training.four_bit else BFLOAT16) * shape.width
    else:
        block = _vision_block(shape, training)
    # a merger's norm gives float32; its two layers and the activation keep their input
    merger = (FLOAT32 + 3 * BFLOAT16) * shape.width
    return shape.blocks * block + shape.mergers * merger


def _vision_block(shape: VisionShape, training: Training) -> int:
    """Bytes that one block keeps where nothing is recomputed."""
    # norms keep their input in float32
    norms = FLOAT32 * (shape.norms * shape.width + shape.normed_heads)
    # q, k, v and the result
    attention = 4 * BFLOAT16 * shape.width
    # a norm gives float32, which 4-bit layers hand on and dropout copies; fitted: 9 bytes for each
    in_float32 = 0
    if training.four_bit:
        in_float32 += 9 * shape.width
    if training.dropout:
        in_float32 += 9 * shape.width
    # GELU keeps its input; x * sigmoid(1.702 x) keeps three tensors, and so do two branches
    tensors = 3 if shape.quick_gelu or shape.gated else 1
    mlp = tensors * (FLOAT32 if training.four_bit else BFLOAT16) * shape.inner
    inputs = _inputs_of_vision_weights(shape, training)
    return norms + attention + in_float32 + mlp + inputs


def _inputs_of_vision_weights(shape: VisionShape, training: Training) -> int:
    """Bytes of the inputs of the block's weights, if these are trained."""
    if "vision" not in training.parts:
        return 0
    copy = BFLOAT16 + MASK if training.dropout else BFLOAT16
    # q, k, v, the output and the first layer of the MLP
    narrow = 5 * copy * shape.width
    second_layer = BFLOAT16 * shape.inner
    return narrow + second_layer


def _vision_work(shape: VisionShape, training: Training) -> int:
    """Bytes that come and go while one block is computed."""
    if not _is_reached(shape, training):
        return _passing_vision_block(shape)
    # gradients of the MLP, fitted
    gradients = 3 * shape.inner
    recomputed = _vision_block(shape, training) if training.checkpointing else 0
    return recomputed + gradients


def _passing_vision_block(shape: VisionShape) -> int:
    """Bytes of what passes through a block that keeps nothing.

    Fitted: five tensors, and two inside the MLP.
    """
    return 5 * BFLOAT16 * shape.width + 2 * BFLOAT16 * shape.inner
