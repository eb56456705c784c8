"""Answer a request with a model of Transformers, for models that have no GGUF file."""

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from medtune.answers import TransformersBackend
from medtune.models import load_base, load_processor, load_tuned

from .requests import Asked, Refused

# What `model.generate` calls the settings that have another name in OpenAI's API.
NAMES = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"}


class TransformersEngine:
    """A model in this process, which answers one request after the other.

    Parameters
    ----------
    model : folder of a merged model or of an adapter, or hub name of a base model.
    base : the base model of an adapter, where its configuration does not name it.
    name : what the server calls it; by default the name of the folder.

    Raises
    ------
    ValueError, OSError : in one line, a model that cannot be loaded.
    """

    def __init__(
        self, model: str | os.PathLike, *, base: str | None = None, name: str | None = None
    ) -> None:
        options: dict[str, Any] = {}
        if torch.cuda.is_available():
            options = {"dtype": "bfloat16", "device_map": {"": 0}}
        path = Path(model).expanduser()
        self.name = name or path.resolve().name
        self.question = None
        if (path / "adapter_config.json").is_file():
            self.processor = load_processor(path)
            self.model = load_tuned(load_base(base or _base_of(path), **options), path)
        else:
            self.processor = load_processor(os.fspath(model))
            self.model = load_base(os.fspath(model), **options)
        tokens = self.processor.tokenizer.added_tokens_decoder.values()
        self.marks = tuple(token.content for token in tokens if token.special)
        self.lock = threading.Lock()

    def close(self) -> None:
        """Let go of the model."""
        self.model = None

    def complete(self, asked: Asked) -> dict[str, Any]:
        """Answer a request as OpenAI's API does."""
        if "logprobs" in asked.settings:
            raise Refused("logprobs: only a GGUF file is served with them")
        if "stop" in asked.settings:
            raise Refused("stop: only a GGUF file is served with it")
        text = self.processor.apply_chat_template(
            asked.messages, add_generation_prompt=True, tokenize=False
        )
        images = [asked.pictures] if asked.pictures else None
        try:
            inputs = self.processor(text=[text], images=images, return_tensors="pt")
        except ValueError as error:
            raise Refused(f"a picture cannot be prepared: {error}") from error
        options = self._options(asked.settings)
        with self.lock:
            # which also ends what waited while the server was closed
            if self.model is None:
                raise Refused("the server is closing", status=503)
            backend = TransformersBackend(self.model, self.processor, options, None)
            (said,) = backend.answer(
                [inputs.to(dtype=self.model.dtype)], asked.settings.get("seed", 0)
            )
        prompt = inputs["input_ids"].shape[1]
        return _reply(self.name, said, prompt, asked.settings["max_tokens"])

    def stream(self, asked: Asked) -> Iterator[bytes]:
        """Answer as server-sent events: the whole text in one of them."""
        yield from events_of(self.complete(asked), asked)

    def _options(self, settings: dict[str, Any]) -> dict[str, Any]:
        options = {"max_new_tokens": settings["max_tokens"], "do_sample": False}
        if settings.get("temperature", 1) > 0:
            options["do_sample"] = True
            for name, ours in NAMES.items():
                if name in settings:
                    options[ours] = settings[name]
        return options


def _base_of(adapter: Path) -> str:
    """Read which base an adapter belongs to."""
    config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    base = config.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"the adapter {adapter} does not name its base: give base=FOLDER")
    return base


def _reply(name: str, said: Any, prompt: int, most: int) -> dict[str, Any]:
    usage = {
        "prompt_tokens": prompt,
        "completion_tokens": said.tokens,
        "total_tokens": prompt + said.tokens,
    }
    choice = {
        "index": 0,
        "finish_reason": "length" if said.tokens >= most else "stop",
        "message": {"role": "assistant", "content": said.text},
    }
    return {
        "id": f"chatcmpl-{time.time_ns()}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": name,
        "choices": [choice],
        "usage": usage,
    }


def events_of(reply: dict[str, Any], asked: Asked) -> Iterator[bytes]:
    """Write a whole reply as server-sent events, for a client that wants it word by word.

    Parameters
    ----------
    reply : of OpenAI's API.
    asked : the request.
    """
    choice = reply["choices"][0]
    event = {**reply, "object": "chat.completion.chunk"}
    del event["usage"]
    deltas = [(choice["message"], None), ({}, choice["finish_reason"])]
    for delta, reason in deltas:
        chunk = {"index": 0, "delta": delta, "finish_reason": reason}
        yield f"data: {json.dumps({**event, 'choices': [chunk]})}\n\n".encode()
    if "stream_options" in asked.settings:
        usage = {**event, "choices": [], "usage": reply["usage"]}
        yield f"data: {json.dumps(usage)}\n\n".encode()
    yield b"data: [DONE]\n\n"
