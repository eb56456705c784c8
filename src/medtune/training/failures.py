"""What ended a training, in one line that says what to do."""

from __future__ import annotations

import errno
import re

import torch

from medtune.files import one_line

# What gloo and NCCL say when another rank is gone or cannot be reached: which of these comes first
# is a matter of milliseconds. torch has no class of its own for the first two.
LOST_CONNECTION = (
    "Timed out",
    "pair closure",
    "Connection closed",
    "Connection reset",
    "NCCL error",
)

# torch says of a loader process that it was killed, that it exited, or that it waits for it in vain.
DEAD_LOADER = re.compile(r"DataLoader worker|DataLoader timed out")

# An error from a loader process comes with its traceback; the last line is the error's own.
FROM_LOADER = re.compile(r"Caught \w+ in DataLoader worker process \d+\.")
NAME_OF_ERROR = re.compile(r"^[\w.]*(?:Error|Exception|Warning): ")

# Of these torch and the system have no class of their own: what malloc, mmap, fork and oneDNN say.
NO_MEMORY = (
    "not enough memory",
    "can't allocate memory",
    "Cannot allocate memory",
    "bad_alloc",
    "can't start new thread",
    "could not create a primitive",
    "could not create a memory",
    # Python's words for a C function that had no memory left even for its error
    "error return without exception set",
)

# torch and safetensors have classes of their own for a disk that is full while they write.
NO_SPACE = (
    "No space left on device",
    "Disk quota exceeded",
    "PytorchStreamWriter failed",
    "iostream error",
)


def explain(error: BaseException, out: str = "output_dir") -> tuple[str, bool]:
    """Say what ended a training.

    Parameters
    ----------
    error : what was raised.
    out : folder that the training writes to.

    Returns
    -------
    tuple : one line, and whether it is all that a user needs; of other errors the traceback tells
        more.

    Examples
    --------
    >>> explain(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "))[0][:30]
    'a process that loads data died'
    """
    # long enough for any message: the end of a line often says what to do
    line = one_line(error, limit=10_000)
    for_users = isinstance(error, (ValueError, OSError))
    if FROM_LOADER.match(line):
        last = str(error).strip().splitlines()[-1]
        line = one_line(NAME_OF_ERROR.sub("", last), limit=10_000)
    elif DEAD_LOADER.search(line):
        line = (
            "a process that loads data died, mostly because memory ran out: set "
            "dataloader_num_workers=0 or to fewer, or give the job more memory; "
            f"--resume goes on from the last checkpoint ({line})"
        )
        for_users = True
    elif any(words in line for words in NO_SPACE):
        line = (
            f"the disk of {out} is full: free some space, "
            f"--resume goes on from the last checkpoint ({line})"
        )
        for_users = True
    elif _is_about_memory(error, line):
        line = (
            "memory ran out: set a smaller per_device_train_batch_size, fewer max_pixels, "
            f"activation_checkpointing=true or load_in_4bit=true; `medtune plan` says what fits "
            f"({one_line(error)})"
        )
        for_users = True
    if any(words in line for words in LOST_CONNECTION):
        line = (
            "lost the connection to the other ranks, "
            f"--resume goes on from the last checkpoint ({line})"
        )
    return line, for_users


def _is_about_memory(error: BaseException, line: str) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return any(words in line for words in NO_MEMORY)
