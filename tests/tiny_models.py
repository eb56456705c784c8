"""Tiny random models of the families that the recipes use, and adapters on them."""

import functools
import json
import tempfile
from pathlib import Path

import peft
import tokenizers
import torch
import transformers
from PIL import Image
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from medtune import models, plan

REPO = Path(__file__).parents[1]

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
VOCABULARY = 420

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": True,
    "vocab_size": VOCABULARY,
    "bos_token_id": None,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
# Qwen's positions have three parts: time, height and width
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
QWEN2_VISION = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}
QWEN25_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "out_hidden_size": 64,
    "intermediate_size": 48,
    "num_heads": 2,
}
QWEN3_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 64,
    "deepstack_visual_indexes": [0],
    "num_position_embeddings": 144,
}
SIGLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}

FAMILIES = ["qwen2-vl", "qwen2.5-vl", "qwen3-vl", "qwen3-vl-moe", "gemma-3"]

# Published models whose shape is shrunk to a twin, by family.
TWINS = {
    "qwen2-vl": "Qwen/Qwen2-VL-2B-Instruct",
    "qwen3-vl": "Qwen/Qwen3-VL-2B-Instruct",
    "qwen2.5-vl": "Qwen/Qwen2.5-VL-3B-Instruct",
    "qwen3-vl-moe": "Qwen/Qwen3-VL-30B-A3B-Instruct",
    "qwen3.5": "Qwen/Qwen3.5-2B",
    "qwen3.5-moe": "Qwen/Qwen3.5-35B-A3B",
    "gemma-3": "google/gemma-3-4b-it",
    "gemma-4": "google/gemma-4-E2B-it",
    "smolvlm": "HuggingFaceTB/SmolVLM-256M-Instruct",
}


def family(name: str) -> transformers.PreTrainedConfig:
    """Give a tiny configuration of one family of published models."""
    if name == "qwen2-vl":
        return transformers.Qwen2VLConfig(text_config=TEXT | ROPE, vision_config=QWEN2_VISION)
    if name == "qwen2.5-vl":
        return transformers.Qwen2_5_VLConfig(text_config=TEXT | ROPE, vision_config=QWEN25_VISION)
    if name == "qwen3-vl":
        return transformers.Qwen3VLConfig(text_config=TEXT | ROPE, vision_config=QWEN3_VISION)
    if name == "qwen3-vl-moe":
        text = TEXT | ROPE | EXPERTS
        return transformers.Qwen3VLMoeConfig(text_config=text, vision_config=QWEN3_VISION)
    return transformers.Gemma3Config(text_config=TEXT, vision_config=SIGLIP, mm_tokens_per_image=4)


@functools.cache
def tiny_folder() -> Path:
    """A random Qwen3-VL with tokenizer and processor, in a folder as `from_pretrained` wants it."""
    out = Path(tempfile.mkdtemp(prefix="medtune-tiny-"))
    tokenizer = make_tokenizer()
    make_processor(tokenizer).save_pretrained(out)
    make_model(tokenizer).save_pretrained(out)
    return out


def make_tokenizer() -> transformers.Qwen2Tokenizer:
    """Train a tokenizer on one sentence."""
    words = tokenizers.Tokenizer(BPE())
    words.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=ByteLevel.alphabet(),
        special_tokens=SPECIAL_TOKENS,
        min_frequency=1,
    )
    sentence = "The image is a computed tomography (CT) scan of the upper abdomen."
    words.train_from_iterator([sentence] * 2, trainer)
    raw = json.loads(words.to_str())["model"]
    tokenizer = transformers.Qwen2Tokenizer(
        vocab=raw["vocab"],
        merges=[tuple(pair) for pair in raw["merges"]],
        unk_token=None,
        bos_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    )
    special = [
        tokenizers.AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS
    ]
    tokenizer.add_tokens(special, True)
    return tokenizer


def make_processor(tokenizer: transformers.Qwen2Tokenizer) -> transformers.ProcessorMixin:
    """Make a processor that brings every picture to 192 x 192 pixels, 36 tokens."""
    pixels = {"shortest_edge": 192 * 192, "longest_edge": 192 * 192}
    pictures = transformers.Qwen2VLImageProcessorPil(
        patch_size=16, size=pixels, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    # a processor that prepares pictures as Qwen3-VL's does, and has no video part
    return transformers.PaddleOCRVLProcessor(pictures, tokenizer, chat_template=TEMPLATE)


def make_model(tokenizer: transformers.Qwen2Tokenizer) -> transformers.PreTrainedModel:
    """Make a random Qwen3-VL that knows the tokens of this tokenizer."""
    config = family("qwen3-vl")
    config.image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    config.video_token_id = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    config.vision_start_token_id = tokenizer.convert_tokens_to_ids("<|vision_start|>")
    config.vision_end_token_id = tokenizer.convert_tokens_to_ids("<|vision_end|>")
    config.text_config.vocab_size = len(tokenizer)
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    model = transformers.Qwen3VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


@functools.cache
def tiny_twin(family_name: str) -> Path:
    """A tiny twin of a published model, in a folder, with the tokenizer of the tiny base."""
    return plan.make_twin(
        TWINS[family_name],
        Path(tempfile.mkdtemp(prefix="medtune-twin-")) / family_name,
        scale="tiny",
        dtype="float32",
        tokenizer=REPO / "data" / "tiny-vlm" / "tokenizer.json",
    )


def one_batch() -> transformers.BatchFeature:
    """Two questions with a picture, as the processor makes them."""
    processor = models.load_processor(tiny_folder())
    image = Image.effect_mandelbrot((256, 256), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    chats = []
    for text in ("What is shown?", "What is shown in the upper abdomen?"):
        content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
        chats.append([{"role": "user", "content": content}])
    return processor.apply_chat_template(
        chats,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"padding": True, "return_tensors": "pt"},
    )


def tuned(which: str = "language+merger", base=None, **options) -> peft.PeftModel:
    """A tiny base with a LoRA whose weights are not zero."""
    base = base or models.load_base(tiny_folder())
    targets = models.adapter_targets(base, which)
    config = peft.LoraConfig(r=4, lora_alpha=8, **targets, **options)
    model = peft.get_peft_model(base, config).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            parameter.data.normal_(0, 0.05)
    return model


def merged_onto(base: Path, adapter: Path) -> transformers.PreTrainedModel:
    """Merge a saved adapter onto a freshly loaded base."""
    model = models.load_tuned(models.load_base(base), adapter)
    return model.merge_and_unload(safe_merge=True).eval()


def notebook_cells(notebook: str) -> list[dict]:
    """The cells of a notebook of the course."""
    file = REPO / "notebooks" / f"{notebook}.ipynb"
    return json.loads(file.read_text("utf-8"))["cells"]


def notebook_cell(notebook: str, name: str) -> str:
    """The source of one cell of a notebook."""
    for cell in notebook_cells(notebook):
        if cell["id"] == name:
            return "".join(cell["source"])
    raise LookupError(f"{notebook} has no cell {name}")
