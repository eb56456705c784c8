"""What a conversion notes on disk, so that a killed run goes on and a finished one is known again.

Records grow in a hidden work folder, `.convert`. After every block of rows, `state.json` there
notes how long each file is; a run that goes on cuts the files back to these sizes. At the end the
files get their names, and `convert.json` comes last: a folder that has it is finished.
"""

import contextlib
import errno
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from medtune.files import write_whole

from .dialects import DIALECTS, SPLITS

KINDS = (*SPLITS, "rejected")  # the files of records that a conversion writes

# Errors of a place where nothing can be written.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass(frozen=True)
class Settings:
    """All that decides what a converted folder holds; `convert.json` notes it as "job".

    dialect : how records are written, a key of `DIALECTS`.
    questions : each question with its language, "en" or "zh".
    asked_of_all : whether these are asked of rows, too, that bring a question of their own.
    language : the language of the captions, "en" or "zh".
    system_prompt : said before each question about pictures, if anything.
    share : share of dialogues without pictures in the train split, from 0 to below 1.
    pictures_per_sample : how many neighbouring rows of one `group` make one sample at most.
    seed : what the draw of questions and the order of dialogues depend on.
    jpeg_quality : quality of pictures that must be made anew, 1 to 95; None for PNG.
    columns : which key of a record holds what, for `dataset_info.json`.
    text_only : SHA-256 of the file of dialogues, if there is one.
    source : what tells this source from another or from a changed one.
    splits : SHA-256 of the splits and groups that the caller gave, if any.
    split_by : "patient", "none", or None, as the caller said.
    keep : columns that go into the records besides those of the course.
    magnify : whether a second picture shows the region of interest magnified.
    """

    dialect: str
    questions: list[tuple[str, str]]
    asked_of_all: bool
    language: str
    system_prompt: str | None
    share: float
    pictures_per_sample: int
    seed: int
    jpeg_quality: int | None
    columns: dict[str, str]
    text_only: str | None
    source: list
    splits: str | None
    split_by: str | None
    keep: list[str]
    magnify: bool = False

    @property
    def with_history(self) -> bool:
        """Whether records have keys of their own for a system prompt and earlier turns."""
        return "history" in self.columns

    def as_job(self) -> dict:
        """Give the settings as they come back from JSON, to be compared with those of a note."""
        return json.loads(json.dumps(vars(self)))


@dataclass
class Progress:
    """How far a conversion has come; `state.json` notes it after every block of rows.

    Attributes
    ----------
    row
        How many rows of the source are done.
    waiting
        Rows before it that wait for more of their sample, each with the row at which its
        block begins.
    sizes
        Bytes that the done rows take in each growing file.
    pairs
        Rows that stand in the records.
    samples
        Samples with pictures, by split.
    text_only
        Dialogues written to the train split.
    copied
        Pictures copied without being decoded.
    stripped
        Those of them that lost EXIF, comments or the like.
    converted
        Pictures made anew.
    rejected
        Rows left out.
    text_only_rejected
        Dialogues left out.
    reasons
        Both by the first word of the reason, which is the name of a column.
    """

    row: int = 0
    waiting: dict[int, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    pairs: int = 0
    samples: Counter[str] = field(default_factory=Counter)
    text_only: int = 0
    copied: int = 0
    stripped: int = 0
    converted: int = 0
    rejected: int = 0
    text_only_rejected: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    @classmethod
    def from_notes(cls, notes: dict) -> "Progress":
        """Make the progress that `state.json` notes."""
        progress = cls(**notes)
        # JSON has texts for keys.
        progress.waiting = {int(row): begin for row, begin in progress.waiting.items()}
        # It gives plain dictionaries, in which a new key does not start at 0.
        progress.samples = Counter(progress.samples)
        progress.reasons = Counter(progress.reasons)
        return progress

    def written_kinds(self) -> list[str]:
        """Name the files that hold anything."""
        kinds = [split for split in SPLITS if self.samples[split]]
        if self.rejected or self.text_only_rejected:
            kinds.append("rejected")
        return kinds

    def summary(self, dialect: str, rows: int) -> dict:
        """Give what `convert_pairs` returns, for a source of so many rows.

        Every row is a pair or rejected. Several pairs may be one record, and dialogues without
        pictures are records, too.
        """
        records = {split: self.samples[split] for split in SPLITS if self.samples[split]}
        if "train" in records:
            records["train"] += self.text_only
        return {
            "dialect": dialect,
            "rows": rows,
            "pairs": self.pairs,
            "rejected": self.rejected,
            "reasons": dict(sorted(self.reasons.items())),
            "records": records,
            "text_only": self.text_only,
            "text_only_rejected": self.text_only_rejected,
            "copied": self.copied,
            "stripped": self.stripped,
            "converted": self.converted,
        }


class Folder:
    """A folder of records: what lies where, and in which order it comes to be.

    Parameters
    ----------
    out : the folder.
    job : the settings of the conversion, as `Settings.as_job` gives them.
    work : where records grow, by default the hidden folder in `out`; another one for a process that
        writes the pictures of a part only.
    """

    def __init__(self, out: Path, job: dict, work: Path | None = None):
        self.out = out
        self.job = job
        self.images = out / "images"
        self.work = work or out / ".convert"
        self.state = self.work / "state.json"
        self.done = out / "convert.json"

    # --- begin

    def open(self, *, overwrite: bool) -> dict | None:
        """Make the folder, and give the notes of a conversion with these settings that it holds.

        Parameters
        ----------
        overwrite : remove a conversion with other settings.

        Returns
        -------
        dict or None : the notes; they have a "summary" if the conversion is finished.

        Raises
        ------
        ValueError : the folder holds something else, or a link that leads out of it.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        self._refuse_links()
        notes = self._read_notes()
        if notes is None:
            self._refuse_other_files()
            return None
        if notes["job"] == self.job:
            return notes
        if not overwrite:
            old = notes["job"]
            changed = [name for name, value in self.job.items() if value != old.get(name)]
            raise ValueError(
                f"{self.out} holds a conversion with other {', '.join(changed)}; "
                "give overwrite=True, or name another folder"
            )
        self._clear()
        return None

    def _refuse_links(self) -> None:
        # What is written or removed below a link would lie in somebody else's folder.
        if self.images.is_symlink() or self.work.is_symlink():
            raise ValueError(
                f"{self.out} holds a link that leads out of it (images or .convert); remove it"
            )

    def _refuse_other_files(self) -> None:
        # A work folder without notes is left where a run was killed right at its start.
        if any(path != self.work for path in self.out.iterdir()):
            raise ValueError(
                f"{self.out} is not empty and holds no conversion; choose another folder"
            )

    def _read_notes(self) -> dict | None:
        # Both are there if the last step, the removal of the work folder, did not come to its end.
        for file in (self.done, self.state):
            if file.exists():
                return json.loads(file.read_text("utf-8"))
        return None

    def _clear(self) -> None:
        """Remove a conversion, and nothing else that lies in the folder."""
        # This one first: what is half removed must not pass for finished.
        self.done.unlink(missing_ok=True)
        for path in (self.work, self.images, *self.out.glob("*.json*")):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def begin(self, progress: Progress) -> None:
        """Make what a conversion needs before its first row."""
        self.work.mkdir(exist_ok=True)
        self.note(progress)
        self.images.mkdir(exist_ok=True)

    # --- go on

    def open_growing(self, kind: str, size: int) -> BinaryIO:
        """Open a file of records in the work folder, cut back to its noted size, to write on."""
        name = f"{kind}.jsonl"
        # A run that was killed while the files got their names has moved some of them already.
        with contextlib.suppress(FileNotFoundError):
            os.replace(self.out / name, self.work / name)
        file = open(self.work / name, "ab")  # noqa: SIM115 - whoever called closes it
        file.truncate(size)
        # Otherwise tell() would still give the size before the cut.
        file.seek(size)
        return file

    def write_picture(self, name: str, data: bytes) -> None:
        """Write a picture whole or not at all: what has its name is complete.

        `medtune.files.write_whole` does the same with a new name for each hidden file, which
        costs a tenth of the time here, where thousands of pictures are copied in a second.
        """
        hidden = f"{self.work}/.tmp"
        path = f"{self.images}/{name}"
        try:
            with open(hidden, "wb") as file:
                file.write(data)
            try:
                os.replace(hidden, path)
            except FileNotFoundError:
                # another process of a cluster may have made it at the same time
                os.makedirs(os.path.dirname(path), exist_ok=True)
                os.replace(hidden, path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(hidden)
            raise

    def read_state(self) -> dict:
        """Read what `note` has written last."""
        return json.loads(self.state.read_text("utf-8"))

    def note(self, progress: Progress) -> None:
        """Note how far the conversion has come."""
        # vars and not dataclasses.asdict, which does not copy a Counter rightly.
        notes = {"job": self.job, "progress": vars(progress)}
        write_whole(self.state, json.dumps(notes))

    # --- finish

    def remove_work(self) -> None:
        """Remove the work folder of a finished conversion that was killed before it could."""
        shutil.rmtree(self.work, ignore_errors=True)

    def finish(self, progress: Progress, *, rows: int, features: dict, told: dict) -> dict:
        """Give the files their names, write dataset_info.json and convert.json, return the summary.

        Parameters
        ----------
        progress : what was done.
        rows : how many rows the source has.
        features : the types of the columns that were copied, for whoever reads the records.
        told : what else the summary tells.
        """
        for kind in progress.written_kinds():
            os.replace(self.work / f"{kind}.jsonl", self.out / f"{kind}.jsonl")
        summary = progress.summary(self.job["dialect"], rows) | told
        info = {split: self._dataset_info(split) for split in summary["records"]}
        self._write_json("dataset_info.json", info, indent=2)
        done = {"summary": summary, "job": self.job, "features": features}
        self._write_json(self.done.name, done, indent=1)
        shutil.rmtree(self.work)
        return summary

    def _dataset_info(self, split: str) -> dict:
        """Say to LLaMA-Factory where the records of a split are and how they are written."""
        form = DIALECTS[self.job["dialect"]]
        return {"file_name": f"{split}.jsonl"} | form | {"columns": self.job["columns"]}

    def _write_json(self, name: str, value: Any, *, indent: int) -> None:
        # The hidden file lies in the work folder, which goes away even if this run is killed here.
        text = json.dumps(value, indent=indent, ensure_ascii=False)
        write_whole(self.out / name, text, scratch=self.work)

    @contextlib.contextmanager
    def explain_no_room(self) -> Iterator[None]:
        """Say in one line what to do when the disk is full or nothing may be written."""
        try:
            yield
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            hint = (
                f"cannot write {self.out} ({error.strerror}): "
                "make room or choose another folder; the same call goes on"
            )
            raise OSError(error.errno, hint) from None
