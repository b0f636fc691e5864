"""Started by test_ddp.py: two gloo processes fit a model, and rank 0 writes down what all of them have."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
import zoo
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from lightning_bln import recompute_population
from lightning_bln.modes import mode_layers
from lightning_bln.recomputation import populations


class Synced(zoo.Simple):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        loss = torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("val_loss", loss, sync_dist=True)


def frozen(model: torch.nn.Module) -> Tensor:
    names = ("batch_mean", "batch_var", "feature_mean", "feature_var", "batch_size")
    return torch.cat([getattr(one, name).flatten() for one in populations(model) for name in names])


def main(population: str, out: Path) -> None:
    torch.manual_seed(0)
    data, validation = zoo.make_data(64, 1), zoo.make_data(40, 2, shift=0.7)
    # with a learning rate of zero the epoch's own average is that of the final weights, and can be checked alike
    model = Synced(lr=0.0 if population == "epoch" else 0.1)
    callback = zoo.chooser(population=population, recompute_batches=None)
    trainer = zoo.trainer(callback, strategy="ddp", devices=2, max_epochs=2)
    trainer.fit(model, DataLoader(data, 8), DataLoader(validation, 10))
    own = frozen(model)
    # the truth about all ranks' data, computed by each process alone
    torch.distributed.barrier()
    modes = trainer.strategy.all_gather(torch.tensor([float(mode_layers(model)[0].get_extra_state().float().sum())]))
    everyone = trainer.strategy.all_gather(own)
    assert callback.result is not None
    scores = {str(mode): values["val_loss"] for mode, values in callback.result.scores.items()}
    trainer.strategy.barrier()
    if trainer.global_rank == 0:
        torch.distributed.destroy_process_group()
        # a layer sees what batches make of the one before it, so they must be those that the ranks had last
        samplers = [DistributedSampler(data, num_replicas=2, rank=rank) for rank in (0, 1)]
        for sampler in samplers:
            sampler.set_epoch(1)
        loaders = [DataLoader(data, 8, sampler=sampler) for sampler in samplers]
        samples = None if population == "epoch" else 1024
        recompute_population(model, [batch for loader in loaders for batch in loader], samples=samples)
        alone = zoo.oracle(model, DataLoader(validation, 10))
        out.write_text(
            json.dumps(
                {
                    "ranks_differ": float((everyone[0] - everyone[1]).abs().max()),
                    "modes_differ": float(modes.max() - modes.min()),
                    "from_truth": float(((own - frozen(model)).abs() / frozen(model).abs().clamp(min=1)).max()),
                    "scores": scores,
                    "alone": {str(mode): values["val_loss"] for mode, values in alone.items()},
                }
            )
        )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
