"""Batch Layer Normalization and normalised recurrent networks for PyTorch and Lightning."""
