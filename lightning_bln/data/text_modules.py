"""Lightning data modules over texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_bln.data.batching import LengthBuckets, pad_batch, pad_to_length, seeded_split, train_validation_split
from lightning_bln.data.data_module import DataModule
from lightning_bln.data.files import DataError, PathLike, read_text
from lightning_bln.data.language import TokenWindows, read_penn_treebank, read_tiny_shakespeare, words_by_line
from lightning_bln.data.reviews import LabelledTexts, read_folder, read_imdb, read_table
from lightning_bln.data.text import PAD, UNKNOWN, TextPipeline, Tokenizer, Vocabulary, build_vocabulary, get_tokenizer


class _Texts(Dataset[tuple[Tensor, int]]):
    def __init__(self, tokens: list[Tensor], labels: list[int]) -> None:
        self.tokens, self.labels = tokens, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.tokens[index], self.labels[index]


class TextData(DataModule):
    """Labelled texts from one folder per class, CSV, TSV or JSON lines.

    Batches are tokens ``(B, T)``, lengths ``(B,)`` and labels ``(B,)``, with samples of similar length together; with
    ``fixed_length`` they are tokens ``(B, fixed_length)``, padded or cut at the front, and labels ``(B,)``. Validation
    and test samples come in a seeded random order, never class by class: in batches of one class, the statistics of
    the current batch would give the label away.

    Args:
        train: A file that ends in ``.csv``, ``.tsv``, ``.jsonl`` or ``.ndjson``, or a folder with a folder per class.
        test: The same for test data, if there is any.
        batch_size: Samples per batch.
        validation: Size of the validation part of the training data, a count or a fraction.
        tokenizer: A name for :func:`~lightning_bln.data.get_tokenizer`, or a callable from a string to tokens.
        vocabulary: A callable from tokens to ids, such as a ``torchtext.vocab.Vocab``; by default built from the
            training texts.
        max_tokens: Largest size of the vocabulary, if it is built.
        min_freq: Tokens rarer than this are not in the vocabulary, if it is built.
        max_length: Longer texts keep their last ``max_length`` tokens.
        fixed_length: Length to which every text is padded or cut.
        text: Column or key of the text.
        label: Column or key of the label.
        num_workers: Number of loader processes.
        seed: Seed of the split and of the order.
    """

    def __init__(
        self,
        train: PathLike,
        test: PathLike | None = None,
        *,
        batch_size: int = 32,
        validation: int | float = 0.1,
        tokenizer: str | Tokenizer = "basic_english",
        vocabulary: Vocabulary | None = None,
        max_tokens: int | None = 20_000,
        min_freq: int = 1,
        max_length: int | None = 400,
        fixed_length: int | None = None,
        text: str = "text",
        label: str = "label",
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        self.train_path, self.test_path = train, test
        self.validation, self.tokenizer = validation, tokenizer
        self.vocabulary, self.max_tokens, self.min_freq = vocabulary, max_tokens, min_freq
        self.max_length, self.fixed_length = max_length, fixed_length
        self.text, self.label = text, label
        self.classes: tuple[str, ...] = ()
        self.pipeline: TextPipeline | None = None

    def read(self) -> tuple[LabelledTexts, LabelledTexts | None]:
        """Return the training texts and, if there are any, the test texts."""

        def one(path: PathLike, classes: tuple[str, ...] | None) -> LabelledTexts:
            if Path(path).is_dir():
                return read_folder(path)
            return read_table(path, text=self.text, label=self.label, classes=classes)

        train = one(self.train_path, None)
        return train, None if self.test_path is None else one(self.test_path, train.classes)

    def setup(self, stage: str | None = None) -> None:
        if self.parts:
            return
        train, test = self.read()
        if test is not None and test.classes != train.classes:
            raise DataError(f"{self.test_path}: classes {test.classes}, but training has {train.classes}")
        tokenize = get_tokenizer(self.tokenizer)
        tokens = [tokenize(text) for text in train.texts]
        split = train_validation_split(len(tokens), self.validation, self.seed)
        train_index, validation_index = (index.tolist() for index in split)
        if self.vocabulary is None:
            # From the training part alone: validation texts must be as unknown to the model as test texts.
            self.vocabulary = build_vocabulary(
                (tokens[index] for index in train_index), min_freq=self.min_freq, max_tokens=self.max_tokens
            )
        self.pipeline = TextPipeline(tokenize, self.vocabulary)
        self.classes = train.classes
        self.parts["train"] = self._dataset([tokens[i] for i in train_index], [train.labels[i] for i in train_index])
        self.parts["validation"] = self._dataset(
            [tokens[i] for i in validation_index], [train.labels[i] for i in validation_index]
        )
        if test is not None:
            (order,) = seeded_split(len(test.texts), [len(test.texts)], self.seed)
            self.parts["test"] = self._dataset(
                [tokenize(test.texts[i]) for i in order.tolist()], [test.labels[i] for i in order.tolist()]
            )

    @property
    def padding(self) -> int:
        """The id that pads shorter texts."""
        assert self.vocabulary is not None
        has_padding = PAD in self.vocabulary
        return self.vocabulary[PAD] if has_padding else 0

    def _dataset(self, texts: list[list[str]], labels: list[int]) -> Dataset[Any]:
        assert self.vocabulary is not None
        ids = [self.vocabulary(tokens) for tokens in texts]
        if self.fixed_length is not None:
            return TensorDataset(pad_to_length(ids, self.fixed_length, self.padding), torch.tensor(labels))
        # An empty text becomes one step of padding: torch cannot pack a sequence of length 0.
        kept = [sequence[-self.max_length :] if self.max_length else sequence for sequence in ids]
        return _Texts([torch.tensor(sequence or [self.padding], dtype=torch.long) for sequence in kept], labels)

    def _loader(self, part: str) -> DataLoader[Any]:
        dataset = self.parts.get(part)
        if not isinstance(dataset, _Texts):
            return super()._loader(part)
        lengths = [len(tokens) for tokens in dataset.tokens]
        batches = LengthBuckets(lengths, self.batch_size, shuffle=part == "train", seed=self.seed)
        return self._make_loader(part, batch_sampler=batches, collate_fn=_Padding(self.padding))


class _Padding:
    """Collates with :func:`~lightning_bln.data.pad_batch`; a class, since a lambda cannot be sent to loader workers."""

    def __init__(self, padding: int) -> None:
        self.padding = padding

    def __call__(self, samples: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor, Tensor]:
        return pad_batch(samples, self.padding)


class IMDBData(TextData):
    """The IMDB reviews, from ``aclImdb_v1.tar.gz`` or the folder ``aclImdb``.

    With ``tokenizer="keras"`` and ``fixed_length=80`` its batches fit :class:`~lightning_bln.models.PaperIMDB`.

    Args:
        data_dir: The folder that holds either; by default ``BLN_DATA_DIR`` or ``./data``.
        download: Whether to download the archive if neither exists.
        **options: See :class:`TextData`.
    """

    def __init__(
        self,
        data_dir: PathLike | None = None,
        *,
        download: bool = False,
        batch_size: int = 32,
        validation: int | float = 5_000,
        tokenizer: str | Tokenizer = "basic_english",
        vocabulary: Vocabulary | None = None,
        max_tokens: int | None = 20_000,
        min_freq: int = 1,
        max_length: int | None = 400,
        fixed_length: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            data_dir or "",
            batch_size=batch_size,
            validation=validation,
            tokenizer=tokenizer,
            vocabulary=vocabulary,
            max_tokens=max_tokens,
            min_freq=min_freq,
            max_length=max_length,
            fixed_length=fixed_length,
            num_workers=num_workers,
            seed=seed,
        )
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
        super().__init__(batch_size, num_workers, seed=0)
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
