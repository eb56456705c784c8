"""Translate the captions of a whole set with a local model, and go on after a kill.

Each translation stands beside its original, a line of JSON each, as soon as it has come. What the
translation changed is written with it, see `differences.py`; what could not be translated is
counted, and named in a file of its own.
"""

import json
import os
import queue
import re
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock
from tqdm import tqdm

from medtune.files import read_json_lines, write_json, write_whole

from .differences import Difference, check_translation
from .endpoint import NOTHING_LISTENS, Endpoint, NoAnswer, open_endpoint
from .rules import detect_language

# What the model is told. It is part of the settings: another prompt starts another file.
_LANGUAGES = {"en": "English", "zh": "Simplified Chinese (简体中文)"}
_PROMPT = (
    "You translate captions of medical images into {language}, in the words of a radiologist's"
    " report. Keep every number with its unit, every side (left, right, both), every negation, every"
    " place and every degree of certainty. Leave nothing out, add nothing and explain nothing."
)
_ONE = " Answer with the translation and nothing else."
_SEVERAL = (
    " The captions come as one JSON object, by number. Answer with one JSON object that has a"
    " translation under each number, and nothing else."
)
_REFUSED = "Your answer was refused: {reason}. Translate again, all of it."

# So many requests in a row without any reply: the endpoint is gone.
_GIVE_UP_AFTER = 5
# Seconds; no pause between two tries is longer.
_LONGEST_PAUSE = 60.0

# A translation of more than so many times the characters of its caption is a sermon.
_LONGEST_SHARE = 6
_ALWAYS_ALLOWED = 200

# Some servers leave out the first of the two signs.
_END_OF_THOUGHTS = "</think>"
_FENCE = re.compile(r"^```\w*\n(.*?)\n?```$", re.S)


def translate_captions(  # noqa: PLR0913 - each is a setting of its own, given by keyword
    source: Iterable[Any],
    out: str | os.PathLike,
    *,
    base_url: str,
    model: str,
    to: str = "zh",
    allow_remote: bool = False,
    batch_size: int = 1,
    workers: int = 4,
    retries: int = 4,
    timeout: float = 120.0,
    pause: float = 1.0,
    api_key: str = "none",
    progress: bool = True,
) -> dict[str, Any]:
    """Translate captions with a model that the caller names, such as Ollama's or vLLM's.

    The same call goes on with a killed one and asks again for what failed. Equal captions are asked
    once, a caption that is in the language already is taken as it is. A translation that changed a
    number, a side, a negation or a finding is asked for once more, with the reason; what it changed
    even then stands in its line, so that you decide.

    Parameters
    ----------
    source : iterable of str, or of mapping
        Captions, or rows with `caption` and perhaps `id`, such as `medtune.pairs.load_pairs` returns
        (pictures are not opened). Without an id it is the row's number.
    out : path
        A JSON Lines file to write, and to go on from: `id`, `caption`, `caption_zh` (or
        `caption_en`) and `differences`, the kinds of what changed. Beside it `<name>.settings.json`
        and, if anything failed, `<name>.failed.jsonl`.
    base_url : str
        Where the model is: "http://localhost:11434" for Ollama's own protocol,
        "http://localhost:8000/v1" for OpenAI's, as vLLM and others speak it.
    model : str
        What the endpoint calls the model.
    to : str, default "zh"
        "zh" or "en".
    allow_remote : bool, default False
        Captions may leave this machine: take an address that is not a loopback one.
    batch_size : int, default 1
        Captions in one request. More saves time with a large model; small ones mix captions up.
    workers : int, default 4
        Requests at the same time.
    retries : int, default 4
        How often a request is sent again after no reply or one that cannot be used.
    timeout : float, default 120
        Seconds for one reply.
    pause : float, default 1
        Seconds before the first retry after no reply; each pause is twice the one before, a minute
        at most. What the endpoint asks for counts if it is longer.
    api_key : str, default "none"
        A bearer token, for endpoints that want one.
    progress : bool, default True
        Show a bar.

    Returns
    -------
    dict
        "rows" of the source, of which each is "translated", "already" in the language, or "failed";
        "reasons" of the failures, counted; "asked", captions that were asked for now; "kept", rows
        that an earlier call had done; "changed", rows with a difference, and "kinds", counted; "out";
        "failed_file", or None.

    Raises
    ------
    ValueError
        A setting or the address is wrong, the address is not this machine, a row has no caption
        column, or `out` was made with other settings, or is being written by another call.
    OSError
        Nothing listens there, the endpoint refuses all requests (no such model, no access), it has
        stopped answering, or `out` cannot be written. What was translated is in `out`.

    Examples
    --------
    Captions do not leave this machine by mistake:

    >>> translate_captions(["A cyst."], "zh.jsonl", base_url="http://example.org/v1", model="m")
    Traceback (most recent call last):
    ValueError: base_url=http://example.org/v1 is not this machine, and what it is asked would leave it: ...
    """
    _check_settings(to, batch_size=batch_size, workers=workers, retries=retries)
    if not timeout > 0 or not pause >= 0:
        raise ValueError(f"timeout={timeout}, pause={pause}: give seconds, timeout above 0")
    endpoint = open_endpoint(
        base_url, model, api_key=api_key, timeout=timeout, allow_remote=allow_remote
    )
    rows = list(_read_rows(source))
    out = Path(out).expanduser()
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(out.with_name(f".{out.name}.lock"))
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise ValueError(f"{out} is being written by another call: wait for it") from None
    try:
        store = _Store(out, to)
        store.open({"model": model, "to": to, "prompt": _PROMPT})
        asking = _Asking(endpoint, to, batch_size, workers, retries, pause)
        return _translate_rows(rows, store, asking, progress)
    finally:
        lock.release()


def _check_settings(to: str, **whole: int) -> None:
    if to not in _LANGUAGES:
        raise ValueError(f"to={to!r}: choose zh or en")
    for name, value in whole.items():
        least = 0 if name == "retries" else 1
        if value < least:
            raise ValueError(f"{name}={value}: give {least} or more")


# ------------------------------------------------------------ rows in


@dataclass(frozen=True)
class _Row:
    """A row of the source."""

    number: int
    id: str
    caption: str


def _read_rows(source: Iterable[Any]) -> Iterator[_Row]:
    """Read captions and ids, without opening a picture."""
    if isinstance(source, str):
        raise ValueError("the source is one string: give a list of captions, or rows")
    columns = getattr(source, "column_names", None)
    if columns is not None:
        if "caption" not in columns:
            raise ValueError("the source has no column caption")
        source = source.select_columns([name for name in ("id", "caption") if name in columns])
    for number, row in enumerate(source):
        if isinstance(row, str):
            yield _Row(number, str(number), row)
            continue
        if not isinstance(row, Mapping) or "caption" not in row:
            raise ValueError(f"row {number} of the source has no caption")
        given = row.get("id")
        caption = row["caption"]
        # None is an empty caption, which fails by name
        text = "" if caption is None else str(caption)
        yield _Row(number, str(number) if given is None else str(given), text)


# ------------------------------------------------------------ the file


class _Store:
    """The translations on disk: a line each, whole or not at all."""

    def __init__(self, out: Path, to: str) -> None:
        self.out = out
        self.column = f"caption_{to}"
        #: The lines, by id and caption.
        self.lines: dict[tuple[str, str], dict[str, Any]] = {}
        #: Translation and differences, by caption.
        self.known: dict[str, dict[str, Any]] = {}

    @property
    def failed_file(self) -> Path:
        return self.out.with_suffix(".failed.jsonl")

    def open(self, settings: dict[str, str]) -> None:
        """Read what an earlier call wrote, if it had these settings, and cut off a torn line."""
        beside = self.out.with_suffix(".settings.json")
        if not self.out.exists() or self.out.stat().st_size == 0:
            write_json(beside, settings)
            return
        before = json.loads(beside.read_text("utf-8")) if beside.exists() else {}
        if before != settings:
            changed = [name for name in settings if settings[name] != before.get(name)]
            raise ValueError(
                f"{self.out} was made with another {' and '.join(changed)}: delete it or choose"
                " another out"
            )
        end = self.out.read_bytes().rfind(b"\n") + 1
        os.truncate(self.out, end)
        for line in read_translations(self.out):
            self._remember(line)

    def _remember(self, line: dict[str, Any]) -> None:
        self.lines[line["id"], line["caption"]] = line
        self.known[line["caption"]] = line

    def add(self, new: Sequence[tuple[_Row, str, Sequence[str]]]) -> None:
        """Write translations: a row, its text, and the kinds of what changed."""
        written = []
        for row, text, differences in new:
            line = {
                "id": row.id,
                "caption": row.caption,
                self.column: text,
                "differences": list(differences),
            }
            self._remember(line)
            written.append(_json_line(line))
        with open(self.out, "a", encoding="utf-8", newline="\n") as file:
            file.write("".join(written))
            file.flush()
            os.fsync(file.fileno())

    def put_in_order(self, rows: Iterable[_Row]) -> None:
        """Write the lines in the order of the source; those of other rows come last."""
        keys = dict.fromkeys((row.id, row.caption) for row in rows)
        ordered = [key for key in keys if key in self.lines]
        ordered += [key for key in self.lines if key not in keys]
        if ordered != list(self.lines):
            write_whole(self.out, "".join(_json_line(self.lines[key]) for key in ordered))

    def name_failures(self, failures: Mapping[int, str], rows: Sequence[_Row]) -> Path | None:
        """Write which rows failed and why, without their captions."""
        if not failures:
            self.failed_file.unlink(missing_ok=True)
            return None
        lines = []
        for number, reason in sorted(failures.items()):
            lines.append(_json_line({"row": number, "id": rows[number].id, "reason": reason}))
        write_whole(self.failed_file, "".join(lines))
        return self.failed_file


def _json_line(value: dict[str, Any]) -> str:
    # half a surrogate pair cannot be written: it becomes a question mark
    text = json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", "replace").decode() + "\n"


def read_translations(out: str | os.PathLike) -> list[dict[str, Any]]:
    r"""Read what `translate_captions` wrote.

    Parameters
    ----------
    out : path
        Its file.

    Returns
    -------
    list of dict
        `id`, `caption`, `caption_zh` or `caption_en`, and `differences`.

    Raises
    ------
    OSError
        There is no such file.
    ValueError
        A line, other than one at the end that a kill cut short, is none of its lines.

    Examples
    --------
    >>> import tempfile
    >>> out = Path(tempfile.mkdtemp(), "zh.jsonl")
    >>> _ = out.write_text(
    ...     '{"id": "1", "caption": "A cyst.", "caption_zh": "囊肿。", "differences": []}\n{"id',
    ...     "utf-8",
    ... )
    >>> [line["caption_zh"] for line in read_translations(out)]
    ['囊肿。']
    """
    with open(out, "rb") as file:
        whole = file.read()
    last = whole.count(b"\n")
    lines = []
    for number, line in read_json_lines(out):
        if number > last:
            break  # the end of a line is missing
        if not isinstance(line, dict) or not {"id", "caption", "differences"} <= line.keys():
            raise ValueError(
                f"{out}, line {number}: no translation; delete the line and translate again"
            )
        lines.append(line)
    return lines


def add_translations(
    pairs: Any, *files: str | os.PathLike, changed: bool = True, to: str = "zh"
) -> Any:
    """Put translations beside the captions of pairs, so that they can be converted.

    Parameters
    ----------
    pairs : datasets.Dataset
        What was translated.
    *files : path
        What `translate_captions` wrote; a later file wins, such as one of corrections.
    changed : bool, default True
        If False, translations with a difference are left out.
    to : str, default "zh"
        The language that was translated to.

    Returns
    -------
    datasets.Dataset
        The pairs with the column `caption_zh` (or `caption_en`), None where there is no
        translation. Translations belong to an id and a caption: for a caption that was changed
        since there is none. `medtune.records.convert_pairs` with `language="zh"` takes them, and
        rejects pairs without one by name.

    Raises
    ------
    ValueError
        No file is given, or one is no file of translations to that language.
    OSError
        There is no such file.

    Examples
    --------
    >>> import datasets, tempfile
    >>> out = Path(tempfile.mkdtemp(), "zh.jsonl")
    >>> _ = out.write_text(
    ...     '{"id": "a", "caption": "A cyst.", "caption_zh": "囊肿。", "differences": []}\\n', "utf-8"
    ... )
    >>> pairs = datasets.Dataset.from_dict({"id": ["a", "b"], "caption": ["A cyst.", "A mass."]})
    >>> add_translations(pairs, out)["caption_zh"][:]
    ['囊肿。', None]
    """
    if not files:
        raise ValueError("no file of translations is given")
    column = f"caption_{to}"
    found: dict[tuple[str, str], str | None] = {}
    for file in files:
        for number, line in enumerate(read_translations(file), 1):
            if column not in line:
                raise ValueError(f"{file}, line {number}: there is no {column}; give to=LANGUAGE")
            taken = changed or not line["differences"]
            found[line["id"], line["caption"]] = line[column] if taken else None
    values = [found.get((row.id, row.caption)) for row in _read_rows(pairs)]
    if column in pairs.column_names:
        pairs = pairs.remove_columns(column)
    return pairs.add_column(column, values)


# ------------------------------------------------------------ asking


@dataclass
class _Outcome:
    """What became of one caption: a translation, or the reason why there is none."""

    text: str | None = None
    differences: Sequence[str] = ()
    reason: str | None = None


@dataclass
class _Asking:
    """How captions are asked about."""

    endpoint: Endpoint
    to: str
    batch_size: int
    workers: int
    retries: int
    pause: float
    #: Set when all must stop: no thread waits or asks any longer.
    stop: threading.Event = field(default_factory=threading.Event)
    #: Whether the endpoint has ever replied.
    replied: bool = False
    #: Requests in a row that got no reply, with all their retries.
    in_vain: int = 0

    def translate(self, captions: Sequence[str]) -> list[_Outcome]:
        """Translate captions in one request; those that it leaves open, one by one."""
        if len(captions) == 1:
            return [self._translate_one(captions[0])]
        try:
            texts = self._ask_several(captions)
        except NoAnswer as error:
            if error.lost:
                return [_Outcome(reason=error.reason) for _ in captions]
            texts = {}
        outcomes = []
        for caption, text in zip(captions, map(texts.get, captions), strict=True):
            good = text and not _refusal(caption, text, self.to)
            if good and not check_translation(caption, text):
                outcomes.append(_Outcome(text))
            else:
                # a batch may have mixed captions up: alone it gets a fair chance
                outcomes.append(self._translate_one(caption))
        return outcomes

    def _ask_several(self, captions: Sequence[str]) -> dict[str, str]:
        """Ask about several captions; returns what can be read of the answer."""
        asked = {str(number): caption for number, caption in enumerate(captions, 1)}
        prompt = _PROMPT.format(language=_LANGUAGES[self.to]) + _SEVERAL
        words = self._ask(_messages(prompt, json.dumps(asked, ensure_ascii=False)))
        try:
            answer = json.loads(words[words.find("{") : words.rfind("}") + 1])
        except ValueError:
            return {}
        if not isinstance(answer, dict):
            return {}
        texts = {}
        for number, caption in asked.items():
            if isinstance(answer.get(number), str):
                texts[caption] = _plain(answer[number])
        return texts

    def _translate_one(self, caption: str) -> _Outcome:
        """Translate one caption; an answer that changed something is asked for once more."""
        prompt = _PROMPT.format(language=_LANGUAGES[self.to]) + _ONE
        messages = _messages(prompt, caption)
        try:
            text = self._ask_until_usable(messages, caption)
        except NoAnswer as error:
            return _Outcome(reason=error.reason)
        differences = check_translation(caption, text)
        if differences:
            refusal = _REFUSED.format(reason=_say(differences))
            messages += [_said("assistant", text), _said("user", refusal)]
            try:
                second = self._ask_until_usable(messages, caption)
            except NoAnswer:
                second = text
            differences_of_second = check_translation(caption, second)
            if len(differences_of_second) < len(differences):
                text, differences = second, differences_of_second
        return _Outcome(text, [difference.kind for difference in differences])

    def _ask_until_usable(self, messages: Sequence[dict[str, str]], caption: str) -> str:
        """Ask until an answer may be a translation; each refusal says why."""
        asked = list(messages)
        for left in range(self.retries, -1, -1):
            try:
                text = _plain(self._ask(asked))
            except NoAnswer as error:
                # after no reply the pauses have been made; a reply that cannot be used costs a try
                if error.lost or not error.try_again or not left:
                    raise
                continue
            refusal = _refusal(caption, text, self.to)
            if refusal is None:
                return text
            asked = [*messages, _said("user", _REFUSED.format(reason=refusal))]
        raise NoAnswer(refusal, lost=False)

    def _ask(self, messages: list[dict[str, str]]) -> str:
        """Send one request, and again after a pause as long as there is no reply."""
        pause = self.pause
        for left in range(self.retries, -1, -1):
            if self.stop.is_set():
                break
            try:
                words = self.endpoint.ask(messages)
            except NoAnswer as error:
                if not error.lost:
                    self._note_reply()
                    raise
                self._check_that_something_listens(error)
                if not left:
                    self._count_in_vain(error)
                    raise
                self.stop.wait(min(max(pause, error.wait or 0.0), _LONGEST_PAUSE))
                pause *= 2
                continue
            self._note_reply()
            return words
        raise NoAnswer("stopped", lost=True)

    def _note_reply(self) -> None:
        self.replied = True
        self.in_vain = 0

    def _check_that_something_listens(self, error: NoAnswer) -> None:
        """Say at once that nothing listens, if nothing ever did: then no retry helps."""
        if error.reason == NOTHING_LISTENS and not self.replied:
            raise OSError(
                f"nothing listens at {self.endpoint.url}: start the server, or give base_url=URL"
            )

    def _count_in_vain(self, error: NoAnswer) -> None:
        self.in_vain += 1
        if self.in_vain >= _GIVE_UP_AFTER:
            raise OSError(
                f"{self.endpoint.url} has stopped answering ({error.reason}); the same call goes on"
                " when it is back"
            )


def _messages(prompt: str, text: str) -> list[dict[str, str]]:
    return [_said("system", prompt), _said("user", text)]


def _said(role: str, content: str) -> dict[str, str]:
    # half a surrogate pair cannot be sent: it becomes a question mark
    return {"role": role, "content": content.encode("utf-8", "replace").decode()}


def _plain(words: str) -> str:
    """Take thoughts, a fence and quotation marks off an answer."""
    text = words.rpartition(_END_OF_THOUGHTS)[2].strip()
    fenced = _FENCE.match(text)
    if fenced:
        text = fenced[1].strip()
    for opening, closing in ('""', "“”", "「」"):
        if len(text) > 1 and text[0] == opening and text[-1] == closing:
            text = text[1:-1].strip()
    return text


def _refusal(caption: str, text: str, to: str) -> str | None:
    """Say why an answer is no translation at all; None if it may be one."""
    if not text:
        return "the answer is empty"
    if detect_language(text) != to:
        return f"the answer is not in {_LANGUAGES[to]}"
    if len(text) > _LONGEST_SHARE * len(caption) + _ALWAYS_ALLOWED:
        return "the answer is far longer than the caption"
    return None


def _say(differences: Sequence[Difference]) -> str:
    """Tell the model what its translation changed."""
    said = []
    for difference in differences:
        lost = ", ".join(difference.lost)
        added = ", ".join(difference.added)
        parts = []
        if lost:
            parts.append(f"it lost {lost}")
        if added:
            parts.append(f"it added {added}")
        said.append(f"{difference.kind}: {' and '.join(parts)}")
    return "; ".join(said)


# ------------------------------------------------------------ all rows


def _translate_rows(
    rows: Sequence[_Row], store: _Store, asking: _Asking, progress: bool
) -> dict[str, Any]:
    """Translate what is not done yet, several requests at the same time."""
    plan = _sort_out(rows, store, asking.to)
    store.add(plan.at_hand)
    done = len(rows) - sum(len(same) for same in plan.waiting.values())
    with tqdm(total=len(rows), initial=done, unit="caption", disable=not progress) as bar:
        for caption, outcome in _ask_all(list(plan.waiting), asking):
            same = plan.waiting[caption]
            if outcome.text is None:
                reason = outcome.reason or "no answer"
                plan.failures.update({row.number: reason for row in same})
            else:
                store.add([(row, outcome.text, outcome.differences) for row in same])
            bar.update(len(same))
    store.put_in_order(rows)
    failed_file = store.name_failures(plan.failures, rows)
    return {
        "rows": len(rows),
        **_count_lines(rows, store),
        "failed": len(plan.failures),
        "reasons": dict(Counter(plan.failures.values()).most_common()),
        "asked": len(plan.waiting),
        "kept": plan.kept,
        "out": str(store.out),
        "failed_file": str(failed_file) if failed_file else None,
    }


@dataclass
class _Plan:
    """What is to be done with the rows of a source."""

    #: The rows of each caption that must be asked for.
    waiting: dict[str, list[_Row]] = field(default_factory=dict)
    #: What can be written at once: row, text, differences.
    at_hand: list[tuple[_Row, str, Sequence[str]]] = field(default_factory=list)
    #: Why a row has no translation, by its number.
    failures: dict[int, str] = field(default_factory=dict)
    #: Rows that are in the file.
    kept: int = 0


def _sort_out(rows: Sequence[_Row], store: _Store, to: str) -> _Plan:
    """Tell what is done, what can be written at once, and what must be asked for."""
    plan = _Plan()
    for row in rows:
        if not row.caption.strip():
            plan.failures[row.number] = "the caption is empty"
        elif (row.id, row.caption) in store.lines:
            plan.kept += 1
        elif detect_language(row.caption) == to:
            plan.at_hand.append((row, row.caption, []))
        elif row.caption in store.known:
            known = store.known[row.caption]
            plan.at_hand.append((row, known[store.column], known["differences"]))
        else:
            plan.waiting.setdefault(row.caption, []).append(row)
    return plan


def _count_lines(rows: Sequence[_Row], store: _Store) -> dict[str, Any]:
    """Count the rows that have a translation, and what the translations changed."""
    kinds: Counter[str] = Counter()
    translated = already = changed = 0
    for row in rows:
        line = store.lines.get((row.id, row.caption))
        if line is None:
            continue
        if line[store.column] == row.caption:
            already += 1
        else:
            translated += 1
        if line["differences"]:
            changed += 1
        kinds.update(line["differences"])
    counts = {"translated": translated, "already": already, "changed": changed}
    return {**counts, "kinds": dict(kinds.most_common())}


def _ask_all(captions: Sequence[str], asking: _Asking) -> Iterator[tuple[str, _Outcome]]:
    """Yield each caption with what became of it, as it comes; an error of the endpoint ends all."""
    starts = range(0, len(captions), asking.batch_size)
    to_do: queue.SimpleQueue[Sequence[str]] = queue.SimpleQueue()
    for start in starts:
        to_do.put(captions[start : start + asking.batch_size])
    # It holds no more than a kill may cost: threads wait until what they have is written.
    done: queue.Queue[tuple[Sequence[str], list[_Outcome] | BaseException]]
    done = queue.Queue(maxsize=asking.workers)
    for _ in range(min(asking.workers, len(starts))):
        # A thread may wait for minutes for a reply: as daemons they do not hold up the end of the
        # program, whether by Ctrl-C or by an error.
        threading.Thread(target=_work, args=(asking, to_do, done), daemon=True).start()
    try:
        for _ in starts:
            batch, outcomes = done.get()
            if isinstance(outcomes, BaseException):
                yield from _what_has_come(done)
                raise outcomes
            yield from zip(batch, outcomes, strict=True)
    finally:
        asking.stop.set()
        # makes room, so that no thread waits for ever with its last batch
        list(_what_has_come(done))


def _work(asking: _Asking, to_do: queue.SimpleQueue, done: queue.Queue) -> None:
    """Translate batches until there are no more, or all must stop."""
    while not asking.stop.is_set():
        try:
            batch = to_do.get_nowait()
        except queue.Empty:
            return
        try:
            done.put((batch, asking.translate(batch)))
        except BaseException as error:  # noqa: BLE001 - the main thread raises it
            done.put((batch, error))
            return


def _what_has_come(done: queue.Queue) -> Iterator[tuple[str, _Outcome]]:
    """Yield what other threads have translated before one met an error."""
    while not done.empty():
        batch, outcomes = done.get()
        if not isinstance(outcomes, BaseException):
            yield from zip(batch, outcomes, strict=True)
