"""The paper's networks, a sequence classifier and a language model."""

from lightning_bln.models import paper
from lightning_bln.models.paper import *  # noqa: F403
from lightning_bln.models.recurrent import LanguageModel, RecurrentNetwork, SequenceClassifier

__all__ = ["LanguageModel", "RecurrentNetwork", "SequenceClassifier"]
__all__ += paper.__all__
