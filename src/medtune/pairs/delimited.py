"""Read tables of delimited text: CSV, TSV, and text files without a heading.

The quotation of CSV is read as the standard (RFC 4180) has it: a field that begins with a quotation
mark ends with one, before a delimiter or a line end, and two of them inside stand for one. A field
that only begins with a quotation mark is text. Python's own reader would take all lines up to the
next quotation mark into it: rows would vanish without a word.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .columns import check_heading, our_names
from .encodings import open_text
from .files_of_pictures import PICTURE_SUFFIXES

DELIMITERS = ",\t;|"

# A quoted caption may have so many lines: a mark that is not closed by then is no quotation.
_MOST_LINES = 10_000

# A quotation mark and what belongs to it, up to a single mark or to where the text breaks off.
_QUOTED = re.compile(r'"(?:[^"]|"")*+')
_LINE_END = "\r\n"


class _NotClosed(Exception):
    """A quoted field goes on in the next line."""


@dataclass
class _Lines:
    """Lines of a file, some of which may be given back to be read again.

    Attributes
    ----------
    source : iterator of str
        The lines, each with its end.
    waiting : list of str
        Lines that were given back, the next one last.
    number : int
        How many lines were read.
    """

    source: Iterator[str]
    waiting: list[str] = field(default_factory=list)
    number: int = 0

    def next(self) -> str | None:
        """Give the next line, or None at the end."""
        line = self.waiting.pop() if self.waiting else next(self.source, None)
        if line is not None:
            self.number += 1
        return line

    def give_back(self, lines: list[str]) -> None:
        """Put lines back, to come again in the same order."""
        self.waiting += reversed(lines)
        self.number -= len(lines)


@dataclass
class _Form:
    """How a table is written.

    Attributes
    ----------
    delimiter : str
        The sign between two fields.
    blank_after : bool
        Whether a blank follows each delimiter, which belongs to no field.
    columns : int
        How many fields a row has; 0 until the heading is read.
    """

    delimiter: str
    blank_after: bool = False
    columns: int = 0


def read_delimited(
    table: Path, encoding: str | None, columns: dict[str, str]
) -> Iterator[tuple[int, dict | ValueError]]:
    """Yield (number of the last line, record) of a table; a row of another length comes as an error.

    Parameters
    ----------
    table : Path
        A CSV with any of the usual delimiters, a TSV, or a text file with tabs.
    encoding : str or None
        Its encoding; None for UTF-8.
    columns : dict of str to str
        Our name -> the table's name, as the caller said: then there is a heading.

    Yields
    ------
    tuple of int and dict or ValueError
        Column -> text. Lines without any text are left out.

    Raises
    ------
    ValueError, OSError
        The file cannot be read, or is not in this encoding.
    """
    # newline="": a line end inside of a quoted caption stays what it is
    with open_text(table, encoding, newline="") as text:
        lines = _Lines(iter(text))
        head = _text_head(lines)
        form = _form_of(head, table)
        if re.fullmatch(r"sep=.", head.strip()):  # so Excel tells itself the delimiter
            lines.next()
            form = _Form(head.strip()[-1])
        heading = _next_row(lines, form)
        if heading is None:
            return
        form.columns = len(heading)
        if _has_no_heading(heading, table, columns):
            yield lines.number, dict(zip(("image", "caption"), heading, strict=True))
            heading = ["image", "caption"]
        else:
            check_heading(heading, table.name, columns)
        while (row := _next_row(lines, form)) is not None:
            if any(cell.strip() for cell in row):
                yield lines.number, _record(heading, row)


def _text_head(lines: _Lines) -> str:
    """Give the first line that holds text, and leave it to be read again."""
    while (line := lines.next()) is not None:
        if line.strip():
            lines.give_back([line])
            return line
    return ""


def _form_of(head: str, table: Path) -> _Form:
    # what stands in quotation marks has delimiters that are none
    bare = re.sub(r'"[^"]*"', "", head)
    tells_tab = table.suffix.lower() in (".tsv", ".tab", ".txt") and "\t" in bare
    delimiter = "\t" if tells_tab else max(DELIMITERS, key=bare.count)
    after = re.findall(re.escape(delimiter) + r"( ?)", bare)
    # of tabs a blank behind is text
    blank_after = delimiter != "\t" and bool(after) and all(after)
    return _Form(delimiter, blank_after)


def _has_no_heading(first: list[str], table: Path, columns: dict[str, str]) -> bool:
    """Say whether the first row is data, as in ROCO's files: a picture and its caption."""
    if columns or len(first) != 2:
        return False
    names = our_names(first, {}, table).values()
    if set(names) & {"image", "caption", "id", "question", "group", "split"}:
        return False
    picture = first[0].strip()
    is_file = Path(picture).suffix.lower() in PICTURE_SUFFIXES
    return is_file or (bool(re.search(r"\d", picture)) and " " not in picture)


def _has_length(row: list[str], columns: int) -> bool:
    # a delimiter at the end of a line is a habit of some programs, and no field
    return columns == 0 or (len(row) >= columns and not any(map(str.strip, row[columns:])))


def _record(heading: list[str], row: list[str]) -> dict | ValueError:
    if not _has_length(row, len(heading)):
        return ValueError(
            f"{len(row)} fields, but the heading has {len(heading)}: a text that holds the "
            "delimiter or a line end stands in quotation marks"
        )
    return dict(zip(heading, row, strict=False))


# --- rows -----------------------------------------------------------------------------------------


def _next_row(lines: _Lines, form: _Form) -> list[str] | None:
    """Read the fields of the next row, which may take several lines; None at the end."""
    line = lines.next()
    if line is None:
        return None
    if '"' not in line:
        return _plain_fields(line, form)
    read = [line]
    while True:
        try:
            fields, end = _fields("".join(read), form)
            break
        except _NotClosed:
            if not _read_to_next_mark(lines, read):
                lines.give_back(read[1:])
                return _fields(line, form, is_whole=True)[0]
    if len(read) > 1 and (not _has_length(fields, form.columns) or _swallows_rows(read, form)):
        lines.give_back(read[1:])
        return _fields(line, form, is_whole=True)[0]
    # where the field turned out to be no quotation, the row ended before the last line
    needed = 1
    while sum(map(len, read[:needed])) < end:
        needed += 1
    lines.give_back(read[needed:])
    return fields


def _read_to_next_mark(lines: _Lines, read: list[str]) -> bool:
    """Read on to the next line with a quotation mark: no other can close one. False if none comes."""
    while len(read) < _MOST_LINES:
        more = lines.next()
        if more is None:
            return False
        read.append(more)
        if '"' in more:
            return True
    return False


def _swallows_rows(read: list[str], form: _Form) -> bool:
    """Say whether lines inside of a quoted field are rows of their own, in a table with tabs.

    There a quotation mark is mostly just a sign. In a CSV, lines of a caption may well hold commas.
    """
    if form.delimiter != "\t":
        return False
    return all(
        line.count("\t") == form.columns - 1 and line.split("\t")[0].strip() for line in read
    )


def _plain_fields(line: str, form: _Form) -> list[str]:
    fields = line.rstrip(_LINE_END).split(form.delimiter)
    if form.blank_after:
        fields = [fields[0], *(cell.removeprefix(" ") for cell in fields[1:])]
    return fields


def _fields(text: str, form: _Form, is_whole: bool = False) -> tuple[list[str], int]:
    """Take a row apart, and give its fields and where it ends.

    _NotClosed says that it goes on in the next line, which it cannot if it is whole.
    """
    fields = []
    place = 0
    while True:
        if form.blank_after and fields and text[place : place + 1] == " ":
            place += 1
        cell, place = _field(text, place, form.delimiter, is_whole)
        fields.append(cell)
        if text[place : place + 1] != form.delimiter:
            return fields, place
        place += 1


def _field(text: str, place: int, delimiter: str, is_whole: bool) -> tuple[str, int]:
    """Read one field from a place on; give it and the place behind it."""
    # blanks before the mark are a habit of those who type tables by hand
    start = (
        place + len(text[place:]) - len(text[place:].lstrip(" ")) if delimiter != "\t" else place
    )
    if text[start : start + 1] == '"':
        quoted = _QUOTED.match(text, start)
        end = quoted.end()
        if end == len(text):
            if not is_whole:
                raise _NotClosed
        elif (behind := _end_of_field(text, end + 1, delimiter)) is not None:
            return quoted.group()[1:].replace('""', '"'), behind
    return _unquoted(text, place, delimiter)


def _end_of_field(text: str, place: int, delimiter: str) -> int | None:
    """Give the place of the delimiter or line end that follows, perhaps after blanks."""
    while text[place : place + 1] == " ":
        place += 1
    if place == len(text) or text[place] == delimiter or text[place] in _LINE_END:
        return place
    return None


def _unquoted(text: str, place: int, delimiter: str) -> tuple[str, int]:
    end = text.find(delimiter, place)
    line_end = min(_found(text, sign, place) for sign in _LINE_END)
    if end == -1 or end > line_end:
        end = line_end
    return text[place:end], end


def _found(text: str, sign: str, place: int) -> int:
    index = text.find(sign, place)
    return len(text) if index == -1 else index
