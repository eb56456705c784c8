"""A model says the same after saving, merging and loading, and a failed write loses nothing."""

import json
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from PIL import Image
from tiny_models import family, merged_onto, notebook_cell, one_batch, tiny_folder, tuned
from transformers import AutoModelForImageTextToText
from trl import SFTConfig, SFTTrainer

from medtune import models


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """A saved adapter."""
    out = tmp_path_factory.mktemp("saved") / "adapter"
    models.save_model(tuned(), models.load_processor(tiny_folder()), out, card="a card")
    return out


# --- merge and compare ---------------------------------------------------------------------------


def test_notebook_06_merges_as_we_do(adapter):
    names = {
        "model_name_or_path": tiny_folder(),
        "adapter": adapter,
        "dtype": "float32",
        "device": "cpu",
        "models": models,
    }
    for name in ("tuned", "merge"):
        exec(notebook_cell("06_merge_export", name), names)
    merged = merged_onto(tiny_folder(), adapter).state_dict()
    for key, value in names["merged"].state_dict().items():
        assert torch.equal(value, merged[key])


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"use_rslora": True}, id="use_rslora"),
        pytest.param({"use_dora": True}, id="use_dora"),
        pytest.param({"modules_to_save": ["lm_head", "embed_tokens"]}, id="modules_to_save"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_adapter_and_merged_model_say_the_same_after_reloading(tmp_path, options):
    processor = models.load_processor(tiny_folder())
    batch = one_batch()
    model = tuned(**options)
    files = models.save_model(model, processor, tmp_path / "adapter", card="c")
    assert {
        "adapter_model.safetensors",
        "chat_template.jinja",
        "processor_config.json",
        "README.md",
    } <= set(files)

    again = models.load_tuned(models.load_base(tiny_folder()), tmp_path / "adapter")
    assert models.compare_logits(model, again, batch)["max_abs_diff"] == 0
    base = models.load_base(tiny_folder())
    assert models.compare_logits(model, base, batch)["max_abs_diff"] > 0.01

    merged = merged_onto(tiny_folder(), tmp_path / "adapter")
    models.save_model(merged, processor, tmp_path / "merged", card="c", max_shard_size="200KB")
    assert (tmp_path / "merged" / "model.safetensors.index.json").exists()
    reloaded = models.load_base(tmp_path / "merged")
    result = models.compare_logits(model, reloaded, batch)
    assert result["max_abs_diff"] < 1e-5
    assert result["argmax_agreement"] == 1
    noted = models.text_logits(model, batch)
    assert models.compare_logits(noted, reloaded, batch) == result, "noted before, the same"
    template = models.load_processor(tmp_path / "merged").chat_template
    assert template == processor.chat_template


def test_logits_are_compared_in_full_precision():
    """On a GPU a convolution in TF32 is a thousandth off; the setting comes back afterwards."""
    model = models.load_base(tiny_folder())
    during = []
    model.register_forward_hook(lambda *_: during.append(torch.backends.cudnn.allow_tf32))
    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.enabled
    models.text_logits(model, one_batch())
    assert during == [False]
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.enabled) == before


def test_experts_are_trained_saved_and_merged(tmp_path):
    torch.manual_seed(0)
    base = AutoModelForImageTextToText.from_config(family("qwen3-vl-moe"))
    base.save_pretrained(tmp_path / "base")
    model = tuned("attention+experts", base=base)
    assert models.count_parameters(model)["experts"]["trained"] > 0
    model.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(3, 40)[None]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    again = models.load_tuned(models.load_base(tmp_path / "base"), tmp_path / "adapter")
    assert models.compare_logits(model, again, batch)["max_abs_diff"] == 0
    merged = merged_onto(tmp_path / "base", tmp_path / "adapter")
    assert models.compare_logits(model, merged, batch)["max_abs_diff"] < 1e-5
    base = models.load_base(tmp_path / "base")
    assert models.compare_logits(base, merged, batch)["max_abs_diff"] > 0.01


# --- card and save -------------------------------------------------------------------------------


def test_card_names_base_data_settings_scores_and_limits():
    card = models.model_card(
        "a/base", data="60 X-rays", settings={"lora_r": 8}, metrics={"bleu": 0.123456}
    )
    assert card.startswith("---\nbase_model: a/base\n")
    for text in ("60 X-rays", "| lora_r | 8 |", "| bleu | 0.1235 |", "no medical device"):
        assert text in card
    assert "None were recorded" in models.model_card("a/base", data="d", settings={})
    assert f"python {platform.python_version()}, medtune " in card
    for package in ("torch", "transformers", "peft"):
        assert f"{package} {metadata.version(package)}" in card


def test_card_has_the_scores_of_notebook_05():
    file = Path(__file__).parents[1] / "papermill_runs/reference/tiny-cpu/summary.json"
    found = json.loads(file.read_text("utf-8"))["notebooks"]["05_evaluate"]
    card = models.model_card(
        "a/base", data="d", settings={}, metrics=models.card_scores(found) | {"loss": 0.5}
    )
    lines = card.splitlines()
    words = found["bleu4_words"]
    (row,) = [line for line in lines if line.startswith("| word BLEU-4 |")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    expected = [words[who] for who in ("base", "tuned", "shuffled", "most_frequent")]
    assert cells[1:5] == [f"{value:.1f}" for value in expected]
    assert cells[5].startswith("+") and "[" in cells[5]
    assert f"{found['n']}" in card and found["intervals"] in card
    table = [line for line in lines if line.startswith("|")]
    assert len({line.count("|") for line in table if "BLEU" in line or "loss" in line}) == 1
    unscored = {"n": 2, "bleu4_words": {"base": None, "tuned": 1.0}}
    assert models.card_scores(unscored)["word BLEU-4"] == {"tuned": "1.0"}


def test_card_asks_what_was_asked_in_training():
    def card(question):
        return models.model_card("a/base", data="d", settings={}, question=question, kind="merged")

    asked = "Where is\nthe 'node'?"
    assert f"question = {asked!r}" in card(asked)
    both = card(["One?", "Two?", "One?"])
    assert "- `One?`\n- `Two?`\n" in both and "question = 'One?'" in both
    many = card([f"Question {number}?" for number in range(9)])
    assert "9 different questions" in many and "Question 5" not in many
    assert "Load and ask" not in models.model_card("a/base", data="d", settings={})


@pytest.mark.parametrize(
    ("base", "shown"),
    [
        ("Qwen/Qwen3-VL-2B-Instruct", "Qwen/Qwen3-VL-2B-Instruct"),
        ("/home/dr.mueller/ward 7/base", "base"),
        ("~/models/base/", "base"),
        ("../data/tiny-vlm", "tiny-vlm"),
        ("C:\\Users\\mueller\\base", "base"),
        ("/c/hub/models--google--gemma-3-4b-it/snapshots/0ab1", "google/gemma-3-4b-it"),
    ],
)
@pytest.mark.parametrize("kind", ["adapter", "merged", None])
def test_no_local_path_in_a_card(base, shown, kind):
    settings = {
        "data": "/srv/ward 7/records",
        "deepspeed": Path("/srv/ward/zero3.json"),
        "several": ["/srv/ward/a", 1],
        "share": "1/2",
        "report": "a | b\nc",
    }
    card = models.model_card(
        base, data="pairs of /srv/ward/x.csv, 3/4 of them", settings=settings, kind=kind
    )
    assert f"base_model: {shown}\n" in card
    for word in ("ward", "mueller", "srv", "home", "models--"):
        assert word not in card
    for text in ("pairs of x.csv, 3/4 of them", "| data | records |", "| deepspeed | zero3.json |"):
        assert text in card
    assert "| share | 1/2 |" in card and "| report | a \\| b c |" in card


def test_a_folder_below_this_one_is_no_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ward" / "base").mkdir(parents=True)
    assert "base_model: base\n" in models.model_card("ward/base", data="d", settings={})
    assert "base_model: other/base\n" in models.model_card("other/base", data="d", settings={})


@pytest.mark.parametrize(("kind", "pictures"), [("adapter", 1), ("merged", 1), ("merged", 2)])
def test_the_lines_of_a_card_load_the_model_and_ask_it(
    adapter, tmp_path, monkeypatch, kind, pictures
):
    model, processor = tuned(), models.load_processor(tiny_folder())
    if kind == "merged":
        model = merged_onto(tiny_folder(), adapter)
    card = models.model_card(
        str(tiny_folder()),
        data="d",
        settings={},
        question="What is it?",
        pictures=pictures,
        kind=kind,
    )
    folder = tmp_path / "model"
    models.save_model(model, processor, folder, card=card)
    # what a reader of the card does: goes into the folder, with the base and a picture
    (folder / tiny_folder().name).symlink_to(tiny_folder())
    for name in ("picture", "picture-1", "picture-2"):
        Image.new("L", (64, 48)).save(folder / f"{name}.png")
    monkeypatch.chdir(folder)
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]
    names = {}
    exec(code, names)
    again = models.load_base(folder) if kind == "merged" else None
    if again is None:
        again = models.load_tuned(models.load_base(tiny_folder()), folder)
    tokens = again.generate(**names["inputs"], max_new_tokens=160, do_sample=False)
    assert torch.equal(tokens, names["tokens"])
    assert "What is it?" in names["prompt"]
    mark = processor.image_token
    assert names["prompt"].count(mark) == pictures


def test_saving_forgets_where_the_base_lies(tmp_path):
    base = shutil.copytree(tiny_folder(), tmp_path / "ward 7" / "base")
    model = tuned(base=models.load_base(base))
    model.peft_config["default"].base_model_name_or_path = str(base)
    processor = models.load_processor(base)
    models.save_model(model, processor, tmp_path / "adapter", card="c")
    models.save_model(model.merge_and_unload(), processor, tmp_path / "merged", card="c")
    for name in ("adapter", "merged"):
        for file in (tmp_path / name).iterdir():
            assert b"ward 7" not in file.read_bytes(), file.name
    models.load_tuned(models.load_base(base), tmp_path / "adapter")
    kept = tuned()
    kept.peft_config["default"].base_model_name_or_path = "Qwen/Qwen3-VL-2B-Instruct"
    models.save_model(kept, processor, tmp_path / "hub", card="c")
    config = json.loads((tmp_path / "hub" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "Qwen/Qwen3-VL-2B-Instruct"


@pytest.mark.parametrize("own", ["<|endoftext|>", ["<|endoftext|>", "<|im_end|>"]])
def test_a_saved_model_ends_its_answers_where_the_template_does(tmp_path, own):
    """Gemma's pretrained models end documents only; other programs read the file."""
    model = models.load_base(tiny_folder())
    processor = models.load_processor(tiny_folder())
    document, turn = processor.tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    model.generation_config.eos_token_id = [document, turn] if isinstance(own, list) else document
    models.save_model(model, processor, tmp_path / "saved", card="a card")
    again = models.load_base(tmp_path / "saved")
    assert again.generation_config.eos_token_id == [document, turn]
    assert models.end_tokens(again, processor) == [document, turn]


@pytest.mark.slow
@pytest.mark.parametrize("ours", [False, True])
def test_a_training_leaves_no_stub_cards(tmp_path, ours):
    """TRL and PEFT write theirs where nobody stops them; then ours would have nothing to do."""
    rows = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": "What?"}],
                "completion": [{"role": "assistant", "content": "A liver."}],
            }
        ]
    )
    args = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        save_steps=1,
        report_to="none",
        bf16=False,
        use_cpu=True,
    )
    processor = models.load_processor(tiny_folder())
    trainer = SFTTrainer(tuned(), args, train_dataset=rows, processing_class=processor.tokenizer)
    if ours:
        models.write_no_stub_cards(trainer)
    trainer.train()
    found = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("README.md"))
    assert found == ([] if ours else ["README.md", "checkpoint-1/README.md"])
    assert (tmp_path / "checkpoint-1" / "adapter_model.safetensors").exists()


def test_saving_replaces_a_model_but_nothing_else(adapter, tmp_path):
    processor = models.load_processor(tiny_folder())
    out = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    (out / "stale.txt").write_text("from an older run")
    models.save_model(tuned(), processor, out, card="new card")
    assert (out / "README.md").read_text() == "new card"
    assert not (out / "stale.txt").exists()

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="is no model folder"):
        models.save_model(tuned(), processor, tmp_path / "mine", card="c")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


FULL_DISK = """
import resource, signal, sys
from medtune import models
model, processor = models.load_base(sys.argv[1]), models.load_processor(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    models.save_model(model, processor, sys.argv[2], card="c")
except OSError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no file size limits on Windows")
def test_write_that_fails_half_way_leaves_the_old_model(tmp_path):
    """The kernel refuses to write more than 100 kB into a file, as a full disk would."""
    out = Path(shutil.copytree(tiny_folder(), tmp_path / "model"))
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    command = [sys.executable, "-c", FULL_DISK, str(tiny_folder()), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    last = done.stdout.splitlines()[-1]
    assert last.startswith(f"Could not save {out}, nothing was written")
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
