"""Private names of Optuna and Ray that the search uses, each with its reason, checked at import."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

from lightning_bln.callbacks._lightning import has_names, require

_USER = "lightning_bln.tuning"


def trial_id(trial: optuna.Trial | FrozenTrial) -> int:
    """The key of a trial in its storage; the public ``number`` counts within the study."""
    return trial._trial_id


def storage_of(study: optuna.Study) -> BaseStorage:
    """The storage as the study uses it, behind a cache of its own that changes have to pass through."""
    return study._storage


class ExtendedReport:
    """Mixin for Ray's ``TuneReportCheckpointCallback`` that reports more than logged metrics.

    Ray's own public hooks report either logged metrics with a checkpoint, or anything without one.
    """

    def extra_entries(self) -> Mapping[str, Any]:
        """What a report holds besides the metrics."""
        return {}

    def _get_report_dict(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
        report = super()._get_report_dict(trainer, pl_module)  # type: ignore[misc]
        if report:
            report.update(self.extra_entries())
        return report


def check_ray(callback: type) -> None:
    """Raise where Ray's callback has lost the method that :class:`ExtendedReport` extends."""
    require(_USER, "ray", has_names(callback, ("_get_report_dict",)), "ray==2.60.0")


require(
    _USER,
    "optuna",
    [
        *has_names(optuna.Trial, ("_trial_id",)),
        *has_names(FrozenTrial, ("_trial_id",)),
        *has_names(optuna.Study, ("_storage",)),
    ],
    "optuna==5.0.0",
)
