"""Registry of the cells by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

from lightning_bln.cells.cell import Cell

MODULES = {
    "antisymmetric": "AntisymmetricRNN GatedAntisymmetricRNN",
    "atr": "ATR",
    "bistable": "BR NBR",
    "cfn": "CFN",
    "cornn": "CoRNN",
    "fast": "FastGRNN FastRNN",
    "gru": "GRU",
    "indrnn": "IndRNN",
    "intersection": "IntersectionRNN",
    "janet": "JANET",
    "lem": "LEM",
    "lightru": "LightRU",
    "ligru": "LiGRU",
    "lstm": "LSTM",
    "lstm_variants": "CoupledLSTM OriginalLSTM PeepholeLSTM ResLSTM WMCLSTM",
    "mclstm": "MCLSTM",
    "mgu": "MGU",
    "minimal": "MinGRU MinLSTM",
    "minimalrnn": "MinimalRNN",
    "miru": "MiRU1 MiRU2",
    "mlstm": "MultiplicativeLSTM",
    "mut": "MUT1 MUT2 MUT3",
    "nas": "NAS",
    "ran": "RAN",
    "rhn": "RHN",
    "rnn": "RNN",
    "scrn": "SCRN",
    "sgrn": "SGRN",
    "sgu": "DSGU SGU",
    "slstm": "SLSTM",
    "sru": "SRU",
    "star": "STAR",
    "taugru": "TauGRU",
    "typed": "QRNN TGRU TLSTM TRNN",
    "ugrnn": "UGRNN",
    "unicornn": "UnICORNN",
}
"""Classes of each file of this package; a new cell needs its file, and its name here."""


class Registry(Mapping[str, type[Cell]]):
    """Cells by the name of their class in lower case; a cell's file is imported on first use.

    Example:
        >>> registry["mgu"]
        <class 'lightning_bln.cells.mgu.MGU'>
    """

    def __init__(self, modules: Mapping[str, str]) -> None:
        found = ((cls, module) for module, classes in modules.items() for cls in classes.split())
        self._where = {cls.lower(): (module, cls) for cls, module in sorted(found, key=lambda pair: pair[0].lower())}

    def __getitem__(self, name: str) -> type[Cell]:
        module, cls = self._where[name]
        return getattr(import_module(f"lightning_bln.cells.{module}"), cls)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, name: object) -> bool:
        return name in self._where


registry = Registry(MODULES)


def build(cell: str | type[Cell], **options: Any) -> Cell:
    """An instance of a cell.

    Args:
        cell: A name in the registry, or a subclass of :class:`Cell`.
        **options: Options of the cell.

    Raises:
        ValueError: ``cell`` is neither, or has no such option.

    Example:
        >>> build("rnn", nonlinearity="relu").nonlinearity
        'relu'
    """
    if isinstance(cell, type) and issubclass(cell, Cell):
        return cell(**options)
    if not isinstance(cell, str) or cell not in registry:
        raise ValueError(f"cell={cell!r}, but the registry has {', '.join(registry)}; pass one, or a subclass of Cell")
    return registry[cell](**options)
