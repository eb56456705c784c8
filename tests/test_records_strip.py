"""What a copied picture tells besides its pixels is cut, and the pixels stay what they are."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from shards import CHANGED, encode, pair, picture, write_shard

from medtune.pairs import to_rgb
from medtune.records import convert_pairs
from medtune.records.strip import PNG_START, strip_metadata

NAME = b"MUELLER^HANS"
XMP = b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta>" + NAME + b"</x:xmpmeta>"
IPTC = b"Photoshop 3.0\x008BIM\x04\x04\0\0\0\0\0\x0c" + NAME


def _exif(orientation: int = 1) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010E] = exif[0x9286] = NAME.decode()  # description, comment
    exif.get_ifd(0x8825)[29] = "1950:01:02"  # the date of a position
    return exif


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def _segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def _chunk(name: bytes, content: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + check


# --- files that Pillow writes -----------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_loses_all_but_its_pixels(mode, progressive):
    image = picture(3, mode, size=(256, 128))
    plain = encode(image, quality=90, progressive=progressive)
    told = encode(
        image,
        quality=90,
        progressive=progressive,
        exif=_exif(),
        comment=NAME,
        xmp=b"<x>" + NAME,
        icc_profile=NAME * 9000,
        dpi=(300, 300),
    )
    assert told.count(NAME) > 9000 and strip_metadata(plain) == plain
    cut = strip_metadata(told + b"behind the end: " + NAME)
    assert NAME not in cut and b"behind" not in cut
    assert np.array_equal(pixels(cut), pixels(told)) and np.array_equal(pixels(cut), pixels(plain))
    left = Image.open(io.BytesIO(cut))
    assert not {"exif", "comment", "xmp", "icc_profile"} & left.info.keys()
    assert not left.getexif()


def test_colours_are_told_by_segments_that_stay():
    """Adobe's files may hold RGB without conversion, which only a segment of theirs tells."""
    image = picture(3, size=(64, 64))
    told = encode(image, keep_rgb=True, quality=95, comment=NAME)
    assert b"Adobe" in told
    cut = strip_metadata(told)
    assert NAME not in cut and np.array_equal(pixels(cut), pixels(told))
    cmyk = encode(picture(3, "CMYK"), comment=NAME)
    assert np.array_equal(pixels(strip_metadata(cmyk)), pixels(cmyk))


def test_a_small_picture_in_the_header_goes():
    plain = encode(picture(0))
    assert plain[2:4] == b"\xff\xe0"
    small = b"JFIF\0\1\2\0\0\1\0\1\2\2" + NAME  # 2 x 2 pixels in RGB
    told = plain[:2] + _segment(0xE0, small) + _segment(0xE0, b"JFXX\0\x10" + NAME) + plain[20:]
    cut = strip_metadata(told)
    assert NAME not in cut and np.array_equal(pixels(cut), pixels(plain))


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_a_png_loses_all_but_its_pixels(mode):
    image = picture(3).convert("P") if mode == "P" else picture(3, mode)
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Patient", NAME.decode())
    texts.add_text("zipped", NAME.decode() * 90, zip=True)
    texts.add_itxt("Patient", NAME.decode() + " 脾", lang="de")
    texts.add(b"tIME", struct.pack(">H5B", 1950, 1, 2, 3, 4, 5))
    texts.add(b"prVt", NAME, after_idat=True)
    told = encode(image, "PNG", pnginfo=texts, exif=_exif(), icc_profile=NAME, dpi=(300, 300))
    plain = encode(image, "PNG")
    assert told.count(NAME) > 3 and strip_metadata(plain) == plain
    cut = strip_metadata(told + NAME)
    assert NAME not in cut
    for name in (b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"tIME", b"iCCP", b"prVt"):
        assert name in told and name not in cut, name
    assert np.array_equal(pixels(cut), pixels(told))


def test_transparency_stays():
    image = picture(0, "L")
    told = encode(image, "PNG", transparency=3)
    assert strip_metadata(told) == told and b"tRNS" in told


# --- wherever they stand ----------------------------------------------------------------------


def _segments(data: bytes) -> list[bytes]:
    """The segments of a JPEG that Pillow wrote, each scan with its segment."""
    parts, place = [data[:2]], 2
    while data[place : place + 2] != b"\xff\xd9":
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if data[place + 1] == 0xDA:
            while data[end] != 0xFF or data[end + 1] in (0, *range(0xD0, 0xD8)):
                end += 1
        parts.append(data[place:end])
        place = end
    return [*parts, data[place:]]


def _chunks(data: bytes) -> list[bytes]:
    parts, place = [PNG_START], 8
    while place < len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        parts.append(data[place:end])
        place = end
    return parts


JPEGS = [
    encode(picture(1, size=(64, 48)), quality=80),
    encode(picture(2, "L", size=(40, 40)), progressive=True),
    encode(picture(3, size=(128, 128)), restart_marker_blocks=2),
]
PNGS = [encode(picture(1, size=(64, 48)), "PNG"), encode(picture(2, "L"), "PNG", bits=4)]

CONTENT = st.binary(max_size=300) | st.sampled_from([XMP, IPTC, NAME, b"\xff\xd9", JPEGS[0]])
EXTRA_SEGMENTS = st.lists(
    st.tuples(st.integers(0, 99), st.sampled_from([0xE1, 0xE2, 0xE5, 0xED, 0xEF, 0xFE]), CONTENT),
    max_size=6,
)
EXTRA_CHUNKS = st.lists(
    st.tuples(
        st.integers(0, 99), st.sampled_from([b"tEXt", b"iTXt", b"eXIf", b"prVt", b"tIME"]), CONTENT
    ),
    max_size=6,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(JPEGS), EXTRA_SEGMENTS, st.binary(max_size=40))
def test_segments_are_found_wherever_they_stand(plain, extra, behind):
    parts = _segments(plain)
    assert b"".join(parts) == plain
    for place, marker, content in extra:
        # behind the start, and before the end
        parts.insert(1 + place % (len(parts) - 1), _segment(marker, content))
    assert strip_metadata(b"".join(parts) + behind) == plain


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(PNGS), EXTRA_CHUNKS, st.binary(max_size=40))
def test_chunks_are_found_wherever_they_stand(plain, extra, behind):
    parts = _chunks(plain)
    assert b"".join(parts) == plain
    for place, name, content in extra:
        parts.insert(2 + place % (len(parts) - 2), _chunk(name, content))
    assert strip_metadata(b"".join(parts) + behind) == plain


@settings(max_examples=500, deadline=None)
@given(st.sampled_from([*JPEGS, *PNGS]), st.data())
def test_damaged_files_are_refused_or_decode_alike(plain, data):
    """Bytes are changed or cut off: nothing else than a ValueError, and no other pixels."""
    spoilt = bytearray(plain)
    for place in data.draw(st.lists(st.integers(0, len(plain) - 1), max_size=3)):
        spoilt[place] = data.draw(st.integers(0, 255))
    spoilt = bytes(spoilt[: data.draw(st.integers(0, len(plain)))])
    try:
        cut = strip_metadata(spoilt)
    except ValueError as error:
        assert "\n" not in str(error)
        return
    assert len(cut) <= len(spoilt)
    try:
        before = pixels(spoilt)
    except Exception:  # Pillow cannot read it either
        return
    assert np.array_equal(pixels(cut), before)


@pytest.mark.parametrize("name", ["animated.png", "animated.gif", "still.webp", "still.tif"])
def test_other_files_are_refused(name):
    with pytest.raises(ValueError, match="animation|neither JPEG nor PNG"):
        strip_metadata(CHANGED[name])


# --- in a conversion --------------------------------------------------------------------------


def _turned_by_xmp() -> bytes:
    xmp = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/'
        '22-rdf-syntax-ns#"><rdf:Description tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
    )
    return encode(picture(2), xmp=xmp.encode())


def _turned_png() -> bytes:
    return encode(picture(2), "PNG", exif=_exif(6))


MAYBE_TURNED = {
    "upright.jpg": encode(picture(2), exif=_exif(), comment=NAME),
    "turned.jpg": encode(picture(2), exif=_exif(6), comment=NAME),
    "turned by XMP.jpg": _turned_by_xmp(),
    "turned.png": _turned_png(),
    "upright.png": encode(picture(2), "PNG", exif=_exif()),
    "16 bits.png": encode(Image.fromarray(np.arange(384, dtype=np.uint16).reshape(16, 24)), "PNG"),
    "comment.gif": encode(picture(2), "GIF", comment=NAME),
    "described.tif": encode(picture(2), "TIFF", tiffinfo={270: NAME.decode()}, icc_profile=NAME),
    "exif.webp": encode(picture(2), "WEBP", exif=_exif(), xmp=XMP, lossless=True),
}


@pytest.mark.parametrize("name", MAYBE_TURNED)
@pytest.mark.parametrize("quality", [None, 95])
def test_a_conversion_keeps_pixels_and_no_names(tmp_path, name, quality):
    data = MAYBE_TURNED[name]
    source = write_shard(tmp_path / "a.parquet", [pair(0, image=data)])
    summary = convert_pairs(source, tmp_path / "out", jpeg_quality=quality)
    assert summary["records"] == {"train": 1}
    (file,) = (tmp_path / "out" / "images").iterdir()
    written = file.read_bytes()
    assert NAME not in written and NAME.decode() not in str(Image.open(file).info)
    expected = to_rgb(Image.open(io.BytesIO(data)))
    shown = Image.open(file).convert("RGB")
    assert shown.size == expected.size and not Image.open(file).getexif()
    if summary["copied"] or quality is None:
        assert np.array_equal(np.asarray(shown), np.asarray(expected))
    assert summary["copied"] == int(name in ("upright.jpg", "upright.png"))
