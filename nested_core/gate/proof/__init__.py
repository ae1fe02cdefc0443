"""The proof: a new process that loads base and adapter with plain mlx_lm and sees the change."""
