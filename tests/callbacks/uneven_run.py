"""Started by test_ddp.py: two gloo processes whose data differ in batches, in their sizes and in sequence length."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import lightning.pytorch as pl
import torch
import zoo
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_bln import BLNLSTM, recompute_population
from lightning_bln.modes import mode_layers
from lightning_bln.population import FROZEN
from lightning_bln.recomputation import populations

LENGTHS = (7, 5)
TRAINING = ((4, 4, 3), (4, 2, 4))
STATISTICS = ((4, 4, 4, 4, 3), (5, 2))
VALIDATION = ((6, 6, 6, 1), (6, 3))


def batches(sizes: tuple[tuple[int, ...], ...], rank: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """What ``rank`` has of a data set, whose longest sequences only rank 0 has."""
    generator = torch.Generator().manual_seed(seed + rank)
    drawn = [torch.randn(size, LENGTHS[rank], zoo.FEATURES, generator=generator) * (1 + rank) for size in sizes[rank]]
    return [(x + rank, (x.sum((1, 2)) > 0).long()) for x in drawn]


def loader(made: list[tuple[Tensor, Tensor]]) -> DataLoader:
    return DataLoader(made, batch_size=None)  # type: ignore[arg-type]


class Sequences(pl.LightningModule):
    """A recurrent classifier; with ``has_buffer`` it has a buffer that DDP would broadcast at every forward."""

    def __init__(self, lr: float, has_buffer: bool) -> None:
        super().__init__()
        self.rnn, self.head = BLNLSTM(zoo.FEATURES, 4, batch_first=True), nn.Linear(4, 2)
        self.lr = lr
        if has_buffer:
            self.register_buffer("offset", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("val_loss", loss, sync_dist=True, batch_size=len(batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Data(pl.LightningDataModule):
    def __init__(self, validation: tuple[tuple[int, ...], ...]) -> None:
        super().__init__()
        self.validation = validation

    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        return loader(batches(TRAINING, self.trainer.global_rank, 10))

    def val_dataloader(self) -> Any:
        assert self.trainer is not None
        return loader(batches(self.validation, self.trainer.global_rank, 20))


class Statistics:
    """Batches for the population, each rank's own."""

    def __iter__(self) -> Any:
        return iter(batches(STATISTICS, torch.distributed.get_rank(), 30))


def main(case: str, out: Path) -> None:
    torch.manual_seed(0)
    # with a learning rate of zero the epoch's own average is that of the final weights, and can be checked alike
    model = Sequences(0.0 if case == "epoch" else 0.1, has_buffer=case == "buffer")
    # Lightning itself broadcasts a buffer at each validation step, so there the ranks must have as many; and under gloo
    # it halves the number of samples in whole numbers, so that an odd one would be off
    validation = ((6, 6), (6, 4)) if case == "buffer" else VALIDATION
    options: dict[str, Any] = {} if case == "epoch" else {"stats_dataloader": Statistics()}
    callback = zoo.chooser(
        population="epoch" if case == "epoch" else "recompute", recompute_batches=None, guard="warn", **options
    )
    trainer = zoo.trainer(callback, strategy="ddp", devices=2, max_epochs=2, use_distributed_sampler=False)
    trainer.fit(model, datamodule=Data(validation))
    own = torch.cat([getattr(one, name).flatten() for one in populations(model) for name in FROZEN])
    everyone = trainer.strategy.all_gather(own)
    modes = trainer.strategy.all_gather(mode_layers(model)[0].get_extra_state().float())
    assert callback.result is not None
    scores = {str(mode): values["val_loss"] for mode, values in callback.result.scores.items()}
    results: list[Any] = [None, None]
    torch.distributed.all_gather_object(results, callback.result.to_dict())
    if trainer.global_rank == 0:
        torch.distributed.destroy_process_group()
        sizes, seed = (TRAINING, 10) if case == "epoch" else (STATISTICS, 30)
        samples = None if case == "epoch" else 1024
        every = [batch for rank in (0, 1) for batch in batches(sizes, rank, seed)]
        recompute_population(model, every, samples=samples)
        truth = torch.cat([getattr(one, name).flatten() for one in populations(model) for name in FROZEN])
        alone = zoo.oracle(model, loader([batch for rank in (0, 1) for batch in batches(validation, rank, 20)]))
        found = {
            "ranks_differ": float((everyone[0] - everyone[1]).abs().max()),
            "modes_differ": float((modes[0] - modes[1]).abs().max()),
            "results_differ": results[0]["scores"] != results[1]["scores"] or results[0] != results[1],
            "positions": populations(model)[0].positions[0],
            "from_truth": float(((own - truth).abs() / truth.abs().clamp(min=1)).max()),
            "scores": scores,
            "alone": {str(mode): values["val_loss"] for mode, values in alone.items()},
        }
        out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
