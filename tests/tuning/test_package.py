"""The package where optuna is not installed."""

from __future__ import annotations

import subprocess
import sys


def test_a_name_that_needs_optuna_names_the_extra_without_it() -> None:
    code = """
import sys
sys.modules["optuna"] = None
from lightning_bln.tuning import *
try:
    from lightning_bln.tuning import Objective
except ImportError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'lightning-bln[optuna]'" in run.stdout, run.stderr
