"""Which rows become pairs: pictures copied or made anew, and what bad rows do."""

import io
import re
import zlib
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from shards import CHANGED, KEPT, encode, json_lines, pair, picture, write_shard

from medtune.pairs import safe_id, to_rgb
from medtune.records import check_folder, convert_pairs
from medtune.records.judge import safe_name
from medtune.records.reasons import kind_of, public_reason
from medtune.records.strip import strip_metadata

# --- pictures ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KEPT)
def test_bytes_are_copied(tmp_path, name):
    source = write_shard(tmp_path / "a.parquet", [pair(0, image=KEPT[name])])
    summary = convert_pairs(source, tmp_path / "out")
    copy = tmp_path / "out" / "images" / f"id-00000{Path(name).suffix}"
    assert copy.read_bytes() == strip_metadata(KEPT[name])
    has_more = name in ("upright.jpg", "padded.jpg")
    assert (copy.read_bytes() != KEPT[name]) == has_more
    assert summary["copied"] == 1 and summary["stripped"] == int(has_more)


@pytest.mark.parametrize("name", CHANGED)
def test_others_are_converted_without_loss(tmp_path, name):
    source = write_shard(tmp_path / "a.parquet", [pair(0, image=CHANGED[name])])
    assert convert_pairs(source, tmp_path / "out")["converted"] == 1
    made = Image.open(tmp_path / "out" / "images" / "id-00000.png")
    made.load()
    assert made.mode == "RGB" and getattr(made, "n_frames", 1) == 1
    assert made.size == ((16, 24) if name == "turned.jpg" else (24, 16))
    wanted = to_rgb(Image.open(io.BytesIO(CHANGED[name])))
    assert np.array_equal(np.asarray(made), np.asarray(wanted))
    if name.startswith(("animated.png", "still")):
        assert np.array_equal(np.asarray(made), np.asarray(picture(2)))
    convert_pairs(source, tmp_path / "jpeg", jpeg_quality=60)
    assert Image.open(tmp_path / "jpeg" / "images" / "id-00000.jpg").size == made.size


def test_pictures_in_a_plain_column_of_bytes(tmp_path):
    rows = [pair(0), pair(1, image=CHANGED["rgba.png"])]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    summary = convert_pairs(tmp_path / "a.parquet", tmp_path / "out")
    assert summary["copied"] == 1 and summary["converted"] == 1


# --- bad rows ---------------------------------------------------------------------------------


def _bomb() -> bytes:
    """A PNG whose header claims 60,000 x 60,000 pixels."""
    whole = bytearray(encode(picture(0, "L"), "PNG"))
    whole[16:24] = (60_000).to_bytes(4, "big") * 2
    whole[29:33] = zlib.crc32(whole[12:29]).to_bytes(4, "big")
    return bytes(whole)


LARGE_JPEG = encode(picture(1, size=(256, 256)))
LARGE_PNG = encode(picture(1, size=(256, 256)), "PNG")

# What is changed in a good row, and the reason that must be given for it.
BAD = {
    "long id": ({"id": "x" * 300}, "^id: .*300 characters"),
    "NUL in the id": ({"id": "a\0b"}, "^id: "),
    "no id": ({"id": None}, "^id: "),
    "no caption": ({"caption": " "}, "^caption: "),
    "surrogate": ({"caption": b"A \xed\xa0\x80 liver."}, "^text: .*utf-8"),
    "50,000 words": ({"caption": "word " * 50_000}, "^caption: .*50000 words"),
    "image mark": ({"caption": "See <image> here."}, "^caption: .*<image>"),
    "zero bytes": ({"image": b""}, "^image: .*zero"),
    "no picture": ({"image": None}, "^image: "),
    "text": ({"image": b"not a picture"}, "^image: "),
    "cut JPEG": ({"image": LARGE_JPEG[:-400]}, "^image: .*truncated"),
    "cut PNG": ({"image": LARGE_PNG[:-400]}, "^image: .*truncated"),
    "flipped bit": ({"image": encode(picture(1), "PNG").replace(b"IDAT", b"IDAU")}, "^image: "),
    "bomb": ({"image": _bomb()}, "^image: .*60000"),
}


@pytest.fixture
def bad_rows(tmp_path) -> tuple[Path, list[dict]]:
    """A shard with bad rows between good ones, and its rows."""
    rows = [pair(0, id="first")]
    for number, (changes, _) in enumerate(BAD.values(), 1):
        rows.append(pair(number) | changes)
    rows += [pair(98, id="first"), pair(99, id="A name with spaces"), pair(100, id="last")]
    captions = []
    for row in rows:
        caption = row["caption"]
        captions.append(caption.encode() if isinstance(caption, str) else caption)
    columns = {
        "image": [{"bytes": row["image"], "path": None} for row in rows],
        "id": [row["id"] for row in rows],
        # only this way a column of texts can hold one that is not UTF-8
        "caption": pa.array(captions, pa.binary()).view(pa.string()),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    return tmp_path / "a.parquet", rows


def test_bad_pairs_are_listed_with_their_reason_and_the_rest_goes_on(tmp_path, bad_rows):
    (source, rows), out = bad_rows, tmp_path / "out"
    summary = convert_pairs(source, out)
    reasons = {entry["row"]: entry["reason"] for entry in json_lines(out / "rejected.jsonl")}
    for number, (name, (_, pattern)) in enumerate(BAD.items(), 1):
        assert re.search(pattern, reasons[number], re.S), f"{name}: {reasons[number]}"
    repeat = len(BAD) + 1
    assert reasons[repeat] == "id: row 0 has it already"
    assert summary["rows"] == summary["pairs"] + summary["rejected"] == len(rows)
    assert summary["rejected"] == len(reasons) == len(BAD) + 1 == sum(summary["reasons"].values())
    assert set(summary["reasons"]) == {"id", "caption", "text", "image"}
    ids = [record["id"] for record in json_lines(out / "train.jsonl")]
    assert ids == ["first", "A name with spaces", "last"]
    assert check_folder(out)["ok"]
    first = (out / "images" / "first.jpg").read_bytes()
    assert first == rows[0]["image"], "not the second of that name"
    names = {path.name for path in (out / "images").iterdir()}
    assert len(names) == 3
    assert all(re.fullmatch(r"(first|last|h-[0-9a-f]{32})\.jpg", name) for name in names)


def test_strict_stops_at_the_first_bad_pair(tmp_path, bad_rows):
    with pytest.raises(ValueError, match=r"^row 1, id 'xxx.*': id: .*300 characters"):
        convert_pairs(bad_rows[0], tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict" / "train.jsonl").exists()


# --- names ------------------------------------------------------------------------------------

PATHS = ["p10/p1000003/s5041426", "..\\Mueller_Hans\\1", "Mueller_Hans.png", "../../etc/passwd"]


def test_ids_that_are_paths_become_hashes(tmp_path):
    rows = [pair(number, id=name) for number, name in enumerate(PATHS)]
    source, out = write_shard(tmp_path / "a.parquet", rows), tmp_path / "out"
    assert convert_pairs(source, out)["rejected"] == 0
    records = json_lines(out / "train.jsonl")
    assert [record["id"] for record in records] == [safe_id(name) for name in PATHS]
    assert all(re.fullmatch("id-[0-9a-f]{16}", record["id"]) for record in records)
    assert all(record["images"] == [f"images/{record['id']}.jpg"] for record in records)
    assert check_folder(out)["ok"]


def test_what_is_rejected_is_listed_without_names(tmp_path):
    """A data set is taken as it is: an id that leaves the folder is a reason, and hashed there."""
    rows = [pair(number, id=name) for number, name in enumerate(["../Mueller_Hans", ".hidden"])]
    pairs = datasets.Dataset.from_parquet(str(write_shard(tmp_path / "a.parquet", rows)))
    summary = convert_pairs(pairs, tmp_path / "out")
    assert summary["reasons"] == {"id": 2} and not summary["records"]
    entry, hidden = json_lines(tmp_path / "out" / "rejected.jsonl")
    assert entry["id"] == safe_id("../Mueller_Hans") and entry["row"] == 0
    assert entry["reason"].startswith("id: would leave a folder")
    assert hidden["id"] == ".hidden"
    with pytest.raises(ValueError, match="^row 0, id 'id-.*': id: would leave") as caught:
        convert_pairs(pairs, tmp_path / "strict", strict=True)
    assert "Mueller" not in str(caught.value)


@pytest.mark.parametrize(
    ("reason", "public", "kind"),
    [
        (
            "captions.csv:3: picture Hans Mueller.png is missing",
            "captions.csv:3: picture is missing",
            "image",
        ),
        (
            "c.jsonl:7: picture ../p1/Mueller lies outside the folder (a link or '..'): give it",
            "c.jsonl:7: picture lies outside the folder (a link or '..'): give it",
            "image",
        ),
        (
            "c.csv:2: DICOM file 'Mueller.dcm' is damaged or cut short",
            "c.csv:2: DICOM file is damaged or cut short",
            "image",
        ),
        (
            "c.csv:2: [Errno 13] Permission denied: '/home/mueller/1.png'",
            "c.csv:2: [Errno 13] Permission denied:",
            "row",
        ),
        (
            "c.csv:3: caption: float is no text; say columns={'caption': 'NAME'}",
            "c.csv:3: caption: float is no text; say columns={'caption': 'NAME'}",
            "caption",
        ),
        ("c.csv:3: split: hold-out is not known", "c.csv:3: split: hold-out is not known", "split"),
        ("IM1 Mueller: DICOM file is damaged", "DICOM file is damaged", "image"),
        ("Hans Mueller.png: it has zero bytes", "it has zero bytes", "row"),
        (
            "p1 Mueller/c.csv:4: picture ../1.nii.gz is a volume: cut it into slices",
            "c.csv:4: picture is a volume: cut it into slices",
            "image",
        ),
        (
            "c.csv:3: picture is an address (https), and medtune fetches nothing",
            "c.csv:3: picture is an address (https), and medtune fetches nothing",
            "image",
        ),
        (
            "c.json:9: not JSON (Expecting value: line 1 column 1 (char 0))",
            "c.json:9: not JSON (Expecting value: line 1 column 1 (char 0))",
            "row",
        ),
        ("image: has zero bytes", "image: has zero bytes", "image"),
        (
            "image: cannot be decoded (cannot identify image file <_io.BytesIO object at 0x7f4afc>)",
            "image: cannot be decoded (cannot identify image file)",
            "image",
        ),
        (
            "image: cannot be decoded ([Errno 2] No such file: 'x/Mueller Hans.png')",
            "image: cannot be decoded ([Errno 2] No such file: )",
            "image",
        ),
        (
            "c.csv:1: picture https://pacs/mueller?key=1 is missing",
            "c.csv:1: picture is missing",
            "image",
        ),
        ("split: 'hold-out' is none of train", "split: 'hold-out' is none of train", "split"),
    ],
)
def test_a_reason_names_no_file_and_no_address(reason, public, kind):
    assert public_reason(reason) == public and kind_of(public) == kind


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=300))
def test_a_file_name_is_plain_and_its_own(sample_id):
    name = safe_name(sample_id)
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", name) and name != ".."
    assert sample_id == name or safe_name(name) != name
