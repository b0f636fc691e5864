"""Conversion back to torch's own layers."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import random
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lightning_bln import (
    BLNGRU,
    BLNLSTM,
    BatchLayerNorm,
    ConvBLN2d,
    Normalization,
    Recurrent,
    recompute_population,
    set_mode,
    to_bln,
    to_torch,
)
from lightning_bln.models import SequenceClassifier
from lightning_bln.recurrence.cell_modules import BLNLSTMCell, RecurrentCell
from tests.convert.test_carried import HOOKS, LAYERS, RECURRENT, REPARAMETRIZED, needs_public_hooks, sample
from tests.convert.test_keep import CELLS, IN_TRAINING, assert_same_step, first, trained
from tests.convert.test_keep import RECURRENT as RECURRENT_OPTIONS

BATCH_NORMS = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm]

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def there_and_back(model: nn.Module, **options: Any) -> Any:
    return to_torch(to_bln(model, norm="keep"), **options)


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    found, expected = one.state_dict(), other.state_dict()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value), key


@pytest.mark.exact
@pytest.mark.parametrize("kind", BATCH_NORMS)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("is_fresh", [True, False])
@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0, None])
@pytest.mark.parametrize("tracks", [True, False])
def test_a_batchnorm_comes_back_as_it_was(kind, affine, is_fresh, momentum, tracks) -> None:
    dtype = random.Random(f"{kind}{affine}{is_fresh}{momentum}{tracks}").choice(DTYPES)
    plain = kind(3, affine=affine, momentum=momentum, track_running_stats=tracks, eps=0.01, dtype=dtype)
    plain = plain if is_fresh else trained(plain)
    back = there_and_back(copy.deepcopy(plain))
    assert type(back) is kind
    assert str(back) == str(plain)
    assert vars(back).keys() == vars(plain).keys()
    assert_same_state(back, plain)
    copy.deepcopy(plain).load_state_dict(back.state_dict())
    if kind is not nn.SyncBatchNorm:
        x = torch.randn(IN_TRAINING[kind][0], dtype=dtype)
        for training in (True, False):
            assert torch.equal(back.train(training)(x), plain.train(training)(x))
        assert_same_state(back, plain)


@pytest.mark.parametrize("kind", IN_TRAINING)
@pytest.mark.parametrize("momentum", [0.1, 0.0])
@pytest.mark.filterwarnings("ignore:the layer has been trained since")
def test_what_was_trained_in_between_comes_back(kind, momentum) -> None:
    plain = trained(kind(3, momentum=momentum, dtype=torch.float64))
    converted = to_bln(copy.deepcopy(plain), norm="keep")
    for _ in range(3):
        x = torch.randn(IN_TRAINING[kind][0], dtype=torch.float64)
        converted(x), plain(x)
    back, report = to_torch(converted, report=True)
    assert not report.incomplete.entries
    assert back.num_batches_tracked == 7, "batches in between are not counted"
    assert plain.num_batches_tracked == 10
    torch.testing.assert_close(back.running_mean, plain.running_mean)
    torch.testing.assert_close(back.running_var, plain.running_var)
    for training in (True, False):
        assert_same_step(back.train(training), plain.train(training), x)


def test_the_attribute_that_stops_tracking_comes_back() -> None:
    plain = trained(nn.BatchNorm1d(3))
    plain.track_running_stats = False
    back = there_and_back(copy.deepcopy(plain))
    assert back.track_running_stats is False
    assert_same_state(back, plain)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}, {"eps": 0.1}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_a_layernorm_comes_back_as_it_was(options, dtype) -> None:
    plain = nn.LayerNorm(4, **options, dtype=dtype)
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    back, x = there_and_back(copy.deepcopy(plain)), torch.randn(3, 4, dtype=dtype)
    assert str(back) == str(plain)
    assert_same_state(back, plain)
    assert torch.equal(back(x), plain(x))


@pytest.mark.parametrize(("kind", "options"), RECURRENT_OPTIONS + CELLS)
def test_a_recurrent_layer_comes_back_as_it_was(kind, options) -> None:
    plain = kind(3, 4, **options)
    back = there_and_back(copy.deepcopy(plain))
    assert type(back) is kind
    assert str(back) == str(plain)
    assert vars(back).keys() == vars(plain).keys()
    assert_same_state(back, plain)
    x = torch.randn((5, 3) if "Cell" in kind.__name__ else (5, 2, 3))
    for training in (True, False):
        assert_same_step(back.train(training), plain.train(training), x)
    again = pickle.loads(pickle.dumps(copy.deepcopy(back)))
    assert torch.equal(first(again(x)), first(plain(x)))
    optimizer = torch.optim.SGD(back.parameters(), lr=1.0)
    optimizer.step()
    assert not torch.equal(first(back(x)), first(plain(x)))


def test_a_state_and_packed_sequences_go_through_what_comes_back() -> None:
    plain = nn.LSTM(3, 4, 2, bidirectional=True)
    back = there_and_back(copy.deepcopy(plain))
    packed = nn.utils.rnn.pack_sequence([torch.randn(4, 3), torch.randn(2, 3)])
    state = torch.randn(4, 2, 4), torch.randn(4, 2, 4)
    torch.testing.assert_close(back(packed, state), plain(packed, state))
    back.flatten_parameters()
    assert [one.shape for one in itertools.chain(*back.all_weights)] == [one.shape for one in back.parameters()]


@pytest.mark.parametrize("name", LAYERS)
def test_parameters_are_the_very_tensors(name) -> None:
    model = nn.Sequential(LAYERS[name]())
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad = index % 2 == 1
    before = dict(model.named_parameters())
    there_and_back(model.eval())
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[key] is value for key, value in before.items())
    assert {module.training for module in model.modules()} == {False}
    assert [one.requires_grad for one in model.parameters()] == [one.requires_grad for one in before.values()]


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_on_no_device_comes_back(name) -> None:
    plain = LAYERS[name](device="meta")
    back = there_and_back(copy.deepcopy(plain))
    found = {key: (value.shape, value.dtype, value.device) for key, value in back.state_dict().items()}
    assert found == {key: (value.shape, value.dtype, value.device) for key, value in plain.state_dict().items()}


@pytest.mark.exact
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "SyncBatchNorm"])
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_run_and_their_handles_remove_them(name, kind) -> None:
    if "load" in kind or "state dict" in kind:
        needs_public_hooks()
    layer, calls = LAYERS[name](), []
    handles = [HOOKS[kind](layer, lambda: calls.append(1))]
    x = sample(layer).requires_grad_()
    converted = to_bln(layer, norm="keep")
    handles.append(HOOKS[kind](converted, lambda: calls.append(1)))
    back = to_torch(converted)
    calls.clear()
    for expected in (2, 0):
        first(back(x)).sum().backward()
        back.load_state_dict(back.state_dict())
        assert len(calls) == expected
        calls.clear()
        for handle in handles:
            handle.remove()


def test_hooks_get_the_layer_that_runs() -> None:
    needs_public_hooks()
    layer, seen = nn.BatchNorm1d(3), []
    layer.register_load_state_dict_pre_hook(lambda module, *_: seen.append(module))
    back = there_and_back(layer)
    back.load_state_dict(back.state_dict())
    assert seen == [back]


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize("kind", REPARAMETRIZED)
def test_parametrizations_of_recurrent_layers_come_back_and_learn(name, kind) -> None:
    layer = RECURRENT[name]()
    weight = next(key for key, _ in layer.named_parameters() if "weight_hh" in key)
    REPARAMETRIZED[kind](layer, weight)
    layer.eval()  # spectral_norm goes on with its iteration whenever it is read in training
    x, before = sample(layer), {key: value.clone() for key, value in layer.state_dict().items()}
    expected = first(layer(x)).detach()
    keys = [key for key, _ in layer.named_parameters()]
    back = there_and_back(layer)
    assert sorted(key for key, _ in back.named_parameters()) == sorted(keys)
    assert back.state_dict().keys() == before.keys()
    assert all(torch.equal(back.state_dict()[key], value) for key, value in before.items())
    torch.testing.assert_close(first(back(x)), expected)
    first(back.train()(x)).sum().backward()
    assert all(one.grad is not None for one in back.parameters())


@pytest.mark.parametrize("kind", ["own", "two", "pruned", "pruned twice"])
@pytest.mark.parametrize("name", ["BatchNorm1d", "BatchNorm2d", "LayerNorm", "LayerNorm without bias"])
def test_parametrizations_of_norms_come_back(name, kind) -> None:
    layer = LAYERS[name]().eval()
    x = sample(layer)
    nn.init.normal_(layer.weight)
    REPARAMETRIZED[kind](layer, "weight")
    keys = layer.state_dict().keys()
    expected = layer(x).detach()
    back = there_and_back(layer)
    assert back.state_dict().keys() == keys
    torch.testing.assert_close(back(x), expected)
    if "pruned" in kind:
        prune.remove(back, "weight")
        torch.testing.assert_close(back(x), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_what_the_user_has_added_comes_back(name) -> None:
    layer: Any = LAYERS[name]()
    layer.tag, layer.gain, layer.part = "mine", nn.Parameter(torch.ones(2)), nn.Linear(1, 1)
    layer.register_buffer("seen", torch.ones(1))
    layer.register_buffer("scratch", torch.ones(1), persistent=False)
    layer.prototype = torch.ones(3)
    keys, names = layer.state_dict().keys(), ("gain", "part", "seen", "scratch", "prototype")
    parts, attributes = [getattr(layer, one) for one in names], vars(layer).keys()
    back, report = there_and_back(layer, report=True)
    assert back.tag == "mine"
    assert all(getattr(back, one) is part for one, part in zip(names, parts, strict=True))
    assert back.state_dict().keys() == keys
    assert not report.incomplete.entries
    assert vars(back).keys() == attributes


def test_shared_layers_and_tied_parameters_come_back() -> None:
    norm, lstm = nn.BatchNorm1d(3), nn.LSTM(3, 3)
    inner = nn.ModuleDict({"norm": norm, "lstm": lstm})
    model = nn.ModuleList([norm, inner, norm, lstm, nn.LSTM(3, 3)])
    model[4].weight_hh_l0 = lstm.weight_hh_l0
    _, report = there_and_back(model, report=True)
    assert model[0] is model[2] is model[1]["norm"]
    assert model[3] is model[1]["lstm"]
    assert model[4].weight_hh_l0 is model[3].weight_hh_l0
    assert [entry.names for entry in report.entries] == [("0", "1.norm", "2"), ("1.lstm", "3"), ("4",)]


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "state dict": lambda model: model.load_state_dict(copy.deepcopy(model.state_dict())) and model,
}


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_of_the_converted_model_comes_back(way) -> None:
    plain = random_model(random.Random(3), 3)
    back = to_torch(COPIES[way](to_bln(copy.deepcopy(plain), norm="keep")))
    assert str(back) == str(plain)
    assert_same_state(back, plain)


def test_a_saved_and_loaded_model_comes_back() -> None:
    file = io.BytesIO()
    torch.save(to_bln(trained(nn.BatchNorm2d(3)), norm="keep"), file)
    file.seek(0)
    assert type(to_torch(torch.load(file, weights_only=False))) is nn.BatchNorm2d


def random_layer(rng: random.Random) -> nn.Module:
    """A layer for ``(5, 4)`` numbers."""
    affine, momentum, tracks = rng.random() < 0.7, rng.choice([0.1, 0.5]), rng.random() < 0.8
    makers = [
        lambda: nn.Linear(4, 4),
        lambda: nn.Tanh(),
        lambda: nn.LayerNorm(4, elementwise_affine=affine),
        lambda: nn.BatchNorm1d(4, affine=affine, momentum=momentum, track_running_stats=tracks),
        lambda: trained(nn.BatchNorm1d(4, affine=affine, momentum=momentum)),
        lambda: nn.GRUCell(4, 4, bias=affine),
        lambda: nn.RNNCell(4, 4, nonlinearity=rng.choice(["tanh", "relu"])),
        lambda: Output(nn.LSTM(4, 8, num_layers=rng.randint(1, 2), proj_size=4)),
        lambda: Output(nn.GRU(4, 2, bidirectional=True, bias=affine)),
    ]
    return rng.choice(makers)()


class Output(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return first(self.layer(x))


def random_model(rng: random.Random, depth: int) -> nn.Module:
    """Nested layers, of which some stand in two places."""
    parts: list[nn.Module] = []
    for _ in range(rng.randint(2, 4)):
        if parts and rng.random() < 0.2:
            parts.append(rng.choice(parts))
        elif depth and rng.random() < 0.5:
            parts.append(random_model(rng, depth - 1))
        else:
            parts.append(random_layer(rng))
    return nn.Sequential(*parts)


@pytest.mark.exact
@pytest.mark.parametrize("seed", range(16))
def test_any_model_is_kept_and_comes_back(seed) -> None:
    plain = random_model(random.Random(seed), 2).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    converted = to_bln(copy.deepcopy(plain), norm="keep")
    assert not any(type(one).__module__.startswith("torch.nn.modules.batchnorm") for one in converted.modules())
    back = to_torch(to_bln(copy.deepcopy(plain), norm="keep"))
    assert str(back) == str(plain)
    assert_same_state(back, plain)
    for training in (False, True, False):
        for other in (converted, back):
            torch.testing.assert_close(other.train(training)(x), copy.deepcopy(plain).train(training)(x))
        plain.train(training)(x)
    assert_same_step(converted.train(), plain.train(), x)
    finally_back = to_torch(converted)
    assert_same_step(finally_back.eval(), plain.eval(), x)
    plain.load_state_dict(finally_back.state_dict())


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_transformer_evaluates_by_its_fused_operator_again(norm_first) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True, norm_first=norm_first)
    plain = nn.TransformerEncoder(layer, 2, nn.LayerNorm(8), enable_nested_tensor=False).eval()
    converted = to_bln(copy.deepcopy(plain), norm="keep")
    back, report = to_torch(copy.deepcopy(converted), report=True)
    assert [one.activation_relu_or_gelu for one in converted.layers] == [0, 0]
    assert [one.activation_relu_or_gelu for one in back.layers] == [2, 2]
    assert [vars(one).keys() for one in back.layers] == [vars(one).keys() for one in plain.layers]
    assert "evaluates by torch's fused operator again" in str(report)
    with torch.no_grad():
        x = torch.randn(2, 5, 8)
        assert torch.equal(back(x), plain(x))


class Doubled(Normalization):
    def forward(self, x, mask=None):
        return 2 * super().forward(x, mask)


class Named(BLNLSTM):
    """A subclass that computes the same."""


def frozen(layer: Any, *shape: int) -> Any:
    recompute_population(layer, [torch.randn(*(shape or (6, 3, 4, 4)))])
    return layer


def in_mode(layer: Any, mode: str) -> Any:
    set_mode(layer, mode)
    return layer


def patched() -> nn.Module:
    layer = Normalization(4, norm="layer", scale=False)
    layer.forward = lambda x: x
    return layer


def made(**options: Any) -> Normalization:
    return Normalization(3, **{"norm": "batch", "scale": False, "channel_dim": 1, "positions": "shared", **options})


STAY = [
    (lambda: BatchLayerNorm(4), "norm='bln'"),
    (lambda: BLNGRU(3, 4, norm="layer").norm_ih_l0, "it has a forward of its own"),
    (lambda: Normalization(4, norm="layer"), "scale=True, a factor of 0.5"),
    (lambda: Normalization(4, norm="layer", scale=2.0), "scale=2.0, a factor of 2"),
    (lambda: Normalization(4, norm="layer", scale=False, channel_dim=1), "norm='layer' over axis 1"),
    (lambda: in_mode(Normalization(4, norm="layer", scale=False), "pppp"), "mode='pppp' takes feature statistics"),
    (lambda: in_mode(Normalization(4, norm="layer", scale=False), "ppcp"), "mode='ppcp' takes feature statistics"),
    (lambda: Normalization(3, norm="batch", scale=False), "batch_dim=0 and channel_dim=-1"),
    (lambda: made(batch_dim=1, channel_dim=-1), "batch_dim=1 and channel_dim=-1"),
    (lambda: made(positions="separate"), "positions='separate'"),
    (lambda: in_mode(frozen(made()), "pccc"), "mode='pccc' takes mean and variance from different places"),
    (lambda: in_mode(frozen(made()), "cccc"), "evaluates by the batch though there is a population"),
    (lambda: made(), "no population is frozen"),
    (lambda: frozen(made()), "pass batch_norm=nn.BatchNorm2d, say"),
    (lambda: to_bln(nn.BatchNorm1d(3), norm="batch"), "no population is frozen"),
    (lambda: to_bln(nn.BatchNorm1d(3)), "norm='bln'"),
    (lambda: to_bln(nn.BatchNorm1d(3), norm="layer"), "norm='layer' over axis 1"),
    (lambda: BLNLSTM(3, 4), "norm='bln', but torch's recurrent layers"),
    (lambda: BLNGRU(3, 4, norm="layer"), "norm='layer', but torch's recurrent layers"),
    (lambda: BLNGRU(3, 4, norm=None, zoneout=0.1), "zoneout=0.1, which torch does not have"),
    (
        lambda: BLNGRU(3, 4, norm=None, input_dropout=0.1, recurrent_dropout=0.2),
        "input_dropout=0.1, recurrent_dropout=0.2",
    ),
    (lambda: Recurrent("mgu", 3, 4, norm=None), "cell MGU"),
    (lambda: RecurrentCell("ran", 3, 4, norm=None), "cell RAN"),
    (lambda: BLNLSTMCell(3, 4), "norm='bln', but torch's recurrent layers"),
    (lambda: Doubled(4, norm="layer", scale=False), "it has a forward of its own"),
    (patched, "it has a forward of its own"),
]


@pytest.mark.parametrize(("make", "reason"), STAY)
def test_what_torch_does_not_have_stays_and_is_named(make, reason, caplog) -> None:
    layer = make()
    model, report = to_torch(nn.Sequential(nn.Linear(3, 3), layer), report=True)
    assert model[1] is layer
    (entry,) = report.left_alone
    assert entry.names == ("1",)
    assert reason in entry.notes[0]
    assert reason in caplog.text
    assert "to_torch left alone or lost" in caplog.text
    assert to_torch(layer) is layer


def test_layers_whose_parent_calls_them_as_ours_stay() -> None:
    model = nn.Sequential(SequenceClassifier(3, 2, 4, norm=None), ConvBLN2d(3, 3, 3))
    _, report = to_torch(model, report=True)
    assert [entry.became for entry in report.entries] == [None, None]
    assert "RecurrentNetwork calls it as no layer of torch can be called" in str(report)


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
def test_a_layer_that_was_made_here_becomes_the_class_that_is_given(kind) -> None:
    shape = IN_TRAINING[kind][-1]
    layer = made(momentum=0.2)
    for _ in range(2):
        layer(torch.randn(shape))
    x, before = torch.randn(shape), copy.deepcopy(layer)
    back, report = to_torch(layer, batch_norm=kind, report=True)
    assert type(back) is kind
    assert (back.momentum, back.eps, back.num_batches_tracked) == (0.2, 1e-3, 0)
    assert not report.incomplete.entries
    assert_same_step(back.eval(), before.eval(), x, atol=1e-5, rtol=1e-4)
    assert_same_step(back.train(), before.train(), x, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(back.running_var, before.population.batch_var[0])


def test_a_population_that_follows_no_batches_becomes_statistics_that_follow_none() -> None:
    back, report = to_torch(frozen(made()), batch_norm=nn.BatchNorm2d, report=True)
    mean = back.running_mean.clone()
    back.train()(torch.randn(6, 3, 4, 4))
    assert torch.equal(back.running_mean, mean)
    assert "momentum 0, since its population does not follow batches" in str(report)


def test_what_is_lost_is_said() -> None:
    layer = frozen(made(population="paper"))
    layer.train()(torch.randn(6, 3, 4, 4))
    _, report = to_torch(layer, batch_norm=nn.BatchNorm2d, report=True)
    assert "population='paper'" in str(report.incomplete)
    plain = trained(nn.BatchNorm1d(3, momentum=None))
    converted = to_bln(plain, norm="keep")
    converted(torch.randn(5, 3))
    back, report = to_torch(converted, report=True)
    assert back.momentum is None
    assert "older than its weights" in str(report.incomplete)
    _, report = to_torch(Named(3, 4, norm=None), report=True)
    assert report.entries[0].lost == ("methods that Named adds",)


@pytest.mark.parametrize("name", ["weight", "bias", "num_batches_tracked"])
def test_a_batchnorm_that_lacks_a_tensor_comes_back_without(name) -> None:
    plain = trained(nn.BatchNorm1d(3))
    setattr(plain, name, None)
    back, x = there_and_back(copy.deepcopy(plain)), torch.randn(5, 3)
    assert_same_state(back, plain)
    assert torch.equal(back(x), plain(x))
    assert torch.equal(back.eval()(x), plain.eval()(x))


def test_a_batchnorm_whose_statistics_were_taken_away_comes_back_without() -> None:
    plain = nn.BatchNorm1d(3)
    plain.running_mean = plain.running_var = None
    back, x = there_and_back(copy.deepcopy(plain)).eval(), torch.randn(5, 3)
    assert vars(back).keys() == vars(plain).keys()
    assert_same_state(back, plain)
    assert torch.equal(back(x), plain.eval()(x))


def test_statistics_that_came_in_between_are_running_statistics() -> None:
    converted = to_bln(nn.BatchNorm1d(3, track_running_stats=False), norm="keep")
    frozen(converted, 6, 3)
    x, expected = torch.randn(5, 3), converted.population.batch_mean[0]
    back = to_torch(in_mode(copy.deepcopy(converted), "ppcc"))
    assert (back.track_running_stats, back.momentum, back.num_batches_tracked) == (True, 0.0, 0)
    back(x)
    assert torch.equal(back.running_mean, expected)
    back, plain = to_torch(converted).eval(), nn.BatchNorm1d(3, track_running_stats=False).eval()
    assert str(back) == str(plain)
    assert torch.equal(back(x), plain(x))


def test_statistics_over_all_ranks_become_a_syncbatchnorm() -> None:
    layer = frozen(made(sync_batch_stats=True))
    back = to_torch(layer)
    assert type(back) is nn.SyncBatchNorm
    converted = to_bln(nn.BatchNorm2d(3), norm="keep")
    converted.sync_batch_stats = True
    assert type(to_torch(converted)) is nn.SyncBatchNorm
    converted = to_bln(nn.SyncBatchNorm(3), norm="keep")
    converted.sync_batch_stats = False
    assert to_torch(converted) is converted
    assert type(to_torch(converted, batch_norm=nn.BatchNorm2d)) is nn.BatchNorm2d


def test_settings_that_were_changed_in_between_count() -> None:
    converted = to_bln(nn.BatchNorm1d(3, momentum=0.1), norm="keep")
    converted.eps, converted.population.momentum = 0.5, 0.7
    back = to_torch(converted)
    assert (back.eps, back.momentum) == (0.5, 0.7)
    converted = to_bln(nn.BatchNorm1d(3, momentum=0.1), norm="keep")
    converted.population.momentum = None
    assert to_torch(converted).momentum == 0.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_dtype_that_was_changed_in_between_counts(dtype) -> None:
    back = to_torch(to_bln(nn.Sequential(nn.BatchNorm1d(3), nn.LayerNorm(3), nn.GRU(3, 3)), norm="keep").to(dtype))
    assert {one.dtype for one in back.state_dict().values() if one.is_floating_point()} == {dtype}
    first(back(torch.randn(5, 3, dtype=dtype)))


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_what_other_norms_made_comes_back_where_it_computes_the_same(norm) -> None:
    plain = nn.LayerNorm(3) if norm == "layer" else trained(nn.BatchNorm1d(3))
    back = to_torch(to_bln(copy.deepcopy(plain), norm=norm))
    assert_same_state(back, plain)


def test_the_class_for_cells_by_name() -> None:
    model = nn.ModuleList([Recurrent("lstm", 3, 4, norm=None), RecurrentCell("rnn", 3, 4, norm=None)])
    model.append(Recurrent("rnn", 3, 4, norm=None, nonlinearity="relu", backend="reference", recompute=True))
    x = torch.randn(5, 2, 3)
    expected = first(model[2](x))
    to_torch(model)
    assert [type(one) for one in model] == [nn.LSTM, nn.RNNCell, nn.RNN]
    torch.testing.assert_close(first(model[2](x)), expected)


@pytest.mark.parametrize("given", [nn.SyncBatchNorm, nn.LayerNorm, 2, "BatchNorm2d", nn.BatchNorm2d(3)])
def test_a_class_that_is_no_batchnorm_is_refused(given) -> None:
    model = nn.Sequential(BLNGRU(3, 3, norm=None))
    with pytest.raises(ValueError, match=r"batch_norm=.*must be one of None, nn.BatchNorm1d"):
        to_torch(model, batch_norm=given)
    assert isinstance(model[0], BLNGRU)


def test_parts_wrapped_for_ddp_are_refused(tmp_path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        model = nn.Sequential(BLNGRU(3, 3, norm=None), to_bln(nn.BatchNorm1d(3), norm="keep"))
        wrapped = nn.parallel.DistributedDataParallel(model)
        with pytest.raises(ValueError, match="convert the module inside before you wrap it"):
            to_torch(wrapped)
        assert isinstance(model[0], BLNGRU)
    finally:
        torch.distributed.destroy_process_group()


def test_a_model_of_torch_stays_as_it_is(caplog) -> None:
    model, report = to_torch(nn.Sequential(nn.BatchNorm1d(3), nn.GroupNorm(1, 3), nn.LSTM(3, 3)), report=True)
    assert str(report) == "nothing to convert"
    assert [type(one) for one in model] == [nn.BatchNorm1d, nn.GroupNorm, nn.LSTM]
    assert not caplog.text


def test_the_random_generator_is_left_alone() -> None:
    model = to_bln(nn.Sequential(nn.LSTM(3, 3), nn.BatchNorm1d(3)), norm="keep")
    state = torch.get_rng_state()
    to_torch(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_converted_in_inference_mode_can_be_trained() -> None:
    model = to_bln(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.LSTM(3, 3)), norm="keep")
    with torch.inference_mode():
        to_torch(model)
    first(model(torch.randn(5, 3))).sum().backward()
