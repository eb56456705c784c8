"""The folder that `export_gguf` writes: its files, and what they do not say themselves."""

import hashlib
import json
import os
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .pictures import Preparation

# Stands beside the GGUF files.
ABOUT = "medtune.json"
# What `check_export` found.
PROOF = "proof.json"
# llama.cpp puts this in the place of a picture, so no text may hold it.
PICTURE_MARK = "<__media__>"


@dataclass(frozen=True)
class Exported:
    """An exported model.

    Parameters
    ----------
    folder : where its files lie.
    name : what a server calls it.
    family : type of the model, as its configuration names it.
    files : for each type, such as "f16", the name of the file of the text part.
    mmproj : name of the file of the vision part.
    preparation : how pictures are prepared.
    question : what the model was asked in training; None where nobody said it.
    context : most tokens of a conversation.
    marks : tokens of the chat template, which no question may hold.
    normalization : Unicode form that the tokenizer brings text to, such as "NFC"; llama.cpp does
        not.
    digests : SHA-256 of each file, by its name.
    """

    folder: Path
    name: str
    family: str
    files: dict[str, str]
    mmproj: str
    preparation: Preparation
    question: str | None
    context: int
    marks: tuple[str, ...]
    normalization: str | None
    digests: dict[str, str]

    def text_file(self, type: str | None = None) -> Path:
        """Give the file of the text part.

        Parameters
        ----------
        type : such as "f16"; by default the first that was written.

        Raises
        ------
        ValueError : it was not exported in this type.
        """
        chosen = type or next(iter(self.files))
        if chosen not in self.files:
            raise ValueError(f"type={chosen}: {self.folder} has {', '.join(self.files)}")
        return self.folder / self.files[chosen]

    def is_proven(self, type: str | None = None) -> bool:
        """Tell whether `check_export` has proven a type of these files.

        Parameters
        ----------
        type : such as "f16"; by default the first that was written.
        """
        chosen = type or next(iter(self.files))
        try:
            proof = json.loads((self.folder / PROOF).read_text("utf-8"))
            return proof["digests"] == self.digests and proof["types"][chosen]["proven"] is True
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def normalize(self, text: str) -> str:
        """Bring a text to the form that the tokenizer of the model would."""
        return unicodedata.normalize(self.normalization, text) if self.normalization else text

    def to_dict(self) -> dict[str, Any]:
        """Give what stands in medtune.json."""
        return {
            "name": self.name,
            "family": self.family,
            "files": self.files,
            "mmproj": self.mmproj,
            "preparation": self.preparation.to_dict(),
            "question": self.question,
            "context": self.context,
            "marks": list(self.marks),
            "normalization": self.normalization,
            "digests": self.digests,
        }


def read_export(path: str | os.PathLike) -> Exported:
    """Read the folder of an exported model.

    Parameters
    ----------
    path : the folder, or one of its GGUF files.

    Returns
    -------
    Exported : what is in it.

    Raises
    ------
    FileNotFoundError : no medtune.json, or a file that it names is missing.
    ValueError : medtune.json is damaged.

    Examples
    --------
    >>> read_export("no-folder")
    Traceback (most recent call last):
    FileNotFoundError: no-folder is no exported model: medtune.json is missing (...)
    """
    folder = Path(path)
    if folder.suffix == ".gguf":
        folder = folder.parent
    about = folder / ABOUT
    if not about.is_file():
        raise FileNotFoundError(
            f"{path} is no exported model: {ABOUT} is missing (export_gguf writes it; the limits "
            "of pictures stand in it, and without them the answers are wrong)"
        )
    try:
        values = json.loads(about.read_text("utf-8"))
        export = Exported(
            folder=folder,
            name=values["name"],
            family=values["family"],
            files=dict(values["files"]),
            mmproj=values["mmproj"],
            preparation=Preparation.from_dict(values["preparation"]),
            question=values["question"],
            context=int(values["context"]),
            marks=tuple(values["marks"]),
            normalization=values["normalization"],
            digests=dict(values["digests"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{about} is damaged ({error!r}): export the model again") from error
    for name in (*export.files.values(), export.mmproj):
        if Path(name).name != name or not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is not complete: {name} is missing")
    return export


def digest_of_file(file: Path) -> str:
    """Compute the SHA-256 of a file.

    Parameters
    ----------
    file : of any size.
    """
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
