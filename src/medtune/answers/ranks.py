"""Several processes under torchrun answer one data set together, as many as there are GPUs.

Each takes every n-th batch and adds its answers to the one file; in the end each has them all. A
run that was killed goes on with any number of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this one is.

    Attributes
    ----------
    rank
        Its number, from 0.
    count
        How many there are; 1 where nobody shares anything.
    """

    rank: int = 0
    count: int = 1

    def share(self, things: Sequence[Any]) -> list[Any]:
        """Give the part of a list that this process does.

        Examples
        --------
        >>> Ranks(1, 3).share("abcdefg")
        ['b', 'e']
        """
        return list(things[self.rank :: self.count])

    def of_first(self, work: Callable[[], Any]) -> Any:
        """Let the first process do something, and give all what it got; its error is that of all.

        Examples
        --------
        >>> Ranks().of_first(lambda: 7)
        7
        """
        if self.count == 1:
            return work()
        done: tuple[Any, Exception | None] = (None, None)
        if self.rank == 0:
            try:
                done = (work(), None)
            except (OSError, ValueError) as error:
                done = (None, error)
        result, error = broadcast_object_list([done])[0]
        if error is not None:
            raise error
        return result

    def collect(self, answers: Mapping[str, Any]) -> dict[str, Any]:
        """Put the answers of all processes together, once each has its own.

        Examples
        --------
        >>> Ranks().collect({"a": 1})
        {'a': 1}
        """
        if self.count == 1:
            return dict(answers)
        together: dict[str, Any] = {}
        for part in gather_object([dict(answers)]):
            together |= part
        return together


def find_ranks(*, over_ranks: bool) -> Ranks:
    """Find out which process this is of those that torchrun started.

    Parameters
    ----------
    over_ranks : whether they work together; if not, each stands alone.

    Examples
    --------
    >>> find_ranks(over_ranks=True)
    Ranks(rank=0, count=1)
    """
    started = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ
    if not over_ranks or not (started or torch.distributed.is_initialized()):
        return Ranks()
    # it connects the processes, if nobody has done so; on a CPU only where it is told of it
    state = PartialState(cpu=not torch.cuda.is_available())
    return Ranks(state.process_index, state.num_processes)
