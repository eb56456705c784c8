"""Runs: a folder with a `params.yaml` in, executed notebooks and their results out.

`params` reads what notebooks declare and what a run says, `overrides` makes a new run of an old
one, `execute` executes the notebooks with papermill and keeps what is finished and unchanged,
`cores` counts the cores that are free for it, `usual` warns when a notebook takes far too long,
`logs` reads what a training logged, `card` says of a run what checklists of papers ask for,
`reference` copies a finished run to where it is kept, and `clean` removes what a run left. Two
files load the large libraries and are imported by their own names: `medtune.runs.study` makes many
runs of the levels of some parameters, `medtune.runs.rehearse` executes a run with random weights.
"""

from .card import write_card
from .clean import clean
from .execute import list_runs, results_of, run
from .logs import TrainingLog, read_log
from .params import Parameter, declared_parameters, find_root, read_params
from .reference import lend_pictures, write_reference

__all__ = [
    "Parameter",
    "TrainingLog",
    "clean",
    "declared_parameters",
    "find_root",
    "lend_pictures",
    "list_runs",
    "read_log",
    "read_params",
    "results_of",
    "run",
    "write_card",
    "write_reference",
]
