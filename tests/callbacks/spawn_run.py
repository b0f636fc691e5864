"""Started by test_ddp.py: processes that the Trainer starts fit a model, and what comes back is written down."""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
import zoo
from torch.utils.data import DataLoader

from lightning_bln import ALL_MODES
from lightning_bln.modes import mode_layers


def main(strategy: str, out: Path) -> None:
    tempfile.tempdir = str(out.parent)
    torch.manual_seed(0)
    model, callback = zoo.Simple(), zoo.chooser(candidates="batch_independent")
    twin = copy.deepcopy(callback)
    training, data = DataLoader(zoo.make_data(64, 1), 8), DataLoader(zoo.make_data(40, 2, shift=0.7), 10)
    trainer = zoo.trainer(callback, strategy=strategy, devices=2, max_epochs=2)
    trainer.fit(model, training, data)
    assert twin.result is None
    result, history = callback.result, list(callback.history)
    assert result is not None
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    mode = str(mode_layers(model)[0].mode)
    alone = zoo.trainer()
    alone.validate(model, data, verbose=False)
    validated = float(alone.callback_metrics["val_loss"])
    zoo.trainer(callback).fit(model, training, data)
    out.write_text(
        json.dumps(
            {
                "chosen": str(result.chosen),
                "history": history,
                "mode": mode,
                "logged": str(ALL_MODES[int(metrics["bln/mode"])]),
                "score": result.scores[result.chosen]["val_loss"] if result.chosen else None,
                "validated": validated,
                "alone": callback.history,
                "left": [one for one in os.listdir(out.parent) if one.startswith("lightning-bln-")],
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
