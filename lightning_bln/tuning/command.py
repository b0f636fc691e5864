"""The ``bln tune`` command."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def run(*, config: Path | None, engine: str, address: str | None, **options: Any) -> None:
    """Run the search on the engine that the command line names."""
    if engine == "optuna":
        if address is not None:
            raise SystemExit(f"--address={address} is for --engine ray; Optuna shares work through --storage")
        from lightning_bln.tuning.study import tune

        tune(config, **options)
        return
    unused = [f"--{name}" for name, default in (("storage", None), ("heartbeat", 30)) if options.pop(name) != default]
    if unused:
        raise SystemExit(f"{', '.join(unused)} is for --engine optuna; Ray keeps its own records under --output")
    from lightning_bln.tuning.ray_engine import tune_on_ray

    tune_on_ray(config, address=address, **options)
