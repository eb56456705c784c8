"""How results are printed: tables for people and pipes, JSON for programs."""

import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

# More characters than a row of a table has: in a pipe nothing is wrapped.
WIDE = 1_000_000


def print_json(result: Any) -> None:
    """Print a result as JSON; text stays readable in any language."""
    print(json.dumps(result, indent=1, ensure_ascii=False, default=str))


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print rows under their keys, aligned.

    A terminal wraps what is too long within its column; in a pipe each row is one plain line, so
    that other programs can read it.
    """
    if not rows:
        print("(none)")
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for key in rows[0]:
        table.add_column(Text(key), overflow="fold")
    for row in rows:
        # as Text: rich would read [lora] in a string as a mark-up
        table.add_row(*[Text(_cell(value)) for value in row.values()])
    at_terminal = sys.stdout.isatty()
    console = Console(
        width=None if at_terminal else WIDE,
        force_terminal=at_terminal,
        force_jupyter=False,
    )
    with console.capture() as captured:
        console.print(table)
    # rich fills the last column with spaces
    for line in captured.get().rstrip("\n").split("\n"):
        print(line.rstrip())


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)
