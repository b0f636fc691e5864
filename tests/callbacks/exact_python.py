"""Steps in which Python decides, and steps that call what is not torch."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from exact_modules import Exact, Functional
from torch import Tensor, nn


def branch(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    out = net(x)
    return out.mean() if out.max() > out.min().abs() else 2 * out.mean() + out.std(correction=0)


def branch_sometimes(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    out = net(x)
    if i == 1 and out.mean() > 0:
        return out.square().mean()
    return F.cross_entropy(out, y)


def until_converged(net: Any, x: Tensor, y: Tensor, i: int) -> Any:
    h, steps = net(x), 0
    while h.norm() > 1 and steps < 50:
        h, steps = h * 0.7, steps + 1
    return {"val_loss": h.sum(), "steps": float(steps)}


def early_exit(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    h = net.first(x)
    if h.mean() > 0.45:
        return h.mean()
    return net.second(h).mean() + 1


def caught(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    out = net(x)
    try:
        return out.mean() * (1 if out.mean() > 0 else 3)
    except Exception:
        return out.mean() * 7


def caught_bare(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    out = net(x)
    try:
        number = float(out.mean())
    except:  # noqa: E722 that users write
        number = -1.0
    return out.mean() + number


def caught_in_finally(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    out, found = net(x), torch.tensor(5.0)
    try:
        found = torch.tensor(out.mean().item())
    finally:
        return found  # noqa: B012 that users write


def caught_then_raised_again(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    out = net(x)
    try:
        if out.sum() > 0:
            raise ValueError
    except ValueError:
        return out.mean() - 10
    return out.mean()


def sorted_by_python(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    rows = sorted(net(x), key=lambda row: float(row[0]))
    return (torch.stack(rows) * torch.arange(len(rows))[:, None]).mean()


def maximum_by_python(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    return max(net(x).mean(0)) + min(net(x)[0]) + sum(net(x).mean(0))


def hashed(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    out = net(x)
    known = {out: 1.0}
    return out.mean() * known[out]


def formatted(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    out = net(x).mean()
    return out + len(f"{out:.3f}") + len(str(out > 0))


def as_json(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    return torch.tensor(json.loads(json.dumps(net(x).tolist()))).square().mean()


def table_of_words(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    words = ["no", "maybe", "yes"]
    said = [words[int(one)] for one in net(x).argmax(1)]
    return torch.tensor(float(sum(map(len, said)))) + net(x).mean()


def index_of_a_list(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    return torch.tensor([3.0, 5.0, 7.0][net(x)[0].argmax()]) + net(x).mean()


def in_range(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    return net(x).mean() + sum(range(net(x)[0].argmax() + 2))


def beam(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    """Greedy decoding that stops at a token."""
    state, tokens = net.first(x)[:1], []
    for _ in range(6):
        state = net.second(state)
        token = net.head(state).argmax(-1).item()
        tokens.append(token)
        if token == 0:
            break
    return torch.tensor(float(sum(tokens) + 10 * len(tokens))) + net(x).mean()


def halting(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    """Samples leave the batch when they are sure."""
    h, left = net.first(x), torch.arange(len(x))
    out = torch.zeros(len(x), 3)
    for depth in range(3):
        scores = net.head(net.second(h))
        sure = scores.softmax(1).amax(1) > 0.5
        out[left[sure]] = scores[sure] * (depth + 1)
        h, left = h[~sure] * 2, left[~sure]
        if not len(left):
            break
    return out.mean() + net(x).mean()


def unequal_shapes(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    out = net(x)
    chosen = out[out[:, 0] > 0]
    return torch.cat([chosen, torch.ones(1, 3)]).std(correction=0) + len(chosen)


def numpy_functions(net: Any, x: Tensor, y: Tensor, i: int) -> Any:
    out = net(x)
    array = out.detach().cpu().numpy()
    return {
        "val_loss": float(np.mean(array)),
        "asarray": float(np.asarray(out.detach()).max()),
        "array": float(np.array(out).min()),
        "list": float(np.array(out.tolist()).std()),
        "of a tensor": float(np.sum(array * y.numpy()[:, None])),
    }


def numpy_of_tensors(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    out = net(x).detach()
    return torch.as_tensor(np.exp(out)).mean() + float(np.dot(out[0], out[0]))


def numpy_back(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    array = net(x).numpy()
    array += 1
    return torch.from_numpy(array).mean()


def numpy_first(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    return torch.from_numpy(np.ones(3, dtype=np.float32) * x.numpy().mean() + net(x).mean(0).numpy()).sum()


def scipy_metrics(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    from scipy import stats
    from scipy.special import softmax

    if len(x) < 2:
        return net(x).mean()
    ranks = stats.spearmanr(net(x)[:, 0], x[:, 0]).statistic
    return torch.tensor(ranks + softmax(net(x), axis=0).max(), dtype=torch.float32)


def sklearn_metrics(net: Any, x: Tensor, y: Tensor, i: int) -> Any:
    from sklearn.metrics import accuracy_score, confusion_matrix, log_loss

    found = net(x)
    return {
        "val_loss": log_loss(y, found.softmax(1).double(), labels=[0, 1, 2]),
        "accuracy": accuracy_score(y, found.argmax(1)),
        "matrix": float(confusion_matrix(y.numpy(), found.argmax(1).numpy(), labels=[0, 1, 2])[0].sum()),
    }


def dlpack(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    return (
        torch.from_dlpack(net(x)).mean() + torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(net(x))).mean()
    )


def numpy_dlpack(net: Any, x: Tensor, y: Tensor, i: int) -> float:
    return float(np.from_dlpack(net(x)).mean())


def deep_copied(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    return copy.deepcopy(net(x)).mean() + copy.copy(net(x)).max()


def copied_model(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    """A copy of the network with other weights, as an average of weights has."""
    own = copy.deepcopy(net.head)
    with torch.no_grad():
        own.weight.mul_(2)
    return own(net.hidden(x)).mean()


def copied_layers(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    return copy.deepcopy(net.first)(x).mean() + net(x).mean()


def buffers_of_bytes(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    import io

    file = io.BytesIO()
    torch.save(net(x), file)
    file.seek(0)
    return torch.load(file).mean()


def pickled(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    import pickle

    return pickle.loads(pickle.dumps(net(x))).mean()


def storage(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    return (
        torch.tensor(net(x).clone().untyped_storage().nbytes() / 100 + net(x).clone().storage_offset()) + net(x).mean()
    )


def strided(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    return net(x).clone().as_strided((len(x),), (3,), 1).sum() + net(x).mean()


def made_of_numbers(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    out = net(x)
    return torch.tensor([out[0, 0], out[0, 1]]).sum() + torch.as_tensor(out).mean() + torch.tensor(out[0]).mean()


def subclass(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    class Own(Tensor):
        pass

    return net(x).as_subclass(Own).mean().as_subclass(Tensor)


def data_attribute(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    out = net(x)
    out.data = out.data * 2
    return out.mean()


def written_data(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    out = net(x)
    out.data[0] = 1.0
    out.data.mul_(2)
    return out.mean()


def types_of_it(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    out = net(x)
    made = torch.empty(out.shape, dtype=out.dtype, device=out.device).copy_(out)
    like = torch.full_like(out, 2) + out.new_zeros(3) + out.new_tensor([1.0, 2.0, 3.0]) + torch.rand_like(out)
    return made.type_as(y).float().mean() + (like * out).mean() + torch.result_type(out, y).itemsize


def at_random_by_it(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    out = net(x)
    return (torch.bernoulli(out.sigmoid()) + torch.normal(out, 1.0) + out.clone().uniform_() + random.random()).mean()


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x * x.abs().max()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


class Counting(torch.autograd.Function):
    """Leaves torch for numpy."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(np.tanh(x.detach().numpy()))

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return gradient


@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    return x / x.abs().max() if bool(x.mean() > 0) else x.cumsum(0)


if not hasattr(torch.library, "custom_op"):
    pytest.skip("needs torch.library.custom_op, from torch 2.4 on", allow_module_level=True)


@torch.library.custom_op("exact::scaled", mutates_args=())
def scaled(x: Tensor) -> Tensor:
    return torch.from_numpy(x.detach().numpy() / np.abs(x.detach().numpy()).max())


@torch.library.custom_op("exact::doubled_", mutates_args={"x"})
def doubled_(x: Tensor) -> None:
    x.mul_(2)


def custom_op(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    return scaled(net(x)).mean() + net(x).mean()


def custom_op_in_place(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    out = net(x)
    doubled_(out)
    return out.mean()


class Compiled(Exact):
    """A part of it is compiled."""

    what = "head"

    def build(self) -> None:
        if self.what == "head":
            self.head = torch.compile(nn.Sequential(self.head), backend="eager")
        if self.what == "second":
            self.second = torch.compile(self.second, backend="eager")
        if self.what == "method":
            self.head.compile(backend="eager")


class Sometimes(Exact):
    """Decides in some epochs only."""

    def build(self) -> None:
        self.epochs = 0

    def on_train_epoch_start(self) -> None:
        self.epochs += 1

    def values(self, x: Tensor, y: Tensor, batch_idx: int) -> Any:
        out = self(x)
        if self.epochs == 2 and batch_idx == 1:
            return out.max() if out.mean() > 0 else out.min()
        return F.cross_entropy(out, y)


FUNCTIONS = (
    branch, branch_sometimes, until_converged, early_exit, caught, caught_bare, caught_in_finally,
    caught_then_raised_again, sorted_by_python, maximum_by_python, hashed, formatted, as_json,
    table_of_words, index_of_a_list, in_range, beam, halting, unequal_shapes, numpy_functions, numpy_of_tensors,
    numpy_back, numpy_first, scipy_metrics, sklearn_metrics, dlpack, numpy_dlpack, deep_copied,
    copied_model, copied_layers, buffers_of_bytes, pickled, storage, strided, made_of_numbers, subclass,
    data_attribute, written_data, types_of_it, at_random_by_it, custom_op, custom_op_in_place,
)  # fmt: skip
STEPS: dict[str, Callable[..., Any]] = {
    **{function.__name__.replace("_", " "): function for function in FUNCTIONS},
    "an own function of autograd": lambda net, x, y, i: Doubled.apply(net(x)).mean(),
    "numpy in a function of autograd": lambda net, x, y, i: Counting.apply(net(x)).mean(),
    "a scripted function": lambda net, x, y, i: scripted(net(x)).mean() + net(x).mean(),
    "item": lambda net, x, y, i: F.cross_entropy(net(x), y).item(),
    "int": lambda net, x, y, i: int(net(x).argmax()) + float(net(x).mean()),
    "an assertion": lambda net, x, y, i: (net(x).mean(), torch._assert(net(x).abs().max() < 1e6, "large"))[0],
    "equal": lambda net, x, y, i: (
        net(x).mean() + torch.equal(net(x), net(x)) + torch.allclose(net(x), net(x) + 1, atol=0.9)
    ),
    "all and any": lambda net, x, y, i: net(x).mean() + ((net(x) > -0.5).all() and (net(x) < 0.5).any()),
    "is it in": lambda net, x, y, i: net(x).mean() + float(1 in net(x).argmax(1)),
    "clamped by itself": lambda net, x, y, i: net(x).clamp(max=net(x).mean().item()).mean(),
    "a format of data": lambda net, x, y, i: net(x).mean() + net(x).element_size() + net(x).nbytes + net(x).stride(0),
}
MODULES: dict[str, Callable[[], Any]] = {
    **{name: (lambda function=function: Functional(function)) for name, function in STEPS.items()},
    "compiled head": type("Compiled", (Compiled,), {"what": "head"}),
    "compiled layers": type("Compiled", (Compiled,), {"what": "second"}),
    "compiled in place": type("Compiled", (Compiled,), {"what": "method"}),
    "in some epochs": Sometimes,
}
