"""Recurrent layers and cells without norm on the samples by which torch tests its own, and on what torch refuses."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_map

from lightning_bln import BLNGRU, BLNLSTM, BLNRNN
from lightning_bln.cells import BLNGRUCell, BLNLSTMCell, BLNRNNCell

internal = pytest.importorskip(
    "tests.torch_samples", reason="torch's samples need torch.testing._internal and expecttest", exc_type=ImportError
)

PAIRS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LSTM: BLNLSTM,
    nn.GRU: BLNGRU,
    nn.RNN: BLNRNN,
    nn.LSTMCell: BLNLSTMCell,
    nn.GRUCell: BLNGRUCell,
    nn.RNNCell: BLNRNNCell,
}
LAYERS = (nn.LSTM, nn.GRU, nn.RNN)
CELLS = (nn.LSTMCell, nn.GRUCell, nn.RNNCell)
INFOS = {info.module_cls: info for info in internal.module_db if info.module_cls in PAIRS}
DTYPES = (torch.float32, torch.float64)
REFUSALS = (ValueError, TypeError, RuntimeError)


def samples(kind: type, dtype: torch.dtype, *, requires_grad: bool = False, training: bool = True) -> list[Any]:
    """What torch constructs a module with and calls it on."""
    make = INFOS[kind].module_inputs_func
    return list(make(INFOS[kind], device="cpu", dtype=dtype, requires_grad=requires_grad, training=training))


def errors(kind: type, dtype: torch.dtype) -> list[Any]:
    """What torch refuses."""
    make = INFOS[kind].module_error_inputs_func
    found = make(INFOS[kind], device="cpu", dtype=dtype, requires_grad=False, training=True) if make else []
    return list(found)


def each(
    find: Callable[[type, torch.dtype], list[Any]],
    kinds: Collection[type] = PAIRS,
    wanted: Callable[[Any], bool] = lambda sample: True,
) -> pytest.MarkDecorator:
    """A test for each wanted sample, by the class of torch and the sample's number."""
    found = {kind: enumerate(find(kind, torch.float64)) for kind in kinds}
    pairs = [(kind, index) for kind, several in found.items() for index, sample in several if wanted(sample)]
    ids = [f"{kind.__name__}-{index}" for kind, index in pairs]
    return pytest.mark.parametrize(("kind", "index"), pairs, ids=ids)


each_sample, each_error = each(samples), each(errors)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
in_both_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def is_another(sample: Any) -> bool:
    """Whether a sample differs from that without ``batch_first``, which an unbatched input does not see."""
    return not sample.constructor_input.kwargs.get("batch_first") or sample.forward_input.args[0].ndim > 2


each_derivative = pytest.mark.parametrize("check", [gradcheck, gradgradcheck], ids=["first", "second"])


def modules(kind: type, sample: Any, dtype: torch.dtype, training: bool = True, **ours: Any) -> tuple[Any, Any]:
    """Ours and torch's, with the same parameters."""
    args, kwargs = sample.constructor_input.args, {"dtype": dtype, **sample.constructor_input.kwargs}
    theirs: Any = kind(*args, **kwargs)
    own: Any = PAIRS[kind](*args, **kwargs, norm=None, **ours)
    own.load_state_dict(theirs.state_dict())
    return own.train(training), theirs.train(training)


def call(module: nn.Module, sample: Any) -> Any:
    return module(*sample.forward_input.args, **sample.forward_input.kwargs)


def leaves(*trees: Any) -> list[Tensor]:
    """The tensors of nested containers."""
    return [leaf for leaf in tree_flatten(trees)[0] if isinstance(leaf, Tensor)]


def inputs_of(sample: Any) -> list[Tensor]:
    return leaves(sample.forward_input.args, sample.forward_input.kwargs)


def backward(module: nn.Module, sample: Any, convert: Callable[[Tensor], Tensor] = lambda g: g) -> list[Tensor]:
    """Outputs, and gradients of the inputs that need one and of the parameters, for converted gradients of outputs."""
    outputs = leaves(call(module, sample))
    wanted = [x for x in inputs_of(sample) if x.requires_grad] + list(module.parameters())
    weights = [convert(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)) for y in outputs]
    return [*outputs, *torch.autograd.grad(outputs, wanted, weights)]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@each_sample
@each_dtype
@in_both_modes
@pytest.mark.parametrize("requires_grad", [True, False], ids=["grad", "fixed"])
def test_outputs_and_gradients_are_torchs(kind, index, dtype, training, requires_grad) -> None:
    sample = samples(kind, dtype, requires_grad=requires_grad, training=training)[index]
    ours, theirs = modules(kind, sample, dtype, training)
    assert_equal(backward(ours, sample), backward(theirs, sample))


@each_sample
@each_dtype
def test_outputs_are_those_of_torchs_reference(kind, index, dtype) -> None:
    sample = samples(kind, dtype)[index]
    if sample.reference_fn is None:
        pytest.skip("torch has no reference for this sample")
    ours, _ = modules(kind, sample, dtype)
    args, kwargs = sample.forward_input.args, sample.forward_input.kwargs
    expected = sample.reference_fn(ours, *args, **kwargs)
    assert_equal(leaves(call(ours, sample)), leaves(expected))


@each_sample
@each_dtype
@in_both_modes
def test_a_pickled_module_gives_the_same(kind, index, dtype, training) -> None:
    sample = samples(kind, dtype, training=training)[index]
    ours, _ = modules(kind, sample, dtype, training)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert type(again) is PAIRS[kind]
    assert_equal(leaves(call(again, sample)), leaves(call(ours, sample)))


@each_sample
@each_dtype
@in_both_modes
def test_inputs_parameters_and_gradients_need_not_be_contiguous(kind, index, dtype, training) -> None:
    sample = samples(kind, dtype, requires_grad=True, training=training)[index]
    ours, _ = modules(kind, sample, dtype, training)
    expected = backward(ours, sample)

    def spread(value: Any) -> Any:
        return internal.noncontiguous_like(value) if isinstance(value, Tensor) else value

    given = sample.forward_input
    for inputs_too in (False, True):
        if inputs_too:
            given.args, given.kwargs = tree_map(spread, given.args), tree_map(spread, given.kwargs)
        assert_equal(backward(ours, sample, spread), expected)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.data = spread(parameter.detach())
    assert_equal(backward(ours, sample, spread), expected)


@each_sample
@each_dtype
def test_device_and_dtype_are_those_asked_for(kind, index, dtype) -> None:
    sample = samples(kind, dtype)[index]
    args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
    for device in ("cpu", "meta"):
        own = PAIRS[kind](*args, **kwargs, norm=None, device=device, dtype=dtype)
        other = kind(*args, **kwargs, device=device, dtype=dtype)
        for (name, one), (other_name, two) in zip(own.named_parameters(), other.named_parameters(), strict=True):
            assert (name, one.shape, one.device, one.dtype) == (other_name, two.shape, two.device, two.dtype)
        if device == "cpu":
            assert all(y.dtype == dtype for y in leaves(call(own, sample)))


def as_function(module: nn.Module, sample: Any) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """A module as a function of its inputs and parameters, and these."""
    names, inputs = [name for name, _ in module.named_parameters()], inputs_of(sample)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        rest = iter(tensors[: len(inputs)])
        args = tree_map(lambda leaf: next(rest) if isinstance(leaf, Tensor) else leaf, sample.forward_input.args)
        return tuple(leaves(functional_call(module, dict(zip(names, tensors[len(inputs) :], strict=True)), args)))

    return function, [*inputs, *module.parameters()]


def assert_differentiable(kind: type, index: int, check: Callable[..., bool], **options: Any) -> None:
    """Derivatives are those of finite differences; one mode suffices without dropout, and samples change it."""
    training = index % 4 < 2
    sample = samples(kind, torch.float64, requires_grad=True, training=training)[index]
    function, inputs = as_function(modules(kind, sample, torch.float64, training, **options)[0], sample)
    assert check(function, inputs, fast_mode=True, check_undefined_grad=check is gradcheck)


@each(samples, LAYERS, is_another)
@each_derivative
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_derivatives_of_a_layer_are_those_of_differences(kind, index, check, backend) -> None:
    assert_differentiable(kind, index, check, backend=backend)


@each(samples, CELLS)
@each_derivative
def test_derivatives_of_a_cell_are_those_of_differences(kind, index, check) -> None:
    assert_differentiable(kind, index, check)


NAMES = {
    "input_size": "input_size=",
    "input has": "input_size=",
    "hidden": "hx",
    "hx": "hx",
    "input dtype": "x has dtype",
}
"""Words of torch's messages about inputs, and the name that ours gives."""


def named_by(error: Any) -> str:
    """How a message names the argument of which torch's speaks."""
    if any(isinstance(value, str) for value in error.module_error_input.constructor_input.args[2:]):
        return "bias="  # torch's samples pass cells a nonlinearity in its place, which torch takes
    if error.error_on is internal.ModuleErrorEnum.CONSTRUCTION_ERROR:
        return f"{error.error_regex.split()[0]}="
    return next(ours for theirs, ours in NAMES.items() if theirs in error.error_regex)


@each_error
@each_dtype
def test_an_error_of_torchs_is_one_of_ours(kind, index, dtype) -> None:
    error = errors(kind, dtype)[index]
    given = error.module_error_input.constructor_input
    with pytest.raises(REFUSALS) as caught:
        call(PAIRS[kind](*given.args, **{"dtype": dtype, **given.kwargs}, norm=None), error.module_error_input)
    assert named_by(error) in str(caught.value)


def skip_unless_torch_refuses(use: Callable[[], object]) -> None:
    """Skip where the installed torch takes what later versions refuse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            use()
        except (*REFUSALS, AttributeError, IndexError):
            return
    pytest.skip(f"torch {torch.__version__} takes it")


CONSTRUCTED = [
    *((kinds, {"hidden_size": size}) for kinds in (LAYERS, CELLS) for size in (4.0, "4", -1, None)),
    *((LAYERS, {"input_size": size}) for size in (3.0, "3", 0, torch.tensor(3.0))),
    *((LAYERS, {"num_layers": number}) for number in (2.0, "2", 0, -1, None)),
    *((LAYERS, {"bias": flag}) for flag in (1, 0, "True", None)),
    *((LAYERS, {"batch_first": flag}) for flag in (1, "False", None)),
    *((LAYERS, {"dropout": value}) for value in ("0.1", True, -0.1, 1.1, float("nan"), None, torch.tensor(0.1))),
    *(((nn.LSTM,), {"proj_size": size}) for size in (-1, 4, 5, 2.0, "2", None)),
    ((nn.RNN,), {"nonlinearity": "sigmoid"}),
]
"""Arguments that torch's constructors refuse."""


@pytest.mark.parametrize(
    ("kind", "options"),
    [(kind, options) for kinds, options in CONSTRUCTED for kind in kinds],
    ids=lambda value: value.__name__ if isinstance(value, type) else repr(value),
)
def test_an_argument_that_torch_refuses_is_named(kind, options) -> None:
    sizes = {"input_size": 3, "hidden_size": 4, **options}
    skip_unless_torch_refuses(lambda: kind(**sizes))
    with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
        PAIRS[kind](**sizes, norm=None)
    assert f"{next(iter(options))}=" in str(caught.value)
    assert "; pass" in str(caught.value) or "must be" in str(caught.value)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


CALLED = [
    *((LAYERS, zeros(*shape), None, "x has") for shape in ((3,), (2, 2, 5, 3))),
    *((LAYERS, zeros(*shape), None, "input_size=3") for shape in ((5, 2, 4), (5, 4), (3, 5))),
    (LAYERS, zeros(5, 2, 3, dtype=torch.float64), None, "dtype"),
    (LAYERS, zeros(5, 2, 3), zeros(1, 4), "hx: h has shape (1, 4)"),
    (LAYERS, zeros(5, 2, 3), zeros(4), "hx: h has shape (4,)"),
    (LAYERS, zeros(5, 3), zeros(1, 1, 4), "hx: h has shape (1, 1, 4)"),
    (LAYERS, zeros(5, 3), zeros(4), "hx: h has shape (4,)"),
    *((LAYERS, zeros(5, 2, 3), zeros(*shape), "hx: h has") for shape in ((2, 2, 4), (1, 3, 4), (1, 2, 5), (1, 1, 4))),
    (LAYERS, zeros(5, 2, 3), zeros(1, 2, 4, dtype=torch.float64), "hx: h has dtype"),
    *((CELLS, zeros(*shape), None, "x has") for shape in ((2, 5, 3), (1, 2, 5, 3))),
    *((CELLS, zeros(*shape), None, "input_size=3") for shape in ((2, 4), (4,))),
    (CELLS, zeros(2, 3, dtype=torch.float64), None, "dtype"),
    *((CELLS, zeros(2, 3), zeros(*shape), "hx has") for shape in ((3, 4), (2, 5), (1, 2, 4))),
    (CELLS, zeros(3), zeros(1, 1, 4), "hx has shapes [(1, 1, 4)"),
    (CELLS, zeros(2, 3), zeros(2, 4, dtype=torch.float64), "hx: h has dtype"),
    ((*LAYERS, *CELLS), [[0.0] * 3], None, "x is a list, but a tensor is needed"),
    *(
        ((kind,), x, 3, "hx=3, but tensors are needed: h; pass")
        for kind, x in ((nn.GRU, zeros(5, 2, 3)), (nn.RNNCell, zeros(2, 3)))
    ),
    *((kinds, x, [0.0], "hx: h is a") for kinds, x in ((LAYERS, zeros(5, 2, 3)), (CELLS, zeros(2, 3)))),
    (LAYERS, zeros(5, 2, 3), zeros(1, 2, 4).to("meta"), "hx: h is on meta, but the input is on cpu"),
]


@pytest.mark.parametrize(
    ("kind", "x", "state", "words"),
    [(kind, *rest) for kinds, *rest in CALLED for kind in kinds],
    ids=lambda value: value.__name__ if isinstance(value, type) else str(tuple(getattr(value, "shape", (value,)))),
)
def test_an_input_or_state_that_torch_refuses_is_named(kind, x, state, words) -> None:
    hx = (state, state) if state is not None and kind in (nn.LSTM, nn.LSTMCell) else state
    skip_unless_torch_refuses(lambda: kind(3, 4)(x, hx))
    with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
        PAIRS[kind](3, 4, norm=None)(x, hx)
    assert words in str(caught.value)


@pytest.mark.parametrize("kind", PAIRS, ids=lambda kind: kind.__name__)
def test_another_number_of_states_is_named(kind) -> None:
    x, shape = (zeros(2, 3), (2, 4)) if kind in CELLS else (zeros(5, 2, 3), (1, 2, 4))
    states = (zeros(*shape),) if kind in (nn.LSTM, nn.LSTMCell) else (zeros(*shape), zeros(*shape))
    skip_unless_torch_refuses(lambda: kind(3, 4)(x, states))
    with pytest.raises((TypeError, ValueError), match="hx has"):
        PAIRS[kind](3, 4, norm=None)(x, states)
