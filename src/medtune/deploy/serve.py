"""Serve a model over HTTP as OpenAI's API does, to this machine unless it is guarded.

What a client sends is checked here (`requests`), and then answered by llama.cpp in a process of its
own or by Transformers in this one. Nothing of a question or an answer is logged or kept.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from medtune.files import data_url, one_line

from .engine import Engine
from .exported import ABOUT, Exported, read_export
from .reach import check_reach, is_loopback
from .requests import Asked, Limits

# Requests that may wait; the next is told to come again.
MOST_WAITING = 64
# Seconds in which answers that are being written may still be finished when the server ends.
GRACE = 2
# Signals that end the server in good order.
ENDINGS = ("SIGINT", "SIGTERM", "SIGHUP")


class Answers(Protocol):
    """What a server needs of the model behind it."""

    name: str
    question: str | None
    marks: tuple[str, ...]

    def complete(self, asked: Asked) -> dict[str, Any]:
        """Answer a request with a whole reply."""

    def stream(self, asked: Asked) -> Iterator[bytes]:
        """Answer a request with server-sent events."""

    def close(self) -> None:
        """End."""


class GgufAnswers:
    """An exported model: prepares pictures as in training, and asks llama.cpp.

    Parameters
    ----------
    export : from `read_export`.
    type, threads, parallel : for `Engine`.
    """

    def __init__(
        self, export: Exported, type: str | None, threads: int | None, parallel: int
    ) -> None:
        self.export = export
        self.name = export.name
        self.question = export.question
        self.marks = export.marks
        self.warning = None
        if not export.is_proven(type):
            self.warning = f"{export.folder} is not proven to say what the model says: check_export"
        self.engine = Engine(export, type, threads=threads, parallel=parallel)

    def close(self) -> None:
        """End the process of llama.cpp."""
        self.engine.close()

    def complete(self, asked: Asked) -> dict[str, Any]:
        """Answer a request with a whole reply."""
        return {**self.engine.complete(self.request(asked)), "model": self.name}

    def stream(self, asked: Asked) -> Iterator[bytes]:
        """Pass on what llama.cpp says, event by event."""
        yield from self.engine.stream(self.request(asked))

    def request(self, asked: Asked) -> dict[str, Any]:
        """Write a request for llama.cpp."""
        return write_request(self.export, asked.messages, asked.pictures, **asked.settings)


def write_request(
    export: Exported, messages: list[dict[str, Any]], pictures: list[Any], **settings: Any
) -> dict[str, Any]:
    """Write a request for llama.cpp, with pictures in the size that the model saw in training.

    Parameters
    ----------
    export : the model that is asked.
    messages : roles and content parts, as a chat template takes them.
    pictures : one for each image part, in their order.
    **settings : such as max_tokens and temperature.
    """
    left = list(pictures)
    written = []
    for message in messages:
        parts = []
        for part in message["content"]:
            if part["type"] == "image":
                url = data_url(export.preparation.apply(left.pop(0)))
                parts.append({"type": "image_url", "image_url": {"url": url}})
            else:
                parts.append({"type": "text", "text": export.normalize(part["text"])})
        written.append({"role": message["role"], "content": parts})
    return {"messages": written, **settings}


class Served:
    """A server in the background, until `close` or the end of a `with`.

    Parameters
    ----------
    answers : the model behind it; `warning` says what is wrong with it, None where nothing is.
    listener : the socket that it listens on.
    host : the address, for people.
    password, limits, tls_cert, tls_key : see `serve`.
    """

    def __init__(  # noqa: PLR0913 - each is a setting of its own
        self,
        answers: Answers,
        listener: socket.socket,
        host: str,
        *,
        password: str | None,
        limits: Limits,
        tls_cert: str | os.PathLike | None,
        tls_key: str | os.PathLike | None,
    ) -> None:
        # of the extra; `serve` has said so where it is missing
        import uvicorn

        from .app import App

        self.answers = answers
        self.model = answers.name
        self.warning = getattr(answers, "warning", None)
        scheme = "https" if tls_cert else "http"
        shown = f"[{host}]" if ":" in host else host
        port = listener.getsockname()[1]
        self.address = f"{scheme}://{shown}:{port}/v1"
        hosts = _own_names(host) if is_loopback(host) else ["*"]
        config = uvicorn.Config(
            App(answers, limits, password, hosts).starlette(),
            # neither questions nor visitors are logged, and nobody else's logging is set up anew
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            limit_concurrency=MOST_WAITING,
            timeout_graceful_shutdown=GRACE,
            ssl_certfile=os.fspath(tls_cert) if tls_cert else None,
            ssl_keyfile=os.fspath(tls_key) if tls_key else None,
        )
        self.server = uvicorn.Server(config)
        self.listener = listener
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        while not self.server.started and self.thread.is_alive():
            time.sleep(0.01)
        if not self.server.started:
            self.close()
            raise OSError(f"the server at {self.address} did not start")

    def _run(self) -> None:
        try:
            self.server.run(sockets=[self.listener])
        finally:
            self.stopped.set()

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop serving, and end the process of llama.cpp."""
        self.server.should_exit = True
        # an answer that is being written ends with the model that writes it
        self.thread.join(timeout=GRACE + 1)
        self.answers.close()
        self.thread.join(timeout=GRACE)
        self.listener.close()

    def wait(self) -> None:
        """Wait for Ctrl-C, SIGTERM or SIGHUP, and close; the main thread must call it.

        Raises
        ------
        OSError : llama.cpp ended by itself.
        """
        end = threading.Event()
        before = {}
        for name in ENDINGS:
            number = getattr(signal, name, None)
            if number is not None:
                before[number] = signal.signal(number, lambda *_: end.set())
        try:
            engine = getattr(self.answers, "engine", None)
            while not end.wait(0.2) and not self.stopped.is_set():
                if engine and engine.process.poll() is not None:
                    raise OSError(f"llama.cpp ended by itself ({engine.process.returncode})")
        finally:
            self.close()
            for number, handler in before.items():
                signal.signal(number, handler)


def serve(  # noqa: PLR0913 - each is a setting that a caller names
    model: str | os.PathLike | Exported,
    *,
    type: str | None = None,
    base: str | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    password: str | None = None,
    tls_cert: str | os.PathLike | None = None,
    tls_key: str | os.PathLike | None = None,
    threads: int | None = None,
    parallel: int = 1,
    limits: Limits | None = None,
) -> Served:
    """Serve a model in the background, at an address that speaks OpenAI's API.

    Parameters
    ----------
    model : an exported model (`Exported`, its folder or one of its GGUF files), or the folder of a
        merged model or an adapter, which Transformers then answers.
    type : of the exported text part, such as "q8_0"; by default that of the file that is named, or
        the first that was written.
    base : the base model of an adapter, where its configuration does not name it.
    host : address to listen on. Another than one of this machine alone needs a password and TLS.
    port : where to listen; 0 for any that is free.
    password : what clients give as their API key, 8 characters or more.
    tls_cert, tls_key : PEM files of a certificate (with its chain) and of its private key.
    threads : of the CPU, for llama.cpp; by default all that this process may use.
    parallel : conversations that llama.cpp answers at the same time.
    limits : what one request may hold.

    Returns
    -------
    Served : its `address` says where, `model` what clients call the model; `close()` ends it.

    Raises
    ------
    ValueError : another host without a password or TLS, an unknown type, a model that does not fit.
    OSError : the port is taken, or the model cannot be loaded.
    ImportError : the extra `gguf` is not installed.

    Examples
    --------
    >>> with serve("export", port=8000) as server:  # doctest: +SKIP
    ...     print(server.address)
    """
    check_reach(host, password, tls_cert, tls_key)
    _import_server()
    listener = _listen(host, port)
    try:
        answers = _load(model, type, base, threads, parallel)
    except BaseException:
        listener.close()
        raise
    return Served(
        answers,
        listener,
        host,
        password=password,
        limits=limits or Limits(),
        tls_cert=tls_cert,
        tls_key=tls_key,
    )


def _import_server() -> None:
    try:
        import starlette  # noqa: F401 - an extra
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ImportError(f"serving needs: pip install 'medtune[gguf]' ({error})") from error


def _listen(host: str, port: int) -> socket.socket:
    """Open the port before anything is loaded: one that is taken shows at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise OSError(
            f"cannot listen on {host}, port {port}: {error.strerror or one_line(error)}"
        ) from error


def _load(
    model: str | os.PathLike | Exported,
    type: str | None,
    base: str | None,
    threads: int | None,
    parallel: int,
) -> Answers:
    """Start what answers."""
    if not isinstance(model, Exported):
        path = Path(model).expanduser()
        if path.suffix != ".gguf" and not (path / ABOUT).is_file():
            from .transformers_engine import TransformersEngine  # loads torch

            if type:
                raise ValueError(f"type={type}: {model} is no exported model")
            return TransformersEngine(model, base=base)
        named = path.name
        model = read_export(path)
        types = [known for known, file in model.files.items() if file == named]
        if path.suffix == ".gguf" and not types and named != model.mmproj:
            raise ValueError(f"{path} is none of the files of this export: {list(model.files)}")
        type = type or next(iter(types), None)
    return GgufAnswers(model, type, threads, parallel)


def _own_names(host: str) -> list[str]:
    """Names under which a browser or a client may call this machine.

    Another name that leads here would be that of a stranger's web page (DNS rebinding).
    """
    return ["127.0.0.1", "localhost", host]
