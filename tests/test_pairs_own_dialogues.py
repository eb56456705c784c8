"""Questions of the data: columns of VQA sets, and dialogues in the dialects of others."""

import base64
import json
from pathlib import Path

import pytest
from pair_sources import AS_BYTES, folder_of_pictures, group_of, jpeg, refused, write_table

from medtune.pairs import load_pairs


@pytest.fixture
def pictures(tmp_path) -> Path:
    return folder_of_pictures(tmp_path)


def loaded(folder: Path, records: list, **options) -> list[dict]:
    """All rows of some records, bad ones too, with pictures as they are."""
    table = write_table(folder / "t.json", records)
    return list(load_pairs(table, strict=False, **options).cast_column("image", AS_BYTES))


def told(rows: list[dict]) -> list[tuple]:
    """What is asked and answered about which picture; of a bad row why it is bad."""
    found = []
    for row in rows:
        if row["problem"]:
            found.append(row["problem"])
        else:
            name = row["image"]["path"] and Path(row["image"]["path"]).stem
            found.append((name, row.get("question"), row["caption"]))
    return found


def asked(text, **more) -> dict:
    return {"role": "user", "content": text, **more}


def said(text) -> dict:
    return {"role": "assistant", "content": text}


# --- columns --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "answer"), [("question", "answer"), ("Question", "Answer"), ("query", "response")]
)
def test_a_rows_own_question_is_kept(pictures, question, answer):
    records = [
        {"image_name": "a.jpg", "qid": 7, question: "<image>Which organ?", answer: "The liver."},
        {"image_name": "b.jpg", "qid": 8, question: "How many?", answer: 2},
        {"image_name": "c.jpg", "qid": 9, question: None, answer: "A scan."},
    ]
    rows = loaded(pictures, records)
    assert told(rows) == [
        ("a", "Which organ?", "The liver."),
        ("b", "How many?", "2"),
        ("c", None, "A scan."),
    ]
    assert [row["id"] for row in rows] == ["7", "8", "9"]


@pytest.mark.parametrize(
    "columns",
    [
        ["text", "question"],
        ["text", "answer"],
        ["Text", "Query"],
        ["text", "question", "answer"],
        ["caption", "question", "answer"],
    ],
)
def test_a_text_beside_questions_is_not_guessed(pictures, columns):
    record = {"image": "a.jpg"} | {column: f"of {column}" for column in columns}
    table = write_table(pictures / "t.csv", [record])
    message = refused(ValueError, "it is not clear which holds", table, strict=False)
    assert "columns={'caption': 'NAME'}" in message
    rows = loaded(pictures, [record], columns={"caption": columns[-1]})
    assert rows[0]["caption"] == f"of {columns[-1]}"
    assert "columns={'caption': 'NAME'}" in loaded(pictures, [record])[0]["problem"]


def test_a_question_that_is_no_text_is_rejected(pictures):
    [row] = loaded(pictures, [{"image": "a.jpg", "question": ["x"], "answer": "y"}])
    assert "question: list is no text" in row["problem"]


# --- dialects -------------------------------------------------------------------------------------

DATA_URL = "data:image/jpeg;base64," + base64.b64encode(jpeg(40)).decode()


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "Which organ?"}],
        [{"image": "a.jpg"}, {"text": "Which organ?"}],
        [
            {"type": "image_url", "image_url": {"url": "a.jpg"}},
            {"type": "text", "text": "Which organ?"},
        ],
        [{"type": "image_url", "image_url": "a.jpg"}, {"type": "text", "text": "Which organ?"}],
        [
            {"type": "input_image", "image_url": "a.jpg"},
            {"type": "input_text", "text": "Which organ?"},
        ],
        [
            {"type": "text", "text": "Which organ?", "image": None},
            {"type": "image", "path": "a.jpg"},
        ],
        [{"type": "image", "url": "images/a.jpg"}, "Which organ?"],
        "<img>a.jpg</img>\nWhich organ?",
    ],
)
def test_pictures_inside_of_turns_are_found(pictures, content):
    rows = loaded(pictures, [{"messages": [asked(content), said("The liver.")]}])
    assert told(rows) == [("a", "Which organ?", "The liver.")]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": DATA_URL}},
        {"type": "image", "image": DATA_URL},
        {"type": "image", "source": {"type": "base64", "data": DATA_URL.split(",")[1]}},
        {"type": "image", "base64": DATA_URL.split(",")[1]},
    ],
)
def test_pictures_that_turns_hold_are_read(pictures, part):
    content = [part, {"type": "text", "text": "Which organ?"}]
    [row] = loaded(pictures, [{"messages": [asked(content), said("The liver.")]}])
    assert row["image"]["bytes"] == jpeg(40)
    assert (row["question"], row["caption"]) == ("Which organ?", "The liver.")


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "<image>Which organ?", "completion": "The liver."},
        {"instruction": "<image>Which", "input": "organ?", "output": "The liver."},
        {"instruction": "Which\norgan?", "output": "The liver.", "history": []},
        {
            "conversation": [
                {"from": "Human", "value": "Which organ?"},
                {"from": "GPT", "value": "The liver."},
            ]
        },
        {"messages": json.dumps([asked("Which organ?"), said("The liver.")])},
        {"query": "Which organ?", "response": "The liver.", "history": None},
    ],
)
@pytest.mark.parametrize("images", ["a.jpg", ["a.jpg"], [{"path": "a.jpg", "bytes": None}]])
def test_dialects_of_others(pictures, record, images):
    [(name, question, answer)] = told(loaded(pictures, [record | {"images": images}]))
    assert (name, question.split(), answer) == ("a", ["Which", "organ?"], "The liver.")


def test_earlier_exchanges_are_learned_too(pictures):
    history = [["<image>Which organ?", "The liver."]]
    swift = {"query": "And now?", "response": "A cyst.", "history": history, "images": ["a.jpg"]}
    alpaca = {"instruction": "And now?", "output": "A cyst.", "history": history, "image": "b.jpg"}
    rows = loaded(pictures, [swift, alpaca])
    both = [("Which organ?", "The liver."), ("And now?", "A cyst.")]
    assert told(rows) == [("a", *both[0]), ("a", *both[1]), ("b", *both[0]), ("b", *both[1])]


def test_each_answer_of_a_dialogue_is_a_pair_of_one_group(pictures):
    turns = [{"from": "human", "value": "<image>\nIs it normal?"}, {"from": "gpt", "value": "No."}]
    turns += [{"from": "human", "value": "Which organ?"}, {"from": "gpt", "value": "The liver."}]
    turns += [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": 3}]
    rows = loaded(pictures, [{"id": "p1", "image": "a.jpg", "conversations": turns}])
    assert told(rows) == [
        ("a", "Is it normal?", "No."),
        ("a", "Which organ?", "The liver."),
        ("a", "How many?", "3"),
    ]
    assert [row["id"] for row in rows] == ["p1", "p1-2", "p1-3"]
    assert {row["group"] for row in rows} == {group_of("p1")}


def test_an_answer_is_about_the_picture_that_was_shown_last(pictures):
    turns = [asked("<image>First?"), said("One."), asked("More?"), said("Two.")]
    turns += [asked("<image>Other?"), said("Three.")]
    in_parts = [asked([{"type": "image", "image": "a.jpg"}, "First?"]), said("One.")]
    in_parts += [asked("More?"), said("Two.")]
    in_parts += [asked([{"type": "image", "image": "b.jpg"}, "Other?"]), said("Three.")]
    expected = [("a", "First?", "One."), ("a", "More?", "Two."), ("b", "Other?", "Three.")]
    assert told(loaded(pictures, [{"messages": turns, "images": ["a.jpg", "b.jpg"]}])) == expected
    assert told(loaded(pictures, [{"messages": in_parts}])) == expected


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": [asked("<video>EF?"), said("60")], "videos": ["e.mp4"]}, "no video"),
        ({"messages": [asked("<video>EF?"), said("60")], "images": ["a.jpg"]}, "no video"),
        ({"messages": [asked([{"type": "video", "video": "e.mp4"}]), said("60")]}, "no video"),
        ({"messages": [asked([{"type": "video_url", "video_url": {}}]), said("60")]}, "no video"),
        ({"messages": [asked("<audio>?"), said("60")], "images": ["a.jpg"]}, "no audio"),
        ({"messages": [asked("Q"), said("A")]}, "dialogue: it has no picture"),
        ({"messages": [asked("<image>Q"), said("A")], "images": []}, "dialogue: it has no picture"),
        ({"messages": [asked("<image><image><image>Q"), said("A")], "images": ["a.jpg", "b.jpg"]},
         "3 marks <image>, but 2 pictures"),
        ({"messages": [asked("Q")], "images": ["a.jpg"]}, "has no answer"),
        ({"messages": [], "images": ["a.jpg"]}, "has no answer"),
        ({"messages": "Q", "images": ["a.jpg"]}, "no JSON list of turns"),
        ({"messages": [asked("Q"), ["A"]], "images": ["a.jpg"]}, "a turn is an object"),
        ({"messages": [asked([5.5, ["x"]]), said("A")], "images": ["a.jpg"]}, "text or parts, not list"),
        ({"messages": [asked("Q"), said([{"type": "image", "image": "a.jpg"}])], "images": ["b.jpg"]},
         "an answer holds a picture"),
        ({"messages": [asked([{"type": "box", "box": 1}]), said("A")], "images": ["a.jpg"]},
         "neither text nor picture"),
    ],
)  # fmt: skip
def test_what_cannot_be_learned_is_named(pictures, record, reason):
    good = {"messages": [asked("<image>Q"), said("A")], "images": ["c.jpg"]}
    bad, fine = told(loaded(pictures, [record, good]))
    assert bad.startswith("t.json:1: ")
    assert reason in bad
    assert fine == ("c", "Q", "A")


def test_dialogues_about_nothing_are_counted_where_they_are_left_out(pictures, caplog):
    text_only = {"messages": [asked("Q"), said("A")]}
    good = {"messages": [asked("<image>Q"), said("A")], "images": ["c.jpg"]}
    table = write_table(pictures / "t.json", [text_only, good, text_only])
    assert len(load_pairs(table)) == 1
    assert "left out: 2 dialogues without a picture" in caplog.text
