"""Sequences that come bit by bit: a layer, the state that it is in, and the steps before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_bln.recurrence.streaming import check_start, first_of


class Stream:
    """Inference over sequences of which a step, or a few, come at a time.

    A stream keeps the last states and counts the steps, so that each is normalised by the statistics that belong to it.
    An input that raises leaves the stream as it was.

    Args:
        layer: A recurrent layer or single-step cell in evaluation; torch's, which ``fold`` makes, too.
        hx: First states; zeros if left out.
        start: Steps that came before.

    Attributes:
        state: The last states, ``None`` before the first step. One of another stream may be assigned.
        start: Steps so far.

    Raises:
        ValueError: The layer reads sequences from their end, too, or ``start`` is negative.
        TypeError: ``layer`` is no recurrent layer, or ``start`` no integer.

    Example:
        >>> from lightning_bln import BLNLSTM, recompute_population
        >>> layer = BLNLSTM(3, 8)
        >>> recompute_population(layer, [torch.randn(20, 16, 3)])
        >>> stream = layer.eval().stream()
        >>> x = torch.randn(20, 1, 3)
        >>> outputs = [stream.step(x[0]), *stream(x[1:])]
        >>> torch.allclose(torch.stack(outputs), layer(x)[0], atol=1e-6)
        True
        >>> stream.start
        20
    """

    def __init__(self, layer: nn.Module, hx: Any = None, start: int = 0) -> None:
        if not isinstance(layer, (nn.RNNBase, nn.RNNCellBase)) and not hasattr(layer, "stream"):
            kind = type(layer).__name__
            raise TypeError(f"layer is a {kind}, but a recurrent layer or single-step cell is needed; pass that one")
        if getattr(layer, "bidirectional", False):
            raise ValueError(
                "the layer is bidirectional and reads whole sequences; stream one built with bidirectional=False"
            )
        self.layer = layer
        self.is_cell = not hasattr(layer, "num_layers")
        self.reset(hx, start)

    def reset(self, hx: Any = None, start: int = 0) -> None:
        """Begin anew."""
        check_start(start, False)
        self.state, self.start = hx, start

    def __call__(self, x: Tensor) -> Tensor:
        """Outputs for the next steps.

        Args:
            x: In the shape that the layer takes, ``(T, B, input_size)`` for one; a cell takes one step.

        Raises:
            RuntimeError: The layer is in training.
            TypeError: ``x`` is no tensor; packed sequences end, so that none could go on.
        """
        if self.layer.training:
            raise RuntimeError("the layer is in training; call eval() on it before it serves")
        check_tensor(x)
        self._check_samples(x)
        check_start(self.start, False)
        with torch.no_grad():
            found = self._run(x)
        if self.is_cell:
            # the output may be written into, and the state may not
            self.state, output, steps = found, first_of(found).clone(), 1
        else:
            output, self.state = found
            steps = x.shape[1 if self.layer.batch_first and x.ndim == 3 else 0]
        self.start += steps
        return output

    def step(self, x: Tensor) -> Tensor:
        """The output, ``(B, size)`` or ``(size,)``, for one step, ``(B, input_size)`` or ``(input_size,)``.

        Raises:
            RuntimeError: The layer is in training.
            TypeError: ``x`` is no tensor.
            ValueError: It has other axes.
        """
        check_tensor(x)
        if x.ndim not in (1, 2):
            raise ValueError(
                f"x has shape {tuple(x.shape)}, but one step is (batch, input_size) or (input_size,); call the stream "
                "itself for several steps"
            )
        if self.is_cell:
            return self(x)
        axis = 1 if self.layer.batch_first and x.ndim == 2 else 0
        return self(x.unsqueeze(axis)).squeeze(axis)

    def _check_samples(self, x: Tensor) -> None:
        """Raise where the state is of another number of sequences."""
        if self.state is None:
            return
        first, has_batch = first_of(self.state), x.ndim == (2 if self.is_cell else 3)
        axis = 1 if has_batch and not self.is_cell and not self.layer.batch_first else 0
        own = x.shape[axis] if has_batch else None
        known = first.shape[-2] if first.ndim == (2 if self.is_cell else 3) else None
        if own != known:
            names = ["a single sequence" if number is None else f"{number} sequences" for number in (known, own)]
            raise ValueError(
                f"the stream holds the state of {names[0]}, but x has {names[1]}; assign that of these to "
                "stream.state, or call reset()"
            )

    def _run(self, x: Tensor) -> Any:
        if hasattr(self.layer, "stream"):
            return self.layer(x, self.state, start=self.start)
        return self.layer(x, self.state)

    def __repr__(self) -> str:
        return f"Stream({type(self.layer).__name__}, start={self.start})"


def check_tensor(x: object) -> None:
    """Raise unless ``x`` is a tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x is a {type(x).__name__}, but a tensor is needed; convert it with torch.as_tensor")
