"""Find the picture that a cell of a table names or holds.

A cell is a name relative to the table or the folder of the source, a whole path, the picture itself
(bytes, base64, a data URL), or an object that has one of these. Names are found as people write
them: with Windows' backslashes, with blanks at the end, with other capitals, with accents composed
the other way, without the ending. A table comes from elsewhere: it must not reach other files of
this machine, by '..' or a link.
"""

import ast
import base64
import binascii
import functools
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from .files_of_pictures import PICTURE_SUFFIXES
from .volumes import VOLUME_SUFFIXES

# Names of pictures are often relative to one of these folders.
PICTURE_FOLDERS = ("images", "image", "imgs", "img", "pictures")

# A link with one of these names beside the table is its owner's way to keep pictures on another
# disk; links of other names, and links to single files, may not leave the folder.
LINKED_FOLDERS = (
    *PICTURE_FOLDERS, "photos", "files", "png", "jpg", "dicom",
    "train", "val", "valid", "validation", "test",
)  # fmt: skip

# What a file with this ending is, and what to do.
NO_PICTURES = {
    ".nii": "a volume: give slab=N, so many of its slices in a question, or save its slices as PNG",
    ".nii.gz": (
        "a volume: give slab=N, so many of its slices in a question, or save its slices as PNG"
    ),
    ".mha": "a volume: save its slices as PNG",
    ".mhd": "a volume: save its slices as PNG",
    ".nrrd": "a volume: save its slices as PNG",
    ".mp4": "a video: take pictures out of it",
    ".avi": "a video: take pictures out of it",
    ".mov": "a video: take pictures out of it",
    ".mkv": "a video: take pictures out of it",
    ".webm": "a video: take pictures out of it",
    ".zip": "an archive: unpack it, and name the pictures in it",
    ".tar": "an archive: unpack it, and name the pictures in it",
    ".tar.gz": "an archive: unpack it, and name the pictures in it",
    ".tgz": "an archive: unpack it, and name the pictures in it",
    ".gz": "an archive: unpack it, and name the pictures in it",
    ".7z": "an archive: unpack it, and name the pictures in it",
    ".rar": "an archive: unpack it, and name the pictures in it",
    ".npy": "an array: save it as PNG",
    ".npz": "an array: save it as PNG",
    ".h5": "an array: save it as PNG",
    ".mat": "an array: save it as PNG",
    ".pdf": "a document: save its pictures as PNG",
    ".docx": "a document: save its pictures as PNG",
    ".xlsx": "a table, no picture",
    ".xls": "a table, no picture",
    ".csv": "a table, no picture",
    ".tsv": "a table, no picture",
    ".json": "a table, no picture",
    ".jsonl": "a table, no picture",
    ".parquet": "a table, no picture",
    ".txt": "a text, no picture",
}

# How the base64 of pictures begins: JPEG, PNG, GIF, WebP, TIFF (two byte orders), BMP.
_BASE64_PICTURE = re.compile(r"\s*(/9j/|iVBORw0KGgo|R0lGOD|UklGR|SUkqA|TU0AK|Qk[0-3][A-Za-z0-9+/])")
# So many signs at least: a name of a file may begin like that too.
_SHORTEST_BASE64 = 60

_ADDRESS = re.compile(r"\s*([a-z][a-z0-9+.-]+)://", re.IGNORECASE)
_WINDOWS_DRIVE = re.compile(r"[A-Za-z]:[\\/]")

# A message shows so much of a name, and of a text that is none only its length.
_LONGEST_NAME = 80


@dataclass(frozen=True)
class Places:
    """Where the pictures of a table lie.

    Attributes
    ----------
    folders : tuple of Path
        Folders that names are relative to, best first.
    roots : tuple of Path
        Folders that no picture may lie outside of.
    volumes : bool
        Whether NIfTI files may be named.
    """

    folders: tuple[Path, ...]
    roots: tuple[Path, ...]
    volumes: bool = False

    def hold(self, path: Path) -> bool:
        """Say whether a path, whose links were followed, lies in one of the roots."""
        return any(path.is_relative_to(root) for root in self.roots)


def places_of(
    table_folder: Path, base: Path, root: Path, called_like: tuple[str, ...] = ()
) -> Places:
    """Give the places of a table's pictures.

    Parameters
    ----------
    table_folder : Path
        The folder of the table.
    base : Path
        The folder of the source.
    root : Path
        The folder that pictures may not lie outside of.
    called_like : tuple of str
        Names of folders beside the table that are its own, such as "train" for train_captions.csv.

    Returns
    -------
    Places
        Names of pictures are relative to the root, to either folder, or to a folder of pictures
        there, such as `images`.
    """
    starts = [table_folder, root, base]
    if root != base:  # the caller named it
        starts.insert(0, root)
    folders: dict[Path, None] = {}
    roots = {root: None}
    for start in dict.fromkeys(starts):
        if not start.is_relative_to(root):
            continue
        folders[start] = None
        for name in (*called_like, *PICTURE_FOLDERS):
            if (start / name).is_dir():
                folders[start / name] = None
        for name in LINKED_FOLDERS:
            link = start / name
            if link.is_symlink() and link.is_dir():
                roots[link.resolve()] = None
    return Places(tuple(folders), tuple(roots))


# --- cells ----------------------------------------------------------------------------------------


def pictures_in(cell: Any) -> list[Any]:
    """Give the single pictures of a cell: those of a list, or the one.

    Examples
    --------
    >>> pictures_in(["a.png", "b.png"]), pictures_in("a.png"), pictures_in('["a.png"]')
    (['a.png', 'b.png'], ['a.png'], ['a.png'])
    """
    if isinstance(cell, list | tuple):
        return list(cell)
    if isinstance(cell, str) and cell.strip().startswith("[") and cell.strip().endswith("]"):
        try:
            # a list as JSON or as Python writes it
            names = ast.literal_eval(cell.strip())
        except (ValueError, SyntaxError):
            return [cell]
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return names
    return [cell]


def find_picture(cell: Any, places: Places) -> Path | bytes:
    """Give the file that a cell names, or the bytes of the picture that it holds.

    Parameters
    ----------
    cell : any value
        What a table has for a picture.
    places : Places
        Where files may lie.

    Returns
    -------
    Path or bytes
        A file or folder that is there, or an encoded picture.

    Raises
    ------
    ValueError
        The cell names no picture, or one outside of the folder. The message says what to do.
    FileNotFoundError
        There is no such file.
    """
    if isinstance(cell, bytes | bytearray):
        return bytes(cell)
    if isinstance(cell, dict):
        return find_picture(_named_in(cell), places)
    # NaN, which tables have where nothing was entered, differs from itself
    if cell is None or cell != cell:
        raise ValueError("there is no picture name")
    if not isinstance(cell, str):
        raise ValueError(f"picture is named by text, not by {type(cell).__name__}")
    if not cell.strip() or "\0" in cell:
        raise ValueError(f"{cell!r:.80} is no picture name")
    if cell.lstrip()[:5].lower() == "data:":
        return _of_data_url(cell.strip())
    if len(cell) >= _SHORTEST_BASE64 and _BASE64_PICTURE.match(cell):
        return _decoded(cell)
    return _find_file(cell, places)


def _named_in(cell: dict) -> Any:
    """Give what an object says about a picture, the picture itself first."""
    content = cell.get("bytes")
    if isinstance(content, str):  # JSON has no bytes: what stands there is base64
        return content if _BASE64_PICTURE.match(content) else _decoded(content)
    if content is not None:
        return content
    for key in ("base64", "data", "image", "image_url", "url", "path", "file_name", "file"):
        value = cell.get(key)
        if value is None:
            continue
        if key in ("base64", "data") and isinstance(value, str) and not value.startswith("data:"):
            return _decoded(value)
        return value
    raise ValueError("picture is an object without bytes, path or url")


def _of_data_url(text: str) -> bytes:
    head, comma, content = text.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ValueError("picture is a data URL that is not marked as base64")
    return _decoded(unquote(content))


def _decoded(text: str) -> bytes:
    try:
        # line ends may stand in it, and the last signs may be left out
        joined = "".join(text.split()).rstrip("=")
        return base64.b64decode(joined + "=" * (-len(joined) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("picture is base64 that is damaged or cut short") from None


# --- files ----------------------------------------------------------------------------------------


def _find_file(name: str, places: Places) -> Path:
    address = _ADDRESS.match(name)
    if address and address[1].lower() == "file":
        name = unquote(name.strip()[len("file://") :])
    elif address:
        raise ValueError(
            f"picture is an address ({address[1].lower()}), and medtune fetches nothing: "
            "download the pictures first"
        )
    suffix = _suffix_of(name)
    is_wanted_volume = places.volumes and suffix in VOLUME_SUFFIXES
    if suffix in NO_PICTURES and not is_wanted_volume:
        raise ValueError(f"picture {shown_name(name)} is {NO_PICTURES[suffix]}")
    leads_out = False
    for path in _candidates(name, places):
        resolved = path.resolve()
        if places.hold(resolved):
            return resolved
        leads_out = True
    if leads_out or _leaves(name, places):
        raise ValueError(
            f"picture {shown_name(name)} lies outside the folder (a whole path, a link, or two dots): "
            "give image_root=FOLDER, a folder that holds all pictures"
        )
    if _WINDOWS_DRIVE.match(name.strip()) or name.strip().startswith(("/", "\\")):
        raise FileNotFoundError(
            f"picture {shown_name(name)} is missing: the table has whole paths of another machine; "
            "write names relative to the table"
        )
    raise FileNotFoundError(
        f"picture {shown_name(name)} is missing: if pictures lie elsewhere, give image_root=FOLDER"
    )


def _suffix_of(name: str) -> str:
    """Give the ending of a name in small letters, both parts of .nii.gz and .tar.gz."""
    suffixes = [suffix.lower() for suffix in PurePosixPath(_slashes(name)).suffixes[-2:]]
    both = "".join(suffixes)
    return both if both in NO_PICTURES else "".join(suffixes[-1:])


def _slashes(name: str) -> str:
    return name.strip().replace("\\", "/")


def _candidates(name: str, places: Places) -> Iterator[Path]:
    """Yield the files that a name may mean; an exact name anywhere counts more than a similar one."""
    found = False
    # joined to a whole path, a folder makes no difference
    for folder in places.folders[:1] if Path(name).is_absolute() else places.folders:
        if (folder / name).exists():
            found = True
            yield folder / name
    if found:
        return
    plain = _slashes(name)
    for folder in [Path("/")] if plain.startswith("/") else places.folders:
        path = _similar(folder, plain)
        if path is not None:
            yield path


def _leaves(name: str, places: Places) -> bool:
    """Say whether a name leads out of the folder, whether or not anything lies there."""
    if ".." not in PurePosixPath(_slashes(name)).parts:
        return False
    return not any(places.hold((folder / _slashes(name)).resolve()) for folder in places.folders)


def _similar(folder: Path, name: str) -> Path | None:
    """Follow a name part by part, and take a similar one where there is no such part."""
    parts = PurePosixPath(name).parts
    place = folder
    for number, part in enumerate(parts):
        if part == "/":
            continue
        if part != ".." and not (place / part).exists():
            is_last = number == len(parts) - 1
            part = _similar_part(place, part, is_last)
            if part is None:
                return None
        place = place / part
    return place


def _similar_part(folder: Path, part: str, is_last: bool) -> str | None:
    try:
        changed = folder.stat().st_mtime_ns
        listing = _listing(str(folder), changed)
    except OSError:
        return None
    found = listing.get(_folded(part), [])
    if not found and is_last:
        found = listing.get(_folded(part) + ".*", [])
    if len(found) > 1:
        raise ValueError(
            f"picture {shown_name(part)} is not clear: {len(found)} files have similar names"
        )
    return found[0] if found else None


@functools.lru_cache(maxsize=64)
def _listing(folder: str, changed: int) -> dict[str, list[str]]:
    """Give the names in a folder by their folded form, and pictures without their ending too.

    `changed` is when the folder was last written to: it keeps the cache from growing old.
    """
    names: dict[str, list[str]] = {}
    for path in Path(folder).iterdir():
        names.setdefault(_folded(path.name), []).append(path.name)
        if path.suffix.lower() in PICTURE_SUFFIXES | {".dcm"}:
            names.setdefault(_folded(path.stem) + ".*", []).append(path.name)
    return names


def _folded(name: str) -> str:
    """Give a name without what people and programs change in it."""
    return unicodedata.normalize("NFC", name).casefold().strip()


def shown_name(name: str) -> str:
    """Give a name for a message: the last part of a whole path, and of a long text its length.

    Examples
    --------
    >>> shown_name("scans/a.png"), shown_name("/home/doe/a.png"), shown_name("x" * 200)
    ('scans/a.png', '.../a.png', '(a text of 200 characters)')
    """
    plain = " ".join(name.split())
    if len(plain) > _LONGEST_NAME:
        return f"(a text of {len(name)} characters)"
    is_whole = plain.startswith(("/", "\\")) or _WINDOWS_DRIVE.match(plain)
    return f".../{PurePosixPath(_slashes(plain)).name}" if is_whole else plain
