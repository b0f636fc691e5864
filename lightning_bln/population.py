"""Population statistics of a layer: gathered from batches, then frozen for inference."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_bln import traced
from lightning_bln._checks import check_bool, check_choice, check_floating, check_int, check_momentum
from lightning_bln._torch import is_fake, is_observed, is_repetition, lasting, own_buffers
from lightning_bln._writing import may_hold, one_at_a_time
from lightning_bln.equation import Statistics
from lightning_bln.modes import warn_outdated
from lightning_bln.moments import Moments, are_of_image, check_one_batch, filled, merge_grown, position_mismatch

ESTIMATORS = ("pooled", "paper")
FROZEN = (*Statistics._fields, "batch_size")
"""Buffers that are frozen."""
POSITIONAL = ("count", "feature_mean", "feature_var", "batch_size")
"""Buffers without a feature axis."""
NOTHING_SEEN = (0.0, 1.0, 0.0, 1.0, 1.0)
"""Frozen values where no position of a kind has had data: each sample is normalised by its own features."""


class Observed(NamedTuple):
    """Statistics of one batch at every position: ``(*positions, d)`` over the batch, ``(*positions)`` otherwise."""

    batch_mean: Tensor
    batch_var: Tensor
    feature_mean: Tensor
    """Mean over the samples, as ``feature_var``."""
    feature_var: Tensor
    seen: Tensor
    """Numbers that each batch statistic was taken over."""
    batch_size: Tensor
    """Samples."""


class Population(nn.Module):
    r"""A layer's statistics at each position, gathered batch by batch and frozen for inference.

    Gathered moments (``count``, ``mean``, ``m2``) and frozen statistics (``batch_mean``, ``batch_var``,
    ``feature_mean``, ``feature_var``, ``batch_size``) are separate buffers, all in the state dict. The first batch sets
    the positions, and longer ones extend the first position axis; positions beyond it use the last one's statistics.

    The equation weighs its terms by :math:`1/m`; the inverse of the frozen ``batch_size`` is the mean of :math:`1/m`
    over all samples, so that it equals samples divided by batches.

    Args:
        num_features: Size of the feature axis.
        estimator: ``"pooled"`` for mean and unbiased variance over all samples seen (Chan's merge), or ``"paper"`` for
            the average of the batches' means and of their variances times :math:`m/(m-1)`, as the authors compute it.
        momentum: If given, every batch moves the frozen population this far towards its own statistics.
        device: Device of the statistics.
        dtype: Their dtype; conversions of the module to half precision leave them in float32.
        merge_positions: Keep one set of statistics for all positions along the first position axis.

    Raises:
        ValueError: ``num_features``, ``estimator`` or ``momentum`` is out of range.
        TypeError: An argument's type is wrong.
    """

    stands_for: float = 1
    """How many training batches each batch stands for while it is gathered, see ``recompute_population``."""
    is_stale = False
    """Whether the layer has been trained since the statistics were frozen."""
    comes_outdated = False  # as the layer has read in a state dict that is being loaded
    channel_dim = -1
    """The layer's feature axis, if its batch axis is first: ahead of several axes of positions it is that of images."""
    training_sizes: Tensor | None = None
    """Batch sizes of training at each position, where those are known in place of ``stands_for``."""
    ignores_batch = False
    """Whether each sample is normalised by its own features alone while statistics are gathered."""

    count: Tensor
    mean: Tensor
    m2: Tensor
    batch_mean: Tensor
    batch_var: Tensor
    feature_mean: Tensor
    feature_var: Tensor
    batch_size: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        estimator: str = "pooled",
        momentum: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        merge_positions: bool = False,
    ) -> None:
        super().__init__()
        check_choice("population", estimator, ESTIMATORS)
        check_floating(dtype)
        self.num_features, self.estimator = check_int("num_features", num_features, 1), estimator
        self.momentum, self.merge_positions = check_momentum(momentum), check_bool("merge_positions", merge_positions)
        self.is_joint = False  # with joint batches all ranks gather the same, so that freezing merges nothing
        self.takes_part = True  # False while this rank repeats a batch to keep step with the others, see ``idle``
        self._ticket = traced.ticket(self)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        quantities = (1 if estimator == "pooled" else 2) * num_features + 3
        self.register_buffer("count", torch.zeros(0, dtype=torch.long, device=device))
        for name in ("mean", "m2"):
            self.register_buffer(name, torch.zeros(0, quantities, **factory))
        for name in FROZEN:
            features = () if name in POSITIONAL else (num_features,)
            self.register_buffer(name, torch.zeros(0, *features, **factory))

    @property
    def is_frozen(self) -> bool:
        """Whether there are statistics to normalise by."""
        return self.batch_mean.shape[0] > 0

    @property
    def is_gathering(self) -> bool:
        """Whether anything has been gathered since the last reset."""
        return self.count.shape[0] > 0

    @property
    def takes_batch(self) -> bool:
        """Whether a batch that comes now is gathered, and not the repetition of one that was."""
        return self.takes_part and not is_repetition()

    @property
    def positions(self) -> tuple[int, ...]:
        """Shape of the positions seen so far."""
        return tuple((self.count if self.is_gathering else self.feature_mean).shape)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._ticket = traced.ticket(self)  # a copy gathers for itself

    def gather(self, observed: Observed, start: int = 0, has_gaps: bool = False) -> None:
        """Add one batch; with ``momentum``, also move the frozen statistics towards it.

        Args:
            observed: Its statistics; those of a position that nothing was seen at count for nothing.
            start: How many positions along the first axis come before those.
            has_gaps: Whether there may be positions that nothing was seen at.

        Raises:
            ValueError: Its positions do not fit the population's.
            RuntimeError: ``torch.vmap`` runs over the statistics, so that there is one batch for each of its entries,
                or ``torch.compile`` traces a transform, and cannot tell.
        """
        if not self.takes_batch or any(map(is_fake, observed)):
            return
        check_one_batch(observed)
        # with momentum a graph may evaluate after it has gathered, and has to see what changed
        if self.momentum is None and traced.gathers_by_ticket(observed.seen.device):
            traced.gather(self._ticket, [*observed], start)
        else:
            self._add(observed, start, has_gaps)

    def take(self, observed: list[Tensor], start: int) -> None:
        """:meth:`gather`, or :meth:`reset` without statistics, called by a compiled graph."""
        if not observed:
            self.reset()
        elif self.takes_batch and observed[0].device == self.mean.device:
            self.is_stale = True  # no graph tells whether gradients are taken; those who freeze do so afterwards
            self._add(Observed(*observed), start)

    def _add(self, observed: Observed, start: int = 0, has_gaps: bool = False) -> None:
        moments = self._moments(observed, start)
        if self.merge_positions:
            moments = Moments(*(part[None] for part in moments.merge_positions()))
        elif start:
            moments, has_gaps = moments.moved(start), True
        if self.is_gathering:
            self.check_fit(tuple(moments.count.shape), tuple(self.count.shape))
        if self.momentum is not None and self.is_frozen:
            self.check_fit(tuple(moments.count.shape), tuple(self.feature_mean.shape))
        with one_at_a_time():
            total = merge_grown(Moments(self.count, self.mean, self.m2), moments) if self.is_gathering else moments
            self.assign(total)
            if self.momentum is not None:
                values = self._values(moments)
                if has_gaps:
                    self._follow(filled(values, NOTHING_SEEN, moments.count), self.momentum, moments.count)
                else:
                    self._follow(values, self.momentum)

    def assign(self, moments: Moments) -> None:
        """Put ``moments`` in place of those gathered so far."""
        self._replace(dict(zip(Moments._fields, moments, strict=True)))

    def freeze(self) -> None:
        """Freeze the statistics of all that has been gathered, over all ranks; the gathered moments stay.

        Raises:
            RuntimeError: Nothing has been gathered.
        """
        if not self.freeze_gathered():
            raise RuntimeError(
                "no statistics have been gathered to freeze; run batches through the model in training mode first, "
                "or call recompute_population(model, batches)"
            )

    def freeze_gathered(self) -> bool:
        """:meth:`freeze`, or nothing where nothing has been gathered; return whether it has."""
        moments = Moments(self.count, self.mean, self.m2)
        if not self.is_joint:
            moments = moments.all_reduce()
        if not moments.count.numel():
            return False
        if not (moments.count[0] > 0).any():
            warnings.warn(
                "nothing was gathered for the first steps, whose population is that of a later one; begin with a fresh "
                "state and start=0",
                stacklevel=4,
            )
        with torch.no_grad():
            self._assign_frozen(filled(self._values(moments), NOTHING_SEEN, moments.count))
        self.is_stale = False
        return True

    def broadcast_frozen(self) -> None:
        """Take over the frozen statistics of the first rank."""
        found = [[getattr(self, name).cpu() for name in FROZEN]]
        torch.distributed.broadcast_object_list(found, 0)
        self._assign_frozen([value.to(self.mean.device) for value in found[0]])

    def share(self, samples: Any) -> Any:
        """Samples of one training batch, where a batch of many ``samples`` stands for several; no less than one."""
        if self.stands_for == 1:
            return samples
        share = samples / self.stands_for
        return share.clamp(min=1) if isinstance(share, Tensor) else max(share, 1.0)

    def reset(self, *, frozen: bool = False) -> None:
        """Empty the gathered moments; frozen statistics stay unless they are to go, too."""
        if self.momentum is None and not frozen and traced.gathers_by_ticket(self.count.device):
            traced.gather(self._ticket, [], 0)
            return
        names = (*Moments._fields, *(FROZEN if frozen else ()))  # no views, which would keep, and save, what there was
        own_buffers(self).update({name: getattr(self, name)[:0].clone() for name in names})

    def at(self, positions: tuple[int, ...], start: int = 0) -> tuple[Statistics, Tensor]:
        """Frozen statistics and batch size at ``positions``, with a feature axis of size 1 or ``d``.

        Args:
            positions: Their shape.
            start: How many positions along the first axis come before.
        """
        self.check_fit(positions, tuple(self.feature_mean.shape))
        last = self.feature_mean.shape[0] - 1
        buffers = own_buffers(self)
        frozen: list[Any] = [buffers[name] for name in FROZEN]
        if torch.compiler.is_compiling() or start or positions[0] != last + 1:  # one graph for any number of positions
            index = torch.arange(start, start + positions[0], device=self.feature_mean.device).clamp(max=last)
            frozen = [value[index] for value in frozen]
        batch_mean, batch_var, *positional = frozen
        feature_mean, feature_var, batch_size = (value[..., None] for value in positional)
        return Statistics(batch_mean, batch_var, feature_mean, feature_var), batch_size

    def check_fit(self, positions: tuple[int, ...], known: tuple[int, ...]) -> None:
        """Raise unless a batch at ``positions`` goes with statistics at those known: only sequences may grow."""
        is_image = are_of_image(positions, self.channel_dim)
        if positions[1:] != known[1:] or (is_image and positions[0] != known[0]):
            raise ValueError(position_mismatch(positions, known, is_image))

    def _moments(self, observed: Observed, start: int = 0) -> Moments:
        """The batch as moments of all that will be frozen, one vector for each position."""
        dtype = self.mean.dtype
        mean, var, feature_mean, feature_var = (value.to(dtype) for value in tuple(observed)[:4])
        if self.training_sizes is None:
            sizes = self.share(observed.batch_size.to(dtype))
        else:
            sizes = self.training_sizes[start : start + len(observed.seen)]
        inverse = (1.0 / sizes).to(dtype)
        if self.estimator == "pooled":
            quantities = torch.cat([mean, torch.stack([feature_mean, feature_var, inverse], -1)], -1)
            spread = torch.cat([var * observed.seen[..., None], var.new_zeros(*var.shape[:-1], 3)], -1)
            return Moments(observed.seen, quantities, spread)
        samples = observed.batch_size.to(dtype)
        unbias = torch.where(samples > 1, samples / (samples - 1), 1.0)
        quantities = torch.cat(
            [mean, var * unbias[..., None], torch.stack([feature_mean, feature_var * unbias, inverse], -1)], -1
        )
        return Moments(observed.seen.clamp(max=1), quantities, torch.zeros_like(quantities))

    def _values(self, moments: Moments) -> list[Tensor]:
        """The values to freeze, in the order of ``FROZEN``."""
        d = self.num_features
        mean = moments.mean[..., :d]
        var = moments.var()[..., :d] if self.estimator == "pooled" else moments.mean[..., d : 2 * d]
        feature_mean, feature_var, inverse = moments.mean[..., -3:].unbind(-1)
        return [mean, var, feature_mean, feature_var, 1.0 / inverse]

    def _assign_frozen(self, values: list[Tensor]) -> None:
        self._replace(dict(zip(FROZEN, values, strict=True)))

    def _replace(self, values: dict[str, Tensor]) -> None:
        """Write ``values`` into the buffers, or put new ones in place of those that are of another shape.

        So an explicit buffer of ``functional_call`` and one in shared memory see what is gathered, and the replay of a
        CUDA graph, which repeats kernels and not assignments. A transform could not write into them.
        """
        buffers, writes = own_buffers(self), not (torch.compiler.is_compiling() or is_observed())
        for name, value in values.items():
            buffer = buffers[name]
            if writes and buffer is not None and may_hold(buffer, value):
                buffer.copy_(value.detach())
            else:
                buffers[name] = lasting(value)

    def _follow(self, values: list[Tensor], momentum: float, count: Tensor | None = None) -> None:
        """Move the frozen statistics towards ``values``, but not at positions of zero ``count``.

        Positions that only one of them has are taken as they are.
        """
        if not self.is_frozen:
            return self._assign_frozen(values)
        moved = []
        for name, value in zip(FROZEN, values, strict=True):
            own = getattr(self, name)
            both = min(own.shape[0], value.shape[0])
            longer = own if own.shape[0] > value.shape[0] else value
            share: Any = momentum
            if count is not None:
                share = momentum * (count[:both] > 0).to(own.dtype)
                share = share if own.ndim == share.ndim else share[..., None]
            moved.append(torch.cat([torch.lerp(own[:both], value[:both], share), longer[both:]]))
        self._assign_frozen(moved)

    def _apply(self, fn: Callable, recurse: bool = True) -> Population:
        super()._apply(fn, recurse)
        for name in ("mean", "m2", *FROZEN):
            buffer = getattr(self, name)
            if buffer.dtype in (torch.float16, torch.bfloat16):
                setattr(self, name, buffer.float())
        return self

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        check_state_dict(self, state_dict, prefix)
        for name, own in self.named_buffers(recurse=False):
            saved = state_dict.get(prefix + name)
            if saved is not None and saved.shape != own.shape:
                setattr(self, name, own.new_zeros(saved.shape))
        self.is_stale, self.comes_outdated = self.comes_outdated, False
        super()._load_from_state_dict(state_dict, prefix, *args)
        warn_outdated(self)

    def extra_repr(self) -> str:
        state = "frozen" if self.is_frozen else "empty"
        return f"{self.num_features}, estimator={self.estimator!r}, positions={self.positions}, {state}"


def check_state_dict(module: nn.Module, state_dict: dict, prefix: str) -> None:
    """Check every shape in ``state_dict`` before any of it is loaded.

    Populations load any number of positions, but only their own number of features, and all of one population's
    buffers have the same positions.

    Raises:
        ValueError: A shape does not fit ``module``, or another of the same population.
    """
    needed = {name: parameter.shape for name, parameter in module.named_parameters()}
    for path, child in module.named_modules():
        if isinstance(child, Population):
            within = f"{path}." if path else ""
            sized = (name for name, _ in child.named_buffers(recurse=False) if name not in POSITIONAL)
            needed |= {within + name: getattr(child, name).shape[-1:] for name in sized}
            for names in (Moments._fields, FROZEN):
                check_positions(child, names, state_dict, prefix + within)
    for name, shape in needed.items():
        saved = state_dict.get(prefix + name)
        if saved is not None and saved.shape[-len(shape) :] != shape:
            raise ValueError(
                f"state_dict[{prefix + name!r}] has shape {tuple(saved.shape)}, but the size needed is {tuple(shape)}; "
                "load it into a layer of the size and kind it was saved from"
            )


def check_positions(population: Population, names: Iterable[str], state_dict: dict, prefix: str) -> None:
    """Check that buffers, those of ``state_dict`` and else the population's own, have the same positions."""
    found = {}
    for name in names:
        value = state_dict.get(prefix + name, getattr(population, name))
        found[name] = tuple(value.shape if name in POSITIONAL else value.shape[:-1])
    if len(set(found.values())) > 1 and any(prefix + name in state_dict for name in names):
        raise ValueError(
            f"state_dict[{prefix + '*'!r}] has buffers of different positions, {found}, but they belong to the same; "
            "save the state dict of a whole layer again"
        )


def __getattr__(name: str) -> Any:
    """Functions that lay here in version 0.1.0."""
    moved = {"freeze_population", "gathering", "populations", "recompute_population", "require_populations"}
    if name in moved or name == "reset_population":
        return getattr(import_module("lightning_bln.recomputation"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
