"""Locate, verify, diagnose: a box head and a match head, trained with the language model.

`regions` reads boxes and words from drawn pictures and their captions; `records` makes batches in
which a sample serves one of three purposes; `model` has the two heads; `losses` says how each task
is judged; `trainer` weighs and logs the three losses; `gate` keeps back answers that do not match
their picture; `mismatch` chooses wrong pairs to test the match head with.

A sample of a batch serves one of three purposes. To *diagnose*: question and picture, and the
answer to learn. To *verify*: question, picture and a statement that belong together (match 1), or
the same with another sample's picture (match 0). Right pictures also teach to *locate* what the
question names. No answer ever stands behind a statement: it would be copied. At inference the model
drafts an answer first, and then the heads judge the draft as a statement.

Boxes are (x0, y0, x1, y1) as shares of the picture, 0..1.
"""

from .gate import choose_threshold, draw_result, locate_verify_diagnose
from .losses import TASKS
from .mismatch import wrong_pairs
from .model import MultiTaskModel
from .records import (
    IMAGE,
    PROMPT,
    REGION_QUESTION,
    STATEMENT,
    MultiTaskCollator,
    Sample,
    Target,
    ask,
    check_box,
    diagnosis_spans,
    encode,
    finding_of,
    question_of,
    statement_of,
)
from .regions import add_regions
from .trainer import LOGGED, MultiTaskTrainer

__all__ = [
    "IMAGE",
    "LOGGED",
    "PROMPT",
    "REGION_QUESTION",
    "STATEMENT",
    "TASKS",
    "MultiTaskCollator",
    "MultiTaskModel",
    "MultiTaskTrainer",
    "Sample",
    "Target",
    "add_regions",
    "ask",
    "check_box",
    "choose_threshold",
    "diagnosis_spans",
    "draw_result",
    "encode",
    "finding_of",
    "locate_verify_diagnose",
    "question_of",
    "statement_of",
    "wrong_pairs",
]
