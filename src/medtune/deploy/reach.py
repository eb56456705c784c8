"""Who can reach a server of this machine: nobody else, unless a password and TLS guard it."""

import ipaddress
import os
import ssl

#: Characters of a password, at least.
LEAST_PASSWORD = 8


def check_reach(
    host: str,
    password: str | None,
    tls_cert: str | os.PathLike | None,
    tls_key: str | os.PathLike | None,
) -> None:
    """Refuse to serve where others could reach a server, or read along, unguarded.

    Parameters
    ----------
    host : address to listen on. Another than one of this machine alone needs a password and TLS.
    password : what visitors are asked for, 8 characters or more; None for none.
    tls_cert, tls_key : PEM files of a certificate (with its chain) and of its private key, without
        a passphrase.

    Raises
    ------
    ValueError : another host without a password or TLS, a password that is too short, or a
        certificate and a key that do not belong together.
    OSError : one of the files is missing or cannot be read.

    Examples
    --------
    >>> check_reach("127.0.0.1", None, None, None)
    >>> check_reach("0.0.0.0", None, None, None)
    Traceback (most recent call last):
    ValueError: others can reach 0.0.0.0: set a password of at least 8 characters, ...
    """
    others_reach_it = not is_loopback(host)
    if (others_reach_it or password) and len(password or "") < LEAST_PASSWORD:
        raise ValueError(
            f"others can reach {host}: set a password of at least {LEAST_PASSWORD} characters, "
            "or stay on 127.0.0.1"
        )
    if bool(tls_cert) != bool(tls_key):
        raise ValueError("TLS needs both: tls_cert=FILE and tls_key=FILE")
    if tls_cert:
        _check_certificate(tls_cert, tls_key)
    elif others_reach_it:
        raise ValueError(
            f"without TLS the network can read pictures and password on the way to {host}: "
            "give tls_cert=FILE and tls_key=FILE, or stay on 127.0.0.1 and use an SSH tunnel"
        )


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach an address.

    Examples
    --------
    >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_certificate(tls_cert: str | os.PathLike, tls_key: str | os.PathLike) -> None:
    """Raise ValueError or OSError, in one line, if a server cannot use a certificate and key."""
    for file in (tls_cert, tls_key):
        # says which of the two is missing, or may not be read; OpenSSL does not
        with open(file, "rb"):
            pass

    def no_passphrase() -> str:
        raise ValueError(f"{tls_key} has a passphrase: give tls_key=FILE with a key without one")

    try:
        # the passphrase as a function: without one OpenSSL would ask at the terminal
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(
            tls_cert, tls_key, password=no_passphrase
        )
    except ssl.SSLError as error:
        raise ValueError(
            f"tls_cert={tls_cert} and tls_key={tls_key} are no PEM certificate and its key: "
            f"{error.reason or error}"
        ) from None
