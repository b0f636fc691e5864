"""The table of cells, the command that prints it, and the page that explains it."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from lightning_bln import Recurrent, cli, recompute_population
from lightning_bln.cells import registry
from lightning_bln.cli.cells_table import entries

PAGE = (Path(__file__).parents[2] / "docs" / "cells.md").read_text()


def test_every_cell_has_its_states_parameters_and_source() -> None:
    found = {entry.name: entry for entry in entries(3, 4)}
    assert set(found) == set(registry)
    assert found["lstm"].parameters == sum(p.numel() for p in torch.nn.LSTM(3, 4).parameters())
    for name, entry in found.items():
        assert entry.parameters > 0
        assert re.search(r"(19|20)\d\d", entry.source), name


def test_the_command_prints_them(capsys) -> None:
    cli.main(["cells", "--hidden-size", "4"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in registry)


def test_the_page_lists_them_and_its_own_cell_gets_all_of_the_layer() -> None:
    listed = re.findall(r"^\| `(\w+)` \| ([\w, ]+) \| (.+) \|$", PAGE.partition("## Which there are")[2], re.M)
    assert [(e.name, ", ".join(e.states), e.source) for e in entries()] == listed
    found: dict = {}
    exec(re.search(r"```python\n(.+?)```", PAGE, re.S)[1], found)
    cell = found["MyUnit"]
    assert found["output"].shape == (10, 4, 256)
    ours, registered = Recurrent(cell, 3, 4, norm=None), Recurrent("mgu", 3, 4, norm=None)
    ours.load_state_dict(registered.state_dict())
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(ours(x)[0], registered(x)[0])
    layer = Recurrent(cell, 3, 4, norm="bln", recurrent_dropout=0.2)
    output, _ = layer(torch.nn.utils.rnn.pack_sequence([torch.randn(n, 3) for n in (5, 2)]))
    output.data.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    recompute_population(layer, [x])
    layer.eval().mode = "pppp"
    torch.testing.assert_close(layer(x)[0][:, :1], layer(x[:, :1])[0])
