"""The course in Chinese: nothing is missing, stale, or says another number than the English."""

import doctest
import json
import re
import shutil
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st

REPO = Path(__file__).parents[1]
sys.path.insert(0, str(REPO / "docs"))
import catalogues  # noqa: E402

TEXTS = catalogues.texts()
# The catalogues that must be whole: all notebooks, and these pages of the documentation. What is not
# listed is shown in English as far as it is not translated.
WHOLE = [name for name in TEXTS if name.startswith("notebooks/")]
WHOLE += ["benchmarks", "deploy", "first-day", "knobs", "launch", "privacy", "scale", "speed"]
WHOLE += ["recipes", "translate", "trust", "your-data"]
TERMS = tomllib.loads((REPO / catalogues.FOLDER / "glossary.toml").read_text("utf-8"))["terms"]


# ---- the catalogues that are committed


@pytest.mark.parametrize("name", WHOLE)
def test_everything_is_translated(name):
    missing = catalogues.missing_entries(name, TEXTS[name])
    assert not missing, f"'make catalogues', then translate in docs/locale/zh/{name}.po"


@pytest.mark.parametrize("name", TEXTS)
def test_nothing_is_translated_that_no_longer_stands_there(name):
    assert not catalogues.stale_entries(name, TEXTS[name]), "make catalogues"


@pytest.mark.parametrize("name", TEXTS)
def test_code_links_and_numbers_are_kept(name):
    wrong = {}
    for text, translated in catalogues.translations(name).items():
        if problems := catalogues.altered(text, translated):
            wrong[text] = problems
    assert not wrong


@pytest.mark.parametrize("name", TEXTS)
def test_terms_are_those_of_the_glossary(name):
    wrong = []
    for text, translated in catalogues.translations(name).items():
        # code, and what is quoted from a page or a message, stay as they are
        bare = re.sub(r"(?<!\*)\*[^*]+\*(?!\*)|\"[^\"]+\"", "", catalogues.CODE.sub("", text))
        for term, chinese in TERMS.items():
            named = re.search(rf"\b{term}s?\b", catalogues.TARGET.sub("", bare), re.I)
            if named and not any(word in translated for word in chinese):
                wrong.append((term, text[:80]))
    assert not wrong


def test_the_glossary_agrees_with_the_chinese_readme():
    assert len(TERMS) == 30
    readme = (REPO / "README.zh-CN.md").read_text("utf-8")
    shown = [words for words in TERMS.values() if any(word in readme for word in words)]
    assert len(shown) >= 15


@pytest.mark.parametrize("name", WHOLE)
def test_the_translation_is_chinese(name):
    """Hardly an entry without a Chinese character, and no punctuation of English between them."""
    for text, translated in catalogues.translations(name).items():
        bare = catalogues.CODE.sub("", translated)
        assert not re.search(r"[\u4e00-\u9fff][,;?!](?=[\u4e00-\u9fff])", bare), text
        if len(catalogues.CODE.sub("", text)) > 60:
            assert re.search(r"[\u4e00-\u9fff]", bare), text


def test_the_examples_hold():
    tried = doctest.testmod(catalogues)
    assert tried.attempted >= 6 and not tried.failed


# ---- the check notices


@pytest.mark.parametrize(
    ("text", "translated", "kind"),
    [
        ("The rank `lora_r` is 16.", "秩 `lora_a` 为 16。", "code"),
        ("See [05](05_evaluate.ipynb).", "见 [05](06_merge_export.ipynb)。", "target"),
        ("81% of 553 pairs", "553 对中的 18%", "number"),
        ("25 million pictures", "250 万张图片", "number"),
        ("| a | b |", "| 一 二 |", "border"),
        ("names {1} of {2}", "名称 {1}", "figure"),
        ("**Licence.** Nothing", "**许可。**什么也没有", "emphasis"),
        ("one line", "一\n行", "one line"),
    ],
)
def test_a_changed_translation_is_noticed(text, translated, kind):
    assert any(kind in problem for problem in catalogues.altered(text, translated))


@pytest.mark.parametrize(
    ("text", "translated"),
    [
        ("25 million pictures", "2500 万张图片"),
        ("1.3 billion parameters, 7,730 pairs", "7,730 个图文对，13 亿个参数"),
        ("`a` before `b`", "`b` 在 `a` 之后"),
        ("**Licence.** Nothing", "**许可**：什么也没有"),
    ],
)
def test_another_order_or_unit_is_no_change(text, translated):
    assert catalogues.altered(text, translated) == []


# ---- from the text to entries and back


@given(
    st.lists(
        st.sampled_from(
            [
                "# A heading",
                "Words over\ntwo lines.",
                "- an item\n  that goes on\n- another",
                "1. first\n2. second",
                "> a quote\n> of two lines",
                "| a | b |\n|---|---|\n| `c` | four |\n| 5 | 6 |",
                "```bash\nmake tutorial  # not this\n```",
                "<!-- results -->\n| a head |\n|---|\n| a row |\n<!-- /results -->",
                "81%<!-- = tiny-cpu notebooks/x .0f --> of the pairs",
            ]
        ),
        min_size=1,
        max_size=6,
    )
)
def test_every_entry_is_found_again_in_its_place(blocks):
    """Each entry in capitals: then all words are, but those of code and comments."""
    markdown = "\n\n".join(blocks)
    known = {entry: entry.upper() for entry in catalogues.entries_of([markdown])}
    shown = catalogues.translate(markdown, known)
    again = catalogues.entries_of([shown])
    assert again == [entry.upper() for entry in catalogues.entries_of([markdown])]
    assert shown.count("```") == markdown.count("```")
    assert re.findall(r"<!--.*?-->", shown) == re.findall(r"<!--.*?-->", markdown)
    assert catalogues.translate(markdown, {}) == markdown


def test_a_computed_figure_keeps_its_source():
    text = (
        "It names 45<!-- = a/scores.json right .0f -->% and 63<!-- = b/scores.json right .0f -->%."
    )
    assert catalogues.entries_of([text]) == ["It names {1}% and {2}%."]
    shown = catalogues.translate(text, {"It names {1}% and {2}%.": "先 {2}%，后 {1}%。"})
    assert shown == (
        "先 63<!-- = b/scores.json right .0f -->%，后 45<!-- = a/scores.json right .0f -->%。"
    )


def small_clone(folder: Path) -> Path:
    """A clone of one notebook and one page."""
    (folder / "notebooks").mkdir()
    (folder / "docs").mkdir()
    cells = [
        nbformat.v4.new_markdown_cell("# Title\n\nThe rank is 16. See [speed](../docs/speed.md)."),
        nbformat.v4.new_code_cell("print(16)"),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "notebooks" / "00_try.ipynb")
    (folder / "docs" / "speed.md").write_text("# Speed\n")
    return folder


def fill(root: Path, name: str, text: str, translated: str) -> None:
    catalogue = catalogues.read_catalogue(name, root)
    catalogue[text].string = translated
    catalogues.write_catalogue(catalogue, catalogues.catalogue_path(name, root))


def test_a_changed_sentence_is_fuzzy_and_shown_in_english(tmp_path):
    root = small_clone(tmp_path)
    name = "notebooks/00_try"
    sentence = "The rank is 16. See [speed](../docs/speed.md)."
    catalogues.update(name, catalogues.texts(root)[name], {"Title": "标题"}, root)
    assert catalogues.missing_entries(name, catalogues.texts(root)[name], root) == [sentence]
    fill(root, name, sentence, "秩为 16。见 [speed](../docs/speed.md)。")
    assert not catalogues.missing_entries(name, catalogues.texts(root)[name], root)
    # the English changes
    path = root / "notebooks" / "00_try.ipynb"
    path.write_text(path.read_text().replace("The rank is 16", "The rank is now 16"))
    parts = catalogues.texts(root)[name]
    assert catalogues.stale_entries(name, parts, root) == [sentence]
    catalogues.update(name, parts, {}, root)
    assert not catalogues.stale_entries(name, parts, root)
    assert "#, fuzzy" in catalogues.catalogue_path(name, root).read_text("utf-8")
    catalogues.write_notebooks(root)
    shown = nbformat.read(root / "notebooks" / "zh" / "00_try.ipynb", 4).cells[0].source
    assert shown == "# 标题\n\nThe rank is now 16. See [speed](../../docs/speed.md)."


def test_updating_twice_changes_nothing(tmp_path):
    root = small_clone(tmp_path)
    shutil.copytree(REPO / "docs" / "locale", root / "docs" / "locale")
    for name, parts in TEXTS.items():
        catalogues.update(name, parts, {}, root)
        path = catalogues.catalogue_path(name, root)
        assert path.read_text("utf-8") == catalogues.catalogue_path(name).read_text("utf-8")


# ---- the notebooks in Chinese


@pytest.mark.parametrize("path", sorted((REPO / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_the_code_is_untouched_and_the_links_lead_somewhere(path):
    english = json.loads(path.read_text("utf-8"))
    known = catalogues.translations(f"notebooks/{path.stem}")
    chinese = catalogues.translated_notebook(path, known)
    nbformat.validate(nbformat.from_dict(chinese))
    code = [[c["id"], c["source"]] for c in chinese["cells"] if c["cell_type"] == "code"]
    assert code[0][0] == "go-up-from-zh"
    assert code[1:] == [
        [c["id"], c["source"]] for c in english["cells"] if c["cell_type"] == "code"
    ]
    for text in catalogues.markdown_of(chinese):
        for target in catalogues.TARGET.findall(catalogues.CODE.sub("", text)):
            if not re.match(r"[a-z]+:|#", target):
                # a notebook's twin is written beside it
                twin = REPO / "notebooks" / target
                below = REPO / "notebooks" / "zh" / target.split("#")[0]
                assert twin.exists() or Path(re.sub(r"/zh/\.\./", "/", str(below))).exists()


def test_what_somebody_wrote_into_a_notebook_stays(tmp_path):
    root = small_clone(tmp_path)
    assert catalogues.write_notebooks(root) == []
    file = root / "notebooks" / "zh" / "00_try.ipynb"
    notebook = nbformat.read(file, 4)
    notebook.cells[1].outputs = [nbformat.v4.new_output("stream", text="16\n")]
    nbformat.write(notebook, file)
    assert catalogues.write_notebooks(root) == []
    # it was run, and the course has not changed: what it printed stays
    assert nbformat.read(file, 4).cells[1].outputs
    notebook.cells[2].source = "print(8)  # mine"
    nbformat.write(notebook, file)
    assert catalogues.write_notebooks(root) == [file]
    assert nbformat.read(file, 4).cells[2].source == "print(8)  # mine"
