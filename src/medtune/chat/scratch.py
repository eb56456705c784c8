"""A private folder for what visitors send: it goes when the page ends, by whatever signal.

Gradio keeps uploads and the pictures that it shows where GRADIO_TEMP_DIR says, by default in a
folder that all users of a machine can look into. A page gets a folder of its own instead, which
only its owner may enter. Nothing can clear up after `kill -9`, so the next page does.
"""

import atexit
import contextlib
import os
import shutil
import signal
import stat
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

# How the names of the folders begin.
PREFIX = "medtune-chat-"
# A file in the folder. Its process holds a lock on it, and the system lets go of a lock when the
# process dies, however it dies; a number of a process could by then belong to another one.
MARK = "in-use.lock"
# The variable that tells gradio where to keep files.
VARIABLE = "GRADIO_TEMP_DIR"
# Signals that end a process at once, if nobody listens. Ctrl-C is an exception in Python, and
# the functions that `atexit` knows still run.
ENDINGS = ("SIGTERM", "SIGHUP", "SIGQUIT")


@dataclass
class Scratch:
    """The private folder of this process."""

    folder: Path
    #: Held as long as the folder is in use.
    lock: filelock.BaseFileLock
    #: What GRADIO_TEMP_DIR was before; None if it was not set.
    before: str | None
    #: The process that made the folder: one that was forked from it must not remove it.
    process: int
    #: Pages that use the folder. They share it: gradio's variable is one for all.
    pages: int = 0


# Of this process, or None; in a list, so that the functions below can change it.
_current: list[Scratch] = []


def open_scratch() -> Path:
    """Give the private folder of this process to one more page; make it for the first.

    What pages left that were killed is removed before.

    Returns
    -------
    Path : the folder, for its owner alone (mode 0700).

    Raises
    ------
    OSError : the folder for temporary files cannot be written.

    Examples
    --------
    >>> folder = open_scratch()
    >>> oct(folder.stat().st_mode)[-3:]
    '700'
    >>> close_scratch()
    >>> folder.exists()
    False
    """
    if not _current:
        before = os.environ.get(VARIABLE)
        # who names a folder for gradio, on an encrypted disk perhaps, finds ours in there
        parent = Path(before or tempfile.gettempdir())
        parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(parent)
        folder, lock = _make(parent)
        _current.append(Scratch(folder, lock, before, os.getpid()))
        os.environ[VARIABLE] = str(folder / "gradio")
        atexit.register(_remove)
        _listen()
    _current[0].pages += 1
    return _current[0].folder


def close_scratch() -> None:
    """Say that a page has ended; with the last one the folder goes. See `open_scratch`."""
    if not _current:
        return
    _current[0].pages -= 1
    if _current[0].pages <= 0:
        _remove()


def _make(parent: Path) -> tuple[Path, filelock.BaseFileLock]:
    """Make a folder with a mark, and lock it."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        lock = filelock.FileLock(folder / MARK)
        with contextlib.suppress(filelock.Timeout, FileNotFoundError):
            lock.acquire(timeout=0)
            if (folder / MARK).exists():
                return folder, lock
        # another page took it for a leftover, in the moment before the lock


def _remove() -> None:
    """Remove the folder of this process, if there is one."""
    if not _current or _current[0].process != os.getpid():
        return
    scratch = _current.pop()
    _remove_folder(scratch.folder, scratch.lock)
    if scratch.before is None:
        os.environ.pop(VARIABLE, None)
    else:
        os.environ[VARIABLE] = scratch.before


def _remove_folder(folder: Path, lock: filelock.BaseFileLock) -> None:
    """Remove a folder, its mark last: one that is half removed must still be known as ours."""
    # a thread of the server may be writing: what comes in between is removed in the next round
    for _ in range(10):
        inside = [path for path in folder.glob("*") if path.name != MARK]
        if not inside:
            break
        for path in inside:
            shutil.rmtree(path, ignore_errors=True)
    lock.release()
    shutil.rmtree(folder, ignore_errors=True)


def _remove_leftovers(parent: Path) -> None:
    """Remove the folders of pages that are dead; those of others and of living ones stay."""
    for folder in sorted(parent.glob(f"{PREFIX}*")):
        if not _is_mine(folder):
            continue
        lock = filelock.FileLock(folder / MARK)
        # locked: its page lives. Gone: another page that starts now was faster
        with contextlib.suppress(filelock.Timeout, OSError):
            lock.acquire(timeout=0)
            _remove_folder(folder, lock)


def _is_mine(folder: Path) -> bool:
    """Tell whether this user's page made a folder; links that lead elsewhere are not followed."""
    try:
        about = folder.lstat()
        mark = (folder / MARK).lstat()
    except OSError:
        return False
    if hasattr(os, "getuid") and about.st_uid != os.getuid():
        return False
    return stat.S_ISDIR(about.st_mode) and stat.S_ISREG(mark.st_mode)


def _listen() -> None:
    """Clear up before a signal ends the process, where nobody else listens to that signal."""
    if threading.current_thread() is not threading.main_thread():
        # Python lets no other thread listen; the next page clears up
        return
    for name in ENDINGS:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _clear_up_and_end)


def _clear_up_and_end(number: int, frame: Any) -> None:
    # a second signal would otherwise come in between, and end the process half way
    for name in ENDINGS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    _remove()
    # ends the process as it would have ended without us, so that its parent sees the signal
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)
