"""Averages of weights, whose populations are their own."""

from __future__ import annotations

from torch import nn
from torch.optim import swa_utils

from lightning_bln._torch import without_buffers
from lightning_bln.recomputation import populations


class AveragedModel(swa_utils.AveragedModel):
    """:class:`torch.optim.swa_utils.AveragedModel` argument for argument, for models with populations.

    Torch copies or averages every buffer, and fails where shapes differ: a population is empty before the first batch
    and grows with the longest. Here populations are left out, since they belong to weights and have no average: compute
    the average's own before it is used, in place of ``torch.optim.swa_utils.update_bn``. One that was computed earlier
    warns in evaluation, once, that it is that of other weights.

    Args:
        model: The model to average; this and all others as in torch's class.

    Example:
        >>> import torch
        >>> from lightning_bln import BLNLSTM, recompute_population
        >>> model = BLNLSTM(3, 4)
        >>> average = AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.99))
        >>> x = torch.randn(5, 8, 3)
        >>> for _ in range(2):  # with a step of an optimizer between
        ...     output, _ = model(x)
        ...     average.update_parameters(model)
        >>> recompute_population(average, [x])
        >>> average.eval()(x)[0].shape
        torch.Size([5, 8, 4])
    """

    def update_parameters(self, model: nn.Module) -> None:
        """Take in the model's weights, and its buffers other than populations as torch does."""
        own = populations(self)
        with without_buffers([*own, *populations(model)]):
            super().update_parameters(model)
        for population in own:
            population.is_stale = population.is_frozen
