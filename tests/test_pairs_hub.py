"""Sets on the hub: a small server on loopback stands for it."""

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from pair_sources import write_parquet

GATED = {"X_Error_Code": "GatedRepo", "X_Error_Message": "Access is restricted"}


def serve_hub(hub: type, home: Path) -> tuple[http.server.HTTPServer, dict[str, str]]:
    """Serve a hub on loopback; gives the server and the environment of a process that asks it."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(home / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "",
    }


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's interface as `datasets` asks of it."""

    protocol_version = "HTTP/1.1"
    commit = "a" * 40
    files: dict[str, bytes] = {}

    def log_message(self, *_):
        pass

    def answer(self, status: int, body: bytes = b"{}", **headers):
        self.send_response(status)
        headers = {"Content-Length": len(body)} | headers
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, value):
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found = re.match(r"/(api/)?datasets/(\w+/\w+)/?([^?]*)", self.path)
        api, repo, rest = found.groups() if found else (None, None, "")
        if repo == "org/gated":
            return self.answer(401, **GATED)
        if repo == "org/halfway" and "parquet" in rest and not api:
            # its card is public, its files are not
            return self.answer(403, **GATED)
        if repo not in ("org/pairs", "org/halfway"):
            return self.answer(401, X_Error_Code="RepoNotFound")
        name = re.sub(r"^(resolve|tree|revision)/[^/]+/?", "", rest)
        if api and rest.startswith("tree/"):
            return self.answer_json(self.entries(name))
        if api:
            siblings = [{"rfilename": file} for file in self.files]
            about = {"id": repo, "sha": self.commit, "tags": [], "siblings": siblings}
            return self.answer_json(about)
        return self.send_file(name)

    do_HEAD = do_POST = do_GET

    def entries(self, folder: str) -> list[dict]:
        """What lies directly in a folder of the repository."""
        entries = {}
        for path, body in self.files.items():
            if not path.startswith(folder):
                continue
            inside = path[len(folder) :].strip("/")
            top = f"{folder}/{inside.split('/')[0]}".strip("/")
            entries[top] = {
                "type": "directory" if "/" in inside else "file",
                "path": top,
                "size": len(body),
                "oid": hashlib.sha1(body).hexdigest(),
            }
        return list(entries.values())

    def send_file(self, name: str):
        if name not in self.files:
            return self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=self.commit)
        body = self.files[name]
        headers = {
            "X_Repo_Commit": self.commit,
            "Accept_Ranges": "bytes",
            "ETag": f'"{hashlib.sha1(body).hexdigest()}"',
        }
        asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not asked:
            return self.answer(200, body, **headers)
        first = int(asked[1])
        last = min(int(asked[2] or len(body)), len(body) - 1)
        headers["Content_Range"] = f"bytes {first}-{last}/{len(body)}"
        return self.answer(206, body[first : last + 1], **headers)


ASK = """
import json, sys
from medtune.pairs import load_pairs

for source, options in json.loads(sys.argv[1]):
    try:
        rows = load_pairs(source, **options)
        first = next(iter(rows))
        columns = sorted(rows.column_names)
        answer = [type(rows).__name__, columns, first["id"], first["caption"], first["image"].size]
        answer.append(len(rows) if hasattr(rows, "__len__") else None)
    except Exception as error:
        answer = [type(error).__name__, str(error)]
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def ask(tmp_path):
    """A function that loads sets in a process of its own and gives what came, or the error.

    `datasets` reads its endpoint when it is imported, hence the process; the server is real HTTP on
    loopback.
    """
    table = write_parquet(
        tmp_path / "t.parquet", id=None, image_id=["r1", "r2", "r3"], cui=[["C1"]] * 3
    )
    content = table.read_bytes()
    Hub.files = {f"data/train-0000{number}-of-00002.parquet": content for number in range(2)}
    names = ("25M_demo", "25M_full")
    configs = [{"config_name": name, "data_files": "data/train-*"} for name in names]
    Hub.files["README.md"] = f"---\nconfigs: {json.dumps(configs)}\n---\n".encode()
    server, environment = serve_hub(Hub, tmp_path)

    def ask(*questions, **changed) -> list:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", ASK, json.dumps(questions)],
            env=environment | changed,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=100,
        )
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    yield ask
    server.shutdown()


@pytest.mark.slow
def test_hub(ask):
    demo = {"config": "25M_demo"}
    stream, limited, whole = ask(
        ("org/pairs", demo | {"streaming": True}),
        ("org/pairs", demo | {"limit": 4}),
        ("org/pairs", demo),
    )
    columns = [["caption", "cui", "id", "image"], "r1", "caption 0", [24, 16]]
    assert stream == ["IterableDataset", *columns, None]
    assert limited == ["Dataset", *columns, 4]
    assert whole == ["Dataset", *columns, 6]

    # from the local cache; a set that is not in it is out of reach
    cached, unreachable = ask(("org/pairs", demo), ("org/gated", {}), HF_HUB_OFFLINE="1")
    assert cached == whole
    kind, message = unreachable
    assert kind == "ConnectionError"
    assert "offline" in message
    assert "\n" not in message


@pytest.mark.slow
def test_hub_sets_that_cannot_be_loaded(ask):
    demo = {"config": "25M_demo"}
    answers = ask(
        ("org/pairs", {}),
        ("org/pairs", {"config": "none"}),
        ("org/pairs:none", {}),
        ("org/pairs", demo | {"split": "test"}),
        ("org/gated", {}),
        ("org/halfway", demo | {"streaming": True}),
        ("org/halfway", demo),
        ("org/none", {}),
    )
    assert all("\n" not in message for _, message in answers)
    for kind, message in answers[:3]:
        assert kind == "ValueError"
        assert "'25M_demo', '25M_full'" in message
    kind, message = answers[3]
    assert kind == "ValueError"
    assert "['train']" in message
    access = r"request access at https://huggingface.co/datasets/org/\w+, then run `hf auth login`"
    for kind, message in answers[4:7]:
        assert kind == "PermissionError", message
        assert re.search(access, message)
    kind, message = answers[7]
    assert kind == "FileNotFoundError"
    assert "no such hub data set" in message
