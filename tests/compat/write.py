"""Write the files of the version that is installed: ``python tests/compat/write.py``. Each release adds its own.

``configs.yaml`` is written by hand: configurations for ``bln fit`` with the class paths of that version.
"""

from __future__ import annotations

import inspect
import json
import pkgutil
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import lightning
import torch
from lightning.pytorch import Callback, LightningDataModule
from torch.utils.data import Dataset, Sampler

sys.path.insert(0, str(Path(__file__).parent))

import cases

import lightning_bln
from lightning_bln.cells import registry


def main() -> None:
    """Write state dicts, pickled layers and a checkpoint, each with what was computed from it."""
    folder = Path(__file__).parent / lightning_bln.__version__
    folder.mkdir(exist_ok=True)
    layers, modules = {}, {}
    for name in cases.LAYERS:
        layer, x = cases.fitted(name)
        state = {key: value.clone() for key, value in layer.state_dict().items()}
        layers[name] = {"state_dict": state, "x": x, "predictions": cases.predictions(layer, x)}
        modules[name] = cases.fitted(name)[0]
    torch.save(modules, folder / "modules.pt")
    torch.save(layers, folder / "state_dicts.pt")
    with tempfile.TemporaryDirectory() as scratch:
        _, _, trainer = cases.fit(Path(scratch), 2)
        trainer.save_checkpoint(folder / "trainer.ckpt")
        network, callback, trainer = cases.fit(Path(scratch), 4, folder / "trainer.ckpt")
    assert callback.result is not None
    then = {
        "state_dict": {key: value.clone() for key, value in network.state_dict().items()},
        "mode": str(callback.result.chosen),
        "history": callback.history,
        "scores": {str(mode): values for mode, values in callback.result.scores.items()},
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
    }
    torch.save(then, folder / "resumed.pt")
    (folder / "class_paths.json").write_text(json.dumps(class_paths(), indent=0) + "\n")
    versions = {"torch": torch.__version__.partition("+")[0], "lightning": lightning.__version__}
    (folder / "versions.json").write_text(json.dumps(versions) + "\n")


def class_paths() -> list[str]:
    """Classes that configurations and pickles may name, each by the module that defines it."""
    kinds = (torch.nn.Module, LightningDataModule, Callback, torch.optim.Optimizer, Dataset, Sampler)
    names = [info.name for info in pkgutil.walk_packages(lightning_bln.__path__, "lightning_bln.")]
    modules = [lightning_bln, *(import_module(name) for name in names if "._" not in name)]
    exported = {id(getattr(module, name)) for module in modules for name in getattr(module, "__all__", ())}
    exported |= set(map(id, registry.values()))
    return sorted(
        f"{module.__name__}.{name}"
        for module in modules
        for name, one in vars(module).items()
        if inspect.isclass(one) and one.__module__ == module.__name__ and not name.startswith("_")
        if issubclass(one, kinds) or id(one) in exported
    )


if __name__ == "__main__":
    main()
