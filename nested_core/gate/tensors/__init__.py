"""Compares adapters by their tensors: differences, LoRA products, and whether they fit a base.

tensor_diff.py compares tensor by tensor, lora_effect.py the low-rank products, and
base_compatibility.py checks whether an adapter is for a base.
"""
