"""Recurrences as persistent Triton kernels, generated from a cell's recorded step."""
