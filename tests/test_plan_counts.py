"""The table of counts agrees with the models themselves, and with it a plan starts at once."""

import json
import subprocess
import sys

import pytest

from medtune.plan import estimate
from medtune.plan.counts import TABLE
from medtune.plan.shapes import FACTS

QWEN = "Qwen/Qwen3-VL-2B-Instruct"


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", FACTS["models"])
def test_the_table_is_what_the_model_has(name):
    from medtune.plan.counting import build_counts

    assert build_counts(name) == json.loads(TABLE.read_text("utf-8"))[name]


def test_the_table_has_every_shape():
    assert set(json.loads(TABLE.read_text("utf-8"))) == set(FACTS["models"])


def test_what_is_not_in_the_table_is_counted_on_the_model():
    """Two words reach what each of them reaches; modules trained whole come on top."""
    vision = estimate(QWEN, target="vision")["trained_parameters"]
    language = estimate(QWEN, target="language")["trained_parameters"]
    both = estimate(QWEN, target="language+vision")["trained_parameters"]
    assert both == vision + language
    whole = estimate(QWEN, modules_to_save=("lm_head",))["trained_parameters"]
    text = FACTS["models"][QWEN]["config"]["text_config"]
    assert whole == language + text["vocab_size"] * text["hidden_size"]
    # weights of twice the width, of which those in 4 bits take the same
    narrow = estimate(QWEN, method="qlora")["weights"]
    wide = estimate(QWEN, method="qlora", dtype="float32")["weights"]
    assert narrow < wide < 2 * narrow


def test_a_plan_loads_neither_torch_nor_transformers():
    program = f"""import sys
from medtune import cli
try: cli.main(["plan", {QWEN!r}])
finally: print([name for name in ("torch", "transformers", "peft") if name in sys.modules])"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert lines[-1] == "[]"
    assert [line for line in lines if line.startswith("peak")][0].endswith("GB on each GPU")
    assert "hours_per_epoch needs --pairs and --samples-per-second" in lines
