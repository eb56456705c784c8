"""Find files of a benchmark in its folder, however deep whoever unpacked it has put them."""

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from medtune.pairs import folder_of_zip


class Places:
    """The files below a folder, by their names. Only what lies there can be found.

    Parameters
    ----------
    source : a folder, or a ZIP, which is unpacked into the user's cache.

    Raises
    ------
    FileNotFoundError : it is not there.
    ValueError : it is a file, and no ZIP.
    """

    def __init__(self, source: str | os.PathLike) -> None:
        path = Path(source).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"no such folder: {path}")
        self.folder = folder_of_zip(path, None)
        if not self.folder.is_dir():
            raise ValueError(f"{path} is no folder: give the one that holds the benchmark's files")
        self._by_name: dict[str, list[Path]] = defaultdict(list)
        self._take(self.folder)
        self._zips_are_open = False
        # many questions are about one picture
        self._found: dict[str, Path] = {}

    def _take(self, folder: Path) -> None:
        for where, _, names in os.walk(folder):
            for name in names:
                self._by_name[name.lower()].append(Path(where) / name)

    def named(self, *names: str) -> list[Path]:
        """Give the files of these names, in the order of the names, and each name's by path."""
        found = []
        for name in names:
            found += sorted(self._by_name.get(name.lower(), []))
        return found

    def ending(self, suffix: str) -> Iterator[Path]:
        """Yield the files whose names end so, by path."""
        files = []
        for name, paths in self._by_name.items():
            if name.endswith(suffix):
                files += paths
        yield from sorted(files)

    def picture(self, name: str) -> Path | None:
        """Give the picture whose path ends with this name; of several, the first by path."""
        if name in self._found:
            return self._found[name]
        found = self._lookup(name)
        if found is None and not self._zips_are_open:
            # SLAKE's pictures on the hub are one ZIP beside its tables
            self._zips_are_open = True
            for archive in list(self.ending(".zip")):
                self._take(folder_of_zip(archive, None))
            found = self._lookup(name)
        if found is not None:
            self._found[name] = found
        return found

    def _lookup(self, name: str) -> Path | None:
        parts = PurePosixPath(name.replace("\\", "/")).parts
        if not parts:
            return None
        candidates = sorted(self._by_name.get(parts[-1].lower(), []))
        # The folder above all may have another name on this machine; but source.jpg alone is the
        # name of hundreds of pictures.
        shortest = 1 if len(parts) == 1 else max(2, len(parts) - 1)
        for length in range(len(parts), shortest - 1, -1):
            for path in candidates:
                if path.parts[-length:] == parts[-length:]:
                    return path
        return None
