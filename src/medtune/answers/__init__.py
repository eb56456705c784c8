"""Answers of a vision-language model to a whole data set: in batches, resumable, with controls.

`generate` asks every sample and sums up the speed; `controls` makes the pictures of the control
runs, `slab_controls` the records of those about several pictures, an earlier one or a patient's
record; `deciding` gives the odds of two words at one place of the reference; `confidence` says how
likely a model found each token of its own answers; `prompts` turns rows of a data set into inputs;
`backends` has those that answer: Transformers, vLLM, and a `server` that speaks OpenAI's API;
`resume` keeps the answers on disk and goes on after a kill; `ranks` lets the processes of torchrun
answer together, and `spread` the machines of a Ray cluster; `predictions` reads answers that others made.
"""

from .backends import TransformersBackend
from .confidence import Spoken, answer_log_probs
from .controls import grey_picture, no_picture, shuffle_pictures
from .deciding import deciding_log_odds
from .generate import generate_answers, generation_speed
from .predictions import read_predictions
from .prompts import prompt_of
from .resume import read_answers
from .server import OpenAIServer
from .slab_controls import (
    picture_alone,
    record_alone,
    repeat_slice,
    shuffle_slices,
    swap_earlier,
    swap_pictures,
    swap_record,
)
from .spread import Tuned, answer_on_cluster

__all__ = [
    "OpenAIServer",
    "Spoken",
    "TransformersBackend",
    "Tuned",
    "answer_log_probs",
    "answer_on_cluster",
    "deciding_log_odds",
    "generate_answers",
    "generation_speed",
    "grey_picture",
    "no_picture",
    "picture_alone",
    "prompt_of",
    "read_answers",
    "read_predictions",
    "record_alone",
    "repeat_slice",
    "shuffle_pictures",
    "shuffle_slices",
    "swap_earlier",
    "swap_pictures",
    "swap_record",
]
