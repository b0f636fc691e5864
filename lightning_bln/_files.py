"""Files that are replaced in one step, and the error of files that cannot be read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4


class FileError(ValueError):
    """A file is missing, damaged or of another format. The message is one line and names the file."""


def one_line(error: object) -> str:
    """The text of an error on one line; its type where it has no text."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def replacing(path: str | os.PathLike[str], like: str | os.PathLike[str] | None = None) -> Iterator[BinaryIO]:
    """A file beside ``path`` that takes its place once the body succeeds; if the body raises, ``path`` stays as it is.

    A reader of ``path`` finds the old file or the new one whole, also after a crash. Folders that are missing are
    made, and go again if the body raises; a symbolic link stays a link.

    Args:
        path: The file to write.
        like: The file whose permissions the new one gets, by default those of the file it replaces.

    Example:
        >>> folder = getfixture("tmp_path")
        >>> with replacing(folder / "scores.json") as file:
        ...     written = file.write(b"{}")
        >>> [(entry.name, entry.read_text()) for entry in folder.iterdir()]
        [('scores.json', '{}')]
    """
    target = Path(path).resolve()
    model = target if like is None else Path(like)
    partial = target.with_name(f".{target.name}.{uuid4().hex[:8]}.part")
    made = [one for one in target.parents if not one.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("xb") as file:
            if model.exists():
                shutil.copymode(model, partial)
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        for folder in made:
            with suppress(OSError):  # another program's file may lie in it by now
                folder.rmdir()
        raise
