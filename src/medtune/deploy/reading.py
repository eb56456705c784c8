"""Answer the slices of a series by a served model, and hold back what the gate does not let pass.

The model sees pixels and a question, nothing else: no tag of a file goes along.
"""

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from pydicom import dcmread
from pydicom.dataset import Dataset

from medtune.answers import OpenAIServer, generate_answers
from medtune.models import load_base, load_processor
from medtune.multitask import MultiTaskModel, statement_of
from medtune.pairs import read_frames, series_files

from .archive import Archive, Series, quiet_libraries

# Stands in every report, before anything that the model said.
WARNING = "Machine-made, not for clinical use. No physician has read or verified this."


@dataclass(frozen=True)
class Gate:
    """A model with a match head, and the least score with which an answer is given.

    Parameters
    ----------
    model : as notebook 07 trains it.
    processor : of its base model.
    threshold : 0..1; see `medtune.multitask.choose_threshold`.
    """

    model: MultiTaskModel
    processor: Any
    threshold: float

    @classmethod
    def load(cls, folder: str | os.PathLike, base: str, threshold: float) -> "Gate":
        """Load the gate of notebook 07.

        Parameters
        ----------
        folder : what `MultiTaskModel.save_pretrained` wrote.
        base : the base model that was trained.
        threshold : 0..1.

        Raises
        ------
        ValueError : a threshold that is none, or weights that do not fit.
        OSError : a file is missing.
        """
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold={threshold} is no match score: give one from 0 to 1")
        model = MultiTaskModel.from_pretrained(load_base(base), folder)
        return cls(model, load_processor(base), threshold)

    def scores(self, pictures: list[Image.Image], question: str, drafts: list[str]) -> list[float]:
        """Give the match score of each draft with its picture."""
        questions = [question] * len(drafts)
        statements = [statement_of(draft) for draft in drafts]
        _, scores = self.model.judge(self.processor, pictures, questions, statements)
        return scores


@dataclass(frozen=True)
class Slice:
    """A slice that a model can be asked about.

    Parameters
    ----------
    number : in its series, from 1, in the order of the anatomy.
    frame : number of the frame in a file of several, from 1; None in a file of one.
    picture : what the model sees, and all that it sees.
    header : tags of its file, without pixels. They name the patient: a report that goes back to the
        archive needs them, nothing else may have them.
    """

    number: int
    frame: int | None
    picture: Image.Image
    header: Dataset


@dataclass(frozen=True)
class FetchedSeries:
    """A series, of which some slices or all were read.

    Parameters
    ----------
    series : the series.
    count : how many slices it has.
    slices : those that were read.
    left_out : files of the series that hold no slice, such as a page of doses.
    """

    series: Series
    count: int
    slices: tuple[Slice, ...]
    left_out: int


@dataclass(frozen=True)
class SliceAnswer:
    """What was said of one slice.

    Parameters
    ----------
    slice : the slice.
    text : what the model said; None where the gate held it back.
    match_score : what the gate found, 0..1; None without a gate.
    """

    slice: Slice
    text: str | None
    match_score: float | None


@dataclass(frozen=True)
class SeriesAnswers:
    """What a model said of a series, and all that a report has to say about it.

    Parameters
    ----------
    fetched : the series, with the slices that were asked about.
    answers : one for each of them.
    model : what the server calls the model.
    card : identifies the model's card, see `card_id`.
    question : what was asked.
    threshold : of the gate; None without a gate.
    """

    fetched: FetchedSeries
    answers: tuple[SliceAnswer, ...]
    model: str
    card: str
    question: str
    threshold: float | None

    @property
    def withheld(self) -> int:
        """How many answers the gate held back."""
        return sum(answer.text is None for answer in self.answers)

    def settings(self) -> list[str]:
        """Say in lines how the answers came about."""
        lines = [f"model card: {self.card}", f"question: {self.question}"]
        if self.threshold is None:
            lines.append("gate: none, no answer was checked against its picture")
        else:
            lines.append(
                f"gate: threshold {self.threshold:g}, {self.withheld} of {len(self.answers)} "
                "answers withheld"
            )
        lines.append(f"slices asked about: {len(self.answers)} of {self.fetched.count}")
        if self.fetched.left_out:
            lines.append(f"files without a slice, left out: {self.fetched.left_out}")
        return lines

    def remark(self, answer: SliceAnswer) -> str:
        """Say of which slice an answer is, and what the gate found."""
        words = f"slice {answer.slice.number} of {self.fetched.count}"
        if answer.match_score is not None:
            words += f", match score {answer.match_score:.3f}, threshold {self.threshold:g}"
        return words


@dataclass(frozen=True)
class _Place:
    """Where a slice lies: its number in the series, and its file with the frame in it."""

    number: int
    file: Path
    frame: int
    frames: int


def card_id(card: str | os.PathLike) -> str:
    """Identify a model's card by its folder and its content.

    Parameters
    ----------
    card : README.md of a model, or the folder that it is in.

    Returns
    -------
    str : name of the folder, and the SHA-256 of the card.

    Raises
    ------
    OSError : there is no card.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp(), "liver-captions")
    >>> folder.mkdir()
    >>> _ = (folder / "README.md").write_text("What this model is for.")
    >>> card_id(folder)
    'liver-captions/README.md sha256:7a01777d0992...'
    """
    file = Path(card)
    if file.is_dir():
        file = file / "README.md"
    if not file.is_file():
        raise FileNotFoundError(f"card={card}: there is no README.md that says what the model is")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return f"{file.resolve().parent.name}/{file.name} sha256:{digest}"


def fetch_series(
    archive: Archive,
    series: Series,
    *,
    slices: int | None = None,
    window: str | tuple[float, float] | None = None,
) -> FetchedSeries:
    """Fetch a series from an archive, and read its slices.

    The files lie in a folder of this user's until they are read, and are then deleted. A process
    that is killed in between (SIGKILL) leaves them in the folder for temporary files.

    Parameters
    ----------
    archive : where the series is.
    series : one of `archive.series(study)`.
    slices : read so many, evenly spread; by default all.
    window : as `medtune.pairs.read_frames` takes it.

    Raises
    ------
    ValueError : no pictures in the series, pictures that its files say are written on, a slice that
        cannot be read.
    OSError : the archive does not answer.

    Examples
    --------
    >>> archive = Archive("http://127.0.0.1:8042/dicom-web")
    >>> [series] = archive.series("1.2.3")  # doctest: +SKIP
    >>> fetched = fetch_series(archive, series, slices=10)  # doctest: +SKIP
    """
    if slices is not None and slices < 1:
        raise ValueError(f"slices={slices}: ask about one slice or more")
    with tempfile.TemporaryDirectory(prefix="medtune-pacs-") as folder:
        files = archive.fetch(series, Path(folder))
        with quiet_libraries():
            places = _places(Path(folder))
            chosen = _spread(places, slices)
            headers = {place.file: _header(place.file) for place in chosen}
            pictures = _pictures(chosen, window)
    read = []
    for place, picture in zip(chosen, pictures, strict=True):
        frame = place.frame if place.frames > 1 else None
        read.append(Slice(place.number, frame, picture, headers[place.file]))
    left_out = len(files) - len({place.file for place in places})
    return FetchedSeries(series, len(places), tuple(read), left_out)


def answer_series(  # noqa: PLR0913 - each is given by keyword where it is a setting
    fetched: FetchedSeries,
    server: OpenAIServer,
    *,
    card: str,
    question: str | None = None,
    gate: Gate | None = None,
    max_new_tokens: int = 256,
) -> SeriesAnswers:
    """Have a served model answer the slices of a series.

    Parameters
    ----------
    fetched : what `fetch_series` gives.
    server : where the model is served.
    card : what `card_id` gives.
    question : what is asked of each slice; by default to describe it.
    gate : holds answers back that do not match their pictures; by default none does.
    max_new_tokens : most tokens of an answer.

    Raises
    ------
    ValueError : the server refuses.
    OSError : the server does not answer.

    Examples
    --------
    >>> server = OpenAIServer("http://127.0.0.1:8000/v1", "liver-captions")
    >>> read = answer_series(fetched, server, card=card_id("merged"))  # doctest: +SKIP
    """
    pictures = [slice.picture for slice in fetched.slices]
    rows = []
    for slice in fetched.slices:
        # the id is a number: it may stand in a log
        rows.append({"id": f"slice {slice.number}", "image": slice.picture, "caption": ""})
    answered = generate_answers(
        server, None, rows, backend="openai", question=question, max_new_tokens=max_new_tokens
    )
    drafts = [answer["answer"] for answer in answered]
    asked = answered[0]["question"]
    scores = gate.scores(pictures, asked, drafts) if gate else [None] * len(drafts)
    answers = []
    for slice, draft, score in zip(fetched.slices, drafts, scores, strict=True):
        is_held_back = gate is not None and score < gate.threshold
        answers.append(SliceAnswer(slice, None if is_held_back else draft, score))
    return SeriesAnswers(
        fetched=fetched,
        answers=tuple(answers),
        model=server.model,
        card=card,
        question=asked,
        threshold=gate.threshold if gate else None,
    )


def _places(folder: Path) -> list[_Place]:
    """List the slices of a series in the order of the anatomy."""
    try:
        stacks = series_files(folder)
    except ValueError:
        raise ValueError("the series holds no pictures: choose another series") from None
    places = []
    for file in [file for stack in stacks for file in stack]:
        header = dcmread(file, stop_before_pixels=True, specific_tags=["NumberOfFrames"])
        frames = int(header.get("NumberOfFrames") or 1)
        for frame in range(1, frames + 1):
            places.append(_Place(len(places) + 1, file, frame, frames))
    return places


def _spread(places: list[_Place], count: int | None) -> list[_Place]:
    """Choose so many slices, each in the middle of its part of the series."""
    if count is None or count >= len(places):
        return places
    part = len(places) / count
    return [places[int((number + 0.5) * part)] for number in range(count)]


def _header(file: Path) -> Dataset:
    """Read what a report needs of a file; refuse one whose pixels may name the patient."""
    header = dcmread(file, stop_before_pixels=True)
    header.decode()
    if str(header.get("BurnedInAnnotation") or "").strip().upper() == "YES":
        raise ValueError(
            "a slice says of itself that text is burnt into it, which may name the patient: "
            "the model is not asked"
        )
    return header


def _pictures(places: list[_Place], window: Any) -> list[Image.Image]:
    """Read the chosen slices, each file once."""
    frames_of: dict[Path, list[Image.Image]] = {}
    pictures = []
    for place in places:
        if place.file not in frames_of:
            # slices of a file follow each other, so the one before is done with
            frames_of = {place.file: read_frames(place.file, window=window)}
        pictures.append(frames_of[place.file][place.frame - 1])
    return pictures
