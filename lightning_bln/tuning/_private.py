"""Private names of Optuna and Ray that the search uses, each with its reason, checked at import."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

from lightning_bln.callbacks._lightning import has_names, require


def trial_id(trial: optuna.Trial | FrozenTrial) -> int:
    """The key of a trial in its storage; the public ``number`` counts within the study."""
    return trial._trial_id


def storage_of(study: optuna.Study) -> BaseStorage:
    """The storage as the study uses it, behind a cache of its own that changes have to pass through."""
    return study._storage


class ExtendedReport:
    """Mixin for Ray's ``TuneReportCheckpointCallback``, which has no public way to report more than logged metrics."""

    def extra_entries(self) -> Mapping[str, Any]:
        """Entries of a report besides the metrics."""
        return {}

    def _get_report_dict(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
        report = super()._get_report_dict(trainer, pl_module)  # type: ignore[misc]
        if report:
            report.update(self.extra_entries())
        return report


def check_ray(callback: type) -> None:
    """Raise where Ray's callback has lost the method that :class:`ExtendedReport` extends."""
    require("lightning_bln.tuning", "ray", has_names(callback, ("_get_report_dict",)), "ray==2.60.0")


for _owner, _name in ((optuna.Trial, "_trial_id"), (FrozenTrial, "_trial_id"), (optuna.Study, "_storage")):
    require("lightning_bln.tuning", "optuna", has_names(_owner, (_name,)), "optuna==5.0.0")
