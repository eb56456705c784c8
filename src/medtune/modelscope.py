"""Fetch models and data sets from ModelScope, for readers whom the Hugging Face hub does not reach.

A name such as `modelscope:Qwen/Qwen3-VL-2B-Instruct` stands wherever a hub name may. The package
`modelscope` downloads into its own cache, and what lies there already is taken when there is no
connection. No code that comes along is ever fetched, and of weights only safetensors are.
"""

import logging
import os
import re
from pathlib import Path

from .files import one_line

PREFIX = "modelscope:"
"""What a name begins with that means ModelScope."""

# Owner and name, and of a data set perhaps one of its folders.
_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?::([\w.-]+))?")

# Code is not run here, and weights in these forms are programs too, or serve other frameworks.
_NEVER_FETCHED = ["*.py", "*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.h5"]
_NEVER_FETCHED += ["*.msgpack", "*.onnx", "*.gguf"]

# Set by those who work without a connection; the hub's own switches are known to everybody.
_OFFLINE_SWITCHES = ("MODELSCOPE_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def is_modelscope_name(name: object) -> bool:
    """Say whether a name means something on ModelScope.

    Examples
    --------
    >>> is_modelscope_name("modelscope:Qwen/Qwen3-VL-2B-Instruct"), is_modelscope_name("Qwen/Q")
    (True, False)
    """
    return str(name).startswith(PREFIX)


def fetch_model(name: str) -> str:
    """Fetch a model from ModelScope, and give the folder in which it lies.

    Parameters
    ----------
    name : such as "modelscope:Qwen/Qwen3-VL-2B-Instruct".

    Returns
    -------
    str : the folder in ModelScope's cache (MODELSCOPE_CACHE moves it).

    Raises
    ------
    ValueError : the name has another form, or `modelscope` is not installed.
    FileNotFoundError : ModelScope has no such model.
    PermissionError : it wants an account.
    ConnectionError : no connection, and not in the cache.
    OSError : the download failed, or does not fit onto the disk.

    Examples
    --------
    >>> fetch_model("modelscope:Qwen3-VL-2B-Instruct")
    Traceback (most recent call last):
    ValueError: modelscope:Qwen3-VL-2B-Instruct is no name on ModelScope: modelscope:OWNER/NAME
    """
    repository, _ = _take_apart(name)
    return str(_fetch(repository, "model", None))


def fetch_dataset(name: str, config: str | None = None) -> str:
    """Fetch a data set from ModelScope, and give the folder in which it lies.

    Parameters
    ----------
    name : such as "modelscope:OWNER/NAME", or "modelscope:OWNER/NAME:FOLDER".
    config : a folder of the set, such as "25M_demo": it alone is fetched.

    Returns
    -------
    str : the folder with the files, in ModelScope's cache (MODELSCOPE_CACHE moves it).

    Raises
    ------
    ValueError : the name has another form, the set has no such folder, or `modelscope` is not
        installed.
    FileNotFoundError : ModelScope has no such set.
    PermissionError : it wants an account.
    ConnectionError : no connection, and not in the cache.
    OSError : the download failed, or does not fit onto the disk.

    Examples
    --------
    >>> fetch_dataset("modelscope:")
    Traceback (most recent call last):
    ValueError: modelscope: is no name on ModelScope: modelscope:OWNER/NAME
    """
    repository, config_in_name = _take_apart(name)
    config = config or config_in_name
    if config is None:
        return str(_fetch(repository, "dataset", None))
    folder = _fetch(repository, "dataset", [f"{config}/*"]) / config
    if not folder.is_dir():
        raise ValueError(
            f"{PREFIX}{repository} has no folder {config}: name one of its folders, "
            f"{PREFIX}{repository}:FOLDER, or leave it out to fetch all"
        )
    return str(folder)


def _take_apart(name: str) -> tuple[str, str | None]:
    """Give owner/name, and the folder if there is one."""
    found = _NAME.fullmatch(name.removeprefix(PREFIX))
    if not found:
        raise ValueError(f"{name} is no name on ModelScope: {PREFIX}OWNER/NAME")
    return found[1], found[2]


def _fetch(repository: str, kind: str, patterns: list[str] | None) -> Path:
    """Fetch what is missing of a repository; without a connection take what the cache has."""
    # else it looks whether this machine stands in the cloud of ModelScope's owner, to be faster
    os.environ.setdefault("MODELSCOPE_DOWNLOAD_INTRA_CLOUD", "false")
    # more than a second, and only those who name ModelScope need it
    try:
        from modelscope.hub.snapshot_download import snapshot_download
    except ImportError:
        raise ValueError(
            f"{PREFIX}{repository} needs the package modelscope: pip install modelscope"
        ) from None
    # each list of files that it asks for is a line otherwise
    logging.getLogger("modelscope_hub").setLevel(logging.ERROR)
    options = {
        "repo_type": kind,
        "allow_patterns": patterns,
        "ignore_patterns": _NEVER_FETCHED,
    }
    if not _is_offline():
        try:
            return Path(snapshot_download(repository, **options))
        except Exception as error:  # requests, urllib3 and the package's own kinds
            refusal = _explained(repository, kind, error)
            if not isinstance(refusal, ConnectionError):
                raise refusal from None
    try:
        folder = Path(snapshot_download(repository, local_files_only=True, **options))
    except Exception:  # the package says in several ways that nothing is there
        raise ConnectionError(
            f"{PREFIX}{repository} is not in ModelScope's cache, and ModelScope is out of reach "
            "(offline?); MODELSCOPE_CACHE names another cache, MODELSCOPE_ENDPOINT a mirror"
        ) from None
    _refuse_half(folder, repository)
    return folder


def _is_offline() -> bool:
    values = [os.environ.get(switch, "").lower() for switch in _OFFLINE_SWITCHES]
    return any(value in ("1", "true", "yes", "on") for value in values)


def _explained(repository: str, kind: str, error: BaseException) -> Exception:
    """Put the ways in which ModelScope does not give a repository into one line of four kinds."""
    kinds = []
    link: BaseException | None = error
    while link is not None:
        kinds += [each.__name__ for each in type(link).__mro__]
        link = link.__cause__ or link.__context__
    name = f"{PREFIX}{repository}"
    if "NotExistError" in kinds:
        return FileNotFoundError(
            f"ModelScope has no {kind} {repository}: check the spelling (a private one needs "
            "MODELSCOPE_API_TOKEN)"
        )
    if "AuthenticationError" in kinds or "PermissionDeniedError" in kinds:
        return PermissionError(
            f"ModelScope refuses {name}: accept its terms on its page, then set "
            "MODELSCOPE_API_TOKEN"
        )
    if {"NetworkError", "ConnectionError", "Timeout", "TimeoutError"} & set(kinds):
        return ConnectionError(f"{name}: {one_line(error)}")
    return OSError(f"{name} cannot be fetched: {one_line(error)}")


def _refuse_half(folder: Path, repository: str) -> None:
    """Refuse a copy whose download was cut: rows or weights would be missing in silence."""
    if next(folder.rglob("*.incomplete"), None) is not None:
        raise ConnectionError(
            f"{PREFIX}{repository} lies half downloaded in {folder}: fetch it again with a "
            "connection, which goes on where it stopped"
        )
