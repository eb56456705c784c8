"""The anchors of headings: those of a Chinese page are made of the English words, so that a link
into a page holds in both languages.
"""

import json
from pathlib import Path

from myst_parser.slugs import github_slugify

# Written by build_site.py: Chinese heading to English one; the English site has none.
FILE = Path(__file__).with_name("headings.json")
ENGLISH = json.loads(FILE.read_text("utf-8")) if FILE.exists() else {}


def slug(title: str) -> str:
    """Make the anchor of a heading."""
    return github_slugify(ENGLISH.get(title, title))
