"""The keys of a training: what a YAML file may say, and what is refused."""

import json
from pathlib import Path

import pytest
from tiny_training import TINY, words_of

from medtune import training
from medtune.training.settings import zero_stage


def words(tmp_path: Path, **changes) -> list[str]:
    settings = {"data": tmp_path, "model_name_or_path": TINY, "output_dir": tmp_path / "out"}
    return words_of(settings | changes)


def test_a_yaml_with_the_names_of_trl(tmp_path):
    lines = [
        "data: here",
        "model_name_or_path: there",
        f"output_dir: {tmp_path}/out",
        "learning_rate: 2e-4",
        "lora_r: 4",
    ]
    (tmp_path / "train.yaml").write_text("\n".join(lines))
    argv = ["--config", str(tmp_path / "train.yaml"), "--lora_alpha", "9"]
    script_args, training_args, model_args = training.parse_arguments(argv)
    assert script_args.data == "here"
    assert training_args.learning_rate == 2e-4
    assert (model_args.lora_r, model_args.lora_alpha) == (4, 9)
    assert training_args.max_length is None, "or image tokens are cut"
    assert training_args.completion_only_loss, "or questions are learned"
    assert zero_stage(training_args) is None


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
        training.main(words(tmp_path, **changes))
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 1
    assert last.startswith("medtune train: rank 0: ") and word in last


def test_an_unknown_key_in_the_yaml_is_refused(tmp_path):
    (tmp_path / "train.yaml").write_text("data: x\nlora_rank: 8\n")
    with pytest.raises(ValueError, match="lora_rank"):
        training.parse_arguments(["--config", str(tmp_path / "train.yaml"), *words(tmp_path)])


def test_no_data_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        training.main(words(tmp_path))
    assert "medtune convert" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("offload", ["", "_offload"])
def test_the_files_of_deepspeed(stage, offload):
    """What they say; tests/test_training_launch.py trains with each."""
    config = json.loads(Path(training.ZERO[f"zero{stage}{offload}"]).read_text())
    zero = config["zero_optimization"]
    assert zero["stage"] == stage
    assert ("offload_optimizer" in zero) == bool(offload)
    assert ("offload_param" in zero) == (stage == 3 and bool(offload))
    for key in ("train_batch_size", "gradient_clipping", "gradient_accumulation_steps"):
        assert config[key] == "auto"


def test_there_are_no_other_files_of_deepspeed():
    assert len(training.ZERO) == 6


def test_the_decision_on_adapters_rests_on_its_runs():
    """float32 stays the default as long as bfloat16 ends clearly higher at some learning rate."""
    reference = Path(__file__).parents[1] / "papermill_runs" / "reference"
    file = reference / "adapter-precision" / "result.json"
    summary = json.loads(file.read_text())["summary"]
    least = []
    for row in summary.values():
        assert len(row["seeds"]) == 3
        least.append(min(row["relative_difference"]))
    assert max(least) > 0.02
    assert training.ScriptArguments(data="x").autocast_adapter_dtype


def test_a_file_of_settings_that_is_missing_or_no_yaml_is_told_in_one_line(tmp_path):
    with pytest.raises(
        ValueError, match=r"there is no file of settings .*none.yaml: docs/your-data"
    ):
        training.parse_arguments(["--config", str(tmp_path / "none.yaml")])
    (tmp_path / "broken.yaml").write_text("data: [records")
    with pytest.raises(ValueError, match=r"is no YAML: .* line 1, column 7") as error:
        training.parse_arguments(["--config", str(tmp_path / "broken.yaml")])
    assert "\n" not in str(error.value)
