"""medtune.answers.generate: neither batches, nor order, nor cache change a greedy answer."""

import json
import os
import signal
import time

import pyarrow.parquet as pq
import pytest
import tiny_qwen
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Picture
from tiny_qwen import SIZES, noise, question_of, texts
from transformers import AutoModelForImageTextToText, AutoProcessor

from medtune.answers import (
    generate_answers,
    generation_speed,
    grey_picture,
    no_picture,
    read_predictions,
    shuffle_pictures,
)


@pytest.fixture(scope="module")
def processor():
    return tiny_qwen.make_processor()


@pytest.fixture(scope="module")
def model(processor):
    return tiny_qwen.make_model(processor)


@pytest.fixture(scope="module")
def records():
    return tiny_qwen.make_records()


@pytest.fixture(scope="module")
def single(model, processor, records):
    return tiny_qwen.answer_one_by_one(model, processor, records)


# ---- batches


@pytest.mark.parametrize(
    "options", [{"batch_size": 1}, {"batch_size": 4}, {"batch_size": 11, "workers": 1}]
)
def test_batches_change_no_greedy_answer(model, processor, records, single, options):
    answers = generate_answers(model, processor, records, max_new_tokens=24, **options)
    assert texts(answers) == single
    assert [answer["id"] for answer in answers] == [row["id"] for row in records]
    assert {answer["reference"] for answer in answers} == {f"caption {i}" for i in range(4)}
    assert answers[1]["question"] == "What does the picture show?"
    assert not model.training and processor.tokenizer.padding_side == "right"


def test_a_picture_that_cannot_be_prepared_is_named_by_its_sample(model, processor):
    strip = Picture.new("RGB", (2400, 8))
    rows = [
        {"id": "good", "image": Picture.new("RGB", (64, 64)), "caption": ""},
        {"id": "strip", "image": strip, "caption": ""},
    ]
    with pytest.raises(ValueError, match="the sample with id strip cannot be prepared: .*aspect"):
        generate_answers(model, processor, rows, max_new_tokens=2)


def test_order_and_cache_change_no_greedy_answer(model, processor, records, single):
    backwards = generate_answers(model, processor, records[::-1], batch_size=3, max_new_tokens=24)
    assert texts(backwards[::-1]) == single
    # a static cache wants full batches: 11 samples in batches of 4 repeat one
    options = {"batch_size": 4, "max_new_tokens": 24, "cache_implementation": "static"}
    answers = generate_answers(model, processor, records, **options)
    assert texts(answers) == single


def test_an_answer_ends_where_the_chat_template_ends_it(model, processor, records, monkeypatch):
    """A pretrained Gemma knows only the end of a document; what it learns is the end of a turn."""
    document, turn = processor.tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    monkeypatch.setattr(model.generation_config, "eos_token_id", document)
    # such a model says the end of its turn at once, and nothing else
    always = {(turn,): 100.0}
    answers = generate_answers(
        model, processor, records[:2], max_new_tokens=6, sequence_bias=always
    )
    assert [(answer["answer"], answer["tokens"]) for answer in answers] == [("", 1), ("", 1)]


def test_one_answer_is_drawn_as_a_recipe_does(model, processor, records):
    """Temperature and top-p reach the model, and a seed draws the same answer again."""
    options = {"max_new_tokens": 24, "do_sample": True, "temperature": 0.8, "top_p": 1.0}
    drawn = [
        generate_answers(model, processor, records[:1], seed=seed, **options) for seed in (0, 0, 1)
    ]
    first, again, other = [answers[0]["answer"] for answers in drawn]
    assert first == again != other
    # nearly the greedy one
    options["temperature"] = 1e-4
    (cold,) = generate_answers(model, processor, records[:1], seed=1, **options)
    (greedy,) = generate_answers(model, processor, records[:1], max_new_tokens=24)
    assert cold["answer"] == greedy["answer"]


def test_a_large_batch_is_prepared_in_parts(model, processor, records, single):
    """40 samples of unequal length, prepared 32 at a time, are one batch padded on the left."""
    many = []
    for copy in range(4):
        many += [row | {"id": f"{row['id']}-{copy}"} for row in records]
    many = many[:40]
    assert len({question_of(row) for row in many}) > 1
    answers = generate_answers(model, processor, many, batch_size=40, max_new_tokens=24)
    assert texts(answers) == (single * 4)[:40]


def test_tiny_base_model_answers_alike_in_batches(tiny_vlm, sample_path):
    if not (tiny_vlm / "model.safetensors").exists():
        pytest.skip("the tiny base model is not here")
    model = AutoModelForImageTextToText.from_pretrained(tiny_vlm, dtype="float32")
    processor = AutoProcessor.from_pretrained(tiny_vlm)
    sample = pq.ParquetFile(sample_path)
    table = next(sample.iter_batches(6, columns=["image", "id", "caption"])).to_pylist()
    rows = Dataset.from_list(table).cast_column("image", Image())
    options = {"max_new_tokens": 40, "question": "Describe the picture."}
    one = generate_answers(model, processor, rows, batch_size=1, **options)
    six = generate_answers(model, processor, rows, batch_size=6, **options)
    assert texts(one) == texts(six)
    assert all(answer["answer"].startswith("There") for answer in one), texts(one)


# ---- what may be asked


def test_data_set_pairs_and_missing_ids(model, processor, records):
    part = {"type": Value("string"), "text": Value("string")}
    messages = List({"role": Value("string"), "content": List(part)})
    features = Features({"prompt": messages, "completion": messages, "images": List(Image())})
    question = "What does the picture show?"
    chosen = [row for row in records if question_of(row) == question]

    without_id = [{name: row[name] for name in features} for row in chosen]
    as_dataset = Dataset.from_list(without_id, features=features)
    pairs = []
    for row in chosen:
        caption = row["completion"][0]["content"][0]["text"]
        pairs.append({"image": row["images"][0], "caption": caption})

    expected = generate_answers(model, processor, chosen, max_new_tokens=8)
    for dataset in (as_dataset, pairs, Dataset.from_list(pairs)):
        answers = generate_answers(model, processor, dataset, max_new_tokens=8, question=question)
        assert texts(answers) == texts(expected)
        assert [a["id"] for a in answers] == [str(number) for number in range(len(expected))]
        assert [a["reference"] for a in answers] == [e["reference"] for e in expected]


def test_rows_without_a_reference_are_answered(model, processor, records, tmp_path):
    """Records without completion, pairs without caption: the same answers as with them."""
    expected = texts(generate_answers(model, processor, records, max_new_tokens=8))
    asked = [{name: row[name] for name in row if name != "completion"} for row in records]
    out = tmp_path / "answers.jsonl"
    answers = generate_answers(model, processor, asked, max_new_tokens=8, out=out)
    assert texts(answers) == expected
    assert {answer["reference"] for answer in answers} == {""}
    assert len(read_predictions(out)) == len(records)
    assert len(set(shuffle_pictures(asked))) == len(records)
    empty = [row | {"completion": []} for row in records[:2]]
    assert texts(generate_answers(model, processor, empty, max_new_tokens=8)) == expected[:2]
    pairs = [
        {"id": None, "image": records[0]["images"][0]},
        {"image": records[1]["images"][0], "caption": None},
    ]
    answers = generate_answers(model, processor, pairs, max_new_tokens=2)
    assert [(answer["id"], answer["reference"]) for answer in answers] == [("0", ""), ("1", "")]


def test_a_pair_is_asked_its_own_question(model, processor, records):
    pairs = []
    for row in records[:3]:
        pairs.append({"image": row["images"][0], "question": question_of(row)})
    pairs[2]["question"] = None
    answers = generate_answers(model, processor, pairs, max_new_tokens=8)
    assert [answer["question"] for answer in answers] == [
        question_of(records[0]),
        question_of(records[1]),
        "Describe this medical image.",
    ]
    expected = generate_answers(model, processor, records[:2], max_new_tokens=8)
    assert texts(answers[:2]) == texts(expected)
    # a question that is given is asked of all
    answers = generate_answers(model, processor, pairs, max_new_tokens=2, question="What?")
    assert {answer["question"] for answer in answers} == {"What?"}


def test_a_lack_of_memory_is_one_line_and_costs_no_answer(model, processor, records, tmp_path):
    def full(image):
        if image.size == SIZES[0]:
            raise MemoryError
        return image

    def killed(image):
        os.kill(os.getpid(), signal.SIGKILL)

    out = tmp_path / "answers.jsonl"
    options = {"out": out, "batch_size": 2, "max_new_tokens": 4}
    with pytest.raises(OSError, match="memory ran out for a batch of 2 samples: set a smaller"):
        generate_answers(model, processor, records, image_transform=full, **options)
    assert 0 < len(read_predictions(out)) < len(records)
    with pytest.raises(OSError, match="a process that prepares pictures died.*set workers=0"):
        generate_answers(
            model, processor, records, image_transform=killed, workers=1, max_new_tokens=4
        )


def test_several_pictures_in_one_question(model, processor, records):
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What?"}]
    two = {
        **records[0],
        "prompt": [{"role": "user", "content": content}],
        "images": [noise(1, (32, 64)), noise(2, (64, 64))],
    }
    alone = generate_answers(model, processor, [two], max_new_tokens=12)
    rows = [{**two, "id": "two"}, *records]
    beside = generate_answers(model, processor, rows, max_new_tokens=12, batch_size=6)
    assert texts(alone) == texts(beside[:1])
    options = {"max_new_tokens": 4, "pictures_from": [1, 0]}
    with pytest.raises(ValueError, match="row 0 wants 2 pictures, row 1 has 1"):
        generate_answers(model, processor, [two, records[1]], **options)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "no sample"),
        ([0, 0], {}, "'sample 0' occurs more than once"),
        (range(11), {"pictures_from": [0, 1]}, "11 row numbers"),
        (range(11), {"pictures_from": [99] * 11}, "11 row numbers"),
    ],
)
def test_bad_input_is_named(model, processor, records, rows, options, message):
    chosen = [records[row] for row in rows]
    with pytest.raises(ValueError, match=message):
        generate_answers(model, processor, chosen, **options)


def test_streams_are_refused(model, processor, records):
    with pytest.raises(ValueError, match="streams"):
        generate_answers(model, processor, iter(records))


# ---- controls


def test_shuffled_pictures_are_shown(model, processor, records, single):
    donors = shuffle_pictures(records, seed=3)
    options = {"max_new_tokens": 24}
    shuffled = generate_answers(model, processor, records, pictures_from=donors, **options)
    exchanged = []
    for row, donor in zip(records, donors, strict=True):
        exchanged.append({**row, "images": records[donor]["images"]})
    expected = generate_answers(model, processor, exchanged, **options)
    assert texts(shuffled) == texts(expected) != single
    captions = [f"caption {number % 4}" for number in range(11)]
    assert [answer["reference"] for answer in shuffled] == captions


def test_grey_pictures_are_shown(model, processor, records, single):
    grey = []
    for row in records:
        picture = Picture.new("RGB", row["images"][0].size, (128, 128, 128))
        grey.append({**row, "images": [picture]})
    options = {"max_new_tokens": 24}
    answers = generate_answers(model, processor, records, image_transform=grey_picture, **options)
    assert texts(answers) == texts(generate_answers(model, processor, grey, **options)) != single


def test_without_a_picture_the_question_alone_is_asked(model, processor, records):
    question = [{"role": "user", "content": "What?"}]
    expected = tiny_qwen.answer_alone(model, processor, question)
    options = {"image_transform": no_picture}
    answers = generate_answers(model, processor, records, max_new_tokens=24, **options)
    assert texts(answers)[0] == expected

    system = [{"role": "system", "content": "Be brief."}]
    with_system = [{**records[0], "prompt": system + records[0]["prompt"]}]
    assert generate_answers(model, processor, with_system, max_new_tokens=2, **options)


# ---- speed


def test_speed_has_the_names_of_the_tables(model, processor, records):
    start = time.perf_counter()
    answers = generate_answers(model, processor, records, max_new_tokens=4)
    wall = time.perf_counter() - start
    speed = generation_speed(answers)
    assert 0 < speed["predict_runtime"] <= wall
    a_second = 11 / speed["predict_runtime"]
    assert speed["predict_samples_per_second"] == pytest.approx(a_second, rel=1e-2)
    assert speed["predict_tokens"] == sum(answer["tokens"] for answer in answers)
    assert json.dumps(speed)
