"""The layer against numbers that the authors' own code computed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_bln import ALL_MODES, BatchLayerNorm, batch_layer_norm, freeze_population

FOLDER = Path(__file__).parent / "golden"
FILES = ("dense_b1_d16", "dense_b25_d12", "dense_b2_d3", "image_b6_h4_w3_c5", "sequence_b5_t7_d8")
TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}


@pytest.fixture(params=FILES)
def golden(request: pytest.FixtureRequest) -> dict[str, Tensor]:
    with np.load(FOLDER / f"{request.param}.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def layer_of(golden: dict[str, Tensor], **options: object) -> BatchLayerNorm:
    layer = BatchLayerNorm(len(golden["gamma"]), **options)
    with torch.no_grad():
        layer.weight.copy_(golden["gamma"])
        layer.bias.copy_(golden["beta"])
    return layer


def golden_name(mode: str) -> str:
    return "eval_" + mode.translate(str.maketrans("pc", "10"))


def test_training_outputs_and_gradients_equal_the_authors(golden: dict[str, Tensor]) -> None:
    layer = layer_of(golden)
    for i, x in enumerate(golden["train_inputs"]):
        x = x.clone().requires_grad_()
        y = layer(x)
        y.backward(golden["upstream"][i])
        torch.testing.assert_close(y, golden["train_outputs"][i], **TOLERANCE)
        torch.testing.assert_close(x.grad, golden["grad_input"][i], **TOLERANCE)
        torch.testing.assert_close(layer.weight.grad, golden["grad_gamma"][i], **TOLERANCE)
        torch.testing.assert_close(layer.bias.grad, golden["grad_beta"][i], **TOLERANCE)
        layer.zero_grad()


def test_paper_population_equals_the_authors(golden: dict[str, Tensor]) -> None:
    layer = layer_of(golden, population="paper")
    for x in golden["train_inputs"]:
        layer(x)
    freeze_population(layer)
    population = layer.population
    one_sample = golden["train_inputs"].shape[1] == 1
    expected = {
        "batch_mean": golden["pop_batch_mean"].flatten(0, -1),
        "feature_mean": golden["pop_feature_mean"].mean(0).flatten(),
        "batch_var": golden["pop_batch_var"].flatten(0, -1),
        "feature_var": golden["pop_feature_var"].mean(0).flatten(),
    }
    for name, value in expected.items():
        ours = getattr(population, name)
        assert ours.isfinite().all()
        if not (one_sample and name.endswith("var")):
            torch.testing.assert_close(ours.flatten(), value, **TOLERANCE)
    assert (population.batch_size == golden["train_inputs"].shape[1]).all()


@pytest.mark.parametrize("mode", ALL_MODES)
def test_inference_outputs_equal_the_authors(golden: dict[str, Tensor], mode: str) -> None:
    names = ("batch_mean", "batch_var", "feature_mean", "feature_var")
    given = {name: golden[f"pop_{name}"] for name, letter in zip(names, mode, strict=True) if letter == "p"}
    y = batch_layer_norm(golden["eval_input"], golden["gamma"], golden["beta"], **given)
    expected = golden[golden_name(mode)]
    known = expected.isfinite()
    torch.testing.assert_close(y[known], expected[known], **TOLERANCE)


@pytest.mark.parametrize("mode", ALL_MODES)
def test_a_layer_trained_on_the_authors_batches_is_finite_in_every_mode(golden: dict[str, Tensor], mode: str) -> None:
    layer = layer_of(golden, population="paper")
    for x in golden["train_inputs"]:
        layer(x)
    freeze_population(layer)
    layer.eval().mode = mode
    y = layer(golden["eval_input"])
    assert y.isfinite().all()
    if mode[2:] == "cc":  # the authors average feature statistics by batch slot, we over samples
        expected = golden[golden_name(mode)]
        known = expected.isfinite()
        torch.testing.assert_close(y[known], expected[known], **TOLERANCE)
