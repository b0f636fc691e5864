"""Sentences for the person who watches a run, above the Trainer's progress bars."""

from __future__ import annotations

import logging
import sys
from collections.abc import Hashable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from lightning_utilities.core import rank_zero
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_bln.callbacks import _lightning


class Messages:
    """Speaker of the callback's sentences, each once a run; without ``verbose`` only of its warnings."""

    def __init__(self, verbose: bool) -> None:
        self.verbose = verbose
        self.said: set[Hashable] = set()

    def begin(self) -> None:
        """Start a run, in which everything may be said again."""
        self.said.clear()

    def info(self, trainer: Any, sentence: str, about: Hashable = None) -> None:
        """Say a sentence, unless one ``about`` the same was said before."""
        if self.verbose and self._is_news(sentence if about is None else about):
            with above_bars(trainer):
                rank_zero_info(sentence)

    def warn(self, trainer: Any, sentence: str, about: Hashable = None) -> None:
        """Warn by a sentence, unless one ``about`` the same was said before."""
        if self._is_news(sentence if about is None else about):
            with above_bars(trainer):
                rank_zero_warn(sentence)

    def _is_news(self, about: Hashable) -> bool:
        is_news = about not in self.said
        self.said.add(about)
        return is_news


@contextmanager
def above_bars(trainer: Any) -> Iterator[None]:
    """Context in which lines written to the terminal go above the Trainer's progress bars, which stay whole."""
    found = bar_classes(trainer)
    with ExitStack() as stack:
        if "TQDMProgressBar" in found:
            tqdm = sys.modules[found["TQDMProgressBar"].__module__].Tqdm
            stack.enter_context(tqdm.external_write_mode(file=sys.stderr))
        elif "RichProgressBar" in found:
            stack.enter_context(handlers_redirected())
        yield


def bar_classes(trainer: Any) -> dict[str, type]:
    """The classes of the Trainer's progress bar, by name; none if it shows no bar."""
    bar = trainer.progress_bar_callback
    # a bar of the user's own may not say whether it is enabled
    return _lightning.bases(bar) if bar is not None and getattr(bar, "is_enabled", True) else {}


@contextmanager
def handlers_redirected() -> Iterator[None]:
    """Context in which log messages take the way that rich, while it draws, has prepared for the standard streams."""
    ways = {
        original: stream
        for stream in (sys.stdout, sys.stderr)
        if (original := getattr(stream, "rich_proxied_file", None)) is not None
    }
    moved: list[tuple[Any, Any]] = []
    logger: logging.Logger | None = rank_zero.log
    while logger is not None:
        streams = [one for one in logger.handlers if isinstance(one, logging.StreamHandler)]
        moved += [(one, one.stream) for one in streams if one.stream in ways]
        logger = logger.parent if logger.propagate else None
    try:
        for handler, stream in moved:
            handler.setStream(ways[stream])
        yield
    finally:
        for handler, stream in moved:
            handler.setStream(stream)
