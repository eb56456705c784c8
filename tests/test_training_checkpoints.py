"""How a run stops and goes on: complete checkpoints, who may continue what, and a full disk."""

import json
from collections import namedtuple
from pathlib import Path

import pytest
from tiny_training import TINY, words_of

from medtune import models, records, training
from medtune.pairs import load_pairs
from medtune.training.checkpoints import Start, prepare_start


def checkpoint(out: Path, step: int, stage: int | None = None) -> Path:
    """Write a folder that looks like a complete checkpoint of two ranks."""
    folder = out / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"12345")
    note = {"step": step, "zero_stage": stage, "ranks": 2, "files": {"weights": 5}}
    (folder / "complete.json").write_text(json.dumps(note))
    return folder


def prepare(out: Path, *, learning_rate: float = 1.0, resume: bool = True, stage=2, ranks=2):
    settings = {"learning_rate": learning_rate}
    return prepare_start(out, settings, resume=resume, stage=stage, ranks=ranks)


def test_only_complete_checkpoints_count(tmp_path):
    whole = checkpoint(tmp_path, 20)
    older = checkpoint(tmp_path, 9)
    cut_off = checkpoint(tmp_path, 30)
    (cut_off / "weights").write_bytes(b"123")
    killed_before_the_note = checkpoint(tmp_path, 40)
    (killed_before_the_note / "complete.json").unlink()
    killed_in_the_note = checkpoint(tmp_path, 50)
    (killed_in_the_note / "complete.json").write_text("{")
    found = training.complete_checkpoints(tmp_path)
    assert [folder for folder, _ in found] == [whole, older]


def test_a_run_is_continued_by_its_like_only(tmp_path, capsys):
    assert prepare(tmp_path, resume=False) == Start(None, False)
    folder = checkpoint(tmp_path, 4, stage=2)
    (tmp_path / "checkpoint-6").mkdir()
    assert prepare(tmp_path) == Start(str(folder), False)
    assert "checkpoint-6 is incomplete" in capsys.readouterr().err
    assert not (tmp_path / "checkpoint-6").exists()
    with pytest.raises(ValueError, match="resume"):
        prepare(tmp_path, resume=False)
    with pytest.raises(ValueError, match="another learning_rate"):
        prepare(tmp_path, learning_rate=2.0)
    for stage in (None, 1, 3):
        with pytest.raises(ValueError, match="under ZeRO stage 2"):
            prepare(tmp_path, stage=stage)


def test_checkpoints_without_settings_are_foreign(tmp_path):
    checkpoint(tmp_path, 4)
    with pytest.raises(ValueError, match="another run"):
        prepare(tmp_path, stage=None, ranks=1)


def test_other_numbers_of_ranks_need_the_universal_form(tmp_path):
    prepare(tmp_path, resume=False)
    folder = checkpoint(tmp_path, 4, stage=2)
    # as DeepSpeed leaves it once it has rewritten a checkpoint
    (folder / "latest_universal").touch()
    assert prepare(tmp_path, ranks=1) == Start(str(folder), True)


@pytest.mark.slow
def test_a_full_disk_stops_saving_not_training(tmp_path, monkeypatch, sample_path, capsys):
    """And a run in one process leaves an adapter that can be loaded again."""
    records.convert_pairs(load_pairs(str(sample_path), limit=6), tmp_path / "data")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(1, 1, 1000))
    out = tmp_path / "out"
    settings = {
        "data": tmp_path / "data",
        "model_name_or_path": TINY,
        "output_dir": out,
        "max_steps": 2,
        "save_steps": 1,
        "per_device_train_batch_size": 1,
        "logging_steps": 1,
    }
    training.main(words_of(settings))
    assert capsys.readouterr().out.count("not saved") == 2
    assert not list(out.glob("checkpoint-*"))
    log = json.loads((out / "log.json").read_text())
    assert [entry["step"] for entry in log] == [1, 2, 2]
    models.load_tuned(models.load_base(TINY), out / "model")
