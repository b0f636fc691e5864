"""Single-step cells against torch's own, by finite differences, and as part of a layer."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn

from lightning_bln import Recurrent, recompute_population
from lightning_bln.cells import BLNGRUCell, BLNLSTMCell, BLNRNNCell, Cell, RecurrentCell, registry

PAIRS = {"lstm": (BLNLSTMCell, nn.LSTMCell), "gru": (BLNGRUCell, nn.GRUCell), "rnn": (BLNRNNCell, nn.RNNCell)}


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batched", [True, False])
def test_without_norm_it_is_torchs_cell(kind, bias, batched) -> None:
    ours, theirs = (cell(3, 5, bias) if i else cell(3, 5, bias, norm=None) for i, cell in enumerate(PAIRS[kind]))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 3) if batched else torch.randn(3)
    state = torch.randn(*x.shape[:-1], 5)
    hx = (state, state + 1) if kind == "lstm" else state
    for given in (None, hx):
        torch.testing.assert_close(ours(x, given), theirs(x, given))


@pytest.mark.parametrize(("kind", "norm"), [*product(registry, [None, "bln"]), *product(PAIRS, ["layer", "batch"])])
def test_gradients_are_those_of_finite_differences(kind, norm) -> None:
    cell = RecurrentCell(kind, 3, 4, norm=norm, dtype=torch.float64)
    names = [name for name, _ in cell.named_parameters()]
    values = [p.detach() + 0.2 * torch.randn_like(p) for p in cell.parameters()]
    sizes = map(cell.state_size, cell.cell.states)
    state = [0.1 + torch.rand(3, size, dtype=torch.float64) for size in sizes]
    inputs = [v.requires_grad_() for v in (torch.randn(3, 3, dtype=torch.float64), *state, *values)]

    def step(x, *rest):
        hx, parameters = rest[: len(state)], dict(zip(names, rest[len(state) :], strict=True))
        return torch.func.functional_call(cell, parameters, (x, hx))

    assert torch.autograd.gradcheck(step, inputs, fast_mode=kind not in PAIRS)  # along a random direction


@pytest.mark.parametrize("kind", registry)
@pytest.mark.parametrize("norm", [None, "bln", "layer", "batch"])
def test_a_layer_of_one_step_is_the_cell(kind, norm) -> None:
    layer, cell = Recurrent(kind, 3, 4, norm=norm), RecurrentCell(kind, 3, 4, norm=norm)
    cell.load_state_dict({name.replace("_l0", ""): value for name, value in layer.state_dict().items()})
    x = torch.randn(5, 3)
    output, _ = layer(x[None])
    result = cell(x)
    torch.testing.assert_close(output[0], result[0] if isinstance(result, tuple) else result)
    if norm is not None:
        for module in (layer, cell):
            recompute_population(module, [x[None] if module is layer else x])
            module.eval()
            module.mode = "pppp"
        result = cell(x)
        torch.testing.assert_close(layer(x[None])[0][0], result[0] if isinstance(result, tuple) else result)


def test_a_cell_of_ones_own_gets_layers_norms_and_packing() -> None:
    class MGU(Cell):
        """Minimal gated unit (Zhou et al. 2016)."""

        gates = ("forget", "candidate")
        products = (("forget",), ("candidate",))

        def step(self, x, state, project):
            f = torch.sigmoid(x.forget + project.forget(state.h))
            n = torch.tanh(x.candidate + project.candidate(f * state.h))
            return self.State(h=(1 - f) * state.h + f * n)

    layer = Recurrent(MGU, 3, 4, num_layers=2, bidirectional=True, norm="bln")
    output, h_n = layer(nn.utils.rnn.pack_sequence([torch.randn(n, 3) for n in (5, 2)]))
    assert h_n.shape == (4, 2, 4)
    output.data.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    assert {"norm_hh_forget_l0.weight", "norm_hh_candidate_l1_reverse.weight"} <= set(layer.state_dict())


def test_bad_cells_and_states_are_named() -> None:
    with pytest.raises(ValueError, match="cell='nope', but the registry has"):
        RecurrentCell("nope", 3, 4)
    with pytest.raises(ValueError, match="input_size=3, but"):
        BLNGRUCell(3, 4)(torch.randn(2, 4))
    with pytest.raises(ValueError, match="hx has shapes"):
        BLNGRUCell(3, 4)(torch.randn(2, 3), torch.randn(2, 5))


def test_a_first_state_of_another_dtype_is_refused() -> None:
    with pytest.raises(TypeError, match=r"hx: c has dtype torch\.float64, but the input has torch\.float32"):
        BLNLSTMCell(4, 4)(torch.randn(3, 4), (torch.zeros(3, 4), torch.zeros(3, 4).double()))
