"""How a run stops and goes on: complete checkpoints, who may continue what, and a full disk."""

import json
from collections import namedtuple
from pathlib import Path

import pytest
from tiny_training import TINY, make_data, make_model, words_of

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
    assert prepare(tmp_path, resume=False) == Start(None)
    folder = checkpoint(tmp_path, 4, stage=2)
    (tmp_path / "checkpoint-6").mkdir()
    assert prepare(tmp_path) == Start(str(folder))
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
    with pytest.raises(ValueError, match="holds a run already"):
        prepare(tmp_path, stage=None, ranks=1)


def test_other_numbers_of_ranks_need_the_universal_form(tmp_path):
    prepare(tmp_path, resume=False)
    folder = checkpoint(tmp_path, 4, stage=2)
    # as DeepSpeed leaves it once it has rewritten a checkpoint
    (folder / "latest_universal").touch()
    assert prepare(tmp_path, ranks=1) == Start(str(folder), universal=True)


# ---- finished runs


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_vlm) -> Path:
    """A small random model and records for it."""
    place = tmp_path_factory.mktemp("finished")
    make_model(place / "base", tiny_vlm, experts=False)
    make_data(place / "data", {"train": 4})
    return place


def train(place: Path, capsys, **changes) -> tuple[int, str]:
    """Train two steps with a checkpoint after each; return the exit code and the last line said."""
    settings = {
        "data": place / "data",
        "model_name_or_path": place / "base",
        "output_dir": place / "out",
        "max_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "per_device_train_batch_size": 1,
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    capsys.readouterr()
    code = 0
    try:
        training.main(words_of(settings | changes))
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr()
    return code, (said.err if code else said.out).strip().splitlines()[-1]


def steps_of(out: Path) -> list[int]:
    """The steps in the log of a run."""
    log = json.loads((out / "log.json").read_text())
    return [entry["step"] for entry in log if "loss" in entry]


def state_of(folder: Path) -> dict[str, int]:
    """The times at which the files of a folder were written."""
    return {str(file): file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


def test_a_finished_run_says_so_and_trains_no_more(place, capsys):
    out = place / "out"
    assert train(place, capsys)[0] == 0
    before = state_of(out)
    for _ in range(2):
        code, said = train(place, capsys, resume=True)
        assert code == 0
        assert f"{out} is finished after 2 steps, its model is in {out / 'model'}" in said
        assert state_of(out) == before
    # fewer steps than it has
    assert "finished after 2 steps" in train(place, capsys, resume=True, max_steps=1)[1]
    # other settings are another run, finished or not
    code, said = train(place, capsys, resume=True, lora_r=4)
    assert (code, "another lora_r" in said) == (1, True)
    code, said = train(place, capsys)
    assert (code, "holds a run already" in said) == (1, True)
    assert state_of(out) == before


def test_a_finished_run_becomes_longer(place, capsys):
    out = place / "longer"
    options = {"output_dir": out, "resume": True, "lr_scheduler_type": "constant"}
    assert train(place, capsys, **options, max_steps=3)[0] == 0
    assert train(place, capsys, **options, max_steps=5)[0] == 0
    assert steps_of(out) == [1, 2, 3, 4, 5]
    note = json.loads((out / "finished.json").read_text())
    assert note["steps"] == 5
    whole = place / "whole"
    assert train(place, capsys, **(options | {"output_dir": whole}), max_steps=5)[0] == 0
    weights = Path("model", "adapter_model.safetensors")
    assert (out / weights).read_bytes() == (whole / weights).read_bytes()


def test_epochs_end_and_become_more(place, capsys):
    options = {"output_dir": place / "epochs", "resume": True, "max_steps": -1}
    assert train(place, capsys, **options, num_train_epochs=1)[0] == 0
    assert "finished after 4 steps" in train(place, capsys, **options, num_train_epochs=1)[1]
    assert train(place, capsys, **options, num_train_epochs=2)[0] == 0
    assert steps_of(place / "epochs") == list(range(1, 9))


def test_a_run_killed_before_its_model_was_saved_takes_no_further_step(place, capsys):
    out = place / "killed"
    assert train(place, capsys, output_dir=out)[0] == 0
    weights = out / "model" / "adapter_model.safetensors"
    before = weights.read_bytes()
    (out / "finished.json").unlink()
    weights.unlink()
    assert train(place, capsys, output_dir=out, resume=True)[0] == 0
    assert steps_of(out) == [1, 2]
    assert weights.read_bytes() == before
    assert not (out / "checkpoint-3").exists()


def test_a_finished_run_without_checkpoints_cannot_become_longer(place, capsys):
    options = {"output_dir": place / "bare", "resume": True, "save_strategy": "no"}
    assert train(place, capsys, **options)[0] == 0
    assert "finished after 2 steps" in train(place, capsys, **options)[1]
    code, said = train(place, capsys, **options, max_steps=4)
    assert code == 1
    assert "left no checkpoint to train longer from" in said
    assert "finished after 2 steps" in train(place, capsys, **options)[1]


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
