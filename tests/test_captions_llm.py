"""Captions by an LLM: what is asked, checked, asked again and kept, on a real HTTP endpoint."""

import dataclasses
import http.server
import json
import stat
import sys
import threading
import time

import pytest

from medtune import captions
from medtune.captions import parse_caption

ENGLISH = (
    "The image is a computed tomography (CT) scan of the upper abdomen in axial view, shown with a"
    " soft tissue window. The region of interest, located in the upper left of the image, covers"
    " about 4% of its area and shows the spleen. It has soft tissue density and is bordered by the"
    " stomach and the left kidney. "
)
CHINESE = (
    "图像为上腹部的轴位计算机断层扫描（CT），采用软组织窗显示。感兴趣区域位于图像的左上部，"
    "约占图像面积的4%，显示脾脏。其密度为软组织密度，与胃和左肾相邻。"
)
FINDING = "Within it lies a round hypodense lesion of about 14 mm, in its upper part."


class Endpoint:
    """An OpenAI-compatible server on the loopback device.

    `reply(text, number)` answers the request of that number, from 1: with the words of the model,
    with (status, body), or with a float, the seconds to wait.
    """

    def __init__(self):
        self.requests = []
        self.lock = threading.Lock()
        self.reply = answer_by_rules
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.endpoint = self
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def ask(self, texts, **options):
        options = {"base_url": self.url, "model": "m", "retries": 1, **options}
        return captions.extract_with_llm(texts, **options)


def answer_by_rules(text, number):
    """Answer as a perfect model would."""
    return json.dumps(dataclasses.asdict(parse_caption(text)))


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        endpoint = self.server.endpoint
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        request = {"path": self.path, "key": self.headers["Authorization"], **body}
        with endpoint.lock:
            endpoint.requests.append(request)
            number = len(endpoint.requests)
        answer = endpoint.reply(body["messages"][1]["content"], number)
        if isinstance(answer, float):
            time.sleep(answer)
            answer = "late"
        status, raw = answer if isinstance(answer, tuple) else (200, self.completion(answer))
        try:
            self.send_response(status)
            kind = "text/html" if raw.startswith("<") else "application/json"
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(raw.encode())))
            self.end_headers()
            self.wfile.write(raw.encode())
        except OSError:
            pass  # the client has given up

    def completion(self, words):
        """Wrap the words of the model as the API does."""
        message = {"role": "assistant", "content": words}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        reply = {"id": "x", "object": "chat.completion", "created": 0, "model": "m"}
        return json.dumps({**reply, "choices": [choice]})

    def log_message(self, *args):
        pass


@pytest.fixture
def endpoint(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Endpoint()
    thread = threading.Thread(target=server.server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.server.shutdown()
    server.server.server_close()
    thread.join()


def test_llm_reads_captions_in_order_and_equal_ones_once(endpoint):
    texts = [ENGLISH + FINDING, "A cyst in the left kidney.", ENGLISH + FINDING, CHINESE]
    got = endpoint.ask(texts, api_key="secret")
    assert got == [parse_caption(t) for t in texts]
    assert len(endpoint.requests) == 3
    request = endpoint.requests[0]
    assert request["path"] == "/v1/chat/completions"
    assert request["key"] == "Bearer secret"
    assert request["temperature"] == 0
    assert "target_diag" in request["response_format"]["json_schema"]["schema"]["properties"]


def test_llm_words_become_those_of_the_rules(endpoint):
    fields = {
        "modality": "Computed Tomography",
        "structure": "Left renal",
        "finding": "a haematoma",
        "findings": ["x"],
    }
    endpoint.reply = lambda text, number: f"<think>…</think>```json\n{json.dumps(fields)}\n```"
    (got,) = endpoint.ask(["左肾血肿"])
    assert (got.modality, got.structure, got.finding, got.language) == (
        "CT",
        "left kidney",
        "hemorrhage",
        "zh",
    )
    assert got.findings == ["x"]


@pytest.mark.parametrize(
    "nonsense",
    [
        "I am sorry.",
        "{",
        '{"modality": 3}',
        '{"some": "json"}',
        "",
        "[]",
        "null",
        '{"modality": null, "structure": null, "finding": null, "area_share": 7}',
        '{"modality": null, "structure": null, "finding": null, "place": "somewhere"}',
        (200, "<html>busy</html>"),
        (200, "{}"),
        (200, '{"choices": []}'),
        (200, "not json"),
        (500, "{}"),
    ],
)
def test_nonsense_then_a_proper_answer(endpoint, nonsense):
    proper = endpoint.reply
    endpoint.reply = lambda text, number: nonsense if number == 1 else proper(text, number)
    assert endpoint.ask([ENGLISH]) == [parse_caption(ENGLISH)]
    assert len(endpoint.requests) == 2
    if isinstance(nonsense, str):
        assert "refused" in endpoint.requests[1]["messages"][2]["content"]


def test_nonsense_for_ever(endpoint, tmp_path):
    proper = endpoint.reply
    endpoint.reply = lambda text, number: "no" if "cyst" in text else proper(text, number)
    texts = ["A mass.", "A secret cyst of Mrs Smith.", "A stone."]
    with pytest.raises(ValueError, match=r"^text 1: m was refused 2 times") as error:
        endpoint.ask(texts, cache_dir=tmp_path)
    assert "\n" not in str(error.value) and "Smith" not in str(error.value)
    got = endpoint.ask(texts, cache_dir=tmp_path, strict=False)
    assert [g and g.finding for g in got] == ["mass", None, "stone"]
    endpoint.reply = proper
    asked_before = len(endpoint.requests)
    # a refused answer is not kept, the other two are
    assert endpoint.ask(texts, cache_dir=tmp_path)[1].finding == "cyst"
    assert len(endpoint.requests) == asked_before + 1


def test_timeout(endpoint):
    endpoint.reply = lambda text, number: 2.0
    with pytest.raises(TimeoutError, match=r"did not answer within 0\.2 s, 2 times"):
        endpoint.ask(["A mass."], timeout=0.2)
    assert len(endpoint.requests) == 2


def test_endpoint_that_refuses_or_is_gone(endpoint):
    endpoint.reply = lambda text, number: (404, '{"error": {"message": "model m not found"}}')
    with pytest.raises(OSError, match="NotFoundError.*model m not found"):
        endpoint.ask(["A mass."])
    with pytest.raises(OSError, match="APIConnectionError"):
        endpoint.ask(["A mass."], base_url="http://127.0.0.1:9/v1", retries=0)


def test_cache_resumes_where_it_stopped(endpoint, tmp_path):
    proper = endpoint.reply
    texts = [f"A nodule of {i} mm." for i in range(12)]
    endpoint.reply = lambda text, number: (
        proper(text, number) if number <= 5 else (400, '{"error": "stop"}')
    )
    with pytest.raises(OSError, match="BadRequestError"):
        endpoint.ask(texts, cache_dir=tmp_path / "cache", workers=1)
    kept = sorted((tmp_path / "cache").iterdir())
    assert len(kept) == 5
    for file in kept:
        assert file.suffix == ".json" and json.loads(file.read_text())
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, "an answer is for its owner only"
    endpoint.requests.clear()
    endpoint.reply = proper
    got = endpoint.ask(texts, cache_dir=tmp_path / "cache")
    assert [g.size_mm for g in got] == list(range(12))
    assert len(endpoint.requests) == 7
    kept[0].write_text(kept[0].read_text()[:20])  # a damaged file is asked again, and only that one
    assert endpoint.ask(texts, cache_dir=tmp_path / "cache") == got
    assert len(endpoint.requests) == 8
    assert len(list((tmp_path / "cache").iterdir())) == 12  # no temporary file is left
    endpoint.ask(texts[:1], cache_dir=tmp_path / "cache", model="another")
    assert len(endpoint.requests) == 9


def test_texts_that_json_cannot_carry(endpoint, tmp_path):
    assert endpoint.ask(["a mass \ud800 \x00"], cache_dir=tmp_path)[0].finding == "mass"


@pytest.mark.parametrize(
    "options", [{}, {"base_url": "http://x"}, {"model": "m"}, {"base_url": "x:1", "model": "m"}]
)
def test_nothing_is_asked_when_no_endpoint_is_configured(options):
    with pytest.raises(
        ValueError, match="^no LLM endpoint is configured: pass base_url.* and model$"
    ):
        captions.extract_with_llm(["A mass."], **options)


def test_captions_stay_on_this_machine_unless_they_may_leave_it():
    with pytest.raises(ValueError, match="allow_remote=True if they may"):
        captions.extract_with_llm(["A mass."], base_url="http://192.0.2.1/v1", model="m")


def test_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match="pip install openai"):
        captions.extract_with_llm(["A mass."], base_url="http://127.0.0.1:9/v1", model="m")
