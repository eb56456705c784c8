"""Turn one record of a table into pairs: its picture, or each frame of it, with each answer."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .columns import ALIASES, our_names, plain_name, split_of_word
from .dialogues import DIALOGUE_COLUMNS, MARK, Answer, read_answers, turns_of
from .files_of_pictures import PICTURE_SUFFIXES, Picture, open_pictures
from .locate import Places, find_picture, pictures_in
from .pictures import NO_TEXT
from .reading import Reading
from .salt import keyed_hash, patient_group, safe_id
from .slabs import MIDDLE, SLAB_COLUMNS, open_slab

# Lone surrogates, which JSON can spell ("\ud800") and Arrow cannot hold.
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def names_group(cell: Any) -> bool:
    """Say whether the `group` of a row names a patient: 0 does, as a number may be a name.

    Parameters
    ----------
    cell : what the column `group` holds in a row, of any type.

    Returns
    -------
    bool : False for None, an empty text and NaN, which tables have where nothing was entered.

    Examples
    --------
    >>> [names_group(cell) for cell in (0, "p1", "", None, float("nan"))]
    [True, True, False, False, False]
    """
    # NaN is the one value that differs from itself
    return cell is not None and cell != "" and cell == cell


@dataclass
class FoundPair:
    """A pair of a record, before ids are numbered and patients become groups.

    Attributes
    ----------
    row : dict
        image, id, caption, and whatever else is known.
    given_id : str or None
        The id that the record has, before it was hashed; None where one was made up.
    patient : str or None
        A hash that stands for the patient of a DICOM file.
    slab : int or None
        Which slab of the record the picture belongs to; None where there are no slabs.
    """

    row: dict
    given_id: str | None
    patient: str | None
    slab: int | None = None

    @property
    def id_is_given(self) -> bool:
        """Whether the id is that of the record; else it was made up."""
        return self.given_id is not None


@dataclass
class RecordReader:
    """Reads the records of one table.

    Attributes
    ----------
    reading : Reading
        How the source is to be read.
    places : Places
        Where the table's pictures lie.
    columns : dict of str to str
        Our name -> the table's name, where the caller or a file beside the table said so.
    is_shard : bool
        Whether the table is a shard of parquet or Arrow, where a missing picture is an empty cell.
    """

    reading: Reading
    places: Places
    columns: dict[str, str]
    is_shard: bool = False
    _names: dict[tuple, dict[str, str]] = field(default_factory=dict)

    def pairs_of(self, record: Any) -> Iterator[FoundPair]:
        """Yield a pair for each picture and each answer of a record, plain or a dialogue.

        Parameters
        ----------
        record : dict
            Column -> value; anything else is refused.

        Yields
        ------
        FoundPair
            At least one, unless the record is a dialogue without a picture.

        Raises
        ------
        ValueError, OSError
            The record is bad: one line that says why.
        """
        if not isinstance(record, dict):
            raise ValueError(f"a record is a JSON object, not {type(record).__name__}")
        record = self._with_known_dialogue(record)
        turns = turns_of(record)
        names = self._names_of(record, is_dialogue=turns is not None)
        ours = _renamed(record, names)
        for kind in ("video", "audio"):
            if record.get(f"{kind}s") or record.get(kind):
                raise ValueError(f"no {kind}: medtune learns from pictures, take some out of it")
        cell = ours.pop("image", None)
        given_id = as_id(ours.pop("id", None))
        ours.pop("images", None)  # left where a record has both image and images
        if cell is None and turns is None and "image" not in names.values():
            cell = self._named_by_id(given_id)
        caption = ours.pop("caption", None)
        question = _as_question(ours.pop("question", None))
        self._read_group(ours, names)
        _read_split(ours)
        cells = pictures_in(cell)
        if turns is None:
            if not cells:
                raise ValueError("image: the list of pictures is empty")
            # the user's own word, or a question, says that a number is meant as a text
            may_be_number = "caption" in self.columns or question is not None
            answers = [Answer(as_caption(caption, may_be_number), question, cells)]
        else:
            answers = read_answers(turns, [one for one in cells if _is_something(one)])
            if not any(answer.pictures for answer in answers):
                return
        yield from self._pairs(answers, given_id, ours)

    def _with_known_dialogue(self, record: dict) -> dict:
        """Call the column of turns by its common name, where a description names another."""
        theirs = self.columns.get("messages")
        if theirs in record and theirs not in ("messages", "conversations"):
            record = dict(record)
            record["messages"] = record.pop(theirs)
        return record

    def _names_of(self, record: dict, is_dialogue: bool) -> dict[str, str]:
        """Map the record's columns to ours; most records have the same columns as the one before."""
        key = (is_dialogue, *record)
        if key not in self._names:
            self._names[key] = self._map_names(record, is_dialogue)
        return self._names[key]

    def _map_names(self, record: dict, is_dialogue: bool) -> dict[str, str]:
        available = [name for name in record if isinstance(name, str)]
        # one table may hold records of several kinds: a wish that this one cannot fulfil is no
        # error
        present = {plain_name(name) for name in available}
        columns = {}
        for ours, theirs in self.columns.items():
            if ours != "messages" and plain_name(theirs) in present:
                columns[ours] = theirs
        if is_dialogue:
            return our_names(available, columns, "the record")
        names = our_names(available, columns, "the record")
        need = ("caption",) if "id" in names.values() else ("image", "caption")
        return our_names(available, columns, "the record", need)

    def _named_by_id(self, given_id: str | None) -> str:
        """Take the id for the name of the picture, which some sets have without its ending."""
        try:
            find_picture(given_id, self.places)
        except (ValueError, OSError):
            raise ValueError(
                "the record has no column image, and no picture is called by its id: say which "
                "column it is, columns={'image': 'NAME'}"
            ) from None
        return given_id

    def _read_group(self, ours: dict, names: dict[str, str]) -> None:
        """Hash the group, unless the table itself calls the column so: then it is no patient's number."""
        if "group" not in ours:
            return
        group = ours["group"]
        if isinstance(group, str):
            group = group.strip()
        if not names_group(group):
            ours["group"] = None
            return
        [theirs] = [name for name, our in names.items() if our == "group"]
        if plain_name(theirs) != "group":
            ours["group"] = patient_group(patient_number(group), self.reading.secret())

    def _pairs(
        self, answers: list[Answer], given_id: str | None, ours: dict
    ) -> Iterator[FoundPair]:
        if self.reading.slab:
            ours = {name: value for name, value in ours.items() if name not in SLAB_COLUMNS}
        # all answers about the first picture come first, then those about the second
        cells: list[Any] = []
        for answer in answers:
            cells += [cell for cell in answer.pictures if cell not in cells]
        for place, cell in enumerate(cells):
            slab = place if self.reading.slab else None
            about = [answer for answer in answers if cell in answer.pictures]
            for picture in self._open(cell, ours):
                for answer in about:
                    row = _row(picture, answer, self._id_of(picture, given_id), ours)
                    yield FoundPair(row, given_id, picture.patient, slab)

    def _open(self, cell: Any, ours: dict) -> Iterator[Any]:
        """Open what a cell names or holds: a picture, or the frames of a DICOM file."""
        if self.is_shard and (not _is_something(cell) or self._is_of_another_machine(cell)):
            yield HeldPicture(None, self.reading)
            return
        try:
            found = find_picture(cell, self.places)
        except FileNotFoundError as error:
            raise FileNotFoundError(_with_advice(str(error), ours)) from None
        if self.reading.slab:
            yield from self._open_slab(found, ours)
        elif isinstance(found, bytes):
            yield HeldPicture(found, self.reading)
        else:
            yield from open_pictures(found, self.reading.window, self.reading.secret())

    def _open_slab(self, found: Path | bytes, ours: dict) -> Iterator[Picture]:
        if isinstance(found, bytes):
            raise ValueError("picture stands in the table itself: slabs are made of files")
        reading = self.reading
        middle = ours.get(MIDDLE)
        yield from open_slab(found, reading.slab, reading.window, reading.secret(), middle)

    def _is_of_another_machine(self, cell: Any) -> bool:
        """Say whether `datasets` noted a whole path with a picture that the shard does not hold.

        It is a path of whoever wrote the shard, and followed only where the caller named a root.
        """
        if not isinstance(cell, dict) or cell.get("bytes") is not None:
            return False
        path = cell.get("path")
        return self.reading.root == self.reading.base and bool(path) and Path(path).is_absolute()

    def _id_of(self, picture: Any, given_id: str | None) -> str | None:
        if given_id is None:
            return picture.made_up_id
        return safe_id(given_id, self.reading.salt)


@dataclass
class HeldPicture:
    """A picture whose bytes stand in the table itself.

    Attributes
    ----------
    content : bytes or None
        The encoded picture; None where the cell is empty.
    reading : Reading
        Holds the salt of the made-up id.
    known : dict
        Nothing: a plain picture fills no columns.
    patient : None
        Nobody: only DICOM files name a patient.
    """

    content: bytes | None
    reading: Reading
    known: dict = field(default_factory=dict)
    patient: str | None = None

    @property
    def cell(self) -> dict | None:
        """What `datasets.Image` wants."""
        return None if self.content is None else {"bytes": self.content, "path": None}

    @property
    def made_up_id(self) -> str | None:
        """The id for a record that gives none."""
        if self.content is None:
            return None
        return "image-" + keyed_hash(self.content, self.reading.secret())[:16]


def picture_key(cell: dict | None) -> str:
    """Give what tells the picture of a row from others: its path, or a hash of its bytes.

    Examples
    --------
    >>> picture_key({"bytes": None, "path": "a.png"})
    'a.png'
    """
    if cell is None:
        return ""
    if cell["bytes"] is None:
        return str(cell["path"])
    return hashlib.blake2b(cell["bytes"], digest_size=16).hexdigest()


def _renamed(record: dict, names: dict[str, str]) -> dict:
    """Give the values of a record under our names, without those of a dialogue."""
    renamed = {}
    for theirs, value in record.items():
        is_ours = names.get(theirs) in ALIASES
        if theirs in names and (is_ours or theirs not in DIALOGUE_COLUMNS):
            renamed[names[theirs]] = without_surrogates(value)
    return renamed


def _row(picture: Any, answer: Answer, row_id: str | None, extra: dict) -> dict:
    row = {
        "image": picture.cell,
        "id": without_surrogates(row_id),
        "caption": without_surrogates(answer.caption),
    }
    # what the table says of a picture counts more than what its file says
    row |= picture.known
    row |= extra
    if answer.question is not None:
        row["question"] = without_surrogates(answer.question)
    return row


def without_surrogates(value: Any) -> Any:
    """Replace lone surrogates of a text by the sign that `reject_reason` looks for.

    Examples
    --------
    >>> without_surrogates("lone \\ud800"), without_surrogates(7)
    ('lone \ufffd', 7)
    """
    return _SURROGATE.sub("\ufffd", value) if isinstance(value, str) else value


# --- cells ----------------------------------------------------------------------------------------


def _is_something(cell: Any) -> bool:
    """Say whether a cell names or holds a picture at all."""
    if isinstance(cell, dict):
        return any(value is not None for value in cell.values())
    return names_group(cell)


def as_id(cell: Any) -> str | None:
    """Give an id or a number as text; None where there is none.

    Examples
    --------
    >>> as_id(7), as_id(7.0), as_id("s1"), as_id(float("nan")), as_id(" ")
    ('7', '7', 's1', None, None)
    """
    if not names_group(cell) or (isinstance(cell, str) and not cell.strip()):
        return None
    # a column of numbers in which some are missing holds fractions
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    return str(cell)


def patient_number(cell: Any) -> str:
    """Give a patient's number as text, the same however a program wrote it.

    Examples
    --------
    >>> patient_number(10.0), patient_number("10.0"), patient_number(" 10"), patient_number("p1.0")
    ('10', '10', '10', 'p1.0')
    """
    text = str(as_id(cell)).strip()
    # tables in which some numbers are missing hold all of them as fractions
    return text.removesuffix(".0") if re.fullmatch(r"\d+\.0", text) else text


def as_caption(cell: Any, may_be_number: bool) -> str | None:
    """Give a caption as text; None where nothing was entered.

    Parameters
    ----------
    cell : any value
        What the table has.
    may_be_number : bool
        Whether a number is an answer, such as to "How many?".

    Returns
    -------
    str or None
        The text; None for an empty cell, NaN, and the word for it.

    Raises
    ------
    ValueError
        The cell holds something else than text.

    Examples
    --------
    >>> as_caption("A liver.", False), as_caption(2, True), as_caption(float("nan"), True)
    ('A liver.', '2', None)
    """
    if cell is None or cell != cell:
        return None
    if isinstance(cell, str):
        return None if cell.strip().lower() in NO_TEXT else cell
    if may_be_number and isinstance(cell, int | float) and not isinstance(cell, bool):
        return as_id(cell)
    raise ValueError(
        f"caption: {type(cell).__name__} is no text; is it the right column? "
        "columns={'caption': 'NAME'}"
    )


def _as_question(cell: Any) -> str | None:
    """Give a question as text, without marks for pictures; None where nothing is asked."""
    if not names_group(cell):
        return None
    if not isinstance(cell, str):
        raise ValueError(f"question: {type(cell).__name__} is no text")
    text = cell.replace(MARK, "").strip()
    return text if text and text.lower() not in NO_TEXT else None


def _read_split(ours: dict) -> None:
    """Give the split by the name that we have for it."""
    split = ours.get("split")
    if "split" not in ours:
        return
    if not names_group(split) or (isinstance(split, str) and not split.strip()):
        ours["split"] = None
        return
    known = split_of_word(split)
    if known is None:
        raise ValueError(f"split: {str(split):.40} is not known, use train, validation or test")
    ours["split"] = known


def _with_advice(message: str, ours: dict) -> str:
    """Name another column where its values look like names of pictures."""
    for name, value in ours.items():
        if isinstance(value, str) and Path(value.strip()).suffix.lower() in PICTURE_SUFFIXES:
            missing = message.split(":")[0]
            return f"{missing}: is it in another column? columns={{'image': {name!r}}}"
    return message
