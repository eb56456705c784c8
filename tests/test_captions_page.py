"""The page docs/translate.md: its Python is run in its order, against a server of ours."""

import itertools
import json
import re

import pyarrow.parquet
from chat_server import ChatServer

from medtune.captions import read_translations

ADDRESS = "http://localhost:11434"


def blocks(repo):
    text = (repo / "docs" / "translate.md").read_text("utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


def test_the_page_does_what_it_says(repo, sample_path, tmp_path, monkeypatch, capsys):
    table = pyarrow.parquet.read_table(
        sample_path, columns=["image", "id", "caption", "caption_zh", "group"]
    )
    twins = dict(zip(table["caption"].to_pylist(), table["caption_zh"].to_pylist(), strict=True))
    captions = list(itertools.islice(twins, 9))
    texts = table["caption"].to_pylist()
    rows = table.take([texts.index(caption) for caption in captions])
    pyarrow.parquet.write_table(rows.drop_columns("caption_zh"), tmp_path / "pairs.parquet")

    models = []

    def reply(text, number):
        models.append(server.requests[number - 1]["model"])
        # the small model cannot tell the sides of one picture, and the large one of another
        if text == captions[0] or (text == captions[1] and models[-1] == "qwen3:4b"):
            return twins[text].replace("4%", "7%").replace("未见", "可见").replace("为", "为CT")
        return twins[text]

    monkeypatch.chdir(tmp_path)
    names: dict = {}
    with ChatServer(reply) as server:
        for block in blocks(repo):
            exec(block.replace(ADDRESS, server.ollama), names)
    shown = capsys.readouterr().out
    assert names["report"]["translated"] == 9 and names["report"]["failed"] == 0
    assert "2 of 9 changed" in shown and "negation" in shown
    assert set(models) == {"qwen3:4b", "qwen3:32b"}
    assert [len(read_translations(file)) for file in names["files"]] == [9, 2]
    # one was put right by the larger model, the other stays out
    rejected = (tmp_path / "records-zh" / "rejected.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["id"] for line in rejected] == [rows["id"][0].as_py()]
    chinese = dict(zip(names["chinese"]["caption"], names["chinese"]["caption_zh"], strict=True))
    assert chinese[captions[0]] is None
    assert [chinese[caption] for caption in captions[1:]] == [twins[c] for c in captions[1:]]


def test_what_the_page_says_of_the_check_is_what_its_tests_hold(repo):
    page = " ".join((repo / "docs" / "translate.md").read_text("utf-8").split())
    tests = (repo / "tests" / "test_captions_differences.py").read_text("utf-8")
    for figure in ("2,848", "5 of 45"):
        assert figure in page and figure in tests
