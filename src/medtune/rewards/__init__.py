"""Rewards that can be checked, preference pairs from the truth, and questions worth asking.

`checkable` has one function for each reward, with the signature that TRL's `GRPOTrainer` calls;
`preferences` makes a better and a worse answer of each of the model's own; `pairs_on_disk` keeps
such pairs beside the records; `questions` keeps those that a model answers now right and now wrong.
"""

from .checkable import box_reward, finding_reward, format_reward, length_reward, name_reward
from .pairs_on_disk import read_preferences, write_preferences
from .preferences import KINDS, Preference, preference_pairs
from .questions import choose_questions, pass_rates

__all__ = [
    "KINDS",
    "Preference",
    "box_reward",
    "choose_questions",
    "finding_reward",
    "format_reward",
    "length_reward",
    "name_reward",
    "pass_rates",
    "preference_pairs",
    "read_preferences",
    "write_preferences",
]
