"""The check of private names at import."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torchmetrics
from lightning.pytorch.utilities.combined_loader import CombinedLoader

from lightning_bln.callbacks import _lightning


def test_the_installed_lightning_has_every_private_name() -> None:
    for namespace in _lightning.namespaces():
        _lightning.check(namespace)


@pytest.mark.parametrize(
    ("owner", "name", "library"),
    [
        (CombinedLoader, "CombinedLoader._mode", f"lightning.pytorch {pl.__version__}"),
        (torchmetrics.Metric, "Metric._computed", f"torchmetrics {torchmetrics.__version__}"),
    ],
)
def test_a_private_name_that_is_gone_is_named(
    owner: type, name: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, "__init__", lambda self: None)
    with pytest.raises(ImportError, match=f"lightning_bln.callbacks does not know {library}: it lacks .*{name}"):
        _lightning.check("lightning.pytorch")


def test_a_module_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("lightning.pytorch.loops.fit_loop._FitLoop")
    with pytest.raises(ImportError, match="_FitLoop"):
        _lightning.check("lightning.pytorch")
