"""Readers of labelled texts: the IMDB archive, one folder per class, CSV and JSON lines."""

from __future__ import annotations

import csv
import gzip
import json
import sys
import tarfile
from pathlib import Path
from typing import NamedTuple

from lightning_bln.data.files import DataError, PathLike, Remote, data_dir, locate, reading

IMDB = Remote("https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz", "md5:7c2ac02c03563afcf9b574c7e56c153a")
IMDB_CLASSES = ("neg", "pos")


class LabelledTexts(NamedTuple):
    """Texts, the class index of each, and the names of the classes."""

    texts: list[str]
    labels: list[int]
    classes: tuple[str, ...]


def read_imdb(directory: PathLike | None = None, *, fetch: bool = False) -> tuple[LabelledTexts, LabelledTexts]:
    """Read the IMDB reviews (Maas et al. 2011), from ``aclImdb_v1.tar.gz`` or the folder ``aclImdb`` it unpacks to.

    Args:
        directory: The folder that holds either; see :func:`lightning_bln.data.data_dir`.
        fetch: Whether to download the archive if neither exists.

    Returns:
        The training and the test reviews, ordered by class and review number; unlabelled reviews are left out.

    Raises:
        DataError: Neither exists, or it is damaged.
    """
    root = data_dir(directory)
    archive = "aclImdb_v1.tar.gz"
    path = locate(root, ("aclImdb", archive), "IMDB reviews", IMDB, archive if fetch else None, " (80 MB)")
    found = _review_folder(path) if path.is_dir() else _review_archive(path)
    splits = []
    for split in ("train", "test"):
        rows = sorted((label, number, text) for part, label, number, text in found if part == split)
        labels = [label for label, _, _ in rows]
        if set(labels) != {0, 1}:
            raise DataError(f"{path}: holds no aclImdb/{split}/pos and aclImdb/{split}/neg reviews; fetch it again")
        splits.append(LabelledTexts([text for _, _, text in rows], labels, IMDB_CLASSES))
    return splits[0], splits[1]


def read_folder(directory: PathLike, pattern: str = "*.txt") -> LabelledTexts:
    """Read texts from one folder per class and one file per text, classes and files ordered by name.

    Raises:
        DataError: No folder holds a file that matches, or a file is not UTF-8.
    """
    root = Path(directory)
    with reading(root):
        folders = sorted(folder for folder in root.iterdir() if folder.is_dir() and any(folder.glob(pattern)))
    if not folders:
        raise DataError(f"{root}: no folder in it holds a file that matches {pattern}; expected CLASS/NAME.txt")
    texts, labels = [], []
    for label, folder in enumerate(folders):
        for path in sorted(folder.glob(pattern)):
            with reading(path):
                texts.append(path.read_text(encoding="utf-8"))
            labels.append(label)
    return LabelledTexts(texts, labels, tuple(folder.name for folder in folders))


def read_table(
    path: PathLike,
    *,
    text: str = "text",
    label: str = "label",
    classes: tuple[str, ...] | None = None,
) -> LabelledTexts:
    """Read labelled texts from CSV with a header, TSV or JSON lines, by the file's ending.

    Args:
        path: A file that ends in ``.csv``, ``.tsv``, ``.jsonl`` or ``.ndjson``.
        text: The column, or key, of the text.
        label: The column, or key, of the label; any string or number.
        classes: The class names in order of index; by default those found, sorted.

    Raises:
        DataError: A row is malformed (the message gives its line), or has a label that is not in ``classes``.
    """
    path = Path(path)
    readers = {".csv": _csv_rows, ".tsv": _csv_rows, ".jsonl": _json_rows, ".ndjson": _json_rows}
    if path.suffix not in readers:
        raise DataError(f"{path}: ends in {path.suffix!r}; the readers know {', '.join(readers)}")
    texts, names = [], []
    with reading(path):
        for line, row in readers[path.suffix](path):
            if row.get(text) is None or row.get(label) is None:
                raise DataError(f"{path}, line {line}: needs {text!r} and {label!r}, has {sorted(map(str, row))}")
            texts.append(str(row[text]))
            names.append(str(row[label]))
    if not texts:
        raise DataError(f"{path}: holds no rows")
    order = classes or tuple(sorted(set(names)))
    index = {name: number for number, name in enumerate(order)}
    if unknown := sorted(set(names) - set(order)):
        raise DataError(f"{path}: label {unknown[0]!r} is not among the classes {order}")
    return LabelledTexts(texts, [index[name] for name in names], order)


def _csv_rows(path: Path) -> list[tuple[int, dict[str, object]]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with path.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        try:
            return [(reader.line_num, dict(row)) for row in reader]
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: {error}") from error


def _json_rows(path: Path) -> list[tuple[int, dict[str, object]]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error.msg})") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: expected an object, found {type(row).__name__}")
        rows.append((number, row))
    return rows


def _place(name: str) -> tuple[str, int, int] | None:
    """Split, class index and number of a path like ``aclImdb/train/pos/12_8.txt``; None for other files."""
    parts = name.split("/")[-3:]
    if len(parts) < 3 or parts[0] not in ("train", "test") or parts[1] not in IMDB_CLASSES:
        return None
    number = parts[2].partition("_")[0]
    return (parts[0], IMDB_CLASSES.index(parts[1]), int(number)) if number.isdigit() else None


def _review_archive(path: Path) -> list[tuple[str, int, int, str]]:
    rows = []
    with reading(path), path.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        # gzip notices a truncated file, which tarfile may not; a stream, since seeking would decompress it anew.
        with gzip.open(raw) if packed else raw as source, tarfile.open(fileobj=source, mode="r|") as archive:
            for member in archive:
                if member.isfile() and (place := _place(member.name)) and (stream := archive.extractfile(member)):
                    rows.append((*place, stream.read().decode("utf-8")))
            while source.read(1 << 20):
                pass
    return rows


def _review_folder(path: Path) -> list[tuple[str, int, int, str]]:
    rows = []
    for file in path.glob("*/*/*.txt"):
        if place := _place(file.as_posix()):
            with reading(file):
                rows.append((*place, file.read_text(encoding="utf-8")))
    return rows
