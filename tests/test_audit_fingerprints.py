"""Pictures are read once, few at a time, whatever they are."""

import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
from look_alikes import encode, make_dataset, scan
from PIL import Image

from medtune import audit
from medtune.audit.near import VIEWS


def test_unusual_and_broken_pictures():
    grey16 = Image.fromarray(np.asarray(scan(3), np.uint16) * 16)
    cmyk = encode(scan(3).convert("CMYK"))
    images = [scan(3), encode(grey16, "PNG"), cmyk, b"no picture", b"", scan(4)]
    marks = audit.fingerprint(make_dataset(images))
    assert marks.unreadable == [3, 4]
    assert marks.digests[3] is None
    assert marks.hashes.shape == (6, len(VIEWS), 4)
    pairs = audit.near_duplicates([], fingerprints=marks)
    assert {(i, j) for i, j, _ in pairs} == {(0, 1), (0, 2), (1, 2)}


def test_exif_rotation_is_applied():
    turned = scan(5).rotate(90, expand=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees to show
    dataset = make_dataset([scan(5), encode(turned, exif=exif), turned])
    assert audit.near_duplicates(dataset)[0][:2] == (0, 1)


def test_fingerprint_of_a_stream_holds_few_pictures_at_a_time():
    class Cell(dict):  # a dict that weak references can see
        __hash__ = object.__hash__

    alive = weakref.WeakSet()
    most = 0
    data = encode(scan(0))

    def rows():
        nonlocal most
        for _ in range(300):
            cell = Cell(bytes=data, path=None)
            alive.add(cell)
            most = max(most, len(alive))
            yield {"image": cell}
            del cell

    marks = audit.fingerprint(rows(), workers=2)
    assert len(marks.digests) == 300
    assert most <= 50


def test_streams_and_empty_sets():
    dataset = make_dataset([scan(0), scan(1)])
    stream = dataset.to_iterable_dataset()
    assert np.array_equal(audit.fingerprint(stream).hashes, audit.fingerprint(dataset).hashes)
    assert audit.fingerprint([]).hashes.shape == (0, len(VIEWS), 4)


def test_hashes_are_those_of_single_pictures():
    """What is read for a data set equals what `picture_hash` gives for a picture without a JPEG."""
    pictures = [scan(0), scan(1, (300, 120)), scan(2, (60, 90))]
    cells = [{"image": encode(picture, "PNG")} for picture in pictures]
    single = [audit.picture_hash(picture) for picture in pictures]
    assert np.array_equal(audit.fingerprint(cells).hashes, single)


# --- fingerprints in a folder ---------------------------------------------------------------------


def same(one: audit.Fingerprints, other: audit.Fingerprints) -> bool:
    return (
        one.digests == other.digests
        and np.array_equal(one.hashes, other.hashes)
        and np.array_equal(one.features, other.features)
        and one.unreadable == other.unreadable
    )


def test_fingerprints_in_a_folder_are_those_in_memory(tmp_path):
    dataset = make_dataset([scan(0), b"no picture", scan(1), scan(0)])
    marks = audit.fingerprint(dataset)
    kept = audit.fingerprint(dataset.to_iterable_dataset(), keep=tmp_path / "new" / "marks")
    assert same(kept, marks)
    assert audit.near_duplicates([], fingerprints=kept) == [(0, 3, 0)]
    nothing = audit.fingerprint([], keep=tmp_path / "nothing")
    assert same(nothing, audit.fingerprint([]))


# Reads pictures into a folder and stands still in the middle, to be killed there.
STALLED = """
import sys, time
sys.path.insert(0, sys.argv[1])
from look_alikes import encode, scan
from medtune import audit

def rows():
    for seed in range(100):
        yield {"image": encode(scan(seed, (64, 64)))}
    print("stalled", flush=True)
    time.sleep(600)

audit.fingerprint(rows(), keep=sys.argv[2])
"""


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", STALLED, here, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "stalled\n"
        with pytest.raises(ValueError, match=f"written by process {process.pid} on"):
            audit.fingerprint([], keep=tmp_path)
        process.kill()
    done = (tmp_path / "digests.bin").stat().st_size // 32
    assert 0 < done < 100
    with open(tmp_path / "hashes.bin", "ab") as file:
        file.write(b"half a row")  # as a kill leaves it

    cells = [{"image": encode(scan(seed, (64, 64)))} for seed in range(110)]
    before = (tmp_path / "features.bin").read_bytes()
    kept = audit.fingerprint(cells, keep=tmp_path)
    assert same(kept, audit.fingerprint(cells))
    # what was there was not written again
    assert (tmp_path / "features.bin").read_bytes().startswith(before)


def test_a_folder_of_other_pictures_is_refused(tmp_path):
    cells = [{"image": encode(scan(seed, (64, 64)))} for seed in range(4)]
    marks = audit.fingerprint(cells, keep=tmp_path)
    for others in (cells[:3], [*cells[:2], cells[3], cells[3]], []):
        with pytest.raises(ValueError, match="fingerprints of other pictures"):
            audit.fingerprint(others, keep=tmp_path)
    assert same(audit.fingerprint(cells, keep=tmp_path), marks)
