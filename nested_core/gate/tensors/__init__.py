"""What the tensors of adapters say: differences, LoRA products, and whether they fit a base.

tensor_diff.py compares tensor by tensor, lora_effect.py the low-rank products, adapter_layout.py
says which tensors a configuration calls for, and base_compatibility.py whether these are there.
"""
