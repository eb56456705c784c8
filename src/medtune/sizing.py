"""Know before you rent: shape twins of published models with random weights, and what training them takes.

The shapes are facts in ``shapes.json`` beside this file. A twin has a model's exact shape and says nothing sensible.
"""

import itertools
import json
import os
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

from .models import adapter_targets, load_processor, part_of, save_model

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
    """Give the facts of one model: published "parameters", "licence" and "config"; `name` may leave out the owner.

    Examples
    --------
    >>> model_facts("gemma-3-4b-pt")["parameters"]
    4300079472

    Raises
    ------
    ValueError : the shape of this model is not known here.
    """
    found = [known for known in model_names() if name.lower() in (known.lower(), known.split("/")[1].lower())]
    if not found:
        raise ValueError(f"The shape of {name} is not known here; known are {', '.join(model_names())}.")
    return FACTS["models"][FACTS["same_shape"].get(found[0], found[0])] | {"name": found[0]}


def twin_config(name: str, *, scale: str = "full"):
    """Build the Transformers configuration of a model's published shape, or of a tiny one of the same family.

    Parameters
    ----------
    scale : "full", or "tiny" for tests: two layers of 64 numbers, experts that are not square.
    """
    from transformers import AutoConfig

    if scale not in ("full", "tiny"):
        raise ValueError(f"scale must be full or tiny, not {scale!r}.")
    config = dict(model_facts(name)["config"])
    family = FACTS["families"][config["model_type"]]
    for key, value in family["tiny_config"].items() if scale == "tiny" else ():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    return AutoConfig.for_model(**config)


def save_processor(name: str, out, *, scale: str = "full", tokenizer=None):
    """Save the processor of a twin in the folder `out` and load it: the published one if the hub cache has it.

    Otherwise it is a stand-in with the same special tokens, chat template in short form and preparation of pictures.

    Parameters
    ----------
    tokenizer : a ``tokenizer.json`` to use for a stand-in, or None to train a small one on a few sentences.
    """
    import tokenizers as tk
    from huggingface_hub import try_to_load_from_cache
    from transformers import PreTrainedTokenizerFast

    facts, out = model_facts(name), Path(out)
    family = FACTS["families"][facts["config"]["model_type"]]
    cached = try_to_load_from_cache(facts["name"], "preprocessor_config.json")
    if scale == "full" and isinstance(cached, str):
        load_processor(Path(cached).parent).save_pretrained(out)
        return load_processor(out)
    if tokenizer:
        words = tk.Tokenizer.from_file(os.fspath(tokenizer))
    else:
        words, spaces = tk.Tokenizer(tk.models.BPE()), tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
        words.pre_tokenizer, words.decoder = spaces, tk.decoders.ByteLevel()
        special = {"initial_alphabet": spaces.alphabet(), "special_tokens": family["tokens"]}
        words.train_from_iterator([FACTS["text"]] * 2, tk.trainers.BpeTrainer(vocab_size=2000, **special))
    words.add_special_tokens(family["tokens"])
    options = {"extra_special_tokens": family["extra"], "padding_side": "left", **family["named"]}
    PreTrainedTokenizerFast(tokenizer_object=words, chat_template=family["template"], **options).save_pretrained(out)
    processor = family["tiny_processor" if scale == "tiny" else "processor"]
    (out / "processor_config.json").write_text(json.dumps(processor, indent=1), encoding="utf-8")
    return load_processor(out)


def build_twin(
    name: str, processor, *, scale="full", dtype="bfloat16", device="cpu", quantization_config=None, seed: int = 0
):
    """Build a model of the published shape with random weights straight on the device, in evaluation mode.

    Parameters
    ----------
    processor : from `save_processor`; the configuration takes its token ids.
    quantization_config : such as `medtune.models.nf4_config`; what bitsandbytes would pack on loading is packed here.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    config = twin_config(name, scale=scale)
    family, tokenizer = FACTS["families"][config.model_type], processor.tokenizer
    for key, token in family["config"].items():
        setattr(config, key, tokenizer.convert_tokens_to_ids(token))
    text = config.get_text_config()
    text.vocab_size = len(tokenizer) if scale == "tiny" else max(text.vocab_size, len(tokenizer))
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, key, getattr(tokenizer, key))
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    for weight in model.parameters():  # Gemma-3 starts its merger at zero: no gradient would reach the vision tower
        if weight.ndim > 1 and not weight.any():
            torch.nn.init.normal_(weight, std=0.02)
    ends = {tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(["<end_of_turn>", "<|im_end|>"])}
    model.generation_config.eos_token_id = sorted(ends - {None, tokenizer.unk_token_id})
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return (_pack(model, quantization_config) if quantization_config else model).eval()


def _pack(model, quantization_config):
    """Quantise the Linear layers of a model in memory, one after the other, as ``from_pretrained`` does."""
    import bitsandbytes as bnb
    import torch
    from transformers.quantizers import AutoHfQuantizer

    linear = {name: module for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    quantizer = AutoHfQuantizer.from_config(quantization_config, pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map=None, dtype=model.dtype)
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            old = linear.pop(name)
            packed = bnb.nn.Params4bit(old.weight.data, requires_grad=False, **module.weight.__dict__)
            module.weight, module.bias = packed.to(old.weight.device), old.bias
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer
    return model


def make_twin(name: str, out, *, scale: str = "full", tokenizer=None, **options) -> Path:
    """Make a shape twin and save it as a folder that loads as the hub's does: all of it or nothing.

    Parameters
    ----------
    name : a hub name of `model_names`.
    out : folder to write; a twin already there is replaced.
    scale : "full" for the published shape, "tiny" for tests.
    tokenizer : see `save_processor`.
    **options : dtype, device, quantization_config and seed, as for `build_twin`.

    Returns
    -------
    Path : the folder.

    Raises
    ------
    ValueError : an unknown name or scale, or `out` holds something else than a model.
    OSError : the disk is full or cannot be written.
    """
    with tempfile.TemporaryDirectory() as scratch:
        processor = save_processor(name, scratch, scale=scale, tokenizer=tokenizer)
        model = build_twin(name, processor, scale=scale, **options)
        card = f"# A {scale} shape twin of {model_facts(name)['name']}\n\nIts weights are random: it knows nothing.\n"
        save_model(model, processor, out, card=card, max_shard_size="5GB")
    return Path(out)


def picture_size(name: str, image_size: int) -> dict[str, int]:
    """Say what one square picture of `image_size` pixels becomes: "tokens" of text, "patches", "bytes" of input.

    Examples
    --------
    >>> picture_size("Qwen/Qwen3-VL-2B-Instruct", 512)
    {'tokens': 256, 'patches': 1024, 'bytes': 6291456}
    """
    config = model_facts(name)["config"]
    vision, side = config["vision_config"], config["vision_config"].get("image_size", 0)
    patches = (side // vision["patch_size"]) ** 2
    if config["model_type"] == "gemma3":  # every picture is brought to one size
        return {"tokens": config["mm_tokens_per_image"] + 4, "patches": patches, "bytes": 12 * side**2}
    if config["model_type"] == "idefics3":  # enlarged to 2,048 pixels, cut into 16 tiles, and once more as a whole
        return {"tokens": 17 * 68, "patches": 17 * patches, "bytes": 17 * 20 * side**2}
    bounds = FACTS["families"][config["model_type"]]["processor"]["image_processor"]["size"]
    pixels = min(max(image_size**2, bounds["shortest_edge"]), bounds["longest_edge"])
    patches = (2 * round(pixels**0.5 / (2 * vision["patch_size"]))) ** 2  # 2 x 2 patches make a token
    return {"tokens": patches // 4, "patches": patches, "bytes": 24 * patches * vision["patch_size"] ** 2}


@cache
def _counts(name: str, method: str, target: str, lora_r: int, modules_to_save: tuple[str, ...], dtype: str) -> dict:
    """Count bytes of weights and of what is trained, on a model and adapter without storage."""
    import peft
    import torch
    from transformers import AutoModelForImageTextToText
    from transformers.quantizers.base import get_keys_to_not_convert

    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        model = AutoModelForImageTextToText.from_config(twin_config(name), dtype=getattr(torch, dtype))
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        if method == "qlora":  # NF4: half a byte, and for every 64 weights a scale of a byte, itself scaled in blocks
            whole = get_keys_to_not_convert(model)
            linear = [m for n, m in model.named_modules() if type(m) is torch.nn.Linear and n not in whole]
            weights -= sum(m.weight.numel() for m in linear) * (2 - 0.5 - 1 / 64 - 4 / 64 / 256)
        if method != "full":
            options = {"r": lora_r, "modules_to_save": list(modules_to_save) or None, **adapter_targets(model, target)}
            model = peft.get_peft_model(model, peft.LoraConfig(**options))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    # TRL keeps adapters on 4-bit weights in bfloat16
    size = sum(p.numel() * (2 if method == "qlora" else p.element_size()) for p in trained.values())
    number, parts = sum(p.numel() for p in trained.values()), set(map(part_of, trained))
    return {"trained_parameters": number, "parts": parts, "weights": weights, "trained": size}


def _activations(name: str, method: str, parts: set[str], lora_dropout: float, checkpointing: bool) -> dict[str, float]:
    """Bytes a token and a patch, as read off what PyTorch saves for the backward pass in each layer under autocast.

    "kept" is held by all layers until the backward pass; "work" is one layer recomputed, and what comes and goes.
    """
    config = model_facts(name)["config"]
    flags, text, vision = FACTS["families"][config["model_type"]], config["text_config"], config["vision_config"]
    hidden, layers, experts = text["hidden_size"], text["num_hidden_layers"], text.get("num_experts_per_tok", 0)
    head = text.get("head_dim", hidden // text["num_attention_heads"])
    queries, keys = (text[f"num_{kind}_heads"] * head for kind in ("attention", "key_value"))
    inner = experts * text["moe_intermediate_size"] if experts else text["intermediate_size"]
    full, packed, drop = method == "full", method == "qlora", int(lora_dropout > 0)
    shared = packed and not drop  # an adapter in bfloat16 keeps the same tensor as its neighbours
    routed, qk = 2 * experts * hidden, (queries + keys) * flags["qk_norm"]
    # norms in float32; of attention q, k, v and the result; of the MLP what activation and product need
    layer = 4 * hidden * flags["norms"] + 4 * qk + 4 * queries + 4 * (queries if flags["repeats_kv"] else keys)
    layer += 6 * inner + routed + 4 * text.get("num_experts", 0)
    if full:  # a weight that is trained needs its input
        layer += 8 * hidden + 2 * qk + 2 * inner
    if not full and "language attention" in parts:  # so does an adapter
        layer += 2 * hidden if shared else (2 + drop) * (3 * hidden + queries)
    if not full and "language MLP" in parts:
        layer += 2 * (hidden + inner) if shared else (2 + drop) * (2 * hidden + inner)
    width = vision.get("embed_dim") or vision["hidden_size"]
    wide = vision.get("intermediate_size") or width * vision["mlp_ratio"]
    depth = vision.get("depth") or vision["num_hidden_layers"]
    mergers = 10 * width * (1 + len(vision.get("deepstack_visual_indexes", [])))
    # LayerNorm gives float32, and 4-bit layers hand it on
    block = (16 + 9 * (packed + drop)) * width + 2 * (1 + packed) * wide * (3 if flags["quick_gelu"] else 1)
    block += ((10 + 5 * drop) * width + 2 * wide) * ("vision" in parts)
    reached = "vision" in parts or (checkpointing and flags["gradients_reach_vision"])
    kept = 2 * hidden + 4 * text.get("num_experts", 0) if checkpointing else layer
    return {
        "kept": layers * kept + 8 * hidden,
        "work": layer + (4 if packed else 8) * inner + routed if checkpointing else 14 * inner,
        "vision_kept": (depth * (2 * (1 + packed) * width if checkpointing else block) + mergers) * reached,
        "vision_work": block * checkpointing + 3 * wide if reached else 10 * width + 4 * wide,
        "experts": 6 * text.get("num_experts", 0) * hidden * inner // max(experts, 1) * ("experts" in parts),
        "cache": 4 * layers * keys,
    }


def plan(
    name: str, *, method: str = "lora", target: str = "language", lora_r: int = 8, lora_dropout: float = 0.0,
    modules_to_save: tuple[str, ...] = (), dtype: str = "bfloat16", batch_size: int = 1, image_size: int = 512,
    text_tokens: int = 150, new_tokens: int = 150, checkpointing: bool = True, gpus: int = 1, gpu_gb: float = 80.0,
    zero_stage: int = 0, accumulation: bool = False, pairs: int = 0, samples_per_second: float = 0.0,
) -> dict[str, Any]:  # fmt: skip
    """Estimate what training with TRL's SFTTrainer takes on each GPU, in GB (10^9 bytes).

    Parameters
    ----------
    name : a hub name of `model_names`.
    method : "lora" (float32 adapters on weights of `dtype`), "qlora" (NF4), or "full".
    target, lora_r, lora_dropout, modules_to_save : as in notebook 03.
    batch_size : samples a GPU in one forward pass.
    accumulation : several batches make a step. Gradients of the one before are then there in the next forward pass,
        which counts for what is trained whole: R4 took 19.0 GB with it (18.9 planned), and 16.2 are planned without.
    image_size, text_tokens : side of the picture in pixels; tokens of a sample besides those of the picture.
    new_tokens : of an answer, for the cache of generation at this batch size.
    checkpointing : activations are recomputed.
    gpus, gpu_gb, zero_stage : cards, memory of each, and what is split over them: 0 nothing, 1 optimizer states,
        2 gradients too, 3 weights too.
    pairs, samples_per_second : of an epoch and of all cards together, for "hours_per_epoch".

    Returns
    -------
    dict : "weights", "adapter", "gradients", "optimizer", "activations" (with the working memory), "peak" as
        ``torch.cuda.max_memory_allocated`` counts, "needed" (with the allocator's slack and CUDA's own), "fits";
        "generation" (the peak when this batch is answered), "kv_cache" (a part of it), "logits" that a loop without
        TRL's fused head would add, "download", "disk"; "tokens", "image_tokens", "trained_parameters",
        "hours_per_epoch".
        Measured on one card only; what ZeRO splits is reckoned.

    Raises
    ------
    ValueError : an unknown model, method or target.
    """
    if method not in ("lora", "qlora", "full"):
        raise ValueError(f"method must be lora, qlora or full, not {method!r}.")
    facts, picture = model_facts(name), picture_size(name, image_size)
    text = facts["config"]["text_config"]
    found = _counts(facts["name"], method, target * (method != "full"), lora_r, tuple(modules_to_save), dtype)
    acts = _activations(name, method, found["parts"], lora_dropout, checkpointing)
    tokens = picture["tokens"] + text_tokens
    rows, patches = tokens * batch_size, picture["patches"] * batch_size
    trained, weights = found["trained"], found["weights"]
    vocabulary = text["vocab_size"] * text["hidden_size"]
    # TRL's fused head sums its own gradient in float32; experts and their adapters are added up for a whole layer
    head = vocabulary * (8 if dtype == "float32" else 6) * bool({"head", "embeddings"} & found["parts"])
    work, seen = acts["work"] * rows + acts["experts"] * 4 / 3, acts["vision_kept"] * patches
    kept = acts["kept"] * rows + seen + acts["experts"] * text["num_hidden_layers"] * (not checkpointing)
    casts = (weights / 2 - 2 * vocabulary) * (method == "full" and dtype == "float32")  # autocast's copies
    before = kept + max(work, head, casts) + trained * accumulation
    top = max(before, trained + seen + max(work, acts["vision_work"] * patches))
    asked = _activations(name, method, set(), 0.0, False)  # generation keeps nothing for a backward pass
    # its top: the vision tower, the prompt beside its cache, or the cache once the answer is whole
    held = asked["cache"] * (tokens + new_tokens) * batch_size
    answer = max(asked["vision_work"] * patches, (asked["cache"] + asked["work"]) * rows, held)
    optimizer = 2 * trained if zero_stage == 0 else 12 * found["trained_parameters"] / gpus  # ZeRO: states in float32
    gradients, weights = trained / (gpus if zero_stage > 1 else 1), weights / (gpus if zero_stage > 2 else 1)
    gathered = 2 * found["weights"] / text["num_hidden_layers"] * (zero_stage > 2)  # a layer in use, and the next
    sizes = {"weights": weights, "adapter": trained * (method != "full"), "optimizer": optimizer}
    peak = sum(sizes.values()) + picture["bytes"] * batch_size + top + gathered
    sizes |= {"gradients": gradients, "activations": max(top - gradients, 0), "peak": peak, "needed": 1.1 * peak + 7e8}
    sizes |= {"generation": peak - optimizer - top - gathered + answer, "download": 2 * facts["parameters"]}
    sizes |= {"logits": 10 * rows * text["vocab_size"], "kv_cache": held, "disk": 4 * facts["parameters"] + 6 * trained}
    result: dict[str, Any] = {key: round(value / 1e9, 3) for key, value in sizes.items()}
    result |= {"fits": result["needed"] <= gpu_gb, "tokens": tokens, "image_tokens": picture["tokens"]}
    hours = pairs / samples_per_second / 3600 if samples_per_second else None
    return result | {"trained_parameters": found["trained_parameters"], "hours_per_epoch": hours}


def recommend(name: str, *, gpus: int = 1, **options) -> dict[str, Any]:
    """Find the largest batch that fits, without checkpointing where 8 samples fit so, with the lowest ZeRO stage.

    Parameters
    ----------
    gpus, **options : as for `plan`, less batch_size, checkpointing and zero_stage.

    Returns
    -------
    dict : "batch_size", "checkpointing", "zero_stage" and what `plan` says of them; the smallest there is if none fits.
    """
    stages = (0, 2, 3) if gpus > 1 else (0,)
    sizes = [(2**power, again) for again in (False, True) for power in range(6, -1 if again else 2, -1)]
    for stage, (size, again) in itertools.product(stages, sizes):
        chosen = {"batch_size": size, "checkpointing": again, "zero_stage": stage}
        found = plan(name, gpus=gpus, **options, **chosen)
        if found["fits"]:
            break
    return chosen | found


def rehearse(run: str, *, steps: int = 2, scale: str | None = None, data: str = "sample", pairs: int = 120, root=None):
    """Run a named run's notebooks, offline, for a handful of steps on a twin in place of the weights.

    Parameters
    ----------
    run : folder in ``papermill_runs/``; results go to a run of the name ``<run>-rehearsal``.
    steps : optimizer steps.
    scale : "full" or "tiny"; by default the full shape where there is a GPU.
    data, pairs : the data set, and about so many of its pairs.

    Returns
    -------
    dict : as from `medtune.runs.run`. Times and memory mean something at full scale; scores never do.
    """
    import torch

    from . import runs

    root, new, cuda = runs.find_root(root), f"{run}-rehearsal", torch.cuda.is_available()
    planned = runs.read_params(run, root=root)
    model = next(values["model_name_or_path"] for values in planned.values() if "model_name_or_path" in values)
    scale = scale or ("full" if cuda else "tiny")
    dtype, place = ("bfloat16", "cuda") if cuda else ("float32", "cpu")
    folder, text = root / "papermill_runs" / new, root / "data" / "tiny-vlm" / "tokenizer.json"
    made = folder / "out" / f"{scale}-twin-of-{model.split('/')[-1]}" / "config.json"
    os.environ["HF_HUB_OFFLINE"] = "1"  # the notebooks' processes inherit it
    # of an older version of this package, a twin is made anew, as a run's notebooks are run anew
    if not made.exists() or made.stat().st_mtime < max(f.stat().st_mtime for f in Path(__file__).parent.glob("*.*")):
        make_twin(model, made.parent, scale=scale, dtype=dtype, device=place, tokenizer=text if text.exists() else None)
        torch.cuda.empty_cache()  # the notebooks run in processes of their own and want the card
    wanted = {"data": data, "model_name_or_path": os.path.relpath(made.parent), "dtype": dtype, "limit": pairs}
    wanted |= {"num_train_epochs": 0.0, "max_steps": steps, "eval_steps": steps, "save_steps": steps}
    wanted |= {"audit_limit": pairs, "eval_samples": 8, "samples": 4, "max_new_tokens": 16}
    if scale == "tiny":
        wanted |= {"per_device_train_batch_size": 2, "batch_size": 4, "dataloader_num_workers": 0, "max_pixels": 0}
    overrides: dict[str, Any] = {}
    for notebook, values in planned.items():
        chosen = wanted | {"gradient_accumulation_steps": min(2, values.get("gradient_accumulation_steps", 1))}
        overrides |= {f"{notebook}.{key}": value for key, value in chosen.items() if key in values}
    (folder / "params.yaml").unlink(missing_ok=True)  # of an earlier rehearsal
    return runs.run(run, overrides=overrides, new_name=new, root=root)
