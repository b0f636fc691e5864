"""Cases that each rank of test_distributed.py runs; with ``rank=None``, one process runs them on the joined batches."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, Sampler, TensorDataset

from lightning_bln import BLNLSTM, BatchLayerNorm, Normalization, Recurrent, recompute_population
from lightning_bln.callbacks import BLNStatsCallback
from lightning_bln.population import FROZEN
from lightning_bln.recomputation import populations

SIZES = {2: (3, 5), 3: (2, 4, 1)}
"""Samples on each rank, by the number of ranks."""

LAYERS: dict[str, dict[str, Any]] = {
    "flat": {"shape": (6,)},
    "steps": {"shape": (4, 6)},
    "images": {"shape": (2, 3, 6)},
    "shared": {"shape": (4, 6), "positions": "shared"},
    "paper": {"shape": (4, 6), "population": "paper"},
    "momentum": {"shape": (4, 6), "momentum": 0.3},
    "batch": {"shape": (4, 6), "norm": "batch"},
    "layer": {"shape": (4, 6), "norm": "layer"},
    "masked": {"shape": (4, 6), "masks": True},
    "masked flat": {"shape": (6,), "masks": True},
    "masked images": {"shape": (2, 3, 6), "masks": True},
    "masked shared": {"shape": (4, 6), "masks": True, "positions": "shared"},
    "masked paper": {"shape": (4, 6), "masks": True, "population": "paper"},
    "masked momentum": {"shape": (4, 6), "masks": True, "momentum": 0.3},
    "masked on one rank": {"shape": (4, 6), "masks": [0]},
}


def part(x: Tensor, rank: int | None, world: int) -> Tensor:
    """A rank's part of a batch; the whole batch for one process."""
    return x if rank is None else x.split(SIZES[world])[rank]


def frozen(model: nn.Module) -> list[Tensor]:
    return [getattr(population, name) for population in populations(model) for name in FROZEN]


def mask_of(joined: Tensor, masks: bool | list[int], rank: int | None, world: int) -> Tensor | None:
    """A rank's mask of its part of ``joined``: of all ranks, or of those in the list; a last step that none has."""
    if not masks:
        return None
    mask = torch.rand(joined.shape[:-1], generator=torch.Generator().manual_seed(3)) > 0.4
    if masks is True and mask.ndim == 2:
        mask[:, -1] = False
    for place, size in enumerate(SIZES[world]):
        if masks is not True and place not in masks:
            mask[sum(SIZES[world][:place]) :][:size] = True
    return part(mask, rank, world) if rank is None or masks is True or rank in masks else None


def layer_case(name: str, rank: int | None, world: int) -> dict[str, Any]:
    """Two training batches through one layer, then its population: outputs, gradients, statistics."""
    torch.manual_seed(1)
    options = dict(LAYERS[name])
    shape, masks = options.pop("shape"), options.pop("masks", False)
    layer = Normalization(6, sync_batch_stats=rank is not None, dtype=torch.float64, **options)
    outputs, grads = [], []
    for _ in range(2):
        joined = torch.randn(sum(SIZES[world]), *shape, dtype=torch.float64) * 3 + 1
        wanted = torch.randn_like(joined)
        x = part(joined, rank, world).clone().requires_grad_()
        y = layer(x, mask_of(joined, masks, rank, world))
        (y.sin() * part(wanted, rank, world)).sum().backward()
        outputs.append(y.detach())
        grads.append(x.grad)
    own = [parameter.grad for parameter in layer.parameters()]
    if rank is not None:
        for grad in own:
            dist.all_reduce(grad)
    layer.population.freeze()
    return {"outputs": outputs, "grads": grads, "weights": own, "population": frozen(layer)}


def longer_case(rank: int, world: int) -> dict[str, Any]:
    """Sequences that differ in length between ranks: a step's statistics are over the ranks that reach it."""
    torch.manual_seed(2)
    sequences = [torch.randn(size, 3 + place, 6, dtype=torch.float64) for place, size in enumerate(SIZES[world])]
    layer = BatchLayerNorm(6, sync_batch_stats=True, dtype=torch.float64)
    layer(sequences[rank])
    layer.population.freeze()
    return {"population": frozen(layer), "sequences": sequences}


def network(synced: bool) -> nn.Sequential:
    torch.manual_seed(3)
    norm = BatchLayerNorm(5, sync_batch_stats=synced, scale=1.0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), norm, nn.Linear(5, 3)).double()


def training_case(rank: int | None, world: int) -> dict[str, Any]:
    """Three steps of DDP on uneven parts, then the population over uneven numbers of batches."""
    torch.manual_seed(4)
    total = sum(SIZES[world])
    batches = [torch.randn(total, 4, dtype=torch.float64) for _ in range(3)]
    model = network(synced=rank is not None)
    trained: nn.Module = model if rank is None else DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x in batches:
        optimizer.zero_grad()
        # DDP averages gradients over ranks; times the number of ranks that is their sum
        (trained(part(x, rank, world)).square().sum() / total * (1 if rank is None else world)).backward()
        optimizer.step()
    own = batches[:2]
    if rank is None:  # the last rank has one batch only
        own = [batches[0], batches[1][: total - SIZES[world][-1]]]
    else:
        own = [part(x, rank, world) for x in (batches[:1] if rank == world - 1 else batches[:2])]
    recompute_population(model, own)
    return {"weights": [one.detach() for one in model.parameters()], "population": frozen(model)}


class Shares(Sampler):
    """Each rank's batches: those of one process, dealt in turn."""

    def __init__(self, batches: list[list[int]], rank: int, world: int) -> None:
        self.batches = batches[rank::world]

    def __iter__(self) -> Any:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class Regression(L.LightningModule):
    """Logs a loss that is averaged over ranks by the number of samples."""

    def __init__(self, synced: bool) -> None:
        super().__init__()
        self.net = network(synced)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.net(batch[0]) - batch[1]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = (self.net(batch[0]) - batch[1]).square().mean()
        self.log("val_loss", loss, sync_dist=True, on_epoch=True, batch_size=len(batch[0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def trainer_case(rank: int | None, world: int, folder: Path) -> dict[str, Any]:
    """A fit with the callback: weights, population and every mode's score."""
    warnings.simplefilter("ignore")
    torch.set_default_dtype(torch.float64)  # of what is logged
    try:
        return fitted(rank, world, folder)
    finally:
        torch.set_default_dtype(torch.float32)


def fitted(rank: int | None, world: int, folder: Path) -> dict[str, Any]:
    torch.manual_seed(5)
    x = torch.randn(12 * world, 4, dtype=torch.float64)
    data = TensorDataset(x, x[:, :3].cos())
    order = list(range(len(x)))
    # training: in one process batches of 4 * world, 4 a rank; validation: each rank every world-th batch
    joined = [order[start : start + 4 * world] for start in range(0, len(order), 4 * world)]
    pieces = [order[start : start + 3] for start in range(0, len(order), 3)]
    if rank is not None:
        joined = [batch[4 * rank : 4 * rank + 4] for batch in joined]
        pieces = pieces[rank::world]
    module = Regression(synced=rank is not None)
    callback = BLNStatsCallback(verbose=False, guard="off")
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1 if rank is None else world,
        strategy="auto" if rank is None else "ddp",
        max_epochs=2,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    trainer.callbacks.append(callback)
    trainer.fit(module, DataLoader(data, batch_sampler=joined), DataLoader(data, batch_sampler=pieces))
    scores = [torch.tensor(values["val_loss"], dtype=torch.float64) for values in callback.result.scores.values()]
    return {
        "weights": [one.detach() for one in module.parameters()],
        "population": frozen(module),
        "scores": scores,
        "mode": str(module.net[2].mode),
    }


def sharded_case(rank: int | None, world: int) -> dict[str, Any]:
    """A step with the weights sharded over the ranks (FSDP2)."""
    torch.manual_seed(6)
    total = sum(SIZES[world])
    x = torch.randn(total, 4, dtype=torch.float64)
    model = network(synced=rank is not None)
    if rank is not None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    (model(part(x, rank, world)).square().sum() / total * (1 if rank is None else world)).backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.step()
    weights = [one.full_tensor() if hasattr(one, "full_tensor") else one for one in model.parameters()]
    recompute_population(model, [part(x, rank, world)])
    return {"weights": [one.detach() for one in weights], "population": frozen(model)}


def recurrent_case(rank: int | None, world: int) -> dict[str, Any]:
    """The population of a recurrence over batches of different lengths, dealt to the ranks; the last has fewer."""
    torch.manual_seed(7)
    lengths = [4, 6, 5, 3, 6, 2, 4][: 2 * world + 1]
    batches = [pack_sequence(list(torch.randn(3, length, 4, dtype=torch.float64))) for length in lengths]
    layers = nn.ModuleList(
        [BLNLSTM(4, 5, dtype=torch.float64), Recurrent("gru", 4, 5, norm="batch", dtype=torch.float64)]
    )
    for layer in layers:
        recompute_population(layer, batches if rank is None else batches[rank::world])
    return {"population": frozen(layers)}


def batchnorm_case(rank: int | None, world: int) -> dict[str, Any]:
    """Running statistics over batches of different sizes, dealt to the ranks; the last has fewer."""
    torch.manual_seed(8)
    batches = [torch.randn(size, 3, 5, dtype=torch.float64) + size for size in [4, 2, 5, 3, 1, 2, 4][: 2 * world + 1]]
    found = {}
    for samples in (None, 1024):
        torch.manual_seed(9)
        model = nn.Sequential(
            nn.BatchNorm1d(3), nn.Conv1d(3, 4, 2), nn.BatchNorm1d(4), BatchLayerNorm(4, channel_dim=1)
        ).double()
        recompute_population(model, batches if rank is None else batches[rank::world], samples=samples)
        running = [buffer for name, buffer in model.named_buffers() if "running" in name]
        found[f"population {samples}"] = [*running, *frozen(model)]
    return found


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    results: dict[str, Any] = {name: layer_case(name, rank, world) for name in LAYERS}
    results["longer"] = longer_case(rank, world)
    results["recurrent"] = recurrent_case(rank, world)
    results["batchnorm"] = batchnorm_case(rank, world)
    results["training"] = training_case(rank, world)
    results["trainer"] = trainer_case(rank, world, folder)
    try:
        results["sharded"] = sharded_case(rank, world)
    except Exception as error:
        results["sharded"] = repr(error)
    torch.save(results, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
