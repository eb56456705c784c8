"""The records of benchmarks/train.py, for this project and for its rivals."""

import json
from pathlib import Path

from _harness import TINY_MODEL
from _random_records import random_answers, record, save_noise_pictures

from medtune.models import load_processor

PICTURES = 128
QUESTION = "What is the diagnosis in this picture?"
WORDS = "the liver is seen at upper left of this picture bright dark small large kidney region near"


def ensure_data(folder: Path, small: bool) -> dict[str, float]:
    """Write the records unless they are there, and say how many tokens an answer has."""
    facts_file = folder / "facts.json"
    words = WORDS.split()
    if not facts_file.exists():
        if small:
            answers = random_answers(words, 64, shortest=4, longest=12)
            side = 64
        else:
            # so many that no epoch ends in the steps of a rung
            answers = random_answers(words, 4096, shortest=77, longest=104)
            side = 512
        save_noise_pictures(
            folder / "images", min(len(answers), PICTURES), noise_side=side // 8, side=side
        )
        lengths = _write_records(folder, answers)
        _write_rivals_records(folder, answers)
        # written last: what has facts is complete
        facts_file.write_text(json.dumps({"answer_tokens": sum(lengths) / len(lengths)}))
    return json.loads(facts_file.read_text())


def _picture(number: int) -> str:
    return f"images/{number % PICTURES}.jpg"


def _write_records(folder: Path, answers: list[str]) -> list[int]:
    """Write records as `medtune convert` does; return the tokens of each answer."""
    tokenizer = load_processor(TINY_MODEL).tokenizer
    lengths = []
    with open(folder / "train.jsonl", "w", encoding="utf-8") as file:
        for number, answer in enumerate(answers):
            length = len(tokenizer(answer)["input_ids"])
            lengths.append(length)
            # batches by length need this column
            row = {**record(number, _picture(number), QUESTION, answer), "length": length}
            file.write(json.dumps(row) + "\n")
    types = {"features": {"length": {"dtype": "int64", "_type": "Value"}}}
    (folder / "convert.json").write_text(json.dumps(types))
    return lengths


def _write_rivals_records(folder: Path, answers: list[str]) -> None:
    """Write the same records as LLaMA-Factory and ms-swift read them."""
    rows = []
    for number, answer in enumerate(answers):
        messages = [
            {"role": "user", "content": f"<image>{QUESTION}"},
            {"role": "assistant", "content": answer},
        ]
        rows.append({"messages": messages, "images": [_picture(number)]})
    (folder / "records.json").write_text(json.dumps(rows))
    description = {
        "file_name": "records.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "images": "images"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
        },
    }
    (folder / "dataset_info.json").write_text(json.dumps({"records": description}))
