"""Entry point of ``python -m lightning_bln.cli``."""

from lightning_bln.cli.command import main

main()
