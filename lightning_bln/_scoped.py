"""Attributes that are set for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def setting(owners: Iterable[Any], **values: Any) -> Iterator[None]:
    """Within the context every owner has these attributes; afterwards each has its own again, or none.

    Example:
        >>> from types import SimpleNamespace
        >>> one, other = SimpleNamespace(size=1), SimpleNamespace(size=2)
        >>> with setting([one, other], size=5, name="both"):
        ...     one.size, other.name
        (5, 'both')
        >>> one, other
        (namespace(size=1), namespace(size=2))
    """
    owners = list(owners)
    before = [(owner, name, getattr(owner, name)) for owner in owners for name in values if is_own(owner, name)]
    try:
        for owner in owners:
            for name, value in values.items():
                setattr(owner, name, value)
        yield
    finally:
        for owner in owners:
            for name in values:
                vars(owner).pop(name, None)
        for owner, name, value in before:
            setattr(owner, name, value)


def is_own(owner: Any, name: str) -> bool:
    """Whether an object itself has an attribute, in its dictionary or through a property."""
    return name in vars(owner) or isinstance(getattr(type(owner), name, None), property)
