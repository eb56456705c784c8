"""The salt of a user, and names that are hashed with it: nobody else can turn them back.

Names of files and numbers of patients tell who somebody is. A hash alone hides nothing, because
numbers can be tried one after the other; with a salt that only its owner has, they cannot. The salt
stays the same, so that the same patient has the same name in each call.
"""

import contextlib
import hashlib
import hmac
import os
import re
import secrets
from pathlib import Path

from medtune.files import one_line

# Endings of files that a table may name its rows by.
_FILE_NAME = re.compile(
    r"\.(jpe?g|png|webp|bmp|tiff?|gif|dcm|dicom|ima|nii|nii\.gz|mha|mhd|nrrd|mp4|avi|txt|json|csv)$",
    re.IGNORECASE,
)


def user_salt() -> str:
    """Give the salt of this user: the environment's MEDTUNE_SALT, else that of a file.

    The file is `medtune/salt` in the folder XDG_CONFIG_HOME (by default ~/.config). On first need
    it is made, with 32 random bytes that only the user can read.

    Returns
    -------
    str
        The salt.

    Raises
    ------
    ValueError
        The file cannot be made or read, or holds nothing. The message says what to give instead.

    Examples
    --------
    >>> user_salt() == user_salt()
    True
    """
    given = os.environ.get("MEDTUNE_SALT")
    if given:
        return given
    config = os.environ.get("XDG_CONFIG_HOME")
    try:
        # without a home folder there is no place for a file
        folder = Path(config) if config else Path.home() / ".config"
        file = folder / "medtune" / "salt"
        if not file.exists():
            _make_salt(file)
        salt = file.read_text("ascii").strip()
    except (OSError, RuntimeError, UnicodeError) as error:
        raise ValueError(
            f"no salt can be kept for the names of patients ({one_line(error, 150)}): "
            "give salt=TEXT or set MEDTUNE_SALT"
        ) from None
    if not salt:
        raise ValueError(f"{file} is empty: delete it, give salt=TEXT or set MEDTUNE_SALT")
    return salt


def _make_salt(file: Path) -> None:
    """Write a new salt, whole or not at all; where two processes do it at once, one salt wins."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    part = file.with_name(f".salt.{secrets.token_hex(4)}.part")
    try:
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="ascii") as text:
            text.write(secrets.token_hex(32) + "\n")
        # a link is refused where the name is taken, a renaming would replace the other's salt
        with contextlib.suppress(FileExistsError):
            os.link(part, file)
    finally:
        part.unlink(missing_ok=True)


def keyed_hash(content: str | bytes, salt: str) -> str:
    """Give the HMAC-SHA256 of a content with a salt, as 64 hexadecimal digits.

    Parameters
    ----------
    content : str or bytes
        What is hashed; text counts as UTF-8.
    salt : str
        The secret.

    Returns
    -------
    str
        The digits. Take as many as a name needs.

    Examples
    --------
    >>> keyed_hash("1234", "one")[:8] == keyed_hash("1234", "two")[:8]
    False
    """
    if isinstance(content, str):
        content = content.encode("utf-8", "surrogatepass")
    return hmac.new(salt.encode("utf-8", "surrogatepass"), content, hashlib.sha256).hexdigest()


def safe_id(name: str, salt: str | None = None) -> str:
    """Give the id that pairs have for a given id: a hash where that is a path or a file's name.

    Such names often hold the number or the name of a patient, and an id goes into records, file
    names and reports.

    Parameters
    ----------
    name : str
        The id that the source gives.
    salt : str, optional
        A secret; by default that of the user, see `user_salt`. The same salt gives the same id, so
        that results can be joined with the source again.

    Returns
    -------
    str
        `id-` and 16 hexadecimal digits for a path (with a slash or a backslash) or the name of a
        file; any other id as it is.

    Raises
    ------
    ValueError
        A salt is needed, and there is none.

    Examples
    --------
    >>> safe_id("roco-17")
    'roco-17'
    >>> safe_id("p10/p1000003/s5041426", salt="a secret")
    'id-aef7fdc5ebcfc7fa'
    """
    if not is_unsafe(name):
        return name
    return "id-" + keyed_hash(name, salt or user_salt())[:16]


def is_unsafe(name: str) -> bool:
    """Say whether an id is a path or the name of a file.

    Examples
    --------
    >>> is_unsafe("p10/s1"), is_unsafe("Doe.png"), is_unsafe("s1")
    (True, True, False)
    """
    return "/" in name or "\\" in name or bool(_FILE_NAME.search(name.strip()))


def patient_group(patient: str, salt: str) -> str:
    """Give the group that stands for a patient: `patient-` and 12 hexadecimal digits.

    Parameters
    ----------
    patient : str
        The number or the name of a patient, as the source has it.
    salt : str
        The secret.

    Returns
    -------
    str
        The same for the same patient and salt.

    Examples
    --------
    >>> len(patient_group("1234", "a secret"))
    20
    """
    return "patient-" + keyed_hash(patient, salt)[:12]
