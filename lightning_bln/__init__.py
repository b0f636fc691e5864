"""Batch Layer Normalization and normalised recurrent networks for PyTorch and Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_bln import _moved
from lightning_bln.averaging import AveragedModel
from lightning_bln.calibration import Calibration, calibrate
from lightning_bln.conv import ConvBLN1d, ConvBLN2d, ConvBLN3d
from lightning_bln.convert import from_torch, to_bln, to_torch
from lightning_bln.exporting import Exported, export
from lightning_bln.folding import fold
from lightning_bln.functional import Statistics, batch_layer_norm
from lightning_bln.modes import ALL_MODES, BATCH_INDEPENDENT_MODES, StatisticsMode, fan_out, set_mode, using_mode
from lightning_bln.moments import Moments
from lightning_bln.norm import BatchLayerNorm, Normalization
from lightning_bln.population import Population
from lightning_bln.recomputation import freeze_population, recompute_population, reset_population
from lightning_bln.recurrent import BLNGRU, BLNLSTM, BLNRNN, Recurrent
from lightning_bln.sweep import SweepResult, sweep_modes

if TYPE_CHECKING:
    from lightning_bln.callbacks import BLNStatsCallback as BLNStatsCallback

__version__ = "0.1.0"

__all__ = [
    "ALL_MODES",
    "BATCH_INDEPENDENT_MODES",
    "BLNGRU",
    "BLNLSTM",
    "BLNRNN",
    "AveragedModel",
    "BatchLayerNorm",
    "Calibration",
    "ConvBLN1d",
    "ConvBLN2d",
    "ConvBLN3d",
    "Exported",
    "Moments",
    "Normalization",
    "Population",
    "Recurrent",
    "Statistics",
    "StatisticsMode",
    "SweepResult",
    "batch_layer_norm",
    "calibrate",
    "export",
    "fan_out",
    "fold",
    "freeze_population",
    "from_torch",
    "recompute_population",
    "reset_population",
    "set_mode",
    "sweep_modes",
    "to_bln",
    "to_torch",
    "using_mode",
]

_moved.install()


def __getattr__(name: str) -> Any:
    """The callback, which needs lightning and is not in ``__all__``, and modules by their earlier paths."""
    if name == "BLNStatsCallback":
        return import_module("lightning_bln.callbacks").BLNStatsCallback
    return _moved.attribute(__name__, name)
