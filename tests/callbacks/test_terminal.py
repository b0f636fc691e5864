"""On a real terminal sentences, bars and table stand in lines of their own."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")

if sys.platform != "win32":
    import terminal

SAYS = (
    "BLNStatsCallback chooses no mode: .* each batch's own statistics are used; call fit first",
    "BLNStatsCallback evaluates modes one after the other: __float__ gives [^ ]+ in one mode and [^ ]+ in another",
    "[pc]ccc has the best val_loss .* is set, which does not depend on the batch",
    "Says resumes in statistics mode ppcc",
    "BLNStatsCallback did not check whether [pc]ccc depends on .* a batch holds a str beside its tensors",
    "BLNStatsCallback could not write its result to save_dir='/dev/null/folder'",
)
OURS = re.compile(r"BLNStatsCallback (chooses|evaluates|did)|has the best|Says resumes|save_dir=")
BAR = re.compile(r"it/s|━ |\d+%\|")
SWEEP = re.compile(r"3 modes|Regrouped batches|Population")
TABLE = ("┏", "┃", "┡", "│", "└")


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("bar", ["tqdm", "rich"])
def test_nothing_tears_or_covers_anything(tmp_path: Path, bar: str, width: int) -> None:
    script = str(Path(__file__).with_name("bars_run.py"))
    lines = terminal.run(["-W", "ignore:.*LeafSpec", script, bar], width, tmp_path)
    screen = "\n".join(lines)
    # where lines are wrapped, by rich at spaces and by the terminal anywhere
    joined = [" ".join(" ".join(lines).split()), "".join(line.ljust(width) for line in lines)]
    for words in SAYS:
        assert any(re.search(words, text) for text in joined), f"{words}\n{screen}"
    assert {"In training.", "In validation."} <= set(lines), screen
    assert not [line for line in lines if OURS.search(line) and BAR.search(line)], screen
    assert not [line for line in lines if SWEEP.search(line) and BAR.search(line)], screen
    # two tables of three modes, with a frame and a header
    table = [line for line in lines if line.startswith(TABLE)]
    assert len(table) == 2 * 7, screen
    assert max(map(len, table)) <= width
    assert all(len({len(line) for line in one}) == 1 for one in (table[:7], table[7:])), screen
    assert "Not shown: another_metric_" in screen
