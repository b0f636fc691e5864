"""Class paths in files from strangers: importing a module runs its code, so foreign ones need consent."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from lightning_bln._files import FileError, one_line

TRUSTED = frozenset(("lightning_bln", "torch", "lightning", "lightning_fabric", "pytorch_lightning", "torchmetrics"))
"""Packages whose classes a file may name."""

IMPORT_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
LARGEST = 2**20
"""Bytes of a file that is looked into, since the parser would read it in place of its name."""


def check_trust(source: Path, config: Any, allowed: Iterable[str] = ()) -> None:
    """Raise where ``config``, which the file ``source`` holds, would have a foreign module imported.

    Args:
        source: The file, for the error message.
        config: A configuration for jsonargparse.
        allowed: Import paths that the user has named as well.

    Raises:
        FileError: There is one; the message names it and the option that gives consent.
    """
    try:
        foreign = next((path for path in import_paths(config) if path not in {*allowed}), None)
    except RecursionError:
        raise FileError(f"{source}: its configuration is nested too deeply") from None
    if foreign is not None:
        raise FileError(
            f"{source} asks for {foreign!r}, which is not of lightning_bln, torch, lightning or torchmetrics; its code "
            "runs when it is imported: pass --trust if you trust this file"
        )


def import_paths(config: Any, key: str = "") -> Iterator[str]:
    """Every import path in a configuration that leads out of the trusted packages, and files with more of it.

    Class paths stand under ``class_path``; but the parser also imports names given for a class or a function, parses
    texts that are YAML, and reads files that are named in place of a value.
    """
    if isinstance(config, dict):
        for name, value in config.items():
            yield from import_paths(value, str(name))
    elif isinstance(config, (list, tuple)):
        for value in config:
            yield from import_paths(value)
    elif isinstance(config, str):
        yield from within_text(config.strip(), is_class_path=key.lstrip("_") == "class_path")


def within_text(text: str, *, is_class_path: bool) -> Iterator[str]:
    """:func:`import_paths` of a text."""
    if IMPORT_PATH.fullmatch(text):
        package = text.split(".")[0]
        if package not in TRUSTED and (is_class_path or is_package(package)):
            yield text
        return
    if is_class_path and ("." in text or ":" in text):
        yield text
    elif any(sign in text for sign in "{[:-\n"):
        nested = parsed(text)
        if isinstance(nested, (dict, list)):
            yield from import_paths(nested)
    yield from within_file(text)


def within_file(text: str) -> Iterator[str]:
    """:func:`import_paths` of a file that ``text`` names, itself if it is too large to look into."""
    try:
        path = Path(text)
        if not path.is_file():
            return
        content = path.read_text(errors="replace") if path.stat().st_size <= LARGEST else None
    except (OSError, ValueError):
        return
    nested = parsed(content) if content is not None else None
    if content is None:
        yield text
    elif isinstance(nested, (dict, list)):
        yield from import_paths(nested)
    elif isinstance(nested, str) and IMPORT_PATH.fullmatch(nested.strip()):
        yield from within_text(nested.strip(), is_class_path=False)


def parsed(text: str) -> Any:
    """YAML content of a text, ``None`` where it is no YAML."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        return None


def is_package(name: str) -> bool:
    """Whether a package or module of this name could be imported."""
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return True


def read_config(text: Any, source: Path) -> dict[str, Any]:
    """The configuration in a YAML text.

    Raises:
        FileError: It is none.
    """
    try:
        config = yaml.safe_load(text) if isinstance(text, str) else None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise FileError(f"{source}: its configuration is no YAML ({one_line(error)[:200]})") from None
    if not isinstance(config, dict):
        raise FileError(f"{source}: its configuration is no YAML mapping")
    return config
