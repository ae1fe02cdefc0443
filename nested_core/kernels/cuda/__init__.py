"""CUDA kernels (*.cu) and the functions that launch them, each beside its formula in MLX.

`launch` compiles and starts a kernel; `self_check` compares it with its formula before it is used.
"""
