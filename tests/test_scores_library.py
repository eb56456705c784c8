"""Scores as metrics of Hugging Face's `evaluate`, which is loaded only for them."""

import subprocess
import sys

import evaluate

from medtune import scores
from medtune.scores import evaluate_metric, finding_scores, llamafactory_scores


def test_evaluate_adapter_combines_offline():
    texts = {
        "predictions": ["the left kidney", "脾脏"],
        "references": ["the right kidney", "脾脏"],
    }
    combined = evaluate.combine([evaluate_metric(), evaluate_metric(finding_scores)])
    result = combined.compute(**texts)
    assert result["bleu-4"] == llamafactory_scores(**texts)["bleu-4"]
    assert result["structure_exact"] == finding_scores(**texts)["structure_exact"] == 0.5


def test_evaluate_adapter_gives_intervals():
    texts = {"predictions": ["脾脏"] * 5, "references": ["脾脏", "肝脏"] * 2 + ["脾脏"]}
    result = evaluate_metric().compute(**texts, groups=list("abcde"))
    assert result["intervals"]["bleu-4"]["label"] == "over 5 groups"


def test_import_needs_no_model_library():
    heavy = ("torch", "transformers", "evaluate")
    code = f"import sys, medtune.scores; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
    assert scores.__doc__
