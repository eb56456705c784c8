"""Rehearse a run before anything is rented: its notebooks, offline, on random weights."""

import os
from pathlib import Path
from typing import Any

import torch

from medtune.plan import make_twin

from .execute import package_files, run
from .params import find_root, read_params


def rehearse(  # noqa: PLR0913 (two places to choose, and four sizes)
    name: str,
    *,
    steps: int = 2,
    scale: str | None = None,
    data: str | None = None,
    pairs: int = 120,
    root: str | Path | None = None,
) -> dict[str, Any]:
    """Execute a run's notebooks, offline, for a handful of steps on a twin of its model.

    Parameters
    ----------
    name : folder in `papermill_runs/`; results go to a run of the name `<name>-rehearsal`.
    steps : optimizer steps.
    scale : "full" for the model's shape, or "tiny"; by default full where there is a GPU.
    data : the data set, as notebook 01 takes it. By default that of the run if it lies on this
        machine, so that your own pictures are rehearsed; else the sample set, as a data set on the
        hub cannot be loaded offline. What is replaced is printed.
    pairs : about so many of its pairs.
    root : the repository; see `medtune.runs.find_root`.

    Returns
    -------
    dict : as from `medtune.runs.run`. Times and memory mean something at full scale; scores never
        do.

    Raises
    ------
    ValueError : a parameter is wrong, the shape of the run's model is not known, or a notebook
        fails.
    OSError : a file is missing, or the disk is full.
    """
    root = find_root(root)
    on_gpu = torch.cuda.is_available()
    if not scale:
        scale = "full" if on_gpu else "tiny"
    dtype = "bfloat16" if on_gpu else "float32"
    # the notebooks' processes inherit it
    os.environ["HF_HUB_OFFLINE"] = "1"
    planned = read_params(name, root=root)
    new_name = f"{name}-rehearsal"
    folder = root / "papermill_runs" / new_name
    model = _model_of(planned)
    twin = _twin_of(model, folder / "out", scale, dtype, root)
    print(f"rehearsal: random weights of the shape of {model} ({scale}) stand in its place")
    if data is None:
        data = _local_data(planned, root)
    wanted = {
        "data": data,
        "limit": pairs,
        "audit_limit": pairs,
        # an override's path is taken from the current folder
        "model_name_or_path": os.path.relpath(twin),
        "dtype": dtype,
        "num_train_epochs": 0.0,
        "max_steps": steps,
        "eval_steps": steps,
        "save_steps": steps,
        # so that a curve of a few steps has points
        "logging_steps": 1,
        "eval_samples": 8,
        "samples": 4,
        "max_new_tokens": 16,
    }
    wanted |= {
        "questions": 16,
        "dpo_steps": steps,
        "grpo_steps": steps,
        "sft_steps": steps,
        # random weights are never right, and never come to an end
        "lowest_pass_rate": 0.0,
        "highest_pass_rate": 1.0,
        "most_cut": 1.0,
    }
    if scale == "tiny":
        wanted |= {
            "per_device_train_batch_size": 2,
            "batch_size": 4,
            "sft_batch_size": 2,
            "dpo_batch_size": 2,
            "grpo_batch_size": 8,
            "dataloader_num_workers": 0,
            "max_pixels": 0,
        }
    # of an earlier rehearsal
    (folder / "params.yaml").unlink(missing_ok=True)
    return run(name, overrides=_overrides(planned, wanted), new_name=new_name, root=root)


def _local_data(planned: dict[str, dict[str, Any]], root: Path) -> str | None:
    """Name the run's data if they lie on this machine (None: leave them as they are), else the sample.

    Says which of the two it is.
    """
    named = [values["data"] for values in planned.values() if "data" in values]
    if not named:
        return None
    given = named[0]
    if given == "sample" or (root / "notebooks" / given).expanduser().exists():
        print(f"rehearsal: on the run's own data, {given}")
        return None
    print(f"rehearsal: {given} is not on this machine, the sample set stands in its place")
    return "sample"


def _model_of(planned: dict[str, dict[str, Any]]) -> str:
    """Return the model that the first notebook which takes one is given."""
    for values in planned.values():
        if "model_name_or_path" in values:
            return values["model_name_or_path"]
    raise ValueError("none of the run's notebooks takes a model: there is nothing to rehearse")


def _twin_of(model: str, out: Path, scale: str, dtype: str, root: Path) -> Path:
    """Return the folder of a twin of `model`, which is made if it is missing or outdated."""
    twin = out / f"{scale}-twin-of-{model.split('/')[-1]}"
    config = twin / "config.json"
    # a twin that an older version of the package made is made anew, as notebooks are executed anew
    newest = max(file.stat().st_mtime for file in package_files())
    if config.exists() and config.stat().st_mtime >= newest:
        return twin
    tokenizer = root / "data" / "tiny-vlm" / "tokenizer.json"
    make_twin(
        model,
        twin,
        scale=scale,
        dtype=dtype,
        device="cuda" if torch.cuda.is_available() else "cpu",
        tokenizer=tokenizer if tokenizer.exists() else None,
    )
    # the notebooks run in processes of their own and want the card
    torch.cuda.empty_cache()
    return twin


def _overrides(planned: dict[str, dict[str, Any]], wanted: dict[str, Any]) -> dict[str, Any]:
    """Give each notebook those of the wanted values that it declares, as `NOTEBOOK.key`."""
    overrides = {}
    known = {key: value for key, value in wanted.items() if value is not None}
    for notebook, values in planned.items():
        # two batches a step show what accumulation does, and more would only take longer
        batches = min(2, values.get("gradient_accumulation_steps", 1))
        chosen = {**known, "gradient_accumulation_steps": batches}
        # on a CPU two processes stand for any number of cards
        there = torch.cuda.device_count() or 2
        chosen["num_processes"] = min(there, values.get("num_processes", 1))
        for key, value in chosen.items():
            if key in values:
                overrides[f"{notebook}.{key}"] = value
    return overrides
