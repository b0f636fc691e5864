"""Hyperparameter search in which each trial trains one model and scores it in every statistics mode."""

from importlib.util import find_spec
from typing import Any

from lightning_bln.tuning.space import Distribution, suggest, suggest_mode, suggest_norm

__all__ = ["Distribution", "suggest", "suggest_mode", "suggest_norm"]

if find_spec("optuna") is not None and find_spec("jsonargparse") is not None:
    from lightning_bln.tuning.objective import Objective, measure_latency
    from lightning_bln.tuning.recipe import Recipe
    from lightning_bln.tuning.report import explained_variance, write_report
    from lightning_bln.tuning.study import tune

    __all__ += ["Objective", "Recipe", "explained_variance", "measure_latency", "tune", "write_report"]
else:

    def __getattr__(name: str) -> Any:
        if name in ("Objective", "Recipe", "explained_variance", "measure_latency", "tune", "write_report"):
            message = f"{__name__}.{name} needs optuna: pip install 'lightning-bln[optuna]'"
            raise ModuleNotFoundError(message, name="optuna")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
