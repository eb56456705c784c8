"""Load a benchmark by its name, from its published files or from the hub."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from medtune.files import one_line
from medtune.pairs import load_pairs, names_group, picture_bytes, split_of_word

from .forms import Item, kind_of_answer, read_items
from .places import Places
from .published import Benchmark, find_benchmark

_TEXT = datasets.Value("string")
_TURNS = datasets.List({"role": _TEXT, "content": datasets.List(datasets.Json())})

# LLaVA-Med puts this behind a question that is answered by yes or no.
YES_OR_NO = " Please choose from the following two options: [yes, no]."


@dataclass
class Loaded:
    """A part of a benchmark, ready to be answered and scored.

    Attributes
    ----------
    benchmark : how it was published.
    split : which part this is.
    rows : what `generate_answers` takes, with the question as it is asked.
    facts : for each row "kind", "language", "options", "category", and "group": the case or the
        picture that several questions share.
    left_out : why rows were left out, and how many.
    """

    benchmark: Benchmark
    split: str
    rows: Any
    facts: list[dict[str, Any]]
    left_out: Counter

    def pictures(self) -> Iterator[Any]:
        """Yield each picture once, still encoded, as the audit takes them."""
        seen = set()
        rows = []
        for number, fact in enumerate(self.facts):
            if fact["pictures"] not in seen:
                seen.add(fact["pictures"])
                rows.append(number)
        yield from pictures_of(self.rows.select(rows))


def pictures_of(rows: Any) -> Iterator[Any]:
    """Yield all pictures of records or pairs, still encoded.

    Parameters
    ----------
    rows : a Dataset with the column `images`, as records have it, or `image`.

    Yields
    ------
    dict : "bytes" and "path" of a picture.

    Examples
    --------
    >>> rows = datasets.Dataset.from_dict({"image": [{"bytes": b"GIF", "path": None}]})
    >>> list(pictures_of(rows.cast_column("image", datasets.Image())))
    [{'bytes': b'GIF', 'path': None}]
    """
    encoded = datasets.Image(decode=False)
    if "images" in rows.column_names:
        several = rows.select_columns(["images"]).cast_column("images", datasets.List(encoded))
        for row in several:
            yield from row["images"]
        return
    for row in rows.select_columns(["image"]).cast_column("image", encoded):
        yield row["image"]


def load_benchmark(
    name: str,
    source: str | os.PathLike | None = None,
    *,
    split: str = "test",
    limit: int | None = None,
) -> Loaded:
    """Load a part of a benchmark with the published questions and prompts.

    Parameters
    ----------
    name : of the benchmark, see `BENCHMARKS`.
    source : folder or ZIP with its files as published, or with parquet files of its set on the hub;
        by default the hub.
    split : the part.
    limit : the first questions only.

    Returns
    -------
    Loaded : rows to answer, and what scoring them needs.

    Raises
    ------
    FileNotFoundError : the files are not there, or not all that is needed.
    ConnectionError : the hub is out of reach.
    ValueError : no such benchmark or part, or nothing of it can be used.

    Examples
    --------
    >>> import json, tempfile, PIL.Image
    >>> folder = Path(tempfile.mkdtemp())
    >>> PIL.Image.new("L", (8, 8)).save(folder / "a.jpg")
    >>> row = {"qid": 1, "image_name": "a.jpg", "question": "Is it dark?", "answer": "Yes",
    ...        "answer_type": "CLOSED", "phrase_type": "test_freeform"}
    >>> _ = (folder / "VQA_RAD Dataset Public.json").write_text(json.dumps([row]))
    >>> loaded = load_benchmark("vqa-rad", folder)
    >>> loaded.rows[0]["prompt"][0]["content"][-1]["text"]
    'Is it dark? Please choose from the following two options: [yes, no].'
    """
    benchmark = find_benchmark(name)
    if benchmark.form == "pairs":
        raise ValueError(f"benchmark={name}: give your pairs to own_questions")
    split = split_of_word(split) or split
    if split not in benchmark.splits:
        known = ", ".join(benchmark.splits)
        raise ValueError(f"{benchmark.title} has no split {split!r}, only {known}: give split=NAME")
    if source is None:
        if benchmark.hub is None:
            raise ValueError(
                f"{benchmark.title} has no set on the hub that is known to be whole: give its files, data=FOLDER"
            )
        if not benchmark.hub_files:
            return _of_pairs(benchmark, load_pairs(benchmark.hub, split=split, limit=limit), split)
        source = _fetched(benchmark)
    places = Places(source)
    if any(places.ending(".parquet")):
        pairs = load_pairs(places.folder, split=split, limit=limit, strict=False)
        return _of_pairs(benchmark, pairs, split)
    return _of_items(benchmark, places, split, limit)


def own_questions(pairs: Any, *, split: str | None = None) -> Loaded:
    """Take any pairs with questions as a benchmark: they are asked as they stand.

    Parameters
    ----------
    pairs : a Dataset with image, caption (the answer) and question, from `load_pairs`. A column
        `answer_type` may say CLOSED or OPEN; else what yes or no answers is closed.
    split : the part, where the pairs have a column `split`; without it all are taken.

    Returns
    -------
    Loaded : rows to answer, and what scoring them needs.

    Raises
    ------
    ValueError : there are no questions, or none in this part.

    Examples
    --------
    >>> import io, PIL.Image
    >>> PIL.Image.new("L", (8, 8)).save(png := io.BytesIO(), "PNG")
    >>> row = {"image": {"bytes": png.getvalue(), "path": None}, "id": "a", "caption": "no",
    ...        "question": "A cyst?"}
    >>> own_questions(datasets.Dataset.from_list([row])).facts[0]["kind"]
    'closed'
    """
    if "question" not in pairs.column_names:
        raise ValueError(
            "the data has no column question: say which it is, columns={'question': 'NAME'}"
        )
    if split is not None and "split" in pairs.column_names:
        pairs = pairs.filter(lambda cell: cell == split, input_columns="split")
        if not len(pairs):
            raise ValueError(f"the data has no rows of the split {split!r}: give split=NAME")
    return _of_pairs(find_benchmark("own"), pairs, split or "all")


# --- from the hub ---------------------------------------------------------------------------------


def _fetched(benchmark: Benchmark) -> str:
    """Fetch the files of a set that is no table on the hub."""
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(
            benchmark.hub, repo_type="dataset", allow_patterns=list(benchmark.hub_files)
        )
    except Exception as error:  # the hub's client raises many kinds
        raise ConnectionError(
            f"the hub does not give {benchmark.hub} ({one_line(error, 100)}): fetch it another way "
            "and give data=FOLDER"
        ) from None


def _of_pairs(benchmark: Benchmark, pairs: Any, split: str) -> Loaded:
    """Make rows of pairs, whose pictures stay where they are."""
    left_out: Counter = Counter()
    good = []
    facts = []
    asked = []
    undecoded = pairs.cast_column("image", datasets.Image(decode=False))
    for number, row in enumerate(undecoded):
        cell = row["image"]
        answer = row.get("caption") or ""
        question = row.get("question") or ""
        problem = row.get("problem") or _problem_of(question, answer, cell)
        if problem:
            left_out[str(problem)] += 1
            continue
        good.append(number)
        kind = str(row.get("answer_type") or "").strip().lower()
        if kind not in ("closed", "open"):
            kind = kind_of_answer(answer)
        digest = hashlib.sha256(picture_bytes(cell)).hexdigest()[:16]
        group = row.get("group")
        fact = {
            "kind": kind,
            "language": _language_of(question),
            "options": [],
            "category": "",
            "group": str(group) if names_group(group) else digest,
            "pictures": digest,
        }
        facts.append(fact)
        prompted = benchmark.form != "pairs"
        asked.append(_asked(question, answer, fact) if prompted else question)
    if not good:
        raise ValueError(f"nothing of {benchmark.title}, {split}, can be used: {_listed(left_out)}")
    rows = pairs.select(good).select_columns(["image", "caption"])
    rows = rows.add_column("id", _unique([f"{split}-{number + 1}" for number in good]))
    rows = rows.add_column("question", asked)
    rows = rows.add_column("group", [fact["group"] for fact in facts])
    return Loaded(benchmark, split, rows, facts, left_out)


def _problem_of(question: str, answer: str, cell: Any) -> str | None:
    if not question.strip():
        return "no question"
    if not answer.strip():
        return "no answer"
    try:
        picture_bytes(cell)
    except (OSError, ValueError):
        return "its picture is missing"
    return None


# --- from published files -------------------------------------------------------------------------


def _of_items(benchmark: Benchmark, places: Places, split: str, limit: int | None) -> Loaded:
    left_out: Counter = Counter()
    rows = []
    facts = []
    known = set()
    for item in read_items(benchmark, places):
        if item.split != split:
            continue
        same = (item.id, item.question, item.answer, tuple(item.pictures))
        if same in known:
            left_out["the same question a second time"] += 1
            continue
        known.add(same)
        if limit is not None and len(rows) == limit:
            break
        problem = _problem_of_item(item)
        files = [places.picture(name) for name in item.pictures]
        if problem is None and None in files:
            problem = "its picture is missing"
        if problem is not None:
            left_out[problem] += 1
            continue
        fact = {
            "kind": item.kind,
            "language": benchmark.language,
            "options": item.options,
            "category": item.category,
            "group": item.group,
            "pictures": "|".join(item.pictures),
        }
        rows.append(_record(item, _asked(item.question, item.answer, fact), files))
        facts.append(fact)
    if not rows:
        raise ValueError(
            f"nothing of {benchmark.title}, {split}, can be used in {places.folder}: "
            f"{_listed(left_out) or 'there are no questions of this part'}"
        )
    names = _unique([row["id"] for row in rows])
    for row, name in zip(rows, names, strict=True):
        row["id"] = name
    features = datasets.Features(
        {
            "id": _TEXT,
            "group": _TEXT,
            "images": datasets.List(datasets.Image()),
            "prompt": _TURNS,
            "completion": _TURNS,
        }
    )
    data = datasets.Dataset.from_list(rows, features=features)
    return Loaded(benchmark, split, data, facts, left_out)


def _problem_of_item(item: Item) -> str | None:
    if not item.question or not item.answer:
        return "no findings" if item.kind == "report" else "no question or no answer"
    if not item.pictures:
        return "no picture is named"
    if item.kind == "choice" and item.answer not in item.options:
        return "the answer is none of the options"
    return None


def _record(item: Item, asked: str, files: Sequence[Path]) -> dict[str, Any]:
    content = [{"type": "image"} for _ in files]
    content.append({"type": "text", "text": asked})
    return {
        "id": item.id,
        "group": item.group,
        "images": [str(file) for file in files],
        "prompt": [{"role": "user", "content": content}],
        "completion": [{"role": "assistant", "content": [{"type": "text", "text": item.answer}]}],
    }


# --- what is asked --------------------------------------------------------------------------------


def _asked(question: str, answer: str, fact: dict[str, Any]) -> str:
    """Put behind a question what those who published scores put there."""
    if fact["kind"] == "choice":
        options = fact["options"]
        # word for word as OmniMedVQA's evaluation asks
        return (
            f"{question}Here are {len(options)} candidate answers:{options} Only return what you "
            "think is the correct answer from the candidate answers, do not return any other "
            "irrelevant text!"
        )
    # in Chinese nobody published a prompt, and yes has many words
    is_english = fact["language"] == "en"
    if is_english and fact["kind"] == "closed" and kind_of_answer(answer) == "closed":
        return question + YES_OR_NO
    return question


def _language_of(question: str) -> str:
    return "zh" if any("\u4e00" <= letter <= "\u9fff" for letter in question) else "en"


def _unique(names: Sequence[str]) -> list[str]:
    """Number names that repeat: answers are known by their ids."""
    counts: Counter = Counter()
    unique = []
    for name in names:
        counts[name] += 1
        unique.append(name if counts[name] == 1 else f"{name}-{counts[name]}")
    return unique


def _listed(left_out: Counter) -> str:
    return ", ".join(f"{count} rows: {why}" for why, count in left_out.most_common())
