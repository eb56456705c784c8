"""Do the same for each shard of a set on the machines of a Ray cluster.

Ray starts the work, gives it to another machine when one is lost, and brings back what came of it.
What the work is stands in the rooms that have it: `medtune.records` (conversion), `medtune.audit`
(fingerprints) and `medtune.answers`.

Ray has no passwords unless it is told to (`RAY_AUTH_MODE=token`), and what travels between its
machines are pickles: whoever reaches a port of the cluster can run programs on it. So it belongs into
a network that nobody else reaches.
"""

import contextlib
import itertools
import logging
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm

import medtune

from .files import one_line

# How often a job is begun anew after its machine or its process was lost. A job that ends its own
# process, such as one that needs more memory than there is, must not go round for ever.
RETRIES = 3
# Jobs that wait at Ray for each processor; more would only fill its memory with their arguments.
WAITING = 2
# A head that does not answer for so long is not there.
SECONDS_TO_REACH = 10
# So many jobs that failed are named one by one.
MOST_NAMED = 3


@dataclass(frozen=True)
class Cluster:
    """The machines of a Ray cluster, which `join_cluster` gives.

    Attributes
    ----------
    ray
        The library, connected.
    """

    ray: Any

    def each(
        self,
        work: Callable[..., Any],
        jobs: Mapping[str, tuple] | Iterable[tuple[str, tuple]],
        take: Callable[[str, Any], None],
        *,
        title: str,
    ) -> dict[str, str]:
        """Do the same with many arguments, on all machines.

        Each job has one processor, and one GPU if the cluster has any. When a machine is lost,
        others do its jobs again. Each result is taken once; but a job may be begun twice, so it must
        leave nothing behind that counts before it is done.

        Parameters
        ----------
        work : a function of a module that all machines have; it gets the arguments of a job.
        jobs : the arguments of each job, by its name; or pairs of both, which are taken as they are
            needed where all of them would fill the memory.
        take : called here with the name and the result of each job that is done, in any order.
        title : what the progress bar is called.

        Returns
        -------
        dict : why a job failed, in one line, by its name; the others were done all the same.
        """
        resources = self.ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        most = WAITING * max(1, gpus or int(resources.get("CPU", 1)))
        # SPREAD, because Ray would fill one machine before it looks at the next
        remote = self.ray.remote(
            num_cpus=1,
            num_gpus=1 if gpus else 0,
            max_retries=RETRIES,
            scheduling_strategy="SPREAD",
        )(_work_alike)
        waiting = iter(jobs.items() if isinstance(jobs, Mapping) else jobs)
        running: dict[Any, str] = {}
        failed: dict[str, str] = {}
        total = len(jobs) if isinstance(jobs, Mapping) else None
        with tqdm(total=total, desc=title, delay=2) as bar:
            while True:
                # so many that no processor waits, and no more
                for name, arguments in itertools.islice(waiting, most - len(running)):
                    running[remote.remote(medtune.__version__, work, arguments)] = name
                if not running:
                    return failed
                (done,), _ = self.ray.wait(list(running), num_returns=1)
                name = running.pop(done)
                try:
                    result = self.ray.get(done)
                except self.ray.exceptions.RayError as error:
                    failed[name] = _reason_of(error)
                else:
                    take(name, result)
                bar.update(1)


def _work_alike(version: str, work: Callable[..., Any], arguments: tuple) -> Any:
    """Do a job on a machine of the cluster, if it has the package that the caller has."""
    if version != medtune.__version__:
        raise ValueError(
            f"a machine of the cluster has medtune {medtune.__version__}, and the one that asks "
            f"{version}: install the same on all"
        )
    return work(*arguments)


@contextlib.contextmanager
def join_cluster(address: str) -> Iterator[Cluster]:
    """Join a Ray cluster for a while.

    Parameters
    ----------
    address : HOST:PORT of the cluster's head, or "auto" on one of its machines. This process must
        run on one of them.

    Raises
    ------
    ImportError : there is no Ray here.
    OSError : there is no cluster at the address.

    Examples
    --------
    >>> with join_cluster("10.0.0.1:6379") as cluster:  # doctest: +SKIP
    ...     cluster.each(len, {"a": ("abc",)}, print, title="Counting")
    a 3
    """
    try:
        import ray
    except ImportError:
        raise ImportError(f"ray={address} needs its extra: pip install 'medtune[ray]'") from None
    with contextlib.ExitStack() as told:
        # Ray prints there when a machine is lost; where results are printed nothing else may stand
        told.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield _joined(ray, address, told)


def _joined(ray: Any, address: str, until: contextlib.ExitStack) -> Cluster:
    """Connect, for as long as the stack stands."""
    try:
        _reach(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        raise OSError(
            f"no cluster can be joined at ray={address}: start this on one of its machines, and say "
            f"where its head is, HOST:PORT as 'ray start --head' prints it ({one_line(error)})"
        ) from None
    # what still runs for this process ends with it
    until.callback(ray.shutdown)
    return Cluster(ray)


def _reach(address: str) -> None:
    """Knock at the head's port: Ray itself would try for minutes.

    Raises
    ------
    OSError : nobody answers.
    """
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=SECONDS_TO_REACH).close()


def _reason_of(error: Exception) -> str:
    """Say in one line why a job failed: what it raised itself, or what Ray says of its process."""
    cause = getattr(error, "cause", None)
    if cause is None:
        return f"its process or machine was lost {RETRIES + 1} times ({one_line(error)})"
    if isinstance(cause, OSError | ValueError):
        return one_line(cause)
    return f"{type(cause).__name__}: {one_line(cause)}"


def name_failed(failed: Mapping[str, str], total: int, what: str) -> str:
    """Say in one line which jobs failed, and why.

    Parameters
    ----------
    failed : the reasons by name, of `Cluster.each`.
    total : how many jobs there were.
    what : what was not done, such as "shards were not converted".

    Examples
    --------
    >>> name_failed({"a.parquet": "it is cut off"}, 8, "shards were not converted")
    '1 of 8 shards were not converted: a.parquet (it is cut off)'
    """
    named = [f"{name} ({reason})" for name, reason in failed.items()]
    text = f"{len(failed)} of {total} {what}: {'; '.join(named[:MOST_NAMED])}"
    if len(named) > MOST_NAMED:
        text += f"; and {len(named) - MOST_NAMED} more"
    return text
