"""Finding, reading and downloading data files, with one-line errors where they are missing or damaged."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from lightning_bln._files import FileError, one_line, replacing

PathLike = str | os.PathLike[str]
DATA_DIR_VARIABLE = "BLN_DATA_DIR"

PIECE = 2**20
"""Bytes that are read at once."""


class DataError(FileError, RuntimeError):
    """A data file is missing, truncated or of the wrong format. The message is one line and names the file."""


class Remote(NamedTuple):
    """A downloadable file: its address and its published checksum, ``"md5:..."`` or ``"sha256:..."``."""

    url: str
    checksum: str


def data_dir(path: PathLike | None = None) -> Path:
    """Return the folder to read data from.

    Args:
        path: The folder; by default that of the variable ``BLN_DATA_DIR``, else ``./data``.

    Example:
        >>> data_dir("/somewhere").as_posix()
        '/somewhere'
    """
    return Path(path or os.environ.get(DATA_DIR_VARIABLE) or "data").expanduser()


def locate(
    directory: Path, names: tuple[str, ...], what: str, remote: Remote, fetch_as: str | None = None, details: str = ""
) -> Path:
    """Return the first of ``names`` that exists under ``directory``.

    Args:
        directory: The folder to look in.
        names: Files or folders, the preferred one first.
        what: The data set's name, for the error message.
        remote: Source of the data set.
        fetch_as: Name to download ``remote`` under if none of ``names`` exists; ``None`` to download nothing.
        details: Further advice on the download, for the error message.

    Raises:
        DataError: None exists; the message says which were looked for, and how to get them.
    """
    if fetch_as is not None and not any((directory / name).exists() for name in names):
        download(remote, directory / fetch_as)
    for name in names:
        if (directory / name).exists():
            return directory / name
    raise DataError(
        f"{what} not found: no {' or '.join(names)} in {directory}. "
        f"Fetch {remote.url}{details}, or ask for it: download=True, --download. "
        f"Then name the folder that holds it with --data-dir, data_dir= or {DATA_DIR_VARIABLE}."
    )


def damaged(path: PathLike, reason: object) -> DataError:
    """The error of a file that is there, but not whole or not of its format."""
    return DataError(f"{path}: truncated or corrupt ({reason}); fetch it again")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Within the context, errors that a damaged file causes become a one-line DataError that names the file."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{error.filename or path}: no such file") from error
    except (EOFError, OSError, tarfile.TarError, zlib.error, UnicodeError, ValueError, KeyError, IndexError) as error:
        raise damaged(path, one_line(error)) from error


def read_bytes(path: Path) -> bytes:
    """Return a file's contents, decompressed if they are gzip data, whatever the file's name."""
    with reading(path):
        raw = path.read_bytes()
        return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw


def read_sized(path: Path, header: int, size_of: Callable[[bytes], tuple[int, int]]) -> bytes:
    """Return the contents of a file whose header says how long it is, and read no more than it has.

    Args:
        path: The file, compressed by gzip or not.
        header: Bytes to read for ``size_of``, or all where there are fewer.
        size_of: Gives the header's and the body's length from these bytes, or raises.

    Raises:
        DataError: The file is longer or shorter than its header says.
    """
    with reading(path), path.open("rb") as plain:
        is_packed = plain.read(2) == b"\x1f\x8b"
        plain.seek(0)
        stream: Any = gzip.GzipFile(fileobj=plain) if is_packed else plain
        start = stream.read(header)
        head, body = size_of(start)
        parts, missing = [start], head + body - len(start)
        # in pieces, since a damaged header may name any size, and read() makes room for what it is asked for
        while missing >= 0 and (part := stream.read(min(missing + 1, PIECE))):
            parts.append(part)
            missing -= len(part)
        if missing:
            promised = f"{body}" if body < 2**63 else "more than 2^63"
            found = f"{body - missing} follow" if missing > 0 else "more follow"
            raise damaged(path, f"header says {promised} bytes, {found}")
        return b"".join(parts)


def read_text(path: Path) -> str:
    """Return a file's contents as UTF-8 text, with its line ends unchanged."""
    with reading(path):
        return read_bytes(path).decode("utf-8")


def download(remote: Remote, target: Path, timeout: float = 60.0) -> Path:
    """Download a file, which gets its name only after its checksum has been verified.

    Args:
        remote: The address and the checksum.
        target: Path of the file; one that exists and matches the checksum is kept.
        timeout: Seconds to wait for the next bytes.

    Returns:
        ``target``.

    Raises:
        DataError: The address cannot be read, or the content does not match the checksum; no file is left behind.
    """
    if target.exists() and _matches(target, remote.checksum):
        return target
    with replacing(target) as partial:
        try:
            with urllib.request.urlopen(remote.url, timeout=timeout) as source:
                shutil.copyfileobj(source, partial)
        except (urllib.error.URLError, OSError, ValueError) as error:
            raise DataError(f"{remote.url}: cannot be fetched ({error}); fetch it by hand to {target}") from error
        partial.flush()
        if not _matches(Path(partial.name), remote.checksum):
            raise DataError(f"{remote.url}: what came does not match {remote.checksum}; nothing was kept")
    return target


def _matches(path: Path, checksum: str) -> bool:
    algorithm, _, expected = checksum.partition(":")
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, algorithm).hexdigest() == expected
