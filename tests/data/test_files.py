"""Downloads over a loopback server, and errors about missing files."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lightning_bln.data import (
    DataError,
    Remote,
    data_dir,
    download,
    read_cifar10,
    read_imdb,
    read_mnist,
    read_penn_treebank,
    read_tiny_shakespeare,
    reviews,
)

PAYLOAD = bytes(range(256)) * 5_000


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    served = tmp_path / "served"
    served.mkdir()
    (served / "file.bin").write_bytes(PAYLOAD)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(served)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("algorithm", ["md5", "sha256"])
def test_download_checks_and_keeps(address: str, tmp_path: Path, algorithm: str) -> None:
    remote = Remote(f"{address}file.bin", f"{algorithm}:{hashlib.new(algorithm, PAYLOAD).hexdigest()}")
    target = download(remote, tmp_path / "new" / "file.bin")
    assert target.read_bytes() == PAYLOAD
    # There already and right: not fetched again, so an address that answers nothing does no harm.
    assert download(Remote("http://127.0.0.1:9/", remote.checksum), target) == target


def test_wrong_checksum_leaves_nothing(address: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"file\.bin: what came does not match md5:0000"):
        download(Remote(f"{address}file.bin", "md5:0000"), tmp_path / "target.bin")
    assert [path.name for path in tmp_path.iterdir()] == ["served"]


def test_a_damaged_file_is_fetched_again(address: str, tmp_path: Path) -> None:
    target = tmp_path / "file.bin"
    target.write_bytes(PAYLOAD[:100])
    download(Remote(f"{address}file.bin", f"md5:{hashlib.md5(PAYLOAD).hexdigest()}"), target)
    assert target.read_bytes() == PAYLOAD


def test_missing_address_names_it(address: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.bin: cannot be fetched .*404"):
        download(Remote(f"{address}nothing.bin", "md5:0"), tmp_path / "nothing.bin")


def test_reader_fetches_what_is_absent(
    address: str, tmp_path: Path, small_imdb: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = small_imdb / "aclImdb_v1.tar.gz"
    archive.rename(small_imdb / "served" / archive.name)
    digest = hashlib.md5((small_imdb / "served" / archive.name).read_bytes()).hexdigest()
    monkeypatch.setattr(reviews, "IMDB", Remote(f"{address}{archive.name}", f"md5:{digest}"))
    train, test = reviews.read_imdb(tmp_path / "fetched", fetch=True)
    assert (len(train.texts), len(test.texts)) == (12, 8)


def test_data_dir_prefers_the_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLN_DATA_DIR", "/from/variable")
    assert data_dir() == Path("/from/variable")
    assert data_dir("/from/argument") == Path("/from/argument")
    monkeypatch.delenv("BLN_DATA_DIR")
    assert data_dir() == Path("data")


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
