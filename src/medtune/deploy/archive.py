"""A PACS that speaks DICOMweb: find a series (QIDO-RS), fetch it (WADO-RS), store (STOW-RS).

Nothing that comes from the archive is said in a message but UIDs of the expected form and counts:
the libraries' own messages and log lines can quote what a tag holds, so they are kept quiet.
"""

import contextlib
import ipaddress
import logging
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydicom.dataset import Dataset

try:
    import requests
    from dicomweb_client import DICOMwebClient
except ImportError:
    raise ImportError("an archive needs its extra: pip install 'medtune[pacs]'") from None

# As it is stored. Without this an archive is asked for uncompressed slices, and Orthanc answers 500
# where it cannot make them.
_AS_STORED = (("application/dicom", "*"),)
_STUDY = "0020000D"
_SERIES = "0020000E"
_MODALITY = "00080060"
_MODALITIES = "00080061"
_COUNT_OF_SERIES = "00201206"
_COUNT_IN_STUDY = "00201208"
_COUNT_IN_SERIES = "00201209"
_UID = re.compile(r"[0-9]+(\.[0-9]+)*")
# Their log lines can hold tag values and answers of the server.
_TALKATIVE = ("dicomweb_client", "highdicom", "pydicom", "urllib3")


@dataclass(frozen=True)
class Series:
    """What an archive says of a series.

    Parameters
    ----------
    study : UID of its study.
    uid : its own UID.
    modality : such as "CT"; "?" where the archive does not say.
    instances : how many files it has; None where the archive does not say.
    """

    study: str
    uid: str
    modality: str
    instances: int | None


class Archive:
    """A PACS behind a DICOMweb address.

    Parameters
    ----------
    url : such as "http://127.0.0.1:8042/dicom-web". Another machine's must be https: slices and
        names of patients travel on it.
    user, password : for HTTP's basic authentication, where the archive wants it.
    timeout : seconds that a request may stand still.

    Raises
    ------
    ValueError : the address cannot be used.

    Examples
    --------
    >>> archive = Archive("http://127.0.0.1:8042/dicom-web")
    >>> Archive("http://pacs.example/dicom-web")
    Traceback (most recent call last):
    ValueError: archive=http://pacs.example/dicom-web is not this machine: give an https address
    """

    def __init__(
        self,
        url: str,
        *,
        user: str | None = None,
        password: str | None = None,
        timeout: float = 60.0,
    ) -> None:
        self.url = _checked(url)
        session = requests.Session()
        if user is not None:
            session.auth = (user, password or "")
        # a redirect could send a patient's data to another address
        session.max_redirects = 0
        if urlsplit(self.url).scheme == "http":
            # plain http is for this machine only: no proxy of the environment
            session.trust_env = False
        self._client = DICOMwebClient(
            self.url, session=session, permissive_uid=True, timeout=timeout
        )
        # one that is down says so at once; a whole store is not sent twice
        self._client.set_http_retry_params(retry=False)

    def studies(self, limit: int = 100) -> list[dict[str, Any]]:
        """List studies, by nothing that says whose they are.

        Parameters
        ----------
        limit : most studies to list.

        Returns
        -------
        list of dict : "study" (UID), "modalities", "series" and "instances" (how many; None where
            the archive does not say).

        Raises
        ------
        OSError : the archive does not answer, or lets nobody in.
        """
        with self._asking("QIDO-RS"):
            found = self._client.search_for_studies(
                limit=limit, fields=[_MODALITIES, _COUNT_OF_SERIES, _COUNT_IN_STUDY]
            )
            studies = []
            for entry in found:
                modalities = entry.get(_MODALITIES, {}).get("Value", [])
                studies.append(
                    {
                        "study": _uid(entry, _STUDY),
                        "modalities": " ".join(_modality(value) for value in modalities),
                        "series": _count(entry, _COUNT_OF_SERIES),
                        "instances": _count(entry, _COUNT_IN_STUDY),
                    }
                )
        return studies

    def series(self, study: str) -> list[Series]:
        """List the series of a study.

        Parameters
        ----------
        study : its UID.

        Raises
        ------
        ValueError : this is no UID, or the archive has no such study.
        OSError : the archive does not answer, or lets nobody in.
        """
        if not _UID.fullmatch(study):
            raise ValueError(f"study={study} is no UID: without a study, all are listed")
        with self._asking("QIDO-RS"):
            found = self._client.search_for_series(study, fields=[_COUNT_IN_SERIES])
            series = []
            for entry in found:
                modality = _modality(*entry.get(_MODALITY, {}).get("Value", [""])[:1])
                uid = _uid(entry, _SERIES)
                series.append(Series(study, uid, modality, _count(entry, _COUNT_IN_SERIES)))
        if not series:
            raise ValueError(f"study={study}: the archive has no such study, or it has no series")
        return series

    def fetch(self, series: Series, folder: Path) -> list[Path]:
        """Fetch a series as it is stored, one file an instance.

        Parameters
        ----------
        series : one that `series` gives.
        folder : where to write; the names of the files say nothing.

        Raises
        ------
        OSError : the archive does not answer, or gives fewer files than it promised.
        """
        files = []
        with self._asking("WADO-RS"):
            for dataset in self._client.iter_series(
                series.study, series.uid, media_types=_AS_STORED
            ):
                file = Path(folder) / f"{len(files) + 1:05d}.dcm"
                dataset.save_as(file, enforce_file_format=True)
                files.append(file)
        if series.instances is not None and len(files) < series.instances:
            raise OSError(
                f"{self.url} gave {len(files)} of {series.instances} files of the series: try again"
            )
        return files

    def store(self, dataset: Dataset) -> None:
        """Store a data set, and see to it that the archive says so.

        Parameters
        ----------
        dataset : with its `file_meta`.

        Raises
        ------
        OSError : the archive does not answer, or did not take it.
        """
        with quiet_libraries():
            # A file that an old converter wrote may call every tag "unknown" (UN). Tags that were
            # read are written as what they are; as they came, Orthanc finds no UID and answers 400.
            for _ in dataset.iterall():
                pass
        # the client leaves it out where there is none, and cannot read what it then gets back
        if not getattr(dataset, "preamble", None):
            dataset.preamble = bytes(128)
        with self._asking("STOW-RS"):
            reply = self._client.store_instances([dataset])
            stored = [
                item.ReferencedSOPInstanceUID for item in reply.get("ReferencedSOPSequence", [])
            ]
        if dataset.SOPInstanceUID not in stored:
            raise OSError(f"{self.url} did not take the file, and does not say why (STOW-RS)")

    @contextlib.contextmanager
    def _asking(self, service: str) -> Iterator[None]:
        """Turn whatever goes wrong into one line without patient data."""
        try:
            with quiet_libraries():
                yield
        except requests.HTTPError as error:
            status = error.response.status_code
            raise OSError(f"{self.url} answers {status} ({service}){_advice(status)}") from None
        except requests.TooManyRedirects:
            raise OSError(
                f"{self.url} sends on to another address, which is not followed ({service})"
            ) from None
        except requests.Timeout:
            raise OSError(f"{self.url} does not answer in time ({service})") from None
        except requests.RequestException:
            raise OSError(
                f"{self.url} does not answer ({service}): does it run, and is the address right?"
            ) from None
        except OSError as error:
            # an errno comes from this machine: no space, no permission
            if error.errno:
                raise
            raise self._nonsense(service) from None
        except Exception:  # parsers raise whatever they like, and quote what they read
            raise self._nonsense(service) from None

    def _nonsense(self, service: str) -> OSError:
        return OSError(
            f"{self.url} gives an answer that is no DICOMweb, or a damaged file ({service})"
        )


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep libraries from writing what they read to a log or a warning, at any level."""
    loggers = []
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if name.partition(".")[0] in _TALKATIVE and isinstance(logger, logging.Logger):
            loggers.append(logger)
    were = [logger.disabled for logger in loggers]
    with warnings.catch_warnings(action="ignore"):
        for logger in loggers:
            logger.disabled = True
        try:
            yield
        finally:
            for logger, was in zip(loggers, were, strict=True):
                logger.disabled = was


def _checked(url: str) -> str:
    """Check an address: this machine, or encrypted."""
    try:
        parts = urlsplit(url)
        host = parts.hostname
        has_port = parts.port is None or parts.port > 0
        is_usable = parts.scheme in ("http", "https") and host and has_port and not parts.query
    except ValueError:
        is_usable = False
    if not is_usable:
        raise ValueError(
            f"archive={url} is no address: give one such as http://127.0.0.1:8042/dicom-web"
        )
    if parts.username or parts.password:
        # not repeated: it would stand in a log
        raise ValueError("archive=URL must hold no user and password: they are given beside it")
    if parts.scheme == "http" and not _is_this_machine(host):
        raise ValueError(f"archive={url} is not this machine: give an https address")
    return url.rstrip("/")


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _advice(status: int) -> str:
    if status in (401, 403):
        return ": it wants a user and a password, or others"
    if status == 404:
        return ": is the address right, and is the series still there?"
    return ""


def _uid(entry: dict[str, Any], tag: str) -> str:
    """Read a UID; what has not its form is nobody's business."""
    value = str(entry[tag]["Value"][0])
    if not _UID.fullmatch(value):
        raise ValueError("no UID")
    return value


def _count(entry: dict[str, Any], tag: str) -> int | None:
    values = entry.get(tag, {}).get("Value", [])
    return int(values[0]) if values else None


def _modality(value: Any = "") -> str:
    return value if re.fullmatch("[A-Z]{2,4}", str(value)) else "?"
