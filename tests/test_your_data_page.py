"""The page docs/your-data.md: every command of it is run, in its order, at tiny scale."""

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import course
import numpy as np
import pytest
from own_data import own_pairs, write_slice
from volume_files import write_nifti, write_series

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

PAGE = course.REPO / "docs" / "your-data.md"
MODEL = "Qwen/Qwen3-VL-2B-Instruct"
# What makes a command short; everything else is as the page has it.
SHORTER = {
    "train": "--max_steps 2 --eval_steps 1 --eval_samples 2 --save_steps 2",
    "evaluate": "--max-new-tokens 8",
    "run": " ".join(
        f"--set {setting}"
        for setting in (
            "03.max_steps=2",
            "03.eval_steps=2",
            "03.eval_samples=2",
            "max_new_tokens=8",
            "06.samples=2",
            "06.merge_onto_4bit=false",
        )
    ),
}


def blocks(kind: str) -> list[str]:
    """The fenced blocks of a kind, in order."""
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)


@pytest.fixture(scope="module")
def desk(tmp_path_factory, sample_path) -> Path:
    """A folder with scans, a table of reports, a DICOM series, volumes, and the parameters of the
    page.
    """
    desk = tmp_path_factory.mktemp("desk")
    own = own_pairs(sample_path, patients=12, pictures=3)
    (desk / "scans").mkdir()
    (desk / "series").mkdir()
    lines = ["scan_file,impression,patient_no"]
    for number, row in own.iterrows():
        name = f"{number:04d}.png"
        row["picture"].save(desk / "scans" / name)
        lines.append(f'{name},"{row["impression"]}",{row["patient_id"].removeprefix("MRN")}')
    (desk / "reports.csv").write_text("\n".join(lines) + "\n", "utf-8")
    for number, picture in enumerate(own["picture"][:3]):
        grey = np.asarray(picture.convert("L"))
        write_slice(desk / "series" / f"1.2.3.{number}", grey, "MRN7000", number)
    write_volumes(desk / "volumes")
    (parameters,) = blocks("yaml")
    (desk / "train.yaml").write_text(parameters.replace(MODEL, str(course.REPO / "data/tiny-vlm")))
    return desk


def write_volumes(folder: Path) -> None:
    """Two DICOM series and two NIfTI files of four patients, and the table of the page."""
    random = np.random.default_rng(0)
    lines = ["series,report,patient_no"]
    for number in range(4):
        array = random.integers(-900, 900, (8, 48, 48), dtype=np.int16)
        name = f"ct-{number:04d}"
        if number < 2:
            write_series(folder / name, array, PatientID=f"991{number}")
        else:
            name += ".nii.gz"
            write_nifti(folder / name, array)
        lines.append(f'{name},"No focal lesion, number {number}.",991{number}')
    (folder / "reports.csv").write_text("\n".join(lines) + "\n", "utf-8")


def as_run_here(command: str, root: Path) -> list[str]:
    """A command of the page with the tiny model, fewer steps, and a clone of its own."""
    words = command.split()
    assert words[0] == "medtune"
    if words[1] != "plan":
        command = command.replace(MODEL, str(course.REPO / "data" / "tiny-vlm"))
    command += " " + SHORTER.get(words[1], "")
    if words[1] == "run":
        command += f" --root {root}"
    program = Path(sys.executable).with_name("medtune")
    return [str(program), *shlex.split(command)[1:]]


def test_every_command_of_the_page_works(desk, tmp_path):
    root = course.copy_of_the_clone(tmp_path / "clone", course.CORE)
    commands = "".join(blocks("bash")).splitlines()
    done = []
    for command in commands:
        words = as_run_here(command, root)
        if words[1] == "chat":
            answers_and_ends(words, desk)
        else:
            result = subprocess.run(words, cwd=desk, capture_output=True, text=True)
            assert result.returncode == 0, (
                f"{command}\n{result.stdout[-500:]}{result.stderr[-3000:]}"
            )
        done.append(words[1])
    # each step of the page has a command
    assert set(done) >= {"audit", "convert", "check", "plan", "train", "evaluate", "compare", "run"}
    assert "chat" in done

    written = [desk / "splits.csv", *desk.glob("records/*.json*"), *desk.glob("*.jsonl")]
    assert len(written) > 6
    for file in written:
        text = file.read_text("utf-8")
        assert not re.search(r"\b70\d\d\b", text), f"{file} names a patient"
        assert str(desk) not in text, f"{file} names a folder of this machine"


def answers_and_ends(words: list[str], desk: Path) -> None:
    """Start the page, wait until it says where it is, and end it as Ctrl-C does."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    log = desk / "chat.log"
    with (
        log.open("w") as out,
        subprocess.Popen(words, cwd=desk, stdout=out, stderr=out, env=environment) as page,
    ):
        deadline = time.monotonic() + 120
        while "127.0.0.1" not in log.read_text() and time.monotonic() < deadline:
            assert page.poll() is None, log.read_text()[-2000:]
            time.sleep(0.5)
        page.terminate()
        page.wait(30)
    assert "127.0.0.1" in log.read_text()


def test_what_the_page_promises_about_scale_is_what_is_run(desk):
    text = PAGE.read_text("utf-8")
    assert "twelve patients" in text
    table = (desk / "reports.csv").read_text("utf-8").splitlines()[1:]
    assert len({line.rsplit(",", 1)[1] for line in table}) == 12
