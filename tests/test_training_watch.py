"""A training in processes of its own: what is printed, when it is stopped, and what it sent."""

import json
import sys
import time
from pathlib import Path

import pytest

from medtune.training import bytes_sent, run_watched


def python(code: str) -> list[str]:
    return [sys.executable, "-u", "-c", code]


def test_lines_come_as_they_are_printed_and_errors_are_among_them():
    lines = []
    code = "import sys; print('one'); print('two', file=sys.stderr); print('three')"
    seconds = run_watched(python(code), on_line=lines.append)
    assert lines == ["one", "two", "three"] and seconds > 0


def test_variables_come_on_top_of_those_of_this_process(monkeypatch):
    monkeypatch.setenv("OURS", "1")
    lines = []
    code = "import os; print(os.environ['OURS'], os.environ['NEW'])"
    run_watched(python(code), environment={"NEW": "2"}, on_line=lines.append)
    assert lines == ["1 2"]


def test_a_command_that_fails_tells_the_end_of_what_it_said():
    with pytest.raises(RuntimeError, match="exit code 1; the last it printed: no such data"):
        run_watched(python("raise SystemExit('no such data')"))


def test_a_command_that_takes_too_long_is_stopped():
    started = time.monotonic()
    with pytest.raises(
        RuntimeError, match="took over 0.01 minutes and was stopped; the last it printed: begun"
    ):
        run_watched(python("import time; print('begun'); time.sleep(60)"), minutes_at_most=0.01)
    assert time.monotonic() - started < 20


def test_an_interruption_ends_the_command(tmp_path):
    """The command would write a file after a while, if it were not stopped."""
    late = tmp_path / "late"

    def interrupt(line):
        raise KeyboardInterrupt

    code = f"import time; print('begun'); time.sleep(2); open({str(late)!r}, 'w')"
    with pytest.raises(KeyboardInterrupt):
        run_watched(python(code), on_line=interrupt)
    time.sleep(2.5)
    assert not late.exists()


def write_trace(folder: Path, *events: tuple[str, list, str]) -> Path:
    """Write what the profiler would export of messages (name, shapes, type)."""
    written = [{"name": "aten::mm"}, {"ph": "M"}]
    for name, shapes, kind in events:
        written.append({"name": name, "args": {"Input Dims": shapes, "Input type": [kind]}})
    trace = folder / "trace.json"
    trace.write_text(json.dumps({"traceEvents": written}))
    return trace


def test_bytes_follow_the_ring_algorithms(tmp_path):
    trace = write_trace(
        tmp_path,
        ("gloo:all_reduce", [[1000]], "float"),
        ("nccl:all_reduce", [[10, 100]], "c10::BFloat16"),
        ("nccl:_all_gather_base", [[500]], "double"),
        ("nccl:_reduce_scatter_base", [[400]], "float"),
        ("gloo:broadcast", [[300]], "long int"),
    )
    assert bytes_sent(trace, 4) == {
        "all_reduce": 1.5 * (4000 + 2000),
        "all_gather": 3 * 4000,
        "reduce_scatter": 0.75 * 1600,
        "broadcast": 2400,
    }


def test_small_messages_and_those_without_a_tensor_do_not_count(tmp_path):
    trace = write_trace(
        tmp_path,
        ("gloo:all_reduce", [[249]], "float"),
        ("gloo:broadcast", [[]], ""),
        ("gloo:barrier", [[5000]], "float"),
    )
    assert bytes_sent(trace, 2) == {}
