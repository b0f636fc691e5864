"""Lightning data modules over texts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_bln.data.batching import LengthBuckets, pad_batch, pad_to_length, seeded_split, train_validation_split
from lightning_bln.data.data_module import DataModule
from lightning_bln.data.files import DataError, PathLike, read_text
from lightning_bln.data.language import TokenWindows, read_penn_treebank, read_tiny_shakespeare, words_by_line
from lightning_bln.data.reviews import LabelledTexts, read_folder, read_imdb, read_table
from lightning_bln.data.text import PAD, UNKNOWN, TextPipeline, Tokenizer, Vocabulary, build_vocabulary, get_tokenizer


class LabelledTextData(DataModule):
    """Labelled texts that a subclass reads; see :class:`TextData` for the batches.

    Args:
        batch_size: Samples per batch.
        validation: Size of the validation part of the training data, a count or a fraction.
        tokenizer: A name for :func:`~lightning_bln.data.get_tokenizer`, or a callable from a string to tokens.
        vocabulary: A callable from tokens to ids, such as a ``torchtext.vocab.Vocab``; by default built from the
            training texts.
        max_tokens: Largest size of the vocabulary, if it is built.
        min_freq: Tokens rarer than this are not in the vocabulary, if it is built.
        max_length: Longer texts keep their last ``max_length`` tokens.
        fixed_length: Length to which every text is padded or cut.
        num_workers: Number of loader processes.
        seed: Seed of the split and of the order.
    """

    def __init__(
        self,
        *,
        batch_size: int = 32,
        validation: int | float = 0.1,
        tokenizer: str | Tokenizer = "basic_english",
        vocabulary: Vocabulary | None = None,
        max_tokens: int | None = 20_000,
        min_freq: int = 1,
        max_length: int | None = 400,
        fixed_length: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        self.validation, self.tokenizer = validation, tokenizer
        self.vocabulary, self.max_tokens, self.min_freq = vocabulary, max_tokens, min_freq
        self.max_length, self.fixed_length = max_length, fixed_length
        self.classes: tuple[str, ...] = ()
        self.pipeline: TextPipeline | None = None

    def read(self) -> tuple[LabelledTexts, LabelledTexts | None]:
        """Return the training texts and, if there are any, the test texts."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        if self.parts:
            return
        train, test = self.read()
        tokenize = get_tokenizer(self.tokenizer)
        tokens = [tokenize(text) for text in train.texts]
        train_index, validation_index = train_validation_split(len(tokens), self.validation, self.seed)
        if self.vocabulary is None:
            # From the training part alone: validation texts must be as unknown to the model as test texts.
            self.vocabulary = build_vocabulary(
                (tokens[index] for index in train_index.tolist()), min_freq=self.min_freq, max_tokens=self.max_tokens
            )
        self.pipeline = TextPipeline(tokenize, self.vocabulary)
        self.classes = train.classes
        self.parts["train"] = self._dataset(tokens, train.labels, train_index)
        self.parts["validation"] = self._dataset(tokens, train.labels, validation_index)
        if test is not None:
            (order,) = seeded_split(len(test.texts), [len(test.texts)], self.seed)
            self.parts["test"] = self._dataset([tokenize(text) for text in test.texts], test.labels, order)

    @property
    def padding(self) -> int:
        """The id that pads shorter texts."""
        assert self.vocabulary is not None
        has_padding = PAD in self.vocabulary
        return self.vocabulary[PAD] if has_padding else 0

    def _dataset(
        self, texts: list[list[str]], labels: list[int], index: Tensor
    ) -> TensorDataset | list[tuple[Tensor, int]]:
        """The texts and labels at ``index``."""
        assert self.vocabulary is not None
        ids = [self.vocabulary(texts[i]) for i in index.tolist()]
        if self.fixed_length is not None:
            return TensorDataset(pad_to_length(ids, self.fixed_length, self.padding), torch.tensor(labels)[index])
        # An empty text becomes one step of padding: torch cannot pack a sequence of length 0.
        kept = [sequence[-self.max_length :] if self.max_length else sequence for sequence in ids]
        tokens = [torch.tensor(sequence or [self.padding], dtype=torch.long) for sequence in kept]
        return list(zip(tokens, (labels[i] for i in index.tolist()), strict=True))

    def _loader(self, part: str) -> DataLoader[Any]:
        if self.fixed_length is not None or part not in self.parts:
            return super()._loader(part)
        lengths = [len(tokens) for tokens, _ in self.parts[part]]
        batches = LengthBuckets(lengths, self.batch_size, shuffle=part == "train", seed=self.seed)
        # partial, since a lambda cannot be sent to loader workers
        return self._make_loader(part, batch_sampler=batches, collate_fn=partial(pad_batch, padding=self.padding))


class TextData(LabelledTextData):
    """Labelled texts from one folder per class, CSV, TSV or JSON lines.

    Batches are tokens ``(B, T)``, lengths ``(B,)`` and labels ``(B,)``, with samples of similar length together; with
    ``fixed_length`` they are tokens ``(B, fixed_length)``, padded or cut at the front, and labels ``(B,)``. Validation
    and test samples come in a seeded random order, never class by class: in batches of one class, the statistics of
    the current batch would give the label away.

    Args:
        train: A file that ends in ``.csv``, ``.tsv``, ``.jsonl`` or ``.ndjson``, or a folder with a folder per class.
        test: The same for test data, if there is any.
        text: Column or key of the text.
        label: Column or key of the label.
        **options: See :class:`LabelledTextData`.
    """

    def __init__(
        self, train: PathLike, test: PathLike | None = None, *, text: str = "text", label: str = "label", **options: Any
    ) -> None:
        super().__init__(**options)
        self.train_path, self.test_path = train, test
        self.text, self.label = text, label

    def read(self) -> tuple[LabelledTexts, LabelledTexts | None]:
        def one(path: PathLike, classes: tuple[str, ...] | None) -> LabelledTexts:
            if Path(path).is_dir():
                return read_folder(path)
            return read_table(path, text=self.text, label=self.label, classes=classes)

        train = one(self.train_path, None)
        if self.test_path is None:
            return train, None
        test = one(self.test_path, train.classes)
        if test.classes != train.classes:
            raise DataError(f"{self.test_path}: classes {test.classes}, but training has {train.classes}")
        return train, test


class IMDBData(LabelledTextData):
    """The IMDB reviews, from ``aclImdb_v1.tar.gz`` or the folder ``aclImdb``.

    With ``tokenizer="keras"`` and ``fixed_length=80`` its batches fit :class:`~lightning_bln.models.PaperIMDB`.

    Args:
        data_dir: The folder that holds either; by default ``BLN_DATA_DIR`` or ``./data``.
        download: Whether to download the archive if neither exists.
        validation: Size of the validation part of the training data, a count or a fraction.
        **options: See :class:`LabelledTextData`.
    """

    def __init__(
        self,
        data_dir: PathLike | None = None,
        *,
        download: bool = False,
        validation: int | float = 5_000,
        **options: Any,
    ) -> None:
        super().__init__(validation=validation, **options)
        self.data_dir, self.download = data_dir, download

    def prepare_data(self) -> None:
        if self.download:
            read_imdb(self.data_dir, fetch=True)

    def read(self) -> tuple[LabelledTexts, LabelledTexts | None]:
        return read_imdb(self.data_dir)


class LanguageData(DataModule):
    """Text for a language model, in batches that continue one another.

    Batches are inputs and targets of shape ``(B, window)``. Row ``r`` of a batch continues row ``r`` of the one before,
    so that a model can carry its hidden state from batch to batch, as :class:`~lightning_bln.models.LanguageModel`
    does. Nothing is shuffled.

    Args:
        source: ``"ptb"`` or ``"tinyshakespeare"``, read from ``data_dir``, or the path of a training text.
        data_dir: The folder of the named texts.
        validation: Path of a validation text, if ``source`` is a path.
        test: Path of a test text, if ``source`` is a path.
        level: ``"word"`` or ``"character"``; Penn Treebank's words count line ends as ``<eos>``.
        batch_size: Rows per batch.
        window: Tokens per row and batch.
        max_tokens: Largest size of the vocabulary.
        download: Whether to download missing files of a named text.
        num_workers: Number of loader processes.
    """

    def __init__(
        self,
        source: PathLike = "ptb",
        data_dir: PathLike | None = None,
        *,
        validation: PathLike | None = None,
        test: PathLike | None = None,
        level: Literal["word", "character"] = "word",
        batch_size: int = 20,
        window: int = 35,
        max_tokens: int | None = None,
        download: bool = False,
        num_workers: int = 0,
    ) -> None:
        if level not in ("word", "character"):
            raise ValueError(f"level={level!r}; use 'word' or 'character'")
        if window < 1:
            raise ValueError(f"window={window}, but a batch is at least 1 token wide")
        super().__init__(batch_size, num_workers)
        self.source, self.data_dir, self.level = source, data_dir, level
        self.validation_path, self.test_path = validation, test
        self.window, self.max_tokens, self.download = window, max_tokens, download
        self.vocabulary: Vocabulary | None = None

    def prepare_data(self) -> None:
        if self.download:
            self._texts(fetch=True)

    def setup(self, stage: str | None = None) -> None:
        if self.parts:
            return
        split: Callable[[str], list[str]] = words_by_line if self.level == "word" else list
        streams = [split(text) for text in self._texts(fetch=False)]
        if self.vocabulary is None:
            self.vocabulary = build_vocabulary(
                streams[:1], max_tokens=self.max_tokens, specials=[UNKNOWN], unknown=UNKNOWN
            )
        for part, stream in zip(("train", "validation", "test"), streams, strict=False):
            self.parts[part] = TokenWindows(self.vocabulary(stream), self.batch_size, self.window)

    def _texts(self, fetch: bool) -> list[str]:
        named = {"ptb": read_penn_treebank, "tinyshakespeare": read_tiny_shakespeare}
        if str(self.source) in named:
            return named[str(self.source)](self.data_dir, fetch=fetch)
        paths = [path for path in (self.source, self.validation_path, self.test_path) if path is not None]
        return [read_text(Path(path)) for path in paths]

    def _loader(self, part: str) -> DataLoader[Any]:
        return self._make_loader(part, batch_size=None, shuffle=False)
