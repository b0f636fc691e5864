"""Names of the cells."""

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


class Registry(Mapping[str, type[Cell]]):
    """Cells by the name of their class in lower case; a cell's file is imported when it is first asked for.

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
    """A cell by its name in the registry, or of a class of one's own.

    Example:
        >>> build("rnn", nonlinearity="relu").nonlinearity
        'relu'
    """
    if isinstance(cell, type) and issubclass(cell, Cell):
        return cell(**options)
    if cell not in registry:
        raise ValueError(f"cell={cell!r}, but the registry has {', '.join(registry)}; pass one, or a subclass of Cell")
    return registry[cell](**options)
