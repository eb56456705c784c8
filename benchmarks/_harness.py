"""What several benchmarks share: settings as arguments, processes of their own, clocks, results.

The package must be importable: installed, or with its folder `src` in PYTHONPATH.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from medtune.files import read_json_lines, write_whole

REPO = Path(__file__).resolve().parents[1]
TINY_MODEL = REPO / "data" / "tiny-vlm"
SAMPLE = REPO / "data" / "sample" / "sample.parquet"


# ---- the command line


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Make a parser whose help is the docstring of a script, with its line breaks."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def to_arguments(settings: Mapping[str, Any]) -> list[str]:
    """Write settings as words of a command line; a list becomes several words.

    >>> to_arguments({"max_steps": 2, "bf16": False, "save": ["head", "tail"]})
    ['--max_steps', '2', '--bf16', 'False', '--save', 'head', 'tail']
    """
    words = []
    for key, value in settings.items():
        values = value if isinstance(value, list | tuple) else [value]
        words += [f"--{key}", *map(str, values)]
    return words


# ---- processes


def torchrun(ranks: int) -> list[str]:
    """Give the words that start several ranks on this machine; what each of them runs follows."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    # port 0: the first that is free
    return [*command, "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]


def environment_of_ranks(**changes: str) -> dict[str, str]:
    """Give the environment of this process, in which ranks find the package, with changes."""
    folders = [str(REPO / "src"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(folders), **changes}


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Parameters
    ----------
    code : its exit code, below 0 for a signal.
    timed_out : it was killed because its time was up.
    """

    code: int
    timed_out: bool


def run_for(
    command: Sequence[str],
    seconds: float,
    log: Path,
    environment: Mapping[str, str] | None = None,
) -> Ended:
    """Run a command for at most so many seconds; what it prints goes to the file `log`."""
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
        try:
            return Ended(process.wait(timeout=seconds), timed_out=False)
        except subprocess.TimeoutExpired:
            # ranks have sessions of their own, so that killing the group would not reach them
            for child in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            process.kill()
            return Ended(process.wait(), timed_out=True)


# ---- time and memory


@dataclass(frozen=True)
class Spent:
    """Seconds since a stopwatch started.

    Parameters
    ----------
    wall : by the clock on the wall.
    cpu : of this process on all processors, which tells more on a shared machine.
    """

    wall: float
    cpu: float


class Stopwatch:
    """Measure seconds from here on; `before_reading` waits for work that still runs on a GPU."""

    def __init__(self, before_reading: Callable[[], None] | None = None):
        self._before_reading = before_reading
        self._start = self._now()

    def _now(self) -> Spent:
        if self._before_reading:
            self._before_reading()
        return Spent(time.perf_counter(), time.process_time())

    def read(self) -> Spent:
        """Say how much time has passed."""
        now = self._now()
        return Spent(now.wall - self._start.wall, now.cpu - self._start.cpu)


def peak_memory_mb() -> float:
    """Give the peak of this process's memory in MiB; Linux only."""
    # of this program alone: what resource.getrusage says begins with the peak of the one before
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


# ---- results


def losses_of(log: Iterable[Mapping[str, Any]]) -> list[float]:
    """Pick the training losses out of a log of Transformers."""
    return [entry["loss"] for entry in log if "loss" in entry]


def read_log(output_dir: str | os.PathLike) -> list[dict[str, Any]]:
    """Read the log that a training left in its folder."""
    return json.loads(Path(output_dir, "log.json").read_text("utf-8"))


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Read a file of JSON Lines, empty if there is none; a line that a kill cut short is left out."""
    if not file.exists():
        return []
    return [row for _, row in read_json_lines(file) if isinstance(row, dict)]


def append_row(file: Path, row: Mapping[str, Any]) -> None:
    """Append one line to a file of JSON Lines."""
    with open(file, "a", encoding="utf-8") as lines:
        lines.write(json.dumps(row) + "\n")


def write_result(file: Path, value: Any) -> None:
    """Write a result as indented JSON, in a folder that is made if need be."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(value, indent=1) + "\n")
