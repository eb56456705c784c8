"""Sphinx settings of the site. `docs/build_site.py` gathers the pages and calls Sphinx; `make site`
calls both.
"""

import importlib
import json
import sys
from importlib.metadata import version as installed
from pathlib import Path

import jieba
from sphinx.search.en import SearchEnglish

project = "medtune"
author = "the medtune contributors"
project_copyright = "the medtune contributors, Apache-2.0"
release = version = installed("medtune")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["README*.md"]  # included in index.md
templates_path = ["_templates"]
# The same texts are built twice, in English and, one folder deeper, in Chinese.
HERE = Path(__file__).parent
CHINESE = (HERE / "headings.json").exists()

# Pages are shown as they were executed: nothing runs here, and nothing is fetched when a page is
# read.
nb_execution_mode = "off"
nb_ipywidgets_js = {}
nb_merge_streams = True
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
# A link into a page names the English heading; see heading_slugs.py.
sys.path.insert(0, str(HERE))
myst_heading_slug_func = "heading_slugs.slug"

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
# Words such as `tokens`, which stand where a docstring says a shape, are fields of several classes.
suppress_warnings = ["ref.python"]
default_role = "code"  # the docstrings write `x` for code

html_theme = "sphinx_book_theme"
html_title = "medtune"
html_static_path = ["_static"]
html_css_files = ["medtune.css"]
html_favicon = "_static/icon.svg"
html_search_language = "en-zh"
# nothing links to the list of modules, and its buttons have no names
html_domain_indices = False
# The switch of language: _templates/language.html.
html_context = {
    "chinese": CHINESE,
    "twins": json.loads((HERE / "twins.json").read_text("utf-8")),
}
# the notebooks can be had from the English page; twice they would be too many megabytes
html_copy_source = not CHINESE
html_theme_options = {
    "use_download_button": not CHINESE,
    "article_header_end": ["language.html", "article-header-buttons.html"],
    "show_toc_level": 2,
    "home_page_in_toc": True,
    "use_fullscreen_button": False,
    "navbar_persistent": [],  # the search field stands in the side bar
    "search_bar_text": "搜索课程" if CHINESE else "Search the course",
}


class SearchBoth(SearchEnglish):
    """English words as usual, Chinese ones cut by jieba; Sphinx's own "zh" names a stemmer that it
    does not ship.
    """

    lang = "en-zh"

    def split(self, input: str) -> list[str]:
        words = super().split(
            input
        )  # a run of Chinese characters is one word, which finds any part of it
        return words + [
            part for word in words if not word.isascii() for part in jieba.cut_for_search(word)
        ]


def home_of(app, module: str, attribute: str) -> str:
    """Name the module whose source is shown for a public name: of our own ones only.

    An alias such as `dict[str, float]` says that it comes from `builtins`, which has no page.
    """
    value = importlib.import_module(module)
    for part in attribute.split("."):
        value = getattr(value, part, None)
    home = getattr(value, "__module__", None) or module
    return home if home.startswith("medtune") else module


def setup(app) -> None:
    jieba.setLogLevel("WARNING")
    app.add_search_language(SearchBoth)
    app.connect("viewcode-follow-imported", home_of)
