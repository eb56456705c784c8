"""Load a processor, a base model (also in 4 bits) and a saved adapter.

An error says in one line what to do. Nothing here runs code that came with a model
(`trust_remote_code` stays off), and only safetensors are read.
"""

import inspect
import os
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import errors as hub_errors
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import cached_file, logging
from transformers.video_processing_utils import BaseVideoProcessor

from medtune.files import one_line
from medtune.modelscope import fetch_model, is_modelscope_name

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def _tokenize_alone() -> None:
    """Let a process that was forked use no threads of the tokenizer.

    It inherits their locks, but not the threads: with TOKENIZERS_PARALLELISM=true the processes
    that prepare batches would wait for them for ever, and the training for the processes. Where the
    variable is not set, the tokenizer does so itself.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


# Whoever forks: a DataLoader of any trainer, also one that a notebook builds. Windows cannot fork.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_tokenize_alone)

# Put before a chat template, it is what the template asks for where nobody says anything else.
NO_THINKING = "{%- set enable_thinking = enable_thinking | default(false) %}"


def load_processor(
    path: str | PathLike, *, min_pixels: int | None = None, max_pixels: int | None = None
) -> ProcessorMixin:
    """Load the processor of a model: tokenizer, picture preparation and chat template.

    Parameters
    ----------
    path : model or adapter folder, hub name, or `modelscope:OWNER/NAME`. Without torchvision, Qwen
        processors are loaded for pictures only.
    min_pixels, max_pixels : bounds for the number of pixels of the resized picture, and so for its
        image tokens (one for 32 x 32 pixels in Qwen3-VL).

    Returns
    -------
    ProcessorMixin : the processor, with a chat template. One that has the model think before it
        answers is switched to answer at once, as medtune trains it.

    Raises
    ------
    OSError : no such folder or hub model, a gated model, no connection.
    ValueError : no processor or chat template in the folder; pixel bounds where pictures have one
        fixed size.

    Examples
    --------
    >>> load_processor("./no-folder")
    Traceback (most recent call last):
    FileNotFoundError: No model folder ./no-folder: give a folder or a hub name (...).
    """
    path = _check_path(path)
    _check_processor_files(path)
    processor = _read_processor(path)
    if not isinstance(processor, ProcessorMixin) or not hasattr(processor, "image_processor"):
        raise ValueError(
            f"{path} has a tokenizer but no picture processor: copy its files from the base model."
        )
    _ensure_chat_template(processor, path)
    _leave_out_thinking(processor)
    if min_pixels or max_pixels:
        _bound_pixels(processor, path, min_pixels, max_pixels)
    return processor


def _check_path(path: str | PathLike) -> str:
    """Give the path of a model folder or a hub name, after a look whether there is such a model."""
    path = os.path.expanduser(os.fspath(path))
    if is_modelscope_name(path):
        return fetch_model(path)
    if os.path.isdir(path):
        return path
    if path.startswith((".", os.sep)) or path.count("/") != 1:
        raise FileNotFoundError(
            f"No model folder {path}: give a folder or a hub name (Qwen/Qwen3-VL-2B-Instruct)."
        )
    # one small file first: without a connection each file costs half a minute of retries
    try:
        cached_file(path, "config.json")
    except OSError as error:
        raise _explain(path, error) from error
    return path


def _explain(path: str, error: Exception) -> OSError:
    """Turn a loading error into one line that says what to do."""
    login = "`hf auth login` (or set HF_TOKEN)"
    if _is_caused_by(error, hub_errors.GatedRepoError):
        return OSError(
            f"{path} is gated: accept its licence on https://huggingface.co/{path}, "
            f"then run {login}."
        )
    if _is_caused_by(error, hub_errors.RepositoryNotFoundError):
        return OSError(
            f"The hub shows no model {path}: check the spelling; for a private model run {login}."
        )
    offline = (hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled)
    if _is_caused_by(error, offline):
        return OSError(
            f"{path} is neither a folder nor in the hub cache "
            "and the hub is out of reach (offline?)."
        )
    return OSError(f"{path} cannot be loaded: {one_line(error)}")


def _is_caused_by(error: BaseException, kinds: type | tuple[type, ...]) -> bool:
    """Say whether an error, or one that it was raised from, is of one of these classes."""
    # Transformers puts a general OSError around what the hub's client says
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, kinds):
            return True
        link = link.__cause__
    return False


def _check_processor_files(path: str) -> None:
    """Refuse a folder without the files of a processor."""
    # of a model of the hub it shows when the processor is read
    if not os.path.isdir(path):
        return
    if not any(os.path.isfile(os.path.join(path, file)) for file in PROCESSOR_FILES):
        raise ValueError(
            f"{path} has no processor ({' or '.join(PROCESSOR_FILES)}): "
            "copy these files from the base model."
        )


def _read_processor(path: str) -> ProcessorMixin:
    """Read a processor; one that cannot have its video part here is read for pictures only."""
    level = logging.get_verbosity()
    # some classes warn about internals of their own
    logging.set_verbosity_error()
    try:
        return AutoProcessor.from_pretrained(path, trust_remote_code=False)
    except (ImportError, ValueError, OSError) as error:
        # the video part wants torchvision, or settings of its own
        if "video" not in str(error).lower():
            raise _explain(path, error) from error
        return _read_processor_for_pictures(path)
    finally:
        logging.set_verbosity(level)


def _read_processor_for_pictures(path: str) -> ProcessorMixin:
    """Read a processor that insists on video, and so on torchvision, for pictures only."""
    full = _processor_class(path)
    left_out = _video_settings(path) | _audio_settings(path)
    parameters = inspect.signature(full.__init__).parameters

    def init(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        # Gemma-4's wants to be told that there is neither sound nor video
        others = {"feature_extractor": None, "video_processor": None} | kwargs
        others = {name: value for name, value in others.items() if name in parameters}
        full.__init__(
            self,
            image_processor=image_processor,
            tokenizer=tokenizer,
            chat_template=chat_template,
            **others,
        )

    def to_dict(self):
        return full.to_dict(self) | left_out

    # The name of the class and the settings of what is left out stay, so that a saved copy loads
    # as the full class where torchvision is installed.
    bases = (full, _PicturesOnly)
    for_pictures = type(full.__name__, bases, {"__init__": init, "to_dict": to_dict})
    return for_pictures.from_pretrained(path)


class _PicturesOnly(ProcessorMixin):
    """What a processor for pictures only inherits from in the place of `ProcessorMixin`."""

    def __init__(self, *parts, feature_extractor=None, video_processor=None, **options):
        # the base refuses a part that the class is not loaded with, even where it is None
        super().__init__(*parts, **options)


def _processor_class(path: str) -> type[ProcessorMixin]:
    """Find the class of a processor; older folders name only the type of model."""
    try:
        settings, _ = ProcessorMixin.get_processor_dict(path)
        return getattr(transformers, settings["processor_class"])
    except (OSError, KeyError):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        return PROCESSOR_MAPPING[type(config)]


def _video_settings(path: str) -> dict:
    """Read the settings of the video part, if there are any, as an entry of the processor's."""
    try:
        settings, _ = BaseVideoProcessor.get_video_processor_dict(path)
    except OSError:
        return {}
    return {"video_processor": settings}


def _audio_settings(path: str) -> dict:
    """Read the settings of the audio part, if there is one, as an entry of the processor's."""
    try:
        settings, _ = ProcessorMixin.get_processor_dict(path)
    except OSError:
        return {}
    if "feature_extractor" not in settings:
        return {}
    return {"feature_extractor": settings["feature_extractor"]}


def _ensure_chat_template(processor: ProcessorMixin, path: str) -> None:
    """Refuse a processor without a chat template, but find the one of a pretrained Gemma."""

    def has_template() -> bool:
        return bool(processor.chat_template or processor.tokenizer.chat_template)

    # Gemma's pretrained models have none: the published recipe takes that of the instruct model
    # beside it
    if not has_template() and path.endswith("-pt"):
        instruct = load_processor(path.removesuffix("-pt") + "-it")
        processor.chat_template = instruct.chat_template
    if not has_template():
        raise ValueError(
            f"{path} has no chat template: "
            "copy chat_template.jinja from the base or instruct model."
        )


def _leave_out_thinking(processor: ProcessorMixin) -> None:
    """Let answers begin at once where a chat template would have the model think before them.

    The larger Qwen3.5 do: the prompt ends with an open `<think>`. A caption has no thoughts, so the
    model would learn to close it, and each of its answers would begin with `</think>`. The template
    has a switch, which is off in the smaller ones; here it is off in all.
    """
    if not isinstance(processor.chat_template, str):
        return
    question = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
    prompt = processor.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    if prompt.rstrip().endswith("<think>"):
        processor.chat_template = NO_THINKING + processor.chat_template


def _bound_pixels(
    processor: ProcessorMixin, path: str, min_pixels: int | None, max_pixels: int | None
) -> None:
    """Set the bounds between which the processor brings the number of pixels of a picture."""
    # Qwen-VL calls these numbers of pixels by the names of edges
    size = processor.image_processor.size
    bounds = dict(size)
    if not bounds.get("shortest_edge") or not bounds.get("longest_edge"):
        raise ValueError(
            f"{path} prepares pictures of one fixed size: leave min_pixels and max_pixels unset."
        )
    # a bound that is given wins over one that is not
    high = max_pixels or max(bounds["longest_edge"], min_pixels)
    low = min(min_pixels or bounds["shortest_edge"], high)
    processor.image_processor.size = type(size)(shortest_edge=low, longest_edge=high)


def check_dtype(dtype: str) -> None:
    """Refuse a type that models are not loaded in here, or that the GPU only imitates.

    A GPU before Ampere computes bfloat16 in float32 and converts to and fro, which is slow; torch
    calls that supported. A CPU may be slow too, but there is nothing else to take.

    Parameters
    ----------
    dtype : "float32" or "bfloat16".

    Raises
    ------
    ValueError : it is neither, or bfloat16 on a GPU that has none.

    Examples
    --------
    >>> check_dtype("float16")
    Traceback (most recent call last):
    ValueError: dtype must be float32 or bfloat16, not 'float16'
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be float32 or bfloat16, not {dtype!r}")
    on_gpu = dtype == "bfloat16" and torch.cuda.is_available()
    if on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name()
        raise ValueError(f"{name} has no bfloat16: set dtype=float32, or take a newer GPU")


def end_tokens(model: PreTrainedModel, processor: ProcessorMixin) -> list[int]:
    """Return the ids of the tokens that end an answer: the model's own, and the end of a turn.

    What the chat template puts right behind an answer is learned in training. Gemma's pretrained
    models do not know theirs: their own end is that of a document, so an answer would go on to the
    last token allowed.

    Parameters
    ----------
    model : from `load_base` or `load_tuned`.
    processor : from `load_processor`.

    Returns
    -------
    list of int : in ascending order.
    """
    own = model.generation_config.eos_token_id
    if own is None:
        own = processor.tokenizer.eos_token_id
    ids = set(own) if isinstance(own, list) else {own}
    return sorted(ids | _turn_end(processor))


def _turn_end(processor: ProcessorMixin) -> set[int]:
    """Return the special token behind an answer, or none where the template has nothing there."""
    answer = "The answer."
    messages = []
    for role, text in (("user", "The question?"), ("assistant", answer)):
        messages.append({"role": role, "content": [{"type": "text", "text": text}]})
    rendered = processor.apply_chat_template(messages, tokenize=False)
    behind = rendered.rpartition(answer)[2]
    ids = processor.tokenizer(behind, add_special_tokens=False)["input_ids"]
    known = processor.tokenizer.added_tokens_decoder
    if not ids or ids[0] not in known or not known[ids[0]].special:
        return set()
    return {ids[0]}


def image_token_id(processor: ProcessorMixin) -> int:
    """Return the id of the tokens that stand for the picture's patches in the text.

    Parameters
    ----------
    processor : from `load_processor`.
    """
    # Gemma-3's processor calls the mark before the picture by this name; its tokenizer knows better
    return getattr(processor.tokenizer, "image_token_id", None) or processor.image_token_id


def nf4_config(compute_dtype: str = "bfloat16", *, storage: str = "uint8") -> BitsAndBytesConfig:
    """Configure 4-bit NF4 weights with double quantisation (QLoRA), for a GPU or a CPU.

    Parameters
    ----------
    compute_dtype : name of the torch type in which layers compute.
    storage : name of the torch type that holds the packed weights; "bfloat16" lets ZeRO-3 and FSDP
        shard them.

    Examples
    --------
    >>> nf4_config("float32").bnb_4bit_quant_type
    'nf4'
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, compute_dtype),
        bnb_4bit_quant_storage=getattr(torch, storage),
    )


def load_base(
    path: str | PathLike,
    *,
    dtype: str = "float32",
    quantization_config: BitsAndBytesConfig | None = None,
    device_map=None,
    **options,
) -> PreTrainedModel:
    """Load a base model from a folder or the hub, in evaluation mode.

    Parameters
    ----------
    path : model folder, hub name, or `modelscope:OWNER/NAME`.
    dtype : "float32", "bfloat16", or "auto" for that of the file.
    quantization_config, device_map, **options : for `from_pretrained`; see `nf4_config`.

    Returns
    -------
    PreTrainedModel : the model, of the class that its configuration names.

    Raises
    ------
    OSError : in one line: a missing folder, a damaged or missing file, a gated or unknown model, no
        connection, too little memory.

    Examples
    --------
    >>> load_base("./no-folder")
    Traceback (most recent call last):
    FileNotFoundError: No model folder ./no-folder: give a folder or a hub name (...).
    """
    name = os.fspath(path)
    path = _check_path(path)
    options["dtype"] = dtype
    options["device_map"] = device_map
    options["use_safetensors"] = True
    options["trust_remote_code"] = False
    # None would hide the configuration of a model that was saved in 4 bits
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    try:
        model = AutoModelForImageTextToText.from_pretrained(path, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise _explain(path, error) from error
    except (MemoryError, RuntimeError) as error:
        # torch has no class of its own for what the system says
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise OSError(
                f"{path} does not fit into memory here: `medtune plan` says what it takes "
                f"({one_line(error)})"
            ) from error
        raise
    _keep_gradients_of_4bit_layers(model)
    if is_modelscope_name(name):
        # an adapter notes its base by this name, and a cache is a folder of one machine
        model.name_or_path = name
    return model


def _keep_gradients_of_4bit_layers(model: PreTrainedModel) -> None:
    """Switch off what bitsandbytes does on a CPU with AVX512-BF16.

    There its first evaluation repacks the weights into a form that passes no gradients.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def load_tuned(
    base: PreTrainedModel, adapter: str | PathLike, *, trainable: bool = False, **options: Any
) -> PeftModel:
    """Put a saved adapter onto a freshly loaded base model, in evaluation mode.

    Unlike in peft, keys that do not fit are an error: peft only warns, and answers come from the
    base model.

    Parameters
    ----------
    base : from `load_base`; it is changed.
    adapter : folder of the adapter.
    trainable : whether the adapter is to be trained further.
    **options : further keywords for peft, such as `autocast_adapter_dtype`.

    Returns
    -------
    PeftModel : the base model with its adapter.

    Raises
    ------
    FileNotFoundError : no `adapter_config.json` or `adapter_model.safetensors` in the folder
        `adapter`.
    ValueError : missing or unexpected keys, or weights of another shape: the adapter belongs to
        another model.

    Examples
    --------
    >>> load_tuned(None, "no-folder")
    Traceback (most recent call last):
    FileNotFoundError: No adapter in no-folder: adapter_config.json is missing.
    """
    for file in ADAPTER_FILES:
        if not (Path(adapter) / file).is_file():
            raise FileNotFoundError(f"No adapter in {adapter}: {file} is missing.")
    misfit = f"The adapter {adapter} does not fit this model"
    config = PeftConfig.from_pretrained(adapter)
    config.inference_mode = not trainable
    try:
        model = get_peft_model(base, config, **options)
        result = model.load_adapter(adapter, "default", is_trainable=trainable, **options)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{misfit}: {one_line(error)}") from error
    for kind, keys in (("missing", result.missing_keys), ("unexpected", result.unexpected_keys)):
        if keys:
            raise ValueError(f"{misfit}: {len(keys)} {kind} keys, as {keys[0]}.")
    return model.eval()
