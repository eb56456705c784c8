"""medtune.deploy: an export says what the model says, or it is not proven."""

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from medtune import deploy, models
from medtune.pairs import load_pairs

NEEDED = ("xllamacpp", "gguf", "conversion")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (extra gguf)"),
]
# an answer that is cut off is compared as well as a whole one
SHORT = {"max_new_tokens": 24}
TINY_VLM = Path(__file__).parents[1] / "data" / "tiny-vlm"
CONFIG = json.loads((TINY_VLM / "config.json").read_text("utf-8"))
LAYERS = CONFIG["text_config"]["num_hidden_layers"]


@pytest.fixture(scope="module")
def tuned(tiny_vlm, tmp_path_factory) -> Path:
    """The tiny base with another weight in each language layer, saved as 06 saves a merged model."""
    model = models.load_base(tiny_vlm)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if name.endswith("q_proj.weight"):
            update = torch.randn(weight.shape[0], 2) @ torch.randn(2, weight.shape[1])
            weight.data += 0.1 * weight.std() * update
    folder = tmp_path_factory.mktemp("tuned") / "merged"
    models.save_model(model, models.load_processor(tiny_vlm), folder, card="# A card")
    return folder


@pytest.fixture(scope="module")
def exported(tuned, tmp_path_factory) -> deploy.Exported:
    folder = tmp_path_factory.mktemp("export") / "gguf"
    return deploy.export_gguf(tuned, folder, ("f16", "q8_0"), question="What is shown?")


@pytest.fixture(scope="module")
def rows(sample_path) -> list[dict]:
    pairs = load_pairs(sample_path, split="test", limit=200)
    chosen = [pairs[i] for i in (0, 99, 199)]
    # one that is not square
    wide = {**chosen[1], "id": "wide", "image": chosen[1]["image"].crop((0, 0, 512, 300))}
    # in two ways to write the same letter, as a keyboard and a file name may have it
    letter = {**chosen[2], "id": "letter", "question": "Show\u0065\u0301?"}
    return [chosen[0], wide, letter]


def test_the_folder_says_what_the_files_do_not(exported, tuned):
    names = {file.name for file in exported.folder.iterdir()}
    assert names == {
        "README.md",
        "chat_template.jinja",
        "medtune.json",
        "mmproj-f16.gguf",
        "model-f16.gguf",
        "model-q8_0.gguf",
    }
    read = deploy.read_export(exported.folder / "model-q8_0.gguf")
    assert read == exported
    processor = models.load_processor(tuned)
    assert read.preparation == deploy.Preparation.of(processor.image_processor)
    assert (read.question, read.normalization) == ("What is shown?", "NFC")
    most = read.preparation.max_tokens
    assert f"--image-max-tokens {most}`" in (exported.folder / "README.md").read_text("utf-8")
    assert not list(exported.folder.parent.glob(".*"))


def test_an_export_is_proven(exported, tuned, tiny_vlm, rows):
    proof = deploy.check_export(exported, tuned, rows, base=tiny_vlm, **SHORT)
    for kind, found in proof["types"].items():
        assert found["why_not"] == [] and found["proven"], kind
        assert found["same_prompts"] == len(rows)
        assert found["tensors"] == {"changed": LAYERS, "found": LAYERS, "missing": []}
        assert found["timing"]["memory_mb"] < 400
    assert proof["types"]["f16"]["largest_difference"] < 0.05
    assert exported.is_proven("f16") and exported.is_proven("q8_0")
    kept = (exported.folder / "proof.json").read_text("utf-8")
    for row in rows:
        assert row["id"] not in kept, "ids may be a patient's, and the folder goes elsewhere"


def test_the_export_of_another_model_is_not_proven(tuned, tiny_vlm, rows, tmp_path):
    """As when somebody exports the base, or an adapter that was never merged."""
    wrong = deploy.export_gguf(tiny_vlm, tmp_path / "base", ("f16",))
    proof = deploy.check_export(wrong, tuned, rows[:1], base=tiny_vlm, **SHORT)
    (found,) = proof["types"].values()
    assert not found["proven"] and not wrong.is_proven()
    assert found["same_prompts"] == 1
    reasons = " ".join(found["why_not"])
    assert f"{LAYERS} tensors of the training are not found" in reasons
    assert found["partings"] == [] or found["partings"][0]["margin"] > 0
    with pytest.raises(ValueError, match="type=q8_0: .* has f16"):
        wrong.text_file("q8_0")


def test_other_limits_or_other_files_are_not_proven(exported, tuned, rows, tmp_path):
    folder = shutil.copytree(exported.folder, tmp_path / "copy")
    larger = {**exported.to_dict()["preparation"], "min_pixels": 90_000, "max_pixels": 100_000}
    about = exported.to_dict() | {"preparation": larger}
    about["digests"] = about["digests"] | {"mmproj-f16.gguf": "0" * 64}
    (folder / "medtune.json").write_text(json.dumps(about))
    proof = deploy.check_export(folder, tuned, rows[:1], types=["f16"], **SHORT)
    reasons = " ".join(proof["types"]["f16"]["why_not"])
    assert "mmproj-f16.gguf is not the file that was written" in reasons
    assert "1 of 1 prompts have another number of tokens: other limits of pictures" in reasons
    assert not deploy.read_export(folder).is_proven("f16")


def with_frames(folder: Path, out: Path, frames: int) -> Path:
    """The same model, with a patch kernel over so many equal frames of a picture."""
    shutil.copytree(folder, out)
    for name, part in (
        ("config.json", "vision_config"),
        ("processor_config.json", "image_processor"),
    ):
        values = json.loads((out / name).read_text("utf-8"))
        values[part]["temporal_patch_size"] = frames
        (out / name).write_text(json.dumps(values))
    for file in out.glob("*.safetensors"):
        weights = load_file(file)
        for name, kernel in weights.items():
            if name.endswith("patch_embed.proj.weight"):
                whole = kernel.sum(dim=2, keepdim=True)
                weights[name] = (whole / frames).repeat(1, 1, frames, 1, 1)
        save_file(weights, file, metadata={"format": "pt"})
    return out


def test_a_picture_is_one_frame_or_two_equal_ones(tuned, rows, tmp_path):
    digests = []
    for frames in (1, 2):
        # a GGUF file has the name of the folder that it was made of
        source = with_frames(tuned, tmp_path / str(frames) / "source", frames)
        export = deploy.export_gguf(source, tmp_path / str(frames) / "gguf", ("f16",))
        proof = deploy.check_export(export, source, rows[:1], max_new_tokens=8)
        found = proof["types"]["f16"]
        assert found["proven"], found["why_not"]
        digests.append(export.digests)
    # what is written is the same model
    assert digests[0] == digests[1]


@pytest.mark.parametrize("family", ["qwen3-vl", "qwen3-vl-moe"])
def test_random_twins_of_published_models(family, rows, tmp_path):
    source = tiny_models.tiny_twin(family)
    export = deploy.export_gguf(source, tmp_path / family, ("f32",))
    asked = [{**row, "caption": ""} for row in rows[:2]]
    proof = deploy.check_export(export, source, asked, max_new_tokens=8)
    found = proof["types"]["f32"]
    assert found["same_prompts"] == 2 and proof["scores"] == {}
    # experts load, and are not vouched for: a random router chooses between near ties
    if family == "qwen3-vl":
        assert found["proven"], found["why_not"]


def test_what_has_no_export_leaves_nothing_behind(tuned, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is an adapter: merge it first"):
        deploy.export_gguf(adapter, tmp_path / "a")
    with pytest.raises(ValueError, match="types=\\['q3'\\]"):
        deploy.export_gguf(tuned, tmp_path / "a", ("q3",))
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="is no exported model"):
        deploy.export_gguf(tuned, tmp_path / "other")
    # a tokenizer that cuts words by a rule of its own
    strange = shutil.copytree(tuned, tmp_path / "strange")
    text = (strange / "tokenizer.json").read_text("utf-8")
    (strange / "tokenizer.json").write_text(text.replace("|\\\\p{N}|", "|\\\\p{N}{1,3}|"))
    # Qwen's own class would put its rule in the place of that of the file
    names = json.loads((strange / "tokenizer_config.json").read_text("utf-8"))
    names["tokenizer_class"] = "PreTrainedTokenizerFast"
    (strange / "tokenizer_config.json").write_text(json.dumps(names))
    with pytest.raises(ValueError, match="does not know how this tokenizer cuts words"):
        deploy.export_gguf(strange, tmp_path / "a")
    packed = shutil.copytree(tuned, tmp_path / "packed")
    config = json.loads((packed / "config.json").read_text("utf-8"))
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": {}}))
    with pytest.raises(ValueError, match="stored in 4 or 8 bits"):
        deploy.export_gguf(packed, tmp_path / "a")
    assert not (tmp_path / "a").exists() and not list(tmp_path.glob(".*"))


def test_a_damaged_folder_is_named(exported, tmp_path):
    with pytest.raises(FileNotFoundError, match="medtune.json is missing"):
        deploy.read_export(tmp_path)
    folder = shutil.copytree(exported.folder, tmp_path / "copy")
    (folder / "mmproj-f16.gguf").unlink()
    with pytest.raises(FileNotFoundError, match="mmproj-f16.gguf is missing"):
        deploy.read_export(folder)
    (folder / "mmproj-f16.gguf").write_bytes(b"GGUF nonsense")
    with pytest.raises(OSError, match="llama.cpp cannot load"):
        deploy.Engine(deploy.read_export(folder))
    (folder / "medtune.json").write_text("{}")
    with pytest.raises(ValueError, match="is damaged"):
        deploy.read_export(folder)


def test_without_limits_the_prompt_is_another(exported, rows):
    """The lesson of notebook 14: the limits are not in the file."""
    from medtune.deploy.serve import write_request

    raw = replace(exported, preparation=deploy.Preparation(width=512, height=512))
    messages = [{"role": "user", "content": [{"type": "image"}]}]
    request = write_request(raw, messages, [rows[0]["image"]], max_tokens=1)
    tokens = {}
    for limits in (True, False):
        with deploy.Engine(exported, limits=limits) as engine:
            tokens[limits] = engine.complete(request)["usage"]["prompt_tokens"]
    assert tokens[False] - tokens[True] >= 100
