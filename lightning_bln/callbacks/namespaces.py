"""Callbacks that a Trainer of either of Lightning's two namespaces takes."""

from __future__ import annotations

from functools import cache
from typing import Any

from lightning_bln.callbacks import _lightning


@cache
def of_both(cls: Any, later: tuple[type, ...]) -> type:
    """A subclass of ``cls`` under the same name that is a callback of further namespaces too."""
    names: dict[str, Any] = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    names["__reduce__"] = lambda self: (revive, (cls, self.__dict__))
    make: Any = type(cls)
    return make(cls.__name__, (cls, *later), names)


def revive(cls: Any, state: dict[str, Any]) -> Any:
    """Unpickle an instance of a class made by :func:`of_both`, which no module has by name."""
    later = tuple(base for base in _lightning.callback_bases() if not issubclass(cls, base))
    instance = object.__new__(of_both(cls, later) if later else cls)
    instance.__dict__.update(state)
    return instance
