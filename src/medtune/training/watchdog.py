"""Says what a training waits for when no step has come to its end for a while; it stops nothing.

A training that hangs says nothing by itself: a loader process waits for a lock, a disk of the
network is gone, another rank has ended.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from transformers import TrainerCallback

# Calls of the main thread that are shown, innermost first.
CALLS_SHOWN = 4

# Child processes that are shown.
PROCESSES_SHOWN = 8

# Over so many seconds the processor time of a child is measured.
MEASURED = 0.5

# What the main thread does, by a part of the name of a file on its stack; the first that fits.
# Where it waits for batches, or prepares them, stands further in than the trainer's own steps.
DOES = {
    "torch/utils/data/_utils/fetch.py": "it prepares a batch itself",
    "torch/utils/data/dataloader.py": "it waits for a batch from the loader processes",
    "torch/distributed": "it waits for the other ranks",
    "torch/_dynamo": "it compiles",
    "torch/_inductor": "it compiles",
    "torch/autograd": "it computes gradients",
}


class Watchdog(TrainerCallback):
    """Reports on stderr when nothing has come to its end for some time.

    Used with `with`, and added to a trainer as a callback.

    Parameters
    ----------
    seconds : without a step, or a batch of an evaluation, after which it reports; again after
        twice, four times ... as many. 0 never reports.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.rank = os.environ.get("RANK", "0")
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._sign(0)

    def __enter__(self) -> Watchdog:
        if self.seconds > 0:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _sign(self, step: int) -> None:
        """Note that something has come to its end."""
        self._last_step = step
        self._last_sign = time.monotonic()
        self._next_report = self.seconds

    def on_train_begin(self, args, state, control, **kwargs):
        """Begin to count: loading the model is over."""
        self._sign(state.global_step)

    def on_substep_end(self, args, state, control, **kwargs):
        """Note a batch of a step of several."""
        self._sign(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        """Note a step."""
        self._sign(state.global_step)

    def on_prediction_step(self, args, state, control, **kwargs):
        """Note a batch of an evaluation."""
        self._sign(state.global_step)

    def on_save(self, args, state, control, **kwargs):
        """Note a checkpoint."""
        self._sign(state.global_step)

    def _watch(self) -> None:
        """Look at the clock until the training has ended."""
        main = threading.main_thread().ident
        pause = min(1.0, self.seconds / 4)
        # Where a library holds Python's lock this thread cannot run: then the interpreter itself
        # writes where all threads are, unless it is put off in time.
        with _interpreter_reports(3 * self.seconds) as put_off:
            while not self._ended.wait(pause):
                put_off()
                silent = time.monotonic() - self._last_sign
                if silent >= self._next_report:
                    self._next_report *= 2
                    self._report(silent, main)

    def _report(self, silent: float, main: int) -> None:
        """Write what every process waits for."""
        lines = [
            f"medtune train: rank {self.rank}: no step for {silent:.0f} s, the last was step "
            f"{self._last_step}; it goes on waiting, Ctrl-C ends it"
        ]
        frame = sys._current_frames().get(main)
        if frame is not None:
            lines.append(f"  main thread: {describe_calls(traceback.extract_stack(frame))}")
        children = describe_children()
        lines += children
        if "loader processes" in lines[-1 - len(children)]:
            lines.append("  dataloader_num_workers=0 trains without loader processes")
        print("\n".join(lines), file=sys.stderr, flush=True)


@contextlib.contextmanager
def _interpreter_reports(seconds: float) -> Iterator[Callable[[], None]]:
    """Let the interpreter write all stacks after some seconds in which nobody put it off."""

    def put_off() -> None:
        # a notebook's stderr is no file
        with contextlib.suppress(Exception):
            faulthandler.dump_traceback_later(seconds, file=sys.__stderr__)

    try:
        yield put_off
    finally:
        faulthandler.cancel_dump_traceback_later()


def describe_calls(stack: traceback.StackSummary) -> str:
    """Say what a thread does, and in which calls, innermost first.

    Examples
    --------
    >>> describe_calls(traceback.StackSummary.from_list([("a/lib/disk.py", 7, "read", "")]))
    'in read (lib/disk.py:7)'
    """
    calls = []
    for call in reversed(stack[-CALLS_SHOWN:]):
        file = "/".join(Path(call.filename).parts[-2:])
        calls.append(f"{call.name} ({file}:{call.lineno})")
    text = "in " + " < ".join(calls)
    for call in reversed(stack):
        for part, what in DOES.items():
            if part in call.filename:
                return f"{what}, {text}"
    return text


def describe_children() -> list[str]:
    """Say of each child process, a line each, whether it works, sleeps or waits for a disk."""
    own = psutil.Process()
    children = own.children()
    before = {child.pid: _processor_seconds(child) for child in children}
    time.sleep(MEASURED)
    lines = []
    for child in children[:PROCESSES_SHOWN]:
        # it may have ended meanwhile
        with contextlib.suppress(psutil.Error):
            busy = (_processor_seconds(child) - before[child.pid]) / MEASURED
            lines.append(f"  {_kind_of(child, own)} {child.pid}: {_state_of(child, busy)}")
    more = len(children) - PROCESSES_SHOWN
    if more > 0:
        lines.append(f"  and {more} more processes")
    return lines


def _processor_seconds(process: psutil.Process) -> float:
    """Return the seconds of processor time that a process has had, 0 if it is gone."""
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return times.user + times.system


def _kind_of(child: psutil.Process, own: psutil.Process) -> str:
    """Name a child: loader processes are forks, and so have the command line of this process."""
    return "loader process" if child.cmdline() == own.cmdline() else f"process {child.name()}"


def _state_of(child: psutil.Process, busy: float) -> str:
    """Say what a process does, from its state and the share of a core that it has used."""
    status = child.status()
    gigabytes = child.memory_info().rss / 1e9
    if status == psutil.STATUS_DISK_SLEEP:
        what = "waits for a disk"
    elif status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
        what = "has ended"
    elif status == psutil.STATUS_STOPPED:
        what = "is stopped (kill -CONT wakes it)"
    elif busy > 0.05:
        what = f"works, {busy:.0%} of a core"
    else:
        what = "sleeps, no work: it waits for a batch to prepare, a lock or the network"
    return f"{what}, {gigabytes:.1f} GB"


def watch(trainer: Any, seconds: float) -> Watchdog:
    """Add a watchdog to a trainer; it watches within a `with`.

    Parameters
    ----------
    trainer : a Transformers trainer.
    seconds : see `Watchdog`.
    """
    dog = Watchdog(seconds)
    trainer.add_callback(dog)
    return dog
