"""Layers and operations that compute the same as mlx-lm's, faster, on CUDA and on CPUs.

optimized_model.using_optimized_layers installs all of them in a model during a block. Each file is
one layer or operation, such as lora_linear.py and geglu.py. call_tracing.py finds LoRA layers that
can be computed together; patching.py replaces calls. device_operations.py loads the kernels of the
room `cuda`, and self_check.py compares a kernel with its formula.
"""
