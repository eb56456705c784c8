"""Pictures are read once, few at a time, whatever they are."""

import weakref

import numpy as np
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
