"""Write image-text pairs as pictures and training records in three dialects, check such a folder, read it for TRL.

A folder holds `images/`, one JSON Lines file a split, `dataset_info.json` (for LLaMA-Factory), `rejected.jsonl` (what
was left out, and why) and `convert.json` (settings, counts). Records grow in a hidden work folder, where their sizes
are noted after every 64 rows, so a killed run goes on where it stopped.
"""

import contextlib
import errno
import functools
import hashlib
import io
import itertools
import json
import os
import random
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from .captions import detect_language
from .data import _line, _split_of, load_pairs, picture_bytes, reject_reason, to_rgb

MARK = "<image>"
UNIT = 64  # rows held in memory and between two notes of progress
SPLITS = ("train", "validation", "test")
QUESTIONS = ("Describe this medical image.", "What does this image show?", "Report the findings in this image.",
             "请描述这张医学图像。", "这张图像显示了什么？", "请报告这张图像中的所见。")  # fmt: skip
DIALECTS: dict[str, dict] = {  # each with its entry in dataset_info.json
    "prompt-completion": {"formatting": "alpaca", "columns": {"prompt": "instruction", "response": "output"}},
    "messages": {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": {"role_tag": "role",
        "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant", "system_tag": "system"}},
    "sharegpt": {"formatting": "sharegpt", "columns": {"messages": "conversations"}, "tags": {"role_tag": "from",
        "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt", "system_tag": "system"}},
}  # fmt: skip
# Columns that a record builds itself, or that would make TRL or LLaMA-Factory take it for another kind of record.
_OWN = {"image", "images", "id", "caption", "caption_zh", "split", "prompt", "completion", "messages", "conversations",
        "system", "instruction", "output", "history", "text", "tools", "chosen", "rejected", "problem"}  # fmt: skip
_NO_JSON = re.compile(r"Value\('(large_)?(binary|date|time|duration)|(Image|Audio|Video)\(")
CHECKS = ("readable", "roles alternate", "no empty turn", "image marks", "pictures open", "ids differ", "groups apart")
_SEEN = SimpleNamespace(mode="L", width=1, height=1, draft=lambda *_: None, load=lambda: None)  # for a judged picture


def _safe_name(sample_id: str) -> str:
    """Turn an id into a file name: itself when it is plain, otherwise a hash, so that no id can leave the folder."""
    plain = re.fullmatch(r"(?!h-[0-9a-f]{32}$)[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", sample_id)
    return sample_id if plain else "h-" + hashlib.sha256(sample_id.encode()).hexdigest()[:32]


def _parts(text: str) -> list[dict]:
    pieces = re.split(f"({MARK})", text)
    return [{"type": "image"} if piece == MARK else {"type": "text", "text": piece} for piece in pieces if piece]


def _study(record: Any, pictures: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Read a record of any dialect, or a list of messages: its (role, text with marks), and each (check, problem)."""
    turns, problems = [], []
    try:
        record = {"messages": record} if isinstance(record, list) else record
        messages = record["prompt"] + record["completion"] if "prompt" in record else record.get("messages")
        for message in messages or record["conversations"]:
            role, text = message.get("role", message.get("from")), message.get("content", message.get("value"))
            if not isinstance(text, str):
                text = "".join(MARK if part["type"] == "image" else part["text"] for part in text)
            turns.append(({"human": "user", "gpt": "assistant"}.get(role, role), text))
        turns[:0] = [("system", record.get("system"))] * bool(record.get("system") and turns[0][0] != "system")
    except (LookupError, TypeError, AttributeError) as error:
        problem = _line(record) if isinstance(record, ValueError) else f"{type(error).__name__}: {_line(error)}"
        return [], [("readable", f"not one of {', '.join(DIALECTS)} ({problem})")]
    roles = [role for role, _ in turns if role != "system"]
    if roles != ["user", "assistant"] * max(1, len(roles) // 2) or "system" in [role for role, _ in turns[1:]]:
        problems.append(("roles alternate", f"the roles are {', '.join(str(role) for role, _ in turns)}"))
    if not all(text.replace(MARK, "").strip() for _, text in turns):
        problems.append(("no empty turn", "a question or an answer is empty"))
    marks = sum(text.count(MARK) for _, text in turns)
    if marks != pictures or any(MARK in text for role, text in turns if role != "user"):
        problems.append(("image marks", f"{marks} {MARK} for {pictures} pictures, or one outside a question"))
    return turns, problems


def _record(sample_id: str, turns: list[tuple[str, str]], images: list[str], extra: dict, job: dict) -> bytes:
    """Make one line; all records of a folder have the same keys."""
    form, record = DIALECTS[job["dialect"]], {"id": sample_id}
    if tags := form.get("tags"):
        said = [{tags["role_tag"]: tags[f"{role}_tag"], tags["content_tag"]: text} for role, text in turns]
        record |= {form["columns"]["messages"]: said}
    else:  # LLaMA-Factory cannot read content parts: the same once more, flat
        parts = [{"role": role, "content": _parts(text)} for role, text in turns]
        texts = [text for role, text in turns if role != "system"]
        record |= {"prompt": parts[:-1], "completion": parts[-1:], "instruction": texts[-2], "output": texts[-1]}
        if "system" in job["columns"]:
            history = [list(turn) for turn in zip(texts[:-2:2], texts[1:-2:2], strict=True)]
            record |= {"system": turns[0][1] if turns[0][0] == "system" else "", "history": history}
    return json.dumps(record | {"images": images} | extra, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _open_source(source: Any) -> tuple[list[tuple], dict, list]:
    """Give shards as (name, rows, ids, problem or function that reads so many rows at a time), types, an identity."""

    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    shards, types, text = [], [], datasets.Value("string")
    if isinstance(source, (str, os.PathLike)):
        path = Path(source).expanduser()
        files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path] * (path.suffix == ".parquet")
        for file in filter(Path.exists, files):
            try:  # without pre_buffer a row group of any size is read page by page
                shard = pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 16)
                ids = [chunk for column in shard.read(columns=["id"]).columns for chunk in column.chunks]
                shards.append((file.name, shard.metadata.num_rows, ids, shard.iter_batches))
                types.append(dict(datasets.Features.from_arrow_schema(shard.schema_arrow)))
            except (OSError, ValueError) as error:
                problem = f"shard: {file.name} is cut off, fetch it again ({_line(error)})"
                shards.append((file.name, 1, [pa.array([str(file)])], problem))
        if shards and not types:
            raise ValueError(shards[0][3])
        plain = types and "image" in types[0] and types[0].get("id") == types[0].get("caption") == text
        if plain and types.count(types[0]) == len(types):
            return shards, types[0], [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
        source = load_pairs(source, strict=False)
    if not isinstance(source, datasets.Dataset) or not {"image", "id", "caption"} <= set(source.column_names):
        raise ValueError("convert needs a Dataset with image, id and caption, as medtune.data.load_pairs gives")
    for name, kind in (("image", datasets.Image(decode=False)), ("id", text), ("caption", text)):
        source = source if source.features[name] == kind else source.cast_column(name, kind)
    ids, arrow = source.select_columns("id").with_format("arrow")[:]["id"].chunks, source.with_format("arrow")
    return [("", len(source), ids, arrow.iter)], dict(source.features), [source._fingerprint]


def _units(shards: list[tuple], first: int) -> Iterator[tuple]:
    """Yield (shard, row numbers, table or problem) from row `first` on; a shard before it is not read."""
    start = 0
    for shard, rows, _, read in shards:
        stop, problem = start + rows, read if isinstance(read, str) else None
        try:
            for table in read(UNIT) if stop > first and not problem else ():
                if start >= first:
                    yield shard, range(start, start + table.num_rows), table
                start += table.num_rows
        except (OSError, ValueError) as error:
            problem = f"shard: {shard} breaks off here ({_line(error)})"
        if problem and stop > first:
            yield shard, range(start, stop), problem
        start = stop


def _judge(row: dict, jpeg_quality: int | None) -> tuple[bytes, str, str] | str:
    """Give picture bytes, suffix, and "copied" or "converted"; or the reason why the pair is bad."""
    suffix, whole = None, False
    with contextlib.suppress(Exception):  # decoders raise many kinds; reject_reason says which
        data = picture_bytes(row["image"])
        picture = Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
        turned = "exif" in picture.info and picture.getexif().get(0x0112, 1) != 1
        if picture.mode in ("RGB", "L") and not turned and getattr(picture, "n_frames", 1) == 1:
            suffix = {"JPEG": ".jpg", "PNG": ".png"}.get(str(picture.format))
        # A JPEG with its end mark is whole, as far as a decoder can tell: only the text is left to judge.
        whole = suffix == ".jpg" and data.endswith(b"\xff\xd9") and picture.width * picture.height <= 50_000_000
    if reason := reject_reason(row | {"image": _SEEN} if whole else row):
        return reason
    if suffix:
        return data, suffix, "copied"
    form, suffix = ("JPEG", ".jpg") if jpeg_quality else ("PNG", ".png")
    to_rgb(Image.open(io.BytesIO(data))).save(buffer := io.BytesIO(), form, quality=jpeg_quality)
    return buffer.getvalue(), suffix, "converted"


def _accept(shard: str, numbers: range, table: Any, job: dict, run: dict) -> Iterator[tuple]:
    """Yield (series, row number, row, split, caption, question, picture name, bytes, how); bad pairs go to `reject`."""
    rows, by_name = [], _split_of(Path(shard)) or "train"
    for i in range(len(numbers)):
        try:  # row by row: text that is not UTF-8 spoils its own row only
            rows += [{"problem": table}] if isinstance(table, str) else table.slice(i, 1).to_pylist()
        except UnicodeDecodeError as error:
            rows.append({"problem": f"text: {_line(error)}"})
    plain = all(((row.get("image") or {}).get("bytes") or b"")[:2] == b"\xff\xd8" for row in rows)
    # threads help where a picture must be decoded, and slow down a mere copy
    judged = (map if plain else run["pool"].map)(_judge, rows, itertools.repeat(job["jpeg_quality"]))
    for number, row, found in zip(numbers, rows, judged, strict=True):
        split = run["splits"][number] if run["splits"] else row.get("split", by_name)
        caption = (row.get("caption_zh") if job["language"] == "zh" else None) or row.get("caption") or ""
        spoken = detect_language(caption)
        problem = (
            found if isinstance(found, str)
            else f"id: row {run['repeated'][number]} has it already, with its own picture" if number in run["repeated"]
            else f"split: {split!r:.50} is none of {', '.join(SPLITS)}" if split not in SPLITS
            else f"caption: it holds the mark {MARK}" if MARK in caption
            else "caption: there is none in Chinese" if job["language"] == "zh" != spoken
            else None
        )  # fmt: skip
        if problem:
            run["reject"](number, row.get("id"), problem)
            continue
        questions = [text for text, tongue in job["questions"] if tongue == spoken] or [q for q, _ in job["questions"]]
        drawn = int(hashlib.sha256(f"{job['seed']}:{row['id']}".encode()).hexdigest(), 16) % len(questions)
        name = f"{number // 10_000:05d}/" * run["folders"] + _safe_name(row["id"]) + found[1]
        series = (split, row["group"]) if job["pictures_per_sample"] > 1 and row.get("group") else number
        yield series, number, row, split, caption, questions[drawn], name, found[0], found[2]


def _replace(path: Path | str, data: bytes, work: Path) -> None:
    """Write a file whole or not at all: what has its name is complete."""
    (temporary := work / ".tmp").write_bytes(data)
    try:
        os.replace(temporary, path)
    except FileNotFoundError:
        os.mkdir(os.path.dirname(path))
        os.replace(temporary, path)


def _read(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, record or ValueError) of JSON Lines, or of a .json file that is one list."""
    with open(file, encoding="utf-8", errors="replace") as stream:
        for number, line in enumerate(json.load(stream) if file.suffix == ".json" else stream, 1):
            try:
                yield f"{file.name}:{number}", json.loads(line) if isinstance(line, str) else line
            except ValueError as error:
                yield f"{file.name}:{number}", error


def _convert(shards: list[tuple], job: dict, state: dict, run: dict, text_only: Path | None) -> dict:
    """Convert what the state does not have, then give the files their names; convert.json comes last."""
    out, work, counts, files, dialogues = run["out"], run["work"], Counter(state["counts"]), {}, []
    nothing, rows = dict.fromkeys(run["extra"]), sum(shard[1] for shard in shards)

    def reject(number: int | None, sample_id: object, reason: str) -> None:
        if run["strict"]:
            raise ValueError(f"row {number}, id {str(sample_id)[:100]!r}: {reason}")
        files["rejected"].write(json.dumps({"id": sample_id, "row": number, "reason": reason}).encode() + b"\n")
        counts.update(["rejected", "reason " + reason.split(":")[0]])

    with contextlib.ExitStack() as stack:
        for kind in (*SPLITS, "rejected"):
            with contextlib.suppress(FileNotFoundError):  # killed while the files got their names
                os.replace(out / f"{kind}.jsonl", work / f"{kind}.jsonl")
            files[kind] = stack.enter_context(open(work / f"{kind}.jsonl", "ab"))
            files[kind].seek(files[kind].truncate(state["sizes"].get(kind, 0)))
        for place, record in _read(text_only) if text_only else ():
            turns, problems = _study(record, 0)
            if not problems:
                dialogues.append((f"text-only-{place.rpartition(':')[2]}", turns))
            elif not state["row"]:  # a run that goes on has said so
                reject(None, place, f"dialogue: {problems[0][1]}")
        random.Random(job["seed"]).shuffle(dialogues)
        run |= {"pool": stack.enter_context(ThreadPoolExecutor(run["workers"])), "reject": reject}
        bar = stack.enter_context(tqdm(total=rows, initial=state["row"], unit="pair", delay=3))
        for shard, numbers, table in _units(shards, state["row"]):
            for _, series in itertools.groupby(_accept(shard, numbers, table, job, run), key=lambda pair: pair[0]):
                while pairs := list(itertools.islice(series, job["pictures_per_sample"])):
                    _, at, cells, splits, captions, questions, names, pictures, hows = zip(*pairs, strict=True)
                    first, answer = cells[0], "\n".join(dict.fromkeys(captions))
                    same = {c: first[c] if all(row[c] == first[c] for row in cells) else None for c in run["extra"]}
                    turns = [("system", job["system_prompt"])] * bool(job["system_prompt"])
                    turns += [("user", MARK * len(at) + questions[0]), ("assistant", answer)]
                    sample_id = first["id"] + f"+{len(at) - 1}" * (len(at) > 1)
                    try:
                        line = _record(sample_id, turns, [f"images/{name}" for name in names], same, job)
                    except ValueError as error:  # what JSON cannot hold
                        for number, row in zip(at, cells, strict=True):
                            reject(number, row["id"], f"record: {_line(error)}")
                        continue
                    for name, data in zip(names, pictures, strict=True):
                        _replace(f"{out}/images/{name}", data, work)
                    files[splits[0]].write(line)
                    counts.update([splits[0], *hows])
                    wanted = int(counts["train"] * job["share"] / (1 - job["share"]) + 0.5)
                    for sample_id, turns in dialogues[counts["text_only"] : wanted]:  # spread evenly
                        files["train"].write(_record(sample_id, turns, [], nothing, job))
                        counts["text_only"] += 1
            for file in files.values():
                file.flush()
            state |= {"row": numbers.stop, "counts": counts, "sizes": {k: f.tell() for k, f in files.items()}}
            _replace(work / "state.json", json.dumps(state).encode(), work)
            bar.update(len(numbers))
    for kind in (kinds := [kind for kind in files if counts[kind]]):
        os.replace(work / f"{kind}.jsonl", out / f"{kind}.jsonl")
    form = DIALECTS[job["dialect"]] | {"columns": job["columns"]}
    info = {split: {"file_name": f"{split}.jsonl"} | form for split in SPLITS if split in kinds}
    _replace(out / "dataset_info.json", json.dumps(info, indent=2).encode(), work)
    records = {kind: counts[kind] + counts["text_only"] * (kind == "train") for kind in info}
    summary = {"dialect": job["dialect"], "rows": rows, "records": records}
    summary |= {name: counts[name] for name in ("text_only", "copied", "converted", "rejected")}
    summary["reasons"] = {kind[7:]: n for kind, n in sorted(counts.items()) if kind.startswith("reason ")}
    done = {"summary": summary, "job": job, "features": run["features"]}
    _replace(out / "convert.json", json.dumps(done, indent=1, ensure_ascii=False).encode(), work)
    shutil.rmtree(work)
    return summary


def convert_pairs(
    source: Any, out: str | os.PathLike, *, dialect: str = "prompt-completion",
    questions: str | Sequence[str] | None = None, language: str = "en", system_prompt: str | None = None,
    text_only: str | os.PathLike | None = None, share: float = 0.1, pictures_per_sample: int = 1,
    splits: Sequence[str] | None = None, jpeg_quality: int | None = None, seed: int = 0, workers: int | None = None,
    strict: bool = False, overwrite: bool = False,
) -> dict:  # fmt: skip
    """Write pairs as pictures and records; the same call goes on with a killed run and leaves a finished one alone.

    JPEG and PNG in RGB or grey are copied byte for byte, others become upright RGB PNG. Parquet shards are read
    directly, with flat memory. The result depends neither on `workers` nor on a restart.

    Parameters
    ----------
    source, out : a `datasets.Dataset` of pairs, or what `load_pairs` takes; the folder to write, new or empty.
    dialect : "prompt-completion" (TRL), "messages" (role/content) or "sharegpt" (conversations, from/value).
    questions : one, or several to draw from by id and seed, such as `QUESTIONS`; in the caption's language if there is.
    language : "en" takes `caption`; "zh" takes `caption_zh`, or a Chinese `caption`, and rejects pairs without.
    system_prompt : said before each question about pictures.
    text_only, share : JSONL of dialogues without pictures, and their share of the train split, from 0 to below 1.
    pictures_per_sample : up to so many neighbouring rows of one `group` make one sample, with all their captions.
    splits : "train", "validation" or "test" for each row. Default: the column `split`, else the name of the shard.
    jpeg_quality : make pictures that cannot be copied JPEG of this quality, 1 to 95, instead of PNG.
    workers : threads for pictures that must be decoded; by default one a core.
    strict, overwrite : stop at the first bad pair instead of listing it; replace a conversion with other settings.

    Returns
    -------
    dict : rows, records a split, pictures copied and converted, rejected, and the reasons by column.

    Raises
    ------
    ValueError, OSError : settings, source, folder or (if `strict`) a pair are wrong; the folder cannot be written.

    Examples
    --------
    >>> import datasets, pathlib, tempfile, PIL.Image
    >>> rows = {"image": [PIL.Image.new("L", (8, 8))], "id": ["a"], "caption": ["A black square."]}
    >>> folder = pathlib.Path(tempfile.mkdtemp()) / "out"
    >>> convert_pairs(datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()), folder)["records"]
    {'train': 1}
    """

    import datasets

    asked = [questions] if isinstance(questions, str) else list(questions or (QUESTIONS[0], QUESTIONS[3]))
    if dialect not in DIALECTS or language not in ("en", "zh"):
        raise ValueError(f"dialect must be one of {', '.join(DIALECTS)}, language en or zh")
    if not 0 <= share < 1 or pictures_per_sample < 1 or not all(text.strip() and MARK not in text for text in asked):
        raise ValueError(f"share must be from 0 to below 1, pictures_per_sample 1 or more, a question without {MARK}")
    shards, types, identity = _open_source(source)
    out, text_only, rows = Path(out).expanduser(), text_only and Path(text_only), sum(shard[1] for shard in shards)
    splits = None if splits is None else list(splits)
    if not rows or splits and len(splits) != rows:
        raise ValueError(f"{len(splits)} splits for {rows} rows" if splits else "the source holds no pairs")
    if pictures_per_sample > 1 and "group" not in types:
        raise ValueError("pictures_per_sample needs a column `group` that says which pictures belong together")
    also = ["images"] + ["system", "history"] * bool(dialect == "prompt-completion" and (system_prompt or text_only))
    job = {
        "dialect": dialect, "questions": [[text, detect_language(text)] for text in asked], "language": language,
        "system_prompt": system_prompt, "share": share, "pictures_per_sample": pictures_per_sample, "seed": seed,
        "jpeg_quality": jpeg_quality, "columns": DIALECTS[dialect]["columns"] | {c: c for c in also},
        "text_only": text_only and hashlib.sha256(text_only.read_bytes()).hexdigest(), "source": identity,
        "splits": splits and hashlib.sha256("\n".join(map(str, splits)).encode()).hexdigest(),
    }  # fmt: skip
    work, done = out / ".convert", out / "convert.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(path.is_symlink() for path in (out / "images", work)):
            raise ValueError(f"{out} holds a link that leads out of it (images or .convert); remove it")
        old = next((json.loads(file.read_text("utf-8")) for file in (done, work / "state.json") if file.exists()), None)
        if not old and any(path != work for path in out.iterdir()):
            raise ValueError(f"{out} is not empty and holds no conversion; choose another folder")
        if old and old["job"] != job:
            changed = ", ".join(key for key in job if job[key] != old["job"].get(key))
            if not overwrite:
                raise ValueError(f"{out} holds a conversion with other {changed}; overwrite it, or name another folder")
            done.unlink(missing_ok=True)  # first: what is half removed must not pass for finished
            for path in (work, out / "images", *out.glob("*.json*")):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            old = None
        if old and done.exists():
            shutil.rmtree(work, ignore_errors=True)
            return old["summary"]
        work.mkdir(exist_ok=True)
        state = old or {"job": job, "row": 0, "counts": {}, "sizes": {}}
        _replace(work / "state.json", json.dumps(state).encode(), work)
        (out / "images").mkdir(exist_ok=True)
        extra = [name for name in types if name not in _OWN and not _NO_JSON.search(str(types[name]))]
        ids = (hash(value) for shard in shards for chunk in shard[2] for value in chunk.cast("binary").to_pylist())
        _, first, same = np.unique(np.fromiter(ids, np.int64), return_index=True, return_inverse=True)
        repeated = {int(row): int(first[same[row]]) for row in np.flatnonzero(first[same] != np.arange(rows))}
        run = {"out": out, "work": work, "extra": extra, "repeated": repeated, "splits": splits, "strict": strict}
        run |= {"features": datasets.Features({name: types[name] for name in extra}).to_dict()}
        run |= {"folders": rows > 100_000, "workers": workers or os.cpu_count()}
        return _convert(shards, job, state, run, text_only)
    except OSError as error:
        (work / ".tmp").unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            hint = f"cannot write {out} ({error.strerror}): make room or choose another folder; the same call goes on"
            raise OSError(error.errno, hint) from None
        raise


def check_folder(folder: str | os.PathLike, *, processor: Any = None, max_length: int | None = None) -> dict:
    """Check the records of a folder, in any dialect, and their pictures; writes `check.json` there.

    Parameters
    ----------
    folder : holds `dataset_info.json` that names the files, or else JSON or JSON Lines files of records.
    processor, max_length : count tokens as this processor does, and report the records that are longer, hence cut.

    Returns
    -------
    dict : `ok`; `records` a file; `table`, a row a check: its errors and the first; `errors`, up to 1,000 with place
        (file:line), id, check and problem; `tokens` (min, median, max); `cut`, id and tokens of the longer ones.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> _ = (folder / "train.jsonl").write_text('{"id": "a", "messages": [{"role": "user", "content": "What?"}]}')
    >>> check_folder(folder)["errors"][0]["problem"]
    'the roles are user'
    """
    folder = Path(folder).expanduser().resolve()
    info, others = folder / "dataset_info.json", {"dataset_info", "rejected", "convert", "check", "summary"}
    names = sorted(file.name for file in folder.glob("*.json*") if file.stem not in others)
    if info.is_file():
        names = [Path(entry["file_name"]).name for entry in json.loads(info.read_text("utf-8")).values()]
    if not names or (max_length and not processor):
        raise ValueError("max_length is in tokens: give a processor too" if names else f"{folder} holds no records")

    def look(placed: tuple[str, Any]) -> list:  # the size of each picture of a record, or what is wrong with it
        images, seen = (placed[1].get("images") if isinstance(placed[1], dict) else None) or [], []
        for name in images if isinstance(images, list) else [images]:
            try:
                if not (folder / name).resolve().is_relative_to(folder):
                    raise ValueError("it lies outside the folder")
                with Image.open(folder / name) as picture:
                    picture.load()
                    seen.append(picture.size)
            except Exception as error:  # decoders raise many kinds
                seen.append(f"{name}: {'it is missing' if isinstance(error, FileNotFoundError) else _line(error)}")
        return seen

    def render(turns: list[tuple[str, str]]) -> tuple[str, int]:
        messages = [{"role": role, "content": _parts(text)} for role, text in turns]
        text = processor.apply_chat_template(messages, tokenize=False)
        return text, len(processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    @functools.cache
    def picture_tokens(size: tuple[int, int]) -> int:  # what a picture of this size adds to its mark
        text, count = render([("user", MARK)])
        return len(processor(images=[[Image.new("RGB", size)]], text=[text])["input_ids"][0]) - count

    errors, records, tokens, owners = [], Counter(), {}, {}
    stream = itertools.chain.from_iterable(_read(folder / name) for name in names)
    with ThreadPoolExecutor() as pool:
        while block := list(itertools.islice(stream, 256)):
            for (place, record), sizes in zip(block, pool.map(look, block), strict=True):
                file, known = place.rpartition(":")[0], record if isinstance(record, dict) else {}
                name, records[file] = str(known.get("id") or place), records[file] + 1
                turns, found = _study(record, len(sizes))
                found += [("pictures open", size) for size in sizes if isinstance(size, str)]
                for check, key, mine in (("ids differ", "id", place), ("groups apart", "group", file)):
                    if known.get(key) and (other := owners.setdefault((key, str(known[key])), mine)) != mine:
                        found.append((check, f"{key} {known[key]} is in {other} too"))
                if processor and not found:
                    tokens[name] = render(turns)[1] + sum(map(picture_tokens, sizes))
                errors += [{"place": place, "id": name, "check": check, "problem": text} for check, text in found]
    first = {error["check"]: f"{error['place']}: {error['problem']}" for error in reversed(errors)}
    count = Counter(error["check"] for error in errors)
    table = [{"check": check, "errors": count[check], "first": first.get(check)} for check in CHECKS]
    report = {"ok": not errors, "records": dict(records), "table": table, "errors": errors[:1000]}
    if lengths := sorted(tokens.values()):
        report["tokens"] = {"min": lengths[0], "median": lengths[len(lengths) // 2], "max": lengths[-1]}
        report["cut"] = {name: count for name, count in tokens.items() if max_length and count > max_length}
    _replace(folder / "check.json", json.dumps(report, indent=1, ensure_ascii=False).encode(), folder)
    return report


def read_records(folder: str | os.PathLike, split: str = "train") -> Any:
    """Read a split of a converted folder, of any dialect, as the `datasets.Dataset` that TRL's `SFTTrainer` wants.

    It has `id`, `prompt` and `completion` (turns of content parts), `images` (decoded when read) and what the source
    had, such as `group` and `roi`. FileNotFoundError: no such split; ValueError: a line does not conform.
    """

    import datasets
    from datasets.exceptions import DatasetGenerationError

    folder, text = Path(folder).expanduser().resolve(), datasets.Value("string")
    file, made = folder / f"{split}.jsonl", folder / "convert.json"
    if not file.is_file():
        there = ", ".join(sorted(other.stem for other in folder.glob("*.jsonl"))) or "nothing"
        raise FileNotFoundError(f"{file} does not exist, only {there}: write it with `medtune convert`")
    extra = datasets.Features.from_dict(json.loads(made.read_text("utf-8"))["features"] if made.is_file() else {})
    turns = datasets.List({"role": text, "content": datasets.List(datasets.Json())})
    types = {"id": text, "prompt": turns, "completion": turns, "images": datasets.List(datasets.Image())} | extra

    def generate(file: Path, changed: int) -> Iterator[dict]:
        for place, record in _read(file):
            images = [(folder / name).resolve() for name in getattr(record, "get", {}.get)("images") or ()]
            said, problems = _study(record, len(images))
            if problems or not all(image.is_relative_to(folder) for image in images):
                raise ValueError(f"{place}: {problems[0][1] if problems else 'a picture lies outside the folder'}")
            parts = [{"role": role, "content": _parts(text)} for role, text in said]
            row = {"prompt": parts[:-1], "completion": parts[-1:], "images": list(map(str, images))}
            yield {name: record.get(name) for name in ("id", *extra)} | row

    try:
        arguments = {"file": file, "changed": file.stat().st_mtime_ns}  # a changed file is read anew
        return datasets.Dataset.from_generator(generate, features=datasets.Features(types), gen_kwargs=arguments)
    except DatasetGenerationError as error:
        raise ValueError(f"cannot read records: {_line(error.__cause__ or error)}") from None
