"""A classifier and a language model on normalised recurrent layers."""

from __future__ import annotations

from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_bln.models.paper.modules import Classifier
from lightning_bln.recurrent import Recurrent


class RecurrentNetwork(nn.Module):
    """Sequences to logits: an embedding where the input is token ids, a recurrent layer, and a linear one on its end.

    Args:
        input_size: features of a step, or with ``embedding`` the number of token ids.
        classes: number of classes.
        hidden_size: units of the state.
        embedding: size of the embedding; ``None`` where steps are vectors already.
        cell: a name in :data:`lightning_bln.cells.registry`.
        dropout: before the linear layer.
        **options: see :class:`~lightning_bln.Recurrent`.

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
        """Return logits ``[batch, classes]``.

        Args:
            inputs: token ids ``[batch, time]``, or vectors ``[batch, time, input_size]``.
            lengths: how many steps of each sequence are data; all without it.
        """
        x: Any = inputs if self.embedding is None else self.embedding(inputs)
        if lengths is not None:
            x = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        _, state = self.recurrent(x)
        last = state[0] if isinstance(state, tuple) else state
        ends = last[-self.recurrent.num_directions :].transpose(0, 1).flatten(1)
        return self.linear(self.dropout(ends))


class SequenceClassifier(Classifier):
    """A classifier of sequences on an in-cell normalised recurrent layer; logs loss and accuracy.

    Batches are ``(inputs, labels)`` or ``(inputs, lengths, labels)``, as
    :class:`~lightning_bln.data.TextData` and :class:`~lightning_bln.data.MNISTData` give them.

    Args:
        input_size: features of a step, or with ``embedding`` the number of token ids.
        classes: number of classes.
        hidden_size: units of the state.
        embedding: size of the embedding; ``None`` where steps are vectors already.
        cell: a name in :data:`lightning_bln.cells.registry`.
        num_layers: layers stacked.
        bidirectional: whether a second set of cells reads backwards.
        dropout: before the linear layer.
        norm: ``"bln"``, ``"layer"``, ``"batch"`` or ``None``.
        scale: what the norm's weight starts at; ``None`` for the norm's own default.
        learning_rate: Adam's.
        max_norm: gradients are clipped to this norm; ``None`` for no clipping.
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
        """Return logits ``[batch, classes]``; see :class:`RecurrentNetwork`."""
        return self.network(inputs, lengths)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        if gradient_clip_val is None and self.max_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters(), self.max_norm)
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)


class LanguageModel(LightningModule):
    """A language model on an in-cell normalised recurrent layer that carries its state from batch to batch.

    Logs ``{train,val,test}_loss`` in nats a token, and ``_perplexity``. Batches are those of
    :class:`~lightning_bln.data.LanguageData`: each row goes on where it stopped, so the state is kept, without its
    gradient, and forgotten at the start of every epoch.

    Args:
        vocabulary: number of token ids.
        hidden_size: units of the state.
        embedding: size of the embedding.
        cell: a name in :data:`lightning_bln.cells.registry`.
        num_layers: layers stacked.
        dropout: on the embedding, between layers and before the output.
        norm: ``"bln"``, ``"layer"``, ``"batch"`` or ``None``.
        scale: what the norm's weight starts at; ``None`` for the norm's own default.
        learning_rate: Adam's.
        max_norm: gradients are clipped to this norm; ``None`` for no clipping.

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
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embedding = nn.Embedding(vocabulary, embedding)
        between = dropout if num_layers > 1 else 0.0
        self.recurrent = Recurrent(
            cell, embedding, hidden_size, num_layers, batch_first=True, dropout=between, norm=norm, scale=scale
        )
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(hidden_size, vocabulary)
        self.learning_rate, self.max_norm = learning_rate, max_norm
        self._state: Any = None

    def forward(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Return logits ``[batch, time, vocabulary]`` and the state after the last step.

        Args:
            tokens: token ids ``[batch, time]``.
            state: the state before the first step; zeros without it.
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
            self._state = _detached(state)
        else:
            # Kept apart: validation may come in the middle of a training epoch.
            logits, state = self(inputs, None if batch_idx == 0 else self._carried(self._held_out, inputs))
            self._held_out = _detached(state)
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
        """The state, unless the batch has another number of rows (a sweep may repeat them, a sanity check may not)."""
        first = state[0] if isinstance(state, tuple) else state
        return state if first is not None and first.shape[1] == len(inputs) else None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        if gradient_clip_val is None and self.max_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters(), self.max_norm)
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)


def _detached(state: Any) -> Any:
    return tuple(part.detach() for part in state) if isinstance(state, tuple) else state.detach()
