"""Which batch, evaluation and report belong to a step: our own order, and that of mlx_lm.lora."""
