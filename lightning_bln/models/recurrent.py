"""A sequence classifier and a language model on normalised recurrent layers."""

from __future__ import annotations

from typing import Any

import torch
from lightning import LightningModule
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_bln.models.paper.modules import Classifier
from lightning_bln.recurrent import Recurrent


class RecurrentNetwork(nn.Module):
    """Sequences to logits: an embedding for token ids, a recurrent layer and a linear layer on its last state.

    Args:
        input_size: Features per step, or with ``embedding`` the number of token ids.
        classes: Number of classes.
        hidden_size: Features of the state.
        embedding: Size of the embedding; ``None`` if the steps are vectors.
        cell: A name in :data:`lightning_bln.cells.registry`.
        dropout: Dropout before the linear layer.
        **options: See :class:`~lightning_bln.Recurrent`.

    Example:
        >>> RecurrentNetwork(10, 3, 8, embedding=4)(torch.zeros(2, 5, dtype=torch.long), torch.tensor([5, 3])).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        input_size: int,
        classes: int,
        hidden_size: int = 128,
        *,
        embedding: int | None = None,
        cell: str = "lstm",
        dropout: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__()
        self.embedding = None if embedding is None else nn.Embedding(input_size, embedding)
        self.recurrent = Recurrent(cell, embedding or input_size, hidden_size, batch_first=True, **options)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(hidden_size * self.recurrent.num_directions, classes)

    def forward(self, inputs: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return logits ``(B, classes)``.

        Args:
            inputs: Token ids ``(B, T)``, or vectors ``(B, T, input_size)``.
            lengths: Length of each sequence without its padding, ``(B,)``; by default ``T``.
        """
        x: Any = inputs if self.embedding is None else self.embedding(inputs)
        if lengths is not None:
            x = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        _, state = self.recurrent(x)
        last = state[0] if isinstance(state, tuple) else state
        directions = 1 + self.recurrent.bidirectional  # torch's layers have it, too
        ends = last[-directions:].transpose(0, 1).flatten(1)
        return self.linear(self.dropout(ends))


class ClippedAdam(LightningModule):
    """Adam at ``self.learning_rate``, with gradients clipped to the norm ``self.max_norm`` unless the Trainer clips."""

    learning_rate: float
    max_norm: float | None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        if gradient_clip_val is None and self.max_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters(), self.max_norm)
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)


class SequenceClassifier(ClippedAdam, Classifier):
    """A sequence classifier on a recurrent layer with norms inside the cell; logs loss and accuracy.

    Batches are ``(inputs, labels)`` or ``(inputs, lengths, labels)``, as
    :class:`~lightning_bln.data.TextData` and :class:`~lightning_bln.data.MNISTData` give them.

    Args:
        input_size: Features per step, or with ``embedding`` the number of token ids.
        classes: Number of classes.
        hidden_size: Features of the state.
        embedding: Size of the embedding; ``None`` if the steps are vectors.
        cell: A name in :data:`lightning_bln.cells.registry`.
        num_layers: Number of stacked layers.
        bidirectional: Whether a second set of cells reads the sequence backwards.
        dropout: Dropout before the linear layer.
        norm: ``"bln"``, ``"layer"``, ``"batch"`` or ``None``.
        scale: Initial value of the norm's weight; ``None`` for the norm's own default.
        learning_rate: Adam's learning rate.
        max_norm: Norm to which gradients are clipped; ``None`` for no clipping.
    """

    def __init__(
        self,
        input_size: int,
        classes: int,
        hidden_size: int = 128,
        embedding: int | None = None,
        cell: str = "lstm",
        num_layers: int = 1,
        bidirectional: bool = False,
        dropout: float = 0.0,
        norm: str | None = "bln",
        scale: float | None = None,
        learning_rate: float = 1e-3,
        max_norm: float | None = 1.0,
    ) -> None:
        network = RecurrentNetwork(
            input_size,
            classes,
            hidden_size,
            embedding=embedding,
            cell=cell,
            dropout=dropout,
            num_layers=num_layers,
            bidirectional=bidirectional,
            norm=norm,
            scale=scale,
        )
        metrics = MetricCollection({"acc": MulticlassAccuracy(classes, average="micro")})
        super().__init__(network, metrics, learning_rate)
        self.max_norm = max_norm
        self.save_hyperparameters()

    def forward(self, inputs: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return logits ``(B, classes)``; see :class:`RecurrentNetwork`."""
        return self.network(inputs, lengths)


class LanguageModel(ClippedAdam):
    """A language model on a recurrent layer with norms inside the cell, which carries its state between batches.

    Logs ``{train,val,test}_loss`` in nats per token, and ``_perplexity``. In the batches of
    :class:`~lightning_bln.data.LanguageData` each row continues that of the batch before, so the state is kept, without
    its gradient, until the epoch ends.

    Args:
        vocabulary: Number of token ids.
        hidden_size: Features of the state.
        embedding: Size of the embedding.
        cell: A name in :data:`lightning_bln.cells.registry`.
        num_layers: Number of stacked layers.
        dropout: Dropout on the embedding, between layers and before the output.
        norm: ``"bln"``, ``"layer"``, ``"batch"`` or ``None``.
        scale: Initial value of the norm's weight; ``None`` for the norm's own default.
        learning_rate: Adam's learning rate.
        max_norm: Norm to which gradients are clipped; ``None`` for no clipping.
        time_statistics: ``"shared"``: one population for all steps, since a text has no first one; ``"separate"``: one
            for each step of a batch.

    Example:
        >>> model = LanguageModel(10, hidden_size=8, embedding=4)
        >>> logits, state = model(torch.zeros(2, 5, dtype=torch.long))
        >>> logits.shape
        torch.Size([2, 5, 10])
    """

    def __init__(
        self,
        vocabulary: int,
        hidden_size: int = 200,
        embedding: int = 200,
        cell: str = "lstm",
        num_layers: int = 1,
        dropout: float = 0.0,
        norm: str | None = "bln",
        scale: float | None = None,
        learning_rate: float = 2e-3,
        max_norm: float | None = 1.0,
        time_statistics: str = "shared",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embedding = nn.Embedding(vocabulary, embedding)
        between = dropout if num_layers > 1 else 0.0
        self.recurrent = Recurrent(
            cell,
            embedding,
            hidden_size,
            num_layers,
            batch_first=True,
            dropout=between,
            norm=norm,
            scale=scale,
            time_statistics=time_statistics,
        )
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(hidden_size, vocabulary)
        self.learning_rate, self.max_norm = learning_rate, max_norm
        self._state: Any = None

    def forward(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Return logits ``(B, T, vocabulary)`` and the state after the last step.

        Args:
            tokens: Token ids ``(B, T)``.
            state: The state before the first step; zeros by default.
        """
        output, state = self.recurrent(self.dropout(self.embedding(tokens)), state)
        return self.linear(self.dropout(output)), state

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._step(batch, batch_idx, "train")

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._step(batch, batch_idx, "val")

    def test_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._step(batch, batch_idx, "test")

    def on_train_epoch_start(self) -> None:
        self._state = None

    def _step(self, batch: Any, batch_idx: int, stage: str) -> Tensor:
        inputs, targets = batch
        if stage == "train":
            logits, state = self(inputs, self._carried(self._state, inputs))
            self._state = apply_to_collection(state, Tensor, Tensor.detach)
        else:
            # A state of its own, since validation may interrupt a training epoch.
            logits, state = self(inputs, None if batch_idx == 0 else self._carried(self._held_out, inputs))
            self._held_out = apply_to_collection(state, Tensor, Tensor.detach)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        self.log(f"{stage}_loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=targets.numel())
        return loss

    def on_train_epoch_end(self) -> None:
        self._log_perplexity("train")

    def on_validation_epoch_end(self) -> None:
        self._log_perplexity("val")

    def on_test_epoch_end(self) -> None:
        self._log_perplexity("test")

    _held_out: Any = None

    def _log_perplexity(self, stage: str) -> None:
        loss = self.trainer.callback_metrics.get(f"{stage}_loss")
        if loss is not None:
            self.log(f"{stage}_perplexity", torch.exp(loss), prog_bar=True)

    def _carried(self, state: Any, inputs: Tensor) -> Any:
        """The state, or None if the batch has another number of rows, which a sweep may repeat for several modes."""
        first = state[0] if isinstance(state, tuple) else state
        return state if first is not None and first.shape[1] == len(inputs) else None
