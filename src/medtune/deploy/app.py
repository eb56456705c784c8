"""The paths of the server: /v1/models, /v1/chat/completions and /health.

It needs starlette, of the extra `gguf`; `serve` imports it when it has said so.
"""

import contextlib
import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from medtune.files import one_line

from .engine import EngineError
from .requests import Limits, Refused, read_request

if TYPE_CHECKING:
    from .serve import Answers


@dataclass
class App:
    """What is served.

    Parameters
    ----------
    answers : the model behind it.
    limits : what one request may hold.
    password : what clients give as their API key; None for none.
    hosts : names by which clients may call the server; "*" for any.
    """

    answers: "Answers"
    limits: Limits
    password: str | None
    hosts: list[str]

    def starlette(self) -> Starlette:
        """Give the application for uvicorn, or for a test client."""
        routes = [
            Route("/health", self.health),
            Route("/v1/models", self.models),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
        ]
        trusted = Middleware(TrustedHostMiddleware, allowed_hosts=self.hosts)
        return Starlette(routes=routes, middleware=[trusted])

    async def health(self, request: Request) -> Response:
        """Say that the server is there."""
        return JSONResponse({"status": "ok"})

    async def models(self, request: Request) -> Response:
        """Name the one model."""
        if not self.is_guest(request):
            return _no_guest()
        entry = {"id": self.answers.name, "object": "model", "created": 0, "owned_by": "medtune"}
        return JSONResponse({"object": "list", "data": [entry]})

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        if not self.is_guest(request):
            return _no_guest()
        # a page of another site may send text, but no JSON, without asking first
        if request.headers.get("content-type", "").split(";")[0] != "application/json":
            return _refusal("send application/json", 415)
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > self.limits.bytes:
                return _refusal(f"a request has at most {self.limits.bytes} bytes", 413)
        try:
            return await run_in_threadpool(self.reply, bytes(body))
        except (Refused, EngineError) as error:
            return _refusal(one_line(error), error.status)
        except ValueError as error:
            return _refusal(one_line(error), 400)

    def is_guest(self, request: Request) -> bool:
        """Tell whether somebody gave the password, if there is one."""
        if self.password is None:
            return True
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        # takes the same time wherever the first difference lies
        return secrets.compare_digest(given.encode(), self.password.encode())

    def reply(self, body: bytes) -> Response:
        """Answer a request; in a thread, for it takes seconds."""
        try:
            values = json.loads(body)
        except ValueError:
            raise Refused("the request is no JSON") from None
        asked = read_request(
            values,
            model=self.answers.name,
            limits=self.limits,
            marks=self.answers.marks,
            question=self.answers.question,
        )
        if not asked.stream:
            return JSONResponse(self.answers.complete(asked))
        events = self.answers.stream(asked)
        # what is wrong with the request shows with the first event, while a status can still say it
        first = next(events, b"")
        return StreamingResponse(_chain(first, events), media_type="text/event-stream")


def _chain(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    # the model behind may die in the middle: the stream then ends without its last event
    with contextlib.suppress(EngineError):
        yield from rest


def _refusal(message: str, status: int) -> Response:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind}}, status)


def _no_guest() -> Response:
    return _refusal("give the password as the API key", 401)
