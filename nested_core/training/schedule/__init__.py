"""Which batch, evaluation and report belong to a step: our own order, and that of mlx_lm.lora.

step_schedule.py is our own, and what a schedule says; mlx_lm_batch_schedule.py is mlx_lm.lora's.
"""
