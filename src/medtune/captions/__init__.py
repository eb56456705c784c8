"""Fields, entities, negation and language of medical captions, English and Chinese.

`rules.py` reads captions by patterns and by the words of `terms.toml`; `llm.py` asks a language
model to read or translate them, and only one that the caller names.
"""

from .llm import extract_with_llm, translate
from .rules import PLACES, TERMS, Caption, detect_language, entities, parse_caption

__all__ = [
    "PLACES",
    "TERMS",
    "Caption",
    "detect_language",
    "entities",
    "extract_with_llm",
    "parse_caption",
    "translate",
]
