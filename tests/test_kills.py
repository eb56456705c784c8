"""Twenty kills at random times, full disks, folders that cannot be written, memory that runs out.

Whatever happens to a job, in the end it has the bytes of one that nobody disturbed; and what it
leaves meanwhile never looks complete when it is not. The kills are drawn anew each time: the seed
is printed, and MEDTUNE_KILLS_SEED sets it.
"""

import json
import multiprocessing
import multiprocessing.forkserver
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import kill_jobs
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tuned
from tiny_training import make_data, make_model

from medtune import models, training

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FORKS = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module", autouse=True)
def forkserver() -> None:
    """Start a process from which all jobs are forked: it has the libraries and computed nothing."""
    FORKS.set_forkserver_preload(["kill_jobs"])
    with pytest.MonkeyPatch.context() as patch:
        # Python 3.11 does not tell it where modules are
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        multiprocessing.forkserver.ensure_running()


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_vlm) -> Path:
    """A small random model, an adapter on it, and records."""
    place = tmp_path_factory.mktemp("kills")
    make_model(place / "base", tiny_vlm, experts=False)
    make_data(place / "data", {"train": 8})
    processor = models.load_processor(place / "base")
    model = tuned("language", models.load_base(place / "base"))
    models.save_model(model, processor, place / "adapter", card="a card")
    return place


@pytest.fixture(scope="module")
def draw() -> random.Random:
    """What decides when a job is killed."""
    seed = os.environ.get("MEDTUNE_KILLS_SEED") or str(time.time_ns())
    print(f"MEDTUNE_KILLS_SEED={seed}")
    return random.Random(seed)


def start(place: Path, out: Path, job, *before) -> multiprocessing.Process:
    """Start a job; `before` may be `limited` and its megabytes."""
    out.mkdir(exist_ok=True)
    log = place / f"{job.__name__}.log"
    arguments = (log, *before, job) if not before else (log, before[0], job, before[1])
    process = FORKS.Process(target=kill_jobs.told_in, args=(*arguments, place, out))
    process.start()
    return process


def finish(place: Path, out: Path, job) -> float:
    """Run a job to its end; return the seconds that it took."""
    began = time.monotonic()
    process = start(place, out, job)
    process.join(120)
    log = place / f"{job.__name__}.log"
    assert process.exitcode == 0, log.read_text(errors="replace")[-3000:]
    return time.monotonic() - began


def bytes_of(folder: Path) -> dict[str, bytes]:
    """All files of a folder, with their content."""
    files = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            files[str(file.relative_to(folder))] = file.read_bytes()
    return files


# ---- what a job leaves


def training_of(out: Path) -> tuple:
    """The losses and the adapter of a finished training."""
    log = json.loads((out / "log.json").read_text())
    losses = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    return losses, bytes_of(out / "model")["adapter_model.safetensors"]


def answers_of(out: Path) -> list[dict]:
    """The answers on file, without the seconds that they took."""
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_bytes().splitlines()]
    for answer in answers:
        del answer["seconds"]
    return sorted(answers, key=lambda answer: answer["id"])


def models_of(out: Path) -> dict[str, bytes]:
    """All that lies in the folder, hidden leftovers too."""
    return bytes_of(out)


def check_training(out: Path, expected: tuple) -> None:
    """What looks complete is: checkpoints, the log, the model."""
    for folder, _ in training.complete_checkpoints(out):
        load_file(folder / "adapter_model.safetensors")
        torch.load(folder / "optimizer.pt", weights_only=False)
        json.loads((folder / "trainer_state.json").read_text())
    if (out / "log.json").exists():
        json.loads((out / "log.json").read_text())
    if (out / "model").exists():
        assert bytes_of(out / "model")["adapter_model.safetensors"] == expected[1]


def check_answers(out: Path, expected: list[dict]) -> None:
    """All lines but the last are whole, and are those of the undisturbed job."""
    if (out / "answers.jsonl").exists():
        for line in (out / "answers.jsonl").read_bytes().split(b"\n")[:-1]:
            answer = json.loads(line)
            del answer["seconds"]
            assert answer in expected


def check_models(out: Path, expected: dict[str, bytes]) -> None:
    """What has the name of the model is whole."""
    for folder in out.iterdir():
        if not folder.name.startswith("."):
            found = {f"{folder.name}/{name}": data for name, data in bytes_of(folder).items()}
            assert found == expected


JOBS = {
    "generate": (kill_jobs.generate, 5, answers_of, check_answers),
    "LoRA": (kill_jobs.train, 5, training_of, check_training),
    "QLoRA": (kill_jobs.train_qlora, 4, training_of, check_training),
    "merge": (kill_jobs.merge, 3, models_of, check_models),
    "export": (kill_jobs.export, 3, models_of, check_models),
}


def test_there_are_twenty_kills():
    assert sum(kills for _, kills, _, _ in JOBS.values()) == 20


@pytest.mark.parametrize("name", JOBS)
def test_killed_at_random_and_started_again(place, draw, name):
    job, kills, result_of, check = JOBS[name]
    whole = place / f"{name}-whole"
    # the first start also waits for the libraries
    finish(place, place / f"{name}-first", job)
    seconds = finish(place, whole, job)
    expected = result_of(whole)
    assert expected

    number = 0
    out = place / f"{name}-{number}"
    while kills:
        process = start(place, out, job)
        process.join(draw.uniform(0.1, 0.9) * seconds)
        # it may end at this very moment
        process.kill()
        process.join()
        if process.exitcode == -9:
            kills -= 1
            check(out, expected)
        else:
            # it got to its end before the kill: the next kills fall on another folder
            assert process.exitcode == 0
            assert result_of(out) == expected
            number += 1
            out = place / f"{name}-{number}"
    finish(place, out, job)
    assert result_of(out) == expected


# ---- disks


@pytest.fixture
def mount(tmp_path) -> Iterator[Callable[[int], Path]]:
    """Mount disks of their own of some kilobytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("no disk can be mounted here: only root may")

    def mount(kilobytes: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
        return folder

    yield mount
    subprocess.run(["umount", "-l", str(folder)], capture_output=True)


def last_line(place: Path, job) -> str:
    """The last line that a job said."""
    return (place / f"{job.__name__}.log").read_text(errors="replace").strip().splitlines()[-1]


def undisturbed(place: Path, name: str):
    """What a job leaves that nobody disturbed."""
    job, _, result_of, _ = JOBS[name]
    whole = place / f"{name}-whole"
    if not whole.exists():
        finish(place, whole, job)
    return result_of(whole)


# kilobytes of the disk on which a job runs, and what lies there
@pytest.mark.parametrize(
    "name, job, kilobytes",
    [
        # the settings fit, no answer does
        ("generate", kill_jobs.generate, 4),
        # the settings and the log fit, the model does not
        ("LoRA", kill_jobs.train, 200),
        ("QLoRA", kill_jobs.train_qlora, 200),
        # within the first checkpoint, and within a later one
        ("LoRA", kill_jobs.train_to_the_brim, 100),
        ("LoRA", kill_jobs.train_to_the_brim, 700),
        ("merge", kill_jobs.merge, 700),
        ("export", kill_jobs.export, 700),
    ],
)
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(
    place, mount, name, job, kilobytes
):
    expected = undisturbed(place, name)
    out = mount(kilobytes) / "out"
    process = start(place, out, job)
    process.join(120)
    assert process.exitcode == 1
    line = last_line(place, job)
    assert str(out) in line, line
    assert "space" in line or "disk full" in line, line
    JOBS[name][3](out, expected)
    assert not list(out.glob("model")) and not list(out.glob("merged"))
    # with more space it goes on
    command = ["mount", "-o", "remount,size=20m", str(out.parent)]
    subprocess.run(command, check=True)
    finish(place, out, JOBS[name][0])
    assert JOBS[name][2](out) == expected


@pytest.mark.parametrize("name", JOBS)
def test_a_folder_that_cannot_be_written_is_one_line(place, mount, name):
    job = JOBS[name][0]
    out = mount(64) / "out"
    out.mkdir()
    command = ["mount", "-o", "remount,ro", str(out.parent)]
    subprocess.run(command, check=True)
    process = start(place, out, job)
    process.join(120)
    assert process.exitcode == 1
    line = last_line(place, job)
    assert "Read-only file system" in line and str(out) in line
    assert not list(out.iterdir())


# ---- memory


@pytest.mark.parametrize("megabytes", [5, 30, 90])
@pytest.mark.parametrize("name", ["LoRA", "generate", "merge"])
def test_memory_that_runs_out_leaves_nothing_half_written(place, name, megabytes):
    job, _, result_of, check = JOBS[name]
    expected = undisturbed(place, name)
    out = place / f"{name}-{megabytes}-megabytes"
    process = start(place, out, job, kill_jobs.limited, megabytes)
    process.join(120)
    check(out, expected)
    line = last_line(place, job)
    print(process.exitcode, line)
    if process.exitcode == 0:
        assert result_of(out) == expected
        return
    assert process.exitcode in (1, -signal.SIGABRT)
    if process.exitcode == -signal.SIGABRT:
        # a library in C++ that cannot even raise an error; nothing is half written after it, either
        pass
    elif name == "LoRA":
        assert line.startswith("medtune train: rank 0: memory ran out: "), line
    else:
        # A function tells its caller, by an error that the command line makes a line of. Libraries
        # that run out of memory while they save do not always say so.
        assert line.startswith("OSError: "), line
    finish(place, out, job)
    assert result_of(out) == expected
