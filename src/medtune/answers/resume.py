"""Answers on disk: a run that was killed goes on where it stopped.

Each batch is written as soon as it is done. Beside the answers, `<name>.jsonl`, stand the settings
that made them, `<name>.settings.json`. A run with other settings is refused, so that answers of two
models never mix in one file.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from medtune.files import write_whole

from .server import OpenAIServer


def read_answers(path: str | os.PathLike) -> list[dict[str, Any]]:
    r"""Read what `generate_answers` wrote; a last line that a kill cut short is left out.

    Parameters
    ----------
    path : the JSON Lines file that was given as `out`.

    Returns
    -------
    list of dict : the answers in the order in which they were made, see `generate_answers`.

    Raises
    ------
    OSError : there is no such file.
    ValueError : a line that is no JSON, other than the last.

    Examples
    --------
    >>> import tempfile
    >>> out = Path(tempfile.mkdtemp(), "answers.jsonl")
    >>> _ = out.write_text('{"id": "1", "answer": "A liver."}\n{"id": "2", "ans')
    >>> read_answers(out)
    [{'id': '1', 'answer': 'A liver.'}]
    """
    # Bytes, not text: an answer may hold half a surrogate pair, which json reads from bytes only.
    # What stands behind the last line feed is an unfinished line, or nothing.
    lines = Path(path).read_bytes().split(b"\n")[:-1]
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it and generate again") from error


def resume(out: Path, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the answers on file, if these settings made them, and cut off an unfinished line.

    Parameters
    ----------
    out : the JSON Lines file; it need not exist, nor its folder.
    settings : whatever an answer depends on; what JSON does not know is written as text.

    Returns
    -------
    dict : answer by id; empty for a new file.

    Raises
    ------
    ValueError : the file was made with other settings, or is damaged.
    OSError : in one line: the folder cannot be written.
    """
    beside = out.with_suffix(".settings.json")
    text = json.dumps(settings, indent=1, default=str)
    if not out.exists() or out.stat().st_size == 0:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_whole(beside, text)
        except OSError as error:
            raise OSError(f"{out} cannot be written: {error.strerror or error}") from error
        return {}
    _check_same(out, beside, json.loads(text))
    answers = {answer["id"]: answer for answer in read_answers(out)}
    end_of_last_line = out.read_bytes().rfind(b"\n") + 1
    os.truncate(out, end_of_last_line)
    return answers


def _check_same(out: Path, beside: Path, now: dict[str, Any]) -> None:
    """Refuse to go on with answers that other settings made."""
    before = {}
    if beside.exists():
        before = json.loads(beside.read_text(encoding="utf-8"))
    changed = [name for name in now | before if now.get(name) != before.get(name)]
    if changed:
        raise ValueError(
            f"{out} was made with other settings ({', '.join(changed)}): "
            "delete it or choose another out"
        )


def append(out: Path, answers: Iterable[Mapping[str, Any]]) -> None:
    """Add answers to the file, a line each, and wait until they are on the disk.

    Several processes may add to one file at the same time.

    Raises
    ------
    OSError : in one line: the disk is full or cannot be written; what is on it stays good.
    """
    lines = [json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers]
    try:
        with open(out, "ab+") as file:
            # another process waits here until these lines are written
            fcntl.flock(file, fcntl.LOCK_EX)
            _cut_unfinished_line(file)
            # surrogatepass: a model may generate half a surrogate pair, and that must not end a run
            file.write("".join(lines).encode("utf-8", "surrogatepass"))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        # what a full disk says names no file
        raise OSError(
            f"{out} cannot be written ({error.strerror or error}): free some space, "
            "the same call goes on where it stopped"
        ) from error


def _cut_unfinished_line(file: BinaryIO) -> None:
    """Cut off what another process wrote of a line before it was killed."""
    end = file.seek(0, os.SEEK_END)
    if not end:
        return
    file.seek(end - 1)
    if file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def digest_of(thing: Any) -> str:
    """Tell models, or processors, apart by a SHA-256 of what an answer depends on.

    Parameters
    ----------
    thing : a processor, of which template and picture settings count, or a model, of which
        configuration and about 16 numbers of each weight count; a folder, a hub id or the name of
        a served model stands for itself.

    Examples
    --------
    >>> digest_of("Qwen/Qwen3-VL-2B-Instruct")
    'Qwen/Qwen3-VL-2B-Instruct'
    """
    if isinstance(thing, str | Path | OpenAIServer):
        return str(thing)
    # settings files of runs that may go on hold this digest: its ingredients and their order must
    # stay
    template = getattr(thing, "chat_template", "")
    digest = hashlib.sha256(str(template).encode())
    for part in ("config", "generation_config", "image_processor"):
        if hasattr(thing, part):
            digest.update(getattr(thing, part).to_json_string().encode())
    if isinstance(thing, torch.nn.Module):
        for name, weight in thing.named_parameters():
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
            digest.update(_some_numbers(weight))
    return digest.hexdigest()


def _some_numbers(weight: torch.Tensor) -> bytes:
    """Return about 16 numbers of a weight: all of them would take minutes for a large model."""
    if weight.device.type == "meta":  # offloaded to the disk: there are no numbers here
        return b""
    flat = weight.detach().flatten()
    step = max(1, flat.numel() // 16)
    return flat[::step].float().cpu().numpy().tobytes()
