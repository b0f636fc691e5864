"""Damage of every kind to a file's content, for readers that have to name the file and nothing else."""

from __future__ import annotations

import gzip
import random
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OTHER_FORMATS = {
    "empty": b"",
    "zeros": bytes(4096),
    "noise": random.Random(0).randbytes(4096),
    "page": b"<!DOCTYPE html>\n<html><body>404 not found</body></html>\n",
    "gzip": gzip.compress(b"something else" * 99),
    "half a gzip": gzip.compress(random.Random(1).randbytes(999))[:-500],
    "zip": b"PK\x03\x04" + bytes(99),
    "pickle": b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.",
    "numpy": b"\x93NUMPY\x01\x00",
    "json": b'{"history": [], "settings": null}',
    "a number": b"7",
    "deep json": b"[" * 100_000,
    "deep yaml": b"- " * 5_000 + b"x",
    "latin": b"\xff\xfe\xe9",
}
"""Content of other formats by name."""


def truncated(raw: bytes, count: int = 12) -> Iterator[bytes]:
    """``raw`` cut at the start, at the end, and in between."""
    lengths = {0, 1, 2, 3, 7, len(raw) - 1, len(raw) - 2} | {len(raw) * part // count for part in range(1, count)}
    return (raw[:length] for length in sorted(lengths) if 0 <= length < len(raw))


def flipped(raw: bytes, count: int = 60) -> Iterator[bytes]:
    """``raw`` with bits, whole bytes or runs of bytes changed, early places more often than late ones."""
    draw = random.Random(0)
    for index in range(count):
        changed = bytearray(raw)
        bound = len(raw) if index % 2 else min(len(raw), 200)
        for _ in range(draw.choice((1, 1, 3))):
            changed[draw.randrange(bound)] ^= draw.choice((1 << draw.randrange(8), 255))
        yield bytes(changed)


def outcome(call: Callable[[], Any], expected: type[Exception]) -> tuple[Any, str]:
    """The result of a call, or ``None`` and the message of the one kind of error that it may raise."""
    try:
        return call(), ""
    except expected as error:
        return None, str(error)


def assert_names(message: str, path: Path) -> None:
    """Check that a message is one short line that names a file, or the folder that it is in."""
    assert "\n" not in message
    assert str(path) in message
    assert len(message) < 600


def taken_in_spite(
    damage: str, path: Path, read: Callable[[], Any], error: type[Exception], flips: int = 60
) -> list[tuple[bytes, Any]]:
    """Damaged contents of ``path`` that ``read`` takes, and what it makes of each; all others are refused by name."""
    raw = path.read_bytes()
    kinds = {"truncated": truncated(raw), "flipped": flipped(raw, flips), "other": OTHER_FORMATS.values()}
    taken, refused = [], 0
    for changed in kinds[damage]:
        path.write_bytes(changed)
        found, message = outcome(read, error)
        if found is None:
            assert_names(message, path)
            refused += 1
        else:
            taken.append((changed, found))
    assert refused
    return taken


@contextmanager
def little_memory(spare: int = 2**30) -> Iterator[None]:
    """Within the context, the process can take no more than ``spare`` bytes of memory besides what it has."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + spare, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
