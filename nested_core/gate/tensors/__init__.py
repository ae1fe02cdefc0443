"""What the tensors of adapters say: differences, LoRA products, and whether they fit a base."""
