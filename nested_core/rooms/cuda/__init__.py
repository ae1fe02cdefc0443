"""CUDA: layers and kernels of our own for training on NVIDIA's GPUs.

lora_linear.py has LoRA and DoRA layers with a backward pass of their own, call_tracing.py finds
those that can be computed together, geglu.py and blocked_attention.py need no kernel of ours. Each
kernel (*.cu) is launched by a function beside its formula in MLX's operations.
kernel_launch.py compiles and starts one. gated_mlp.py, lora_add.py, lora_matmuls.py and
concatenate.py are what several layers share; fused_mlp.py, padded_attention.py, rms_norm.py,
rope.py, swiglu.py and gated_delta_kernels.py are for one kind of layer; operations.py is what the
core asks, and installs all of it in a model.
"""
