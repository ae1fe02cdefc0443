"""Kernels of our own for CUDA, each beside the same formula in MLX's operations."""
