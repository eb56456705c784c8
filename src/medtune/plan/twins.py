"""Shape twins: models of a published shape with random weights, to try a machine beforehand.

A twin takes the memory and the time of its model. What it says has no sense.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

import bitsandbytes
import tokenizers
import torch
from huggingface_hub import try_to_load_from_cache
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from transformers.quantizers import AutoHfQuantizer

from medtune.files import write_json
from medtune.models import load_processor, save_model

from .shapes import FACTS, family_facts, model_facts

# Tokens that end an answer, in the families where the end of the text is another token.
ENDS_OF_TURN = ["<end_of_turn>", "<|im_end|>", "<turn|>"]


def twin_config(name: str, *, scale: str = "full") -> PreTrainedConfig:
    """Build the configuration of a model's published shape, or of a tiny one of its family.

    Parameters
    ----------
    name : a hub name of `model_names`.
    scale : "full", or "tiny" for tests: two layers of 64 numbers, experts that are not square.

    Raises
    ------
    ValueError : an unknown name or scale.

    Examples
    --------
    >>> twin_config("Qwen/Qwen3-VL-2B-Instruct", scale="tiny").text_config.hidden_size
    64
    """
    if scale not in ("full", "tiny"):
        raise ValueError(f"scale must be full or tiny, not {scale!r}.")
    config = dict(model_facts(name)["config"])
    if scale == "tiny":
        for key, value in family_facts(name)["tiny_config"].items():
            # of a part of the model only the named sizes change
            config[key] = {**config[key], **value} if isinstance(value, dict) else value
    return AutoConfig.for_model(**config)


def save_processor(
    name: str,
    out: str | PathLike,
    *,
    scale: str = "full",
    tokenizer: str | PathLike | None = None,
) -> ProcessorMixin:
    """Save the processor of a twin in a folder and load it.

    It is the published one if the hub cache has that. Otherwise it is a stand-in with the same
    special tokens, the chat template in short form, and the same preparation of pictures.

    Parameters
    ----------
    name : a hub name of `model_names`.
    out : folder to write.
    scale : "full", or "tiny" for tests: a stand-in with small pictures in any case.
    tokenizer : a `tokenizer.json` to use for a stand-in, or None to train a small one on a few
        sentences.

    Returns
    -------
    ProcessorMixin : the processor, as `medtune.models.load_processor` gives it.

    Raises
    ------
    ValueError : an unknown name.
    """
    full_name = model_facts(name)["name"]
    family = family_facts(name)
    out = Path(out)

    cached = try_to_load_from_cache(full_name, "preprocessor_config.json")
    # of a file that the hub is known not to have, the cache gives an object of its own
    if scale == "full" and isinstance(cached, str):
        load_processor(Path(cached).parent).save_pretrained(out)
        return load_processor(out)

    if tokenizer:
        words = tokenizers.Tokenizer.from_file(os.fspath(tokenizer))
    else:
        words = _train_tokenizer(family["tokens"])
    words.add_special_tokens(family["tokens"])
    stand_in = PreTrainedTokenizerFast(
        tokenizer_object=words,
        chat_template=family["template"],
        extra_special_tokens=family["extra"],
        padding_side="left",
        **family["named"],
    )
    stand_in.save_pretrained(out)
    settings = family["tiny_processor"] if scale == "tiny" else family["processor"]
    write_json(out / "processor_config.json", settings)
    return load_processor(out)


def _train_tokenizer(special_tokens: list[str]) -> tokenizers.Tokenizer:
    """Train a small tokenizer of bytes on a few sentences; it can write any text."""
    words = tokenizers.Tokenizer(BPE())
    words.pre_tokenizer = ByteLevel(add_prefix_space=False)
    words.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=2000, initial_alphabet=ByteLevel.alphabet(), special_tokens=special_tokens
    )
    words.train_from_iterator([FACTS["text"]] * 2, trainer)
    return words


def build_twin(  # noqa: PLR0913 (each is a choice of its own)
    name: str,
    processor: ProcessorMixin,
    *,
    scale: str = "full",
    dtype: str = "bfloat16",
    device: str | torch.device = "cpu",
    quantization_config: BitsAndBytesConfig | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """Build a model of the published shape with random weights, in evaluation mode.

    Parameters
    ----------
    name : a hub name of `model_names`.
    processor : from `save_processor`; the configuration takes its token ids.
    scale : "full" for the published shape, "tiny" for tests.
    dtype : name of the torch type of the weights.
    device : where the weights are made, without a detour over the memory of the CPU.
    quantization_config : such as `medtune.models.nf4_config`; what bitsandbytes would pack on
        loading is packed here.
    seed : of the random weights; it seeds torch as a whole.

    Raises
    ------
    ValueError : an unknown name or scale.
    """
    config = twin_config(name, scale=scale)
    _take_token_ids(config, name, processor.tokenizer, scale)
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    _wake_zero_weights(model)
    _end_answers_at(model, processor.tokenizer)
    if quantization_config:
        _pack_in_4bit(model, quantization_config)
    return model.eval()


def _take_token_ids(
    config: PreTrainedConfig, name: str, tokenizer: PreTrainedTokenizerFast, scale: str
) -> None:
    """Write the ids of a tokenizer's special tokens, and its size, into the configuration."""
    for key, token in family_facts(name)["config"].items():
        setattr(config, key, tokenizer.convert_tokens_to_ids(token))
    text = config.get_text_config()
    if scale == "tiny":
        text.vocab_size = len(tokenizer)
    else:
        # published embeddings have more rows than there are tokens
        text.vocab_size = max(text.vocab_size, len(tokenizer))
    if hasattr(text, "vocab_size_per_layer_input"):
        # Gemma-4 has a second embedding of each token
        text.vocab_size_per_layer_input = text.vocab_size
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, key, getattr(tokenizer, key))


def _wake_zero_weights(model: PreTrainedModel) -> None:
    """Give random numbers to matrices that start at zero."""
    # Gemma-3's merger is one: no gradient would reach the vision tower through it
    for weight in model.parameters():
        if weight.ndim > 1 and not weight.any():
            torch.nn.init.normal_(weight, std=0.02)


def _end_answers_at(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Let an answer end where the text or the turn ends."""
    ends = {tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(ENDS_OF_TURN)}
    # what a tokenizer does not know comes as None or as its unknown token
    model.generation_config.eos_token_id = sorted(ends - {None, tokenizer.unk_token_id})
    model.generation_config.pad_token_id = tokenizer.pad_token_id


@contextmanager
def head_of_its_own(model: PreTrainedModel) -> Iterator[None]:
    """Give a model's head weights of its own for a moment, as it has while it is loaded.

    Then, before weights are tied, bitsandbytes decides which layers to leave as they are: among
    them the last, which is the head. Once it is tied, another layer is the last.
    """
    head = model.get_output_embeddings()
    tied = head.weight
    head.weight = torch.nn.Parameter(torch.empty_like(tied, device="meta"), requires_grad=False)
    try:
        yield
    finally:
        head.weight = tied


def _pack_in_4bit(model: PreTrainedModel, quantization_config: BitsAndBytesConfig) -> None:
    """Quantise the Linear layers of a model in memory, as `from_pretrained` does on loading."""
    originals = {}
    for name, module in model.named_modules():
        # exactly this class: what derives from it is not packed on loading either
        if type(module) is torch.nn.Linear:
            originals[name] = module
    quantizer = AutoHfQuantizer.from_config(quantization_config, pre_quantized=False)
    # puts 4-bit layers without content in the place of the Linear layers that are to be packed
    with head_of_its_own(model):
        quantizer.preprocess_model(model=model, device_map=None, dtype=model.dtype)
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            # taken out one after the other, so that the card never holds both forms of all layers
            original = originals.pop(name)
            packed = bitsandbytes.nn.Params4bit(
                original.weight.data, requires_grad=False, **module.weight.__dict__
            )
            # the move to the device is what packs
            module.weight = packed.to(original.weight.device)
            module.bias = original.bias
            # as in `medtune.models.load_base`: with AVX512-BF16 on a CPU, an evaluation would
            # repack the weights into a form that passes no gradients, and fail on a tiny twin
            module.support_avx512bf16_for_cpu = False
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer


def make_twin(
    name: str,
    out: str | PathLike,
    *,
    scale: str = "full",
    tokenizer: str | PathLike | None = None,
    **options,
) -> Path:
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

    Examples
    --------
    >>> make_twin("someone/else", "twin")
    Traceback (most recent call last):
    ValueError: The shape of someone/else is not known here; known are ...
    """
    full_name = model_facts(name)["name"]
    card = f"# A {scale} shape twin of {full_name}\n\nIts weights are random: it knows nothing.\n"
    with tempfile.TemporaryDirectory() as scratch:
        processor = save_processor(name, scratch, scale=scale, tokenizer=tokenizer)
        model = build_twin(name, processor, scale=scale, **options)
        save_model(model, processor, out, card=card, max_shard_size="5GB")
    return Path(out)
