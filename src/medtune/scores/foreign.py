"""Scores of other programs, in an environment of their own.

RadGraph-F1, CheXbert, RaTEScore and GREEN want other versions of Transformers than medtune, and
weights of their own. So they are not imported but run, each by a small program of the user's. What
it has to do is this:

1. It is started with two more arguments: a file to read and a file to write.
2. The first holds one JSON object a line: "id", "answer" and "reference", all text.
3. Into the second it writes one JSON object a line, in any order: the "id", and a number for each
   score; null where the score has none.
4. It ends with 0.
"""

import json
import math
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .intervals import mean_of_known, values_of

# So many ids that are left out a message names.
MOST_NAMED = 3


def run_scorer(command: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Let another program score answers.

    What the program prints goes to stderr: it may print how far it is.

    Parameters
    ----------
    command : the program and its arguments, such as "conda run -n radgraph python radgraph_f1.py".
        No shell reads it. Two paths are added: of the answers, and of the scores to write.
    rows : answers with "id", "answer" and "reference".

    Returns
    -------
    dict : for each score one number a row, in the order of the rows, NaN where it has none.

    Raises
    ------
    OSError : there is no such program.
    ValueError : no rows, an empty command, a program that fails, that leaves out ids, or writes
        what the contract does not know; or ids that are not one a row.

    Examples
    --------
    >>> file = Path(tempfile.mkdtemp(), "lengths.py")
    >>> _ = file.write_text('''
    ... import json, sys
    ... with open(sys.argv[1]) as answers, open(sys.argv[2], "w") as scores:
    ...     for row in map(json.loads, answers):
    ...         length = len(row["answer"])
    ...         scores.write(json.dumps({"id": row["id"], "length": length}) + "\\\\n")
    ... ''')
    >>> rows = [{"id": "a", "answer": "liver", "reference": "spleen"}]
    >>> run_scorer(f"{sys.executable} {file}", rows)
    {'length': [5.0]}
    """
    words = _words(command)
    names = [str(row["id"]) for row in rows]
    if not names:
        raise ValueError(f"{command}: there are no answers to score")
    if len(set(names)) < len(names):
        raise ValueError(f"{command}: an id stands on two answers, so scores cannot be told apart")
    with tempfile.TemporaryDirectory(prefix="medtune-scores-") as folder:
        answers = Path(folder, "answers.jsonl")
        scores = Path(folder, "scores.jsonl")
        lines = []
        for name, row in zip(names, rows, strict=True):
            line = {"id": name, "answer": row["answer"], "reference": row["reference"]}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        answers.write_text("".join(lines), encoding="utf-8")
        _run(command, [*words, str(answers), str(scores)])
        if not scores.is_file():
            raise ValueError(f"{command}: it wrote no scores to its second argument")
        found = _read(command, scores, set(names))
    return _in_order(command, found, names)


def mean_scores(values: Mapping[str, Sequence[float]], *, columns: bool = False) -> dict[str, Any]:
    """Average scores of single answers, in the form that `with_intervals` takes.

    Parameters
    ----------
    values : for each score one number an answer, NaN for none.
    columns : give (rows, statistic) in place of each mean.

    Returns
    -------
    dict : the mean of each score, None where no answer has one.

    Examples
    --------
    >>> mean_scores({"green": [1.0, 0.5, float("nan")]})
    {'green': 0.75}
    """
    entries = {name: (list(column), mean_of_known) for name, column in values.items()}
    return entries if columns else values_of(entries)


def _words(command: str) -> list[str]:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"{command}: this is no command ({error})") from None
    if not words:
        raise ValueError("the command is empty: give a program and its arguments")
    return words


def _run(command: str, words: list[str]) -> None:
    sys.stderr.flush()
    try:
        # What it prints may hold reports of patients: it goes to the screen, and into no message.
        done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=_screen(), check=False)
    except FileNotFoundError:
        raise FileNotFoundError(f"{command}: there is no program {words[0]!r}") from None
    except PermissionError:
        raise PermissionError(f"{command}: {words[0]!r} cannot be executed") from None
    if done.returncode:
        how = f"failed with {done.returncode}"
        if done.returncode < 0:
            how = f"was ended by signal {-done.returncode}"
        raise ValueError(f"{command}: the program {how}; what it said stands above")


def _screen() -> int:
    """Give the descriptor of stderr: stdout is kept for scores that somebody may read on."""
    return 2


def _read(command: str, file: Path, known: set[str]) -> dict[str, dict[str, float]]:
    """Read the scores of each id, and refuse what the contract does not know."""
    found: dict[str, dict[str, float]] = {}
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"{command}: its scores are no UTF-8 text") from None
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        where = f"{command}: line {number} of its scores"
        try:
            line = json.loads(text)
        except ValueError:
            raise ValueError(f"{where} is no JSON") from None
        if not isinstance(line, dict) or "id" not in line:
            raise ValueError(f"{where} is no JSON object with an id")
        name = str(line.pop("id"))
        if name not in known:
            raise ValueError(f"{where} has an id that no answer has")
        if name in found:
            raise ValueError(f"{where} has the id of an earlier line")
        found[name] = {key: _number(where, key, value) for key, value in line.items()}
    return found


def _number(where: str, key: str, value: Any) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isinf(value):
        raise ValueError(f"{where}: {key} is no number")
    return float(value)


def _in_order(
    command: str, found: Mapping[str, Mapping[str, float]], names: Sequence[str]
) -> dict[str, list[float]]:
    missing = [name for name in names if name not in found]
    if missing:
        named = ", ".join(repr(name) for name in missing[:MOST_NAMED])
        raise ValueError(
            f"{command}: it left out {len(missing)} of {len(names)} ids: {named}"
            f"{', ...' if len(missing) > MOST_NAMED else ''}"
        )
    keys = dict.fromkeys(key for name in names for key in found[name])
    if not keys:
        raise ValueError(f"{command}: it wrote ids without any score")
    values = {}
    for key in keys:
        without = [name for name in names if key not in found[name]]
        if without:
            raise ValueError(
                f"{command}: {len(without)} of {len(names)} ids have no {key}, the first is "
                f"{without[0]!r}; null says that there is none"
            )
        values[key] = [found[name][key] for name in names]
    return values
