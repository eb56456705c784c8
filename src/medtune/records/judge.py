"""Judge the rows of a source: which become pairs, and with which picture, caption and question."""

import contextlib
import hashlib
import io
import itertools
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from medtune.boxes import magnify_box
from medtune.captions import detect_language
from medtune.pairs import (
    names_group,
    picture_bytes,
    reject_reason,
    split_of,
    split_of_word,
    to_rgb,
)

from .dialects import MARK, SPLITS, find_mark
from .progress import Settings
from .sources import Block
from .splits import Chosen
from .strip import strip_metadata

SUFFIXES = {"JPEG": ".jpg", "PNG": ".png"}
EXIF_ORIENTATION = 0x0112
# An enlarged part has no detail that a finer JPEG could keep.
MAGNIFIED_QUALITY = 90
JPEG_START = b"\xff\xd8"
# Above so many pixels `reject_reason` suspects a decompression bomb, so it must see the picture.
MAX_PIXELS = 50_000_000
# More files than this in one folder are slow to list and to copy.
MANY_ROWS = 100_000
ROWS_A_FOLDER = 10_000
# What a text must not hold: NUL, lone surrogates, and the sign for bytes that were no text.
NOT_IN_TEXT = re.compile(r"[\x00\ud800-\udfff\ufffd]")
# Stands for a picture that needs no decoding, where `reject_reason` would decode it.
JUDGED = Image.new("L", (1, 1))

# Called with the number of a row, its id, and the reason why it is left out.
Reject = Callable[[int, object, str], None]


@dataclass(slots=True)
class Picture:
    """A picture as it will be written.

    data : the bytes of the file, without EXIF, comments and the like.
    suffix : ".jpg" or ".png".
    copied : whether the pixels are encoded as in the source; otherwise they were made anew.
    stripped : whether something was cut off a copied file.
    """

    data: bytes
    suffix: str
    copied: bool
    stripped: bool = False


@dataclass(slots=True)
class Pair:
    """A row that is fit for training.

    number : number of the row in the source, from 0.
    cells : what the source knows about it, by column.
    split : "train", "validation" or "test".
    caption : the caption in the wanted language.
    question : what is asked.
    own_question : whether the source brought the question; otherwise it was drawn.
    file_name : where its picture goes, below the folder `images`.
    picture : the picture.
    magnified : the region of interest, enlarged, where that is wanted.
    """

    number: int
    cells: dict
    split: str
    caption: str
    question: str
    own_question: bool
    file_name: str
    picture: Picture
    magnified: Picture | None = None

    @property
    def magnified_name(self) -> str:
        """Where the enlarged region goes; no id becomes a file name with a plus."""
        return f"{Path(self.file_name).with_suffix('')}+magnified.jpg"


@dataclass
class Judge:
    """Judges rows, one block after the other.

    settings : what the conversion was asked to do.
    chosen : the split of each row, and the groups that the caller said.
    repeated : rows whose id is taken: number of the row -> number of the row that has it.
    rows : how many rows the source has; many are spread over several folders.
    """

    settings: Settings
    chosen: Chosen
    repeated: dict[int, int]
    rows: int

    def accept(self, block: Block, pool: Executor, reject: Reject) -> Iterator[Pair]:
        """Yield the pairs of a block that are fit for training; tell `reject` about the others."""
        rows = block.rows()
        # Threads help where a picture must be decoded, and slow down a mere copy.
        copied = all(_looks_like_jpeg(row.get("image")) for row in rows)
        apply = map if copied else pool.map
        quality = self.settings.jpeg_quality
        pictures = list(apply(judge_picture, rows, itertools.repeat(quality)))
        enlarged = itertools.repeat(None)
        if self.settings.magnify:
            enlarged = pool.map(magnify_region, rows, pictures, itertools.repeat(quality))
        split_by_name = split_of(Path(block.shard)) or "train"
        if self.chosen.groups:
            self._fill_groups(block.numbers, rows)

        judged = zip(block.numbers, rows, pictures, enlarged, strict=False)
        for number, row, picture, closer in judged:
            cell = row.get("split", split_by_name)
            if self.chosen.splits:
                cell = self.chosen.split_of_row(number)
            split = split_of_word(cell)
            caption = self._caption(row)
            language = detect_language(caption)
            own = self._own_question(row)
            if isinstance(picture, str):
                problem = picture
            elif isinstance(closer, str):
                problem = closer
            else:
                problem = self._problem(number, split, cell, caption, language)
                problem = problem or _text_problem(own)
            if problem or split is None:
                reject(number, row.get("id"), problem)
                continue
            question = own or self._draw_question(row["id"], language)
            name = self._file_name(number, row["id"], picture.suffix)
            yield Pair(number, row, split, caption, question, bool(own), name, picture, closer)

    def _fill_groups(self, numbers: range, rows: list[dict]) -> None:
        """Give the rows without a group the one that the file of splits says."""
        for number, row in zip(numbers, rows, strict=True):
            group = row.get("group")
            if not names_group(group):
                group = self.chosen.group_of_row(number)
            # texts, because those of the file are
            row["group"] = str(group) if names_group(group) else None

    def _own_question(self, row: dict) -> Any:
        """Give the question that the source brings, unless the caller has one for all; None: none.

        The marks for pictures go: a record sets its own.
        """
        if self.settings.asked_of_all:
            return None
        question = row.get("question")
        if isinstance(question, str):
            return question.replace(MARK, "").strip() or None
        # NaN, which tables have where nothing was entered, is the one value that differs from itself
        return None if question != question else question

    def _caption(self, row: dict) -> str:
        chinese = row.get("caption_zh") if self.settings.language == "zh" else None
        return chinese or row.get("caption") or ""

    def _problem(
        self, number: int, split: str | None, cell: Any, caption: str, language: str
    ) -> str | None:
        """Say what keeps a row out whose picture and texts are fine by themselves."""
        if number in self.repeated:
            return f"id: row {self.repeated[number]} has it already"
        if split is None:
            unknown = f"split: {cell!r:.50} is none of {', '.join(SPLITS)}"
            return self.chosen.missing or unknown
        mark = find_mark(caption)
        if mark:
            return f"caption: it holds the mark {mark}"
        if self.settings.language == "zh" and language != "zh":
            return "caption: there is none in Chinese"
        return None

    def _draw_question(self, sample_id: str, language: str) -> str:
        """Draw a question in the caption's language if there is one, otherwise any.

        The draw depends on id and seed alone: neither order nor a restart changes it.
        """
        asked = self.settings.questions
        fitting = [text for text, its_language in asked if its_language == language]
        questions = fitting or [text for text, _ in asked]
        key = f"{self.settings.seed}:{sample_id}".encode()
        return questions[int(hashlib.sha256(key).hexdigest(), 16) % len(questions)]

    def _file_name(self, number: int, sample_id: str, suffix: str) -> str:
        name = safe_name(sample_id) + suffix
        if self.rows > MANY_ROWS:
            return f"{number // ROWS_A_FOLDER:05d}/{name}"
        return name


def safe_name(sample_id: str) -> str:
    """Turn an id into a file name: itself when it is plain, otherwise a hash.

    No id can leave the folder that way, and none is too long for a file system.

    Examples
    --------
    >>> safe_name("slice-7"), safe_name("../slice")
    ('slice-7', 'h-3686883329aff2978510c3b3ba78efed')
    """
    # An id that looks like such a hash is hashed too, or two ids could share a name.
    if re.fullmatch(r"(?!h-[0-9a-f]{32}$)[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", sample_id):
        return sample_id
    return "h-" + hashlib.sha256(sample_id.encode()).hexdigest()[:32]


def _text_problem(question: Any) -> str | None:
    """Say why a question of the source cannot be asked."""
    if question is None:
        return None
    if not isinstance(question, str):
        return "question: is no text"
    mark = find_mark(question)
    if mark:
        return f"question: it holds the mark {mark}, and only pictures can be shown"
    if NOT_IN_TEXT.search(question):
        return "question: holds characters that are not valid Unicode (surrogates, U+FFFD or NUL)"
    return None


def _looks_like_jpeg(cell: Any) -> bool:
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    return isinstance(data, bytes) and data.startswith(JPEG_START)


def judge_picture(row: dict, jpeg_quality: int | None) -> Picture | str:
    """Give the picture of a row as it will be written, or the reason why the pair is bad.

    Parameters
    ----------
    row : the cells of a pair, its `image` as `datasets.Image(decode=False)` gives it.
    jpeg_quality : quality of pictures that cannot be copied, 1 to 95; None makes them PNG.

    Examples
    --------
    >>> judge_picture({"id": "a", "caption": "A liver.", "image": {"bytes": b""}}, None)
    'image: has zero bytes'
    """
    data = suffix = clean = None
    whole = False
    # Decoders raise many kinds of errors; `reject_reason` meets the same one and says which.
    with contextlib.suppress(Exception):
        data = picture_bytes(row["image"])
        header = Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
        suffix = _suffix_if_copied(header, data)
        if suffix:
            clean = strip_metadata(data)
        # A JPEG with its end mark is whole, as far as a decoder can tell.
        small = header.width * header.height <= MAX_PIXELS
        whole = suffix == ".jpg" and clean is not None and small

    reason = reject_reason(row | {"image": JUDGED} if whole else row)
    if reason:
        return reason
    if suffix and clean is not None:
        return Picture(clean, suffix, copied=True, stripped=len(clean) < len(data))
    return _make_anew(data, jpeg_quality)


def magnify_region(
    row: dict, picture: Picture | str, jpeg_quality: int | None
) -> Picture | str | None:
    """Show the region of interest of a row as large as its whole picture.

    Parameters
    ----------
    row : the cells of a pair, with its box in `roi`.
    picture : the picture of the row as it will be written; where it is a reason, there is none.
    jpeg_quality : 1 to 95; None takes 90.

    Returns
    -------
    Picture, or the reason why there is no region to show; None where there is no picture.
    """
    if isinstance(picture, str):
        return None
    roi = row.get("roi")
    if roi is None:
        return "roi: no region of interest is known that could be magnified"
    with Image.open(io.BytesIO(picture.data)) as image:
        try:
            shown = magnify_box(to_rgb(image), roi)
        except ValueError as error:
            return f"roi: {error}"
    buffer = io.BytesIO()
    shown.save(buffer, "JPEG", quality=jpeg_quality or MAGNIFIED_QUALITY)
    return Picture(buffer.getvalue(), ".jpg", copied=False)


def _suffix_if_copied(header: Image.Image, data: bytes) -> str | None:
    """Give the suffix of a picture that can be copied, because every reader shows it alike."""
    if header.mode not in ("RGB", "L"):
        return None
    animated = getattr(header, "n_frames", 1) != 1
    if animated or _is_turned(header, data):
        return None
    return SUFFIXES.get(str(header.format))


def _is_turned(header: Image.Image, data: bytes) -> bool:
    """Say whether EXIF or XMP tell to show the picture turned, which is cut off from a copy."""
    if header.format == "PNG":
        # Such chunks may stand behind the pixels: Pillow decodes all of the picture to find them.
        may_be = any(mark in data for mark in (b"eXIf", b"Raw profile type", b"adobe.xmp"))
    else:
        may_be = "exif" in header.info or "xmp" in header.info
    return may_be and header.getexif().get(EXIF_ORIENTATION, 1) != 1


def _make_anew(data: bytes, jpeg_quality: int | None) -> Picture:
    form = "JPEG" if jpeg_quality else "PNG"
    picture = to_rgb(Image.open(io.BytesIO(data)))
    # Pillow would write comments, profiles and resolutions of the old file into the new one.
    picture.info = {}
    buffer = io.BytesIO()
    picture.save(buffer, form, quality=jpeg_quality)
    return Picture(buffer.getvalue(), SUFFIXES[form], copied=False)
