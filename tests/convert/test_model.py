"""Conversion of plain torch modules to normalised ones."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from lightning_bln import BLNLSTM, Normalization, from_torch, recompute_population, set_mode, to_bln


@pytest.mark.parametrize(
    "layer",
    [
        nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True, proj_size=2),
        nn.GRU(3, 4, bias=False),
        nn.RNN(3, 4, nonlinearity="relu"),
    ],
)
def test_without_norm_a_converted_layer_computes_the_same(layer) -> None:
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(from_torch(layer, norm=None)(x), layer(x))


def test_with_norm_it_has_the_same_weights() -> None:
    layer = nn.LSTM(3, 4)
    converted = from_torch(layer, zoneout=0.1)
    assert isinstance(converted, BLNLSTM)
    assert converted.zoneout == 0.1
    for name, parameter in layer.named_parameters():
        assert torch.equal(getattr(converted, name), parameter)


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_converted_norms_keep_weights_and_compute_the_same(norm) -> None:
    plain = nn.LayerNorm(6) if norm == "layer" else nn.BatchNorm2d(6)
    nn.init.normal_(plain.weight)
    nn.init.normal_(plain.bias)
    x = torch.randn(4, 5, 6) if norm == "layer" else torch.randn(4, 6, 5, 5)
    torch.testing.assert_close(to_bln(plain, norm=norm)(x), plain(x))


def test_a_whole_model_converts_trains_and_evaluates() -> None:
    model = nn.Sequential(
        nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Sequential(nn.ReLU(), nn.LayerNorm(8)), nn.Linear(8, 2)
    )
    assert to_bln(model) is model
    assert [type(m) for m in model.modules() if isinstance(m, Normalization)] == [Normalization] * 2
    recompute_population(model, [torch.randn(7, 3)])
    set_mode(model, "pppp")
    assert model.eval()(torch.randn(1, 3)).isfinite().all()


def test_what_cannot_convert_is_named_and_nothing_changes() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.LayerNorm((4, 4)))
    with pytest.raises(ValueError, match="1 is a LayerNorm over"):
        to_bln(model)
    assert isinstance(model[0], nn.BatchNorm1d)
    with pytest.raises(ValueError, match="layer=Linear, but only"):
        from_torch(nn.Linear(2, 2))


CHANNELS = {nn.BatchNorm1d: (6, 3), nn.BatchNorm2d: (6, 3, 4, 4), nn.BatchNorm3d: (6, 3, 2, 2, 2)}


@pytest.mark.parametrize("kind", CHANNELS)
@pytest.mark.parametrize("momentum", [0.1, 0.9, 1.0, 0.0])
def test_running_statistics_become_the_population_and_go_on(kind, momentum) -> None:
    plain = kind(3, momentum=momentum)
    plain.running_mean.normal_()
    plain.running_var.uniform_(0.5, 2)
    converted, shape = to_bln(copy.deepcopy(plain), norm="batch"), CHANNELS[kind]
    for step in range(4):
        x = torch.randn(shape) * (step + 1) + step
        torch.testing.assert_close(converted.eval()(x), plain.eval()(x))
        torch.testing.assert_close(converted.train()(x), plain.train()(x))
        torch.testing.assert_close(converted.population.batch_mean[0], plain.running_mean)
        torch.testing.assert_close(converted.population.batch_var[0], plain.running_var)


def test_statistics_that_come_from_no_data_are_no_population() -> None:
    assert not to_bln(nn.BatchNorm1d(3), norm="batch").population.is_frozen
    assert not to_bln(nn.BatchNorm1d(3, device="meta"), norm="batch").population.is_frozen


@pytest.mark.parametrize("norm", ["bln", "layer", "batch"])
def test_a_report_says_what_became_of_running_statistics(norm) -> None:
    plain = nn.BatchNorm1d(3, momentum=None)
    plain(torch.randn(5, 3))
    converted, report = to_bln(plain, norm=norm, report=True)
    said = {"bln": ["recompute_population"], "layer": [], "batch": ["are its population", "momentum=None"]}
    assert all(part in str(report) for part in said[norm])
    assert bool(report.incomplete.entries) == bool(said[norm])
    assert converted.population.is_frozen == (norm == "batch")


@pytest.mark.parametrize("norm", ["bln", "batch"])
def test_a_batchnorm_without_running_statistics_evaluates_by_the_batch(norm) -> None:
    plain = nn.BatchNorm1d(3, track_running_stats=False).eval()
    converted = to_bln(plain, norm=norm)
    assert converted.mode == "cccc"
    if norm == "batch":
        x = torch.randn(5, 3)
        torch.testing.assert_close(converted(x), plain(x))


def test_sync_batchnorm_takes_statistics_over_all_ranks() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm1d(3)))
    converted = to_bln(model)
    assert [layer.sync_batch_stats for layer in converted] == [True, True]
    assert not to_bln(nn.BatchNorm2d(3)).sync_batch_stats
    assert converted[0](torch.randn(2, 3, 4, 4)).shape == (2, 3, 4, 4)


@pytest.mark.parametrize("norm", ["bln", "layer", "batch"])
def test_single_steps_convert_with_the_options_they_know(norm) -> None:
    model = nn.ModuleList([nn.LSTMCell(3, 4), nn.GRUCell(3, 4, bias=False), nn.RNNCell(3, 4, nonlinearity="relu")])
    expected = [one(torch.randn(5, 3)) for one in model]
    _, report = to_bln(model, norm=norm, zoneout=0.1, eps=1e-4, report=True)
    assert [type(one).__name__ for one in model] == ["BLNLSTMCell", "BLNGRUCell", "BLNRNNCell"]
    assert [one.norm for one in model] == [norm] * 3
    assert all(entry.notes == ("a single step takes no zoneout",) for entry in report.entries)
    for one, before in zip(model, expected, strict=True):
        found = one(torch.randn(5, 3))
        assert [part.shape for part in found] == [part.shape for part in before]
    with pytest.raises(ValueError, match="zoneut"):
        to_bln(nn.LSTMCell(3, 4), zoneut=0.1)


@pytest.mark.parametrize(
    "cell", [nn.LSTMCell(3, 4), nn.GRUCell(3, 4, bias=False), nn.RNNCell(3, 4, nonlinearity="relu")]
)
def test_without_norm_a_converted_cell_computes_the_same(cell) -> None:
    x = torch.randn(5, 3)
    torch.testing.assert_close(from_torch(cell, norm=None)(x), cell(x))


def test_shared_layers_stay_shared() -> None:
    norm, lstm = nn.BatchNorm1d(3), nn.LSTM(3, 3)
    inner = nn.ModuleDict({"norm": norm, "lstm": lstm})
    model = nn.ModuleList([norm, inner, norm, inner, lstm])
    _, report = to_bln(model, report=True)
    assert model[0] is model[2] is model[1]["norm"]
    assert model[4] is model[1]["lstm"]
    assert model[1] is model[3] is inner
    assert isinstance(model[0], Normalization)
    assert [entry.names for entry in report.entries] == [("0", "1.norm", "2"), ("1.lstm", "4")]
    assert "0 = 1.norm = 2: BatchNorm1d -> Normalization" in str(report)


def test_tied_parameters_stay_tied_and_an_optimizer_goes_on() -> None:
    model = nn.ModuleList([nn.LSTM(3, 3), nn.LSTM(3, 3), nn.LayerNorm(3), nn.LayerNorm(3)])
    model[1].weight_hh_l0, model[3].weight = model[0].weight_hh_l0, model[2].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    to_bln(model)
    assert model[1].weight_hh_l0 is model[0].weight_hh_l0
    assert model[3].weight is model[2].weight
    assert {*before} <= {*model.parameters()}


def test_modules_that_hold_one_another_end() -> None:
    model = nn.Module()
    model.child = nn.Sequential(nn.BatchNorm1d(3))
    model.child.add_module("parent", model)
    to_bln(model)
    assert isinstance(model.child[0], Normalization)


class ChannelsFirst(nn.LayerNorm):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class Activated(nn.BatchNorm2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).relu()


class Reversed(nn.LSTM):
    def forward(self, input, hx=None):
        return super().forward(input.flip(0), hx)


class Named(nn.BatchNorm2d):
    """A subclass that computes the same."""

    def name(self) -> str:
        return "mine"


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.BatchNorm1d(4))


def patched() -> nn.Module:
    layer = nn.LayerNorm(4)
    layer.forward = lambda x: x
    return layer


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (ChannelsFirst(4), "LayerNorm with a forward of its own"),
        (ChannelsFirst((4, 4)), "LayerNorm with a forward of its own"),
        (Activated(4), "BatchNorm2d with a forward of its own"),
        (Reversed(4, 4), "LSTM with a forward of its own"),
        (patched(), "LayerNorm with a forward of its own"),
        (nn.GroupNorm(2, 4), "it has no counterpart"),
        (nn.InstanceNorm1d(4), "it has no counterpart"),
        (nn.LazyInstanceNorm1d(), "it has no counterpart"),
        (nn.LocalResponseNorm(2), "it has no counterpart"),
        (scripted(), "it has no counterpart"),
    ],
    ids=lambda one: type(one).__name__ if isinstance(one, nn.Module) else "",
)
def test_what_stays_is_named_with_the_reason(layer, reason, caplog) -> None:
    model, report = to_bln(nn.Sequential(nn.Linear(4, 4), layer), report=True)
    assert model[1] is layer
    assert [(entry.names, entry.became, entry.notes) for entry in report.left_alone] == [(("1",), None, (reason,))]
    assert reason in caplog.text


def test_a_subclass_that_computes_the_same_converts() -> None:
    model, report = to_bln(nn.Sequential(Named(4)), report=True)
    assert isinstance(model[0], Normalization)
    assert report.entries[0].lost == ("methods that Named adds to BatchNorm2d",)


def test_a_model_with_nothing_to_convert_says_so(caplog) -> None:
    model, report = to_bln(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), report=True)
    assert (len(model), str(report)) == (2, "nothing to convert")
    assert not caplog.text


def test_many_layers_of_a_kind_are_one_line() -> None:
    _, report = to_bln(nn.Sequential(*(nn.BatchNorm1d(3) for _ in range(9))), report=True)
    assert str(report) == "0, 1, ... 6 more ..., 8: BatchNorm1d -> Normalization"
    assert len(report.converted) == 9


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    "layer", [nn.LazyBatchNorm1d(), nn.LazyBatchNorm2d(), nn.LazyBatchNorm3d(affine=False), nn.LayerNorm((4, 4))]
)
def test_a_layer_that_cannot_convert_is_named_and_nothing_changes_anywhere(layer, nested) -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Sequential(layer) if nested else layer, nn.LSTM(4, 4))
    with pytest.raises(ValueError, match=rf"1{'.0' if nested else ''} is a {type(layer).__name__}"):
        to_bln(model)
    assert isinstance(model[0], nn.BatchNorm1d)
    assert isinstance(model[2], nn.LSTM)


def test_a_lazy_layer_converts_once_it_has_a_size() -> None:
    model = nn.Sequential(nn.LazyBatchNorm1d(), nn.LazyLinear(2))
    model[0](torch.randn(5, 3))
    assert to_bln(model)[0].num_features == 3


def test_an_option_that_does_not_exist_changes_nothing() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.LSTM(4, 4))
    with pytest.raises(ValueError, match="zoneut"):
        to_bln(model, zoneut=0.1)
    assert isinstance(model[0], nn.BatchNorm1d)


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_transformer_evaluates_by_its_converted_norms(norm_first) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
    model, report = to_bln(nn.TransformerEncoder(layer, 2, nn.LayerNorm(8), enable_nested_tensor=False), report=True)
    model.eval()
    calls = []
    for module in model.modules():
        if isinstance(module, Normalization):
            module.forward = lambda x, forward=module.forward: calls.append(1) or forward(x)
    with torch.no_grad():
        model(torch.randn(2, 5, 8))
    assert len(calls) == 5
    assert "evaluates without torch's fused operator" in str(report)


def test_parts_wrapped_for_ddp_are_refused(tmp_path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(nn.Sequential(nn.BatchNorm1d(3)))
        with pytest.raises(ValueError, match="convert the module inside before you wrap it"):
            to_bln(nn.Sequential(wrapped))
        group = torch.distributed.new_group([0])
        with pytest.raises(ValueError, match="0 is a SyncBatchNorm with a process group of its own"):
            to_bln(nn.Sequential(nn.SyncBatchNorm(3, process_group=group)))
    finally:
        torch.distributed.destroy_process_group()


def test_a_user_attribute_of_a_model_is_no_business_of_the_conversion() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3)).eval()
    model.tag = "mine"
    handle = model.register_forward_hook(lambda *_: None)
    assert to_bln(model) is model
    assert model.tag == "mine"
    assert not model.training
    handle.remove()
