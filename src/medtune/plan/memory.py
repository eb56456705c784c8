"""Know before you rent: what training a model takes on each GPU, and the largest batch that fits.

Sizes are counted in bytes and given in GB (10^9 bytes). `activations.py` beside this file says what
a token and a patch take; here the sums are made, the fullest moment of a step is found, and ZeRO
splits what it splits.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .activations import (
    BFLOAT16,
    CHUNK,
    FLOAT32,
    Training,
    answer_activations,
    language_shapes,
    training_activations,
)
from .counts import Adapter, Counts, count
from .shapes import family_facts, model_facts

# PyTorch's allocator reserves more than it gives out, and CUDA has memory of its own.
ALLOCATOR_SLACK = 1.1
CUDA_CONTEXT = 7e8

# SmolVLM enlarges every picture to 2,048 pixels, cuts it into 4 x 4 tiles and adds it as a whole.
SMOLVLM_TILES = 17

# Gemma-4 brings every picture to at most 280 tokens of 3 x 3 patches, in whole tokens a side, and
# fills it up to so many patches.
GEMMA4_PATCHES = 280 * 9

LARGEST_BATCH = 64

# Memory in GB of the cards that are sold and rented.
CARDS = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141)


@dataclass(frozen=True)
class Batch:
    """What one GPU has before it in one forward pass."""

    #: number of samples
    samples: int
    #: tokens of all samples, those of the pictures among them
    tokens: int
    #: the same where each sample is filled up to whole chunks
    chunked_tokens: int
    #: the same with the answers, as they stand in the cache in the end
    answered_tokens: int
    #: patches of all pictures
    patches: int
    #: bytes of the prepared pictures
    picture_bytes: int


@dataclass(frozen=True)
class Shares:
    """What one GPU holds of that which ZeRO may split over all of them, in bytes."""

    weights: float
    gradients: float
    optimizer: float
    #: whole layers that ZeRO-3 has collected for the moment
    gathered: float


def picture_size(name: str, image_size: int) -> dict[str, int]:
    """Say what one square picture becomes in front of a model.

    Parameters
    ----------
    name : a hub name of `model_names`.
    image_size : side of the picture in pixels.

    Returns
    -------
    dict : "tokens" in the text, "patches" in the vision tower, and "bytes" of the prepared picture.

    Raises
    ------
    ValueError : an unknown model.

    Examples
    --------
    >>> picture_size("Qwen/Qwen3-VL-2B-Instruct", 512)
    {'tokens': 256, 'patches': 1024, 'bytes': 6291456}
    """
    config = model_facts(name)["config"]
    patch = config["vision_config"]["patch_size"]
    colours = 3 * FLOAT32
    if config["model_type"] == "gemma3":
        # every picture is brought to one size; around its tokens stand two marks and line breaks
        side = config["vision_config"]["image_size"]
        return {
            "tokens": config["mm_tokens_per_image"] + 4,
            "patches": (side // patch) ** 2,
            "bytes": colours * side**2,
        }
    if config["model_type"] == "idefics3":
        # 64 tokens and 4 marks a tile; beside each pixel an integer says whether it is padding
        side = config["vision_config"]["image_size"]
        return {
            "tokens": SMOLVLM_TILES * (64 + 4),
            "patches": SMOLVLM_TILES * (side // patch) ** 2,
            "bytes": SMOLVLM_TILES * (colours + 8) * side**2,
        }
    if config["model_type"] == "gemma4":
        # 3 x 3 patches make a token, and around a picture's tokens stand two marks
        side = math.isqrt(GEMMA4_PATCHES) // 3
        place = 2 * 8
        return {
            "tokens": side**2 + 2,
            "patches": GEMMA4_PATCHES,
            "bytes": GEMMA4_PATCHES * (colours * patch**2 + place),
        }
    # Qwen-VL keeps the size of the picture within bounds, which are numbers of pixels; 2 x 2
    # patches make a token, and a picture is prepared twice, as a film of two frames
    bounds = family_facts(name)["processor"]["image_processor"]["size"]
    pixels = min(max(image_size**2, bounds["shortest_edge"]), bounds["longest_edge"])
    tokens = round(pixels**0.5 / (2 * patch)) ** 2
    patches = 4 * tokens
    return {"tokens": tokens, "patches": patches, "bytes": patches * 2 * colours * patch**2}


def _marks_of_picture(model_type: str) -> int:
    """Count the tokens around a picture that `picture_size` leaves to the text."""
    # the others' are counted with the picture; Qwen-VL writes a mark before it and one behind
    return 0 if model_type in ("gemma3", "gemma4", "idefics3") else 2


def _top_of_step(name: str, counts: Counts, batch: Batch, training: Training) -> float:
    """Find the bytes of activations and gradients at the fullest moment of a step."""
    activations = training_activations(name, training)
    work = (
        activations.work * batch.tokens
        + activations.work_in_chunks * batch.chunked_tokens
        + activations.experts_work
    )
    vision_work = activations.vision_work * batch.patches
    vision_kept = activations.vision_kept * batch.patches
    kept = (
        activations.kept * batch.tokens
        + activations.kept_in_chunks * batch.chunked_tokens
        + vision_kept
        + activations.experts_kept
    )

    # between forward and backward pass all activations are there, and gradients of an earlier batch
    # if several make a step
    at_the_turn = kept + max(
        work, _head_work(name, counts, training), _casts(name, counts, training)
    )
    if training.accumulation:
        at_the_turn += counts.trained
    # at the end of the backward pass all gradients are there, and what the vision tower has kept
    at_the_end = counts.trained + vision_kept + max(work, vision_work)
    return max(at_the_turn, at_the_end)


def _head_work(name: str, counts: Counts, training: Training) -> int:
    """Bytes of the head's own gradient, if head or embeddings are trained."""
    if not {"head", "embeddings"} & counts.parts:
        return 0
    # TRL's fused head sums it in float32 and then brings it to the type of the weights
    gradient = FLOAT32 if training.dtype == "float32" else BFLOAT16
    return _vocabulary(name) * (FLOAT32 + gradient)


def _casts(name: str, counts: Counts, training: Training) -> float:
    """Bytes of autocast's bfloat16 copies of weights that are trained in float32."""
    if training.method != "full" or training.dtype != "float32":
        return 0
    # of all weights that multiply, so not of the embeddings
    return counts.weights / 2 - BFLOAT16 * _vocabulary(name)


def _vocabulary(name: str) -> int:
    """Count the weights of the embeddings, which are those of the head as well."""
    text = model_facts(name)["config"]["text_config"]
    return text["vocab_size"] * text["hidden_size"]


def _top_of_answers(name: str, batch: Batch) -> tuple[float, float]:
    """Find the bytes of answering a batch at its fullest moment, and those of the whole cache."""
    needs = answer_activations(name)
    in_vision = needs.vision_work * batch.patches
    states = needs.state * batch.samples
    at_the_prompt = (needs.cache + needs.work) * batch.tokens + states
    whole_cache = needs.cache * batch.answered_tokens + states
    return max(in_vision, at_the_prompt, whole_cache), whole_cache


def _share(name: str, counts: Counts, *, gpus: int, zero_stage: int) -> Shares:
    """Split what this ZeRO stage splits: 1 optimizer states, 2 gradients too, 3 weights too."""
    if zero_stage == 0:
        # AdamW's two moments, in the type of what is trained
        optimizer = 2 * counts.trained
    else:
        # under ZeRO these are float32, and so is a copy of the weights
        optimizer = 3 * FLOAT32 * counts.trained_parameters / gpus
    layers = sum(shape.layers for shape in language_shapes(name))
    return Shares(
        weights=counts.weights / gpus if zero_stage >= 3 else counts.weights,
        gradients=counts.trained / gpus if zero_stage >= 2 else counts.trained,
        optimizer=optimizer,
        # the layer in use, and the next
        gathered=2 * counts.weights / layers if zero_stage >= 3 else 0,
    )


def estimate(  # noqa: PLR0913 (every option of a plan is a keyword of its own)
    name: str,
    *,
    method: str = "lora",
    target: str = "language",
    lora_r: int = 8,
    lora_dropout: float = 0.0,
    modules_to_save: tuple[str, ...] = (),
    dtype: str = "bfloat16",
    batch_size: int = 1,
    image_size: int = 512,
    pictures_per_sample: int = 1,
    text_tokens: int = 150,
    new_tokens: int = 150,
    checkpointing: bool = True,
    gpus: int = 1,
    gpu_gb: float = 80.0,
    zero_stage: int = 0,
    accumulation: bool = False,
    pairs: int = 0,
    samples_per_second: float = 0.0,
) -> dict[str, Any]:
    """Estimate what training with TRL's SFTTrainer takes on each GPU, in GB (10^9 bytes).

    Measured on one card only; what ZeRO splits is reckoned.

    Parameters
    ----------
    name : a hub name of `model_names`.
    method : "lora" (float32 adapters on weights of `dtype`), "qlora" (NF4), or "full".
    target, lora_r, lora_dropout, modules_to_save : as in notebook 03.
    dtype : of the weights, "bfloat16" or "float32".
    batch_size : samples a GPU in one forward pass.
    image_size : side of the picture in pixels.
    pictures_per_sample : pictures of one size in a sample, such as the slices of a slab.
    text_tokens : tokens of a sample besides those of the pictures, with the marks of one picture.
    new_tokens : tokens of an answer, for the cache of generation at this batch size.
    checkpointing : activations are recomputed.
    gpus : number of cards.
    gpu_gb : memory of each card in GB.
    zero_stage : what is split over the cards: 0 nothing, 1 optimizer states, 2 gradients too, 3
        weights too.
    accumulation : several batches make a step. Gradients of the one before are then there in the
        next forward pass, which counts for what is trained whole: Gemma-3 4B with embeddings and
        head took 19.0 GB with it (18.9 planned), and 16.2 are planned without.
    pairs : pairs of an epoch, for "hours_per_epoch".
    samples_per_second : of all cards together, for "hours_per_epoch".

    Returns
    -------
    dict : for training "weights", "adapter", "gradients", "optimizer" and "activations" (with the
        working memory); "peak" as `torch.cuda.max_memory_allocated` counts, "needed" (with the
        allocator's slack and CUDA's own), and whether that "fits". For answers "generation" (the
        peak when this batch is answered) and "kv_cache" (a part of it). Besides, "logits" that a
        loop without TRL's fused head would add, "download" and "disk". Not in GB: "tokens" and
        "image_tokens" of a sample, "trained_parameters", and "hours_per_epoch" (None without a
        speed).

    Raises
    ------
    ValueError : an unknown model, method or target, or no picture at all.

    Examples
    --------
    >>> found = estimate("Qwen/Qwen3-VL-2B-Instruct", batch_size=16, gpu_gb=24)
    >>> found["peak"], found["fits"]
    (6.376, True)
    """
    if pictures_per_sample < 1:
        raise ValueError(f"pictures_per_sample={pictures_per_sample} is not 1 or more")
    if method not in ("lora", "qlora", "full"):
        raise ValueError(f"method must be lora, qlora or full, not {method!r}.")
    facts = model_facts(name)
    name = facts["name"]
    vocabulary = facts["config"]["text_config"]["vocab_size"]
    picture = picture_size(name, image_size)
    image_tokens = pictures_per_sample * picture["tokens"]
    marks = (pictures_per_sample - 1) * _marks_of_picture(facts["config"]["model_type"])
    tokens = image_tokens + marks + text_tokens
    pictures = pictures_per_sample * batch_size
    batch = Batch(
        samples=batch_size,
        tokens=tokens * batch_size,
        chunked_tokens=math.ceil(tokens / CHUNK) * CHUNK * batch_size,
        answered_tokens=(tokens + new_tokens) * batch_size,
        patches=picture["patches"] * pictures,
        picture_bytes=picture["bytes"] * pictures,
    )
    adapter = None
    if method != "full":
        adapter = Adapter(target, lora_r, tuple(modules_to_save))
    counts = count(name, dtype, adapter, four_bit=method == "qlora")
    training = Training(
        method=method,
        dtype=dtype,
        parts=counts.parts,
        dropout=lora_dropout > 0,
        checkpointing=checkpointing,
        accumulation=accumulation,
    )

    top = _top_of_step(name, counts, batch, training)
    answering, kv_cache = _top_of_answers(name, batch)
    shares = _share(name, counts, gpus=gpus, zero_stage=zero_stage)
    adapter_bytes = counts.trained if adapter else 0
    loaded = shares.weights + adapter_bytes + batch.picture_bytes
    peak = loaded + shares.optimizer + top + shares.gathered

    sizes = {
        "weights": shares.weights,
        "adapter": adapter_bytes,
        "optimizer": shares.optimizer,
        "gradients": shares.gradients,
        "activations": max(top - shares.gradients, 0),
        "peak": peak,
        "needed": ALLOCATOR_SLACK * peak + CUDA_CONTEXT,
        "generation": loaded + answering,
        # published weights are in bfloat16
        "download": BFLOAT16 * facts["parameters"],
        # in bfloat16, in float32 for the loss, and their gradient
        "logits": (BFLOAT16 + 2 * FLOAT32) * batch.tokens * vocabulary,
        "kv_cache": kv_cache,
        # the download and a merged model, and two checkpoints with their optimizer states
        "disk": 2 * BFLOAT16 * facts["parameters"] + 2 * 3 * counts.trained,
    }
    result: dict[str, Any] = {key: round(size / 1e9, 3) for key, size in sizes.items()}
    result["fits"] = result["needed"] <= gpu_gb
    result["tokens"] = tokens
    result["image_tokens"] = image_tokens
    result["trained_parameters"] = counts.trained_parameters
    result["hours_per_epoch"] = pairs / samples_per_second / 3600 if samples_per_second else None
    return result


def recommend(name: str, *, gpus: int = 1, **options) -> dict[str, Any]:
    """Find the largest batch that fits, with the lowest ZeRO stage that lets one fit.

    Activations are recomputed only where fewer than 8 samples fit without.

    Parameters
    ----------
    name : a hub name of `model_names`.
    gpus, **options : as for `estimate`, less batch_size, checkpointing and zero_stage.

    Returns
    -------
    dict : "batch_size", "checkpointing", "zero_stage" and what `estimate` says of them; the
        smallest there is if none fits.

    Raises
    ------
    ValueError : an unknown model, method or target.

    Examples
    --------
    >>> found = recommend("Qwen/Qwen3-VL-2B-Instruct", gpu_gb=24)
    >>> found["batch_size"], found["checkpointing"]
    (8, False)
    """
    for choice in _choices(gpus):
        found = estimate(name, gpus=gpus, **options, **choice)
        if found["fits"]:
            break
    return choice | found


def smallest_card(name: str, **options) -> int | None:
    """Name the smallest graphics card on which a model can be trained at all.

    One sample at a time, with activations recomputed; a step may still have many samples, by
    accumulation.

    Parameters
    ----------
    name : a hub name of `model_names`.
    **options : as for `estimate`, less batch_size, checkpointing, gpu_gb and gpus.

    Returns
    -------
    int or None : its memory in GB, of `CARDS`; None if it fits on none.

    Raises
    ------
    ValueError : an unknown model, method or target.

    Examples
    --------
    >>> smallest_card("google/medgemma-1.5-4b-it", method="qlora", accumulation=True)
    8
    >>> smallest_card("Qwen/Qwen3-VL-30B-A3B-Instruct")
    80
    """
    needed = estimate(name, batch_size=1, checkpointing=True, **options)["needed"]
    for card in CARDS:
        if needed <= card:
            return card
    return None


def _choices(gpus: int) -> Iterator[dict[str, Any]]:
    """Yield settings of batch, checkpointing and ZeRO, the one to be preferred first."""
    # with stage 1 alone hardly anything fits that does not fit without
    stages = (0, 2, 3) if gpus > 1 else (0,)
    for stage in stages:
        for checkpointing in (False, True):
            smallest = 1 if checkpointing else 8
            batch_size = LARGEST_BATCH
            while batch_size >= smallest:
                yield {
                    "batch_size": batch_size,
                    "checkpointing": checkpointing,
                    "zero_stage": stage,
                }
                batch_size //= 2
