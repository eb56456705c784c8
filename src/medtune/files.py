"""Write a file whole or not at all and alone, read JSON Lines, put an error into one line, and a
picture too.
"""

import base64
import contextlib
import io
import json
import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock


def one_line(error: object, limit: int = 300) -> str:
    """Put the message of an error, or any text, into one line of at most `limit` characters.

    An error without a message gives the name of its class.

    Examples
    --------
    >>> one_line(ValueError("the file\\n   is empty"))
    'the file is empty'
    >>> one_line(KeyboardInterrupt())
    'KeyboardInterrupt'
    """
    return " ".join(str(error).split())[:limit] or type(error).__name__


def data_url(picture: Any) -> str:
    """Write a picture as the `data:` address of a PNG, as OpenAI's API takes it.

    Parameters
    ----------
    picture : of PIL; its metadata stay behind.

    Examples
    --------
    >>> from PIL import Image
    >>> data_url(Image.new("RGB", (1, 1)))[:22]
    'data:image/png;base64,'
    """
    file = io.BytesIO()
    # as bare pixels, so that no comment of the file goes along
    bare = picture.convert("RGB")
    bare.info = {}
    bare.save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def write_whole(
    path: str | os.PathLike, content: str | bytes, *, scratch: str | os.PathLike | None = None
) -> None:
    """Write a file whole or not at all: what has the file's name is complete, even after a kill.

    The content goes to a hidden file first, which then takes the name in one step.

    Parameters
    ----------
    path : the file; one that is there is replaced.
    content : text (written as UTF-8, line ends as they are) or bytes.
    scratch : folder for the hidden file, on the same disk; by default the folder of `path`.

    Raises
    ------
    OSError : no such folder, no permission, no space; nothing is left behind.

    Examples
    --------
    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp(), "note.txt")
    >>> write_whole(file, "done")
    >>> file.read_text()
    'done'
    """
    path = Path(path)
    # a name of its own, so that two threads may write the same file at the same time
    part = Path(scratch or path.parent) / f".{path.name}.{secrets.token_hex(4)}.part"
    try:
        part.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def only_writer(path: str | os.PathLike, named: str) -> Iterator[None]:
    """Keep other processes from writing a file, as long as they ask here too.

    The lock is a hidden file beside it. It falls with its process, however that ends.

    Parameters
    ----------
    path : the file; it need not exist, but its folder is made.
    named : what a message calls it, such as "out=answers.jsonl".

    Raises
    ------
    ValueError : in one line: another process writes there; it says which one.
    OSError : in one line: the folder cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp(), "answers.jsonl")
    >>> with only_writer(file, "out=answers.jsonl"):
    ...     with only_writer(file, "out=answers.jsonl"):
    ...         pass
    Traceback (most recent call last):
    ValueError: out=answers.jsonl is being written by process ...
    """
    path = Path(path)
    file = path.with_name(f".{path.name}.lock")
    lock = filelock.FileLock(file, timeout=0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        raise ValueError(
            f"{named} is being written by {_writer_of(file)}: wait for it, or name another place"
        ) from None
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from error
    try:
        # where a disk knows no locks, the library has written the same two lines itself
        if not isinstance(lock, filelock.SoftFileLock):
            file.write_text(f"{os.getpid()}\n{socket.gethostname()}\n", "utf-8")
        yield
    finally:
        # before the release: who waits for a file that is gone looks for a new one
        file.unlink(missing_ok=True)
        lock.release()


def _writer_of(file: Path) -> str:
    """Say which process holds a lock."""
    try:
        lines = file.read_text("utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    # between locking and writing its name a process has none
    if len(lines) < 2 or not lines[0].isdigit():
        return "another process"
    return f"process {lines[0]} on {lines[1]}"


def write_json(path: str | os.PathLike, value: Any, *, indent: int | None = 1) -> None:
    """Write a value as JSON, whole or not at all; text stays readable in any language.

    Examples
    --------
    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp(), "note.json")
    >>> write_json(file, {"organ": "脾"}, indent=None)
    >>> file.read_text("utf-8")
    '{"organ": "脾"}'
    """
    write_whole(path, json.dumps(value, indent=indent, ensure_ascii=False))


def read_json_lines(path: str | os.PathLike) -> Iterator[tuple[int, Any]]:
    r"""Yield (line number from 1, value) of a JSON Lines file; a line that is not JSON comes as its ValueError.

    Only a line feed ends a line: other signs that Unicode counts as line ends may stand inside a text. A byte order
    mark and blank lines are skipped, bytes that are not UTF-8 come out as U+FFFD.

    Examples
    --------
    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp(), "rows.jsonl")
    >>> _ = file.write_text('{"caption": "one\u2028line"}\n\n{"capt', "utf-8")
    >>> [(number, type(value).__name__) for number, value in read_json_lines(file)]
    [(1, 'dict'), (3, 'JSONDecodeError')]
    """
    with open(path, encoding="utf-8-sig", errors="replace", newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except ValueError as error:
                yield number, error
