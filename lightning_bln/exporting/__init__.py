"""Files of trained models that run without this package, each compared with its model before it is kept."""

from lightning_bln.exporting.calls import Call
from lightning_bln.exporting.errors import ExportError
from lightning_bln.exporting.export import Exported, export

__all__ = ["Call", "ExportError", "Exported", "export"]
