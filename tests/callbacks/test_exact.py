"""The table of the callback is that of sixteen plain validations, whatever a module does."""

from __future__ import annotations

import warnings

import exact_batch
import exact_data
import exact_layers
import exact_modules
import exact_networks
import exact_python
import exact_state
import pytest

pytestmark = pytest.mark.exact


@pytest.mark.parametrize("name", exact_batch.MODULES)
def test_operations_along_the_batch(name: str) -> None:
    exact_modules.assert_exact(exact_batch.MODULES[name])


@pytest.mark.parametrize("name", exact_python.MODULES)
def test_decisions_in_python_and_foreign_code(name: str) -> None:
    exact_modules.assert_exact(exact_python.MODULES[name])


@pytest.mark.parametrize("name", exact_state.MODULES)
def test_what_is_written_kept_and_drawn(name: str) -> None:
    exact_modules.assert_exact(exact_state.MODULES[name])


@pytest.mark.parametrize("name", exact_layers.MODULES)
def test_layers_that_are_hooked_and_changed(name: str) -> None:
    exact_modules.assert_exact(exact_layers.MODULES[name])


@pytest.mark.parametrize("name", exact_layers.WITH_GRADIENTS)
def test_gradients_within_a_step(name: str) -> None:
    exact_modules.assert_exact(exact_layers.WITH_GRADIENTS[name], inference_mode=False)


@pytest.mark.parametrize("name", exact_data.FORMS)
def test_batches_of_every_form(name: str) -> None:
    make, data = exact_data.FORMS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exact_modules.assert_exact(make, data, train=data)


@pytest.mark.parametrize("name", exact_data.LOADERS)
def test_loaders(name: str) -> None:
    make, data, train, monitor = exact_data.LOADERS[name]
    exact_modules.assert_exact(make, data, train=train, monitor=monitor)


@pytest.mark.parametrize("name", exact_data.LOGGING)
def test_ways_to_log(name: str) -> None:
    exact_modules.assert_exact(exact_data.LOGGING[name])


def test_a_monitor_that_is_logged_at_the_end() -> None:
    # the hook runs once for each mode, so that it is called more often
    exact_modules.assert_exact(exact_data.LogsAtTheEnd, monitor="end_loss", counts=False)


@pytest.mark.parametrize("name", exact_networks.MODULES)
def test_networks_of_every_kind(name: str) -> None:
    exact_modules.assert_exact(exact_networks.MODULES[name])


TRAINERS = {
    "bfloat16": {"precision": "bf16-true", "tolerance": 0.1},  # sums of 60 numbers of eight bits
    "autocast": {"precision": "bf16-mixed", "tolerance": 0.02},
    "float64": {"precision": "64-true"},
    "without inference mode": {"inference_mode": False},
    "some batches": {"limit_val_batches": 2},
    "twice an epoch": {"val_check_interval": 0.5},
    "sanity check": {"num_sanity_val_steps": 2},
    "accumulated gradients": {"accumulate_grad_batches": 3},
    "three epochs": {"max_epochs": 3},
    "anomalies": {"detect_anomaly": True},
    "every second epoch": {"check_val_every_n_epoch": 2, "max_epochs": 4},
}
HOSTILE = {
    "centred": exact_batch.MODULES["centred"],
    "in some epochs": exact_python.MODULES["in some epochs"],
    "containers": exact_state.MODULES["containers"],
    "BLNLSTM that goes on": exact_networks.MODULES["BLNLSTM that goes on"],
}


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("name", HOSTILE)
def test_trainers(name: str, trainer: str) -> None:
    exact_modules.assert_exact(HOSTILE[name], **TRAINERS[trainer])
