"""Readers: small files of every format, broken ones, and the real data where it is."""

from __future__ import annotations

import gzip
import json
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_bln.data import (
    DataError,
    LabelledTexts,
    TokenWindows,
    read_cifar10,
    read_folder,
    read_idx,
    read_imdb,
    read_mnist,
    read_penn_treebank,
    read_table,
    read_tiny_shakespeare,
    words_by_line,
)

from .conftest import write_idx


def test_imdb_archive_and_folder_agree(small_imdb: Path) -> None:
    packed = read_imdb(small_imdb)
    with tarfile.open(small_imdb / "aclImdb_v1.tar.gz") as archive:
        archive.extractall(small_imdb / "unpacked", filter="data")
    assert read_imdb(small_imdb / "unpacked") == packed
    train, test = packed
    assert train.texts[0] == "A awful film, No. 0!<br />"
    assert (train.labels, test.labels) == ([0] * 6 + [1] * 6, [0] * 4 + [1] * 4)
    assert train.classes == ("neg", "pos")


@pytest.mark.parametrize("keep", [0.3, 0.9, 0.99])
def test_truncated_archive_is_named(small_imdb: Path, keep: float) -> None:
    path = small_imdb / "aclImdb_v1.tar.gz"
    raw = path.read_bytes()
    path.write_bytes(raw[: int(keep * len(raw))])
    with pytest.raises(DataError, match=r"aclImdb_v1\.tar\.gz: (truncated or corrupt|holds no)") as caught:
        read_imdb(small_imdb)
    assert "\n" not in str(caught.value)


def test_absent_files_say_how_to_get_them(tmp_path: Path) -> None:
    for read, url in (
        (read_imdb, "ai.stanford.edu"),
        (read_cifar10, "cs.toronto.edu"),
        (read_mnist, "train-images-idx3-ubyte.gz"),
        (read_penn_treebank, "ptb.train.txt"),
        (read_tiny_shakespeare, "tinyshakespeare"),
    ):
        with pytest.raises(DataError, match="--data-dir, data_dir= or BLN_DATA_DIR") as caught:
            read(tmp_path)
        assert url in str(caught.value)


def test_real_imdb(reviews: tuple[LabelledTexts, LabelledTexts]) -> None:
    train, test = reviews
    for split in reviews:
        assert len(split.texts) == 25_000
        assert sum(split.labels) == 12_500
    assert len(set(train.texts) & set(test.texts)) == 123


def test_folder_a_class(tmp_path: Path) -> None:
    for name, text in (("b/2.txt", "four"), ("b/1.txt", "drei"), ("a/1.txt", "ëins")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_folder(tmp_path) == LabelledTexts(["ëins", "drei", "four"], [0, 1, 1], ("a", "b"))
    (tmp_path / "a/1.txt").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(DataError, match=r"a/1\.txt: truncated or corrupt"):
        read_folder(tmp_path)
    with pytest.raises(DataError, match=r"expected CLASS/NAME\.txt"):
        read_folder(tmp_path / "a")
    with pytest.raises(DataError, match="nowhere: no such file"):
        read_folder(tmp_path / "nowhere")


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
def test_tables(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"reviews.{ending}"
    rows = [('good, "really"\nnew line', "pos"), ("bad", "neg")]
    if ending == "jsonl":
        path.write_text("\n".join(json.dumps({"text": text, "label": label}) for text, label in rows) + "\n")
    else:
        comma = "," if ending == "csv" else "\t"
        quoted = [f'"{text.replace(chr(34), chr(34) * 2)}"{comma}{label}' for text, label in rows]
        path.write_text("\n".join([f"text{comma}label", *quoted]) + "\n")
    assert read_table(path) == LabelledTexts([rows[0][0], "bad"], [1, 0], ("neg", "pos"))
    assert read_table(path, classes=("pos", "neg")).labels == [0, 1]
    with pytest.raises(DataError, match="label 'neg' is not among the classes"):
        read_table(path, classes=("pos",))
    with pytest.raises(DataError, match=rf"reviews\.{ending}, line \d: needs 'body' and 'label'"):
        read_table(path, text="body")


def test_broken_rows_are_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text('{"text": "a", "label": 1}\n{"text": "b", "la')
    with pytest.raises(DataError, match=r"broken\.jsonl, line 2: not JSON"):
        read_table(path)
    path.write_text("[1, 2]\n")
    with pytest.raises(DataError, match=r"line 1: expected an object, found list"):
        read_table(path)
    (tmp_path / "broken.csv").write_text('text,label\n"never closed,1\n')
    with pytest.raises(DataError, match=r"broken\.csv, line \d: unexpected end of data"):
        read_table(tmp_path / "broken.csv")
    with pytest.raises(DataError, match=r"ends in '\.xml'"):
        read_table(tmp_path / "reviews.xml")
    (tmp_path / "empty.csv").write_text("text,label\n")
    with pytest.raises(DataError, match="holds no rows"):
        read_table(tmp_path / "empty.csv")


def make_cifar(folder: Path, kind: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (6, 3072), dtype=np.uint8), np.array([0, 9, 3, 4, 5, 1], np.uint8)
    folder.mkdir()
    for name, part in (("data_batch_1", slice(0, 2)), ("data_batch_2", slice(2, 4)), ("test_batch", slice(4, 6))):
        if kind == "bin":
            (folder / f"{name}.bin").write_bytes(np.hstack([labels[part, None], pixels[part]]).tobytes())
        else:
            (folder / name).write_bytes(pickle.dumps({b"data": pixels[part], b"labels": labels[part].tolist()}, 2))
    return pixels.reshape(-1, 3, 32, 32), labels


@pytest.mark.parametrize("kind", ["bin", "py"])
def test_cifar10_batches(tmp_path: Path, kind: str) -> None:
    pixels, labels = make_cifar(tmp_path / f"cifar-10-batches-{kind}", kind)
    train, test = read_cifar10(tmp_path)
    np.testing.assert_array_equal(torch.cat([train.pixels, test.pixels]).numpy(), pixels)
    np.testing.assert_array_equal(torch.cat([train.labels, test.labels]).numpy(), labels)
    assert torch.equal(read_cifar10(tmp_path / f"cifar-10-batches-{kind}")[0].pixels, train.pixels)


@pytest.mark.parametrize("kind", ["bin", "py"])
def test_broken_cifar10_is_named(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / f"cifar-10-batches-{kind}"
    make_cifar(folder, kind)
    path = folder / ("data_batch_2.bin" if kind == "bin" else "data_batch_2")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=rf"{path.name}: truncated or corrupt") as caught:
        read_cifar10(tmp_path)
    assert "\n" not in str(caught.value)
    (folder / path.name.replace("data_batch_2", "test_batch")).unlink()
    path.unlink()
    with pytest.raises(DataError, match="test_batch"):
        read_cifar10(tmp_path)


class _Evil:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return print, ("code in a data file ran",)


def test_python_batches_run_no_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    make_cifar(folder, "py")
    (folder / "test_batch").write_bytes(pickle.dumps({b"data": _Evil(), b"labels": [1]}, 2))
    with pytest.raises(DataError, match=r"test_batch: truncated or corrupt \(asks for \w+\.print\)"):
        read_cifar10(tmp_path)
    assert capsys.readouterr().out == ""


def test_binary_labels_are_checked(tmp_path: Path) -> None:
    make_cifar(tmp_path / "cifar-10-batches-bin", "bin")
    path = tmp_path / "cifar-10-batches-bin" / "test_batch.bin"
    path.write_bytes(b"\x63" + path.read_bytes()[1:])
    with pytest.raises(DataError, match="label 99, classes are 0 to 9"):
        read_cifar10(tmp_path)


def test_real_cifar10(real_data: Path) -> None:
    train, test = read_cifar10(real_data)
    assert train.pixels.shape == test.pixels.shape == (10_000, 3, 32, 32)
    assert test.labels.bincount().tolist() == [1_000] * 10


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_idx(tmp_path: Path, ending: str) -> None:
    array = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    path = tmp_path / f"images-idx3-ubyte{ending}"
    write_idx(path, array)
    np.testing.assert_array_equal(read_idx(path).numpy(), array)
    raw = path.read_bytes()
    for broken in (raw[:-3], raw[:3], b"", b"\x00\x00\x0d\x01" + raw[4:]):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=r"images-idx3-ubyte.*truncated or corrupt"):
            read_idx(path)


def test_mnist_counts_must_agree(tmp_path: Path) -> None:
    for name, shape in (
        ("train-images-idx3-ubyte.gz", (3, 28, 28)),
        ("train-labels-idx1-ubyte", (2,)),
        ("t10k-images-idx3-ubyte", (1, 28, 28)),
        ("t10k-labels-idx1-ubyte.gz", (1,)),
    ):
        write_idx(tmp_path / name, np.zeros(shape))
    with pytest.raises(DataError, match="3 MNIST images but 2 labels"):
        read_mnist(tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(3))
    assert read_mnist(tmp_path)[0].pixels.shape == (3, 1, 28, 28)


def test_real_mnist(real_data: Path) -> None:
    train, test = read_mnist(real_data)
    assert (len(train.labels), len(test.labels)) == (60_000, 10_000)
    assert train.labels[:5].tolist() == [5, 0, 4, 1, 9]


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
