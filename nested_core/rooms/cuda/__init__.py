"""CUDA: kernels of our own for training on NVIDIA's GPUs.

Each kernel (*.cu) is launched by a function beside its formula in MLX's operations.
kernel_launch.py compiles and starts one. gated_mlp.py, lora_add.py, lora_matmuls.py and
concatenate.py are what several layers share; fused_mlp.py, padded_attention.py, rms_norm.py,
rope.py, swiglu.py and gated_delta_kernels.py are for one kind of layer; operations.py is what the
core asks.
"""
