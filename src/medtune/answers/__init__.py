"""Answers of a vision-language model to a whole data set: in batches, resumable, with controls.

`generate` asks every sample and sums up the speed; `controls` makes the pictures of the control
runs; `prompts` turns rows of a data set into inputs; `backends` has the two that answer,
Transformers and vLLM; `resume` keeps the answers on disk and goes on after a kill; `predictions`
reads answers that others made.
"""

from .controls import grey_picture, no_picture, shuffle_pictures
from .generate import generate_answers, generation_speed
from .predictions import read_predictions
from .resume import read_answers

__all__ = [
    "generate_answers",
    "generation_speed",
    "grey_picture",
    "no_picture",
    "read_answers",
    "read_predictions",
    "shuffle_pictures",
]
