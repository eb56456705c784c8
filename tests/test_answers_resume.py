"""medtune.answers.resume: a killed run goes on without loss, and never with other settings."""

import json
import multiprocessing
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import tiny_qwen
import torch
from PIL import Image
from tiny_qwen import texts

from medtune.answers import generate_answers, grey_picture, read_answers
from medtune.answers.prompts import survey_rows
from medtune.answers.resume import append, digest_of, resume


@pytest.fixture(scope="module")
def processor():
    return tiny_qwen.make_processor()


@pytest.fixture(scope="module")
def model(processor):
    return tiny_qwen.make_model(processor)


@pytest.fixture(scope="module")
def records():
    return tiny_qwen.make_records()


def slow(image):
    time.sleep(0.1)
    return image


# ---- after a kill


def test_killed_run_goes_on(model, processor, records, tmp_path):
    out = tmp_path / "predictions.jsonl"
    options = {"out": out, "batch_size": 2, "max_new_tokens": 24, "image_transform": slow}
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
    lines = before.count(b"\n")
    assert 4 <= lines < 11 and process.exitcode == -9
    with open(out, "ab") as file:  # as if the kill had come in the middle of a line
        file.write(b'{"id": "sample 10", "question": "Wh')
    assert len(read_answers(out)) == lines

    answers = generate_answers(model, processor, records, **{**options, "batch_size": 3})
    assert texts(answers) == tiny_qwen.answer_one_by_one(model, processor, records)
    written = out.read_bytes()
    assert written.startswith(before)
    ids = Counter(answer["id"] for answer in read_answers(out))
    assert ids == Counter(row["id"] for row in records)
    assert generate_answers(model, processor, records, **options) == answers
    assert out.read_bytes() == written
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["predictions.jsonl", "predictions.settings.json"]


def test_a_second_call_is_told_who_writes_there(model, processor, records, tmp_path):
    out = tmp_path / "there" / "predictions.jsonl"
    options = {"batch_size": 2, "max_new_tokens": 4, "image_transform": slow}
    process = multiprocessing.get_context("fork").Process(
        target=generate_answers, args=(model, processor, records), kwargs=options | {"out": out}
    )
    process.start()
    try:
        while not out.exists() or not out.stat().st_size:
            assert process.is_alive()
            time.sleep(0.01)
        # the same call and one with other settings, by another way to the same file
        for changes in ({}, {"max_new_tokens": 6}):
            other = tmp_path / "there" / ".." / "there" / "predictions.jsonl"
            with pytest.raises(ValueError, match=f"written by process {process.pid} on") as told:
                generate_answers(model, processor, records, out=other, **options | changes)
            assert "\n" not in str(told.value)
        # another file in the same folder is free
        beside = out.with_name("beside.jsonl")
        generate_answers(model, processor, records[:1], out=beside, max_new_tokens=2)
    finally:
        process.kill()
        process.join()
    # the lock has gone with its process
    answers = generate_answers(model, processor, records, out=out, **options)
    assert [answer["id"] for answer in answers] == [row["id"] for row in records]
    assert {path.suffix for path in out.parent.iterdir()} == {".jsonl", ".json"}


def test_sampling_is_seeded_and_survives_a_kill(model, processor, records, tmp_path):
    out = tmp_path / "a.jsonl"
    options = {
        "do_sample": True,
        "batch_size": 4,
        "max_new_tokens": 12,
        "temperature": 5.0,
        "seed": 1,
    }
    state = torch.get_rng_state()
    first = generate_answers(model, processor, records, out=out, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert texts(first) == texts(generate_answers(model, processor, records, **options))
    other_seed = {**options, "seed": 2}
    assert texts(first) != texts(generate_answers(model, processor, records, **other_seed))

    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:6]))  # one batch and a half
    again = generate_answers(model, processor, records, out=out, **options)
    assert texts(again) == texts(first)
    assert len(read_answers(out)) == len(records)


def test_half_a_surrogate_pair_is_kept(tmp_path):
    out = tmp_path / "answers.jsonl"
    answer = {"id": "1", "answer": "broken \ud83d, and a line\u2028inside"}
    append(out, [answer])
    assert read_answers(out) == [answer]


# ---- other settings


def test_resume_refuses_other_settings(model, processor, records, tmp_path):
    out = tmp_path / "deep" / "predictions.jsonl"
    rows = records[:2]
    options = {"out": out, "max_new_tokens": 3}
    generate_answers(model, processor, rows, **options)
    written = out.read_bytes()
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

    weight = model.model.language_model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        weight.mul_(2)
        with pytest.raises(ValueError, match=r"other settings \(model\)"):
            generate_answers(model, processor, rows, **options)
        weight.div_(2)

    settings = out.with_suffix(".settings.json")
    settings.rename(tmp_path / "aside.json")
    with pytest.raises(ValueError, match="other settings"):
        generate_answers(model, processor, rows, **options)
    (tmp_path / "aside.json").rename(settings)
    assert out.read_bytes() == written
    assert len(generate_answers(model, processor, rows, **options)) == 2

    out.write_bytes(b'{"id": "sample 0", "ques\n' + written)
    with pytest.raises(ValueError, match="damaged"):
        generate_answers(model, processor, rows, **options)


# ---- settings files of earlier versions must go on to fit


def test_the_settings_file_keeps_its_form(tmp_path):
    out = tmp_path / "answers.jsonl"
    assert resume(out, {"model": "größer", "drawn": [0, 8], "options": {"path": tmp_path}}) == {}
    expected = '{\n "model": "gr\\u00f6\\u00dfer",\n "drawn": [\n  0,\n  8\n ],\n'
    expected += f' "options": {{\n  "path": "{tmp_path}"\n }}\n}}'
    assert (tmp_path / "answers.settings.json").read_text("utf-8") == expected


def test_the_settings_keep_their_names(model, processor, records, tmp_path):
    out = tmp_path / "answers.jsonl"
    generate_answers(model, processor, records[:1], out=out, max_new_tokens=1)
    settings = json.loads((tmp_path / "answers.settings.json").read_text("utf-8"))
    assert list(settings) == [
        "model",
        "processor",
        "data",
        "pictures_from",
        "image_transform",
        "backend",
        "max_new_tokens",
        "options",
        "drawn",
    ]
    del settings["model"], settings["processor"], settings["data"]
    assert list(settings.values()) == [None, "NoneType", "transformers", 1, {}, None]


class Thing(torch.nn.Module):
    """All that the digest of a model looks at."""

    def __init__(self):
        super().__init__()
        self.chat_template = "a template"
        self.config = SimpleNamespace(to_json_string=lambda: '{"width": 3}')
        self.weight = torch.nn.Parameter(torch.arange(40.0).reshape(8, 5))
        self.bias = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))


def test_the_digest_of_a_model_stays():
    expected = "bee637c981a93754b54703269b88d7a078c07ac4e3626b867bca48f6269c748a"
    assert digest_of(Thing()) == expected


class LetterProcessor:
    """A processor whose tokens are letters."""

    def apply_chat_template(self, messages, **options):
        return str(messages)

    def tokenizer(self, texts):
        return {"input_ids": [list(text) for text in texts]}


def test_the_digest_of_a_data_set_stays():
    picture = Image.new("RGB", (64, 32), (1, 2, 3))
    record = {
        "id": 7,
        "prompt": [{"role": "user", "content": "Why?"}],
        "completion": [{"role": "assistant", "content": "So."}],
    }
    rows = [{"image": picture, "caption": "Ein Ödem"}, record]
    survey = survey_rows(rows, LetterProcessor(), "What?")
    assert survey.samples == [
        {"id": "0", "question": "What?", "reference": "Ein Ödem"},
        {"id": "7", "question": "Why?", "reference": "So."},
    ]
    assert survey.lengths == [87, 37]  # 85 letters and 2 image tokens; 37 letters
    assert survey.digest == "cb10ee52db6210346f21b9b2497d064fae6a2e15a0f07252580a3cf856ce66ab"
