"""Models and data sets of ModelScope: by its own package, from a loopback server and its cache."""

import hashlib
import json
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import pytest
from shards import json_lines, pair, write_shard

from medtune import models
from medtune.modelscope import fetch_dataset, fetch_model
from medtune.pairs import load_pairs

pytest.importorskip("modelscope", reason="the extra [modelscope] is not installed")
from modelscope_hub import config  # noqa: E402 - not there without the extra


class Site(ThreadingHTTPServer):
    """Speaks what the package asks ModelScope for: lists of files, and files.

    Attributes
    ----------
    folders : the folder of each repository, by "models/OWNER/NAME" or "datasets/OWNER/NAME".
    asked : the files that were fetched.
    paths : all that was asked for.
    refused : the status with which every question is answered, if it is not 0.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folders: dict[str, Path] = {}
        self.asked: list[str] = []
        self.paths: list[str] = []
        self.refused = 0


class Answer(BaseHTTPRequestHandler):
    """Answers one request."""

    server: Site

    def log_message(self, *args) -> None:
        """Say nothing on stderr."""

    def do_GET(self) -> None:
        """Give a list of files, or a file."""
        address = urlparse(self.path)
        self.server.paths.append(address.path)
        asked = {name: values[0] for name, values in parse_qs(address.query).items()}
        words = address.path.removeprefix("/api/v1/").split("/")
        folder = self.server.folders.get("/".join(words[:3]))
        if self.server.refused:
            self.say(self.server.refused, {"Message": "no"})
        elif folder is None:
            self.say(404, {"Message": "not found"})
        elif "FilePath" in asked:
            self.server.asked.append(asked["FilePath"])
            self.send(200, (folder / asked["FilePath"]).read_bytes(), "application/octet-stream")
        elif words[3:4] == ["repo"]:
            self.say(200, {"Code": 200, "Success": True, "Data": {"Files": self.files_of(folder)}})
        else:
            self.say(200, {"Code": 200, "Success": True, "Data": {}})

    def files_of(self, folder: Path) -> list[dict]:
        """List the files of a repository."""
        files = []
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                content = file.read_bytes()
                digest = hashlib.sha256(content).hexdigest()
                name = str(file.relative_to(folder))
                files.append({"Path": name, "Type": "blob", "Size": len(content), "Sha256": digest})
        return files

    def say(self, status: int, answer: dict) -> None:
        self.send(status, json.dumps(answer).encode(), "application/json")

    def send(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A ModelScope of one's own, and an empty cache."""
    site = Site()
    thread = threading.Thread(target=site.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", f"http://127.0.0.1:{site.server_port}")
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "home"))
    for switch in ("MODELSCOPE_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(switch, raising=False)
    # the package reads its environment once
    config.set_default_config(None)
    yield site
    config.set_default_config(None)
    site.shutdown()
    site.server_close()
    thread.join()


def offline(site: Site, monkeypatch) -> None:
    """Switch the site off, as for one without a connection."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    site.refused = 500


def put_pairs(site: Site, folder: Path) -> None:
    """Put a set of two folders on the site, with code that nobody wants."""
    for part, count in {"demo": 3, "full": 5}.items():
        (folder / part).mkdir(parents=True)
        rows = [pair(number, id=f"{part}-{number}") for number in range(count)]
        write_shard(folder / part / "train-00000-of-00001.parquet", rows)
    (folder / "loader.py").write_text("raise SystemExit('code was run')")
    site.folders["datasets/some/pairs"] = folder


def test_a_set_is_fetched_once_and_then_taken_from_the_cache(site, tmp_path, monkeypatch):
    put_pairs(site, tmp_path / "set")
    found = load_pairs("modelscope:some/pairs:demo")
    assert found["id"][:] == ["demo-0", "demo-1", "demo-2"]
    assert site.asked == ["demo/train-00000-of-00001.parquet"], "the other folder stays there"
    assert load_pairs("modelscope:some/pairs", config="full", limit=2)["id"][:] == [
        "full-0",
        "full-1",
    ]
    assert not list((tmp_path / "cache").rglob("*.py")), "code is not fetched"

    assert not [path for path in site.paths if "some/pairs" not in path], "nothing else is asked"

    fetched = list(site.asked)
    offline(site, monkeypatch)
    again = load_pairs("modelscope:some/pairs:demo", streaming=True)
    assert [row["id"] for row in again] == found["id"][:]
    assert site.asked == fetched


@pytest.mark.slow
def test_no_connection_is_the_cache_or_one_line(site, tmp_path, monkeypatch):
    put_pairs(site, tmp_path / "set")
    load_pairs("modelscope:some/pairs:demo")
    # nobody listens there; the package tries for some seconds
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    config.set_default_config(None)
    assert len(load_pairs("modelscope:some/pairs:demo")) == 3
    offline(site, monkeypatch)
    with pytest.raises(ConnectionError, match=r"^modelscope:some/other is not in .*ENDPOINT"):
        load_pairs("modelscope:some/other")


def test_a_half_download_is_not_taken_for_the_set(site, tmp_path, monkeypatch):
    put_pairs(site, tmp_path / "set")
    folder = Path(fetch_dataset("modelscope:some/pairs"))
    (folder / "demo" / "train-00001-of-00002.parquet.incomplete").write_bytes(b"PAR1")
    offline(site, monkeypatch)
    with pytest.raises(ConnectionError, match="half downloaded"):
        load_pairs("modelscope:some/pairs")


def test_what_modelscope_refuses_is_one_line(site, tmp_path):
    put_pairs(site, tmp_path / "set")
    with pytest.raises(FileNotFoundError, match="ModelScope has no dataset some/thing"):
        load_pairs("modelscope:some/thing")
    with pytest.raises(ValueError, match="modelscope:some/pairs has no folder huge: name one"):
        load_pairs("modelscope:some/pairs:huge")
    with pytest.raises(ValueError, match="modelscope:pairs is no name on ModelScope"):
        load_pairs("modelscope:pairs")
    site.refused = 403
    with pytest.raises(PermissionError, match="ModelScope refuses modelscope:some/gated"):
        fetch_model("modelscope:some/gated")


def test_a_model_is_loaded_by_its_name(site, tmp_path, tiny_vlm, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(tiny_vlm, folder)
    (folder / "modeling_evil.py").write_text("raise SystemExit('code was run')")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    site.folders["models/some/model"] = folder
    name = "modelscope:some/model"
    assert models.load_processor(name).chat_template
    offline(site, monkeypatch)
    model = models.load_base(name)
    assert model.name_or_path == name, "an adapter names it so"
    assert model.num_parameters() == models.load_base(tiny_vlm).num_parameters()
    assert not {"modeling_evil.py", "pytorch_model.bin"} & set(site.asked)
    assert "model.safetensors" in site.asked


@pytest.mark.parametrize("layout", ["models/some--model/snapshots/master", "hub/models/some/model"])
def test_a_cache_that_was_filled_elsewhere_is_taken(site, tmp_path, tiny_vlm, monkeypatch, layout):
    # today's form of the cache, and that of the package before 1.38
    place = tmp_path / "cache" / layout
    shutil.copytree(tiny_vlm, place)
    offline(site, monkeypatch)
    assert Path(fetch_model("modelscope:some/model")) == place
    assert models.load_processor("modelscope:some/model").chat_template


def test_convert_reads_the_same_name(site, tmp_path):
    put_pairs(site, tmp_path / "set")
    program = Path(sys.executable).with_name("medtune")
    command = [program, "convert", "modelscope:some/pairs:demo", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(json_lines(tmp_path / "out" / "train.jsonl")) == 3


def test_without_the_package_one_line_says_what_to_install(tmp_path):
    code = """
import sys
sys.modules["modelscope"] = None
from medtune.cli import main
main(["convert", "modelscope:some/pairs", "out"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 1
    expected = "modelscope:some/pairs needs the package modelscope: pip install modelscope"
    assert done.stderr.strip() == f"medtune: {expected}"
