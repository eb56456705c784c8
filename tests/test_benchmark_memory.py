"""benchmarks/memory.py on a tiny twin: a process and a time limit for each configuration."""

import json
import subprocess
import sys

import pytest
from tiny_models import REPO

from medtune.plan import model_names

sys.path.insert(0, str(REPO / "benchmarks"))
import memory  # noqa: E402
from _memory_configurations import NEW  # noqa: E402

SCRIPT = REPO / "benchmarks" / "memory.py"


def measure(out, *options: str) -> list[dict]:
    """Measure the fourth of the new configurations, by the command; return all lines."""
    command = [sys.executable, SCRIPT, out, "--new", "--tiny", "--only", "3", "--steps", "3"]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    return [json.loads(line) for line in out.read_text("utf-8").splitlines()]


def test_every_later_family_is_among_the_new_configurations():
    measured = {configuration.model for configuration in NEW}
    assert measured <= set(model_names())
    assert len(NEW) >= 12
    for family in ("Qwen3.5-2B", "Qwen3.5-35B-A3B", "gemma-4-E2B", "gemma-4-E4B", "medgemma-1.5"):
        assert any(family in model for model in measured)


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_configuration_is_measured_once_and_what_fails_is_measured_again(tmp_path):
    out = tmp_path / "out.jsonl"
    (late,) = measure(out, "--each", "0.1")
    assert late["error"] == "took longer than 0.1 s, see out-3.log"
    _, line = measure(out, "--each", "240")
    assert (line["model"], line["method"], line["batch"]) == ("Qwen/Qwen3.5-2B", "lora", 4)
    assert "error" not in line and len(line["losses"]) == 3
    # so it is not measured again, and another one would be
    assert memory.is_measured(NEW[3], out)
    assert not memory.is_measured(NEW[4], out)
