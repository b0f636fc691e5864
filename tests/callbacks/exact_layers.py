"""Modules that hook layers, add, freeze and exchange them, and steps that take gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from exact_modules import Exact, Functional, norm
from torch import Tensor, nn


class Hooked(Exact):
    """A hook of a layer keeps the largest output in the module."""

    def setup(self, stage: str) -> None:
        self.seen, self.norms = [], {}
        for handle in getattr(self, "handles", ()):
            handle.remove()
        self.handles = [
            self.first[0].register_forward_hook(self.looked),
            self.second.register_forward_pre_hook(self.before),
            self.second[1].register_forward_hook(self.changed),
        ]

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.seen, self.norms, self.largest = [], {}, None

    def looked(self, module: Any, inputs: Any, output: Tensor) -> None:
        self.seen.append(output.detach().max())

    def before(self, module: Any, inputs: Any) -> None:
        self.largest = inputs[0].detach().max()
        self.norms.setdefault("norm", []).append(inputs[0].detach().norm())

    def changed(self, module: Any, inputs: Any, output: Tensor) -> Tensor:
        return output * 0.5 + output.mean()

    def values(self, x: Tensor, y: Tensor, i: int) -> Any:
        loss = F.cross_entropy(self(x), y)
        kept = torch.stack(self.norms["norm"]).mean()
        return {"val_loss": loss, "largest": self.largest, "kept": kept, "seen": torch.stack(self.seen).sum()}


class HookedInStep(Exact):
    """A hook for one call, its values in a closure."""

    def values(self, x: Tensor, y: Tensor, i: int) -> Any:
        found: dict[str, Any] = {}
        handles = [
            self.first[1].register_forward_hook(lambda module, inputs, output: found.update(norm=output.abs().max())),
            self.head.register_forward_pre_hook(lambda module, inputs: found.update(before=inputs[0].mean(0))),
        ]
        loss = F.cross_entropy(self(x), y)
        for handle in handles:
            handle.remove()
        return {"val_loss": loss + found["norm"], "before": found["before"].max()}


class HookedBetweenEpochs(Hooked):
    """Hooks from the second epoch on."""

    def setup(self, stage: str) -> None:
        self.epochs = getattr(self, "epochs", 0)

    def on_train_epoch_start(self) -> None:
        self.epochs += 1
        if self.epochs == 2:
            Hooked.setup(self, "fit")

    def values(self, x: Tensor, y: Tensor, i: int) -> Any:
        return super().values(x, y, i) if self.epochs == 2 else F.cross_entropy(self(x), y)


class Changing(Exact):
    """Something about its layers is another from the second epoch on."""

    def build(self) -> None:
        self.epochs = 0

    def on_train_epoch_start(self) -> None:
        self.epochs += 1
        if self.epochs == 2:
            self.change()

    def change(self) -> None:
        raise NotImplementedError


class Added(Changing):
    def change(self) -> None:
        self.second.append(nn.Softmax(0))


class AddedNorm(Changing):
    def change(self) -> None:
        self.second.append(norm())


class Frozen(Changing):
    def change(self) -> None:
        self.first.requires_grad_(False)


class Exchanged(Changing):
    def change(self) -> None:
        self.second = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), norm())


class OtherForward(Changing):
    def change(self) -> None:
        self.forward = self.centred  # type: ignore[method-assign]

    def centred(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x) - self.hidden(x).mean(0))


def saliency(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        x = x.clone().requires_grad_(True)
        loss = F.cross_entropy(net(x), y)
        (gradient,) = torch.autograd.grad(loss, x)
    return gradient.abs().sum() + loss.detach()


def penalty(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    """The norm of a gradient, and its gradient."""
    with torch.enable_grad():
        x = x.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), x)
    return second.norm() + gradient.detach().norm(dim=1).max()


def adversarial(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    with torch.enable_grad():
        x = x.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(F.cross_entropy(net(x), y), x)
    return F.cross_entropy(net(x.detach() + 0.3 * gradient.sign()), y)


def of_hidden(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    """A map by the gradient of what a layer gives."""
    with torch.enable_grad():
        h = net.hidden(x)
        h.requires_grad_(True)
        (gradient,) = torch.autograd.grad(net.head(h)[:, 0].sum(), h)
    return (gradient * h).sum().detach() + h.detach().mean()


def of_detached_hidden(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    with torch.enable_grad():
        h = net.hidden(x).detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(net.head(h).square().sum(), h)
    return (gradient * h).sum().detach()


def weights(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    with torch.enable_grad():
        gradients = torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()), allow_unused=True)
    return torch.stack([one.norm() for one in gradients if one is not None]).norm()


def backward(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    with torch.enable_grad():
        F.cross_entropy(net(x), y).backward()
    norms = torch.stack([one.grad.norm() for one in net.parameters()])
    net.zero_grad()
    return norms.norm()


def backward_to_the_input(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    with torch.enable_grad():
        x = x.clone().requires_grad_(True)
        F.cross_entropy(net(x), y).backward(inputs=[x])
    return x.grad.abs().mean()


def adapted(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    """A step of descent on a copy of some weights, as in meta-learning."""
    with torch.enable_grad():
        weight = net.head.weight.detach().clone().requires_grad_(True)
        loss = F.cross_entropy(F.linear(net.hidden(x), weight), y)
        (gradient,) = torch.autograd.grad(loss, weight)
    return F.cross_entropy(F.linear(net.hidden(x), weight.detach() - gradient), y)


def descent(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    """An optimizer within the step, over its own variable."""
    with torch.enable_grad():
        shift = torch.zeros(8, requires_grad=True)
        optimizer = torch.optim.SGD([shift], lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(net.head(net.hidden(x) + shift), y).backward()
            optimizer.step()
    net.zero_grad()
    return F.cross_entropy(net.head(net.hidden(x) + shift.detach()), y)


def jacobian(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    return torch.func.vmap(torch.func.jacrev(net.head))(net.hidden(x)).square().mean() + net(x).mean()


def functional_call(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    doubled = {name: 2 * one for name, one in net.head.named_parameters()}
    return torch.func.functional_call(net.head, doubled, (net.hidden(x),)).mean()


GRADIENTS = (
    saliency, penalty, adversarial, of_hidden, of_detached_hidden, weights, backward, backward_to_the_input, adapted,
    descent, jacobian, functional_call,
)  # fmt: skip


def functional(step: Callable[..., Any]) -> Callable[[], Any]:
    return lambda: Functional(step)


MODULES: dict[str, Callable[[], Any]] = {
    "hooks": Hooked,
    "hooks in the step": HookedInStep,
    "hooks from the second epoch on": HookedBetweenEpochs,
    "a layer added": Added,
    "a layer with a mode added": AddedNorm,
    "layers frozen": Frozen,
    "layers exchanged": Exchanged,
    "another forward": OtherForward,
}
WITH_GRADIENTS: dict[str, Callable[[], Any]] = {step.__name__.replace("_", " "): functional(step) for step in GRADIENTS}
