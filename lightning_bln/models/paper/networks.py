"""The paper's two networks, for each of the compared norms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_bln.models.paper.keras import KerasLSTM, keras_dense
from lightning_bln.norm import Normalization

# One layer class for all, so that they differ in nothing else. The control starts as BLN does at batch size 1.
PAPER_NORMS: dict[str, dict[str, Any]] = {
    "bln": {"norm": "bln", "scale": True},
    "batch": {"norm": "batch", "scale": False, "positions": "shared", "momentum": 0.01, "population": "pooled"},
    "layer": {"norm": "layer", "scale": False},
    "layer-scaled": {"norm": "layer", "scale": True},
}


def paper_norm(norm: str, num_features: int, *, channel_dim: int = -1, population: str = "paper") -> Normalization:
    """Return one of the four norms that are compared.

    Args:
        norm: ``"bln"`` as the authors'; ``"batch"`` and ``"layer"`` as the Keras layers they compare with;
            ``"layer-scaled"``, a control that the paper lacks: layer normalization whose weight starts at
            :math:`1/\\sqrt d`, as BLN's does.
        num_features: Size of the feature axis.
        channel_dim: The feature axis.
        population: The estimator, see :class:`lightning_bln.population.Population`; ``"batch"`` always has Keras's
            running variance.

    Raises:
        ValueError: There is no such norm.

    Example:
        >>> paper_norm("layer-scaled", 64).scale
        True
    """
    if norm not in PAPER_NORMS:
        raise ValueError(f"norm={norm!r}; use one of {', '.join(PAPER_NORMS)}")
    layer = Normalization(num_features, channel_dim=channel_dim, **{"population": population, **PAPER_NORMS[norm]})
    if norm == "batch":
        # Keras's running statistics start at mean 0 and variance 1, which weighs on them for hundreds of steps.
        frozen = layer.population
        frozen.batch_mean, frozen.batch_var = torch.zeros(1, num_features), torch.ones(1, num_features)
        frozen.feature_mean, frozen.feature_var, frozen.batch_size = torch.zeros(1), torch.ones(1), torch.ones(1)
    return layer


class PaperLSTM(nn.Module):
    """The paper's IMDB network: two LSTMs, each followed by the norm, and a dense layer.

    Embedding, LSTM, norm, LSTM (last step), norm, dense, tanh, norm, dense. With the defaults it has the paper's
    10,620,161 parameters.

    Args:
        norm: See :func:`paper_norm`.
        vocabulary: Number of token ids.
        embedding: Size of the embedding.
        hidden: State size of the first LSTM; the second has half.
        dropout: Dropout of the inputs of both LSTMs.
        recurrent_dropout: Dropout of the hidden states of both LSTMs.
        population: See :func:`paper_norm`.
        sparse: Whether the embedding has sparse gradients, for :class:`~lightning_bln.models.KerasAdam`.

    Example:
        >>> PaperLSTM("bln", vocabulary=10, embedding=4, hidden=8)(torch.zeros(3, 5, dtype=torch.long)).shape
        torch.Size([3])
    """

    def __init__(
        self,
        norm: str = "bln",
        *,
        vocabulary: int = 20_000,
        embedding: int = 512,
        hidden: int = 128,
        dropout: float = 0.2,
        recurrent_dropout: float = 0.2,
        population: str = "paper",
        sparse: bool = True,
    ) -> None:
        super().__init__()
        dropouts = {"dropout": dropout, "recurrent_dropout": recurrent_dropout}
        self.embedding = nn.Embedding(vocabulary, embedding, sparse=sparse)
        nn.init.xavier_uniform_(self.embedding.weight)
        self.lstm1 = KerasLSTM(embedding, hidden, **dropouts)
        self.norm1 = paper_norm(norm, hidden, population=population)
        self.lstm2 = KerasLSTM(hidden, hidden // 2, **dropouts)
        self.norm2 = paper_norm(norm, hidden // 2, population=population)
        self.dense1 = keras_dense(hidden // 2, 32)
        self.norm3 = paper_norm(norm, 32, population=population)
        self.dense2 = keras_dense(32, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return a logit ``(B,)`` for each row of ``tokens`` of shape ``(B, T)``."""
        return self.head(self.features(tokens))

    def features(self, tokens: Tensor) -> Tensor:
        """Return the input of the first norm, which does not depend on any statistics."""
        return self.lstm1(self.embedding(tokens))

    def head(self, features: Tensor) -> Tensor:
        """Return the logits from :meth:`features`."""
        x = self.norm2(self.lstm2(self.norm1(features))[:, -1])
        return self.dense2(self.norm3(torch.tanh(self.dense1(x)))).squeeze(-1)


class PaperCNN(nn.Module):
    """The paper's CIFAR-10 network: two convolutions and two dense layers, each followed by tanh and the norm.

    With the defaults it has the paper's 83,578 parameters.

    Args:
        norm: See :func:`paper_norm`.
        classes: Number of classes.
        population: See :func:`paper_norm`.

    Example:
        >>> PaperCNN("bln")(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, norm: str = "bln", *, classes: int = 10, population: str = "paper") -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 5, padding="same"), nn.Conv2d(6, 16, 5)
        for conv in (self.conv1, self.conv2):
            nn.init.xavier_uniform_(conv.weight)
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)
        self.norm1 = paper_norm(norm, 6, channel_dim=1, population=population)
        self.norm2 = paper_norm(norm, 16, channel_dim=1, population=population)
        self.dense1, self.dense2 = keras_dense(16 * 6 * 6, 120), keras_dense(120, 84)
        self.norm3 = paper_norm(norm, 120, population=population)
        self.norm4 = paper_norm(norm, 84, population=population)
        self.dense3 = keras_dense(84, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(B, classes)`` for ``images`` of shape ``(B, 3, 32, 32)``."""
        return self.head(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """Return the input of the first norm, which does not depend on any statistics."""
        return nn.functional.avg_pool2d(torch.tanh(self.conv1(images)), 2)

    def head(self, features: Tensor) -> Tensor:
        """Return the logits from :meth:`features`."""
        x = self.norm1(features)
        x = self.norm2(nn.functional.avg_pool2d(torch.tanh(self.conv2(x)), 2))
        x = self.norm3(torch.tanh(self.dense1(x.flatten(1))))
        x = self.norm4(torch.tanh(self.dense2(x)))
        return self.dense3(x)
