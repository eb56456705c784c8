"""Unpack a ZIP of pictures and tables safely: only what stays in its folder, and not too much."""

import hashlib
import os
import secrets
import shutil
import stat
import zipfile
from pathlib import Path, PurePosixPath

from medtune.files import one_line

# Limits for what a ZIP may unpack to. A file of some kilobytes can promise terabytes.
MOST_FILES = 1_000_000
MOST_BYTES = 200 * 2**30
# Pictures hardly shrink; text shrinks to a tenth. What shrinks a thousandfold is a trap.
MOST_SHRINKING = 1_000
LONGEST_NAME = 255

# What a Mac and Windows put beside the files.
_NO_FILES = ("__MACOSX", ".DS_Store", "Thumbs.db", "desktop.ini")


def unpacked(archive: Path, encoding: str | None) -> Path:
    """Unpack a ZIP into the user's cache, once, and give the folder.

    The folder is `medtune/unpacked` in XDG_CACHE_HOME (by default ~/.cache); only the user can read
    it. The same file is not unpacked again.

    Parameters
    ----------
    archive : Path
        The ZIP.
    encoding : str or None
        How names are encoded that are not marked as UTF-8.

    Returns
    -------
    Path
        The folder with its files; where the ZIP holds one folder, that one.

    Raises
    ------
    ValueError
        It is no ZIP, is encrypted or damaged, is too large, or names files outside of its folder.
    OSError
        There is no room.
    """
    about = archive.stat()
    key = f"{archive.resolve()}:{about.st_size}:{about.st_mtime_ns}:{encoding}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "medtune" / "unpacked" / hashlib.sha256(key.encode()).hexdigest()[:24]
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        part = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.part")
        try:
            _unpack(archive, part, encoding)
            # what has the folder's name is complete; where two processes unpack, one wins
            if not folder.exists():
                part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    inside = list(folder.iterdir())
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else folder


def _unpack(archive: Path, folder: Path, encoding: str | None) -> None:
    name = archive.name
    try:
        with zipfile.ZipFile(archive, metadata_encoding=encoding) as zipped:
            members = [entry for entry in zipped.infolist() if not _is_no_file(entry)]
            _check_size(members, name, folder.parent)
            folder.mkdir(mode=0o700)
            for entry in members:
                _write(zipped, entry, folder / _safe_path(entry, encoding, name))
    except (zipfile.BadZipFile, NotImplementedError, EOFError, LookupError) as error:
        raise ValueError(f"{name} is no ZIP, or is damaged ({one_line(error, 100)})") from None
    except RuntimeError:  # so zipfile says that a password is missing
        raise ValueError(f"{name} is encrypted: unpack it, and give the folder") from None


def _is_no_file(entry: zipfile.ZipInfo) -> bool:
    parts = PurePosixPath(entry.filename).parts
    return entry.is_dir() or any(part in _NO_FILES or part.startswith("._") for part in parts)


def _check_size(members: list[zipfile.ZipInfo], name: str, folder: Path) -> None:
    total = sum(entry.file_size for entry in members)
    if len(members) > MOST_FILES or total > MOST_BYTES:
        raise ValueError(
            f"{name} would unpack to {len(members)} files of {total / 2**30:.0f} GB: unpack it "
            "yourself if you trust it, and give the folder"
        )
    for entry in members:
        if entry.file_size > 2**20 and entry.file_size > MOST_SHRINKING * entry.compress_size:
            raise ValueError(f"{name} holds a file that shrank a thousandfold (a ZIP bomb?)")
    free = shutil.disk_usage(folder).free
    if total > free:
        raise ValueError(
            f"{name} needs {total / 2**30:.1f} GB in {folder}, where {free / 2**30:.1f} are free: "
            "set XDG_CACHE_HOME to a larger disk"
        )


def _safe_path(entry: zipfile.ZipInfo, encoding: str | None, archive: str) -> PurePosixPath:
    """Give the place of a file below the folder, or raise."""
    is_link = stat.S_ISLNK(entry.external_attr >> 16)
    path = PurePosixPath(_readable_name(entry, encoding).replace("\\", "/"))
    leaves = path.is_absolute() or ".." in path.parts or any(":" in part for part in path.parts)
    too_long = any(len(part.encode("utf-8", "replace")) > LONGEST_NAME for part in path.parts)
    if is_link or leaves or too_long or not path.parts:
        raise ValueError(
            f"{archive} holds a link or a name that leads out of its folder: it is not unpacked"
        )
    return path


def _readable_name(entry: zipfile.ZipInfo, encoding: str | None) -> str:
    """Give a file's name as its maker wrote it: old programs do not say how names are encoded."""
    is_marked = entry.flag_bits & 0x800
    if is_marked or encoding or entry.filename.isascii():
        return entry.filename
    raw = entry.filename.encode("cp437")
    for guess in ("utf-8", "gb18030"):
        try:
            return raw.decode(guess)
        except UnicodeDecodeError:
            continue
    return entry.filename


def _write(zipped: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        raise ValueError(f"{Path(zipped.filename).name} holds two files of one name")
    # zipfile itself gives no more bytes than the entry promises, and checks its sum
    with zipped.open(entry) as source, open(path, "xb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
