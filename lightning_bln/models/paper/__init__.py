"""The paper's two networks as torch and Lightning modules, and the parts of Keras they are made of."""

from lightning_bln.models.paper.keras import KerasAdam, KerasLSTM
from lightning_bln.models.paper.modules import AUTHORS_THRESHOLD, Classifier, PaperCIFAR10, PaperIMDB
from lightning_bln.models.paper.networks import PAPER_NORMS, PaperCNN, PaperLSTM, paper_norm

__all__ = [
    "AUTHORS_THRESHOLD",
    "PAPER_NORMS",
    "Classifier",
    "KerasAdam",
    "KerasLSTM",
    "PaperCIFAR10",
    "PaperCNN",
    "PaperIMDB",
    "PaperLSTM",
    "paper_norm",
]
