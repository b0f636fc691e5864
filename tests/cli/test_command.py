"""The ``bln`` command's own parser."""

from __future__ import annotations

import pytest

from lightning_bln import cli


def test_help_lists_the_commands(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    for command in ("demo", *cli.LIGHTNING):
        assert command in printed
