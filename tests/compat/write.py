"""Write the files of the version that is installed: ``python tests/compat/write.py``. Each release adds its own."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import lightning
import torch

sys.path.insert(0, str(Path(__file__).parent))

import cases

import lightning_bln


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
    versions = {"torch": torch.__version__.partition("+")[0], "lightning": lightning.__version__}
    (folder / "versions.json").write_text(json.dumps(versions) + "\n")


if __name__ == "__main__":
    main()
