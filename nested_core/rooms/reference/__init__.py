"""`training.reference: mlx_lm`: training that does what mlx_lm.lora does, bit for bit.

mlx_lm_schedule.py has its batches and its loss, mlx_lm_trainer.py reports, evaluates and draws
random numbers when it does.
"""
