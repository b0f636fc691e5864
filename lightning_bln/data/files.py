"""Where data files lie, what is said when they are absent or broken, and how they are fetched."""

from __future__ import annotations

import gzip
import hashlib
import os
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

PathLike = str | os.PathLike[str]
DATA_DIR_VARIABLE = "BLN_DATA_DIR"


class DataError(RuntimeError):
    """A data file is absent, truncated or not what its name promises. The message is one line and names the file."""


class Remote(NamedTuple):
    """A file that can be fetched: its address and its published checksum, ``"md5:..."`` or ``"sha256:..."``."""

    url: str
    checksum: str


def data_dir(path: PathLike | None = None) -> Path:
    """Return the folder that data is read from.

    Args:
        path: the folder asked for; without one, the variable ``BLN_DATA_DIR``, and without that ``./data``.

    Example:
        >>> data_dir("/somewhere").as_posix()
        '/somewhere'
    """
    return Path(path or os.environ.get(DATA_DIR_VARIABLE) or "data").expanduser()


def first_existing(directory: Path, names: tuple[str, ...], what: str, how: str) -> Path:
    """Return the first of ``names`` that exists under ``directory``.

    Raises:
        DataError: none exists; the message says which were looked for, and how to get them.
    """
    for name in names:
        if (directory / name).exists():
            return directory / name
    raise DataError(
        f"{what} not found: no {' or '.join(names)} in {directory}. {how} "
        f"Then name the folder that holds it with --data-dir, data_dir= or {DATA_DIR_VARIABLE}."
    )


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever a damaged file makes its reader raise into a one-line DataError that names the file."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{error.filename or path}: no such file") from error
    except (EOFError, OSError, tarfile.TarError, zlib.error, UnicodeError, ValueError, KeyError, IndexError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: truncated or corrupt ({reason}); fetch it again") from error


def read_bytes(path: Path) -> bytes:
    """Return a file's contents, unpacked if it is gzip whatever its name says."""
    with reading(path):
        raw = path.read_bytes()
        return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw


def read_text(path: Path) -> str:
    """Return a file's contents as UTF-8 text, line ends as they are."""
    with reading(path):
        return read_bytes(path).decode("utf-8")


def download(remote: Remote, target: Path, timeout: float = 60.0) -> Path:
    """Fetch a file, check it, and only then give it its name.

    Args:
        remote: the address and the checksum.
        target: where the file belongs; a file that is there already and passes the check is kept.
        timeout: seconds without a byte after which to give up.

    Returns:
        ``target``.

    Raises:
        DataError: the address cannot be read, or what came does not match the checksum (nothing is left behind).
    """
    if target.exists() and _matches(target, remote.checksum):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        try:
            with urllib.request.urlopen(remote.url, timeout=timeout) as source, partial.open("wb") as sink:
                while block := source.read(1 << 20):
                    sink.write(block)
        except (urllib.error.URLError, OSError, ValueError) as error:
            raise DataError(f"{remote.url}: cannot be fetched ({error}); fetch it by hand to {target}") from error
        if not _matches(partial, remote.checksum):
            raise DataError(f"{remote.url}: what came does not match {remote.checksum}; nothing was kept")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def _matches(path: Path, checksum: str) -> bool:
    algorithm, _, expected = checksum.partition(":")
    digest = hashlib.new(algorithm)
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest() == expected
