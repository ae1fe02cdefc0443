"""CUDA kernels (*.cu) and the functions that launch them, each beside its formula in MLX.

`kernel_launch` compiles and starts a kernel; `self_check` compares it with its formula before
its first use.
"""
