"""medtune.deploy.serve: a real client is answered, a stranger is not, and nothing is left running."""

import importlib.util
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from PIL import Image

from medtune import chat, cli, deploy
from medtune.answers import OpenAIServer, generate_answers
from medtune.files import data_url
from medtune.models import load_base, load_processor
from medtune.pairs import load_pairs

MISSING = [n for n in ("xllamacpp", "gguf", "conversion") if importlib.util.find_spec(n) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (extra gguf)"),
]
PASSWORD = "of the tests"


@pytest.fixture(scope="module")
def exported(tiny_vlm, tmp_path_factory) -> deploy.Exported:
    folder = tmp_path_factory.mktemp("export") / "tiny"
    return deploy.export_gguf(tiny_vlm, folder, ("f16",), question="What is shown?")


@pytest.fixture(scope="module")
def served(exported):
    with deploy.serve(exported, password=PASSWORD) as server:
        yield server


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=served.address, api_key=PASSWORD, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def rows(sample_path) -> list[dict]:
    pairs = load_pairs(sample_path, split="test", limit=60)
    return [{**pairs[i], "question": "Where is it?"} for i in (0, 29, 59)]


def question(picture: Image.Image | None = None, text: str = "Where is it?") -> list[dict]:
    parts = [{"type": "text", "text": text}]
    if picture is not None:
        parts.insert(0, {"type": "image_url", "image_url": {"url": data_url(picture)}})
    return [{"role": "user", "content": parts}]


def test_the_client_of_openai_is_answered(client, rows):
    assert [model.id for model in client.models.list()] == ["tiny"]
    options = {"model": "tiny", "temperature": 0, "max_tokens": 12}
    messages = question(rows[0]["image"])
    reply = client.chat.completions.create(messages=messages, logprobs=True, **options)
    assert reply.model == "tiny" and 0 < reply.usage.completion_tokens <= 12
    assert reply.choices[0].logprobs.content[0].logprob <= 0
    stream = client.chat.completions.create(
        messages=messages, stream=True, stream_options={"include_usage": True}, **options
    )
    events = list(stream)
    text = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
    assert text == reply.choices[0].message.content
    assert events[-1].usage.completion_tokens == reply.usage.completion_tokens
    assert {event.model for event in events} == {"tiny"}


def test_what_is_refused_has_a_status_and_a_reason(client, served):
    options = {"model": "tiny", "max_tokens": 4}
    with pytest.raises(openai.NotFoundError, match="is called tiny"):
        client.chat.completions.create(model="gpt-9", messages=question())
    with pytest.raises(openai.BadRequestError, match="only the chat template"):
        client.chat.completions.create(messages=question(text="a<__media__>"), **options)
    with pytest.raises(openai.BadRequestError, match="exceeds the available context"):
        client.chat.completions.create(messages=question(text="x " * 9000), **options)
    with pytest.raises(openai.BadRequestError, match="exceeds the available context"):
        messages = question(text="x " * 9000)
        list(client.chat.completions.create(messages=messages, stream=True, **options))
    address = f"{served.address}/chat/completions"
    headers = {"Authorization": f"Bearer {PASSWORD}"}
    assert httpx.post(address, content="{}", headers=headers).status_code == 415
    large = httpx.post(address, content=b" " * 65_000_000, headers=headers | JSON)
    assert large.status_code == 413
    assert httpx.post(address, content="{", headers=headers | JSON).status_code == 400


JSON = {"Content-Type": "application/json"}


def test_strangers_are_kept_out(served):
    with (
        openai.OpenAI(base_url=served.address, api_key="guess", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()
    assert httpx.post(f"{served.address}/chat/completions", json={}).status_code == 401
    # a web page whose name was made to lead here
    health = served.address.replace("/v1", "/health")
    assert httpx.get(health).status_code == 200
    assert httpx.get(health, headers={"Host": "evil.example"}).status_code == 400
    # llama.cpp itself listens on loopback, and answers only who knows its key
    engine = served.answers.engine
    behind = f"http://127.0.0.1:{engine.address.port}/v1/chat/completions"
    assert httpx.post(behind, json={"messages": []}).status_code == 401
    assert engine.key not in " ".join(psutil.Process(engine.process.pid).cmdline())


def test_it_does_not_serve_others_unguarded(exported):
    with pytest.raises(ValueError, match="set a password of at least 8 characters"):
        deploy.serve(exported, host="0.0.0.0")
    with pytest.raises(ValueError, match="without TLS the network can read"):
        deploy.serve(exported, host="0.0.0.0", password=PASSWORD)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1, port {port}"):
            deploy.serve(exported, port=port)


def test_generate_answers_and_the_page_ask_it(served, rows, tmp_path, monkeypatch):
    server = OpenAIServer(served.address, served.model, api_key=PASSWORD, parallel=2)
    options = {"backend": "openai", "max_new_tokens": 12}
    answers = generate_answers(server, None, rows, out=tmp_path / "a.jsonl", **options)
    monkeypatch.setenv("MEDTUNE_SERVE_PASSWORD", PASSWORD)
    models = chat.load_models(served.address)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}]
    messages[0]["content"][1]["text"] = rows[0]["question"]
    picture = rows[0]["image"]
    (said,) = chat.answer(models, "base", messages, [picture], max_new_tokens=12)
    assert (said.text, said.tokens) == (answers[0]["answer"], answers[0]["tokens"])
    with pytest.raises(ValueError, match="only another server can stand beside it"):
        chat.load_models(served.address, "an/adapter")


@pytest.mark.timeout(400)
def test_the_page_of_a_served_model_answers_in_a_browser(
    served, rows, tmp_path, monkeypatch, chromium
):
    monkeypatch.setenv("MEDTUNE_SERVE_PASSWORD", PASSWORD)
    page = chat.launch(chat.load_models(served.address), feedback=tmp_path, examples=[])
    rows[0]["image"].convert("RGB").save(tmp_path / "picture.png")
    tab = chromium.new_page()
    try:
        tab.set_default_timeout(60_000)
        tab.goto(page.local_url)
        tab.wait_for_selector("#question textarea")
        tab.set_input_files("#files input[type=file]", str(tmp_path / "picture.png"))
        tab.wait_for_selector("#gallery img")
        tab.fill("#question textarea", "Where is it?")
        tab.locator("button.primary").click()
        tab.locator("#base .bot.message em").wait_for()
        said = tab.locator("#base .bot.message").last.inner_text()
    finally:
        tab.close()
        page.close()
    server = OpenAIServer(served.address, served.model, api_key=PASSWORD)
    asked = generate_answers(server, None, rows[:1], backend="openai", max_new_tokens=160)
    assert said.startswith(" ".join(asked[0]["answer"].split()[:3]))


def test_it_is_served_as_https_with_a_password(exported, tmp_path):
    openssl = shutil.which("openssl")
    if not openssl:
        pytest.skip("needs openssl to make a certificate")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    request = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key]
    request += ["-out", cert, "-subj", "/CN=here", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(request, check=True, capture_output=True)
    options = {"password": PASSWORD, "tls_cert": cert, "tls_key": key}
    with deploy.serve(exported, **options) as server:
        address = server.address
        assert address.startswith("https://127.0.0.1:")
        context = ssl.create_default_context(cafile=cert)
        assert httpx.get(f"{address}/models", verify=context).status_code == 401
        headers = {"Authorization": f"Bearer {PASSWORD}"}
        assert httpx.get(f"{address}/models", headers=headers, verify=context).status_code == 200


def test_a_run_is_served_by_its_name(exported, tmp_path, capsys):
    (tmp_path / "notebooks").mkdir()
    out = tmp_path / "papermill_runs" / "mine" / "out"
    out.mkdir(parents=True)
    with pytest.raises(SystemExit):
        cli.main(["serve", "mine", "--root", str(tmp_path)])
    assert "neither an export (notebook 14) nor a merged model" in capsys.readouterr().err
    (out / "14_out_of_the_notebook").mkdir()
    (out / "14_out_of_the_notebook" / "gguf").symlink_to(exported.folder)
    with pytest.raises(SystemExit):
        cli.main(["serve", "mine", "--root", str(tmp_path), "--type", "q4"])
    assert "--type q4" in capsys.readouterr().err


def test_the_command_exports(tiny_vlm, tmp_path, capsys):
    out = tmp_path / "gguf"
    with pytest.raises(SystemExit) as end:
        cli.main(["export", str(tiny_vlm), str(out), "--type", "f16"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert "model-f16.gguf" in said and "not proven" in said


def test_a_model_of_transformers_is_served_too(tiny_vlm, rows):
    with deploy.serve(tiny_vlm) as server:
        options = {"max_new_tokens": 12}
        served = generate_answers(
            OpenAIServer(server.address, server.model), None, rows[:2], backend="openai", **options
        )
        with openai.OpenAI(base_url=server.address, api_key="x", max_retries=0) as client:
            asked = {"model": server.model, "messages": question(), "max_tokens": 3}
            events = list(client.chat.completions.create(stream=True, **asked))
            assert events[-1].choices[0].finish_reason in ("stop", "length")
            with pytest.raises(openai.BadRequestError, match="only a GGUF file"):
                client.chat.completions.create(logprobs=True, **asked)
    alone = generate_answers(load_base(tiny_vlm), load_processor(tiny_vlm), rows[:2], **options)
    assert [row["answer"] for row in served] == [row["answer"] for row in alone]


# ---- the end


def start(folder: Path) -> tuple[subprocess.Popen, psutil.Process, str]:
    """Start the command; return it, its llama.cpp, and the address."""
    command = [Path(sys.executable).with_name("medtune"), "serve", folder, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    assert " at http" in line, process.stderr.read()
    (engine,) = psutil.Process(process.pid).children()
    return process, engine, line.split(" at ")[1].split()[0]


def gone(process: psutil.Process) -> bool:
    """Wait until a process has ended; one whose parent is dead may stay as a zombie."""
    for _ in range(600):
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_all_of_it(exported, name):
    process, engine, address = start(exported.folder)
    models = httpx.get(f"{address}/models").json()
    assert models["data"][0]["id"] == "tiny"
    process.send_signal(getattr(signal, name))
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0
    assert said.count("\n") == 1 and "is not proven" in said
    assert gone(engine)


def test_llama_cpp_ends_with_who_started_it(exported):
    """Also when that is killed and can clear up nothing."""
    process, engine, _ = start(exported.folder)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert gone(engine)


def test_the_command_ends_in_one_line_when_llama_cpp_dies(exported):
    process, engine, address = start(exported.folder)
    engine.kill()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "medtune: llama.cpp ended by itself" in said and "Traceback" not in said
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{address}/models")


def test_an_answer_that_is_cut_off_is_an_error(exported, rows):
    """llama.cpp dies between two questions of a run: what was answered stays."""
    server = deploy.serve(exported)
    asked = OpenAIServer(server.address, server.model, pause=0.01, retries=1)
    try:
        generate_answers(asked, None, rows[:1], backend="openai", max_new_tokens=3)
        server.answers.engine.process.kill()
        server.answers.engine.process.wait()
        with pytest.raises(OSError, match="answers 503"):
            generate_answers(asked, None, rows[1:], backend="openai", max_new_tokens=3)
    finally:
        server.close()
