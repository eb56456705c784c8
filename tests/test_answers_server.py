"""medtune.answers.server: a server that fails, dies or talks nonsense costs no answer in silence."""

import contextlib
import http.server
import json
import threading

import pytest
from PIL import Image

from medtune.answers import OpenAIServer, generate_answers, generation_speed, read_answers


class AnswerServer:
    """Speaks OpenAI's API on loopback; `reply(number)` gives a status and a body for each request."""

    def __init__(self, reply):
        self.reply = reply
        self.requests = []
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.owner = self
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    lock = threading.Lock()

    def do_GET(self):
        models = [{"id": name} for name in self.server.owner.reply(0)]
        self.send(200, json.dumps({"data": models}).encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        owner = self.server.owner
        with self.lock:
            owner.requests.append(body)
            status, raw = owner.reply(len(owner.requests))
        self.send(status, raw)

    def send(self, status, raw):
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(raw)

    def log_message(self, *args):
        pass


def said(text="A liver.", tokens=3, reason="stop", **changes):
    choice = {"index": 0, "message": {"content": text}, "finish_reason": reason}
    reply = {"choices": [choice], "usage": {"completion_tokens": tokens}} | changes
    return 200, json.dumps(reply).encode()


def pairs(count):
    return [
        {"id": f"p{i}", "image": Image.new("RGB", (8 + i, 8), (i, 0, 0)), "caption": "A liver."}
        for i in range(count)
    ]


def server_at(url, **options):
    return OpenAIServer(url, "m", **{"pause": 0.01, "retries": 2, **options})


def answer(url, rows, **options):
    server = options.pop("server", None) or server_at(url)
    return generate_answers(server, None, rows, backend="openai", **options)


def test_every_sample_is_asked_with_its_picture():
    with AnswerServer(lambda number: said()) as server:
        answers = answer(server.url, pairs(5), batch_size=2, max_new_tokens=7, top_p=0.9)
    assert [row["id"] for row in answers] == [f"p{i}" for i in range(5)]
    assert {row["answer"] for row in answers} == {"A liver."}
    assert generation_speed(answers)["predict_tokens"] == 15
    assert len(server.requests) == 5
    for request in server.requests:
        assert (request["max_tokens"], request["temperature"], request["top_p"]) == (7, 0, 0.9)
        parts = request["messages"][0]["content"]
        assert parts[0]["image_url"]["url"].startswith("data:image/png;base64,")
        assert parts[1]["text"] == "Describe this medical image."


def test_drawn_answers_have_a_seed_and_a_transform_is_applied():
    with AnswerServer(lambda number: said()) as server:
        answer(server.url, pairs(1), do_sample=True, seed=3, temperature=0.7)
        answer(server.url, pairs(1), image_transform=lambda picture: None)
    drawn, without = server.requests
    assert (drawn["seed"], drawn["temperature"]) == (3, 0.7)
    assert [part["type"] for part in without["messages"][0]["content"]] == ["text"]


def test_a_server_that_is_busy_is_asked_again():
    def reply(number):
        return (503, b"later") if number < 3 else said()

    with AnswerServer(reply) as server:
        assert answer(server.url, pairs(1))[0]["answer"] == "A liver."
    assert len(server.requests) == 3


NONSENSE = {
    "html": (200, b"<html>"),
    "no choices": (200, b'{"choices": []}'),
    "no text": said(text=None),
    "no count of tokens": said(usage={}),
    "filtered": said(reason="content_filter"),
    "refused": (400, b'{"error": {"message": "p0 is a patient"}}'),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_no_answer(name, tmp_path):
    with (
        AnswerServer(lambda number: NONSENSE[name]) as server,
        pytest.raises(ValueError, match="the sample with id p0 is not answered: .*") as error,
    ):
        answer(server.url, pairs(1), out=tmp_path / "answers.jsonl")
    assert "patient" not in str(error.value)
    # a request that is refused would be refused again
    assert len(server.requests) == (1 if name == "refused" else 3)


def test_who_is_not_let_in_is_told_so():
    with (
        AnswerServer(lambda number: (401, b"")) as server,
        pytest.raises(OSError, match="answers 401: give api_key=KEY"),
    ):
        answer(server.url, pairs(1))


def test_a_server_that_dies_costs_one_batch(tmp_path):
    """What was answered stays, and the same call goes on with a server at another address."""
    out = tmp_path / "answers.jsonl"

    def dies(number):
        return said() if number <= 4 else (502, b"")

    with (
        AnswerServer(dies) as first,
        pytest.raises(OSError, match="does not answer .*goes on where it stopped"),
    ):
        answer(first.url, pairs(7), batch_size=2, out=out)
    assert len(read_answers(out)) == 4
    with pytest.raises(OSError, match="the connection is refused, 3 times"):
        answer(first.url, pairs(7), batch_size=2, out=out)
    with AnswerServer(lambda number: said("A spleen.")) as second:
        answers = answer(second.url, pairs(7), batch_size=2, out=out)
    assert len(second.requests) == 3
    assert sorted(row["answer"] for row in answers) == ["A liver."] * 4 + ["A spleen."] * 3
    other = OpenAIServer(second.url, "another model")
    with pytest.raises(ValueError, match="other settings \\(model\\)"):
        answer("", pairs(7), server=other, out=out)


def test_pictures_stay_on_this_machine_unless_they_may_leave():
    with pytest.raises(ValueError, match="is not this machine"):
        answer("http://192.0.2.1/v1", pairs(1))
    with pytest.raises(ValueError, match="with /v1 at its end"):
        answer("http://127.0.0.1:11434", pairs(1))
    with pytest.raises(ValueError, match="takes OpenAIServer"):
        generate_answers("http://127.0.0.1:1/v1", None, pairs(1), backend="openai")


def test_a_server_says_which_model_it_has():
    with AnswerServer(lambda number: ["tuned"]) as server:
        assert OpenAIServer.at(server.url).model == "tuned"
    with (
        AnswerServer(lambda number: ["a", "b"]) as server,
        pytest.raises(ValueError, match="has a, b: give URL#NAME"),
    ):
        OpenAIServer.at(server.url)
    with pytest.raises(OSError, match="does not say which model it has"):
        OpenAIServer.at(server.url)
