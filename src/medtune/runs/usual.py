"""What a notebook usually takes, and a word of warning when it takes far longer."""

import contextlib
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

# A step that takes so many times its usual time is worth a look.
FAR_LONGER = 5


def usual_minutes(name: str, root: Path) -> dict[str, float]:
    """Read how long each notebook took in the reference run that is kept of a run.

    Parameters
    ----------
    name : the run; a run that was copied from it under another name has no reference of its own.
    root : the repository.

    Returns
    -------
    dict : notebook to minutes; empty where there is no reference.

    Examples
    --------
    >>> usual_minutes("no-such-run", Path("."))
    {}
    """
    file = root / "papermill_runs" / "reference" / name / "summary.json"
    try:
        return dict(json.loads(file.read_text("utf-8"))["timing"])
    except (OSError, ValueError, KeyError):
        # nothing depends on it but a warning
        return {}


@contextlib.contextmanager
def warn_if_slow(notebook: str, minutes: float | None) -> Iterator[None]:
    """Warn once, on the error stream, if what stands in the block takes five times its usual time.

    Parameters
    ----------
    notebook : what runs.
    minutes : its usual time; None or 0 if it is not known.

    Yields
    ------
    None
    """
    if not minutes:
        yield
        return
    text = (
        f"\nmedtune: {notebook} has taken {FAR_LONGER} times the {minutes:g} minutes of the "
        "reference run and goes on. Other work on the cores? Ctrl-C, then the same command with "
        "OMP_NUM_THREADS=1 before it continues."
    )
    timer = threading.Timer(FAR_LONGER * minutes * 60, print, [text], {"file": sys.stderr})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
