"""How many bytes a rank sends in a step, read from a trace of PyTorch's profiler.

Needs the standard library only. This file stands alone and can be copied into another project.
"""

import json
import math
import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

# How the profiler calls the messages of gloo (on a CPU) and NCCL (on GPUs), such as
# "gloo:all_reduce" and "nccl:_all_gather_base".
MESSAGE = re.compile(r"(?:gloo|nccl):_?(all_reduce|all_gather|reduce_scatter|broadcast).*")

# Bytes of one number, by the type's name in C++. All others have four.
BYTES_OF_TYPE = {"long int": 8, "double": 8, "c10::BFloat16": 2}

# Counts and flags are smaller: they cost no time worth counting.
SMALLEST = 1000


def bytes_sent(trace: str | PathLike, ranks: int) -> dict[str, float]:
    """Sum up the bytes that a rank sends, by kind of message.

    The trace has the size of each message. What a rank sends of it follows from the usual ring
    algorithms. For a message of n bytes that is 2 (N-1)/N n in an all-reduce, (N-1)/N n in a
    reduce-scatter and n in a broadcast; an all-gather of shards of n bytes sends (N-1) n.

    Parameters
    ----------
    trace : file that `torch.profiler.profile(record_shapes=True)` exported on one rank.
    ranks : number N of the ranks.

    Returns
    -------
    dict : bytes by "all_reduce", "all_gather", "reduce_scatter" and "broadcast"; kinds that do not
        occur are left out, and so are messages of less than 1,000 bytes.

    Examples
    --------
    >>> import tempfile
    >>> gradients = {"Input Dims": [[1000]], "Input type": ["float"]}
    >>> events = [{"name": "gloo:all_reduce", "args": gradients}, {"name": "aten::mm"}]
    >>> trace = Path(tempfile.mkdtemp()) / "trace.json"
    >>> _ = trace.write_text(json.dumps({"traceEvents": events}))
    >>> bytes_sent(trace, ranks=4)
    {'all_reduce': 6000.0}
    """
    share_of_others = (ranks - 1) / ranks
    sent_per_byte = {
        "all_reduce": 2 * share_of_others,
        "all_gather": ranks - 1,
        "reduce_scatter": share_of_others,
        "broadcast": 1,
    }
    sent: dict[str, float] = {}
    for event in json.loads(Path(trace).read_text("utf-8"))["traceEvents"]:
        message = MESSAGE.fullmatch(event.get("name", ""))
        if message is None:
            continue
        size = _size_of(event.get("args", {}))
        if size >= SMALLEST:
            kind = message[1]
            sent[kind] = sent.get(kind, 0) + sent_per_byte[kind] * size
    return sent


def _size_of(arguments: Mapping[str, Any]) -> int:
    """Return the bytes of the first tensor that a message was given, 0 if it was given none."""
    shapes = arguments.get("Input Dims")
    if not shapes or not shapes[0]:
        return 0
    types = arguments.get("Input type", [""])
    return BYTES_OF_TYPE.get(types[0], 4) * math.prod(shapes[0])
