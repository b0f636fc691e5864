"""Every cell against its torchrecurrent counterpart: outputs, states and all gradients, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_bln import Recurrent
from lightning_bln.cells import registry

torchrecurrent = pytest.importorskip("torchrecurrent")

INPUTS, HIDDEN, STEPS, SAMPLES = 3, 4, 5, 2
Weights = dict[str, Tensor]


class Peer(NamedTuple):
    """A torchrecurrent layer, and the translation of its weights, options and states to ours."""

    layer: str
    weights: Callable[[Weights], Weights] = lambda w: w
    theirs: dict[str, Any] = {}
    ours: dict[str, Any] = {}
    states: tuple[str, ...] = ("h",)
    inputs: int = INPUTS


def cat(*tensors: Tensor) -> Tensor:
    return torch.cat(tensors)


def change(**new: Callable[[Weights], Tensor]) -> Callable[[Weights], Weights]:
    """Translation that changes or adds weights."""
    return lambda w: {**w, **{name: make(w) for name, make in new.items()}}


def rows(tensor: Tensor, *order: int) -> Tensor:
    """Blocks of rows in another order."""
    parts = tensor.chunk(len(order))
    return torch.cat([parts[i] for i in order])


def peepholes(w: Weights) -> Weights:
    names = ("peephole_input", "peephole_forget", "peephole_output")
    return dict(zip(names, w["weight_ph"].chunk(3), strict=True))


def two_inputs(w: Weights) -> Weights:
    """Their second set of weights acts on the input before; its bias adds to the first's."""
    return {"weight_ih": cat(w["weight_ih"], w["weight_hh"]), "bias_ih": w["bias_ih"] + w["bias_hh"]}


def fast_gates(w: Weights) -> Weights:
    update, hidden = (w["bias_ih"] + w["bias_hh"]).chunk(2)
    return {**w, "bias_update": update, "bias_hidden": hidden}


def bistable(w: Weights) -> Weights:
    modulation, update = w["weight_hh"].chunk(2)
    bias = w["bias_ih"] + cat(w["bias_hh"], torch.zeros(HIDDEN).double())
    return {"weight_ih": w["weight_ih"], "bias_ih": bias, "weight_modulation": modulation, "weight_update": update}


def one_bias(w: Weights) -> Weights:
    """Their gate lacks the recurrent bias; the paper has one bias for each gate, so only sums matter."""
    bias = w["bias_ih"] + cat(torch.zeros(HIDDEN).double(), w["bias_hh"])
    return {**w, "bias_ih": bias, "bias_hh": torch.zeros(HIDDEN).double()}


STEPS_OPTIONS = {"epsilon": 0.3, "gamma": 0.2}
with_context = change(
    weight_hh=lambda w: cat(w["weight_hh"], w["weight_ch"]), bias_hh=lambda w: cat(w["bias_hh"], w["bias_ch"])
)
with_memory = change(
    weight_hh=lambda w: cat(w["weight_hh"], w["weight_mh"]), bias_hh=lambda w: cat(w["bias_hh"], w["bias_mh"])
)


def multiplier_last(w: Weights) -> Weights:
    w = with_memory(w)
    return {**w, "weight_ih": rows(w["weight_ih"], 1, 2, 3, 4, 0), "bias_ih": rows(w["bias_ih"], 1, 2, 3, 4, 0)}


def delayed(w: Weights) -> Weights:
    """Their delayed gate is the second, ours the last."""
    return {key: rows(value, 0, 2, 3, 1) for key, value in w.items()}


PEERS = {
    "antisymmetricrnn": Peer("AntisymmetricRNN", theirs=STEPS_OPTIONS, ours=STEPS_OPTIONS),
    "gatedantisymmetricrnn": Peer("GatedAntisymmetricRNN", one_bias, STEPS_OPTIONS, STEPS_OPTIONS),
    "atr": Peer("ATR"),
    "br": Peer("BR", bistable),
    "nbr": Peer("NBR"),
    "cfn": Peer("CFN"),
    "cornn": Peer("coRNN", with_context, {"dt": 0.3, "gamma": 0.8}, {"dt": 0.3, "gamma": 0.8}, ("h", "c")),
    "fastrnn": Peer("FastRNN"),
    # Their gate is a tanh unless told otherwise; the paper's is a sigmoid, and only then does it weigh two states.
    "fastgrnn": Peer("FastGRNN", fast_gates, {"nonlinearity": "sigmoid"}),
    "indrnn": Peer("IndRNN", change(recurrent=lambda w: w["vector_u"], bias_ih=lambda w: w["bias_ih"] + w["bias_hh"])),
    "intersectionrnn": Peer(
        "IntersectionRNN",
        change(weight_ih=lambda w: cat(w["weight_ih"], torch.eye(HIDDEN).double())),
        inputs=HIDDEN,
    ),
    "janet": Peer("JANET", states=("h", "h")),
    "lightru": Peer("LightRU"),
    "ligru": Peer("LiGRU"),
    "mclstm": Peer("MCLSTM", states=("v", "c")),
    "mgu": Peer("MGU"),
    "minimalrnn": Peer("MinimalRNN", change(weight_latent=lambda w: w["weight_mm"])),
    "miru1": Peer("MiRU1", theirs={"update_coefficient": 0.3}, ours={"update": 0.3}),
    "miru2": Peer(
        "MiRU2", theirs={"update_coefficient": 0.3, "reset_coefficient": 0.7}, ours={"update": 0.3, "reset": 0.7}
    ),
    "multiplicativelstm": Peer("MultiplicativeLSTM", multiplier_last, states=("h", "c")),
    "mut1": Peer("MUT1"),
    "mut2": Peer("MUT2"),
    "mut3": Peer("MUT3"),
    "originallstm": Peer("OriginalLSTM", states=("h", "c")),
    "peepholelstm": Peer("PeepholeLSTM", lambda w: {**w, **peepholes(w)}, states=("h", "c")),
    "ran": Peer("RAN", change(weight_ih=lambda w: rows(w["weight_ih"], 1, 2, 0)), states=("h", "c")),
    "reslstm": Peer(
        "ResLSTM",
        lambda w: {
            **w,
            **peepholes(w),
            "weight_ih": cat(w["weight_ih"], w["weight_res"]),
            "weight_projection": w["weight_proj"],
        },
        states=("h", "c"),
    ),
    "sgrn": Peer("SGRN"),
    "sgu": Peer("SGU"),
    "dsgu": Peer("DSGU", change(weight_out=lambda w: w["weight_ho"])),
    "star": Peer("STAR"),
    "taugru": Peer("tauGRU", delayed, {"delay": 3}, {"delay": 3}),
    "trnn": Peer("TRNN"),
    "tgru": Peer("TGRU", two_inputs),
    "tlstm": Peer("TLSTM", two_inputs, states=("c",)),
    "ugrnn": Peer("UGRNN"),
    "unicornn": Peer(
        "UnICORNN",
        change(recurrent=lambda w: w["weight_hh"], control=lambda w: w["weight_ch"]),
        {"alpha": 0.4},
        {"alpha": 0.4},
        ("h", "z"),
    ),
    "wmclstm": Peer("WMCLSTM", with_memory, states=("h", "c")),
}


def peer(name: str, it: Peer) -> tuple[Recurrent, nn.Module, Weights, Callable[[Weights], Weights]]:
    """Our layer, theirs, their weights drawn at random, and their translation to ours."""
    theirs = getattr(torchrecurrent, it.layer)(it.inputs, HIDDEN, **it.theirs).double()
    ours = Recurrent(name, it.inputs, HIDDEN, norm=None, dtype=torch.float64, **it.ours)
    wanted = {key.removesuffix("_l0") for key, _ in ours.named_parameters()}
    weights = dict(theirs.cells[0].named_parameters())
    for key, value in weights.items():
        if key != "beta" or name != "janet":  # the paper's beta is a constant
            nn.init.normal_(value, std=0.5)

    def translate(given: Weights) -> Weights:
        return {f"{key}_l0": value for key, value in it.weights(given).items() if key in wanted}

    return ours, theirs, weights, translate


def compare(name: str, it: Peer, given: bool) -> list[tuple[Tensor, Tensor]]:
    """Outputs, last states and gradients, ours and theirs."""
    ours, theirs, weights, translate = peer(name, it)
    x = torch.randn(STEPS, SAMPLES, it.inputs, dtype=torch.float64, requires_grad=True)
    distinct = list(dict.fromkeys(it.states))
    first = {key: torch.randn(1, SAMPLES, HIDDEN, dtype=torch.float64, requires_grad=True) for key in distinct}
    sizes = {state: ours.state_size(state) for state in ours.cell.states}
    zeros = {state: torch.zeros(1, SAMPLES, size, dtype=torch.float64) for state, size in sizes.items()}
    hx: Any = tuple({**zeros, **first}.values()) if given else None
    given_to_them: Any = tuple(first[key] for key in it.states) if given else None
    if given and it.layer in ("TGRU", "TLSTM"):
        given_to_them = (*given_to_them, torch.zeros(1, SAMPLES, it.inputs, dtype=torch.float64))
    if given and len(given_to_them) == 1:
        given_to_them = given_to_them[0]
    output, last = functional_call(ours, translate(weights), (x, hx))
    their_output, their_last = theirs(x) if given_to_them is None else theirs(x, given_to_them)
    last = dict(zip(ours.cell.states, [last] if isinstance(last, Tensor) else last, strict=True))
    their_last = [their_last] if isinstance(their_last, Tensor) else list(their_last)[: len(it.states)]
    pairs = [(output, their_output), *((last[key], value) for key, value in zip(it.states, their_last, strict=True))]
    leaves = [x, *(first.values() if given else ()), *weights.values()]
    gradients = []
    for side in (0, 1):
        loss = sum((pair[side] * torch.linspace(-1, 2, pair[side].numel()).view_as(pair[side])).sum() for pair in pairs)
        gradients.append(torch.autograd.grad(loss, leaves, allow_unused=True))
    names = ["x", *(first if given else ()), *weights]
    for key, a, b in zip(names, *gradients, strict=True):
        if (name, key) == ("janet", "beta"):
            continue
        assert (a is None) == (b is None), key
        if a is not None:
            pairs.append((a, b))
    return pairs


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("given", [False, True])
def test_without_norm_a_cell_is_torchrecurrents(name: str, given: bool) -> None:
    for ours, theirs in compare(name, PEERS[name], given):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


DEPARTS = {
    "lem": Peer("LEM", with_context, states=("h", "z")),
    "nas": Peer("NAS", states=("h", "c")),
    "fastgrnn": Peer("FastGRNN", fast_gates),
}


@pytest.mark.parametrize("name", DEPARTS)
def test_cells_that_torchrecurrent_departs_from_the_paper_in_differ_from_ours(name: str) -> None:
    """In test_loops ours equal the papers' equations."""
    ours, theirs = compare(name, DEPARTS[name], False)[0]
    assert not torch.allclose(ours, theirs, atol=1e-3)


def test_all_of_torchrecurrents_cells_are_there() -> None:
    layers = [n.removesuffix("Cell") for n in dir(torchrecurrent) if n.endswith("Cell")]
    assert len(layers) == 41
    assert {name.lower() for name in layers} <= set(registry)
    assert set(PEERS) | set(DEPARTS) | {"scrn"} == {name.lower() for name in layers}
