"""What answers a batch: a model of Transformers, padded on the left and seeded, vLLM, or a server.

Each backend has one method, `answer(parts, seed)`: it takes the inputs of a batch in the parts in
which they were prepared, and returns what was generated for each row.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from medtune.models import end_tokens

from .server import Generated, OpenAIServer


class TransformersBackend:
    """Answers with `model.generate`.

    Parameters
    ----------
    model : on its device; it is left in evaluation mode.
    processor : its processor.
    options : for `model.generate`, with `max_new_tokens` and `do_sample`.
    cache_implementation : "static" for a cache of one size, with which decoding is compiled on a
        GPU; None for the model's own.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        options: Mapping[str, Any],
        cache_implementation: str | None,
    ) -> None:
        model.eval()  # dropout of an adapter would make answers random
        self.model = model
        self.tokenizer = processor.tokenizer
        self.end_tokens = end_tokens(model, processor)
        self.options = {
            "use_cache": True,
            "pad_token_id": self.tokenizer.pad_token_id,
            "eos_token_id": self.end_tokens,
            **options,
        }
        self.cache_implementation = cache_implementation
        self.cache_length = 0  # tokens; grows with the longest batch so far
        text_config = getattr(model.config, "text_config", None)
        uses_sdpa = getattr(text_config, "_attn_implementation", None) == "sdpa"
        # only where decoding is compiled: there the reading of keys and values takes most of a step
        self.folds_attention = cache_implementation == "static" and uses_sdpa

    def answer(self, parts: Sequence[Any], seed: int) -> list[Generated]:
        """Answer the rows of a batch."""
        on_device = [part.to(self.model.device) for part in parts]
        inputs = join_parts(on_device, self.tokenizer.pad_token_id)
        width = inputs["input_ids"].shape[1]
        tokens = self._generate(inputs, seed)[:, width:].tolist()
        answers = [_up_to_end(row, self.end_tokens) for row in tokens]
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        result = []
        for text, answer in zip(texts, answers, strict=True):
            result.append(Generated(text.strip(), len(answer)))
        return result

    def _generate(self, inputs: Mapping[str, torch.Tensor], seed: int) -> torch.Tensor:
        """Run the model with a seed of its own, and leave the global random state as it was."""
        cache = self._cache_options(width=inputs["input_ids"].shape[1])
        device = self.model.device
        # the state of the CPU is always kept
        random_states = [device] if device.type == "cuda" else []
        attention = folded_attention(self.model) if self.folds_attention else nullcontext()
        with attention, torch.random.fork_rng(random_states):
            torch.manual_seed(seed)
            return self.model.generate(**inputs, **self.options, **cache)

    def _cache_options(self, width: int) -> dict[str, Any]:
        if not self.cache_implementation:
            return {}
        # a cache that keeps its size is compiled once; a size that is no multiple of 8 is slow
        needed = width + self.options["max_new_tokens"]
        rounded_up = -(-needed // 64) * 64
        self.cache_length = max(self.cache_length, rounded_up)
        return {
            "cache_implementation": self.cache_implementation,
            "max_cache_len": self.cache_length,
        }


class VllmBackend:
    """Answers with vLLM, which does its own batching.

    Parameters
    ----------
    model : a folder, a hub id or a `vllm.LLM`.
    options : for `vllm.SamplingParams`, with `max_new_tokens` and `do_sample` by their names in
        Transformers.

    Raises
    ------
    ImportError : vLLM is not installed.
    """

    def __init__(self, model: Any, options: Mapping[str, Any]) -> None:
        try:
            # here, not at the top: vLLM is no dependency, it wants Linux and a GPU
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise ImportError(
                "backend='vllm' needs vLLM: pip install vllm (Linux, with a GPU)"
            ) from error
        self.llm = LLM(str(model)) if isinstance(model, str | Path) else model
        self.sampling_params = SamplingParams
        options = dict(options)
        max_tokens = options.pop("max_new_tokens")
        do_sample = options.pop("do_sample")
        self.options = {"max_tokens": max_tokens, **options}
        if not do_sample:
            self.options["temperature"] = 0.0

    def answer(self, parts: Sequence[list[dict[str, Any]]], seed: int) -> list[Generated]:
        """Answer the requests of a batch."""
        requests = []
        for part in parts:
            requests += part
        parameters = self.sampling_params(seed=seed, **self.options)
        result = []
        for request in self.llm.generate(requests, parameters, use_tqdm=False):
            output = request.outputs[0]
            result.append(Generated(output.text.strip(), len(output.token_ids)))
        return result


class ServerBackend:
    """Answers by a server that speaks OpenAI's API.

    Parameters
    ----------
    model : the server.
    options : by the names of Transformers, with `max_new_tokens` and `do_sample`; others go to the
        server as they are.

    Raises
    ------
    ValueError : `model` is no `OpenAIServer`, or its address cannot be used.
    """

    def __init__(self, model: Any, options: Mapping[str, Any]) -> None:
        if not isinstance(model, OpenAIServer):
            raise ValueError("backend='openai' takes OpenAIServer(base_url, model) as the model")
        model.endpoint()  # a wrong address shows before the first picture is read
        self.server = model
        settings = dict(options)
        self.settings = {"max_tokens": settings.pop("max_new_tokens")}
        self.draws = settings.pop("do_sample")
        if not self.draws:
            self.settings["temperature"] = 0
        self.settings |= settings

    def answer(self, parts: Sequence[list[dict[str, Any]]], seed: int) -> list[Generated]:
        """Answer the requests of a batch, several at the same time."""
        requests = []
        for part in parts:
            requests += part
        settings = {**self.settings, "seed": seed} if self.draws else self.settings

        def ask(request: Mapping[str, Any]) -> Generated:
            try:
                return self.server.ask(request["messages"], request["pictures"], settings)
            except ValueError as error:
                name = request["id"]
                raise ValueError(f"the sample with id {name} is not answered: {error}") from None

        pool = ThreadPoolExecutor(self.server.parallel)
        try:
            return list(pool.map(ask, requests))
        finally:
            # after an error nobody waits for the others
            pool.shutdown(wait=False, cancel_futures=True)


def join_parts(parts: Sequence[Mapping[str, torch.Tensor]], pad: int) -> dict[str, torch.Tensor]:
    """Make one batch of its parts, padded on the left as a processor does.

    Parameters
    ----------
    parts : what the processor made of some rows each. What is of the shape (rows, tokens) is
        padded; the rest, such as pixels and grids, is put one behind the other.
    pad : id of the padding token. Masks and token types are padded with 0.

    Examples
    --------
    >>> parts = [{"input_ids": torch.tensor([[1, 2]])}, {"input_ids": torch.tensor([[3]])}]
    >>> join_parts(parts, pad=0)["input_ids"].tolist()
    [[1, 2], [0, 3]]
    """
    batch = {}
    for name, first in parts[0].items():
        tensors = [part[name] for part in parts]
        if first.shape != parts[0]["input_ids"].shape:
            batch[name] = torch.cat(tensors)
            continue
        rows = []
        for tensor in tensors:
            rows.extend(tensor)
        fill = pad if name == "input_ids" else 0
        batch[name] = pad_sequence(rows, batch_first=True, padding_value=fill, padding_side="left")
    return batch


def _up_to_end(tokens: list[int], ends: list[int]) -> list[int]:
    """Cut what stands behind the first end token: rows that end early are filled up."""
    for place, token in enumerate(tokens):
        if token in ends:
            return tokens[: place + 1]
    return tokens


@contextmanager
def folded_attention(model: Any) -> Iterator[None]:
    """Let the language part of a model that attends with SDPA use `_attend_folded` for a while.

    Afterwards, and after an error too, it attends with SDPA again.
    """
    _register_folded_attention()
    model.set_attn_implementation({"text_config": "folded"})
    try:
        yield
    finally:
        model.set_attn_implementation({"text_config": "sdpa"})


@cache  # once a process, so that nothing changes later that compiled code depends on
def _register_folded_attention() -> None:
    AttentionInterface.register("folded", _attend_folded)
    AttentionMaskInterface.register("folded", sdpa_mask)


def _attend_folded(  # noqa: PLR0913 - the arguments are those of Transformers
    module, query, key, value, attention_mask, scaling=None, **kwargs
):
    """Attend in decoding as if heads that share keys and values were so many queries of one head.

    SDPA with a mask would copy keys and values for each of these heads, and those are most of what
    a step reads. Arguments and results are those of an attention function of Transformers.
    """
    tokens = query.shape[2]
    if tokens > 1:  # not a step of decoding, but the prompt
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    key_heads = key.shape[1]
    # (rows, heads, 1 token, width) -> (rows, heads of the keys, heads that share them, width)
    query = query.squeeze(2).unflatten(1, (key_heads, -1))
    result = scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling
    )
    # -> (rows, 1 token, heads, width)
    return result.flatten(1, 2).unsqueeze(1), None
