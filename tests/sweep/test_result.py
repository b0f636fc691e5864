"""The sweep without a Trainer: scores equal plain evaluation, and results tell the truth in every form."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_bln import ALL_MODES, BLNLSTM, BatchLayerNorm, recompute_population, set_mode
from lightning_bln._torch import OutOfMemoryError
from lightning_bln.modes import mode_layers
from lightning_bln.sweep import SweepResult, sweep_modes
from lightning_bln.sweep.shared_forward import SharedForward


class Residual(nn.Module):
    """Adds its input to what its layer makes of it, so that fanning out within it cannot work."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = BLNLSTM(5, 6, batch_first=True, num_layers=2)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out, (h, _) = self.layer(x)
        return self.head(out[:, -1]), h


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = BatchLayerNorm(5, scale=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + 0.1 * torch.randn_like(x))


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = BatchLayerNorm(5, scale=False)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        self.seen.append(y)
        return y


class Hits:
    """A metric with a state, as torchmetrics has them."""

    def __init__(self) -> None:
        self.right, self.all = 0, 0

    def update(self, out: Tensor, y: Tensor) -> None:
        self.right += int((out.argmax(-1) == y).sum())
        self.all += len(y)

    def compute(self) -> float:
        return self.right / self.all


MODELS: dict[str, tuple[Any, tuple[int, ...], bool]] = {
    "perceptron": (
        lambda: nn.Sequential(nn.Linear(5, 5), BatchLayerNorm(5), nn.Tanh(), BatchLayerNorm(5, scale=False)),
        (5,),
        True,
    ),
    "residual": (lambda: nn.Sequential(Residual(BatchLayerNorm(5)), Residual(BatchLayerNorm(5))), (5,), True),
    "recurrent": (Recurrent, (4, 5), True),
    "one layer": (lambda: BatchLayerNorm(5, scale=False), (5,), True),
    "random": (Noisy, (5,), False),
    "stateful outside its layer": (Remembers, (5,), True),
}


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def prepared(name: str) -> tuple[nn.Module, list[tuple[Tensor, Tensor]], bool]:
    make, shape, shares = MODELS[name]
    model = make()
    batches = [(torch.randn(size, *shape) + 0.5, torch.randint(3, (size,))) for size in (8, 8, 3)]
    recompute_population(model, [torch.randn(8, *shape)])
    return model, batches, shares


@pytest.mark.parametrize("name", MODELS)
def test_scores_equal_evaluating_each_mode_alone(name: str) -> None:
    model, batches, _ = prepared(name)
    model.train()
    torch.manual_seed(1)
    result = sweep_modes(
        model,
        batches,
        lambda batch: (first(model(batch[0])), batch[1]),
        {"loss": F.cross_entropy, "acc": Hits()},
    )
    assert model.training
    assert {layer.mode for layer in mode_layers(model)} == {"ppcc"}
    model.eval()
    losses = {}
    for mode in ALL_MODES:
        set_mode(model, mode)
        torch.manual_seed(1)
        with torch.no_grad():
            outs = [first(model(x)) for x, _ in batches]
        losses[mode] = sum(float(F.cross_entropy(o, y)) * len(y) for o, (_, y) in zip(outs, batches, strict=True)) / 19
        assert result.scores[mode]["loss"] == pytest.approx(losses[mode], rel=1e-5)
        right = sum(int((o.argmax(-1) == y).sum()) for o, (_, y) in zip(outs, batches, strict=True))
        assert result.scores[mode]["acc"] == pytest.approx(right / 19, abs=1e-6)
    assert len({round(value, 5) for value in losses.values()}) >= 8
    assert losses[result.best()] == pytest.approx(min(losses.values()), rel=1e-5)  # two may be equal but for rounding


class Turn:
    def __init__(self, mode: str) -> None:
        self.mode = mode


def forwards(model: nn.Module, shared: SharedForward, batches: list) -> list[int]:
    """How often the model's layers run in each batch when every mode has its turn."""
    layer, counts = mode_layers(model)[0], []
    plain = type(layer).forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        counts[-1] += 1
        return plain(layer, *args, **kwargs)

    layer.forward = counted  # type: ignore[method-assign]
    with torch.no_grad():
        for x, _ in batches:
            counts.append(0)

            def turn(run: Turn, x: Tensor = x) -> None:
                set_mode(model, run.mode)
                model(x)

            shared.each([Turn(mode) for mode in ALL_MODES], turn)
    del layer.forward
    return counts


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("recurrent", "one layer")])
def test_modes_share_one_forward_after_the_check_where_they_can(name: str) -> None:
    model, batches, shares = prepared(name)
    model.eval()
    shared = SharedForward(model)
    counts = forwards(model, shared, [*batches, batches[0]])
    assert counts[0] >= 16
    assert counts[-1] == (1 if shares else 16)
    assert shared.is_active is shares


def test_chunks_bound_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_bln.sweep.shared_module.BYTES", 5 * 8 * 5 * 4)
    model, batches, _ = prepared("perceptron")
    shared = SharedForward(model.eval())
    counts = forwards(model, shared, batches)
    assert shared.chunk == 5
    assert counts[2] == 4


def test_out_of_memory_means_smaller_chunks_then_the_plain_way() -> None:
    model, batches, _ = prepared("perceptron")
    model.eval()
    shared = SharedForward(model)
    linear = model[0]

    class Small(nn.Module):
        limit = 64

        def forward(self, x: Tensor) -> Tensor:
            if len(x) > self.limit:
                raise OutOfMemoryError("out of memory")
            return x

    model[2] = Small()
    shared = SharedForward(model)
    result = forwards(model, shared, [batches[0]] * 4)
    assert shared.chunk == 8
    assert result[-1] == 2
    model[2].limit = 8
    forwards(model, shared, [batches[0]] * 4)
    assert not shared.is_active
    assert linear is model[0]


def test_bad_arguments_are_named() -> None:
    model, batches, _ = prepared("perceptron")

    def predict(batch: Any) -> Any:
        return model(batch[0]), batch[1]

    metrics = {"loss": F.cross_entropy}
    with pytest.raises(ValueError, match="metrics is empty"):
        sweep_modes(model, batches, predict, {})
    with pytest.raises(ValueError, match="modes is empty"):
        sweep_modes(model, batches, predict, metrics, [])
    with pytest.raises(ValueError, match="batches is empty"):
        sweep_modes(model, [], predict, metrics)
    with pytest.raises(ValueError, match="monitor='f1'"):
        sweep_modes(model, batches, predict, metrics, monitor="f1")
    with pytest.raises(ValueError, match="no layer with a statistics mode"):
        sweep_modes(nn.Linear(2, 2), batches, predict, metrics)
    with pytest.raises(ValueError, match="mode='up'"):
        sweep_modes(model, batches, predict, metrics, mode="up")  # type: ignore[arg-type]


def result(**options: Any) -> SweepResult:
    scores = {mode: {"loss": 0.1 * index, "acc": 1 - 0.1 * index} for index, mode in enumerate(ALL_MODES)}
    scores["pppp"]["loss"] = math.nan
    return SweepResult(scores, "loss", **options)


def test_best_by_either_direction_and_metric() -> None:
    assert result().best() == "pppc"
    assert result().best("acc", "max") == "pppp"
    assert result().best(among=["cccc", "pccc"]) == "pccc"
    assert result(mode="max").best() == "cccc"
    with pytest.raises(ValueError, match="monitor='f1'"):
        result().best("f1")


def test_json_round_trip(tmp_path: Path) -> None:
    made = result(incumbent="ppcc", chosen="pppc", regrouped={"pppc": (0.5, math.inf)}, note="so it is")
    text = made.to_json(tmp_path / "result.json")
    for source in (text, tmp_path / "result.json"):
        read = SweepResult.from_json(source)
        assert math.isnan(read.scores["pppp"]["loss"])
        assert read.to_dict() == made.to_dict()


def test_table_ranks_and_marks() -> None:
    lines = str(result(incumbent="ppcc", chosen="ppcp")).splitlines()
    assert lines[0].split() == ["mode", "loss", "acc"]
    assert lines[1].split() == ["pppc", "0.1000", "0.9000", "best"]
    assert lines[2].split() == ["ppcp", "0.2000", "0.8000", "chosen"]
    assert lines[-1].startswith("pppp")


def test_heat_map_marks_the_best_and_the_incumbent() -> None:
    figure = result(incumbent="ppcc", chosen="pppc").plot()
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts][:2] == ["nan", "0.1000"]
    assert sorted(patch.get_label() for patch in axes.patches) == ["best: pppc", "incumbent: ppcc"]
