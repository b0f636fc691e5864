"""Splits, batches of similar length and padding, shared by the data modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler


def seeded_split(length: int, sizes: Sequence[int | float], seed: int) -> list[Tensor]:
    """Divide ``range(length)`` at random, the same way for the same seed.

    Args:
        length: Number of samples.
        sizes: The size of each part: a count, or a fraction of ``length``. The rest is in no part.
        seed: The split's own seed; the global generator is not touched.

    Returns:
        One tensor of shuffled indices per part; the parts are disjoint.

    Raises:
        ValueError: The parts are larger than the whole, or a size is negative.

    Example:
        >>> [part.tolist() for part in seeded_split(5, [0.4, 3], seed=1)]
        [[0, 4], [2, 3, 1]]
    """
    counts = [round(size * length) if isinstance(size, float) else size for size in sizes]
    if min(counts) < 0 or sum(counts) > length:
        raise ValueError(f"sizes={list(sizes)} ask for {sum(counts)} of {length} samples; ask for {length} at most")
    order = torch.randperm(length, generator=torch.Generator().manual_seed(seed))
    return list(order[: sum(counts)].split(counts))


def train_validation_split(length: int, validation: int | float, seed: int) -> tuple[Tensor, Tensor]:
    """:func:`seeded_split` of all samples into training and validation, given the validation part's size."""
    held_out = round(validation * length) if isinstance(validation, float) else validation
    train, valid = seeded_split(length, [length - held_out, held_out], seed)
    return train, valid


class LengthBuckets(Sampler[list[int]]):
    """Batches of samples of similar length, which need little padding, in a random order.

    Samples are shuffled, cut into windows of ``window`` batches, sorted by length within each window and cut into
    batches, which are shuffled. Lightning calls ``set_epoch``, so that each epoch has an order of its own, also when
    training is resumed.

    Args:
        lengths: The length of every sample.
        batch_size: Samples per batch.
        shuffle: Whether to sort and shuffle; otherwise samples keep their order.
        seed: Seed of the order.
        drop_last: Whether to drop a smaller last batch.
        window: Batches that are sorted together; a larger window means less padding and less randomness.

    Example:
        >>> [sorted(batch) for batch in LengthBuckets([9, 1, 8, 2], 2, shuffle=True, seed=0)]
        [[1, 3], [0, 2]]
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        window: int = 50,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}, but a batch holds at least 1 sample")
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.window = window
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(len(self.lengths), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(len(self.lengths)))
        if not self.shuffle:
            yield from self._cut(order)
            return
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(order), generator=generator).tolist()
        span = self.window * self.batch_size
        batches: list[list[int]] = []
        for start in range(0, len(order), span):
            batches += self._cut(sorted(order[start : start + span], key=self.lengths.__getitem__))
        for index in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[index]

    def _cut(self, order: list[int]) -> list[list[int]]:
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        return batches[:-1] if self.drop_last and batches and len(batches[-1]) < self.batch_size else batches


def pad_batch(samples: Sequence[tuple[Tensor, int]], padding: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Collate sequences of different lengths.

    Args:
        samples: Pairs of token ids ``(T,)`` and a label.
        padding: The id appended to shorter sequences.

    Returns:
        Token ids ``(B, T)`` with the longest sequence's ``T``, lengths ``(B,)`` and labels ``(B,)``.

    Example:
        >>> tokens, lengths, labels = pad_batch([(torch.tensor([5, 6]), 1), (torch.tensor([7]), 0)])
        >>> tokens.tolist(), lengths.tolist(), labels.tolist()
        ([[5, 6], [7, 0]], [2, 1], [1, 0])
    """
    tokens, labels = zip(*samples, strict=True)
    lengths = torch.tensor([len(sequence) for sequence in tokens])
    return pad_sequence(list(tokens), batch_first=True, padding_value=padding), lengths, torch.tensor(labels)


def pad_to_length(sequences: Sequence[Sequence[int]], length: int, padding: int = 0) -> Tensor:
    """Pad or cut sequences at the front, as Keras's ``pad_sequences`` does; the end of every sequence is kept.

    Returns:
        A tensor ``(N, length)``.

    Example:
        >>> pad_to_length([[1, 2, 3], [4]], 2).tolist()
        [[2, 3], [0, 4]]
    """
    result = torch.full((len(sequences), length), padding, dtype=torch.long)
    for row, sequence in zip(result, sequences, strict=True):
        kept = torch.as_tensor(sequence[-length:], dtype=torch.long)
        row[length - len(kept) :] = kept
    return result
