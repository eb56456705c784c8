"""Read the files of each benchmark, in the form in which it was published."""

import json
import pickle
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medtune.pairs import split_of_word

from .places import Places
from .published import Benchmark


@dataclass
class Item:
    """A question of a benchmark, or a report that shall be written.

    Attributes
    ----------
    id : of the question; unique within its benchmark.
    split : the part in which it was published.
    pictures : names of its pictures, as the benchmark writes them.
    question : as published, without what is put behind it.
    answer : as published.
    kind : "closed" (yes or no, or one of two), "open", "choice" (of `options`) or "report".
    group : what several questions share: the case, or the picture.
    options : of a choice.
    category : the benchmark's own word for the kind of question; "" for none.
    """

    id: str
    split: str
    pictures: list[str]
    question: str
    answer: str
    kind: str
    group: str
    options: list[str] = field(default_factory=list)
    category: str = ""


def read_items(benchmark: Benchmark, places: Places) -> Iterator[Item]:
    """Yield all questions of a benchmark that its folder holds, of whatever part.

    Raises
    ------
    FileNotFoundError : the folder holds no file of its form; the message says which are read.
    ValueError : a file is damaged, or a question lacks a part.
    """
    reader = {
        "vqa-rad": _vqa_rad,
        "slake": _slake,
        "path-vqa": _path_vqa,
        "omnimedvqa": _omnimedvqa,
        "iu-xray": _iu_xray,
    }[benchmark.form]
    try:
        yield from reader(benchmark, places)
    except KeyError as error:
        raise ValueError(
            f"{places.folder}: a question of {benchmark.title} has no {error}: is it another form?"
        ) from None


def kind_of_answer(answer: str) -> str:
    """Say of what kind a question is, where a set does not say it: closed if yes or no answers it.

    Examples
    --------
    >>> kind_of_answer(" Yes."), kind_of_answer("否"), kind_of_answer("left lung")
    ('closed', 'closed', 'open')
    """
    plain = answer.strip().strip(".。").lower()
    return "closed" if plain in ("yes", "no", "是", "否", "不是", "是的") else "open"


# --- VQA-RAD --------------------------------------------------------------------------------------

_VQA_RAD_FILES = ("VQA_RAD Dataset Public.json", "VQA_RAD_Dataset_Public.json")


def _vqa_rad(benchmark: Benchmark, places: Places) -> Iterator[Item]:
    """Read the file of its authors, or the two into which others have split it."""
    tables = places.named(*_VQA_RAD_FILES)[:1]
    if not tables:
        tables = places.named("trainset.json", "testset.json")
    if not tables:
        raise _missing(
            benchmark, places, "'VQA_RAD Dataset Public.json', or trainset.json and testset.json"
        )
    for table in tables:
        for number, row in enumerate(_list_in(table), 1):
            # test_freeform and test_para, as against freeform and para
            of_test = str(row.get("phrase_type", "")).startswith("test") or "testset" in table.name
            # some are written with a blank behind them
            kind = _text(row.get("answer_type")).lower() or kind_of_answer(_text(row["answer"]))
            picture = _text(row["image_name"])
            yield Item(
                id=f"{table.stem}-{row.get('qid', number)}" if len(tables) > 1 else f"{row['qid']}",
                split="test" if of_test else "train",
                pictures=[picture],
                question=_text(row["question"]),
                answer=_text(row["answer"]),
                kind="closed" if kind == "closed" else "open",
                group=_text(row.get("image_case_url")) or picture,
                category=_text(row.get("question_type")),
            )


# --- SLAKE ----------------------------------------------------------------------------------------


def _slake(benchmark: Benchmark, places: Places) -> Iterator[Item]:
    tables = places.named("train.json", "validation.json", "validate.json", "test.json")
    if not tables:
        raise _missing(benchmark, places, "train.json, validation.json and test.json")
    for table in tables:
        for row in _list_in(table):
            if row.get("q_lang") != benchmark.language:
                continue
            picture = _text(row["img_name"])
            kind = _text(row.get("answer_type")).lower() or kind_of_answer(_text(row["answer"]))
            yield Item(
                id=f"{row['qid']}",
                split=split_of_word(table.stem) or table.stem,
                pictures=[picture],
                question=_text(row["question"]),
                answer=_text(row["answer"]),
                kind="closed" if kind == "closed" else "open",
                group=picture,
                category=_text(row.get("content_type")),
            )


# --- PathVQA --------------------------------------------------------------------------------------


class _PlainUnpickler(pickle.Unpickler):
    """Reads lists, objects, texts and numbers. A pickle from elsewhere could run any program."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a table does not need")


def _path_vqa(benchmark: Benchmark, places: Places) -> Iterator[Item]:
    tables = places.named("train_qa.pkl", "val_qa.pkl", "test_qa.pkl")
    if not tables:
        raise _missing(benchmark, places, "train_qa.pkl, val_qa.pkl and test_qa.pkl")
    for table in tables:
        split = split_of_word(table.stem.split("_")[0])
        for number, row in enumerate(_pickled_list(table), 1):
            answer = _text(row["answer"])
            picture = _text(row["image"])
            yield Item(
                id=f"{split}-{number}",
                split=split,
                # their names stand in the table without an ending
                pictures=[f"{picture}.jpg"],
                question=_text(row["question"]),
                answer=answer,
                kind=kind_of_answer(answer),
                group=picture,
            )


def _pickled_list(table: Path) -> list[dict]:
    try:
        with open(table, "rb") as file:
            rows = _PlainUnpickler(file).load()
    except Exception as error:  # damaged pickles raise many kinds
        raise ValueError(f"{table} cannot be read: {' '.join(str(error).split())}") from None
    return _checked_list(rows, table)


# --- OmniMedVQA -----------------------------------------------------------------------------------


def _omnimedvqa(benchmark: Benchmark, places: Places) -> Iterator[Item]:
    """Read the open-access part: pictures of the restricted one are not published."""
    tables = [table for table in places.ending(".json") if table.parent.name == "Open-access"]
    if not tables:
        raise _missing(benchmark, places, "QA_information/Open-access/*.json")
    for table in tables:
        for number, row in enumerate(_list_in(table), 1):
            options = []
            for letter in "ABCD":
                option = _text(row.get(f"option_{letter}"))
                if option:
                    options.append(option)
            picture = _text(row["image_path"])
            yield Item(
                id=f"{row.get('question_id') or f'{table.stem}-{number}'}",
                split="test",
                pictures=[picture],
                question=_text(row["question"]),
                answer=_text(row["gt_answer"]),
                kind="choice",
                group=picture,
                options=options,
                category=_text(row.get("question_type")),
            )


# --- IU X-Ray -------------------------------------------------------------------------------------

# What is asked is ours: who published reports published no question.
REPORT_QUESTION = "Describe the findings of this chest X-ray."


def _iu_xray(benchmark: Benchmark, places: Places) -> Iterator[Item]:
    """Read R2Gen's table, which has a split, or the XML reports of Open-i, which have none."""
    tables = places.named("annotation.json")
    if tables:
        yield from _r2gen(tables[0])
        return
    reports = 0
    for file in places.ending(".xml"):
        item = _openi_report(file)
        if item is not None:
            reports += 1
            yield item
    if not reports:
        raise _missing(benchmark, places, "the XML reports of Open-i, or R2Gen's annotation.json")


def _r2gen(table: Path) -> Iterator[Item]:
    parts = _json_in(table)
    if not isinstance(parts, dict):
        raise ValueError(f"{table} is no object with the lists train, val and test")
    for name, rows in parts.items():
        split = split_of_word(name)
        if split is None:
            continue
        for row in _checked_list(rows, table):
            yield _report(_text(row["id"]), split, list(row["image_path"]), _text(row["report"]))


def _openi_report(file: Path) -> Item | None:
    """Read one report; None for an XML file that is something else."""
    try:
        root = ET.parse(file).getroot()
    except ET.ParseError as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    if root.tag != "eCitation":
        return None
    findings = ""
    for part in root.iter("AbstractText"):
        if _text(part.get("Label")).upper() == "FINDINGS":
            findings = _text("".join(part.itertext()))
    pictures = [f"{image.get('id')}.png" for image in root.iter("parentImage")]
    named = root.find(".//uId")
    name = file.stem if named is None else _text(named.get("id")) or file.stem
    return _report(name, "test", pictures, findings)


def _report(name: str, split: str, pictures: list[str], report: str) -> Item:
    # CXR7_IM-2263 is a study of CXR7
    patient = name.split("_")[0]
    return Item(name, split, pictures, REPORT_QUESTION, report, "report", group=patient)


# --- what the forms share -------------------------------------------------------------------------


def _text(cell: Any) -> str:
    """Give a cell as one line of text: answers such as 3 are numbers in some files."""
    return "" if cell is None else " ".join(str(cell).split())


def _json_in(table: Path) -> Any:
    try:
        return json.loads(table.read_text("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{table} is damaged: {' '.join(str(error).split())}") from None


def _list_in(table: Path) -> list[dict]:
    return _checked_list(_json_in(table), table)


def _checked_list(rows: Any, table: Path) -> list[dict]:
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{table} is no list of questions")
    return rows


def _missing(benchmark: Benchmark, places: Places, files: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"{places.folder} does not hold {benchmark.title} as it was published: {files}"
    )
