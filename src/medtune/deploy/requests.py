"""Read what a client asks: a request of OpenAI's API for chat completions, within limits.

A client is a stranger. It cannot name files of this machine or addresses for it to fetch, its
pictures are counted and measured before they are decoded, and what is not understood is refused and
not passed over.
"""

import base64
import binascii
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, UnidentifiedImageError

# What may be set for an answer, with its type and bounds.
SETTINGS = {
    "temperature": (float, 0, 2),
    "top_p": (float, 0, 1),
    "top_k": (int, 0, 10_000),
    "min_p": (float, 0, 1),
    "frequency_penalty": (float, -2, 2),
    "presence_penalty": (float, -2, 2),
    "seed": (int, 0, 2**31 - 1),
    "top_logprobs": (int, 0, 20),
}
# Read on their own, or said by every client and without a meaning here.
OTHER_KEYS = {"model", "messages", "stream", "stream_options", "max_tokens"}
OTHER_KEYS |= {"max_completion_tokens", "stop", "logprobs", "n", "user"}
ROLES = ("system", "user", "assistant")
FORMATS = ("PNG", "JPEG")
# PIL's modes of more than 8 bits a channel: shown as they are, all would be white or black.
DEEP_MODES = ("I", "F")


class Refused(ValueError):
    """A request that is not answered.

    Attributes
    ----------
    status : of HTTP.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """What one request may hold.

    Parameters
    ----------
    bytes : of the whole request.
    pictures : in the whole conversation.
    pixels : of one picture.
    messages : of the conversation.
    characters : of all texts together.
    tokens : of the answer; a client that names no number gets `default_tokens`.
    """

    bytes: int = 64_000_000
    pictures: int = 8
    pixels: int = 64_000_000
    messages: int = 40
    characters: int = 20_000
    tokens: int = 2048
    default_tokens: int = 256


@dataclass(frozen=True)
class Asked:
    """A request that was read.

    Parameters
    ----------
    messages : roles and content parts, as a chat template takes them.
    pictures : one for each image part, in their order.
    settings : for the answer: max_tokens, temperature and others, by OpenAI's names.
    stream : whether the answer is wanted word by word.
    """

    messages: list[dict[str, Any]]
    pictures: list[Image.Image]
    settings: dict[str, Any]
    stream: bool


def read_request(
    body: Any,
    *,
    model: str,
    limits: Limits,
    marks: Sequence[str] = (),
    question: str | None = None,
) -> Asked:
    """Read and check a request.

    Parameters
    ----------
    body : the request, read from JSON.
    model : name of the model that is served.
    limits : what the request may hold.
    marks : texts that no message may hold, as they would be taken for the template's own.
    question : what is asked where the last message shows a picture without a word.

    Returns
    -------
    Asked : what is asked.

    Raises
    ------
    Refused : anything that is not understood, not allowed or too much; it quotes no text.

    Examples
    --------
    >>> body = {"model": "m", "messages": [{"role": "user", "content": "What is it?"}]}
    >>> read_request(body, model="m", limits=Limits()).messages[0]["content"]
    [{'type': 'text', 'text': 'What is it?'}]
    """
    if not isinstance(body, Mapping):
        raise Refused("the request is no JSON object")
    if body.get("model") != model:
        raise Refused(f"the model that is served here is called {model}", status=404)
    reader = _Reader(limits, tuple(marks))
    messages = reader.read_messages(body.get("messages"))
    if question and messages[-1]["content"] and not _has_words(messages[-1]):
        messages[-1]["content"].append({"type": "text", "text": question})
    return Asked(messages, reader.pictures, _settings(body, limits), bool(body.get("stream")))


class _Reader:
    """Reads messages, and counts what they hold."""

    def __init__(self, limits: Limits, marks: tuple[str, ...]) -> None:
        self.limits = limits
        self.marks = marks
        self.pictures: list[Image.Image] = []
        self.characters = 0

    def read_messages(self, messages: Any) -> list[dict[str, Any]]:
        if not isinstance(messages, list) or not messages:
            raise Refused("messages must be a list with at least one message")
        if len(messages) > self.limits.messages:
            raise Refused(f"more than {self.limits.messages} messages")
        read = []
        for message in messages:
            if not isinstance(message, Mapping) or message.get("role") not in ROLES:
                raise Refused(f"each message has a role: {', '.join(ROLES)}")
            read.append({"role": message["role"], "content": self.read(message.get("content"))})
        if read[-1]["role"] != "user":
            raise Refused("the last message must be the user's")
        return read

    def read(self, content: Any) -> list[dict[str, Any]]:
        """Read the content of a message: a text, or a list of parts."""
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, list):
            raise Refused("the content of a message is a text or a list of parts")
        return [self.read_part(part) for part in content]

    def read_part(self, part: Any) -> dict[str, Any]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            return {"type": "text", "text": self.check_text(part["text"])}
        if kind == "image_url" and isinstance(part.get("image_url"), Mapping):
            self.pictures.append(self.read_picture(part["image_url"].get("url")))
            return {"type": "image"}
        raise Refused("a part is {type: text, text} or {type: image_url, image_url: {url}}")

    def check_text(self, text: str) -> str:
        self.characters += len(text)
        if self.characters > self.limits.characters:
            raise Refused(f"more than {self.limits.characters} characters of text")
        for mark in self.marks:
            if mark in text:
                raise Refused(f"a text holds {mark}, which only the chat template may write")
        return text

    def read_picture(self, url: Any) -> Image.Image:
        if len(self.pictures) >= self.limits.pictures:
            raise Refused(f"more than {self.limits.pictures} pictures")
        if not isinstance(url, str) or not url.startswith("data:"):
            raise Refused(
                "a picture comes as data:image/png;base64,...: no address is fetched here"
            )
        try:
            content = base64.b64decode(url.partition(",")[2], validate=True)
            picture = Image.open(io.BytesIO(content), formats=FORMATS)
        except (binascii.Error, ValueError, UnidentifiedImageError):
            raise Refused(f"a picture is no {' or '.join(FORMATS)} in base64") from None
        except Image.DecompressionBombError:
            raise Refused(f"a picture has more than {self.limits.pixels} pixels") from None
        if picture.width * picture.height > self.limits.pixels:
            raise Refused(f"a picture has more than {self.limits.pixels} pixels")
        if picture.mode.startswith(DEEP_MODES):
            raise Refused("a picture has more than 8 bits a channel: window or stretch it first")
        try:
            picture.load()
        except (OSError, ValueError, SyntaxError):  # what PIL's decoders raise
            raise Refused("a picture is damaged") from None
        return picture


def _has_words(message: Mapping[str, Any]) -> bool:
    return any(part["type"] == "text" and part["text"].strip() for part in message["content"])


def _settings(body: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    """Check how the answer is wanted."""
    unknown = [key for key in body if key not in SETTINGS and key not in OTHER_KEYS]
    if unknown:
        raise Refused(f"not served here: {', '.join(sorted(map(str, unknown)))[:100]}")
    if body.get("n") not in (None, 1):
        raise Refused("n: one answer at a time")
    settings = {"max_tokens": _tokens(body, limits)}
    for key, (kind, least, most) in SETTINGS.items():
        value = body.get(key)
        if value is None:
            continue
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or kind(value) != value or not least <= value <= most:
            raise Refused(f"{key} must be a number from {least} to {most}")
        settings[key] = kind(value)
    if body.get("logprobs"):
        settings["logprobs"] = True
    if body.get("stop"):
        settings["stop"] = _stop(body["stop"])
    options = body.get("stream_options")
    if body.get("stream") and isinstance(options, Mapping) and options.get("include_usage"):
        settings["stream_options"] = {"include_usage": True}
    return settings


def _tokens(body: Mapping[str, Any], limits: Limits) -> int:
    wanted = body.get("max_completion_tokens", body.get("max_tokens"))
    if wanted is None:
        return limits.default_tokens
    if not isinstance(wanted, int) or isinstance(wanted, bool) or not 1 <= wanted <= limits.tokens:
        raise Refused(f"max_tokens must be a whole number from 1 to {limits.tokens}")
    return wanted


def _stop(stop: Any) -> list[str]:
    words = [stop] if isinstance(stop, str) else stop
    if not isinstance(words, list) or len(words) > 4 or not all(isinstance(w, str) for w in words):
        raise Refused("stop is a text or up to four of them")
    return words
