"""Shape twins, the memory planner and rehearsals: published facts, notebooks on tiny twins, recorded figures of a GPU."""

import ast
import contextlib
import io
import json
import os
from pathlib import Path

import pytest
import torch

from medtune import models, preflight, sizing

REPO = Path(__file__).parents[1]
FAMILIES = {
    "qwen2-vl": "Qwen/Qwen2-VL-2B-Instruct",
    "qwen3-vl": "Qwen/Qwen3-VL-2B-Instruct",
    "qwen3-vl-moe": "Qwen/Qwen3-VL-30B-A3B-Instruct",
    "gemma-3": "google/gemma-3-4b-it",
}


# --- twins ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def twins(tmp_path_factory) -> dict[str, Path]:
    """The tiny twins of the four families."""
    root = tmp_path_factory.mktemp("twins")
    words = REPO / "data" / "tiny-vlm" / "tokenizer.json"
    options = {"scale": "tiny", "dtype": "float32", "tokenizer": words}
    return {family: sizing.make_twin(name, root / family, **options) for family, name in FAMILIES.items()}


@pytest.mark.parametrize("name", sizing.model_names())
def test_the_shape_has_the_published_number_of_parameters(name):
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(sizing.twin_config(name))
    counted = models.count_parameters(model)["total"]["frozen"] or models.count_parameters(model)["total"]["trained"]
    assert counted == pytest.approx(sizing.model_facts(name)["parameters"], rel=5e-3)


# --- the notebooks on every family -----------------------------------------------------------------------------------


def execute(notebook: str, **parameters) -> dict:
    """Run a notebook's code cells in this process, as papermill would with these parameters; return its names."""
    cells = json.loads((REPO / "notebooks" / f"{notebook}.ipynb").read_text("utf-8"))["cells"]
    names = {"__name__": "__main__"}
    for cell in (cell for cell in cells if cell["cell_type"] == "code"):
        tags = cell["metadata"].get("tags", [])
        if "solution" in tags:
            continue
        exec(compile("".join(cell["source"]), f"{notebook}:{cell['id']}", "exec"), names)
        if "parameters" in tags:
            assert parameters.keys() <= {line.target.id for line in ast.parse("".join(cell["source"])).body}
            names |= parameters
    return names


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    """Twenty small pictures with a caption each, converted and split by patient as notebook 02 does."""
    from datasets import Dataset
    from PIL import Image

    from medtune import convert

    out = tmp_path_factory.mktemp("records") / "data"
    organs = ["left kidney", "right kidney", "liver", "spleen", "aorta"]
    pairs = [
        {
            "id": f"p{i}",
            "image": Image.effect_mandelbrot((96, 96), (-2 + i / 20, -1.5, 1, 1.5), 30).convert("RGB"),
            "caption": f"The image is a CT scan. The {organs[i % 5]} is seen in the middle.",
            "group": f"patient {i}",
        }
        for i in range(20)
    ]
    splits = ["train"] * 12 + ["validation"] * 4 + ["test"] * 4
    pairs = Dataset.from_list(pairs)
    pairs.to_parquet(out.parent / "pairs.parquet")
    convert.convert_pairs(pairs, out, questions=["Describe this picture."], splits=splits)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_notebooks_train_evaluate_and_merge_a_twin(family, method, twins, records, tmp_path, monkeypatch):
    monkeypatch.chdir(REPO / "notebooks")
    target = "attention+experts" if family == "qwen3-vl-moe" else "language"
    (tmp_path / "02_convert_data").mkdir()
    (tmp_path / "02_convert_data" / "data").symlink_to(records)
    shared = {"run_dir": str(tmp_path), "model_name_or_path": str(twins[family]), "max_new_tokens": 6}
    shared["data"] = str(records.parent / "pairs.parquet")
    small = {"max_steps": 2, "per_device_train_batch_size": 2, "eval_samples": 2, "eval_steps": 2, "warmup_steps": 0}
    import time
    t=time.time()
    names = execute("03_finetune_lora", **shared, **small, method=method, target=target)
    t1=time.time()
    execute("05_evaluate", **shared)
    t2=time.time()
    execute("06_merge_export", **shared, samples=2, merge_onto_4bit=False)
    print("TIMES", t1-t, t2-t1, time.time()-t2)
