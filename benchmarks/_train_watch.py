"""What a GPU waited for: a profile of the last steps, and what the main thread did meanwhile."""

import bisect
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# A pause of the GPU counts from so many microseconds on.
SHORTEST_PAUSE = 50
# Calls of CUDA that make the CPU wait, or the GPU.
BLOCKING = ("cudaMalloc", "cudaFree", "cudaStreamSynchronize")
# Lines of the report for each way to sum up.
MOST_LINES = 40

# Begin and end, in microseconds since the trace began.
Span = tuple[float, float]


@dataclass(frozen=True)
class Glimpse:
    """What the main thread did at one moment.

    Parameters
    ----------
    clock : nanoseconds since 1970.
    calls : `file.function:line` of each call, the innermost first.
    """

    clock: int
    calls: list[str]


class Watch:
    """Look every millisecond what the main thread does."""

    def __init__(self) -> None:
        self.glimpses: list[Glimpse] = []
        self._on = True
        main = threading.main_thread().ident
        self._thread = threading.Thread(target=self._look, args=(main,), daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._on = False
        self._thread.join()

    def _look(self, thread: int) -> None:
        while self._on:
            frame = sys._current_frames()[thread]
            calls = []
            while frame:
                code = frame.f_code
                calls.append(f"{Path(code.co_filename).stem}.{code.co_name}:{frame.f_lineno}")
                frame = frame.f_back
            self.glimpses.append(Glimpse(time.time_ns(), calls))
            time.sleep(0.001)


class StepProfile:
    """PyTorch's profile of some steps, with a watch beside it."""

    def __init__(self, cuda: bool):
        self._cuda = cuda
        activities = [ProfilerActivity.CPU]
        if cuda:
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities)
        self._watch = Watch()

    def start(self) -> None:
        self._watch.start()
        self._profile.start()

    def stop(self) -> None:
        self._profile.stop()
        self._watch.stop()

    def save(self, file: Path, name: str) -> None:
        """Write the operators by their own time, and the pauses of the GPU."""
        order = "self_cuda_time_total" if self._cuda else "self_cpu_time_total"
        table = self._profile.key_averages().table(
            sort_by=order, row_limit=30, max_name_column_width=70
        )
        idle = describe_pauses(self._profile, self._watch.glimpses) if self._cuda else ""
        file.write_text(f"The last 2 steps of {name}, {order}\n\n{table}\n{idle}")


def describe_pauses(found: Any, glimpses: Sequence[Glimpse]) -> str:
    """List the pauses of the GPU by the functions that the main thread was in.

    Parameters
    ----------
    found : a `torch.profiler.profile` that has stopped.
    glimpses : in the order of time.
    """
    spans = _busy_spans(found)
    pauses, end = _pauses(spans)
    trace_began = found.profiler.kineto_results.trace_start_ns()
    blamed = _blame(pauses, glimpses, trace_began)
    waited = sum(stop - start for start, stop in pauses) / 1000
    whole = (end - spans[0][0]) / 1000
    lines = [
        f"{waited:.1f} of {whole:.1f} ms without work for the GPU, {len(pauses)} pauses",
    ]
    for event in found.key_averages():
        if event.key in BLOCKING:
            milliseconds = event.self_cpu_time_total / 1000
            lines.append(f"{milliseconds:9.1f} ms in {event.count} calls of {event.key}")
    # first by the four innermost calls, then by every function on the way there
    for prefix in ("  ", "any"):
        keys = [key for key in blamed if key.startswith(prefix)]
        keys.sort(key=blamed.get, reverse=True)
        lines += [f"{blamed[key]:9.1f} ms {key}" for key in keys[:MOST_LINES]]
    return "\n".join(lines) + "\n"


def _busy_spans(found: Any) -> list[Span]:
    """List when something ran on the GPU, in the order of time."""
    spans = []
    for event in found.events():
        if event.device_type == DeviceType.CUDA and event.time_range.end:
            spans.append((event.time_range.start, event.time_range.end))
    return sorted(spans)


def _pauses(spans: Sequence[Span]) -> tuple[list[Span], float]:
    """List the pauses between busy spans, which may overlap; return also when the last one ends."""
    busy_until = spans[0][1]
    pauses = []
    for start, end in spans:
        if start - busy_until > SHORTEST_PAUSE:
            pauses.append((busy_until, start))
        busy_until = max(busy_until, end)
    return pauses, busy_until


def _blame(
    pauses: Sequence[Span], glimpses: Sequence[Glimpse], trace_began: int
) -> dict[str, float]:
    """Share the milliseconds of each pause among what was seen in it."""
    clocks = [(glimpse.clock - trace_began) / 1000 for glimpse in glimpses]
    blamed: dict[str, float] = {}
    for start, end in pauses:
        first = bisect.bisect_left(clocks, start)
        after = bisect.bisect_right(clocks, end)
        inside = glimpses[first:after]
        if not inside:
            # a pause shorter than a millisecond: what was seen last before it
            inside = [glimpses[max(0, bisect.bisect(clocks, start) - 1)]]
        share = (end - start) / 1000 / len(inside)
        for glimpse in inside:
            functions = {call.split(":")[0] for call in glimpse.calls}
            innermost = "  " + " < ".join(glimpse.calls[:4])
            for key in (innermost, *(f"any {function}" for function in functions)):
                blamed[key] = blamed.get(key, 0) + share
    return blamed
