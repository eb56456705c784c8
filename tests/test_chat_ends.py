"""What visitors sent goes when the page ends, in real processes that are ended in every way."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from gradio_client import Client, handle_file
from pydicom.data import get_testdata_file

from medtune import chat
from medtune.chat import scratch

NAME = "Testpatient_Grete"
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no such signals on Windows")

# The module alone, without the libraries of the page, so that a process starts at once.
ALONE = f"""
import importlib.util, signal, sys, time
about = importlib.util.spec_from_file_location("scratch", {scratch.__file__!r})
scratch = importlib.util.module_from_spec(about)
sys.modules["scratch"] = scratch
about.loader.exec_module(scratch)
if sys.argv[1:] == ["nohup"]:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
folder = scratch.open_scratch()
(folder / "gradio" / "a").mkdir(parents=True)
(folder / "gradio" / "a" / "{NAME}.png").write_text("a picture")
if sys.argv[1:] == ["many"]:
    for number in range(5_000):
        (folder / "gradio" / "a" / str(number)).touch()
print(folder, flush=True)
time.sleep(60)
"""


def heed_all() -> None:
    """In a new process: heed the signals that nohup, or a shell in the background, ignores."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Start a process with a page's folder; yields (process, folder)."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv(scratch.VARIABLE, raising=False)
    started = []

    def begin(*words: str):
        command = [sys.executable, "-c", ALONE, *words]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            preexec_fn=heed_all,
        )
        started.append(process)
        return process, Path(process.stdout.readline().strip())

    yield begin
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT"])
def test_the_folder_goes_by_every_signal(start, tmp_path, name):
    process, folder = start()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert list(tmp_path.rglob(f"{NAME}.png"))
    process.send_signal(getattr(signal, name))
    code = process.wait(20)
    assert list(tmp_path.iterdir()) == []
    assert code == -getattr(signal, name), "whoever started the page sees by what it ended"


def test_a_second_signal_does_not_end_it_half_way(start, tmp_path):
    process, _ = start("many")
    for _ in range(20):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.005)
    process.wait(60)
    assert list(tmp_path.iterdir()) == []


def test_a_signal_that_is_ignored_stays_so(start):
    process, folder = start("nohup")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None and folder.exists()


def test_after_kill_9_the_next_page_clears_up(start, tmp_path):
    dead, left = start()
    dead.kill()
    dead.wait()
    assert list(left.rglob(f"{NAME}.png")), "nobody could clear up"
    _, folder = start()
    assert not left.exists() and folder.exists()


def test_only_folders_of_dead_pages_go(start, tmp_path):
    living, kept = start()
    # the name alone does not make a folder ours, nor does a link to somebody else's folder
    mine = tmp_path / f"{scratch.PREFIX}thesis"
    mine.mkdir()
    (mine / "thesis.txt").write_text("precious")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / scratch.MARK).touch()
    link = tmp_path / f"{scratch.PREFIX}link"
    link.symlink_to(elsewhere)
    inside = kept / "gradio" / "link"
    inside.symlink_to(elsewhere)
    _, folder = start()
    assert kept.exists() and folder.exists() and living.poll() is None
    assert (mine / "thesis.txt").exists() and link.is_symlink()
    living.terminate()
    living.wait(20)
    assert not kept.exists() and (elsewhere / scratch.MARK).exists(), "links are not followed"


def test_a_folder_that_is_half_removed_is_known_again(start):
    dead, left = start()
    dead.kill()
    dead.wait()
    (left / "gradio" / "a").chmod(0o500)  # its file cannot be removed
    start()
    there = left.exists()
    if there:  # root can remove it all the same
        (left / "gradio" / "a").chmod(0o700)
        assert (left / scratch.MARK).exists()
    start()
    assert not left.exists()


def test_pages_of_a_process_share_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv(scratch.VARIABLE, str(tmp_path / "mine"))
    models = chat.ChatModels(None, None, None)
    first = chat.build_page(models, examples=[])
    second = chat.build_page(models, examples=[])
    (folder,) = (tmp_path / "mine").iterdir()
    assert Path(os.environ[scratch.VARIABLE]).parent == folder
    first.close()
    first.close()
    assert folder.exists(), "the second page is there"
    second.close()
    assert list((tmp_path / "mine").iterdir()) == []
    assert os.environ[scratch.VARIABLE] == str(tmp_path / "mine"), "as it was before"


# ---- the command, with visitors


@pytest.fixture
def serve(tmp_path, tiny_vlm, monkeypatch):
    """Start `medtune chat`; yields (process, address)."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.delenv(scratch.VARIABLE, raising=False)
    started = []

    def begin():
        code = "from medtune.cli import main; main()"
        command = [sys.executable, "-c", code, "chat", str(tiny_vlm)]
        command += ["--feedback", str(tmp_path / "feedback")]
        with open(tmp_path / "log.txt", "w") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=tmp_path, preexec_fn=heed_all
            )
        started.append(process)
        for _ in range(600):
            said = (tmp_path / "log.txt").read_text()
            if "medtune chat: " in said:
                return process, said.partition("medtune chat: ")[2].split()[0]
            assert process.poll() is None, said
            time.sleep(0.2)
        raise TimeoutError(said)

    yield begin
    for process in started:
        process.kill()
        process.wait()


def left_in(folder: Path) -> list[Path]:
    """Files of visitors: what has the patient's name, or is a DICOM file without it."""
    return [*folder.rglob(f"{NAME}*"), *folder.rglob("*.dcm")]


def send(address: str) -> None:
    """Send a picture, and a DICOM file that becomes a copy without the patient."""
    client = Client(address, verbose=False, download_files=False)
    client.predict([handle_file(get_testdata_file("CT_small.dcm"))], 0, api_name="/upload")
    files = {"files": (f"{NAME}.png", b"a picture")}
    httpx.post(f"{address}gradio_api/upload", files=files, timeout=60).raise_for_status()


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGKILL"])
def test_nothing_of_a_visitor_stays(serve, tmp_path, name):
    process, address = serve()
    send(address)
    there = left_in(tmp_path)
    assert {file.suffix for file in there} == {".png", ".dcm"}
    for file in there:
        folder = tmp_path / "tmp" / file.relative_to(tmp_path / "tmp").parts[0]
        assert folder.stat().st_mode & 0o777 == 0o700
    process.send_signal(getattr(signal, name))
    process.wait(60)
    if name == "SIGKILL":
        assert left_in(tmp_path)
        again, _ = serve()
        assert not left_in(tmp_path)
        again.terminate()
        again.wait(60)
    assert not left_in(tmp_path) and not list((tmp_path / "tmp").glob(f"{scratch.PREFIX}*"))
