"""Write a merged model as the two GGUF files of llama.cpp, with what they do not say themselves.

The converter is llama.cpp's own. Two things it does not know are seen to here: a patch kernel for
one picture instead of two frames, and the pre-tokenizer of a vocabulary that it never met.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from medtune.files import one_line, write_json
from medtune.models import load_processor

from .engine import Engine
from .exported import ABOUT, PICTURE_MARK, Exported, digest_of_file
from .pictures import Preparation

#: What the converter can write the text part in.
TYPES = ("f32", "f16", "bf16", "q8_0")
# Most tokens of a conversation, where the model could take more: their memory is taken at the start.
MOST_CONTEXT = 8192
# How llama.cpp calls the rule by which a tokenizer cuts text into words, by its regular expression.
PRE_TOKENIZERS = {
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| "
    "?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+": "qwen2",
}
# The weight that turns patches of a picture into tokens, in Qwen-VL: (out, colours, frames, y, x).
PATCH_WEIGHT = "patch_embed.proj.weight"


def export_gguf(
    model: str | os.PathLike,
    out: str | os.PathLike,
    types: Sequence[str] = ("f16", "q8_0"),
    *,
    question: str | None = None,
    name: str | None = None,
) -> Exported:
    """Export a merged model for llama.cpp: all of it or nothing.

    Parameters
    ----------
    model : folder of a merged model, as notebook 06 saves it, with its processor.
    out : folder to write; an export that is there is replaced once the new one is complete.
    types : of the text part, a file each: "f32", "f16", "bf16" or "q8_0". The vision part is small
        and stays in f16.
    question : what the model was asked in training; a server asks it where a client shows a picture
        without a word.
    name : what a server calls the model; by default the name of `out`.

    Returns
    -------
    Exported : what was written. It is not proven yet: see `check_export`.

    Raises
    ------
    ValueError : an adapter, a model in 4 bits, a family that has no converter, a tokenizer or a
        preparation of pictures that llama.cpp does not know, an unknown type, or `out` holds
        something else.
    ImportError : the extra `gguf` is not installed.
    OSError : no such folder, or the disk is full or cannot be written.

    Examples
    --------
    >>> export_gguf("no-folder", "export")
    Traceback (most recent call last):
    FileNotFoundError: No model folder no-folder: ...
    """
    model = Path(model)
    out = Path(out)
    types = list(dict.fromkeys(types))
    config = _check_model(model)
    _check_types(types)
    if out.exists() and not (out / ABOUT).exists():
        raise ValueError(f"{out} exists and is no exported model: choose another folder.")
    processor = load_processor(model)
    preparation = Preparation.of(processor.image_processor)
    _import_converter()
    # a hidden folder beside the wanted one is on the same disk, so a rename puts it in its place
    partial = out.with_name(f".{out.name}.partial")
    replaced = out.with_name(f".{out.name}.old")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        source = _with_two_frames(model, config, partial / "source")
        files = {type: f"model-{type}.gguf" for type in types}
        mmproj = "mmproj-f16.gguf"
        _convert(source, partial / mmproj, "f16", vision=True)
        for type, file in files.items():
            _convert(source, partial / file, type, vision=False)
        shutil.rmtree(partial / "source", ignore_errors=True)
        export = Exported(
            folder=out,
            name=name or out.name,
            family=config["model_type"],
            files=files,
            mmproj=mmproj,
            preparation=preparation,
            question=question,
            context=min(_longest(config), MOST_CONTEXT),
            marks=(*_marks(processor.tokenizer), PICTURE_MARK),
            normalization=_normalization(processor.tokenizer),
            digests={file.name: digest_of_file(file) for file in sorted(partial.glob("*.gguf"))},
        )
        template = processor.chat_template or processor.tokenizer.chat_template
        (partial / "chat_template.jinja").write_text(template, "utf-8")
        _write_card(model, export, partial)
        write_json(partial / ABOUT, export.to_dict())
        # what llama.cpp cannot load is no export
        for type in types:
            Engine(replace(export, folder=partial), type).close()
        shutil.rmtree(replaced, ignore_errors=True)
        if out.exists():
            os.replace(out, replaced)
        os.replace(partial, out)
    except OSError as error:
        raise OSError(
            f"Could not export to {out}, nothing was written: {one_line(error)}"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
    return export


def _check_model(model: Path) -> dict[str, Any]:
    """Read the configuration of a model that can be converted."""
    if not model.is_dir():
        raise FileNotFoundError(f"No model folder {model}: give the folder of a merged model.")
    if not (model / "config.json").is_file():
        what = "an adapter" if (model / "adapter_config.json").is_file() else "no model"
        raise ValueError(f"{model} is {what}: merge it first, as notebook 06 does")
    config = json.loads((model / "config.json").read_text("utf-8"))
    if "quantization_config" in config:
        raise ValueError(f"{model} is stored in 4 or 8 bits: merge onto the full weights (06)")
    return config


def _check_types(types: Sequence[str]) -> None:
    unknown = [type for type in types if type not in TYPES]
    if unknown or not types:
        raise ValueError(f"types={unknown}: one or more of {', '.join(TYPES)}")


def _import_converter() -> None:
    """Say in one line what is missing."""
    try:
        import conversion  # noqa: F401 - an extra: the rest of the package does not need it
        import gguf  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"the export needs llama.cpp's converter: pip install 'medtune[gguf]' ({error})"
        ) from error


def _with_two_frames(model: Path, config: dict[str, Any], source: Path) -> Path:
    """Give a folder that the converter understands: the model, or a copy with another kernel.

    llama.cpp wants the kernel of Qwen-VL, which covers two frames of a video; a picture counts as
    two equal frames. A kernel of one frame W gives the same as one of two frames with W/2 each.
    """
    vision = config.get("vision_config", {})
    if vision.get("temporal_patch_size") != 1:
        return model
    source.mkdir()
    for file in model.iterdir():
        target = source / file.name
        if file.suffix == ".safetensors":
            _copy_weights(file, target)
        elif file.name == "config.json":
            two_frames = {**config, "vision_config": {**vision, "temporal_patch_size": 2}}
            write_json(target, two_frames)
        else:
            target.symlink_to(file.resolve())
    return source


def _copy_weights(file: Path, target: Path) -> None:
    """Copy a file of weights with the patch kernel in two halves, or link one without it."""
    with safe_open(file, "pt") as weights:
        names = list(weights.keys())
        if not any(name.endswith(PATCH_WEIGHT) for name in names):
            target.symlink_to(file.resolve())
            return
        tensors = {name: weights.get_tensor(name) for name in names}
    for name in names:
        if name.endswith(PATCH_WEIGHT):
            half = tensors[name] / 2
            tensors[name] = torch.cat([half, half], dim=2).contiguous()
    save_file(tensors, target, metadata={"format": "pt"})


def _convert(source: Path, target: Path, type: str, *, vision: bool) -> None:
    """Run the converter for one file."""
    import gguf
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class

    part = ModelType.MMPROJ if vision else ModelType.TEXT
    settings = ModelBase.load_hparams(source, False)
    architecture = get_model_architecture(settings, part)
    with _only_errors():
        try:
            converter = get_model_class(architecture, mmproj=vision)
        except NotImplementedError:
            raise ValueError(f"llama.cpp has no converter for {architecture}") from None
        file_type = {
            "f32": gguf.LlamaFileType.ALL_F32,
            "f16": gguf.LlamaFileType.MOSTLY_F16,
            "bf16": gguf.LlamaFileType.MOSTLY_BF16,
            "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
        }[type]
        try:
            with torch.inference_mode():
                _knowing_our_models(converter)(source, file_type, target).write()
        except OSError:
            raise
        except Exception as error:  # the converter has no class of its own for what it refuses
            raise ValueError(
                f"llama.cpp's converter refuses {architecture}: {one_line(error)}"
            ) from error


def _knowing_our_models(converter: type) -> type:
    """Give a converter that knows two things of models which Transformers 5 has saved.

    llama.cpp knows a tokenizer by the tokens that it makes of one text. A vocabulary that was
    trained anew makes others, but the rule by which words are cut may still be a known one. And
    Transformers 5 saves experts with the outputs before the inputs, the published files the other
    way round.
    """

    def get_vocab_base_pre(self: Any, tokenizer: Any) -> str:
        try:
            return converter.get_vocab_base_pre(self, tokenizer)
        except NotImplementedError:
            rule = _splitting_rule(tokenizer)
            if rule not in PRE_TOKENIZERS:
                raise ValueError("llama.cpp does not know how this tokenizer cuts words") from None
            return PRE_TOKENIZERS[rule]

    def modify_tensors(self: Any, data_torch: torch.Tensor, name: str, bid: int | None) -> Any:
        text = self.hparams.get("text_config", self.hparams)
        if _outputs_come_first(name, tuple(data_torch.shape), text):
            data_torch = data_torch.permute(0, 2, 1)
        return converter.modify_tensors(self, data_torch, name, bid)

    methods: dict[str, Any] = {"get_vocab_base_pre": get_vocab_base_pre}
    methods["modify_tensors"] = modify_tensors
    methods["model_arch"] = converter.model_arch
    return type(converter.__name__, (converter,), methods)


def _outputs_come_first(name: str, shape: tuple[int, ...], text: dict[str, Any]) -> bool:
    """Tell whether a tensor holds experts in the order in which Transformers 5 saves them.

    >>> text = {"hidden_size": 64, "moe_intermediate_size": 40}
    >>> _outputs_come_first("layers.0.mlp.experts.gate_up_proj", (4, 80, 64), text)
    True
    """
    width, inner = text.get("hidden_size"), text.get("moe_intermediate_size")
    wanted = {"mlp.experts.gate_up_proj": (width, inner and 2 * inner)}
    wanted["mlp.experts.down_proj"] = (inner, width)
    for ending, (first, second) in wanted.items():
        if name.removesuffix(".weight").endswith(ending) and len(shape) == 3:
            if first == second:
                raise ValueError(f"{name} is square: its order cannot be told")
            return shape[1:] == (second, first)
    return False


def _splitting_rule(tokenizer: Any) -> str | None:
    """Find the regular expression of a tokenizer that cuts by one and then goes byte by byte."""
    settings = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {}
    steps = settings.get("pretokenizers", [settings])
    kinds = [step.get("type") for step in steps]
    if kinds != ["Split", "ByteLevel"] or steps[1].get("use_regex"):
        return None
    return steps[0]["pattern"].get("Regex")


@contextmanager
def _only_errors() -> Iterator[None]:
    """Keep the converter from telling of each tensor."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _longest(config: dict[str, Any]) -> int:
    """Give the most tokens that a model can take."""
    text = config.get("text_config", config)
    return int(text.get("max_position_embeddings", MOST_CONTEXT))


def _marks(tokenizer: Any) -> list[str]:
    """Give the tokens of the chat template: who could write them could speak for the model."""
    return sorted(
        token.content for token in tokenizer.added_tokens_decoder.values() if token.special
    )


def _normalization(tokenizer: Any) -> str | None:
    """Give the Unicode form of a tokenizer that has one and does nothing else to a text."""
    settings = json.loads(tokenizer.backend_tokenizer.to_str())["normalizer"] or {}
    kind = settings.get("type")
    return kind if kind in ("NFC", "NFD", "NFKC", "NFKD") else None


def _write_card(model: Path, export: Exported, folder: Path) -> None:
    """Write the card of the merged model anew, with a word on how these files are used."""
    card = model / "README.md"
    text = card.read_text("utf-8") if card.is_file() else f"# {export.name}\n"
    limits = "They have one fixed size."
    if export.preparation.max_tokens:
        limits = (
            "The files do not hold the limits of its pictures: give llama.cpp's own server "
            f"`--image-min-tokens 1 --image-max-tokens {export.preparation.max_tokens}`, or the "
            "answers are wrong."
        )
    text += (
        "\n## As GGUF files\n\n"
        f"Made for llama.cpp with `medtune`: {', '.join(export.files.values())} hold the text part, "
        f"{export.mmproj} the vision part; `{ABOUT}` says how pictures are prepared. {limits} "
        "`medtune serve .` sees to that.\n"
    )
    (folder / "README.md").write_text(text, "utf-8")
