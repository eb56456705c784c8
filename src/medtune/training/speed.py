"""The same training in less time: what neither Transformers nor TRL does yet.

Each piece gives the same loss as without it. `speed_up` changes the one model that it is given,
never a library: many small pictures in one attention call, thin products for adapters of fused
experts, layers compiled one by one. `send_bytes` lets pictures travel as bytes, and `pad_lengths`
leaves few lengths of text to plan for. (`cache_features` has a file of its own.) The keys `fast`
and `cache_features` in `train.yaml` turn them on.

A model is changed in two ways. A method of one object is replaced by setting an attribute of the
same name on that object, which leaves its class alone. Layers that are compiled get another class
instead: layers of one class share what is compiled for it, whereas a function that belongs to one
layer would be compiled again for the next.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.vision_utils import get_vision_position_ids

# The label of a token that has no part in the loss.
NOT_COUNTED = -100

# In `mm_token_type_ids`: the token stands for a part of a picture.
PICTURE = 1


# ---- the model as a whole


def speed_up(
    model: nn.Module, *, attention: bool = True, experts: bool = True, compiled: bool = False
) -> dict[str, int]:
    """Change a model, with or without adapter, in place; what it computes stays the same.

    On a CPU the head that TRL gives a model then scores the positions that have a label, as it does
    on a GPU, not all.

    Parameters
    ----------
    model : any model; what it does not have is left out.
    attention : of Qwen-VL. In its vision tower pictures of one size share one call; Transformers
        calls once a picture. Text that is padded on the right attends without a mask, which lets
        PyTorch take its fastest kernel; positions of all samples are counted at once.
    experts : LoRA on fused experts becomes two thin products; peft adds a full-size change to all
        experts' weights.
    compiled : decoder layers and vision blocks are compiled one by one, at their first step. On a
        CPU it hardly pays. All of them share one piece of Transformers' code: set
        `torch._dynamo.config.recompile_limit` to 64, as `parse_arguments` does, or after eight
        variants of shape and class the rest runs as before.

    Returns
    -------
    dict : for each of the three the number of layers changed; 0 where the model has no such layers.

    Examples
    --------
    >>> speed_up(nn.Linear(2, 2))
    {'attention': 0, 'experts': 0, 'compiled': 0}
    """
    # listed before anything changes
    modules = list(model.modules())
    cores = [module for module in modules if _is_qwen_vl(module)]
    wrappers = _outermost_adapters_of_experts(model)
    layers = _layers_that_repeat(modules)

    base = without_adapter(model)
    _count_parameters_once(base)
    _switch_mode_only_where_it_differs(model, modules)
    _score_only_labelled_positions(base)

    changed = {"attention": 0, "experts": 0, "compiled": 0}
    if attention:
        changed["attention"] = sum(_attend_faster(core) for core in cores)
    if experts:
        changed["experts"] = sum(_multiply_adapters_of_experts(wrapper) for wrapper in wrappers)
    if compiled:
        _compile(layers, thin_experts=changed["experts"] > 0)
        changed["compiled"] = len(layers)
    return changed


def without_adapter(model: Any) -> Any:
    """Return the model of Transformers inside a model of peft, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _is_qwen_vl(module: nn.Module) -> bool:
    """Say whether this is the part of a Qwen-VL that holds vision tower and language model."""
    return hasattr(module, "get_rope_index") and hasattr(getattr(module, "visual", None), "blocks")


def _outermost_adapters_of_experts(model: nn.Module) -> list[Any]:
    """Find peft's wrappers around fused experts; of wrappers in each other, the outermost."""
    found = []
    for name, module in model.named_modules():
        # peft wraps once for each parameter, and a wrapper's inside is called base_layer
        if hasattr(module, "parameter_name") and not name.endswith("base_layer"):
            found.append(module)
    return found


def _count_parameters_once(base: Any) -> None:
    """Remember the number of parameters, which Transformers' trainer asks for twice a step."""
    if hasattr(base, "num_parameters"):
        base.num_parameters = functools.cache(base.num_parameters)


def _switch_mode_only_where_it_differs(model: nn.Module, modules: list[nn.Module]) -> None:
    """Let `model.train()` do nothing where all modules are in that mode already."""

    def train(mode: bool = True) -> nn.Module:
        # looking at all costs little, and the first alone may mislead: a new PeftModel says that it
        # trains, over a base in evaluation mode
        modes = {module.training for module in modules}
        if modes == {mode}:
            return model
        return type(model).train(model, mode)

    model.train = train


def _score_only_labelled_positions(base: Any) -> None:
    """Leave positions without a label out of TRL's loss, which is summed over those that have one.

    TRL's head asks for it by the keyword `fused_lm_head`, and leaves them out itself on a GPU.
    """
    own = base.forward

    # `generate` reads the signature of the model's own forward
    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        labels = kwargs.get("labels")
        asked = kwargs.get("fused_lm_head") and "shift_labels" not in kwargs
        if not asked or not base.training or labels.is_cuda:
            return own(*args, **kwargs)
        # a position predicts the label of the next one
        labels = labels[:, 1:]
        labelled = labels != NOT_COUNTED

        def keep_labelled(module: nn.Module, args: Any, outputs: Any) -> None:
            hidden = outputs.last_hidden_state[:, :-1]
            # the head wants rows of positions: all that are left are one row
            outputs.last_hidden_state = hidden[labelled][None]

        kwargs["shift_labels"] = labels[labelled][None]
        with base.base_model.register_forward_hook(keep_labelled):
            return own(*args, **kwargs)

    base.forward = forward


# ---- attention of Qwen-VL


@dataclass
class _Pictures:
    """What the vision tower sees in this step, for those of its layers that must know.

    Attributes
    ----------
    frames : number of pictures if all have one size (frames, where pictures move), else 0.
    """

    frames: int = 0


def _attend_faster(core: Any) -> int:
    """Change how a Qwen-VL attends, and what it prepares for it; return the number of layers."""
    _cut_patches_by_a_product(core.visual.patch_embed)
    core.language_model.register_forward_pre_hook(_without_padding_mask, with_kwargs=True)
    core.get_rope_index = _positions_at_once(
        core.get_rope_index, core.config.vision_config.spatial_merge_size
    )
    return _attend_to_equal_pictures_at_once(core.visual)


def _cut_patches_by_a_product(patch_embed: Any) -> None:
    """Replace the convolution over patches by a matrix product: patches do not overlap."""
    convolution = patch_embed.proj
    if not isinstance(convolution, nn.Conv3d):
        return

    def forward(patches: torch.Tensor) -> torch.Tensor:
        weight = convolution.weight.flatten(1)
        return functional.linear(patches.flatten(1), weight, convolution.bias)

    convolution.forward = forward


def _without_padding_mask(text: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Before a language model trains: drop the mask of a text that is padded on the right.

    The causal order hides what stands on the right, and what the padding itself puts out has no
    label.
    """
    mask = kwargs.get("attention_mask")
    if text.training and getattr(mask, "ndim", 0) == 2:
        begins_again = mask[:, 1:] > mask[:, :-1]
        if not begins_again.any():
            kwargs["attention_mask"] = None
    return args, kwargs


def _attend_to_equal_pictures_at_once(tower: Any) -> int:
    """Let pictures of one size be a batch, where a whole picture attends to itself.

    Returns
    -------
    int : number of layers that do so.
    """
    pictures = _Pictures()

    def look(tower: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        grid = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
        # for each picture its number of frames, rows and columns of patches
        sizes = grid.tolist()
        if sizes.count(sizes[0]) < len(sizes):
            pictures.frames = 0
            return args, kwargs
        pictures.frames = len(sizes) * sizes[0][0]
        # Transformers counts the patches of one picture after the other
        of_one = get_vision_position_ids(grid[:1], tower.spatial_merge_size)
        kwargs["position_ids"] = of_one.repeat(len(sizes), 1)
        return args, kwargs

    tower.register_forward_pre_hook(look, with_kwargs=True)
    # in Qwen2.5-VL the other layers attend within windows
    layers = getattr(tower, "fullatt_block_indexes", range(len(tower.blocks)))
    batched = _class_that_batches(type(tower.blocks[0].attn), pictures)
    for layer in layers:
        tower.blocks[layer].attn.__class__ = batched
    return len(layers)


def _class_that_batches(kind: type, pictures: _Pictures) -> type:
    """Derive from a vision attention of Qwen-VL one that attends to equal pictures in one call."""
    rotate = sys.modules[kind.__module__].apply_rotary_pos_emb_vision

    class Batched(kind):
        """All layers of a tower get this one class, for layers of one class are compiled once."""

        def forward(self, hidden_states, cu_seqlens, position_embeddings=None, **kwargs):
            frames = pictures.frames
            if not frames:
                # the model's own way
                return super().forward(
                    hidden_states, cu_seqlens, position_embeddings=position_embeddings, **kwargs
                )
            # from (patches, 3 times all heads) to three of (patches, heads, width)
            mixed = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1))
            query, key, value = mixed.unbind(1)
            query, key = rotate(query, key, *position_embeddings)
            # to (frames, heads, patches of one, width)
            query = query.unflatten(0, (frames, -1)).transpose(1, 2)
            key = key.unflatten(0, (frames, -1)).transpose(1, 2)
            value = value.unflatten(0, (frames, -1)).transpose(1, 2)
            seen = functional.scaled_dot_product_attention(query, key, value, scale=self.scaling)
            return self.proj(seen.transpose(1, 2).flatten(0, 1).flatten(1))

    return Batched


def _positions_at_once(own: Callable[..., Any], merge: int) -> Callable[..., Any]:
    """Make a `get_rope_index` that counts a batch of equal pictures by sums.

    Transformers goes through the samples one by one, and waits for the GPU at each.

    Parameters
    ----------
    own : the model's own `get_rope_index`, for all other batches.
    merge : the merger makes one token of a square of so many patches in each direction.
    """

    def get_rope_index(
        input_ids, image_grid_thw=None, video_grid_thw=None, attention_mask=None, **kwargs
    ):
        sizes = [] if image_grid_thw is None else image_grid_thw.tolist()
        if video_grid_thw is not None or not _are_equal_still_pictures(sizes):
            return own(
                input_ids,
                image_grid_thw=image_grid_thw,
                video_grid_thw=video_grid_thw,
                attention_mask=attention_mask,
                **kwargs,
            )
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        picture = (kwargs["mm_token_type_ids"] == PICTURE) * real
        _, rows, columns = sizes[0]
        return _positions_of_equal_pictures(real, picture, rows // merge, columns // merge)

    return get_rope_index


def _are_equal_still_pictures(sizes: list[list[int]]) -> bool:
    """Say whether there are pictures, each of one frame, and all of one size."""
    if not sizes:
        return False
    _, rows, columns = sizes[0]
    return sizes.count([1, rows, columns]) == len(sizes)


def _positions_of_equal_pictures(
    real: torch.Tensor, picture: torch.Tensor, height: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Count the rotary positions of texts with pictures of one size.

    A token of text is one position further than the one before. A picture's tokens have three
    positions: time, row and column, counted from where the picture begins; and the text after it
    goes on behind its longer edge.

    Parameters
    ----------
    real : (samples, tokens), 1 for a token and 0 for padding.
    picture : (samples, tokens), 1 for a token of a picture.
    height, width : of every picture, in tokens.

    Returns
    -------
    tuple : positions (3, samples, tokens), and for each sample (samples, 1) how much further than
        its number of tokens the positions have come.
    """
    size = height * width
    text = real - picture
    # how many tokens of each kind stand before this one
    pictures_before = picture.cumsum(1) - picture
    text_before = text.cumsum(1) - text
    whole_pictures = pictures_before // size
    begin = text_before + max(height, width) * whole_pictures
    inside = pictures_before % size * picture
    time = torch.zeros_like(inside)
    row = inside // width
    column = inside % width
    positions = (begin + torch.stack([time, row, column])) * real
    highest = positions.amax((0, 2))
    return positions, (highest + 1 - real.sum(1))[:, None]


# ---- adapters of fused experts


def _multiply_adapters_of_experts(outer: Any) -> int:
    """Apply the adapters of one layer's experts as products; return 1, or 0 where that cannot be.

    Parameters
    ----------
    outer : peft's outermost wrapper around the experts, which are parameters of three dimensions.
    """
    experts = outer.get_base_layer()
    adapters = {}
    layer = outer
    while layer is not experts:
        adapters[layer.parameter_name] = layer
        layer = layer.base_layer
    # kernels want rows of 16 bytes, so that ranks must be multiples of 8
    odd_rank = any(rank % 8 for rank in outer.r.values())
    if getattr(experts, "is_transposed", True) or experts.has_bias or odd_rank:
        return 0
    thin = _ThinExperts(outer, outer.forward, experts, adapters)
    # compiled, these products get strides that their kernel refuses
    outer.forward = torch.compiler.disable(thin.forward)
    return 1


@dataclass
class _ThinExperts:
    """Experts whose adapters A and B are applied to each expert's tokens x, as x A B.

    peft adds A B to the weights of all experts, which is a change of full size at every step.

    Attributes
    ----------
    outer : peft's outermost wrapper, which knows which adapter is active.
    own : the forward of that wrapper, for all other cases.
    experts : the module inside with the weights of all experts.
    adapters : peft's wrapper by the name of the parameter that it wraps.
    """

    outer: Any
    own: Callable[..., torch.Tensor]
    experts: Any
    adapters: dict[str, Any]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Send each token (tokens, width) through its experts (tokens, k) and weigh the results."""
        outer = self.outer
        if outer.disable_adapters or outer.merged or len(outer.active_adapters) != 1:
            return self.own(hidden_states, top_k_index, top_k_weights)
        # the tokens of one expert stand side by side, and `ends` says where they end
        chosen, order = top_k_index.flatten().sort()
        numbers = torch.arange(self.experts.num_experts, device=chosen.device)
        ends = torch.searchsorted(chosen, numbers, right=True).int()
        experts_a_token = top_k_index.shape[-1]
        x = hidden_states[order // experts_a_token]
        x = self._product(x, "gate_up_proj", ends)
        x = self.experts._apply_gate(x)
        x = self._product(x, "down_proj", ends)
        # back to (tokens, k, width)
        x = x[order.argsort()].unflatten(0, top_k_index.shape)
        weighed = top_k_weights[:, None].to(x.dtype) @ x
        return weighed[:, 0].to(hidden_states.dtype)

    def _product(self, x: torch.Tensor, name: str, ends: torch.Tensor) -> torch.Tensor:
        """Multiply each expert's tokens by its weights, and by its adapter if there is one."""
        # private, and so looked for only where it is needed: all else works without it
        from transformers.integrations.moe import _grouped_linear

        result = _grouped_linear(x, getattr(self.experts, name), ends)
        if name not in self.adapters:
            return result
        active = self.outer.active_adapters[0]
        out, into, scaling = self.adapters[name].get_delta_factors(active)
        thin = scaling * _grouped_linear(x, into.contiguous(), ends)
        return result + _grouped_linear(thin, out.contiguous(), ends)


# ---- compiled layers


def _layers_that_repeat(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Find the decoder layers and vision blocks, by the classes that a model must not split."""
    modules = list(modules)
    names: set[str] = set()
    for module in modules:
        names.update(getattr(module, "_no_split_modules", None) or ())
    return [module for module in modules if type(module).__name__ in names]


def _compile(layers: list[nn.Module], *, thin_experts: bool) -> None:
    """Compile each layer whole, or in parts where it has experts, whose products are not traced.

    Within checkpointing a layer is traced whole or not at all, hence the parts. The part with the
    experts is compiled only where their adapters are thin products, which stay out by themselves.
    """
    for layer in layers:
        parts = list(layer.children()) if _has_experts(layer) else [layer]
        for part in parts:
            if thin_experts or not _has_experts(part):
                part.compile()


def _has_experts(part: nn.Module) -> bool:
    """Say whether a module holds fused experts, whose products cannot be compiled."""
    return any(hasattr(type(module), "_apply_gate") for module in part.modules())


# ---- batches


def send_bytes(trainer: Any) -> bool:
    """Let pixels travel to the model as bytes, and scale them there: the same numbers.

    A quarter of the memory traffic is left, and the processes that load data do less, too.

    Parameters
    ----------
    trainer : a `trl.SFTTrainer` of a Qwen-VL model, after `speed_up` or without it.

    Returns
    -------
    bool : False, and nothing is changed, where the model is another or its processor does not
        scale.
    """
    core = without_adapter(trainer.model).model
    own = trainer.data_collator
    prepare = getattr(trainer.processing_class, "image_processor", None)
    scales = getattr(prepare, "do_rescale", False) and getattr(prepare, "do_normalize", False)
    if not scales or not hasattr(core, "visual") or not hasattr(own, "processor"):
        return False
    # copies, because the trainer saves its own processor with the model
    unscaled = copy.copy(prepare)
    unscaled.do_rescale = False
    unscaled.do_normalize = False
    own.processor = copy.copy(own.processor)
    own.processor.image_processor = unscaled
    trainer.data_collator = functools.partial(_collate_as_bytes, own)
    core.get_image_features = _scale_first(core.get_image_features, prepare)
    return True


def _collate_as_bytes(collate: Callable[[list[dict]], dict], rows: list[dict]) -> dict:
    """Collate rows, and turn pixels that were not scaled, whole numbers up to 255, into bytes."""
    batch = collate(rows)
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].to(torch.uint8)
    return batch


def _scale_first(features: Callable[..., Any], prepare: Any) -> Callable[..., Any]:
    """Let `get_image_features` scale pixels that come as bytes; others pass as they are.

    Parameters
    ----------
    features : the model's own `get_image_features`.
    prepare : the image processor, with the factor, mean and deviation of each channel.
    """
    # a row of pixels holds channel after channel: of each the frames, rows and columns of a patch
    area = prepare.patch_size**2 * prepare.temporal_patch_size
    # in bytes: (b * factor - mean) / deviation = (b - mean / factor) / (deviation / factor)
    mean = torch.tensor(prepare.image_mean) / prepare.rescale_factor
    deviation = torch.tensor(prepare.image_std) / prepare.rescale_factor
    mean = mean.repeat_interleave(area)
    deviation = deviation.repeat_interleave(area)

    @functools.cache
    def on(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        return mean.to(device), deviation.to(device)

    # `generate` reads the signature of the model's own function
    @functools.wraps(features)
    def scale(pixel_values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if pixel_values.dtype == torch.uint8:
            its_mean, its_deviation = on(pixel_values.device)
            pixel_values = (pixel_values - its_mean) / its_deviation
        return features(pixel_values, *args, **kwargs)

    return scale


def pad_lengths(
    collate: Callable[[list[dict]], dict], rows: list[dict], *, step: int = 8
) -> dict[str, Any]:
    """Collate a batch and pad it on the right to a multiple of `step` tokens, which do not count.

    A GPU's attention is planned anew for each length that it has not seen, which takes longer than
    the padding.

    Parameters
    ----------
    collate : a function that makes a batch of rows, such as a trainer's `data_collator`.
    rows : the rows for it.
    step : tokens; lengths become a multiple of it.

    Returns
    -------
    dict : the batch. What has the shape of its "input_ids", (rows, tokens), is padded: labels by
        -100, the rest by 0.

    Examples
    --------
    >>> def collate(rows):
    ...     return {"input_ids": torch.ones(1, 5), "labels": torch.ones(1, 5)}
    >>> pad_lengths(collate, [])["labels"].tolist()
    [[1.0, 1.0, 1.0, 1.0, 1.0, -100.0, -100.0, -100.0]]
    """
    batch = collate(rows)
    shape = batch["input_ids"].shape
    missing = -shape[1] % step
    for key, value in list(batch.items()):
        if getattr(value, "shape", None) == shape:
            filler = NOT_COUNTED if key == "labels" else 0
            batch[key] = functional.pad(value, (0, missing), value=filler)
    return batch
