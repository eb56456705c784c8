"""The ladder and the rivals of benchmarks/train.py: which settings are measured."""

import sys

from tiny_models import REPO

sys.path.insert(0, str(REPO / "benchmarks"))
from _train_rungs import LADDER, RUNGS  # noqa: E402


def test_no_rung_asks_for_what_does_not_load():
    """Liger's kernels fail with this Transformers; once a rung inherited them from another."""
    for name, rung in RUNGS.items():
        assert not rung.settings.get("use_liger_kernel"), name


def test_each_rung_changes_something_of_the_one_above_it():
    names = list(LADDER)
    for above, name in zip(names[:-1], names[1:], strict=True):
        assert RUNGS[above] != RUNGS[name], name
        for key, value in LADDER[name][0].items():
            assert RUNGS[name].settings[key] == value
