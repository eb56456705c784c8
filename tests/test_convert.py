"""Converted folders: what is written, for whom it is readable, what bad input does, and what a kill cannot do."""

import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medtune import convert, data

CAPTION = "The image is a CT scan of the upper abdomen. It shows the spleen, number {}."
CHINESE = "图像为上腹部的轴位CT，显示脾脏，编号{}。"


def picture(seed: int = 0, mode: str = "RGB", size: tuple[int, int] = (24, 16)) -> Image.Image:
    bands = {"L": (), "RGB": (3,), "RGBA": (4,), "CMYK": (4,)}[mode]
    noise = np.random.default_rng(seed).integers(0, 256, (size[1] // 4, size[0] // 4, *bands), dtype=np.uint8)
    image = Image.frombytes(mode, (size[0] // 4, size[1] // 4), noise.tobytes())
    return image.resize(size)


def encode(image: Image.Image, form: str = "JPEG", **options) -> bytes:
    image.save(buffer := io.BytesIO(), form, **options)
    return buffer.getvalue()


def pair(number: int, **changes) -> dict:
    row = {"id": f"id-{number:05d}", "caption": CAPTION.format(number), "image": encode(picture(number))}
    return row | changes


def write(file: Path, rows: list[dict], **options) -> Path:
    """A parquet shard as the hub has them."""
    columns = {key: [row.get(key) for row in rows] for key in dict.fromkeys(key for row in rows for key in row)}
    columns["image"] = [{"bytes": data, "path": None} for data in columns["image"]]
    pq.write_table(pa.table(columns), file, **options)
    return file


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []


def tree(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rejected(folder: Path) -> dict[str, str]:
    return {entry["id"]: entry["reason"] for entry in lines(folder / "rejected.jsonl")}


# --- what is written ----------------------------------------------------------------------------------------------


def test_the_default_record_is_what_trl_reads(tmp_path):
    rows = [pair(0, group="g0", roi=[0.1, 0.2, 0.3, 0.4], has_box=False), pair(1, group=None, roi=None, has_box=True)]
    summary = convert.convert_pairs(write(tmp_path / "a.parquet", rows), tmp_path / "out", questions="What is it?")
    first, second = lines(tmp_path / "out" / "train.jsonl")
    assert first == {
        "id": "id-00000",
        "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}],
        "completion": [{"role": "assistant", "content": [{"type": "text", "text": CAPTION.format(0)}]}],
        "instruction": "<image>What is it?",
        "output": CAPTION.format(0),
        "images": ["images/id-00000.jpg"],
        "group": "g0",
        "roi": [0.1, 0.2, 0.3, 0.4],
        "has_box": False,
    }
    assert second["roi"] is None and second.keys() == first.keys()
    assert summary == {
        "dialect": "prompt-completion", "rows": 2, "records": {"train": 2}, "text_only": 0, "copied": 2, "converted": 0,
        "rejected": 0, "reasons": {},
    }  # fmt: skip
    assert summary == json.loads((tmp_path / "out" / "convert.json").read_text())["summary"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "images", "train.jsonl", "dataset_info.json", "convert.json"
    }  # fmt: skip


def llamafactory_rows(folder: Path, name: str) -> list[dict]:
    """What LLaMA-Factory 0.9.5 makes of a data set, by the rules of its data/parser.py and data/converter.py."""
    entry = json.loads((folder / "dataset_info.json").read_text())[name]
    rows = datasets.load_dataset("json", data_files=str(folder / entry["file_name"]), split="train")
    columns, tags, found = entry["columns"], entry.get("tags"), []
    for row in rows:
        images = row[columns["images"]] or None
        assert all((folder / image).is_file() for image in images or ())
        if entry["formatting"] == "sharegpt":
            messages = row[columns["messages"]]
            system = ""
            if messages[0][tags["role_tag"]] == tags["system_tag"]:
                system, messages = messages[0][tags["content_tag"]], messages[1:]
            roles = [message[tags["role_tag"]] for message in messages]
            assert roles == [tags["user_tag"], tags["assistant_tag"]] * (len(roles) // 2) and roles
            texts = [message[tags["content_tag"]] for message in messages]
        else:
            assert entry["formatting"] == "alpaca"
            turns = (row[columns["history"]] if "history" in columns else None) or []
            texts = [t for turn in turns for t in turn] + [row[columns["prompt"]], row[columns["response"]]]
            system = row[columns["system"]] if "system" in columns else ""
        assert all(isinstance(text, str) and text for text in texts)
        assert sum(text.count("<image>") for text in texts) == len(images or ())
        found.append({"system": system, "texts": texts, "images": images})
    return found


@pytest.fixture
def dialogues(tmp_path) -> Path:
    def turns(i: int) -> list[dict]:
        return [{"from": "human", "value": f"Where is organ {i}?"}, {"from": "gpt", "value": "In the abdomen."}]

    said: list = [turns(i) for i in range(30)]
    long = zip(["user", "assistant"] * 2, "abcd", strict=True)
    said[0] = {"messages": [{"role": "system", "content": "Be kind."}, *({"role": r, "content": t} for r, t in long)]}
    (tmp_path / "said.jsonl").write_text("\n".join(map(json.dumps, said)) + "\n{broken\n[]\n")
    return tmp_path / "said.jsonl"


@pytest.mark.parametrize("dialect", convert.DIALECTS)
@pytest.mark.parametrize("system", [None, "You are a radiologist."])
@pytest.mark.parametrize("mixed", [False, True])
def test_llamafactory_reads_every_dialect(tmp_path, dialogues, dialect, system, mixed):
    source = write(tmp_path / "a.parquet", [pair(i, split=("train", "test")[i % 10 == 9]) for i in range(60)])
    options = {"dialect": dialect, "system_prompt": system} | ({"text_only": dialogues, "share": 0.25} if mixed else {})
    summary = convert.convert_pairs(source, tmp_path / "out", **options)
    train, test = (llamafactory_rows(tmp_path / "out", split) for split in ("train", "test"))
    assert summary["records"] == {"train": len(train), "test": len(test)} == {"train": 72 if mixed else 54, "test": 6}
    shown = [row for row in train if row["images"]]
    assert shown[3] == {
        "system": system or "", "texts": ["<image>Describe this medical image.", CAPTION.format(3)],
        "images": ["images/id-00003.jpg"],
    }  # fmt: skip
    spoken = [row for row in train if not row["images"]]
    assert len(spoken) == summary["text_only"] == (18 if mixed else 0)
    if mixed:
        assert summary["reasons"] == {"dialogue": 2}
        kind = [row for row in spoken if row["system"] == "Be kind."]
        assert [row["texts"] for row in kind] in ([], [["a", "b", "c", "d"]])
        assert all(any(not row["images"] for row in train[i : i + 9]) for i in range(0, 60, 9)), "spread, not in a heap"
    assert convert.check_folder(tmp_path / "out")["ok"]


@pytest.mark.parametrize("dialect", convert.DIALECTS)
def test_the_real_llamafactory_reads_it(tmp_path, dialogues, dialect):
    """Where LLaMA-Factory is installed, its own loader says so."""
    pytest.importorskip("llamafactory", reason="LLaMA-Factory is not installed")
    from types import SimpleNamespace as Arguments

    from llamafactory.data.loader import _load_single_dataset
    from llamafactory.data.parser import get_dataset_list

    out = str(tmp_path / "out")
    source = write(tmp_path / "a.parquet", [pair(i) for i in range(20)])
    convert.convert_pairs(source, out, dialect=dialect, text_only=dialogues, share=0.2, system_prompt="Be brief.")
    (attributes,) = get_dataset_list(["train"], out)
    arguments = Arguments(dataset_dir=out, media_dir=out, streaming=False, max_samples=None,
                          preprocessing_num_workers=None, overwrite_cache=True)  # fmt: skip
    model, training = Arguments(cache_dir=None, hf_hub_token=None), Arguments(local_process_index=0)
    rows = _load_single_dataset(attributes, model, arguments, training)
    assert len(rows) == 25 and sum(bool(row["_images"]) for row in rows) == 20
    for row in rows:
        assert row["_prompt"] and row["_response"] and all(map(os.path.isfile, row["_images"] or ()))
        assert sum(turn["content"].count("<image>") for turn in row["_prompt"]) == len(row["_images"] or ())


@pytest.mark.parametrize("dialect", convert.DIALECTS)
def test_trl_trains_on_the_answer_only(tmp_path, dialogues, tiny_vlm, dialect):
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    from medtune import models

    rows = [pair(i, image=encode(picture(i, size=(64, 96))), group=f"g{i // 3}") for i in range(9)]
    convert.convert_pairs(
        write(tmp_path / "a.parquet", rows), tmp_path / "out", dialect=dialect, text_only=dialogues, share=0.25,
        pictures_per_sample=2, system_prompt="Answer in one sentence.",
    )  # fmt: skip
    records, processor = convert.read_records(tmp_path / "out"), models.load_processor(str(tiny_vlm))
    assert sorted(map(len, records["images"])) == [0, 0, 1, 1, 1, 2, 2, 2]
    assert records[0]["images"][0].size == (64, 96) and records[0]["prompt"][0]["role"] == "system"
    batch = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)([dict(row) for row in records])
    report = convert.check_folder(tmp_path / "out", processor=processor, max_length=20)
    lengths = batch["attention_mask"].sum(1).tolist()
    assert report["ok"] and (report["tokens"]["min"], report["tokens"]["max"]) == (min(lengths), max(lengths))
    assert report["cut"] == {r["id"]: n for r, n in zip(records, lengths, strict=True) if n > 20}
    for labels, record in zip(batch["labels"], records, strict=True):
        answer = record["completion"][0]["content"][0]["text"]
        assert processor.tokenizer.decode(labels[labels != -100]).strip() == answer + "<|im_end|>"


def test_columns_that_start_with_nulls_keep_their_type(tmp_path):
    rows = [pair(i, roi=None if i < 1500 else [0.0, 0.5, 0.5, 1.0], note=None) for i in range(1501)]
    for row in rows:
        row["image"] = rows[0]["image"]
    table = pa.Table.from_pylist(
        [row | {"image": {"bytes": row["image"], "path": None}} for row in rows],
        schema=pa.schema(
            {"id": pa.string(), "caption": pa.string(), "roi": pa.list_(pa.float64()), "note": pa.string(),
             "image": pa.struct({"bytes": pa.binary(), "path": pa.string()})}
        ),
    )  # fmt: skip
    pq.write_table(table, tmp_path / "a.parquet")
    convert.convert_pairs(tmp_path / "a.parquet", tmp_path / "out")
    records = convert.read_records(tmp_path / "out")
    assert records[-1]["roi"] == [0.0, 0.5, 0.5, 1.0] and records[0]["roi"] is None
    assert records.features["note"] == datasets.Value("string")


def test_a_changed_file_is_read_anew(tmp_path):
    for text in ("A liver.", "A spleen."):
        source = write(tmp_path / "a.parquet", [pair(0, caption=text)])
        convert.convert_pairs(source, tmp_path / "out", overwrite=True)
        assert convert.read_records(tmp_path / "out")[0]["completion"][0]["content"][0]["text"] == text
    with pytest.raises(FileNotFoundError, match="test.jsonl does not exist, only train"):
        convert.read_records(tmp_path / "out", "test")


# --- pictures -----------------------------------------------------------------------------------------------------

KEPT = {
    "rgb.jpg": encode(picture(1), quality=90),
    "grey.jpg": encode(picture(1, "L")),
    "progressive.jpg": encode(picture(1), progressive=True),
    "upright.jpg": encode(
        picture(1), exif=bytes.fromhex("4578696600004d4d002a00000008000101120003000000010001000000000000")
    ),
    "padded.jpg": encode(picture(1)) + b"\0\0",
    "rgb.png": encode(picture(1), "PNG"),
    "grey.png": encode(picture(1, "L"), "PNG"),
}


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


CHANGED = {
    "turned.jpg": encode(picture(2), exif=_exif(6)),
    "cmyk.jpg": encode(picture(2, "CMYK")),
    "palette.png": encode(picture(2).convert("P"), "PNG"),
    "rgba.png": encode(picture(2, "RGBA"), "PNG"),
    "sixteen.png": encode(Image.fromarray(np.arange(24 * 16, dtype=np.uint16).reshape(16, 24) * 150), "PNG"),
    "animated.gif": encode(picture(2), "GIF", save_all=True, append_images=[picture(3)]),
    "animated.png": encode(picture(2), "PNG", save_all=True, append_images=[picture(3)]),
    "still.webp": encode(picture(2), "WEBP", lossless=True),
    "still.tif": encode(picture(2), "TIFF"),
}


@pytest.mark.parametrize("name", KEPT)
def test_bytes_are_copied(tmp_path, name):
    summary = convert.convert_pairs(write(tmp_path / "a.parquet", [pair(0, image=KEPT[name])]), tmp_path / "out")
    assert (
        summary["copied"] == 1 and (tmp_path / "out" / f"images/id-00000{Path(name).suffix}").read_bytes() == KEPT[name]
    )


@pytest.mark.parametrize("name", CHANGED)
def test_others_are_converted_without_loss(tmp_path, name):
    source = write(tmp_path / "a.parquet", [pair(0, image=CHANGED[name])])
    assert convert.convert_pairs(source, tmp_path / "out")["converted"] == 1
    made = Image.open(tmp_path / "out" / "images" / "id-00000.png")
    made.load()
    assert made.mode == "RGB" and getattr(made, "n_frames", 1) == 1
    assert made.size == ((16, 24) if name == "turned.jpg" else (24, 16))
    wanted = data.to_rgb(Image.open(io.BytesIO(CHANGED[name])))
    assert np.array_equal(np.asarray(made), np.asarray(wanted))
    if name.startswith(("animated.png", "still")):
        assert np.array_equal(np.asarray(made), np.asarray(picture(2)))
    convert.convert_pairs(source, tmp_path / "jpeg", jpeg_quality=60)
    assert Image.open(tmp_path / "jpeg" / "images" / "id-00000.jpg").size == made.size


def test_a_data_set_and_its_file_give_the_same(tmp_path):
    rows = [pair(i, image=(KEPT | CHANGED)[name]) for i, name in enumerate(KEPT | CHANGED)]
    source = write(tmp_path / "a.parquet", rows)
    convert.convert_pairs(source, tmp_path / "direct")
    pairs = data.load_pairs(source)
    convert.convert_pairs(pairs, tmp_path / "loaded")
    convert.convert_pairs(pairs.select(range(15, -1, -1)).select(range(15, -1, -1)), tmp_path / "indexed")
    direct, loaded, indexed = (tree(tmp_path / name) for name in ("direct", "loaded", "indexed"))
    assert direct.pop("convert.json") != loaded.pop("convert.json") != indexed.pop("convert.json")
    assert direct == loaded == indexed and len(direct) == 18


def test_pictures_in_files_and_other_columns_are_loaded(tmp_path):
    (tmp_path / "set").mkdir()
    picture(5).save(tmp_path / "set" / "a.png")
    (tmp_path / "set" / "captions.csv").write_text("image,caption\na.png,A liver.\nb.png,A spleen.\n")
    summary = convert.convert_pairs(tmp_path / "set", tmp_path / "out")
    assert summary["records"] == {"train": 1} and summary["rejected"] == 1
    assert convert.convert_pairs(tmp_path / "set", tmp_path / "out") == summary, "the same source is known again"
    assert Path(tmp_path / "out" / "images" / "a.png").read_bytes() == (tmp_path / "set" / "a.png").read_bytes()
    rows = [{"image": encode(picture(0)), "image_id": "x", "caption": "A liver.", "cui": ["C1"]}]
    write(tmp_path / "other.parquet", rows)
    convert.convert_pairs(tmp_path / "other.parquet", tmp_path / "other")
    assert lines(tmp_path / "other" / "train.jsonl")[0]["id"] == "x"


# --- questions, languages, splits, series -------------------------------------------------------------------------


def test_questions_are_drawn_by_id_and_seed_in_the_language_of_the_caption(tmp_path):
    rows = [pair(i, caption=(CAPTION, CHINESE)[i % 2].format(i)) for i in range(120)]
    source, drawn = write(tmp_path / "a.parquet", rows), {}
    for name, options in {"one": {}, "again": {}, "other": {"seed": 1}}.items():
        convert.convert_pairs(source, tmp_path / name, questions=convert.QUESTIONS, dialect="messages", **options)
        records = lines(tmp_path / name / "train.jsonl")
        drawn[name] = [record["messages"][0]["content"].removeprefix("<image>") for record in records]
    assert drawn["one"] == drawn["again"] != drawn["other"]
    english, chinese = Counter(drawn["one"][::2]), Counter(drawn["one"][1::2])
    assert set(english) == set(convert.QUESTIONS[:3]) and set(chinese) == set(convert.QUESTIONS[3:])
    assert min(*english.values(), *chinese.values()) > 8
    convert.convert_pairs(source, tmp_path / "fixed", questions="这是什么？", dialect="messages")
    asked = {record["messages"][0]["content"] for record in lines(tmp_path / "fixed" / "train.jsonl")}
    assert asked == {"<image>这是什么？"}, "the only question there is"


def test_chinese_captions_on_request(tmp_path):
    rows = [pair(0, caption_zh=CHINESE.format(0)), pair(1, caption_zh=None), pair(2, caption=CHINESE.format(2))]
    convert.convert_pairs(write(tmp_path / "a.parquet", rows), tmp_path / "out", language="zh")
    records = lines(tmp_path / "out" / "train.jsonl")
    assert [record["output"] for record in records] == [CHINESE.format(0), CHINESE.format(2)]
    assert {record["instruction"] for record in records} == {"<image>请描述这张医学图像。"}
    assert rejected(tmp_path / "out") == {"id-00001": "caption: there is none in Chinese"}
    assert "caption_zh" not in records[0]


def test_splits_come_from_the_caller_the_column_or_the_file(tmp_path):
    for name, count in {"train-00000": 3, "test-00000": 2, "validation-00000": 1}.items():
        rows = [pair(int.from_bytes(name.encode()[:2], "big") * 10 + i) for i in range(count)]
        (tmp_path / "shards").mkdir(exist_ok=True)
        write(tmp_path / "shards" / f"{name}.parquet", rows)
    named = convert.convert_pairs(tmp_path / "shards", tmp_path / "named")
    assert named["records"] == {"train": 3, "validation": 1, "test": 2}
    given_splits = ["validation"] * 6
    given_ = convert.convert_pairs(tmp_path / "shards", tmp_path / "given", splits=given_splits)
    assert given_["records"] == {"validation": 6}
    rows = [pair(0, split="test"), pair(1, split="train"), pair(2, split=None), pair(3, split="../../x")]
    column = convert.convert_pairs(write(tmp_path / "a.parquet", rows), tmp_path / "column")
    assert column["records"] == {"train": 1, "test": 1} and column["reasons"] == {"split": 2}
    with pytest.raises(ValueError, match="1 splits for 4 rows"):
        convert.convert_pairs(tmp_path / "a.parquet", tmp_path / "wrong", splits=["train"])


def test_slices_of_one_series_make_one_sample(tmp_path):
    groups = ["a"] * 5 + ["b"] * 2 + [None] * 2
    rows = [pair(i, group=g, slice=i, plane="axial", raw=b"x", about={"time": "now"}) for i, g in enumerate(groups)]
    rows[1]["image"] = b""
    rows[3]["caption"] = rows[2]["caption"]
    source = write(tmp_path / "a.parquet", rows)
    convert.convert_pairs(source, tmp_path / "out", pictures_per_sample=2, dialect="messages")
    records = lines(tmp_path / "out" / "train.jsonl")
    assert [record["id"] for record in records] == [
        "id-00000+1", "id-00003+1", "id-00005+1", "id-00007", "id-00008"
    ]  # fmt: skip
    assert records[0]["images"] == ["images/id-00000.jpg", "images/id-00002.jpg"]
    assert records[0]["messages"][0]["content"].startswith("<image><image>Describe")
    assert records[0]["messages"][1]["content"] == CAPTION.format(0) + "\n" + CAPTION.format(2)
    assert records[1]["messages"][1]["content"] == CAPTION.format(2) + "\n" + CAPTION.format(4)
    assert "raw" not in records[0] and records[0]["about"] == {"time": "now"}, "bytes stay out, names do not matter"
    assert records[0]["slice"] is None and records[0]["plane"] == "axial" and records[3]["slice"] == 7
    assert convert.check_folder(tmp_path / "out")["ok"]
    with pytest.raises(ValueError, match="needs a column `group`"):
        convert.convert_pairs(write(tmp_path / "b.parquet", [pair(0)]), tmp_path / "no", pictures_per_sample=2)


# --- bad input ----------------------------------------------------------------------------------------------------


def _bomb() -> bytes:
    whole = bytearray(encode(picture(0, "L"), "PNG"))
    whole[16:24] = (60_000).to_bytes(4, "big") * 2
    import zlib

    whole[29:33] = zlib.crc32(whole[12:29]).to_bytes(4, "big")
    return bytes(whole)


BAD = {
    "leaves the folder": ({"id": "../../etc/passwd"}, "^id: "),
    "slash": ({"id": "a/b"}, "^id: "),
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
    "cut JPEG": ({"image": encode(picture(1, size=(256, 256)))[:-400]}, "^image: .*truncated"),
    "cut PNG": ({"image": encode(picture(1, size=(256, 256)), "PNG")[:-400]}, "^image: .*truncated"),
    "flipped bit": ({"image": encode(picture(1), "PNG").replace(b"IDAT", b"IDAU")}, "^image: "),
    "bomb": ({"image": _bomb()}, "^image: .*60000"),
}


def test_bad_pairs_are_listed_with_their_reason_and_the_rest_goes_on(tmp_path):
    rows = [pair(0, id="first")]
    for number, (changes, _) in enumerate(BAD.values(), 1):
        rows.append(pair(number) | changes)
    rows += [pair(98, id="first"), pair(99, id="A name with spaces"), pair(100, id="last")]
    for row in rows:
        row["caption"] = row["caption"].encode() if isinstance(row["caption"], str) else row["caption"]
    table = pa.table({
        "image": [{"bytes": row["image"], "path": None} for row in rows], "id": [row["id"] for row in rows],
        "caption": pa.array([row["caption"] for row in rows], pa.binary()).view(pa.string()),
    })  # fmt: skip
    pq.write_table(table, tmp_path / "a.parquet")
    summary = convert.convert_pairs(tmp_path / "a.parquet", tmp_path / "out")
    reasons = {entry["row"]: entry["reason"] for entry in lines(tmp_path / "out" / "rejected.jsonl")}
    for number, (name, (_, pattern)) in enumerate(BAD.items(), 1):
        assert re.search(pattern, reasons[number], re.S), f"{name}: {reasons[number]}"
    repeat = len(BAD) + 1
    assert reasons[repeat] == "id: row 0 has it already, with its own picture"
    assert summary["rejected"] == len(reasons) == len(BAD) + 1 == sum(summary["reasons"].values())
    assert set(summary["reasons"]) == {"id", "caption", "text", "image"}
    assert [record["id"] for record in lines(tmp_path / "out" / "train.jsonl")] == [
        "first",
        "A name with spaces",
        "last",
    ]
    assert convert.check_folder(tmp_path / "out")["ok"]
    assert (tmp_path / "out" / "images" / "first.jpg").read_bytes() == rows[0]["image"], "not the second of that name"
    names = {path.name for path in (tmp_path / "out" / "images").iterdir()}
    assert len(names) == 3 and all(re.fullmatch(r"(first|last|h-[0-9a-f]{32})\.jpg", name) for name in names)
    with pytest.raises(ValueError, match=r"^row 1, id '../../etc/passwd': id: .*"):
        convert.convert_pairs(tmp_path / "a.parquet", tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict" / "train.jsonl").exists()


def test_values_that_json_lacks_become_null_or_a_reason(tmp_path):
    rows = [pair(0, age=float("nan")), pair(1, age=3.0)]
    summary = convert.convert_pairs(write(tmp_path / "a.parquet", rows), tmp_path / "out")
    assert [record["age"] for record in lines(tmp_path / "out" / "train.jsonl")] == [None, 3.0]
    assert summary["rejected"] == 0


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=300))
def test_a_file_name_is_plain_and_its_own(sample_id):
    name = convert._safe_name(sample_id)
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", name) and name != ".."
    assert sample_id == name or convert._safe_name(name) != name


def test_a_shard_cut_in_the_middle_does_not_stop_the_others(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(3):
        write(folder / f"{shard}.parquet", [pair(shard * 100 + i) for i in range(40)], row_group_size=20)
    whole = (folder / "1.parquet").read_bytes()
    (folder / "1.parquet").write_bytes(whole[: len(whole) // 2])
    summary = convert.convert_pairs(folder, tmp_path / "out")
    assert summary["records"] == {"train": 80} and summary["reasons"] == {"shard": 1}
    assert "1.parquet is cut off" in lines(tmp_path / "out" / "rejected.jsonl")[0]["reason"]
    with pytest.raises(ValueError, match="^row 40, id 'None': shard: 1.parquet is cut off"):
        convert.convert_pairs(folder, tmp_path / "strict", strict=True)
    with pytest.raises(ValueError, match="1.parquet is cut off, fetch it again"):
        convert.convert_pairs(folder / "1.parquet", tmp_path / "alone")
    spoilt = bytearray(whole)  # the footer is whole, a page is not
    middle = pq.ParquetFile(io.BytesIO(whole)).metadata.row_group(1).column(2)
    start = min(filter(None, (middle.dictionary_page_offset, middle.data_page_offset)))
    spoilt[start : start + 400] = b"\xff" * 400
    (folder / "1.parquet").write_bytes(spoilt)
    summary = convert.convert_pairs(folder, tmp_path / "page")
    assert summary["records"]["train"] + summary["rejected"] == 120 and summary["records"]["train"] >= 80
    assert "1.parquet breaks off here" in lines(tmp_path / "page" / "rejected.jsonl")[0]["reason"]


@pytest.mark.parametrize("name", ["images", ".convert"])
def test_links_that_leave_the_folder_are_refused(tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="link that leads out of it"):
        convert.convert_pairs(write(tmp_path / "a.parquet", [pair(0)]), tmp_path / "out")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_what_lies_in_the_folder_is_respected(tmp_path):
    source, out = write(tmp_path / "a.parquet", [pair(0), pair(1)]), tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and holds no conversion"):
        convert.convert_pairs(source, out)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    (out / "notes.txt").unlink()
    first = convert.convert_pairs(source, out)
    before, when = tree(out), (out / "train.jsonl").stat().st_mtime_ns
    assert convert.convert_pairs(source, out, workers=3) == first and tree(out) == before
    assert (out / "train.jsonl").stat().st_mtime_ns == when, "a finished run is left alone"
    with pytest.raises(ValueError, match="other dialect, seed, columns; overwrite it"):
        convert.convert_pairs(source, out, dialect="messages", seed=7)
    assert tree(out) == before
    (out / "mine.txt").write_text("mine")
    splits = ["test", "test"]
    assert convert.convert_pairs(source, out, overwrite=True, splits=splits)["records"] == {"test": 2}
    assert not (out / "train.jsonl").exists() and (out / "mine.txt").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"dialect": "alpaca"}, {"language": "fr"}, {"share": 1.0}, {"pictures_per_sample": 0}, {"questions": " "},
        {"questions": "<image>What?"},
    ],
)  # fmt: skip
def test_wrong_settings_are_named_before_anything_is_written(tmp_path, options):
    with pytest.raises(ValueError) as caught:
        convert.convert_pairs(write(tmp_path / "a.parquet", [pair(0)]), tmp_path / "out", **options)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_only_pairs_are_converted(tmp_path):
    for wrong in (datasets.Dataset.from_dict({"a": [1]}), [1, 2]):
        with pytest.raises(ValueError, match="image, id and caption"):
            convert.convert_pairs(wrong, tmp_path / "out")
    with pytest.raises(FileNotFoundError):
        convert.convert_pairs(tmp_path / "nowhere.parquet", tmp_path / "out")
    with pytest.raises(ValueError, match="holds no pairs"):
        convert.convert_pairs(data.load_pairs(write(tmp_path / "a.parquet", [pair(0)])).select([]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ids_that_are_numbers(tmp_path):
    write(tmp_path / "a.parquet", [pair(0, id=7), pair(1, id=8)])
    convert.convert_pairs(tmp_path / "a.parquet", tmp_path / "file")
    rows = {"image": [picture(0)] * 2, "id": [7, 7], "caption": ["A liver."] * 2}
    pairs = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    assert convert.convert_pairs(pairs, tmp_path / "set")["rejected"] == 1
    assert [record["id"] for record in lines(tmp_path / "file" / "train.jsonl")] == ["7", "8"]


# --- kills, full disks, workers -----------------------------------------------------------------------------------

RUN = """
    import os, shutil, signal, sys
    from medtune import convert
    source, out, last = sys.argv[1], sys.argv[2], int(sys.argv[3])
    count, replace, rmtree = 0, os.replace, shutil.rmtree

    def counted(function):
        def call(*arguments, **options):
            global count
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)
        return call

    os.replace, shutil.rmtree = counted(os.replace), counted(shutil.rmtree)
    convert.convert_pairs(source, out, questions=convert.QUESTIONS, workers=2)
    print(count)
"""


@pytest.fixture(scope="module")
def mixed_shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    slow = [name for name in CHANGED if name != "cmyk.jpg"]
    for shard in range(2):
        rows = [pair(shard * 1000 + i, split=("train", "validation")[i % 7 == 0]) for i in range(600)]
        for i in range(0, 300, 3) if shard else ():
            rows[i]["image"] = CHANGED[slow[i % len(slow)]]
        rows[5]["image"] = b""
        write(folder / f"{shard}.parquet", rows, row_group_size=170)
    return folder


@pytest.fixture(scope="module")
def unbroken(mixed_shards, tmp_path_factory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("unbroken") / "out"
    summary = convert.convert_pairs(mixed_shards, out, questions=convert.QUESTIONS, workers=1)
    assert summary["converted"] == 100 and summary["rejected"] == 2
    return tree(out)


def _run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", textwrap.dedent(RUN), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_workers_change_nothing(mixed_shards, unbroken, tmp_path):
    convert.convert_pairs(mixed_shards, tmp_path / "out", questions=convert.QUESTIONS, workers=5)
    assert tree(tmp_path / "out") == unbroken


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_the_same(mixed_shards, unbroken, tmp_path):
    """The process kills itself, with no chance to tidy up, before the n-th file gets its name."""
    out = tmp_path / "out"
    for last in (2, 400):
        assert _run(mixed_shards, out, last).returncode == -signal.SIGKILL
        assert not (out / "convert.json").exists()
    row = json.loads((out / ".convert" / "state.json").read_text())["row"]
    assert 256 <= row < 1200, "it went on"
    assert json.loads(convert_count := _run(mixed_shards, out, 0).stdout) < 1000, convert_count
    assert tree(out) == unbroken


@pytest.mark.slow
@pytest.mark.parametrize("before", range(1, 8))
def test_a_kill_while_the_files_get_their_names(mixed_shards, unbroken, tmp_path, before):
    total = int(_run(mixed_shards, tmp_path / "count", 0).stdout)
    out = tmp_path / "out"
    assert _run(mixed_shards, out, total + 1 - before).returncode == -signal.SIGKILL
    assert _run(mixed_shards, out, 0).returncode == 0
    assert tree(out) == unbroken


@pytest.mark.slow
def test_kills_at_any_time(mixed_shards, unbroken, tmp_path):
    out, draw = tmp_path / "out", random.Random(0)
    command = [sys.executable, "-c", textwrap.dedent(RUN), str(mixed_shards), str(out), "0"]
    for _ in range(6):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while not (out / ".convert").exists() and process.poll() is None:
            time.sleep(0.005)
        time.sleep(draw.uniform(0.0, 0.3))
        process.kill()
        process.wait()
    convert.convert_pairs(mixed_shards, out, questions=convert.QUESTIONS)
    assert tree(out) == unbroken


def _in_small_room(tmp_path: Path, option: str, script: str) -> str:
    """Run a script where tmp_path/room is a file system of its own."""
    (tmp_path / "room").mkdir()
    inner = f"mount -t tmpfs -o {option} room {tmp_path}/room && exec {sys.executable} -c '{textwrap.dedent(script)}'"
    done = subprocess.run(["unshare", "--map-root-user", "--mount", "sh", "-c", inner], capture_output=True, text=True)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip("this machine lets nobody mount")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs unshare")
def test_a_full_disk_is_one_line_and_leaves_nothing_half(tmp_path):
    rows = [pair(i, image=encode(picture(i, size=(256, 256)), quality=95)) for i in range(300)]
    source = write(tmp_path / "a.parquet", rows)
    found = json.loads(_in_small_room(tmp_path, "size=3m", f"""
        import json, os, shutil, pathlib
        from medtune import convert
        out, errors = pathlib.Path("{tmp_path}/room/out"), []
        try:
            convert.convert_pairs("{source}", out)
        except OSError as error:
            errors.append(str(error))
        half = [p.name for p in out.rglob("*") if p.name.endswith("tmp")]
        sizes = {{p.stem: p.stat().st_size for p in (out / "images").iterdir()}}
        os.system("mount -o remount,size=100m {tmp_path}/room")
        summary = convert.convert_pairs("{source}", out)
        print(json.dumps([errors, half, sizes, summary["records"], convert.check_folder(out)["ok"]]))
    """))  # fmt: skip
    errors, half, sizes, records, ok = found
    assert len(errors) == 1 and "\n" not in errors[0] and "No space left on device" in errors[0] and "out" in errors[0]
    assert 0 < len(sizes) < 300 and not half
    assert sizes == {row["id"]: len(row["image"]) for row in rows if row["id"] in sizes}
    assert records == {"train": 300} and ok, "with room the same call goes on"


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs unshare")
def test_a_read_only_target_is_one_line(tmp_path):
    source = write(tmp_path / "a.parquet", [pair(0)])
    found = _in_small_room(tmp_path, "ro", f"""
        from medtune import convert
        try:
            convert.convert_pairs("{source}", "{tmp_path}/room/out")
        except OSError as error:
            print(error)
    """)  # fmt: skip
    assert found.count("\n") == 1 and "Read-only file system" in found and "room/out" in found


# --- the check ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", convert.DIALECTS)
def test_check_finds_each_fault(tmp_path, dialect):
    out = tmp_path / "out"
    rows = [pair(i, group=f"g{i}", split=("train", "test")[i % 2]) for i in range(24)]
    convert.convert_pairs(write(tmp_path / "a.parquet", rows), out, dialect=dialect)
    assert convert.check_folder(out)["ok"]
    train = lines(out / "train.jsonl")
    turns = {"prompt-completion": "completion", "messages": "messages", "sharegpt": "conversations"}[dialect]
    says = "value" if dialect == "sharegpt" else "content"
    (out / "images" / "id-00000.jpg").unlink()
    (out / "images" / "id-00002.jpg").write_bytes(b"no picture")
    cut = (out / "images" / "id-00004.jpg").read_bytes()
    (out / "images" / "id-00004.jpg").write_bytes(cut[:-200])
    (tmp_path / "outside.jpg").write_bytes(cut)
    (out / "images" / "id-00006.jpg").unlink()
    (out / "images" / "id-00006.jpg").symlink_to(tmp_path / "outside.jpg")
    train[4]["images"] = ["../outside.jpg"]
    train[5]["images"] *= 2
    train[6][turns][-1][says] = [{"type": "text", "text": " "}] if dialect == "prompt-completion" else " "
    train[7][turns].append(train[7][turns][-1])
    train[8]["id"] = train[9]["id"]
    train[10]["group"] = "g1"
    del train[11][turns]
    text = "\n".join(map(json.dumps, train)) + "\n{cut"
    (out / "train.jsonl").write_text(text)
    report = convert.check_folder(out)
    found = {(error["place"], error["check"]) for error in report["errors"]}
    expected = {("train.jsonl:" + place, check) for place, check in [
        *((str(n), "pictures open") for n in range(1, 6)), ("6", "image marks"), ("7", "no empty turn"),
        ("8", "roles alternate"), ("10", "ids differ"), ("12", "readable"), ("13", "readable"),
    ]} | {("test.jsonl:1", "groups apart")}  # fmt: skip
    assert found == expected and not report["ok"] and report["records"] == {"train.jsonl": 13, "test.jsonl": 12}
    assert {row["check"]: row["errors"] for row in report["table"]} == Counter(check for _, check in expected)
    assert report == json.loads((out / "check.json").read_text())
    assert report["errors"][0]["problem"] == "images/id-00000.jpg: it is missing"


def test_check_reads_what_others_wrote(tmp_path):
    """A ShareGPT list of one of the recipes, with its own tags and without dataset_info.json."""
    picture(0).save(tmp_path / "a.jpg")
    said = [{"from": "user", "value": "<image>诊断？"}, {"from": "assistant", "value": "肝脏。"}]
    records = [{"conversations": said, "images": ["a.jpg"]}, {"conversations": said[::-1], "images": "a.jpg"}]
    (tmp_path / "mllm.json").write_text(json.dumps(records, ensure_ascii=False), "utf-8")
    report = convert.check_folder(tmp_path)
    assert [(error["place"], error["check"]) for error in report["errors"]] == [
        ("mllm.json:2", "roles alternate"), ("mllm.json:2", "image marks")
    ][:1]  # fmt: skip
    records = [{"messages": said, "id": ["a"], "images": 5}, 7, "x", None, {}, {"messages": [1]}, {"prompt": 1}]
    (tmp_path / "odd.jsonl").write_text("\n".join(map(json.dumps, records)))
    odd = [error["check"] for error in convert.check_folder(tmp_path)["errors"][1:]]
    assert odd == ["pictures open", *["readable"] * 6]
    with pytest.raises(ValueError, match="give a processor"):
        convert.check_folder(tmp_path, max_length=100)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no records"):
        convert.check_folder(tmp_path / "empty")


def test_records_whose_pictures_lie_elsewhere_are_not_read(tmp_path):
    picture(0).save(tmp_path / "a.jpg")
    (tmp_path / "out").mkdir()
    said = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A liver."}]
    for image in ("../a.jpg", str(tmp_path / "a.jpg")):
        (tmp_path / "out" / "train.jsonl").write_text(json.dumps({"id": "a", "messages": said, "images": [image]}))
        with pytest.raises(ValueError, match="train.jsonl:1: a picture lies outside the folder"):
            convert.read_records(tmp_path / "out")


# --- real data ----------------------------------------------------------------------------------------------------


def test_the_sample_set_converts_as_it_is(sample_path, tmp_path):
    pairs = data.load_pairs(sample_path, limit=300)
    summary = convert.convert_pairs(pairs, tmp_path / "out")
    assert summary["copied"] == 300 and not summary["rejected"] and sum(summary["records"].values()) == 300
    records = convert.read_records(tmp_path / "out", "train")
    assert {"group", "roi", "fields", "modality", "has_box"} <= set(records.column_names)
    assert records[0]["images"][0].size == (512, 512) and records.features["fields"] == pairs.features["fields"]
    assert convert.check_folder(tmp_path / "out")["ok"]


def test_real_radiographs(real, tmp_path):
    summary = convert.convert_pairs(real / "cxr.parquet", tmp_path / "out", strict=True)
    assert summary["records"] == {"train": 60} and summary["copied"] == 60


def test_real_dicom(real, tmp_path):
    pairs = data.load_pairs(real / "dicom", allow_empty_captions=True)
    pairs = pairs.remove_columns("caption").add_column("caption", [f"A slice, number {i}." for i in range(len(pairs))])
    summary = convert.convert_pairs(pairs, tmp_path / "out", questions="What is this?")
    assert summary["rejected"] == 0 and sum(summary["records"].values()) == len(pairs)
    assert convert.check_folder(tmp_path / "out")["ok"]
