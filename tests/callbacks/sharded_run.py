"""Started by test_ddp.py: two gloo processes fit a model whose weights are sharded, by FSDP of either kind."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
import zoo
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch.utils.data import DataLoader

from lightning_bln import recompute_population
from lightning_bln.modes import mode_layers
from lightning_bln.population import FROZEN
from lightning_bln.recomputation import populations

SIZES = ((4, 4, 4, 3), (5, 2))


def batches(rank: int) -> list[Any]:
    """What the population is computed over: ranks have different numbers of batches."""
    data = zoo.make_data(40, 3 + rank)
    return [data[sum(SIZES[rank][:place]) : sum(SIZES[rank][: place + 1])] for place in range(len(SIZES[rank]))]


class Statistics:
    def __iter__(self) -> Any:
        return iter(batches(torch.distributed.get_rank()))


class Sharded(zoo.Simple):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        loss = torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("val_loss", loss, sync_dist=True, batch_size=len(batch[1]))


class Sharded2(Sharded):
    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        mesh = self.device_mesh["data_parallel"]
        for layer in self.net:
            if isinstance(layer, torch.nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(self, mesh=mesh)


def main(case: str, out: Path) -> None:
    torch.manual_seed(0)
    validation = zoo.make_data(40, 2, shift=0.7)
    strategy: Any = FSDPStrategy(state_dict_type="full")
    model: Any = Sharded()
    options: dict[str, Any] = {"devices": 2, "max_epochs": 2, "accelerator": "cpu" if case == "fsdp2" else "gpu"}
    if case == "fsdp2":
        strategy = ModelParallelStrategy(
            data_parallel_size=2,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend="gloo",
        )
        model = Sharded2()
    callback = zoo.chooser(recompute_batches=None, stats_dataloader=Statistics(), guard="warn")
    trainer = zoo.trainer(callback, strategy=strategy, **options)
    trainer.fit(model, DataLoader(zoo.make_data(64, 1), 8), DataLoader(validation, 10))
    path = trainer.strategy.broadcast(str(out.with_suffix(".ckpt")))
    trainer.save_checkpoint(path)
    own = torch.cat([getattr(one, name).flatten() for one in populations(model) for name in FROZEN])
    everyone = trainer.strategy.all_gather(own)
    modes = trainer.strategy.all_gather(mode_layers(model)[0].get_extra_state().float())
    assert callback.result is not None
    if trainer.global_rank == 0:
        torch.distributed.destroy_process_group()
        alone = zoo.Simple()
        saved = torch.load(path, weights_only=True)["state_dict"]
        alone.load_state_dict(saved)
        loaded = torch.cat([getattr(one, name).flatten() for one in populations(alone) for name in FROZEN])
        mode = str(mode_layers(alone)[0].mode)
        recompute_population(alone, batches(0) + batches(1))
        truth = torch.cat([getattr(one, name).flatten() for one in populations(alone) for name in FROZEN])
        order = [[*range(rank, 40, 2)] for rank in (0, 1)]
        pieces = [part[start : start + 10] for part in order for start in (0, 10)]
        scores = zoo.oracle(alone, DataLoader(validation, batch_sampler=pieces))
        found = {
            "ranks_differ": float((everyone[0] - everyone[1]).abs().max()),
            "modes_differ": float((modes[0] - modes[1]).abs().max()),
            "saved_differs": float((loaded - own).abs().max()),
            "from_truth": float(((own - truth).abs() / truth.abs().clamp(min=1)).max()),
            "mode": mode,
            "chosen": str(callback.result.chosen),
            "scores": {str(one): values["val_loss"] for one, values in callback.result.scores.items()},
            "alone": {str(one): values["val_loss"] for one, values in scores.items()},
        }
        out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
