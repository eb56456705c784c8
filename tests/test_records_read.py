"""Reading a converted folder: what changed is read anew, and nothing from elsewhere."""

import copy
import json
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shards import pair, picture, write_shard

from medtune.models import load_processor
from medtune.records import DIALECTS, check_folder, convert_pairs, read_records


def test_a_changed_file_is_read_anew(tmp_path):
    out = tmp_path / "out"
    for text in ("A liver.", "A spleen."):
        source = write_shard(tmp_path / "a.parquet", [pair(0, caption=text)])
        convert_pairs(source, out, overwrite=True)
        assert read_records(out)[0]["completion"][0]["content"][0]["text"] == text
    with pytest.raises(FileNotFoundError, match="test.jsonl does not exist, only train"):
        read_records(out, "test")


def test_records_whose_pictures_lie_elsewhere_are_not_read(tmp_path):
    picture(0).save(tmp_path / "a.jpg")
    (tmp_path / "out").mkdir()
    said = [
        {"role": "user", "content": "<image>What?"},
        {"role": "assistant", "content": "A liver."},
    ]
    for image in ("../a.jpg", str(tmp_path / "a.jpg")):
        record = {"id": "a", "messages": said, "images": [image]}
        (tmp_path / "out" / "train.jsonl").write_text(json.dumps(record))
        with pytest.raises(ValueError, match="train.jsonl:1: a picture lies outside the folder"):
            read_records(tmp_path / "out")


# --- dialogues --------------------------------------------------------------------------------

ASKED = {
    "<image>Is it an effusion?": "No.",
    "Which organ?": "The lungs.",
    "<image>And now?": "Yes.",
}


def _said(asked: dict[str, str]) -> list[dict]:
    turns = []
    for question, answer in asked.items():
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return turns


def _write(folder, *records, name="train.jsonl", encoding="utf-8"):
    for number, letter in enumerate("ab"):
        picture(number).save(folder / f"{letter}.png")
    text = json.dumps(list(records))
    if name.endswith("l"):
        text = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    (folder / name).write_text(text, encoding)


def test_every_answer_of_a_dialogue_is_learned(tmp_path):
    _write(tmp_path, {"id": "d", "conversations": _said(ASKED), "images": ["a.png", "b.png"]})
    report = check_folder(tmp_path)
    assert report["ok"] and report["records"] == {"train.jsonl": 1}
    assert report["answers"] == {"train.jsonl": 3}
    rows = read_records(tmp_path)
    assert rows["id"] == ["d", "d#2", "d#3"]
    learned = [row["completion"][0]["content"][0]["text"] for row in rows]
    assert learned == list(ASKED.values())
    assert [len(row["prompt"]) for row in rows] == [1, 3, 5]
    assert [len(row["images"]) for row in rows] == [1, 1, 2], "no picture before it is shown"
    assert rows[1]["prompt"][1]["content"][0]["text"] == "No.", "what was said before is the prompt"


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_answer_is_a_label(tmp_path, tiny_vlm, dialect):
    """TRL's collator has each answer of a text-only dialogue among its labels once."""
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    said = {"What is a liver?": "An organ.", "And a spleen?": "An organ, too."}
    (tmp_path / "said.jsonl").write_text(json.dumps({"conversations": _said(said)}))
    source = write_shard(tmp_path / "a.parquet", [pair(0)])
    options = {"text_only": tmp_path / "said.jsonl", "share": 0.5}
    convert_pairs(source, tmp_path / "out", dialect=dialect, **options)
    records, processor = read_records(tmp_path / "out"), load_processor(str(tiny_vlm))
    collate = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    batch = collate([dict(row) for row in records])
    learned = []
    for labels in batch["labels"]:
        learned.append(processor.tokenizer.decode(labels[labels != -100]).strip())
    ends = [f"{answer}<|im_end|>" for answer in [pair(0)["caption"], *said.values()]]
    assert learned == ends


# --- records of others ------------------------------------------------------------------------

ONE = {"<image>What is shown?": "A liver."}


@pytest.mark.parametrize(
    "record",
    [
        {"id": "a", "conversations": _said(ONE), "images": "a.png"},
        {"id": "a", "conversations": _said(ONE), "image": "a.png"},
        {"id": "a", "conversations": _said(ONE), "images": [{"path": "a.png", "bytes": None}]},
        {"id": "a", "instruction": "<image>What is shown?", "output": "A liver.", "image": "a.png"},
        {"id": "a", "query": "<image>What is shown?", "response": "A liver.", "images": ["a.png"]},
        {
            "id": "a",
            "messages": [
                {"role": "User", "content": "<image>What is shown?"},
                {"role": "model", "content": "A liver."},
            ],
            "images": ["a.png"],
        },
        {
            "id": "a",
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": "file://a.png"},
                        {"type": "text", "text": "What is shown?"},
                    ],
                },
                {"role": "assistant", "content": "A liver."},
            ],
        },
        {
            "id": "a",
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": "a.png"}},
                        {"type": "text", "text": "What is shown?"},
                    ],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "A liver."}]},
            ],
        },
        {
            "id": "a",
            "prompt": "<image>What is shown?",
            "completion": "A liver.",
            "images": ["a.png"],
        },
    ],
)
@pytest.mark.parametrize("name", ["train.jsonl", "train.json"])
def test_forms_of_others_are_checked_and_read_alike(tmp_path, record, name):
    _write(tmp_path, record, record | {"id": 7}, name=name, encoding="utf-8-sig")
    report = check_folder(tmp_path)
    assert report["ok"], report["errors"]
    rows = read_records(tmp_path)
    assert rows["id"] == ["a", "7"]
    for row in rows:
        (shown,) = row["images"]
        assert shown.convert("RGB").tobytes() == picture(0).tobytes()
        prompt = [{"type": "image"}, {"type": "text", "text": "What is shown?"}]
        assert row["prompt"] == [{"role": "user", "content": prompt}]
        assert row["completion"][0]["content"] == [{"type": "text", "text": "A liver."}]


def test_separators_of_unicode_end_no_line(tmp_path):
    answer = "One.\u2028Two.\u0085Three."
    _write(tmp_path, {"id": "a", "conversations": _said({"What?": answer})})
    assert check_folder(tmp_path)["ok"]
    assert read_records(tmp_path)[0]["completion"][0]["content"][0]["text"] == answer


CLIP = [{"role": "user", "content": "<video>EF?"}, {"role": "assistant", "content": "60"}]
PARTS = [
    {
        "role": "user",
        "content": [{"type": "video", "video": "e.mp4"}, {"type": "text", "text": "EF?"}],
    },
    {"role": "assistant", "content": [{"type": "text", "text": "60"}]},
]
PLAIN = [{"role": "user", "content": "EF?"}, {"role": "assistant", "content": "60"}]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": CLIP, "videos": ["e.mp4"]},
        {"messages": PARTS},
        {"messages": PLAIN, "videos": ["e.mp4"]},
        {"messages": [{"role": "user", "content": "<audio>Murmur?"}, CLIP[1]]},
    ],
)
def test_clips_are_no_pictures(tmp_path, record):
    _write(tmp_path, record)
    (error,) = check_folder(tmp_path)["errors"]
    assert error["check"] == "no video" and "only pictures" in error["problem"]
    with pytest.raises(ValueError, match="train.jsonl:1: it has .*only pictures"):
        read_records(tmp_path)


@pytest.mark.parametrize("name", ["https://a.org/a.png", "data:image/png;base64,AAAA", 5, None])
def test_a_picture_that_is_no_file_is_found_by_the_check(tmp_path, name):
    _write(tmp_path, {"conversations": _said(ONE), "images": [name]})
    (error,) = check_folder(tmp_path)["errors"]
    assert error["check"] == "pictures open"
    with pytest.raises(ValueError, match="train.jsonl:1: a picture"):
        read_records(tmp_path)


def test_a_folder_with_entries_of_a_hub_is_read_for_what_is_here(tmp_path):
    (tmp_path / "part").mkdir()
    _write(tmp_path, {"id": "a", "conversations": _said(ONE), "images": ["a.png"]}, name="m.json")
    (tmp_path / "m.json").rename(tmp_path / "part" / "m.json")
    entries = {
        "mine": {"file_name": "part/m.json", "formatting": "sharegpt"},
        "alpaca": {"hf_hub_url": "some/alpaca"},
        "gone": {"file_name": "gone.jsonl"},
        "table": {"file_name": "table.csv"},
        "outside": {"file_name": "../other.json"},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries), "utf-8-sig")
    report = check_folder(tmp_path)
    assert report["records"] == {"part/m.json": 1}
    assert report["left_out"].keys() == {"alpaca", "table", "outside"}
    (error,) = report["errors"]
    assert error["place"] == "gone.jsonl" and "missing" in error["problem"]
    assert read_records(tmp_path, "mine")["id"] == ["a"]
    (tmp_path / "dataset_info.json").write_text(json.dumps({"alpaca": entries["alpaca"]}))
    with pytest.raises(ValueError, match="holds no records; alpaca: it lies on a hub"):
        check_folder(tmp_path)


@pytest.mark.parametrize("text", ['[{"id": "a", ', '{"a": 1}', "7", ""])
def test_a_json_file_that_is_no_list_is_named(tmp_path, text):
    (tmp_path / "train.json").write_text(text)
    (error,) = check_folder(tmp_path)["errors"]
    assert error["place"] == "train.json:1" and error["check"] == "readable"
    with pytest.raises(ValueError, match="train.json:1: not one of"):
        read_records(tmp_path)


# --- what the check passes is read ------------------------------------------------------------

PART = {"type": "image", "image": "a.png"}
ANSWER = {"role": "assistant", "content": "A liver."}
FORMS = [
    {"id": "a", "messages": [{"role": "user", "content": "What?"}, ANSWER], "images": []},
    {"id": 7, "messages": [{"role": "user", "content": "<image>What?"}, ANSWER], "images": "a.png"},
    {"messages": [{"role": "user", "content": [PART, "What?"]}, ANSWER]},
    {"id": "d", "conversations": _said(ASKED), "images": ["a.png", {"path": "b.png"}]},
    {"instruction": "What?", "input": "Now?", "output": "A liver.", "history": [["Hm?", "Yes."]]},
    {"query": "<image>What?", "response": "A liver.", "images": ["b.png"]},
    {"prompt": "What?", "completion": "A liver."},
    {"prompt": [{"role": "user", "content": "What?"}], "completion": [ANSWER], "system": "Brief."},
    [{"role": "user", "content": "What?"}, ANSWER],
]
ODD = [None, "", 5, True, [], {}, ["x"], {"a": 1}, "<image>", "<video>", "gone.png", "../x.png"]
ODD += [[["q"]], [None], [{"type": "image"}], [{"text": "x"}], "x\u2028y", "assistant", [PART] * 2]


@st.composite
def odd_records(draw) -> object:
    """A record of one of the forms, of which some values are replaced by odd ones."""
    record = json.loads(json.dumps(draw(st.sampled_from(FORMS))))
    for _ in range(draw(st.integers(0, 2))):
        place = record
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], (dict, list)) and draw(st.booleans()):
                place = place[key]
                continue
            place[key] = copy.deepcopy(draw(st.sampled_from(ODD)))
            break
    return record


@settings(max_examples=100, deadline=None)
@given(st.lists(odd_records(), min_size=1, max_size=2), st.booleans())
def test_what_the_check_passes_is_read(records, as_list):
    folder = Path(tempfile.mkdtemp())
    try:
        _write(folder, *records, name="train.json" if as_list else "train.jsonl")
        report = check_folder(folder)
        if not report["ok"]:
            assert all("\n" not in error["problem"] for error in report["errors"])
            return
        rows = read_records(folder)
        assert len(rows) == sum(report["answers"].values()) > 0
        assert len(set(rows["id"])) == len(rows)
        for row in rows:
            marks = [part for turn in row["prompt"] for part in turn["content"]]
            shown = sum(part["type"] == "image" for part in marks)
            assert shown == len(row["images"])
            assert row["completion"][0]["content"][0]["text"].strip()
    finally:
        shutil.rmtree(folder)
