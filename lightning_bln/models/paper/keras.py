"""Parts of Keras that differ from torch's and that the paper's networks use: LSTM dropout, initialisers, Adam."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

GATES = 4


class KerasLSTM(nn.Module):
    """One LSTM layer as ``tf.keras.layers.LSTM`` of TensorFlow 2.1 trains it.

    The recurrence is that of :class:`torch.nn.LSTM`, with one bias instead of two, other initial weights (Glorot
    uniform, bias zero, and one for the forget gate) and another dropout: in training every sequence draws one mask for
    its inputs and one for its hidden state, and keeps them over time (Gal and Ghahramani 2016). All gates share them,
    as in TensorFlow 2.1, which the authors used; with recurrent dropout, later versions draw one mask per gate.

    Args:
        input_size: Features of the input.
        hidden_size: Features of the state.
        dropout: Probability that an input feature is dropped.
        recurrent_dropout: Probability that a feature of the hidden state is dropped on its way into the gates.

    Example:
        >>> KerasLSTM(3, 4, dropout=0.2, recurrent_dropout=0.2)(torch.zeros(2, 5, 3)).shape
        torch.Size([2, 5, 4])
    """

    def __init__(
        self, input_size: int, hidden_size: int, *, dropout: float = 0.0, recurrent_dropout: float = 0.0
    ) -> None:
        super().__init__()
        for name, value in (("dropout", dropout), ("recurrent_dropout", recurrent_dropout)):
            if not 0.0 <= value < 1.0:
                raise ValueError(f"{name}={value}, but a chance of being dropped lies in [0, 1)")
        self.input_size, self.hidden_size = input_size, hidden_size
        self.dropout, self.recurrent_dropout = dropout, recurrent_dropout
        self.weight_ih = nn.Parameter(torch.empty(GATES * hidden_size, input_size))
        self.weight_hh = nn.Parameter(torch.empty(GATES * hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.empty(GATES * hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new initial weights."""
        nn.init.xavier_uniform_(self.weight_ih)
        nn.init.xavier_uniform_(self.weight_hh)
        nn.init.zeros_(self.bias)
        with torch.no_grad():
            self.bias[self.hidden_size : 2 * self.hidden_size] = 1.0

    def forward(self, x: Tensor) -> Tensor:
        """Run over a batch of sequences from a zero state.

        Args:
            x: Sequences ``(B, T, input_size)``.

        Returns:
            The hidden state at every step, ``(B, T, hidden_size)``.
        """
        input_mask = self._mask(x, self.input_size, self.dropout)
        hidden_mask = self._mask(x, self.hidden_size, self.recurrent_dropout)
        if input_mask is not None:
            x = x * input_mask[:, None]
        weight_hh: Tensor = self.weight_hh
        if hidden_mask is not None and len(x) > 1:
            gates = nn.functional.linear(x.transpose(0, 1), self.weight_ih, self.bias)
            return _MaskedRecurrence.apply(gates, weight_hh, hidden_mask).transpose(0, 1)
        # torch's LSTM has no such mask, but a single sequence's can be multiplied into the weights.
        if hidden_mask is not None:
            weight_hh = weight_hh * hidden_mask
        state = x.new_zeros(1, len(x), self.hidden_size)
        weights = [self.weight_ih, weight_hh, self.bias, torch.zeros_like(self.bias)]
        return torch.lstm(x, (state, state), weights, True, 1, 0.0, self.training, False, True)[0]

    def _mask(self, x: Tensor, size: int, chance: float) -> Tensor | None:
        if not self.training or chance == 0.0:
            return None
        return x.new_empty(len(x), size).bernoulli_(1.0 - chance).div_(1.0 - chance)

    def extra_repr(self) -> str:
        return (
            f"{self.input_size}, {self.hidden_size}, dropout={self.dropout}, recurrent_dropout={self.recurrent_dropout}"
        )


class _MaskedRecurrence(torch.autograd.Function):
    """The LSTM's recurrence on projected inputs ``(T, B, 4 * H)``, with a mask on the input of ``weight_hh``.

    A backward of its own, because autograd's bookkeeping takes longer than the steps themselves.
    """

    @staticmethod
    def forward(ctx: Any, projected: Tensor, weight_hh: Tensor, mask: Tensor) -> Tensor:
        steps, batch, _ = projected.shape
        hidden = weight_hh.shape[1]
        gates = projected.contiguous().clone()
        cells, outputs = (projected.new_empty(steps, batch, hidden) for _ in range(2))
        squashed = torch.empty_like(cells)
        cell, entering = (projected.new_zeros(batch, hidden) for _ in range(2))
        weight_t = weight_hh.t().contiguous()
        for now, new_cell, new_squashed, output in zip(gates, cells, squashed, outputs, strict=True):
            i, f, g, o = now.addmm_(entering, weight_t).chunk(GATES, 1)
            now[:, : 2 * hidden].sigmoid_()
            g.tanh_()
            o.sigmoid_()
            cell = torch.mul(f, cell, out=new_cell).addcmul_(i, g)
            torch.tanh(cell, out=new_squashed)
            torch.mul(o, new_squashed, out=output)
            torch.mul(output, mask, out=entering)
        ctx.save_for_backward(weight_hh, mask, gates, cells, squashed, outputs)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        weight_hh, mask, gates, cells, squashed, outputs = ctx.saved_tensors
        steps, batch, hidden = outputs.shape
        before = torch.cat([torch.zeros_like(cells[:1]), cells[:-1]])
        i, f, g, o = gates.chunk(GATES, -1)
        # Each gate's factor is computed for all steps at once; only the chain over time needs the loop.
        factors = torch.stack([g * i * (1 - i), before * f * (1 - f), i * (1 - g * g), squashed * o * (1 - o)], 2)
        into_cell = o * (1 - squashed * squashed)
        grads = torch.empty_like(factors)
        grad_cell, leaving = (grad_outputs.new_zeros(batch, hidden) for _ in range(2))
        for step in range(steps - 1, -1, -1):
            grad_hidden = grad_outputs[step] + leaving
            grad_cell.addcmul_(grad_hidden, into_cell[step])
            torch.mul(grad_cell[:, None], factors[step, :, :3], out=grads[step, :, :3])
            torch.mul(grad_hidden, factors[step, :, 3], out=grads[step, :, 3])
            grad_cell.mul_(f[step])
            torch.mm(grads[step].view(batch, -1), weight_hh, out=leaving).mul_(mask)
        grad_gates = grads.view(steps, batch, -1)
        grad_weight = grad_gates[1:].flatten(0, 1).t() @ (outputs[:-1] * mask).flatten(0, 1)
        return grad_gates, grad_weight, None


def keras_dense(in_features: int, out_features: int) -> nn.Linear:
    """Return a linear layer with the authors' initial values: orthogonal weights and zero bias."""
    layer = nn.Linear(in_features, out_features)
    nn.init.orthogonal_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class KerasAdam(torch.optim.Optimizer):
    r"""Adam as Keras computes it, fast for sparse gradients.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \quad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \quad
        p_t = p_{t-1} - \eta_t \frac{m_t}{\sqrt{v_t} + \epsilon}, \quad
        \eta_t = \eta \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t}

    Unlike :class:`torch.optim.Adam`, Keras adds :math:`\epsilon` before the bias correction. A sparse gradient
    (``nn.Embedding(sparse=True)``) counts as a dense one, as in Keras: a row keeps moving after it was last in a batch.
    These moves are deferred and made all at once when the row is next needed, so that a step costs only as much as the
    rows in its batch. Call :meth:`catch_up` with the rows that a forward pass is about to read, and without rows before
    the parameter is read as a whole.

    Args:
        params: Parameters or parameter groups.
        lr: :math:`\eta`.
        betas: :math:`\beta_1` and :math:`\beta_2`.
        eps: :math:`\epsilon`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps)):
            if value <= 0:
                raise ValueError(f"{name}={value}, but it must be positive")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; see :class:`torch.optim.Optimizer`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.tensor(0)
                    state["m"], state["v"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
                if parameter.grad.is_sparse:
                    self._sparse_step(parameter, parameter.grad.coalesce(), state, group)
                else:
                    state["step"] += 1
                    _move(parameter, state["m"], state["v"], parameter.grad, group, int(state["step"]))
        return loss

    @torch.no_grad()
    def catch_up(self, parameter: Tensor, rows: Tensor | None = None) -> None:
        """Make the deferred moves of rows whose gradients have been zero since they were last seen.

        Args:
            parameter: A parameter of this optimizer.
            rows: Indices of the needed rows, repeats allowed; ``None`` for all.
        """
        state = self.state.get(parameter, {})
        if "seen" not in state:
            return
        group = next(group for group in self.param_groups if any(parameter is other for other in group["params"]))
        rows = torch.arange(len(parameter), device=parameter.device) if rows is None else rows.unique()
        rows = rows[state["seen"][rows] < state["step"]]
        if len(rows):
            values, m, v = self._caught_up(parameter, state, group, rows, int(state["step"]))
            parameter[rows], state["m"][rows], state["v"][rows] = values, m, v
            state["seen"][rows] = state["step"]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for state in self.state.values():
            if "seen" in state:  # torch converts all state to the parameter's dtype
                state["seen"] = state["seen"].long()

    def _sparse_step(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if "seen" not in state:
            state["seen"] = torch.zeros(len(parameter), dtype=torch.long, device=parameter.device)
        rows, part = gradient.indices()[0], gradient.values()
        values, m, v = self._caught_up(parameter, state, group, rows, int(state["step"]))
        state["step"] += 1
        _move(values, m, v, part, group, int(state["step"]))
        parameter[rows], state["m"][rows], state["v"][rows] = values, m, v
        state["seen"][rows] = state["step"]

    def _caught_up(
        self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any], rows: Tensor, now: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Values, m and v of ``rows`` at step ``now``, after steps without gradient.

        Over ``k`` such steps a row moves by
        :math:`\\sum_j \\eta_{s+j} \\beta_1^j m / (\\beta_2^{j/2} \\sqrt v + \\epsilon)`.
        With :math:`w_j = \\eta_{s+j} \\beta_1^j \\beta_2^{-j/2}` that is :math:`m \\sum_j w_j / (\\sqrt v + \\epsilon
        \\beta_2^{-j/2})`. Each :math:`\\beta_2^{-j/2}` in the denominator is replaced by its mean under the weights
        :math:`w_j`. That is exact for one step, and for any number off by at most 1e-4 of the move, since the weights
        vanish long before :math:`\\beta_2^{-j/2}` changes.
        """
        beta1, beta2 = group["betas"]
        values, m, v, seen = parameter[rows], state["m"][rows], state["v"][rows], state["seen"][rows]
        gaps = (now - seen).tolist()
        if not any(gaps):
            return values, m, v
        table = {gap: self._missed(group, now - gap, gap) for gap in set(gaps)}
        total, shift = (values.new_tensor([[table[gap][entry]] for gap in gaps]) for entry in (0, 1))
        values.sub_(total * m / (v.sqrt() + group["eps"] * shift))
        elapsed = values.new_tensor([[float(gap)] for gap in gaps])
        return values, m * beta1**elapsed, v * beta2**elapsed

    @staticmethod
    def _missed(group: dict[str, Any], start: int, gap: int) -> tuple[float, float]:
        """Sum of the weights, and mean of beta2^(-j/2) under them, over ``gap`` steps after step ``start``."""
        beta1, beta2 = group["betas"]
        total = weighted = 0.0
        # 0.9^300 is 2e-14: later moves are below float32 precision.
        for j in range(1, min(gap, 300) + 1):
            growth = beta2 ** (-j / 2)
            weight = _rate(group, start + j) * beta1**j * growth
            total += weight
            weighted += weight * growth
        return total, (weighted / total if total else 1.0)


def _move(values: Tensor, m: Tensor, v: Tensor, gradient: Tensor, group: dict[str, Any], step: int) -> None:
    """Adam's step on values and both moments, in place."""
    beta1, beta2 = group["betas"]
    m.lerp_(gradient, 1 - beta1)
    v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    values.addcdiv_(m, v.sqrt().add_(group["eps"]), value=-_rate(group, step))


def _rate(group: dict[str, Any], step: int) -> float:
    beta1, beta2 = group["betas"]
    return float(group["lr"]) * math.sqrt(1 - beta2**step) / (1 - beta1**step)
