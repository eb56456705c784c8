"""benchmarks/memory.py on a tiny twin: a process and a time limit for each configuration."""

import argparse
import sys

import pytest
from tiny_models import REPO

from medtune.files import read_json_lines
from medtune.plan import model_names

sys.path.insert(0, str(REPO / "benchmarks"))
import memory  # noqa: E402
from _memory_configurations import NEW  # noqa: E402


def test_every_later_family_is_among_the_new_configurations():
    measured = {configuration.model for configuration in NEW}
    assert measured <= set(model_names())
    assert len(NEW) >= 12
    for family in ("Qwen3.5-2B", "Qwen3.5-35B-A3B", "gemma-4-E2B", "gemma-4-E4B", "medgemma-1.5"):
        assert any(family in model for model in measured)


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_configuration_is_measured_once_and_what_fails_is_measured_again(tmp_path, capsys):
    """The process of each is started by the command that the script itself would give."""
    out = tmp_path / "out.jsonl"
    given = argparse.Namespace(out=out, steps=3, each=0.1, new=True, check=False, tiny=True)
    memory.measure_apart(3, NEW[3], given)
    given.each = 400
    assert not memory.is_measured(NEW[3], out)
    memory.measure_apart(3, NEW[3], given)
    late, line = [row for _, row in read_json_lines(out)]
    assert late["error"] == "took longer than 0.1 s, see out-3.log"
    assert (line["model"], line["method"], line["batch"]) == ("Qwen/Qwen3.5-2B", "lora", 4)
    assert "error" not in line and len(line["losses"]) == 3
    # so it is not measured again, and another one would be
    assert memory.is_measured(NEW[3], out)
    assert not memory.is_measured(NEW[4], out)
    assert "Qwen/Qwen3.5-2B" in capsys.readouterr().out
