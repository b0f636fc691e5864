"""Forwards with conditions, arguments and results that files do not have, and what an export leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_bln import export
from lightning_bln.exporting import Call, ExportError
from tests.export.helpers import exports
from tests.exporting.test_export import FORMATS, needs_onnx


class Chooses(nn.Linear):
    """A linear layer with a sign by a condition on the input's shape."""

    def __init__(self, is_plus: Callable[[Any], bool]) -> None:
        super().__init__(4, 4)
        self.is_plus = is_plus

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.is_plus(x.shape) else -y


@exports
@pytest.mark.parametrize("to", ["onnx", "pt2"])
@pytest.mark.parametrize(
    ("is_plus", "message"),
    [
        (
            lambda shape: shape[0] < 50,
            "axis 0 of x is open up to 49 alone, by a condition of forward",
        ),
        (lambda shape: shape[0] >= 5, "input of shape"),
        (lambda shape: shape[0] % 2 == 0, "input of shape"),
        (lambda shape: shape[0] != 100, r"input of shape \(100, 9, 4\)"),
        (lambda shape: shape[0] < shape[1], "axis 0 of x is open up to 8 alone"),
    ],
)
def test_a_condition_on_the_number_of_samples_is_refused(is_plus, message, to, tmp_path) -> None:
    needs_onnx(to)
    with pytest.raises(ExportError, match=message):
        export(Chooses(is_plus), tmp_path / "model", [torch.randn(6, 9, 4)], to=to)


@exports
@pytest.mark.parametrize("to", ["onnx", "pt2"])
@pytest.mark.parametrize(
    ("is_plus", "note"),
    [
        (lambda shape: shape[1] < 50, "axis 1 of x is fixed, since a condition of forward ends at 49"),
        (lambda shape: shape[1] >= 5, "other axes are fixed, since"),
        (lambda shape: shape[1] != 100, "other axes are fixed, since"),
        (lambda shape: shape[1] != 1, "other axes are fixed, since"),
        (lambda shape: shape[1] % 3 == 0, "other axes are fixed, since"),
    ],
)
def test_an_axis_that_a_condition_limits_is_fixed(is_plus, note, to, tmp_path) -> None:
    needs_onnx(to)
    found = export(Chooses(is_plus), tmp_path / "model", [torch.randn(6, 9, 4)], to=to)
    assert str(found.axes) == "x (batch, 9, 4)"
    assert any(note in one for one in found.notes)


@exports
def test_a_condition_that_looks_like_one_of_torchs_own_is_found(tmp_path) -> None:
    needs_onnx("onnx")
    found = export(Chooses(lambda shape: shape[1] - 2 != 1), tmp_path / "model.onnx", [torch.randn(6, 9, 4)])
    assert str(found.axes) == "x (batch, 9, 4)"


class Positions(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.arange(20.0)[: x.shape[1], None]


@exports
def test_a_limit_of_the_model_itself_is_named(tmp_path) -> None:
    found = export(Positions(4, 4), tmp_path / "model.pt2", [torch.randn(6, n, 4) for n in (9, 7)])
    assert str(found.axes) == "x (batch, x_1, 4)"
    assert "axis 1 of x goes up to 20, as in the model" in found.notes


class Picky(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_exporting() and len(x) not in (6, 8):
            raise ValueError("6 or 8")
        return super().forward(x)


@exports
def test_a_size_that_was_never_run_is_not_claimed(tmp_path) -> None:
    with pytest.raises(ExportError, match="cannot be open, since the model takes neither 1 nor 12 in place"):
        export(Picky(4, 4), tmp_path / "model.pt2", [torch.randn(6, 4)])
    assert str(export(Picky(4, 4), tmp_path / "model.pt2", [torch.randn(n, 4) for n in (6, 8)]).axes) == "x (batch, 4)"


class Writes(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.add_(1)) + x


@pytest.mark.parametrize("to", FORMATS)
def test_a_forward_may_write_into_its_input(to, tmp_path) -> None:
    needs_onnx(to)
    batches = [torch.randn(n, 4) for n in (6, 3)]
    before = [x.clone() for x in batches]
    assert export(Writes(4, 4), tmp_path / "model", batches, to=to).difference < 1e-5
    assert all(map(torch.equal, batches, before))


class Gives(nn.Linear):
    def __init__(self, other: Callable[[Tensor], Any]) -> None:
        super().__init__(4, 2)
        self.other = other

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), {"other": self.other(x)}


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("other", [len, lambda x: 3, lambda x: "name"])
def test_a_result_that_is_no_tensor_is_named(other, to, tmp_path) -> None:
    needs_onnx(to)
    with pytest.raises(ExportError, match=r"output\[1\]\['other'\] of Gives.forward is of type .*, where a file gives"):
        export(Gives(other), tmp_path / "model", [torch.randn(6, 4)], to=to)


class Gathers(nn.Linear):
    def forward(self, *xs: Tensor, **others: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(sum((*xs, *others.values())))  # type: ignore[arg-type]


@pytest.mark.parametrize("to", FORMATS)
def test_arguments_without_names_in_the_signature(to, tmp_path) -> None:
    needs_onnx(to)
    x = torch.randn(6, 4)
    found = export(Gathers(4, 2), tmp_path / "model", [Call((x, 2 * x), {"z": 3 * x, "y": x})], to=to)
    if found.axes is not None:
        assert list(found.axes.sizes) == [("batch", 4)] * 4
    if to == "pt2":
        program = torch.export.load(found.path.open("rb")).module()  # type: ignore[arg-type]
        assert program(x, x, z=x, y=x).shape == (6, 2)


class Joins(nn.Linear):
    def forward(self, x: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(x["a"] - x["b"])


@pytest.mark.parametrize("to", FORMATS)
def test_examples_of_another_kind_are_counted(to, tmp_path) -> None:
    needs_onnx(to)
    a, b = torch.randn(2, 6, 4)
    examples = [({"a": a, "b": b},), ({"b": b, "a": a},)]
    found = export(Joins(4, 2), tmp_path / "model", examples, to=to)
    assert found.inputs == 2
    assert "left out" not in str(found)
    found = export(Joins(4, 2), tmp_path / "model", [*examples, ({"a": a, "b": b.double()},)], to="torch")
    assert "1 of 3 examples are left out, which have another structure or dtype than the rest" in found.notes


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (
            (torch.zeros(2, 4), torch.zeros(2)),
            r"example \(Tensor, Tensor\) does not fit Linear.forward\(input\): too many",
        ),
        ({"y": torch.zeros(2, 4)}, r"example \(y=\) does not fit Linear.forward\(input\): missing"),
        (Call((torch.zeros(2, 4),), samples=1), r"samples=1 is the size of no axis .* \(2, 4\); pass the number"),
    ],
)
def test_examples_that_do_not_fit_are_named(example, message, tmp_path) -> None:
    with pytest.raises(ExportError, match=message):
        export(nn.Linear(4, 2), tmp_path / "model.pt", [example])


def test_a_refused_export_makes_no_folder(tmp_path) -> None:
    x = [torch.randn(8, 4)]
    with pytest.raises(ArithmeticError):
        export(nn.Linear(4, 2), tmp_path / "a" / "b" / "model.pt", x, check=lambda run: 1 // 0)  # type: ignore[arg-type,return-value]
    assert not [*tmp_path.iterdir()]
    assert export(nn.Linear(4, 2), tmp_path / "a" / "b" / "model.pt", x).path.is_file()


@pytest.mark.parametrize("path", ["/proc/none/model.pt", f"{'x' * 300}.pt", f"{'x' * 300}/model.pt"])
def test_a_folder_that_cannot_be_made_is_named(path, tmp_path) -> None:
    with pytest.raises(ExportError, match=r"cannot be written \(.*\); name another file|no permission to write"):
        export(nn.Linear(4, 2), tmp_path / path, [torch.randn(8, 4)])


class Draws(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0 * torch.rand_like(x[:, :2])


def test_the_callers_random_state_stays(tmp_path) -> None:
    model, state = Draws(4, 2), torch.get_rng_state()
    export(model, tmp_path / "model.pt", [torch.zeros(8, 4)])
    assert torch.equal(torch.get_rng_state(), state)
