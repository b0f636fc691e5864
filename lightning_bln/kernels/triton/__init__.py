"""Kernels in Triton, for GPUs and for Triton's interpreter; nothing here imports Triton before a kernel is called."""
