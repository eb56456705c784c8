"""The course in Chinese: gettext catalogues of its text, and what is written from them.

python docs/catalogues.py update       # take today's English text into docs/locale/zh/
python docs/catalogues.py status       # how much of each text is translated
python docs/catalogues.py notebooks    # write notebooks/zh/, for JupyterLab

An entry is a heading, a paragraph, an item of a list, or a row of a table; code is none. Whoever
translates fills in `msgstr` with any editor of gettext files, in one line. What is not translated,
or is marked `fuzzy` because the English has changed since, is shown in English.
"""

import argparse
import hashlib
import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

from babel.messages.catalog import Catalog
from babel.messages.pofile import read_po, write_po
from markdown_it import MarkdownIt

REPO = Path(__file__).parents[1]
LANGUAGE = "zh"
FOLDER = Path("docs") / "locale" / LANGUAGE
# A figure that docs/figures/prose_figures.py computes: the number, then the comment that says how.
COMPUTED = re.compile(r"[+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?%?<!-- = .*? -->")
PLACEHOLDER = re.compile(r"\{\d+\}")
CODE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)", re.S)
TARGET = re.compile(r"\]\(([^()\s]+)\)")
# A number, and the word that multiplies it: 25 million is 2500 万.
NUMBER = re.compile(r"(\d+(?:[.,]\d+)*)(?: ?(thousand|million|billion|万|亿))?")
UNITS = {"thousand": 3, "million": 6, "billion": 9, "万": 4, "亿": 8}
PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
# The first code cell of a written notebook.
STEP_UP = """# 中文笔记本在 notebooks/zh/ 里，路径与 notebooks/ 里的英文原文相同
import os

if os.path.basename(os.getcwd()) == "zh":
    os.chdir("..")"""


@dataclass(frozen=True)
class Passage:
    """A piece of Markdown that is translated as a whole."""

    #: Its lines: from this one,
    first: int
    #: to the one before this.
    last: int
    #: What stands before it: the mark of a heading or of a list.
    prefix: str
    #: Its text in one line; computed figures are `{1}`, `{2}` and so on.
    text: str
    #: The computed figures, with the comments that say where they come from.
    figures: tuple[str, ...]


# ---- from the text to its entries


def passages_of(markdown: str) -> list[Passage]:
    """Split Markdown into the pieces that are translated, in their order.

    Examples
    --------
    >>> [passage.text for passage in passages_of("# Title\\n\\nOne\\nline.\\n\\n- An item")]
    ['Title', 'One line.', 'An item']
    """
    lines = markdown.split("\n")
    found = []
    row = -1
    for token in PARSER.parse(markdown):
        if token.type == "tr_open":
            # the parser knows on which line a row stands; its cells stand there too
            row = token.map[0]
            found.append(_passage(lines[row], row, row + 1, ""))
        elif token.type == "inline" and token.map[0] != row:
            first, last = token.map
            start = token.content.split("\n")[0]
            prefix = lines[first][: lines[first].index(start)]
            found.append(_passage(token.content, first, last, prefix))
    return [passage for passage in found if has_words(passage.text)]


def _passage(content: str, first: int, last: int, prefix: str) -> Passage:
    """Make a passage of its source."""
    text = re.sub(r"\s*\n\s*", " ", content.strip())
    figures = tuple(match.group() for match in COMPUTED.finditer(text))
    for number, figure in enumerate(figures, 1):
        text = text.replace(figure, f"{{{number}}}", 1)
    return Passage(first, last, prefix, text, figures)


def has_words(text: str) -> bool:
    """Say whether a text has words outside its code, its links' targets and its comments.

    Examples
    --------
    >>> has_words("| `lora_r` | 16 |"), has_words("| rank | 16 |")
    (False, True)
    """
    bare = re.sub(r"<!--.*?-->", "", CODE.sub("", TARGET.sub("", text)))
    return re.search(r"[^\W\d_]", PLACEHOLDER.sub("", bare)) is not None


def texts(repo: Path = REPO) -> dict[str, list[str]]:
    """Name every catalogue, and give the Markdown that it translates.

    A notebook's catalogue is `notebooks/<name>`, that of a page of the documentation `<name>`.
    """
    found = {}
    for path in sorted((repo / "notebooks").glob("*.ipynb")):
        found[f"notebooks/{path.stem}"] = markdown_of(json.loads(path.read_text("utf-8")))
    for path in sorted((repo / "docs").glob("*.md")):
        if path.name != "index.md":
            found[path.stem] = [path.read_text("utf-8")]
    return found


def markdown_of(notebook: dict) -> list[str]:
    """Give the source of each Markdown cell."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "markdown"]
    return ["".join(cell["source"]) for cell in cells]


def entries_of(parts: list[str]) -> list[str]:
    """Give each text that is to be translated once, in the order of the pages."""
    found = {}
    for part in parts:
        for passage in passages_of(part):
            found[passage.text] = True
    return list(found)


# ---- the catalogues


def catalogue_path(name: str, repo: Path = REPO) -> Path:
    """Say where the catalogue of a text lies."""
    return repo / FOLDER / f"{name}.po"


def read_catalogue(name: str, repo: Path = REPO) -> Catalog:
    """Read a catalogue; an empty one if there is none yet."""
    path = catalogue_path(name, repo)
    if not path.exists():
        return new_catalogue()
    with open(path, "rb") as file:
        return read_po(file, locale="zh_CN")


def new_catalogue() -> Catalog:
    """Make an empty catalogue."""
    return Catalog(
        locale="zh_CN",
        project="medtune",
        version="0.1",
        header_comment="# The text of medtune's course in Chinese; docs/catalogues.py reads and updates it.",
        last_translator="the medtune contributors",
        language_team="the medtune contributors",
        msgid_bugs_address="the issues of the repository",
        revision_date=datetime.now(UTC),
        fuzzy=False,
    )


def translations(name: str, repo: Path = REPO) -> dict[str, str]:
    """Give what a catalogue translates, without what is empty or fuzzy."""
    found = {}
    for message in read_catalogue(name, repo):
        if message.id and message.string and not message.fuzzy:
            found[message.id] = message.string
    return found


def update(name: str, parts: list[str], known: dict[str, str], repo: Path = REPO) -> None:
    """Bring a catalogue to today's text.

    What is new takes the translation of the same words in another catalogue. A changed entry keeps
    its translation, marked fuzzy; what is no longer there goes.
    """
    catalogue = read_catalogue(name, repo)
    template = Catalog()
    for text in entries_of(parts):
        template.add(text)
    catalogue.update(template, update_creation_date=False)
    ordered = new_catalogue()
    ordered.creation_date = catalogue.creation_date
    ordered.revision_date = catalogue.revision_date
    for text in entries_of(parts):
        message = catalogue[text]
        taken = known.get(text, "") if message.fuzzy or not message.string else ""
        if taken:
            ordered.add(text, taken)
        else:
            flags = {"fuzzy"} if message.fuzzy and message.string else set()
            ordered.add(text, message.string, flags=flags)
        # gettext takes "81% of" for a format of Python
        ordered[text].flags.discard("python-format")
    write_catalogue(ordered, catalogue_path(name, repo))


def write_catalogue(catalogue: Catalog, path: Path) -> None:
    """Write a catalogue, an entry in a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        write_po(file, catalogue, width=0, ignore_obsolete=True)


def missing_entries(name: str, parts: list[str], repo: Path = REPO) -> list[str]:
    """List the entries that the text has and the catalogue does not translate."""
    known = translations(name, repo)
    return [text for text in entries_of(parts) if text not in known]


def stale_entries(name: str, parts: list[str], repo: Path = REPO) -> list[str]:
    """List the entries of the catalogue that the text no longer has."""
    wanted = set(entries_of(parts))
    return [text for text in translations(name, repo) if text not in wanted]


def altered(text: str, translated: str) -> list[str]:
    """Say what a translation must keep and does not: code, targets of links, numbers.

    Examples
    --------
    >>> altered("Rank `lora_r` is 16", "秩 `lora_r` 为 8")
    ["number: ['16'] became ['8']"]
    """
    problems = []
    for kind, find in KEPT.items():
        before, after = Counter(find(text)), Counter(find(translated))
        if before != after:
            lost = sorted((before - after).elements())
            come = sorted((after - before).elements())
            problems.append(f"{kind}: {lost} became {come}")
    if "\n" in translated:
        problems.append("a translation is one line")
    return problems


def _code_of(text: str) -> list[str]:
    return [match.group() for match in CODE.finditer(text)]


def _targets_of(text: str) -> list[str]:
    return TARGET.findall(CODE.sub("", text))


def _figures_of(text: str) -> list[str]:
    return PLACEHOLDER.findall(CODE.sub("", text))


def _comments_of(text: str) -> list[str]:
    return re.findall(r"<!--.*?-->", text)


def _numbers_of(text: str) -> list[str]:
    """Give the numbers as they are written; with a word such as million, their value."""
    bare = PLACEHOLDER.sub("", TARGET.sub("", CODE.sub("", text)))
    found = []
    for digits, unit in NUMBER.findall(bare):
        if unit:
            value = Decimal(digits.replace(",", "")) * 10 ** UNITS[unit]
            found.append(f"{int(value)}")
        else:
            found.append(digits)
    return found


def _marks_of(text: str) -> list[str]:
    """Give what the parser takes for emphasis: beside Chinese signs two stars may mean nothing."""
    (line,) = PARSER.parseInline(text)
    return [token.type for token in line.children if token.type in ("strong_open", "em_open")]


def _cells_of(text: str) -> list[str]:
    """Give the borders of a row of a table."""
    return re.findall(r"(?<!\\)\|", CODE.sub("", text)) if text.startswith("|") else []


KEPT = {
    "code": _code_of,
    "target of a link": _targets_of,
    "computed figure": _figures_of,
    "comment": _comments_of,
    "number": _numbers_of,
    "emphasis": _marks_of,
    "border of a table": _cells_of,
}


# ---- from the catalogues to pages


def translate(markdown: str, known: dict[str, str]) -> str:
    """Put translations in the place of the English; what has none stays.

    Examples
    --------
    >>> translate("## One\\n\\n- Two\\n  lines", {"One": "一", "Two lines": "两行"})
    '## 一\\n\\n- 两行'
    """
    lines = markdown.split("\n")
    for passage in reversed(passages_of(markdown)):
        translated = known.get(passage.text)
        if translated is None:
            continue
        for number, figure in enumerate(passage.figures, 1):
            translated = translated.replace(f"{{{number}}}", figure)
        lines[passage.first : passage.last] = [passage.prefix + translated]
    return "\n".join(lines)


def headings(markdown: str, known: dict[str, str]) -> dict[str, str]:
    """Pair each translated heading with the English one, both without marks, so that links into a
    page hold.

    Examples
    --------
    >>> headings("## What `fast` does", {"What `fast` does": "`fast` 做什么"})
    {'fast 做什么': 'What fast does'}
    """
    found = {}
    for passage in passages_of(markdown):
        if passage.prefix.startswith("#") and passage.text in known:
            found[plain(known[passage.text])] = plain(passage.text)
    return found


def plain(text: str) -> str:
    """Give the words of a line as a page shows them.

    Examples
    --------
    >>> plain("**Rank** `lora_r`, see [03](03_finetune_lora.ipynb)")
    'Rank lora_r, see 03'
    """
    (line,) = PARSER.parseInline(text)
    return "".join(token.content for token in line.children)


def write_notebooks(repo: Path = REPO) -> list[Path]:
    """Write the notebooks in Chinese to `notebooks/zh/`; their code stays as it is.

    One in which somebody has changed a cell is left alone. One that was only run is written anew
    if the course has changed since.

    Returns
    -------
    list of Path : those that were left alone.
    """
    folder = repo / "notebooks" / LANGUAGE
    folder.mkdir(exist_ok=True)
    left_alone = []
    for path in sorted((repo / "notebooks").glob("*.ipynb")):
        notebook = translated_notebook(path, translations(f"notebooks/{path.stem}", repo))
        notebook["metadata"]["medtune"] = {"written": _digest(notebook)}
        file = folder / path.name
        before = json.loads(file.read_text("utf-8")) if file.exists() else None
        if before is not None and _was_changed(before):
            left_alone.append(file)
        elif before is None or _digest(before) != _digest(notebook):
            file.write_text(json.dumps(notebook, ensure_ascii=False, indent=1) + "\n", "utf-8")
    return left_alone


def translated_notebook(path: Path, known: dict[str, str]) -> dict:
    """Read a notebook and put its words into Chinese."""
    notebook = json.loads(path.read_text("utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            text = translate("".join(cell["source"]), known)
            cell["source"] = move_down(text).splitlines(keepends=True)
    notebook["cells"].insert(_first_code(notebook), _step_up())
    return notebook


def _digest(notebook: dict) -> str:
    """Digest what stands in the cells, without what they printed."""
    sources = ["".join(cell["source"]) for cell in notebook["cells"]]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()


def _was_changed(notebook: dict) -> bool:
    """Say whether a cell differs from what was written."""
    written = notebook["metadata"].get("medtune", {}).get("written")
    return written != _digest(notebook)


def _first_code(notebook: dict) -> int:
    """Say where the first cell of code stands."""
    kinds = [cell["cell_type"] for cell in notebook["cells"]]
    return kinds.index("code")


def _step_up() -> dict:
    """Make the cell that goes to the folder whose paths the code uses."""
    return {
        "cell_type": "code",
        "execution_count": None,
        "id": "go-up-from-zh",
        "metadata": {},
        "outputs": [],
        "source": STEP_UP.splitlines(keepends=True),
    }


def move_down(markdown: str) -> str:
    """Make the links of a page those of its twin one folder deeper.

    The notebooks beside it have twins, too.

    Examples
    --------
    >>> move_down("[01](01_explore_data.ipynb), [speed](../docs/speed.md)")
    '[01](01_explore_data.ipynb), [speed](../../docs/speed.md)'
    """

    def moved(match: re.Match) -> str:
        target = match.group(1)
        if re.match(r"[a-z]+:|#", target) or re.fullmatch(r"\w+\.ipynb(#.*)?", target):
            return match.group()
        return f"]({os.path.join('..', target)})"

    return TARGET.sub(moved, markdown)


# ---- the commands


def memory(repo: Path = REPO) -> dict[str, str]:
    """Join what all catalogues translate."""
    known = {}
    for name in texts(repo):
        known |= translations(name, repo)
    return known


def print_status(repo: Path = REPO) -> None:
    """Print for each text how many of its entries are translated."""
    for name, parts in texts(repo).items():
        total = len(entries_of(parts))
        left = len(missing_entries(name, parts, repo))
        print(f"{name:40} {total - left:4} of {total:4}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["update", "status", "notebooks"])
    what = parser.parse_args().what
    if what == "update":
        known = memory()
        for name, parts in texts().items():
            update(name, parts, known)
    if what == "notebooks":
        for file in write_notebooks():
            print(f"{file.relative_to(REPO)}: kept as you changed it; remove it to have today's")
        print(f"notebooks/{LANGUAGE}: the notebooks in Chinese")
    else:
        print_status()


if __name__ == "__main__":
    main()
