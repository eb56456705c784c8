"""A language model behind an address: OpenAI's protocol and Ollama's own.

Needs nothing but the standard library. Captions leave this machine only if the caller says that
they may: the address must be a loopback one, no proxy is used and no redirect is followed.
"""

import http.client
import ipaddress
import json
import socket
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any, NoReturn
from urllib.parse import urlsplit

# Statuses that say "later": the same request may succeed then.
_TRY_LATER = {408, 409, 425, 429, 500, 502, 503, 504, 507, 520, 522, 524, 529}
# Statuses that no other caption would get past: no access, no such model or path, a redirect.
_HOPELESS = {301, 302, 303, 307, 308, 401, 403, 404, 405}

# Bytes; a translation has thousands, so that more is nonsense without an end.
_LONGEST_REPLY = 4 << 20
_PIECE = 1 << 16

# The reason of a `NoAnswer` where nobody takes the connection.
NOTHING_LISTENS = "the connection is refused"
# The reason of a `NoAnswer` where the reply is something else.
NOT_THIS_PROTOCOL = "the reply is not of this protocol"


class NoAnswer(Exception):
    """One request was in vain.

    Attributes
    ----------
    reason : why, in a few words that hold nothing of the caption.
    lost : True if the endpoint did not answer; False if its answer cannot be used.
    try_again : whether the same request may succeed.
    wait : seconds that the endpoint asks to wait, or None.
    """

    def __init__(
        self, reason: str, *, lost: bool, try_again: bool = True, wait: float | None = None
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.lost = lost
        self.try_again = try_again
        self.wait = wait


@dataclass(frozen=True)
class Endpoint:
    """Where a language model is asked, and how.

    Attributes
    ----------
    url : the full address of its chat.
    ollama : whether it speaks Ollama's own protocol, not OpenAI's.
    local : whether the address is a loopback one.
    model : what the endpoint calls the model.
    api_key : sent as a bearer token.
    timeout : seconds in which the whole answer must have come.
    """

    url: str
    ollama: bool
    local: bool
    model: str
    api_key: str
    timeout: float

    def ask(self, messages: list[dict[str, str]]) -> str:
        """Send messages and return what the model says.

        Raises
        ------
        NoAnswer : this request was in vain.
        OSError : the endpoint will refuse every other request, too.
        """
        request: dict[str, Any] = {"model": self.model, "messages": messages, "stream": False}
        if self.ollama:
            request["options"] = {"temperature": 0}
            # a model that can think would do so for a minute about every caption
            request["think"] = False
        else:
            request["temperature"] = 0
        reply = self.post(request)
        try:
            return _words_of_ollama(reply) if self.ollama else _words_of_openai(reply)
        except (KeyError, TypeError, IndexError, AttributeError):
            raise NoAnswer(NOT_THIS_PROTOCOL, lost=False) from None

    def post(self, request: dict[str, Any]) -> Any:
        """Send a whole request and return the reply, read from JSON.

        Raises
        ------
        NoAnswer : this request was in vain.
        OSError : the endpoint will refuse every other request, too.
        """
        raw = self._send(json.dumps(request).encode())
        try:
            return json.loads(raw)
        except ValueError:
            raise NoAnswer(NOT_THIS_PROTOCOL, lost=False) from None

    def models(self) -> list[str]:
        """Ask an endpoint of OpenAI's protocol which models it has.

        Raises
        ------
        NoAnswer : this request was in vain.
        OSError : the endpoint will refuse every other request, too.
        """
        raw = self._send(None, self.url.removesuffix("/chat/completions") + "/models")
        try:
            return [str(entry["id"]) for entry in json.loads(raw)["data"]]
        except (ValueError, KeyError, TypeError):
            raise NoAnswer(NOT_THIS_PROTOCOL, lost=False) from None

    def _send(self, body: bytes | None, url: str | None = None) -> bytes:
        """Post a request, or get what is at an address, and return the bytes of the reply."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.api_key}"}
        request = urllib.request.Request(url or self.url, body, headers)
        end = time.monotonic() + self.timeout
        # urllib raises OSError and HTTPException, which share no other ancestor
        try:
            with self._opener().open(request, timeout=self.timeout) as reply:
                return _read_until(reply, end)
        except urllib.error.HTTPError as error:
            error.close()
            self._refused(error)
        except TimeoutError:
            raise self._too_slow() from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise self._too_slow() from None
            refused = isinstance(error.reason, ConnectionRefusedError)
            reason = NOTHING_LISTENS if refused else "the connection failed"
            raise NoAnswer(reason, lost=True) from None
        except (OSError, http.client.HTTPException):
            # a connection that is cut: RemoteDisconnected, IncompleteRead, ConnectionResetError
            raise NoAnswer("the connection was lost", lost=True) from None

    def _opener(self) -> urllib.request.OpenerDirector:
        # A proxy of the environment would carry captions that are meant for this machine elsewhere.
        handlers: list[Any] = [_NoRedirect()]
        if self.local:
            handlers.append(urllib.request.ProxyHandler({}))
        return urllib.request.build_opener(*handlers)

    def _too_slow(self) -> NoAnswer:
        return NoAnswer(f"no answer within {self.timeout:g} s", lost=True)

    def _refused(self, error: urllib.error.HTTPError) -> NoReturn:
        """Raise what a status means. The reply's own words may quote the caption: they stay out."""
        if error.code in _HOPELESS:
            raise OSError(f"{self.url} answers {error.code}: {self._advice(error.code)}") from None
        reason = f"the endpoint answers {error.code}"
        if error.code in _TRY_LATER:
            wait = _seconds(error.headers.get("Retry-After"))
            raise NoAnswer(reason, lost=True, wait=wait) from None
        raise NoAnswer(reason, lost=False, try_again=False) from None

    def _advice(self, status: int) -> str:
        if status in (401, 403):
            return "give api_key=KEY"
        if status != 404 and status != 405:
            return "it sends what it is asked on to another address, which is not followed"
        if self.ollama:
            return (
                f"pull the model (ollama pull {self.model}), or, if this is not Ollama, give"
                " base_url=URL with /v1 at its end"
            )
        return f"is a model called {self.model} served there, and base_url=URL right?"


def open_endpoint(
    base_url: str, model: str, *, api_key: str, timeout: float, allow_remote: bool
) -> Endpoint:
    """Check an address and find out which protocol it means.

    Parameters
    ----------
    base_url : with nothing behind the port, or with /api, it is Ollama's own protocol; any other
        path, such as /v1, is OpenAI's.
    model, api_key, timeout : see `Endpoint`.
    allow_remote : take an address that is not a loopback one.

    Raises
    ------
    ValueError : the address cannot be used, leads elsewhere, or no model is named.

    Examples
    --------
    >>> open_endpoint(
    ...     "http://localhost:8000/v1", "m", api_key="", timeout=9, allow_remote=False
    ... ).url
    'http://localhost:8000/v1/chat/completions'
    """
    if not model:
        raise ValueError("no model is named: give model=NAME, as the endpoint calls it")
    host, port, scheme, path = _parts_of(base_url)
    local = _is_loopback(host)
    if not local and not allow_remote:
        raise ValueError(
            f"base_url={base_url} is not this machine, and what it is asked would leave it: give"
            " allow_remote=True if they may"
        )
    ollama = path in ("", "/api", "/api/chat")
    chat = "/api/chat" if ollama else f"{path.removesuffix('/chat/completions')}/chat/completions"
    # put together anew, so that what was checked is what is asked
    shown_host = f"[{host}]" if ":" in host else host
    url = f"{scheme}://{shown_host}:{port}{chat}"
    return Endpoint(url, ollama, local, model, api_key, timeout)


def _parts_of(base_url: str) -> tuple[str, int, str, str]:
    """Take an address apart: host, port, scheme and path."""
    try:
        parts = urlsplit(base_url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except (ValueError, TypeError, AttributeError):
        parts = None
    plain = parts and not (parts.username or parts.password or parts.query or parts.fragment)
    if not plain or parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(
            f"base_url={base_url} is no address: give http://localhost:11434 (Ollama) or"
            " http://localhost:8000/v1 (vLLM and others)"
        )
    return parts.hostname, port, parts.scheme, parts.path.rstrip("/")


def _is_loopback(host: str) -> bool:
    """Tell whether a host is this machine: a loopback address, or localhost if it leads to one.

    Other names are not looked up: what they lead to may change between the check and the request.
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        if host != "localhost":
            return False
    try:
        found = socket.getaddrinfo(host, None)
    except OSError:
        return False
    return all(ipaddress.ip_address(entry[4][0]).is_loopback for entry in found)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Leaves a redirect as the error that it then is."""

    def redirect_request(self, *args: Any) -> None:
        return None


def _read_until(reply: Any, end: float) -> bytes:
    """Read a reply to its end; the timeout of a socket counts anew with every byte that drips."""
    pieces = []
    size = 0
    # read1 comes back with what is there, read would wait for the whole piece
    while piece := reply.read1(_PIECE):
        pieces.append(piece)
        size += len(piece)
        if size > _LONGEST_REPLY:
            raise NoAnswer("the reply has no end", lost=False)
        if time.monotonic() > end:
            raise TimeoutError
    expected = reply.headers.get("Content-Length")
    if expected is not None and size < int(expected):
        raise NoAnswer("the connection was lost", lost=True)
    return b"".join(pieces)


def _words_of_openai(reply: Any) -> str:
    choice = reply["choices"][0]
    if choice.get("finish_reason") == "length":
        raise NoAnswer("the answer was cut short", lost=False)
    return _text(choice["message"]["content"])


def _words_of_ollama(reply: Any) -> str:
    if reply.get("done_reason") == "length":
        raise NoAnswer("the answer was cut short", lost=False)
    return _text(reply["message"]["content"])


def _text(words: Any) -> str:
    if not isinstance(words, str):
        raise TypeError("no text")
    return words


def _seconds(header: str | None) -> float | None:
    """Read Retry-After where it is a number of seconds; it may also be a date."""
    try:
        return max(0.0, float(header or ""))
    except ValueError:
        return None
