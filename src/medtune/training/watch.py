"""Run a training in processes of its own, and watch it: what it prints, and how long it takes.

Needs the standard library only. This file stands alone and can be copied into another project.
"""

import os
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence


def run_watched(
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    minutes_at_most: float = 5.0,
    on_line: Callable[[str], object] | None = None,
) -> float:
    """Run a command until it ends; stop it when it takes too long or this process is interrupted.

    Parameters
    ----------
    command : the words of the command line.
    environment : variables to set, on top of those of this process.
    minutes_at_most : after so many minutes the command gets SIGTERM. A launcher such as torchrun
        then ends its ranks.
    on_line : called with each line that the command prints, as soon as it is printed; errors are
        among the lines.

    Returns
    -------
    float : the seconds that it took.

    Raises
    ------
    RuntimeError : the command failed or was stopped; ends with the last it printed, enough for a
        launcher's own traceback and what its ranks said before.

    Examples
    --------
    >>> import sys
    >>> seconds = run_watched([sys.executable, "-c", "print('loss 2.0')"], on_line=print)
    loss 2.0
    """
    printed = []
    started = time.perf_counter()
    with subprocess.Popen(
        command,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        timer = threading.Timer(60 * minutes_at_most, process.terminate)
        timer.start()
        try:
            for line in process.stdout:
                printed.append(line)
                if on_line:
                    on_line(line.rstrip("\n"))
        finally:
            timer.cancel()
            # After Ctrl-C the ranks would go on without this.
            process.terminate()
    seconds = time.perf_counter() - started
    if process.returncode != 0:
        problem = f"the command ended with exit code {process.returncode}"
        if seconds >= 60 * minutes_at_most:
            problem = f"the command took over {minutes_at_most} minutes and was stopped"
        raise RuntimeError(f"{problem}; the last it printed: {''.join(printed)[-4000:]}")
    return seconds
