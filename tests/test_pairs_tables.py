"""Tables of captions and of dialogues, from clean to wild."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pair_sources import (
    AS_BYTES,
    NO_TEXT,
    folder_of_pictures,
    group_of,
    image_id,
    jpeg,
    refused,
    write_table,
)

from medtune.pairs import load_pairs, reject_reason


@pytest.fixture
def pictures(tmp_path) -> Path:
    return folder_of_pictures(tmp_path)


# --- captions -------------------------------------------------------------------------------------

any_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl"])
@settings(max_examples=15, deadline=None)
@given(texts=st.lists(any_text, min_size=1, max_size=4))
def test_captions_come_out_of_a_table_as_they_went_in(tmp_path_factory, suffix, texts):
    folder = tmp_path_factory.mktemp("table")
    (folder / "a.jpg").write_bytes(jpeg())
    records = []
    for number, text in enumerate(texts):
        records.append({"id": f"n{number}", "image": "a.jpg", "caption": text})
    write_table(folder / f"t.{suffix}", records)
    rows = load_pairs(folder)
    assert rows["caption"] == [None if text.strip().lower() in NO_TEXT else text for text in texts]
    assert rows["id"] == [f"n{number}" for number in range(len(texts))]
    cell = rows.cast_column("image", AS_BYTES)[0]["image"]
    assert cell["path"] == str((folder / "a.jpg").resolve())


def test_table_in_the_wild(pictures):
    """A byte order mark, semicolons, a line end inside of a caption, other names, no ids."""
    table = pictures / "metadata.csv"
    text = 'file_name;text;patient\nimages/a.jpg;Leber;p1\nb.jpg;"zwei\nZeilen; ja";p2\n'
    table.write_bytes(("\ufeff" + text).encode())
    rows = load_pairs(pictures, columns={"group": "patient"})
    assert rows["caption"] == ["Leber", "zwei\nZeilen; ja"]
    assert rows["id"] == [image_id(jpeg(0)), image_id(jpeg(40))]  # made from the picture
    assert rows["group"] == [group_of("p1"), group_of("p2")]
    assert [row["image"].size for row in rows] == [(24, 16)] * 2


def test_several_tables(pictures):
    table = write_table(pictures / "metadata.csv", [{"image": "a.jpg", "caption": "Leber"}])
    other = write_table(pictures / "other.jsonl", [{"image": "c.jpg", "caption": "Milz"}])
    # metadata and captions are names that say it
    assert load_pairs(pictures)["caption"] == ["Leber"]
    assert load_pairs(pictures, captions=other)["id"] == [image_id(jpeg(80))]
    table.rename(pictures / "this.csv")
    refused(ValueError, r"several tables \(other.jsonl, this.csv\)", pictures)


def test_values_of_several_kinds_are_kept(pictures):
    records = [
        {"image": "a.jpg", "caption": "a", "k": 1, "m": {"a": [1]}},
        {"image": "b.jpg", "caption": "b", "k": "x"},
        {"image": "c.jpg", "caption": "c", "k": {"a": 2}, "m": {"a": [2]}},
    ]
    write_table(pictures / "t.jsonl", records)
    rows = load_pairs(pictures)
    assert rows["k"] == ["1", "x", '{"a": 2}']
    assert rows[0]["m"] == {"a": [1]}
    assert rows[1]["m"] is None


def test_a_column_may_have_any_name(pictures):
    record = {"image": "a.jpg", "caption": "a", "named": "yes", "Ward": "p"}
    write_table(pictures / "t.jsonl", [record])
    row = load_pairs(pictures)[0]
    assert (row["named"], row["Ward"]) == ("yes", "p")


def test_pictures_without_a_table(pictures):
    refused(ValueError, "3 pictures and no table of captions", pictures)
    rows = load_pairs(pictures, allow_empty_captions=True)
    assert rows["id"] == [image_id(jpeg(grey)) for grey in (0, 40, 80)]
    assert rows["caption"] == [""] * 3
    (pictures / "empty").mkdir()
    refused(ValueError, "holds no pairs", pictures / "empty")


# --- what a table must not name, and bad tables ---------------------------------------------------

OUTSIDE = "outside the folder"


@pytest.fixture
def beside_a_secret(pictures) -> Path:
    """A folder with a.jpg, beside a picture that it does not hold, and two links out of it."""
    folder = pictures / "set"
    (pictures / "images").rename(folder)
    (pictures / "secret.jpg").write_bytes(jpeg())
    (folder / "link.jpg").symlink_to(pictures / "secret.jpg")
    (folder / "linked").symlink_to(pictures)
    return folder


def write_bad_and_good(folder: Path, name: str) -> None:
    bad = {"image": name, "caption": "x"}
    good = {"image": "a.jpg", "caption": "y"}
    write_table(folder / "t.jsonl", [bad, good])


@pytest.mark.parametrize(
    ("name", "kind", "pattern"),
    [
        ("nowhere.jpg", FileNotFoundError, "nowhere.jpg is missing"),
        ("../secret.jpg", ValueError, OUTSIDE),
        ("/etc/hostname", ValueError, OUTSIDE),
        ("link.jpg", ValueError, OUTSIDE),
        ("linked/secret.jpg", ValueError, OUTSIDE),
        ("a\0.jpg", ValueError, "no picture name"),
        ("", ValueError, "no picture name"),
        ("x" * 5000, (ValueError, OSError), "t.jsonl:1: "),
    ],
)
def test_pictures_that_a_table_must_not_name(beside_a_secret, name, kind, pattern):
    write_bad_and_good(beside_a_secret, name)
    refused(kind, pattern, beside_a_secret)
    # nothing is lost: the bad row says what is wrong with it
    rows = load_pairs(beside_a_secret, strict=False)
    assert rows["id"] == ["t.jsonl:1", image_id(jpeg(0))]
    assert rows["caption"] == [None, "y"]
    reasons = [reject_reason(row) for row in rows.cast_column("image", AS_BYTES)]
    assert re.search(pattern, reasons[0])
    assert reasons[1] is None


@pytest.mark.parametrize("name", ["../secret.jpg", "link.jpg", "linked/secret.jpg"])
def test_image_root_may_allow_more(beside_a_secret, name):
    write_bad_and_good(beside_a_secret, name)
    # names are relative to image_root too: '..' leaves a root that is the folder itself
    allowed = beside_a_secret if name.startswith("..") else beside_a_secret.parents[1]
    assert len(load_pairs(beside_a_secret, image_root=allowed, strict=False)) == 2


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_records_stay_countable(pictures, streaming):
    lines = [
        '{"image": "a.jpg", "caption": "good"}',
        "{broken",
        "[1]",
        '{"image": "b.jpg"}',
        '{"messages": [3], "images": ["c.jpg"]}',
        '{"image": "c.jpg", "caption": "lone \\ud800"}',
        '{"image": "c.jpg", "caption": "good"}',
    ]
    (pictures / "t.jsonl").write_text("\n".join(lines))
    refused(ValueError, "^t.jsonl:2: not JSON", pictures)
    rows = list(load_pairs(pictures, strict=False, streaming=streaming))
    problems = [row["problem"] for row in rows]
    assert [bool(problem) for problem in problems] == [False, True, True, True, True, False, False]
    assert "no column caption" in problems[3]
    assert problems[4].startswith("t.jsonl:5: ")
    rejected = [bool(reject_reason(row)) for row in rows]
    assert rejected == [False, True, True, True, True, True, False]


def test_bytes_that_are_no_utf8_are_rejected_not_guessed(pictures):
    (pictures / "t.csv").write_bytes(b"image,caption\na.jpg,caf\xe9\nb.jpg,caf\xc3\xa9\n")
    reasons = [reject_reason(row) for row in load_pairs(pictures)]
    assert reasons[0].startswith("caption: holds characters")
    assert reasons[1] is None


def test_bad_tables(pictures):
    table = pictures / "t.json"
    table.write_text('[{"image": "a.jpg"')
    refused(ValueError, "is not JSON .*cut off", pictures)
    table.write_text('{"image": "a.jpg", "caption": "x"}')
    refused(ValueError, "t.json is no list of records but one dict", pictures)
    table.write_text("[]")
    refused(ValueError, "holds no pairs", pictures)
    table.unlink()
    (pictures / "t.csv").write_text("picture,words\na.jpg,x\n")
    refused(ValueError, "no column image or caption, only picture, words", pictures)
    missing = pictures / "none.csv"
    refused(FileNotFoundError, "No such file.*none.csv", pictures, captions=missing)


# --- dialogues ------------------------------------------------------------------------------------


def dialogue(dialect: str, question: str, answer: str, images: list[str]) -> dict:
    if dialect == "messages":
        turns = [
            {"role": "system", "content": "S"},
            {"role": "user", "content": f"<image>{question}"},
            {"role": "assistant", "content": answer},
        ]
        return {"messages": turns, "images": images}
    if dialect == "conversations":
        turns = [
            {"from": "human", "value": f"<image>\n{question}"},
            {"from": "gpt", "value": answer},
        ]
        return {"conversations": turns, "images": images}
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    return {
        "prompt": [asked],
        "completion": [said],
        "images": images,
        "instruction": question,
        "output": answer,
    }


visible_text = st.text(st.characters(exclude_categories=["Cs", "Zs", "Cc"]), min_size=1)
words = visible_text.map(lambda text: text.replace("<image>", "x"))


@pytest.mark.parametrize("dialect", ["messages", "conversations", "prompt-completion"])
@settings(max_examples=15, deadline=None)
@given(spoken=st.lists(st.tuples(words, words), min_size=1, max_size=4))
def test_dialogues_back_into_pairs(tmp_path_factory, dialect, spoken):
    folder = tmp_path_factory.mktemp("dialogue")
    (folder / "a.jpg").write_bytes(jpeg())
    # spaces around a text do not survive
    spoken = [(asked.strip() or "q", said.strip() or "a") for asked, said in spoken]
    records = [dialogue(dialect, asked, said, ["a.jpg"]) for asked, said in spoken]
    write_table(folder / "t.json", records)
    rows = load_pairs(folder)
    assert list(zip(rows["question"], rows["caption"], strict=True)) == spoken
    first = image_id(jpeg())
    assert rows["id"] == [first, *(f"{first}-{number}" for number in range(2, len(spoken) + 1))]
    assert set(rows.column_names) == {"image", "id", "caption", "question"}


def test_dialogues_with_several_turns_pictures_or_none(pictures):
    turns = [
        {"role": "user", "content": "<image>q1"},
        {"role": "assistant", "content": "a1"},
        {"role": "user", "content": "q2"},
        {"role": "assistant", "content": "a2"},
    ]
    two_pictures = ["images/b.jpg", "images/c.jpg"]
    records = [
        {"id": "two", "messages": turns, "images": ["a.jpg"], "group": "p1"},
        {"messages": turns[:2], "images": []},  # text only: no pair
        {"id": "both", "messages": turns[:2], "images": two_pictures, "group": "p2"},
    ]
    rows = load_pairs(write_table(pictures / "sharegpt.json", records))
    assert rows["id"] == ["two", "two-2", "both", "both-2"]
    assert rows["question"] == ["q1", "q2", "q1", "q1"]
    assert rows["caption"] == ["a1", "a2", "a1", "a1"]
    assert rows["group"] == ["p1", "p1", "p2", "p2"]
    # each picture is brighter than the one before
    assert [row["image"].getpixel((0, 0))[0] // 40 for row in rows] == [0, 0, 1, 2]
