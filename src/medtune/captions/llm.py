"""Read captions with an LLM behind an OpenAI-compatible endpoint, such as Ollama's.

Only the endpoint that the caller names is asked: captions leave this machine if its URL does. What
it answers is checked; an answer that is refused is asked for again, with the reason.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from tqdm import tqdm

from medtune.files import one_line, write_json

from .endpoint import open_endpoint
from .rules import PLACES, Caption, detect_language, entities

_EXTRACT = (
    "Read the medical caption and answer with one JSON object of the schema. Use only what it says,"
    f" else null. place is one of {', '.join(PLACES)}; area_share is 0..1; negated lists the"
    " findings said to be absent; target_diag is the words that carry the diagnosis."
)

# What the model is told about the fields. pydantic would send the docstring of `Caption`; but every
# request is part of the name of its cached answer, and a better docstring must not ask all again.
_FIELDS = (
    "The fields of one caption; None or an empty list where it does not say.\n\n"
    "`area_share` is 0..1 of the picture; `place` and `finding_place` are in `PLACES`;"
    " `side` is the patient's;\n"
    "`findings` are asserted, `finding` is the first, `negated` are said to be absent."
    " The last three are sentences."
)

# Fields whose words are put into those of the rules, so that "a haematoma" is "hemorrhage".
_FIELDS_IN_OUR_WORDS = ("modality", "structure", "finding", "level", "view", "density")

_CAPTION = TypeAdapter(Caption)


def extract_with_llm(texts: Sequence[str], **endpoint: Any) -> list[Caption | None]:
    """Let an LLM read the fields of captions; its answers are validated.

    Parameters
    ----------
    texts : sequence of str
        Captions; equal ones are asked once.
    base_url : str
        Where the endpoint is; for Ollama "http://localhost:11434/v1".
    model : str
        What the endpoint calls the model, say "qwen3:4b".
    api_key : str, default "none"
        What the endpoint wants to see; Ollama takes anything.
    allow_remote : bool, default False
        Take an address that is not of this machine. The captions then leave it.
    cache_dir : path, optional
        A folder for one small JSON file per text: a second call asks only for what is missing. It
        holds answers: keep it as safe as the captions.
    timeout : float, default 60
        Seconds to wait for one answer.
    retries : int, default 2
        How often to ask again when the endpoint fails or an answer is refused.
    workers : int, default 4
        How many texts are asked at the same time.
    strict : bool, default True
        If False, None stands where an answer stays wrong, instead of an error.

    Returns
    -------
    list of Caption or None
        One for each text, in the same order.

    Raises
    ------
    ValueError
        If no endpoint is configured or it is not on this machine, or an answer stays wrong.
    OSError
        If the endpoint fails; TimeoutError if it is too slow.
    ImportError
        If the package `openai` is not installed.

    Examples
    --------
    Nothing is asked unless an endpoint is named:

    >>> extract_with_llm(["A cyst in the left kidney."])
    Traceback (most recent call last):
    ValueError: no LLM endpoint is configured: pass base_url, ... and model
    """
    schema = _CAPTION.json_schema() | {"description": _FIELDS}
    response_format = {
        "type": "json_schema",
        "json_schema": {"name": "Caption", "schema": schema},
    }
    task = _Task(_EXTRACT, _read_caption, {"response_format": response_format})
    return _ask_all(texts, task, _Endpoint(**endpoint))


# ------------------------------------------------------------ what is asked and how it is read


@dataclass
class _Task:
    """What is asked about every text."""

    #: The system message.
    instruction: str
    #: read(text, answer) returns the value of an answer; a ValueError refuses it and says why.
    read: Callable[[str, str], object]
    #: What the request holds besides model, temperature and messages.
    request: dict[str, Any]


def _read_caption(text: str, answer: str) -> Caption:
    """Check the fields that an LLM answers, and put them into the words of the rules."""
    # models like to think aloud before the object, and to put a fence around it
    json_object = answer[answer.find("{") : answer.rfind("}") + 1]
    caption = _CAPTION.validate_json(json_object)
    if not 0 <= (caption.area_share or 0) <= 1 or caption.place not in (None, *PLACES):
        raise ValueError(f"area_share must be 0..1 and place null or one of {', '.join(PLACES)}")
    changes: dict[str, Any] = {"language": detect_language(text)}
    for name in _FIELDS_IN_OUR_WORDS:
        said = getattr(caption, name) or ""
        ours = [value for kind, value, _ in entities(said) if kind == name]
        if len(ours) == 1:
            changes[name] = ours[0]
    return replace(caption, **changes)


# ------------------------------------------------------------ asking


@dataclass(kw_only=True)
class _Endpoint:
    """Who is asked, and how patiently; `extract_with_llm` says what each field means."""

    base_url: str | None = None
    model: str | None = None
    api_key: str = "none"
    allow_remote: bool = False
    cache_dir: str | Path | None = None
    timeout: float = 60.0
    retries: int = 2
    workers: int = 4
    strict: bool = True

    def connect(self) -> Any:
        """Return a client of the endpoint."""
        has_url = self.base_url and self.base_url.startswith(("http://", "https://"))
        if not (has_url and self.model):
            raise ValueError(
                "no LLM endpoint is configured: pass base_url, say 'http://localhost:11434/v1',"
                " and model"
            )
        # refuses an address elsewhere; the client below speaks to the one that was checked
        open_endpoint(
            self.base_url,
            self.model,
            api_key=self.api_key,
            timeout=self.timeout,
            allow_remote=self.allow_remote,
        )
        # here and not at the top: openai is an extra, and the rules do not need it
        try:
            import openai
        except ImportError as error:
            raise ImportError(
                "asking an LLM needs the package openai: pip install openai"
            ) from error

        return openai.OpenAI(
            base_url=self.base_url,
            api_key=self.api_key,
            timeout=self.timeout,
            max_retries=self.retries,
        )


def _ask_all(texts: Sequence[str], task: _Task, endpoint: _Endpoint) -> list:
    """Ask about every text, equal ones once, several at the same time."""
    client = endpoint.connect()
    # half of a surrogate pair cannot be sent: it becomes a question mark
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    first_number: dict[str, int] = {}
    for number, text in enumerate(texts):
        first_number.setdefault(text, number)

    def ask(text: str, number: int) -> object:
        return _ask(client, endpoint, task, text, number)

    # an error cancels what has not begun; what has been answered is in the cache
    with ThreadPoolExecutor(endpoint.workers) as pool:
        values = pool.map(ask, first_number.keys(), first_number.values())
        progress = tqdm(values, total=len(first_number), disable=len(first_number) < 2)
        value_of = dict(zip(first_number, progress, strict=True))
    return [value_of[text] for text in texts]


def _ask(client: Any, endpoint: _Endpoint, task: _Task, text: str, number: int) -> object:
    """Ask about one text until an answer is accepted, and keep that one; errors name its number.

    They never quote the text: its words may be a patient's.
    """
    messages = [
        {"role": "system", "content": task.instruction},
        {"role": "user", "content": text},
    ]
    options = {"model": endpoint.model, "temperature": 0, **task.request}
    kept = _cache_file(endpoint, messages, options)
    if kept:
        # a file that is not there or damaged: ask
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return task.read(text, json.loads(kept.read_text("utf-8"))["answer"])

    for _ in range(endpoint.retries + 1):
        try:
            answer = _complete(client, endpoint, messages, options)
            value = task.read(text, answer)
        except (ValueError, AttributeError, TypeError, IndexError) as error:
            # nonsense, by the model or by the endpoint: say why, and ask again
            reason = one_line(error)
            refusal = f"Your answer was refused: {reason}. Try again."
            messages[2:] = [{"role": "user", "content": refusal}]
            continue
        if kept:
            _keep(kept, endpoint, answer)
        return value

    if not endpoint.strict:
        return None
    times = endpoint.retries + 1
    raise ValueError(
        f"text {number}: {endpoint.model} was refused {times} times, at last for {reason}"
    )


def _complete(client: Any, endpoint: _Endpoint, messages: list, options: dict[str, Any]) -> str:
    """Send one request and return what the model says."""
    import openai  # an extra; `_Endpoint.connect` has said so where it is missing

    try:
        reply = client.chat.completions.create(messages=messages, **options)
    except openai.APITimeoutError as error:
        raise TimeoutError(
            f"{endpoint.base_url} did not answer within {endpoint.timeout:g} s,"
            f" {endpoint.retries + 1} times"
        ) from error
    except openai.OpenAIError as error:
        message = f"{endpoint.base_url}: {type(error).__name__}: {str(error)[:200]}"
        raise OSError(message.replace("\n", " ")) from error
    return str(reply.choices[0].message.content)


def _cache_file(
    endpoint: _Endpoint, messages: list[dict[str, str]], options: dict[str, Any]
) -> Path | None:
    """Name the file of an answer by all that was asked, so that another model asks anew."""
    if not endpoint.cache_dir:
        return None
    asked = json.dumps([messages, options])
    return Path(endpoint.cache_dir, hashlib.sha256(asked.encode()).hexdigest() + ".json")


def _keep(file: Path, endpoint: _Endpoint, answer: str) -> None:
    """Write an answer to its file, which only its owner may read."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"model": endpoint.model, "answer": answer}, indent=None)
    file.chmod(0o600)
