"""The paper's two experiments as LightningModules."""

from __future__ import annotations

from typing import Any, cast

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryAccuracy, MulticlassAccuracy

from lightning_bln.models.paper.keras import KerasAdam
from lightning_bln.models.paper.networks import PaperCNN, PaperLSTM

AUTHORS_THRESHOLD = float(torch.sigmoid(torch.tensor(0.5)))
"""Probability above which the authors' Keras metric counts class 1: it compared logits, not probabilities, with 0.5."""


class Classifier(LightningModule):
    """Base class of the classifiers: one step for training, validation and test, which logs loss and accuracies.

    Args:
        network: Module from inputs to logits.
        metrics: Metrics of the :meth:`predictions` and the labels.
        learning_rate: Adam's learning rate.
        is_binary: Whether the network gives one logit per sample instead of one per class.
    """

    def __init__(
        self, network: nn.Module, metrics: MetricCollection, learning_rate: float, *, is_binary: bool = False
    ) -> None:
        super().__init__()
        self.is_binary = is_binary
        self.network = network
        self.learning_rate = learning_rate
        self.metrics = nn.ModuleDict(
            {f"{stage}_metrics": metrics.clone(f"{stage}_") for stage in ("train", "val", "test")}
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits."""
        return self.network(inputs)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss of a batch."""
        return nn.functional.cross_entropy(logits, labels)

    def predictions(self, logits: Tensor) -> Tensor:
        """Return the predictions that the metrics take."""
        return logits

    def settle(self) -> None:
        """Bring all weights up to the last step, if the optimizer defers updates."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._step(batch, "train")

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._step(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._step(batch, "test")

    def _step(self, batch: Any, stage: str) -> Tensor:
        *inputs, labels = batch
        logits = self(*inputs)
        loss = self.loss(logits, labels)
        metrics = cast(MetricCollection, self.metrics[f"{stage}_metrics"])
        metrics.update(self.predictions(logits.detach()), labels)
        self.log(f"{stage}_loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(labels))
        self.log_dict(metrics, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(labels))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return KerasAdam(self.parameters(), lr=self.learning_rate, eps=1e-8)


class PaperIMDB(Classifier):
    """The paper's sentiment experiment: :class:`~lightning_bln.models.PaperLSTM`, Adam at 0.003, sigmoid cross-entropy.

    Logs ``{train,val,test}_loss``, ``_acc`` (logit above 0) and ``_acc_authors`` (logit above 0.5, which is what the
    authors' Keras metric counted).

    Args:
        norm: ``"bln"``, ``"batch"``, ``"layer"`` or ``"layer-scaled"``, see :func:`~lightning_bln.models.paper_norm`.
        vocabulary: Number of token ids.
        embedding: Size of the embedding.
        hidden: State size of the first LSTM.
        dropout: Dropout of the LSTMs' inputs.
        recurrent_dropout: Dropout of the LSTMs' hidden states.
        population: ``"paper"`` or ``"pooled"``.
        learning_rate: Adam's learning rate.
        sparse: Whether the embedding has sparse gradients; optimizers other than
            :class:`~lightning_bln.models.KerasAdam` need ``False``.
    """

    def __init__(
        self,
        norm: str = "bln",
        vocabulary: int = 20_000,
        embedding: int = 512,
        hidden: int = 128,
        dropout: float = 0.2,
        recurrent_dropout: float = 0.2,
        population: str = "paper",
        learning_rate: float = 0.003,
        sparse: bool = True,
    ) -> None:
        network = PaperLSTM(
            norm,
            vocabulary=vocabulary,
            embedding=embedding,
            hidden=hidden,
            dropout=dropout,
            recurrent_dropout=recurrent_dropout,
            population=population,
            sparse=sparse,
        )
        metrics = MetricCollection(
            {"acc": BinaryAccuracy(), "acc_authors": BinaryAccuracy(threshold=AUTHORS_THRESHOLD)},
            compute_groups=False,
        )
        super().__init__(network, metrics, learning_rate, is_binary=True)
        self.save_hyperparameters()
        self._optimizer: KerasAdam | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        """Return a logit ``(B,)`` for each row of ``inputs`` of shape ``(B, T)``."""
        self.settle(inputs)
        return self.network(inputs)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))

    def predictions(self, logits: Tensor) -> Tensor:
        return torch.sigmoid(logits)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self._optimizer = KerasAdam(self.parameters(), lr=self.learning_rate, eps=1e-8)
        return self._optimizer

    def settle(self, tokens: Tensor | None = None) -> None:
        """Make the embedding's deferred moves for ``tokens``, by default for all."""
        if self._optimizer is not None:
            self._optimizer.catch_up(cast(PaperLSTM, self.network).embedding.weight, tokens)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        self.settle()
        return super().state_dict(*args, **kwargs)


class PaperCIFAR10(Classifier):
    """The paper's image experiment: :class:`~lightning_bln.models.PaperCNN`, Adam at 0.002, softmax cross-entropy.

    Logs ``{train,val,test}_loss`` and ``_acc``.

    Args:
        norm: ``"bln"``, ``"batch"``, ``"layer"`` or ``"layer-scaled"``, see :func:`~lightning_bln.models.paper_norm`.
        population: ``"paper"`` or ``"pooled"``.
        learning_rate: Adam's learning rate.
    """

    def __init__(self, norm: str = "bln", population: str = "paper", learning_rate: float = 0.002) -> None:
        metrics = MetricCollection({"acc": MulticlassAccuracy(10, average="micro")})
        super().__init__(PaperCNN(norm, population=population), metrics, learning_rate)
        self.save_hyperparameters()
