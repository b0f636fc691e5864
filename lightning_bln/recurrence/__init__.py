"""A cell over time: the reference in plain torch operations, and faster ways with the same results."""

from lightning_bln.recurrence.stream import Stream

__all__ = ["Stream"]
