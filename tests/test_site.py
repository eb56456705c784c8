"""The site: it builds without a warning, offline, small, every link leads somewhere, and it works
in a browser.
"""

import functools
import http.server
import importlib
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest

REPO = Path(__file__).parents[1]
for folder in ("docs", "docs/figures"):
    sys.path.insert(0, str(REPO / folder))
import build_site  # noqa: E402
import results_figure  # noqa: E402
import results_table  # noqa: E402

TEXTS = [
    *(
        "README.md",
        "README.zh-CN.md",
        "CONTRIBUTING.md",
        "data/README.md",
        "data/tiny-vlm/README.md",
    ),
    *sorted(
        f"docs/{path.name}" for path in (REPO / "docs").glob("*.md") if path.name != "index.md"
    ),
]
LINK = re.compile(r"\[[^\]]*\]\(([^()\s]+)\)")
# two sites are built: English and Chinese
slow = [pytest.mark.slow, pytest.mark.timeout(1200)]


# ---- the texts that the site is made of


@pytest.mark.parametrize("text", TEXTS)
def test_links_of_the_texts_lead_to_files(text):
    targets = [
        t for t in LINK.findall((REPO / text).read_text("utf-8")) if not re.match(r"[a-z]+:|#", t)
    ]
    assert not [
        target for target in targets if not ((REPO / text).parent / target.split("#")[0]).exists()
    ]


@pytest.mark.parametrize("text", TEXTS)
def test_commands_that_the_texts_name_exist(text):
    from medtune.cli import app

    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    code = re.findall(
        r"`([^`\n]+)`|^(?:\.venv/bin/)?(medtune .*)$", (REPO / text).read_text("utf-8"), re.M
    )
    named = [re.match(r"(?:\.venv/bin/)?medtune ([a-z]+)", a or b) for a, b in code]
    assert not {match[1] for match in named if match} - known


def test_both_readmes_show_the_same_things():
    def links(name: str) -> list[str]:
        return [
            t
            for t in LINK.findall((REPO / name).read_text("utf-8"))
            if t.startswith(("notebooks", "docs/", "papermill"))
        ]

    english = links("README.md")
    for picture in ("results.svg", "phantom.png"):
        stem, _, kind = picture.partition(".")
        english = [link.replace(picture, f"{stem}.zh.{kind}") for link in english]
    assert english == links("README.zh-CN.md")
    runs = [
        set(re.findall(r"`([a-z0-9-]*(?:qwen|gemma)[a-z0-9-]*)`", (REPO / n).read_text("utf-8")))
        for n in TEXTS[:2]
    ]
    assert runs[0] == runs[1] and len(runs[0]) >= 5


def test_the_picture_shows_the_numbers_of_the_reference_runs():
    drawn = results_figure.bars(results_table.read_runs(), results_figure.read_people())
    for name in ("results.svg", "results.zh.svg"):
        assert results_figure.shown(results_figure.FOLDER / name) == drawn, (
            "run docs/figures/results_figure.py"
        )


def test_the_picture_can_be_drawn(tmp_path):
    drawn = results_figure.bars(results_table.read_runs(), results_figure.read_people())
    results_figure.draw(drawn, 3, 2, tmp_path / "picture.svg")
    assert results_figure.shown(tmp_path / "picture.svg") == drawn


def test_every_room_stands_in_one_group():
    grouped = [name for names in build_site.GROUPS.values() for name in names]
    assert len(set(grouped)) == len(grouped)
    assert set(build_site.rooms()) == set(grouped)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("[a](notebooks/x.ipynb)", "[a](../notebooks/x.ipynb)"),
        ("[a](CONTRIBUTING.md#tests)", "[a](contributing.md#tests)"),
        ("[`a`](src/nothing.py) and [b](no/)", "`a` and b"),
        ("[a](https://example.org/x) [b](#here)", "[a](https://example.org/x) [b](#here)"),
        (
            "![bars of [a] b](docs/images/results.svg)",
            "![bars of [a] b](../files/docs/images/results.svg)",
        ),
        ("[run](papermill_runs/x/params.yaml)", "[run](../profiles.md#x)"),
    ],
)
def test_links_are_moved(before, after):
    pages = {
        "notebooks/x.ipynb": "notebooks/x.ipynb",
        "CONTRIBUTING.md": "about/contributing.md",
        "papermill_runs/x/params.yaml": "profiles.md#x",
        "docs/images/results.svg": "files/docs/images/results.svg",
    }
    assert build_site.move_links(before, "README.md", "about/zh.md", pages) == after


# ---- the built site


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The folder of HTML pages. A warning of Sphinx is an error of the build."""
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, REPO / "docs" / "build_site.py", "--out", out],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out / "html"


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, "BeautifulSoup"]:  # noqa: F821
    """Every page, parsed. The theme leaves templates among its own files, which are no pages."""
    from bs4 import BeautifulSoup

    files = [path for path in sorted(site.rglob("*.html")) if "_static" not in path.parts]
    return {path: BeautifulSoup(path.read_text("utf-8"), "html.parser") for path in files}


@pytest.fixture(scope="module")
def address(site) -> Iterator[str]:
    """The site as a web server offers it."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_) -> None:
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=site)
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


class TestSite:
    pytestmark = slow

    def test_it_has_all_that_was_promised(self, site):
        wanted = [
            "index",
            "recipes",
            "results",
            "profiles",
            "zh/index",
            "reference/data",
            "reference/tiny-vlm",
        ]
        wanted += ["reference/command", *(f"api/{name}" for name in build_site.rooms())]
        wanted += [f"notebooks/{path.stem}" for path in build_site.executed_notebooks()]
        wanted += [f"runs/{path.parent.name}/{path.stem}" for path in build_site.other_notebooks()]
        wanted += [text[5:-3] for text in TEXTS if text.startswith("docs/")]
        wanted += [f"zh/notebooks/{path.stem}" for path in build_site.executed_notebooks()]
        wanted += [f"zh/{text[5:-3]}" for text in TEXTS if text.startswith("docs/")]
        assert not [name for name in wanted if not (site / f"{name}.html").is_file()]

    def test_it_is_small(self, site):
        files = [path for path in site.rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files) < 40e6

    def test_every_link_leads_somewhere(self, site, pages):
        anchors = {
            path: {tag["id"] for tag in page.find_all(id=True)} for path, page in pages.items()
        }
        broken, followed = [], 0
        for path, page in pages.items():
            for tag in page.find_all(["a", "img", "link", "script"]):
                target = tag.get("href") or tag.get("src")
                parts = urlsplit(target or "")
                if not target or parts.scheme or target.startswith("#") and len(target) == 1:
                    continue
                goal = (path.parent / unquote(parts.path)).resolve() if parts.path else path
                goal = goal / "index.html" if goal.is_dir() else goal
                inside = goal.is_relative_to(site.resolve())
                anchored = (
                    not parts.fragment
                    or goal not in anchors
                    or unquote(parts.fragment) in anchors[goal]
                )
                followed += 1
                if not (inside and goal.is_file() and anchored):
                    broken.append(f"{path.relative_to(site)} -> {target}")
        assert followed > 500 and not broken

    def test_nothing_is_loaded_from_elsewhere(self, site, pages):
        loaded = [
            (path.name, tag.get("src") or tag.get("href"))
            for path, page in pages.items()
            for tag in page.find_all(["script", "link", "img", "iframe", "video", "source", "form"])
            if re.match(
                r"(https?:)?//", tag.get("src") or tag.get("href") or tag.get("action") or ""
            )
        ]
        assert not loaded
        for path in site.rglob("*.css"):
            assert not re.search(
                r"(url\(|@import)\s*[\"']?(https?:)?//", path.read_text("utf-8")
            ), path

    def test_a_notebook_page_shows_what_was_executed(self, pages, site):
        for path in build_site.executed_notebooks():
            page = pages[site / "notebooks" / f"{path.stem}.html"]
            cells = nbformat.read(path, 4).cells
            figures = [
                o
                for c in cells
                if c.cell_type == "code"
                for o in c.outputs
                if "image/png" in o.get("data", {})
            ]
            assert len(page.select("div.cell_output img")) >= len(figures), path.name
            assert len(page.select("div.cell_input")) == sum(
                cell.cell_type == "code" for cell in cells
            )
            assert (
                not page.select("div.cell_output .traceback")
                and "Traceback (most recent" not in page.text
            )
            folded = sum(
                "solution" in c.metadata.get("tags", []) for c in cells if c.cell_type == "code"
            )
            assert len(page.select("div.cell details, details.hide")) >= folded > 0, (
                "solutions are folded"
            )

    def test_a_room_page_shows_the_functions_of_its_files(self, pages, site):
        for room, modules in build_site.rooms().items():
            shown = {tag["id"] for tag in pages[site / "api" / f"{room}.html"].select("dt[id]")}
            for name in modules:
                module = importlib.import_module(name)
                for key, value in vars(module).items():
                    own = getattr(value, "__module__", "") == name
                    if own and callable(value) and not key.startswith("_"):
                        assert f"{name}.{key}" in shown

    @pytest.mark.parametrize(
        ("site_of", "words"),
        [
            ("", "perceptual hash"),
            ("", "find_box"),
            ("zh/", "微调"),
            ("zh/", "感知哈希"),
            ("zh/", "打乱"),
            ("zh/", "find_box"),
        ],
    )
    def test_search_finds_a_page(self, address, chromium, site_of, words):
        page = chromium.new_page()
        page.goto(f"{address}{site_of}search.html?q={words}")
        page.wait_for_selector("ul.search li a", timeout=20_000)
        page.locator("ul.search li a").first.click()
        page.wait_for_load_state()
        found = page.locator("main").inner_text().lower()
        assert any(word in found for word in words.lower().split())
        page.close()

    def test_searching_from_the_side_bar(self, address, chromium):
        page = chromium.new_page(viewport={"width": 1280, "height": 900})
        page.goto(address)
        page.locator("button.search-button-field").first.click()
        page.keyboard.type("leak")
        page.keyboard.press("Enter")
        page.wait_for_selector("ul.search li a", timeout=20_000)
        assert "search.html?q=leak" in page.url
        page.close()

    @pytest.mark.parametrize("width", [390, 1280])
    def test_in_the_browser(self, address, chromium, width):
        """No page asks another host, has an error, or is wider than the screen; every picture is
        there.
        """
        page = chromium.new_page(viewport={"width": width, "height": 844})
        asked, errors = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on(
            "response",
            lambda response: errors.append(response.url) if response.status >= 400 else None,
        )
        names = [
            "index",
            "zh/index",
            "zh/recipes",
            "zh/notebooks/03_finetune_lora",
            "recipes",
            "results",
            "profiles",
            "reference/command",
            "api/index",
            "api/boxes",
        ]
        for name in [
            *names,
            *(f"notebooks/{path.stem}" for path in build_site.executed_notebooks()),
        ]:
            page.goto(f"{address}{name}.html", wait_until="load")
            sizes = page.eval_on_selector_all(
                "main img", "images => images.map(i => i.complete && i.naturalWidth)"
            )
            assert all(sizes), name
            assert len(sizes) == 2 or name not in ("index", "zh/index"), "the README's pictures"
            assert page.evaluate("document.documentElement.scrollWidth") <= width, (
                f"{name} is too wide"
            )
        assert not errors and not [url for url in asked if not url.startswith((address, "data:"))]
        page.close()

    @pytest.mark.parametrize(
        ("here", "there"),
        [
            ("index", "zh/index"),
            ("notebooks/03_finetune_lora", "zh/notebooks/03_finetune_lora"),
            ("your-data", "zh/your-data"),
            # what there is in English only leads to the first page
            ("api/boxes", "zh/index"),
        ],
    )
    def test_the_switch_of_language_leads_to_the_same_page(self, address, chromium, here, there):
        page = chromium.new_page(viewport={"width": 390, "height": 844})
        page.goto(f"{address}{here}.html")
        assert page.evaluate("document.documentElement.lang") == "en"
        page.locator("a.language-switch").click()
        page.wait_for_url(f"{address}{there}.html")
        assert page.evaluate("document.documentElement.lang") == "zh-CN"
        page.locator("a.language-switch").click()
        back = here if there == f"zh/{here}" else "index"
        page.wait_for_url(f"{address}{back}.html")
        page.close()

    def test_notebooks_are_in_chinese(self, pages, site):
        """Their headings, that is; what stands in code and outputs is as it was executed."""
        for path in build_site.executed_notebooks():
            page = pages[site / "zh" / "notebooks" / f"{path.stem}.html"]
            heads = [tag.text for tag in page.select("article h2")]
            assert len(heads) > 4
            assert all(re.search(r"[\u4e00-\u9fff]", head) for head in heads), path.stem

    def test_every_picture_has_words(self, pages):
        wordless = []
        for path, page in pages.items():
            for picture in page.select("article img"):
                words = picture.get("alt", "")
                if len(words) < 8 or words.endswith((".png", ".svg")):
                    wordless.append((path.name, words))
        assert not wordless

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_axe_finds_nothing_serious(self, address, chromium, scheme):
        """What keeps people out who see, hear or point in another way: contrast, names, order."""
        from axe_playwright_python.sync_playwright import Axe

        page = chromium.new_page(viewport={"width": 1280, "height": 900}, color_scheme=scheme)
        found = []
        names = ["index", "zh/index", "notebooks/01_explore_data", "zh/notebooks/05_evaluate"]
        for name in [*names, "recipes", "api/boxes", "results", "search"]:
            page.goto(f"{address}{name}.html")
            for violation in Axe().run(page).response["violations"]:
                if violation["impact"] in ("serious", "critical"):
                    places = [node["html"][:200] for node in violation["nodes"][:3]]
                    found.append((name, violation["id"], places))
        page.close()
        assert not found
