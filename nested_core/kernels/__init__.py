"""Layers and operations that compute what mlx-lm's do, faster, on CUDA and on CPUs.

`apply.optimized_layers` installs all of them in a model for the time of a block. Each file is one
layer or operation; `tracing` finds LoRA layers that can be computed together, `patching` replaces
calls, and `cuda` has our kernels, each beside the same formula in MLX's operations.
"""
