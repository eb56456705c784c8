"""Start llama.cpp in a process of its own, ask it, and end it."""

import contextlib
import http.client
import importlib.util
import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from medtune.files import one_line

from .exported import Exported

PROGRAM = Path(__file__).with_name("engine_process.py")
# Seconds: a long answer of a large model on a slow machine.
PATIENCE = 600.0


class EngineError(OSError):
    """The engine does not answer, or refuses a request.

    Attributes
    ----------
    status : of HTTP; 503 where it does not answer at all.
    """

    def __init__(self, message: str, status: int = 503) -> None:
        super().__init__(message)
        self.status = status


class Engine:
    """llama.cpp with the two files of an export, until `close` or the end of a `with`.

    It listens on 127.0.0.1 and answers only who knows its key, which is made anew each time.

    Parameters
    ----------
    export : from `read_export`.
    type : such as "f16"; by default the first that was exported.
    limits : keep pictures within the limits of the model's processor. The file does not hold them:
        without them llama.cpp takes its own, and the model sees pictures as it never did before.
    threads : of the CPU; by default OMP_NUM_THREADS, or all that this process may use.
    parallel : conversations that are answered at the same time.

    Raises
    ------
    ImportError : xllamacpp is not installed.
    OSError : llama.cpp cannot load the files.

    Examples
    --------
    >>> with Engine(read_export("model")) as engine:  # doctest: +SKIP
    ...     engine.complete({"messages": [{"role": "user", "content": "Hello"}]})
    """

    def __init__(
        self,
        export: Exported,
        type: str | None = None,
        *,
        limits: bool = True,
        threads: int | None = None,
        parallel: int = 1,
    ) -> None:
        if importlib.util.find_spec("xllamacpp") is None:
            raise ImportError("a GGUF file needs llama.cpp: pip install 'medtune[gguf]'")
        self.export = export
        self.file = export.text_file(type)
        self.key = secrets.token_hex(16)
        preparation = export.preparation
        settings = {
            "model": str(self.file),
            "mmproj": str(export.folder / export.mmproj),
            "name": export.name,
            "key": self.key,
            "context": export.context,
            "parallel": parallel,
            "threads": threads or _threads(),
            # a picture that is not square may have fewer tokens than the least number of pixels
            # suggests: it is brought to its size before it comes here
            "image_min_tokens": 1,
            "image_max_tokens": preparation.max_tokens if limits else None,
        }
        # llama.cpp says there what is wrong with a file
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process
        self.process = subprocess.Popen(
            [sys.executable, str(PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            # Ctrl-C goes to all processes of a terminal: this one ends after those who ask it
            start_new_session=True,
        )
        try:
            self.process.stdin.write(json.dumps(settings) + "\n")
            self.process.stdin.flush()
            said = json.loads(self.process.stdout.readline() or "{}")
        except (OSError, ValueError):
            said = {}
        except BaseException:
            self.close()
            raise
        if "address" not in said:
            self.close()
            raise OSError(
                f"llama.cpp cannot load {self.file}: {said.get('error') or self._last_words()}"
            )
        self.address = urlsplit(said["address"])

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def memory(self) -> int:
        """Give the bytes of memory that the process holds now."""
        return psutil.Process(self.process.pid).memory_info().rss

    def seconds(self) -> float:
        """Give the seconds of CPU time that the process has used."""
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    def complete(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Ask for a whole answer.

        Parameters
        ----------
        request : a request of OpenAI's API for chat completions, its pictures as `data:` addresses.

        Returns
        -------
        dict : the reply, as OpenAI's API gives it.

        Raises
        ------
        EngineError : it does not answer, or refuses the request.
        """
        with self._send("/v1/chat/completions", request) as reply:
            return json.loads(reply.read())

    def stream(self, request: Mapping[str, Any]) -> Iterator[bytes]:
        """Ask for an answer that comes word by word, and pass on its server-sent events.

        Parameters
        ----------
        request : see `complete`.

        Raises
        ------
        EngineError : see `complete`.
        """
        with self._send("/v1/chat/completions", {**request, "stream": True}) as reply:
            while line := reply.readline():
                yield line

    def tokenize(self, text: str) -> list[int]:
        """Give the tokens of a text, marks of the chat template as one token each."""
        request = {"content": text, "add_special": False, "parse_special": True}
        with self._send("/tokenize", request) as reply:
            return json.loads(reply.read())["tokens"]

    @contextlib.contextmanager
    def _send(self, path: str, request: Mapping[str, Any]) -> Iterator[http.client.HTTPResponse]:
        connection = http.client.HTTPConnection(
            self.address.hostname, self.address.port, timeout=PATIENCE
        )
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        try:
            connection.request("POST", path, json.dumps(request), headers)
            reply = connection.getresponse()
            if reply.status != 200:
                raise EngineError(_why(reply.read()), reply.status)
            yield reply
        except EngineError:
            raise
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(f"llama.cpp does not answer: {one_line(error)}") from error
        finally:
            # llama.cpp stops to generate for who no longer listens
            connection.close()

    def _last_words(self) -> str:
        """Give the end of what llama.cpp wrote before it died."""
        self.log.seek(0)
        lines = self.log.read().decode("utf-8", "replace").strip().splitlines()
        code = self.process.returncode
        return one_line(lines[-1]) if lines else f"its process ended with {code}"


def _why(body: bytes) -> str:
    """Read the message of an error reply."""
    try:
        return one_line(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return "llama.cpp refuses the request"


def _threads() -> int:
    """Say how many threads to compute with."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return int(wanted) if wanted.isdigit() and int(wanted) > 0 else len(os.sched_getaffinity(0))
