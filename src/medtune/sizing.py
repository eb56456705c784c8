"""Know before you rent: shape twins of published models with random weights, and what training them takes.

The shapes are facts in ``shapes.json`` beside this file. A twin has a model's exact shape and says nothing sensible.
"""

from __future__ import annotations

import json
import os
import shutil
from functools import cache
from pathlib import Path
from typing import Any


@cache
def _facts() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("shapes.json").read_text("utf-8"))


def model_names() -> list[str]:
    """Name the models whose shape is known, by hub name.

    Examples
    --------
    >>> "Qwen/Qwen3-VL-2B-Instruct" in model_names()
    True
    """
    return [*_facts()["models"], *_facts()["same_shape"]]


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
    return _facts()["models"][_facts()["same_shape"].get(found[0], found[0])] | {"name": found[0]}


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
    family = _facts()["families"][config["model_type"]]
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

    from medtune.models import load_processor

    facts, out = model_facts(name), Path(out)
    family = _facts()["families"][facts["config"]["model_type"]]
    cached = try_to_load_from_cache(facts["name"], "preprocessor_config.json")
    if scale == "full" and not tokenizer and isinstance(cached, str):
        load_processor(Path(cached).parent).save_pretrained(out)
        return load_processor(out)
    if tokenizer:
        words = tk.Tokenizer.from_file(os.fspath(tokenizer))
    else:
        words = tk.Tokenizer(tk.models.BPE())
        words.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
        words.decoder = tk.decoders.ByteLevel()
        alphabet = tk.pre_tokenizers.ByteLevel.alphabet()
        trainer = tk.trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, special_tokens=family["tokens"])
        words.train_from_iterator([_facts()["text"]] * 2, trainer)
    words.add_special_tokens(family["tokens"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words, extra_special_tokens=family["extra"], padding_side="left", **family["named"]
    )
    fast.chat_template = family["template"]
    fast.save_pretrained(out)
    processor = json.loads(json.dumps(family["processor"]))
    if scale == "tiny":
        processor |= family.get("tiny", {})
        processor["image_processor"] |= family["tiny_processor"]
    (out / "processor_config.json").write_text(json.dumps(processor, indent=1), encoding="utf-8")
    return load_processor(out)


def build_twin(
    name: str,
    processor,
    *,
    scale: str = "full",
    dtype="bfloat16",
    device="cpu",
    quantization_config=None,
    seed: int = 0,
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
    family, tokenizer = _facts()["families"][config.model_type], processor.tokenizer
    for key, token in family["config"].items():
        setattr(config, key, tokenizer.convert_tokens_to_ids(token))
    text = config.get_text_config()
    text.vocab_size = len(tokenizer) if scale == "tiny" else max(text.vocab_size, len(tokenizer))
    text.pad_token_id, text.bos_token_id = tokenizer.pad_token_id, tokenizer.bos_token_id
    text.eos_token_id = tokenizer.eos_token_id
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    ends = {tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(["<end_of_turn>", "<|im_end|>"])}
    model.generation_config.eos_token_id = sorted(ends - {None, tokenizer.unk_token_id})
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return _pack(model, quantization_config).eval()


def _pack(model, quantization_config):
    """Quantise the Linear layers of a model in memory, one after the other, as ``from_pretrained`` does."""
    import bitsandbytes as bnb
    import torch
    from transformers.quantizers import AutoHfQuantizer

    if quantization_config is None:
        return model
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


def make_twin(
    name: str,
    out,
    *,
    scale: str = "full",
    dtype="bfloat16",
    device="cpu",
    quantization_config=None,
    seed: int = 0,
    tokenizer=None,
) -> Path:
    """Make a shape twin and save it as a folder that loads as the hub's does: all of it or nothing.

    Parameters
    ----------
    name : a hub name of `model_names`.
    out : folder to write; a twin already there is replaced.
    scale : "full" for the published shape, "tiny" for tests.
    dtype, device, quantization_config, seed : as for `build_twin`.
    tokenizer : see `save_processor`.

    Returns
    -------
    Path : the folder.

    Raises
    ------
    ValueError : an unknown name or scale, or `out` holds something else than a model.
    OSError : the disk is full or cannot be written.
    """
    from medtune.models import save_model

    out = Path(out)
    scratch = out.with_name(f".{out.name}.processor")
    try:
        processor = save_processor(name, scratch, scale=scale, tokenizer=tokenizer)
        options = {"scale": scale, "dtype": dtype, "device": device, "quantization_config": quantization_config}
        model = build_twin(name, processor, **options, seed=seed)
        card = f"# A {scale} shape twin of {model_facts(name)['name']}\n\nIts weights are random: it knows nothing.\n"
        save_model(model, processor, out, card=card, max_shard_size="5GB")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return out


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

    from medtune import runs

    root, name, cuda = runs.find_root(root), f"{run}-rehearsal", torch.cuda.is_available()
    planned = runs.read_params(run, root=root)
    model = next(values["model_name_or_path"] for values in planned.values() if "model_name_or_path" in values)
    scale = scale or ("full" if cuda else "tiny")
    dtype = "bfloat16" if cuda else "float32"
    twin = root / "papermill_runs" / name / "out" / f"{scale}-twin"
    os.environ["HF_HUB_OFFLINE"] = "1"  # the notebooks' processes inherit it
    if not (twin / "config.json").exists():
        words = root / "data" / "tiny-vlm" / "tokenizer.json"
        tokenizer = words if words.exists() else None
        make_twin(model, twin, scale=scale, dtype=dtype, device="cuda" if cuda else "cpu", tokenizer=tokenizer)
    wanted = {
        "data": data,
        "model_name_or_path": os.path.relpath(twin),
        "dtype": dtype,
        "limit": pairs,
        "num_train_epochs": 0.0,
        "max_steps": steps,
        "eval_steps": steps,
        "save_steps": steps,
        "eval_samples": 8,
        "samples": 4,
        "max_new_tokens": 16,
    }
    small = {"per_device_train_batch_size": 2, "batch_size": 4, "dataloader_num_workers": 0, "max_pixels": 0}
    wanted |= small if scale == "tiny" else {}
    overrides: dict[str, Any] = {}
    for notebook, values in planned.items():
        overrides |= {f"{notebook}.{key}": value for key, value in wanted.items() if key in values}
        if "gradient_accumulation_steps" in values:
            overrides[f"{notebook}.gradient_accumulation_steps"] = min(2, values["gradient_accumulation_steps"])
    (root / "papermill_runs" / name / "params.yaml").unlink(missing_ok=True)  # of an earlier rehearsal
    return runs.run(run, overrides=overrides, new_name=name, root=root)
