"""Callbacks for the Trainer of ``lightning.pytorch`` and ``pytorch_lightning``."""

from lightning_bln.callbacks.stats import BLNStatsCallback

__all__ = ["BLNStatsCallback"]
