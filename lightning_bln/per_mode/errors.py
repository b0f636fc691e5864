"""The error where modes cannot be evaluated jointly."""

from __future__ import annotations

from typing import Any, ClassVar


class NotTogether(Exception):
    """Raised where modes cannot be evaluated jointly; the message says why."""

    made: ClassVar[int] = 0
    """How many there have been, which tells of one that the caller's code has caught."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        NotTogether.made += 1


class AddsGradients(NotTogether):
    """A backward pass would add to gradients that all modes have."""


def name_of(func: Any) -> str:
    """The name of a function of torch, for a sentence."""
    return getattr(func, "__name__", str(func))


def reason_of(error: Exception) -> str:
    """The end of a sentence that says why modes are not evaluated jointly."""
    message = str(error).partition("\n")[0].rstrip(".")
    return message if isinstance(error, NotTogether) else ": ".join(filter(None, [type(error).__name__, message]))
