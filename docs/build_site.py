"""Build the site: gather the pages into OUT/source, then let Sphinx write OUT/html. Nothing is
executed or fetched. The same in Chinese goes from OUT/source-zh to OUT/html/zh.

python docs/build_site.py                  # the site in docs/_build/html; open index.html
python docs/build_site.py --out elsewhere

The pages are the READMEs, the texts of this folder, the executed notebooks of the reference run,
the cards of data and
base model, the run profiles, the tables of results, and a page for each room of the package. In
Chinese there are the README, the notebooks and the texts of this folder; they link to the English
page where there is no Chinese one.
"""

import argparse
import ast
import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from myst_parser.slugs import github_slugify

sys.path.insert(0, str(Path(__file__).parent))
import catalogues  # noqa: E402

REPO = Path(__file__).parents[1]
RUN = "tiny-cpu"
CHINESE_README = "README.zh-CN.md"
# Of the theme's files in _static, those that would be two megabytes more in a second copy.
LARGE_FILES = ("scripts/fontawesome.js", "styles/pydata-sphinx-theme.css")
# A link of the repository's texts: a picture or not, its words, the file, an anchor in it.
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s#]*)(#[^()\s]*)?\)")
PROGRESS_BAR = "application/vnd.jupyter.widget-view+json"
# The four groups of the README. A room that stands in none of them is a mistake that a test finds.
GROUPS = {
    "Data": ("pairs", "modelscope", "captions", "boxes", "audit", "records"),
    "Model": ("models", "plan", "training", "rewards", "multitask"),
    "Judge": ("answers", "scores", "benchmarks", "plots"),
    "Run": ("runs", "cluster", "chat", "deploy", "cli", "files"),
}
# File of the repository -> page of the site; more are added where files are many.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "about/contributing.md",
    "CHANGELOG.md": "about/changelog.md",
    "LICENSE": "about/licence.md",
    "data/README.md": "reference/data.md",
    "data/tiny-vlm/README.md": "reference/tiny-vlm.md",
    "papermill_runs/reference": "results.md",
    "src/medtune": "api/index.md",
}


def find_pages(repo: Path = REPO) -> dict[str, str]:
    """Map each file of the repository that has a page to the page's path."""
    pages = dict(PAGES)
    pages |= {f"docs/{path.name}": path.name for path in (repo / "docs").glob("*.md")}
    for path in executed_notebooks(repo):
        pages[f"notebooks/{path.name}"] = pages[str(path.relative_to(repo))] = (
            f"notebooks/{path.name}"
        )
    for path in other_notebooks(repo):
        pages[str(path.relative_to(repo))] = f"runs/{path.parent.name}/{path.name}"
    for room, files in rooms(repo).items():
        pages[f"src/medtune/{room}"] = f"api/{room}.md"
        for module in files:
            file = module.replace(".", "/") + ".py"
            heading = "" if module == f"medtune.{room}" else "#" + module.rpartition(".")[2]
            pages[f"src/{file}"] = f"api/{room}.md{heading}"
    for path in profiles(repo):
        folder = f"papermill_runs/{path.parent.name}"
        anchor = github_slugify(path.parent.name)
        pages[folder] = pages[f"{folder}/params.yaml"] = f"profiles.md#{anchor}"
    for file in [
        file for file in pages if file.endswith(".md")
    ]:  # pictures and small files that a text links to
        for target in re.findall(r"\]\(([^()\s#:]+)\)", (repo / file).read_text("utf-8")):
            linked = os.path.normpath(os.path.join(os.path.dirname(file), target))
            if (repo / linked).is_file() and not linked.endswith((".md", ".ipynb")):
                pages.setdefault(linked, f"files/{linked}")
    return pages


def chinese_pages(repo: Path = REPO) -> dict[str, str]:
    """Map each file that has a page in Chinese to that page; the files that these link to go along."""
    pages = {CHINESE_README: "index.md"}
    for file, page in find_pages(repo).items():
        if is_translated(file) or page.startswith("files/"):
            pages[file] = page
    for target in re.findall(
        r"\]\((docs/images/[^()\s]+)\)", (repo / CHINESE_README).read_text("utf-8")
    ):
        pages[target] = f"files/{target}"
    return pages


def is_translated(file: str) -> bool:
    """Say whether a file has a catalogue: the notebooks and the texts of `docs/`."""
    executed = f"papermill_runs/reference/{RUN}/"
    return file.endswith((".md", ".ipynb")) and file.startswith(("notebooks/", "docs/", executed))


def english_pages(repo: Path = REPO) -> dict[str, str]:
    """Map each file to its English page, as the Chinese site sees it: one folder above its own."""
    pages = {file: f"../{page}" for file, page in find_pages(repo).items()}
    return pages | {"README.md": "../index.md"}


def executed_notebooks(repo: Path = REPO) -> list[Path]:
    """Notebooks of the reference run, in their order."""
    return sorted((repo / "papermill_runs" / "reference" / RUN).glob("*.ipynb"))


def other_notebooks(repo: Path = REPO) -> list[Path]:
    """Executed notebooks of the other reference runs."""
    paths = sorted((repo / "papermill_runs" / "reference").glob("*/*.ipynb"))
    return [path for path in paths if path.parent.name != RUN]


def profiles(repo: Path = REPO) -> list[Path]:
    """Parameters of the runs that come with the repository; `medtune run --name` marks what a
    reader made of them.
    """
    paths = sorted((repo / "papermill_runs").glob("*/params.yaml"))
    return [path for path in paths if not path.read_text("utf-8").startswith("# Copied from")]


def rooms(repo: Path = REPO) -> dict[str, list[str]]:
    """Room of the package to the names of its modules; a file beside the folders is a room of one."""
    package = repo / "src" / "medtune"
    found = {}
    for path in sorted(package.iterdir()):
        if (path / "__init__.py").is_file():
            files = [
                file.stem for file in sorted(path.glob("*.py")) if not file.stem.startswith("__")
            ]
            found[path.name] = [f"medtune.{path.name}.{file}" for file in files]
        elif path.suffix == ".py" and path.stem != "__init__":
            found[path.stem] = [f"medtune.{path.stem}"]
    return found


def first_line(room: str, repo: Path = REPO) -> str:
    """What a room's docstring says first."""
    folder = repo / "src" / "medtune" / room
    file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    return (ast.get_docstring(ast.parse(file.read_text("utf-8"))) or "").split("\n")[0]


def move_links(
    text: str,
    file: str,
    page: str,
    pages: dict[str, str],
    elsewhere: dict[str, str] | None = None,
) -> str:
    """Turn the relative links of a repository's file into links between pages; what has no page
    loses its link.

    What has a page in the other language only, `elsewhere`, gets a link out of this site: it is
    HTML, for Sphinx knows nothing of that page.

    Examples
    --------
    >>> move_links("[03](notebooks/03.ipynb), [x](y.py)", "README.md", "a/zh.md", {"notebooks/03.ipynb": "03.ipynb"})
    '[03](../03.ipynb), x'
    >>> move_links("[规则](a.py)", "README.md", "index.md", {}, {"a.py": "../api/a.md"})
    '<a href="../api/a.html">规则</a>'
    """

    def moved(match: re.Match) -> str:
        picture, label, target, anchor = match.groups()
        if re.match(r"[a-z]+:|#", target) or not target:
            return match.group()
        path = os.path.normpath(os.path.join(os.path.dirname(file), target))
        start = os.path.dirname(page) or "."
        new, _, own = pages.get(path, "").partition("#")
        if new:
            anchor = f"#{own}" if own else anchor or ""
            return f"{picture}[{label}]({os.path.relpath(new, start)}{anchor})"
        new, _, own = (elsewhere or {}).get(path, "").partition("#")
        if not new:
            return label
        address = re.sub(r"\.(md|ipynb)$", ".html", os.path.relpath(new, start))
        return f'<a href="{html.escape(address)}{"#" + own if own else ""}">{label}</a>'

    return LINK.sub(moved, text)


def clean_notebook(
    notebook: dict, name: str, page: str, pages: dict[str, str], language: str = "en"
) -> dict:
    """Keep what a reader wants: no progress bars, no library's warnings, solutions folded, links
    between pages.
    """
    chinese = language == catalogues.LANGUAGE
    known = catalogues.translations(f"notebooks/{Path(name).stem}") if chinese else {}
    elsewhere = english_pages() if chinese else {}
    said = ""
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            text = catalogues.translate("".join(cell["source"]), known)
            said = text
            cell["source"] = move_links(text, f"notebooks/{name}", page, pages, elsewhere)
        elif "outputs" in cell:
            kept = [output for output in cell["outputs"] if output.get("name") != "stderr"]
            cell["outputs"] = [
                output for output in kept if PROGRESS_BAR not in output.get("data", {})
            ]
        tags = cell["metadata"].get("tags", [])
        cell["metadata"] = {
            "tags": [*tags, "hide-cell"] if "solution" in tags and "outputs" in cell else tags,
            # who cannot see a figure is told what the text before it says of it
            "mystnb": {"image": {"alt": words_before_figure(said, chinese)}},
        }
    notebook["cells"].insert(1, note_on_top(name, page, language))
    notebook["metadata"] = {
        key: notebook["metadata"][key] for key in ("kernelspec", "language_info")
    }
    return notebook


def words_before_figure(markdown: str, chinese: bool) -> str:
    """Put the last passage of a text into words for a figure that follows it.

    Examples
    --------
    >>> words_before_figure("## Boxes\\n\\nHow **large** are they?", chinese=False)
    'Figure: How large are they?'
    """
    passages = catalogues.passages_of(markdown)
    words = catalogues.plain(passages[-1].text) if passages else ""
    return f"{'图：' if chinese else 'Figure: '}{words}"


def note_on_top(name: str, page: str, language: str = "en") -> dict:
    """A cell that says what the reader has before him."""
    run = page.split("/")[1] if page.startswith("runs/") else RUN
    text = (
        f"This is the notebook as the reference run `{run}` executed it, without progress bars and pictures of "
        "the patient; in some figures a drawn body stands for them, and a line above says so. "
        f"To run it yourself: `make lab`, then open `notebooks/{name}`."
    )
    if language == catalogues.LANGUAGE:
        text = (
            f"这是参考运行 `{run}` 执行过的笔记本，不含进度条和患者的图片；有些图用画出来的人体代替，图上方有一行说明。"
            f"想自己运行：`make lab LANGUAGE=zh`，然后打开 `notebooks/zh/{name}`。"
        )
    text = f":::{{note}}\n{text}\n:::"
    return {"cell_type": "markdown", "id": "about-this-page", "metadata": {}, "source": text}


def table(head: tuple[str, ...], rows: list[tuple]) -> str:
    """A Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return (
        "\n".join(
            "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |"
            for line in lines
        )
        + "\n"
    )


def show(value: object) -> object:
    """A number as people read it."""
    if type(value) is int:
        return f"{value:,}"
    return f"{value:,.4g}" if isinstance(value, float) and abs(value) < 1e4 else value


def results_page(repo: Path = REPO) -> str:
    """Tables of what the committed reference runs found; all computed from their summaries."""
    readme = (repo / "README.md").read_text("utf-8")
    parts = [
        "# Results",
        "Computed from the summaries in `papermill_runs/reference/`; nothing here is typed by hand.",
    ]
    parts += [
        "## Before and after",
        re.search(r"<!-- results -->\n(.*?)<!-- /results -->", readme, re.S).group(1),
    ]
    for path in sorted((repo / "papermill_runs" / "reference").glob("*/summary.json")):
        summary = json.loads(path.read_text("utf-8"))
        if "notebooks" not in summary:  # a study has tables of its own
            continue
        parts.append(f"## The run {summary['run']}")
        minutes, rows = summary.get("timing", {}), []
        for name, found in summary["notebooks"].items():
            numbers = [
                (k, v) for k, v in found.get("results", found).items() if type(v) in (int, float)
            ]
            cell = ", ".join(f"{key.replace('_', ' ')} {show(value)}" for key, value in numbers)
            rows.append((name, minutes.get(name, ""), cell or "see the notebook"))
        parts.append(table(("notebook", "minutes", "results"), rows))
        converted = summary["notebooks"].get("02_convert_data", {})
        if summary["run"] == RUN and "box_finders" in converted:
            parts.append("### What a copier scores without any model (02)")
            for split, found in converted["copiers"].items():
                head = ("copied caption", *next(iter(found.values())))
                parts.append(f"{split[0].upper()}{split[1:]}:")
                parts.append(
                    table(
                        head,
                        [(name, *map(show, scores.values())) for name, scores in found.items()],
                    )
                )
            parts.append("### Finders of a drawn box, on boxes whose place is known (02)")
            finders = converted["box_finders"]
            head = ("finder", *next(iter(finders.values())))
            parts.append(
                table(head, [(name, *map(show, found.values())) for name, found in finders.items()])
            )
    if others := other_notebooks(repo):
        names = [
            (f"{path.parent.name}: {path.stem}", f"runs/{path.parent.name}/{path.stem}")
            for path in others
        ]
        parts += [
            "## Executed notebooks of other runs",
            "\n".join(f"- [{title}]({page}.ipynb)" for title, page in names),
        ]
        parts.append(
            "```{toctree}\n:hidden:\n\n"
            + "\n".join(f"{title} <{page}>" for title, page in names)
            + "\n```"
        )
    return "\n\n".join(parts)


def profiles_page(repo: Path = REPO) -> str:
    """Every `papermill_runs/<name>/params.yaml`, as it is."""
    parts = [
        "# Run profiles",
        "A run is a folder `papermill_runs/<name>/` with the file `params.yaml`: which notebooks, with which "
        "parameters. Start one with `medtune run <name>`; list all its parameters with `medtune params <name>`.",
    ]
    for path in profiles(repo):
        parts += [f"## {path.parent.name}", f"```yaml\n{path.read_text('utf-8').strip()}\n```"]
    return "\n\n".join(parts)


def api_pages(repo: Path = REPO) -> dict[str, str]:
    """One page a room and an overview in the four groups."""
    known = rooms(repo)
    text = (
        "# The package\n\nA folder is a room with files of one job each; its `__init__.py` shows its "
        "public names. Data flows one way: sample or source, audit, records, training, answers, scores.\n"
    )
    pages = {}
    for group, names in GROUPS.items():
        names = [name for name in names if name in known]
        rows = [(f"[{name}]({name}.md)", first_line(name, repo)) for name in names]
        text += f"\n## {group}\n\n{table(('room', 'what it does'), rows)}\n"
        text += "```{toctree}\n:hidden:\n\n" + "\n".join(names) + "\n```\n"
        for name in names:
            pages[f"api/{name}.md"] = room_page(name, known[name])
    return pages | {"api/index.md": text}


def room_page(room: str, modules: list[str]) -> str:
    """The page of a room: what it is for, then each of its files."""
    parts = [f"# medtune.{room}"]
    if modules != [f"medtune.{room}"]:
        parts.append(f"```{{eval-rst}}\n.. automodule:: medtune.{room}\n```")
    for module in modules:
        if module != f"medtune.{room}":
            parts.append(f"## {module.rpartition('.')[2]}")
        parts.append(f"```{{eval-rst}}\n.. automodule:: {module}\n   :members:\n```")
    return "\n\n".join(parts) + "\n"


def gather(source: Path, repo: Path = REPO) -> None:
    """Write every page into the folder `source`."""
    pages = find_pages(repo)
    begin(source, repo)
    # the switch of language leads to the same page
    twins = {file: page for file, page in chinese_pages(repo).items() if is_translated(file)}
    write_twins(source, twins)
    written = {"results.md": results_page(repo), "profiles.md": profiles_page(repo)} | api_pages(
        repo
    )
    chinese = {CHINESE_README: "zh/index.md"}
    for file, page in pages.items():
        if file.endswith(".md"):
            text = (repo / file).read_text("utf-8")
            text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.S)  # a model card's header
            page = "README.md" if file == "README.md" else page  # which docs/index.md includes
            written[page] = move_links(text, file, page, pages, chinese)
    licence = (repo / "LICENSE").read_text("utf-8")
    written["about/licence.md"] = f"# Licence\n\n```text\n{licence}\n```\n"
    for path in [*executed_notebooks(repo), *other_notebooks(repo)]:
        page = pages[str(path.relative_to(repo))]
        written[page] = json.dumps(
            clean_notebook(json.loads(path.read_text("utf-8")), path.name, page, pages)
        )
    write_all(source, written, pages, repo)
    command = [sys.executable, "-m", "typer", "medtune.cli", "utils", "docs", "--name", "medtune"]
    command += ["--title", "The command medtune", "--output", source / "reference" / "command.md"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def gather_chinese(source: Path, repo: Path = REPO) -> None:
    """Write every page that there is in Chinese into the folder `source`.

    What a catalogue does not translate stays English.
    """
    pages = chinese_pages(repo)
    elsewhere = english_pages(repo)
    begin(source, repo)
    write_twins(source, {file: page for file, page in pages.items() if is_translated(file)})
    readme = (repo / CHINESE_README).read_text("utf-8")
    written = {"README.md": move_links(readme, CHINESE_README, "README.md", pages, elsewhere)}
    written["index.md"] = (repo / "docs" / "locale" / "zh" / "index.md").read_text("utf-8")
    slugs = {}
    for file, page in pages.items():
        if not file.endswith(".md") or file == CHINESE_README or file == "docs/index.md":
            continue
        text = (repo / file).read_text("utf-8")
        known = catalogues.translations(Path(file).stem, repo)
        slugs |= catalogues.headings(text, known)
        translated = catalogues.translate(text, known)
        written[page] = move_links(translated, file, page, pages, elsewhere)
    for path in executed_notebooks(repo):
        page = pages[str(path.relative_to(repo))]
        notebook = json.loads(path.read_text("utf-8"))
        written[page] = json.dumps(
            clean_notebook(notebook, path.name, page, pages, catalogues.LANGUAGE)
        )
    (source / "headings.json").write_text(json.dumps(slugs, ensure_ascii=False), "utf-8")
    write_all(source, written, pages, repo)


def begin(source: Path, repo: Path) -> None:
    """Make the folder new, with the settings of Sphinx."""
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(repo / "docs" / "_static", source / "_static")
    shutil.copytree(repo / "docs" / "_templates", source / "_templates")
    shutil.copy(repo / "docs" / "conf.py", source)
    shutil.copy(repo / "docs" / "heading_slugs.py", source)


def write_twins(source: Path, twins: dict[str, str]) -> None:
    """Note which pages there are in both languages; `conf.py` reads it."""
    names = {re.sub(r"\.(md|ipynb)$", "", page) for page in twins.values()} | {"index"}
    (source / "twins.json").write_text(json.dumps(sorted(names)), "utf-8")


def write_all(source: Path, written: dict[str, str], pages: dict[str, str], repo: Path) -> None:
    """Write the pages, and copy the files that they show."""
    for page, text in written.items():
        (source / page).parent.mkdir(parents=True, exist_ok=True)
        (source / page).write_text(text, "utf-8")
    for file, copied in pages.items():
        if copied.startswith("files/"):
            (source / copied).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repo / file, source / copied)


def call_sphinx(source: Path, target: Path, doctrees: Path, language: str) -> None:
    """Let Sphinx write the pages; every warning is an error: a site with a dead link or an unread
    docstring is not handed out.
    """
    options = ["-b", "html", "-W", "--keep-going", "-q", "-j", "auto", "-d", doctrees]
    options += ["-D", f"language={language}"]
    done = subprocess.run([sys.executable, "-m", "sphinx", *options, source, target])
    if done.returncode:
        sys.exit("the site has the faults named above")
    finish(target)


def finish(target: Path) -> None:
    """Take out what no page asks for, and name what a screen reader meets without a name."""
    # for those who debug the theme; a reader's browser asks for none of them
    for source_map in (target / "_static").rglob("*.map"):
        source_map.unlink()
    # A copy of each notebook, which myst-nb would offer for download where a page asks for it. It
    # stands beside the site, so that of the Chinese one is in the English one.
    shutil.rmtree(target.parent / "jupyter_execute", ignore_errors=True)
    # who downloads a notebook wants to run it, and the page has its figures
    for notebook in (target / "_sources").rglob("*.ipynb"):
        content = json.loads(notebook.read_text("utf-8"))
        for cell in content["cells"]:
            if "outputs" in cell:
                cell |= {"outputs": [], "execution_count": None}
        notebook.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", "utf-8")
    # the theme's own words; Sphinx has put them into the pages
    shutil.rmtree(target / "_static" / "locales", ignore_errors=True)
    for page in target.rglob("*.html"):
        text = page.read_text("utf-8")
        words = "展开" if '<html lang="zh' in text else "Show what belongs to it"
        named = f'<summary aria-label="{words}"><span class="toctree-toggle"'
        page.write_text(text.replace('<summary><span class="toctree-toggle"', named), "utf-8")


def share_large_files(site: Path) -> None:
    """Let the Chinese pages load the large files of the theme from where the English ones do."""
    chinese = site / "zh"
    shared = []
    for name in LARGE_FILES:
        copy = chinese / "_static" / name
        if copy.read_bytes() == (site / "_static" / name).read_bytes():
            copy.unlink()
            shared.append(re.escape(name))
    if not shared:
        return
    # one folder further up
    reference = re.compile(rf'"((?:\.\./)*_static/(?:{"|".join(shared)}))')
    for page in chinese.rglob("*.html"):
        text = page.read_text("utf-8")
        page.write_text(reference.sub(r'"../\1', text), "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=REPO / "docs" / "_build", help="folder to write"
    )
    out = parser.parse_args().out
    shutil.rmtree(out / "html", ignore_errors=True)
    gather(out / "source")
    call_sphinx(out / "source", out / "html", out / "doctrees", "en")
    gather_chinese(out / "source-zh")
    call_sphinx(out / "source-zh", out / "html" / "zh", out / "doctrees-zh", "zh_CN")
    share_large_files(out / "html")
    print(f"Open {out / 'html' / 'index.html'}")


if __name__ == "__main__":
    main()
