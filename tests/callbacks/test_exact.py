"""The table of the callback is that of sixteen plain validations, whatever a module does."""

from __future__ import annotations

import exact_batch
import exact_modules
import exact_python
import pytest


@pytest.mark.parametrize("name", exact_batch.MODULES)
def test_operations_along_the_batch(name: str) -> None:
    exact_modules.assert_exact(exact_batch.MODULES[name])


@pytest.mark.parametrize("name", exact_python.MODULES)
def test_decisions_in_python_and_foreign_code(name: str) -> None:
    exact_modules.assert_exact(exact_python.MODULES[name])
