"""Every function that is computed on the stack of all modes equals the same function of each part."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_bln.per_mode import NotTogether, PerMode, part_of
from lightning_bln.per_mode.tensor import RULES

pytestmark = pytest.mark.exact

MODES = 3
Parts = list[Tensor]


def numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(shape, generator=generator) * 3
    return drawn > 0 if dtype == torch.bool else drawn.to(dtype)


FORMS: dict[str, Callable[[Parts], PerMode]] = {
    "parts": lambda parts: PerMode([one.clone() for one in parts]),
    "a stack": lambda parts: PerMode.of_stack(torch.stack(parts)),
    "a stack, modes last": lambda parts: PerMode.of_stack(torch.stack(parts, -1).movedim(-1, 0)),
}
KINDS = [
    *(((), torch.float32), ((3,), torch.float32), ((2, 3), torch.float32), ((0, 3), torch.float32)),
    *(((2, 3), torch.int64), ((2, 3), torch.bfloat16), ((2, 3), torch.bool), ((3, 2, 4), torch.float64)),
]


def outcome(function: Callable[..., Any], *values: Any) -> Any:
    """A result, or the error."""
    try:
        return function(*values)
    except NotTogether:
        raise
    except Exception as error:
        return error


def leaves(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [leaf for one in value for leaf in leaves(one)]
    return [value]


def assert_equal(found: Any, expected: Any) -> None:
    assert not isinstance(expected, Exception), (found, expected)
    ours, theirs = leaves(found), leaves(expected)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        if isinstance(other, Tensor):
            assert type(one) is Tensor
            assert one.dtype == other.dtype
            tolerance = 2e-2 if other.dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)
        else:
            assert one == other or (one != one and other != other)


def assert_as_parts(function: Callable[..., Any], *values: Any, form: str) -> None:
    """``function`` of parts of all modes, where ``values`` that are lists have one for each, as of each mode's."""
    expected = [
        outcome(function, *(value[place].clone() if isinstance(value, list) else kept(value) for value in values))
        for place in range(MODES)
    ]
    given = [FORMS[form](value) if isinstance(value, list) else kept(value) for value in values]
    try:
        found = outcome(function, *given)
    except NotTogether:
        return
    if isinstance(found, Exception) or all(isinstance(one, Exception) for one in expected):
        return  # after an error each mode runs alone, which gives its own result or error
    for place, one in enumerate(expected):
        assert_equal(part_of(found, place), one)


def kept(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def name_of(function: Any) -> str:
    return getattr(function, "__qualname__", None) or getattr(function, "__name__", str(function))


FUNCTIONS = sorted({name_of(one): one for one in RULES}.items())
DROPOUT = {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"}
UNSUITED = DROPOUT | {"grad", "__hash__", "backward", "__set__", "lstm", "gru", "rnn_tanh", "rnn_relu", "__iter__"}
CALLS = [(name, one) for name, one in FUNCTIONS if name.rpartition(".")[2] not in UNSUITED and "packed" not in name]
ARGUMENTS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((), {}),
    *(((dim,), {}) for dim in (0, 1, -1, -2)),
    *(((dim, keepdim), {}) for dim, keepdim in product((0, -1), (True, False))),
    *(((), {"dim": dim}) for dim in (0, -1, 2, (0,), (0, -1), None)),
    *(((), {"dim": dim, "keepdim": True}) for dim in (0, -1, (-1, 0), None)),
    ((), {"keepdim": True}),
    ((2,), {}),
    ((2, 0), {}),
    ((2, -1), {}),
    ((0, 1), {}),
    ((-1, 0), {}),
    ((0, 1, 1), {}),
    ((1, 0, 1), {}),
    ((1.5,), {}),
    (((0, 1),), {}),
    ((-1,), {}),
    ((3, -1), {}),
    ((True,), {}),
    ((), {"dim": 0, "dtype": torch.float64}),
    ((), {"dtype": torch.float64}),
    ((), {"dim": 0, "descending": True}),
    ((), {"correction": 0}),
    ((0,), {"correction": 0}),
    ((False,), {}),
    ((), {"unbiased": False}),
    ((None,), {}),
    ((...,), {}),
    ((slice(1),), {}),
    (((slice(None), 0),), {}),
    (((0, slice(None)),), {}),
    (((None, ...),), {}),
    (((..., None, -1),), {}),
    ((torch.tensor([0, 1]),), {}),
    (((slice(None), torch.tensor([1, 0, 0])),), {}),
    ((torch.tensor([True, False]),), {}),
    (([0, 1],), {}),
    (((slice(None), [0, 1]),), {}),
    (((torch.tensor([0, 1]), torch.tensor([0, 0])),), {}),
    (((0, None, torch.tensor([0, 1])),), {}),
    ((torch.tensor([[0, 1], [1, 0]]),), {}),
    ((torch.tensor(1),), {}),
    ((True,), {}),
]


@pytest.mark.parametrize(("name", "function"), CALLS, ids=[name for name, _ in CALLS])
def test_one_tensor(name: str, function: Any) -> None:
    for shape, dtype in KINDS:
        parts = [numbers(shape, dtype, seed) for seed in range(MODES)]
        for (args, kwargs), form in product(ARGUMENTS, FORMS):
            if name.endswith("expand") and not shape and args and isinstance(args[0], int) and args[0] < 0:
                continue  # torch makes tensors of negative size of it
            try:
                assert_as_parts(lambda one, args=args, kwargs=kwargs: function(one, *args, **kwargs), parts, form=form)
            except Exception as error:
                raise AssertionError(f"{name}{args} {kwargs} of {form} {shape} {dtype}: {error}") from error


OTHERS: list[Any] = [2, 0.5, (), (3,), (2, 1), (4, 2, 3)]


@pytest.mark.parametrize(("name", "function"), CALLS, ids=[name for name, _ in CALLS])
def test_two_tensors(name: str, function: Any) -> None:
    types = [torch.float32, torch.int64, torch.float64, torch.bool]
    for shape, other, dtype, second in product([(), (2, 3)], OTHERS, types[:2], types):
        parts = [numbers(shape, dtype, seed) for seed in range(MODES)]
        given: list[Any] = [other]
        if isinstance(other, tuple):
            own = [numbers(other, second, seed + 10) for seed in range(MODES)]
            given = [own, own[0]]
        elif second != torch.float32:
            continue
        for value, form, swapped in product(given, list(FORMS)[:2], (False, True)):
            values = (value, parts) if swapped else (parts, value)
            try:
                assert_as_parts(function, *values, form=form)
            except Exception as error:
                what = f"{'swapped ' if swapped else ''}{shape} {dtype} with {other} {second} of {form}"
                raise AssertionError(f"{name} {what} {type(value)}: {error}") from error


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "detach": Tensor.detach,
    "view": lambda x: x.view(-1),
    "view_as": lambda x: x.view_as(x),
    "reshape": lambda x: x.reshape(3, 2),
    "flatten": Tensor.flatten,
    "contiguous": Tensor.contiguous,
    "a copy": lambda x: x.T.contiguous(),
    "a copy by reshape": lambda x: x.T.reshape(-1),
    "to": lambda x: x.to(torch.float32),
    "to another type": lambda x: x.to(torch.float64),
    "to a copy": lambda x: x.to(torch.float32, copy=True),
    "type_as": lambda x: x.type_as(torch.ones(1)),
    "float": Tensor.float,
    "clone": Tensor.clone,
    "transpose": lambda x: x.transpose(0, 1),
    "T": lambda x: x.T,
    "mT": lambda x: x.mT,
    "t": Tensor.t,
    "permute": lambda x: x.permute(1, 0),
    "squeeze": lambda x: x[:, :1].squeeze(1),
    "unsqueeze": lambda x: x.unsqueeze(0),
    "select": lambda x: x.select(1, 0),
    "narrow": lambda x: x.narrow(1, 0, 2),
    "chunk": lambda x: x.chunk(2)[1],
    "split": lambda x: x.split(1)[0],
    "unbind": lambda x: x.unbind(1)[2],
    "iteration": lambda x: next(iter(x)),
    "a number": lambda x: x[0],
    "a slice": lambda x: x[:, 1:],
    "dots": lambda x: x[..., None],
    "an index": lambda x: x[torch.tensor([0, 1])],
    "a list": lambda x: x[[1, 0]],
    "a mask": lambda x: x[torch.tensor([True, False])],
    "expand": lambda x: x[:1].expand(1, 3),
    "movedim": lambda x: x.movedim(0, 1),
    "diagonal": Tensor.diagonal,
    "unflatten": lambda x: x.unflatten(1, (3, 1)),
    "unfold": lambda x: x.unfold(1, 2, 1),
    "data": lambda x: x.data,
    "real": lambda x: x.real,
    "as_strided": lambda x: x.as_strided((2,), (3,)),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "relu": F.relu,
    "itself": lambda x: x,
    "positive": lambda x: +x,
    "expand_as": lambda x: x.expand_as(torch.ones(2, 3)),
    "atleast": lambda x: torch.atleast_2d(x),
    "broadcast": lambda x: torch.broadcast_to(x, (2, 3)),
    "view of a type": lambda x: x.view(torch.int32).view(torch.float32),
    "hsplit": lambda x: torch.hsplit(x, 3)[1],
    "ravel": Tensor.ravel,
    "swapaxes": lambda x: x.swapaxes(0, 1),
    "a view of a view": lambda x: x.view(-1)[2:].unsqueeze(0).squeeze(),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", VIEWS)
def test_a_write_is_seen_where_it_is_in_plain_tensors(name: str, form: str) -> None:
    def into_the_view(x: Tensor) -> list[Tensor]:
        view = VIEWS[name](x)
        view.mul_(2)
        view[0] = 7
        return [x + 0, view + 0]

    def into_the_source(x: Tensor) -> list[Tensor]:
        view = VIEWS[name](x)
        x.add_(1)
        x[0, 1] = 7
        return [x + 0, view + 0]

    if name in ("contiguous", "ravel") and form == "a stack, modes last":
        pytest.skip("a part that is not contiguous is copied, though a mode alone may have one that is")
    parts = [numbers((2, 3), torch.float32, seed) for seed in range(MODES)]
    for function in (into_the_view, into_the_source):
        assert_as_parts(function, parts, form=form)
