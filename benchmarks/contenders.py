"""The contenders of each comparison, as jobs without arguments."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.measure import Job
from benchmarks.resnet import residual_network
from lightning_bln import BLNGRU, BLNLSTM, BLNRNN, BatchLayerNorm, set_mode

KINDS: dict[str, tuple[type, type]] = {"lstm": (nn.LSTM, BLNLSTM), "gru": (nn.GRU, BLNGRU), "rnn": (nn.RNN, BLNRNN)}
LARGE = [
    (80, 25, 512, 128),
    (80, 64, 128, 128),
    (100, 64, 256, 256),
    (28, 128, 28, 128),
    (512, 16, 128, 256),
    (80, 1, 128, 128),
]
SIZES = [*LARGE, (16, 512, 16, 32), (8, 32, 8, 64), (100, 16, 40, 100)]
"""The last three have few units and few inputs, where norms cost most."""
GPU_SIZES = [*LARGE, (128, 64, 256, 256), (512, 32, 512, 512)]
ONE_STEP = (1, 1, 64, 128)
"""Of one sequence, as in a loop that generates."""
ARRAYS = [(256, 1024), (64, 80, 128), (4096, 256), (32, 512, 64)]
IMAGES = [(50, 64, 32, 32), (50, 16, 32, 32), (50, 3, 32, 32), (8, 16, 64, 64), (128, 32, 8, 8), (4, 128, 14, 14)]
NETWORK = (50, 3, 32, 32)
Size = tuple[int, int, int, int]


def train(layer: nn.Module, x: Tensor) -> Job:
    """Forward and backward of one training step, without the optimizer."""

    def job() -> None:
        layer.zero_grad()
        layer(x)[0].sum().backward()

    return job


def infer(layer: nn.Module, x: Tensor) -> Job:
    """One forward pass without gradients."""

    def job() -> None:
        with torch.no_grad():
            layer(x)

    return job


def training(
    kind: str, size: Size, device: str = "cpu", dtype: torch.dtype = torch.float32, extras: bool = True
) -> dict[str, Job]:
    """Training steps of torch's layer, of ours with each norm, and of alternatives."""
    steps, samples, inputs, hidden = size
    theirs, ours = KINDS[kind]
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    x = torch.randn(steps, samples, inputs, **options)
    jobs = {"torch": train(theirs(inputs, hidden, **options), x)}
    backend = "auto" if device == "cpu" else "reference"
    for norm in ("bln", "layer", "batch", None):
        jobs[f"ours {norm}"] = train(ours(inputs, hidden, norm=norm, backend=backend, **options), x)
    if device != "cpu" or not extras:
        return jobs
    jobs["ours bln, recompute"] = train(ours(inputs, hidden, norm="bln", recompute=True), x)
    jobs["reference bln"] = train(ours(inputs, hidden, norm="bln", backend="reference"), x)
    jobs["matrix products"] = products(kind, size)
    if kind == "lstm":
        peephole = nearest(inputs, hidden)
        if peephole is not None:
            jobs["torchrecurrent PeepholeLSTM"] = train(peephole, x)
    return jobs


def compiled_reference(kind: str, size: Size) -> dict[str, Job]:
    """A training step with the inductor backend; torch.compile takes half a minute per size."""
    steps, samples, inputs, hidden = size
    layer = KINDS[kind][1](inputs, hidden, norm="bln", backend="compile")
    return {"reference bln, compiled": train(layer, torch.randn(steps, samples, inputs))}


def inference(kind: str, size: Size, device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Job]:
    """Forward passes of torch's layer, and of ours in the two modes that differ most."""
    steps, samples, inputs, hidden = size
    theirs, ours = KINDS[kind]
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    x = torch.randn(steps, samples, inputs, **options)
    jobs = {"torch": infer(theirs(inputs, hidden, **options).eval(), x)}
    for mode in ("cccc", "pppp"):
        layer = ours(inputs, hidden, norm="bln", momentum=0.1, **options)
        layer(x)
        set_mode(layer.eval(), mode)
        jobs[f"ours {mode}"] = infer(layer, x)
    jobs["ours None"] = infer(ours(inputs, hidden, norm=None, **options).eval(), x)
    return jobs


def products(kind: str, size: Size) -> Job:
    """All matrix products of a training step by torch: a lower bound for any layer that uses its BLAS."""
    steps, samples, inputs, hidden = size
    columns = {"lstm": 4, "gru": 3, "rnn": 1}[kind] * hidden
    x, h, v = torch.randn(steps * samples, inputs), torch.randn(samples, hidden), torch.randn(samples, columns)
    all_h, all_v = torch.randn(steps * samples, hidden), torch.randn(steps * samples, columns)
    w_ih, w_hh = torch.randn(columns, inputs), torch.randn(columns, hidden)

    def job() -> None:
        torch.mm(x, w_ih.t())
        for _ in range(steps):
            torch.mm(h, w_hh.t())
            torch.mm(v, w_hh)
        torch.mm(all_v.t(), x)
        torch.mm(all_v.t(), all_h)

    return job


def nearest(inputs: int, hidden: int) -> nn.Module | None:
    """torchrecurrent's LSTM with peepholes, its nearest to a plain one, or None where the package is missing."""
    try:
        import torchrecurrent
    except ImportError:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torchrecurrent.PeepholeLSTM(inputs, hidden)


def arrays(shape: tuple[int, ...]) -> dict[str, Job]:
    """Training steps of one BatchLayerNorm and of torch's two norms on the same array."""
    x = torch.randn(shape, requires_grad=True)
    layer, features = BatchLayerNorm(shape[-1]), shape[-1]
    wide = shape[1:].numel() if isinstance(shape, torch.Size) else torch.Size(shape[1:]).numel()
    parameters = [torch.ones(n, requires_grad=True) for n in (wide, wide, features, features)]

    def ours() -> None:
        x.grad = None
        layer.zero_grad()
        layer(x).sum().backward()

    def batch() -> None:
        x.grad = parameters[0].grad = parameters[1].grad = None
        F.batch_norm(x.flatten(1), None, None, *parameters[:2], training=True).sum().backward()

    def norm() -> None:
        x.grad = parameters[2].grad = parameters[3].grad = None
        F.layer_norm(x, (features,), *parameters[2:]).sum().backward()

    return {"BatchLayerNorm": ours, "F.batch_norm": batch, "F.layer_norm": norm}


NORMS_OF_IMAGES: dict[str, Callable[[int], nn.Module]] = {
    "BatchNorm2d": nn.BatchNorm2d,
    "shared": partial(BatchLayerNorm, channel_dim=1, positions="shared"),
    "separate": partial(BatchLayerNorm, channel_dim=1, positions="separate"),
}


def step(model: nn.Module, x: Tensor) -> Job:
    """Forward and backward of one training step on images, with a gradient as the next layer has."""
    grad = torch.randn_like(model(x))

    def job() -> None:
        x.grad = None
        model.zero_grad()
        model(x).backward(grad)

    return job


def images(shape: Size, memory_format: torch.memory_format = torch.contiguous_format) -> dict[str, Job]:
    """Training steps of torch's norm and of ours with either kind of positions on the same images."""
    x = torch.randn(shape).to(memory_format=memory_format).requires_grad_()
    return {name: step(norm(shape[1]), x) for name, norm in NORMS_OF_IMAGES.items()}


def networks(shape: Size) -> dict[str, Job]:
    """Training steps of a small ResNet with each norm."""
    return {name: step(residual_network(norm), torch.randn(shape)) for name, norm in NORMS_OF_IMAGES.items()}
