"""Layers and operations that compute what mlx-lm's do, faster, on CUDA and on CPUs.

optimized_model.using_optimized_layers installs all of them in a model while a block runs. Each
file is one layer or operation, such as lora_linear.py and geglu.py. call_tracing.py finds
LoRA layers that can be computed together, patching.py replaces calls. device_operations.py asks
the room `cuda` for kernels, and self_check.py compares a kernel with its formula.
"""
