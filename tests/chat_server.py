"""A small server on the loopback device that speaks OpenAI's protocol and Ollama's own.

It answers as it is told: with words, late, with a status, with half a reply, or not at all.
"""

import contextlib
import http.server
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Fault:
    """What the server does instead of answering."""

    #: Answer with this status.
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    #: Answer with these bytes, not with words in the protocol's form.
    raw: bytes | None = None
    #: Promise so many bytes more than come, and hang up.
    missing: int = 0
    #: Hang up without a word.
    drop: bool = False
    #: Seconds before the answer.
    late: float = 0.0
    #: Seconds between one byte and the next.
    drip: float = 0.0
    #: Words in the protocol's form, such as for a late answer.
    words: str = ""
    #: Say that the answer was cut short.
    cut_short: bool = False


class ChatServer:
    """The server; `with ChatServer(reply) as server` starts and ends it.

    `reply(text, number)` says what becomes of the request of that number, from 1: words or a `Fault`.
    `text` is the last caption that was asked about.
    """

    def __init__(self, reply: Callable[[str, int], "str | Fault"]) -> None:
        self.reply = reply
        self.requests: list[dict[str, Any]] = []
        self.lock = threading.Lock()
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.owner = self
        self.port = self.server.server_port
        self.ollama = f"http://127.0.0.1:{self.port}"
        self.openai = f"http://127.0.0.1:{self.port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> "ChatServer":
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.die()

    def die(self) -> None:
        """Stop listening: whoever comes is refused."""
        self.server.shutdown()
        self.server.server_close()

    @property
    def captions(self) -> list[str]:
        """What was asked about, in the order in which it came."""
        return [request["messages"][1]["content"] for request in self.requests]


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        owner = self.server.owner
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with owner.lock:
            owner.requests.append({"path": self.path, "headers": dict(self.headers), **body})
            number = len(owner.requests)
        answer = owner.reply(body["messages"][1]["content"], number)
        fault = answer if isinstance(answer, Fault) else Fault(words=answer)
        time.sleep(fault.late)
        if fault.drop:
            self.close_connection = True
            self.connection.close()
            return
        raw = fault.raw if fault.raw is not None else self.in_protocol(fault)
        # who asked may have gone
        with contextlib.suppress(OSError):
            self.send(fault, raw)

    def in_protocol(self, fault: Fault) -> bytes:
        """Put words into the form of the protocol that was asked in."""
        reason = "length" if fault.cut_short else "stop"
        message = {"role": "assistant", "content": fault.words}
        if self.path == "/api/chat":
            reply = {"model": "m", "message": message, "done": True, "done_reason": reason}
        elif self.path == "/v1/chat/completions":
            choice = {"index": 0, "message": message, "finish_reason": reason}
            reply = {"id": "x", "object": "chat.completion", "choices": [choice]}
        else:
            fault.status = 404
            reply = {"error": "no such path"}
        return json.dumps(reply).encode()

    def send(self, fault: Fault, raw: bytes) -> None:
        self.send_response(fault.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw) + fault.missing))
        for name, value in fault.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if not fault.drip:
            self.wfile.write(raw)
            return
        for byte in raw:
            self.wfile.write(bytes([byte]))
            time.sleep(fault.drip)

    def log_message(self, *args: object) -> None:
        pass
