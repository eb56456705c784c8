"""Answers of others: every form that programs write them in, and what is no answer by its line."""

import csv
import io
import json
import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from medtune.answers import read_predictions
from medtune.pairs import safe_id

ROWS = [
    {"id": "a", "answer": "A liver.", "reference": "A liver with a cyst."},
    {"id": "b", "answer": "", "reference": "No mass,\nno effusion."},
    {"id": "c", "answer": "肝脏\u2028正常", "reference": 'The "liver"; normal'},
]


def lines(rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def table(rows, delimiter: str = ",") -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write(folder: Path, name: str, text: str, encoding: str = "utf-8") -> Path:
    file = folder / name
    file.write_bytes(text.encode(encoding))
    return file


def refusal(file: Path, **options) -> str:
    """What is said of a file that is refused: one line."""
    with pytest.raises(ValueError) as error:
        read_predictions(file, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def batch(name: str, content, error=None, status: int = 200) -> dict:
    """A line of the output of an OpenAI batch."""
    message = {"role": "assistant", "content": content, "refusal": None}
    body = {"id": "chatcmpl-1", "choices": [{"index": 0, "message": message}]}
    response = {"status_code": status, "request_id": "r", "body": body}
    return {"id": f"batch_req_{name}", "custom_id": name, "response": response, "error": error}


# ---- forms


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize(
    "text",
    [
        lines(ROWS),
        lines(ROWS).replace("\n", "\r\n") + "\r\n",
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2),
        json.dumps({"model": "x", "predictions": ROWS}, indent=2),
        table(ROWS),
        table(ROWS, ";"),
        table(ROWS, "\t"),
    ],
)
def test_every_form_gives_the_same(tmp_path, text, encoding):
    assert read_predictions(write(tmp_path, "answers.txt", text, encoding)) == ROWS


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\r\x00"))


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6), st.sampled_from(",;\t"))
def test_texts_come_back_as_they_were(tmp_path_factory, texts, delimiter):
    """Oracle: what the standard library wrote."""
    folder = tmp_path_factory.mktemp("texts")
    rows = []
    for number, (answer, reference) in enumerate(texts):
        rows.append({"id": str(number), "answer": answer, "reference": reference})
    assert read_predictions(write(folder, "a.jsonl", lines(rows))) == rows
    assert read_predictions(write(folder, "a.json", json.dumps(rows))) == rows
    # a table's control signs make it look like a picture; real answers have none
    if all(sign >= " " or sign in "\n\t" for sign in "".join(map("".join, texts))):
        assert read_predictions(write(folder, "a.csv", table(rows, delimiter))) == rows


def test_what_llamafactory_wrote(tmp_path):
    rows = [
        {"prompt": "user\nWhat?\nassistant\n", "predict": "A liver.", "label": "A spleen."},
        {"prompt": "user\nWhere?", "predict": "Left.", "label": "Right."},
    ]
    found = read_predictions(write(tmp_path, "generated_predictions.jsonl", lines(rows)))
    assert [row["id"] for row in found] == ["1", "2"]
    assert [(row["answer"], row["reference"]) for row in found] == [
        ("A liver.", "A spleen."),
        ("Left.", "Right."),
    ]
    assert found[1]["question"] == "user\nWhere?"


def test_the_output_of_an_openai_batch(tmp_path, caplog):
    parts = [{"type": "text", "text": "Right "}, {"type": "text", "text": "lung."}]
    file = write(tmp_path, "output.jsonl", lines([batch("b", "A liver."), batch("a", parts)]))
    references = [
        {"id": "a", "caption": "Left lung.", "group": "p1", "question": "Which?"},
        {"id": "b", "caption": "A liver with a cyst."},
        {"id": "c", "caption": "A spleen."},
    ]
    expected = [
        {"id": "b", "answer": "A liver.", "reference": "A liver with a cyst."},
        {
            "id": "a",
            "answer": "Right lung.",
            "reference": "Left lung.",
            "group": "p1",
            "question": "Which?",
        },
    ]
    with caplog.at_level(logging.WARNING, "medtune"):
        assert read_predictions(file, references=references) == expected
    assert "1 of 3 references have no answer, the first is 'c'" in caplog.text
    as_table = write(
        tmp_path,
        "references.csv",
        table([{"group": "", "question": "", **row} for row in references]),
    )
    assert read_predictions(file, references=as_table) == expected
    texts = {row["id"]: row["caption"] for row in references}
    found = read_predictions(file, references=texts)
    assert [row["reference"] for row in found] == ["A liver with a cyst.", "Left lung."]
    assert "references=TABLE" in refusal(file)


def test_a_batch_with_requests_that_failed(tmp_path):
    failed = batch("b", None, error={"code": "batch_expired", "message": "it took\ntoo long"})
    refused = batch("c", None)
    other = {"custom_id": "d", "response": {"status_code": 200, "body": {}}, "error": None}
    file = write(tmp_path, "output.jsonl", lines([batch("a", "x"), failed, refused, other]))
    said = refusal(file, references=dict.fromkeys("abcd", "x"))
    assert "3 of 4 lines are no answers" in said
    assert "line 2: the request failed: it took too long" in said
    assert "line 3: its answer is no text" in said
    assert "line 4: it has no response.body.choices" in said


def test_records_are_references(tmp_path):
    """A file of training records, as it lies beside its pictures."""
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    question = [{"type": "image"}, {"type": "text", "text": "What?"}]
    record = {
        "id": "a",
        "images": ["a.png"],
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": [{"type": "text", "text": "A liver."}]}],
    }
    said = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Left."}]
    references = write(tmp_path, "test.jsonl", lines([record, {"id": "b", "messages": said}]))
    file = write(tmp_path, "answers.csv", "id,prediction\nb,Right.\na,A lung.\n")
    found = read_predictions(file, references=references)
    assert [row["reference"] for row in found] == ["Left.", "A liver."]


def test_names_of_files_find_their_records(tmp_path):
    """Conversion hashes them with the user's salt."""
    references = [{"id": safe_id("p10/s1/view.png"), "caption": "A lung."}]
    file = write(tmp_path, "a.csv", "id,answer\np10/s1/view.png,A liver.\n")
    expected = {"id": references[0]["id"], "answer": "A liver.", "reference": "A lung."}
    assert read_predictions(file, references=references) == [expected]
    assert expected["id"].startswith("id-")


# ---- names


def test_columns_name_the_keys_of_a_file(tmp_path):
    rows = [{"nr": 7, "out": {"texts": ["A liver."]}, "gold": ["A spleen."], "who": "p1"}]
    file = write(tmp_path, "a.jsonl", lines(rows))
    columns = {"id": "nr", "answer": "out.texts.0", "reference": "gold", "group": "who"}
    expected = {"id": "7", "answer": "A liver.", "reference": "A spleen.", "group": "p1"}
    assert read_predictions(file, columns=columns) == [expected]
    said = refusal(file, columns=columns | {"answer": "text"})
    assert "has no column 'text'; it has nr, out, gold, who" in said
    assert "'caption', but can name id, answer" in refusal(file, columns={"caption": "gold"})


def test_headings_by_case_and_blanks(tmp_path):
    file = write(tmp_path, "a.csv", "Image ID; Prediction ;Ground Truth\nx;A liver.;A spleen.\n")
    expected = {"id": "x", "answer": "A liver.", "reference": "A spleen."}
    assert read_predictions(file) == [expected]


def test_numbers_are_texts_and_other_things_are_not(tmp_path):
    row = {"id": 3, "answer": 2, "reference": 1.5}
    found = read_predictions(write(tmp_path, "a.jsonl", lines([row])))
    assert found == [{"id": "3", "answer": "2", "reference": "1.5"}]
    for bad in (None, float("nan"), ["x", "y"], {"text": "x"}, True):
        file = write(tmp_path, "b.jsonl", lines([row, row | {"id": 4, "reference": bad}]))
        assert "line 2: its reference is no text" in refusal(file)
    for bad in (None, float("nan"), ["x"], True):
        file = write(tmp_path, "b.jsonl", lines([row, row | {"id": 4, "answer": bad}]))
        assert "line 2: its answer is no text" in refusal(file)


# ---- what is refused


def test_a_repeated_id_is_named(tmp_path):
    rows = [*ROWS, ROWS[1] | {"answer": "another"}]
    assert "id 'b' stands on lines 2 and 4" in refusal(write(tmp_path, "a.jsonl", lines(rows)))


def test_bad_lines_are_counted_and_named(tmp_path):
    text = lines(ROWS[:1]) + '\n{"id": "x", "ans\n[1]\n' + lines([{"id": "y"}, {"answer": "z"}])
    said = refusal(write(tmp_path, "a.jsonl", text))
    assert "4 of 5 lines are no answers" in said
    assert "line 3: it is no JSON" in said
    assert "line 4: it is no JSON object but list" in said
    assert "line 5: it has no answer: name its column, columns={'answer': 'NAME'}" in said
    assert "line 6: it has no reference" in said
    many = lines([{"id": number} for number in range(9)])
    assert "and 4 more" in refusal(write(tmp_path, "b.jsonl", many))
    unquoted = "id,answer,reference\na,A liver, normal.,x\nb,y,z\n"
    said = refusal(write(tmp_path, "c.csv", unquoted))
    assert "1 of 2 lines are no answers: line 2: it has 4 cells, the heading has 3" in said


def test_pictures_and_other_files_are_no_tables(tmp_path):
    picture = Image.effect_noise((64, 64), 40)
    files = []
    for ending in ("png", "jpg", "gif", "tif", "pdf"):
        files.append(tmp_path / f"picture.{ending}")
        picture.save(files[-1])
    files.append(tmp_path / "archive.zip")
    files[-1].write_bytes(b"PK\x03\x04\x14\x00\x00\x00\x08\x00")
    files.append(write(tmp_path, "readme.txt", "A file\nof words.\n"))
    for file in files:
        assert refusal(file) == f"{file} is no table of answers: JSONL, JSON or CSV"
    assert "it is empty" in refusal(write(tmp_path, "a.jsonl", "\n\n"))
    assert "but a folder" in refusal(tmp_path)
    assert "no table of answers" in refusal(write(tmp_path, "a.json", "[1, 2"))
    with pytest.raises(FileNotFoundError):
        read_predictions(tmp_path / "absent.jsonl")


def test_other_encodings_are_told_and_read(tmp_path):
    rows = [{"id": "a", "answer": "肝脏正常。", "reference": "肝囊肿。"}]
    file = write(tmp_path, "a.csv", table(rows), "gb18030")
    assert "is not UTF-8: say what it is, encoding=" in refusal(file)
    assert read_predictions(file, encoding="gb18030") == rows
    assert "is not in encoding=ascii" in refusal(file, encoding="ascii")
    assert "no encoding=klingon" in refusal(file, encoding="klingon")


def test_references_that_do_not_fit(tmp_path):
    file = write(tmp_path, "a.csv", table(ROWS))
    assert "line 3: there is no reference" not in refusal(file, references={"a": "x", "b": "y"})
    assert "there is no reference for id 'c'" in refusal(file, references={"a": "x", "b": "y"})
    twice = [{"id": "a", "caption": "x"}, {"id": "a", "caption": "y"}]
    assert "row 2: id 'a' has a reference already" in refusal(file, references=twice)
    assert "row 1: it needs an id and" in refusal(file, references=[{"caption": "x"}])
    # those of the table count, whatever the file has
    found = read_predictions(file, references=dict.fromkeys("abc", "z"))
    assert {row["reference"] for row in found} == {"z"}
