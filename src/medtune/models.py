"""Base model, processor, 4-bit weights, adapter, merge and save: the model side of a fine-tune in plain functions.

Nothing here runs code that came with a model (no ``trust_remote_code``); only safetensors are read and written.
"""

import os
import re
import shutil
from pathlib import Path

# The parts of a vision-language model, by parameter name; the first match wins.
PARTS = {
    "experts": r"\.experts\b|\.shared_expert|\.mlp\.gate(\.|$)",
    "merger": r"merger|multi_modal_projector|connector",
    "vision": r"\bvisual\b|vision_tower|vision_model",
    "embeddings": r"embed_tokens",
    "head": r"lm_head",
    "language attention": r"self_attn",
    "language MLP": r"\.mlp\.",
}
# What one word of `adapter_targets(model, which)` reaches.
TARGETS = {
    **{part: {part} for part in ("experts", "vision", "merger")},
    "attention": {"language attention"},
    "mlp": {"language MLP"},
    "language": {"language attention", "language MLP"},
    "llamafactory-all": {"language attention", "language MLP"},  # its `lora_target: all` freezes vision and merger
    "all-linear": {"language attention", "language MLP", "merger", "vision"},  # peft's: all Linear but the head
}


def part_of(name: str) -> str:
    """Say to which part of the model a parameter or module belongs, by its name.

    Examples
    --------
    >>> part_of("base_model.model.model.visual.merger.linear_fc1.lora_A.default.weight")
    'merger'
    """
    return next((part for part, pattern in PARTS.items() if re.search(pattern, name)), "norms and other")


def _one_line(error) -> str:
    return " ".join(str(error).split())[:300]


def _explain(path: str, error: Exception) -> OSError:
    """Turn a loading error into one line that says what to do."""
    from huggingface_hub import errors

    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    kinds = {cls for link in chain for cls in type(link).__mro__}
    login = "`hf auth login` (or set HF_TOKEN)"
    if errors.GatedRepoError in kinds:
        return OSError(f"{path} is gated: accept its licence on https://huggingface.co/{path}, then run {login}.")
    if errors.RepositoryNotFoundError in kinds:
        return OSError(f"The hub shows no model {path}: check the spelling; for a private model run {login}.")
    if kinds & {errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled}:
        return OSError(f"{path} is neither a folder nor in the hub cache and the hub is out of reach (offline?).")
    return OSError(f"{path} cannot be loaded: {_one_line(error)}")


def _check_path(path) -> str:
    from transformers.utils import cached_file

    path = os.path.expanduser(os.fspath(path))
    if not os.path.isdir(path):
        if path.startswith((".", os.sep)) or path.count("/") != 1:
            raise FileNotFoundError(f"No model folder {path}: give a folder or a hub name (Qwen/Qwen3-VL-2B-Instruct).")
        try:  # one small file first: without a connection each file costs half a minute of retries
            cached_file(path, "config.json")
        except OSError as error:
            raise _explain(path, error) from error
    return path


def _for_pictures(path: str):
    """Load a processor that insists on video, and so on torchvision, for pictures only."""
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
    from transformers.video_processing_utils import BaseVideoProcessor

    try:  # newer folders name the class, older ones only the type of model
        full = getattr(transformers, transformers.ProcessorMixin.get_processor_dict(path)[0]["processor_class"])
    except (OSError, KeyError):
        full = PROCESSOR_MAPPING[type(transformers.AutoConfig.from_pretrained(path, trust_remote_code=False))]
    try:
        video = {"video_processor": BaseVideoProcessor.get_video_processor_dict(path)[0]}
    except OSError:
        video = {}

    def init(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        full.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    # name and video settings stay, so that a saved copy loads as the full class where torchvision is installed
    members = {"__init__": init, "to_dict": lambda self: full.to_dict(self) | video}
    return type(full.__name__, (full,), members).from_pretrained(path)


def load_processor(path, *, min_pixels: int | None = None, max_pixels: int | None = None):
    """Load the processor of a model: tokenizer, picture preparation and chat template.

    Parameters
    ----------
    path : model or adapter folder, or hub name. Without torchvision, Qwen processors are loaded for pictures only.
    min_pixels, max_pixels : bounds for the resized picture, and so for its image tokens (one per 32x32 in Qwen3-VL).

    Raises
    ------
    OSError : no such folder or hub model, a gated model, no connection.
    ValueError : no processor or chat template in the folder; pixel bounds where pictures have one fixed size.

    Examples
    --------
    >>> load_processor("./no-folder")
    Traceback (most recent call last):
    FileNotFoundError: No model folder ./no-folder: give a folder or a hub name (Qwen/Qwen3-VL-2B-Instruct).
    """
    from transformers import AutoProcessor, ProcessorMixin
    from transformers.utils import logging

    path = _check_path(path)
    files = ("processor_config.json", "preprocessor_config.json")
    if os.path.isdir(path) and not any(os.path.isfile(os.path.join(path, file)) for file in files):
        raise ValueError(f"{path} has no processor ({' or '.join(files)}): copy these files from the base model.")
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # some classes warn about internals of their own
    try:
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=False)
    except (ImportError, ValueError, OSError) as error:
        if "video" not in str(error).lower():  # the video part wants torchvision or settings of its own
            raise _explain(path, error) from error
        processor = _for_pictures(path)
    finally:
        logging.set_verbosity(level)
    if not isinstance(processor, ProcessorMixin) or not hasattr(processor, "image_processor"):
        raise ValueError(f"{path} has a tokenizer but no picture processor: copy its files from the base model.")
    if not (processor.chat_template or processor.tokenizer.chat_template) and path.endswith("-pt"):
        # Gemma's pretrained models have none: its published recipe takes that of the instruct model beside it
        processor.chat_template = load_processor(path.removesuffix("-pt") + "-it").chat_template
    if not (processor.chat_template or processor.tokenizer.chat_template):
        raise ValueError(f"{path} has no chat template: copy chat_template.jinja from the base or instruct model.")
    if min_pixels or max_pixels:
        size = dict(processor.image_processor.size)
        if not size.get("shortest_edge") or not size.get("longest_edge"):
            raise ValueError(f"{path} prepares pictures of one fixed size: leave min_pixels and max_pixels unset.")
        high = max_pixels or max(size["longest_edge"], min_pixels)
        low = min(min_pixels or size["shortest_edge"], high)
        processor.image_processor.size = type(processor.image_processor.size)(shortest_edge=low, longest_edge=high)
    return processor


def image_token_id(processor) -> int:
    """Return the id of the tokens that stand for the picture's patches in the text."""
    # Gemma-3's processor calls the mark before the picture by this name; its tokenizer knows better
    return getattr(processor.tokenizer, "image_token_id", None) or processor.image_token_id


def nf4_config(compute_dtype: str = "bfloat16", *, storage: str = "uint8"):
    """Configure 4-bit NF4 weights with double quantisation (QLoRA), for a GPU or a CPU."""
    import torch
    from transformers import BitsAndBytesConfig

    how = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    how["bnb_4bit_quant_storage"] = getattr(torch, storage)  # bfloat16 lets ZeRO-3 and FSDP shard the weights
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=getattr(torch, compute_dtype), **how)


def load_base(path, *, dtype="float32", quantization_config=None, device_map=None, **options):
    """Load a base model from a folder or the hub, in evaluation mode.

    Parameters
    ----------
    path : model folder or hub name.
    dtype : "float32", "bfloat16", or "auto" for that of the file.
    quantization_config, device_map, **options : for ``from_pretrained``; see `nf4_config`.

    Raises
    ------
    OSError : in one line: a missing folder, a damaged or missing file, a gated or unknown model, no connection.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText

    path = _check_path(path)
    options |= {"dtype": dtype, "device_map": device_map, "use_safetensors": True, "trust_remote_code": False}
    if quantization_config is not None:  # None would hide that of a model that was saved in 4 bits
        options["quantization_config"] = quantization_config
    try:
        model = AutoModelForImageTextToText.from_pretrained(path, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise _explain(path, error) from error
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes on a CPU: its first evaluation repacks the weights into a form that passes no gradients
            module.support_avx512bf16_for_cpu = False
    return model


def adapter_targets(model, which: str = "language") -> dict:
    """Name the layers that get an adapter, as keyword arguments for ``peft.LoraConfig``.

    Parameters
    ----------
    model : the base model, without adapter.
    which : words of `TARGETS` joined by ``+``, such as "language+merger". The head is never included. Names such as
        "q_proj+v_proj" take of the language layers these only.

    Returns
    -------
    dict : "target_modules", a pattern that matches exactly the chosen Linear layers. Experts, and Gemma-3's merger, are
        bare parameters: "target_parameters" names them, and they need ``lora_dropout=0``.

    Raises
    ------
    ValueError : an unknown word, or one that reaches nothing in this model.

    Examples
    --------
    >>> import torch
    >>> layer = torch.nn.ModuleDict({"self_attn": torch.nn.ModuleDict({"q_proj": torch.nn.Linear(2, 2)})})
    >>> print(adapter_targets(torch.nn.ModuleDict({"layers": torch.nn.ModuleList([layer])}))["target_modules"])
    layers\\.\\d+\\.self_attn\\.(q_proj)
    """
    import torch

    words = [word.strip() for word in which.split("+")]
    named = {word for word in words if word.endswith("_proj")}
    if unknown := [word for word in words if word not in TARGETS.keys() | named]:
        raise ValueError(f"Unknown adapter target {unknown[0]!r}: use {', '.join(TARGETS)}, or several joined by +.")
    reach = {word: TARGETS.get(word, TARGETS["language"]) for word in words}
    parts = set().union(*reach.values())
    leaves: dict[str, set] = {}
    parameters, reached = set(), set()
    for name, module in model.named_modules():
        # SigLIP's pooling head is never called by Gemma-3
        if isinstance(module, torch.nn.Linear) and part_of(name) in parts and "vision_tower.head" not in name:
            parent, _, leaf = name.rpartition(".")
            if named and leaf not in named and part_of(name) in TARGETS["language"]:
                continue
            parent = re.sub(r"(?<=\.)\d+(?=\\\.|$)", r"\\d+", re.escape(parent))
            leaves.setdefault(parent, set()).add(re.escape(leaf))
            reached.add(part_of(name))
    for name, parameter in model.named_parameters():
        part = part_of(name)  # fused experts are 3-D parameters, Gemma-3's merger is a 2-D one
        if part in set(words) - set(map(part_of, leaves)) and parameter.ndim == {"experts": 3, "merger": 2}.get(part):
            parameters.add(".".join(name.split(".")[-3 if part == "experts" else -2 :]))
            reached.add(part)
    if absent := [word for word in words if not reached & reach[word]]:
        raise ValueError(f"This model has no layers for the adapter target {absent[0]!r}.")
    pattern = "|".join(rf"{parent}\.({'|'.join(sorted(names))})" for parent, names in sorted(leaves.items()))
    return {"target_modules": pattern or []} | ({"target_parameters": sorted(parameters)} if parameters else {})


def parameter_groups(model, learning_rate: float, rates: dict[str, float]) -> list[dict]:
    """Group what is trained by learning rate, for ``torch.optim``: `rates` by part (`PARTS`), else `learning_rate`.

    Raises
    ------
    ValueError : a rate for a part in which nothing is trained.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.ModuleDict({"visual": torch.nn.Linear(2, 2), "lm_head": torch.nn.Linear(2, 2)})
    >>> [(group["lr"], len(group["params"])) for group in parameter_groups(model, 1e-4, {"vision": 1e-5})]
    [(1e-05, 2), (0.0001, 2)]
    """
    trained = [(part_of(name), p) for name, p in model.named_parameters() if p.requires_grad]
    if absent := set(rates) - {part for part, _ in trained}:
        raise ValueError(f"A learning rate for {sorted(absent)[0]!r}, but nothing is trained there.")
    groups: dict[float, list] = {}
    for part, parameter in trained:
        groups.setdefault(rates.get(part, learning_rate), []).append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]


def count_parameters(model) -> dict[str, dict[str, int]]:
    """Count trained and frozen parameters by part (`PARTS`), 4-bit weights at their true number.

    Examples
    --------
    >>> import torch
    >>> count_parameters(torch.nn.ModuleDict({"lm_head": torch.nn.Linear(2, 3)}))
    {'head': {'trained': 9, 'frozen': 0}, 'total': {'trained': 9, 'frozen': 0}}
    """
    counts = {part: {"trained": 0, "frozen": 0} for part in [*PARTS, "norms and other", "total"]}
    for name, parameter in model.named_parameters():  # a head tied to the embeddings is counted there
        state = getattr(parameter, "quant_state", None)  # bitsandbytes packs two weights into a byte
        number = state.shape.numel() if state is not None else parameter.numel()
        for part in (part_of(name), "total"):
            counts[part]["trained" if parameter.requires_grad else "frozen"] += number
    return {part: count for part, count in counts.items() if sum(count.values())}


def load_tuned(base, adapter):
    """Put a saved adapter onto a freshly loaded base model; unlike in peft, keys that do not fit are an error.

    Raises
    ------
    FileNotFoundError : no ``adapter_config.json`` or ``adapter_model.safetensors`` in the folder `adapter`.
    ValueError : missing or unexpected keys, or weights of another shape: the adapter belongs to another model.
    """
    from peft import PeftConfig, get_peft_model

    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (Path(adapter) / file).is_file():
            raise FileNotFoundError(f"No adapter in {adapter}: {file} is missing.")
    config = PeftConfig.from_pretrained(adapter)
    config.inference_mode = True
    try:
        model = get_peft_model(base, config)
        result = model.load_adapter(adapter, "default")
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"The adapter {adapter} does not fit this model: {_one_line(error)}") from error
    for kind, keys in (("missing", result.missing_keys), ("unexpected", result.unexpected_keys)):
        if keys:
            raise ValueError(f"The adapter {adapter} does not fit this model: {len(keys)} {kind} keys, as {keys[0]}.")
    return model.eval()


def text_logits(model, batch):
    """Compute the logits (positions, vocabulary) of tokens of text, not padding nor picture: float32, on the CPU."""
    import torch

    text, training = batch["attention_mask"].bool(), model.training
    for key in {"mm_token_type_ids", "token_type_ids"} & batch.keys():  # Qwen-VL's and Gemma's mark of image tokens
        text = text & (batch[key] == 0)
    inputs = {key: value.to(model.device) for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        logits = model.eval()(**inputs).logits[text.to(model.device)].float().cpu()
    model.train(training)
    return logits


def compare_logits(first, second, batch=None) -> dict[str, float]:
    """Compare two models by their `text_logits` for one batch; of a model that has gone, give its logits instead.

    Returns
    -------
    dict : "max_abs_diff" and "mean_abs_diff", "largest_logit" to judge them by, and "argmax_agreement", the share
        (0..1) of "positions" where both find the same next token most likely.
    """
    first, second = (one if hasattr(one, "argmax") else text_logits(one, batch) for one in (first, second))
    difference, same = (first - second).abs(), (first.argmax(-1) == second.argmax(-1)).float()
    found = {"max_abs_diff": difference.max(), "mean_abs_diff": difference.mean(), "largest_logit": first.abs().max()}
    found |= {"argmax_agreement": same.mean()}
    return {key: value.item() for key, value in found.items()} | {"positions": len(difference)}


def model_card(base: str, *, data: str, settings: dict, metrics: dict | None = None, limits: str | None = None) -> str:
    """Write the text of a model's README.md: base, data, settings, scores if there are any, limits.

    Examples
    --------
    >>> "| lora_r | 8 |" in model_card("Qwen/Qwen3-VL-2B-Instruct", data="60 X-rays", settings={"lora_r": 8})
    True
    """

    def table(head, values):
        shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in values.items()}
        return "\n".join([f"| {head} | |", "|---|---|", *(f"| {key} | {value} |" for key, value in shown.items())])

    scores = table("score on held-out pairs", metrics) if metrics else "None were recorded when this was saved."
    limits = limits or (
        "Made with a tutorial; no medical device, not validated on patients. An answer that reads well can be wrong. "
        "Compare scores only on the same held-out set, and beside the scores of answers to the wrong picture."
    )
    sections = {"Data": data, "Settings": table("setting", settings), "Scores": scores, "Limits": limits}
    return (
        f"---\nbase_model: {base}\npipeline_tag: image-text-to-text\ntags: [medical, medtune]\n---\n"
        f"# Fine-tuned from {base}\n\nMade with medtune. The licences of the base model and of the data apply.\n"
        + "".join(f"\n## {title}\n\n{text}\n" for title, text in sections.items())
    )


def save_model(model, processor, out, *, card: str, max_shard_size: str = "2GB") -> list[str]:
    """Save a model or adapter with processor, chat template and `card` (see `model_card`): all of it or nothing.

    Parameters
    ----------
    model, processor : a plain model or one with an adapter (then the adapter is saved), and its processor.
    out : folder; a model already there is replaced once the new one is complete.

    Returns
    -------
    list of str : names of the files written.

    Raises
    ------
    ValueError : `out` holds something else than a model.
    OSError : the disk is full or cannot be written.
    """
    out = Path(out)
    partial, old = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.old")
    if out.exists() and not any((out / file).exists() for file in ("config.json", "adapter_config.json")):
        raise ValueError(f"{out} exists and is no model folder: choose another folder.")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        model.save_pretrained(partial, max_shard_size=max_shard_size)
        processor.save_pretrained(partial)
        (partial / "README.md").write_text(card, encoding="utf-8")
        shutil.rmtree(old, ignore_errors=True)
        if out.exists():
            os.replace(out, old)
        os.replace(partial, out)
    except Exception as error:  # safetensors reports a full disk with a class of its own
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"Could not save {out}, nothing was written (disk full?): {_one_line(error)}") from error
    shutil.rmtree(old, ignore_errors=True)
    return sorted(file.name for file in out.iterdir())
