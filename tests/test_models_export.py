"""A model says the same after saving, merging and loading, and a failed write loses nothing."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import family, merged_onto, notebook_cell, one_batch, tiny_folder, tuned
from transformers import AutoModelForImageTextToText

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
