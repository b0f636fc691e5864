"""Calls of the fused kernels whose arguments are kept while no tensor's place and no option of the layer changes."""
