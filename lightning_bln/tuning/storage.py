"""Addresses of studies: shown without passwords, opened with one line of error."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import unquote

from lightning_bln._files import FileError, one_line

FILES = ("sqlite", "journal")
"""Kinds of addresses that are a file's path."""

HIDDEN = "***"
SECRET_OPTION = re.compile(r"([?&;\s][^=&;\s]*(?:pass|pwd|secret|token|key)[^=&;\s]*=)([^&;\s]+)", re.I)
"""Options of an address that hold a password."""


def masked(url: str) -> str:
    """``url`` without any password, also where it is no proper address.

    Example:
        >>> masked("postgresql://ann:secret@host/studies")
        'postgresql://ann:***@host/studies'
    """
    kind, colon, rest = url.partition(":")
    if kind in FILES:
        return url
    secret = password(url)
    if secret:
        rest = f"{rest.removesuffix(secret + '@' + host(rest))}{HIDDEN}@{host(rest)}"
    return SECRET_OPTION.sub(rf"\1{HIDDEN}", kind + colon + rest)


def password(url: str) -> str:
    """The password between user and host, as it is written; empty where there is none.

    It ends at the last @, since it may hold @, : and / that nobody has quoted. Without // there is no telling a user
    from a password.
    """
    kind, _, rest = url.partition(":")
    user, at, _ = rest.rpartition("@")
    if kind in FILES or not at:
        return ""
    return user.lstrip("/").partition(":")[2] if user.startswith("/") else user


def host(rest: str) -> str:
    """The part of an address that follows the user."""
    return rest.rpartition("@")[2]


def scrubbed(text: object, url: str) -> str:
    """``text`` of an error without the passwords in ``url``.

    Nothing of it is left where a password is not quoted as it should be: then the address is read wrongly, and an error
    may show any part of it.
    """
    if re.search(r"[@/?#\s:\[\]]", password(url)):
        return "its password has to be quoted, @ as %40, / as %2F and : as %3A"
    found = str(text).replace(url, masked(url))
    secrets = {password(url), *(option for _, option in SECRET_OPTION.findall(url))}
    for secret in sorted({form for one in secrets for form in (one, unquote(one)) if form}, key=len, reverse=True):
        found = found.replace(secret, HIDDEN)
    return found


@contextmanager
def opening(url: str) -> Iterator[None]:
    """Within the context, any error becomes one line that names the study's address, without its password."""
    try:
        kind, _, path = url.partition(":")
        if kind == "sqlite":
            check_sqlite(Path(path.removeprefix("///")))
        yield
    except FileError:
        raise
    except Exception as error:  # what databases, drivers and a damaged study may raise has no common class
        reason = one_line(scrubbed(one_line(error), url))[:300]
        raise FileError(f"storage={masked(url)}: no study can be read or made there ({reason})") from None


def check_sqlite(path: Path) -> None:
    """Raise where a file is there and is no SQLite database, or a damaged one."""
    if not path.is_file() or not path.stat().st_size:
        return
    with closing(sqlite3.connect(path, timeout=60)) as connection:
        found = connection.execute("PRAGMA quick_check(1)").fetchall()
    if found != [("ok",)]:
        raise sqlite3.DatabaseError(f"the database is damaged: {found[0][0]}")
