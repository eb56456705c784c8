"""Take a dialogue apart: each answer with its question and the pictures that it is about.

Known are the dialects of OpenAI and Qwen (messages with parts), of LLaVA and ShareGPT
(conversations), of TRL (prompt and completion), of Alpaca (instruction and output), and of ms-swift
(query, response and history).
"""

import json
import re
from dataclasses import dataclass, field
from typing import Any

# What the dialects of dialogue data call the two who speak; other roles, such as system, are not
# part of question and answer.
ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
}

# Columns that hold a dialogue or repeat it: the pair has question and caption instead.
DIALOGUE_COLUMNS = {
    "messages",
    "conversations",
    "conversation",
    "prompt",
    "completion",
    "instruction",
    "output",
    "history",
    "system",
}

MARK = "<image>"

# A picture that is named inside a text, as older Qwen models and ms-swift have it.
_NAMED_IN_TEXT = re.compile(r"<img>(.*?)</img>", re.DOTALL)
# What else than pictures a text may announce.
_OTHER_MARK = re.compile(r"<(video|audio)>")
_KEYS_OF_PICTURES = ("image", "image_url", "url", "path", "source", "base64", "bytes", "data")


@dataclass
class Turn:
    """What one of the two says.

    Attributes
    ----------
    role : str or None
        "user", "assistant", or None for anybody else.
    text : str
        The words, without marks for pictures.
    pictures : list
        What the turn itself names or holds, in order.
    marks : int
        How many pictures of the record's own column it announces.
    """

    role: str | None
    text: str
    pictures: list[Any] = field(default_factory=list)
    marks: int = 0


@dataclass
class Answer:
    """What is said about pictures.

    Attributes
    ----------
    caption : str or None
        The caption or, in a dialogue, the answer.
    question : str or None
        What was asked; None where nothing was.
    pictures : list
        The cells of the pictures that it is about.
    """

    caption: str | None
    question: str | None
    pictures: list[Any] = field(default_factory=list)


def turns_of(record: dict) -> list | None:
    """Give the turns of a dialogue in any of the dialects, as they stand, or None for a plain record.

    Examples
    --------
    >>> turns_of({"image": "a.png", "caption": "A liver."})
    >>> len(turns_of({"prompt": "What is it?", "completion": "A liver."}))
    2
    """
    if record.get("completion") is not None:
        # what stands in prompt and completion counts even if there are messages too
        return _said_by("user", record.get("prompt")) + _said_by("assistant", record["completion"])
    for column in ("messages", "conversations", "conversation"):
        turns = record.get(column)
        if turns is not None:
            return _as_list(turns, column)
    if record.get("caption") is not None:
        return None
    if record.get("instruction") is not None and record.get("output") is not None:
        asked = [record["instruction"], record.get("input") or ""]
        question = "\n".join(str(text) for text in asked if text)
        return (
            _history(record) + _said_by("user", question) + _said_by("assistant", record["output"])
        )
    query = record.get("query")
    names_picture = isinstance(query, str) and bool(_NAMED_IN_TEXT.search(query))
    if record.get("response") is not None and (record.get("history") or names_picture):
        asked = _said_by("user", query)
        return _history(record) + asked + _said_by("assistant", record["response"])
    return None


def _as_list(turns: Any, column: str) -> list:
    if isinstance(turns, str):  # tables without lists keep them as JSON
        try:
            turns = json.loads(turns)
        except ValueError:
            raise ValueError(f"dialogue: {column} is a text, and no JSON list of turns") from None
    if not isinstance(turns, list):
        raise ValueError(f"dialogue: {column} is no list of turns but one {type(turns).__name__}")
    return turns


def _said_by(role: str, said: Any) -> list:
    """Give a list of messages as it is, and anything else as one message."""
    if isinstance(said, list):
        # a list of messages, unless it is a list of parts
        speakers = [isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in said]
        if speakers and all(speakers):
            return said
    return [{"role": role, "content": said}]


def _history(record: dict) -> list:
    turns = []
    for exchange in record.get("history") or []:
        if not isinstance(exchange, list | tuple) or len(exchange) != 2:
            raise ValueError("dialogue: history is a list of pairs, a question and its answer")
        turns += _said_by("user", exchange[0]) + _said_by("assistant", exchange[1])
    return turns


def read_answers(raw_turns: list, pictures: list[Any]) -> list[Answer]:
    """Give each answer of a dialogue with what was asked since the answer before, and its pictures.

    Parameters
    ----------
    raw_turns : list
        What `turns_of` gives.
    pictures : list
        The pictures that the record names outside of its turns.

    Returns
    -------
    list of Answer
        An answer is about the pictures that were shown last. None of them may have a picture.

    Raises
    ------
    ValueError
        A turn is no turn, there is a video or a sound, or marks and pictures do not agree.

    Examples
    --------
    >>> turns = [{"role": "user", "content": "<image>Which organ?"},
    ...          {"role": "assistant", "content": "The liver."}]
    >>> read_answers(turns, ["a.png"])
    [Answer(caption='The liver.', question='Which organ?', pictures=['a.png'])]
    """
    turns = [_turn(raw) for raw in raw_turns]
    if not any(turn.role == "assistant" for turn in turns):
        raise ValueError("dialogue: it has no answer, nobody speaks as assistant or gpt")
    _hand_out(turns, pictures)
    answers = []
    asked: list[str] = []
    shown: list[Any] = []
    latest: list[Any] = []
    for turn in turns:
        if turn.role == "assistant":
            shown = latest or shown
            latest = []
            answers.append(Answer(turn.text, "\n".join(asked), shown))
            asked = []
            continue
        latest = latest + turn.pictures
        if turn.role == "user" and turn.text:
            asked.append(turn.text)
    return answers


def _hand_out(turns: list[Turn], pictures: list[Any]) -> None:
    """Give each turn those of the record's own pictures that it announces."""
    announcing = [turn for turn in turns if turn.marks]
    marks = sum(turn.marks for turn in announcing)
    if not pictures:
        return
    if marks > len(pictures) > 1:
        raise ValueError(f"dialogue: {marks} marks {MARK}, but {len(pictures)} pictures")
    if len(pictures) > 1 and len(announcing) > 1:
        if marks != len(pictures):
            raise ValueError(
                f"dialogue: {marks} marks {MARK} in several turns, but {len(pictures)} pictures"
            )
        left = list(pictures)
        for turn in announcing:
            turn.pictures += left[: turn.marks]
            left = left[turn.marks :]
        return
    # one picture, or all in one place: they are there from the beginning
    first = announcing[0] if announcing else turns[0]
    first.pictures += pictures


def _turn(raw: Any) -> Turn:
    if not isinstance(raw, dict):
        raise ValueError(
            f"dialogue: a turn is an object with role and content, not {type(raw).__name__}"
        )
    speaker = raw.get("role") or raw.get("from")
    role = ROLES.get(str(speaker).strip().lower())
    said = raw.get("content")
    if said is None:
        said = raw.get("value")
    turn = Turn(role, "")
    words = []
    for part in said if isinstance(said, list) else [said]:
        text = _read_part(part, turn)
        if text:
            words.append(text)
    turn.text = " ".join(words).strip()
    if role == "assistant" and turn.pictures:
        raise ValueError("dialogue: an answer holds a picture, medtune learns texts")
    if role == "assistant":
        turn.marks = 0
    return turn


def _read_part(part: Any, turn: Turn) -> str:
    """Give the words of a part, and put its pictures and marks into the turn."""
    if isinstance(part, dict):
        return _read_object(part, turn)
    if isinstance(part, str):
        return _read_text(part, turn)
    # NaN, which differs from itself, is nothing
    if part is None or part != part:
        return ""
    if isinstance(part, int | float) and not isinstance(part, bool):
        return f"{part:g}"  # the answer to "How many?"
    raise ValueError(f"dialogue: what is said is text or parts, not {type(part).__name__}")


def _read_object(part: dict, turn: Turn) -> str:
    """Read a part that says its type, or shows it by its keys."""
    kind = str(part.get("type") or "").lower()
    for other in ("video", "audio"):
        if other in kind or any(part.get(key) is not None for key in (other, f"{other}_url")):
            raise ValueError(f"no {other}: medtune learns from pictures, take some out of it")
    text = part.get("text")
    if "image" in kind or (not kind and text is None):
        picture = _picture_of_part(part)
        if picture is None:
            turn.marks += 1
        else:
            turn.pictures.append(picture)
        return ""
    if not isinstance(text, str):
        raise ValueError(f"dialogue: a part of type {kind[:30]} is neither text nor picture")
    return _read_text(text, turn)


def _picture_of_part(part: dict) -> Any:
    """Give what a part says about its picture, or None where the record's own column has it."""
    for key in _KEYS_OF_PICTURES:
        value = part.get(key)
        if value is None or value == "":
            continue
        return {key: value} if key in ("base64", "bytes", "data") else value
    return None


def _read_text(text: str, turn: Turn) -> str:
    other = _OTHER_MARK.search(text)
    if other:
        raise ValueError(f"no {other[1]}: medtune learns from pictures, take some out of it")
    turn.pictures += [name.strip() for name in _NAMED_IN_TEXT.findall(text)]
    text = _NAMED_IN_TEXT.sub("", text)
    turn.marks += text.count(MARK)
    return text.replace(MARK, "").strip()
