"""Tables as people write them by hand and with other programs: nothing in them vanishes."""

import base64
import csv
import io
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pair_sources import (
    AS_BYTES,
    NO_TEXT,
    encoded,
    folder_of_pictures,
    group_of,
    image_id,
    jpeg,
    refused,
    write_table,
)
from PIL import Image

from medtune.pairs import load_pairs, reject_reason


@pytest.fixture
def pictures(tmp_path) -> Path:
    return folder_of_pictures(tmp_path)


def loaded(source: Path, **options) -> list[dict]:
    """All rows of a source, bad ones too, with pictures as they are."""
    rows = load_pairs(source, strict=False, **options)
    return list(rows.cast_column("image", AS_BYTES))


def captions_of(source: Path, **options) -> list[str | None]:
    return [row["caption"] for row in loaded(source, **options)]


def written(folder: Path, name: str, text: str, encoding: str = "utf-8") -> Path:
    (folder / name).write_bytes(text.encode(encoding))
    return folder / name


# --- quotation and fields -------------------------------------------------------------------------


def test_a_quotation_mark_that_is_never_closed_swallows_nothing(pictures):
    lines = ["a.jpg\tNormal.", 'b.jpg\t"Double bubble sign.', "c.jpg\tA cyst.", "a.jpg\tA spleen."]
    text = "image\tcaption\n" + "\n".join(lines) + "\n"
    expected = ["Normal.", '"Double bubble sign.', "A cyst.", "A spleen."]
    assert captions_of(written(pictures, "t.tsv", text)) == expected
    assert captions_of(written(pictures, "t.csv", text.replace("\t", ","))) == expected


def test_two_open_quotation_marks_swallow_nothing_either(pictures):
    tsv = 'image\tcaption\na.jpg\t"Double bubble.\nb.jpg\tSaid "so".\nc.jpg\tThe end"\n'
    expected = ['"Double bubble.', 'Said "so".', 'The end"']
    assert captions_of(written(pictures, "t.tsv", tsv)) == expected


def test_a_row_with_too_many_or_too_few_fields_is_named(pictures):
    text = 'image,caption\na.jpg,PA view, normal.\nb.jpg\nc.jpg,"Quoted, as it should be."\n'
    table = written(pictures, "t.csv", text)
    rows = loaded(table)
    assert rows[0]["problem"].startswith("t.csv:2: 3 fields, but the heading has 2")
    assert rows[1]["problem"].startswith("t.csv:3: 1 fields, but the heading has 2")
    assert rows[2]["caption"] == "Quoted, as it should be."
    refused(ValueError, "^t.csv:2: 3 fields", table)


def test_empty_lines_and_delimiters_at_the_end_are_no_rows(pictures):
    text = "image,caption\n\na.jpg,Liver.,\n,\n   \nb.jpg,Spleen.\n"
    assert captions_of(written(pictures, "t.csv", text)) == ["Liver.", "Spleen."]


@pytest.mark.parametrize(
    "heading", ["sep=;\nimage;caption", "image;caption", "image|caption", "image\tcaption"]
)
def test_other_delimiters(pictures, heading):
    sign = heading[-8]
    table = written(pictures, "t.csv", f"{heading}\na.jpg{sign}A liver, a spleen.\n")
    assert captions_of(table) == ["A liver, a spleen."]


cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
tricky = st.text(st.sampled_from(list('a" ,;\t\n\r')), max_size=8)


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(cells | tricky, min_size=1, max_size=5), quoting=st.sampled_from([0, 1, 2]))
def test_what_a_csv_writer_quotes_is_read_back(tmp_path_factory, texts, quoting):
    """Python's own writer is the oracle, with as much quotation as it may use."""
    folder = tmp_path_factory.mktemp("csv")
    (folder / "a.jpg").write_bytes(jpeg())
    buffer = io.StringIO()
    writer = csv.writer(buffer, quoting=quoting)
    writer.writerow(["image", "id", "caption"])
    for number, text in enumerate(texts):
        writer.writerow(["a.jpg", f"n{number}", text])
    rows = loaded(written(folder, "t.csv", buffer.getvalue()))
    expected = [None if text.strip().lower() in NO_TEXT else text for text in texts]
    assert [row["caption"] for row in rows] == expected


plain_texts = st.text(st.sampled_from(list('ab" ,')), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(plain_texts.filter(str.strip), min_size=1, max_size=6))
def test_every_line_of_a_tsv_without_quotation_is_a_row(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("tsv")
    (folder / "a.jpg").write_bytes(jpeg())
    lines = [f"a.jpg\tn{number}\t{text}\n" for number, text in enumerate(texts)]
    rows = loaded(written(folder, "t.tsv", "image\tid\tcaption\n" + "".join(lines)))
    assert [row["id"] for row in rows] == [f"n{number}" for number in range(len(texts))]


@pytest.mark.parametrize("sign", [",", "\t", ";"])
@settings(max_examples=40, deadline=None)
@given(texts=st.lists(plain_texts.filter(str.strip), min_size=1, max_size=6))
def test_every_line_that_opens_and_closes_nothing_is_counted(tmp_path_factory, sign, texts):
    """Each line begins a field with a mark that no line closes: a pair or a rejection each."""
    folder = tmp_path_factory.mktemp("open")
    (folder / "a.jpg").write_bytes(jpeg())
    lines = []
    for number, text in enumerate(texts):
        lines.append(f'a.jpg{sign}n{number}{sign}"{text.replace(chr(34), "")}x\n')
    heading = sign.join(("image", "id", "caption"))
    rows = loaded(written(folder, "t.csv", f"{heading}\n{''.join(lines)}"))
    assert len(rows) == len(texts)
    seen = [row["id"] if not row["problem"] else f"n{int(row['id'][6:]) - 2}" for row in rows]
    assert seen == [f"n{number}" for number in range(len(texts))]


# --- every line is a pair or a rejection ----------------------------------------------------------

odd = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
odd |= st.lists(st.integers(), max_size=2) | st.dictionaries(st.text(max_size=3), odd, max_size=2)
names = st.sampled_from(["a.jpg", "none.jpg", "", "../a.jpg", "x.mp4", "https://a/b.png"]) | odd
turns = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "gpt", "tool"]), "content": odd}
    )
    | odd,
    max_size=3,
)
records = st.fixed_dictionaries(
    {},
    optional={
        "image": names,
        "images": st.lists(names, max_size=2) | names,
        "caption": odd,
        "answer": odd,
        "question": odd,
        "messages": turns | odd,
        "split": odd | st.sampled_from(["train", "Dev"]),
        "group": odd,
        "patient_id": odd,
    },
)


@settings(max_examples=80, deadline=None)
@given(lines=st.lists(records | odd, min_size=1, max_size=6))
def test_every_line_is_a_pair_or_a_rejection(tmp_path_factory, lines):
    folder = tmp_path_factory.mktemp("lines")
    (folder / "a.jpg").write_bytes(jpeg())
    texts = []
    for number, line in enumerate(lines, 1):
        record = line | {"id": f"n{number}"} if isinstance(line, dict) else line
        texts.append(json.dumps(record))
    table = written(folder, "t.jsonl", "\n".join(texts))
    seen = set()
    for row in loaded(table):
        assert row["problem"] or row["image"]["path"] == str(folder.resolve() / "a.jpg")
        place = re.fullmatch(r"t\.jsonl:(\d+)|n(\d+)(?:-\d+)?", row["id"])
        seen.add(int(place[1] or place[2]))
        assert "\n" not in (row["problem"] or "")
    assert seen == set(range(1, len(lines) + 1))


# --- captions that are no text --------------------------------------------------------------------


def test_captions_that_are_no_text_are_rejected(pictures):
    captions = ["A liver.", float("nan"), None, "nan", " NaN ", ["a"], {"a": 1}, 3, True]
    records = [{"image": "a.jpg", "caption": caption} for caption in captions]
    rows = loaded(write_table(pictures / "t.json", records))
    reasons = [reject_reason(row) for row in rows]
    assert reasons[0] is None
    assert reasons[1:5] == ["caption: is empty"] * 4
    for reason, kind in zip(reasons[5:], ("list", "dict", "int", "bool"), strict=True):
        assert f"caption: {kind} is no text" in reason
        assert "columns={'caption': 'NAME'}" in reason


def test_a_number_is_an_answer_to_a_question_or_the_users_own_word(pictures):
    record = {"image": "a.jpg", "question": "How many?", "answer": 2}
    assert captions_of(write_table(pictures / "t.json", [record])) == ["2"]
    record = {"image": "a.jpg", "caption": "a", "count": 2.0}
    table = write_table(pictures / "t.json", [record, record | {"count": float("nan")}])
    assert captions_of(table, columns={"caption": "count"}) == ["2", None]


# --- headings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "heading",
    [
        "ID,Image,Caption",
        "id, image, caption",
        '"Id","Image Path","CAPTION"',
        "\ufeffUID,FileName,Report",
        "image_id ,file_name ,text ",
        "Image-ID,Image_Name,Findings",
    ],
)
def test_headings_by_any_capitals_and_blanks(pictures, heading):
    text = f"{heading}\n7,a.jpg,Normal chest.\n"
    if ", " in heading:
        text = text.replace(",a", ", a").replace(",N", ", N")
    [row] = loaded(written(pictures, "t.csv", text))
    assert (row["id"], row["caption"], row["problem"]) == ("7", "Normal chest.", None)


def test_columns_are_said_by_the_name_that_the_table_has(pictures):
    """Open-i's merged table calls the exam `image`, and the picture `filename`."""
    text = "uid,Image,Impression ,filename\n1,Xray Chest,Normal.,a.jpg\n"
    table = written(pictures, "t.csv", text)
    refused(ValueError, "no column caption, only uid, Image, Impression, filename", table)
    columns = {"caption": "impression"}
    [row] = loaded(table, columns=columns)
    assert "columns={'image': 'filename'}" in row["problem"]
    [row] = loaded(table, columns=columns | {"image": "filename"})
    assert (row["id"], row["caption"]) == ("1", "Normal.")
    refused(ValueError, "no column nothing", table, columns={"caption": "nothing"})


def test_a_table_that_cannot_be_paired_says_so_once(pictures):
    table = written(pictures, "t.csv", "picture,words\na.jpg,x\nb.jpg,y\n")
    refused(ValueError, "^t.csv has no column image or caption", table, strict=False)
    table = written(pictures, "t.csv", "image,caption,caption\na.jpg,x,y\n")
    refused(ValueError, "two columns called caption", table, strict=False)


def test_a_column_called_problem_rejects_nothing(pictures):
    text = "image,caption,problem\na.jpg,A liver.,cough\n"
    [row] = loaded(written(pictures, "t.csv", text))
    assert reject_reason(row) is None
    assert row["source_problem"] == "cough"


# --- splits, ids and groups -----------------------------------------------------------------------


def test_words_for_splits_are_known_and_others_named(pictures):
    words = ["train", "Val", "TEST ", "Training", "dev", "valid", "validation", "holdout", ""]
    records = [{"image": "a.jpg", "caption": "x", "split": word} for word in words]
    rows = loaded(write_table(pictures / "t.csv", records))
    known = ["train", "validation", "test", "train", *["validation"] * 3]
    assert [row["split"] for row in rows] == [*known, None, None]
    assert "split: holdout is not known" in rows[7]["problem"]
    assert load_pairs(pictures / "t.csv", split="val", strict=False)["problem"].count(None) == 4


def test_numbers_of_patients_are_hashed_and_pseudonyms_stay(pictures):
    numbers = [17.0, 17, "17", "17.0"]  # as programs write the same
    records = [{"image": "a.jpg", "caption": "x", "Patient ID": number} for number in numbers]
    table = write_table(pictures / "t.json", records)
    assert [row["group"] for row in loaded(table)] == [group_of("17")] * 4
    secret = load_pairs(table, salt="another")["group"][0]
    assert re.fullmatch("patient-[0-9a-f]{12}", secret)
    assert secret != group_of("17")
    table = write_table(
        pictures / "t.json", [{"image": "a.jpg", "caption": "x", "Group": "ward-1"}]
    )
    assert loaded(table)[0]["group"] == "ward-1"


def test_ids_that_are_paths_or_file_names_are_hashed(pictures):
    given_ids = ["p10/s1", "p10/s2", "Doe.png", "plain"]
    records = [{"image": "a.jpg", "caption": "x", "id": name} for name in given_ids]
    rows = loaded(write_table(pictures / "t.jsonl", records))
    ids = [row["id"] for row in rows]
    assert ids[3] == "plain"
    assert len(set(ids)) == 4
    assert all(re.fullmatch("id-[0-9a-f]{16}", name) for name in ids[:3])
    assert [reject_reason(row) for row in rows] == [None] * 4


def test_views_of_one_report_get_ids_of_their_own_and_one_group(pictures):
    rows = []
    for uid in (1, 2):
        for name in ("a.jpg", "b.jpg"):
            rows.append({"uid": uid, "filename": name, "findings": f"Report {uid}."})
    rows.append({"uid": 3, "filename": "c.jpg", "findings": "Alone."})
    rows.append(rows[0])  # the very same again
    table = write_table(pictures / "t.csv", rows)
    for options in ({}, {"streaming": True}, {"limit": 9}):
        read = loaded(table, **options)
        assert [row["id"] for row in read] == ["1", "1-2", "2", "2-2", "3", "1"]
        groups = [row["group"] for row in read]
        assert groups[0] == groups[1] == groups[5] == group_of("1")
        assert groups[2] == groups[3] == group_of("2")
        assert groups[4] is None


def test_several_pictures_of_one_record_are_one_group_without_an_id_too(pictures):
    records = [{"images": ["a.jpg", "b.jpg"], "caption": "x"}, {"image": "c.jpg", "caption": "y"}]
    rows = loaded(write_table(pictures / "t.json", records))
    assert [row["id"] for row in rows] == [image_id(jpeg(grey)) for grey in (0, 40, 80)]
    groups = [row["group"] for row in rows]
    assert groups == [group_of(rows[0]["id"])] * 2 + [None]


def test_a_known_group_is_kept_for_views_of_one_report(pictures):
    rows = [
        {"id": "s", "image": "a.jpg", "caption": "x", "subject_id": 7},
        {"id": "s", "image": "b.jpg", "caption": "x", "subject_id": 7},
    ]
    read = loaded(write_table(pictures / "t.csv", rows))
    assert [row["group"] for row in read] == [group_of("7")] * 2
    assert [row["id"] for row in read] == ["s", "s-2"]


def test_questions_about_one_picture_under_one_id_are_all_kept(pictures):
    rows = []
    for question, answer in (("Which organ?", "The liver."), ("Is it normal?", "Yes.")):
        rows.append({"image_id": 5, "image": "a.jpg", "question": question, "answer": answer})
    read = loaded(write_table(pictures / "t.csv", rows))
    assert [row["id"] for row in read] == ["5", "5-2"]
    assert read[0]["group"] == read[1]["group"] == group_of("5")


# --- encodings ------------------------------------------------------------------------------------

CHINESE = "image,caption\na.jpg,胸部正位片，双肺纹理清晰。\nb.jpg,右肺上叶结节影。\n"
SPANISH = "image,caption\na.jpg,Tórax normal sin hallazgos.\nb.jpg,Nódulo pulmonar.\n"
RUSSIAN = "image,caption\na.jpg,Органы грудной клетки без патологии.\nb.jpg,Печень.\n"
KOREAN = "image,caption\na.jpg,흉부 방사선 사진은 정상입니다.\nb.jpg,간 낭종이 있습니다.\n"


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (CHINESE, "gbk"),
        (SPANISH, "latin-1"),
        (SPANISH, "cp1252"),
        (RUSSIAN, "cp1251"),
        (KOREAN, "euc_kr"),
        (CHINESE, "utf-16"),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl"])
def test_text_that_is_not_utf8_is_named_once_with_what_fits(pictures, text, encoding, suffix):
    records = list(csv.DictReader(io.StringIO(text)))
    if suffix == "json":
        text = json.dumps(records, ensure_ascii=False)
    elif suffix == "jsonl":
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    table = written(pictures, f"t.{suffix}", text, encoding)
    message = refused(ValueError, f"t.{suffix} is not UTF-8", table, strict=False)
    fitting = re.search(r"encoding=([\w-]+)", message)[1]
    expected = [record["caption"] for record in records]
    assert captions_of(table, encoding=fitting) == expected


def test_names_of_pictures_in_another_encoding(pictures):
    (pictures / "胸片.jpg").write_bytes(jpeg())
    table = written(pictures, "t.csv", "image,caption\n胸片.jpg,双肺清晰。\n", "gbk")
    refused(ValueError, "encoding=gb18030", table)
    assert captions_of(table, encoding="gb18030") == ["双肺清晰。"]
    refused(ValueError, "no encoding is called 'klingon'", table, encoding="klingon")


def test_line_ends_of_unicode_inside_of_texts_are_text(pictures):
    texts = ["One\u2028line.", "No\x85change.", "A\x0btab.", "B\x1cC"]
    records = [{"image": "a.jpg", "caption": text} for text in texts]
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    assert captions_of(written(pictures, "t.jsonl", "".join(lines))) == texts
    csv_lines = "".join(f"a.jpg,{text}\n" for text in texts)
    assert captions_of(written(pictures, "t.csv", "image,caption\n" + csv_lines)) == texts


def test_json_lines_may_be_called_json(pictures):
    records = [{"image": "a.jpg", "caption": "x"}, {"image": "b.jpg", "caption": "y"}]
    text = "".join(json.dumps(record) + "\n" for record in records)
    assert captions_of(written(pictures, "t.json", text)) == ["x", "y"]
    table = written(pictures, "t.json", text + '{"image": "c.jp')
    assert loaded(table)[2]["problem"].startswith("t.json:3: not JSON")


# --- names of pictures ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("on_disk", "in_table"),
    [
        ("images/0.png", "images\\0.png"),
        ("images/0.png", ".\\images\\0.png"),
        ("T\u006f\u0301rax.png", "T\u00f3rax.png"),
        ("T\u00f3rax.png", "T\u006f\u0301rax.png"),
        ("0.PNG", "0.png"),
        ("Images/0.png", "images/0.PNG"),
        ("胸片 一 (1).png", "胸片 一 (1).png "),
        ("images/train/p1/0.png", "train/p1/0.png"),
        ("imgs/0.png", "0.png"),
        ("0.png", "./0.png"),
        ("images/scan_1.png", "scan_1"),
    ],
)
def test_names_as_people_write_them(tmp_path, on_disk, in_table):
    (tmp_path / on_disk).parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8)).save(tmp_path / on_disk)
    [row] = loaded(write_table(tmp_path / "t.csv", [{"image": in_table, "caption": "A liver."}]))
    assert row["problem"] is None
    assert row["image"]["path"] == str((tmp_path / on_disk).resolve())


def test_a_name_that_may_be_two_files_is_not_guessed(tmp_path):
    for name in ("A.png", "a.PNG"):
        Image.new("L", (8, 8)).save(tmp_path / name)
    [row] = loaded(write_table(tmp_path / "t.csv", [{"image": "a.png", "caption": "x"}]))
    assert "2 files have similar names" in row["problem"]


def test_a_folder_of_pictures_may_be_a_link_to_another_disk(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "set").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "disk" / "0.png")
    (tmp_path / "set" / "images").symlink_to(tmp_path / "disk")
    (tmp_path / "set" / "inside").mkdir()
    (tmp_path / "set" / "within").symlink_to(tmp_path / "set" / "inside")
    Image.new("L", (8, 8)).save(tmp_path / "set" / "inside" / "1.png")
    (tmp_path / "other").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "other" / "0.png")
    (tmp_path / "set" / "elsewhere").symlink_to(tmp_path / "other")
    names = ["images/0.png", "0.png", "within/1.png", "elsewhere/0.png", "images/../../secret.png"]
    Image.new("L", (8, 8)).save(tmp_path / "secret.png")
    records = [{"image": name, "caption": "x"} for name in names]
    rows = loaded(write_table(tmp_path / "set" / "t.csv", records))
    assert [row["problem"] is None for row in rows] == [True, True, True, False, False]
    assert "image_root=FOLDER" in rows[3]["problem"]


def test_whole_paths_and_parents_are_read_inside_of_image_root(tmp_path):
    folder = folder_of_pictures(tmp_path)
    (folder / "data").mkdir()
    names = [str(folder / "images" / "a.jpg"), "../images/b.jpg", f"file://{folder}/images/c.jpg"]
    records = [{"image": name, "caption": "x"} for name in names]
    table = write_table(folder / "data" / "t.json", records)
    for row in loaded(table):
        assert "image_root=FOLDER" in row["problem"]
        assert str(folder) not in row["problem"]
    rows = loaded(table, image_root=folder)
    assert [row["id"] for row in rows] == [image_id(jpeg(grey)) for grey in (0, 40, 80)]


PNG = encoded(Image.new("L", (8, 8), 9), "PNG")


@pytest.mark.parametrize("content", [PNG, jpeg(), encoded(Image.new("L", (9, 9)), "GIF")])
def test_pictures_that_stand_in_the_table(tmp_path, content):
    text = base64.b64encode(content).decode()
    cells = [text, f"data:image/png;base64,{text}", {"bytes": text}, {"base64": text}]
    cells.append({"url": f"data:image/jpeg;base64,{text}"})
    records = [{"image": cell, "caption": "x"} for cell in cells]
    rows = loaded(write_table(tmp_path / "t.json", records))
    assert [row["image"]["bytes"] for row in rows] == [content] * 5
    assert rows[0]["id"] == image_id(content)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("https://example.org/a.jpg", "download the pictures"),
        ("s3://bucket/a.jpg", "download the pictures"),
        ("scan.nii.gz", "save its slices as PNG"),
        ("echo.MP4", "take pictures out of it"),
        ("pictures.zip", "unpack it"),
        ("captions.xlsx", "a table, no picture"),
        ("data:image/jpeg;base64-/9j/4AAQ", "not marked as base64"),
        ("data:image/jpeg;base64,/9j/4A*Q", "damaged or cut short"),
        ("C:\\data\\0.png", "relative to the table"),
        ("/no/such/0.png", "relative to the table"),
        (5, "named by text"),
        ({"width": 5}, "without bytes, path or url"),
        ([], "list of pictures is empty"),
        (None, "no picture name"),
    ],
)
def test_what_is_no_picture_here_is_named_with_advice(tmp_path, name, advice):
    record = {"image": name, "caption": "A liver."}
    [row] = loaded(write_table(tmp_path / "t.json", [record]))
    assert row["problem"].startswith("t.json:1: ")
    assert advice in row["problem"]


def test_a_missing_picture_is_the_same_with_and_without_a_limit(pictures):
    records = [{"image": f"{name}.jpg", "caption": "x"} for name in "axb"]
    table = write_table(pictures / "t.csv", records)
    whole, few = loaded(table), loaded(table, limit=9)
    assert whole == few
    assert [bool(row["problem"]) for row in few] == [False, True, False]
    for options in ({}, {"limit": 9}, {"streaming": True}):
        refused(FileNotFoundError, "^t.csv:3: picture x.jpg is missing", table, **options)
