"""Five rows of each benchmark, in the form in which it was published; words and pictures are made up."""

import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image


def draw(file: Path, seed: int, size: int = 96) -> Path:
    """A smooth picture of its own for each seed, which a hash tells from the others."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 255, (24, 24), dtype="uint8"))
    file.parent.mkdir(parents=True, exist_ok=True)
    coarse.resize((size, size), Image.Resampling.BICUBIC).save(file)
    return file


def _vqa_rad_row(qid, picture, question, answer, answer_type, phrase_type):
    return {
        "qid": f"{qid}",
        "phrase_type": phrase_type,
        "qid_linked_id": "03f451ca-de62-4617-9679-e836026a7642",
        "image_case_url": f"https://example.org/case/{picture}",
        "image_name": f"synpic{picture}.jpg",
        "image_organ": "CHEST",
        "evaluation": "not evaluated",
        "question": question,
        "question_rephrase": "NULL",
        "question_relation": "NULL",
        "question_frame": "NULL",
        "question_type": "PRES",
        "answer": answer,
        "answer_type": answer_type,
    }


def write_vqa_rad(folder: Path) -> Path:
    """Two pictures; the first stands in train and in test, as in the published split."""
    rows = [
        _vqa_rad_row(1, 1, "Is the heart large?", "Yes", "CLOSED", "freeform"),
        _vqa_rad_row(2, 1, "Is there an effusion?", "No", "CLOSED ", "test_freeform"),
        _vqa_rad_row(3, 2, "How many masses are there?", 2, "OPEN", "test_para"),
        _vqa_rad_row(4, 2, "Left or right?", "Left", "CLOSED", "test_freeform"),
        _vqa_rad_row(5, 3, "Where is the mass?", "Upper lobe", "OPEN", "test_freeform"),
    ]
    for number in (1, 2, 3):
        draw(folder / "VQA_RAD Image Folder" / f"synpic{number}.jpg", number)
    (folder / "VQA_RAD Dataset Public.json").write_text(json.dumps(rows))
    return folder


def _slake_row(qid, image, question, answer, language, answer_type):
    return {
        "img_id": image,
        "img_name": f"xmlab{image}/source.jpg",
        "question": question,
        "answer": answer,
        "q_lang": language,
        "location": "Lung",
        "modality": "CT",
        "answer_type": answer_type,
        "base_type": "vqa",
        "content_type": "Organ",
        "triple": ["vhead", "_", "_"],
        "qid": qid,
    }


def write_slake(folder: Path, *, zipped: bool = False) -> Path:
    """Both languages; with `zipped` the pictures are one ZIP, as on the hub."""
    test = [
        _slake_row(1, 10, "Is the liver seen?", "No", "en", "CLOSED"),
        _slake_row(2, 10, "What organ is it?", "Lung", "en", "OPEN"),
        _slake_row(3, 10, "图中有肝脏吗？", "没有", "zh", "CLOSED"),
        _slake_row(4, 11, "这是什么器官？", "左肺", "zh", "OPEN"),
    ]
    train = [_slake_row(5, 12, "Is it a CT?", "Yes", "en", "CLOSED")]
    for number in (10, 11, 12):
        draw(folder / "imgs" / f"xmlab{number}" / "source.jpg", number)
    for name, rows in (("train", train), ("validation", []), ("test", test)):
        (folder / f"{name}.json").write_text(json.dumps(rows, ensure_ascii=False), "utf-8")
    if zipped:
        with zipfile.ZipFile(folder / "imgs.zip", "w") as archive:
            for file in sorted((folder / "imgs").rglob("*.jpg")):
                archive.write(file, file.relative_to(folder))
                file.unlink()
    return folder


def write_path_vqa(folder: Path) -> Path:
    """Tables are pickles, and pictures lie in a folder for each part."""
    rows = {
        "train": [("train_0001", "what is present?", "liver")],
        "val": [("val_0001", "is it brain?", "no")],
        "test": [
            ("test_0001", "is it necrosis?", "yes"),
            ("test_0001", "what is seen?", "many plasma cells"),
            ("test_0002", "is it normal?", "no"),
        ],
    }
    for number, (split, questions) in enumerate(rows.items()):
        table = []
        for picture, question, answer in questions:
            draw(folder / "images" / split / f"{picture}.jpg", 100 * number + int(picture[-1]))
            table.append({"image": picture, "question": question, "answer": answer})
        file = folder / "qas" / split / f"{split}_qa.pkl"
        file.parent.mkdir(parents=True)
        file.write_bytes(pickle.dumps(table))
    return folder


def write_omnimedvqa(folder: Path) -> Path:
    """One table for each set that it was made from, of questions with two to four options."""
    rows = []
    for number in range(5):
        options = ["MRI", "CT", "X-Ray", "Ultrasound"][: 2 + number % 3]
        row = {
            "dataset": "Made up",
            "question_id": f"Made_up_{number:04}",
            "question_type": "Modality Recognition" if number < 3 else "Disease Diagnosis",
            "question": "What is the modality?",
            "gt_answer": "CT",
            "image_path": f"Images/Made up/{number}.png",
            "modality_type": "CT",
        }
        for letter, option in zip("ABCD", options, strict=False):
            row[f"option_{letter}"] = option
        rows.append(row)
        draw(folder / "Images" / "Made up" / f"{number}.png", number)
    table = folder / "QA_information" / "Open-access" / "Made up.json"
    table.parent.mkdir(parents=True)
    table.write_text(json.dumps(rows))
    return folder


REPORT = """<?xml version="1.0" encoding="utf-8"?>
<eCitation>
  <uId id="CXR{number}"/>
  <MedlineCitation><Article><Abstract>
    <AbstractText Label="COMPARISON">None.</AbstractText>
    <AbstractText Label="FINDINGS">{findings}</AbstractText>
    <AbstractText Label="IMPRESSION">Normal chest.</AbstractText>
  </Abstract></Article></MedlineCitation>
  <parentImage id="CXR{number}_1_IM-0001-3001"><caption>PA</caption></parentImage>
  <parentImage id="CXR{number}_1_IM-0001-4001"><caption>Lateral</caption></parentImage>
</eCitation>
"""


def write_openi(folder: Path) -> Path:
    """Five XML reports of two views each; the last has no findings."""
    reports = folder / "ecgen-radiology"
    reports.mkdir(parents=True)
    for number in range(1, 6):
        findings = (
            "" if number == 5 else f"The heart is normal. No mass {number} &amp; no effusion."
        )
        text = REPORT.format(number=number, findings=findings)
        (reports / f"{number}.xml").write_text(text)
        for view in (3001, 4001):
            name = f"CXR{number}_1_IM-0001-{view}.png"
            draw(folder / "NLMCXR_png" / name, 10 * number + view // 1000)
    return folder


def write_r2gen(folder: Path) -> Path:
    """R2Gen's table, which has the split that papers on IU X-Ray use."""
    parts = {"train": [], "val": [], "test": []}
    for number, split in enumerate(("train", "train", "val", "test", "test")):
        name = f"CXR{number}_IM-000{number}"
        pictures = [f"{name}/0.png", f"{name}/1.png"]
        for view, picture in enumerate(pictures):
            draw(folder / "images" / picture, 10 * number + view)
        row = {"id": name, "report": f"Lungs are clear {number}.", "image_path": pictures}
        parts[split].append(row | {"split": split})
    (folder / "annotation.json").write_text(json.dumps(parts))
    return folder
