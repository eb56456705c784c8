"""The same training in less time: what neither Transformers nor TRL does yet, each piece with the same loss as without.

`speed_up` changes the one model that it is given, never a library: many small pictures in one attention call, thin
products for adapters of fused experts, layers compiled one by one. `send_bytes` lets pictures travel as bytes,
`pad_lengths` leaves few lengths of text to plan for, `cache_features` lets a frozen vision tower see each picture once.
The keys ``fast`` and ``cache_features`` in ``train.yaml`` turn them on.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import shutil
from pathlib import Path
from types import SimpleNamespace


def speed_up(model, *, attention: bool = True, experts: bool = True, compiled: bool = False) -> dict[str, int]:
    """Change a model, with or without adapter, in place; what it computes stays the same.

    On a CPU the head that TRL gives a model then scores the positions that have a label, as it does on a GPU, not all.

    Parameters
    ----------
    attention : of Qwen-VL. In its vision tower pictures of one size share one call; Transformers calls once a picture.
        Text that is padded on the right attends without a mask, which lets PyTorch take its fastest kernel; positions
        of all samples are counted at once.
    experts : LoRA on fused experts becomes two thin products; peft adds a full-size change to all experts' weights.
    compiled : decoder layers and vision blocks are compiled one by one, at their first step. On a CPU it hardly pays.
        All of them share one piece of Transformers' code: set ``torch._dynamo.config.recompile_limit`` to 64, as
        `medtune.train` does, or after eight variants of shape and class the rest runs as before.

    Returns
    -------
    dict : for each of the three the number of layers changed; 0 where the model has no such layers.

    Examples
    --------
    >>> import torch
    >>> speed_up(torch.nn.Linear(2, 2))
    {'attention': 0, 'experts': 0, 'compiled': 0}
    """
    modules = list(model.named_modules())
    cores = [m for _, m in modules if hasattr(m, "get_rope_index") and hasattr(getattr(m, "visual", None), "blocks")]
    outer = [m for n, m in modules if hasattr(m, "parameter_name") and not n.endswith("base_layer")]
    base, switch = model.get_base_model() if hasattr(model, "peft_config") else model, type(model).train
    if hasattr(base, "num_parameters"):  # Transformers' trainer walks all modules in each step, twice
        base.num_parameters = functools.cache(base.num_parameters)
    # looking at all costs little; the first alone may mislead: a new PeftModel says True over a base in eval mode
    model.train = lambda mode=True: model if {m.training for _, m in modules} == {mode} else switch(model, mode)
    _score_labels(base)
    whole = set().union(*(getattr(m, "_no_split_modules", None) or () for _, m in modules))
    changed = {"attention": sum(map(_attend_faster, cores)) if attention else 0}
    changed["experts"] = sum(map(_route_adapters, outer)) if experts else 0
    layers = [m for _, m in modules if compiled and type(m).__name__ in whole]

    def plain(part) -> bool:  # without experts, whose products cannot be compiled
        return not any(hasattr(type(module), "_apply_gate") for module in part.modules())

    for layer in layers:  # within checkpointing a layer is traced whole or not at all
        for part in [layer] if plain(layer) else layer.children():
            if plain(part) or changed["experts"]:
                part.compile()
    return changed | {"compiled": len(layers)}


def _score_labels(base) -> None:
    """Leave positions without a label out of TRL's loss, which is summed over those that have one."""
    own = base.forward

    @functools.wraps(own)  # `generate` reads its signature
    def forward(*args, **kwargs):
        labels = kwargs.get("labels")
        if not kwargs.get("fused_lm_head") or "shift_labels" in kwargs or not base.training or labels.is_cuda:
            return own(*args, **kwargs)
        labels, mask = labels[:, 1:], labels[:, 1:] != -100

        def cut(_, args, outputs):
            outputs.last_hidden_state = outputs.last_hidden_state[:, :-1][mask][None]

        with base.base_model.register_forward_hook(cut):
            return own(*args, **kwargs | {"shift_labels": labels[mask][None]})

    base.forward = forward


def _attend_faster(core) -> int:
    """Equal pictures as a batch in those layers in which a whole one attends to itself; no mask, no wait, no conv."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention as attend
    from transformers.vision_utils import get_vision_position_ids

    tower, embed, pictures = core.visual, core.visual.patch_embed.proj, {}
    kind = type(tower.blocks[0].attn)
    rotate, layers = kind.forward.__globals__["apply_rotary_pos_emb_vision"], range(len(tower.blocks))

    class Batched(kind):  # one class, as layers of one class are compiled once
        def forward(self, hidden_states, cu_seqlens, position_embeddings=None, **kwargs):
            if not pictures["equal"]:  # the model's own way
                return super().forward(hidden_states, cu_seqlens, position_embeddings=position_embeddings, **kwargs)
            query, key, value = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
            query, key = rotate(query, key, *position_embeddings)  # tokens, heads, width
            parts = (part.unflatten(0, (pictures["equal"], -1)).transpose(1, 2) for part in (query, key, value))
            return self.proj(attend(*parts, scale=self.scaling).transpose(1, 2).flatten(0, 1).flatten(1))

    def look(tower, args, kwargs):
        grids = (grid := kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]).tolist()
        pictures["equal"] = len(grids) * grids[0][0] if grids.count(grids[0]) == len(grids) else 0
        if pictures["equal"]:  # Transformers counts the patches of one picture after the other
            kwargs["position_ids"] = get_vision_position_ids(grid[:1], tower.spatial_merge_size).repeat(len(grids), 1)
        return args, kwargs

    for layer in (changed := list(getattr(tower, "fullatt_block_indexes", layers))):
        tower.blocks[layer].attn.__class__ = Batched

    def unmask(text, args, kwargs):  # the causal order hides padding on the right, and its own outputs have no label
        mask = kwargs.get("attention_mask")
        if text.training and getattr(mask, "ndim", 0) == 2 and not (mask[:, 1:] > mask[:, :-1]).any():
            kwargs["attention_mask"] = None
        return args, kwargs

    if isinstance(embed, torch.nn.Conv3d):  # patches do not overlap: the convolution is one matrix product
        embed.forward = lambda x: torch.nn.functional.linear(x.flatten(1), embed.weight.flatten(1), embed.bias)
    tower.register_forward_pre_hook(look, with_kwargs=True)
    core.language_model.register_forward_pre_hook(unmask, with_kwargs=True)
    core.get_rope_index = _count_positions(core.get_rope_index, core.config.vision_config.spatial_merge_size)
    return len(changed)


def _count_positions(own, merge: int):
    """The rotary positions of a batch of equal pictures by sums; Transformers waits for the GPU at every sample."""
    import torch

    def get_rope_index(input_ids, image_grid_thw=None, video_grid_thw=None, attention_mask=None, **kwargs):
        grids = [] if image_grid_thw is None else image_grid_thw.tolist()
        if video_grid_thw is not None or not grids or grids.count([1, *grids[0][1:]]) < len(grids):
            grid = {"image_grid_thw": image_grid_thw, "video_grid_thw": video_grid_thw}
            return own(input_ids, **grid, attention_mask=attention_mask, **kwargs)
        height, width = (size // merge for size in grids[0][1:])
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        picture = (kwargs["mm_token_type_ids"] == 1) * real
        number, text = picture.cumsum(1) - picture, real - picture  # picture tokens before this one
        inside = number % (height * width) * picture
        begin = text.cumsum(1) - text + max(height, width) * (number // (height * width))
        positions = (begin + torch.stack([0 * inside, inside // width, inside % width])) * real
        return positions, (positions.amax((0, 2)) + 1 - real.sum(1))[:, None]

    return get_rope_index


def _route_adapters(outer) -> int:
    """Apply adapters of fused experts to each expert's tokens, as x A B; peft adds A B to all the weights."""
    import torch
    from transformers.integrations.moe import _grouped_linear

    own, experts, adapters, layer = outer.forward, outer.get_base_layer(), {}, outer
    while layer is not experts:
        adapters[layer.parameter_name], layer = layer, layer.base_layer
    # kernels want rows of 16 bytes, so ranks are multiples of 8
    if getattr(experts, "is_transposed", True) or experts.has_bias or any(rank % 8 for rank in outer.r.values()):
        return 0

    def product(x, name: str, ends):
        result = _grouped_linear(x, getattr(experts, name), ends)
        if name in adapters:
            out, into, scaling = adapters[name].get_delta_factors(outer.active_adapters[0])
            thin = scaling * _grouped_linear(x, into.contiguous(), ends)
            result = result + _grouped_linear(thin, out.contiguous(), ends)
        return result

    def forward(hidden_states, top_k_index, top_k_weights):
        if outer.disable_adapters or outer.merged or len(outer.active_adapters) != 1:
            return own(hidden_states, top_k_index, top_k_weights)
        chosen, order = top_k_index.flatten().sort()
        ends = torch.searchsorted(chosen, torch.arange(experts.num_experts, device=chosen.device), right=True).int()
        x = product(hidden_states[order // top_k_index.shape[-1]], "gate_up_proj", ends)
        x = product(experts._apply_gate(x), "down_proj", ends)[order.argsort()]
        return (top_k_weights[:, None].to(x.dtype) @ x.unflatten(0, top_k_index.shape))[:, 0].to(hidden_states.dtype)

    outer.forward = torch.compiler.disable(forward)  # compiled, these products get strides that their kernel refuses
    return 1


def send_bytes(trainer) -> bool:
    """Let pixels travel to the model as bytes, and scale them there: a quarter of the memory traffic, the same numbers.

    The processes that load data do less, too. For a `trl.SFTTrainer` of a Qwen-VL model, after `speed_up` or without
    it. Returns False, and changes nothing, where the model is another or its processor does not scale.
    """
    import torch

    core = (trainer.model.get_base_model() if hasattr(trainer.model, "peft_config") else trainer.model).model
    own, prepare = trainer.data_collator, getattr(trainer.processing_class, "image_processor", None)
    scales = getattr(prepare, "do_rescale", False) and getattr(prepare, "do_normalize", False)
    if not scales or not hasattr(core, "visual") or not hasattr(own, "processor"):
        return False
    area = prepare.patch_size**2 * prepare.temporal_patch_size  # a row of pixels: channels, frames, height, width
    parts = [torch.tensor(part) / prepare.rescale_factor for part in (prepare.image_mean, prepare.image_std)]
    on = functools.cache(lambda device: [part.repeat_interleave(area).to(device) for part in parts])  # copied once
    features, raw, own.processor = core.get_image_features, copy.copy(prepare), copy.copy(own.processor)
    raw.do_rescale = raw.do_normalize = False
    own.processor.image_processor = raw

    def scale(pixel_values, *args, **kwargs):
        if pixel_values.dtype == torch.uint8:
            mean, deviation = on(pixel_values.device)
            pixel_values = (pixel_values - mean) / deviation
        return features(pixel_values, *args, **kwargs)

    def collate(rows: list[dict]) -> dict:
        batch = own(rows)
        return batch | {key: batch[key].to(torch.uint8) for key in ("pixel_values",) if key in batch}

    core.get_image_features = functools.wraps(features)(scale)  # `generate` reads its signature
    trainer.data_collator = collate
    return True


def pad_lengths(collate, rows: list[dict], *, step: int = 8) -> dict:
    """Collate a batch and pad it on the right to a multiple of `step` tokens, which do not count.

    A GPU's attention is planned anew for each length that it has not seen, which takes longer than the padding.

    Parameters
    ----------
    collate, rows : a function that makes a batch of rows, such as a trainer's ``data_collator``, and the rows.
    step : tokens; lengths become a multiple of it.

    Returns
    -------
    dict : the batch. What has the shape of its "input_ids", (rows, tokens), is padded: labels by -100, the rest by 0.

    Examples
    --------
    >>> import torch
    >>> pad_lengths(lambda rows: {"input_ids": torch.ones(1, 5), "labels": torch.ones(1, 5)}, [])["labels"].tolist()
    [[1.0, 1.0, 1.0, 1.0, 1.0, -100.0, -100.0, -100.0]]
    """
    import torch

    batch = collate(rows)
    shape = batch["input_ids"].shape
    for key in [key for key, value in batch.items() if getattr(value, "shape", None) == shape]:
        batch[key] = torch.nn.functional.pad(batch[key], (0, -shape[1] % step), value=-100 * (key == "labels"))
    return batch


def cache_features(trainer, folder) -> None:
    """Show each picture to the frozen vision tower once; the trainer's batches then hold its features, not pixels.

    Parameters
    ----------
    trainer : a `trl.SFTTrainer` of a Qwen-VL model whose `images` are files, as `medtune.convert.read_records` gives.
    folder : for one file a picture: for each of its tokens the numbers of the merger and of DeepStack, in the dtype
        computed. What is there already, of the same weights, preparation and picture, is reused.

    Raises
    ------
    ValueError : vision tower or merger are trained, the model is no Qwen-VL, the trainer is none of TRL's.
    OSError : the disk has too little space.
    """
    import datasets
    import torch
    from PIL import Image
    from safetensors.torch import load_file, save, save_file

    from medtune.models import part_of

    own, prepare = trainer.data_collator, trainer.processing_class.image_processor
    core = (trainer.model.get_base_model() if hasattr(trainer.model, "peft_config") else trainer.model).model
    learns = any(p.requires_grad and part_of(n) in ("vision", "merger") for n, p in trainer.model.named_parameters())
    if learns or trainer.is_deepspeed_enabled or not hasattr(core, "visual") or not hasattr(own, "processor"):
        raise ValueError("cache_features needs a Qwen-VL model, vision tower and merger frozen, and no DeepSpeed")
    same = repr((prepare.to_dict(), trainer.args.bf16, trainer.args.fp16)).encode() + save(core.visual.state_dict())
    folder, places = Path(folder) / hashlib.sha256(same).hexdigest()[:16], {}
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train_dataset", "eval_dataset"):
        if data := getattr(trainer, name):
            setattr(trainer, name, data := data.cast_column("images", datasets.List(datasets.Image(decode=False))))
            for path in {picture["path"] for pictures in data["images"] for picture in pictures}:
                places[path] = folder / f"{hashlib.sha256(Path(path).read_bytes()).hexdigest()}.safetensors"
    todo = {place: path for path, place in places.items() if not place.exists()}
    for number, (place, path) in enumerate(todo.items()):
        batch = prepare([datasets.Image().decode_example({"path": path, "bytes": None})], return_tensors="pt")
        with torch.no_grad(), trainer.accelerator.autocast():
            seen = core.get_image_features(**batch.to(core.device), return_dict=True)
        layers = [seen.pooler_output[0], *(deep[0] for deep in getattr(seen, "deepstack_features", None) or ())]
        tensors = {"pixel_values": torch.cat(layers, -1).cpu(), "image_grid_thw": batch["image_grid_thw"].cpu()}
        save_file(tensors, place.with_suffix(".partial"))
        size = place.with_suffix(".partial").rename(place).stat().st_size * (len(todo) - number)
        if number == 0:
            print(f"medtune.train: features of {len(todo)} pictures, about {size / 1e6:.1f} MB, go to {folder}")
        if shutil.disk_usage(folder).free < size:
            raise OSError(f"{folder} has too little space: {size / 1e9:.2f} GB of features are still to come")

    def look_up(images, **kwargs) -> dict:
        found = [load_file(places[picture.filename]) for pictures in images for picture in pictures]
        return {key: torch.cat([one[key] for one in found]) for key in found[0]}

    def split(pixel_values, image_grid_thw, **kwargs) -> SimpleNamespace:
        sizes = (image_grid_thw.prod(-1) // core.visual.spatial_merge_size**2).tolist()
        first, *deep = (part.split(sizes) for part in pixel_values.split(core.config.text_config.hidden_size, -1))
        return SimpleNamespace(pooler_output=first, deepstack_features=deep)

    def collate(rows: list[dict]) -> dict:  # a picture opened but not decoded stands for the name of its file
        return own([row | {"images": [Image.open(picture["path"]) for picture in row["images"]]} for row in rows])

    look_up.merge_size, look_up.fetch_images = prepare.merge_size, lambda images: images
    core.get_image_features, trainer.data_collator, own.processor = split, collate, copy.copy(own.processor)
    own.processor.image_processor = look_up
