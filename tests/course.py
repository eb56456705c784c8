"""Runs of the course as a user starts them, shortened; the tests are in test_course*.py.

Two chains of notebooks share the work, so that two workers of pytest can run them side by side.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import yaml

from medtune import runs

REPO = Path(__file__).parents[1]
# Everything that a notebook checks still has to hold. The core, also on other data than the sample.
CORE = [
    "00_start_here",
    "01_explore_data",
    "02_convert_data",
    "03_finetune_lora",
    "05_evaluate",
    "06_merge_export",
]
# The first chain is the story: data, adapter, scores, merge, chat, rewards, trust, and out of the
# notebook.
STORY = [
    *CORE,
    "09_chat",
    "12_reward_what_is_true",
    "13_when_to_trust",
    "14_out_of_the_notebook",
]
STORY_SHORTER = {
    "03.max_steps": 200,  # with 150 names are at 42%, not far from the floor of test_course.py
    "05.eval_samples": 320,
    "12.questions": 12,
    "12.dpo_steps": 2,
    "12.grpo_steps": 2,
    "12.grpo_batch_size": 8,
    "12.sft_steps": 2,
    "12.gamed_steps": 1,
    "12.eval_samples": 9,
    "13.validation_samples": 60,
    "13.robust_samples": 8,
    "13.named_samples": 8,
}
# The second are the notebooks that train by themselves; they need the records of 02 only.
TRAININGS = [
    "02_convert_data",
    "04_train_on_many_gpus",
    "07_locate_verify_diagnose",
    "08_study_the_knobs",
]
TRAININGS += ["10_make_it_fast", "11_volumes_priors_records"]
TRAININGS_SHORTER = {
    "02.limit": 1500,
    "04.parity_steps": 2,
    "04.samples": 32,
    "04.eval_samples": 8,
    "07.max_steps": 30,
    "07.eval_samples": 16,
    "07.vain_samples": 8,
    "08.ranks": [4],
    "08.seeds": 1,
    "08.max_steps": 3,
    "08.eval_samples": 3,
    "10.steps": 4,
    "10.fast_steps": 4,
    "10.pairs": 40,
    "11.max_steps": 4,
    "11.eval_steps": 4,
    "11.eval_samples": 4,
}


def copy_of_the_clone(folder: Path, notebooks: list[str]) -> Path:
    """A root of its own for a run of some notebooks: they and the parameters copied, data linked."""
    shutil.copytree(REPO / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns(".*"))
    params = yaml.safe_load(
        (REPO / "papermill_runs" / "tiny-cpu" / "params.yaml").read_text("utf-8")
    )
    (folder / "papermill_runs" / "tiny-cpu").mkdir(parents=True)
    params["notebooks"] = notebooks
    (folder / "papermill_runs" / "tiny-cpu" / "params.yaml").write_text(
        yaml.safe_dump(params), "utf-8"
    )
    (folder / "papermill_runs" / "reference").symlink_to(REPO / "papermill_runs" / "reference")
    (folder / "data").symlink_to(REPO / "data")
    return folder


def medtune(*arguments) -> str:
    """The command as a user starts it; fails with what it complained about."""
    command = [Path(sys.executable).with_name("medtune"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run_chain(folder: Path, notebooks: list[str], shorter: dict, name: str) -> Path:
    """Run some notebooks with fewer steps; return the output folder."""
    root = copy_of_the_clone(folder, notebooks)
    changes = [part for key, value in shorter.items() for part in ("--set", f"{key}={value}")]
    table = medtune("run", "tiny-cpu", *changes, "--name", name, "--root", root)
    assert all(notebook in table for notebook in notebooks)
    return root / "papermill_runs" / name / "out"


def keys(value, above: str = "") -> list[str]:
    """All keys of nested mappings, as dotted paths."""
    if not isinstance(value, dict):
        return []
    return [
        path
        for key, inner in value.items()
        for path in (f"{above}{key}", *keys(inner, f"{above}{key}."))
    ]


def check_outputs(out: Path, notebooks: list[str]) -> None:
    """Each notebook has outputs, no error, and a summary with its times under "timing"."""
    summary = json.loads((out / "summary.json").read_text("utf-8"))
    assert list(summary["notebooks"]) == notebooks
    for name in notebooks:
        executed = nbformat.read(out / f"{name}.ipynb", 4)
        outputs = [
            output for cell in executed.cells if cell.cell_type == "code" for output in cell.outputs
        ]
        assert outputs and not any(output.output_type == "error" for output in outputs)
        timed = [
            key
            for key in keys(summary["notebooks"][name])
            if re.search(r"second|minute|date|_time\b", key)
        ]
        assert all(key.startswith("timing") for key in timed), (
            f"{name}: times belong under 'timing', not {timed}"
        )


def check_second_start(out: Path, notebooks: list[str]) -> None:
    """A second start keeps everything."""
    said = medtune("run", out.parent.name, "--root", out.parents[2])
    assert said.count("finished before and unchanged") == len(notebooks)


def tiny_run() -> list[str]:
    """The notebooks of the tiny run."""
    return list(runs.read_params("tiny-cpu", root=REPO))
