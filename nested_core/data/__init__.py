"""Data sets: read by line, judged whole, tokenised as mlx-lm does, batched without state.

Nothing is imported here, so that naming one module does not load pandera, polars or mlx.
"""
