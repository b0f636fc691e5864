"""Steps that compute along the batch, where a sample's value depends on the others'."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from exact_modules import Exact, Functional
from torch import Tensor, nn

STEPS: dict[str, Callable[..., Any]] = {
    "scaled by the largest": lambda net, x, y, i: F.cross_entropy(net.head((h := net.hidden(x)) / h.abs().max()), y),
    "centred": lambda net, x, y, i: F.cross_entropy(net.head((h := net.hidden(x)) - h.mean(0)), y),
    "standardised": lambda net, x, y, i: (
        net(x).sub(net(x).mean(0)).div(net(x).std(0, False) + 1).square().sum(1).mean()
    ),
    "softmax over samples": lambda net, x, y, i: (net(x).softmax(0) * x.sum(1, keepdim=True)).sum(),
    "sorted": lambda net, x, y, i: (net(x).sort(0).values * torch.arange(len(x))[:, None]).mean(),
    "sorted by an index": lambda net, x, y, i: F.cross_entropy(net(x)[net(x)[:, 0].argsort(descending=True)], y),
    "topk": lambda net, x, y, i: net(x).topk(min(2, len(x)), 0).values.sum(),
    "topk indices": lambda net, x, y, i: x[net(x).norm(dim=1).topk(1).indices].sum() + net(x).mean(),
    "cumsum": lambda net, x, y, i: net(x).cumsum(0).square().mean(),
    "cummax": lambda net, x, y, i: torch.cummax(net(x), 0)[0].mean(),
    "cdist": lambda net, x, y, i: torch.cdist(net.hidden(x), net.hidden(x)).mean() + net(x).mean(),
    "unique": lambda net, x, y, i: net(x).argmax(1).unique().numel() + net(x).mean(),
    "unique counts": lambda net, x, y, i: net(x).argmax(1).unique(return_counts=True)[1].float().max() + net(x).mean(),
    "bincount": lambda net, x, y, i: net(x).argmax(1).bincount(minlength=3).float().var() + net(x).mean(),
    "scatter_add": lambda net, x, y, i: (
        torch.zeros(3, 3).scatter_add(0, y[:, None].expand(-1, 3), net(x)).square().mean()
    ),
    "index_add": lambda net, x, y, i: torch.zeros(3, 3).index_add(0, y, net(x)).square().mean(),
    "index_add_ into zeros": lambda net, x, y, i: torch.zeros(3, 3).index_add_(0, y, net(x)).square().mean(),
    "scatter by prediction": lambda net, x, y, i: (
        torch.zeros(3).scatter_add_(0, net(x).argmax(1), torch.ones(len(x))).square().mean() + net(x).mean()
    ),
    "graph": lambda net, x, y, i: F.cross_entropy(passed(net, net.hidden(x)), y),
    "einsum": lambda net, x, y, i: torch.einsum("ac,bc->ab", net(x), net(x)).square().mean(),
    "gram": lambda net, x, y, i: (net(x).T @ net(x)).square().mean(),
    "covariance": lambda net, x, y, i: torch.cov(torch.cat([net(x), net(x) + 1]).T).square().mean(),
    "pdist": lambda net, x, y, i: F.pdist(torch.cat([net(x), net(x) * 2])).mean(),
    "contrastive": lambda net, x, y, i: contrastive(net, x),
    "triplet": lambda net, x, y, i: F.triplet_margin_loss(net(x), net(x).roll(1, 0), net(x).flip(0)),
    "roll": lambda net, x, y, i: (net(x) - net(x).roll(1, 0)).square().mean() + net(x).mean(),
    "flip": lambda net, x, y, i: F.cross_entropy(net.head(net.hidden(x).flip(0)), y),
    "chosen by a mask": lambda net, x, y, i: net(x)[y == 0].sum() + net(x).mean(),
    "chosen by their own mask": lambda net, x, y, i: net(x)[net(x)[:, 0] > 0].sum() + net(x).mean(),
    "nonzero": lambda net, x, y, i: (net(x) > 0).nonzero().sum().float() + net(x).mean(),
    "quantile": lambda net, x, y, i: torch.quantile(net(x), 0.3, 0).sum() + net(x).mean(),
    "median": lambda net, x, y, i: net(x).median(0).values.sum() + net(x).median(),
    "logsumexp": lambda net, x, y, i: net(x).logsumexp(0).sum() + net(x).logsumexp((0, 1)),
    "svd": lambda net, x, y, i: torch.linalg.svdvals(net(x)).sum(),
    "eigh": lambda net, x, y, i: torch.linalg.eigvalsh(net(x).T @ net(x)).max(),
    "lstsq": lambda net, x, y, i: torch.linalg.solve(net(x).T @ net(x) + torch.eye(3), net(x).T @ x).square().mean(),
    "norms": lambda net, x, y, i: (
        torch.linalg.norm(net(x)) + net(x).norm(p=1, dim=0).max() + torch.linalg.matrix_norm(net(x))
    ),
    "histogram": lambda net, x, y, i: torch.histc(net(x), 4, -2, 2).square().mean() + net(x).mean(),
    "bucketize": lambda net, x, y, i: (
        torch.bucketize(net(x), torch.tensor([-1.0, 0.0, 1.0])).float().mean() + net(x).mean()
    ),
    "searchsorted": lambda net, x, y, i: (
        torch.searchsorted(net(x)[:, 0].sort().values, net(x)[:, 1]).float().mean() + net(x).mean()
    ),
    "vmap": lambda net, x, y, i: torch.vmap(lambda one: one.sum() * one[0])(net(x)).mean(),
    "outer": lambda net, x, y, i: torch.outer(net(x)[:, 0], net(x)[:, 1]).sum() + net(x).mean(),
    "tensordot": lambda net, x, y, i: torch.tensordot(net(x), net(x), dims=([0], [0])).square().sum(),
    "baddbmm": lambda net, x, y, i: torch.baddbmm(torch.ones(1, 3, 3), net(x).T[None], net(x)[None]).square().mean(),
    "addmm": lambda net, x, y, i: torch.addmm(torch.ones(3), net(x), torch.eye(3)).square().mean(),
    "meshgrid": lambda net, x, y, i: sum(one.sum() for one in torch.meshgrid(net(x)[:, 0], net(x)[0], indexing="ij")),
    "broadcast": lambda net, x, y, i: (net(x)[:, None] - net(x)[None]).square().sum(-1).clamp(max=1).mean(),
    "split": lambda net, x, y, i: sum((k + 1) * one.mean() for k, one in enumerate(net(x).split([1, 2], 1))),
    "chunk": lambda net, x, y, i: sum((k + 1) * one.sum() for k, one in enumerate(net(x).chunk(2))),
    "repeat_interleave": lambda net, x, y, i: (
        net(x).repeat_interleave(2, 0) * torch.arange(2 * len(x))[:, None]
    ).mean(),
    "unfold": lambda net, x, y, i: net.hidden(x).unfold(1, 3, 2).amax(-1).mean(),
    "tril": lambda net, x, y, i: (net(x) @ net(x).T).tril().square().mean(),
    "diagonal": lambda net, x, y, i: (net(x) @ net(x).T).diagonal().sum() + (net(x) @ net(x).T).trace(),
    "where by a value of all": lambda net, x, y, i: torch.where(net(x) > net(x).mean(), net(x), -net(x)).mean(),
    "masked_select": lambda net, x, y, i: net(x).masked_select(y[:, None] > 0).sum() + net(x).mean(),
    "gather": lambda net, x, y, i: (
        net(x).gather(1, y[:, None]).mean() + net(x).gather(0, y[None, :1].expand(1, 3) * 0).sum()
    ),
    "one_hot of a prediction": lambda net, x, y, i: (
        F.one_hot(net(x).argmax(1), 3).float().mean(0).std() + net(x).mean()
    ),
    "one_hot without classes": lambda net, x, y, i: (
        F.one_hot(net(x).argmax(1)).float().mean(0).std(correction=0) + net(x).mean()
    ),
    "multinomial": lambda net, x, y, i: net(x).softmax(1).multinomial(2).float().mean() + net(x).mean(),
    "gumbel": lambda net, x, y, i: F.gumbel_softmax(net(x), hard=True)[:, 0].mean() + net(x).mean(),
    "distribution": lambda net, x, y, i: -torch.distributions.Categorical(logits=net(x)).log_prob(y).mean(),
    "kl of distributions": lambda net, x, y, i: torch.distributions.kl_divergence(
        torch.distributions.Normal(net(x), 1.0), torch.distributions.Normal(0.0, net(x).sigmoid() + 1)
    ).mean(),
    "losses": lambda net, x, y, i: (
        F.nll_loss(net(x).log_softmax(1), y, torch.tensor([1.0, 2.0, 3.0]))
        + F.multi_margin_loss(net(x), y)
        + F.kl_div(net(x).log_softmax(1), F.one_hot(y, 3).float(), reduction="batchmean")
    ),
    "label smoothing": lambda net, x, y, i: F.cross_entropy(net(x), y, label_smoothing=0.1),
    "weighted classes": lambda net, x, y, i: F.cross_entropy(net(x), y, weight=torch.tensor([1.0, 0.5, 2.0])),
    "ignored class": lambda net, x, y, i: F.cross_entropy(net(x), y, ignore_index=1),
    "soft targets": lambda net, x, y, i: F.cross_entropy(net(x), net(x).flip(1).softmax(1)),
    "cosine": lambda net, x, y, i: F.cosine_similarity(net(x), net(x).roll(1, 0)).mean() + net(x).mean(),
    "ctc": lambda net, x, y, i: F.ctc_loss(
        net(x)[:, None].log_softmax(-1).expand(-1, 1, -1), torch.ones(1, 1).long(), (len(x),), (1,)
    ),
    "complex": lambda net, x, y, i: torch.fft.rfft(net(x), dim=0).abs().mean() + torch.fft.fft(net(x)).real.mean(),
    "interpolated": lambda net, x, y, i: F.interpolate(net(x)[None], scale_factor=2.0, mode="linear").square().mean(),
    "pooled over samples": lambda net, x, y, i: F.adaptive_max_pool1d(net(x).T[None], 1).sum() + net(x).mean(),
    "a batch as one sample": lambda net, x, y, i: (
        F.instance_norm(torch.cat([net(x), -net(x)]).T[None]).abs().mean() + net(x).mean()
    ),
    "group_norm": lambda net, x, y, i: F.group_norm(net.hidden(x), 2).abs().mean() + net(x).mean(),
    "batch_norm by the batch": lambda net, x, y, i: (
        F.batch_norm(torch.cat([net(x), -net(x)]), None, None, training=True).abs().mean() + net(x).mean()
    ),
    "layer_norm over samples": lambda net, x, y, i: F.layer_norm(net(x), net(x).shape).abs().mean() + net(x).mean(),
    "bfloat16": lambda net, x, y, i: net(x).bfloat16().float().mean() + net(x).mean(),
    "float64": lambda net, x, y, i: net(x).double().mean() + net(x).mean(),
    "as strided": lambda net, x, y, i: net(x).contiguous().as_strided((len(x),), (3,)).sum() + net(x).mean(),
    "nested": lambda net, x, y, i: torch.nn.utils.rnn.pad_sequence(list(net(x))).mean() + net(x).mean(),
    "block diagonal": lambda net, x, y, i: torch.block_diag(*net(x)[:2]).square().sum() + net(x).mean(),
    "kthvalue": lambda net, x, y, i: net(x).kthvalue(1, 0).values.sum() + net(x).kthvalue(2, 1)[0].sum(),
    "isin": lambda net, x, y, i: torch.isin(net(x).argmax(1), torch.tensor([0, 1])).float().mean() + net(x).mean(),
    "aminmax": lambda net, x, y, i: sum(torch.aminmax(net(x))) + net(x).mean(),
    "var_mean": lambda net, x, y, i: sum(torch.var_mean(net(x), 0, correction=0)).sum(),
    "std of all": lambda net, x, y, i: net(x).std() + net(x).var(correction=0) + net(x).std(unbiased=False),
    "keyword arguments": lambda net, x, y, i: torch.sum(input=net(x), dim=0).max() + torch.mean(input=net(x)),
}


def passed(net: Any, h: Tensor) -> Tensor:
    """Messages along the edges of a ring."""
    nodes = torch.arange(len(h))
    source, target = torch.cat([nodes, nodes]), torch.cat([nodes.roll(1), nodes.roll(-1)])
    received = torch.zeros_like(h)
    received.index_add_(0, target, h[source])
    degree = torch.bincount(target, minlength=len(h)).clamp(min=1)
    return net.head(h + received / degree[:, None])


def contrastive(net: Any, x: Tensor) -> Tensor:
    a, b = F.normalize(net(x), dim=1), F.normalize(net(-x), dim=1)
    scores = a @ b.T / 0.1
    labels = torch.arange(len(x), device=scores.device)
    return (F.cross_entropy(scores, labels) + F.cross_entropy(scores.T, labels)) / 2 + net(x).mean()


class Attends(Exact):
    """Attention over samples, or over the features of one, with torch's modules."""

    batch_first = False
    encoder = False

    def build(self) -> None:
        if self.encoder:
            self.mix: nn.Module = nn.TransformerEncoderLayer(8, 2, 16, batch_first=self.batch_first)
        else:
            self.mix = nn.MultiheadAttention(8, 2, batch_first=self.batch_first)

    def hidden(self, x: Tensor) -> Tensor:
        h = super().hidden(x)
        h = h[None] if self.batch_first else h[:, None]
        h = self.mix(h) if self.encoder else self.mix(h, h, h)[0]
        return h.reshape(-1, 8)


class Unbatched(Attends):
    """Attention over samples that are one sequence without a batch axis."""

    def hidden(self, x: Tensor) -> Tensor:
        h = Exact.hidden(self, x)
        return self.mix(h, h, h)[0]


class Normalised(Exact):
    """A norm of torch's behind the layers with a mode."""

    kind: Callable[[], nn.Module] = staticmethod(lambda: nn.BatchNorm1d(8))

    def build(self) -> None:
        self.other = self.kind()

    def hidden(self, x: Tensor) -> Tensor:
        return self.other(super().hidden(x))


class InTraining(Normalised):
    """A norm that stays in training during validation, so that its buffers move."""

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.other.train()

    def values(self, x: Tensor, y: Tensor, batch_idx: int) -> Any:
        return F.cross_entropy(self(torch.cat([x, -x])), torch.cat([y, y]))


def variant(base: type, /, **attributes: Any) -> Callable[[], Exact]:
    return type(base.__name__, (base,), attributes)


MODULES: dict[str, Callable[[], Any]] = {
    **{name: (lambda function=function: Functional(function)) for name, function in STEPS.items()},
    "attention over samples": variant(Attends),
    "attention, batch first": variant(Attends, batch_first=True),
    "attention without a batch": Unbatched,
    "encoder over samples": variant(Attends, encoder=True),
    "encoder, batch first": variant(Attends, encoder=True, batch_first=True),
    "BatchNorm in evaluation": Normalised,
    "BatchNorm without statistics": variant(
        Normalised,
        kind=staticmethod(lambda: nn.BatchNorm1d(8, track_running_stats=False)),
        values=lambda self, x, y, i: F.cross_entropy(self(torch.cat([x, -x])), torch.cat([y, y])),
    ),
    "BatchNorm in training": InTraining,
    "GroupNorm": variant(Normalised, kind=staticmethod(lambda: nn.GroupNorm(2, 8))),
    "LayerNorm": variant(Normalised, kind=staticmethod(lambda: nn.LayerNorm(8))),
    "InstanceNorm over samples": variant(
        Normalised,
        kind=staticmethod(lambda: nn.InstanceNorm1d(8)),
        hidden=lambda self, x: self.other(torch.cat([Exact.hidden(self, x), Exact.hidden(self, -x)]).T[None])[0].T[
            : len(x)
        ],
    ),
}
