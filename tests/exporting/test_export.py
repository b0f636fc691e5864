"""Files of whole models: equal to the model at any size, kept only if they are, and free of this package."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lightning_bln import BLNGRU, BLNLSTM, BatchLayerNorm, ConvBLN2d, export, fold, recompute_population, set_mode
from lightning_bln.exporting import Call, Exported, ExportError
from lightning_bln.exporting.compare import allowed_for
from lightning_bln.exporting.formats import format_of
from lightning_bln.folding.difference import difference
from tests.export.helpers import exports

FORMATS = (pytest.param("onnx", marks=exports), pytest.param("pt2", marks=exports), "torch")


class Sequences(nn.Module):
    """A recurrent layer and a linear one, with a forward of a mask given by name, and several results."""

    def __init__(self, layer: Callable[..., nn.Module] = BLNLSTM, **options: Any) -> None:
        super().__init__()
        self.layer, self.head = layer(4, 6, batch_first=True, **options), nn.Linear(6, 3)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> dict[str, Tensor | None]:
        y = self.layer(x)[0]
        return {"last": self.head(y[:, -1]), "all": y if mask is None else y * mask.unsqueeze(-1), "none": None}


class Case(NamedTuple):
    """A model, how to make its input, and what becomes of its layers."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    mode: str | None
    becomes: set[str | None]
    sizes: str
    """Axes of the input of an ONNX file."""


FOLDS = {"time_statistics": "shared", "norm_cell": False}
CASES = {
    "folded": Case(lambda: Sequences(**FOLDS), (4, 4), "pppp", {"LSTM"}, "x (batch, x_1, 4)"),
    "folded gru": Case(
        lambda: Sequences(BLNGRU, time_statistics="shared"), (5, 4), "pppp", {"GRU"}, "x (batch, x_1, 4)"
    ),
    "stays": Case(Sequences, (5, 4), "ppcc", {None}, "x (batch, x_1, 4)"),
    "images": Case(
        lambda: nn.Sequential(ConvBLN2d(3, 4, 3, positions="shared"), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        (3, 8, 8),
        "pppp",
        {"Affine", "Sequential"},
        "input (batch, 3, input_2, input_3)",
    ),
    "places": Case(
        lambda: nn.Sequential(ConvBLN2d(3, 4, 3), nn.Flatten()), (3, 6, 6), "ppcc", {None}, "input (batch, 3, 6, 6)"
    ),
    "batchnorm": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3)),
        (3, 6, 6),
        None,
        {"Identity"},
        "input (batch, 3, 6, 6)",
    ),
}
QUICK = ("folded", "batchnorm")


def ready(name: str) -> tuple[nn.Module, list[Tensor]]:
    """A model with a population, and batches whose last one is smaller."""
    case = CASES[name]
    model = case.build()
    recompute_population(model, [2 * torch.randn(16, *case.shape) + 1 for _ in range(4)])
    if case.mode is not None:
        set_mode(model, case.mode)
    return model, [torch.randn(n, *case.shape) for n in (8, 8, 3)]


def needs_onnx(to: str) -> None:
    if to == "onnx":
        for name in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(name)


def round_trip(name: str, to: Any, path: Path) -> Exported:
    needs_onnx(to)
    model, batches = ready(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = export(model, path, batches, to=to)
    assert found.difference < 1e-5
    assert {entry.became for entry in found.report.entries} == CASES[name].becomes
    assert model.training  # as it was
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    if to != "torch":
        assert str(found.axes) == CASES[name].sizes
    if to == "onnx":
        assert found.axes is not None
        session = import_module("onnxruntime").InferenceSession(path)
        assert [tuple(one.shape) for one in session.get_inputs()] == [*found.axes.sizes]
    return found


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("name", QUICK)
def test_a_file_computes_what_its_model_does(name, to, tmp_path) -> None:
    round_trip(name, to, tmp_path / "model")


@pytest.mark.exact
@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("name", [name for name in CASES if name not in QUICK])
def test_a_file_of_any_model_computes_what_its_model_does(name, to, tmp_path) -> None:
    round_trip(name, to, tmp_path / "model")


RUNS = """
import sys, torch
sys.modules["lightning_bln"] = None
to, path, values = sys.argv[1:]
x, expected = torch.load(values)
if to == "onnx":
    import onnxruntime
    session = onnxruntime.InferenceSession(path)
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
elif to == "pt2":
    found = torch.export.load(path).module()(x)
else:
    nn = torch.nn
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Identity(), nn.Flatten(), nn.Linear(64, 3))
    model.load_state_dict(torch.load(path, weights_only=True))
    found = model(x)
assert torch.allclose(found, expected, atol=1e-5)
"""


@pytest.mark.parametrize("to", FORMATS)
def test_a_file_runs_where_this_package_is_not(to, tmp_path) -> None:
    needs_onnx(to)
    model, batches = ready("batchnorm")
    path = tmp_path / f"model.{'pt' if to == 'torch' else to}"
    assert export(model, path, batches).to == to
    x = torch.randn(11, 3, 6, 6)
    torch.save((x, model.eval()(x).detach()), tmp_path / "values.pt")
    subprocess.run([sys.executable, "-c", RUNS, to, str(path), str(tmp_path / "values.pt")], check=True, cwd=tmp_path)


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("is_there", [True, False])
def test_a_file_that_differs_is_not_kept(to, is_there, tmp_path, monkeypatch) -> None:
    needs_onnx(to)
    model, batches = ready("batchnorm")
    path = tmp_path / "model"
    if is_there:
        path.write_text("earlier")

    def wrong(model: nn.Module, *, report: Literal[True]) -> Any:
        copy, found = fold(model, report=report)
        with torch.no_grad():
            copy[-1].bias[1] += 0.01
        return copy, found

    module = import_module("lightning_bln.exporting.export")
    monkeypatch.setattr(module, "fold", wrong)
    with pytest.raises(ExportError, match=r"differ from the model's by up to 0\.01 .*; the tolerance is 0\.0001"):
        export(model, path, batches, to=to)
    assert [entry.name for entry in tmp_path.iterdir()] == (["model"] if is_there else [])
    assert not is_there or path.read_text() == "earlier"
    assert export(model, path, batches, to=to, tolerance=0.1).difference == pytest.approx(0.01, rel=1e-3)


def test_the_callers_check_refuses_a_file(tmp_path) -> None:
    def check(file: Callable[..., Tensor]) -> None:
        torch.testing.assert_close(file(batches[2]), model.eval()(batches[2]))
        raise ArithmeticError("too slow")

    model, batches = ready("batchnorm")
    with pytest.raises(ArithmeticError, match="too slow"):
        export(model, tmp_path / "model.pt", batches, check=check)
    assert not [*tmp_path.iterdir()]


@exports
def test_arguments_by_name_and_nested_results(tmp_path) -> None:
    model, batches = ready("folded")
    calls = [Call((x,), {"mask": torch.rand(x.shape[:2]) > 0.5}) for x in batches]
    found = export(model, tmp_path / "model.pt2", calls)
    assert str(found.axes) == "x (batch, x_1, 4), mask (batch, x_1)"
    program = torch.export.load(found.path).module()
    result = program(calls[2].args[0], mask=calls[2].kwargs["mask"])
    torch.testing.assert_close(result, model.eval()(calls[2].args[0], **calls[2].kwargs))


@exports
@pytest.mark.exact
def test_axes_that_a_converter_gets_wrong_are_fixed(tmp_path) -> None:
    needs_onnx("onnx")
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    found = export(model, tmp_path / "model.onnx", [torch.randn(n, 3, 8, 8) for n in (8, 3)])
    assert str(found.axes) == "input (batch, 3, 8, 8)"
    assert "other axes are fixed, since the file's results on an input of shape (8, 3, 4, 8) are of" in str(found)


@exports
def test_an_axis_that_torch_fixes_is_named(tmp_path) -> None:
    model = nn.RNN(4, 5, batch_first=True)
    found = export(model, tmp_path / "model.pt2", [torch.randn(n, 6, 4) for n in (1, 3)])
    assert str(found.axes) == "input (batch, 6, 4)"
    assert "axis 1 of input is fixed by torch.export" in found.notes


@exports
def test_samples_on_the_second_axis(tmp_path) -> None:
    model = BLNLSTM(4, 5, **FOLDS)  # type: ignore[arg-type]
    recompute_population(model, [(torch.randn(6, 16, 4),)])
    set_mode(model, "pppp")
    calls = [Call((torch.randn(steps, n, 4),), samples=n) for steps, n in ((6, 1), (7, 3))]
    assert str(export(model, tmp_path / "model.pt2", calls).axes) == "input (input_0, batch, 4)"


class FixedBatch(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).view(8, -1)


class Branching(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if y.sum() > 0 else -y


class Counting(nn.Linear):
    def forward(self, x: Tensor, times: int = 1) -> Tensor:  # type: ignore[override]
        return super().forward(x) * times


@exports
@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (
            FixedBatch(4, 2),
            torch.randn(8, 4),
            r"axis 0 of x is a constant of the program, 8; if .*, pass Call\(\(x,\), samples=number\)\. In forward",
        ),
        (
            Branching(4, 2),
            torch.randn(8, 4),
            r"Could not guard on data-dependent .*; to='torch' needs no",
        ),
        (Counting(4, 2), (torch.randn(8, 4), 2), "called with values of type int, where a file takes tensors alone"),
        (nn.Linear(4, 2), (), "examples is empty"),
    ],
)
def test_a_model_that_does_not_export_says_why(model, example, message, tmp_path, capfd) -> None:
    logging.getLogger("lightning_bln.convert").disabled = True
    with pytest.raises(ExportError, match=message):
        export(model, tmp_path / "model.pt2", [example] if example != () else [])
    assert not [*tmp_path.iterdir()]
    assert capfd.readouterr() == ("", "")


def test_places_that_cannot_be_written(tmp_path) -> None:
    model, x = nn.Linear(4, 2), [torch.randn(8, 4)]
    (tmp_path / "file").write_text("")
    for path, message in {
        "model.zip": "stands for no format; choose onnx, pt2 or torch",
        "file/model.pt": "file is no folder; name a file",
    }.items():
        with pytest.raises(ExportError, match=message):
            export(model, tmp_path / path, x)
    with pytest.raises(ExportError, match="it is a folder"):
        export(model, tmp_path, x, to="torch")
    with pytest.raises(ExportError, match="to='tensorrt'; choose onnx"):
        export(model, tmp_path / "model.onnx", x, to="tensorrt")  # type: ignore[arg-type]
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@exports
def test_missing_packages_are_named(monkeypatch) -> None:
    monkeypatch.setattr("lightning_bln.exporting.formats.find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"needs onnx and .*; run: pip install 'lightning-bln\[export\]'"):
        format_of("model.onnx", None)


def test_torch_without_open_axes_is_named(monkeypatch) -> None:
    monkeypatch.setattr(torch.export, "Dim", object)
    with pytest.raises(ExportError, match=r"needs torch 2\.6 or newer, .*; to='torch' works here"):
        format_of("model.pt2", None)
    assert format_of("model.pth", None) == "torch"


def test_a_state_dict_says_what_it_needs(tmp_path) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), BatchLayerNorm(3))
    recompute_population(model, [torch.randn(16, 4)])
    found = export(model, tmp_path / "model.pt", [torch.randn(8, 4)])
    assert "loading it needs lightning_bln, for its layers 2" in str(found)


@pytest.mark.parametrize(
    ("found", "expected", "is_alike"),
    [
        (torch.tensor([1.0, 2e6]), torch.tensor([1.1, 2e6]), True),  # relative to the largest
        (torch.tensor([1.0]), torch.tensor([1.01]), False),
        (torch.tensor([1.0], dtype=torch.float64), torch.tensor([1.0 + 1e-6], dtype=torch.float64), False),
        (torch.tensor([torch.nan, torch.inf]), torch.tensor([torch.nan, torch.inf]), True),
        (torch.tensor([torch.nan]), torch.tensor([1.0]), False),
        (torch.tensor([1.0]), torch.tensor([torch.nan]), False),
        (torch.tensor([torch.inf]), torch.tensor([1.0]), False),
        (torch.tensor([3]), torch.tensor([4]), False),
        (torch.tensor([3]), torch.tensor([3]), True),
        (torch.tensor([2**62]), torch.tensor([2**62 + 1]), False),
        (torch.tensor([3.0]), torch.tensor([3]), False),
        (torch.tensor([1 + 1j]), torch.tensor([1 - 1j]), False),
        (torch.tensor([1 + 1j]), torch.tensor([1 + 1.00001j]), True),
        ((torch.ones(1), 3), (torch.ones(1), 4), False),
        (torch.ones(2, 1), torch.ones(1, 2), False),
        ((torch.ones(1),), (torch.ones(1), torch.ones(1)), False),
        ({"a": torch.ones(2)}, {"a": torch.ones(2)}, True),
    ],
)
def test_differences(found, expected, is_alike) -> None:
    assert difference(found, expected, allowed_for(None), least=1.0).is_alike == is_alike
