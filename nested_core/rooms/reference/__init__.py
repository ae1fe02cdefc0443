"""`training.reference: mlx_lm`: training that does what mlx_lm.lora does, bit for bit.

refused_keys.py names the keys that it cannot be given with. mlx_lm_schedule.py has its batches and
its loss, mlx_lm_trainer.py reports, evaluates and draws random numbers when it does.
"""
