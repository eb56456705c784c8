"""Which column of a source is which of ours, and which split a word means."""

import difflib
import re
from collections.abc import Iterable

# Our name -> the names that published sets give the same thing, best first. Capital letters and
# blanks make no difference: "Image Path" is image_path.
ALIASES = {
    "image": (
        "image_path", "image_file", "image_name", "image_file_name", "file_name", "filename",
        "img_path", "img_name", "img", "figure_path", "image_index", "picture_path", "path",
        "images",
    ),
    "id": ("image_id", "img_id", "uid", "qid", "question_id"),
    "caption": ("text", "report", "findings", "description", "answer", "response"),
    "question": ("query",),
    "group": ("patient_id", "subject_id", "patientid", "subjectid", "patient"),
    "split": (),
}  # fmt: skip

# Beside one of these, `text` may be anything: what is answered, what is read, or both at once.
QUESTION_LIKE = {
    "question", "questions", "query", "answer", "answers", "prompt", "instruction", "options",
    "choices",
}  # fmt: skip

# Columns that hold the turns of a dialogue.
DIALOGUES = {"messages", "conversations", "conversation"}

# The first word of a file's name, in small letters -> the split that it means.
SPLITS = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
# In a column, where nothing else can be meant, there are more words for them.
SPLITS_IN_COLUMNS = SPLITS | {
    "training": "train",
    "validate": "validation",
    "development": "validation",
    "eval": "validation",
    "testing": "test",
}

# A message shows so many columns, and so much of each: a file without a header has data there.
_MOST_SHOWN = 20
_LONGEST_SHOWN = 30

ADVICE = "say which is which, columns={'caption': 'NAME'}"


def plain_name(name: object) -> str:
    """Give a column's name without what makes no difference: capitals, blanks, a byte order mark.

    Examples
    --------
    >>> plain_name(" Image Path"), plain_name("patient-ID")
    ('image_path', 'patient_id')
    """
    return re.sub(r"[\s-]+", "_", str(name).strip("\ufeff \t\r\n").lower())


def split_of_word(word: object) -> str | None:
    """Give the split that a word in a column or the name of a folder means.

    Parameters
    ----------
    word : object
        Such as "Train", "val" or "dev"; capital letters and blanks at the ends do not count.

    Returns
    -------
    str or None
        "train", "validation" or "test"; None for a word that is not known.

    Examples
    --------
    >>> split_of_word("Dev "), split_of_word("TEST"), split_of_word("holdout")
    ('validation', 'test', None)
    """
    return SPLITS_IN_COLUMNS.get(word.strip().lower()) if isinstance(word, str) else None


def own_names(columns: dict[str, str]) -> dict[str, str]:
    """Give the caller's columns under our own names: who says patient means group.

    Examples
    --------
    >>> own_names({"patient": "Case", "caption": "Report", "scanner": "Device"})
    {'group': 'Case', 'caption': 'Report', 'scanner': 'Device'}
    """
    meant = {}
    for name, theirs in columns.items():
        ours = name
        for known, aliases in ALIASES.items():
            if plain_name(name) in (known, *aliases):
                ours = known
        meant[ours] = theirs
    return meant


def our_names(
    available: Iterable[str], columns: dict[str, str], where: object, need: tuple[str, ...] = ()
) -> dict[str, str]:
    """Map the source's names to ours: what the caller said first, then `ALIASES`.

    Parameters
    ----------
    available : iterable of str
        The names that the source has, in its order.
    columns : dict of str to str
        Our name -> the source's name, as the caller said.
    where : object
        What a message calls the source.
    need : tuple of str
        Our names that must be among the result.

    Returns
    -------
    dict of str to str
        The source's name -> our name; a name that is none of ours stays, without blanks at its
        ends. A column that bears one of our names though the caller gave that name to another is
        left out.

    Raises
    ------
    ValueError
        A needed name, or one that the caller gave, is not there, or it is not clear which column
        holds the caption.

    Examples
    --------
    >>> our_names(["UID", "report", "group"], {}, "the table")
    {'UID': 'id', 'report': 'caption', 'group': 'group'}
    """
    available = list(available)
    taken, missing = _taken(available, columns)
    missing += [ours for ours in need if ours not in taken.values()]
    if missing:
        raise ValueError(
            f"{where} has no column {' or '.join(missing)}, only {shown(available)}: "
            + _advice(missing[0], available, columns)
        )
    if "caption" in need and "caption" not in columns:
        _refuse_ambiguous(taken, available, where)
    names = {}
    for theirs in available:
        stripped = str(theirs).strip("\ufeff \t\r\n")
        ours = taken.get(theirs, _not_reserved(stripped))
        # a second column of the same name, or one whose name went to another, is left out
        is_free = theirs in taken or plain_name(stripped) not in ALIASES
        if stripped and is_free and ours not in names.values():
            names[theirs] = ours
    return names


def _advice(missing: str, available: list[str], columns: dict[str, str]) -> str:
    """Say which of our names the missing column was for, and which column may be meant."""
    ours = next((ours for ours, theirs in columns.items() if theirs == missing), missing)
    near = difflib.get_close_matches(missing, [str(name) for name in available], 1)
    name = near[0] if near and missing in columns.values() else "NAME"
    return f"say which is which, columns={{{ours!r}: {name!r}}}"


def _not_reserved(name: str) -> str:
    """Give another name to a column that would make each row look rejected."""
    return "source_problem" if plain_name(name) == "problem" else name


def _taken(available: list[str], columns: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """Map the columns that are ours, by the caller's word or a known name; and list what is not there."""
    taken: dict[str, str] = {}
    missing = []
    for ours, theirs in columns.items():
        found = _matching(theirs, available)
        if found is None:
            missing.append(theirs)
        else:
            taken[found] = ours
    for ours in ALIASES:
        if ours in taken.values():
            continue
        free = [name for name in available if name not in taken]
        # our own name counts more than an alias
        for alias in (ours, *ALIASES[ours]):
            found = _matching(alias, free)
            if found is not None:
                taken[found] = ours
                break
    return taken, missing


def check_heading(heading: list[str], where: object, columns: dict[str, str]) -> None:
    """Raise, once for a table, if its columns cannot become pairs.

    Parameters
    ----------
    heading : list of str
        The names of all columns.
    where : object
        What a message calls the table.
    columns : dict of str to str
        Our name -> the table's name, as the caller said.

    Raises
    ------
    ValueError
        Two columns have one name, a column is missing, or it is not clear which holds the caption.
    """
    named = [name for name in heading if name.strip()]
    twice = [name for name in named if named.count(name) > 1]
    if twice:
        raise ValueError(f"{where} has two columns called {shown(twice[:1])}: rename one")
    if DIALOGUES & {plain_name(name) for name in named}:
        return
    names = our_names(named, columns, where)
    # an id may stand for its picture: a file that is called by it
    need = ("caption",) if "id" in names.values() else ("image", "caption")
    our_names(named, columns, where, need)


def _matching(name: str, available: list[str]) -> str | None:
    """Find a column by its exact name, or else by the name without capitals and blanks."""
    if name in available:
        return name
    plain = plain_name(name)
    for candidate in available:
        if plain_name(candidate) == plain:
            return candidate
    return None


def _refuse_ambiguous(taken: dict[str, str], available: list[str], where: object) -> None:
    """Refuse to guess where a text stands beside questions: it may be the caption or not."""
    plain = {plain_name(name) for name in available}
    [chosen] = [theirs for theirs, ours in taken.items() if ours == "caption"]
    answers = plain & {"answer", "response"}
    texts = plain & {"caption", "text", "report", "findings", "description"}
    is_plain_text = plain_name(chosen) == "text"
    if plain & QUESTION_LIKE and (is_plain_text or (answers and texts)):
        candidates = sorted(texts | answers | (plain & QUESTION_LIKE))
        raise ValueError(
            f"{where} has the columns {', '.join(candidates)}: it is not clear which holds what "
            f"shall be answered, {ADVICE}"
        )


def shown(names: Iterable[object]) -> str:
    """Put names of columns into a message, short: without a header they are data.

    Examples
    --------
    >>> shown(["image", "A very long heading that is no heading at all"])
    'image, A very long heading that is no...'
    """
    short = []
    for name in names:
        text = " ".join(str(name).split())
        short.append(text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN].strip() + "...")
    more = "" if len(short) <= _MOST_SHOWN else f" and {len(short) - _MOST_SHOWN} more"
    return ", ".join(short[:_MOST_SHOWN]) + more
