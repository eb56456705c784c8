"""The probabilities of a model's own words are those with which it chose them."""

import math

import pytest
import torch
from PIL import Image

from medtune.answers import Spoken, answer_log_probs, generate_answers
from medtune.models import load_base, load_processor
from medtune.runs import find_root

TINY = str(find_root() / "data" / "tiny-vlm")


@pytest.fixture(scope="module")
def processor():
    return load_processor(TINY)


@pytest.fixture(scope="module")
def model():
    return load_base(TINY)


@pytest.fixture(scope="module")
def rows():
    shades = {
        "black": "Describe this picture.",
        "grey": "What do you see?",
        "white": "请描述图片。",
    }
    return [
        {"image": Image.new("RGB", (96, 64), shade), "question": question, "id": shade}
        for shade, question in shades.items()
    ]


@pytest.fixture(scope="module")
def answers(model, processor, rows):
    return [row["answer"] for row in generate_answers(model, processor, rows, max_new_tokens=60)]


def test_they_are_those_of_generate(model, processor, rows, answers):
    """The library's own scores of a greedy answer are the oracle."""
    spoken = answer_log_probs(model, processor, rows, answers, batch_size=3)
    for row, answer, said in zip(rows, answers, spoken, strict=True):
        content = [{"type": "image"}, {"type": "text", "text": row["question"]}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        inputs = processor(images=[row["image"]], text=[text], return_tensors="pt")
        made = model.generate(
            **inputs,
            max_new_tokens=60,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        logs = model.compute_transition_scores(made.sequences, made.logits, normalize_logits=True)[
            0
        ]
        assert said.text == answer
        wanted = logs[: len(said.log_probs)]
        assert torch.tensor(said.log_probs) == pytest.approx(wanted, abs=1e-3)
        # greedy: each was the likeliest
        assert said.probability() == pytest.approx(math.exp(sum(wanted)), rel=0.01)


def test_neither_batch_nor_order_matters(model, processor, rows, answers):
    together = answer_log_probs(model, processor, rows, answers, batch_size=3)
    turned = answer_log_probs(model, processor, rows[::-1], answers[::-1], batch_size=1)[::-1]
    for one, other in zip(together, turned, strict=True):
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-4)


def test_pieces_spell_the_answer_and_words_are_found(model, processor, rows, answers):
    for said in answer_log_probs(model, processor, rows, answers):
        spelled = [said.text[a:b] for a, b in zip(said.begins, said.ends, strict=True)]
        assert "".join(spelled) == said.text
        last = said.text.split()[-1]
        assert said.probability() <= said.probability(last) <= 1
        assert math.isnan(said.probability("no such words"))


def test_an_empty_answer_has_no_tokens(model, processor, rows):
    first, second = answer_log_probs(model, processor, rows[:2], ["", "It is grey."])
    assert first == Spoken("", (), (), ()) and len(second.log_probs) > 1
    with pytest.raises(ValueError, match="must hold 2, one a row, not 1"):
        answer_log_probs(model, processor, rows[:2], ["one"])


def test_nobody_is_asked_nothing(model, processor):
    assert answer_log_probs(model, processor, [], []) == []
    with pytest.raises(ValueError, match="answers must hold 0"):
        answer_log_probs(model, processor, [], ["It is a circle."])
