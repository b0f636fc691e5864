"""The classifier and the language model on in-cell normalised layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_bln.data import LanguageData, pad_batch
from lightning_bln.models import LanguageModel, RecurrentNetwork, SequenceClassifier

from .paper.test_modules import quiet


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("norm", ["bln", "layer", "batch", None])
def test_padding_changes_nothing(norm: str | None, bidirectional: bool) -> None:
    network = RecurrentNetwork(20, 3, 8, embedding=4, norm=norm, bidirectional=bidirectional)
    tokens, lengths = torch.randint(1, 20, (5, 6)), torch.tensor([6, 2, 4, 1, 6])
    longer = torch.cat([tokens, torch.randint(1, 20, (5, 3))], 1)
    torch.testing.assert_close(network(tokens, lengths), network(longer, lengths))


def test_classifier_learns_from_padded_texts(tmp_path: Path) -> None:
    samples = [(torch.randint(2 + 4 * (n % 2), 6 + 4 * (n % 2), (1 + n % 6,)), n % 2) for n in range(40)]
    loader: Any = DataLoader(samples, batch_size=10, collate_fn=pad_batch)  # type: ignore[arg-type]
    model = SequenceClassifier(10, 2, 8, embedding=4, learning_rate=0.05)
    trainer = quiet(tmp_path, max_epochs=15, enable_checkpointing=False)
    trainer.fit(model, loader, loader)
    assert float(trainer.callback_metrics["train_acc"]) > 0.9
    assert {"val_loss", "val_acc"} <= set(trainer.callback_metrics)


def test_classifier_takes_rows_of_pixels(tmp_path: Path) -> None:
    data = TensorDataset(torch.rand(12, 28, 28), torch.arange(12) % 10)
    trainer = quiet(tmp_path, max_epochs=1, enable_checkpointing=False)
    trainer.fit(SequenceClassifier(28, 10, 8, cell="gru"), DataLoader(data, 4), DataLoader(data, 4))
    assert torch.isfinite(trainer.callback_metrics["val_loss"])


def test_language_model_equals_one_long_pass_when_the_state_is_carried() -> None:
    model = LanguageModel(10, hidden_size=8, embedding=4, norm="layer").eval()
    tokens = torch.randint(0, 10, (3, 12))
    whole, _ = model(tokens)
    first, state = model(tokens[:, :5])
    second, _ = model(tokens[:, 5:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)


def test_language_model_carries_its_state_over_batches_not_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "text.txt"
    path.write_text("abcde" * 40)
    data = LanguageData(path, validation=path, level="character", batch_size=4, window=10)
    model = LanguageModel(6, hidden_size=16, embedding=8, learning_rate=0.02, norm="bln")
    seen: list[tuple[bool, bool]] = []
    forward = model.forward

    def spy(tokens: torch.Tensor, state: Any = None) -> Any:
        seen.append((model.training, state is None))
        return forward(tokens, state)

    monkeypatch.setattr(model, "forward", spy)
    trainer = quiet(tmp_path, max_epochs=12, enable_checkpointing=False, num_sanity_val_steps=0)
    trainer.fit(model, data)
    batches = len(data.train_dataloader())
    epoch = [(True, True), *[(True, False)] * (batches - 1), (False, True), *[(False, False)] * (batches - 1)]
    assert seen == epoch * 12
    metrics = trainer.callback_metrics
    assert float(metrics["train_perplexity"]) == pytest.approx(float(torch.exp(metrics["train_loss"])), rel=1e-4)
    assert float(metrics["train_perplexity"]) < 3.0
