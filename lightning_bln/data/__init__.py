"""Data modules and readers for images, labelled texts and language modelling."""

from lightning_bln.data.batching import LengthBuckets, pad_batch, pad_to_length, seeded_split
from lightning_bln.data.files import DataError, Remote, data_dir, download
from lightning_bln.data.image_modules import CIFAR10Data, MNISTData, standardise
from lightning_bln.data.images import Images, read_cifar10, read_idx, read_mnist
from lightning_bln.data.language import TokenWindows, read_penn_treebank, read_tiny_shakespeare, words_by_line
from lightning_bln.data.reviews import LabelledTexts, read_folder, read_imdb, read_table
from lightning_bln.data.text import (
    TextPipeline,
    Vocabulary,
    WordVocabulary,
    backends,
    build_vocabulary,
    get_tokenizer,
)
from lightning_bln.data.text_modules import IMDBData, LanguageData, TextData

__all__ = [
    "CIFAR10Data",
    "DataError",
    "IMDBData",
    "Images",
    "LabelledTexts",
    "LanguageData",
    "LengthBuckets",
    "MNISTData",
    "Remote",
    "TextData",
    "TextPipeline",
    "TokenWindows",
    "Vocabulary",
    "WordVocabulary",
    "backends",
    "build_vocabulary",
    "data_dir",
    "download",
    "get_tokenizer",
    "pad_batch",
    "pad_to_length",
    "read_cifar10",
    "read_folder",
    "read_idx",
    "read_imdb",
    "read_mnist",
    "read_penn_treebank",
    "read_table",
    "read_tiny_shakespeare",
    "seeded_split",
    "standardise",
    "words_by_line",
]
