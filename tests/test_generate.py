"""medtune.generate: batching changes no greedy answer, and a killed run goes on without loss."""

import json
import multiprocessing
import random
import subprocess
import sys
import time
import types
from collections import Counter

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Picture

from medtune.generate import (
    generate_answers,
    generation_speed,
    grey_picture,
    no_picture,
    read_answers,
    shuffle_pictures,
)

TEMPLATE = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}{% if c.type == 'image' %}\
<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
SPECIAL += ["<|image_pad|>", "<|video_pad|>"]


@pytest.fixture(scope="module")
def processor():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessorPil, Qwen3VLProcessor

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    text = ["What does the picture show? Describe this medical image. user assistant"]
    tokenizer.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )

    class PicturesOnly(Qwen3VLProcessor):  # the full class wants torchvision, for video
        def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
            super().__init__(image_processor, tokenizer, chat_template=chat_template)

    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    size = {"shortest_edge": 32 * 32, "longest_edge": 96 * 96}
    pictures = Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, temporal_patch_size=2, size=size)
    return PicturesOnly(image_processor=pictures, tokenizer=fast, chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def model(processor):
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    ids = processor.tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config=dict(
            vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, rope_parameters=rope, tie_word_embeddings=False,
        ),
        vision_config=dict(
            depth=2, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=32, patch_size=8,
            spatial_merge_size=2, temporal_patch_size=2, num_position_embeddings=36, deepstack_visual_indexes=[0],
        ),
        image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"),
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = Qwen3VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():  # as drawn, all logits are nearly equal
            if weight.ndim > 1:
                weight.mul_(12 if "visual" in name else 6)
    model.generation_config.eos_token_id = [ids("<|im_end|>"), *range(20, 60)]  # so that answers end early
    return model


def noise(seed, size):
    rng = random.Random(seed)
    return Picture.frombytes("RGB", (8, 8), rng.randbytes(192)).resize(size)


@pytest.fixture(scope="module")
def records():
    sizes = [(32, 32), (96, 40), (64, 64), (40, 80), (96, 96)]
    questions = ["What?", "What does the picture show?", "Describe this medical image, please."]
    return [
        {
            "id": f"sample {i}",
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": questions[i % 3]}]}],
            "completion": [{"role": "assistant", "content": [{"type": "text", "text": f"caption {i % 4}"}]}],
            "images": [noise(i, sizes[i % 5])],
        }
        for i in range(11)
    ]


@pytest.fixture(scope="module")
def single(model, processor, records):
    """Answers of a plain loop, one sample at a time, nothing padded."""
    answers = []
    for row in records:
        text = processor.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        inputs = processor(text=[text], images=row["images"], return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        answers.append((processor.tokenizer.decode(tokens, skip_special_tokens=True).strip(), len(tokens)))
    assert len({text for text, _ in answers}) > 5 and len({n for _, n in answers}) > 3  # or the tests say nothing
    return answers


def texts(answers):
    return [(answer["answer"], answer["tokens"]) for answer in answers]


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 4}, {"batch_size": 11, "workers": 1}])
def test_batches_change_no_greedy_answer(model, processor, records, single, options):
    answers = generate_answers(model, processor, records, max_new_tokens=24, **options)
    assert texts(answers) == single
    assert [answer["id"] for answer in answers] == [row["id"] for row in records]
    assert {answer["reference"] for answer in answers} == {f"caption {i}" for i in range(4)}
    assert answers[1]["question"] == "What does the picture show?"
    assert not model.training and processor.tokenizer.padding_side == "right"


def test_order_and_cache_change_no_greedy_answer(model, processor, records, single):
    answers = generate_answers(model, processor, records[::-1], batch_size=3, max_new_tokens=24)
    assert texts(answers[::-1]) == single
    # a static cache wants full batches: 11 samples in batches of 4 repeat one
    answers = generate_answers(
        model, processor, records, batch_size=4, max_new_tokens=24, cache_implementation="static"
    )
    assert texts(answers) == single


def test_a_large_batch_is_prepared_in_parts(model, processor, records, single):
    """40 samples of unequal length, prepared 32 at a time, are one batch padded on the left."""
    many = [row | {"id": f"{row['id']}-{copy}"} for copy in range(4) for row in records][:40]
    assert len({row["prompt"][0]["content"][1]["text"] for row in many}) > 1
    assert texts(generate_answers(model, processor, many, batch_size=40, max_new_tokens=24)) == (single * 4)[:40]


def test_a_static_cache_leaves_the_attention_as_it_was(model, processor, records, monkeypatch):
    """In between, heads that share keys are queries of one head; afterwards, and after an error, SDPA is back."""
    text, used, own = model.config.text_config, [], type(model).set_attn_implementation
    assert text.num_attention_heads > text.num_key_value_heads and text._attn_implementation == "sdpa"

    def note(way):
        used.append(way)
        own(model, way)

    monkeypatch.setattr(model, "set_attn_implementation", note)
    generate_answers(model, processor, records, batch_size=11, max_new_tokens=2, cache_implementation="static")
    assert used == [{"text_config": "folded"}, {"text_config": "sdpa"}] and text._attn_implementation == "sdpa"
    with pytest.raises(TypeError):
        generate_answers(model, processor, records, max_new_tokens=2, cache_implementation="static", top_k="many")
    assert text._attn_implementation == "sdpa"


def test_data_set_pairs_and_missing_ids(model, processor, records):
    messages = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})
    features = Features({"prompt": messages, "completion": messages, "images": List(Image())})
    question = "What does the picture show?"
    chosen = [row for row in records if row["prompt"][0]["content"][1]["text"] == question]
    as_dataset = Dataset.from_list([{k: row[k] for k in features} for row in chosen], features=features)
    pairs = [{"image": row["images"][0], "caption": row["completion"][0]["content"][0]["text"]} for row in chosen]
    expected = generate_answers(model, processor, chosen, max_new_tokens=8)
    for dataset in (as_dataset, pairs, Dataset.from_list(pairs)):
        answers = generate_answers(model, processor, dataset, max_new_tokens=8, question=question)
        assert texts(answers) == texts(expected)
        assert [(a["id"], a["reference"]) for a in answers] == [
            (str(i), e["reference"]) for i, e in enumerate(expected)
        ]


def test_several_pictures_in_one_question(model, processor, records):
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What?"}]
    two = {
        **records[0],
        "prompt": [{"role": "user", "content": content}],
        "images": [noise(1, (32, 64)), noise(2, (64, 64))],
    }
    alone = generate_answers(model, processor, [two], max_new_tokens=12)
    beside = generate_answers(model, processor, [{**two, "id": "two"}, *records], max_new_tokens=12, batch_size=6)
    assert texts(alone) == texts(beside[:1])
    with pytest.raises(ValueError, match="row 0 wants 2 pictures, row 1 has 1"):
        generate_answers(model, processor, [two, records[1]], max_new_tokens=4, pictures_from=[1, 0])


def test_controls_show_other_pictures(model, processor, records, single):
    donors = shuffle_pictures(records, seed=3)
    shuffled = generate_answers(model, processor, records, max_new_tokens=24, pictures_from=donors)
    exchanged = [{**row, "images": records[donor]["images"]} for row, donor in zip(records, donors, strict=True)]
    assert texts(shuffled) == texts(generate_answers(model, processor, exchanged, max_new_tokens=24)) != single
    assert [answer["reference"] for answer in shuffled] == [f"caption {i % 4}" for i in range(11)]

    grey = [{**row, "images": [Picture.new("RGB", row["images"][0].size, (128,) * 3)]} for row in records]
    answers = generate_answers(model, processor, records, max_new_tokens=24, image_transform=grey_picture)
    assert texts(answers) == texts(generate_answers(model, processor, grey, max_new_tokens=24)) != single

    text = processor.apply_chat_template(
        [{"role": "user", "content": "What?"}], add_generation_prompt=True, tokenize=False
    )
    inputs = processor(text=[text], return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    answers = generate_answers(model, processor, records, max_new_tokens=24, image_transform=no_picture)
    assert texts(answers)[0] == (processor.tokenizer.decode(tokens, skip_special_tokens=True).strip(), len(tokens))

    system = [{"role": "system", "content": "Be brief."}]
    with_system = [{**records[0], "prompt": system + records[0]["prompt"]}]
    assert generate_answers(model, processor, with_system, max_new_tokens=2, image_transform=no_picture)


def slow(image):
    time.sleep(0.1)
    return image


def test_killed_run_goes_on(model, processor, records, single, tmp_path):
    out = tmp_path / "predictions.jsonl"
    options = dict(out=out, batch_size=2, max_new_tokens=24, image_transform=slow)
    process = multiprocessing.get_context("fork").Process(
        target=generate_answers, args=(model, processor, records), kwargs=options
    )
    process.start()
    while not out.exists() or out.read_bytes().count(b"\n") < 4:
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()  # SIGKILL: nothing is tidied up
    process.join()
    before = out.read_bytes()
    assert 4 <= before.count(b"\n") < 11 and process.exitcode == -9
    with open(out, "ab") as file:  # as if the kill had come in the middle of a line
        file.write(b'{"id": "sample 10", "question": "Wh')
    assert len(read_answers(out)) == before.count(b"\n")

    answers = generate_answers(model, processor, records, **{**options, "batch_size": 3})
    assert texts(answers) == single
    assert out.read_bytes().startswith(before)
    assert Counter(a["id"] for a in read_answers(out)) == Counter(row["id"] for row in records)
    written = out.read_bytes()
    assert generate_answers(model, processor, records, **options) == answers and out.read_bytes() == written
    assert sorted(path.name for path in tmp_path.iterdir()) == ["predictions.jsonl", "predictions.settings.json"]


def test_resume_refuses_other_settings(model, processor, records, tmp_path):
    out = tmp_path / "deep" / "predictions.jsonl"
    rows, options = records[:2], dict(out=out, max_new_tokens=3)
    generate_answers(model, processor, rows, **options)
    written = out.read_bytes()
    bias = model.model.language_model.layers[1].mlp.down_proj.weight
    others = {
        "max_new_tokens": (rows, {"max_new_tokens": 4}),
        "options": (rows, {"repetition_penalty": 1.5}),
        "image_transform": (rows, {"image_transform": grey_picture}),
        "pictures_from": (rows, {"pictures_from": [1, 0]}),
        "drawn": (rows, {"do_sample": True}),
        "data": ([{**rows[0], "images": rows[1]["images"]}, rows[1]], {}),
    }
    for name, (dataset, changed) in others.items():
        with pytest.raises(ValueError, match=rf"made with other settings \(.*{name}"):
            generate_answers(model, processor, dataset, **{**options, **changed})
    with torch.no_grad():
        bias.mul_(2)
        with pytest.raises(ValueError, match=r"other settings \(model\)"):
            generate_answers(model, processor, rows, **options)
        bias.div_(2)
    out.with_suffix(".settings.json").rename(tmp_path / "aside.json")
    with pytest.raises(ValueError, match="other settings"):
        generate_answers(model, processor, rows, **options)
    (tmp_path / "aside.json").rename(out.with_suffix(".settings.json"))
    assert out.read_bytes() == written
    assert len(generate_answers(model, processor, rows, **options)) == 2
    out.write_bytes(b'{"id": "sample 0", "ques\n' + written)
    with pytest.raises(ValueError, match="damaged"):
        generate_answers(model, processor, rows, **options)


def test_sampling_is_seeded_and_survives_a_kill(model, processor, records, tmp_path):
    options = dict(do_sample=True, batch_size=4, max_new_tokens=12, temperature=5.0, seed=1)
    state = torch.get_rng_state()
    first = generate_answers(model, processor, records, out=tmp_path / "a.jsonl", **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert texts(first) == texts(generate_answers(model, processor, records, **options))
    assert texts(first) != texts(generate_answers(model, processor, records, **{**options, "seed": 2}))
    lines = (tmp_path / "a.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines[:6]))  # one batch and a half
    again = generate_answers(model, processor, records, out=tmp_path / "a.jsonl", **options)
    assert texts(again) == texts(first) and len(read_answers(tmp_path / "a.jsonl")) == len(records)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda rows: [], {}, "no sample"),
        (lambda rows: [rows[0], rows[0]], {}, "'sample 0' occurs more than once"),
        (lambda rows: rows, {"pictures_from": [0, 1]}, "11 row numbers"),
        (lambda rows: rows, {"pictures_from": [99] * 11}, "11 row numbers"),
    ],
)
def test_bad_input_is_named(model, processor, records, change, options, message):
    with pytest.raises(ValueError, match=message):
        generate_answers(model, processor, change(records), **options)


def test_speed_has_the_names_of_the_tables(model, processor, records):
    start = time.perf_counter()
    answers = generate_answers(model, processor, records, max_new_tokens=4)
    wall = time.perf_counter() - start
    speed = generation_speed(answers)
    assert 0 < speed["predict_runtime"] <= wall
    assert speed["predict_samples_per_second"] == pytest.approx(11 / speed["predict_runtime"], rel=1e-2)
    assert speed["predict_tokens"] == sum(answer["tokens"] for answer in answers)
    assert json.dumps(speed)


@given(st.lists(st.sampled_from("abcde"), min_size=2, max_size=40), st.integers(0, 99))
def test_shuffled_pictures_are_of_another_structure(structures, seed):
    rows = [{"structure": name} for name in structures]
    donors = shuffle_pictures(rows, seed)
    assert sorted(donors) == list(range(len(rows))) and all(i != donor for i, donor in enumerate(donors))
    same = sum(structures[i] == structures[donor] for i, donor in enumerate(donors))
    assert same == max(0, 2 * max(Counter(structures).values()) - len(rows))  # the fewest possible


def test_shuffle_is_seeded_and_goes_by_caption(records):
    assert shuffle_pictures(records, seed=1) == shuffle_pictures(records, seed=1) != shuffle_pictures(records, seed=2)
    assert all(i % 4 != donor % 4 for i, donor in enumerate(shuffle_pictures(records)))
    with pytest.raises(ValueError, match="at least two"):
        shuffle_pictures(records[:1])


def test_vllm_is_asked_for_by_name(processor, records, monkeypatch):
    with pytest.raises(ImportError, match="pip install vllm"):
        generate_answers("no/model", processor, records, backend="vllm")

    class SamplingParams(dict):
        def __init__(self, **options):
            super().__init__(options)

    class LLM:  # vLLM needs a GPU: this stands in for its interface
        def __init__(self, path):
            self.path = path

        def generate(self, prompts, parameters, use_tqdm):
            assert parameters["max_tokens"] == 5 and parameters["temperature"] == 0.0
            return [
                types.SimpleNamespace(outputs=[types.SimpleNamespace(text=p["prompt"][-30:], token_ids=[1, 2])])
                for p in prompts
                if p["multi_modal_data"]["image"][0].size
            ]

    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(LLM=LLM, SamplingParams=SamplingParams))
    answers = generate_answers("no/model", processor, records, backend="vllm", max_new_tokens=5)
    assert len(answers) == 11 and answers[0]["answer"].endswith("<|im_start|>assistant") and answers[0]["tokens"] == 2


def test_tiny_base_model_answers_alike_in_batches(tiny_vlm, sample_path):
    import pyarrow.parquet as pq
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if not (tiny_vlm / "model.safetensors").exists():
        pytest.skip("the tiny base model is not here")
    model = AutoModelForImageTextToText.from_pretrained(tiny_vlm, dtype="float32")
    processor = AutoProcessor.from_pretrained(tiny_vlm)
    columns = ["image", "id", "caption"]
    table = next(pq.ParquetFile(sample_path).iter_batches(6, columns=columns)).to_pylist()
    rows = Dataset.from_list(table).cast_column("image", Image())
    options = dict(max_new_tokens=40, question="Describe the picture.")
    one, six = (generate_answers(model, processor, rows, batch_size=n, **options) for n in (1, 6))
    assert texts(one) == texts(six) and all(answer["answer"].startswith("There") for answer in one), texts(one)


def test_streams_are_refused(model, processor, records):
    with pytest.raises(ValueError, match="streams"):
        generate_answers(model, processor, iter(records))


def test_import_is_light():
    code = "import sys, medtune.generate; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
