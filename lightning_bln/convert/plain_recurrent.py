"""Recurrent layers and cells of torch in place of ours without norms."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_bln._torch import update_flat_weights
from lightning_bln.cells.gru import GRU
from lightning_bln.cells.lstm import LSTM
from lightning_bln.cells.rnn import RNN
from lightning_bln.convert.layers import SETTINGS
from lightning_bln.convert.places import Counterpart
from lightning_bln.recurrence.cell_modules import RecurrentCell
from lightning_bln.recurrent import Recurrent

PLAIN_LAYERS: dict[type, type[nn.Module]] = {LSTM: nn.LSTM, GRU: nn.GRU, RNN: nn.RNN}
PLAIN_CELLS: dict[type, type[nn.Module]] = {LSTM: nn.LSTMCell, GRU: nn.GRUCell, RNN: nn.RNNCell}

ONLY_OURS = ("zoneout", "input_dropout", "recurrent_dropout")
"""Options that torch's layers lack and that change what is computed in training."""


def recurrent_reason(layer: Recurrent | RecurrentCell) -> str | None:
    """The reason why torch has no recurrent layer that computes what ``layer`` does, if so."""
    if type(layer.cell) not in PLAIN_LAYERS:
        return f"cell {type(layer.cell).__name__}, which torch does not have"
    if layer.norm is not None:
        return f"norm={layer.norm!r}, but torch's recurrent layers have no norms inside"
    given = [f"{name}={getattr(layer, name)}" for name in ONLY_OURS if getattr(layer, name)]
    return f"{', '.join(given)}, which torch does not have" if given else None


def plain_recurrent(layer: Recurrent | RecurrentCell) -> Counterpart:
    """A recurrent layer of torch with a layer's settings, its parameters not yet those of the layer."""
    kind: Any = (PLAIN_CELLS if isinstance(layer, RecurrentCell) else PLAIN_LAYERS)[type(layer.cell)]
    settings = {name: getattr(layer.cell if name == "nonlinearity" else layer, name) for name in SETTINGS[kind]}
    weight = next(layer.parameters())
    # each of its tensors is replaced by the layer's
    made = kind(layer.input_size, layer.hidden_size, device="meta", dtype=weight.dtype, **settings)
    return Counterpart(made, [], [])


def finish(made: nn.Module) -> None:
    """Let a recurrent layer of torch read the parameters that it has been given."""
    if isinstance(made, nn.RNNBase):
        update_flat_weights(made)


def known_of_recurrent(layer: Recurrent | RecurrentCell) -> frozenset[str]:
    """Attributes of every layer of the kind, those that are not the user's."""
    kind = RecurrentCell if isinstance(layer, RecurrentCell) else Recurrent
    return frozenset(vars(kind("lstm", 1, 1, norm=None, device="meta")))
