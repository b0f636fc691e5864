"""Started by test_exact_ddp.py: two gloo processes fit modules of several kinds, and rank 0 writes down the tables."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import exact_batch
import exact_layers
import exact_modules
import exact_networks
import exact_python
import exact_state
import zoo
from torch.utils.data import DataLoader

from lightning_bln import ALL_MODES, set_mode

KINDS: dict[str, Any] = {
    "centred": exact_batch.MODULES["centred"],
    "contrastive": exact_batch.MODULES["contrastive"],
    "branch": exact_python.MODULES["branch"],
    "numpy": exact_python.MODULES["numpy functions"],
    "containers": exact_state.MODULES["containers"],
    "in place": exact_state.MODULES["in place"],
    "running average": exact_state.MODULES["running average"],
    "hooks": exact_layers.MODULES["hooks"],
    "BLNLSTM that goes on": exact_networks.MODULES["BLNLSTM that goes on"],
}


def batches(rank: int) -> DataLoader:
    """The validation data of ``rank``."""
    x, y = zoo.make_data(40, 2, shift=0.7).tensors
    own = [(x[start : start + 10], y[start : start + 10]) for start in (10 * rank, 20 + 10 * rank)]
    return DataLoader(own, batch_size=None)  # type: ignore[arg-type]


def training() -> DataLoader:
    x, y = zoo.make_data(64, 1).tensors
    return DataLoader([(x[i : i + 16], y[i : i + 16]) for i in range(0, 64, 16)], batch_size=None)  # type: ignore[arg-type]


def plain_validations(trainer: Any, module: Any) -> dict[str, float]:
    """What a validation of each mode on the same ranks logs, averaged over them."""
    found = {}
    for mode in ALL_MODES:
        own = copy.deepcopy(module)
        set_mode(own, mode)
        trainer.validate(own, batches(trainer.global_rank), verbose=False)
        found[mode] = float(trainer.strategy.reduce(trainer.callback_metrics["val_loss"], reduce_op="mean"))
    return found


OPTIONS: dict[str, Any] = {
    "strategy": "ddp_find_unused_parameters_true",
    "devices": 2,
    "use_distributed_sampler": False,
}


def tables(name: str) -> tuple[int, list[Any]]:
    """This rank, and for each validation the callback's scores, those of plain validations and the reason."""
    exact_modules.seed_all(0)
    callback = zoo.chooser(recompute_batches=None)
    keeps = exact_modules.Keeps(callback)
    trainer = zoo.trainer(exact_modules.SameSeed(), callback, keeps, max_epochs=2, num_sanity_val_steps=0, **OPTIONS)

    class Data(zoo.pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return training()

        def val_dataloader(self) -> Any:
            return batches(trainer.global_rank)

    trainer.fit(KINDS[name](), datamodule=Data())
    validates = zoo.trainer(exact_modules.SameSeed(), **OPTIONS)
    found = []
    for module, result in zip(keeps.modules, keeps.results, strict=True):
        scores = {str(mode): values["val_loss"] for mode, values in result.scores.items()}
        found.append((scores, plain_validations(validates, module), result.reason))
    return trainer.global_rank, found


def main(out: Path) -> None:
    found = {name: tables(name) for name in KINDS}
    if all(rank == 0 for rank, _ in found.values()):
        out.write_text(json.dumps({name: own for name, (_, own) in found.items()}))


if __name__ == "__main__":
    main(Path(sys.argv[2]))
