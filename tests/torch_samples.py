"""Sample inputs and errors of torch's own test-suite: private names of torch, in this one file.

Importing it raises ImportError where torch has none, or where expecttest, which they need, is not installed.
"""

from __future__ import annotations

from unittest import mock

import torch

with mock.patch.object(torch.backends, "disable_global_flags"):  # which would bind every other test of the process
    from torch.testing._internal.common_modules import ModuleErrorEnum, module_db
    from torch.testing._internal.common_utils import noncontiguous_like

__all__ = ["ModuleErrorEnum", "module_db", "noncontiguous_like"]
