"""Ask a model that another program serves: `medtune serve`, vLLM, SGLang, llama-server or Ollama.

All of them speak OpenAI's API for chat completions. Pictures go along as PNG, and only to this
machine unless the caller says that they may leave it.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medtune.captions import Endpoint, NoAnswer, open_endpoint
from medtune.files import data_url

# Seconds; each pause before a retry is twice the one before.
LONGEST_PAUSE = 60.0


@dataclass(frozen=True)
class Generated:
    """What a model said.

    Parameters
    ----------
    text : without special tokens and without blanks around it.
    tokens : how many tokens were generated, the end token too.
    """

    text: str
    tokens: int


@dataclass(frozen=True)
class OpenAIServer:
    """Where a model is served, and how patiently it is asked.

    Parameters
    ----------
    base_url : address of the API, such as "http://127.0.0.1:8000/v1".
    model : what the server calls the model.
    api_key : sent as a bearer token; for `medtune serve` the password.
    parallel : most requests at the same time.
    timeout : seconds in which a whole answer must have come.
    retries : how often to ask again when the server does not answer or answers nonsense.
    pause : seconds before the first retry, twice as many before each further one.
    allow_remote : send pictures to an address that is not this machine.

    Examples
    --------
    >>> server = OpenAIServer("http://127.0.0.1:8000/v1", "liver-captions")
    >>> generate_answers(server, None, test, backend="openai")  # doctest: +SKIP
    """

    base_url: str
    model: str
    api_key: str = "none"
    parallel: int = 4
    timeout: float = 600.0
    retries: int = 4
    pause: float = 1.0
    allow_remote: bool = False

    @classmethod
    def at(cls, address: str, **options: Any) -> "OpenAIServer":
        """Find the model that a server has.

        Parameters
        ----------
        address : of the API; where it has several models, with #NAME behind it.
        **options : api_key, allow_remote and the others.

        Raises
        ------
        ValueError : it has several models, or the address cannot be used.
        OSError : nobody answers there, or lets nobody in.

        Examples
        --------
        >>> OpenAIServer.at("http://127.0.0.1:8000/v1#liver-captions").model
        'liver-captions'
        """
        base_url, _, name = address.partition("#")
        if name:
            return cls(base_url, name, **options)
        try:
            names = cls(base_url, "any", **options).endpoint().models()
        except NoAnswer as error:
            raise OSError(f"{base_url} does not say which model it has: {error.reason}") from None
        if len(names) != 1:
            raise ValueError(f"{base_url} has {', '.join(names) or 'no model'}: give URL#NAME")
        return cls(base_url, names[0], **options)

    def __str__(self) -> str:
        # without the address: a run may go on when the server has got another port
        return f"{self.model}, as a server has it"

    def endpoint(self) -> Endpoint:
        """Check the address.

        Raises
        ------
        ValueError : it cannot be used, or is not this machine.
        """
        endpoint = open_endpoint(
            self.base_url,
            self.model,
            api_key=self.api_key,
            timeout=self.timeout,
            allow_remote=self.allow_remote,
        )
        if endpoint.ollama:
            raise ValueError(f"base_url={self.base_url}: give OpenAI's path, with /v1 at its end")
        return endpoint

    def ask(
        self,
        messages: Sequence[Mapping[str, Any]],
        pictures: Sequence[Any],
        settings: Mapping[str, Any],
    ) -> Generated:
        """Ask one question, again where it was in vain.

        Parameters
        ----------
        messages : roles and content, as a chat template takes them, ending with a question.
        pictures : one for each image part, in their order.
        settings : by OpenAI's names, such as max_tokens and temperature.

        Raises
        ------
        OSError : the server does not answer, or lets nobody in.
        ValueError : its answers cannot be used, or it refuses the request.
        """
        endpoint = self.endpoint()
        request = {"model": self.model, "messages": with_pictures(messages, pictures), **settings}
        pause = self.pause
        for left in range(self.retries, -1, -1):
            try:
                return _read(endpoint.post(request))
            except NoAnswer as error:
                if not error.try_again or not left:
                    raise self._in_vain(error) from None
                # one that is starting again needs longer than a moment
                time.sleep(min(max(pause, error.wait or 0.0), LONGEST_PAUSE))
                pause *= 2
        raise AssertionError("the last try raises or returns")

    def _in_vain(self, error: NoAnswer) -> Exception:
        times = f"{self.retries + 1} times" if error.try_again else "and would again"
        if error.lost:
            return OSError(
                f"{self.base_url} does not answer ({error.reason}, {times}): start the server "
                "again; with out=FILE the same call goes on where it stopped"
            )
        return ValueError(
            f"{self.base_url} gives no answer that can be used: {error.reason}, {times}"
        )


def with_pictures(
    messages: Sequence[Mapping[str, Any]], pictures: Sequence[Any]
) -> list[dict[str, Any]]:
    """Write messages as OpenAI's API takes them, each picture in its place.

    Parameters
    ----------
    messages : roles and content, as a chat template takes them.
    pictures : one for each image part, in their order.

    Raises
    ------
    ValueError : another number of pictures than of image parts.

    Examples
    --------
    >>> with_pictures([{"role": "user", "content": "What is it?"}], [])
    [{'role': 'user', 'content': 'What is it?'}]
    """
    left = list(pictures)
    written = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [_part(part, left) for part in content]
        written.append({"role": message["role"], "content": content})
    if left:
        raise ValueError(f"{len(left)} pictures have no place in the messages")
    return written


def _part(part: Mapping[str, Any], left: list[Any]) -> dict[str, Any]:
    if part["type"] != "image":
        return {"type": "text", "text": part["text"]}
    if not left:
        raise ValueError("the messages have places for more pictures than there are")
    return {"type": "image_url", "image_url": {"url": data_url(left.pop(0))}}


def _read(reply: Any) -> Generated:
    """Take the answer out of a reply."""
    try:
        choice = reply["choices"][0]
        text = choice["message"]["content"]
        tokens = reply["usage"]["completion_tokens"]
    except (KeyError, TypeError, IndexError):
        raise NoAnswer("the reply is not of this protocol", lost=False) from None
    is_count = isinstance(tokens, int) and not isinstance(tokens, bool) and tokens >= 0
    if not isinstance(text, str) or not is_count:
        raise NoAnswer("the reply has no text, or does not count its tokens", lost=False)
    if choice.get("finish_reason") not in ("stop", "length"):
        raise NoAnswer("the answer did not come to its end", lost=False)
    return Generated(text.strip(), tokens)
