"""Processors, base models and adapters are loaded, or refused in one line that says what to do."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import bitsandbytes
import peft
import pytest
import torch
import trl
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import notebook_cell, one_batch, tiny_folder, tiny_twin, tuned
from transformers import BitsAndBytesConfig
from transformers.utils import is_torchvision_available

from medtune import models


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """A saved adapter."""
    out = tmp_path_factory.mktemp("saved") / "adapter"
    models.save_model(tuned(), models.load_processor(tiny_folder()), out, card="a card")
    return out


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of the tiny folder, to be damaged."""
    return Path(shutil.copytree(tiny_folder(), tmp_path / "copy"))


# --- processor -----------------------------------------------------------------------------------


def test_processor_loads_and_bounds_pixels():
    processor = models.load_processor(tiny_folder(), max_pixels=128 * 128)
    picture = Image.new("RGB", (512, 512))
    batch = processor(images=[picture], text=["<|image_pad|>"], return_tensors="pt")
    assert (batch["input_ids"] == processor.image_token_id).sum() == 16


def test_pixel_bounds_are_refused_where_pictures_have_one_size(copy):
    config = json.loads((copy / "processor_config.json").read_text())
    config["image_processor"]["size"] = {"height": 56, "width": 56}
    config["image_processor"]["image_processor_type"] = "SiglipImageProcessor"
    (copy / "processor_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="one fixed size"):
        models.load_processor(copy, max_pixels=128 * 128)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("processor_config.json", "has no processor"),
        ("chat_template.jinja", "has no chat template"),
    ],
)
def test_folder_without_processor_or_template_says_so(copy, missing, message):
    (copy / missing).unlink()
    with pytest.raises(ValueError, match=message) as error:
        models.load_processor(copy)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(is_torchvision_available(), reason="with torchvision the full class loads")
def test_processor_that_wants_video_loads_for_pictures(copy, tmp_path):
    config = json.loads((copy / "processor_config.json").read_text())
    video = {"video_processor_type": "Qwen3VLVideoProcessor", "fps": 3}
    config["processor_class"] = "Qwen3VLProcessor"
    config["video_processor"] = video
    (copy / "processor_config.json").write_text(json.dumps(config))
    processor = models.load_processor(copy)
    chat = [{"role": "user", "content": [{"type": "text", "text": "What is shown?"}]}]
    plain = models.load_processor(tiny_folder())
    text = processor.apply_chat_template(chat, tokenize=False)
    assert text == plain.apply_chat_template(chat, tokenize=False)

    processor.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "processor_config.json").read_text())
    assert saved["processor_class"] == "Qwen3VLProcessor", "the full class where torchvision is"
    assert saved["video_processor"] == video
    again = models.load_processor(tmp_path / "again")
    assert again.image_token_id == plain.image_token_id


def test_a_pretrained_gemma_takes_the_template_of_the_instruct_model(tmp_path):
    for end in ("-it", "-pt"):
        shutil.copytree(tiny_twin("gemma-3"), tmp_path / f"gemma{end}")
    (tmp_path / "gemma-pt" / "chat_template.jinja").unlink()
    processor = models.load_processor(tmp_path / "gemma-pt")
    assert processor.chat_template == models.load_processor(tmp_path / "gemma-it").chat_template


@pytest.mark.parametrize("load", [models.load_processor, models.load_base])
def test_missing_folders_are_named(load):
    for path in ("./nowhere", "/nowhere/at/all", "../data/nowhere"):
        with pytest.raises(FileNotFoundError, match=f"No model folder {re.escape(path)}"):
            load(path)
    with pytest.raises(OSError, match="neither a folder nor in the hub cache"):
        load("medtune/nowhere")


def test_a_model_of_the_hub_that_is_gated_or_not_here_is_refused_in_one_line():
    """The licence page and the login of a gated model are tested against a server below."""
    message = "google/gemma-3-4b-pt is neither a folder nor in the hub cache"
    with pytest.raises(OSError, match=message) as error:
        models.load_processor("google/gemma-3-4b-pt")
    assert "\n" not in str(error.value)


# A hub that has one gated model and no other, and what loading says of it.
HUB = """
import http.server, threading, os
class Hub(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        gated = "/gated/" in self.path
        self.send_response(403 if gated else 401)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()
    do_GET = do_HEAD
    def log_message(self, *args): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
from medtune import models
for name in ("gated/model", "unknown/model"):
    for load in (models.load_processor, models.load_base):
        try:
            load(name)
        except OSError as error:
            print(error)
"""


@pytest.mark.slow
def test_gated_and_unknown_hub_models_are_explained(tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", HUB], env=environment, capture_output=True, text=True, check=True
    )
    lines = run.stdout.splitlines()
    assert len(lines) == 4
    for line in lines[:2]:
        assert "accept its licence" in line
        assert "hf auth login" in line
        assert "HF_TOKEN" in line
    for line in lines[2:]:
        assert "check the spelling" in line


# --- base model ----------------------------------------------------------------------------------


def test_base_loads_in_the_asked_dtype():
    model = models.load_base(tiny_folder(), dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not model.training


def test_damaged_and_pickled_weights_are_refused(copy):
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(OSError, match="cannot be loaded") as error:
        models.load_base(copy)
    assert "\n" not in str(error.value)

    (copy / "model.safetensors").unlink()
    torch.save(models.load_base(tiny_folder()).state_dict(), copy / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"no file named model.safetensors"):
        models.load_base(copy)


def test_nf4_keeps_gradients_after_an_evaluation():
    """With AVX512-BF16, bitsandbytes repacks weights at an evaluation, and gradients end there."""
    base = models.load_base(tiny_folder(), quantization_config=models.nf4_config("float32"))
    assert any(isinstance(module, bitsandbytes.nn.Linear4bit) for module in base.modules())
    targets = models.adapter_targets(base, "attention")
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, **targets))
    batch = one_batch()

    def gradients():
        model.train().zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        named = model.named_parameters()
        return [parameter.grad.clone() for name, parameter in named if "lora_B" in name]

    before = gradients()
    with torch.no_grad():
        model.eval()(**batch)
    for first, second in zip(before, gradients(), strict=True):
        torch.testing.assert_close(first, second)
        assert first.norm() > 0


@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_notebook_03_configures_nf4_as_we_do(dtype, storage):
    names = {
        "method": "qlora",
        "dtype": dtype,
        "bnb_4bit_quant_storage": storage,
        "torch": torch,
        "BitsAndBytesConfig": BitsAndBytesConfig,
    }
    exec(notebook_cell("03_finetune_lora", "quantization"), names)
    ours = models.nf4_config(dtype, storage=storage)
    assert names["quantization_config"].to_dict() == ours.to_dict()


def test_what_4bit_weights_lie_in_changes_no_number():
    logits = {}
    for storage in ("uint8", "bfloat16"):
        config = models.nf4_config("float32", storage=storage)
        base = models.load_base(tiny_folder(), quantization_config=config)
        packed = [
            module for module in base.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)
        ]
        assert {module.weight.dtype for module in packed} == {getattr(torch, storage)}
        logits[storage] = models.text_logits(base, one_batch())
    torch.testing.assert_close(logits["uint8"], logits["bfloat16"], rtol=0, atol=0)


# --- types and ends ------------------------------------------------------------------------------


def test_a_gpu_that_only_imitates_bfloat16_is_refused(monkeypatch):
    """Only the card is not the real one."""
    card = {"is_available": True, "get_device_name": "Tesla T4", "has": False}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: card["is_available"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: card["get_device_name"])
    # with emulation torch says yes of every card
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: including_emulation or card["has"],
    )
    with pytest.raises(ValueError, match="Tesla T4 has no bfloat16: set dtype=float32") as caught:
        models.check_dtype("bfloat16")
    assert "\n" not in str(caught.value)
    models.check_dtype("float32")
    card["has"] = True
    models.check_dtype("bfloat16")
    card |= {"has": False, "is_available": False}
    models.check_dtype("bfloat16")


GEMMA = (
    "<bos>{% for message in messages %}<start_of_turn>{{ message.role }}\n"
    "{% for part in message.content %}{{ part.text | trim }}{% endfor %}<end_of_turn>\n"
    "{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "special", "end"),
    [
        (None, [], "<|im_end|>"),
        (GEMMA, ["<end_of_turn>"], "<end_of_turn>"),
        (GEMMA.replace("<end_of_turn>\n", "\n"), ["<end_of_turn>"], None),
        # words of a template that are no token of their own end nothing
        (GEMMA, [], None),
    ],
)
def test_what_ends_an_answer_is_read_from_the_template(template, special, end):
    processor = models.load_processor(tiny_folder())
    processor.tokenizer.add_tokens(special, special_tokens=True)
    if template:
        processor.chat_template = template
    document = processor.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    base = models.load_base(tiny_folder())
    base.generation_config.eos_token_id = document
    names = processor.tokenizer.convert_ids_to_tokens(models.end_tokens(base, processor))
    assert names == (["<|endoftext|>", end] if end else ["<|endoftext|>"])


# --- saved adapter -------------------------------------------------------------------------------


def rename_modules(weights: dict) -> dict:
    return {key.replace("language_model", "text_model"): value for key, value in weights.items()}


def lose_one(weights: dict) -> dict:
    first = next(iter(weights))
    return {key: value for key, value in weights.items() if key != first}


def add_one(weights: dict) -> dict:
    return weights | {"base_model.model.lost.lora_A.weight": torch.zeros(2)}


def change_shapes(weights: dict) -> dict:
    return {key: torch.zeros(len(value) + 1, value.shape[1]) for key, value in weights.items()}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (rename_modules, "28 missing keys"),
        (lose_one, "1 missing keys"),
        (add_one, "1 unexpected keys"),
        (change_shapes, "size mismatch"),
    ],
)
@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_adapter_that_does_not_fit_is_an_error(adapter, tmp_path, damage, message):
    copied = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    weights = damage(load_file(adapter / "adapter_model.safetensors"))
    save_file(weights, copied / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        models.load_tuned(models.load_base(tiny_folder()), copied)
    assert "\n" not in str(error.value)


def test_missing_adapter_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="adapter_config.json is missing"):
        models.load_tuned(models.load_base(tiny_folder()), tmp_path)


def test_only_one_line_of_bitsandbytes_is_not_shown(caplog):
    """It says that a faster product is absent, each time that anything is started on some CPUs."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "no kernels")
    logger.warning("the weights are damaged")
    assert [record.getMessage() for record in caplog.records] == ["the weights are damaged"]


def test_a_model_that_does_not_fit_into_memory_is_one_line(monkeypatch):
    def fail(*args, **options):
        raise RuntimeError(
            "unable to mmap 1355888 bytes from file <x>: Cannot allocate memory (12)"
        )

    model_class = "medtune.models.load.AutoModelForImageTextToText"
    monkeypatch.setattr(f"{model_class}.from_pretrained", fail)
    with pytest.raises(OSError, match="does not fit into memory here: `medtune plan` says"):
        models.load_base(tiny_folder())


@pytest.mark.parametrize("thinks", [True, False], ids=["larger ones", "smaller ones"])
def test_a_template_that_thinks_first_is_switched_to_answer_at_once(thinks, tmp_path):
    """Oracle: the templates that TRL keeps of Qwen3.5 as it is published."""
    name = "qwen3_5_think.jinja" if thinks else "qwen3_5_nothink.jinja"
    published = Path(trl.__file__).with_name("chat_templates") / name
    shutil.copytree(tiny_twin("qwen3.5"), tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(published.read_text("utf-8"), "utf-8")
    processor = models.load_processor(tmp_path / "model")

    def rendered(turns, **options):
        return processor.apply_chat_template(turns, tokenize=False, **options)

    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
    answer = [{"role": "assistant", "content": [{"type": "text", "text": "A liver."}]}]
    prompt = rendered(question, add_generation_prompt=True)
    assert prompt.endswith("<think>\n\n</think>\n\n")
    # so what is learned is the answer and its end
    assert rendered(question + answer) == f"{prompt}A liver.<|im_end|>\n"
    # and who asks for thoughts still gets them
    asked = rendered(question, add_generation_prompt=True, enable_thinking=True)
    assert asked.endswith("assistant\n<think>\n")

    # saved and loaded again, it is switched once
    processor.save_pretrained(tmp_path / "saved")
    again = models.load_processor(tmp_path / "saved")
    assert again.chat_template == processor.chat_template


def test_a_processor_of_sound_and_video_is_read_for_pictures_and_keeps_their_settings(tmp_path):
    """Gemma-4: what is saved loads whole where torchvision is installed."""
    processor = models.load_processor(tiny_twin("gemma-4"))
    processor.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "processor_config.json").read_text("utf-8"))
    assert settings["processor_class"] == "Gemma4Processor"
    assert settings["video_processor"]["video_processor_type"] == "Gemma4VideoProcessor"
    feature_extractor = settings["feature_extractor"]
    assert feature_extractor["feature_extractor_type"] == "Gemma4AudioFeatureExtractor"
