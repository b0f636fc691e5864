"""The models under the callback that picks a statistics mode."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_bln.callbacks import BLNStatsCallback
from lightning_bln.data import LanguageData, TextData
from lightning_bln.models import LanguageModel, PaperCIFAR10, SequenceClassifier
from lightning_bln.modes import ALL_MODES, mode_layers

from .paper.test_modules import quiet, small_imdb, tokens_loader


def fitted(tmp_path: Path, model: torch.nn.Module, *data: object) -> BLNStatsCallback:
    callback = BLNStatsCallback(recompute_batches=4, verbose=False)
    trainer = quiet(tmp_path, max_epochs=2, enable_checkpointing=False, callbacks=[callback], num_sanity_val_steps=0)
    trainer.fit(model, *data)  # type: ignore[arg-type]
    assert callback.result is not None
    assert {layer.mode for layer in mode_layers(model)} <= set(ALL_MODES)
    return callback


def test_paper_networks(tmp_path: Path) -> None:
    fitted(tmp_path, small_imdb(), tokens_loader(), tokens_loader())
    images = DataLoader(TensorDataset(torch.randn(10, 3, 32, 32), torch.arange(10)), 5)
    fitted(tmp_path, PaperCIFAR10(), images, images)


def test_padded_texts(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    rows = [{"text": " ".join(["good", "bad"][n % 2 : n % 2 + 1] * (1 + n % 5)), "label": n % 2} for n in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)))
    data = TextData(path, batch_size=8, validation=0.4)
    data.setup()
    fitted(tmp_path, SequenceClassifier(10, 2, 6, embedding=4), data)


@pytest.mark.parametrize("norm", ["bln", "batch"])
def test_language_model(tmp_path: Path, norm: str) -> None:
    path = tmp_path / "text.txt"
    path.write_text("abcde" * 40)
    data = LanguageData(path, validation=path, level="character", batch_size=4, window=10)
    fitted(tmp_path, LanguageModel(6, hidden_size=6, embedding=4, norm=norm), data)
