"""Ways of tracing, compiling and exporting a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import pack_sequence

from tests.as_torch.expected import UNROLLED
from tests.as_torch.layers import EVAL, LAYERS, TRAIN, Case, Found, agree, flat, run, same, weighted
from tests.as_torch.ways import few, way

LENGTHS = tuple(range(2, 11))


def traces(case: Case) -> bool:
    return case.few and case.norm != "layer"


@way("make_fx", "of the outputs, with real and with fake tensors", traces)
def fx(case: Case) -> None:
    module, mode = case.module(), "fake" if case.situation == EVAL else "real"
    graph = make_fx(lambda *xs: module(*xs), tracing_mode=mode, _allow_non_fake_inputs=True)(*case.inputs())
    same(graph(*case.inputs(1)), case.reference()(*case.inputs(1)))


def compiled(module: nn.Module, backend: str = "aot_eager", **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(module, backend=backend, **options)


SLOW = (*UNROLLED, "mingru", "ConvBLN1d", "ConvBLN3d", "BLNGRU", "BLNRNN", "BLNLSTMCell", "BLNGRUCell", "mgu cell")


def compiles(case: Case) -> bool:
    """One case in training and one in evaluation; of cells that compile for long, the latter."""
    if not case.few or case.packed or case.norm == "layer":
        return False
    return case.situation != TRAIN or case.kind not in SLOW


@way("torch.compile", '`torch.compile(fullgraph=True)`, backend "aot_eager", forward and backward', compiles)
def compile_(case: Case) -> None:
    module = case.module()
    agree(run(compiled(module, fullgraph=True), case.inputs(), module), case.expected())


def compiles_packed(case: Case) -> bool:
    is_one = case.packed and case.norm is None and case.situation != TRAIN
    return is_one and case.kind in ("BLNLSTM", "LSTM")


@way("torch.compile, packed", "nine packed batches of different lengths, without `fullgraph`", compiles_packed)
def compile_packed(case: Case) -> None:
    call = compiled(case.module().layer)
    reference = case.reference().layer
    for steps in LENGTHS:
        x = torch.randn(steps, case.shapes[0][-1], dtype=torch.float64)
        packed = pack_sequence([x, x[:-1], x[:1]])
        same(flat(call(packed)), flat(reference(packed)))


def compiles_lengths(case: Case) -> bool:
    if case.kind in ("coupledlstm", "lem", "slstm", "mingru", "ConvBLN1d", "ConvBLN3d", "BLNRNN"):
        return False
    return case.time_axis is not None and compiles(case) and (not case.has_time or case.norm in (None, "bln"))


@way(
    "torch.compile, nine lengths",
    'nine different lengths, `fullgraph=True`, backend "eager"',
    compiles_lengths,
)
def compile_lengths(case: Case) -> None:
    module, reference = case.module(), case.reference()
    call = compiled(module, "eager", fullgraph=True)
    for steps in LENGTHS:
        inputs = case.inputs(steps=steps)
        same(call(*inputs), reference(*inputs))
    for found, wanted in zip(module.buffers(), reference.buffers(), strict=True):
        same((found,), (wanted,))


def exports(case: Case) -> bool:
    return (compiles(case) and case.situation != TRAIN) or is_usual(case)


def is_usual(case: Case) -> bool:
    """Evaluation by batch statistics of a population, on the default backend."""
    return (case.norm, case.situation, case.backend or "auto", case.packed) == ("bln", "ppcc", "auto", False)


def exported(case: Case, axes: dict[int, str], sizes: list[dict[str, int]], *, states: bool = True) -> None:
    """Export with these axes dynamic, and compare at other sizes."""
    dims = {axis: torch.export.Dim(name, min=3 if name == "steps" else 2, max=64) for axis, name in axes.items()}
    shapes = tuple(dims if index == 0 or states else None for index in range(len(case.shapes)))
    dynamic = (shapes[0], shapes[1:]) if shapes[1:] else (shapes[0],)
    program: Any = torch.export.export(case.module(), case.inputs(), dynamic_shapes=dynamic if dims else None)
    for own in sizes:
        inputs = case.inputs(1, **own)
        same(program.module()(*inputs), case.reference()(*inputs))


@way("torch.export", "static shapes", exports)
def export_static(case: Case) -> None:
    exported(case, {}, [{}])


def exports_batch(case: Case) -> bool:
    return exports(case) and case.kind not in ("coupledlstm", "lem", "ConvBLN1d", "ConvBLN3d")


@way("torch.export, dynamic batch", "another number of samples", exports_batch)
def export_batch(case: Case) -> None:
    exported(case, {case.batch_axis: "samples"}, [{"samples": 5}, {"samples": 2}])


@way(
    "torch.export, dynamic time",
    "another number of steps or positions",
    lambda c: exports(c) and c.time_axis is not None,
)
def export_time(case: Case) -> None:
    assert case.time_axis is not None
    exported(case, {case.time_axis: "steps"}, [{"steps": 5}, {"steps": 9}], states=False)


def converts(case: Case) -> bool:
    """One case of each layer, with norms where it has any."""
    return is_usual(case) if case.kind in LAYERS else exports(case)


@way(
    "ONNX",
    "`torch.onnx.export(dynamo=True)`, run by onnxruntime at other sizes: samples, steps and positions",
    converts,
)
def onnx(case: Case) -> None:
    import onnxruntime

    axes = {case.batch_axis: "samples"} | ({} if case.time_axis is None else {case.time_axis: "steps"})
    dims = [{axis: torch.export.Dim(name, min=3 if name == "steps" else 2, max=64) for axis, name in axes.items()}]
    dims += [{case.batch_axis: dims[0][case.batch_axis]}] * (len(case.shapes) - 1)
    shapes = (dims[0], tuple(dims[1:])) if dims[1:] else (dims[0],)
    with torch.no_grad():
        program = torch.onnx.export(
            case.module(torch.float32), case.inputs(0, torch.float32), dynamo=True, verbose=False, dynamic_shapes=shapes
        )
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    names = [one.name for one in session.get_inputs()]
    for sizes in ({"samples": 5, "steps": 5}, {"samples": 2, "steps": 9}):
        inputs = case.inputs(1, torch.float32, **sizes)
        found = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
        wanted = case.reference()(*(x.double() for x in inputs))
        same(map(torch.from_numpy, found), wanted, 1e-5)


@way("torch.jit.trace", "of the layer; the program takes as many steps as the example has", few)
def jit_trace(case: Case) -> None:
    program: Any = torch.jit.trace(case.module(), case.inputs(), check_trace=False)
    found, wanted = run_jit(program, case), run(case.reference(), case.inputs(1))
    same(found.outputs, wanted.outputs)
    same(found.grads[: len(case.shapes)], wanted.grads[: len(case.shapes)])


def run_jit(program: Any, case: Case) -> Found:
    leaves: list[Tensor] = [x.requires_grad_() for x in case.inputs(1)]
    outputs = program(*leaves)
    return Found(tuple(outputs), torch.autograd.grad(weighted(outputs), leaves), {})
