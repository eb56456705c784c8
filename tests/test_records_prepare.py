"""What a training would die of is found by the check before, with the model's own processor."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from shards import picture
from tiny_models import tiny_twin

from medtune.models import load_processor
from medtune.records import check_folder, read_records
from medtune.records.prepare import control_tokens_of, find_control_token

QUESTION = "<image>What is shown?"


def write(folder: Path, records: list[dict]) -> Path:
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    (folder / "train.jsonl").write_text("".join(lines), "utf-8")
    return folder


def record(number: int, image: str, answer: str = "A liver.", question: str = QUESTION) -> dict:
    said = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": f"r{number}", "messages": said, "images": [image]}


def found(report: dict) -> list[tuple[str, str]]:
    return [(error["place"], error["check"]) for error in report["errors"]]


@pytest.fixture(scope="module")
def processor(tiny_vlm):
    return load_processor(str(tiny_vlm))


@pytest.fixture(scope="module")
def gemma():
    return load_processor(str(tiny_twin("gemma-3")))


def dies(processor, row: dict) -> bool:
    """Whether TRL's collator, which makes the batches of a training, fails on a row."""
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    collate = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    try:
        collate([dict(row)])
    except Exception:  # processors raise many kinds
        return True
    return False


# --- pictures ---------------------------------------------------------------------------------


def test_a_strip_is_found_by_place_before_a_training_dies_of_it(tmp_path, processor):
    picture(0, size=(64, 64)).save(tmp_path / "a.png")
    Image.effect_noise((1200, 5), 40).save(tmp_path / "strip.png")
    write(tmp_path, [record(0, "a.png"), record(1, "strip.png"), record(2, "a.png")])
    assert check_folder(tmp_path)["ok"], "a picture like any other, for want of a processor"
    report = check_folder(tmp_path, processor=processor)
    assert not report["ok"] and found(report) == [("train.jsonl:2", "processor takes it")]
    assert report["errors"][0]["id"] == "r1" and "ratio" in report["errors"][0]["problem"]
    rows = read_records(tmp_path)
    assert [dies(processor, row) for row in rows] == [False, True, False]


MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F"]
SIZES = [(64, 64), (1, 1), (3, 200), (64, 3), (1, 500), (601, 3), (2000, 16)]


@pytest.mark.parametrize("family", ["processor", "gemma"])
def test_what_passes_can_be_trained_on_whatever_mode_and_size(tmp_path, request, family):
    """The check and TRL's own collator agree on every picture."""
    processor = request.getfixturevalue(family)
    names = []
    for mode in MODES:
        name = f"{mode.replace(';', '')}.tif"
        values = np.arange(64 * 64).reshape(64, 64) % 250
        if mode == "I;16":
            made = Image.fromarray(values.astype(np.uint16) * 200)
        elif mode == "F":
            made = Image.fromarray(values.astype(np.float32))
        else:
            made = Image.fromarray(values.astype(np.uint8)).convert("RGB").convert(mode)
        made.save(tmp_path / name)
        names.append(name)
    for width, height in SIZES:
        names.append(f"{width}x{height}.png")
        Image.effect_noise((width, height), 40).save(tmp_path / names[-1])
    write(tmp_path, [record(number, name) for number, name in enumerate(names)])
    report = check_folder(tmp_path, processor=processor)
    refused = {error["place"] for error in report["errors"]}
    rows = read_records(tmp_path)
    for number, (name, row) in enumerate(zip(names, rows, strict=True), 1):
        assert (f"train.jsonl:{number}" in refused) == dies(processor, row), name


def test_pictures_too_large_are_named(tmp_path):
    Image.new("1", (10_001, 5_000)).save(tmp_path / "slide.png")
    write(tmp_path, [record(0, "slide.png")])
    (error,) = check_folder(tmp_path)["errors"]
    assert error["check"] == "pictures open" and "10001 x 5000 pixels" in error["problem"]


def test_a_picture_is_prepared_once_for_each_size(tmp_path, processor, monkeypatch):
    for number in range(12):
        size = (64, 64) if number % 2 else (96, 64)
        picture(number, size=size).save(tmp_path / f"{number}.png")
    write(tmp_path, [record(number, f"{number}.png") for number in range(12)])
    prepared = []
    prepare = type(processor.image_processor).preprocess

    def counted(self, images, *args, **options):
        prepared.append(images)
        return prepare(self, images, *args, **options)

    monkeypatch.setattr(type(processor.image_processor), "preprocess", counted)
    assert check_folder(tmp_path, processor=processor)["ok"]
    assert len(prepared) == 2


# --- control tokens ---------------------------------------------------------------------------

SPOILT = [
    "A liver.<|im_end|>",
    "The <|image_pad|> shows a liver.",
    "<|vision_start|><|image_pad|><|vision_end|>A liver.",
    "A liver.<|im_end|>\n<|im_start|>user\nWhat else?",
    "<|endoftext|>",
]


@pytest.mark.parametrize("with_processor", [False, True])
def test_control_tokens_in_texts_are_found(tmp_path, processor, with_processor):
    picture(0, size=(64, 64)).save(tmp_path / "a.png")
    records = [record(0, "a.png", "A ratio < 0.5 | > 0.3, [1] and <5 mm>.")]
    for number, text in enumerate(SPOILT, 1):
        records.append(record(number, "a.png", text))
    records.append(record(9, "a.png", question=QUESTION + " <|im_start|>"))
    records.append(record(10, "a.png") | {"system": "Be kind.<|im_end|>"})
    write(tmp_path, records)
    report = check_folder(tmp_path, processor=processor if with_processor else None)
    expected = [(f"train.jsonl:{number}", "no control tokens") for number in range(2, 9)]
    assert found(report) == expected
    assert "<|im_end|>" in report["errors"][0]["problem"]


WELL_KNOWN = [
    *("<|im_end|>", "<|image_pad|>", "<|eot_id|>", "<|start_header_id|>", "<|image|>"),
    *("<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<image_soft_token>", "<bos>"),
    *("<end_of_utterance>", "<fake_token_around_image>", "<row_1_col_2>", "<global-img>"),
    *("[INST]", "[/INST]", "[IMG]", "<<SYS>>", "<s>", "</s>", "<pad>", "<IMG_CONTEXT>"),
]


@pytest.mark.parametrize("token", WELL_KNOWN)
def test_tokens_of_well_known_models_are_known_without_one(token):
    assert find_control_token(f"A liver{token} is seen.") == token


def test_each_special_token_of_a_model_is_found(processor, gemma):
    for one in (processor, gemma):
        tokens = control_tokens_of(one)
        special = [token for token in one.tokenizer.all_special_tokens if "<" in token]
        assert set(special) <= set(tokens) and len(tokens) >= 3
        for token in tokens:
            assert find_control_token(f"x{token}y", tokens)
    assert find_control_token("<image><video><audio>", ["<image>"]) is None


def test_places_in_a_picture_may_be_taught():
    answer = "<|object_ref_start|>the liver<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>"
    assert find_control_token(answer) is None
    assert find_control_token(answer + "<|im_end|>") == "<|im_end|>"


@given(st.text(alphabet="abc <>|[]/0.5", max_size=60))
def test_plain_text_holds_no_control_token(text):
    """Signs of comparison and references in brackets are no tokens."""
    token = find_control_token(text)
    assert token is None or token.startswith("<|")


# --- lengths ----------------------------------------------------------------------------------


def test_an_answer_that_would_be_cut_is_an_error(tmp_path, processor):
    picture(0, size=(64, 64)).save(tmp_path / "a.png")
    records = [record(i, "a.png", "A liver. " * (40 if i == 2 else 1)) for i in range(4)]
    write(tmp_path, records)
    whole = check_folder(tmp_path, processor=processor)
    assert whole["ok"] and whole["cut"] == {}
    report = check_folder(tmp_path, processor=processor, max_length=70)
    assert not report["ok"] and found(report) == [("train.jsonl:3", "answers whole")]
    tokens = report["cut"]["r2"]
    expected = f"{tokens} tokens, more than max_length=70: it would be cut"
    assert report["errors"][0]["problem"] == expected
    assert list(report["cut"]) == ["r2"] and tokens == report["tokens"]["max"]
    assert check_folder(tmp_path, processor=processor, max_length=tokens)["ok"]
    (row,) = [row for row in report["table"] if row["check"] == "answers whole"]
    assert row["errors"] == 1 and row["first"].startswith("train.jsonl:3: ")


def test_a_record_longer_than_the_model_takes_is_an_error(tmp_path, processor):
    longest = processor.tokenizer.model_max_length
    picture(0, size=(64, 64)).save(tmp_path / "a.png")
    write(tmp_path, [record(0, "a.png", "A liver. " * longest)])
    report = check_folder(tmp_path, processor=processor)
    assert found(report) == [("train.jsonl:1", "answers whole")]
    assert f"more than the {longest} that the model takes" in report["errors"][0]["problem"]


@pytest.mark.parametrize("family", ["processor", "gemma"])
def test_tokens_are_those_of_a_training(tmp_path, request, family):
    """Of each answer of a dialogue, with blanks at its ends, and with several pictures."""
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    processor = request.getfixturevalue(family)
    for number, size in enumerate([(64, 64), (96, 160)]):
        picture(number, size=size).save(tmp_path / f"{number}.png")
    said = []
    for question, answer in {QUESTION: " A liver.", "<image>And here?": "A spleen. "}.items():
        said += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    write(tmp_path, [{"id": "d", "messages": said, "images": ["0.png", "1.png"]}])
    report = check_folder(tmp_path, processor=processor, max_length=1)
    rows = read_records(tmp_path)
    assert rows.features["images"] == datasets.List(datasets.Image())
    collate = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    lengths = {}
    for row in rows:
        batch = collate([dict(row)])
        lengths[row["id"]] = int(batch["attention_mask"].sum())
    assert report["cut"] == lengths
