"""What is computed otherwise than by mlx-lm's layers, on any device.

optimized_model.using_optimized_layers installs it in a model during a block: quantized layers that
multiply by dequantized weights, and what rooms have for a device or a kind of layer.
device_operations.py loads the kernels of the room `cuda`, self_check.py compares a kernel with its
formula, and patching.py replaces calls.
"""
