"""Started by test_ddp.py: two gloo processes with late layers, with buffers of their own, or that log unlike names."""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.nn.functional as F
import zoo
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_bln import recompute_population
from lightning_bln.recomputation import populations


class Late(zoo.Simple):
    """Makes its layers in the hook that ``self.hook`` names."""

    hook = ""

    def __init__(self) -> None:
        super().__init__(lr=0.0)
        self.net = self.net if self.hook == "init" else None

    def make(self) -> None:
        self.net = zoo.Simple().net if self.net is None else self.net

    def setup(self, stage: str) -> None:
        if self.hook == "setup":
            self.make()

    def configure_model(self) -> None:
        if self.hook == "configure_model":
            self.make()


def late(hook: str, out: Path) -> None:
    """Write by how much the population of the first norm is off from the mean of all ranks' data."""
    torch.manual_seed(0)
    Late.hook = hook
    model, data = Late(), zoo.make_data(64, 1)
    trainer = zoo.trainer(zoo.chooser(population="epoch"), strategy="ddp", devices=2)
    trainer.fit(model, DataLoader(data, 8), DataLoader(zoo.make_data(40, 2), 10))
    right = model.net[0](data.tensors[0]).mean(0).detach()
    found = model.net[1].population.batch_mean[0]
    if trainer.is_global_zero:
        out.write_text(json.dumps({"off": float((found - right).abs().max())}))


class Uneven(zoo.Simple):
    """Logs under a name that depends on the rank."""

    names: tuple[str, ...] = ()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        for name in self.names[self.global_rank].split():
            self.log(name, loss)


def uneven(names: str, out: Path) -> None:
    """Write what each rank's fit raised; ``names`` has the names that each logs, one rank after a slash."""
    Uneven.names = tuple(names.split("/"))
    strategy = DDPStrategy(timeout=timedelta(seconds=60))
    trainer = zoo.trainer(zoo.chooser(), strategy=strategy, devices=2)
    error = ""
    try:
        trainer.fit(Uneven(), DataLoader(zoo.make_data(64, 1), 8), DataLoader(zoo.make_data(40, 2), 10))
    except MisconfigurationException as raised:
        error = str(raised)
    ranks = [out.with_suffix(f".{rank}") for rank in range(2)]
    partial = out.with_suffix(f".part{trainer.global_rank}")
    partial.write_text(error)
    partial.rename(ranks[trainer.global_rank])
    while trainer.is_global_zero and not ranks[1].exists():
        time.sleep(0.05)
    if trainer.is_global_zero:
        out.write_text(json.dumps([path.read_text() for path in ranks]))


class Buffered(zoo.Simple):
    """Has a BatchNorm before the BLN layers, of which every rank gathers its own running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.net.insert(1, nn.BatchNorm1d(8, momentum=0.5))

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)


def buffers(case: str, out: Path) -> None:
    """Write how far statistics and scores are from those of rank 0's model on all data."""
    samples, _, batchnorm = case.partition(" ")
    torch.manual_seed(0)
    model, data, validation = Buffered(), zoo.make_data(64, 1), zoo.make_data(40, 2, shift=0.7)
    options: dict[str, Any] = {"samples": int(samples) or None, "batchnorm": bool(batchnorm)}
    callback = zoo.chooser(candidates="batch_independent", recompute_batches=None, **options)
    trainer = zoo.trainer(callback, strategy="ddp", devices=2)
    trainer.fit(model, DataLoader(data, 8), DataLoader(validation, 10))
    trainer.strategy.barrier()
    if not trainer.is_global_zero:
        return
    torch.distributed.destroy_process_group()
    assert callback.result is not None
    own = frozen(model)
    samplers = [DistributedSampler(data, num_replicas=2, rank=rank) for rank in (0, 1)]
    batches = [batch for sampler in samplers for batch in DataLoader(data, 8, sampler=sampler)]
    recompute_population(model, batches, **options)
    alone = zoo.oracle(model, DataLoader(validation, 10))
    scores = {mode: values["val_loss"] for mode, values in callback.result.scores.items()}
    off = {str(mode): abs(value - alone[mode]["val_loss"]) for mode, value in scores.items()}
    found = {"population": float((own - frozen(model)).abs().max()), "scores": off}
    if callback.comparison is not None:
        rows = {label: row["val_loss"] for label, row in callback.comparison.rows.items()}
        found["compared"] = abs(rows["recomputed statistics"] - scores[callback.result.incumbent])
        found["gained"] = abs(rows["recomputed statistics"] - rows["running averages"])
    out.write_text(json.dumps(found))


def frozen(model: nn.Module) -> torch.Tensor:
    names = ("batch_mean", "batch_var", "feature_mean", "feature_var")
    found = [getattr(one, name).flatten() for one in populations(model) for name in names]
    return torch.cat(
        [*found, *(one for name, one in model.named_buffers() if name.endswith(("running_mean", "running_var")))]
    )


if __name__ == "__main__":
    kind, _, case = sys.argv[1].partition(":")
    {"late": late, "uneven": uneven, "buffers": buffers}[kind](case, Path(sys.argv[2]))
