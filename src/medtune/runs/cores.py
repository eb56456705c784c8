"""How many threads the notebooks of a run compute with: as many as cores are really free.

Threads that wait for a core make all others wait: beside other work two threads can be ten times
slower than one.
"""

import os
from dataclasses import dataclass

import psutil

# What OpenMP, MKL and OpenBLAS read, and with them PyTorch and NumPy.
VARIABLE = "OMP_NUM_THREADS"
# So long the cores are watched.
SECONDS = 0.3


@dataclass(frozen=True)
class Cores:
    """The cores of this machine, as a run may use them."""

    #: Cores that the process may run on; a container's share of time is not counted here.
    visible: int
    #: As many as a container or a user's limit (affinity, cgroup) leaves of them.
    allowed: int
    #: As many as nothing else keeps busy; at least one.
    free: int


def look_at_cores(seconds: float = SECONDS) -> Cores:
    """Count the cores that this process may use, and watch for a moment which of them are idle.

    Parameters
    ----------
    seconds : how long to watch.

    Returns
    -------
    Cores : what was found.

    Examples
    --------
    >>> cores = look_at_cores(0.05)
    >>> 1 <= cores.free <= cores.allowed
    True
    """
    # a quarter of a second that listing runs does not need; it knows affinity and cgroups
    import joblib

    busy = psutil.cpu_percent(seconds, percpu=True)
    # macOS does not know affinity
    knows_affinity = hasattr(os, "sched_getaffinity")
    own = os.sched_getaffinity(0) if knows_affinity else set(range(len(busy)))
    # a container may number its cores in another way than the machine does
    watched = [share for core, share in enumerate(busy) if core in own] or busy
    idle = sum(100 - share for share in watched) / 100
    allowed = min(joblib.cpu_count(), len(own))
    return Cores(len(own), allowed, max(1, min(allowed, round(idle))))


def choose_threads(cores: Cores) -> str:
    """Set the number of threads for the processes that are started from now on, and say so.

    A number that the user has set stays. Where every core is free nothing is set: the libraries
    then choose for themselves.

    Parameters
    ----------
    cores : what `look_at_cores` found.

    Returns
    -------
    str : one line about it.

    Examples
    --------
    >>> before = os.environ.pop("OMP_NUM_THREADS", None)
    >>> choose_threads(Cores(visible=8, allowed=8, free=3))
    '3 of 8 cores are free: 3 threads (OMP_NUM_THREADS=3 repeats the last digits of the results)'
    >>> choose_threads(Cores(visible=8, allowed=8, free=8))
    'threads: OMP_NUM_THREADS=3, as it was set'
    >>> del os.environ["OMP_NUM_THREADS"]
    >>> if before:
    ...     os.environ["OMP_NUM_THREADS"] = before
    """
    if VARIABLE in os.environ:
        return f"threads: {VARIABLE}={os.environ[VARIABLE]}, as it was set"
    if cores.free == cores.visible:
        return f"all of {_count(cores.visible, 'core')} free: {_count(cores.visible, 'thread')}"
    os.environ[VARIABLE] = str(cores.free)
    of = (
        f"{cores.free} of {_count(cores.visible, 'core')} {'is' if cores.free == 1 else 'are'} free"
    )
    if cores.allowed < cores.visible:
        of += f" (this process may use the time of {cores.allowed})"
    again = f"{VARIABLE}={cores.free} repeats the last digits of the results"
    return f"{of}: {_count(cores.free, 'thread')} ({again})"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
