"""The dialects of training records: how each is written, and how any of them is read.

Whatever the dialect, this package thinks of a record as turns: pairs of a role ("system", "user" or
"assistant") and a text, in which `MARK` stands for a picture.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from medtune.files import one_line

MARK = "<image>"
# Marks of other data for what this package cannot show to a model.
OTHER_MARKS = ("<video>", "<audio>")
SPLITS = ("train", "validation", "test")
QUESTIONS = (
    "Describe this medical image.",
    "What does this image show?",
    "Report the findings in this image.",
    "请描述这张医学图像。",
    "这张图像显示了什么？",
    "请报告这张图像中的所见。",
)

# Each dialect with what its entry in LLaMA-Factory's dataset_info.json says about it.
DIALECTS: dict[str, dict] = {
    "prompt-completion": {
        "formatting": "alpaca",
        "columns": {"prompt": "instruction", "response": "output"},
    },
    "messages": {
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
            "system_tag": "system",
        },
    },
    "sharegpt": {
        "formatting": "sharegpt",
        "columns": {"messages": "conversations"},
        "tags": {
            "role_tag": "from",
            "content_tag": "value",
            "user_tag": "human",
            "assistant_tag": "gpt",
            "system_tag": "system",
        },
    },
    # The keys of ShareGPT with the roles of chat templates, as one published recipe writes them.
    # A trainer that was told of "human" and "gpt" finds no question here, so the tags say it.
    "conversations": {
        "formatting": "sharegpt",
        "columns": {"messages": "conversations"},
        "tags": {
            "role_tag": "from",
            "content_tag": "value",
            "user_tag": "user",
            "assistant_tag": "assistant",
            "system_tag": "system",
        },
    },
}

# Words of ShareGPT, Gemma and others for two of the roles.
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}

# Anything may stand in a file of JSON; whatever is no record fails in one of these ways.
NO_RECORD = (LookupError, TypeError, AttributeError, ValueError)

Turn = tuple[str, str]  # role, text


class Problem(NamedTuple):
    """Something that is wrong with a record.

    check : what was checked, one of the names in `medtune.records.check.CHECKS`.
    text : what was found, in one line.
    """

    check: str
    text: str


def question_with_marks(question: str, pictures: int) -> str:
    """Put as many image marks before a question as there are pictures, or where it has one itself.

    A question may begin or end with one mark, as published ones do: it stands for all pictures.

    Examples
    --------
    >>> question_with_marks("What is it?", 2)
    '<image><image>What is it?'
    >>> question_with_marks("What is it?<image>", 2)
    'What is it?<image><image>'
    """
    marks = MARK * pictures
    if question.endswith(MARK):
        return question.removesuffix(MARK) + marks
    return marks + question.removeprefix(MARK)


def find_mark(text: str) -> str | None:
    """Give the first mark that a text holds, for a picture or for what cannot be shown.

    Examples
    --------
    >>> find_mark("<video>What moves?"), find_mark("A liver.")
    ('<video>', None)
    """
    for mark in (MARK, *OTHER_MARKS):
        if mark in text:
            return mark
    return None


def content_parts(text: str) -> list[dict]:
    """Split a text at its image marks into the content parts that chat templates take.

    Examples
    --------
    >>> content_parts("<image>What is it?")
    [{'type': 'image'}, {'type': 'text', 'text': 'What is it?'}]
    """
    parts = []
    for piece in re.split(f"({MARK})", text):
        if piece == MARK:
            parts.append({"type": "image"})
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts


def messages_with_parts(turns: list[Turn]) -> list[dict]:
    """Write turns as messages whose contents are parts, as TRL and chat templates take them.

    Examples
    --------
    >>> messages_with_parts([("assistant", "A liver.")])
    [{'role': 'assistant', 'content': [{'type': 'text', 'text': 'A liver.'}]}]
    """
    return [{"role": role, "content": content_parts(text)} for role, text in turns]


# --- write ------------------------------------------------------------------------------------


def dataset_columns(dialect: str, *, with_history: bool) -> dict[str, str]:
    """Say which key of a record holds what, for the folder's dataset_info.json.

    Parameters
    ----------
    dialect : a key of `DIALECTS`.
    with_history : whether records of the dialect "prompt-completion" need keys of their own for a
        system prompt and earlier turns; the other dialects hold these among their messages.

    Examples
    --------
    >>> dataset_columns("messages", with_history=False)
    {'messages': 'messages', 'images': 'images'}
    """
    columns = DIALECTS[dialect]["columns"] | {"images": "images"}
    if dialect == "prompt-completion" and with_history:
        columns |= {"system": "system", "history": "history"}
    return columns


def make_record(
    sample_id: str, turns: list[Turn], images: list[str], *, dialect: str, with_history: bool
) -> dict:
    """Make the record of one sample; all records of a folder have the same keys.

    Parameters
    ----------
    sample_id : the id of the sample.
    turns : at least a question and its answer; a system prompt may come first.
    images : names of the picture files, from the folder on, as many as there are marks.
    dialect, with_history : as `dataset_columns` takes them.

    Examples
    --------
    >>> turns = [("user", "<image>What is it?"), ("assistant", "A liver.")]
    >>> record = make_record("a", turns, ["a.png"], dialect="sharegpt", with_history=False)
    >>> record["conversations"][1]
    {'from': 'gpt', 'value': 'A liver.'}
    >>> record = make_record("a", turns, ["a.png"], dialect="conversations", with_history=False)
    >>> record["conversations"][1]
    {'from': 'assistant', 'value': 'A liver.'}
    """
    record: dict[str, Any] = {"id": sample_id}
    if dialect == "prompt-completion":
        messages = messages_with_parts(turns)
        record["prompt"] = messages[:-1]
        record["completion"] = messages[-1:]
        # LLaMA-Factory cannot read content parts, so the same stands here once more as plain text.
        record |= _alpaca_keys(turns, with_history)
    else:
        form = DIALECTS[dialect]
        record[form["columns"]["messages"]] = _tagged_messages(turns, form["tags"])
    record["images"] = images
    return record


def _tagged_messages(turns: list[Turn], tags: dict[str, str]) -> list[dict]:
    messages = []
    for role, text in turns:
        messages.append({tags["role_tag"]: tags[f"{role}_tag"], tags["content_tag"]: text})
    return messages


def _alpaca_keys(turns: list[Turn], with_history: bool) -> dict:
    """Write turns as the last question and answer, and if asked the system prompt and the rest."""
    texts = [text for role, text in turns if role != "system"]
    keys: dict[str, Any] = {"instruction": texts[-2], "output": texts[-1]}
    if with_history:
        first_role, first_text = turns[0]
        earlier = texts[:-2]
        questions, answers = earlier[::2], earlier[1::2]
        keys["system"] = first_text if first_role == "system" else ""
        keys["history"] = [list(turn) for turn in zip(questions, answers, strict=True)]
    return keys


# --- read -------------------------------------------------------------------------------------


def read_turns(record: Any, pictures: int) -> tuple[list[Turn], list[Problem]]:
    """Read a record of any dialect, and say what is wrong with it.

    Parameters
    ----------
    record : a record, a plain list of messages, or the ValueError that reading its line raised.
    pictures : how many pictures belong to the record.

    Returns
    -------
    tuple : the turns, none if the record cannot be read; and the problems, none if it is fine.

    Examples
    --------
    >>> said = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A liver."}]
    >>> read_turns({"conversations": said}, 1)
    ([('user', '<image>What?'), ('assistant', 'A liver.')], [])
    >>> read_turns({"conversations": said}, 2)[1][0].text
    '1 <image> for 2 pictures, or one outside a question'
    """
    if isinstance(record, ValueError):
        return [], [_unreadable(one_line(record))]
    try:
        turns = _turns_of(record)
    except NO_RECORD as error:
        return [], [_unreadable(f"{type(error).__name__}: {one_line(error)}")]
    problems = _problems_of(turns, pictures)
    if isinstance(record, dict) and not problems:
        named = [key for key in ("videos", "audios", "video", "audio") if record.get(key)]
        problems += [_not_shown(key) for key in named]
    return turns, problems


def _not_shown(what: str) -> Problem:
    said = f"it has {what}: no video and no sound can be shown, only pictures; take frames of it"
    return Problem("no video", said)


def turns_of_answers(turns: list[Turn]) -> list[list[Turn]]:
    """Give for each answer of a dialogue all turns up to it, so that each can be learned.

    Examples
    --------
    >>> said = [("user", "<image>What?"), ("assistant", "A liver.")]
    >>> turns_of_answers([*said, ("user", "Where?"), ("assistant", "Right.")])[0] == said
    True
    """
    ends = [number for number, (role, _) in enumerate(turns, 1) if role == "assistant"]
    return [turns[:end] for end in ends]


def _unreadable(reason: str) -> Problem:
    return Problem("readable", f"not one of {', '.join(DIALECTS)} ({reason})")


def _turns_of(record: Any) -> list[Turn]:
    turns = [_turn_of(message) for message in _messages_of(record)]
    system = record.get("system") if isinstance(record, dict) else None
    if system and turns[0][0] != "system":
        if not isinstance(system, str):
            raise TypeError("the system prompt is not a text")
        turns.insert(0, ("system", system))
    return turns


def _messages_of(record: Any) -> list[dict]:
    """Give the messages of a record, whatever the keys that hold them."""
    if isinstance(record, list):
        return record
    if "prompt" in record:
        prompt = record["prompt"]
        completion = record["completion"]
        if isinstance(prompt, str):
            return [_message("user", prompt), _message("assistant", completion)]
        return prompt + completion
    messages = record.get("messages") or record.get("conversations")
    if not messages and ("instruction" in record or "query" in record):
        return _flat_messages(record)
    return messages or record["conversations"]


def _message(role: str, content: Any) -> dict:
    return {"role": role, "content": content}


def _flat_messages(record: dict) -> list[dict]:
    """Give the messages of a record with the flat keys of LLaMA-Factory or ms-swift."""
    messages = []
    for question, answer in record.get("history") or ():
        messages += [_message("user", question), _message("assistant", answer)]
    if "instruction" in record:
        question, answer = record["instruction"], record["output"]
        if record.get("input"):
            question += "\n" + record["input"]
    else:
        question, answer = record["query"], record["response"]
    return [*messages, _message("user", question), _message("assistant", answer)]


def _turn_of(message: dict) -> Turn:
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if isinstance(content, str):
        text = content
    else:
        text = "".join(_text_of_part(part) for part in content)
    if isinstance(role, str):
        role = role.lower()
    return ROLES.get(role, role), text


def _text_of_part(part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") or ""
    if _is_picture(part):
        return MARK
    for other in OTHER_MARKS:
        # "video", "video_url", "input_audio": the word stands in the name of each
        if other.strip("<>") in kind:
            return other
    return part["text"]


def _is_picture(part: dict) -> bool:
    # Qwen's own examples sometimes leave the type out
    return part.get("type") in ("image", "image_url") or ("image" in part and "text" not in part)


def pictures_of(record: Any) -> list[Any]:
    """Give what a record says of its pictures, in the order in which they are shown.

    Usually names of files beside the record, in `images` or `image`; others write each picture into
    the part of the message that shows it. What is no name of a file is for others to judge.

    Examples
    --------
    >>> pictures_of({"images": "a.png", "conversations": []})
    ['a.png']
    >>> part = {"type": "image", "image": "file://b.png"}
    >>> pictures_of({"messages": [{"role": "user", "content": [part]}]})
    ['b.png']
    """
    beside = []
    if isinstance(record, dict):
        beside = record.get("images") or record.get("image") or []
    if not isinstance(beside, list):
        beside = [beside]
    try:
        shown = list(_pictures_of_messages(_messages_of(record)))
    except NO_RECORD:
        shown = []  # not readable at all, as `read_turns` says
    if not any(shown):
        return [_name_of(picture) for picture in beside]
    rest = iter(beside)
    pictures = []
    for picture in shown:
        pictures.append(picture or next(rest, None))
    return [_name_of(picture) for picture in [*pictures, *rest]]


def _pictures_of_messages(messages: list[dict]) -> Iterator[Any]:
    """Yield for each place of a picture what its part says of it, or None."""
    for message in messages:
        content = message.get("content", message.get("value"))
        for part in [content] if isinstance(content, str) else content:
            if isinstance(part, dict) and _is_picture(part):
                keys = ("image", "image_url", "url", "path")
                yield next((part[key] for key in keys if part.get(key)), None)
            else:
                for _ in range(_text_of_part(part).count(MARK)):
                    yield None


def _name_of(picture: Any) -> Any:
    """Give the name of a picture's file, out of the forms in which it is written."""
    if isinstance(picture, dict):
        picture = picture.get("path") or picture.get("url") or picture
    if isinstance(picture, str):
        picture = picture.removeprefix("file://")
    return picture


def _problems_of(turns: list[Turn], pictures: int) -> list[Problem]:
    problems = []
    if not _roles_alternate(turns):
        found = ", ".join(str(role) for role, _ in turns)
        problems.append(Problem("roles alternate", f"the roles are {found}"))
    if not all(text.replace(MARK, "").strip() for _, text in turns):
        problems.append(Problem("no empty turn", "a question or an answer is empty"))
    for mark in OTHER_MARKS:
        if any(mark in text for _, text in turns):
            problems.append(_not_shown(mark))
    marks = sum(text.count(MARK) for _, text in turns)
    misplaced = any(MARK in text for role, text in turns if role != "user")
    if marks != pictures or misplaced:
        found = f"{marks} {MARK} for {pictures} pictures, or one outside a question"
        problems.append(Problem("image marks", found))
    return problems


def _roles_alternate(turns: list[Turn]) -> bool:
    """Say whether questions and answers take turns, after a system prompt or none."""
    roles = [role for role, _ in turns]
    if roles and roles[0] == "system":
        roles = roles[1:]
    exchanges = max(1, len(roles) // 2)
    return roles == ["user", "assistant"] * exchanges
