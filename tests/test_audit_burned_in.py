"""Text in the pixels: the flag of DICOM, and pictures that are read by tesseract."""

import os
import random
import shutil
import stat

import datasets
import pytest
from look_alikes import encode, make_dataset, scan
from PIL import Image, ImageDraw

from medtune import audit
from medtune.pairs import load_pairs

with_tesseract = pytest.mark.skipif(
    shutil.which("tesseract") is None, reason="no tesseract here: apt-get install tesseract-ocr"
)
NAME = "DOE JANE 12.04.1963"


def lettered(seed: int, size: int = 20, colour: int = 255, text: str = NAME) -> Image.Image:
    image = scan(seed, (512, 400))
    ImageDraw.Draw(image).text((12, 10 + 40 * (seed % 8)), text, fill=colour, font_size=size)
    return image


def test_the_flag_is_told_without_any_reader(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda program: None)
    flags = ["YES", "NO", None, "YES"]
    dataset = make_dataset([scan(seed) for seed in range(4)], burned_in=flags)
    found = audit.burned_in_text(dataset)
    assert found.flagged == ["id-0", "id-3"]
    assert (found.looked, found.with_text, found.reader_found) == (0, [], False)
    flag, missing = found.warnings()
    assert flag.startswith("2 of 4 pictures come from DICOM files") and "id-0" in flag
    assert "was not looked for: the program tesseract is not installed" in missing


@with_tesseract
def test_text_is_found_and_never_told(capfd, caplog):
    images = [scan(seed, (512, 400)) for seed in range(2)]
    images += [lettered(seed) for seed in range(2)]
    dataset = make_dataset(images)
    found = audit.burned_in_text(dataset)
    assert found.with_text == ["id-2", "id-3"]
    assert (found.looked, found.pictures, found.reader_found) == (4, 4, True)
    [line] = found.warnings()
    assert line.startswith("2 of 4 pictures looked at, of 4, hold text")
    told = f"{found!r} {line} {capfd.readouterr()} {caplog.text}".upper()
    assert not any(word in told for word in ("DOE", "JANE", "1963"))


@with_tesseract
@pytest.mark.parametrize("edge", [256, pytest.param(2600, marks=pytest.mark.slow)])
@pytest.mark.parametrize("colour", [0, 255])
def test_letters_of_any_size_of_picture(edge, colour):
    """Letters of 7% of the picture, white or black."""
    image = Image.new("L", (edge, edge), 128)
    image.paste(scan(1, (edge, edge // 2)), (0, edge // 2))
    draw = ImageDraw.Draw(image)
    draw.text((edge // 20, edge // 10), "DOE JANE 1963", fill=colour, font_size=round(edge * 0.07))
    found = audit.burned_in_text(make_dataset([encode(image, "PNG")]))
    assert found.with_text == ["id-0"]


@with_tesseract
def test_pictures_that_cannot_be_read_and_pictures_as_files(tmp_path):
    lettered(0).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no picture")
    cells = [{"bytes": None, "path": str(tmp_path / name)} for name in ("a.png", "b.png")]
    table = {"id": ["a", "b", "c"], "image": [*cells, None], "problem": [None, None, "bad"]}
    dataset = datasets.Dataset.from_dict(table).cast_column("image", datasets.Image())
    found = audit.burned_in_text(dataset)
    assert (found.looked, found.with_text, found.unreadable) == (1, ["a"], ["b", "c"])


@pytest.mark.slow
@with_tesseract
def test_real_films(real):
    """The films that say how they were taken, looked through by eye; no other is suspected."""
    rows = load_pairs(real / "cxr.parquet", limit=25)
    found = audit.burned_in_text(rows)
    assert found.looked == 25
    with_words = [1, 2, 8, 9, 10, 13, 15, 17, 18, 22, 23, 24]
    assert set(found.with_text) <= {rows["id"][row] for row in with_words}
    assert len(found.with_text) >= 8


@pytest.mark.slow
@with_tesseract
def test_texture_is_no_text():
    images = [scan(seed, (512, 512)) for seed in random.Random(0).sample(range(1000), 12)]
    assert audit.burned_in_text(make_dataset(images)).with_text == []


def program(folder, script: str) -> None:
    path = folder / "tesseract"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)


def word_of(text: str, language: str = "eng") -> str:
    """A script that stands for tesseract and finds one word in each picture."""
    head = r"\t".join(["x"] * 12)
    word = r"\t".join(["5", *["1"] * 9, "96.5", text])
    return (
        f'case "$*" in *list*) echo {language};; '
        f'*) cat >/dev/null; printf "{head}\\n{word}\\n";; esac'
    )


def test_the_sample_is_drawn_by_its_seed(tmp_path, monkeypatch):
    program(tmp_path, word_of("JANE"))
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    dataset = make_dataset([scan(0, (40, 40))] * 9)
    first = audit.burned_in_text(dataset, sample=3, seed=1)
    assert first.looked == len(first.with_text) == 3
    assert first == audit.burned_in_text(dataset, sample=3, seed=1)
    assert first.with_text != audit.burned_in_text(dataset, sample=3, seed=2).with_text
    assert audit.burned_in_text(dataset).looked == 9
    assert audit.burned_in_text(dataset, sample=0).looked == 0
    assert audit.burned_in_text(dataset, confidence=97).with_text == []


@pytest.mark.parametrize(
    ("text", "is_text"),
    [("王芳", True), ("王", False), ("AP", False), ("JANE", True), ("-/:.", False)],
)
def test_what_counts_as_text(tmp_path, monkeypatch, text, is_text):
    """Two Chinese signs are a name; not every machine has the data to read them."""
    program(tmp_path, word_of(text, "chi_sim"))
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = audit.burned_in_text(make_dataset([scan(0, (40, 40))]))
    assert found.with_text == (["id-0"] if is_text else [])


@pytest.mark.parametrize(
    ("script", "reader_found"),
    [
        ("exit 1", False),
        ("echo 'List of available languages (1):'; echo osd", False),
        ('case "$*" in *list*) echo eng;; *) cat >/dev/null; echo odd; exit 3;; esac', True),
    ],
)
def test_a_reader_that_fails_is_no_all_clear(tmp_path, monkeypatch, script, reader_found):
    program(tmp_path, script)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = audit.burned_in_text(make_dataset([scan(0)]))
    assert found.reader_found == reader_found
    assert found.looked == 0
    assert found.unreadable == (["id-0"] if reader_found else [])
    [line] = found.warnings()
    assert line.startswith("text was not looked for") or "was not looked for: " in line


def test_what_makes_no_sense_is_refused():
    dataset = make_dataset([scan(0)])
    with pytest.raises(ValueError, match="sample=-1"):
        audit.burned_in_text(dataset, sample=-1)
    with pytest.raises(ValueError, match="confidence=101"):
        audit.burned_in_text(dataset, confidence=101)
