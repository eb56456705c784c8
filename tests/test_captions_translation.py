"""Captions translated by a model on this machine: what is asked, kept, refused, and gone on with."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest
from chat_server import ChatServer, Fault

from medtune.captions import add_translations, read_translations, translate_captions
from medtune.records import convert_pairs, read_records


@pytest.fixture(scope="module")
def twins(sample_path) -> dict[str, str]:
    """Forty captions of the sample, and the same in Chinese."""
    table = pyarrow.parquet.read_table(sample_path, columns=["caption", "caption_zh"])
    pairs = zip(table["caption"].to_pylist(), table["caption_zh"].to_pylist(), strict=True)
    return dict(itertools.islice(dict(pairs).items(), 40))


def translate(server, source, out, **options):
    options = {"base_url": server.ollama, "model": "m", "pause": 0.01, "progress": False} | options
    return translate_captions(source, out, **options)


@pytest.mark.parametrize("protocol", ["ollama", "openai"])
def test_a_set_is_translated_in_both_protocols(twins, tmp_path, protocol):
    rows = [{"id": f"a{number}", "caption": text} for number, text in enumerate(twins)]
    rows += [{"id": "again", "caption": rows[0]["caption"]}]
    out = tmp_path / "zh.jsonl"
    with ChatServer(lambda text, number: twins[text]) as server:
        report = translate(
            server, rows, out, base_url=getattr(server, protocol), api_key="secret", model="qwen"
        )
    lines = read_translations(out)
    assert [(line["id"], line["caption"]) for line in lines] == [
        (row["id"], row["caption"]) for row in rows
    ], "in the order of the source, the original beside the translation"
    assert [line["caption_zh"] for line in lines] == [twins[row["caption"]] for row in rows]
    assert all(line["differences"] == [] for line in lines)
    counts = {"rows": 41, "translated": 41, "already": 0, "failed": 0, "asked": 40, "changed": 0}
    assert counts.items() <= report.items()

    assert len(server.requests) == 40, "equal captions are asked once"
    request = server.requests[0]
    path = {"ollama": "/api/chat", "openai": "/v1/chat/completions"}[protocol]
    assert request["path"] == path and request["model"] == "qwen" and request["stream"] is False
    assert request["headers"]["Authorization"] == "Bearer secret"
    assert (request.get("options") or request)["temperature"] == 0
    assert "Simplified Chinese" in request["messages"][0]["content"]


def test_the_same_call_goes_on_and_asks_for_nothing_twice(twins, tmp_path):
    captions = list(twins)
    out = tmp_path / "new" / "zh.jsonl"
    with ChatServer(lambda text, number: twins[text]) as server:
        translate(server, captions[:15], out)
        whole = out.read_bytes()
        out.write_bytes(whole[:-40])  # a kill while the last line was written
        report = translate(server, captions, out)
        assert report["kept"] == 14 and report["translated"] == 40
        assert sorted(server.captions) == sorted([*captions, captions[14]])
        asked = len(server.requests)
        assert translate(server, captions, out)["kept"] == 40
        assert len(server.requests) == asked
        # a part of the source leaves the others where they are
        assert translate(server, captions[:5], out)["translated"] == 5
        assert len(read_translations(out)) == 40
    with pytest.raises(ValueError, match="made with another model: delete it or choose another"):
        translate(server, captions, out, model="larger")


SCRIPT = """
import sys
from medtune.captions import translate_captions
texts = open(sys.argv[1], encoding="utf-8").read().splitlines()
translate_captions(texts, sys.argv[2], base_url=sys.argv[3], model="m", progress=False)
"""


def test_a_kill_costs_no_more_than_what_is_under_way(twins, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(twins), "utf-8")
    out = tmp_path / "zh.jsonl"
    with ChatServer(lambda text, number: Fault(words=twins[text], late=0.02)) as server:
        command = [sys.executable, "-c", SCRIPT, str(texts), str(out), server.ollama]
        for goal in (5, 20):
            process = subprocess.Popen(command)
            while not out.exists() or out.read_bytes().count(b"\n") < goal:
                assert process.poll() is None
                time.sleep(0.005)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        subprocess.run(command, check=True)
        # each kill may have lost what four workers had asked for, and what waited to be written
        assert 40 <= len(server.requests) <= 40 + 2 * (4 + 4 + 1)
    lines = read_translations(out)
    assert [line["caption_zh"] for line in lines] == list(twins.values())
    assert not list(tmp_path.glob("*.part"))


def test_ctrl_c_does_not_wait_for_a_reply(twins, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(twins), "utf-8")
    out = tmp_path / "zh.jsonl"

    def reply(text, number):
        return Fault(words=twins[text], late=0.0 if number <= 3 else 60.0)

    with ChatServer(reply) as server:
        command = [sys.executable, "-c", SCRIPT, str(texts), str(out), server.ollama]
        process = subprocess.Popen(command, stderr=subprocess.PIPE)
        while not out.exists() or out.read_bytes().count(b"\n") < 3:
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert b"KeyboardInterrupt" in errors and len(read_translations(out)) == 3


def test_two_calls_do_not_write_one_file(twins, tmp_path):
    out = tmp_path / "zh.jsonl"
    begun = threading.Event()

    def reply(text, number):
        begun.set()
        return Fault(words=twins[text], late=0.5)

    with ChatServer(reply) as server:
        captions = list(twins)[:4]
        thread = threading.Thread(target=translate, args=(server, captions, out))
        thread.start()
        begun.wait(10)
        with pytest.raises(ValueError, match="is being written by another call"):
            translate(server, captions, out)
        thread.join()
        assert translate(server, captions, out)["kept"] == 4


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=429, headers={"Retry-After": "0.05"}),
        Fault(status=429, headers={"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}),
        Fault(status=500),
        Fault(status=503, raw=b"<html>busy</html>"),
        Fault(drop=True),
        Fault(missing=100, words="囊肿。"),
        Fault(raw=b'{"message": {"role": "assistant", "content": "\xe5\x9b'),
        Fault(raw=b"{}"),
        Fault(raw=b"[]"),
        Fault(raw=b'{"message": {"content": null}}'),
        Fault(raw=b'{"error": "the runner has ended"}'),
        Fault(raw=b""),
        Fault(late=1.0, words="囊肿。"),
        Fault(drip=0.05, words="囊肿。"),
        Fault(cut_short=True, words="左肾可见"),
        "",
        "A 14 mm cyst in the left kidney.",
        "左肾" * 400,
    ],
    ids=lambda fault: repr(fault)[:60],
)
@pytest.mark.parametrize("protocol", ["ollama", "openai"])
def test_a_fault_is_asked_again(tmp_path, fault, protocol):
    good = "左肾可见14毫米囊肿。"
    with ChatServer(lambda text, number: fault if number == 1 else good) as server:
        report = translate(
            server,
            ["A 14 mm cyst in the left kidney."],
            tmp_path / "zh.jsonl",
            base_url=getattr(server, protocol),
            timeout=0.4,
        )
    assert report["translated"] == 1 and report["failed"] == 0 and len(server.requests) == 2
    assert read_translations(tmp_path / "zh.jsonl")[0]["caption_zh"] == good


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault(status=500), "the endpoint answers 500"),
        (Fault(status=400, raw=b'{"error": "Mrs Smith is too long"}'), "the endpoint answers 400"),
        (Fault(drop=True), "the connection was lost"),
        (Fault(raw=b"{"), "the reply is not of this protocol"),
        (Fault(late=0.3), "no answer within 0.1 s"),
        (Fault(cut_short=True, words="囊"), "the answer was cut short"),
        ("I am sorry.", "the answer is not in Simplified Chinese (简体中文)"),
        (" ", "the answer is empty"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_stays_wrong_is_counted_and_named(tmp_path, fault, reason):
    rows = [
        {"id": "good", "caption": "A mass."},
        {"id": "bad", "caption": "A cyst of Jane Smith."},
        {"id": "empty", "caption": "  "},
        {"id": "none", "caption": None},
        {"id": "bad too", "caption": "A cyst of Jane Smith."},
        {"id": "chinese", "caption": "脾脏可见囊肿。"},
    ]
    out = tmp_path / "zh.jsonl"
    with ChatServer(lambda text, number: fault if "cyst" in text else "肿块。") as server:
        report = translate(server, rows, out, retries=1, timeout=0.1 if "0.1" in reason else 5)
        assert report["reasons"] == {reason: 2, "the caption is empty": 2}
        assert (report["rows"], report["failed"]) == (6, 4)
        assert (report["translated"], report["already"]) == (1, 1)
        failed = Path(report["failed_file"])
        named = [json.loads(line) for line in failed.read_text("utf-8").splitlines()]
        assert [line["id"] for line in named] == ["bad", "empty", "none", "bad too"]
        assert named[0] == {"row": 1, "id": "bad", "reason": reason}
        assert "Smith" not in failed.read_text("utf-8") + repr(report)
        # the next call asks again for what failed, and for nothing else
        asked = len(server.requests)
        server.reply = lambda text, number: "简·史密斯的囊肿。"
        report = translate(server, rows, out)
        assert len(server.requests) == asked + 1 and report["failed"] == 2
        server.reply = lambda text, number: pytest.fail("nothing is left to ask")
        report = translate(server, [row for row in rows if (row["caption"] or "").strip()], out)
        assert report["failed"] == 0 and report["failed_file"] is None and not failed.exists()


def test_a_server_that_dies_ends_the_call_and_nothing_is_lost(twins, tmp_path):
    out = tmp_path / "zh.jsonl"
    captions = list(twins)

    def reply(text, number):
        return twins[text] if number <= 12 else Fault(drop=True)

    with ChatServer(reply) as server, pytest.raises(OSError, match="stopped answering") as error:
        translate(server, captions, out, workers=2, retries=1)
    assert "\n" not in str(error.value)
    assert len(read_translations(out)) == 12
    with pytest.raises(OSError, match=r"nothing listens at http://127\.0\.0\.1:\d+/api/chat"):
        translate(server, captions, out)
    with ChatServer(lambda text, number: twins[text]) as server:
        assert translate(server, captions, out)["kept"] == 12
        assert len(server.requests) == 28


@pytest.mark.parametrize(
    ("status", "protocol", "advice"),
    [
        (404, "ollama", "answers 404: pull the model .ollama pull m., or, if this is not Ollama"),
        (404, "openai", "answers 404: is a model called m served there"),
        (401, "openai", "answers 401: give api_key=KEY"),
        (307, "openai", "answers 307: it sends what it is asked on to another address"),
    ],
)
def test_what_no_caption_would_get_past_ends_the_call(tmp_path, status, protocol, advice):
    with ChatServer(lambda text, number: "never") as other:
        headers = {"Location": f"{other.openai}/chat/completions"}
        with (
            ChatServer(lambda text, number: Fault(status=status, headers=headers)) as server,
            pytest.raises(OSError, match=advice),
        ):
            captions = [f"A mass of {size} mm." for size in range(50)]
            translate(server, captions, tmp_path / "x", base_url=getattr(server, protocol))
        assert not other.requests, "a caption was carried on"
    assert len(server.requests) <= 4


@pytest.mark.parametrize(
    "address",
    [
        "http://example.org/v1",
        "https://127.0.0.1.example.org/v1",
        "http://localhost.example.org",
        "http://0.0.0.0:11434",
        "http://192.168.1.4:11434",
        "http://[2001:db8::1]/v1",
        "http://ollama:11434",
    ],
)
def test_captions_do_not_leave_this_machine_by_mistake(tmp_path, address):
    with pytest.raises(
        ValueError, match="is not this machine, and what it is asked would leave it"
    ):
        translate_captions(["A mass."], tmp_path / "zh.jsonl", base_url=address, model="m")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "address",
    [
        "localhost:11434",
        "ftp://127.0.0.1",
        "http://127.0.0.1@example.org/v1",
        "http://127.0.0.1:99999",
        "http://",
        "",
        "http://127.0.0.1/v1?key=1",
    ],
)
def test_what_is_no_address_is_refused(tmp_path, address):
    with pytest.raises(ValueError, match="is no address: give http://localhost:11434"):
        translate_captions(["A mass."], tmp_path / "zh.jsonl", base_url=address, model="m")


def test_a_proxy_of_the_environment_gets_no_captions(tmp_path, monkeypatch):
    def reply(text, number):
        return "肿块。"

    with ChatServer(reply) as server, ChatServer(reply) as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.ollama)
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        translate(server, ["A mass."], tmp_path / "zh.jsonl")
        assert not proxy.requests and len(server.requests) == 1


def test_other_machines_are_asked_if_the_caller_says_so(tmp_path, monkeypatch):
    """A name that leads here stands for another machine: no machine is reached by a test."""
    with ChatServer(lambda text, number: "肿块。") as server:
        monkeypatch.setenv("http_proxy", server.ollama)
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        address = "http://translator.invalid:8000/v1"
        # as a proxy it is asked for a whole address, which it does not know
        with pytest.raises(OSError, match=f"{address}/chat/completions answers 404"):
            translate(server, ["A mass."], tmp_path / "x", base_url=address, allow_remote=True)
        (request,) = server.requests
        assert request["path"] == f"{address}/chat/completions"


def test_a_translation_that_changed_something_is_asked_for_once_more(tmp_path):
    wrong, right = "右肾可见14毫米囊肿。", "左肾可见14毫米囊肿。"
    caption = "A 14 mm cyst in the left kidney."
    with ChatServer(lambda text, number: wrong if number == 1 else right) as server:
        report = translate(server, [caption], tmp_path / "a.jsonl")
    assert report["changed"] == 0 and len(server.requests) == 2
    said = server.requests[1]["messages"]
    assert said[2] == {"role": "assistant", "content": wrong}
    assert "it lost left and it added right" in said[3]["content"]

    worse = "右肾可见囊肿。"
    with ChatServer(lambda text, number: wrong if number == 1 else worse) as server:
        report = translate(server, [caption], tmp_path / "b.jsonl")
    (line,) = read_translations(tmp_path / "b.jsonl")
    assert line["caption_zh"] == wrong, "the better of two is kept"
    assert line["differences"] == ["side", "structure"] and len(server.requests) == 2
    assert report["changed"] == 1 and report["kinds"] == {"side": 1, "structure": 1}


def test_what_models_put_around_a_translation_is_taken_off(tmp_path):
    wrapped = '<think>left…\n</think>\n\n```text\n"左肾可见囊肿。"\n```'
    with ChatServer(lambda text, number: wrapped) as server:
        translate(server, ["A cyst in the left kidney."], tmp_path / "zh.jsonl")
    assert read_translations(tmp_path / "zh.jsonl")[0]["caption_zh"] == "左肾可见囊肿。"
    with ChatServer(lambda text, number: " “A cyst in the left kidney.” ") as server:
        report = translate(server, ["左肾可见囊肿。"], tmp_path / "en.jsonl", to="en")
    (line,) = read_translations(tmp_path / "en.jsonl")
    assert line["caption_en"] == "A cyst in the left kidney." and report["translated"] == 1


def test_several_captions_in_one_request(twins, tmp_path):
    captions = list(twins)

    def reply(text, number):
        if not text.startswith("{"):
            return twins[text]
        asked = json.loads(text)
        answer = {key: twins[caption] for key, caption in asked.items()}
        if number == 1:
            # the model mixes two captions up, and forgets one
            answer["1"], answer["2"] = answer["2"], answer["1"]
            del answer["3"]
        return "Here it is:\n" + json.dumps(answer, ensure_ascii=False)

    with ChatServer(reply) as server:
        report = translate(server, captions, tmp_path / "zh.jsonl", batch_size=8, workers=1)
    assert report["translated"] == 40 and report["changed"] == 0
    assert len(server.requests) == 5 + 3, "only what was mixed up or forgotten is asked for alone"
    lines = read_translations(tmp_path / "zh.jsonl")
    assert [line["caption_zh"] for line in lines] == list(twins.values())

    with ChatServer(lambda text, n: "no" if text.startswith("{") else twins[text]) as server:
        assert translate(server, captions[:8], tmp_path / "b", batch_size=4)["translated"] == 8
        assert len(server.requests) == 2 + 8


def test_pairs_are_translated_and_converted(twins, sample_path, tmp_path):
    table = pyarrow.parquet.read_table(sample_path, columns=["image", "id", "caption", "group"])
    texts = table["caption"].to_pylist()
    table = table.take([texts.index(caption) for caption in itertools.islice(twins, 6)])
    pairs = datasets.Dataset(table).cast_column("image", datasets.Image())
    wanted = [twins[caption] for caption in pairs["caption"][:]]
    mixed_up = pairs["caption"][0]

    def reply(text, number):
        return twins[text].replace("右", "左") if text == mixed_up else twins[text]

    out = tmp_path / "zh.jsonl"
    with ChatServer(reply) as server:
        translate(server, pairs, out)
    chinese = add_translations(pairs, out)
    assert "左肾" in chinese["caption_zh"][0] and chinese["caption_zh"][1:] == wanted[1:]
    # what it changed is left out, and then comes from a file of corrections
    left_out = add_translations(pairs, out, changed=False)
    assert left_out["caption_zh"][0] is None
    report = convert_pairs(left_out, tmp_path / "a", language="zh", splits=["train"] * 6)
    flagged = [row for row in read_translations(out) if row["differences"]]
    assert report["rejected"] == len(flagged) == 1
    again = tmp_path / "again.jsonl"
    with ChatServer(lambda text, number: twins[text]) as server:
        translate(server, flagged, again, model="larger")
    better = add_translations(pairs, out, again, changed=False)
    assert better["caption_zh"][:] == wanted
    convert_pairs(better, tmp_path / "b", language="zh", splits=["train"] * 6)
    records = read_records(tmp_path / "b", "train")
    answers = [record["completion"][0]["content"] for record in records]
    texts = [part[0]["text"] if isinstance(part, list) else part for part in answers]
    assert sorted(texts) == sorted(wanted)
    # a caption that has changed since has no translation
    changed = pairs.remove_columns("caption").add_column("caption", ["A mass."] * 6)
    assert add_translations(changed, out)["caption_zh"][:] == [None] * 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "fr"}, "to='fr': choose zh or en"),
        ({"model": ""}, "no model is named: give model=NAME"),
        ({"workers": 0}, "workers=0: give 1 or more"),
        ({"batch_size": 0}, "batch_size=0: give 1 or more"),
        ({"retries": -1}, "retries=-1: give 0 or more"),
        ({"timeout": 0}, "timeout=0.*give seconds"),
        ({"source": "A mass."}, "the source is one string: give a list"),
        ({"source": [{"text": "A mass."}]}, "row 0 of the source has no caption"),
        (
            {"source": datasets.Dataset.from_dict({"text": ["A mass."]})},
            "the source has no column caption",
        ),
    ],
)
def test_slips_of_the_caller(tmp_path, options, message):
    options = {"source": ["A mass."], "base_url": "http://localhost:9", "model": "m"} | options
    with pytest.raises(ValueError, match=message):
        translate_captions(options.pop("source"), tmp_path / "zh.jsonl", **options)


def test_a_file_that_is_no_translation_is_named(tmp_path):
    pairs = datasets.Dataset.from_dict({"caption": ["A mass."]})
    out = tmp_path / "zh.jsonl"
    out.write_text('{"some": "json"}\n', "utf-8")
    with pytest.raises(ValueError, match=r"zh\.jsonl, line 1: no translation"):
        add_translations(pairs, out)
    out.write_text('{"id": "0", "caption": "A mass.", "differences": []}\n', "utf-8")
    with pytest.raises(ValueError, match=r"line 1: there is no caption_zh; give to=LANGUAGE"):
        add_translations(pairs, out)
    with pytest.raises(ValueError, match="no file of translations is given"):
        add_translations(pairs)
    with pytest.raises(FileNotFoundError):
        read_translations(tmp_path / "nowhere")


def test_half_a_surrogate_pair_ends_nothing(tmp_path):
    with ChatServer(lambda text, number: "肿块 \ud800 \x00。") as server:
        report = translate(server, ["a mass \ud800 \x00"], tmp_path / "zh.jsonl")
    assert report["translated"] == 1 and len(read_translations(tmp_path / "zh.jsonl")) == 1
