"""Cut what a JPEG or PNG file tells besides its pixels: names, dates, places, comments.

Needs the standard library only. This file stands alone and can be copied into another project.

Cameras, scanners and archives write EXIF, XMP, IPTC, comments and texts into picture files, and a
patient's name may stand in any of them. They are cut out of the bytes; the pixels are not decoded
and stay what they are.
"""

import struct

JPEG_START = b"\xff\xd8"
PNG_START = b"\x89PNG\r\n\x1a\n"

# --- JPEG: segments of a marker, a length and content; after SOS comes a scan without length

START_OF_SCAN = 0xDA
END = 0xD9
JFIF = 0xE0
ADOBE = 0xEE
ALONE = {0x01, *range(0xD0, 0xD8)}  # markers without length and content
# Tables, frames and scans, which a decoder needs.
DECODED = {*range(0xC0, 0xD0), *range(0xDA, 0xE0)}
# Inside a scan FF is followed by 00 or by a restart marker; anything else ends the scan.
IN_SCAN = {0x00, *range(0xD0, 0xD8)}

# --- PNG: chunks of a length, a name, content and a checksum

# What decoders need, and numbers about colour and size; the profile iCCP is no such number but a
# file of its own, with texts.
PNG_NEEDED = {b"IHDR", b"PLTE", b"IDAT", b"IEND"}
PNG_NUMBERS = {b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"sBIT", b"bKGD", b"pHYs"}
MOST_NUMBERS = 256  # bytes; a longer chunk holds something else


def strip_metadata(data: bytes) -> bytes:
    """Cut all that a JPEG or PNG file tells besides its pixels.

    EXIF, XMP, IPTC, comments, text chunks, dates, colour profiles, small preview pictures, unknown
    segments, and what comes behind the end go. A decoder gives the same pixels as before, unless it
    follows the orientation that EXIF tells, or a colour profile: turn such pictures first.

    Parameters
    ----------
    data : the bytes of the file.

    Returns
    -------
    bytes : the same file without them; the very same bytes if it has none.

    Raises
    ------
    ValueError : it is neither JPEG nor PNG, an animation, or damaged, so that nobody can say what
        would be cut: decode it and save it anew.

    Examples
    --------
    >>> end = bytes.fromhex("00000000") + b"IEND" + bytes.fromhex("ae426082")
    >>> strip_metadata(PNG_START + end + b"a name") == PNG_START + end
    True
    >>> strip_metadata(b"GIF89a")
    Traceback (most recent call last):
    ValueError: neither JPEG nor PNG
    """
    try:
        if data.startswith(JPEG_START):
            return _strip_jpeg(data)
        if data.startswith(PNG_START):
            return _strip_png(data)
    except (struct.error, IndexError):
        raise ValueError("the file is cut short") from None
    raise ValueError("neither JPEG nor PNG")


def _strip_jpeg(data: bytes) -> bytes:
    kept = [JPEG_START]
    place = len(JPEG_START)
    while True:
        if data[place] != 0xFF:
            raise ValueError("no segment begins where one should")
        # any number of FF may stand before a marker
        while data[place] == 0xFF:
            place += 1
        marker = data[place]
        place += 1
        if marker == END:
            kept.append(bytes((0xFF, END)))
            return b"".join(kept)
        if marker in ALONE:
            kept.append(bytes((0xFF, marker)))
            continue
        (length,) = struct.unpack_from(">H", data, place)
        content = data[place + 2 : place + length]
        if length < 2 or len(content) < length - 2:
            raise ValueError("the file is cut short")
        kept.append(_jpeg_segment(marker, content))
        place += length
        if marker == START_OF_SCAN:
            end = _end_of_scan(data, place)
            kept.append(data[place:end])
            place = end


def _end_of_scan(data: bytes, place: int) -> int:
    """Find the marker that ends a scan; `find` is six times as fast here as a regular expression."""
    while True:
        place = data.find(b"\xff", place)
        if place < 0:
            raise ValueError("the file is cut short")
        following = data[place + 1]
        if following == 0xFF:
            place += 1  # any number of FF may stand before a marker
        elif following in IN_SCAN:
            place += 2
        else:
            return place


def _jpeg_segment(marker: int, content: bytes) -> bytes:
    """Give a segment as it is kept, empty if it is not."""
    if marker == JFIF and content.startswith(b"JFIF\0") and len(content) >= 14:
        # Decoders tell the colours by it. A small picture may follow its 12 bytes of numbers.
        content = content[:12] + b"\0\0"
    elif marker == ADOBE and content.startswith(b"Adobe"):
        # Decoders tell the colours by it, too; it has 12 bytes.
        content = content[:12]
    elif marker not in DECODED:
        return b""
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def _strip_png(data: bytes) -> bytes:
    kept = [PNG_START]
    place = len(PNG_START)
    while True:
        (length,) = struct.unpack_from(">I", data, place)
        name = data[place + 4 : place + 8]
        end = place + 12 + length
        if end > len(data) or len(name) < 4:
            raise ValueError("the file is cut short")
        if name in PNG_NEEDED or (name in PNG_NUMBERS and length <= MOST_NUMBERS):
            kept.append(data[place:end])
        elif name in (b"acTL", b"fcTL", b"fdAT"):
            raise ValueError("it is an animation")
        elif name[:1].isupper():
            # by its capital letter one that decoders need
            raise ValueError(f"it has a chunk {name!r}, which is not part of the standard")
        if name == b"IEND":
            return b"".join(kept)
        place = end
