"""Fields, entities, negation and language of medical captions, English and Chinese.

`rules.py` reads captions by patterns and by the words of `terms.toml`; `llm.py` asks a language
model to read them, and only one that the caller names. `translation.py` translates a set with a
local model that `endpoint.py` speaks with; `differences.py` finds what a translation changed, with
the numbers of `quantities.py`.
"""

from .differences import Difference, check_translation, check_translations
from .endpoint import Endpoint, NoAnswer, open_endpoint
from .llm import extract_with_llm
from .rules import (
    GENERIC,
    PLACES,
    TERMS,
    Caption,
    detect_language,
    entities,
    parse_caption,
    split_sentences,
    structure_spans,
)
from .translation import add_translations, read_translations, translate_captions

__all__ = [
    "GENERIC",
    "PLACES",
    "TERMS",
    "Caption",
    "Difference",
    "Endpoint",
    "NoAnswer",
    "add_translations",
    "check_translation",
    "check_translations",
    "detect_language",
    "entities",
    "extract_with_llm",
    "open_endpoint",
    "parse_caption",
    "read_translations",
    "split_sentences",
    "structure_spans",
    "translate_captions",
]
