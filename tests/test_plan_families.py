"""The course's notebooks and its script train a tiny twin of every family, with LoRA and QLoRA."""

import ast
import contextlib
import json
from pathlib import Path

import pytest
from datasets import Dataset
from IPython.display import display
from PIL import Image
from tiny_models import REPO, notebook_cells, tiny_twin

from medtune import models
from medtune.records import convert_pairs
from medtune.training import main

ORGANS = ["left kidney", "right kidney", "liver", "spleen", "aorta"]


def execute(notebook: str, **parameters) -> dict:
    """Run a notebook's code cells in this process, as papermill would; return its names."""
    with contextlib.chdir(REPO / "notebooks"):  # programs that a notebook starts lie beside it
        return execute_here(notebook, parameters)


def execute_here(notebook: str, parameters: dict) -> dict:
    # a kernel has `display` without an import
    names = {"__name__": "__main__", "display": display}
    for cell in notebook_cells(notebook):
        tags = cell["metadata"].get("tags", [])
        if cell["cell_type"] != "code" or "solution" in tags:
            continue
        source = "".join(cell["source"])
        exec(compile(source, f"{notebook}:{cell['id']}", "exec"), names)
        if "parameters" in tags:
            declared = {line.target.id for line in ast.parse(source).body}
            assert parameters.keys() <= declared
            names |= parameters
    return names


def picture_pair(number: int) -> dict:
    """A small picture with a caption, of a person of its own."""
    picture = Image.effect_mandelbrot((96, 96), (-2 + number / 20, -1.5, 1, 1.5), 30)
    organ = ORGANS[number % len(ORGANS)]
    return {
        "id": f"p{number}",
        "image": picture.convert("RGB"),
        "caption": f"The image is a CT scan. The {organ} is seen in the middle.",
        "group": f"patient {number}",
    }


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    """Twenty pictures with a caption each, converted and split as notebook 02 does."""
    out = tmp_path_factory.mktemp("records") / "data"
    pairs = Dataset.from_list([picture_pair(number) for number in range(20)])
    pairs.to_parquet(out.parent / "pairs.parquet")
    splits = ["train"] * 12 + ["validation"] * 4 + ["test"] * 4
    convert_pairs(pairs, out, questions=["Describe this picture."], splits=splits)
    return out


# Later families take the same way through fewer tests, to save time: test_training_preflight trains
# all of them, test_runs_rehearse goes through the notebooks with one, test_models_deltanet merges.
EARLIER = ("qwen2-vl", "qwen3-vl", "qwen3-vl-moe", "gemma-3", "smolvlm")
CASES = [(family, method) for method in ("lora", "qlora") for family in EARLIER]

# 96 pixels are 3 x 3 squares of 32, or 4 x 4 of 28; Gemma-3 has a fixed number, Gemma-4 the most of
# its squares; SmolVLM sees four tiles and the whole, of four tokens each.
IMAGE_TOKENS = {"gemma-3": 4, "gemma-4": 64, "qwen2-vl": 16, "smolvlm": 20}


def target_of(family: str) -> str:
    """What gets an adapter: of each family once what is special about it."""
    if family in ("qwen3-vl-moe", "qwen3.5-moe"):
        return "attention+experts"
    if family in ("gemma-3", "gemma-4"):
        return "all-linear"
    return "language"


def parts_of(family: str) -> set[str]:
    """The parts that this target reaches, of those that the model has."""
    parts = set()
    for word in target_of(family).split("+"):
        parts |= models.TARGETS[word]
    if family == "gemma-3":
        parts.remove("merger")  # there it is no Linear layer
    return parts & set(models.count_parameters(models.load_base(tiny_twin(family))))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("family", "method"), CASES)
def test_the_notebooks_train_evaluate_and_merge_a_twin(
    family, method, records, tmp_path, monkeypatch
):
    monkeypatch.chdir(REPO / "notebooks")
    (tmp_path / "02_convert_data").mkdir()
    (tmp_path / "02_convert_data" / "data").symlink_to(records)
    shared = {
        "run_dir": str(tmp_path),
        "model_name_or_path": str(tiny_twin(family)),
        "max_new_tokens": 6,
        "data": str(records.parent / "pairs.parquet"),
    }
    names = execute(
        "03_finetune_lora",
        **shared,
        max_steps=2,
        per_device_train_batch_size=2,
        eval_samples=2,
        eval_steps=2,
        warmup_steps=0,
        method=method,
        target=target_of(family),
    )
    # what is trained and what is frozen, printed before the first step
    table = names["table"]
    assert set(table.index[table["trained"] > 0]) - {"total"} == parts_of(family)
    base = models.load_base(tiny_twin(family))
    size = sum(parameter.numel() for parameter in base.parameters())
    assert table.loc["total", "frozen"] >= size
    assert set(names["gradients"]) == names["trained_parts"], "the preflight saw every part"
    assert names["image_tokens"] == IMAGE_TOKENS.get(family, 9)

    execute("05_evaluate", **shared)
    execute("06_merge_export", **shared, samples=2, merge_onto_4bit=False)
    summaries = {}
    for path in tmp_path.glob("*/summary.json"):
        summaries[path.parent.name] = json.loads(path.read_text("utf-8"))
    assert summaries["03_finetune_lora"]["results"]["steps"] == 2
    merged = summaries["06_merge_export"]
    assert merged["answers_same_reloaded"] == merged["answers"] == 2


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("family", "method"), [*CASES, ("qwen3.5", "qlora")])
def test_the_script_trains_a_twin(family, method, records, tmp_path):
    arguments = {
        "data": records,
        "model_name_or_path": tiny_twin(family),
        "target": target_of(family),
        "output_dir": tmp_path / "out",
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "dtype": "float32",
    }
    given = []
    for key, value in arguments.items():
        given += [f"--{key}", str(value)]
    if method == "qlora":
        given += ["--load_in_4bit", "--use_bnb_nested_quant"]
    main(given)

    base = models.load_base(tiny_twin(family))
    # keys that do not fit would be an error
    tuned = models.load_tuned(base, tmp_path / "out" / "model")
    assert models.count_parameters(tuned)["total"]["frozen"] > 0
    moved = [
        name
        for name, parameter in tuned.named_parameters()
        if "lora_B" in name and parameter.abs().max() > 0
    ]
    assert moved
