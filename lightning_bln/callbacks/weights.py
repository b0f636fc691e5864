"""Weights of a module: kept over steps that may write into them, and told apart from those of before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_bln._torch import own_buffers, own_modules, own_parameters
from lightning_bln.callbacks.backup import Backup
from lightning_bln.callbacks.readings import same_entries
from lightning_bln.population import Population


class KeptWeights:
    """Parameters, gradients and children of a module as they are, to be put back.

    Meanwhile no parameter has a gradient, as none has at the first step of a fit.

    Args:
        module: The module.
        contents: Whether to keep what the parameters hold; not where they are shards, which their wrapper exchanges.
        others: Further tensors to keep the contents of, by name.
    """

    def __init__(self, module: nn.Module, contents: bool, others: dict[str, Tensor]) -> None:
        places: list[dict[str, Any]] = []
        if contents:
            parts = [one for one in module.modules() if not isinstance(one, torch.jit.ScriptModule)]
            places = [place for one in parts for place in (own_parameters(one), own_modules(one))]
        self.places = [(place, dict(place)) for place in places]
        self.parameters = dict(module.named_parameters()) if contents else {}
        self.flags = [(one, one.requires_grad, one.grad) for one in self.parameters.values()]
        for parameter in self.parameters.values():
            parameter.grad = None
        self.backup = Backup({**others, **self.parameters})

    def restore(self) -> list[str]:
        """Put all back; return the names of tensors that steps have written into."""
        for place, values in self.places:
            if not same_entries(place, values):
                place.clear()
                place.update(values)
        try:
            return self.backup.restore()
        finally:
            for parameter, requires_grad, grad in self.flags:
                parameter.requires_grad_(requires_grad)
                parameter.grad = grad


@dataclass
class Fingerprint:
    """Checksums by which weights are told from those of before: no change of a single number goes unseen.

    Args:
        modules: The module at each place in the model.
        parameters: Checksums of parameters.
        buffers: Checksum of each buffer by its name.
    """

    modules: dict[str, int]
    parameters: dict[str, int]
    buffers: dict[str, int]


def fingerprint(module: nn.Module) -> Fingerprint:
    """The fingerprint of this rank's weights and buffers; populations and metrics count for nothing."""
    modules = {name: id(one) for name, one in module.named_modules() if not isinstance(one, (Population, Metric))}
    groups: dict[str, list[Tensor]] = {}
    for name, parameter in module.named_parameters():
        raw = bytes_of(parameter)
        groups.setdefault(name if len(raw) > SMALL else f"small ones on {raw.device}", []).append(raw)
    sums = {name: checksum(torch.cat(parts) if len(parts) > 1 else parts[0]) for name, parts in groups.items()}
    return Fingerprint(modules, as_integers(sums), fingerprint_of_buffers(module))


def fingerprint_of_buffers(module: nn.Module) -> dict[str, int]:
    """Checksum of each buffer by its name."""
    found: dict[str, Tensor] = {}
    for prefix, one in module.named_modules():
        if not isinstance(one, (Population, Metric)):
            found |= {f"{prefix}.{name}": value for name, value in own_buffers(one).items() if value is not None}
    return as_integers({name: checksum(bytes_of(value)) for name, value in found.items()})


def as_integers(sums: dict[str, Tensor]) -> dict[str, int]:
    """Checksums as numbers, fetched from their device at once."""
    devices = {one.device for one in sums.values()}
    values = [*sums.values()] if len(devices) == 1 else [one.cpu() for one in sums.values()]
    return dict(zip(sums, torch.stack(values).tolist(), strict=True)) if sums else {}


def bytes_of(value: Tensor) -> Tensor:
    """The bytes of this rank's part of a tensor; none of one that is not dense."""
    local = value.to_local() if hasattr(value, "to_local") else value
    if local.layout != torch.strided or local.is_meta:
        return torch.empty(0, dtype=torch.uint8)
    return local.detach().contiguous().view(-1).view(torch.uint8)


SMALL = 2**16
"""Bytes of a parameter up to which it shares a checksum with others, in which places count."""
ROW = 1024


def checksum(raw: Tensor) -> Tensor:
    """A sum of 64-bit words, each times a number that depends on its place, as fast as memory.

    The factors are odd and the ring is that of 64-bit integers, so that a change of one word always shows.
    """
    if raw.storage_offset() % 8:
        raw = raw.clone()
    whole = len(raw) // 8 * 8
    words, rest = raw[:whole].view(torch.int64), raw[whole:].to(torch.int64)
    rows = len(words) // ROW
    total = weighed(torch.cat([words[rows * ROW :], rest]), 2 * MIX, 1)
    if rows:
        table = words[: rows * ROW].view(rows, ROW)
        total = total + weighed(table.sum(1), 2, 1) + weighed(table.sum(0), 4 * MIX, 0)
    return total


MIX = 0x9E3779B97F4A7C15 >> 8
"""A large number without a pattern."""


def weighed(values: Tensor, step: int, start: int) -> Tensor:
    """The sum of integers, each times its place's factor."""
    factors = torch.arange(1, len(values) + 1, device=values.device) * step + start
    return (values * factors).sum()
