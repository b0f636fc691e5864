"""Real data where it lies, and small files in the formats of the real ones."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from lightning_bln.data import LabelledTexts, read_imdb


@pytest.fixture(scope="session")
def real_data(shared: Path) -> Path:
    return shared / "data"


@pytest.fixture(scope="session")
def reviews(real_data: Path) -> tuple[LabelledTexts, LabelledTexts]:
    return read_imdb(real_data)


@pytest.fixture
def small_imdb(tmp_path: Path) -> Path:
    """An archive laid out as the real one: 6 + 6 training and 4 + 4 test reviews, and files that are no reviews."""
    with tarfile.open(tmp_path / "aclImdb_v1.tar.gz", "w:gz") as archive:
        for split, count in (("train", 6), ("test", 4)):
            for label, word in (("neg", "awful"), ("pos", "great")):
                for number in range(count):
                    add(archive, f"aclImdb/{split}/{label}/{number}_5.txt", f"A {word} film, No. {number}!<br />")
        add(archive, "aclImdb/train/unsup/0_0.txt", "no label")
        add(archive, "aclImdb/README", "not a review")
    return tmp_path


def add(archive: tarfile.TarFile, name: str, text: str) -> None:
    raw = text.encode()
    member = tarfile.TarInfo(name)
    member.size = len(raw)
    archive.addfile(member, io.BytesIO(raw))


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    raw = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
