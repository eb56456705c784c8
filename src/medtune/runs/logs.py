"""The log that a training left, and how many samples a step of it saw."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .params import find_root

# Notebooks that train, the first of which a run has is meant.
TRAINING_NOTEBOOKS = ("03_finetune_lora", "03b_finetune_launched", "07_locate_verify_diagnose")


@dataclass(frozen=True)
class TrainingLog:
    """What a training logged."""

    #: The entries as the trainer keeps them: "step", and "loss" or "eval_loss" among others.
    history: list[dict[str, Any]]
    #: Samples that one optimizer step saw on all ranks; None where nothing beside the log says it.
    samples_per_step: int | None


def read_log(run: str | Path, *, root: str | Path | None = None) -> TrainingLog:
    """Read the log of a run's training, also of one that is still going on.

    Parameters
    ----------
    run : name of a run, such as "tiny-cpu"; or a folder with `log.json`, as `medtune train` and the
        notebooks write it.
    root : the repository; see `medtune.runs.find_root`.

    Returns
    -------
    TrainingLog : the entries, and the samples of a step.

    Raises
    ------
    FileNotFoundError : there is no log.
    ValueError : the log is damaged.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "log.json").write_text('[{"step": 5, "loss": 2.0}]')
    >>> _ = (folder / "settings.json").write_text('{"samples_per_step": 128}')
    >>> read_log(folder).samples_per_step
    128
    """
    folder = _folder_of_log(run, root)
    file = folder / "log.json"
    try:
        history = json.loads(file.read_text("utf-8"))
        steps = [entry["step"] for entry in history]
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{file} is no log of a training: give a run, or its folder") from None
    if not steps:
        raise ValueError(f"{file} is empty: the training has not logged a step yet")
    return TrainingLog(history, _samples_per_step(folder))


def _folder_of_log(run: str | Path, root: str | Path | None) -> Path:
    """Find the folder with the log: that which was named, or that of a run's training."""
    named = Path(run)
    if (named / "log.json").is_file():
        return named
    places = [named]
    if named.name == str(run):
        places.append(find_root(root) / "papermill_runs" / named.name / "out")
    for place in places:
        for notebook in TRAINING_NOTEBOOKS:
            # the second is where ranks write, before the notebook takes it over
            for folder in (place / notebook, place / notebook / "training"):
                if (folder / "log.json").is_file():
                    return folder
    raise FileNotFoundError(
        f"no log.json of a training in {places[-1]}: 'medtune list' names the runs, and what is "
        "finished of each"
    )


def _samples_per_step(folder: Path) -> int | None:
    # a training of several ranks notes it when it starts, a notebook when it is done
    for name, key in (
        ("settings.json", "samples_per_step"),
        ("summary.json", "effective_batch_size"),
    ):
        file = folder / name
        if not file.is_file():
            continue
        told = json.loads(file.read_text("utf-8")).get(key)
        if told:
            return int(told)
    return None
