"""A training that hangs says what it waits for, and one whose loader process dies says that."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from tiny_training import make_data, make_model, words_of
from trl import SFTTrainer

from medtune import training
from medtune.training import failures, watchdog


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_vlm) -> Path:
    """A small random model and records for it."""
    place = tmp_path_factory.mktemp("watchdog")
    make_model(place / "base", tiny_vlm, experts=False)
    make_data(place / "data", {"train": 4})
    return place


def words(place: Path, out: Path, **changes) -> list[str]:
    settings = {
        "data": place / "data",
        "model_name_or_path": place / "base",
        "output_dir": out,
        "max_steps": 2,
        "save_strategy": "no",
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    return words_of(settings | changes)


def trainer_with(before_a_batch):
    """Make trainers that do something before each batch, in the process that prepares it."""

    def make(**keywords):
        trainer = SFTTrainer(**keywords)
        collate = trainer.data_collator

        def collate_later(rows):
            before_a_batch()
            return collate(rows)

        trainer.data_collator = collate_later
        return trainer

    return make


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_that_sleeps_is_told_and_not_killed(place, tmp_path, capsys, workers):
    options = {"watchdog_seconds": 0.4, "dataloader_num_workers": workers}
    training.main(words(place, tmp_path / "out", **options), trainer_with(lambda: time.sleep(1.2)))
    assert (tmp_path / "out" / "model").is_dir(), "it went on"
    said = capsys.readouterr().err.splitlines()
    assert any(line.startswith("medtune train: rank 0: no step for ") for line in said)
    assert any("the last was step 0; it goes on waiting, Ctrl-C ends it" in line for line in said)
    does = "it waits for a batch from the loader processes" if workers else "it prepares a batch"
    # on a busy machine it may have reported before the first batch, too
    start = next(n for n, line in enumerate(said) if f"main thread: {does}" in line)
    if workers:
        # the process of the tests may have other children, too
        report = [line for line in said[start + 1 :] if line.startswith("  ")]
        loaders = [line for line in report if "loader process" in line]
        assert any("sleeps, no work" in line for line in loaders), report
        assert any("dataloader_num_workers=0" in line for line in report)
    else:
        assert "test_training_watchdog.py" in said[start]
    assert sum("no step for" in line for line in said) < 10, "ever more rarely"


def test_a_training_that_goes_on_says_nothing(place, tmp_path, capsys):
    training.main(words(place, tmp_path / "out", watchdog_seconds=30))
    training.main(
        words(place, tmp_path / "off", watchdog_seconds=0), trainer_with(lambda: time.sleep(0.3))
    )
    assert "no step for" not in capsys.readouterr().err


def test_it_watches_no_longer_than_the_training(place, tmp_path):
    def fail():
        raise OSError("the disk is broken")

    with pytest.raises(SystemExit):
        training.main(words(place, tmp_path / "out"), trainer_with(fail))
    assert not [thread for thread in threading.enumerate() if thread.name == "watchdog"]


def test_children_are_told_by_what_they_do():
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    worker = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        # until both have started
        time.sleep(1)
        lines = {}
        for line in watchdog.describe_children():
            lines[line.split(":")[0].split()[-1]] = line
        assert "sleeps, no work" in lines[str(sleeper.pid)]
        assert "works, " in lines[str(worker.pid)]
        worker.send_signal(signal.SIGSTOP)
        time.sleep(0.2)
        stopped = [line for line in watchdog.describe_children() if str(worker.pid) in line]
        assert "is stopped" in stopped[0]
    finally:
        for process in (sleeper, worker):
            process.kill()
            process.wait()


def test_a_loader_process_that_is_killed_is_one_line(place, tmp_path, capsys):
    """As the system does it when memory runs out."""
    with pytest.raises(SystemExit) as end:
        training.main(
            words(place, tmp_path / "out", dataloader_num_workers=1),
            trainer_with(lambda: os.kill(os.getpid(), signal.SIGKILL)),
        )
    assert end.value.code == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("medtune train: rank 0: a process that loads data died")
    assert "dataloader_num_workers=0" in line


def test_memory_that_runs_out_is_one_line():
    # more than there can be
    with pytest.raises(Exception) as too_much:  # noqa: PT011 - numpy and torch have their own
        torch.empty(2**62, dtype=torch.int8)
    line, for_users = failures.explain(too_much.value)
    assert for_users and line.startswith("memory ran out: set a smaller")
    with contextlib.suppress(MemoryError):
        bytearray(2**62)
        pytest.fail("so much memory")
    assert failures.explain(MemoryError())[0].startswith("memory ran out")
    # raised by a library in C whose allocation of an error fails, too
    silent = SystemError("error return without exception set")
    assert failures.explain(silent)[0].startswith("memory ran out")
    assert failures.explain(RuntimeError("shapes differ")) == ("shapes differ", False)


@pytest.mark.slow
def test_loader_processes_do_not_wait_for_the_tokenizer(place, tmp_path):
    """With TOKENIZERS_PARALLELISM=true they waited for ever for threads that they do not have."""
    command = [sys.executable, "-m", "medtune.training"]
    command += words(place, tmp_path / "out", dataloader_num_workers=2, max_steps=4, fast=True)
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "true"}
    with subprocess.Popen(command, env=environment, start_new_session=True) as process:
        try:
            assert process.wait(120) == 0
        finally:
            # its own children, and no others of these tests, such as a browser
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert (tmp_path / "out" / "model").is_dir()


# As a notebook or a script of one's own does it: a loader beside a tokenizer that has used threads.
LOADS_BESIDE_THREADS = """
import sys
from torch.utils.data import DataLoader
from medtune import models

tokenizer = models.load_processor(sys.argv[1]).tokenizer
texts = ["a text of some words"] * 64
tokenizer(texts)
loader = DataLoader(texts, batch_size=32, num_workers=1, collate_fn=tokenizer)
print(len(list(loader)), "batches", flush=True)
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_loader_of_ones_own_does_not_wait_for_the_tokenizer_either(place):
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", LOADS_BESIDE_THREADS, place / "base"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.stdout == "2 batches\n", done.stderr[-500:]
