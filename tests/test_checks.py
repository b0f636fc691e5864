"""Arguments of constructors: what is refused and how it is named, and what is taken."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch

from lightning_bln import (
    BLNGRU,
    BLNLSTM,
    BLNRNN,
    BatchLayerNorm,
    ConvBLN1d,
    ConvBLN2d,
    ConvBLN3d,
    Population,
    Recurrent,
)
from lightning_bln.cells import BLNGRUCell, BLNLSTMCell, BLNRNNCell, RecurrentCell
from lightning_bln.norm import Normalization
from lightning_bln.recurrence.gate_norm import GateNorm

KINDS: dict[type, dict[str, Any]] = {
    Recurrent: {"cell": "lstm", "input_size": 3, "hidden_size": 4},
    BLNLSTM: {"input_size": 3, "hidden_size": 4},
    BLNGRU: {"input_size": 3, "hidden_size": 4},
    BLNRNN: {"input_size": 3, "hidden_size": 4},
    RecurrentCell: {"cell": "gru", "input_size": 3, "hidden_size": 4},
    BLNLSTMCell: {"input_size": 3, "hidden_size": 4},
    BLNGRUCell: {"input_size": 3, "hidden_size": 4},
    BLNRNNCell: {"input_size": 3, "hidden_size": 4},
    Normalization: {"num_features": 5},
    BatchLayerNorm: {"num_features": 5},
    GateNorm: {"hidden_size": 4, "gates": 3},
    Population: {"num_features": 5},
    ConvBLN1d: {"in_channels": 2, "out_channels": 4, "kernel_size": 3},
    ConvBLN2d: {"in_channels": 2, "out_channels": 4, "kernel_size": 3},
    ConvBLN3d: {"in_channels": 2, "out_channels": 4, "kernel_size": 3},
}
"""Each class, and the least that it is made with."""

TORCHS = {"device", "padding_mode"}
"""Arguments that torch checks and names."""

ARGUMENTS = [
    (kind, name)
    for kind in KINDS
    for name, parameter in inspect.signature(kind).parameters.items()
    if parameter.kind is not parameter.VAR_KEYWORD and name not in TORCHS
]


@pytest.mark.parametrize(("kind", "name"), ARGUMENTS, ids=lambda value: getattr(value, "__name__", value))
def test_no_argument_takes_anything(kind: Any, name: str) -> None:
    shown = "population" if (kind, name) == (Population, "estimator") else name
    for value in (object(), [0.5], torch.zeros(2), math.nan, "7"):
        with pytest.raises(
            (TypeError, ValueError), match=rf"^{shown}=(?s:.*), but .*(; (pass|leave|lower)|one of|None)"
        ):
            kind(**{**KINDS[kind], name: value})


RECURRENT, CELL, NORM, CONV = (KINDS[kind] for kind in (Recurrent, RecurrentCell, BatchLayerNorm, ConvBLN2d))

REFUSED = [
    (Recurrent, {"hidden_size": 3.0}, TypeError, "hidden_size=3.0, but it must be an integer; pass an int"),
    (Recurrent, {"hidden_size": True}, TypeError, "hidden_size=True, but it must be an integer; pass an int"),
    (Recurrent, {"input_size": -1}, ValueError, "input_size=-1, but it must be positive; pass at least 1"),
    (Recurrent, {"num_layers": 2.0}, TypeError, "num_layers=2.0, but"),
    (Recurrent, {"bidirectional": "yes"}, TypeError, "bidirectional='yes', but it must be a bool; pass True or False"),
    (Recurrent, {"dropout": "0.1"}, TypeError, "dropout='0.1', but it must be a number; pass a float"),
    (Recurrent, {"dropout": True}, TypeError, "dropout=True, but it must be a number; pass a float"),
    (Recurrent, {"zoneout": -0.5}, ValueError, "zoneout=-0.5, but it is a probability; pass a number in [0, 1]"),
    (Recurrent, {"proj_size": -1}, ValueError, "proj_size=-1, but it must not be negative; pass at least 0"),
    (Recurrent, {"proj_size": 4}, ValueError, "proj_size=4, but it must be smaller than hidden_size=4; lower it"),
    (Recurrent, {"norm": None, "eps": -1}, ValueError, "eps=-1, but it must be finite and not negative; pass a small"),
    (Recurrent, {"norm": None, "time_statistics": "none"}, ValueError, "time_statistics='none', but"),
    (Recurrent, {"dtype": torch.int64}, ValueError, "dtype=torch.int64, but it holds no real fractions; pass one"),
    (Recurrent, {"cell": ["lstm"]}, ValueError, "cell=['lstm'], but the registry has"),
    (Recurrent, {"cell": "rhn", "depth": 2.0}, TypeError, "depth=2.0, but it must be an integer; pass an int"),
    (Recurrent, {"cell": "taugru", "delay": 0}, ValueError, "delay=0, but it must be positive; pass at least 1"),
    (Recurrent, {"cell": "lem", "dt": "0.1"}, TypeError, "dt='0.1', but it must be a number; pass a float"),
    (Recurrent, {"cell": "mingru", "positive": 1}, TypeError, "positive=1, but it must be a bool"),
    (RecurrentCell, {"delta": math.inf}, ValueError, "delta=inf, but it must be finite; pass another number"),
    (BatchLayerNorm, {"eps": math.nan}, ValueError, "eps=nan, but it must be finite and not negative"),
    (BatchLayerNorm, {"scale": math.inf}, ValueError, "scale=inf, but it must be finite; pass another number"),
    (BatchLayerNorm, {"scale": None}, TypeError, "scale=None, but it must be a number"),
    (BatchLayerNorm, {"momentum": True}, TypeError, "momentum=True, but it must be a number; pass a float"),
    (BatchLayerNorm, {"momentum": 0}, ValueError, "momentum=0, but it must lie in (0, 1], or be None to gather"),
    (BatchLayerNorm, {"num_features": 0}, ValueError, "num_features=0, but at least one feature is needed; pass a"),
    (BatchLayerNorm, {"channel_dim": 1.0}, TypeError, "channel_dim=1.0, but it must be an integer; pass an int"),
    (ConvBLN2d, {"kernel_size": (3, 3, 3)}, ValueError, "kernel_size=(3, 3, 3), but 2 are needed, one for each"),
    (ConvBLN2d, {"stride": (1, 0)}, ValueError, "stride=0, but it must be positive; pass at least 1"),
    (ConvBLN2d, {"groups": 0}, ValueError, "groups=0, but it must be positive; pass at least 1"),
]


@pytest.mark.parametrize(
    ("kind", "options", "error", "words"), REFUSED, ids=[f"{row[0].__name__}-{row[1]}" for row in REFUSED]
)
def test_what_does_not_fit_is_named_with_the_way_out(kind, options, error, words) -> None:
    with pytest.raises(error) as caught:
        kind(**{**KINDS[kind], **options})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


TAKEN = [
    (Recurrent, {"hidden_size": np.int64(5), "num_layers": np.int32(2), "dropout": np.float32(0.5)}),
    (Recurrent, {"dropout": 1, "num_layers": 2, "recurrent_dropout": 0, "eps": 0, "delta": 0}),
    (BatchLayerNorm, {"num_features": np.int16(5), "eps": np.float64(0.1), "scale": np.float32(2)}),
    (BatchLayerNorm, {"eps": 0, "delta": -1, "scale": 2, "momentum": 1}),
    (BatchLayerNorm, {"scale": False, "momentum": None}),
    (ConvBLN2d, {"kernel_size": [3, np.int64(1)], "padding": "same"}),
]


@pytest.mark.parametrize(("kind", "options"), TAKEN, ids=[f"{row[0].__name__}-{row[1]}" for row in TAKEN])
def test_numbers_of_any_library_are_taken_as_pythons_own(kind, options) -> None:
    layer = kind(**{**KINDS[kind], **options})
    kept = {name: value for name, value in vars(layer).items() if isinstance(value, (int, float, np.number))}
    assert {type(value) for value in kept.values()} <= {bool, int, float}
    for name, value in options.items():
        assert getattr(layer, name, value) == value
