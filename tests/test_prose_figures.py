"""Figures in prose say what the committed files say."""

import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
sys.path.insert(0, str(REPO / "docs" / "figures"))
import prose_figures  # noqa: E402

SPECIFICITY = "tiny-cpu notebooks/07_locate_verify_diagnose/match/specificity .2f"


def markers(page: Path) -> list[str]:
    return [figure.marker for figure in prose_figures.figures_of(page.read_text("utf-8"))]


@pytest.mark.parametrize("page", prose_figures.pages(), ids=lambda page: page.name)
def test_the_figures_of_a_page_are_those_of_their_files(page):
    assert prose_figures.problems(page.read_text("utf-8")) == []


def test_both_readmes_hold_the_same_figures():
    english, chinese = (markers(REPO / name) for name in ("README.md", "README.zh-CN.md"))
    assert SPECIFICITY in english and len(english) >= 5
    assert sorted(english) == sorted(chinese)


@pytest.mark.parametrize("name", ["knobs.md", "speed.md", "launch.md", "recipes.md"])
def test_pages_with_an_artefact_have_figures(name):
    assert markers(REPO / "docs" / name)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (f"It is 0.99<!-- = {SPECIFICITY} -->.", "0.99 should be 0."),
        (f"It is high<!-- = {SPECIFICITY} -->.", "no number stands before"),
        ("It is 0.74<!-- = tiny-cpu notebooks/07/none .2f -->.", "KeyError"),
        ("It is 1<!-- = no-such-run timing .0f -->.", "FileNotFoundError"),
        ("It is 1<!-- = speed-h200 rung=fast96/samples_per_second .0f -->.", "rows have"),
        ("It is 1<!-- = . timing .0f -->.", "name one"),
        ("It is 1<!-- = computed nothing .0f -->.", "KeyError"),
        ("It is 1<!-- = study-knobs lora_r=3 .0f -->.", "no runs"),
        ("It is 1<!-- = tiny-cpu timing -->.", "a source, a way and a format"),
    ],
)
def test_a_figure_that_is_not_its_files_is_found(text, problem):
    (found,) = prose_figures.problems(text)
    assert found.startswith("line 1") and problem in found


@pytest.mark.parametrize("mark", ["<!--= {} -->", "<!-- ={} -->", "<!-- = {}-->", "<!--  = {} -->"])
def test_a_marker_that_is_not_written_as_one_is_found(mark):
    (found,) = prose_figures.problems("It is 0.74" + mark.format(SPECIFICITY))
    assert "with these spaces" in found


def test_figures_are_written_anew():
    right = "A\n\nIt is {}<!-- = " + SPECIFICITY + " -->, and 12 stays."
    (figure,) = prose_figures.figures_of(right.format("0.1"))
    assert prose_figures.rewritten(right.format("0.1")) == right.format(figure.wanted())
    readme = (REPO / "README.md").read_text("utf-8")
    assert prose_figures.rewritten(readme) == readme


def test_the_script_checks_and_writes(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(f"It is 0.99<!-- = {SPECIFICITY} -->.", "utf-8")
    monkeypatch.setattr(prose_figures, "pages", lambda: [page])
    with pytest.raises(SystemExit, match=r"page\.md, line 1: 0\.99 should be"):
        prose_figures.main(["--check"])
    assert "0.99" in page.read_text("utf-8")
    prose_figures.main([])
    prose_figures.main(["--check"])
    assert "0.99" not in page.read_text("utf-8")
