"""Two processes under torchrun answer together: into one file, and on after a kill."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import tiny_qwen

from medtune.answers.resume import append, read_answers

# where other things run, to start two processes takes a minute
pytestmark = pytest.mark.timeout(600)

JOB = Path(__file__).with_name("answer_ranks.py")
IDS = [record["id"] for record in tiny_qwen.make_records()]
TOTAL = len(IDS)


def start(log: Path, *words, ranks: int) -> subprocess.Popen:
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    command += [str(JOB), *map(str, words)]
    with open(log, "a") as file:
        return subprocess.Popen(
            command,
            stdout=file,
            stderr=file,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )


def run(log: Path, *words, ranks: int) -> None:
    assert start(log, *words, ranks=ranks).wait(200) == 0, log.read_text()[-3000:]


def said(answers: list[dict]) -> dict[str, tuple]:
    """By id, without the seconds that an answer took."""
    told = {}
    for answer in answers:
        assert answer["id"] not in told, "an answer stands there twice"
        told[answer["id"]] = (answer["question"], answer["answer"], answer["tokens"])
    return told


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The answers of one process."""
    place = tmp_path_factory.mktemp("alone")
    run(place / "log", place / "answers.jsonl", 0, ranks=1)
    return place / "answers.jsonl"


@pytest.mark.slow
def test_killed_ranks_go_on_in_one_file(alone, tmp_path):
    out = tmp_path / "answers.jsonl"
    log = tmp_path / "log"
    process = start(log, out, 0.3, ranks=2)
    end = time.monotonic() + 200
    while not out.exists() or out.stat().st_size == 0:
        assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.02)
    family = [process, *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        member.send_signal(signal.SIGKILL)
    process.wait()
    psutil.wait_procs(family[1:], timeout=30)
    before = len(read_answers(out))
    assert 0 < before < TOTAL, "it was killed too late to show anything"

    run(log, out, 0, f"beside={tmp_path}", ranks=2)
    assert said(read_answers(out)) == said(read_answers(alone))
    # both ranks return all answers, in the order of the data set, and did what was left
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert said(told[0]["answers"]) == said(read_answers(alone))
    assert told[0]["answers"] == told[1]["answers"]
    assert [answer["id"] for answer in told[0]["answers"]] == IDS
    assert told[0]["seen"] + told[1]["seen"] == TOTAL - before


@pytest.mark.slow
def test_ranks_without_a_file(alone, tmp_path):
    run(tmp_path / "log", "-", 0, f"beside={tmp_path}", ranks=2)
    seen = []
    for rank in (0, 1):
        told = json.loads((tmp_path / f"{rank}.json").read_text())
        assert said(told["answers"]) == said(read_answers(alone))
        seen.append(told["seen"])
    # batches of 2
    assert sum(seen) == TOTAL and abs(seen[0] - seen[1]) <= 2


@pytest.mark.slow
def test_one_process_finishes_what_two_began_and_draws_alike(tmp_path):
    drawn = ("do_sample=true", "seed=4", "temperature=1.5")
    run(tmp_path / "log", tmp_path / "one.jsonl", 0, *drawn, ranks=1)
    run(tmp_path / "log", tmp_path / "two.jsonl", 0, *drawn, ranks=2)
    assert said(read_answers(tmp_path / "two.jsonl")) == said(read_answers(tmp_path / "one.jsonl"))


def add_many(out: Path, name: str) -> None:
    for number in range(50):
        append(out, [{"id": f"{name}-{number}", "answer": "word " * 5000}])


def test_processes_add_whole_lines(tmp_path):
    out = tmp_path / "answers.jsonl"
    # what a process that was killed has left
    out.write_text('{"id": "0", "answer": "a"}\n{"id": "1", "ans')
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=add_many, args=(out, name)) for name in "abc"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    ids = [answer["id"] for answer in read_answers(out)]
    assert len(ids) == len(set(ids)) == 151 and ids[0] == "0"
