"""Scores for answers, boxes and match probabilities, their intervals over patients, and rivals.

`text` counts words and characters as LLaMA-Factory and as papers do, `findings` asks whether the
right thing is named, `detection` whether a finding is reported where there is one, `listing`
whether all findings are listed and none is invented, `boxes` judges regions and match
probabilities, `intervals` draws whole patients or slices, `conditions` scores several models side
by side, `another` scores another person beside the held-out pairs, `predict` shows runs side by
side as LLaMA-Factory does, `slabs` judges answers about several pictures and records, `series` sets
answers about slices beside a report, `rivals` and `copiers` answer without a model, `abstaining`
says when not to answer, `invented` counts what is named and not there, `groups` says for whom a
model is worse, `agreement` counts the fields in which captions agree, `foreign` runs scores of other
programs, and `library` offers the text scores to `evaluate`.
`text` and `intervals` stand alone.

Every score gives one number a data set. With `per_sample=True` it gives one value a sample, as
`paired_bootstrap` takes it, and `with_intervals` adds an interval to each number.
"""

from .abstaining import Threshold, calibration_table, choose_threshold, risk_coverage
from .agreement import field_agreement
from .another import score_people
from .boxes import box_scores, match_scores
from .conditions import (
    Measure,
    ScoredCondition,
    compare_conditions,
    pair_score,
    score_conditions,
)
from .copiers import answer_by_kind, copy_nearest, thumbnail_vectors
from .detection import detection_scores
from .findings import RATIOS, finding_scores
from .foreign import mean_scores, run_scorer
from .groups import compare_groups, correct_for_looks
from .intervals import bootstrap_interval, paired_bootstrap, with_intervals
from .invented import invented_scores, named_in_pictures
from .library import evaluate_metric
from .listing import LISTING_QUESTIONS, listing_scores, read_listing
from .predict import PREDICT_NAMES, predict_table
from .rivals import most_frequent_caption, nearest_caption_copier
from .series import compare_with_report
from .slabs import SlabAnswer, read_slab_answer, slab_scores
from .text import llamafactory_scores, standard_scores

__all__ = [
    "LISTING_QUESTIONS",
    "PREDICT_NAMES",
    "RATIOS",
    "Measure",
    "ScoredCondition",
    "SlabAnswer",
    "Threshold",
    "answer_by_kind",
    "bootstrap_interval",
    "box_scores",
    "calibration_table",
    "choose_threshold",
    "compare_conditions",
    "compare_groups",
    "compare_with_report",
    "copy_nearest",
    "correct_for_looks",
    "detection_scores",
    "evaluate_metric",
    "field_agreement",
    "finding_scores",
    "invented_scores",
    "listing_scores",
    "llamafactory_scores",
    "match_scores",
    "mean_scores",
    "most_frequent_caption",
    "named_in_pictures",
    "nearest_caption_copier",
    "pair_score",
    "paired_bootstrap",
    "predict_table",
    "read_listing",
    "read_slab_answer",
    "risk_coverage",
    "run_scorer",
    "score_conditions",
    "score_people",
    "slab_scores",
    "standard_scores",
    "thumbnail_vectors",
    "with_intervals",
]
