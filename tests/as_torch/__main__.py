"""Run every way on every layer and write the page: ``python -m tests.as_torch``."""

from __future__ import annotations

import logging
import sys
import time

import torch

from tests.as_torch.layers import LAYERS
from tests.as_torch.outcomes import outcome
from tests.as_torch.page import PAGE, write
from tests.as_torch.torch_layers import TORCH_LAYERS
from tests.as_torch.ways import WAYS


def main() -> int:
    """Write the page; the number of its failures on layers of this package."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    found = {}
    for way in WAYS.values():
        start = time.process_time()
        for name, cases in LAYERS.items():
            found[way.name, name] = outcome(way, cases)
        ours = time.process_time()
        for name, cases in TORCH_LAYERS.items():
            found[way.name, name] = outcome(way, cases, has_errors=False)
        print(f"{way.name}: {ours - start:.1f} s, torch's layers {time.process_time() - ours:.1f} s", flush=True)
    write(found)
    own = {key: value for key, value in found.items() if key[1] in LAYERS}
    for (way_name, layer), value in own.items():
        for failure in value.failures:
            print(f"{way_name}, {layer}: {failure[:300]}")
    right, documented = sum(v.right for v in own.values()), sum(v.documented for v in own.values())
    failing = sum(len(v.failures) for v in own.values())
    cells = [value.text for value in own.values() if value.text]
    print(f"{len(cells)} cells of {PAGE.name}: {sum(text == 'no' for text in cells)} fail")
    print(f"{right + documented + failing} cases: {right} right, {documented} documented, {failing} failing")
    return min(failing, 1)


sys.exit(main())
