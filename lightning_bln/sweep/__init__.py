"""Scores of all statistics modes, from one pass over the data."""

from lightning_bln.sweep.evaluate import sweep_modes
from lightning_bln.sweep.result import Direction, Regrouped, SweepResult, check_direction

__all__ = ["Direction", "Regrouped", "SweepResult", "check_direction", "sweep_modes"]
