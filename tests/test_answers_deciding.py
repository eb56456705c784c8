"""medtune.answers.deciding: the odds are the model's own, whatever the batch, and follow the picture."""

import math

import pytest
import tiny_qwen
import torch

from medtune.answers import deciding_log_odds

WORDS = (" show", " image")


@pytest.fixture(scope="module")
def processor():
    return tiny_qwen.make_processor()


@pytest.fixture(scope="module")
def model(processor):
    return tiny_qwen.make_model(processor)


@pytest.fixture(scope="module")
def records():
    """The second reference has neither word, the third has one of them twice."""
    captions = ["picture user. show", "nothing", "show image. Describe the image"]
    records = tiny_qwen.make_records()
    for number, record in enumerate(records):
        text = captions[number % 3]
        record["completion"][0]["content"] = [{"type": "text", "text": text}]
    return records


def odds_alone(model, processor, record, begun, images):
    """What a plain forward pass says about the next token, nothing padded."""
    text = processor.apply_chat_template(
        record["prompt"], add_generation_prompt=True, tokenize=False
    )
    inputs = processor(text=[text + begun], images=images, return_tensors="pt")
    with torch.no_grad():
        chances = model(**inputs).logits[0, -1].log_softmax(-1)
    first, second = [processor.tokenizer(word)["input_ids"][0] for word in WORDS]
    return float(chances[first] - chances[second])


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_the_odds_are_those_of_a_plain_forward_pass(model, processor, records, batch_size):
    found = deciding_log_odds(model, processor, records, words=WORDS, batch_size=batch_size)
    for number, (record, value) in enumerate(zip(records, found, strict=True)):
        if number % 3 == 1:
            assert math.isnan(value)
            continue
        begun = ["picture user.", None, "show image. Describe the"][number % 3]
        wanted = odds_alone(model, processor, record, begun, record["images"])
        assert value == pytest.approx(wanted, abs=1e-3)
    assert not model.training


def test_another_picture_gives_other_odds(model, processor, records):
    own = deciding_log_odds(model, processor, records, words=WORDS)
    donors = [*range(5, 11), *range(5)]
    other = deciding_log_odds(model, processor, records, words=WORDS, pictures_from=donors)
    assert other != own
    wanted = odds_alone(model, processor, records[0], "picture user.", records[5]["images"])
    assert other[0] == pytest.approx(wanted, abs=1e-3)
    swapped = deciding_log_odds(model, processor, records, words=WORDS[::-1])
    assert swapped[0] == pytest.approx(-own[0], abs=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((" show",), "give two"),
        ((" show", " show me"), "both begin with the same token"),
        ((" show", ""), "does not begin a token with it"),
    ],
)
def test_words_that_cannot_decide_are_refused(model, processor, records, words, message):
    with pytest.raises(ValueError, match=message):
        deciding_log_odds(model, processor, records, words=words)


def test_donors_are_one_a_sample(model, processor, records):
    with pytest.raises(ValueError, match="pictures_from must hold 11"):
        deciding_log_odds(model, processor, records, words=WORDS, pictures_from=[0])
