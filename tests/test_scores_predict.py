"""The table of LLaMA-Factory's predict figures."""

import math

import pandas as pd
import pytest

from medtune.answers import generation_speed
from medtune.scores import PREDICT_NAMES, llamafactory_scores, predict_table


def answers(texts, seconds=None):
    reference = "the left kidney"
    rows = [{"id": str(n), "answer": text, "reference": reference} for n, text in enumerate(texts)]
    return [row | {"seconds": seconds, "tokens": 4} if seconds else row for row in rows]


def test_the_table_has_the_published_names_and_figures():
    runs = {
        "base": answers(["左肾。"] * 10, 1.25),
        "tuned": answers(["the left kidney", "the right kidney"] * 5, 0.5),
        "of others": answers(["the left kidney"]),
    }
    table = predict_table(runs, batch_size={"base": 4, "tuned": 4})
    frame = pd.DataFrame(table)
    assert list(frame.index) == list(PREDICT_NAMES) and list(frame.columns) == list(runs)
    for name, rows in runs.items():
        scores = llamafactory_scores([r["answer"] for r in rows], [r["reference"] for r in rows])
        for key, value in scores.items():
            assert table[name][f"predict_{key}"] == pytest.approx(value, abs=1e-4)
    speed = generation_speed(runs["base"])
    assert table["base"]["predict_runtime"] == speed["predict_runtime"] == 12.5
    assert table["base"]["predict_samples_per_second"] == speed["predict_samples_per_second"] == 0.8
    # ten answers in batches of four are three steps
    assert table["base"]["predict_steps_per_second"] == pytest.approx(3 / 12.5)
    # what is not known is told as such
    assert table["of others"]["predict_runtime"] is None
    assert predict_table({"a": runs["base"]})["a"]["predict_steps_per_second"] is None
    assert math.isnan(frame.loc["predict_runtime", "of others"])


@pytest.mark.parametrize(
    ("runs", "options", "message"),
    [
        ({}, {}, "no runs: give"),
        ({"a": []}, {}, "the run a has no answers"),
        ({"a": [{"answer": "x"}]}, {}, "answer 0 of the run a lacks its answer or reference"),
        ({"a": answers(["x"])}, {"batch_size": 0}, "batch_size=0: give 1 or more"),
    ],
)
def test_slips(runs, options, message):
    with pytest.raises(ValueError, match=message):
        predict_table(runs, **options)
