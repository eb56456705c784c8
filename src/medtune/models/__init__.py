"""The model side of a fine-tune, in plain functions: load, adapt, merge and save.

`load.py` loads a processor, a base model (also in 4 bits) and a saved adapter; `adapters.py` says
which layers get an adapter and counts what is trained; `export.py` compares two models, writes a
model card and saves; `words.py` marks the tokens of words that weigh more in a loss.
"""

from .adapters import (
    PARTS,
    TARGETS,
    adapter_targets,
    count_parameters,
    parameter_groups,
    part_of,
)
from .export import (
    card_scores,
    compare_logits,
    model_card,
    save_model,
    text_logits,
    write_no_stub_cards,
)
from .load import (
    check_dtype,
    end_tokens,
    image_token_id,
    load_base,
    load_processor,
    load_tuned,
    nf4_config,
)
from .words import mark_words, weigh_tokens

__all__ = [
    "PARTS",
    "TARGETS",
    "adapter_targets",
    "card_scores",
    "check_dtype",
    "compare_logits",
    "count_parameters",
    "end_tokens",
    "image_token_id",
    "load_base",
    "load_processor",
    "load_tuned",
    "mark_words",
    "model_card",
    "nf4_config",
    "parameter_groups",
    "part_of",
    "save_model",
    "text_logits",
    "weigh_tokens",
    "write_no_stub_cards",
]
