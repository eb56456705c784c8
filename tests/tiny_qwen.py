"""A tiny Qwen3-VL that says something, its processor, and records to ask it about."""

import random

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
VOCABULARY = 320
QUESTIONS = [
    "What?",
    "What does the picture show?",
    "Describe this medical image, please.",
]
SIZES = [(32, 32), (96, 40), (64, 64), (40, 80), (96, 96)]


class PicturesOnly(Qwen3VLProcessor):
    """The processor without its video part, which wants torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)


def make_processor():
    """Train a tokenizer on a sentence, and cut pictures into patches of 8 x 8."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    text = "What does the picture show? Describe this medical image. user assistant"
    tokenizer.train_from_iterator([text], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    pictures = Qwen2VLImageProcessorPil(
        patch_size=8,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": 32 * 32, "longest_edge": 96 * 96},
    )
    return PicturesOnly(image_processor=pictures, tokenizer=fast, chat_template=TEMPLATE)


def make_model(processor):
    """Draw a model whose answers differ from picture to picture, and end early."""
    ids = processor.tokenizer.convert_tokens_to_ids
    rope = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
    }
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "rope_parameters": rope,
            "tie_word_embeddings": False,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = Qwen3VLForConditionalGeneration(config).eval()
    # as drawn, all logits are nearly equal
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.mul_(12 if "visual" in name else 6)
    model.generation_config.eos_token_id = [ids("<|im_end|>"), *range(20, 60)]
    return model


def noise(seed, size):
    """Draw a picture of 8 x 8 coloured fields."""
    rng = random.Random(seed)
    return Image.frombytes("RGB", (8, 8), rng.randbytes(192)).resize(size)


def make_records():
    """Make 11 records with three questions, pictures of five sizes and four captions."""
    records = []
    for number in range(11):
        content = [{"type": "image"}, {"type": "text", "text": QUESTIONS[number % 3]}]
        caption = [{"type": "text", "text": f"caption {number % 4}"}]
        records.append(
            {
                "id": f"sample {number}",
                "prompt": [{"role": "user", "content": content}],
                "completion": [{"role": "assistant", "content": caption}],
                "images": [noise(number, SIZES[number % 5])],
            }
        )
    return records


def question_of(record):
    """Return the question of a record."""
    return record["prompt"][0]["content"][1]["text"]


def answer_alone(model, processor, messages, images=None):
    """Answer one prompt with `model.generate`, nothing padded: the text and how many tokens."""
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], images=images, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, length:]
    said = processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    return said, len(tokens)


def answer_one_by_one(model, processor, records):
    """Answer records in a plain loop: what every way to batch them must agree with."""
    answers = []
    for row in records:
        answers.append(answer_alone(model, processor, row["prompt"], row["images"]))
    # or the tests that compare with these answers say nothing
    assert len({text for text, _ in answers}) > 5
    assert len({count for _, count in answers}) > 3
    return answers


def texts(answers):
    """Return text and number of tokens of each answer."""
    return [(answer["answer"], answer["tokens"]) for answer in answers]
