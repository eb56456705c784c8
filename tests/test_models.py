"""Loading, adapting, merging and saving, on tiny random models of the families the recipes use."""

import functools
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from medtune import models

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True, "bos_token_id": None}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}
QWEN3_VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
QWEN3_VISION |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 144}


def family(name: str):
    """A tiny config of one family of published models."""
    import transformers as tf

    text = TEXT | {"vocab_size": 420, "pad_token_id": 0, "eos_token_id": 2}
    siglip = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    siglip |= {"image_size": 56, "patch_size": 14}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
    qwen2_vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}
    qwen25_vision = {"depth": 2, "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48, "num_heads": 2}
    return {
        "qwen2-vl": lambda: tf.Qwen2VLConfig(text_config=text | ROPE, vision_config=qwen2_vision),
        "qwen2.5-vl": lambda: tf.Qwen2_5_VLConfig(text_config=text | ROPE, vision_config=qwen25_vision),
        "qwen3-vl": lambda: tf.Qwen3VLConfig(text_config=text | ROPE, vision_config=QWEN3_VISION),
        "qwen3-vl-moe": lambda: tf.Qwen3VLMoeConfig(text_config=text | ROPE | experts, vision_config=QWEN3_VISION),
        "gemma-3": lambda: tf.Gemma3Config(text_config=text, vision_config=siglip, mm_tokens_per_image=4),
    }[name]()


@functools.cache
def tiny_folder() -> Path:
    """A random Qwen3-VL with its own tokenizer and processor, in a folder as `from_pretrained` wants it."""
    import tokenizers as tk
    import transformers as tf

    out = Path(tempfile.mkdtemp(prefix="medtune-tiny-"))
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    special += ["<|image_pad|>", "<|video_pad|>"]
    bpe = tk.Tokenizer(tk.models.BPE())
    bpe.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tk.pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        ["The image is a computed tomography (CT) scan of the upper abdomen."] * 2,
        tk.trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, special_tokens=special, min_frequency=1),
    )
    raw = json.loads(bpe.to_str())["model"]
    tokenizer = tf.Qwen2Tokenizer(
        vocab=raw["vocab"],
        merges=[tuple(pair) for pair in raw["merges"]],
        unk_token=None,
        bos_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    )
    tokenizer.add_tokens([tk.AddedToken(token, special=True, normalized=False) for token in special], True)
    pixels = {"shortest_edge": 192 * 192, "longest_edge": 192 * 192}
    pictures = tf.Qwen2VLImageProcessorPil(patch_size=16, size=pixels, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    tf.PaddleOCRVLProcessor(pictures, tokenizer, chat_template=TEMPLATE).save_pretrained(out)
    config = family("qwen3-vl")
    for key, token in {"image": "<|image_pad|>", "video": "<|video_pad|>"}.items():
        setattr(config, f"{key}_token_id", tokenizer.convert_tokens_to_ids(token))
    for key in ("start", "end"):
        setattr(config, f"vision_{key}_token_id", tokenizer.convert_tokens_to_ids(f"<|vision_{key}|>"))
    config.text_config.vocab_size, config.tie_word_embeddings = len(tokenizer), True
    torch.manual_seed(0)
    model = tf.Qwen3VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(out)
    return out


def one_batch():
    """Two questions with a picture, as the processor makes them."""
    from PIL import Image

    processor = models.load_processor(tiny_folder())
    image = Image.effect_mandelbrot((256, 256), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    texts = ["What is shown?", "What is shown in the upper abdomen?"]
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]
        for text in texts
    ]
    kwargs = {"processor_kwargs": {"padding": True, "return_tensors": "pt"}}
    return processor.apply_chat_template(chats, tokenize=True, return_dict=True, **kwargs)


def tuned(which="language+merger", base=None, **options):
    """A tiny base with a LoRA whose weights are not zero."""
    import peft

    base = base or models.load_base(tiny_folder())
    config = peft.LoraConfig(r=4, lora_alpha=8, **models.adapter_targets(base, which), **options)
    model = peft.get_peft_model(base, config).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            parameter.data.normal_(0, 0.05)
    return model


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A saved adapter."""
    out = tmp_path_factory.mktemp("saved") / "adapter"
    models.save_model(tuned(), models.load_processor(tiny_folder()), out, card="a card")
    return out


@pytest.fixture
def copy(tmp_path):
    """A copy of the tiny folder, to be damaged."""
    return Path(shutil.copytree(tiny_folder(), tmp_path / "copy"))


# --- processor -----------------------------------------------------------------------------------------------------


def test_processor_loads_and_bounds_pixels():
    from PIL import Image

    processor = models.load_processor(tiny_folder(), max_pixels=128 * 128)
    batch = processor(images=[Image.new("RGB", (512, 512))], text=["<|image_pad|>"], return_tensors="pt")
    assert (batch["input_ids"] == processor.image_token_id).sum() == 16


def test_pixel_bounds_are_refused_where_pictures_have_one_size(copy):
    config = json.loads((copy / "processor_config.json").read_text())
    config["image_processor"] |= {"size": {"height": 56, "width": 56}, "image_processor_type": "SiglipImageProcessor"}
    (copy / "processor_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="one fixed size"):
        models.load_processor(copy, max_pixels=128 * 128)


@pytest.mark.parametrize(
    ("missing", "message"),
    [("processor_config.json", "has no processor"), ("chat_template.jinja", "has no chat template")],
)
def test_folder_without_processor_or_template_says_so(copy, missing, message):
    (copy / missing).unlink()
    with pytest.raises(ValueError, match=message) as error:
        models.load_processor(copy)
    assert "\n" not in str(error.value)


def test_processor_that_wants_video_loads_for_pictures(copy, tmp_path):
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():
        pytest.skip("with torchvision the full class loads")
    config = json.loads((copy / "processor_config.json").read_text())
    video = {"video_processor_type": "Qwen3VLVideoProcessor", "fps": 3}
    config |= {"processor_class": "Qwen3VLProcessor", "video_processor": video}
    (copy / "processor_config.json").write_text(json.dumps(config))
    processor = models.load_processor(copy)
    chat = [{"role": "user", "content": [{"type": "text", "text": "What is shown?"}]}]
    plain = models.load_processor(tiny_folder())
    assert processor.apply_chat_template(chat, tokenize=False) == plain.apply_chat_template(chat, tokenize=False)
    processor.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "processor_config.json").read_text())
    assert saved["processor_class"] == "Qwen3VLProcessor"  # loads as the full class where torchvision is
    assert saved["video_processor"] == video
    assert models.load_processor(tmp_path / "again").image_token_id == plain.image_token_id


def test_missing_folders_are_named():
    for load in (models.load_processor, models.load_base):
        for path in ("./nowhere", "/nowhere/at/all", "../data/nowhere"):
            with pytest.raises(FileNotFoundError, match=f"No model folder {re.escape(path)}"):
                load(path)
        with pytest.raises(OSError, match="neither a folder nor in the hub cache"):
            load("medtune/nowhere")


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
    run = subprocess.run([sys.executable, "-c", HUB], env=environment, capture_output=True, text=True, check=True)
    lines = run.stdout.splitlines()
    assert len(lines) == 4
    assert all("accept its licence" in line and "hf auth login" in line and "HF_TOKEN" in line for line in lines[:2])
    assert all("check the spelling" in line for line in lines[2:])


# --- base model ----------------------------------------------------------------------------------------------------


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
    """On a CPU with AVX512-BF16 bitsandbytes repacks weights at the first evaluation, and gradients end there."""
    import bitsandbytes
    import peft

    base = models.load_base(tiny_folder(), quantization_config=models.nf4_config("float32"))
    assert any(isinstance(module, bitsandbytes.nn.Linear4bit) for module in base.modules())
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, **models.adapter_targets(base, "attention")))
    batch = one_batch()

    def gradients():
        model.train().zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        return [parameter.grad.clone() for name, parameter in model.named_parameters() if "lora_B" in name]

    before = gradients()
    with torch.no_grad():
        model.eval()(**batch)
    for first, second in zip(before, gradients(), strict=True):
        torch.testing.assert_close(first, second)
        assert first.norm() > 0


def test_four_bit_weights_are_counted_at_their_true_number():
    full = models.count_parameters(models.load_base(tiny_folder()))
    packed = models.count_parameters(models.load_base(tiny_folder(), quantization_config=models.nf4_config()))
    assert {part: sum(count.values()) for part, count in full.items()} == {
        part: sum(count.values()) for part, count in packed.items()
    }


def cell(notebook: str, name: str) -> str:
    """The source of one cell of a notebook."""
    cells = json.loads((Path(__file__).parents[1] / "notebooks" / notebook).read_text("utf-8"))["cells"]
    return "".join(next(cell["source"] for cell in cells if cell["id"] == name))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_notebook_03_configures_nf4_as_we_do(dtype):
    from transformers import BitsAndBytesConfig

    names = {"method": "qlora", "dtype": dtype, "torch": torch, "BitsAndBytesConfig": BitsAndBytesConfig}
    exec(cell("03_finetune_lora.ipynb", "quantization"), names)
    assert names["quantization_config"].to_dict() == models.nf4_config(dtype).to_dict()


def merged_onto(base, adapter):
    return models.load_tuned(models.load_base(base), adapter).merge_and_unload(safe_merge=True).eval()


def test_notebook_06_merges_as_we_do(adapter):
    names = {"model_name_or_path": tiny_folder(), "adapter": adapter, "dtype": "float32", "device": "cpu"}
    names |= {"models": models}
    for name in ("tuned", "merge"):
        exec(cell("06_merge_export.ipynb", name), names)
    merged = merged_onto(tiny_folder(), adapter).state_dict()
    assert all(torch.equal(value, merged[key]) for key, value in names["merged"].state_dict().items())


# --- adapter -------------------------------------------------------------------------------------------------------

FAMILIES = ["qwen2-vl", "qwen2.5-vl", "qwen3-vl", "qwen3-vl-moe", "gemma-3"]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("which", ["language", "attention", "language+merger", "all-linear", "llamafactory-all"])
def test_targets_name_exactly_the_layers_of_their_parts(name, which):
    """Oracle: peft itself, which builds an adapter on each layer that the pattern names."""
    import peft
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        base = AutoModelForImageTextToText.from_config(family(name))
    targets = models.adapter_targets(base, which)
    linear = {key for key, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    wanted = {part for word in which.split("+") for part in models.TARGETS[word]}
    expected = {key for key in linear if models.part_of(key) in wanted and "vision_tower.head" not in key}
    assert {key for key, _ in base.named_modules() if re.fullmatch(targets["target_modules"], key)} == expected
    counts = models.count_parameters(peft.get_peft_model(base, peft.LoraConfig(r=2, **targets)))
    trained = {part for part, count in counts.items() if count["trained"]} - {"total"}
    absent = {"language MLP"} if name == "qwen3-vl-moe" else set()  # its MLPs are experts
    absent |= {"merger"} if name == "gemma-3" and which == "all-linear" else set()  # its merger is no Linear layer
    assert trained == wanted - absent
    assert counts["total"]["trained"] == sum(counts[part]["trained"] for part in trained)


def test_peft_agrees_on_all_linear():
    """peft's own `all-linear` finds the same layers."""
    import peft
    from transformers import AutoModelForImageTextToText

    def adapted(targets):
        with torch.device("meta"):
            base = AutoModelForImageTextToText.from_config(family("qwen3-vl"))
        model = peft.get_peft_model(base, peft.LoraConfig(r=2, **targets(base)))
        return {name for name, _ in model.named_parameters() if "lora_" in name}

    ours = adapted(lambda base: models.adapter_targets(base, "all-linear"))
    assert ours == adapted(lambda base: {"target_modules": "all-linear"})


def test_unknown_and_absent_targets_are_refused():
    base = models.load_base(tiny_folder())
    with pytest.raises(ValueError, match="Unknown adapter target 'everything'"):
        models.adapter_targets(base, "everything")
    with pytest.raises(ValueError, match="no layers for the adapter target 'experts'"):
        models.adapter_targets(base, "language+experts")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
    ],
    ids=lambda options: next(iter(options), "plain"),
)
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_adapter_and_merged_model_say_the_same_after_reloading(tmp_path, options):
    processor, batch = models.load_processor(tiny_folder()), one_batch()
    model = tuned(**options)
    files = models.save_model(model, processor, tmp_path / "adapter", card="c")
    assert {"adapter_model.safetensors", "chat_template.jinja", "processor_config.json", "README.md"} <= set(files)
    again = models.load_tuned(models.load_base(tiny_folder()), tmp_path / "adapter")
    assert models.compare_logits(model, again, batch)["max_abs_diff"] == 0
    assert models.compare_logits(model, models.load_base(tiny_folder()), batch)["max_abs_diff"] > 0.01
    merged = merged_onto(tiny_folder(), tmp_path / "adapter")
    models.save_model(merged, processor, tmp_path / "merged", card="c", max_shard_size="200KB")
    assert (tmp_path / "merged" / "model.safetensors.index.json").exists()
    reloaded = models.load_base(tmp_path / "merged")
    result = models.compare_logits(model, reloaded, batch)
    assert result["max_abs_diff"] < 1e-5
    assert result["argmax_agreement"] == 1
    assert models.compare_logits(models.text_logits(model, batch), reloaded, batch) == result, "noted before, the same"
    assert models.load_processor(tmp_path / "merged").chat_template == processor.chat_template


def test_experts_are_trained_saved_and_merged(tmp_path):
    from transformers import AutoModelForImageTextToText

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
    assert models.compare_logits(models.load_base(tmp_path / "base"), merged, batch)["max_abs_diff"] > 0.01


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda w: {key.replace("language_model", "text_model"): v for key, v in w.items()}, "28 missing keys"),
        (lambda w: dict(list(w.items())[1:]), "1 missing keys"),
        (lambda w: w | {"base_model.model.lost.lora_A.weight": torch.zeros(2)}, "1 unexpected keys"),
        (lambda w: {key: torch.zeros(v.shape[0] + 1, v.shape[1]) for key, v in w.items()}, "size mismatch"),
    ],
    ids=["renamed", "missing", "unexpected", "shape"],
)
@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_adapter_that_does_not_fit_is_an_error(adapter, tmp_path, damage, message):
    from safetensors.torch import load_file, save_file

    copied = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    save_file(damage(load_file(adapter / "adapter_model.safetensors")), copied / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        models.load_tuned(models.load_base(tiny_folder()), copied)
    assert "\n" not in str(error.value)


def test_missing_adapter_is_refused(adapter, tmp_path):
    with pytest.raises(FileNotFoundError, match="adapter_config.json is missing"):
        models.load_tuned(models.load_base(tiny_folder()), tmp_path)


# --- save ----------------------------------------------------------------------------------------------------------


def test_card_names_base_data_settings_scores_and_limits():
    card = models.model_card("a/base", data="60 X-rays", settings={"lora_r": 8}, metrics={"bleu": 0.123456})
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
sys.path.insert(0, sys.argv[1])
from test_models import models, tiny_folder
model, processor = models.load_base(sys.argv[2]), models.load_processor(sys.argv[2])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    models.save_model(model, processor, sys.argv[3], card="c")
except OSError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no file size limits on Windows")
def test_write_that_fails_half_way_leaves_the_old_model(tmp_path):
    """The kernel refuses to write more than 100 kB into a file, as a full disk would."""
    out = Path(shutil.copytree(tiny_folder(), tmp_path / "model"))
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    command = [sys.executable, "-c", FULL_DISK, str(Path(__file__).parent), str(tiny_folder()), str(out)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[-1].startswith(f"Could not save {out}, nothing was written")
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


# --- the libraries -------------------------------------------------------------------------------------------------


def test_libraries_still_take_the_arguments_we_use():
    """A renamed argument shows here, by name, before it shows somewhere in a notebook."""
    import peft
    import transformers
    import trl

    used = {
        transformers.BitsAndBytesConfig: "load_in_4bit bnb_4bit_quant_type bnb_4bit_use_double_quant "
        "bnb_4bit_compute_dtype bnb_4bit_quant_storage",
        peft.LoraConfig: "r lora_alpha lora_dropout bias target_modules target_parameters modules_to_save use_rslora "
        "use_dora task_type",
        trl.SFTConfig: "output_dir learning_rate lr_scheduler_type warmup_steps max_steps num_train_epochs "
        "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps activation_checkpointing "
        "activation_checkpointing_kwargs max_grad_norm max_length completion_only_loss bf16 tf32 optim seed data_seed "
        "logging_steps eval_strategy eval_steps eval_on_start save_strategy save_steps save_total_limit report_to "
        "dataloader_num_workers dataloader_pin_memory remove_unused_columns disable_tqdm deepspeed use_cpu",
        trl.SFTTrainer: "model args train_dataset eval_dataset processing_class peft_config callbacks data_collator",
        transformers.Trainer.train: "resume_from_checkpoint",
        transformers.Trainer.get_batch_samples: "epoch_iterator num_batches device",
        transformers.Trainer.training_step: "model inputs num_items_in_batch",
        transformers.GenerationMixin.generate: "generation_config",
        transformers.ProcessorMixin.apply_chat_template: "conversation processor_kwargs",
        peft.PeftModel.load_adapter: "model_id adapter_name",
        peft.tuners.lora.LoraModel.merge_and_unload: "safe_merge",
    }
    for function, names in used.items():
        missing = set(names.split()) - inspect.signature(function).parameters.keys()
        assert not missing, f"{function.__qualname__} no longer takes {sorted(missing)}"
    for field in ("max_new_tokens", "do_sample", "temperature", "top_p", "num_beams"):
        assert hasattr(transformers.GenerationConfig(), field), field
    assert transformers.Qwen3VLForConditionalGeneration.accepts_loss_kwargs is False, "the trap is gone: say so in 03"
