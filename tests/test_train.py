"""Training in one process: parameters, what is refused, complete checkpoints, and the same as notebook 03."""

import json
from pathlib import Path

import pytest

from medtune import train

TINY = Path(__file__).parents[1] / "data" / "tiny-vlm"


def arguments(tmp_path: Path, **changes) -> list[str]:
    settings = {"data": tmp_path, "model_name_or_path": TINY, "output_dir": tmp_path / "out"} | changes
    return [part for key, value in settings.items() for part in (f"--{key}", str(value))]


def test_a_yaml_with_the_names_of_trl(tmp_path):
    lines = [
        "data: here",
        "model_name_or_path: there",
        f"output_dir: {tmp_path}/out",
        "learning_rate: 2e-4",
        "lora_r: 4",
    ]
    (tmp_path / "train.yaml").write_text("\n".join(lines))
    script, training, model = train.parse_arguments(["--config", str(tmp_path / "train.yaml"), "--lora_alpha", "9"])
    assert (script.data, training.learning_rate, model.lora_r, model.lora_alpha) == ("here", 2e-4, 4, 9)
    assert training.max_length is None and training.completion_only_loss, (
        "or image tokens are cut and questions learned"
    )
    assert train.zero_stage(training) is None


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"lerning_rate": 1}, "lerning_rate"),
        ({"max_steps": "many"}, "max_steps"),
        ({"resume_from_checkpoint": "elsewhere"}, "resume"),
        ({"model_name_or_path": ""}, "model_name_or_path"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(tmp_path, capsys, changes, word):
    with pytest.raises(SystemExit) as end:
        train.main(arguments(tmp_path, **changes))
    said = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 1 and said[-1].startswith("medtune.train: rank 0: ") and word in said[-1]


def test_an_unknown_key_in_the_yaml_is_refused(tmp_path):
    (tmp_path / "train.yaml").write_text("data: x\nlora_rank: 8\n")
    with pytest.raises(ValueError, match="lora_rank"):
        train.parse_arguments(["--config", str(tmp_path / "train.yaml"), *arguments(tmp_path)])


def test_no_data_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main(arguments(tmp_path))
    assert "medtune convert" in capsys.readouterr().err.splitlines()[-1]


def checkpoint(out: Path, step: int, stage: int | None = None) -> Path:
    folder = out / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"12345")
    note = {"step": step, "zero_stage": stage, "ranks": 2, "files": {"weights": 5}}
    (folder / "complete.json").write_text(json.dumps(note))
    return folder


def test_only_complete_checkpoints_count(tmp_path):
    whole, older = checkpoint(tmp_path, 20), checkpoint(tmp_path, 9)
    (checkpoint(tmp_path, 30) / "weights").write_bytes(b"123")  # cut off
    (checkpoint(tmp_path, 40) / "complete.json").unlink()  # killed before the note
    (checkpoint(tmp_path, 50) / "complete.json").write_text("{")
    assert [folder for folder, _ in train.complete_checkpoints(tmp_path)] == [whole, older]


def test_a_run_is_continued_by_its_like_only(tmp_path, capsys):
    settings = {"learning_rate": 1.0}
    assert train._prepare(tmp_path, settings, False, 2, 2) == (None, False)
    folder = checkpoint(tmp_path, 4, stage=2)
    (tmp_path / "checkpoint-6").mkdir()
    assert train._prepare(tmp_path, settings, True, 2, 2) == (str(folder), False)
    assert "checkpoint-6 is incomplete" in capsys.readouterr().err and not (tmp_path / "checkpoint-6").exists()
    with pytest.raises(ValueError, match="resume"):
        train._prepare(tmp_path, settings, False, 2, 2)
    with pytest.raises(ValueError, match="another learning_rate"):
        train._prepare(tmp_path, {"learning_rate": 2.0}, True, 2, 2)
    for stage in (None, 1, 3):
        with pytest.raises(ValueError, match="under ZeRO stage 2"):
            train._prepare(tmp_path, settings, True, stage, 2)
    checkpoint(tmp_path / "foreign", 4)
    with pytest.raises(ValueError, match="another run"):
        train._prepare(tmp_path / "foreign", settings, True, None, 1)


@pytest.mark.parametrize("name", ["zero1", "zero1_offload", "zero2", "zero2_offload", "zero3", "zero3_offload"])
def test_the_files_of_deepspeed(name):
    """What they say; tests/test_launch.py trains with each."""
    config = json.loads(Path(train.ZERO[name]).read_text())
    zero = config["zero_optimization"]
    assert zero["stage"] == int(name[4])
    assert ("offload_optimizer" in zero) == ("offload" in name) and ("offload_param" in zero) == (
        name == "zero3_offload"
    )
    assert {config[key] for key in ("train_batch_size", "gradient_clipping", "gradient_accumulation_steps")} == {"auto"}


@pytest.mark.slow
def test_a_full_disk_stops_saving_not_training(tmp_path, monkeypatch, sample_path, capsys):
    """And a run in one process leaves an adapter that can be loaded again."""
    from collections import namedtuple

    from medtune import convert, models
    from medtune.data import load_pairs

    convert.convert_pairs(load_pairs(str(sample_path), limit=6), tmp_path / "data")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(1, 1, 1000))
    more = {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 1, "logging_steps": 1}
    train.main(arguments(tmp_path, data=tmp_path / "data", **more))
    assert capsys.readouterr().out.count("not saved") == 2 and not list((tmp_path / "out").glob("checkpoint-*"))
    assert [entry["step"] for entry in json.loads((tmp_path / "out" / "log.json").read_text())] == [1, 2, 2]
    models.load_tuned(models.load_base(TINY), tmp_path / "out" / "model")
