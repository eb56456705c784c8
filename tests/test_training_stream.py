"""Training from shards: the same as from a converted folder, and on after a kill."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from shards import encode, pair, picture, write_shard
from tiny_training import make_model, words_of

from medtune import training
from medtune.records import RecordStream, convert_pairs, index_shards
from medtune.training.stream import ShardLoader

# where other things run, to start two processes takes a minute
pytestmark = pytest.mark.timeout(600)

SIZES = (7, 5, 11)


def small_pair(number: int, **changes) -> dict:
    """A pair with a small picture and an answer of a length of its own."""
    shown = encode(picture(number, size=(64, 48)))
    row = {"image": shown, "caption": "It is " + "dark " * (number % 5) + f"and number {number}."}
    return pair(number, **(row | changes))


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_vlm) -> Path:
    """A tiny model, shards, and the same converted."""
    place = tmp_path_factory.mktemp("stream")
    make_model(place / "base", tiny_vlm, experts=False)
    (place / "shards").mkdir()
    numbers = itertools.count()
    for shard, size in enumerate(SIZES):
        rows = [small_pair(next(numbers)) for _ in range(size)]
        write_shard(place / "shards" / f"{shard}.parquet", rows, row_group_size=4)
    convert_pairs(place / "shards", place / "records")
    return place


def words(place: Path, out: Path, **changes) -> list[str]:
    """The words of a training of two epochs."""
    settings = {
        "data": place / "shards",
        "model_name_or_path": place / "base",
        "output_dir": out,
        "num_train_epochs": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 50,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "lora_r": 4,
        "lora_dropout": 0.1,
        "seed": 0,
        "disable_tqdm": True,
    }
    return words_of(settings | changes)


def outcome(out: Path) -> tuple[list, bytes]:
    """The losses and the adapter of a finished training."""
    log = json.loads((out / "log.json").read_text())
    losses = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    return losses, (out / "model" / "adapter_model.safetensors").read_bytes()


def start(place: Path, out: Path, *, ranks: int = 1, **changes) -> subprocess.Popen:
    """Start a training in processes of its own."""
    command = [sys.executable, "-m"]
    if ranks > 1:
        command += ["torch.distributed.run", "--nproc-per-node", str(ranks)]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "-m"]
    command += ["medtune.training", *words(place, out, **changes)]
    with open(place / f"{out.name}.log", "a") as log:
        return subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )


def finish(process: subprocess.Popen, place: Path, out: Path) -> None:
    assert process.wait(200) == 0, (place / f"{out.name}.log").read_text()[-3000:]


def kill_after(process: subprocess.Popen, out: Path, step: int, log: Path) -> None:
    """Kill a training and all its processes with SIGKILL once a checkpoint is complete."""
    end = time.monotonic() + 200
    while not (out / f"checkpoint-{step}" / "complete.json").exists():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.02)
    family = [process, *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        member.send_signal(signal.SIGKILL)
    process.wait()
    psutil.wait_procs(family[1:], timeout=30)


# ---- the same as from a folder


def test_in_order_it_is_the_training_of_the_folder(place, tmp_path):
    training.main(words(place, tmp_path / "stream", shuffle_buffer=0))
    folder = {"data": place / "records", "train_sampling_strategy": "sequential"}
    training.main(words(place, tmp_path / "folder", **folder))
    assert outcome(tmp_path / "stream") == outcome(tmp_path / "folder")
    card = (tmp_path / "stream" / "model" / "README.md").read_text()
    assert "Describe this medical image." in card


def test_shuffled_it_has_each_record_once_an_epoch(place):
    orders = []
    for epoch in (0, 1):
        loader = loader_of(place, rank=0, ranks=1)
        loader.set_epoch(epoch)
        orders.append(list(itertools.chain.from_iterable(batch["ids"] for batch in loader)))
        assert len(loader) == 12
    assert sorted(orders[0]) == sorted(orders[1]) == [f"id-{number:05d}" for number in range(23)]
    assert orders[0] != orders[1]


def collate_ids(rows: list[dict]) -> dict:
    """A batch that tells which records it is made of."""
    return {"ids": [row["id"] for row in rows], "labels": torch.ones(len(rows), 1)}


def loader_of(place: Path, *, rank: int, ranks: int, workers: int = 0, batch_size: int = 2):
    """The loader of one rank, which needs no others to know its share."""
    script_args = SimpleNamespace(shuffle_buffer=6, allow_cut_answers=True)
    args = SimpleNamespace(
        seed=0,
        data_seed=None,
        per_device_train_batch_size=batch_size,
        world_size=ranks,
        process_index=rank,
        dataloader_num_workers=workers,
        dataloader_pin_memory=False,
        dataloader_prefetch_factor=None,
        max_length=None,
    )
    stream = RecordStream(index_shards(place / "shards"), "train")
    return ShardLoader(stream, script_args, args, collate_ids)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_have_as_many_batches_and_each_record_once(place, ranks, workers):
    counted = []
    batches = set()
    for rank in range(ranks):
        own = list(loader_of(place, rank=rank, ranks=ranks, workers=workers, batch_size=3))
        batches.add(len(own))
        for batch in own:
            # a batch that only keeps the others company has no part in the loss
            if (batch["labels"] != -100).all():
                counted += batch["ids"]
    assert sorted(counted) == [f"id-{number:05d}" for number in range(23)]
    assert batches == {-(-8 // ranks)}


# ---- a kill


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 2), (2, 0)])
def test_a_killed_training_goes_on_with_the_next_record(place, tmp_path, ranks, workers):
    # on two ranks a batch of 3 leaves one of them without, at the end of each epoch
    batch = 3 if ranks == 2 else 2
    how = {
        "ranks": ranks,
        "dataloader_num_workers": workers,
        "per_device_train_batch_size": batch,
        "shuffle_buffer": 6,
    }
    undisturbed = tmp_path / f"undisturbed-{ranks}-{workers}"
    finish(start(place, undisturbed, **how), place, undisturbed)
    killed = tmp_path / f"killed-{ranks}-{workers}"
    log = place / f"{killed.name}.log"
    kill_after(start(place, killed, **how), killed, 2, log)
    done = [folder.name for folder, _ in training.complete_checkpoints(killed)]
    assert not (killed / "finished.json").exists(), "it was killed too late to show anything"
    finish(start(place, killed, resume=True, **how), place, killed)
    assert outcome(killed) == outcome(undisturbed), done


@pytest.mark.slow
def test_each_step_can_be_gone_on_from(place, tmp_path):
    how = {"shuffle_buffer": 6, "gradient_accumulation_steps": 2}
    whole = tmp_path / "whole"
    training.main(words(place, whole, **how))
    # in the middle of a window, at the end of an epoch, in the second
    for step in (1, 4, 6, 9):
        part = tmp_path / f"from-{step}"
        shutil.copytree(whole, part)
        shutil.rmtree(part / "model")
        (part / "finished.json").unlink()
        for folder, note in training.complete_checkpoints(part):
            if note["step"] > step:
                shutil.rmtree(folder)
        training.main(words(place, part, resume=True, **how))
        assert outcome(part) == outcome(whole), step


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dataloader_num_workers": 2}, "of a stream with workers 0: only with the same"),
        ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}, "batch_size 2"),
    ],
)
def test_what_decides_the_next_record_must_not_change(place, tmp_path, capsys, changed, message):
    out = tmp_path / "out"
    training.main(words(place, out, max_steps=2))
    shutil.rmtree(out / "model")
    (out / "finished.json").unlink()
    with pytest.raises(SystemExit):
        training.main(words(place, out, max_steps=2, resume=True, **changed))
    assert message in capsys.readouterr().err


# ---- what cannot be trained on


@pytest.fixture
def spoilt(place, tmp_path) -> Path:
    """Shards of 40 rows with pictures that are damaged, and one that no processor takes."""
    rows = [small_pair(number) for number in range(40)]
    rows[3]["image"] = b"no picture"
    rows[17]["image"] = encode(picture(1, size=(400, 4)).crop((0, 0, 400, 1)), "PNG")
    (tmp_path / "shards").mkdir()
    write_shard(tmp_path / "shards" / "a.parquet", rows, row_group_size=8)
    return tmp_path / "shards"


# the narrow picture comes among the records that are looked at before the first step, or later
@pytest.mark.parametrize(("workers", "looked_at"), [(0, 256), (2, 1)])
def test_bad_records_are_left_out_and_listed(
    place, spoilt, tmp_path, capfd, monkeypatch, workers, looked_at
):
    monkeypatch.setattr(training.trainer, "LOOKED_AT", looked_at)
    changed = {"data": spoilt, "num_train_epochs": 1, "save_strategy": "no"}
    training.main(words(place, tmp_path / "out", dataloader_num_workers=workers, **changed))
    told = capfd.readouterr().err
    assert "2 of 40 rows were left out (1 image, 1 record)" in told
    listed = ""
    for file in (tmp_path / "out" / "rejected").glob("*.jsonl"):
        listed += file.read_text()
    assert '"id-00003"' in listed and '"id-00017"' in listed
    # steps are counted as if all records were there
    assert json.loads((tmp_path / "out" / "finished.json").read_text())["steps"] == 20


def test_too_many_bad_records_end_it_in_a_line(place, spoilt, tmp_path, capfd):
    with pytest.raises(SystemExit):
        training.main(words(place, tmp_path / "out", data=spoilt, most_rejected=0.01))
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("medtune train: rank 0: ") and "most_rejected=0.01" in last


def test_records_are_looked_at_before_the_first_step(place, tmp_path, capfd):
    with pytest.raises(SystemExit):
        training.main(words(place, tmp_path / "out", max_length=20))
    assert "answers are cut by max_length=20" in capfd.readouterr().err
    assert not (tmp_path / "out" / "log.json").exists()


# ---- settings


def test_validation_and_questions(place, tmp_path):
    table = tmp_path / "splits.csv"
    lines = ["id,split"]
    for number in range(23):
        lines.append(f"id-{number:05d},{'validation' if number % 3 == 0 else 'train'}")
    table.write_text("\n".join(lines) + "\n")
    asked = {"splits": table, "eval_strategy": "epoch", "num_train_epochs": 1, "eval_samples": 4}
    chosen = [*words(place, tmp_path / "out", **asked), "--questions", "What?", "Where?"]
    script_args, training_args, model_args = training.parse_arguments(chosen)
    trainer = training.build_trainer(script_args, training_args, model_args)
    assert len(trainer.eval_dataset) == 4
    assert all(int(name[3:]) % 3 == 0 for name in trainer.eval_dataset["id"])
    assert len(trainer.get_train_dataloader()) == 8
    texts = {row["prompt"][-1]["content"][-1]["text"] for row in trainer.train_dataset}
    assert texts == {"What?", "Where?"}
    training.train_model(trainer, script_args, model_args)
    log = json.loads((tmp_path / "out" / "log.json").read_text())
    assert any("eval_loss" in entry for entry in log)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"data": "records", "splits": "splits.csv"},
            "splits is for shards, and data=records names",
        ),
        ({"cache_features": True}, "cache_features=true needs a converted folder"),
        ({"data": "no-such-*.parquet"}, "no-such-*.parquet names no parquet file"),
        ({"splits": "no-such.csv"}, "no-such.csv"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(place, tmp_path, capfd, changed, message):
    with pytest.raises(SystemExit):
        training.main(words(place, tmp_path / "out", **changed))
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert message in last
