"""The paper's networks, a sequence classifier and a language model."""

from lightning_bln.models.paper import (
    AUTHORS_THRESHOLD,
    PAPER_NORMS,
    Classifier,
    KerasAdam,
    KerasLSTM,
    PaperCIFAR10,
    PaperCNN,
    PaperIMDB,
    PaperLSTM,
    paper_norm,
)
from lightning_bln.models.recurrent import LanguageModel, RecurrentNetwork, SequenceClassifier

__all__ = [
    "AUTHORS_THRESHOLD",
    "PAPER_NORMS",
    "Classifier",
    "KerasAdam",
    "KerasLSTM",
    "LanguageModel",
    "PaperCIFAR10",
    "PaperCNN",
    "PaperIMDB",
    "PaperLSTM",
    "RecurrentNetwork",
    "SequenceClassifier",
    "paper_norm",
]
