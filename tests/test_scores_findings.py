"""What is said: entities, places and areas."""

import math

import numpy as np
import pytest
from example_captions import EN, EN_DENIED

from medtune.scores import RATIOS, finding_scores


def test_findings_are_compared_with_their_negation():
    same = finding_scores([EN], [EN])
    assert same["f1"] == same["precision"] == same["recall"] == same["structure_exact"] == 1
    assert same["place_error"] == same["area_error"] == 0

    contradicted = finding_scores([EN_DENIED], [EN])
    assert contradicted["by_kind"]["finding"]["f1"] == 0 < contradicted["f1"] < 1
    right = {"precision": 1, "recall": 1, "f1": 1, "support": 1}
    assert contradicted["by_kind"]["structure"] == right


def test_place_and_area_are_measured():
    moved = EN.replace("upper left of", "lower right of").replace("4%", "10%")
    scores = finding_scores([moved, "The spleen."], [EN, EN])
    assert scores["place_exact"] == 0 and scores["place_error"] == 4  # two rows and two columns
    assert scores["area_error"] == pytest.approx(6)  # the second answer says none
    assert scores["structure_exact"] == 1

    nothing = finding_scores(["Fine."], ["Fine."])
    assert nothing["structure_exact"] is nothing["place_error"] is nothing["area_error"] is None
    assert nothing["f1"] == 0


def test_entity_counts_make_the_score():
    samples = finding_scores([EN, "The liver."], [EN, EN], per_sample=True)
    rows = np.array(samples["entities"])
    assert rows[0, 0] == rows[0, 1] == rows[0, 2] > 3
    assert rows[1].tolist()[:2] == [0, 1]
    scores = finding_scores([EN, "The liver."], [EN, EN])
    for name, ratio in RATIOS.items():
        assert ratio(rows) == scores[name]
    assert samples["structure_exact"] == [1, 0] and math.isnan(samples["place_error"][1])
