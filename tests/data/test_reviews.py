"""Labelled texts: small files of every format, damaged ones, and the real reviews where they are."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from lightning_bln.data import DataError, LabelledTexts, read_folder, read_imdb, read_table


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
