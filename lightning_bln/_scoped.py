"""Attributes that are set for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any


@contextmanager
def setting(owners: Iterable[Any], **values: Any) -> Iterator[None]:
    """Within the context every owner has these plain attributes; afterwards each has its own again, or none.

    Example:
        >>> from types import SimpleNamespace
        >>> one, other = SimpleNamespace(size=1), SimpleNamespace(size=2)
        >>> with setting([one, other], size=5, name="both"):
        ...     one.size, other.name
        (5, 'both')
        >>> one, other
        (namespace(size=1), namespace(size=2))
    """
    with ExitStack() as stack:
        for owner in owners:
            for name, value in values.items():
                stack.callback(restore, owner, name, getattr(owner, name) if is_own(owner, name) else ABSENT)
                setattr(owner, name, value)
        yield


ABSENT = object()


def restore(owner: Any, name: str, value: Any) -> None:
    """Give an attribute its value back, or take it away."""
    if value is ABSENT:
        vars(owner).pop(name, None)
    else:
        setattr(owner, name, value)


def is_own(owner: Any, name: str) -> bool:
    """Whether an object itself has an attribute, in its dictionary or through a property."""
    return name in vars(owner) or isinstance(getattr(type(owner), name, None), property)
