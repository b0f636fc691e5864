"""Formats of files: what writes each, and what runs it."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_bln._torch import open_recurrences
from lightning_bln.exporting.axes import Axes, Program, capture, most_open, places_needed, shapes_of
from lightning_bln.exporting.calls import Call, filled, named
from lightning_bln.exporting.errors import ExportError, first_line, quiet
from lightning_bln.folding.affine import Affine
from lightning_bln.folding.reasons import LAYERS

Format = Literal["onnx", "pt2", "torch"]
"""An ONNX file, a program of torch.export, or the state dict of the folded model."""

SUFFIXES: dict[str, Format] = {".onnx": "onnx", ".pt2": "pt2", ".pt": "torch", ".pth": "torch"}
"""The format that a file's name stands for."""

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
"""Packages that writing and running an ONNX file needs."""

Run = Callable[[Call], Any]
"""A function that runs a file, or a model, on a call."""


def format_of(path: str | Path, to: str | None) -> Format:
    """The format that is asked for, by default that of the file's name.

    Raises:
        ExportError: There is no such format, or what it needs is not installed.

    Example:
        >>> format_of("model.pt", None)
        'torch'
    """
    found = SUFFIXES.get(Path(path).suffix.lower()) if to is None else to
    if found not in get_args(Format):
        what = f"to={to!r}" if to is not None else f"{path}: its name stands for no format"
        raise ExportError(f"{what}; choose onnx, pt2 or torch (to=, --to)")
    if found != "torch" and not hasattr(getattr(torch.export, "Dim", None), "AUTO"):
        raise ExportError(
            f"to={found!r} needs torch 2.6 or newer, whose exporter finds open axes; this is {torch.__version__}; "
            "to='torch' works here"
        )
    missing = [name for name in PACKAGES if found == "onnx" and find_spec(name) is None]
    if missing:
        raise ExportError(f"to='onnx' needs {' and '.join(missing)}; run: pip install 'lightning-bln[export]'")
    return found  # type: ignore[return-value]


def write_onnx(program: Program, model: nn.Module, call: Call, file: BinaryIO) -> None:
    """Write an ONNX file whose open axes have names."""
    names = {place: name for name, places in program.axes.open.items() for place in places}
    with quiet(), open_recurrences(), named(call, model):  # the converter traces recurrent layers once more
        try:
            made = torch.onnx.export(
                program.program, dynamo=True, verbose=False, dynamic_shapes=shapes_of(model, call, names)
            )
            assert made is not None
            proto = made.model_proto
            for value, sizes in zip(proto.graph.input, program.axes.sizes, strict=True):
                for axis, size in zip(value.type.tensor_type.shape.dim, sizes, strict=True):
                    if isinstance(size, int):  # the name of a symbol, where torch found that out late
                        axis.dim_value = size
            content = proto.SerializeToString()
        except Exception as error:  # the converter raises errors of all kinds
            raise ExportError(f"torch.onnx.export: {first_line(error.__cause__ or error)}") from error
    file.write(content)


def load_onnx(path: Path, like: Any) -> Run:
    """A function that runs an ONNX file, with results of the structure of ``like``."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # its warnings are about its own optimisations, and errors are raised as well
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]

    def run(call: Call) -> Any:
        tensors = [x.detach().clone(memory_format=torch.contiguous_format).numpy() for x in call.tensors()]
        found = session.run(None, dict(zip(names, tensors, strict=True)))
        return filled(like, [torch.from_numpy(one) for one in found])

    return run


def write_pt2(program: Program, file: BinaryIO) -> None:
    """Write a program of torch.export."""
    content = io.BytesIO()  # which has no name, as torch wants one that ends with .pt2
    with quiet():
        try:
            torch.export.save(program.program, content)
        except Exception as error:  # torch raises errors of all kinds
            raise ExportError(f"torch.export.save: {first_line(error)}") from error
    file.write(content.getvalue())


def load_pt2(path: Path) -> Run:
    """A function that runs a program of torch.export."""
    with path.open("rb") as file, quiet():
        program = torch.export.load(io.BytesIO(file.read())).module()
    return lambda call: call.run(program)


def write_torch(model: nn.Module, file: BinaryIO) -> None:
    """Write a state dict."""
    torch.save(model.state_dict(), file)


def load_torch(path: Path, model: nn.Module) -> Run:
    """A function that runs a copy of ``model`` with the state dict of a file, and nothing of its own."""
    copy = deepcopy(model)
    with torch.no_grad():
        for value in copy.state_dict().values():
            if isinstance(value, Tensor) and value.is_floating_point():
                value.fill_(float("nan"))
    copy.load_state_dict(torch.load(path, weights_only=True))
    return lambda call: call.run(copy)


def attempts(to: Format, model: nn.Module, calls: Sequence[Call]) -> Iterator[Callable[[BinaryIO], Axes | None]]:
    """Functions that write a file, that with the most open axes first; each returns the axes of its inputs."""
    if to == "torch":
        yield lambda file: write_torch(model, file)
        return

    def write(file: BinaryIO, program: Program) -> Axes:
        if to == "onnx":
            write_onnx(program, model, calls[0], file)
        else:
            write_pt2(program, file)
        return program.axes

    yield lambda file: write(file, most_open(model, calls))
    yield lambda file: write(file, capture(model, calls, places_needed(calls)))


def load(to: Format, path: Path, model: nn.Module, like: Any) -> Run:
    """A function that runs a file.

    Raises:
        ExportError: What is to run it does not take it.
    """
    try:
        if to == "onnx":
            return load_onnx(path, like)
        return load_pt2(path) if to == "pt2" else load_torch(path, model)
    except Exception as error:  # of any library
        raise ExportError(f"the file does not load: {first_line(error)}") from error


def staying(model: nn.Module) -> list[str]:
    """Names of the layers of this package in ``model``, for which a state dict needs it."""
    ours = [name for name, one in model.named_modules() if isinstance(one, (*LAYERS, Affine)) and is_ours(one)]
    inside = {name for name in ours for other in ours if name != other and f"{name}.".startswith(other and f"{other}.")}
    return [name or "model" for name in ours if name not in inside]


def is_ours(layer: nn.Module) -> bool:
    """Whether a layer's class is of this package."""
    return any(one.__module__.split(".")[0] == "lightning_bln" for one in type(layer).__mro__)
