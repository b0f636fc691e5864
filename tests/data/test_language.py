"""Texts for language models: the real files where they are, and windows that continue one another."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import pytest
import torch

from lightning_bln.data import DataError, TokenWindows, read_penn_treebank, read_tiny_shakespeare, words_by_line


def test_real_penn_treebank(real_data: Path) -> None:
    streams = [words_by_line(text) for text in read_penn_treebank(real_data)]
    assert [len(stream) for stream in streams] == [929_589, 73_760, 82_430]
    assert len(set(streams[0])) == 10_000


def test_real_shakespeare(real_data: Path) -> None:
    parts = read_tiny_shakespeare(real_data)
    assert sum(map(len, parts)) == 1_115_394
    assert parts[0].startswith("First Citizen")


@pytest.mark.parametrize(("batch_size", "window"), [(1, 5), (3, 4), (4, 100)])
def test_windows_go_on_where_they_stopped(batch_size: int, window: int) -> None:
    tokens = list(range(50))
    windows = list(TokenWindows(tokens, batch_size, window))
    inputs, targets = (torch.cat(part, 1) for part in zip(*windows, strict=True))
    length = 49 // batch_size
    assert inputs.tolist() == [tokens[row * length : (row + 1) * length] for row in range(batch_size)]
    assert torch.equal(targets, inputs + 1)
    assert all(part.shape[1] == window for part, _ in windows[:-1])


def test_too_short_a_stream_is_an_error() -> None:
    with pytest.raises(DataError, match="3 tokens are too few for batch_size=5"):
        TokenWindows([1, 2, 3], 5, 2)


def test_a_gzip_file_cut_short_is_named(tmp_path: Path) -> None:
    path = tmp_path / "ptb" / "ptb.train.txt"
    path.parent.mkdir()
    path.write_bytes(gzip.compress(b"a b c\n" * 1_000)[:-20])
    with pytest.raises(DataError, match=r"ptb\.train\.txt: truncated or corrupt"):
        read_penn_treebank(tmp_path)
    shutil.rmtree(path.parent)
