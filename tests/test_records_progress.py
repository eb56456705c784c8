"""What a kill, a full disk, a restart or another use of the folder cannot do."""

import json
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from shards import CHANGED, encode, pair, picture, tree, write_shard

from medtune.records import QUESTIONS, convert_pairs
from medtune.records.progress import Folder

# --- what lies in the folder ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["images", ".convert"])
def test_links_that_leave_the_folder_are_refused(tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="link that leads out of it"):
        convert_pairs(write_shard(tmp_path / "a.parquet", [pair(0)]), tmp_path / "out")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_what_lies_in_the_folder_is_respected(tmp_path):
    source, out = write_shard(tmp_path / "a.parquet", [pair(0), pair(1)]), tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and holds no conversion"):
        convert_pairs(source, out)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_a_finished_conversion_is_left_alone_or_replaced(tmp_path):
    source, out = write_shard(tmp_path / "a.parquet", [pair(0), pair(1)]), tmp_path / "out"
    first = convert_pairs(source, out)
    before, when = tree(out), (out / "train.jsonl").stat().st_mtime_ns
    assert convert_pairs(source, out, workers=3) == first and tree(out) == before
    assert (out / "train.jsonl").stat().st_mtime_ns == when, "a finished run is left alone"
    with pytest.raises(ValueError, match="other dialect, seed, columns; give overwrite=True"):
        convert_pairs(source, out, dialect="messages", seed=7)
    assert tree(out) == before
    (out / "mine.txt").write_text("mine")
    replaced = convert_pairs(source, out, overwrite=True, splits=["test", "test"])
    assert replaced["records"] == {"test": 2}
    assert not (out / "train.jsonl").exists() and (out / "mine.txt").exists()


# --- kills and workers ------------------------------------------------------------------------

# Kills itself before the n-th file gets its name or the n-th folder goes: nothing can tidy up.
RUN = """
import os, shutil, signal, sys
from medtune.records import QUESTIONS, convert_pairs

source, out, last = sys.argv[1], sys.argv[2], int(sys.argv[3])
count = 0


def counted(function):
    def call(*arguments, **options):
        global count
        count += 1
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)

    return call


os.replace = counted(os.replace)
shutil.rmtree = counted(shutil.rmtree)
convert_pairs(source, out, questions=QUESTIONS, workers=2)
print(count)
"""


@pytest.fixture(scope="module")
def mixed_shards(tmp_path_factory) -> Path:
    """Two shards of 600 rows; in the second, 100 pictures must be made anew."""
    folder = tmp_path_factory.mktemp("shards")
    slow = [data for name, data in CHANGED.items() if name != "cmyk.jpg"]
    for shard in range(2):
        rows = []
        for i in range(600):
            rows.append(pair(shard * 1000 + i, split="validation" if i % 7 == 0 else "train"))
        if shard == 1:
            for i in range(0, 300, 3):
                rows[i]["image"] = slow[i % len(slow)]
        rows[5]["image"] = b""
        write_shard(folder / f"{shard}.parquet", rows, row_group_size=170)
    return folder


@pytest.fixture(scope="module")
def unbroken(mixed_shards, tmp_path_factory) -> dict[str, str]:
    """What a conversion in one go gives."""
    out = tmp_path_factory.mktemp("unbroken") / "out"
    summary = convert_pairs(mixed_shards, out, questions=QUESTIONS, workers=1)
    assert summary["converted"] == 100 and summary["rejected"] == 2
    return tree(out)


def _run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", RUN, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_workers_change_nothing(mixed_shards, unbroken, tmp_path):
    convert_pairs(mixed_shards, tmp_path / "out", questions=QUESTIONS, workers=5)
    assert tree(tmp_path / "out") == unbroken


@pytest.mark.parametrize("breaks", [1, 2, 3, 4])
def test_samples_of_several_pictures_go_on_where_they_broke_off(tmp_path, monkeypatch, breaks):
    """A sample that waits for pictures of the next block is not lost, and not written twice."""
    rows = []
    for i in range(300):
        rows.append(pair(i, group=f"g{i // 7}", question=("What?", "Where?", None)[i % 3]))
    rows[65]["image"] = b""
    source = write_shard(tmp_path / "a.parquet", rows, row_group_size=50)
    options = {"pictures_per_sample": 3, "split_by": "patient"}
    summary = convert_pairs(source, tmp_path / "unbroken", **options)
    assert summary["pairs"] == 299
    note, noted = Folder.note, []

    def broken(self, progress):
        noted.append(progress.row)
        if len(noted) > breaks:
            raise KeyboardInterrupt
        note(self, progress)

    monkeypatch.setattr(Folder, "note", broken)
    with pytest.raises(KeyboardInterrupt):
        convert_pairs(source, tmp_path / "out", **options)
    monkeypatch.undo()
    assert convert_pairs(source, tmp_path / "out", **options) == summary
    assert tree(tmp_path / "out") == tree(tmp_path / "unbroken")


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_the_same(mixed_shards, unbroken, tmp_path):
    out = tmp_path / "out"
    for last in (2, 400):
        assert _run(mixed_shards, out, last).returncode == -signal.SIGKILL
        assert not (out / "convert.json").exists()
    state = json.loads((out / ".convert" / "state.json").read_text())
    assert 256 <= state["progress"]["row"] < 1200, "it went on"
    count = _run(mixed_shards, out, 0).stdout
    assert int(count) < 1000, count
    assert tree(out) == unbroken


@pytest.mark.slow
@pytest.mark.parametrize("before", range(1, 8))
def test_a_kill_while_the_files_get_their_names(mixed_shards, unbroken, tmp_path, before):
    total = int(_run(mixed_shards, tmp_path / "count", 0).stdout)
    out = tmp_path / "out"
    assert _run(mixed_shards, out, total + 1 - before).returncode == -signal.SIGKILL
    assert _run(mixed_shards, out, 0).returncode == 0
    assert tree(out) == unbroken


@pytest.mark.slow
def test_kills_at_any_time(mixed_shards, unbroken, tmp_path):
    out, draw = tmp_path / "out", random.Random(0)
    command = [sys.executable, "-c", RUN, str(mixed_shards), str(out), "0"]
    for _ in range(6):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while not (out / ".convert").exists() and process.poll() is None:
            time.sleep(0.005)
        time.sleep(draw.uniform(0.0, 0.3))
        process.kill()
        process.wait()
    convert_pairs(mixed_shards, out, questions=QUESTIONS)
    assert tree(out) == unbroken


# --- full and read-only disks -----------------------------------------------------------------


def _in_small_room(tmp_path: Path, option: str, script: str) -> str:
    """Run a script where tmp_path/room is a file system of its own."""
    (tmp_path / "room").mkdir()
    mount = f"mount -t tmpfs -o {option} room {tmp_path}/room"
    inner = f"{mount} && exec {sys.executable} -c '{textwrap.dedent(script)}'"
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", inner]
    done = subprocess.run(command, capture_output=True, text=True)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip("this machine lets nobody mount")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs unshare")
def test_a_full_disk_is_one_line_and_leaves_nothing_half(tmp_path):
    rows = []
    for i in range(300):
        rows.append(pair(i, image=encode(picture(i, size=(256, 256)), quality=95)))
    source = write_shard(tmp_path / "a.parquet", rows)
    script = f"""
        import json, os, pathlib
        from medtune.records import check_folder, convert_pairs
        out, errors = pathlib.Path("{tmp_path}/room/out"), []
        try:
            convert_pairs("{source}", out)
        except OSError as error:
            errors.append(str(error))
        half = [path.name for path in out.rglob("*") if path.name.endswith(("tmp", "part"))]
        sizes = {{path.stem: path.stat().st_size for path in (out / "images").iterdir()}}
        os.system("mount -o remount,size=100m {tmp_path}/room")
        summary = convert_pairs("{source}", out)
        ok = check_folder(out)["ok"]
        print(json.dumps([errors, half, sizes, summary["records"], ok]))
    """
    found = json.loads(_in_small_room(tmp_path, "size=3m", script))
    errors, half, sizes, records, ok = found
    assert len(errors) == 1 and "\n" not in errors[0]
    assert "No space left on device" in errors[0] and "out" in errors[0]
    assert 0 < len(sizes) < 300 and not half
    assert sizes == {row["id"]: len(row["image"]) for row in rows if row["id"] in sizes}
    assert records == {"train": 300} and ok, "with room the same call goes on"


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs unshare")
def test_a_read_only_target_is_one_line(tmp_path):
    source = write_shard(tmp_path / "a.parquet", [pair(0)])
    script = f"""
        from medtune.records import convert_pairs
        try:
            convert_pairs("{source}", "{tmp_path}/room/out")
        except OSError as error:
            print(error)
    """
    found = _in_small_room(tmp_path, "ro", script)
    assert found.count("\n") == 1 and "Read-only file system" in found and "room/out" in found


def test_a_file_in_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(FileExistsError, match="out"):
        convert_pairs(write_shard(tmp_path / "a.parquet", [pair(0)]), tmp_path / "out")
