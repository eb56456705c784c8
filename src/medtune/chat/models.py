"""Base and tuned model behind the page, and answers that grow word by word.

An adapter shares the weights of the base: switching it off gives the base's answer. Such a switch
holds for the whole model, whoever asks; so one single thread generates, one answer after the other.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TextIteratorStreamer

from medtune.answers import OpenAIServer, answer_log_probs
from medtune.captions import parse_caption
from medtune.models import load_base, load_processor, load_tuned
from medtune.multitask import MultiTaskModel, locate_verify_diagnose

#: Where notebook 13 leaves the threshold of a run, beside the folder of the notebook that trained.
THRESHOLD = Path("13_when_to_trust", "threshold.json")


@dataclass
class ChatModels:
    """The models of a page, and the thread that generates."""

    #: The base model, or its `OpenAIServer`; the same object as `tuned` where that is an adapter on
    #: it.
    base: Any
    #: The tuned model, or its `OpenAIServer`, or None.
    tuned: Any
    #: One processor, so that both models get the same prompt; None where servers have their own.
    processor: Any
    #: Function of a picture and a question that locates, verifies, then answers; or None.
    locate: Callable[[Any, str], dict] | None = None
    #: Least confidence, 0..1, with which the tuned model would answer; None: it always would.
    least: float | None = None
    #: The one thread that generates.
    worker: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))


@dataclass
class Said:
    """An answer as far as it has got."""

    #: The text so far.
    text: str
    #: Tokens so far, the end token too; None for an answer that was not streamed.
    tokens: int | None = None
    #: Seconds so far, without the time in which others were answered.
    seconds: float | None = None
    #: Seconds to the first token.
    first: float | None = None


def load_models(  # noqa: PLR0913 - each is a setting that a caller names
    base: str | os.PathLike,
    adapter: str | os.PathLike | None = None,
    *,
    tuned: str | os.PathLike | None = None,
    heads: str | os.PathLike | None = None,
    threshold: float = 0.5,
    max_pixels: int | None = None,
    least: float | None = None,
    **options: Any,
) -> ChatModels:
    """Load base and tuned model; an adapter shares the weights of the base.

    Parameters
    ----------
    base : folder or hub name of the base model; or the address of a server that has it, such as
        http://127.0.0.1:8000/v1, whose password is in MEDTUNE_SERVE_PASSWORD.
    adapter : folder of an adapter on the base.
    tuned : folder of a merged model, instead of an adapter; or the address of a server.
    heads : folder of a multi-task model, which locates, verifies, then answers.
    threshold : least match score, 0..1, with which the multi-task model gives an answer.
    max_pixels : most pixels of a picture after resizing.
    least : least confidence with which the tuned model would answer, see `read_threshold`; infinity
        for never.
    **options : for `medtune.models.load_base`, such as dtype; the default is bfloat16 on a GPU and
        float32 without one.

    Raises
    ------
    ValueError, OSError : both adapter and tuned, or a model or processor that does not load: one
        line.
    """
    if adapter and tuned:
        raise ValueError("give an adapter or a tuned (merged) model, not both")
    if is_address(base):
        if adapter or heads or (tuned and not is_address(tuned)):
            raise ValueError(f"{base} is a server: only another server can stand beside it")
        return ChatModels(_at(base), _at(tuned) if tuned else None, None)
    if torch.cuda.is_available():
        options = {"dtype": "bfloat16", "device_map": {"": 0}} | options
    adapter_has_processor = adapter and any(Path(adapter).glob("*processor_config.json"))
    tuned_folder = None if is_address(tuned) else tuned
    processor_folder = adapter if adapter_has_processor else tuned_folder or base
    processor = load_processor(processor_folder, max_pixels=max_pixels)
    base_model = load_base(base, **options)
    tuned_model = None
    if adapter:
        base_model = tuned_model = load_tuned(base_model, adapter)
    elif tuned:
        tuned_model = _at(tuned) if is_address(tuned) else load_base(tuned, **options)
    models = ChatModels(base_model, tuned_model, processor, least=least)
    if heads:
        # on weights of its own: its adapter is another one
        model = MultiTaskModel.from_pretrained(load_base(base, **options), heads)

        def locate(image, question: str) -> dict:
            found = locate_verify_diagnose(
                model, processor, [image], [question], threshold=threshold
            )
            return found[0]

        models.locate = locate
    return models


def read_threshold(file: str | os.PathLike) -> float:
    """Read from which confidence on a model of a run answers, as notebook 13 chose it.

    Parameters
    ----------
    file : the run's `13_when_to_trust/threshold.json`.

    Returns
    -------
    float : 0..1; infinity where no answer may be given.

    Raises
    ------
    OSError : there is no such file.
    ValueError : it holds no threshold.

    Examples
    --------
    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp(), "threshold.json")
    >>> _ = file.write_text('{"value": 0.25, "promised": 0.1}')
    >>> read_threshold(file)
    0.25
    """
    try:
        value = json.loads(Path(file).read_text("utf-8"))["value"]
        return math.inf if value is None else float(value)
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{file} holds no threshold: notebook 13 writes one") from None


def find_threshold(adapter: str | os.PathLike) -> Path | None:
    """Find the threshold of the run that trained an adapter.

    Parameters
    ----------
    adapter : folder of the adapter, such as RUN/out/03_finetune_lora/adapter.

    Returns
    -------
    Path or None : RUN/out/13_when_to_trust/threshold.json, None where there is none.

    Examples
    --------
    >>> import tempfile
    >>> out = Path(tempfile.mkdtemp()).resolve()
    >>> adapter = out / "03_finetune_lora" / "adapter"
    >>> find_threshold(adapter)
    >>> (out / "13_when_to_trust").mkdir()
    >>> (out / THRESHOLD).touch()
    >>> find_threshold(adapter) == out / THRESHOLD
    True
    """
    out = Path(adapter).resolve().parent.parent
    file = out / THRESHOLD
    return file if file.is_file() else None


def confidence(
    models: ChatModels, messages: Sequence[dict], pictures: Sequence, text: str
) -> float:
    """Say how likely the tuned model found the structure that its answer names.

    Parameters
    ----------
    models : what `load_models` gives, with a tuned model that is no server.
    messages, pictures : what was asked, as `answer` takes them.
    text : what it answered.

    Returns
    -------
    float : 0..1, NaN where the answer names none.
    """
    named = parse_caption(text).structure
    if not named:
        return math.nan
    row = {"prompt": list(messages), "images": list(pictures)}

    def read() -> float:
        [spoken] = answer_log_probs(models.tuned, models.processor, [row], [text])
        return spoken.probability(named)

    return models.worker.submit(read).result()


def is_address(model: Any) -> bool:
    """Tell whether a model is given by the address of a server."""
    return isinstance(model, str) and model.startswith(("http://", "https://"))


def _at(address: str) -> OpenAIServer:
    # not an argument: other users of the machine see a command line
    return OpenAIServer.at(address, api_key=os.environ.get("MEDTUNE_SERVE_PASSWORD") or "none")


def answer(  # noqa: PLR0913 - each is a setting that a caller names
    models: ChatModels,
    which: str,
    messages: Sequence[dict],
    pictures: Sequence,
    *,
    max_new_tokens: int = 160,
    do_sample: bool = False,
    stopped: Callable[[], bool] = bool,
) -> Iterator[Said]:
    """Answer as one of the models, word by word.

    When several ask at once, one after the other is answered.

    Parameters
    ----------
    models : what `load_models` gives.
    which : "base" or "tuned".
    messages : roles and content parts, as a chat template takes them, ending with a question.
    pictures : one for each image part, in their order.
    max_new_tokens : tokens of the longest answer.
    do_sample : draw each token, as the model's own settings say, instead of taking the likeliest.
    stopped : asked after every token; True ends the answer.

    Yields
    ------
    Said : the answer so far.
    """
    model, processor = getattr(models, which), models.processor
    if isinstance(model, OpenAIServer):
        yield _answer_of_server(model, messages, pictures, max_new_tokens, do_sample)
        return
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    images = [list(pictures)] if pictures else None
    inputs = processor(text=[prompt], images=images, return_tensors="pt")
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    moments: list[float] = []  # when generation began, then when each token came
    listener_left = False

    def note_token(ids, scores, **_):
        """A stopping criterion of Transformers: note the time, and say whether to stop."""
        moments.append(time.perf_counter())
        stop = bool(stopped() or listener_left)
        return torch.full((len(ids),), stop, device=ids.device)

    def generate() -> None:
        adapter_off = contextlib.nullcontext()
        if which == "base" and models.base is models.tuned:
            adapter_off = model.disable_adapter()
        try:
            with adapter_off:
                moments.append(time.perf_counter())
                model.generate(
                    **inputs.to(model.device, dtype=model.dtype),
                    do_sample=do_sample,
                    max_new_tokens=max_new_tokens,
                    streamer=streamer,
                    stopping_criteria=[note_token],
                )
        finally:
            streamer.end()

    job = models.worker.submit(generate)
    text = ""
    try:
        for piece in streamer:
            text += piece
            seconds = [moment - moments[0] for moment in moments] or [0.0]
            first = seconds[1] if len(seconds) > 1 else seconds[0]
            yield Said(text.strip(), len(moments) - 1, seconds[-1], first)
        job.result()  # raises what went wrong
    finally:
        # who no longer listens need not be answered to the end
        listener_left = True
        job.cancel()


def _answer_of_server(
    server: OpenAIServer,
    messages: Sequence[dict],
    pictures: Sequence,
    max_new_tokens: int,
    do_sample: bool,
) -> Said:
    """Ask a server; it answers in one piece."""
    settings: dict[str, Any] = {"max_tokens": max_new_tokens}
    if not do_sample:
        settings["temperature"] = 0
    start = time.perf_counter()
    generated = server.ask(messages, pictures, settings)
    seconds = time.perf_counter() - start
    return Said(generated.text, generated.tokens, seconds, seconds)
