"""Who can read the records: LLaMA-Factory in every dialect, and TRL's collator."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shards import CAPTION, encode, json_lines, pair, picture, write_shard

from medtune.models import load_processor
from medtune.records import DIALECTS, check_folder, convert_pairs, read_records
from medtune.records.dialects import make_record, pictures_of, read_turns, turns_of_answers


@pytest.fixture
def dialogues(tmp_path) -> Path:
    """A file of 30 dialogues, one of them long and with a system prompt, and two broken lines."""
    said: list = []
    for i in range(30):
        question = {"from": "human", "value": f"Where is organ {i}?"}
        said.append([question, {"from": "gpt", "value": "In the abdomen."}])
    long = [{"role": "system", "content": "Be kind."}]
    for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True):
        long.append({"role": role, "content": text})
    said[0] = {"messages": long}
    lines = [*map(json.dumps, said), "{broken", "[]", ""]
    (tmp_path / "said.jsonl").write_text("\n".join(lines))
    return tmp_path / "said.jsonl"


# --- LLaMA-Factory ----------------------------------------------------------------------------


def llamafactory_rows(folder: Path, name: str) -> list[dict]:
    """What LLaMA-Factory 0.9.5 makes of a data set, by its data/parser.py and data/converter.py."""
    entry = json.loads((folder / "dataset_info.json").read_text())[name]
    file = str(folder / entry["file_name"])
    read = sharegpt_row if entry["formatting"] == "sharegpt" else alpaca_row
    rows = []
    for record in datasets.load_dataset("json", data_files=file, split="train"):
        row = read(record, entry)
        row["images"] = record[entry["columns"]["images"]] or None
        names = row["images"] or ()
        assert all((folder / image).is_file() for image in names)
        assert all(isinstance(text, str) and text for text in row["texts"])
        assert sum(text.count("<image>") for text in row["texts"]) == len(names)
        rows.append(row)
    return rows


def sharegpt_row(record: dict, entry: dict) -> dict:
    tags = entry["tags"]
    messages, system = record[entry["columns"]["messages"]], ""
    if messages[0][tags["role_tag"]] == tags["system_tag"]:
        system, messages = messages[0][tags["content_tag"]], messages[1:]
    roles = [message[tags["role_tag"]] for message in messages]
    assert roles == [tags["user_tag"], tags["assistant_tag"]] * (len(roles) // 2) and roles
    return {"system": system, "texts": [message[tags["content_tag"]] for message in messages]}


def alpaca_row(record: dict, entry: dict) -> dict:
    assert entry["formatting"] == "alpaca"
    columns = entry["columns"]
    turns = (record[columns["history"]] if "history" in columns else None) or []
    texts = [text for turn in turns for text in turn]
    texts += [record[columns["prompt"]], record[columns["response"]]]
    return {"system": record[columns["system"]] if "system" in columns else "", "texts": texts}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("system", [None, "You are a radiologist."])
@pytest.mark.parametrize("mixed", [False, True])
def test_llamafactory_reads_every_dialect(tmp_path, dialogues, dialect, system, mixed):
    rows = [pair(i, split=("train", "test")[i % 10 == 9]) for i in range(60)]
    source, out = write_shard(tmp_path / "a.parquet", rows), tmp_path / "out"
    options = {"dialect": dialect, "system_prompt": system}
    if mixed:
        options |= {"text_only": dialogues, "share": 0.25}
    summary = convert_pairs(source, out, **options)

    train, test = (llamafactory_rows(out, split) for split in ("train", "test"))
    assert summary["records"] == {"train": len(train), "test": len(test)}
    assert summary["records"] == {"train": 72 if mixed else 54, "test": 6}
    shown = [row for row in train if row["images"]]
    assert shown[3] == {
        "system": system or "",
        "texts": ["<image>Describe this medical image.", CAPTION.format(3)],
        "images": ["images/id-00003.jpg"],
    }
    spoken = [row for row in train if not row["images"]]
    assert len(spoken) == summary["text_only"] == (18 if mixed else 0)
    if mixed:
        assert summary["reasons"] == {"dialogue": 2}
        kind = [row["texts"] for row in spoken if row["system"] == "Be kind."]
        assert kind in ([], [["a", "b", "c", "d"]])
        for start in range(0, 60, 9):
            nine = train[start : start + 9]
            assert any(not row["images"] for row in nine), "spread, not in a heap"
    assert check_folder(out)["ok"]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_real_llamafactory_reads_it(tmp_path, dialogues, dialect):
    """Where LLaMA-Factory is installed, its own loader says so."""
    pytest.importorskip("llamafactory", reason="LLaMA-Factory is not installed")
    from llamafactory.data.loader import _load_single_dataset
    from llamafactory.data.parser import get_dataset_list

    out = str(tmp_path / "out")
    source = write_shard(tmp_path / "a.parquet", [pair(i) for i in range(20)])
    options = {"text_only": dialogues, "share": 0.2, "system_prompt": "Be brief."}
    convert_pairs(source, out, dialect=dialect, **options)
    (attributes,) = get_dataset_list(["train"], out)
    arguments = SimpleNamespace(
        dataset_dir=out,
        media_dir=out,
        streaming=False,
        max_samples=None,
        preprocessing_num_workers=None,
        overwrite_cache=True,
    )
    model = SimpleNamespace(cache_dir=None, hf_hub_token=None)
    training = SimpleNamespace(local_process_index=0)
    rows = _load_single_dataset(attributes, model, arguments, training)
    assert len(rows) == 25 and sum(bool(row["_images"]) for row in rows) == 20
    for row in rows:
        names = row["_images"] or ()
        assert row["_prompt"] and row["_response"] and all(map(os.path.isfile, names))
        assert sum(turn["content"].count("<image>") for turn in row["_prompt"]) == len(names)


# --- TRL --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", DIALECTS)
def test_trl_trains_on_the_answer_only(tmp_path, dialogues, tiny_vlm, dialect):
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    rows = []
    for i in range(9):
        rows.append(pair(i, image=encode(picture(i, size=(64, 96))), group=f"g{i // 3}"))
    out = tmp_path / "out"
    convert_pairs(
        write_shard(tmp_path / "a.parquet", rows),
        out,
        dialect=dialect,
        text_only=dialogues,
        share=0.25,
        pictures_per_sample=2,
        system_prompt="Answer in one sentence.",
        split_by="none",
    )
    records, processor = read_records(out), load_processor(str(tiny_vlm))
    said = [record for record in json_lines(out / "train.jsonl") if not record["images"]]
    answers = sum(len(turns_of_answers(read_turns(record, 0)[0])) for record in said)
    assert len(said) == 2
    assert sorted(map(len, records["images"])) == [0] * answers + [1, 1, 1, 2, 2, 2]
    assert records[0]["images"][0].size == (64, 96)
    assert records[0]["prompt"][0]["role"] == "system"

    collate = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    batch = collate([dict(row) for row in records])
    lengths = batch["attention_mask"].sum(1).tolist()
    assert check_folder(out, processor=processor)["ok"]
    report = check_folder(out, processor=processor, max_length=20)
    assert {error["check"] for error in report["errors"]} == {"answers whole"}
    assert report["tokens"]["min"] == min(lengths) and report["tokens"]["max"] == max(lengths)
    by_id = dict(zip(records["id"], lengths, strict=True))
    assert report["cut"] == {name: length for name, length in by_id.items() if length > 20}
    for labels, record in zip(batch["labels"], records, strict=True):
        answer = record["completion"][0]["content"][0]["text"]
        trained = processor.tokenizer.decode(labels[labels != -100]).strip()
        assert trained == answer + "<|im_end|>"


# --- any record -------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_was_written_is_read_back(tmp_path, dialogues, dialect):
    source = write_shard(tmp_path / "a.parquet", [pair(i) for i in range(4)])
    options = {"text_only": dialogues, "share": 0.9, "system_prompt": "Be brief."}
    convert_pairs(source, tmp_path / "out", dialect=dialect, **options)
    for record in json_lines(tmp_path / "out" / "train.jsonl"):
        turns, problems = read_turns(record, len(record["images"]))
        assert not problems
        if record["id"].startswith("id-"):
            assert [role for role, _ in turns] == ["system", "user", "assistant"]


def test_the_published_dialect_is_written_to_the_letter(tmp_path):
    """A recipe on a hosted trainer: keys of ShareGPT, roles of chat templates, marked question."""
    rows = [pair(0, caption="肝脏可见一处病变。")]
    source, out = write_shard(tmp_path / "a.parquet", rows), tmp_path / "out"
    question = "<image>图片中的诊断结果是怎样?"
    summary = convert_pairs(source, out, dialect="conversations", questions=question)
    assert summary["dialect"] == "conversations"
    (record,) = json_lines(out / "train.jsonl")
    assert record["conversations"] == [
        {"from": "user", "value": question},
        {"from": "assistant", "value": "肝脏可见一处病变。"},
    ]
    assert record["images"] == ["images/id-00000.jpg"]
    entry = json.loads((out / "dataset_info.json").read_text())["train"]
    assert entry["tags"]["user_tag"] == "user" and entry["tags"]["assistant_tag"] == "assistant"
    assert check_folder(out)["ok"]


words = st.text("ab 肝?\n", min_size=1).filter(str.strip)


@given(
    st.sampled_from([name for name in DIALECTS if name != "prompt-completion"]),
    st.none() | words,
    st.lists(st.tuples(words, words), min_size=1, max_size=4),
    st.integers(0, 3),
)
def test_a_record_is_read_back_whatever_was_said(dialect, system, said, pictures):
    turns = [("system", system)] if system else []
    for number, (question, answer) in enumerate(said):
        marks = "<image>" * pictures if number == 0 else ""
        turns += [("user", marks + question), ("assistant", answer)]
    images = [f"images/{number}.jpg" for number in range(pictures)]
    record = make_record("a", turns, images, dialect=dialect, with_history=False)
    written = json.loads(json.dumps(record))
    assert read_turns(written, pictures) == (turns, [])
    assert pictures_of(written) == images


def test_a_system_prompt_beside_the_messages_comes_first():
    said = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A liver."}]
    turns, problems = read_turns({"messages": said, "system": "Be brief."}, 0)
    assert turns[0] == ("system", "Be brief.") and not problems
    turns, problems = read_turns({"messages": said, "system": 5}, 0)
    assert not turns and problems[0].check == "readable"
