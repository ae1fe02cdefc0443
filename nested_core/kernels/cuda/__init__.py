"""CUDA kernels (*.cu) and the functions that launch them, each beside its formula in MLX.

kernel_launch.py compiles and starts a kernel; self_check.py compares it with its formula before
its first use. gated_mlp.py, lora_add.py, lora_matmuls.py and concatenate.py are the functions that
several layers share.
"""
